"""MixKV (arXiv 2510.20707)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from sglang_vlkv.policies.snapkv import SnapKV
from sglang_vlkv.stages.layer import Layer, LayerScores


def spread(x: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` ``[H, n]`` moved into [0, 1] per head, then scaled so that its mean is ``mean`` ``[H, 1]``."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    x = (x - low) / (high - low).clamp_min(1e-12)
    return x if mean is None else x * (mean / x.mean(1, keepdim=True).clamp_min(1e-12))


@dataclass(frozen=True)
class MixKV(SnapKV):
    """Importance where a head's keys differ, diversity where they repeat each other.

    MixKV (arXiv 2510.20707) over SnapKV: importance is the votes plus the value norm, diversity is
    how little a key points along the head's mean key, and a head whose keys are alike (mean cosine
    similarity r) mixes them as ``r * diversity + (1 - r) * importance``.

    Deviation: r is measured on the prompt, per KV head.
    """

    name = "mixkv"

    def score(self, layer: Layer) -> LayerScores:
        votes = super().score(layer)
        attention = spread(votes.scores)
        level = attention.mean(1, keepdim=True)
        values = spread(layer.v.float().norm(dim=-1).T, level)
        keys = normalize(layer.k.float().transpose(0, 1), dim=-1)  # [H, n, D]
        total = keys.sum(1, keepdim=True)
        num_keys = keys.shape[1]
        redundancy = (total.square().sum(-1) - num_keys) / max(1, num_keys * (num_keys - 1))
        along_mean = (keys * normalize(total, dim=-1)).sum(-1)
        diversity = spread(-along_mean, level)
        r = redundancy.clamp(0, 1)  # [H, 1]
        return votes._replace(scores=r * diversity + (1 - r) * (attention + values))
