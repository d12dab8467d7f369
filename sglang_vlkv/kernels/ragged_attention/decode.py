"""Ragged decode: the rows of all requests cut into chunks of equal cost, on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_vlkv.kernels.ragged_attention.arguments import LOG2_E, check_attention, lanes

# A row is found through its index, and Triton halves the stages between the two loads: two tiles of K
# and V are in shared memory while the index of a third is on its way.
STAGES = 5
BLOCK_SHARED = 76 * 1024  # bytes at most of a block of the main kernel, with what CUDA keeps for itself
HOPPER = 132, 233_472  # multiprocessors, bytes of shared memory in each
MERGED = 64  # partial results that the merge reads at a time
MERGES_PER_SM = 4  # programs of the merge that run at a time; those of many requests look at several
PLANNED = 16  # chunks whose requests are looked up at a time


class RaggedDecode:
    """One query token per request attends to its rows: FlashInfer's paged decode, page size 1.

    A layer's rows are cut into chunks (request, range). :meth:`plan` picks the smallest chunk for
    which their number stays within :meth:`num_chunks`, for all layers in one launch. In :meth:`run`
    one program per chunk and KV head reads the chunk's rows; a request of one chunk is then done, the
    partial results of the others are merged. Both can be captured in a CUDA graph: grids depend on B
    alone, nothing is copied to the host, and with ``out`` given nothing is allocated. A captured run
    belongs to the plan captured with it.

    Attributes:
        tile: rows that are read at a time; chunks are multiples of it.
        first_chunk: ``[L, max_requests + 1]`` int32, prefix sums of the requests' chunks.
        owner: ``[L, max_chunks]`` int32, each chunk's request; -1 behind the last.
        chunk_rows: ``[L]`` int32, rows of a chunk; a request's last may be shorter.
        partial, partial_lse: ``[max_chunks, Hq, D]`` and ``[max_chunks, Hq]`` float32, results and
            binary logarithms of the sums of exponentials. Layers run one after another and share them.
    """

    def __init__(
        self,
        num_layers: int,
        max_requests: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        num_sms: int | None = None,
    ) -> None:
        """
        Args:
            num_sms: multiprocessors to fill; those of ``device`` where it is None. On a CPU, for
                tests and compilation, as many as Hopper has.
        """
        if num_q_heads % num_kv_heads:
            raise ValueError(f"{num_q_heads} query heads cannot share {num_kv_heads} KV heads")
        sms, shared = HOPPER
        if torch.device(device).type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            sms, shared = properties.multi_processor_count, properties.shared_memory_per_multiprocessor
        sms = sms if num_sms is None else num_sms
        blocks = sms * max(1, shared // BLOCK_SHARED)
        self._max_merges = MERGES_PER_SM * sms
        self.num_layers, self.max_requests = num_layers, max_requests
        self.num_q_heads, self.num_kv_heads, self.head_dim = num_q_heads, num_kv_heads, head_dim
        self.tile = decode_tile(head_dim)
        self._one_wave = max(1, blocks // num_kv_heads)
        self._planned_requests = 0
        self.max_chunks = chunks = self.num_chunks(max_requests)

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.first_chunk = empty(num_layers, max_requests + 1, dtype=torch.int32)
        self.owner = empty(num_layers, chunks, dtype=torch.int32)
        self.chunk_rows = empty(num_layers, dtype=torch.int32)
        self.partial = empty(chunks, num_q_heads, head_dim, dtype=torch.float32)
        self.partial_lse = empty(chunks, num_q_heads, dtype=torch.float32)

    def num_chunks(self, num_requests: int) -> int:
        """The most chunks of one layer.

        The chunks of few requests run all at once, each 8/7 of an even share at most. Many requests
        round too much for that: their chunks are half a share at most, and the GPU starts the next
        where one ends.
        """
        if 8 * num_requests <= self._one_wave:
            return self._one_wave
        return 2 * self._one_wave + num_requests

    def plan(self, indptr: torch.Tensor) -> None:
        """Cuts the rows of all layers into chunks, for the runs that follow.

        Args:
            indptr: ``[L, B + 1]`` int32, offsets into ``indices``, contiguous.
        """
        num_requests = self._check_indptr(indptr)
        num_chunks = self.num_chunks(num_requests)
        _plan_chunks[self.num_layers, triton.cdiv(num_chunks, 4 * PLANNED)](
            indptr,
            self.first_chunk,
            self.owner,
            self.chunk_rows,
            num_requests,
            num_chunks,
            self.max_requests + 1,
            self.max_chunks,
            TILE=self.tile,
            BLOCK_B=lanes(num_requests),
            BLOCK_C=PLANNED,
            num_warps=4,
        )
        self._planned_requests = num_requests

    def run(
        self,
        layer: int,
        q: torch.Tensor,
        k_cells: torch.Tensor,
        v_cells: torch.Tensor,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        scale: float,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends in one layer.

        Args:
            layer: which of ``indptr``.
            q: ``[B, Hq, D]`` float32, bfloat16 or float16; requests may be further apart.
            k_cells, v_cells: ``[num_cells, Hkv, D]`` contiguous, one dtype; converted to q's.
            indptr: ``[L, B + 1]`` int32, what was planned.
            indices: flat int32 cell ids of all layers.
            scale: of the logits, before the softmax.
            out: ``[B, Hq, D]`` contiguous, in q's dtype.

        Returns:
            ``[B, Hq, D]``; zeros for a request without rows.
        """
        num_requests = self._check_indptr(indptr)
        if num_requests != self._planned_requests:
            raise ValueError(f"{self._planned_requests} requests were planned, not {num_requests}")
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer {layer} of {self.num_layers}")
        if q.shape != (num_requests, self.num_q_heads, self.head_dim):
            raise ValueError(
                f"q must be [B, Hq, D] = {[num_requests, self.num_q_heads, self.head_dim]}; "
                f"it is {list(q.shape)}"
            )
        out = check_attention(q, k_cells, v_cells, indices, out)
        if k_cells.shape[1] != self.num_kv_heads:
            raise ValueError(f"{self.num_kv_heads} KV heads were planned; the cells have {k_cells.shape[1]}")
        group = self.num_q_heads // self.num_kv_heads
        block_d = max(16, triton.next_power_of_2(self.head_dim))
        num_chunks = self.num_chunks(num_requests)
        _decode_chunks[(num_chunks * self.num_kv_heads,)](
            q,
            k_cells,
            v_cells,
            out,
            self.partial,
            self.partial_lse,
            indptr,
            indices,
            self.first_chunk,
            self.owner,
            self.chunk_rows,
            layer,
            num_requests,
            self.max_requests + 1,
            self.max_chunks,
            scale * LOG2_E,
            q.stride(0),
            HKV=self.num_kv_heads,
            GROUP=group,
            D=self.head_dim,
            BLOCK_H=max(16, triton.next_power_of_2(group)),
            BLOCK_D=block_d,
            TILE=self.tile if q.element_size() == 2 else max(16, self.tile // 2),
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=4,
            num_stages=STAGES,
        )
        num_outputs = num_requests * self.num_q_heads
        _merge_chunks[(min(num_outputs, self._max_merges),)](
            self.partial,
            self.partial_lse,
            out,
            self.first_chunk,
            layer,
            num_outputs,
            self.max_requests + 1,
            HQ=self.num_q_heads,
            D=self.head_dim,
            BLOCK_C=MERGED,
            BLOCK_D=block_d,
            num_warps=4,
        )
        return out

    def _check_indptr(self, indptr: torch.Tensor) -> int:
        num_layers, entries = indptr.shape
        if num_layers != self.num_layers or not 0 < entries - 1 <= self.max_requests:
            raise ValueError(
                f"indptr must be [L, B + 1] with L = {self.num_layers} and 1 <= B <= "
                f"{self.max_requests}, not {list(indptr.shape)}"
            )
        if indptr.dtype != torch.int32 or not indptr.is_contiguous():
            raise ValueError("indptr must be contiguous int32")
        return entries - 1


def decode_tile(head_dim: int) -> int:
    """Rows of which K and V, 16 bits each, take 32 KiB."""
    return max(16, 8192 // max(64, triton.next_power_of_2(head_dim)))


@triton.jit(do_not_specialize=["num_requests", "num_chunks", "table_stride", "owner_stride"])
def _plan_chunks(
    indptr_ptr,
    first_chunk_ptr,
    owner_ptr,
    chunk_rows_ptr,
    num_requests,
    num_chunks,
    table_stride,
    owner_stride,
    TILE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Programs (l, ...) agree on layer l's chunks; each writes the owners of its share of them."""
    layer = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_B)
    valid = lane < num_requests
    indptr_ptr += layer * (num_requests + 1) + lane
    starts = tl.load(indptr_ptr, mask=valid, other=0)  # [BLOCK_B]
    ends = tl.load(indptr_ptr + 1, mask=valid, other=0)
    tiles = (ends - starts + TILE - 1) // TILE

    # The smallest chunk, in tiles, for which there are at most num_chunks; the largest leaves one
    # chunk per request, and there are no more requests than chunks.
    low, high = 1, tl.maximum(tl.max(tiles, 0), 1)
    while low < high:
        middle = (low + high) // 2
        fits = tl.sum((tiles + middle - 1) // middle, 0) <= num_chunks
        low = tl.where(fits, low, middle + 1)
        high = tl.where(fits, middle, high)
    chunks = (tiles + low - 1) // low
    chunk_ends = tl.cumsum(chunks, 0)
    if tl.program_id(1) == 0:
        first_chunk_ptr += layer * table_stride
        tl.store(chunk_rows_ptr + layer, low * TILE)
        tl.store(first_chunk_ptr, 0)
        tl.store(first_chunk_ptr + 1 + lane, chunk_ends, mask=valid)

    # Chunk c belongs to the request before which all that ends at or before c; -1 where there is no c.
    total = tl.sum(chunks, 0)
    owner_ptr += layer * owner_stride
    for first in range(tl.program_id(1) * BLOCK_C, num_chunks, tl.num_programs(1) * BLOCK_C):
        chunk = first + tl.arange(0, BLOCK_C)
        owner = tl.sum((chunk_ends[None, :] <= chunk[:, None]).to(tl.int32), 1)
        tl.store(owner_ptr + chunk, tl.where(chunk < total, owner, -1), mask=chunk < num_chunks)


@triton.jit(do_not_specialize=["layer", "num_requests", "table_stride", "owner_stride"])
def _decode_chunks(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    indptr_ptr,
    indices_ptr,
    first_chunk_ptr,
    owner_ptr,
    chunk_rows_ptr,
    layer,
    num_requests,
    table_stride,
    owner_stride,
    scale_log2,
    q_stride,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program ``chunk * HKV + head`` is the G query heads of one KV head over one chunk.

    The programs of a chunk's KV heads are neighbours, so they run at the same time and together read
    each row's ``HKV * D`` contiguous values while its DRAM page is open, and none needs registers for
    more than its own head.
    """
    chunk = tl.program_id(0) // HKV
    kv_head = tl.program_id(0) % HKV
    layer = layer.to(tl.int64)
    request = tl.load(owner_ptr + layer * owner_stride + chunk)
    if request < 0:
        return
    indptr_ptr += layer * (num_requests + 1)
    first_chunk_ptr += layer * table_stride
    begin = tl.load(indptr_ptr + request)
    end = tl.load(indptr_ptr + request + 1)
    first_chunk = tl.load(first_chunk_ptr + request)
    num_chunks = tl.load(first_chunk_ptr + request + 1) - first_chunk
    chunk_rows = tl.load(chunk_rows_ptr + layer)
    begin += (chunk - first_chunk) * chunk_rows
    end = tl.minimum(end, begin + chunk_rows)

    g = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + g
    real = (g < GROUP)[:, None] & (d < D)[None, :]
    at = heads[:, None] * D + d[None, :]  # [BLOCK_H, BLOCK_D]
    q = tl.load(q_ptr + request.to(tl.int64) * q_stride + at, mask=real, other=0.0)

    peak = tl.full([BLOCK_H], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    n = tl.arange(0, TILE)
    for start in range(begin, end, TILE):
        seen = start + n < end
        cell = tl.load(indices_ptr + start + n, mask=seen, other=0).to(tl.int64)
        row = (cell * HKV + kv_head) * D  # [TILE]
        mask = seen[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + row[:, None] + d[None, :], mask=mask, other=0.0).to(q.dtype)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [BLOCK_H, TILE]
        logits = tl.where(seen[None, :], logits, -float("inf"))
        v = tl.load(v_ptr + row[:, None] + d[None, :], mask=mask, other=0.0).to(q.dtype)
        peak_now = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.exp2(logits - peak_now[:, None])
        keep = tl.exp2(peak - peak_now)
        total = total * keep + tl.sum(weights, 1)
        acc = acc * keep[:, None]
        acc = tl.dot(weights.to(q.dtype), v, acc, input_precision=PRECISION)
        peak = peak_now

    acc = acc / total[:, None]
    if num_chunks == 1:
        out_ptr += request.to(tl.int64) * (HKV * GROUP * D)
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=real)
    else:
        slot = chunk.to(tl.int64) * (HKV * GROUP)
        tl.store(partial_ptr + slot * D + at, acc, mask=real)
        tl.store(lse_ptr + slot + heads, peak + tl.log2(total), mask=g < GROUP)


@triton.jit(do_not_specialize=["layer", "num_outputs", "table_stride"])
def _merge_chunks(
    partial_ptr,
    lse_ptr,
    out_ptr,
    first_chunk_ptr,
    layer,
    num_outputs,
    table_stride,
    HQ: tl.constexpr,
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Output ``request * HQ + head``: the request's chunks, weighted by their sums of exponentials.

    What has one chunk is written already; what has none is zero.
    """
    first_chunk_ptr += layer.to(tl.int64) * table_stride
    c = tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    for output in range(tl.program_id(0), num_outputs, tl.num_programs(0)):
        request = output // HQ
        head = output % HQ
        first = tl.load(first_chunk_ptr + request)
        end = tl.load(first_chunk_ptr + request + 1)
        if end - first != 1:
            peak = -float("inf")
            total = 0.0
            acc = tl.zeros([BLOCK_D], tl.float32)
            for start in range(first, end, BLOCK_C):
                mine = start + c < end
                slot = (start + c).to(tl.int64) * HQ + head  # [BLOCK_C]
                lse = tl.load(lse_ptr + slot, mask=mine, other=-float("inf"))
                mask = mine[:, None] & (d < D)[None, :]
                partial = tl.load(partial_ptr + slot[:, None] * D + d[None, :], mask=mask, other=0.0)
                peak_now = tl.maximum(peak, tl.max(lse, 0))
                weights = tl.exp2(lse - peak_now)
                keep = tl.exp2(peak - peak_now)
                total = total * keep + tl.sum(weights, 0)
                acc = acc * keep + tl.sum(weights[:, None] * partial, 0)
                peak = peak_now
            acc = acc / tl.where(end > first, total, 1.0)
            at = tl.cast(output, tl.int64) * D + d
            tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=d < D)
