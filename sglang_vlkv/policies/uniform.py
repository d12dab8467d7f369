"""Post-vision attention with equal layers."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_vlkv.policies.votes import votes
from sglang_vlkv.stages.layer import Layer, LayerScores
from sglang_vlkv.stages.policy import Policy


@dataclass(frozen=True)
class Uniform(Policy):
    """VL-Cache's score with the same budget in every layer.

    The ablation that the VL-Cache paper (arXiv 2410.23317) lacks: what its layer budgets are worth.
    """

    name = "uniform"
    can_draft = True

    def score(self, layer: Layer) -> LayerScores:
        return votes(layer)
