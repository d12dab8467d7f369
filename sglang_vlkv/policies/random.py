"""Seeded noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_vlkv.stages.layer import Layer, LayerScores
from sglang_vlkv.stages.policy import Policy


@dataclass(frozen=True)
class Random(Policy):
    """Keeps random rows: what a policy must beat.

    Attributes:
        seed: of the noise, which also depends on the layer, but not on the tensor-parallel rank.
    """

    name = "random"
    votes = False

    seed: int = 0

    def score(self, layer: Layer) -> LayerScores:
        num_keys, num_heads = layer.num_keys, layer.num_kv_heads
        generator = torch.Generator().manual_seed(65_537 * self.seed + layer.index)
        noise = torch.rand(num_heads, num_keys, generator=generator)
        return LayerScores(noise.to(layer.device))
