"""Elastic Cache (arXiv 2407.18121)."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_vlkv.policies.h2o import ColumnSums
from sglang_vlkv.stages.layer import Layer, LayerScores
from sglang_vlkv.stages.options import choice


@dataclass(frozen=True)
class Elastic(ColumnSums):
    """Anchors by accumulated attention; what loses is merged into the nearest anchor.

    Elastic Cache (arXiv 2407.18121, ECCV 2024): one anchor set per layer, shared by its heads; the
    first tokens and the last prompt token are always anchors and take nothing in; decoding evicts
    one row per output token, so that the cache stays at its size.

    Deviation: positions stay true positions (the authors' code rewinds them). With tensor
    parallelism an anchor set is shared by the heads of a rank.
    """

    name = "elastic"

    recent_fraction: float = 0.0  # the last prompt token is an anchor at any fraction
    sink_tokens: int = 1
    merge: str = choice("bucket_mean", "none", "similar")
    decode: str = choice("fixed_point", "append")

    def score(self, layer: Layer) -> LayerScores:
        sums = super().score(layer)
        shared = sums.scores.mean(0, keepdim=True).expand_as(sums.scores)
        return sums._replace(scores=shared)
