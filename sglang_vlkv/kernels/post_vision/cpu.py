"""Vectorised torch; what a CPU server runs."""

from __future__ import annotations

import math

import torch

from sglang_vlkv.kernels.post_vision.scores import PostVisionScores

TILE_ELEMENTS = 1 << 22  # float32 attention entries alive at once: 16 MiB


def post_vision_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    p: float = 0.01,
    reduce: str = "sum",
    rows: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    tile: int = TILE_ELEMENTS,
) -> PostVisionScores:
    """Column sums (or maxima) of the voting rows' causal attention, and its thresholded zeros.

    ``A = softmax(q k^T * scale)`` in float32 over the whole prompt; the scores are A summed over
    the voting rows and over each KV head's query heads. An entry counts as zero when it is below
    ``p`` times its row's maximum, which on logits needs no normaliser: ``x < max + ln p``.

    Args:
        q: the voting rows' queries, ``[R, Hq, D]``.
        k: ``[n, Hkv, D]``; with ``slots`` a pool's buffer ``[pool_rows, Hkv, D]``.
        p: in (0, 1].
        reduce: ``sum`` over voting rows and a KV head's query heads, or their ``max``.
        rows: positions of the voting rows, ``[R]`` int64 ascending; None for the last R.
        slots: key j is ``k[slots[j]]``, ``[n]`` integer; None where key j is ``k[j]``.
        tile: attention entries to materialise at a time; the Triton version has none.

    Raises:
        ValueError: R > n without ``rows``, or Hq is not a multiple of Hkv.
    """
    if slots is not None:
        k = k[slots]
    num_rows, num_q_heads, head_dim = q.shape
    num_keys, num_kv_heads, _ = k.shape
    if (rows is None and num_rows > num_keys) or num_q_heads % num_kv_heads:
        raise ValueError(f"q is {list(q.shape)} and k is {list(k.shape)}; R <= n and Hkv | Hq needed")
    group = num_q_heads // num_kv_heads
    q = (q.float() * scale).view(num_rows, num_kv_heads, group, head_dim).transpose(0, 1)
    k = k.transpose(0, 1)
    positions = torch.arange(num_keys, device=k.device)
    rows = positions[num_keys - num_rows :] if rows is None else rows
    first = int(rows[0])
    scores = torch.zeros(num_kv_heads, num_keys, dtype=torch.float32, device=k.device)
    zeros = torch.zeros((), dtype=torch.int64, device=k.device)
    # A tile is all rows of some heads, or, where not even one head's fit, some rows of one head.
    num_heads = max(1, min(num_kv_heads, tile // (num_rows * group * num_keys)))
    step = max(1, min(num_rows, tile // (group * num_keys)))
    for head in range(0, num_kv_heads, num_heads):
        heads = slice(head, head + num_heads)
        keys = k[heads].float().mT  # [heads, D, n]
        for start in range(0, num_rows, step):
            queries = q[heads, start : start + step]  # [heads, rows, G, D]
            logits = queries.flatten(1, 2) @ keys  # [heads, rows * G, n]
            # Nothing before the first voting row can be in a row's future.
            future = positions[first:] > rows[start : start + step].repeat_interleave(group)[:, None]
            logits[..., first:].masked_fill_(future, -torch.inf)
            small = logits < logits.amax(-1, keepdim=True) + math.log(p)
            zeros += small.sum() - len(queries) * future.sum()
            attention = logits.softmax(-1)
            if reduce == "sum":
                scores[heads] += attention.sum(1)
            else:
                scores[heads] = torch.maximum(scores[heads], attention.amax(1))
    entries = num_q_heads * int((rows + 1).sum())
    return PostVisionScores(scores, int(zeros), entries)


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
    """:func:`post_vision_scores` of B requests of different lengths.

    Args:
        q: ``[sumR, Hq, D]``, request after request.
        k_buffer: ``[pool_rows, Hkv, D]``, or ``[nnz, Hkv, D]`` without ``slots``.
        q_indptr, kv_indptr: ``[B + 1]`` integer: request b has the voting rows
            ``q[q_indptr[b] : q_indptr[b + 1]]`` and the keys ``kv_indptr[b]`` to ``kv_indptr[b + 1]``.
        slots: ``[nnz]`` integer, which row of ``k_buffer`` each key is; None for all in order.
        rows: ``[sumR]`` integer, each voting row's position among its request's keys, ascending
            within a request.
        max_q_len, max_kv_len: at least as many as any request's voting rows and keys.

    Returns:
        The scores ``[Hkv, nnz]`` float32 and each request's zeros ``[B]`` int64.
    """
    starts, ends = q_indptr.tolist(), kv_indptr.tolist()
    num_keys = k_buffer.shape[0] if slots is None else len(slots)
    scores = torch.zeros(k_buffer.shape[1], num_keys, dtype=torch.float32, device=q.device)
    zeros = torch.zeros(len(starts) - 1, dtype=torch.int64, device=q.device)
    for request in range(len(starts) - 1):
        voting, keys = slice(*starts[request : request + 2]), slice(*ends[request : request + 2])
        if voting.start == voting.stop:
            continue
        k = k_buffer[keys] if slots is None else k_buffer[slots[keys]]
        scored = post_vision_scores(q[voting], k, scale, p, reduce, rows[voting].long())
        scores[:, keys], zeros[request] = scored.scores, scored.zeros
    return scores, zeros
