"""Choosing the winners: scores and counts in, positions out."""

from __future__ import annotations

import torch

from sglang_vlkv.base import Modality, Policy, Prompt, Selection, num_tokens


def top_positions(scores: torch.Tensor, num_kept: int, tier: torch.Tensor) -> torch.Tensor:
    """The ``num_kept`` winners of every head, ascending in position.

    Lower tiers win whatever their score; within a tier the score descends and, between equal
    scores, the position ascends.

    Args:
        scores: ``[H, n]`` float.
        num_kept: in [1, n].
        tier: ``[n]`` or ``[H, n]`` integer.

    Returns:
        ``[H, num_kept]`` int64.
    """
    by_score = scores.sort(dim=1, descending=True, stable=True).indices
    by_tier = tier.expand_as(scores).gather(1, by_score).sort(dim=1, stable=True).indices
    return by_score.gather(1, by_tier[:, :num_kept]).sort(dim=1).values


def protection(
    policy: Policy, prompt: Prompt, scores: torch.Tensor, num_recent: int
) -> torch.Tensor:
    """The tier of every key: 0 the recent window, 1 what a modality's floor keeps, 2 the rest.

    Args:
        scores: ``[H, n]``.
        num_recent: tokens at the prompt's end that are always kept.

    Returns:
        ``[H, n]`` int8.
    """
    tier = torch.full_like(scores, 2, dtype=torch.int8)
    for name, fraction in policy.modality_floors.items():
        members = (prompt.tags == Modality[name.upper()]).nonzero().flatten().to(scores.device)
        count = num_tokens(fraction, len(members))
        if count:
            none = torch.zeros(len(members), dtype=torch.int8, device=scores.device)
            winners = members[top_positions(scores[:, members], count, none)]
            tier.scatter_(1, winners, 1)
    tier[:, scores.shape[1] - num_recent :] = 0
    return tier


def select(
    policy: Policy, prompt: Prompt, scores: list[torch.Tensor], sparsity: list[float]
) -> Selection:
    """Budgets the layers and picks every head's winners.

    Args:
        scores: per layer, ``[Hkv, n]`` float32.
        sparsity: per layer, equal on all tensor-parallel ranks.
    """
    budgets = policy.layer_budgets(sparsity, prompt.num_tokens)
    kept = []
    for layer_scores, num_kept in zip(scores, budgets, strict=True):
        tier = protection(policy, prompt, layer_scores, policy.num_recent(num_kept))
        kept.append(top_positions(layer_scores, num_kept, tier))
    return Selection(kept, sparsity)
