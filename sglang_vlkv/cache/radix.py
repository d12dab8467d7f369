"""SGLang's radix cache with twins beside its exact KV, in a namespace of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from sglang.srt.disaggregation.kv_events import BlockRemoved, BlockStored
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, create_unified_radix_cache
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_vlkv.cache.eviction import Eviction
from sglang_vlkv.cache.live import LiveTwins
from sglang_vlkv.cache.lookup import Lookup
from sglang_vlkv.cache.pins import Pins
from sglang_vlkv.cache.pool import CellPool
from sglang_vlkv.cache.ranks import Ranks
from sglang_vlkv.cache.requests import Planner, Requests, RequestState
from sglang_vlkv.cache.twins import Twins
from sglang_vlkv.observe import events
from sglang_vlkv.options.config import NONE, Settings

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_vlkv.observe.publisher import Publisher


class TwinRadixCache(UnifiedRadixCache):
    """Exact KV under token paths, as in SGLang, and twins under keys that no request can ask for.

    A compacted request takes no part in the exact tree any more. Its rows are a twin from the moment
    they are placed: the request holds the twin's lock like that of a prefix, and others may share it.

    Attributes:
        settings, planner: wired once the scheduler stands, before the first request.
        decoding: the requests that decode, and maybe some that have just been released.
        resting: requests that the last compaction retracted. Their prefill's result is still to come,
            so they must not be admitted before the next.
        twins: every twin in the tree.
        live: which requests read them, and what becomes of their rows.
        pins: what retracted requests go on from.
        watchers: are told what happens to kept rows.
        ranks: the scheduler's, once it stands.
        publisher: the one of them that sends live events; None where nobody asked for that.
    """

    settings: Settings
    planner: Planner

    def __init__(self, params) -> None:
        self.twins = Twins()
        self.watchers = events.Watchers()
        self.publisher: Publisher | None = None
        self.decoding: list[Req] = []
        self.resting: list[Req] = []
        self.ranks = Ranks()
        self.live, self.pins = LiveTwins(self), Pins(self)
        self._lookup, self._eviction = Lookup(self), Eviction(self)
        self._unannounced: set[int] = set()  # hashes in KV events
        super().__init__(params)

    def reset(self) -> None:
        super().reset()
        count = len(self.twins)
        self.ranks.note("reset")
        self.twins.clear()
        if self.watchers and count:
            self.watchers.tell(events.Flushed(count))
        self.pins.clear()
        self.requests.drop_drafts()
        self._unannounced.clear()

    @property
    def pool(self) -> CellPool:
        return self.token_to_kv_pool_allocator.get_kvcache()

    @property
    def requests(self) -> Requests:
        return self.pool.requests

    def state_of(self, req: Req) -> RequestState:
        """The state of ``req``, planned on first sight."""
        state = self.requests.get(req)
        # An input error replaces the prompt by a stub of one token.
        if state is None or state.asked.end != len(req.origin_input_ids):
            plan = self.planner.plan(req)
            space = (repr(plan.policy), req.extra_key, req.cache_salt)
            state = self.requests.add(req, plan, space)
        return state

    # ---- Lookup ----

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """The longest exact prefix, or the twin that serves instead of it."""
        exact = super().match_prefix(params)
        req = params.req
        if req is None or self.disable:
            return exact
        state = self.state_of(req)
        hit = self._lookup.find(req, state, params.key)
        if hit is not None and hit != state.hit:  # asked again in every round that the request waits
            state.hit_plan = self._lookup.plan_behind(req, state, hit)
        state.hit = hit
        if hit is None:
            return exact
        node = hit.twin.node
        return exact._replace(
            device_prefix_len=hit.covered,
            last_device_node=node,
            last_host_node=node,
            best_match_node=node,
            full_kv_hit_length=hit.covered,
        )

    def swa_reprefill_tail_tokens(self, req: Req | None = None) -> int:
        """Caps the exact hit so that the queries that the policy needs are computed.

        Upstream's seam for recomputing the end of a cached prefix.
        """
        tail = super().swa_reprefill_tail_tokens(req)
        if req is None:
            return tail
        plan = self.state_of(req).asked
        return max(tail, plan.num_computed + len(req.output_ids)) if plan.compacts else tail

    def prefix_device_indices(self, req: Req) -> torch.Tensor:
        state = self.requests.get(req)
        if state is None or state.hit is None:
            return super().prefix_device_indices(req)
        # Rows of a twin have no token each; attention reads them from the state's cells.
        return torch.zeros(req.prefix_len, dtype=torch.int64, device=self.device)

    def maybe_hand_to_session(self, req: Req) -> None:
        """The request's row has just been written for a prefill, or for its next chunk."""
        super().maybe_hand_to_session(req)
        state, row = self.state_of(req), req.kv.req_pool_idx
        if state.row != row:
            self.requests.take_row(state, row)
            state.prefix_tokens = min(req.prefix_len, state.asked.end)
            state.prefix_kind = "exact" if req.prefix_len else "cold"
            if state.hit is not None and req.prefix_len:  # SGLANG_RADIX_FORCE_MISS may have undone it
                self.live.go_on_from(req, state, state.hit)

    # ---- The end of a request ----

    def claim_kv_row(self, req: Req) -> bool:
        """The request finished, was aborted or was retracted, and its row is about to be freed."""
        if super().claim_kv_row(req):
            return True
        state = self.requests.get(req)
        if state is None or state.row is None or state.twin is None:
            return False
        held = 0 if self.disable else state.twin.num_slots
        state.last_slots = held + req.kv.kv_allocated_len - req.kv.cache_protected_len
        if not self.disable and self.live.outlives(req, state):
            state.left = self.live.leave(req, state)
            if req.output_ids and not req.finished():
                # Lost output rows can be computed again behind the prompt's; sliding rows cannot.
                self.pins.add(req, state.left.twin if state.sliding else state.twin)
        return False

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        super().on_release(req, checkpointed=checkpointed)
        state = self.requests.get(req)
        if state is None:
            return
        if state.row is not None and state.twin is not None:
            req.skip_radix_cache_insert = state.skips_insert
            state.twin.add_holders(-1)
            for piece in reversed(state.twin.chain()):
                if not piece.lasting:
                    self._eviction.drop(piece)
            self._eviction.limit()
        if self.watchers and state.row is not None:
            self.watchers.tell(self._released(req, state))
        if state.drafted and self._outcome(req) == "finished" and not req.retraction_count:
            self.requests.leave_draft(state, req.output_ids)
        self.requests.release_row(state)
        if req.finished():  # else it is prefilled again
            self.requests.drop_draft(state)

    @staticmethod
    def _outcome(req: Req) -> str:
        """Why it gives its row back, in a word."""
        if isinstance(req.finished_reason, FINISH_ABORT):
            return "aborted"
        return "finished" if req.finished() else "retracted"

    def _released(self, req: Req, state: RequestState) -> events.Released:
        alone = state.twin is None
        slots = req.kv.kv_allocated_len if alone else state.last_slots
        outcome, reason = self._outcome(req), state.asked.left_alone
        if outcome == "finished":
            reason = state.why_left_alone(req.retraction_count)
        return events.Released(
            rid=req.rid,
            policy=NONE if alone else state.asked.policy.name,
            reason=reason.code if alone else "",
            outcome=outcome,
            prefix=state.prefix_kind,
            prefix_tokens=state.prefix_tokens,
            prompt_tokens=state.asked.end,
            output_tokens=len(req.output_ids),
            bytes=slots * self.pool.slot_bytes,
            draft=bool(state.asked.writes_draft),
        )

    # ---- Eviction ----

    def _evict_device_leaf(self, node_id: int, tracker: dict[ComponentType, int]):
        """Every leaf that makes room passes here."""
        backup = super()._evict_device_leaf(node_id, tracker)
        self.ranks.note("evict", node_id)
        twin = self.twins.remove(node_id)
        if self.watchers and twin is not None and twin.lasting:
            self.watchers.tell(events.TwinEvicted(node_id, len(twin.slots) * self.pool.slot_bytes))
        return backup

    def _evict(self, params: EvictParams, *args, **kwargs) -> EvictResult:
        """Exact KV that has a twin goes first, then all else by the server's eviction policy, and
        what retracted requests need only where nobody could decode otherwise."""
        freed = self._eviction.evict_doubled(params.num_tokens)
        params = replace(params, num_tokens=max(0, params.num_tokens - freed))
        result = super()._evict(params, *args, **kwargs)
        while result.num_tokens_evicted < params.num_tokens and self.pins:
            if sum(req.kv.holds_kv for req in self.decoding) > 1:
                break  # one of them can be retracted
            self.pins.drop_oldest()
            missing = params.num_tokens - result.num_tokens_evicted
            more = super()._evict(replace(params, num_tokens=missing), *args, **kwargs)
            result.num_tokens_evicted += more.num_tokens_evicted
        result.num_tokens_evicted += freed
        return result

    def slots_read(self) -> int:
        """Slots of twins that requests read, or will where they were retracted."""
        ends = {state.twin for state in self.requests.holders() if state.twin is not None}
        ends |= set(self.pins.twins())
        pieces = {piece for twin in ends for piece in twin.chain() if piece in self.twins}
        return sum(len(piece.slots) for piece in pieces)

    def describe_twins(self) -> dict:
        """For ``GET /kv_policy/twins``."""
        twins = self.twins
        return {
            "twins": len(twins),
            "slots": twins.num_slots,
            "hits": twins.hits,
            "evictions": twins.evictions,
        }

    def take_events(self) -> list:
        """KV events of exact KV only: no router can ask for a twin."""
        events = []
        for event in super().take_events():
            if isinstance(event, BlockStored) and self.twins.is_name(event.token_ids[0]):
                self._unannounced.update(event.block_hashes)
            elif isinstance(event, BlockRemoved) and self._unannounced.issuperset(event.block_hashes):
                self._unannounced.difference_update(event.block_hashes)
            else:
                events.append(event)
        return events

def create(ctx: TreeCacheBuildContext) -> TwinRadixCache:
    """The factory registered under :data:`options.backends.RADIX_CACHE`."""
    return create_unified_radix_cache(ctx, cache_class=TwinRadixCache)
