"""What the score stage reads and leaves behind, and what the select stage decides."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from sglang_vlkv.stages.prompt import Prompt
from sglang_vlkv.stages.rope import Rope


class Rows(NamedTuple):
    """Keys or values of n positions: a tensor of their own, or where they lie in a pool.

    Attributes:
        buffer: ``[n, Hkv, D]``; with ``slots`` a pool's, ``[pool_rows, Hkv, D]``.
        slots: row j is ``buffer[slots[j]]``, ``[n]`` integer; None where it is ``buffer[j]``.
    """

    buffer: torch.Tensor
    slots: torch.Tensor | None = None

    def gather(self) -> torch.Tensor:
        """``[n, Hkv, D]``."""
        return self.buffer if self.slots is None else self.buffer[self.slots]


@dataclass(frozen=True)
class Layer:
    """One layer of a prompt, as a policy sees it. Nothing here may be written to.

    Attributes:
        prompt: what the positions hold.
        q: queries after RoPE, ``[R, Hq, D]``: of the last R positions that ``keys`` holds.
        keys: where the keys after RoPE are, see :attr:`k`.
        values: where the values are, see :attr:`v`.
        scale: factor on the dot products.
        index: the layer's number.
        rope: the model's rotary embedding, None where it has none.
        seen: what :meth:`Policy.observe` made of the prompt's queries; None if it does not observe.
        draft: queries of drafted output tokens, ``[T, Hq, D]``, which see the whole prompt; None
            where nothing was drafted.
    """

    prompt: Prompt
    q: torch.Tensor
    keys: Rows
    values: Rows
    scale: float
    index: int = 0
    rope: Rope | None = None
    seen: object = None
    draft: torch.Tensor | None = None

    @property
    def num_keys(self) -> int:
        """n; gathers nothing."""
        return len(self.keys.buffer if self.keys.slots is None else self.keys.slots)

    @property
    def num_kv_heads(self) -> int:
        return self.keys.buffer.shape[1]

    @property
    def device(self) -> torch.device:
        return self.keys.buffer.device

    @cached_property
    def k(self) -> torch.Tensor:
        """Keys, ``[n, Hkv, D]``; gathered when first asked for."""
        return self.keys.gather()

    @cached_property
    def v(self) -> torch.Tensor:
        """Values, ``[n, Hkv, D]``; gathered when first asked for."""
        return self.values.gather()

    @property
    def scored_keys(self) -> Rows:
        """The keys as attention scoring reads them best: where they lie, but gathered on a CPU."""
        return self.keys if self.device.type == "cuda" else Rows(self.k)

    def positions(self, start: int, end: int) -> torch.Tensor:
        """Rotary positions of prompt positions ``[start, end)``, ``[axes, end - start]`` int64."""
        return self.prompt.rotary_positions(self.device)[:, start:end]


class LayerScores(NamedTuple):
    """What the score stage leaves behind, per layer.

    Attributes:
        scores: importance of every key, ``[Hkv, n]`` float32; more is more important.
        zeros: attention entries that the ThresholdFilter counts as zero, summed over voting rows
            and this rank's query heads. On an accelerator a 0-dim int64 tensor, which nothing waits
            for before the last layer is done.
        entries: how many there were; 0 where no attention was computed. A tensor like ``zeros`` where
            only the accelerator knows.
        quota_scores: a second importance ``[Hkv, n]``, by which the policy's ``quota`` is filled;
            ``-inf`` where a key takes no part in it.
        profile: what else the layer budgets depend on, ``[any]`` int64.

    Tensor-parallel ranks add their ``zeros``, ``entries`` and ``profile``, and agree on budgets.
    """

    scores: torch.Tensor
    zeros: int | torch.Tensor = 0
    entries: int | torch.Tensor = 0
    quota_scores: torch.Tensor | None = None
    profile: torch.Tensor | None = None


class Selection(NamedTuple):
    """What the select stage decides.

    Attributes:
        kept: per layer, the prompt positions kept by each KV head, ascending,
            ``[Hkv, num_kept[l]]`` int64.
        sparsity: per layer, the measured fraction of zeros, in [0, 1]; None where no attention was
            computed.
    """

    kept: list[torch.Tensor]
    sparsity: list[float] | None

    @property
    def num_kept(self) -> list[int]:
        return [layer.shape[1] for layer in self.kept]
