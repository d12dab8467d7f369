"""The voting rows' attention, with a draft's rows among them where there is one."""

from __future__ import annotations

import torch

from sglang_vlkv.base import Layer, LayerScores
from sglang_vlkv.kernels.post_vision import post_vision_scores


def votes(layer: Layer, p: float = 0.01, reduce: str = "sum") -> LayerScores:
    """:func:`post_vision_scores` of the voting rows, and of drafted queries over the whole prompt.

    Drafted rows change the scores only; sparsity is measured on the voting rows.
    """
    own = post_vision_scores(layer.q, layer.k, layer.scale, p, reduce)
    if layer.draft is None or not len(layer.draft):
        return own
    last = torch.full((len(layer.draft),), len(layer.k) - 1, device=layer.k.device)
    drafted = post_vision_scores(layer.draft, layer.k, layer.scale, p, reduce, rows=last)
    both = torch.add if reduce == "sum" else torch.maximum
    return own._replace(scores=both(own.scores, drafted.scores))
