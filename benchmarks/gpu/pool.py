"""Cells with random contents, and requests that see some of them."""

from __future__ import annotations

import torch

from benchmarks.gpu.shapes import Batch, Model, kept_rows
from benchmarks.gpu.timing import Clock
from sglang_vlkv.kernels.ragged_attention.rows import RowTable

OWN = 32  # tokens that a compacted request has decoded


class Pool:
    """All layers' K and V in one allocation, ``[L, 2, rows, Hkv, D]``, random normal.

    Attributes:
        k_cells, v_cells: ``[cells, Hkv, D]``; the same id addresses a row's K and V.
        cells_per_layer: slot s of layer l is cell ``l * cells_per_layer + s``.
    """

    def __init__(self, model: Model, rows: int, clock: Clock) -> None:
        shape = model.layers, 2, rows, model.kv_heads, model.head_dim
        self.storage = torch.empty(shape, dtype=clock.dtype, device=clock.device)
        for layer in self.storage:
            layer.normal_()
        self.model, self.rows, self.device = model, rows, clock.device
        self.cells_per_layer = 2 * rows
        self.k_cells = self.storage.view(-1, model.kv_heads, model.head_dim)
        self.v_cells = self.k_cells[rows:]

    def cells_of(self, slots: torch.Tensor) -> torch.Tensor:
        """All layers' cells of ``slots``, layer after layer, int32."""
        layers = torch.arange(self.model.layers, device=self.device)[:, None]
        return (layers * self.cells_per_layer + slots.long()).flatten().int()


class Residents:
    """Several sets of the same batch on rows of their own, in random slots.

    Attributes:
        rows, seq_lens: per set, ``[B]`` int64.
        moved: bytes that one set's decode step has to read: rows and their indices.
    """

    def __init__(self, pool: Pool, batch: Batch, alpha: float, uneven: bool, sets: int) -> None:
        self.pool, self.batch = pool, batch
        layers, device = pool.model.layers, pool.device
        size = len(batch.lengths)
        self.compacted = alpha < 1
        own = OWN if self.compacted else 0
        self.table = RowTable.empty(sets * size, layers, device)
        longest = max(batch.lengths) + own
        self.req_to_token = torch.zeros(sets * size, longest, dtype=torch.int32, device=device)
        free = torch.randperm(pool.rows - 1, device=device).add_(1).int()  # slot 0 is for padding
        self._cells: list[torch.Tensor] = []  # the table holds their addresses
        self._counts: list[list[int]] = []
        taken = num_rows = 0
        for row in range(sets * size):
            length = batch.lengths[row % size]
            if self.compacted:
                kept = kept_rows(layers, length, alpha, uneven, seed=row % size)
                num_slots = -(-sum(kept) // layers)
                slots = free[taken : taken + num_slots]
                cells = pool.cells_of(slots)[: sum(kept)].contiguous()
                self._cells.append(cells)
                self.table.cells[row] = cells.data_ptr()
                ends = torch.tensor([0, *kept], dtype=torch.int32).cumsum(0)
                self.table.fixed[row] = ends.int().to(device)
                self.table.first_own[row] = length
                taken += num_slots
            else:
                kept = [0] * layers
            self._counts.append(kept)
            slots_own = own if self.compacted else length
            start = length if self.compacted else 0
            self.req_to_token[row, start : start + slots_own] = free[taken : taken + slots_own]
            taken += slots_own
            if row < size:
                num_rows += sum(kept) + layers * slots_own
        if taken > len(free):
            raise ValueError(f"{sets} sets of {batch.name} take {taken} slots; the pool has {len(free)}")
        self.rows = list(torch.arange(sets * size, device=device).split(size))
        lens = torch.tensor([n + own for n in batch.lengths], device=device)
        self.seq_lens = [lens.clone() for _ in range(sets)]
        self.num_rows = num_rows
        self.moved = num_rows * (pool.model.row_bytes + 4)

    def cells(self, of_set: int, request: int, layer: int) -> torch.Tensor:
        """What a request sees of a layer, computed apart from what is measured, int64."""
        row = of_set * len(self.batch.lengths) + request
        length = self.batch.lengths[request]
        start, end = (length, length + OWN) if self.compacted else (0, length)
        own = self.req_to_token[row, start:end].long() + layer * self.pool.cells_per_layer
        if not self.compacted:
            return own
        before = sum(self._counts[row][:layer])
        fixed = self._cells[row][before : before + self._counts[row][layer]].long()
        return torch.cat([fixed, own])


def slots_needed(model: Model, batch: Batch, alpha: float) -> int:
    if alpha == 1:
        return batch.tokens
    return sum(-(-round(alpha * n * model.layers) // model.layers) + OWN for n in batch.lengths)


def sets_for(model: Model, batch: Batch, alpha: float, rows: int, l2_bytes: int) -> int:
    """Sets in rotation such that at least four times the L2 cache lies between two reads of a row."""
    slots = slots_needed(model, batch, alpha)
    wanted = -(-4 * l2_bytes // (slots * model.layers * model.row_bytes)) + 1
    if slots * model.layers * model.row_bytes >= 4 * l2_bytes:
        wanted = 1  # a step alone is as much
    return max(1, min(wanted, (rows - 1) // slots))
