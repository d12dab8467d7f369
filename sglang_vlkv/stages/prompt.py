"""What a policy is told of a prompt. Below the configuration everything counts tokens, never ratios."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Callable, NamedTuple

import torch


class Modality(IntEnum):
    """What a prompt position holds."""

    TEXT = 0
    IMAGE = 1
    VIDEO = 2
    AUDIO = 3
    SYSTEM = 4  # chat-template and delimiter tokens: the tokenizer's special tokens


VISUAL = (Modality.IMAGE, Modality.VIDEO)


def num_tokens(ratio: float, *counts: int) -> int:
    """Tokens in ``ratio`` of the product of ``counts``: rounded half to even."""
    return round(math.prod(counts, start=ratio))


class Shown(NamedTuple):
    """The pictures and videos of a prompt, numbered from 0.

    Attributes:
        positions: of their tokens, ascending, ``[m]`` int64.
        numbers: whose each of them is, ``[m]`` int64.
        sizes: how many each has, ``[pictures]`` int64, none 0.
        distinct: the same, but 1 for pictures that come again later.
    """

    positions: torch.Tensor
    numbers: torch.Tensor
    sizes: torch.Tensor
    distinct: torch.Tensor


class KeptPicture(NamedTuple):
    """What is left of an image or a video.

    Attributes:
        modality: image or video.
        tokens: it has in the prompt.
        rows: kept of it, over all layers and KV heads.
        least: kept of it by any one KV head of any layer.
    """

    modality: Modality
    tokens: int
    rows: int
    least: int


@dataclass(frozen=True)
class Prompt:
    """A prompt with its placeholders expanded; outputs are never part of it.

    Attributes:
        tags: :class:`Modality` of every position, ``[n]`` uint8 on the CPU.
        last_turn: first position of the newest turn of the user's.
        positions: rotary positions ``[axes, n]`` int64: three axes (time, height, width) under
            M-RoPE, else one; None where they are 0 .. n-1.
        pictures: which picture or video each position belongs to, ``[n]`` int64, -1 for none; None
            takes every unbroken run of image or video tags for one.
        newest: where the same token stands in the newest copy of its picture, ``[n]`` int64: for most
            positions they themselves; None for all.
        turn_end: position of the token that ends the newest turn; None where nothing does.
    """

    tags: torch.Tensor
    last_turn: int = 0
    positions: torch.Tensor | None = None
    pictures: torch.Tensor | None = None
    newest: torch.Tensor | None = None
    turn_end: int | None = None

    @property
    def num_tokens(self) -> int:
        return self.tags.numel()

    def since(self, start: int) -> Prompt:
        """The part from position ``start`` on, as a prompt of its own."""
        positions = torch.arange(self.num_tokens)[None] if self.positions is None else self.positions
        pictures = self.pictures if self.pictures is None else self.pictures[start:]
        newest = self.newest if self.newest is None else self.newest[start:] - start
        end = self.turn_end if self.turn_end is None else max(0, self.turn_end - start)
        turn = max(0, self.last_turn - start)
        return Prompt(self.tags[start:], turn, positions[:, start:], pictures, newest, end)

    @cached_property
    def visual(self) -> torch.Tensor:
        """Which positions hold a visual token, ``[n]`` bool."""
        return torch.isin(self.tags, torch.tensor(VISUAL, dtype=self.tags.dtype))

    @cached_property
    def shown(self) -> Shown:
        """Its pictures and videos."""
        numbers = self.pictures
        if numbers is None:
            changes = self.tags.diff(prepend=self.tags[:1] + 1) != 0
            numbers = changes.cumsum(0).where(self.visual, -1)
        positions = (numbers >= 0).nonzero().flatten()
        _, numbers, sizes = numbers[positions].unique(return_inverse=True, return_counts=True)
        distinct = sizes.clone()
        distinct[numbers[torch.isin(positions, self.repeats[0])]] = 1
        return Shown(positions, numbers, sizes, distinct)

    @cached_property
    def repeats(self) -> torch.Tensor:
        """Tokens of pictures that come again later, and where they do, ``[2, r]`` int64."""
        if self.newest is None:
            return torch.empty(2, 0, dtype=torch.int64)
        old = (self.newest != torch.arange(self.num_tokens)).nonzero().flatten()
        return torch.stack([old, self.newest[old]])

    def question_positions(self, device: torch.device) -> torch.Tensor:
        """The newest turn's, behind the last picture; also its text before it where nothing is asked
        behind it; ``[m]`` int64 on ``device``."""

        def make() -> torch.Tensor:
            asks = torch.arange(self.num_tokens) >= max(self.vision_end, self.last_turn)
            if self.asked_before:
                asks[self.last_turn :] |= self.tags[self.last_turn :] == Modality.TEXT
            return asks.nonzero().flatten()

        return self._on("question", make, device)

    def repeats_on(self, device: torch.device) -> torch.Tensor:
        """:attr:`repeats` on ``device``."""
        return self._on("repeats", lambda: self.repeats, device)

    def distinct_positions(self, device: torch.device) -> torch.Tensor:
        """Where the visual tokens are that do not come again, ``[m]`` int64 on ``device``."""

        def make() -> torch.Tensor:
            return self.visual.index_fill(0, self.repeats[0], False).nonzero().flatten()

        return self._on("distinct", make, device)

    def visual_positions(self, device: torch.device) -> torch.Tensor:
        """Where the visual tokens are, ``[m]`` int64 on ``device``."""
        return self._on("visual", lambda: self.visual.nonzero().flatten(), device)

    def shown_tokens(self, device: torch.device) -> torch.Tensor:
        """Of :attr:`shown`: positions, numbers, numbers in order, and behind these how many of the same
        number come before; ``[4, m]`` int64 on ``device``."""

        def make() -> torch.Tensor:
            positions, numbers, sizes, _ = self.shown
            ordered = numbers.sort().values
            before = torch.arange(len(ordered)) - (sizes.cumsum(0) - sizes)[ordered]
            return torch.stack([positions, numbers, ordered, before])

        return self._on("shown", make, device)

    def rotary_positions(self, device: torch.device) -> torch.Tensor:
        """:attr:`positions` on ``device``, also where they are 0 .. n-1."""
        return self._on(
            "rotary",
            lambda: torch.arange(self.num_tokens)[None] if self.positions is None else self.positions,
            device,
        )

    @cached_property
    def _copies(self) -> dict[tuple[str, torch.device], torch.Tensor]:
        return {}

    def _on(self, name: str, make: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
        """Copied once for all layers, and without waiting for what the device is at."""
        if (name, device) not in self._copies:
            made = make().pin_memory() if device.type == "cuda" else make()
            self._copies[name, device] = made.to(device, non_blocking=True)
        return self._copies[name, device]

    def per_modality(self, kept: list[torch.Tensor]) -> dict[str, int]:
        """Rows by what they hold, over all layers and KV heads.

        Args:
            kept: per layer, positions ``[Hkv, rows]``.
        """
        kept = self.tags[torch.cat([layer.flatten() for layer in kept])]
        counts, there = (torch.bincount(tags, minlength=len(Modality)) for tags in (kept, self.tags))
        return {m.name.lower(): int(counts[m]) for m in Modality if there[m]}

    def per_picture(self, kept: list[torch.Tensor]) -> list[KeptPicture]:
        """What is kept of each picture and video, in their order.

        Args:
            kept: per layer, positions ``[Hkv, rows]``.
        """
        positions, numbers, sizes, _ = self.shown
        picture = torch.full((self.num_tokens,), len(sizes))
        picture[positions] = numbers
        heads = [picture[head.long()] for layer in kept for head in layer]
        counts = torch.stack([torch.bincount(head, minlength=len(sizes) + 1)[:-1] for head in heads])
        tags = torch.empty_like(sizes).scatter_(0, numbers, self.tags[positions].long())
        columns = tags.tolist(), sizes.tolist(), counts.sum(0).tolist(), counts.amin(0).tolist()
        return [KeptPicture(Modality(tag), *of_one) for tag, *of_one in zip(*columns, strict=True)]

    @cached_property
    def asked_before(self) -> bool:
        """Whether text of the newest turn stands before its last picture and none behind it: nothing that
        follows the picture but the chat template."""
        start, middle = self.last_turn, self.vision_end
        text = self.tags == Modality.TEXT
        return bool(text[start:middle].any()) and not text[max(start, middle) : self.turn_end].any()

    @property
    def num_visual(self) -> int:
        return int(self.visual.sum())

    @cached_property
    def vision_end(self) -> int:
        """Position after the last visual token; 0 without one."""
        visual = self.visual.nonzero()
        return int(visual[-1]) + 1 if len(visual) else 0
