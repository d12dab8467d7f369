"""Where FlashInfer's plan arrays lie: what of a plan depends on the batch size alone.

FlashInfer plans in a fixed grid when it is to be captured in a CUDA graph: the number of thread
blocks, the offsets of the arrays in its workspaces and the flags do not depend on the lengths.
These are ``plan_info``, a vector of int64 that ``run`` takes. Computed here, on the host, once per
batch size; what depends on the lengths is written on the device (``plan_kernel``).

Upstream (FlashInfer 0.7.2): ``DecodePlanInfo``, ``DecodePlanImpl``, ``PrefillPlanInfo``,
``PrefillPlanImpl`` and ``BatchDecodeWithPagedKVCacheWorkEstimationDispatched`` in
``attention/scheduler.cuh``, ``AlignedAllocator`` in ``allocator.h``, ``FA2DetermineCtaTileQ`` in
``utils.cuh``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

DECODE_GROUP_SIZES = (1, 2, 3, 4, 6, 8, 16)
"""Query heads per KV head that FlashInfer's CUDA-core decode is compiled for (``DISPATCH_GQA_GROUP_SIZE``)."""

MIN_CHUNK = 128
"""Fewest rows of a chunk at page size 1: 128 rows over the page size."""

PREFILL_BLOCKS_PER_SM = 2
"""Thread blocks per SM that ``PrefillPlanImpl`` counts on, whatever the kernel's occupancy."""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Heads:
    """The attention's shape."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads


@dataclass(frozen=True)
class Grid:
    """The device, as the planner sees it.

    Attributes:
        num_sms: streaming multiprocessors.
        num_blocks_per_sm: thread blocks of the CUDA-core decode kernel that fit on one of them; not
            read for tensor-core decode.
    """

    num_sms: int
    num_blocks_per_sm: int


@dataclass(frozen=True)
class Layout:
    """One layer's plan for batches of one size.

    Attributes:
        plan_info: what FlashInfer's ``run`` takes; offsets in bytes.
        num_blocks: the grid's first dimension, and the length of the arrays of tiles.
        max_tiles: tiles that the search for the chunk size may use, while that is possible.
        q_tiles: query tiles of a request: its one row's G heads over the kernel's tile.
        split_kv: requests are cut into chunks and the partial results merged.
        request_indices, kv_tile_indices, o_indptr, kv_chunk_size: offsets in the int workspace,
            in bytes, like the following.
        block_valid_mask: -1 where the kernel reads none.
        qo_tile_indices, merge_indptr, total_num_rows: tensor-core decode only, else -1.
        int_bytes, float_bytes: what the plan needs of either workspace.
    """

    plan_info: tuple[int, ...]
    num_blocks: int
    max_tiles: int
    q_tiles: int
    split_kv: bool
    request_indices: int
    kv_tile_indices: int
    o_indptr: int
    kv_chunk_size: int
    block_valid_mask: int
    qo_tile_indices: int
    merge_indptr: int
    total_num_rows: int
    int_bytes: int
    float_bytes: int


@dataclass
class _Allocator:
    """Offsets handed out one after the other, as FlashInfer does."""

    used: int = field(default=0)

    def take(self, size: int, alignment: int = 16) -> int:
        begin = ceil_div(self.used, alignment) * alignment
        self.used = begin + size
        return begin


def cta_tile_q(heads: Heads) -> int:
    """Packed query rows (row times head of the group) of one block at one query row per request.

    For head dimensions up to 256 on devices of compute capability 8 and later: the tile of 16 then
    takes 72 KiB of shared memory at most, and every such device has 99, which upstream asks it for.
    """
    if heads.group_size > 64 and heads.head_dim < 256:
        return 128
    return 64 if heads.group_size > 16 else 16


def cuda_core_layout(batch_size: int, heads: Heads, grid: Grid) -> Layout:
    """CUDA-core decode of ``batch_size`` requests: ``DecodePlanInfo``."""
    max_blocks = grid.num_sms * grid.num_blocks_per_sm
    max_tiles = max_blocks // heads.num_kv_heads
    split_kv = batch_size * heads.num_kv_heads < max_blocks
    num_blocks = max_tiles if split_kv else batch_size
    ints, floats = _Allocator(), _Allocator()
    request_indices = ints.take(4 * num_blocks)
    kv_tile_indices = ints.take(4 * num_blocks)
    o_indptr = ints.take(4 * (num_blocks + 1))
    kv_chunk_size = ints.take(4, 1)
    mask = v = s = 0
    if split_kv:
        v = floats.take(4 * heads.num_q_heads * num_blocks * heads.head_dim)
        s = floats.take(4 * heads.num_q_heads * num_blocks)
        mask = ints.take(num_blocks)
    plan_info = (
        num_blocks,
        v,
        s,
        request_indices,
        kv_tile_indices,
        o_indptr,
        mask,
        kv_chunk_size,
        1,
        int(split_kv),
    )
    return Layout(
        plan_info=plan_info,
        num_blocks=num_blocks,
        max_tiles=max_tiles,
        q_tiles=1,
        split_kv=split_kv,
        request_indices=request_indices,
        kv_tile_indices=kv_tile_indices,
        o_indptr=o_indptr,
        kv_chunk_size=kv_chunk_size,
        block_valid_mask=mask if split_kv else -1,
        qo_tile_indices=-1,
        merge_indptr=-1,
        total_num_rows=-1,
        int_bytes=ints.used,
        float_bytes=floats.used,
    )


def tensor_core_layout(batch_size: int, heads: Heads, grid: Grid) -> Layout:
    """Tensor-core decode of ``batch_size`` requests: ``PrefillPlanInfo``, one query row each."""
    group, tile_q = heads.group_size, cta_tile_q(heads)
    max_tiles = PREFILL_BLOCKS_PER_SM * grid.num_sms // heads.num_kv_heads
    num_blocks = max(max_tiles, ceil_div(batch_size * group, tile_q) + batch_size - 1)
    ints, floats = _Allocator(), _Allocator()
    request_indices = ints.take(4 * num_blocks)
    qo_tile_indices = ints.take(4 * num_blocks)
    kv_tile_indices = ints.take(4 * num_blocks)
    o_indptr = ints.take(4 * (batch_size + 1))
    kv_chunk_size = ints.take(4, 1)
    total_num_rows = ints.take(4)
    max_partial_rows = ceil_div(num_blocks * tile_q, group)
    v = floats.take(4 * heads.num_q_heads * max_partial_rows * heads.head_dim)
    s = floats.take(4 * heads.num_q_heads * max_partial_rows)
    merge_indptr = ints.take(4 * (batch_size + 1))
    mask = ints.take(num_blocks)
    plan_info = (
        *(num_blocks, batch_size, total_num_rows, tile_q),
        *(request_indices, qo_tile_indices, kv_tile_indices, merge_indptr, o_indptr, kv_chunk_size),
        *(v, s, mask, 1, 1),
    )
    return Layout(
        plan_info=plan_info,
        num_blocks=num_blocks,
        max_tiles=max_tiles,
        q_tiles=ceil_div(group, tile_q),
        split_kv=True,
        request_indices=request_indices,
        kv_tile_indices=kv_tile_indices,
        o_indptr=o_indptr,
        kv_chunk_size=kv_chunk_size,
        block_valid_mask=mask,
        qo_tile_indices=qo_tile_indices,
        merge_indptr=merge_indptr,
        total_num_rows=total_num_rows,
        int_bytes=ints.used,
        float_bytes=floats.used,
    )


def prefers_tensor_cores(group_size: int, kv_dtype: torch.dtype) -> bool:
    """SGLang's choice (``should_use_tensor_core``): 8-bit caches, and 16-bit ones from 4 query heads per KV head."""
    if kv_dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return True
    return kv_dtype in (torch.float16, torch.bfloat16) and group_size >= 4
