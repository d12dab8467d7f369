"""FlashInfer's planner and ragged attention in plain loops, for tests and for the self-check.

The planners follow ``attention/scheduler.cuh`` of FlashInfer 0.7.2 step by step at page size 1 in
CUDA-graph mode and share nothing with ``layout`` and ``plan_kernel`` but the description of the
device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .layout import Grid, Heads


class Plan(NamedTuple):
    """What the host planner makes of one batch; names as upstream, None where the kind has no such array."""

    padded_batch_size: int
    split_kv: bool
    kv_chunk_size: int
    request_indices: list[int]
    kv_tile_indices: list[int]
    o_indptr: list[int]
    block_valid_mask: list[bool] | None
    cta_tile_q: int | None = None
    qo_tile_indices: list[int] | None = None
    merge_indptr: list[int] | None = None
    total_num_rows: int | None = None

    @property
    def overflows(self) -> bool:
        """More chunks than blocks: upstream writes past its arrays (CUDA-core decode, empty requests)."""
        return len(self.request_indices) > self.padded_batch_size


def cuda_core_plan(lengths: list[int], heads: Heads, grid: Grid) -> Plan:
    """``DecodePlan``; ``lengths``: rows per request."""
    max_grid_size, gdy = grid.num_sms * grid.num_blocks_per_sm, heads.num_kv_heads
    split_kv = len(lengths) * gdy < max_grid_size
    if split_kv:
        low, high = 128, max(lengths)
        while low < high:
            mid = (low + high) // 2
            if sum(-(-n // mid) for n in lengths) * gdy > max_grid_size:
                low = mid + 1
            else:
                high = mid
        chunk, padded = low, max_grid_size // gdy
    else:
        chunk, padded = max([1, *lengths]), len(lengths)
    request_indices, kv_tile_indices, o_indptr = [], [], [0]
    for request, n in enumerate(lengths):
        chunks = -(-max(n, 1) // chunk)
        request_indices += [request] * chunks
        kv_tile_indices += range(chunks)
        o_indptr.append(o_indptr[-1] + chunks)
    mask = [i < len(request_indices) for i in range(padded)] if split_kv else None
    return Plan(padded, split_kv, chunk, request_indices, kv_tile_indices, o_indptr, mask)


def tensor_core_plan(lengths: list[int], heads: Heads, grid: Grid) -> Plan:
    """``PrefillPlan`` as the decode wrapper calls it, one query row per request."""
    group = heads.num_q_heads // heads.num_kv_heads
    if group > 64 and heads.head_dim < 256:
        tile = 128
    elif group > 16:
        tile = 64
    else:  # as long as 16 rows of queries and 64 of keys and values fit in shared memory: 16-bit ones of 256 do
        tile = 16
    total_tiles_q = -(-len(lengths) * group // tile) + len(lengths) - 1
    max_batch_size_if_split = 2 * grid.num_sms // heads.num_kv_heads
    q_tiles = -(-group // tile)
    low, high = 128, max([1, *lengths])
    while low < high:
        mid = (low + high) // 2
        if sum(q_tiles * -(-max(n, 1) // mid) for n in lengths) > max_batch_size_if_split:
            low = mid + 1
        else:
            high = mid
    request_indices, qo_tile_indices, kv_tile_indices, merge_indptr, o_indptr = [], [], [], [0], [0]
    for request, n in enumerate(lengths):
        chunks = -(-max(n, 1) // low)
        for q_tile in range(q_tiles):
            for kv_tile in range(chunks):
                request_indices.append(request)
                qo_tile_indices.append(q_tile)
                kv_tile_indices.append(kv_tile)
        merge_indptr.append(merge_indptr[-1] + chunks)
        o_indptr.append(o_indptr[-1] + chunks)
    padded = max(max_batch_size_if_split, total_tiles_q)
    return Plan(
        *(padded, True, low, request_indices, kv_tile_indices, o_indptr),
        *(
            [i < len(request_indices) for i in range(padded)],
            tile,
            qo_tile_indices,
            merge_indptr,
            len(lengths),
        ),
    )


def ragged_decode(
    q: torch.Tensor,
    k_cells: torch.Tensor,
    v_cells: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """One query row per request over that request's cells, in float64.

    Args:
        q: ``[B, Hq, D]``.
        k_cells, v_cells: ``[num_cells, Hkv, D]``.
        indptr: ``[B + 1]``, offsets into ``indices``: one layer's.
        indices: ``[nnz]``, cells.

    Returns:
        ``[B, Hq, D]`` float64; zeros for a request without rows.
    """
    qo_indptr = torch.arange(len(q) + 1)
    return ragged_extend(q, k_cells, v_cells, qo_indptr, indptr, indices, scale)


def ragged_extend(
    q: torch.Tensor,
    k_cells: torch.Tensor,
    v_cells: torch.Tensor,
    qo_indptr: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The last E of a request's n cells are its E query rows' own: row e sees the first n - E + e + 1.

    Args:
        q: ``[nnz_q, Hq, D]``.
        qo_indptr: ``[B + 1]``, offsets into ``q``. The rest as in ``ragged_decode``.
    """
    group = q.shape[1] // k_cells.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for request in range(len(qo_indptr) - 1):
        cells = indices[indptr[request] : indptr[request + 1]].long()
        k, v = (x[cells].double().cpu().repeat_interleave(group, 1) for x in (k_cells, v_cells))  # [n, Hq, D]
        begin, end = int(qo_indptr[request]), int(qo_indptr[request + 1])
        for row in range(begin, end):
            seen = len(cells) - (end - 1 - row)
            if seen <= 0:
                continue
            logits = torch.einsum("hd,nhd->hn", q[row].double().cpu(), k[:seen]) * scale
            out[row] = torch.einsum("hn,nhd->hd", logits.softmax(-1), v[:seen])
    return out
