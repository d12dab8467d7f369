"""What requests see of their compacted prompts, kept where an accelerator reads it."""

from __future__ import annotations

from itertools import accumulate

import torch

from sglang_vlkv.kernels.ragged_attention.rows import RowTable


class DeviceRows:
    """The host's request states as a :class:`RowTable`, from which a decode step builds its index
    lists on the device, inside its CUDA graph: the host sends nothing at a step.

    Every write is an ordinary operation of the scheduler's stream. SGLang holds that stream back
    until the forward in flight has read its row tables (``Scheduler._apply_war_barrier``), and the
    next forward waits for it, so neither sees half of a change.

    Args:
        num_rows: rows of ``req_to_token``.
        capacity: most index entries of a decode step, over all layers, that its buffers hold.

    Attributes:
        table: what the kernels read.
        visible: entries that the coming decode step needs at most.
        drafts: a request in it leaves its queries.
        graph_copies: a replayed step leaves the queries of all its requests where they can be read.
    """

    def __init__(self, num_rows: int, num_layers: int, capacity: int, device: torch.device | str) -> None:
        self.table = RowTable.empty(num_rows, num_layers, device)
        self.capacity, self.visible = capacity, 0
        self.drafts = self.graph_copies = False
        self._cells: dict[int, torch.Tensor] = {}  # by row: the table holds their addresses only

    @property
    def graph_serves(self) -> bool:
        """Whether the coming decode step may be a replayed CUDA graph."""
        return (self.graph_copies or not self.drafts) and self.visible <= self.capacity

    def set(self, row: int, cells: list[torch.Tensor], sliding: list[int], first_own: int) -> None:
        """The request of ``row`` sees other rows from its next step on: see :class:`RowTable`.

        Args:
            cells: per layer, its fixed cells, ``[num_fixed]`` integer.
            sliding: per layer, how many of its newest slots it sees; empty where it sees them all.
        """
        table = self.table
        fixed = accumulate(map(len, cells), initial=0)
        slides = accumulate(sliding or [0] * len(cells), initial=0)
        numbers = torch.tensor([*fixed, *slides, first_own], dtype=torch.int32)
        cells = torch.cat(cells).to(torch.int32)
        if cells.is_cuda:
            numbers = numbers.pin_memory().to(cells.device, non_blocking=True)
        table.cells[row] = cells.data_ptr()
        table.fixed[row], table.sliding[row] = numbers[:-1].view(2, -1)
        table.first_own[row] = numbers[-1]
        self._cells[row] = cells

    def clear(self, row: int) -> None:
        """Its request is gone; whoever is given ``row`` next sees exact rows."""
        if self._cells.pop(row, None) is not None:
            for column in self.table:
                column[row] = 0
