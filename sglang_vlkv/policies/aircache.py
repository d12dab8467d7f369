"""AirCache (arXiv 2503.23956)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping

import torch

from sglang_vlkv.policies.prefixkv import importance_profile
from sglang_vlkv.policies.votes import scored
from sglang_vlkv.stages.budgets import proportional
from sglang_vlkv.stages.layer import Layer, LayerScores
from sglang_vlkv.stages.options import require, text_stays
from sglang_vlkv.stages.policy import Policy


@dataclass(frozen=True)
class AirCache(Policy):
    """Only the text that the prompt's last token attends to votes; strong and skewed layers get more.

    AirCache (arXiv 2503.23956): an "elite" observation window steadies the votes, and a layer's
    budget follows the strength (sum) and the skewness of its visual tokens' importance, half each.
    All text stays, as the paper compresses visual tokens only.

    Deviation: the paper's code is not public; elite rows are those that receive at least ``elite``
    times the most that any voting row receives from the last token, over the heads of a rank. The
    text counts into the budget.

    Attributes:
        elite: in [0, 1]. 0 lets every voting row vote; higher listens to fewer.
    """

    name = "aircache"

    modality_floors: Mapping[str, float] = text_stays()
    elite: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.elite <= 1, "elite", self.elite, "in [0, 1]")

    def score(self, layer: Layer) -> LayerScores:
        num_keys, num_rows = layer.num_keys, len(layer.q)
        last = scored(layer, layer.q[-1:])
        received = last.scores[:, num_keys - num_rows :].sum(0)
        chosen = (received >= self.elite * received.max()).nonzero().flatten()
        rows = chosen + num_keys - num_rows
        votes = scored(layer, layer.q[chosen], rows=rows)
        visual = votes.scores[:, layer.prompt.visual_positions(layer.device)] / len(chosen)
        return votes._replace(profile=importance_profile(visual))

    def layer_budgets(
        self, sparsity: list[float], num_prompt: int, profiles: list[torch.Tensor] | None = None
    ) -> list[int]:
        strength, skewness = [], []
        for profile in profiles:
            importance = profile.double()
            deviation = importance - importance.mean()
            spread = deviation.square().mean().sqrt().clamp_min(1e-300)
            strength.append(float(importance.sum()))
            skewness.append(max(0.0, float((deviation / spread).pow(3).mean())))
        shares = [
            [value / (sum(values) or 1.0) for value in values] for values in (strength, skewness)
        ]
        weights = [sum(both) / 2 for both in zip(*shares)]
        return proportional(weights, self.max_total(num_prompt, len(weights)), num_prompt)
