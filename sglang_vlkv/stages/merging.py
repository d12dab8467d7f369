"""What becomes of the rows that do not stay: averaged into rows that do."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from sglang_vlkv.kernels.compaction import cpu, gather_rows
from sglang_vlkv.stages.policy import Policy

TILE_ELEMENTS = 1 << 22  # float32 similarities alive at once: 16 MiB


def merge(
    policy: Policy, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept rows, each the mean of itself and of the lost rows that were given to it.

    A sink (the first ``sink_tokens`` positions) and the last position take nothing in.

    Args:
        k, v: ``[n, H, D]``.
        kept: ``[H, num_kept]`` int64, ascending.

    Returns:
        K and V ``[num_kept, H, D]`` in their dtypes; means are taken in float32.
    """
    n = len(k)
    if policy.merge == "bucket_mean":
        positions = torch.arange(n, device=k.device)
        rows = gather_rows(k, v, positions, kept, [kept.shape[1]], 0, True, policy.sink_tokens)
        return rows[0], rows[1]
    closed = (kept < policy.sink_tokens) | (kept == n - 1)
    bucket = nearest_by_key(k, kept, closed, policy.merge_threshold)
    own = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    bucket.scatter_(1, kept, own)
    return bucket_means(k, bucket, kept.shape[1]), bucket_means(v, bucket, kept.shape[1])


def nearest_by_key(
    k: torch.Tensor, kept: torch.Tensor, closed: torch.Tensor, threshold: float
) -> torch.Tensor:
    """For every position, the open kept row whose key has the largest cosine similarity to its own.

    LOOK-M's merging (arXiv 2406.18139); ties go to the lower position.

    Args:
        k: ``[n, H, D]``.
        kept: ``[H, num_kept]`` ascending.
        closed: ``[H, num_kept]`` bool: rows that take nothing in.
        threshold: rows whose best similarity is below it are lost.

    Returns:
        ``[H, n]`` int64 numbers of kept rows, -1 where the row is lost.
    """
    keys = normalize(k.float().transpose(0, 1), dim=-1)  # [H, n, D]
    num_heads, n, head_dim = keys.shape
    anchors = keys.gather(1, kept[:, :, None].expand(-1, -1, head_dim)).mT  # [H, D, num_kept]
    nearest = torch.empty(num_heads, n, dtype=torch.int64, device=k.device)
    step = max(1, TILE_ELEMENTS // (num_heads * kept.shape[1]))
    for start in range(0, n, step):
        similarity = keys[:, start : start + step] @ anchors
        similarity.masked_fill_(closed[:, None], -torch.inf)
        best, at = similarity.max(-1)
        lost = (best < threshold) | (best == -torch.inf)
        nearest[:, start : start + step] = at.masked_fill(lost, -1)
    return nearest


def bucket_means(x: torch.Tensor, bucket: torch.Tensor, num_kept: int) -> torch.Tensor:
    """Means of the rows of each bucket.

    Args:
        x: ``[n, H, D]``.
        bucket: ``[H, n]`` int64 in [-1, num_kept); -1 is in no bucket.

    Returns:
        ``[num_kept, H, D]`` in x's dtype. A bucket of one row is that row to the bit.
    """
    num_heads, n = bucket.shape
    positions = torch.arange(n, device=x.device)
    one = bucket.new_zeros(num_heads, num_kept + 1)  # a position of each; the last takes what is in none
    one.scatter_(1, bucket.remainder(num_kept + 1), positions.expand_as(bucket))
    own = x[one[:, :num_kept].t(), torch.arange(num_heads, device=x.device)]
    return cpu.bucket_means(x, positions, bucket, own)
