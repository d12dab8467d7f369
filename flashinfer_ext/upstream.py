"""Every symbol of FlashInfer that this package touches; nothing else of it imports FlashInfer.

The layout of a plan is private to FlashInfer, so versions are named one by one. No GPU has run this
package yet: 0.7.2 is named because plans equal those of its planner, compiled for a CPU, and calls fit
its signatures. Another version is added when ``python -m flashinfer_ext.check`` passes with it on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch

from .layout import Grid, Heads

SUPPORTED_VERSIONS = ("0.7.2",)

NON_CAUSAL, CAUSAL = 0, 1  # flashinfer.utils.MaskMode
NHD = 0  # flashinfer.utils.TensorLayout
NO_POSITIONS = 0  # flashinfer.utils.PosEncodingMode.NONE: keys are stored with their positions applied
NO_WINDOW = -1

RUN_ARGUMENTS = tuple(
    """
    float_workspace_buffer int_workspace_buffer plan_info_vec q paged_k_cache paged_v_cache
    paged_kv_indptr paged_kv_indices paged_kv_last_page_len o maybe_lse
    kv_layout_code window_left enable_pdl alibi_slopes logits_soft_cap sm_scale rope_scale rope_theta
    """.split()
)
"""Of ``flashinfer.decode.get_batch_decode_module(...).run``, in order."""

PAGED_RUN_ARGUMENTS = tuple(
    """
    float_workspace_buffer int_workspace_buffer plan_info_vec q paged_k_cache paged_v_cache
    qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len o maybe_lse
    mask_mode layout window_left enable_pdl maybe_custom_mask maybe_mask_indptr maybe_alibi_slopes
    maybe_prefix_len_ptr maybe_token_pos_in_items_ptr maybe_max_item_len_ptr logits_soft_cap sm_scale
    scale_q scale_k scale_v rope_scale rope_theta token_pos_in_items_len workspace_size
    """.split()
)
"""Of ``flashinfer.prefill.get_batch_prefill_module("fa2", ...).paged_run``; those behind have defaults."""


def check(device: torch.device) -> str:
    """The installed version.

    Raises:
        RuntimeError: no GPU, FlashInfer is not installed, or plans of its version are not known here.
    """
    if device.type != "cuda":
        raise RuntimeError(f"FlashInfer has no kernels for {device}; it needs an NVIDIA GPU")
    supported = " or ".join(SUPPORTED_VERSIONS)
    try:
        import flashinfer
    except ImportError as error:
        raise RuntimeError(
            f"flashinfer_ext needs flashinfer-python {supported}, which is not installed"
        ) from error
    version = flashinfer.__version__
    if version.split("+")[0] not in SUPPORTED_VERSIONS:
        raise RuntimeError(
            f"flashinfer_ext writes the plans of flashinfer-python {supported}; {version} is installed and may "
            "lay them out differently. Install a supported version, or use FlashInfer's own wrappers."
        )
    return version


def decode_module(q_dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int) -> Any:
    """CUDA-core decode: compiled, or loaded from FlashInfer's cache."""
    from flashinfer.decode import get_batch_decode_module

    return get_batch_decode_module(
        *(q_dtype, kv_dtype, q_dtype, torch.int32, head_dim, head_dim, NO_POSITIONS),
        False,  # use_sliding_window
        False,  # use_logits_soft_cap
    )


def prefill_module(q_dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int) -> Any:
    """Prefill and tensor-core decode, the FA2 template."""
    from flashinfer.prefill import get_batch_prefill_module

    return get_batch_prefill_module(
        *("fa2", q_dtype, kv_dtype, q_dtype, torch.int32, head_dim, head_dim, NO_POSITIONS),
        False,  # use_sliding_window
        False,  # use_logits_soft_cap
        False,  # use_fp16_qk_reduction
    )


def kernel_spec(q_dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, prefill: bool) -> Any:
    """What ``prefill_module`` or ``decode_module`` compiles, to be built ahead, also without a GPU."""
    from flashinfer.jit.attention import modules

    shared = q_dtype, kv_dtype, q_dtype, torch.int32, head_dim, head_dim, NO_POSITIONS, False, False
    if prefill:
        return modules._gen_batch_prefill_primary_module("fa2", *shared, False)
    return modules.gen_batch_decode_module(*shared)


def device_grid(
    device: torch.device, heads: Heads, q_dtype: torch.dtype, kv_dtype: torch.dtype, decode: Any | None
) -> Grid:
    """The device, as FlashInfer's planner sees it.

    Args:
        decode: the CUDA-core decode module, whose occupancy FlashInfer tells through the size of its
            workspace: ``num_q_heads * blocks * (head_dim + 1)`` floats, with
            ``blocks = num_sms * occupancy // num_kv_heads``. None for tensor cores.

    Raises:
        RuntimeError: the device is older than compute capability 8.
    """
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        raise RuntimeError(
            f"flashinfer_ext needs compute capability 8.0 or later, {properties.name} has "
            f"{properties.major}.{properties.minor}; use FlashInfer's own wrappers"
        )
    num_sms = properties.multi_processor_count
    if decode is None:
        return Grid(num_sms, 1)
    float_bytes, _ = decode.workspace_size(
        torch.empty(1, dtype=torch.uint8, device=device),
        torch.tensor([0, 1], dtype=torch.int32),  # one request of one row
        *(1, heads.num_q_heads, heads.num_kv_heads, 1),  # batch size, heads, page size
        True,  # enable_cuda_graph
        *(NO_WINDOW, 0.0, heads.head_dim, heads.head_dim),
        torch.empty(0, dtype=q_dtype),
        torch.empty(0, dtype=kv_dtype),
    )
    return Grid(num_sms, blocks_per_sm(int(float_bytes), num_sms, heads))


def blocks_per_sm(float_bytes: int, num_sms: int, heads: Heads) -> int:
    """The occupancy behind a CUDA-core decode workspace of ``float_bytes``; needs no more KV heads than SMs."""
    blocks = float_bytes // (4 * heads.num_q_heads * (heads.head_dim + 1))
    return -(-blocks * heads.num_kv_heads // num_sms)
