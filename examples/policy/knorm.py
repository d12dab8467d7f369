"""A policy of your own: keys with a small norm draw attention (arXiv 2406.11430)."""

from dataclasses import dataclass

from sglang_vlkv.base import Layer, LayerScores, Policy


@dataclass(frozen=True)
class KNorm(Policy):
    """Keeps the keys with the smallest norms."""

    name = "knorm"

    def score(self, layer: Layer) -> LayerScores:
        return LayerScores(-layer.k.float().norm(dim=-1).T)
