"""Contracts between the stages ``score -> budget -> select -> merge -> compact``.

Nothing here imports SGLang. Below the configuration everything counts tokens, never ratios; one
function, :func:`num_tokens`, turns a ratio into a count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import ClassVar, Mapping, NamedTuple

import torch


class Modality(IntEnum):
    """What a pool slot, or a prompt position, holds."""

    TEXT = 0
    IMAGE = 1
    VIDEO = 2
    AUDIO = 3
    SYSTEM = 4  # chat-template and delimiter tokens: the tokenizer's special tokens
    MERGED = 5  # rows of several tokens: a compacted or merged slot


VISUAL = (Modality.IMAGE, Modality.VIDEO)


def num_tokens(ratio: float, *counts: int) -> int:
    """Tokens in ``ratio`` of the product of ``counts``: rounded half to even."""
    return round(math.prod(counts, start=ratio))


@dataclass(frozen=True)
class Prompt:
    """A prompt with its placeholders expanded; outputs are never part of it.

    Attributes:
        tags: :class:`Modality` of every position, ``[n]`` uint8 on the CPU.
        last_turn: first position of the newest turn.
    """

    tags: torch.Tensor
    last_turn: int = 0

    @property
    def num_tokens(self) -> int:
        return self.tags.numel()

    @property
    def num_visual(self) -> int:
        return int(sum((self.tags == m).sum() for m in VISUAL))

    @property
    def vision_end(self) -> int:
        """Position after the last visual token; 0 without one."""
        visual = sum(self.tags == m for m in VISUAL).nonzero()
        return int(visual[-1]) + 1 if len(visual) else 0


class LayerScores(NamedTuple):
    """What the score stage leaves behind, per layer.

    Attributes:
        scores: importance of every key, ``[Hkv, n]`` float32; more is more important.
        zeros: attention entries that the ThresholdFilter counts as zero, summed over voting rows
            and this rank's query heads. Tensor-parallel ranks add theirs.
    """

    scores: torch.Tensor
    zeros: int


class Selection(NamedTuple):
    """What the select stage decides.

    Attributes:
        kept: per layer, the prompt positions kept by each KV head, ascending,
            ``[Hkv, num_kept[l]]`` int64.
        sparsity: per layer, the measured fraction of zeros, in [0, 1].
    """

    kept: list[torch.Tensor]
    sparsity: list[float]

    @property
    def num_kept(self) -> list[int]:
        return [layer.shape[1] for layer in self.kept]


@dataclass(frozen=True)
class Policy:
    """Which KV rows of a prompt stay after its prefill. Subclasses are stateless, one file each.

    The fields are the options of ``--kv-policy-config``; every policy has these.

    Attributes:
        budget: fraction of the prompt's KV rows that stays, over all layers, in (0, 1].
            Lower frees more memory and loses more of the picture.
        recent_fraction: fraction of each layer's budget that the last prompt tokens take
            unconditionally, inside the budget. Higher favours the question's end over the picture.
        min_rows, max_rows: least and most voting rows (the prompt positions whose attention
            scores the keys). More rows cost scoring time and re-prefill on a prefix hit.
        voting: ``post_vision`` lets all text after the last visual token vote, ``last_turn`` only
            the newest turn's.
        min_prompt_tokens: shorter prompts are left alone: they have little to free.
        modality_floors: per modality name, the least fraction of its tokens kept by every layer
            and head, inside the budget: ``{"text": 1.0}`` keeps all text. Where floors exceed the
            budget their best-scored tokens win.
        compact_always: compact even where that frees nothing (a budget of 1); for testing.
    """

    name: ClassVar[str]

    budget: float = 0.1
    recent_fraction: float = 0.1
    min_rows: int = 16
    max_rows: int = 256
    voting: str = field(default="post_vision", metadata={"choices": ("post_vision", "last_turn")})
    min_prompt_tokens: int = 256
    modality_floors: Mapping[str, float] = field(default_factory=dict)
    compact_always: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError, naming the option, what it was and what it may be."""
        for option in fields(self):
            check_type(self.name, option, getattr(self, option.name))
        require(0 < self.budget <= 1, "budget", self.budget, "in (0, 1]")
        require(0 <= self.recent_fraction <= 1, "recent_fraction", self.recent_fraction, "in [0, 1]")
        require(self.min_rows >= 1, "min_rows", self.min_rows, "at least 1")
        require(self.max_rows >= self.min_rows, "max_rows", self.max_rows, "at least min_rows")
        require(
            self.budget * self.min_prompt_tokens >= 1,
            "min_prompt_tokens",
            self.min_prompt_tokens,
            f"at least 1 / budget = {math.ceil(1 / self.budget)}, so that every layer keeps a token",
        )
        names = [m.name.lower() for m in Modality if m is not Modality.MERGED]
        for name, fraction in self.modality_floors.items():
            require(name in names, "modality_floors", name, f"one of {', '.join(names)}")
            is_number = isinstance(fraction, (int, float)) and not isinstance(fraction, bool)
            require(is_number and 0 <= fraction <= 1, f"modality_floors[{name}]", fraction, "in [0, 1]")

    def num_voting(self, prompt: Prompt) -> int:
        """R: how many of the last prompt positions vote."""
        start = prompt.vision_end
        if self.voting == "last_turn":
            start = max(start, prompt.last_turn)
        rows = prompt.num_tokens - start
        return min(max(rows, self.min_rows), self.max_rows, prompt.num_tokens)

    def num_recent(self, num_kept: int) -> int:
        """How many of the last prompt tokens a layer that keeps ``num_kept`` always keeps."""
        return min(max(1, int(self.recent_fraction * num_kept)), num_kept)

    def max_total(self, num_prompt: int, num_layers: int) -> int:
        """Most rows that all layers together keep of a prompt: what admission reserves."""
        return num_tokens(self.budget, num_prompt, num_layers)

    def score(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> LayerScores:
        """Scores one layer's keys.

        Args:
            q: the voting rows' queries after RoPE, ``[R, Hq, D]``.
            k: the whole prompt's keys after RoPE, ``[n, Hkv, D]``.
            scale: factor on the dot products.
        """
        raise NotImplementedError

    def layer_budgets(self, sparsity: list[float], num_prompt: int) -> list[int]:
        """Rows that each layer keeps per KV head, from the layers' measured sparsity."""
        raise NotImplementedError


def require(ok: bool, option: str, value: object, allowed: str) -> None:
    """Raises ValueError naming ``option``, what it is and what it must be, unless ``ok``."""
    if not ok:
        raise ValueError(f"{option} is {value!r}; it must be {allowed}")


def check_type(policy: str, option, value: object) -> None:
    """Raises ValueError unless ``value`` fits the dataclass field ``option``."""
    kinds = {
        "float": ((int, float), "a number"),
        "int": ((int,), "an integer"),
        "bool": ((bool,), "true or false"),
        "str": ((str,), "a string"),
    }
    types, words = kinds.get(option.type, ((Mapping,), "an object of modality names to fractions"))
    fits = isinstance(value, types) and (bool in types or not isinstance(value, bool))
    require(fits, f"{policy} option {option.name}", value, words)
    choices = option.metadata.get("choices")
    if choices:
        require(value in choices, option.name, value, f"one of {', '.join(choices)}")
