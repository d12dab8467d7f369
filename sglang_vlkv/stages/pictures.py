"""What of every layer is the pictures' own, so that none of them is left without rows."""

from __future__ import annotations

from itertools import accumulate

import torch

from sglang_vlkv.kernels import on_device
from sglang_vlkv.stages.prompt import Prompt, num_tokens

TILE_ELEMENTS = 1 << 24  # visual scores ranked at once: 128 MiB of indices


def own_rows(share: float, num_kept: int, num_pictures: int) -> int:
    """Rows of a KV head that keeps ``num_kept`` which are its pictures' own, all together.

    ``share`` of them, or one for each picture where that is more. A tenth, and the prompt's last token
    in any case, is never theirs; where one for each does not fit into what remains, half is.
    """
    most = num_kept - max(1, num_kept // 10)
    if not share or not num_pictures:
        return 0
    one_each = num_pictures if num_pictures <= most else num_kept // 2
    return min(max(num_tokens(share, num_kept), one_each), most)


def split(sizes: torch.Tensor, rows: list[int], num_heads: int) -> torch.Tensor:
    """Splits a layer's own rows over the pictures: one each, the rest by size.

    Where a layer has fewer rows than pictures, its heads take turns: over all layers and heads, no
    picture has one more often than another, but for once.

    Args:
        sizes: tokens of each picture, ``[P]`` int64.
        rows: per layer, what each of its heads gives.

    Returns:
        ``[L, num_heads, P]`` int64, at most ``sizes``; sums are ``rows``, or all tokens where these are fewer.
    """
    num_pictures, spare_tokens = len(sizes), int(sizes.sum()) - len(sizes)
    per_head = torch.tensor(rows)[:, None].expand(-1, num_heads)
    starts = torch.tensor([0, *accumulate(per_head.flatten().tolist())][:-1]).view(per_head.shape + (1,))
    one = (torch.arange(num_pictures) - starts).remainder(num_pictures) < per_head[..., None]
    more = (per_head[:, :1] - num_pictures).clamp(0, spare_tokens)  # [L, 1]
    shares = more * (sizes - 1)
    whole, fraction = shares // max(1, spare_tokens), shares % max(1, spare_tokens)
    largest_first = fraction.argsort(dim=1, descending=True, stable=True)
    missing = more - whole.sum(1, keepdim=True)
    whole.scatter_add_(1, largest_first, (torch.arange(num_pictures) < missing).long())
    return one + whole[:, None]


def mark_own(
    prompt: Prompt, scores: torch.Tensor, tier: torch.Tensor, counts: torch.Tensor, own: int
) -> None:
    """Puts the first ``counts`` keys of every picture, in the order of selection, into the tier ``own``.

    Args:
        scores: ``[L, H, n]``.
        tier: ``[L, H, n]`` int8, written to.
        counts: ``[L, H, P]`` on the host.
    """
    positions, numbers, ordered, before = prompt.shown_tokens(scores.device)
    counts = on_device(counts.flatten().tolist(), scores.device).view(counts.shape)
    step = max(1, TILE_ELEMENTS // (scores.shape[1] * len(positions)))
    for some in (slice(layer, layer + step) for layer in range(0, len(scores), step)):
        tiers = tier[some][..., positions]
        best_first = scores[some][..., positions].sort(dim=-1, descending=True, stable=True).indices
        group = (numbers * 256 + tiers).gather(-1, best_first)
        best_first = best_first.gather(-1, group.sort(dim=-1, stable=True).indices)
        is_own = before < counts[some][..., ordered]
        tiers.scatter_(-1, best_first, tiers.gather(-1, best_first).masked_fill(is_own, own))
        tier[some] = tier[some].index_copy(-1, positions, tiers)
