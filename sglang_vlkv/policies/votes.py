"""The voting rows' attention, with a draft's rows among them where there is one."""

from __future__ import annotations

import torch

from sglang_vlkv.kernels.post_vision import post_vision_scores
from sglang_vlkv.stages.layer import Layer, LayerScores


def scored(
    layer: Layer, q: torch.Tensor, p: float = 0.01, reduce: str = "sum", rows: torch.Tensor | None = None
) -> LayerScores:
    """:func:`post_vision_scores` of the queries ``q`` over the layer's keys, wherever they lie."""
    keys = layer.scored_keys
    return LayerScores(*post_vision_scores(q, keys.buffer, layer.scale, p, reduce, rows, keys.slots))


def votes(layer: Layer, p: float = 0.01, reduce: str = "sum") -> LayerScores:
    """:func:`scored` of the voting rows, and of drafted queries over the whole prompt.

    Drafted rows change the scores only; sparsity is measured on the voting rows.
    """
    own = scored(layer, layer.q, p, reduce)
    if layer.draft is None or not len(layer.draft):
        return own
    last = torch.full((len(layer.draft),), layer.num_keys - 1, device=layer.device)
    drafted = scored(layer, layer.draft, p, reduce, rows=last)
    both = torch.add if reduce == "sum" else torch.maximum
    return own._replace(scores=both(own.scores, drafted.scores))
