"""Obvious loops, for tests."""

from __future__ import annotations

from typing import Sequence

import torch


def gather_rows(
    k_cells: torch.Tensor,
    v_cells: torch.Tensor,
    slots: torch.Tensor,
    kept: torch.Tensor,
    num_kept: Sequence[int],
    cells_per_layer: int,
    merge: bool = False,
    sink_tokens: int = 0,
) -> torch.Tensor:
    """See the CPU version."""
    num_heads, num_rows = kept.shape
    rows = torch.empty(2, num_rows, num_heads, k_cells.shape[2], dtype=k_cells.dtype)
    for kv, cells in enumerate((k_cells, v_cells)):
        for head in range(num_heads):
            first = 0
            for layer, count in enumerate(num_kept):
                own = kept[head, first : first + count].tolist()
                into = buckets(own, len(slots), sink_tokens) if merge and own else [[j] for j in own]
                for i, members in enumerate(into):
                    found = torch.stack([cells[layer * cells_per_layer + slots[j], head] for j in members])
                    rows[kv, first + i, head] = found[0] if len(members) == 1 else found.float().mean(0)
                first += count
    return rows


def buckets(kept: list[int], n: int, sink_tokens: int) -> list[list[int]]:
    """For each kept position, which positions its row is the mean of."""
    members = {j: [] for j in kept}
    for j in range(n):
        nearest = min(kept, key=lambda anchor: (abs(j - anchor), anchor))
        is_closed = nearest < sink_tokens or nearest == n - 1
        if j == nearest or not is_closed:
            members[nearest].append(j)
    return list(members.values())


def scatter_rows(
    k_cells: torch.Tensor, v_cells: torch.Tensor, cells: torch.Tensor, rows: torch.Tensor
) -> None:
    """See the CPU version."""
    for i, cell in enumerate(cells.tolist()):
        k_cells[cell], v_cells[cell] = rows[0, i], rows[1, i]
