"""Obvious float32 loops, for tests."""

from __future__ import annotations

import torch

from sglang_vlkv.kernels.post_vision.scores import PostVisionScores


def post_vision_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    p: float = 0.01,
    reduce: str = "sum",
    rows: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> PostVisionScores:
    """See the CPU version."""
    if slots is not None:
        k = k[slots.long()]
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
    return PostVisionScores(scores, zeros, entries)


def post_vision_scores_ragged(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    q_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    slots: torch.Tensor | None,
    rows: torch.Tensor,
    scale: float,
    p: float,
    reduce: str,
    max_q_len: int,
    max_kv_len: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the CPU version."""
    scores, zeros = [], []
    for request in range(len(q_indptr) - 1):
        voting = range(q_indptr[request], q_indptr[request + 1])
        keys = range(kv_indptr[request], kv_indptr[request + 1])
        assert len(voting) <= max_q_len and len(keys) <= max_kv_len
        cells = torch.arange(keys.start, keys.stop) if slots is None else slots[keys.start : keys.stop]
        queries, positions = q[voting.start : voting.stop], rows[voting.start : voting.stop]
        one = post_vision_scores(queries, k_buffer, scale, p, reduce, positions, cells)
        scores.append(one.scores)
        zeros.append(one.zeros)
    return torch.cat(scores, dim=1), torch.tensor(zeros)
