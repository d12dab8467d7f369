"""SnapKV (arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import avg_pool1d

from sglang_vlkv.policies.votes import votes
from sglang_vlkv.stages.layer import Layer, LayerScores
from sglang_vlkv.stages.options import require
from sglang_vlkv.stages.policy import Policy
from sglang_vlkv.stages.prompt import Prompt


def check_kernel_size(kernel_size: int) -> None:
    """Raises ValueError unless :func:`smoothed` takes it."""
    odd = 1 <= kernel_size < 100 and kernel_size % 2 == 1
    require(odd, "kernel_size", kernel_size, "odd, from 1 to 99")


def smoothed(scores: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """Means over ``kernel_size`` neighbouring positions, fewer at the ends, ``[H, n]``."""
    around = kernel_size // 2
    return avg_pool1d(scores, kernel_size, stride=1, padding=around, count_include_pad=False)


@dataclass(frozen=True)
class SnapKV(Policy):
    """The prompt's last tokens vote, their votes are smoothed over neighbours, and they all stay.

    SnapKV (arXiv 2404.14469). It does not know an image from text: the window has a fixed size, and
    where the budget is smaller than that, nothing but recent tokens stays.

    Deviation: the smoothing runs over the whole prompt, its window included, and averages what is
    there at the ends.

    Attributes:
        window_size: voting rows at the end of the prompt; kept whole, inside the budget.
        kernel_size: neighbouring positions that a vote is averaged over, odd; 1 does not smooth.
    """

    name = "snapkv"
    can_draft = True

    window_size: int = 32
    kernel_size: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.window_size >= 1, "window_size", self.window_size, "at least 1")
        check_kernel_size(self.kernel_size)

    def num_voting(self, prompt: Prompt) -> int:
        return min(self.window_size, prompt.num_tokens)

    def num_recent(self, num_kept: int) -> int:
        return min(self.window_size, num_kept)

    def score(self, layer: Layer) -> LayerScores:
        scored = votes(layer)
        return scored._replace(scores=smoothed(scored.scores, self.kernel_size))
