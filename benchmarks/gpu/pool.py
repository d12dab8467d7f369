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
        flat = self.storage.view(-1, model.kv_heads, model.head_dim)
        self.k_cells, self.v_cells = flat[:-rows], flat[rows:]

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

    def __init__(
        self, pool: Pool, batch: Batch, alpha: float, uneven: bool, sets: int, exact: tuple[int, ...] = ()
    ) -> None:
        """
        Args:
            exact: requests of the batch that are not compacted although ``alpha < 1``.
        """
        layers, device, size = pool.model.layers, pool.device, len(batch.lengths)
        self.pool, self.batch = pool, batch
        self.table = RowTable.empty(sets * size, layers, device)
        self.req_to_token = torch.zeros(sets * size, max(batch.lengths) + OWN, dtype=torch.int32, device=device)
        self._free = torch.randperm(pool.rows - 1, device=device).add_(1).int()  # slot 0 is for padding
        self._fixed: list[torch.Tensor] = []  # per row; the table holds their addresses
        self.kept: list[list[int]] = []
        for row in range(sets * size):
            compacted = alpha < 1 and row % size not in exact
            length = batch.lengths[row % size]
            self.kept.append(kept_rows(layers, length, alpha, uneven, row % size) if compacted else [0] * layers)
            self._place(row, length, compacted)
        self.rows = list(torch.arange(sets * size, device=device).split(size))
        ends = [self.first_own(row) + self.num_own(row) for row in range(size)]
        self.seq_lens = [torch.tensor(ends, device=device) for _ in range(sets)]
        self.num_rows = sum(sum(self.kept[row]) + layers * self.num_own(row) for row in range(size))
        self.moved = self.num_rows * (pool.model.row_bytes + 4)

    def first_own(self, row: int) -> int:
        return self.batch.lengths[row % len(self.batch.lengths)] if sum(self.kept[row]) else 0

    def num_own(self, row: int) -> int:
        return OWN if sum(self.kept[row]) else self.batch.lengths[row % len(self.batch.lengths)]

    def _place(self, row: int, length: int, compacted: bool) -> None:
        """Gives the row its slots: for what it keeps, and for its own tokens."""
        kept = self.kept[row]
        num_fixed, num_own = -(-sum(kept) // len(kept)), OWN if compacted else length
        slots, self._free = self._free[: num_fixed + num_own], self._free[num_fixed + num_own :]
        if len(slots) < num_fixed + num_own:
            raise ValueError(f"row {row} of {self.batch.name} finds no room in {self.pool.rows} slots")
        fixed = self.pool.cells_of(slots[:num_fixed])[: sum(kept)].contiguous()
        self._fixed.append(fixed)
        start = 0
        if compacted:
            self.table.cells[row] = fixed.data_ptr()
            self.table.fixed[row] = torch.tensor([0, *kept]).cumsum(0).int().to(self.pool.device)
            self.table.first_own[row] = start = length
        self.req_to_token[row, start : start + num_own] = slots[num_fixed:]

    def cells(self, row: int, layer: int, newest: int | None = None) -> torch.Tensor:
        """What a row sees of a layer, apart from the kernels that are measured, int64.

        Args:
            newest: how many of its own tokens it sees; all of them if None.
        """
        start = self.first_own(row)
        own = self.req_to_token[row, start : start + self.num_own(row)].long()
        own = own[len(own) - newest :] if newest is not None else own
        before = sum(self.kept[row][:layer])
        fixed = self._fixed[row][before : before + self.kept[row][layer]].long()
        return torch.cat([fixed, own + layer * self.pool.cells_per_layer])


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
