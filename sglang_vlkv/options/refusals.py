"""What a policy cannot be combined with, refused before the model loads.

``python -m sglang_vlkv.options.refusals`` prints the table of docs/features.md.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import torch
from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.utils.common import get_bool_env_var

from sglang_vlkv.observe.metrics import LABELS
from sglang_vlkv.options.asked import Asked
from sglang_vlkv.options.backends import ATTENTION, BACKENDS, HEAD_DIMS, RADIX_CACHE, takes

KV_DTYPES = (None, "auto", "bfloat16", "bf16", "float16", "float32")


class Refusal(NamedTuple):
    """A combination, and what is said of it.

    Attributes:
        flags: what the documentation calls it.
        holds: whether it is asked for.
        asked: what was asked, formatted with ``cfg`` and ``its``, the :class:`Asked`.
        why: why it cannot be.
        instead: what to do instead, formatted likewise.
    """

    flags: str
    holds: Callable[[Asked], bool]
    asked: str
    why: str
    instead: str


OTHER_MODEL = "Serve a model with plain multi-head or grouped-query attention"

MODEL = (
    Refusal(
        "multi-head latent attention (MLA)",
        lambda its: its.model.attention_arch == AttentionArch.MLA,
        "a model with multi-head latent attention (MLA)",
        "its cache holds one latent row for all heads, and heads keep different tokens",
        OTHER_MODEL,
    ),
    Refusal(
        "Mamba and linear-attention layers",
        lambda its: mambaish_config(its.model) is not None or its.model.attention_arch == AttentionArch.SSM,
        "a model with Mamba or linear-attention layers",
        "their state has no rows to select",
        OTHER_MODEL,
    ),
    Refusal(
        "sliding-window and chunked attention layers",
        lambda its: its.slides,
        "a model with sliding-window or chunked attention layers",
        "they drop rows on their own",
        OTHER_MODEL,
    ),
    Refusal(
        "sparse attention (MiniMax-M3, MiniCPM)",
        lambda its: its.is_sparse,
        "a model with sparse attention",
        "it chooses rows on its own, and keeps more of them than keys and values",
        OTHER_MODEL,
    ),
    Refusal(
        "capped logits, attention sinks, attention that is not causal",
        lambda its: its.beyond_softmax,
        "a model whose attention has capped logits or sinks, or is not causal",
        "the kernels compute softmax attention over the rows that a request kept and nothing else",
        OTHER_MODEL,
    ),
    Refusal(
        "keys and values of different sizes",
        lambda its: its.model.has_asymmetric_kv,
        "a model with keys and values of different sizes",
        "a cell holds either",
        OTHER_MODEL,
    ),
    Refusal(
        "encoder-decoder models",
        lambda its: bool(its.model.is_encoder_decoder),
        "an encoder-decoder model",
        "cross-attention rows are not prompt rows",
        OTHER_MODEL,
    ),
    Refusal(
        "embedding and reward models, `--is-embedding`",
        lambda its: not its.model.is_generation,
        "an embedding or reward model",
        "it never decodes",
        "Serve a generating model",
    ),
    Refusal(
        "more `--tp-size` than KV heads",
        lambda its: its.cfg.tp_size > its.kv_heads,
        "--tp-size {cfg.tp_size}",
        "SGLang would replicate the model's KV heads, and replicas would keep different tokens",
        "Use --tp-size {its.kv_heads} or less",
    ),
    Refusal(
        "`--attention-backend flashinfer` with other sizes of head",
        lambda its: not takes(its.decode, its.model.head_dim),
        "attention heads of {its.model.head_dim} under {its.decode_named}",
        f"its kernels are made for heads of {', '.join(map(str, HEAD_DIMS['flashinfer']))}",
        "Use --attention-backend triton",
    ),
)


def _unread(field: str) -> Refusal:
    """A field that names an attention backend without a ragged counterpart."""
    flag = f"--{field.replace('_', '-')}"
    return Refusal(
        f"`{flag}` but `torch_native` on a CPU and `{'`, `'.join(ATTENTION['cuda'])}` on NVIDIA GPUs",
        lambda its: getattr(its.args, field) not in (None, *ATTENTION.get(its.cfg.device, {})),
        f"{flag} {{its.args.{field}}}",
        "it cannot read per-layer ragged rows",
        f"Use {flag} {{its.served}}",
    )


ATTENTION_SERVED = (
    Refusal(
        "`--device` other than a CPU or NVIDIA GPUs, ROCm",
        lambda its: its.cfg.device not in ATTENTION or torch.version.hip is not None,
        "--device {its.device}",
        "it has no kernels for this device",
        "Serve on NVIDIA GPUs or on a CPU",
    ),
    *map(_unread, BACKENDS),
    Refusal(
        "models with attention of their own",
        lambda its: not {its.prefill, its.decode} <= {None, *ATTENTION.get(its.cfg.device, {})},
        "a model that SGLang serves with {its.prefill} and {its.decode} attention",
        "what they compute is not attention over all rows before a token",
        OTHER_MODEL,
    ),
    Refusal(
        "another `--prefill-attention-backend` than `--decode-attention-backend`",
        lambda its: its.prefill != its.decode,
        "{its.prefill_named} with {its.decode_named}",
        "one backend both scores the prompt and reads the kept rows",
        "Use --attention-backend {its.decode}",
    ),
    Refusal(
        "`--page-size` over 1",
        lambda its: its.cfg.page_size is not None and its.cfg.page_size > 1,
        "{its.pages}",
        "rows are kept token by token",
        "Use --page-size 1",
    ),
)

PARALLEL = (
    Refusal(
        "`--speculative-algorithm`",
        lambda its: its.cfg.speculative_algorithm is not None,
        "--speculative-algorithm {cfg.speculative_algorithm}",
        "draft and verify steps read the exact rows",
        "Drop the --speculative-* flags",
    ),
    Refusal(
        "`--disaggregation-mode`",
        lambda its: its.cfg.disaggregation_mode not in (None, "null"),
        "--disaggregation-mode {cfg.disaggregation_mode}",
        "compacted rows cannot be sent to another server",
        "Drop --disaggregation-mode",
    ),
    Refusal(
        "`--pp-size` over 1",
        lambda its: its.cfg.pp_size > 1,
        "--pp-size {cfg.pp_size}",
        "the budget is split over the layers of all stages, and no stage sees them all",
        "Use --tp-size instead",
    ),
    Refusal(
        "`--attn-cp-size`, `--dcp-size`, `--enable-prefill-cp`",
        lambda its: (its.cfg.attn_cp_size or 1) > 1 or (its.cfg.dcp_size or 1) > 1 or its.cfg.enable_prefill_cp,
        "context parallelism (--attn-cp-size, --dcp-size, --enable-prefill-cp)",
        "no rank holds a prompt's whole KV",
        "Use --tp-size instead",
    ),
    Refusal(
        "`--attn-dp-size`, `--enable-dp-attention`",
        lambda its: (its.cfg.attn_dp_size or 1) > 1 or its.cfg.enable_dp_attention,
        "data-parallel attention (--attn-dp-size, --enable-dp-attention)",
        "its ranks schedule different requests in one batch",
        "Use --dp-size without it",
    ),
    Refusal(
        "`--enable-pdmux`",
        lambda its: its.cfg.enable_pdmux,
        "--enable-pdmux",
        "prefill and decode would run at the same time on one request's rows",
        "Drop --enable-pdmux",
    ),
    Refusal(
        "`--enable-two-batch-overlap`",
        lambda its: its.cfg.enable_two_batch_overlap,
        "--enable-two-batch-overlap",
        "it splits a batch in two, and rows are listed for the whole batch",
        "Drop --enable-two-batch-overlap",
    ),
    Refusal(
        "`--encoder-only`",
        lambda its: its.cfg.encoder_only,
        "--encoder-only",
        "an encoder holds no KV",
        "Give --kv-policy to the server that decodes",
    ),
)

MEMORY = (
    Refusal(
        "`--enable-hierarchical-cache` (HiCache), `--enable-lmcache`, `--enable-flexkv`, "
        "`--enable-unified-cache-external-linker`",
        lambda its: (
            its.cfg.enable_hierarchical_cache
            or its.cfg.enable_lmcache
            or its.cfg.enable_flexkv
            or its.cfg.enable_unified_cache_external_linker
        ),
        "a hierarchical or external KV cache",
        "it moves rows between tiers by slot, and compacted slots hold rows of many layers",
        "Drop --enable-hierarchical-cache, --enable-lmcache, --enable-flexkv and "
        "--enable-unified-cache-external-linker",
    ),
    Refusal(
        "`--radix-cache-backend`",
        lambda its: its.cfg.radix_cache_backend not in (None, RADIX_CACHE),
        "--radix-cache-backend {cfg.radix_cache_backend}",
        "compacted requests must leave the tree, which only the built-in cache lets them",
        "Drop --radix-cache-backend",
    ),
    Refusal(
        "`--enable-streaming-session`, `--enable-session-radix-cache`",
        lambda its: its.cfg.enable_streaming_session or its.cfg.enable_session_radix_cache,
        "sessions that hold KV (--enable-streaming-session, --enable-session-radix-cache)",
        "a compacted request has left the tree that they hold it in",
        "Drop these flags",
    ),
    Refusal(
        "`--kv-cache-dtype` of 8 bits or fewer",
        lambda its: its.cfg.kv_cache_dtype not in KV_DTYPES,
        "{its.kv_dtype}",
        "rows of a quantised cache share scales",
        "Use --kv-cache-dtype bfloat16, or float16 for a model of that dtype",
    ),
    Refusal(
        "`--enable-hisparse`, `--enable-page-major-kv-layout`, `--enable-unified-memory`",
        lambda its: (
            its.cfg.enable_hisparse or its.cfg.enable_page_major_kv_layout or its.cfg.enable_unified_memory
        ),
        "a HiSparse, page-major or unified KV pool",
        "kept rows are packed over the cells of the plain pool",
        "Drop --enable-hisparse, --enable-page-major-kv-layout and --enable-unified-memory",
    ),
    Refusal(
        "`--enable-return-routed-experts`, `--enable-return-indexer-topk`",
        lambda its: its.cfg.enable_return_routed_experts or its.cfg.enable_return_indexer_topk,
        "routed-expert or indexer capture",
        "it reads back a request's row, which no longer lists the prompt",
        "Drop --enable-return-routed-experts and --enable-return-indexer-topk",
    ),
    Refusal(
        "`--strip-thinking-cache`",
        lambda its: its.cfg.strip_thinking_cache,
        "--strip-thinking-cache",
        "it gives back a finished request's output by position, and compacted rows lie elsewhere",
        "Drop --strip-thinking-cache",
    ),
    Refusal(
        "`--kv-canary`",
        lambda its: its.cfg.kv_canary != "none",
        "--kv-canary {cfg.kv_canary}",
        "it expects a token's row in the slot that the token was given, and kept rows lie elsewhere",
        "Drop --kv-canary",
    ),
)

KERNELS = (
    Refusal(
        "`--enable-deterministic-inference`, `--rl-on-policy-target`",
        lambda its: its.cfg.enable_deterministic_inference,
        "deterministic inference (--enable-deterministic-inference, --rl-on-policy-target)",
        "the decode kernels divide their work by what else is in the batch, and which rows are "
        "kept depends on the prefix that is found",
        "Drop --enable-deterministic-inference and --rl-on-policy-target",
    ),
    Refusal(
        "`--enable-torch-compile` on GPUs",
        lambda its: its.cfg.enable_torch_compile and its.cfg.device != "cpu",
        "--enable-torch-compile",
        "nobody has tried it with the kernels that read ragged rows",
        "Drop --enable-torch-compile",
    ),
    Refusal(
        "`--enable-nvidia-megakernel`, `--enable-amd-monokernel`",
        lambda its: its.cfg.enable_nvidia_megakernel or its.cfg.enable_amd_monokernel,
        "--enable-nvidia-megakernel or --enable-amd-monokernel",
        "they replace the attention that reads ragged rows",
        "Drop these flags",
    ),
    Refusal(
        "`--dllm-algorithm`",
        lambda its: its.cfg.dllm_algorithm is not None,
        "a diffusion language model",
        "its blocks are denoised against the exact rows",
        "Drop --dllm-algorithm",
    ),
)

FRONTEND = (
    Refusal(
        "`--grpc-mode`, `--smg-grpc-mode`",
        lambda its: its.cfg.smg_grpc_mode or its.cfg.grpc_mode,
        "--grpc-mode or --smg-grpc-mode",
        "its requests go past the process that checks what they ask for",
        "Serve over HTTP",
    ),
    Refusal(
        "`--tokenizer-worker-num` over 1",
        lambda its: (its.cfg.tokenizer_worker_num or 1) > 1,
        "--tokenizer-worker-num {cfg.tokenizer_worker_num}",
        "reports are kept by the one process that answers requests",
        "Use --tokenizer-worker-num 1",
    ),
    Refusal(
        f"`--extra-metric-labels` with {', '.join(LABELS[:-1])} or {LABELS[-1]}",
        lambda its: bool(its.labels),
        "--extra-metric-labels with {its.labels}",
        "its own metrics have labels of this name",
        "Name them otherwise",
    ),
    Refusal(
        "`SGLANG_USE_PICKLE_IPC=0`",
        lambda its: not get_bool_env_var("SGLANG_USE_PICKLE_IPC", "true"),
        "SGLANG_USE_PICKLE_IPC=0",
        "a request's options may be objects in objects, which end a scheduler that does not expect them",
        "Unset SGLANG_USE_PICKLE_IPC",
    ),
)


def _variable(name: str, why: str) -> Refusal:
    """A variable of the environment that is set to true."""
    return Refusal(f"`{name}=1`", lambda its: get_bool_env_var(name), f"{name}=1", why, f"Unset {name}")


VARIABLES = (
    _variable("SGLANG_RUST_SERVER", "its responses carry no report"),
    _variable("SGLANG_USE_HND_KVCACHE", "kept rows are packed over a pool of token rows"),
    _variable("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "the pool's storage must exist when it is built"),
)

# The first that holds is told.
REFUSALS = (*MODEL, *ATTENTION_SERVED, *PARALLEL, *MEMORY, *KERNELS, *FRONTEND, *VARIABLES)


def refuse(server_args, model_config) -> None:
    """Raises ValueError for the first combination that cannot be served.

    Args:
        server_args: SGLang's, with what its resolution has declared so far.
        model_config: SGLang's ModelConfig.
    """
    its = Asked(server_args, model_config)
    for refusal in REFUSALS:
        if refusal.holds(its):
            words = refusal.asked, refusal.instead
            asked, instead = (sentence.format(cfg=its.cfg, its=its) for sentence in words)
            raise ValueError(
                f"--kv-policy cannot serve {asked}: {refusal.why}. {instead}, or use --kv-policy none."
            )


def table() -> str:
    """All refusals, as the documentation's table."""
    rows = [f"| {refusal.flags} | {refusal.why} |" for refusal in REFUSALS]
    return "\n".join(["| refused | why |", "|---|---|", *rows])


if __name__ == "__main__":
    print(table())
