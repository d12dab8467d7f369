"""Vectorised torch; what a CPU server runs."""

from __future__ import annotations

import math

import torch

from sglang_vlkv.base import LayerScores

TILE_ELEMENTS = 1 << 22  # float32 attention entries alive at once: 16 MiB


def post_vision_scores(
    q: torch.Tensor, k: torch.Tensor, scale: float, p: float, tile: int = TILE_ELEMENTS
) -> LayerScores:
    """Column sums of the voting rows' causal attention, and its thresholded zeros.

    ``A = softmax(q k^T * scale)`` in float32 over the whole prompt; the scores are A summed over
    the voting rows and over each KV head's query heads. An entry counts as zero when it is below
    ``p`` times its row's maximum, which on logits needs no normaliser: ``x < max + ln p``.

    Args:
        q: the last R prompt positions' queries, ``[R, Hq, D]``; row i sits at n - R + i.
        k: ``[n, Hkv, D]``.
        tile: attention entries to materialise at a time.

    Raises:
        ValueError: R > n, or Hq is not a multiple of Hkv.
    """
    num_rows, num_q_heads, head_dim = q.shape
    num_keys, num_kv_heads, _ = k.shape
    if num_rows > num_keys or num_q_heads % num_kv_heads:
        raise ValueError(f"q is {list(q.shape)} and k is {list(k.shape)}; R <= n and Hkv | Hq needed")
    group = num_q_heads // num_kv_heads
    # [R, Hkv, G, D] -> [Hkv, R, G, D]: a tile is some rows of one KV head, all its query heads.
    q = (q.float() * scale).view(num_rows, num_kv_heads, group, head_dim).transpose(0, 1)
    positions = torch.arange(num_keys, device=k.device)
    first = num_keys - num_rows
    scores = torch.zeros(num_kv_heads, num_keys, dtype=torch.float32, device=k.device)
    zeros = torch.zeros((), dtype=torch.int64, device=k.device)
    step = max(1, tile // (group * num_keys))
    for head in range(num_kv_heads):
        keys = k[:, head].float().t()  # [D, n]
        for start in range(0, num_rows, step):
            rows = q[head, start : start + step]
            logits = rows.reshape(-1, head_dim) @ keys  # [rows * G, n]
            # Only the last R columns can be in a row's future.
            last = torch.arange(first + start, first + start + len(rows), device=k.device)
            future = positions[first:] > last.repeat_interleave(group)[:, None]
            logits[:, first:].masked_fill_(future, -torch.inf)
            zeros += (logits < logits.amax(1, keepdim=True) + math.log(p)).sum() - future.sum()
            scores[head] += logits.softmax(1).sum(0)
    return LayerScores(scores, int(zeros))
