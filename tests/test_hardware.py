"""What a server of whom nothing was asked gets on GPUs that are not there."""

import os
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import sglang.srt.models
import torch
from sglang.srt import platforms
from sglang.srt.arg_groups import memory_hook, model_override_base, overrides, resolution_hooks
from sglang.srt.arg_groups.attention_hook import handle_attention_backend_compatibility
from sglang.srt.arg_groups.model_overrides import qwen3_vl
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.runtime_context import override_platform
from sglang.srt.server_args import ServerArgs
from transformers import Qwen3VLConfig

from sglang_vlkv.options import arguments
from sglang_vlkv.options.backends import ATTENTION, BACKENDS
from sglang_vlkv.options.refusals import refuse

GPUS = {  # compute capability, MiB
    "A100": (80, 80 * 1024),
    "H100": (90, 80 * 1024),
    "H200": (90, 140 * 1024),
    "B200": (100, 180 * 1024),
}

EXPECTED = {"A100": "flashinfer", "H100": "fa3", "H200": "fa3", "B200": "triton"}


@cache
def architectures() -> list[str]:
    """All that have overrides by name, and all models, for those that match a predicate."""
    models = Path(sglang.srt.models.__path__[0]).rglob("*.py")
    classes = {name for path in models for name in re.findall(r"^class (\w+)\(", path.read_text(), re.M)}
    return sorted(classes | set(model_override_base._MODEL_OVERRIDE_FNS))


class Lenient(SimpleNamespace):
    """A configuration that says None to whatever else is asked of it."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)


@pytest.fixture(params=GPUS)
def gpu(request, monkeypatch):
    sm, memory = GPUS[request.param]
    monkeypatch.setattr(model_override_base, "current_platform", SimpleNamespace(is_out_of_tree=bool))
    monkeypatch.setattr(qwen3_vl, "is_sm90_supported", lambda: sm == 90)
    for module in (qwen3_vl, memory_hook):
        monkeypatch.setattr(module, "get_device_memory_capacity", lambda device=None: memory)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: divmod(sm, 10))
    facts = dict.fromkeys(("is_hip", "is_npu", "is_xpu", "is_musa", "is_mps", "is_sm110", "is_sm120"), False)
    facts |= dict(
        is_cuda=True,
        device_sm=sm,
        has_flashinfer=True,
        is_sm90=sm == 90,
        is_sm100=sm == 100,
        is_sm100_or_sm110=sm == 100,
        is_blackwell=sm == 100,
        is_hopper_with_cuda_12_3=sm == 90,
    )
    with override_platform(**facts):
        yield request.param


@pytest.fixture
def qwen3_vl_start(gpu, monkeypatch, tmp_path):
    """Resolves a server's arguments for a Qwen3-VL, as a start does."""
    config = Qwen3VLConfig(architectures=["Qwen3VLForConditionalGeneration"], dtype="bfloat16")
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(resolution_hooks, "_HOOKS", {})
    arguments.register_resolution()
    platform = dict(is_out_of_tree=bool, device_name="cuda", apply_server_args_defaults=lambda args: None)
    monkeypatch.setattr(platforms, "current_platform", SimpleNamespace(**platform))
    before = dict(os.environ)

    def start(policy: str = "vlcache", kv_budget: float = 0.1, **typed) -> ServerArgs:
        args = ServerArgs(model_path=str(tmp_path), device="cuda", **typed)
        args.kv_policy, args.kv_budget = policy, kv_budget if policy != "none" else None
        args.resolve_once()
        return args

    yield start
    os.environ.clear()
    os.environ.update(before)


def resolved(architecture: str, typed: dict = {}, head_dim: int = 128) -> ServerArgs:
    """Arguments after all that names attention backends, for a model of plain attention."""
    hf_config = Lenient(architectures=[architecture], model_type="qwen3_vl", layer_types=[])
    hf_config.get_text_config = lambda: hf_config
    model = dict(is_multimodal=True, attention_arch=AttentionArch.MHA, is_generation=True, head_dim=head_dim)
    args = ServerArgs(model_path="none", device="cuda", tp_size=1, **typed)
    args.kv_policy, args._quantization_explicitly_unset = "vlcache", False
    args._model_config = Lenient(
        hf_config=hf_config, hf_text_config=hf_config, get_total_num_kv_heads=lambda: 8, **model
    )
    args._resolved_overrides = overrides.collect_model_override_declarations(architecture, args, hf_config)
    arguments._choose_attention_backend(args, handle_attention_backend_compatibility)
    overrides.run_post_process_pass(args, overrides._page_size_default)
    return args


def asked(message: str) -> str:
    return re.fullmatch(r"--kv-policy cannot serve (.+?): .+", message).group(1)


def test_of_whom_nothing_was_asked_no_flag_is_refused(gpu):
    """Every model that SGLang has defaults for, as far as attention backends and pages go."""
    refused = {}
    for architecture in architectures():
        args = resolved(architecture)
        cfg = resolving_view(args)
        try:
            refuse(args, args._model_config)
        except ValueError as error:
            refused[architecture] = asked(str(error))
        else:
            [backend] = {getattr(cfg, name) for name in BACKENDS}
            assert backend in ATTENTION["cuda"] and cfg.page_size == 1, architecture
    assert "DeepseekV4ForCausalLM" in refused and "MuseSparkForConditionalGeneration" in refused
    for architecture, what in refused.items():
        assert "--" not in what and not architecture.startswith("Qwen")


def test_qwen3_vl_starts(gpu, qwen3_vl_start):
    """The whole resolution. On Hopper SGLang has a decode backend for it, which nobody named."""
    args = qwen3_vl_start()
    named = [fields.get("decode_attention_backend") for _, fields in args._resolved_overrides]
    assert ("flashinfer" in named) == (gpu != "B200")
    cfg = resolving_view(args)
    assert {getattr(cfg, name) for name in BACKENDS} == {EXPECTED[gpu]} and cfg.page_size == 1


@pytest.mark.parametrize("field", BACKENDS)
@pytest.mark.parametrize("gpu", ["H100"], indirect=True)
def test_the_backend_that_is_named_serves_both_phases(gpu, field):
    for backend in ATTENTION["cuda"]:
        args = resolved("Qwen3VLForConditionalGeneration", {field: backend})
        refuse(args, args._model_config)
        assert {getattr(resolving_view(args), name) for name in BACKENDS} == {backend}


@pytest.mark.parametrize(
    "typed, what",
    [
        (dict(attention_backend="fa4"), "--attention-backend fa4"),
        (dict(prefill_attention_backend="fa4"), "--prefill-attention-backend fa4"),
        (dict(decode_attention_backend="trtllm_mha"), "--decode-attention-backend trtllm_mha"),
        (
            dict(attention_backend="triton", prefill_attention_backend="fa3"),
            "--prefill-attention-backend fa3 with --attention-backend triton",
        ),
        (
            dict(decode_attention_backend="triton", prefill_attention_backend="fa3"),
            "--prefill-attention-backend fa3 with --decode-attention-backend triton",
        ),
        (dict(page_size=16), "--page-size 16"),
    ],
    ids=str,
)
@pytest.mark.parametrize("gpu", ["H100"], indirect=True)
def test_only_flags_that_were_typed_are_refused(gpu, typed, what):
    args = resolved("Qwen3VLForConditionalGeneration", typed)
    with pytest.raises(ValueError) as raised:
        refuse(args, args._model_config)
    assert asked(str(raised.value)) == what


@pytest.mark.parametrize("gpu", ["H100"], indirect=True)
def test_heads_that_flashinfer_has_no_kernels_for(gpu):
    """Chosen, it gives way; named, however, it is refused by the flag that named it."""
    args = resolved("MossVLForConditionalGeneration", head_dim=80)
    assert {getattr(resolving_view(args), name) for name in BACKENDS} == {"triton"}
    args = resolved("LlavaForCausalLM", dict(prefill_attention_backend="flashinfer"), head_dim=80)
    with pytest.raises(ValueError, match="heads of 80 under --prefill-attention-backend flashinfer: "):
        refuse(args, args._model_config)


def captured(args: ServerArgs) -> tuple[int, list[int], float]:
    cfg = resolving_view(args)
    decode = cfg.cuda_graph_config.decode
    return decode.max_bs, decode.bs, cfg.mem_fraction_static


def test_larger_batches_are_captured_and_their_memory_counted(gpu, qwen3_vl_start):
    default, _, stock_fraction = captured(qwen3_vl_start("none"))
    most, sizes, fraction = captured(qwen3_vl_start())
    assert default in (256, 512) and most == max(sizes) == 1024
    assert fraction < stock_fraction


@pytest.mark.parametrize(
    "typed, most",
    [
        (dict(max_running_requests=300), 300),
        (dict(max_running_requests=100), 100),
        (dict(cuda_graph_max_bs_decode=64), 64),
        (dict(cuda_graph_bs_decode=[1, 512]), 512),
        (dict(cuda_graph_config={"decode": {"max_bs": 40}}), 40),
        (dict(mem_fraction_static=0.8), 256),
        (dict(kv_budget=0.4), 512),
        (dict(kv_budget=0.6), 256),
    ],
    ids=str,
)
@pytest.mark.parametrize("gpu", ["H100"], indirect=True)
def test_what_the_operator_says_of_captured_batches_stands(gpu, qwen3_vl_start, typed, most):
    assert captured(qwen3_vl_start(**typed))[0] == most


@pytest.mark.parametrize("gpu", ["H100"], indirect=True)
def test_without_decode_graphs_nothing_is_captured(gpu, qwen3_vl_start):
    typed = dict(disable_decode_cuda_graph=True)
    assert captured(qwen3_vl_start(**typed)) == captured(qwen3_vl_start("none", **typed))
