"""Expected Attention (arXiv 2510.00636)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sglang_vlkv.stages.layer import Layer, LayerScores
from sglang_vlkv.stages.options import require
from sglang_vlkv.stages.policy import Policy


class QueryMoments(NamedTuple):
    """Sums over queries before RoPE.

    Attributes:
        count: how many queries.
        total: their sum, ``[Hq, D]`` float64.
        products: the sum of their outer products, ``[Hq, D, D]`` float64.
    """

    count: int
    total: torch.Tensor
    products: torch.Tensor


@dataclass(frozen=True)
class Expected(Policy):
    """The attention that future queries are expected to pay, whatever they will ask.

    Expected Attention (arXiv 2510.00636): queries before RoPE are taken for normally distributed
    with the mean and covariance of the prompt's own; rotated to the average of the next positions,
    their expected exponential weight on a key has a closed form. Times the norm of its value.

    Attributes:
        future: how many next positions the rotation is averaged over.
        epsilon: added to the weight before it is multiplied by the value norm; higher lets large
            values in that nobody is expected to look at.
    """

    name = "expected"
    needs_rope = True

    sink_tokens: int = 4
    future: int = 512
    epsilon: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.future <= 65_536, "future", self.future, "in [1, 65536]")
        require(0 <= self.epsilon < math.inf, "epsilon", self.epsilon, "finite and at least 0")

    @property
    def observes(self) -> bool:
        return True

    def observe(self, seen: QueryMoments | None, layer: Layer) -> QueryMoments:
        end = layer.num_keys
        q = layer.rope.unrotate(layer.q, layer.positions(end - len(layer.q), end)).double()
        q = q[max(0, self.sink_tokens - (end - len(layer.q))) :]  # sinks have odd queries
        new = QueryMoments(len(q), q.sum(0), torch.einsum("nhd,nhe->hde", q, q))
        if seen is None:
            return new
        return QueryMoments(*(a + b for a, b in zip(seen, new, strict=True)))

    def score(self, layer: Layer) -> LayerScores:
        moments: QueryMoments = layer.seen
        count = max(1, moments.count)
        mean = moments.total / count
        covariance = moments.products / count - mean[:, :, None] * mean[:, None, :]
        cos, sin = self._mean_rotation(layer)

        def turned(x: torch.Tensor) -> torch.Tensor:  # [m, Hq, D]
            return layer.rope.rotate(x, cos.expand(len(x), -1), sin.expand(len(x), -1))

        mean = turned(mean[None])[0]  # [Hq, D]
        # R C R^T: the rotation of all columns, then of all rows.
        covariance = turned(covariance.permute(2, 0, 1)).permute(1, 2, 0)
        covariance = turned(covariance.permute(1, 0, 2)).permute(1, 0, 2)
        keys = layer.k.float().transpose(0, 1)  # [Hkv, n, D]
        group = len(mean) // len(keys)
        mean = mean.unflatten(0, (len(keys), group)) * layer.scale
        covariance = covariance.unflatten(0, (len(keys), group)) * layer.scale**2
        logits = torch.einsum("hnd,hgd->hgn", keys, mean)
        logits += torch.einsum("hnd,hgde,hne->hgn", keys, covariance, keys) / 2
        weights = logits.softmax(-1).mean(1)
        return LayerScores((weights + self.epsilon) * layer.v.float().norm(dim=-1).T)

    def _mean_rotation(self, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[1, lanes]`` averaged over the next positions."""
        last = layer.positions(layer.num_keys - 1, layer.num_keys).max()
        limit = len(layer.rope.cos_sin)
        ahead = (last + torch.arange(1, self.future + 1, device=last.device)).clamp(max=limit - 1)
        axes = 1 if layer.rope.axes is None else 3
        cos, sin = layer.rope.angles(ahead.expand(axes, -1))
        return cos.mean(0, keepdim=True), sin.mean(0, keepdim=True)
