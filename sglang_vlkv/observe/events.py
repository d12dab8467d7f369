"""What happens to kept rows, told to whoever watches: metrics, and the stream of live events.

Byte counts are one tensor-parallel rank's; rows are counted per layer, over the rank's KV heads where
it says so. Nothing here imports SGLang.
"""

from __future__ import annotations

import time
from typing import Callable, NamedTuple

PREFIX_KINDS = ("cold", "exact", "twin", "shared")  # where a request's prefix came from
# Why a prompt was left alone.
REASONS = (
    "no_visual", "short_prompt", "full_budget", "first_token", "not_in_prompt", "beam_search",
    "no_rope", "refused",
)  # fmt: skip


class Compacted(NamedTuple):
    """A prompt's exact rows have been replaced by the kept ones.

    Attributes:
        rid: the request's id.
        policy, budget: what it asked for, or the server's.
        prompt_tokens, visual_tokens: of the prompt.
        kept_per_layer: rows that stand for the prompt, ``[L]``.
        kept_per_modality: the same rows by lower-case modality, summed over layers and KV heads.
        unseen_pictures: images and videos of which some layer and KV head has kept no row.
        sparsity_per_layer: as measured, ``[L]``; None where the policy looks at no attention.
        kept_bytes: of the slots that hold them, shared ones included.
        full_bytes: what the whole prompt's rows took.
        shared: they are those of another live request.
        draft: it is a draft, which goes ahead of a request with the same id.
    """

    rid: str
    policy: str
    budget: float
    prompt_tokens: int
    visual_tokens: int
    kept_per_layer: list[int]
    kept_per_modality: dict[str, int]
    unseen_pictures: int
    sparsity_per_layer: list[float] | None
    kept_bytes: int
    full_bytes: int
    shared: bool
    draft: bool


class Pass(NamedTuple):
    """The scheduler has stood still for the compaction of ``requests`` prompts.

    Attributes:
        seconds: of the scheduler's thread, selection, gather and scatter together.
    """

    requests: int
    seconds: float


class TwinCreated(NamedTuple):
    """Rows stay when their request ends: kept ones of a prompt, or those of a turn behind them.

    Attributes:
        twin: its id, of the tree's node; ids of evicted ones come again.
        rid: of the request whose rows they are.
        start, tokens: the stretch of the token path that they stand for.
        bytes: of its slots.
        run: it lost no rows: what was computed behind another twin, token by token.
    """

    twin: int
    rid: str
    start: int
    tokens: int
    bytes: int
    run: bool


class TwinHit(NamedTuple):
    """A request goes on from a twin.

    Attributes:
        twin, rid: which, and who.
        prefix: ``twin``, or ``shared`` where another live request reads it.
        covered: prompt tokens that need no prefill.
        prompt_tokens: of the request.
        rows_lost: kept rows that a shorter common prefix cannot use.
    """

    twin: int
    rid: str
    prefix: str
    covered: int
    prompt_tokens: int
    rows_lost: int


class TwinEvicted(NamedTuple):
    """A twin has made room."""

    twin: int
    bytes: int


class Flushed(NamedTuple):
    """The cache was emptied; all twins are gone."""

    twins: int


class Released(NamedTuple):
    """A request gave its row back.

    Attributes:
        rid: the request's id.
        policy: that it ran under; ``none`` where its prompt was left alone, or not compacted yet.
        reason: why it was left alone, as a code of :class:`~sglang_vlkv.cache.requests.Reason`; else empty.
        outcome: ``finished``, ``aborted`` or ``retracted``.
        prefix: ``cold``, ``exact``, ``twin`` or ``shared``.
        prefix_tokens: prompt tokens that its last prefill found computed.
        prompt_tokens, output_tokens: of the request so far.
        bytes: of the slots that its rows took at the end.
        draft: it is a draft, which goes ahead of a request with the same id.
    """

    rid: str
    policy: str
    reason: str
    outcome: str
    prefix: str
    prefix_tokens: int
    prompt_tokens: int
    output_tokens: int
    bytes: int
    draft: bool


class Deferred(NamedTuple):
    """A request waits, for the first time, while room is reserved for kept rows."""

    rid: str


class NoRoom(NamedTuple):
    """A prefilled request was put back: its kept rows found no room."""

    rid: str


class PoolUse(NamedTuple):
    """The pool at this moment, in slots, and the requests.

    Attributes:
        size: all slots.
        free: that nobody holds.
        evictable: of the radix tree that nobody reads, twins among them.
        twins: that twins hold.
        twins_read: those of them that live requests read, which are not evictable.
        slot_bytes: of one slot.
        running, waiting: requests.
    """

    size: int
    free: int
    evictable: int
    twins: int
    twins_read: int
    slot_bytes: int
    running: int
    waiting: int


Event = (
    Compacted | Pass | TwinCreated | TwinHit | TwinEvicted | Flushed | Released | Deferred | NoRoom | PoolUse
)


class Watchers:
    """Those who are told. False while there is nobody, so that no event need be built.

    They are called on the scheduler's thread and must not wait for anything.
    """

    SAMPLE_SECONDS = 0.25

    def __init__(self) -> None:
        self._watchers: list[Callable[[Event], None]] = []
        self._next_sample = 0.0

    def __bool__(self) -> bool:
        return bool(self._watchers)

    def add(self, watcher: Callable[[Event], None]) -> None:
        self._watchers.append(watcher)

    def tell(self, event: Event) -> None:
        for watcher in self._watchers:
            watcher(event)

    def sample(self, make: Callable[[], Event]) -> None:
        """Tells what ``make`` returns, some times a second at most."""
        if self._watchers and (now := time.monotonic()) >= self._next_sample:
            self._next_sample = now + self.SAMPLE_SECONDS
            self.tell(make())
