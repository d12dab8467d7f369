"""What post-vision scoring returns."""

from __future__ import annotations

from typing import NamedTuple

import torch


class PostVisionScores(NamedTuple):
    """Attention of voting rows, per key.

    Attributes:
        scores: ``[Hkv, n]`` float32.
        zeros: entries that the ThresholdFilter counts as zero, over voting rows and query heads; a
            0-dim int64 tensor where an accelerator counts them.
        entries: causally valid entries; a tensor like ``zeros`` where only the accelerator knows.
    """

    scores: torch.Tensor
    zeros: int | torch.Tensor
    entries: int | torch.Tensor
