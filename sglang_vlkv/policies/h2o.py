"""H2O (arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from sglang_vlkv.policies.votes import scored
from sglang_vlkv.stages.layer import Layer, LayerScores
from sglang_vlkv.stages.options import choice
from sglang_vlkv.stages.policy import Policy


@dataclass(frozen=True)
class ColumnSums(Policy):
    """Policies that score by the column sums of the whole prompt's causal attention.

    The sums grow chunk by chunk of the prefill; the attention matrix is never held.

    Attributes:
        importance: ``prompt`` sums over all rows, which needs the queries of the whole prompt: a
            cached prefix is computed again. ``mean`` divides each sum by the rows that see the key.
            ``window`` sums over the voting rows only and keeps prefix hits.
    """

    importance: str = choice("prompt", "mean", "window")

    @property
    def observes(self) -> bool:
        return self.importance != "window"

    def observe(self, seen: LayerScores | None, layer: Layer) -> LayerScores:
        chunk = scored(layer, layer.q)
        if seen is None:
            return chunk
        grown = pad(seen.scores, (0, chunk.scores.shape[1] - seen.scores.shape[1]))
        entries = seen.entries + chunk.entries
        return LayerScores(grown + chunk.scores, seen.zeros + chunk.zeros, entries)

    def score(self, layer: Layer) -> LayerScores:
        if not self.observes:
            return scored(layer, layer.q)
        sums: LayerScores = layer.seen
        if self.importance == "prompt":
            return sums
        rows = torch.arange(layer.num_keys, 0, -1, device=sums.scores.device)
        return sums._replace(scores=sums.scores / rows)


@dataclass(frozen=True)
class H2O(ColumnSums):
    """Heavy hitters and the recent past, half of the budget each.

    H2O (arXiv 2306.14048), applied once to the prompt: the keys with the largest accumulated
    attention stay. It favours early keys, which more rows can see.
    """

    name = "h2o"

    recent_fraction: float = 0.5
