"""VL-Cache (arXiv 2410.23317)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_vlkv.policies.votes import votes
from sglang_vlkv.stages import budgets
from sglang_vlkv.stages.layer import Layer, LayerScores
from sglang_vlkv.stages.options import require
from sglang_vlkv.stages.policy import Policy


@dataclass(frozen=True)
class VLCache(Policy):
    """Post-vision attention picks the keys, measured sparsity splits the budget over layers.

    The text after the last visual token is what asks about the picture, so its attention alone
    says which keys matter; layers whose attention is dense get more rows than sparse ones.
    VL-Cache (arXiv 2410.23317, ICLR 2025), not the "VLCache" of arXiv 2512.12977.

    Deviation: layer budgets sum to exactly the budget; ``renormalise=False`` is the paper's
    clipping, which overspends at small budgets and underspends at large ones.

    Attributes:
        p: an attention entry below ``p`` times its row's largest counts as zero when sparsity is
            measured. Higher widens the differences between layers.
        renormalise: False spends what the paper's clipped layer budgets happen to sum to.
    """

    name = "vlcache"
    can_draft = True

    p: float = 0.01
    renormalise: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.p < 1, "p", self.p, "in (0, 1)")

    def score(self, layer: Layer) -> LayerScores:
        return votes(layer, self.p)

    def layer_budgets(
        self, sparsity: list[float], num_prompt: int, profiles: list[torch.Tensor] | None = None
    ) -> list[int]:
        weights = [1.0 - gamma for gamma in sparsity]
        if not self.renormalise:
            return budgets.clipped(weights, self.budget, num_prompt)
        total = self.max_total(num_prompt, len(weights))
        return budgets.proportional(weights, total, num_prompt)

    def max_total(self, num_prompt: int, num_layers: int) -> int:
        if not self.renormalise:
            return budgets.clipped_bound(self.budget, num_prompt, num_layers)
        return super().max_total(num_prompt, num_layers)
