"""FlashInfer's planner on the device: the arrays of all layers in one launch.

The host planner looks for the smallest chunk with which all requests, cut into chunks of that many
rows, fit the grid; it then lists the chunks request by request. Both depend on sums over the
requests only, so one thread block computes them from the lengths. Here every block of a layer does
so for itself and writes its own stretch of the list: nothing is exchanged between blocks.

Upstream (FlashInfer 0.7.2, ``attention/scheduler.cuh``):
``PartitionPagedKVCacheBinarySearchMinNumPagePerBatch`` and ``DecodeSplitKVIndptr`` for CUDA-core
decode, ``PrefillBinarySearchKVChunkSize`` and ``PrefillSplitQOKVIndptr`` for tensor-core decode.
With one query row per request they agree, with one exception: the former counts no chunk for an
empty request while it searches and one when it lists them, and so may list more chunks than the
grid has blocks. This planner counts one in both; where the former's list fits, the chunk is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl

from .layout import MIN_CHUNK, Grid, Heads, Layout, cuda_core_layout, tensor_core_layout

TILES = 128  # entries of the list that one thread block writes


# Nothing is specialised on its value: a new batch size compiles only where BLOCK_B is new.
@triton.jit(
    do_not_specialize=[
        *("indptr_stride", "layer_stride", "batch_size", "num_blocks", "max_tiles", "request_indices"),
        *("kv_tile_indices", "o_indptr", "kv_chunk_size", "block_valid_mask", "qo_tile_indices"),
        *("merge_indptr", "total_num_rows"),
    ],
)
def _plan_kernel(
    indptr,  # [L, B + 1] int32
    ints,  # [L, layer_stride] int32, the int workspace
    masks,  # the same memory as bytes: [L, 4 * layer_stride]
    indptr_stride,
    layer_stride,
    batch_size,
    num_blocks,
    max_tiles,
    request_indices,  # this and the following: where an array begins, in elements of its view
    kv_tile_indices,
    o_indptr,
    kv_chunk_size,
    block_valid_mask,
    qo_tile_indices,
    merge_indptr,
    total_num_rows,
    MIN_CHUNK: tl.constexpr,
    SPLIT_KV: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    Q_TILES: tl.constexpr,
    LOG2_B: tl.constexpr,
    BLOCK_B: tl.constexpr,
    TILES: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    indptr += layer * indptr_stride
    ints += layer * layer_stride
    masks += layer * layer_stride * 4

    requests = tl.arange(0, BLOCK_B)
    here = requests < batch_size
    begin = tl.load(indptr + requests, mask=here, other=0)
    rows = tl.load(indptr + requests + 1, mask=here, other=0) - begin  # [BLOCK_B]
    longest = tl.max(rows, 0)
    # An empty request has one chunk, of no rows: its block writes its zeros.
    rows = tl.where(here, tl.maximum(rows, 1), 0)

    if SPLIT_KV:
        chunk = tl.full((), MIN_CHUNK, tl.int32)
        high = longest
        while chunk < high:
            middle = (chunk + high) // 2
            tiles = tl.sum((rows + middle - 1) // middle, 0) * Q_TILES
            fits = tiles <= max_tiles
            high = tl.where(fits, middle, high)
            chunk = tl.where(fits, chunk, middle + 1)
    else:
        chunk = tl.maximum(longest, 1)

    chunks = (rows + chunk - 1) // chunk  # [BLOCK_B]
    ends = tl.cumsum(chunks, 0)
    begins = ends - chunks
    total = tl.sum(chunks, 0) * Q_TILES

    # Entry t of the list is of the request behind all whose entries end at or before t.
    entries = tl.program_id(0) * TILES + tl.arange(0, TILES)
    valid = entries < total
    request = tl.zeros([TILES], dtype=tl.int32)
    for i in tl.static_range(LOG2_B):
        step = BLOCK_B >> (i + 1)
        ended = tl.gather(ends, request + (step - 1), 0) * Q_TILES <= entries
        request += tl.where(ended, step, 0)
    request = tl.where(valid, request, 0)
    entry = entries - tl.gather(begins, request, 0) * Q_TILES  # among its request's
    per_q_tile = tl.gather(chunks, request, 0)
    q_tile = entry // per_q_tile

    in_grid = entries < num_blocks
    tl.store(ints + request_indices + entries, request, mask=in_grid)
    tl.store(ints + kv_tile_indices + entries, tl.where(valid, entry - q_tile * per_q_tile, 0), mask=in_grid)
    if TENSOR_CORES:
        tl.store(ints + qo_tile_indices + entries, tl.where(valid, q_tile, 0), mask=in_grid)
    if SPLIT_KV:
        tl.store(masks + block_valid_mask + entries, valid.to(tl.uint8), mask=in_grid)

    if tl.program_id(0) == 0:
        first = requests == 0
        tl.store(ints + o_indptr + requests, begins, mask=first)
        tl.store(ints + o_indptr + requests + 1, ends, mask=here)
        tl.store(ints + kv_chunk_size, chunk)
        if TENSOR_CORES:
            tl.store(ints + merge_indptr + requests, begins, mask=first)
            tl.store(ints + merge_indptr + requests + 1, ends, mask=here)
            tl.store(ints + total_num_rows, batch_size)


def plan_layers(indptr: torch.Tensor, int_workspace: torch.Tensor, layout: Layout) -> None:
    """Write every layer's plan.

    Args:
        indptr: ``[L, B + 1]`` int32 with a contiguous last dimension; non-decreasing, beginning
            anywhere: layer l's request b has ``indptr[l, b + 1] - indptr[l, b]`` rows.
        int_workspace: ``[L, n]`` uint8, contiguous, ``n`` a multiple of 16 and at least
            ``layout.int_bytes``: row l becomes layer l's FlashInfer int workspace.
        layout: of batches of B requests.

    Raises:
        ValueError: another dtype, or the workspace is too small.
    """
    num_layers, batch_size = indptr.shape[0], indptr.shape[1] - 1
    if indptr.dtype != torch.int32 or indptr.stride(1) != 1:
        raise ValueError("indptr is int32 with contiguous rows")
    rows, row_bytes = int_workspace.shape
    if int_workspace.dtype != torch.uint8 or not int_workspace.is_contiguous() or row_bytes % 16:
        raise ValueError("the int workspace is contiguous uint8 with rows of a multiple of 16")
    if rows < num_layers or row_bytes < layout.int_bytes:
        raise ValueError(f"{rows} times {row_bytes} bytes hold no {num_layers} plans of {layout.int_bytes}")
    tensor_cores = layout.qo_tile_indices >= 0
    block_b = max(16, triton.next_power_of_2(batch_size))
    _plan_kernel[(triton.cdiv(layout.num_blocks, TILES), num_layers)](
        indptr,
        int_workspace.view(torch.int32),
        int_workspace,
        indptr.stride(0),
        int_workspace.shape[1] // 4,
        batch_size,
        layout.num_blocks,
        layout.max_tiles,
        layout.request_indices // 4,
        layout.kv_tile_indices // 4,
        layout.o_indptr // 4,
        layout.kv_chunk_size // 4,
        layout.block_valid_mask,
        layout.qo_tile_indices // 4,
        layout.merge_indptr // 4,
        layout.total_num_rows // 4,
        MIN_CHUNK=MIN_CHUNK,
        SPLIT_KV=layout.split_kv,
        TENSOR_CORES=tensor_cores,
        Q_TILES=layout.q_tiles,
        LOG2_B=block_b.bit_length() - 1,
        BLOCK_B=block_b,
        TILES=TILES,
        num_warps=4,
    )


def aot_cases() -> dict[str, Callable[[], None]]:
    """The launcher at production shapes, for compiling without a GPU."""

    def case(layout_of: Callable[[int, Heads, Grid], Layout], batch_size: int, heads: Heads) -> None:
        layout = layout_of(batch_size, heads, Grid(num_sms=132, num_blocks_per_sm=4))
        indptr = torch.empty(28, batch_size + 1, dtype=torch.int32)
        plan_layers(indptr, torch.empty(28, -(-layout.int_bytes // 256) * 256, dtype=torch.uint8), layout)

    seven, one = Heads(28, 4, 128), Heads(16, 16, 128)
    return {
        "plan_tensor_cores_b1": partial(case, tensor_core_layout, 1, seven),
        "plan_tensor_cores_b64": partial(case, tensor_core_layout, 64, seven),
        "plan_tensor_cores_b512": partial(case, tensor_core_layout, 512, seven),
        "plan_cuda_cores_b8": partial(case, cuda_core_layout, 8, one),
        "plan_cuda_cores_b512": partial(case, cuda_core_layout, 512, one),
    }
