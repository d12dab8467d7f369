"""Obvious loops, for tests."""

from __future__ import annotations

import torch


def gather_rows(buffer: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """See the CPU version."""
    num_heads, num_kept = slots.shape
    rows = torch.empty(num_kept, num_heads, buffer.shape[2], dtype=buffer.dtype)
    for head in range(num_heads):
        for i in range(num_kept):
            rows[i, head] = buffer[slots[head, i], head]
    return rows


def scatter_rows(cells: torch.Tensor, cell_ids: torch.Tensor, rows: torch.Tensor) -> None:
    """See the CPU version."""
    for i, cell in enumerate(cell_ids.tolist()):
        cells[cell] = rows[i]
