"""What decode and extend ask of their tensors."""

from __future__ import annotations

import torch

LOG2_E = 1.4426950408889634  # exp(x) is exp2(x * LOG2_E), which GPUs have an instruction for


def lanes(num_requests: int) -> int:
    """Lanes that hold a batch: 16, 64, 256, ... Every number of them is one more compilation, and all
    of them are worked on however few requests there are."""
    lanes = 16
    while lanes < num_requests:
        lanes *= 4
    return lanes


def check_attention(
    q: torch.Tensor,
    k_cells: torch.Tensor,
    v_cells: torch.Tensor,
    indices: torch.Tensor,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Raises ValueError for what the kernels cannot read; returns ``out``, allocated where it is None."""
    _, num_q_heads, head_dim = q.shape
    if k_cells.shape != v_cells.shape or k_cells.dtype != v_cells.dtype or k_cells.shape[2] != head_dim:
        raise ValueError(
            f"k_cells and v_cells must be [num_cells, Hkv, {head_dim}] of one dtype; they are "
            f"{list(k_cells.shape)} {k_cells.dtype} and {list(v_cells.shape)} {v_cells.dtype}"
        )
    if num_q_heads % k_cells.shape[1]:
        raise ValueError(f"{num_q_heads} query heads cannot share {k_cells.shape[1]} KV heads")
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"q must be float32, bfloat16 or float16, not {q.dtype}")
    if not (k_cells.is_contiguous() and v_cells.is_contiguous()):
        raise ValueError("k_cells and v_cells must be contiguous")
    if q.stride()[1:] != (head_dim, 1):
        raise ValueError(f"the heads of a token in q must be contiguous; its strides are {q.stride()}")
    if indices.dtype != torch.int32 or indices.ndim != 1 or not indices.is_contiguous():
        raise ValueError("indices must be flat, contiguous int32")
    if out is None:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {list(q.shape)} {q.dtype}")
    return out
