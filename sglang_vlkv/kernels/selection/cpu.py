"""Vectorised torch; what a CPU server runs."""

from __future__ import annotations

from typing import Sequence

import torch


def top_positions(scores: torch.Tensor, num_kept: int, tier: torch.Tensor) -> torch.Tensor:
    """The ``num_kept`` winners of every head, ascending in position.

    Lower tiers win whatever their score; within a tier the score descends and, between equal
    scores, the position ascends.

    Args:
        scores: ``[H, n]`` float.
        num_kept: in [0, n].
        tier: ``[n]`` or ``[H, n]`` integer.

    Returns:
        ``[H, num_kept]`` int64.
    """
    by_score = scores.sort(dim=1, descending=True, stable=True).indices
    by_tier = tier.expand_as(scores).gather(1, by_score).sort(dim=1, stable=True).indices
    return by_score.gather(1, by_tier[:, :num_kept]).sort(dim=1).values


def rank(scores: torch.Tensor) -> torch.Tensor:
    """Every key's place in its head's ranking, ``[H, n]`` int64: 0 for the best, ties to the first."""
    by_score = scores.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(by_score)
    return torch.empty_like(by_score).scatter_(1, by_score, places)


def select_rows(scores: torch.Tensor, tier: torch.Tensor, num_kept: Sequence[int]) -> torch.Tensor:
    """:func:`top_positions` of all layers, one behind the other.

    Args:
        scores: ``[L, H, n]`` float32.
        tier: ``[L, H, n]`` int8.
        num_kept: per layer, in [0, n].

    Returns:
        ``[H, sum(num_kept)]`` int64: every layer's winners, ascending in position.

    Raises:
        ValueError: shapes that do not go together, other dtypes, a count outside [0, n].
    """
    check(scores, tier, num_kept)
    layers = zip(scores, num_kept, tier, strict=True)
    return torch.cat([top_positions(*layer) for layer in layers], dim=1)


def check(scores: torch.Tensor, tier: torch.Tensor, num_kept: Sequence[int]) -> None:
    """Raises ValueError as :func:`select_rows` says."""
    if scores.dim() != 3 or tier.shape != scores.shape or len(num_kept) != len(scores) or not len(scores):
        given = f"scores {list(scores.shape)}, tier {list(tier.shape)} and {len(num_kept)} counts"
        raise ValueError(f"{given}; [L, H, n], the same and L needed")
    if scores.dtype != torch.float32 or tier.dtype != torch.int8:
        raise ValueError(f"scores are {scores.dtype} and tier is {tier.dtype}; float32 and int8 needed")
    if not 0 <= min(num_kept) <= max(num_kept) <= scores.shape[2]:
        raise ValueError(f"num_kept is {list(num_kept)}; every layer keeps 0 to n = {scores.shape[2]}")
