"""PyramidKV (arXiv 2406.02069)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sglang_vlkv.policies.snapkv import SnapKV
from sglang_vlkv.stages.budgets import proportional
from sglang_vlkv.stages.options import require


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's score; the budget falls linearly from the first layer to the last.

    PyramidKV (arXiv 2406.02069): attention funnels into few tokens with depth.

    Deviation: the mean over the layers is the budget exactly, also where the first layers would
    keep more than the prompt has.

    Attributes:
        beta: the last layer keeps 1 / beta of the mean. Higher is steeper; 1 is SnapKV.
    """

    name = "pyramidkv"

    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.beta < math.inf, "beta", self.beta, "finite and at least 1")

    def layer_budgets(
        self, sparsity: list[float], num_prompt: int, profiles: list[torch.Tensor] | None = None
    ) -> list[int]:
        num_layers = len(sparsity)
        last = 1.0 / self.beta
        depth = [layer / max(1, num_layers - 1) for layer in range(num_layers)]
        weights = [(2.0 - last) * (1 - d) + last * d for d in depth]
        return proportional(weights, self.max_total(num_prompt, num_layers), num_prompt)
