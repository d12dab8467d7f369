"""Choosing the winners: scores and counts in, positions out."""

from __future__ import annotations

import torch

from sglang_vlkv.base import LayerScores, Policy, Prompt, Selection, num_tokens

RECENT, FLOOR, QUOTA, REST = range(4)  # tiers: lower ones win whatever their score


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


def rank(scores: torch.Tensor) -> torch.Tensor:
    """Every key's place in its head's ranking, ``[H, n]`` int64: 0 for the best, ties to the first."""
    by_score = scores.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(by_score)
    return torch.empty_like(by_score).scatter_(1, by_score, places)


def tiers(
    policy: Policy,
    prompt: Prompt,
    scores: torch.Tensor,
    num_kept: int,
    quota_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """The tier of every key of a layer that keeps ``num_kept``, ``[H, n]`` int8.

    Args:
        scores: ``[H, n]``.
        quota_scores: ``[H, n]``; ``-inf`` where a key takes no part.
    """
    n = scores.shape[1]
    tier = torch.full_like(scores, REST, dtype=torch.int8)
    for members, fraction in policy.floors(prompt):
        members = members.nonzero().flatten().to(scores.device)
        count = num_tokens(fraction, len(members))
        if count:
            all_alike = torch.zeros(len(members), dtype=torch.int8, device=scores.device)
            tier.scatter_(1, members[top_positions(scores[:, members], count, all_alike)], FLOOR)
    num_recent = policy.num_recent(num_kept)
    num_sinks = min(policy.sink_tokens, num_kept - num_recent)
    tier[:, n - num_recent :] = RECENT
    tier[:, :num_sinks] = RECENT
    room = min(num_tokens(policy.floors_share, num_kept), num_kept - num_recent - num_sinks)
    over = rank(scores.masked_fill(tier != FLOOR, -torch.inf)) >= room
    tier[(tier == FLOOR) & over] = REST
    if quota_scores is not None and policy.quota:
        left = num_kept - (tier < QUOTA).sum(1, keepdim=True)
        open_to = (tier == REST) & (quota_scores > -torch.inf)
        best = rank(quota_scores.masked_fill(~open_to, -torch.inf))
        tier[open_to & (best < (policy.quota * left.double()).round())] = QUOTA
    return tier


def select(
    policy: Policy,
    prompt: Prompt,
    layers: list[LayerScores],
    sparsity: list[float] | None = None,
    profiles: list[torch.Tensor] | None = None,
) -> Selection:
    """Budgets the layers and picks every head's winners.

    Args:
        layers: the scores of every layer.
        sparsity, profiles: per layer, added over the tensor-parallel ranks.
    """
    budgets = policy.layer_budgets(sparsity or [0.0] * len(layers), prompt.num_tokens, profiles)
    kept = []
    for layer, num_kept in zip(layers, budgets, strict=True):
        tier = tiers(policy, prompt, layer.scores, num_kept, layer.quota_scores)
        kept.append(top_positions(layer.scores, num_kept, tier))
    return Selection(kept, sparsity)
