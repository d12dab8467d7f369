"""Choosing the winners: scores and counts in, positions out."""

from __future__ import annotations

from typing import Sequence

import torch

from sglang_vlkv.kernels import on_device
from sglang_vlkv.kernels.selection import rank, select_rows, top_positions
from sglang_vlkv.stages.layer import LayerScores, Selection
from sglang_vlkv.stages.policy import Policy
from sglang_vlkv.stages.prompt import Prompt, num_tokens

RECENT, FLOOR, QUOTA, REST = range(4)  # tiers: lower ones win whatever their score


def tiers(
    policy: Policy,
    prompt: Prompt,
    scores: torch.Tensor,
    num_kept: int | Sequence[int],
    quota_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """The tier of every key of a layer that keeps ``num_kept``, or of all layers, like ``scores``, int8.

    Args:
        scores: ``[H, n]`` or ``[L, H, n]``.
        num_kept: of the layer, or of each.
        quota_scores: like ``scores``; ``-inf`` where a key takes no part.
    """
    *_, num_heads, n = scores.shape
    kept = [num_kept] if isinstance(num_kept, int) else num_kept
    recent = [policy.num_recent(count) for count in kept]
    sinks = [min(policy.sink_tokens, count - newest) for count, newest in zip(kept, recent, strict=True)]
    room = [
        min(num_tokens(policy.floors_share, count), count - newest - first)
        for count, newest, first in zip(kept, recent, sinks, strict=True)
    ]
    numbers = on_device([*kept, *recent, *sinks, *room], scores.device).view(4, -1, 1)
    _, recent, sinks, _ = numbers  # [L, 1]
    kept, _, _, room = numbers.repeat_interleave(num_heads, dim=1)  # [L * H, 1]

    shape, scores, has_floors = scores.shape, scores.reshape(-1, n), False
    tier = torch.full_like(scores, REST, dtype=torch.int8)
    for members, fraction in policy.floors(prompt):
        members = members.nonzero().flatten().to(scores.device)
        count = num_tokens(fraction, len(members))
        if count:
            has_floors = True
            all_alike = torch.zeros(len(members), dtype=torch.int8, device=scores.device)
            tier.scatter_(1, members[top_positions(scores[:, members], count, all_alike)], FLOOR)
    place = torch.arange(n, dtype=torch.int32, device=scores.device)
    at_ends = (place < sinks.int()) | (place >= n - recent.int())  # [L, n]
    tier.view(-1, num_heads, n).masked_fill_(at_ends[:, None], RECENT)
    if has_floors:
        over = rank(scores.masked_fill(tier != FLOOR, -torch.inf)) >= room
        tier.masked_fill_((tier == FLOOR) & over, REST)
    if quota_scores is not None and policy.quota:
        quota_scores = quota_scores.reshape(-1, n)
        left = kept - (tier < QUOTA).sum(1, keepdim=True)
        open_to = (tier == REST) & (quota_scores > -torch.inf)
        best = rank(quota_scores.masked_fill(~open_to, -torch.inf))
        tier.masked_fill_(open_to & (best < (policy.quota * left.double()).round()), QUOTA)
    return tier.view(shape)


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
    scores = torch.stack([layer.scores for layer in layers])
    second = [layer.quota_scores for layer in layers]
    quota_scores = None if any(layer is None for layer in second) else torch.stack(second)
    tier = tiers(policy, prompt, scores, budgets, quota_scores)
    kept = select_rows(scores.float(), tier, budgets)
    return Selection(list(kept.split(budgets, dim=1)), sparsity)
