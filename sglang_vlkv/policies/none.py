"""The full cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_vlkv.stages.layer import Layer, LayerScores
from sglang_vlkv.stages.policy import Policy

NONE = "none"


@dataclass(frozen=True)
class KeepAll(Policy):
    """Keeps every row: what a request asks for to be left alone where the server has a policy."""

    name = NONE
    votes = False

    budget: float = 1.0

    def score(self, layer: Layer) -> LayerScores:
        num_keys, num_heads = layer.num_keys, layer.num_kv_heads
        return LayerScores(torch.zeros(num_heads, num_keys, device=layer.device))
