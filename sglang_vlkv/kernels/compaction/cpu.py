"""Vectorised torch; what a CPU server runs."""

from __future__ import annotations

import torch


def gather_rows(buffer: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Collects one layer's kept rows: row i of head h comes from ``slots[h, i]``.

    Args:
        buffer: ``[rows, H, D]``.
        slots: ``[H, k]`` int64.

    Returns:
        ``[k, H, D]``, a copy.
    """
    heads = torch.arange(buffer.shape[1], device=buffer.device)
    return buffer[slots.t(), heads]


def scatter_rows(cells: torch.Tensor, cell_ids: torch.Tensor, rows: torch.Tensor) -> None:
    """Writes rows to cells: ``cells[cell_ids[i]] = rows[i]``.

    Args:
        cells: ``[num_cells, H, D]``, written in place.
        cell_ids: ``[k]`` integer, all different.
        rows: ``[k, H, D]``.
    """
    cells.index_copy_(0, cell_ids.long(), rows)
