"""Obvious float32 loops, for tests."""

from __future__ import annotations

import torch


def ragged_decode(
    q: torch.Tensor,
    k_cells: torch.Tensor,
    v_cells: torch.Tensor,
    indices: list[torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """See the CPU version."""
    num_requests, num_q_heads, _ = q.shape
    group = num_q_heads // k_cells.shape[1]
    out = torch.empty_like(q, dtype=torch.float32)
    for request in range(num_requests):
        for head in range(num_q_heads):
            cells = indices[request].long()
            logits = k_cells[cells, head // group].float() @ q[request, head].float() * scale
            out[request, head] = torch.softmax(logits, 0) @ v_cells[cells, head // group].float()
    return out
