"""What a policy cannot be combined with, refused before the model loads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.utils.common import get_bool_env_var

from sglang_vlkv.attention import COUNTERPARTS, HEAD_DIMS, takes
from sglang_vlkv.cache.radix import BACKEND
from sglang_vlkv.observe.metrics import LABELS


class Refusal(NamedTuple):
    """A setting that holds, why it cannot be, and what to do instead."""

    holds: bool
    asked: str
    why: str
    instead: str


def refuse(cfg, model_config) -> None:
    """Raises ValueError for the first combination that cannot be served.

    Args:
        cfg: SGLang's resolving view of the server arguments.
        model_config: SGLang's ModelConfig.
    """
    for refusal in [*_model_refusals(model_config, cfg), *_server_refusals(cfg)]:
        if refusal.holds:
            raise ValueError(
                f"--kv-policy cannot serve {refusal.asked}: {refusal.why}. "
                f"{refusal.instead}, or use --kv-policy none."
            )


def _model_refusals(model, cfg) -> list[Refusal]:
    other = "Serve a model with plain multi-head or grouped-query attention"
    backend = cfg.decode_attention_backend or cfg.attention_backend
    return [
        Refusal(
            model.attention_arch == AttentionArch.MLA,
            "a model with multi-head latent attention (MLA)",
            "its cache holds one latent row for all heads, and heads keep different tokens",
            other,
        ),
        Refusal(
            mambaish_config(model) is not None or model.attention_arch == AttentionArch.SSM,
            "a model with Mamba or linear-attention layers",
            "their state has no rows to select",
            other,
        ),
        Refusal(
            bool(model.is_hybrid_swa or model.attention_chunk_size or _slides(model)),
            "a model with sliding-window or chunked attention layers",
            "they drop rows on their own",
            other,
        ),
        Refusal(
            bool(model.is_encoder_decoder),
            "an encoder-decoder model",
            "cross-attention rows are not prompt rows",
            other,
        ),
        Refusal(
            not model.is_generation,
            "an embedding or reward model",
            "it never decodes",
            "Serve a generating model",
        ),
        Refusal(
            cfg.tp_size > model.get_total_num_kv_heads(),
            f"--tp-size {cfg.tp_size}",
            f"the model's {model.get_total_num_kv_heads()} KV heads would be replicated and the "
            "replicas would keep different tokens",
            f"Use --tp-size {model.get_total_num_kv_heads()} or less",
        ),
        Refusal(
            not takes(backend, model.head_dim),
            f"attention heads of {model.head_dim} under --attention-backend {backend}",
            f"its kernels are made for heads of {' or '.join(map(str, HEAD_DIMS.get(backend, ())))}",
            "Use --attention-backend triton",
        ),
    ]


def _slides(model) -> bool:
    """Whether its layers use the window its configuration states; Qwen2 states one unused."""
    unused = getattr(model.hf_text_config, "use_sliding_window", True) is False
    return bool(model.sliding_window_size) and not unused


def _server_refusals(cfg) -> list[Refusal]:
    fields = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    served = COUNTERPARTS.get(cfg.device, {})
    prefill, decode = (getattr(cfg, field) or cfg.attention_backend for field in fields[1:])
    taken = sorted(set(LABELS) & set(cfg.extra_metric_labels or {}))
    return [
        Refusal(
            cfg.device not in COUNTERPARTS or torch.version.hip is not None,
            f"--device {'cuda on ROCm' if torch.version.hip else cfg.device}",
            "it has no kernels for this device",
            "Serve on NVIDIA GPUs or on a CPU",
        ),
        *(
            Refusal(
                getattr(cfg, field) not in (None, *served),
                f"--{field.replace('_', '-')} {getattr(cfg, field)}",
                "it cannot read per-layer ragged rows",
                f"Use --{field.replace('_', '-')} {' or '.join(served)}",
            )
            for field in fields
        ),
        Refusal(
            prefill != decode,
            f"--prefill-attention-backend {prefill} with --decode-attention-backend {decode}",
            "one backend both scores the prompt and reads the kept rows",
            f"Use --attention-backend {decode}",
        ),
        Refusal(
            cfg.page_size is not None and cfg.page_size > 1,
            f"--page-size {cfg.page_size}",
            "rows are kept token by token",
            "Use --page-size 1",
        ),
        Refusal(
            cfg.speculative_algorithm is not None,
            f"--speculative-algorithm {cfg.speculative_algorithm}",
            "draft and verify steps read the exact rows",
            "Drop the --speculative-* flags",
        ),
        Refusal(
            cfg.disaggregation_mode not in (None, "null"),
            f"--disaggregation-mode {cfg.disaggregation_mode}",
            "compacted rows cannot be sent to another server",
            "Drop --disaggregation-mode",
        ),
        Refusal(
            cfg.pp_size > 1,
            f"--pp-size {cfg.pp_size}",
            "the budget is split over the layers of all stages, and no stage sees them all",
            "Use --tp-size instead",
        ),
        Refusal(
            (cfg.attn_cp_size or 1) > 1 or (cfg.dcp_size or 1) > 1 or bool(cfg.enable_prefill_cp),
            "context parallelism (--attn-cp-size, --dcp-size, --enable-prefill-cp)",
            "no rank holds a prompt's whole KV",
            "Use --tp-size instead",
        ),
        Refusal(
            (cfg.attn_dp_size or 1) > 1 or bool(cfg.enable_dp_attention),
            "data-parallel attention (--attn-dp-size, --enable-dp-attention)",
            "its ranks schedule different requests in one batch",
            "Use --dp-size without it",
        ),
        Refusal(
            bool(
                cfg.enable_hierarchical_cache
                or cfg.enable_lmcache
                or cfg.enable_flexkv
                or cfg.enable_unified_cache_external_linker
            ),
            "a hierarchical or external KV cache",
            "it moves rows between tiers by slot, and compacted slots hold rows of many layers",
            "Drop --enable-hierarchical-cache, --enable-lmcache, --enable-flexkv and "
            "--enable-unified-cache-external-linker",
        ),
        Refusal(
            cfg.radix_cache_backend not in (None, BACKEND),
            f"--radix-cache-backend {cfg.radix_cache_backend}",
            "compacted requests must leave the tree, which only the built-in cache lets them",
            "Drop --radix-cache-backend",
        ),
        Refusal(
            bool(cfg.enable_streaming_session or cfg.enable_session_radix_cache),
            "sessions that hold KV (--enable-streaming-session, --enable-session-radix-cache)",
            "a compacted request has left the tree that they hold it in",
            "Drop these flags",
        ),
        Refusal(
            cfg.kv_cache_dtype not in (None, "auto", "bfloat16", "bf16", "float16", "float32"),
            f"--kv-cache-dtype {cfg.kv_cache_dtype}",
            "rows of a quantised cache share scales",
            "Use --kv-cache-dtype auto",
        ),
        Refusal(
            bool(cfg.enable_hisparse or cfg.enable_page_major_kv_layout or cfg.enable_unified_memory),
            "a HiSparse, page-major or unified KV pool",
            "kept rows are packed over the cells of the plain pool",
            "Drop --enable-hisparse, --enable-page-major-kv-layout and --enable-unified-memory",
        ),
        Refusal(
            bool(cfg.enable_return_routed_experts or cfg.enable_return_indexer_topk),
            "routed-expert or indexer capture",
            "it reads back a request's row, which no longer lists the prompt",
            "Drop --enable-return-routed-experts and --enable-return-indexer-topk",
        ),
        Refusal(
            bool(cfg.strip_thinking_cache),
            "--strip-thinking-cache",
            "it gives back a finished request's output by position, and compacted rows lie elsewhere",
            "Drop --strip-thinking-cache",
        ),
        Refusal(
            bool(cfg.smg_grpc_mode or cfg.grpc_mode),
            "--grpc-mode or --smg-grpc-mode",
            "its requests go past the process that checks what they ask for",
            "Serve over HTTP",
        ),
        Refusal(
            bool(cfg.enable_pdmux),
            "--enable-pdmux",
            "prefill and decode would run at the same time on one request's rows",
            "Drop --enable-pdmux",
        ),
        Refusal(
            bool(cfg.enable_two_batch_overlap),
            "--enable-two-batch-overlap",
            "it splits a batch in two, and rows are listed for the whole batch",
            "Drop --enable-two-batch-overlap",
        ),
        Refusal(
            bool(cfg.enable_deterministic_inference),
            "--enable-deterministic-inference",
            "the decode kernels divide their work by what else is in the batch, and which rows are "
            "kept depends on the prefix that is found",
            "Drop --enable-deterministic-inference and --rl-on-policy-target",
        ),
        Refusal(
            bool(cfg.enable_torch_compile) and cfg.device != "cpu",
            "--enable-torch-compile",
            "nobody has tried it with the kernels that read ragged rows",
            "Drop --enable-torch-compile",
        ),
        Refusal(
            cfg.kv_canary != "none",
            f"--kv-canary {cfg.kv_canary}",
            "it expects a token's row in the slot that the token was given, and kept rows lie elsewhere",
            "Drop --kv-canary",
        ),
        Refusal(
            bool(cfg.enable_nvidia_megakernel or cfg.enable_amd_monokernel),
            "--enable-nvidia-megakernel or --enable-amd-monokernel",
            "they replace the attention that reads ragged rows",
            "Drop these flags",
        ),
        Refusal(
            bool(cfg.encoder_only),
            "--encoder-only",
            "an encoder holds no KV",
            "Give --kv-policy to the server that decodes",
        ),
        Refusal(
            cfg.dllm_algorithm is not None,
            "a diffusion language model",
            "its blocks are denoised against the exact rows",
            "Drop --dllm-algorithm",
        ),
        Refusal(
            (cfg.tokenizer_worker_num or 1) > 1,
            f"--tokenizer-worker-num {cfg.tokenizer_worker_num}",
            "reports are kept by the one process that answers requests",
            "Use --tokenizer-worker-num 1",
        ),
        Refusal(
            not get_bool_env_var("SGLANG_USE_PICKLE_IPC", "true"),
            "SGLANG_USE_PICKLE_IPC=0",
            "a request's options may be objects in objects, which end a scheduler that does not expect them",
            "Unset SGLANG_USE_PICKLE_IPC",
        ),
        Refusal(
            bool(taken),
            f"--extra-metric-labels with {' and '.join(taken)}",
            "its own metrics have labels of this name",
            "Name them otherwise",
        ),
        *(
            Refusal(get_bool_env_var(name), f"{name}=1", why, f"Unset {name}")
            for name, why in {
                "SGLANG_RUST_SERVER": "its responses carry no report",
                "SGLANG_USE_HND_KVCACHE": "kept rows are packed over a pool of token rows",
                "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": "the pool's storage must exist when it is built",
            }.items()
        ),
    ]
