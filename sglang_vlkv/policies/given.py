"""Rows that the request names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Mapping, Sequence

import torch

from sglang_vlkv.stages.layer import Layer, LayerScores
from sglang_vlkv.stages.options import require, text_stays
from sglang_vlkv.stages.policy import Policy
from sglang_vlkv.stages.prompt import Prompt


@dataclass(frozen=True)
class Given(Policy):
    """Keeps all text, and the visual tokens that the request names (or all but those).

    For experiments: an oracle that knows where the answer is, or its opposite. What remains of the
    budget goes to the latest positions.

    Attributes:
        visual: numbers of visual tokens, counted over all pictures of the prompt.
        keep: False keeps everything but them; set the budget so that they are what is lost.
    """

    name = "given"
    votes = False

    recent_fraction: float = 0.0
    picture_share: float = 0.0
    modality_floors: Mapping[str, float] = text_stays()
    visual: Sequence[int] = ()
    keep: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        least = min(self.visual, default=0)
        require(least >= 0, "visual", list(self.visual), "numbers from 0")
        require(len(self.visual) <= 100_000, "visual", len(self.visual), "at most 100,000 numbers")

    def _named(self, prompt: Prompt) -> torch.Tensor:
        """Positions of the named tokens, ``[n]`` bool."""
        named = torch.zeros_like(prompt.tags, dtype=torch.bool)
        tokens = prompt.visual.nonzero().flatten()
        at = torch.tensor(list(self.visual), dtype=torch.int64)
        named[tokens[at[at < len(tokens)]]] = True
        return named

    def floors(self, prompt: Prompt) -> Iterator[tuple[torch.Tensor, float]]:
        yield from super().floors(prompt)
        if self.keep:
            yield self._named(prompt), 1.0

    def score(self, layer: Layer) -> LayerScores:
        num_keys, num_heads = layer.num_keys, layer.num_kv_heads
        score = torch.arange(num_keys, dtype=torch.float32)
        if not self.keep:
            score[self._named(layer.prompt)] = -1.0
        return LayerScores(score.to(layer.device).expand(num_heads, -1))
