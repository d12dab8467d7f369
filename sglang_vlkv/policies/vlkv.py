"""This project's own policy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Iterator

import torch

from sglang_vlkv.base import Layer, LayerScores, Policy, Prompt, choice, require
from sglang_vlkv.policies.votes import votes


@dataclass(frozen=True)
class VLKV(Policy):
    """The question whole, what any of its words looks at, and what stands out in the picture.

    Three departures from VL-Cache (arXiv 2410.23317), each an option:

    - The question's rows do not compete with the picture's: all text after the last visual token
      stays, inside the budget and up to ``floors_share`` of it.
    - A key is worth the largest attention that any voting row of any head of its group pays it, not
      the sum: a word that looks at one patch outweighs many that glance at another.
    - A quota of what is left goes to visual tokens that differ from the rest of the picture,
      whatever the question is: those with the largest Mahalanobis distance of their keys before
      RoPE, per KV head. Later questions and words not yet decoded may need them.

    Every layer keeps equally many.

    Attributes:
        reduce: ``max`` or ``sum`` of the attention over voting rows and group heads.
        question: fraction of the text after the last visual token that stays.
        ridge: added to the covariance, relative to its mean variance; higher trusts directions in
            which keys hardly vary less.
    """

    name = "vlkv"
    needs_rope = True

    floors_share: float = 0.5
    quota: float = 0.4
    reduce: str = choice("max", "sum")
    question: float = 1.0
    ridge: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.question <= 1, "question", self.question, "in [0, 1]")
        require(1e-6 <= self.ridge < math.inf, "ridge", self.ridge, "finite and at least 1e-6")

    def floors(self, prompt: Prompt) -> Iterator[tuple[torch.Tensor, float]]:
        yield from super().floors(prompt)
        if self.question:
            yield torch.arange(prompt.num_tokens) >= prompt.vision_end, self.question

    def score(self, layer: Layer) -> LayerScores:
        scored = votes(layer, reduce=self.reduce)
        return scored._replace(quota_scores=self._outliers(layer) if self.quota else None)

    def _outliers(self, layer: Layer) -> torch.Tensor:
        """Squared Mahalanobis distance of the visual keys, ``[Hkv, n]``; ``-inf`` elsewhere."""
        visual = layer.prompt.visual.nonzero().flatten()
        positions = layer.positions(0, len(layer.k))[:, visual]
        visual = visual.to(layer.k.device)
        keys = layer.rope.unrotate(layer.k[visual], positions).transpose(0, 1)  # [H, m, D]
        keys = keys - keys.mean(1, keepdim=True)
        covariance = keys.mT @ keys / keys.shape[1]
        variance = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
        eye = torch.eye(keys.shape[2], device=keys.device)
        covariance += self.ridge * variance[:, None, None] * eye
        distance = (keys * torch.linalg.solve(covariance, keys.mT).mT).sum(-1)
        scores = torch.full((len(keys), len(layer.k)), -torch.inf, device=keys.device)
        scores[:, visual] = distance
        return scores
