"""Choosing the winners: scores and counts in, positions out."""

from __future__ import annotations

import torch

from sglang_vlkv.kernels.selection import rank, select_rows, top_positions
from sglang_vlkv.stages.layer import LayerScores, Selection
from sglang_vlkv.stages.policy import Policy
from sglang_vlkv.stages.prompt import Prompt, num_tokens

RECENT, FLOOR, QUOTA, REST = range(4)  # tiers: lower ones win whatever their score


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
    n, has_floors = scores.shape[1], False
    tier = torch.full_like(scores, REST, dtype=torch.int8)
    for members, fraction in policy.floors(prompt):
        members = members.nonzero().flatten().to(scores.device)
        count = num_tokens(fraction, len(members))
        if count:
            has_floors = True
            all_alike = torch.zeros(len(members), dtype=torch.int8, device=scores.device)
            tier.scatter_(1, members[top_positions(scores[:, members], count, all_alike)], FLOOR)
    num_recent = policy.num_recent(num_kept)
    num_sinks = min(policy.sink_tokens, num_kept - num_recent)
    tier[:, n - num_recent :] = RECENT
    tier[:, :num_sinks] = RECENT
    if has_floors:
        room = min(num_tokens(policy.floors_share, num_kept), num_kept - num_recent - num_sinks)
        over = rank(scores.masked_fill(tier != FLOOR, -torch.inf)) >= room
        tier.masked_fill_((tier == FLOOR) & over, REST)
    if quota_scores is not None and policy.quota:
        left = num_kept - (tier < QUOTA).sum(1, keepdim=True)
        open_to = (tier == REST) & (quota_scores > -torch.inf)
        best = rank(quota_scores.masked_fill(~open_to, -torch.inf))
        tier.masked_fill_(open_to & (best < (policy.quota * left.double()).round()), QUOTA)
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
    tier = [
        tiers(policy, prompt, layer.scores, num_kept, layer.quota_scores)
        for layer, num_kept in zip(layers, budgets, strict=True)
    ]
    scores = torch.stack([layer.scores.float() for layer in layers])
    kept = select_rows(scores, torch.stack(tier), budgets)
    return Selection(list(kept.split(budgets, dim=1)), sparsity)
