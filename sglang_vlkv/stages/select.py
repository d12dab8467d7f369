"""Choosing the winners: scores and counts in, positions out."""

from __future__ import annotations

from typing import Sequence

import torch

from sglang_vlkv.kernels import on_device
from sglang_vlkv.kernels.selection import rank, select_rows, top_positions
from sglang_vlkv.stages.layer import LayerScores, Selection
from sglang_vlkv.stages.pictures import mark_own, own_rows, split
from sglang_vlkv.stages.policy import Policy
from sglang_vlkv.stages.prompt import Prompt, num_tokens

OWN, RECENT, FLOOR, QUOTA, REST = range(-1, 4)  # tiers: lower ones win whatever their score


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


def keep_pictures(
    policy: Policy, prompt: Prompt, scores: torch.Tensor, tier: torch.Tensor, budgets: list[int]
) -> None:
    """Gives every picture its rows, which win over all others; nothing changes where it has them already.

    In their favour the oldest of the recent window go first, then the last of the sinks; the prompt's
    last token stays.

    Args:
        scores: ``[L, H, n]``.
        tier: of every key, as :func:`tiers` finds it, ``[L, H, n]`` int8; written to.
        budgets: rows that each layer keeps.
    """
    sizes = prompt.shown.distinct
    rows = [own_rows(policy.picture_share, num_kept, len(sizes)) for num_kept in budgets]
    if not any(rows):
        return
    mark_own(prompt, scores, tier, split(sizes, rows, scores.shape[1]), OWN)
    tier[..., -1] = OWN
    sinks = min(policy.sink_tokens, prompt.num_tokens)
    if all(policy.num_recent(k) + sinks + r <= k for k, r in zip(budgets, rows, strict=True)):
        return
    kept = on_device(budgets, scores.device)[:, None, None]
    ahead = (tier == RECENT).int()
    ahead = torch.cat([ahead[..., :sinks], ahead[..., sinks:].flip(-1)], -1).cumsum(-1)
    ahead = torch.cat([ahead[..., :sinks], ahead[..., sinks:].flip(-1)], -1)
    over = ahead > kept - (tier == OWN).sum(-1, keepdim=True)
    tier.masked_fill_((tier == RECENT) & over, REST)


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
    scores = torch.stack([layer.scores.float() for layer in layers])
    tier = tiers(policy, prompt, scores, budgets, _second_scores(layers))
    keep_pictures(policy, prompt, scores, tier, budgets)
    kept = select_rows(scores, tier, budgets)
    return Selection(list(kept.split(budgets, dim=1)), sparsity)


def _second_scores(layers: list[LayerScores]) -> torch.Tensor | None:
    """Those that quotas are filled by, ``[L, H, n]``: ``-inf`` where a layer has none, None where all have none."""
    if all(layer.quota_scores is None for layer in layers):
        return None
    none = torch.full_like(layers[0].scores, -torch.inf)
    return torch.stack([none if layer.quota_scores is None else layer.quota_scores for layer in layers])
