"""Who owns which rows: the state that a request has beside SGLang's own.

A request's state is born when its prefill begins, belongs to a row of SGLang's ``req_to_token``
while the request holds that row, and loses its rows when it is released, whether it finished, was
aborted or was retracted. Everything here is host state; nothing imports SGLang.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Iterable, Iterator, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch

from sglang_vlkv.cache.device_rows import DeviceRows
from sglang_vlkv.cache.twins import Hit, Twin
from sglang_vlkv.observe.events import REASONS
from sglang_vlkv.stages.layer import LayerScores
from sglang_vlkv.stages.policy import Policy
from sglang_vlkv.stages.prompt import Prompt

logger = logging.getLogger(__name__)

MAX_DRAFT_BYTES = 256 * 2**20  # of drafts whose requests have not come, or never will


class Reason(str):
    """Why a prompt is left alone, in words; empty where it is compacted.

    Attributes:
        code: the same without numbers, of :data:`REASONS`.
    """

    code: str

    def __new__(cls, code: str = "", words: str = "") -> Reason:
        assert code in ("", *REASONS), code
        reason = super().__new__(cls, words)
        reason.code = code
        return reason


@dataclass(frozen=True)
class Plan:
    """What will happen to a request's prompt, or to what a twin does not cover of it.

    Attributes:
        prompt: what competes for rows: the request's prompt from ``start`` on.
        policy: what the request asked for, or the server's.
        left_alone: why the prompt stays uncompressed; empty where it is compacted.
        num_voting: R, the prompt positions at its end whose attention scores the keys.
        max_slots: most pool slots that the kept rows take.
        writes_draft: id that its output tokens' queries are left under; empty for ordinary requests.
        reads_draft: id of queries that a draft has left for it.
    """

    prompt: Prompt
    policy: Policy | None = None
    left_alone: Reason = Reason()
    num_voting: int = 0
    max_slots: int = 0
    writes_draft: str = ""
    reads_draft: str = ""
    start: int = 0

    @property
    def end(self) -> int:
        """Length of the request's prompt."""
        return self.start + self.prompt.num_tokens

    @property
    def compacts(self) -> bool:
        return not self.left_alone

    @property
    def first_voting(self) -> int:
        """Position in the request's prompt."""
        return self.end - self.num_voting

    @property
    def num_computed(self) -> int:
        """Prompt positions at its end whose queries are needed, whatever is cached."""
        if self.left_alone:
            return 0
        return self.prompt.num_tokens if self.policy.observes else self.num_voting


class Planner(Protocol):
    """What decides, before a prefill, what will happen to a prompt."""

    def plan(self, req) -> Plan:
        """For the whole prompt of a request of SGLang's."""

    def for_turn(self, plan: Plan, start: int) -> Plan:
        """For what follows ``start`` of a prompt whose beginning a twin stands for."""


class Drafted(NamedTuple):
    """What a draft leaves: its first output tokens, and per layer their queries ``[T, Hq, D]``."""

    tokens: tuple[int, ...] = ()
    queries: dict[int, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return sum(query.nbytes for query in self.queries.values())


@dataclass
class RequestState:
    """One request, from its admission to its end.

    Attributes:
        asked: the plan for its whole prompt.
        plan: what happens to the tokens that are computed; ``asked`` where no twin covers any.
        space: which twins it may use.
        row: the ``req_to_token`` row it holds, or None.
        prefix_kind: where its prefix came from, of :data:`events.PREFIX_KINDS`.
        prefix_tokens: prompt tokens that its last prefill found computed.
        hit, hit_plan: the twin that its next prefill goes on from, and what follows from that.
        left: where its path ended when its row was released, to go on from after a retraction.
        pending: its prompt holds exact KV that a compaction will replace.
        queries: per layer, the voting rows' queries so far, pieces of ``[rows, Hq, D]``; a voting
            window may straddle chunks.
        seen: per layer, what the policy has observed of the prompt so far.
        drafted: per layer, the queries of its output tokens, where it writes a draft.
        voted: the drafted tokens whose queries voted for its rows.
        scores: per layer, once its last chunk has run.
        cells: per layer, the cells of the compacted rows that it sees, ``[num_kept[l]]`` int32; None
            while all is exact. Without the sliding rows, where there are any.
        max_cells: the most cells that it sees in all layers together, on any rank; known where
            a device reads them.
        first_own: tokens from this sequence position on have slots of their own.
        twin, twin_rows: the piece that ``cells`` ends with, and how many of its rows per layer they
            hold, None for all. Still there for the report when the request has ended.
        kept: per layer, the prompt positions behind ``cells`` and the sliding rows,
            ``[Hkv, rows]``, on the host.
        kept_slots: pool slots that hold them, shared ones included.
        rows_lost: kept rows of its prefix that a shorter common prefix with a twin could not use.
        sliding: per layer, how many rows of the sequence's newest slots it sees beside ``cells``
            (fixed-point elimination); empty where it sees all output tokens.
        evicted: sequence position before which the slots of sliding rows have been given back.
        last_slots: pool slots that held its rows when it was released, outputs among them.
        skips_insert: the request's own ``skip_radix_cache_insert`` before ``cells`` set it.
        deferred: it had to wait while room was reserved for kept rows.
    """

    asked: Plan
    plan: Plan
    space: tuple = ()
    row: int | None = None
    prefix_kind: str = "cold"
    prefix_tokens: int = 0
    hit: Hit | None = None
    hit_plan: Plan | None = None
    left: Hit | None = None
    pending: bool = False
    queries: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    seen: dict[int, object] = field(default_factory=dict)
    drafted: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    voted: tuple[int, ...] = ()
    scores: dict[int, LayerScores] = field(default_factory=dict)
    cells: list[torch.Tensor] | None = None
    max_cells: int = 0
    first_own: int = 0
    twin: Twin | None = None
    twin_rows: list[int] | None = None
    kept: list[torch.Tensor] = field(default_factory=list)
    kept_slots: int = 0
    rows_lost: int = 0
    sliding: list[int] = field(default_factory=list)
    evicted: int = 0
    last_slots: int = 0
    skips_insert: bool = False
    deferred: bool = False

    def rows_of_prompt(self) -> list[torch.Tensor]:
        """Per layer, the prompt positions of all rows that stand for the prompt, ``[Hkv, rows]``; those
        of a new turn that was not compacted among them."""
        own = torch.arange(min(self.first_own, self.asked.end), self.asked.end)
        return [torch.cat([layer, own.expand(len(layer), -1)], dim=1) for layer in self.kept]

    def why_left_alone(self, retractions: int) -> Reason:
        """For a request that ended without kept rows, after so many ``retractions``."""
        words = "finished at its first token" + " after a retraction" * bool(retractions)
        return self.asked.left_alone or Reason("first_token", words)


class Requests:
    """The states, by request object and by ``req_to_token`` row.

    Attributes:
        on_device: where an accelerator reads what they see; None where the host does.
    """

    def __init__(self) -> None:
        self.on_device: DeviceRows | None = None
        self._by_request: WeakKeyDictionary[object, RequestState] = WeakKeyDictionary()
        self._by_row: dict[int, RequestState] = {}
        self._drafts: OrderedDict[str, Drafted] = OrderedDict()

    def get(self, request) -> RequestState | None:
        return self._by_request.get(request)

    def at_row(self, row: int) -> RequestState | None:
        return self._by_row.get(row)

    def add(self, request, plan: Plan, space: tuple = ()) -> RequestState:
        state = self._by_request[request] = RequestState(plan, plan, space)
        return state

    def take_row(self, state: RequestState, row: int) -> None:
        """``state``'s prefill begins in ``row``; whatever an earlier attempt left is dropped."""
        state.row, state.plan, state.pending = row, state.asked, state.asked.compacts
        state.queries, state.seen, state.drafted, state.scores = {}, {}, {}, {}
        state.cells, state.first_own = None, 0
        state.kept, state.kept_slots, state.rows_lost = [], 0, 0
        state.twin, state.twin_rows, state.left = None, None, None
        state.sliding, state.evicted, state.last_slots = [], 0, 0
        self._by_row[row] = state

    def sees(self, state: RequestState) -> None:
        """``state``'s cells are others now."""
        if self.on_device is not None:
            state.max_cells = sum(sum(piece.num_rows) for piece in state.twin.chain())
            self.on_device.set(state.row, state.cells, state.sliding, state.first_own)

    def expect(self, decoding: Iterable[tuple[object, int]], num_layers: int) -> None:
        """Says what the requests that may decode next need of the device, each with its sequence's
        length by then."""
        if self.on_device is None:
            return
        visible, drafts = 0, False
        for request, length in decoding:
            state = self.get(request)
            if state is None or state.cells is None:
                visible += length * num_layers
                continue
            # Bounds that are equal on all tensor-parallel ranks, as what follows from them must be.
            own = max(length - state.first_own, max(state.sliding, default=0))
            visible += state.max_cells + own * num_layers
            drafts |= bool(state.plan.writes_draft)
        self.on_device.visible, self.on_device.drafts = visible, drafts

    def release_row(self, state: RequestState) -> None:
        """The request finished, was aborted or was retracted; its rows are no longer its own."""
        if self._by_row.get(state.row) is state:
            del self._by_row[state.row]
            if self.on_device is not None:
                self.on_device.clear(state.row)
        state.row, state.cells, state.hit, state.pending = None, None, None, False
        state.queries, state.seen, state.drafted, state.scores = {}, {}, {}, {}

    def leave_draft(self, state: RequestState, output_ids: list[int]) -> None:
        """``state`` writes a draft and has ended with ``output_ids``, never retracted."""
        # Whether the last one's query was computed depends on what else was running.
        tokens = tuple(output_ids[:-1][: state.plan.policy.draft_tokens])
        if not tokens or any(len(rows) < len(tokens) for rows in state.drafted.values()):
            return
        queries = {layer: torch.cat(rows[: len(tokens)]) for layer, rows in state.drafted.items()}
        self._drafts[state.plan.writes_draft] = Drafted(tokens, queries)
        size = sum(left.num_bytes for left in self._drafts.values())
        while size > MAX_DRAFT_BYTES and len(self._drafts) > 1:
            _, oldest = self._drafts.popitem(last=False)
            size -= oldest.num_bytes
            logger.warning(
                "A draft of %d tokens was dropped before its request came, to hold no more than %d MiB of "
                "drafts; the request votes without it.", len(oldest.tokens), MAX_DRAFT_BYTES >> 20,
            )  # fmt: skip

    def draft_for(self, state: RequestState) -> Drafted:
        """What a draft has left for ``state``; nothing where none has."""
        return self._drafts.get(state.plan.reads_draft, Drafted())

    def drop_draft(self, state: RequestState) -> None:
        """``state`` has ended, and nobody else reads its draft."""
        self._drafts.pop(state.plan.reads_draft, None)

    def drop_drafts(self) -> None:
        """The weights that drafted may be others now."""
        self._drafts.clear()

    def holders(self) -> Iterator[RequestState]:
        """The states that hold a row."""
        return iter(self._by_row.values())
