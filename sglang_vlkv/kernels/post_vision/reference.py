"""Obvious float32 loops, for tests."""

from __future__ import annotations

import torch

from sglang_vlkv.base import LayerScores


def post_vision_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    p: float = 0.01,
    reduce: str = "sum",
    rows: torch.Tensor | None = None,
) -> LayerScores:
    """See the CPU version."""
    num_rows, num_q_heads, _ = q.shape
    num_keys, num_kv_heads, _ = k.shape
    group = num_q_heads // num_kv_heads
    scores = torch.zeros(num_kv_heads, num_keys)
    zeros = entries = 0
    for row in range(num_rows):
        visible = num_keys - num_rows + row + 1 if rows is None else int(rows[row]) + 1
        for head in range(num_q_heads):
            logits = k[:visible, head // group].float() @ q[row, head].float() * scale
            attention = torch.softmax(logits, dim=0)
            column = scores[head // group, :visible]
            column.copy_(column + attention if reduce == "sum" else torch.maximum(column, attention))
            zeros += int((attention < p * attention.max()).sum())
            entries += visible
    return LayerScores(scores, zeros, entries)
