"""InfiniPot-V (arXiv 2506.15745)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping

import torch
from torch.nn.functional import normalize

from sglang_vlkv.policies.snapkv import check_kernel_size, smoothed
from sglang_vlkv.stages.layer import Layer, LayerScores
from sglang_vlkv.stages.options import require, text_stays
from sglang_vlkv.stages.policy import Policy
from sglang_vlkv.stages.prompt import Modality


@dataclass(frozen=True)
class InfiniPotV(Policy):
    """Without attention: patches that differ from the newest frames, and large values.

    InfiniPot-V (arXiv 2506.15745): half of the budget goes to the video tokens least similar to
    the same place in the most recent frames (TaR), the rest to the largest value norms (VaN).
    Pictures have no frames and go by value norm alone.

    Deviation: applied once, after the prefill, instead of whenever a memory limit is met, so it
    does not lower the prefill's peak. All text stays, inside the budget. Several videos count as
    one.

    Attributes:
        recent_frames: fraction of a video's frames that the others are compared with; they
            themselves come first.
        kernel_size: neighbouring positions that a value norm is averaged over, odd.
    """

    name = "infinipotv"
    votes = False

    modality_floors: Mapping[str, float] = text_stays()
    quota: float = 0.5
    recent_frames: float = 0.25
    kernel_size: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.recent_frames <= 1, "recent_frames", self.recent_frames, "in (0, 1]")
        check_kernel_size(self.kernel_size)

    def score(self, layer: Layer) -> LayerScores:
        norms = layer.v.float().norm(dim=-1).T
        smooth = smoothed(norms, self.kernel_size)
        return LayerScores(smooth, quota_scores=self._temporal_difference(layer))

    def _temporal_difference(self, layer: Layer) -> torch.Tensor | None:
        """``[H, n]``, ``-inf`` off the video; None without frames of one size to compare."""
        video = (layer.prompt.tags == Modality.VIDEO).nonzero().flatten()
        if layer.prompt.positions is None or not len(video):
            return None
        _, sizes = layer.prompt.positions[0, video].unique_consecutive(return_counts=True)
        if len(sizes) < 2 or len(sizes.unique()) > 1:
            return None
        num_frames, video = len(sizes), video.to(layer.device)
        keys = normalize(layer.k[video].float().transpose(0, 1), dim=-1)  # [H, tokens, D]
        frames = keys.unflatten(1, (num_frames, -1))  # [H, frames, places, D]
        num_recent = max(1, int(self.recent_frames * num_frames))
        recent = frames[:, num_frames - num_recent :].mean(1, keepdim=True)
        difference = -(frames * recent).sum(-1)  # minus the mean cosine, in [-1, 1]
        difference[:, num_frames - num_recent :] = 1.0
        scores = torch.full((len(keys), layer.num_keys), -torch.inf, device=layer.device)
        scores[:, video] = difference.flatten(1)
        return scores
