"""PrefixKV (arXiv 2412.03409)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_vlkv.policies.votes import votes
from sglang_vlkv.stages.budgets import cumulative
from sglang_vlkv.stages.layer import Layer, LayerScores
from sglang_vlkv.stages.policy import Policy

FIXED_POINT = 2.0**24  # importance is added over ranks as integers


def importance_profile(scores: torch.Tensor) -> torch.Tensor:
    """Every key's importance over a rank's heads, ``[H, n]`` to ``[n]`` int64, ready to be added."""
    return (scores.double().sum(0) * FIXED_POINT).round().long()


@dataclass(frozen=True)
class PrefixKV(Policy):
    """Every layer keeps the best-scored keys that cover one and the same share of its attention.

    PrefixKV (arXiv 2412.03409): the share is the one at which the budget is spent.

    Deviation: measured on the prompt itself, exactly; the authors search it offline on samples.
    """

    name = "prefixkv"
    can_draft = True

    def score(self, layer: Layer) -> LayerScores:
        scored = votes(layer)
        return scored._replace(profile=importance_profile(scored.scores))

    def layer_budgets(
        self, sparsity: list[float], num_prompt: int, profiles: list[torch.Tensor] | None = None
    ) -> list[int]:
        return cumulative(profiles, self.max_total(num_prompt, len(profiles)))
