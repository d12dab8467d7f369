"""Rotary position embedding, taken off keys and queries again."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rope:
    """A model's rotary embedding (RoPE, arXiv 2104.09864; M-RoPE, arXiv 2409.12191).

    Attributes:
        cos_sin: ``[positions, rotary_dim]``: cosines of all lanes, then sines.
        axes: per lane, the position axis that turns it, ``[rotary_dim / 2]`` int64; None where
            positions have one axis.
        neox: lanes pair dimension i with i + rotary_dim / 2, else 2i with 2i + 1.
    """

    cos_sin: torch.Tensor
    axes: torch.Tensor | None = None
    neox: bool = True

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[n, rotary_dim / 2]`` float32 at ``positions`` ``[axes, n]``."""
        cos, sin = self.cos_sin[positions].float().chunk(2, dim=-1)  # [axes, n, lanes]
        if self.axes is None or len(positions) == 1:
            return cos[0], sin[0]
        lanes = torch.arange(len(self.axes), device=self.axes.device)
        return cos[self.axes, :, lanes].T, sin[self.axes, :, lanes].T

    def unrotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What ``x`` was before RoPE, up to the rounding of its dtype.

        Args:
            x: keys or queries after RoPE, ``[n, H, D]``.
            positions: ``[axes, n]`` int64.

        Returns:
            ``[n, H, D]`` float32.
        """
        cos, sin = self.angles(positions)
        length = cos.square() + sin.square()  # not 1 where RoPE scales what it turns (YaRN)
        return self.rotate(x, cos / length, -sin / length)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Turns every lane of ``x`` ``[n, H, D]`` by the angles ``[n, rotary_dim / 2]``."""
        x, cos, sin = x.float(), cos[:, None], sin[:, None]
        rotary_dim = self.cos_sin.shape[1]
        turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        if self.neox:
            a, b = turned.chunk(2, dim=-1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        else:
            a, b = turned[..., ::2], turned[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        return torch.cat([turned, rest], dim=-1)
