"""The contract of a policy: what the stages ``score -> budget -> select -> merge`` ask of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import ClassVar, Iterator, Mapping

import torch

from sglang_vlkv.stages.budgets import proportional
from sglang_vlkv.stages.layer import Layer, LayerScores
from sglang_vlkv.stages.options import check_type, choice, is_number, require
from sglang_vlkv.stages.prompt import Modality, Prompt, num_tokens


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
        picture_share: least fraction of each layer's budget that is the pictures' and videos' own, in
            every head: a row for each of them, what remains by their sizes, their best-scored tokens. It
            takes from all other tokens, the recent window included, and changes nothing where a picture
            has its rows anyway. A tenth of the budget is never theirs; where one row for each does not
            fit, they share half of it, and heads take turns. 0 lets a picture vanish.
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
    picture_share: float = 0.1
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
        for name in ("recent_fraction", "floors_share", "picture_share", "quota"):
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
        names = [m.name.lower() for m in Modality]
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
