"""What cannot be served is refused before the model loads, and reports do not pile up."""

import argparse
import ast
import re
import weakref
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import sglang.srt.models
import torch
from sglang.srt.configs import FalconH1Config, Qwen3NextConfig
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.server_args import ServerArgs
from torch import nn
from transformers import Qwen2Config

from flashinfer_ext.decode import check_heads
from sglang_vlkv.attention.layers import unserved
from sglang_vlkv.frontend import reports
from sglang_vlkv.frontend.reports import ReportStore
from sglang_vlkv.options.asked import BEYOND_SOFTMAX, IGNORE_THEIR_WINDOW
from sglang_vlkv.options.backends import ATTENTION, RADIX_CACHE, takes
from sglang_vlkv.options.config import add_flags
from sglang_vlkv.options.refusals import refuse
from tests.serving import ROOT


class Arguments(SimpleNamespace):
    """SGLang's defaults, a few settings apart."""

    def __init__(self, **settings) -> None:
        defaults = ServerArgs(model_path="none")
        names = ServerArgs.__struct_fields__
        assert set(settings) <= set(names)
        super().__init__(**{name: getattr(defaults, name) for name in names} | settings)


def model(**settings) -> SimpleNamespace:
    """A model with grouped-query attention and 2 KV heads, a few settings apart."""
    defaults = dict(
        attention_arch=AttentionArch.MHA,
        hf_config=Qwen2Config(),
        hf_text_config=Qwen2Config(),
        linear_attn_registry_result=None,
        is_draft_model=False,
        is_hybrid_swa=False,
        attention_chunk_size=None,
        has_attention_sinks=False,
        has_asymmetric_kv=False,
        sliding_window_size=None,
        is_encoder_decoder=False,
        is_generation=True,
        head_dim=128,
        get_total_num_kv_heads=lambda: 2,
    )
    assert set(settings) <= set(defaults)
    return SimpleNamespace(**defaults | settings)


SERVABLE = dict(device="cpu", attention_backend="torch_native", page_size=1)

# settings, what the refusal says was asked, what it says to do
SERVERS = [
    (dict(attention_backend="fa3"), "--attention-backend fa3", "--attention-backend torch_native"),
    (dict(device="xpu"), "--device xpu", "NVIDIA GPUs"),
    (dict(device="cuda"), "--attention-backend torch_native", "--attention-backend fa3 or flashinfer or triton"),
    (
        dict(device="cuda", attention_backend="fa3", decode_attention_backend="triton"),
        "--attention-backend fa3 with --decode-attention-backend triton",
        "Use --attention-backend triton",
    ),
    (dict(decode_attention_backend="triton"), "--decode-attention-backend triton", "--decode-attention-backend torch_native"),
    (dict(prefill_attention_backend="flashinfer"), "--prefill-attention-backend flashinfer", "--prefill-attention-backend torch_native"),
    (dict(page_size=16), "--page-size 16", "--page-size 1"),
    (dict(speculative_algorithm="EAGLE"), "--speculative-algorithm EAGLE", "Drop the --speculative-"),
    (dict(disaggregation_mode="prefill"), "--disaggregation-mode prefill", "Drop --disaggregation-mode"),
    (dict(disaggregation_mode="decode"), "--disaggregation-mode decode", "Drop --disaggregation-mode"),
    (dict(pp_size=2), "--pp-size 2", "Use --tp-size"),
    (dict(extra_metric_labels={"policy": "x"}), "--extra-metric-labels with policy", "Name them otherwise"),
    (dict(tp_size=4), "--tp-size 4", "Use --tp-size 2 or less"),
    (dict(attn_cp_size=2), "context parallelism", "Use --tp-size"),
    (dict(dcp_size=2), "context parallelism", "Use --tp-size"),
    (dict(enable_prefill_cp=True), "context parallelism", "Use --tp-size"),
    (dict(enable_dp_attention=True), "data-parallel attention", "--dp-size"),
    (dict(attn_dp_size=2), "data-parallel attention", "--dp-size"),
    (dict(enable_hierarchical_cache=True), "hierarchical", "Drop --enable-hierarchical-cache"),
    (dict(enable_lmcache=True), "external KV cache", "--enable-lmcache"),
    (dict(enable_flexkv=True), "external KV cache", "--enable-flexkv"),
    (dict(enable_unified_cache_external_linker=True), "external KV cache", "--enable-unified-cache-external-linker"),
    (dict(radix_cache_backend="mine"), "--radix-cache-backend mine", "Drop --radix-cache-backend"),
    (dict(enable_streaming_session=True), "--enable-streaming-session", "Drop these flags"),
    (dict(enable_session_radix_cache=True), "--enable-session-radix-cache", "Drop these flags"),
    (dict(kv_cache_dtype="fp8_e4m3"), "--kv-cache-dtype fp8_e4m3", "--kv-cache-dtype bfloat16"),
    (dict(kv_cache_dtype="fp4_e2m1"), "--kv-cache-dtype fp4_e2m1", "--kv-cache-dtype bfloat16"),
    (dict(enable_hisparse=True), "HiSparse", "--enable-hisparse"),
    (dict(enable_page_major_kv_layout=True), "page-major", "--enable-page-major-kv-layout"),
    (dict(enable_unified_memory=True), "unified", "--enable-unified-memory"),
    (dict(enable_return_routed_experts=True), "routed-expert", "--enable-return-routed-experts"),
    (dict(enable_return_indexer_topk=True), "indexer", "--enable-return-indexer-topk"),
    (dict(enable_pdmux=True), "--enable-pdmux", "Drop --enable-pdmux"),
    (dict(enable_two_batch_overlap=True), "--enable-two-batch-overlap", "Drop --enable-two-batch-overlap"),
    (dict(enable_deterministic_inference=True), "--enable-deterministic-inference", "--enable-deterministic-inference"),
    (
        dict(device="cuda", attention_backend="triton", enable_torch_compile=True),
        "--enable-torch-compile",
        "Drop --enable-torch-compile",
    ),
    (dict(kv_canary="log"), "--kv-canary log", "Drop --kv-canary"),
    (dict(enable_nvidia_megakernel=True), "--enable-nvidia-megakernel", "Drop these flags"),
    (dict(enable_amd_monokernel=True), "--enable-amd-monokernel", "Drop these flags"),
    (dict(encoder_only=True), "--encoder-only", "server that decodes"),
    (dict(dllm_algorithm="LowConfidence"), "diffusion", "Drop --dllm-algorithm"),
    (dict(tokenizer_worker_num=2), "--tokenizer-worker-num 2", "--tokenizer-worker-num 1"),
]  # fmt: skip

MODELS = [
    (dict(attention_arch=AttentionArch.MLA), "MLA"),
    (dict(attention_arch=AttentionArch.SSM), "Mamba"),
    (dict(hf_config=FalconH1Config()), "Mamba"),
    (dict(hf_config=Qwen3NextConfig()), "linear-attention"),
    (dict(linear_attn_registry_result=("spec", "config")), "linear-attention"),
    (dict(is_hybrid_swa=True), "sliding-window"),
    (dict(sliding_window_size=4096, hf_text_config=SimpleNamespace()), "sliding-window"),
    (dict(sliding_window_size=4096, hf_text_config=Qwen2Config(use_sliding_window=True)), "sliding-window"),
    (dict(attention_chunk_size=8192), "chunked attention"),
    (dict(hf_config=Qwen2Config(architectures=["MiniMaxM3SparseForCausalLM"])), "sparse attention"),
    (dict(hf_config=Qwen2Config(architectures=["MiniMaxM3SparseForConditionalGeneration"])), "sparse attention"),
    (dict(hf_config=Qwen2Config(has_minicpm_sparse_attention=True)), "sparse attention"),
    (dict(has_attention_sinks=True), "sinks"),
    (dict(hf_text_config=Qwen2Config(attn_logit_softcapping=50.0)), "capped logits"),
    *((dict(hf_config=Qwen2Config(architectures=[name])), "not causal") for name in BEYOND_SOFTMAX),
    (dict(has_asymmetric_kv=True), "keys and values of different sizes"),
    (dict(is_encoder_decoder=True), "encoder-decoder"),
    (dict(is_generation=False), "embedding"),
]

VARIABLES = ["SGLANG_RUST_SERVER", "SGLANG_USE_HND_KVCACHE", "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    if "--kv-policy" not in parser._option_string_actions:
        add_flags(parser)
    return set(parser._option_string_actions)


def refusal(cfg, model_config) -> str:
    with pytest.raises(ValueError) as raised:
        refuse(cfg, model_config)
    return str(raised.value)


def assert_helps(message: str, asked: str, instead: str, known_flags: set[str]) -> None:
    """Says what was asked, why not, and what to do, in flags that exist."""
    before, why, advice = re.fullmatch(
        r"--kv-policy cannot serve (.+?): (.{10,}?)\. (.+), or use --kv-policy none\.", message
    ).groups()
    assert asked in before
    assert instead in advice
    for flag in re.findall(r"--[a-z-]+(?<!-)(?=[ ,.]|$)", message):
        assert flag in known_flags, flag


def test_sglangs_defaults_are_served():
    refuse(Arguments(**SERVABLE), model())


@pytest.mark.parametrize(
    "settings",
    [
        dict(attention_backend=None),
        dict(page_size=None),
        dict(tp_size=2),
        dict(dp_size=2),
        dict(chunked_prefill_size=128, enable_mixed_chunk=True),
        dict(radix_cache_backend=RADIX_CACHE),
        dict(kv_cache_dtype="bfloat16"),
        dict(tokenizer_worker_num=1),
    ],
    ids=str,
)
def test_what_can_be_served_is(settings):
    refuse(Arguments(**SERVABLE | settings), model())


@pytest.mark.parametrize("device, backend", [(d, name) for d, names in ATTENTION.items() for name in names])
def test_every_counterpart_is_served(device, backend):
    refuse(Arguments(**SERVABLE | dict(device=device, attention_backend=backend)), model())


@pytest.mark.parametrize("ours", ATTENTION["cuda"].values())
def test_what_gpu_backends_override_is_there(ours):
    """Some of SGLang's import only beside a GPU's driver, so both sides are read, not imported."""
    source = ast.parse((ROOT / f"{ours.rpartition('.')[0].replace('.', '/')}.py").read_text())
    [stock] = [
        (node.module, node.names[0].name)
        for node in source.body
        if isinstance(node, ast.ImportFrom) and node.module.startswith("sglang.srt.layers.attention")
    ]
    upstream = Path(find_spec("sglang").origin).parent.joinpath(*stock[0].split(".")[1:]).with_suffix(".py")
    [found] = [n for n in ast.parse(upstream.read_text()).body if getattr(n, "name", "") == stock[1]]
    methods = {n.name: [a.arg for a in n.args.args] for n in found.body if isinstance(n, ast.FunctionDef)}
    assert methods["__init__"][:2] == ["self", "model_runner"]
    assert methods["init_forward_metadata"] == ["self", "forward_batch"]
    assert methods["init_forward_metadata_out_graph"] == ["self", "forward_batch", "in_capture"]
    assert methods["init_cuda_graph_state"][:3] == ["self", "max_bs", "max_num_tokens"]
    for name in ("forward_extend", "forward_decode"):
        assert methods[name][:7] == ["self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache"]


UNUSED_WINDOWS = [
    dict(hf_text_config=Qwen2Config(use_sliding_window=False)),
    *(dict(hf_config=Qwen2Config(architectures=[name])) for name in IGNORE_THEIR_WINDOW),
]


@pytest.mark.parametrize("settings", UNUSED_WINDOWS)
def test_a_window_that_is_stated_but_unused_is_served(settings):
    text = dict(hf_text_config=SimpleNamespace())
    refuse(Arguments(**SERVABLE), model(**text | settings, sliding_window_size=4096))
    assert "sliding-window" in refusal(Arguments(**SERVABLE), model(**text, sliding_window_size=4096))


TOLD_OTHERWISE = {  # by file, what of it is refused
    "bert": "embeds",
    "dflash": "drafts",
    "dspark_minimax": "drafts",
    "embedding_gemma2": "embeds",
    "gemma2": "slides",
    "gemma3_causal": "slides",
    "gemma4_diffusion": "slides",
    "lfm2": "has linear attention",
    "qwen3_5": "has linear attention",
    "whisper": "encodes and decodes",
}
BEYOND = re.compile(
    r"xai_temperature|AttentionType\.(ENCODER_ONLY|DECODER_BIDIRECTIONAL)|logit_cap=logit_cap|loop_idx == 0"
)


def entry_classes(source: str) -> set[str]:
    """The models that a file of SGLang's registers."""
    assigned = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    values = [node.value for node in assigned if getattr(node.targets[0], "id", "") == "EntryClass"]
    return {node.id for value in values for node in ast.walk(value) if isinstance(node, ast.Name)}


def test_what_is_known_of_models_is_what_their_sources_say():
    """No file of a model that is said to ignore its window reads one, and a model whose attention is
    beyond ours is refused before it loads: by name, or as its configuration tells."""
    files = {path: path.read_text() for path in Path(sglang.srt.models.__path__[0]).glob("*.py")}
    by_file = {path: entry_classes(source) for path, source in files.items()}
    for name in IGNORE_THEIR_WINDOW:
        [path] = [path for path, names in by_file.items() if name in names]
        assert "sliding_window" not in files[path] + files[path.with_name("llama.py")], name
    beyond = {path.stem: names for path, names in by_file.items() if BEYOND.search(files[path])}
    by_name = {file: names for file, names in beyond.items() if file not in TOLD_OTHERWISE}
    assert set(TOLD_OTHERWISE) <= set(beyond)
    assert set().union(*by_name.values()) == set(BEYOND_SOFTMAX)


@pytest.mark.parametrize("settings, asked, instead", SERVERS, ids=[str(settings) for settings, *_ in SERVERS])
def test_server_settings_are_refused(settings, asked, instead, known_flags):
    assert_helps(refusal(Arguments(**SERVABLE | settings), model()), asked, instead, known_flags)


@pytest.mark.parametrize("settings, asked", MODELS, ids=[f"{asked}-{i}" for i, (_, asked) in enumerate(MODELS)])
def test_models_are_refused(settings, asked, known_flags):
    message = refusal(Arguments(**SERVABLE), model(**settings))
    assert_helps(message, asked, "Serve a", known_flags)


def test_heads_that_flashinfer_has_no_kernels_for_are_refused_under_it_alone(known_flags):
    gpu = SERVABLE | dict(device="cuda", attention_backend="flashinfer")
    for head_dim in range(8, 264, 8):
        if takes("flashinfer", head_dim):
            check_heads(4, 2, head_dim, torch.float16, torch.float16)
            refuse(Arguments(**gpu), model(head_dim=head_dim))
            continue
        with pytest.raises(ValueError):
            check_heads(4, 2, head_dim, torch.float16, torch.float16)
        message = refusal(Arguments(**gpu), model(head_dim=head_dim))
        assert_helps(message, f"heads of {head_dim}", "--attention-backend triton", known_flags)
    for backend in ("triton", "fa3"):
        refuse(Arguments(**gpu | dict(attention_backend=backend)), model(head_dim=80))


@pytest.mark.parametrize(
    "settings, said",
    [
        ({}, ""),
        (dict(logit_cap=30.0), "caps attention logits at 30.0 (layers.1.attn)"),
        (dict(sliding_window_size=512), "a window of 512 rows"),
        (dict(v_head_dim=64), "keys of 128 and values of 64"),
        (dict(is_cross_attention=True), "more than the rows before it"),
        (dict(attn_type=AttentionType.DECODER_BIDIRECTIONAL), "more than the rows before it"),
    ],
)
def test_attention_that_is_more_than_ours_is_noticed(settings, said):
    layers = [nn.Module(), nn.Module()]
    for index, layer in enumerate(layers):
        layer.attn = RadixAttention(4, 128, 0.1, 2, index, **settings if index else {})
    model = nn.Module()
    model.layers = nn.ModuleList(layers)
    assert unserved(model) == "" if not said else said in unserved(model)
    layers[0].attn.xai_temperature_len = 1024
    assert "temperature" in unserved(model)


@pytest.mark.parametrize("name", VARIABLES)
def test_environment_is_refused(name, monkeypatch, known_flags):
    monkeypatch.setenv(name, "1")
    assert_helps(refusal(Arguments(**SERVABLE), model()), f"{name}=1", f"Unset {name}", known_flags)
    monkeypatch.setenv(name, "0")
    refuse(Arguments(**SERVABLE), model())


def test_messages_without_pickle_are_refused(monkeypatch, known_flags):
    name = "SGLANG_USE_PICKLE_IPC"
    monkeypatch.setenv(name, "0")
    assert_helps(refusal(Arguments(**SERVABLE), model()), f"{name}=0", f"Unset {name}", known_flags)
    monkeypatch.setenv(name, "1")
    refuse(Arguments(**SERVABLE), model())


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(reports, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_reports_are_kept_for_their_age(clock):
    store = ReportStore(max_age=10)
    store.put("a", {"policy": "vlcache"})
    clock.now += 9
    store.put("b", {"policy": "none"})
    assert store.get("a") == {"policy": "vlcache"} and store.get("unknown") is None
    clock.now += 2
    assert store.get("a") is None and store.get("b") == {"policy": "none"}
    clock.now += 9
    assert store.get("b") is None


def test_the_oldest_reports_go_first_where_there_are_too_many(clock):
    store = ReportStore(max_age=10, max_reports=3)
    for name in "abcd":
        store.put(name, {"name": name})
    assert [store.get(name) is not None for name in "abcd"] == [False, True, True, True]


def test_a_thousand_positions_count_as_one_more_report(clock):
    store = ReportStore(max_age=10, max_reports=5)
    store.put("small", {})
    store.put("large", {"positions": [[list(range(1000))] * 2] * 2})
    assert store.get("small") is None and store.get("large") is not None
    store.put("next", {})
    assert store.get("large") is None and store.get("next") is not None


def test_the_choices_of_a_request_lie_together(clock):
    store = ReportStore(max_age=10, max_reports=3)
    store.put("third", {"choice": 2}, ("request", "mine"), 2)
    clock.now += 9
    assert store.get("request") is store.get("first") is store.choices("first") is None
    store.put("first", {"choice": 0}, ("request", "mine"), 0)
    clock.now += 9
    for name in ("request", "mine", "first", "third"):
        assert store.choices(name) == [{"choice": 0}, None, {"choice": 2}]
    assert [store.get(name)["choice"] for name in ("request", "mine", "first", "third")] == [0, 0, 0, 2]
    store.put("one", {})
    assert store.choices("one") == [{}]
    store.put("another", {})
    assert store.choices("request") is store.get("third") is None, "four reports are one too many"


def test_an_id_leads_to_the_newest_request_that_took_it(clock):
    store = ReportStore(max_age=10)
    store.put("a", {"request": 1}, ("one", "mine"))
    store.put("b", {"request": 2}, ("two", "mine"))
    assert store.get("mine") == {"request": 2} and store.get("a") == {"request": 1}
    clock.now += 6
    store.put("c", {"request": 1}, ("one", "mine"), 1)
    clock.now += 6
    assert store.get("two") is None and store.get("mine") == {"request": 1}
    clock.now += 6
    assert store.get("mine") is None and not store._found


def test_long_ids_count(clock):
    store = ReportStore(max_age=10, max_reports=5)
    store.put("small", {})
    store.put("x" * 40_000, {})
    assert store.get("small") is None


def test_a_report_that_is_put_again_is_the_newest(clock):
    store = ReportStore(max_age=10, max_reports=2)
    store.put("a", {"try": 1})
    clock.now += 6
    store.put("b", {})
    store.put("a", {"try": 2})
    store.put("c", {})
    assert store.get("b") is None
    clock.now += 6
    assert store.get("a") == {"try": 2}


def test_expired_reports_are_not_only_hidden(clock):
    class Report(dict):
        """Unlike a dict, weakly referable."""

    store, old = ReportStore(max_age=10), Report()
    store.put("old", old)
    kept = weakref.ref(old)
    del old
    assert kept() is not None
    clock.now += 11
    store.put("new", {})
    assert kept() is None
