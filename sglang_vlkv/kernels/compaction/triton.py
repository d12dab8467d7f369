"""All layers and heads in one launch each way."""

from __future__ import annotations

from itertools import accumulate
from typing import Callable, Sequence

import torch
import triton
import triton.language as tl

from sglang_vlkv.kernels import on_device
from sglang_vlkv.kernels.compaction.cpu import check_gather, check_scatter

BLOCK_ROWS = 32
BLOCK_BUCKET = 16  # rows of a bucket that are read at a time


# What differs from prompt to prompt is not specialised on: a server would compile while it serves.
@triton.jit(do_not_specialize=["stride_kept"])
def _copy_rows(
    k_cells, v_cells, slots, kept, starts, k_rows, v_rows,
    stride_cell, stride_head, stride_kept, cells_per_layer,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of one layer and head."""
    layer, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_heads = tl.num_programs(2)
    start = tl.load(starts + layer)
    row = start + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < tl.load(starts + layer + 1)
    # [BLOCK], [BLOCK], [BLOCK]
    position = tl.load(kept + head * stride_kept + row, mask=inside, other=0)
    slot = tl.load(slots + position, mask=inside, other=0).to(tl.int64)
    cell = layer.to(tl.int64) * cells_per_layer + slot
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < HEAD_DIM)[None, :]
    source = cell[:, None] * stride_cell + head * stride_head + d[None, :]
    target = (row * num_heads + head)[:, None] * HEAD_DIM + d[None, :]
    # [BLOCK, BLOCK_D]
    tl.store(k_rows + target, tl.load(k_cells + source, mask=mask), mask=mask)
    tl.store(v_rows + target, tl.load(v_cells + source, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["stride_kept", "num_positions", "sink_tokens"])
def _merge_rows(
    k_cells, v_cells, slots, kept, starts, k_rows, v_rows,
    stride_cell, stride_head, stride_kept, cells_per_layer, num_positions, sink_tokens,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row of one layer and head, the mean of a contiguous range of positions."""
    layer, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_heads = tl.num_programs(2)
    start, end = tl.load(starts + layer), tl.load(starts + layer + 1)
    row = start + tl.program_id(0)
    if row >= end:
        return
    kept += head * stride_kept + row
    own = tl.load(kept)
    below = tl.load(kept - 1, mask=row > start, other=0)
    above = tl.load(kept + 1, mask=row + 1 < end, other=0)
    # Midpoints belong to the lower row.
    first = tl.where(row > start, (below + own) // 2 + 1, 0)
    last = tl.where(row + 1 < end, (own + above) // 2, num_positions - 1)
    is_closed = (own < sink_tokens) | (own == num_positions - 1)
    first, last = tl.where(is_closed, own, first), tl.where(is_closed, own, last)

    base = layer.to(tl.int64) * cells_per_layer
    d = tl.arange(0, BLOCK_D)
    lanes = d < HEAD_DIM
    k_cells += head * stride_head + d
    v_cells += head * stride_head + d
    k_rows += (row * num_heads + head) * HEAD_DIM + d
    v_rows += (row * num_heads + head) * HEAD_DIM + d
    if first == last:
        cell = base + tl.load(slots + own).to(tl.int64)
        tl.store(k_rows, tl.load(k_cells + cell * stride_cell, mask=lanes), mask=lanes)
        tl.store(v_rows, tl.load(v_cells + cell * stride_cell, mask=lanes), mask=lanes)
    else:
        k_sum = tl.zeros([BLOCK_D], tl.float32)
        v_sum = tl.zeros([BLOCK_D], tl.float32)
        for block in range(first, last + 1, BLOCK):
            at = block + tl.arange(0, BLOCK)
            inside = at <= last
            cell = base + tl.load(slots + at, mask=inside, other=0).to(tl.int64)
            mask = inside[:, None] & lanes[None, :]
            source = (cell * stride_cell)[:, None]
            # [BLOCK, BLOCK_D]
            k_sum += tl.sum(tl.load(k_cells[None, :] + source, mask=mask, other=0.0).to(tl.float32), 0)
            v_sum += tl.sum(tl.load(v_cells[None, :] + source, mask=mask, other=0.0).to(tl.float32), 0)
        size = (last - first + 1).to(tl.float32)
        tl.store(k_rows, (k_sum / size).to(k_rows.dtype.element_ty), mask=lanes)
        tl.store(v_rows, (v_sum / size).to(v_rows.dtype.element_ty), mask=lanes)


@triton.jit(do_not_specialize=["num_rows"])
def _scatter_rows(
    k_cells, v_cells, cells, rows,
    stride_cell, stride_head, stride_kv, stride_row, stride_row_head, num_rows,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of one head."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    cell = tl.load(cells + row, mask=inside, other=0).to(tl.int64)  # [BLOCK]
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < HEAD_DIM)[None, :]
    source = rows + (row * stride_row + head * stride_row_head)[:, None] + d[None, :]
    target = (cell * stride_cell + head * stride_head)[:, None] + d[None, :]
    # [BLOCK, BLOCK_D]
    tl.store(k_cells + target, tl.load(source, mask=mask), mask=mask)
    tl.store(v_cells + target, tl.load(source + stride_kv, mask=mask), mask=mask)


def gather_rows(
    k_cells: torch.Tensor,
    v_cells: torch.Tensor,
    slots: torch.Tensor,
    kept: torch.Tensor,
    num_kept: Sequence[int],
    cells_per_layer: int,
    merge: bool = False,
    sink_tokens: int = 0,
) -> torch.Tensor:
    """See the CPU version. One launch; nothing waits for the device.

    Raises:
        ValueError: as the CPU version; lists or head dimensions that are not contiguous, lists that
            are no integers, K and V of different strides, cells to merge that are no floats.
    """
    check_gather(k_cells, v_cells, slots, kept, num_kept)
    _check(k_cells, v_cells, slots=slots, kept=kept)
    if merge and not k_cells.is_floating_point():
        raise ValueError(f"cells are {k_cells.dtype}; rows of numbers are needed to be merged")
    (num_heads, num_rows), head_dim = kept.shape, k_cells.shape[2]
    out = k_cells.new_empty(2, num_rows, num_heads, head_dim)
    if not num_rows or not num_heads:
        return out
    starts = list(accumulate(num_kept, initial=0))
    starts, most = on_device(starts, kept.device), max(num_kept)
    lists = k_cells, v_cells, slots, kept, starts, *out
    sizes = *k_cells.stride()[:2], kept.stride(0), cells_per_layer
    block_d = triton.next_power_of_2(head_dim)
    if merge:
        _merge_rows[most, len(num_kept), num_heads](
            *lists, *sizes, len(slots), sink_tokens,
            HEAD_DIM=head_dim, BLOCK=BLOCK_BUCKET, BLOCK_D=block_d, num_warps=2,
        )  # fmt: skip
    else:
        _copy_rows[triton.cdiv(most, BLOCK_ROWS), len(num_kept), num_heads](
            *lists, *sizes, HEAD_DIM=head_dim, BLOCK=BLOCK_ROWS, BLOCK_D=block_d, num_warps=4
        )
    return out


def scatter_rows(
    k_cells: torch.Tensor, v_cells: torch.Tensor, cells: torch.Tensor, rows: torch.Tensor
) -> None:
    """See the CPU version. One launch; nothing waits for the device.

    Raises:
        ValueError: as the CPU version; lists or head dimensions that are not contiguous, lists that
            are no integers, K and V of different strides.
    """
    check_scatter(k_cells, v_cells, cells, rows)
    _check(k_cells, v_cells, cells=cells, rows=rows)
    num_heads, head_dim = k_cells.shape[1:]
    if not rows.numel():
        return
    _scatter_rows[triton.cdiv(len(cells), BLOCK_ROWS), num_heads](
        k_cells, v_cells, cells, rows, *k_cells.stride()[:2], *rows.stride()[:3], len(cells),
        HEAD_DIM=head_dim, BLOCK=BLOCK_ROWS, BLOCK_D=triton.next_power_of_2(head_dim), num_warps=4,
    )  # fmt: skip


def _check(k_cells: torch.Tensor, v_cells: torch.Tensor, **others: torch.Tensor) -> None:
    """Raises ValueError for what the kernels would misread."""
    if k_cells.stride() != v_cells.stride() or k_cells.stride(2) != 1:
        raise ValueError(
            f"k_cells have strides {k_cells.stride()} and v_cells {v_cells.stride()}; "
            "equal ones and contiguous heads needed"
        )
    for name, x in others.items():
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} has strides {x.stride()}; its last dimension must be contiguous")
        if name != "rows" and x.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} is {x.dtype}; int32 or int64 needed")
        if x.device != k_cells.device:
            raise ValueError(f"{name} is on {x.device} and the cells on {k_cells.device}")


def aot_cases() -> dict[str, Callable[[], None]]:
    """Launches at production shapes with tensors on the CPU, for compiling ahead of time."""

    def case(num_layers: int, num_heads: int, merge: bool | None) -> None:
        n, kept = 32_768, 3277
        storage = torch.empty(num_layers * 2 * n, num_heads, 128, dtype=torch.bfloat16)
        cells = storage[: len(storage) - n], storage[n:]
        num_kept = [kept] * num_layers
        if merge is None:
            rows = torch.empty(2, sum(num_kept), num_heads, 128, dtype=torch.bfloat16)
            return scatter_rows(*cells, torch.empty(sum(num_kept), dtype=torch.int32), rows)
        positions = torch.empty(num_heads, sum(num_kept), dtype=torch.int64)
        gather_rows(*cells, torch.empty(n, dtype=torch.int64), positions, num_kept, 2 * n, merge)

    models = {"qwen2.5-vl-7b": (28, 4), "llava-v1.6-mistral-7b": (32, 8)}
    ways = {"gather": False, "merge": True, "scatter": None}
    return {
        f"{model} {way}": lambda shape=shape, merge=merge: case(*shape, merge)
        for model, shape in models.items()
        for way, merge in ways.items()
    }
