"""The index lists of all layers in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_vlkv.kernels.ragged_attention.arguments import lanes
from sglang_vlkv.kernels.ragged_attention.rows import RowTable

TILE = 1024  # indices that a program writes at a time
PROGRAMS = 2048  # of one launch; each takes the next tile in turn


class RaggedIndices:
    """``indptr`` and ``indices`` of what a batch sees, built where they are read.

    Nothing is copied to the host and nothing allocated after construction, so :meth:`build` can be
    captured in a CUDA graph; the graph of one batch size always finds its lists at one address.

    Attributes:
        indptr: ``[L, max_requests + 1]`` int32.
        indices: ``[capacity]`` int32.
    """

    def __init__(
        self, num_layers: int, max_requests: int, capacity: int, device: torch.device | str
    ) -> None:
        """
        Args:
            capacity: indices of all layers and requests together. The caller sees to it that they
                fit; what does not is neither written nor named by ``indptr``.
        """
        if not 0 < capacity <= torch.iinfo(torch.int32).max:
            raise ValueError(f"capacity is counted in an int32 and at least 1, not {capacity}")
        self.num_layers, self.max_requests, self.capacity = num_layers, max_requests, capacity
        self.indptr = torch.zeros(num_layers, max_requests + 1, dtype=torch.int32, device=device)
        self.indices = torch.zeros(capacity, dtype=torch.int32, device=device)

    def build(
        self,
        table: RowTable,
        rows: torch.Tensor,
        seq_lens: torch.Tensor,
        req_to_token: torch.Tensor,
        cells_per_layer: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes what each request of the batch sees, layer after layer and request after request.

        Args:
            table: of ``N`` rows and ``L`` layers.
            rows: ``[B]`` int64, each request's row; rows may repeat.
            seq_lens: ``[B]`` int32 or int64, the newest token included.
            req_to_token: ``[N, C]`` int32, slots.
            cells_per_layer: slot s of layer l is cell ``l * cells_per_layer + s``.

        Returns:
            ``indptr`` ``[L, B + 1]`` int32 and ``indices`` ``[capacity]`` int32, overwritten by the
            next call. Request b in layer l sees ``indices[indptr[l, b] : indptr[l, b + 1]]``:
            ``indptr`` counts over all layers, and a layer begins where the one before it ends.
        """
        self._check(table, rows, seq_lens, req_to_token)
        num_requests = rows.shape[0]
        indptr = self.indptr.view(-1)[: self.num_layers * (num_requests + 1)]
        indptr = indptr.view(self.num_layers, num_requests + 1)
        grid = self.num_layers, triton.cdiv(PROGRAMS, self.num_layers)
        _build_indices[grid](
            *table,
            rows,
            seq_lens,
            req_to_token,
            indptr,
            self.indices,
            num_requests,
            req_to_token.stride(0),
            cells_per_layer,
            self.capacity,
            NUM_LAYERS=self.num_layers,
            BLOCK_B=lanes(num_requests),
            TILE=TILE,
            num_warps=4 if num_requests <= 1024 else 16,
        )
        return indptr, self.indices

    def _check(
        self, table: RowTable, rows: torch.Tensor, seq_lens: torch.Tensor, req_to_token: torch.Tensor
    ) -> None:
        per_layer = req_to_token.shape[0], self.num_layers + 1
        if table.fixed.shape != per_layer or table.sliding.shape != per_layer:
            raise ValueError(
                f"fixed and sliding must be [N, L + 1] = {list(per_layer)}; they are "
                f"{list(table.fixed.shape)} and {list(table.sliding.shape)}"
            )
        if not 0 < rows.shape[0] <= self.max_requests or seq_lens.shape != rows.shape:
            raise ValueError(
                f"rows and seq_lens must be [B] with 1 <= B <= {self.max_requests}; they are "
                f"{list(rows.shape)} and {list(seq_lens.shape)}"
            )
        contiguous = *table, rows, seq_lens
        if not all(x.is_contiguous() for x in contiguous) or req_to_token.stride(1) != 1:
            raise ValueError("the table, rows and seq_lens must be contiguous, and each row of req_to_token")
        dtypes = table.cells.dtype, rows.dtype, table.fixed.dtype, table.sliding.dtype, table.first_own.dtype
        if dtypes != (torch.int64,) * 2 + (torch.int32,) * 3 or req_to_token.dtype != torch.int32:
            raise ValueError("cells and rows must be int64, the rest of the table and req_to_token int32")


@triton.jit(do_not_specialize=["num_requests", "cells_per_layer", "capacity"])
def _build_indices(
    cells_ptr,
    fixed_ptr,
    sliding_ptr,
    first_own_ptr,
    rows_ptr,
    seq_lens_ptr,
    req_to_token_ptr,
    indptr_ptr,
    indices_ptr,
    num_requests,
    row_stride,
    cells_per_layer,
    capacity,
    NUM_LAYERS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (l, p) writes tiles p, p + programs, ... of layer l, counted over its requests."""
    layer = tl.program_id(0)
    lane = tl.arange(0, BLOCK_B)
    valid = lane < num_requests
    rows = tl.load(rows_ptr + lane, mask=valid, other=0)  # [BLOCK_B]
    lens = tl.load(seq_lens_ptr + lane, mask=valid, other=0).to(tl.int64)
    own = lens - tl.load(first_own_ptr + rows, mask=valid, other=0)
    valid = valid & (own > 0)
    at = rows * (NUM_LAYERS + 1) + layer
    fixed_start = tl.load(fixed_ptr + at, mask=valid, other=0).to(tl.int64)
    fixed_end = tl.load(fixed_ptr + at + 1, mask=valid, other=0).to(tl.int64)
    sliding_start = tl.load(sliding_ptr + at, mask=valid, other=0).to(tl.int64)
    sliding_end = tl.load(sliding_ptr + at + 1, mask=valid, other=0).to(tl.int64)
    slides = tl.load(sliding_ptr + rows * (NUM_LAYERS + 1) + NUM_LAYERS, mask=valid, other=0) > 0
    own = tl.where(valid, own, 0)
    # The lengths are prefix sums over the layers already, so a layer knows where it begins.
    before = fixed_start + tl.where(slides, sliding_start, layer * own)  # of the layers below
    num_rows = fixed_end - fixed_start + tl.where(slides, sliding_end - sliding_start, own)
    base = tl.sum(before, 0)
    ends = base + tl.cumsum(num_rows, 0)

    if tl.program_id(1) == 0:
        indptr_ptr += layer.to(tl.int64) * (num_requests + 1)
        tl.store(indptr_ptr, tl.minimum(base, capacity).to(tl.int32))
        tl.store(indptr_ptr + 1 + lane, tl.minimum(ends, capacity).to(tl.int32), mask=lane < num_requests)

    tiles = ((num_rows + TILE - 1) // TILE).to(tl.int32)
    tile_ends = tl.cumsum(tiles, 0)
    num_tiles = tl.sum(tiles, 0)
    first_cell = layer.to(tl.int64) * cells_per_layer
    for tile in range(tl.program_id(1), num_tiles, tl.num_programs(1)):
        request = tl.sum((tile_ends <= tile).to(tl.int32), 0)
        mine = lane == request
        row = tl.sum(tl.where(mine, rows, 0), 0)
        count = tl.sum(tl.where(mine, num_rows, 0), 0)
        start = tl.sum(tl.where(mine, ends - num_rows, 0), 0)
        fixed = tl.sum(tl.where(mine, fixed_start, 0), 0)
        num_fixed = tl.sum(tl.where(mine, fixed_end - fixed_start, 0), 0)
        seq_len = tl.sum(tl.where(mine, lens, 0), 0)
        tile_in_request = tile - tl.sum(tl.where(mine, tile_ends - tiles, 0), 0)

        i = tile_in_request.to(tl.int64) * TILE + tl.arange(0, TILE)  # [TILE], which of the request's rows
        wanted = (i < count) & (start + i < capacity)
        cells = tl.load(cells_ptr + row).to(tl.pointer_type(tl.int32))
        is_fixed = i < num_fixed
        named = tl.load(cells + fixed + i, mask=wanted & is_fixed, other=0)
        # The newest slot is the last row.
        slots = req_to_token_ptr + row * row_stride + seq_len - count + i
        slot = tl.load(slots, mask=wanted & ~is_fixed, other=0)
        cell = tl.where(is_fixed, named, (first_cell + slot).to(tl.int32))
        tl.store(indices_ptr + start + i, cell, mask=wanted)
