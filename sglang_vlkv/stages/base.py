"""Contracts between the stages ``score -> budget -> select -> merge -> compact``.

Nothing here imports SGLang. Below the configuration everything counts tokens, never ratios; one
function, :func:`num_tokens`, turns a ratio into a count.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass, field, fields
from enum import IntEnum
from functools import cached_property
from typing import Callable, ClassVar, Iterator, Mapping, NamedTuple

import torch

from sglang_vlkv.stages.budgets import proportional
from sglang_vlkv.stages.rope import Rope


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
        positions: rotary positions ``[axes, n]`` int64: three axes (time, height, width) under
            M-RoPE, else one; None where they are 0 .. n-1.
    """

    tags: torch.Tensor
    last_turn: int = 0
    positions: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.tags.numel()

    def since(self, start: int) -> Prompt:
        """The part from position ``start`` on, as a prompt of its own."""
        positions = torch.arange(self.num_tokens)[None] if self.positions is None else self.positions
        return Prompt(self.tags[start:], max(0, self.last_turn - start), positions[:, start:])

    @cached_property
    def visual(self) -> torch.Tensor:
        """Which positions hold a visual token, ``[n]`` bool."""
        return torch.isin(self.tags, torch.tensor(VISUAL, dtype=self.tags.dtype))

    def visual_positions(self, device: torch.device) -> torch.Tensor:
        """Where the visual tokens are, ``[m]`` int64 on ``device``."""
        return self._on("visual", lambda: self.visual.nonzero().flatten(), device)

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

    @property
    def num_visual(self) -> int:
        return int(self.visual.sum())

    @cached_property
    def vision_end(self) -> int:
        """Position after the last visual token; 0 without one."""
        visual = self.visual.nonzero()
        return int(visual[-1]) + 1 if len(visual) else 0


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


def choice(default: str, *others: str):
    """A dataclass field whose value is one of these words."""
    return field(default=default, metadata={"choices": (default, *others)})


def text_stays():
    """A ``modality_floors`` field that keeps all that is not part of a picture or video."""
    return field(default_factory=lambda: {"text": 1.0, "system": 1.0, "audio": 1.0})


@dataclass(frozen=True)
class Policy:
    """Which KV rows of a prompt stay after its prefill. Subclasses are stateless, one file each.

    The fields are the options of ``--kv-policy-config``; every policy has these.

    Attributes:
        budget: fraction of the prompt's KV rows that stays, over all layers, in (0, 1].
            Lower frees more memory and loses more of the picture.
        recent_fraction: fraction of each layer's budget that the last prompt tokens take
            unconditionally, inside the budget. Higher favours the question's end over the picture.
        sink_tokens: how many of the prompt's first tokens always stay, inside the budget.
        min_rows, max_rows: least and most voting rows (the prompt positions whose attention
            scores the keys). More rows cost scoring time and re-prefill on a prefix hit.
        voting: ``post_vision`` lets all text after the last visual token vote, ``last_turn`` only
            the newest turn's.
        min_prompt_tokens: shorter prompts are left alone: they have little to free.
        modality_floors: per modality name, the least fraction of its tokens kept by every layer
            and head, inside the budget: ``{"text": 1.0}`` keeps all text. Where floors exceed the
            budget their best-scored tokens win.
        floors_share: most of a layer's budget that floors may take.
        quota: fraction of what recent window, sinks and floors leave of a layer's budget that goes
            by the policy's second score, where it has one.
        merge: what happens to the rows that do not stay. ``none`` drops them; ``bucket_mean``
            averages each into the kept row nearest by position (Elastic Cache, arXiv 2407.18121),
            ``similar`` into the kept row with the most similar key (LOOK-M, arXiv 2406.18139).
        merge_threshold: ``similar`` drops rows whose best cosine similarity is below it.
        decode: ``append`` keeps the KV of all output tokens; ``fixed_point`` evicts a row for every
            output token, so that the cache stays at its size (Elastic Cache).
        fixed_point_distance: rows at the end of a layer that ``fixed_point`` lets slide; it evicts
            at row ``max(sink_tokens, rows - fixed_point_distance)``.
        draft_tokens: output tokens that are decoded first and thrown away, so that their attention
            votes too. Costs those steps before the first token, and the voting rows' prefill twice.
        compact_always: compact even where that frees nothing (a budget of 1); for testing.
    """

    name: ClassVar[str]
    needs_rope: ClassVar[bool] = False  # refused for models whose rotary embedding is unknown
    votes: ClassVar[bool] = True  # its score looks at queries
    can_draft: ClassVar[bool] = False  # also at those of drafted tokens

    budget: float = 0.1
    recent_fraction: float = 0.1
    sink_tokens: int = 0
    min_rows: int = 16
    max_rows: int = 256
    voting: str = choice("post_vision", "last_turn")
    min_prompt_tokens: int = 256
    modality_floors: Mapping[str, float] = field(default_factory=dict)
    floors_share: float = 1.0
    quota: float = 0.0
    merge: str = choice("none", "bucket_mean", "similar")
    merge_threshold: float = 0.0
    decode: str = choice("append", "fixed_point")
    fixed_point_distance: int = 25
    draft_tokens: int = 0
    compact_always: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError, naming the option, what it was and what it may be."""
        for option in fields(self):
            check_type(self.name, option, getattr(self, option.name))
        require(1e-9 < self.budget <= 1, "budget", self.budget, "in (0, 1]")
        for name in ("recent_fraction", "floors_share", "quota"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        require(-1 <= self.merge_threshold <= 1, "merge_threshold", self.merge_threshold, "in [-1, 1]")
        require(self.sink_tokens >= 0, "sink_tokens", self.sink_tokens, "at least 0")
        most = 256 if self.can_draft else 0
        require(0 <= self.draft_tokens <= most, "draft_tokens", self.draft_tokens, f"in [0, {most}]")
        require(self.min_rows >= 1, "min_rows", self.min_rows, "at least 1")
        in_range = self.min_rows <= self.max_rows <= 4096
        require(in_range, "max_rows", self.max_rows, "at least min_rows and at most 4096")
        distance = self.fixed_point_distance
        require(distance >= 1, "fixed_point_distance", distance, "at least 1")
        require(
            self.budget * self.min_prompt_tokens >= 1,
            "min_prompt_tokens",
            self.min_prompt_tokens,
            f"at least 1 / budget = {math.ceil(1 / self.budget)}, so that every layer keeps a token",
        )
        names = [m.name.lower() for m in Modality if m is not Modality.MERGED]
        for name, fraction in self.modality_floors.items():
            require(name in names, "modality_floors", name, f"one of {', '.join(names)}")
            fits = is_number(fraction) and 0 <= fraction <= 1
            require(fits, f"modality_floors[{name}]", fraction, "in [0, 1]")

    @property
    def observes(self) -> bool:
        """Whether the queries of the whole prompt matter, not only the voting rows'.

        Then nothing of a cached prefix can be used: its queries are gone.
        """
        return False

    def num_voting(self, prompt: Prompt) -> int:
        """R: how many of the last prompt positions vote."""
        if not self.votes:
            return 1  # the last position is computed in any case
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

    def max_slots(self, num_prompt: int, num_layers: int) -> int:
        """Most pool slots that the kept rows take; a slot holds one row of every layer.

        Rows that slide take a slot for all layers, also where a layer has fewer of them.
        """
        slots = -(-self.max_total(num_prompt, num_layers) // num_layers)
        if self.decode == "fixed_point":
            slots = min(slots + self.fixed_point_distance, num_prompt)
        return slots

    def num_sliding(self, num_kept: int) -> int:
        """Rows at the end of a layer that ``fixed_point`` evicts from, one for every output token."""
        at = max(self.sink_tokens, num_kept - self.fixed_point_distance)
        return num_kept - min(at, num_kept - 1)

    def floors(self, prompt: Prompt) -> Iterator[tuple[torch.Tensor, float]]:
        """Groups of positions, ``[n]`` bool, and the least fraction of each that stays."""
        for name, fraction in self.modality_floors.items():
            yield prompt.tags == Modality[name.upper()], fraction

    def observe(self, seen: object, layer: Layer) -> object:
        """Takes in a prefill chunk; called chunk after chunk where :attr:`observes` is set.

        Args:
            seen: what the chunk before returned, None at the first.
            layer: the chunk's queries, and the keys and values up to its end.

        Returns:
            What becomes ``seen`` of :meth:`score`. It must not grow with queries times keys.
        """
        raise NotImplementedError

    def score(self, layer: Layer) -> LayerScores:
        """Scores one layer's keys once the prompt is complete; ``q`` are the voting rows'."""
        raise NotImplementedError

    def layer_budgets(
        self, sparsity: list[float], num_prompt: int, profiles: list[torch.Tensor] | None = None
    ) -> list[int]:
        """Rows that each layer keeps per KV head; equal layers unless overridden.

        Args:
            sparsity: per layer, as measured (0 where it was not).
            profiles: per layer, the ``profile`` of its scores, added over the ranks.
        """
        num_layers = len(sparsity)
        return proportional([1.0] * num_layers, self.max_total(num_prompt, num_layers), num_prompt)


def require(ok: bool, option: str, value: object, allowed: str) -> None:
    """Raises ValueError naming ``option``, what it is and what it must be, unless ``ok``."""
    if not ok:
        raise ValueError(f"{option} is {shortened(value)}; it must be {allowed}")


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def shortened(value: object) -> str:
    """Its ``repr`` for an error message: cut where it is long or deep."""
    return _SHORT.repr(value)


def is_number(value: object) -> bool:
    """A boolean is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _annotation(kind: object) -> str:
    """A type as it is written: ``int``, ``Sequence[int]``."""
    return kind.__name__ if isinstance(kind, type) else str(kind).rsplit(".", 1)[-1]


def check_type(policy: str, option, value: object) -> None:
    """Raises ValueError unless ``value`` fits the dataclass field ``option``."""
    kinds = {
        "float": ((int, float), "a number"),
        "int": ((int,), "an integer"),
        "bool": ((bool,), "true or false"),
        "str": ((str,), "a string"),
        "Sequence[int]": ((list, tuple), "a list of integers"),
        "Mapping[str, float]": ((Mapping,), "an object of modality names to fractions"),
    }
    kind = option.type if isinstance(option.type, str) else _annotation(option.type)
    if kind in kinds:  # others are the policy's own to check
        types, words = kinds[kind]
        fits = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        require(fits, f"{policy} option {option.name}", value, words)
    if kind == "float" and isinstance(value, int):
        require(abs(value) < 2**63, f"{policy} option {option.name}", value, "a number that a float holds")
    integers = {"int": [value], "Sequence[int]": value}.get(kind, [])
    for number in integers:
        fits = isinstance(number, int) and not isinstance(number, bool) and abs(number) < 2**31
        require(fits, f"{policy} option {option.name}", value, f"{words} of at most 31 bits")
    choices = option.metadata.get("choices")
    if choices:
        require(value in choices, option.name, value, f"one of {', '.join(choices)}")
