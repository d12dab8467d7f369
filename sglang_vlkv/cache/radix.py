"""SGLang's radix cache with twins beside its exact KV, in a namespace of their own."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Iterable

import torch
from sglang.srt.disaggregation.kv_events import BlockRemoved, BlockStored
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    InsertParams,
    MatchPrefixParams,
    MatchResult,
    TreeLock,
)
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, create_unified_radix_cache
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_vlkv.cache.pool import CellPool
from sglang_vlkv.cache.ranks import Ranks
from sglang_vlkv.cache.requests import Plan, Reason, Requests, RequestState
from sglang_vlkv.cache.twins import Hit, Slides, Twin, Twins
from sglang_vlkv.observe import events
from sglang_vlkv.options.config import FALLBACK, NONE, OFF, PREFER, RESUME, Settings
from sglang_vlkv.scheduler.planning import Planner
from sglang_vlkv.stages.base import Modality

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_vlkv.observe.publisher import Publisher
    from sglang_vlkv.scheduler.compaction import Compactor

BACKEND = "vlkv"
NAMESPACE = uuid.uuid4().hex  # extra_key of the twins' keys, which clients must not guess


class TwinRadixCache(UnifiedRadixCache):
    """Exact KV under token paths, as in SGLang, and twins under keys that no request can ask for.

    A compacted request takes no part in the exact tree any more. Its rows are a twin from the moment
    they are placed: the request holds the twin's lock like that of a prefix, and others may share it.

    Attributes:
        settings, planner, compactor: wired once the scheduler stands, before the first request.
        decoding: the requests that decode, and maybe some that have just been released.
        twins: every twin in the tree.
        watchers: are told what happens to kept rows.
        ranks: the scheduler's, once it stands.
        publisher: the one of them that sends live events; None where nobody asked for that.
    """

    settings: Settings
    planner: Planner
    compactor: Compactor
    decoding: list[Req]

    def __init__(self, params) -> None:
        self.twins = Twins()
        self.watchers = events.Watchers()
        self.publisher: Publisher | None = None
        self.decoding = []
        self.ranks = Ranks()
        self._unannounced: set[int] = set()  # hashes in KV events
        self._pins: dict[Req, tuple[Twin, TreeLock]] = {}  # oldest first
        super().__init__(params)

    def reset(self) -> None:
        super().reset()
        count = len(self.twins)
        self.ranks.note("reset")
        self.twins.clear()
        if self.watchers and count:
            self.watchers.tell(events.Flushed(count))
        self._pins.clear()
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
        hit = self._find_twin(req, state, params.key)
        if hit is not None and hit != state.hit:  # asked again in every round that the request waits
            state.hit_plan = self._plan_behind(req, state, hit)
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

    def _find_twin(self, req: Req, state: RequestState, key: RadixKey) -> Hit | None:
        """The twin that ``req`` goes on from, by the operator's ``twins``."""
        tokens, mode = key.token_ids, self.settings.twins
        asks = state.asked.compacts and state.row is None and tokens
        if mode == OFF or not asks or not len(self.twins):
            return None
        # Input logprobs want their tokens computed; SGLang's own limit also counts outputs as such.
        wanted = req.logprob_start_len if req.return_logprob else -1
        limit = min(len(tokens) - 1, wanted if 0 <= wanted < len(req.origin_input_ids) else len(tokens))
        if state.left is not None:
            if not req.output_ids:
                return None  # retracted before its first token, which only exact KV gives again
            if (own := self._own_hit(state.left, limit)) is not None:
                return own
        if mode == RESUME and state.asked.writes_draft:
            return None  # how it votes must not depend on whether an earlier answer's rows are still there
        whole = RadixKey(tokens, req.extra_key, cache_salt=req.cache_salt)
        exact = self.tree_core.match_full_device_prefix(whole)[0]
        for hit in self.twins.find(state.space, tokens, limit, beyond=exact + 1):
            reaches = hit.covered if mode == PREFER else hit.lossy_end
            if reaches > exact and (mode != RESUME or self._is_same_selection(req, state, hit)):
                return hit
        return None

    def _own_hit(self, hit: Hit, limit: int) -> Hit | None:
        """What is left of a retracted request's rows; what it computed behind them it can compute again."""
        while hit.covered > limit or not (hit.twin in self.twins and hit.twin.lasting):
            if not hit.twin.is_run or hit.twin.parent is None:
                return None
            hit = Hit(hit.twin.parent, hit.twin.start, hit.twin.parent_rows)
        return hit

    def _is_same_selection(self, req: Req, state: RequestState, hit: Hit) -> bool:
        """``req`` would keep the rows that the twin holds."""
        return self._is_whole_prompt(req, hit) and hit.twin.voted == self.requests.draft_for(state).tokens

    @staticmethod
    def _is_whole_prompt(req: Req, hit: Hit) -> bool:
        """The twin was selected for this very prompt, and nothing of the prompt is left to score."""
        n = len(req.origin_input_ids)
        return hit.rows is None and hit.twin.num_prompt == n <= hit.twin.end

    def _plan_behind(self, req: Req, state: RequestState, hit: Hit) -> Plan:
        if hit.rows is None and hit.twin.end >= len(req.origin_input_ids):
            reason = Reason(words="a twin stands for it")
            return replace(state.asked, left_alone=reason, num_voting=0, max_slots=0)
        return self.planner.for_turn(state.asked, hit.covered)

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
                self._go_on_from(req, state, state.hit)
        tags = self.pool.tags
        slots = self.req_to_token_pool.req_to_token[row, req.prefix_len : req.extend_end].long()
        tags[slots] = Modality.TEXT
        prompt = state.asked.prompt.tags[req.prefix_len : req.extend_end]
        if tags.is_cuda:  # a copy from memory that is not pinned would wait for the running prefill
            prompt = prompt.pin_memory().to(tags.device, non_blocking=True)
        tags[slots[: len(prompt)]] = prompt

    def _go_on_from(self, req: Req, state: RequestState, hit: Hit) -> None:
        twin = hit.twin
        if (req.prefix_len, req.last_node) != (hit.covered, twin.node):
            raise RuntimeError(
                f"request {req.rid} was given a prefix of {req.prefix_len} tokens where a twin covers "
                f"{hit.covered}; please report this as a bug of sglang_vlkv"
            )
        self.unpin(req)
        hit = self._agreed(hit)
        n, slides, whole = state.asked.end, twin.slides, self._is_whole_prompt(req, hit)
        state.prefix_kind = "shared" if twin.holders else "twin"
        state.plan, state.pending, state.rows_lost = state.hit_plan, state.hit_plan.compacts, hit.rows_lost
        # Of a prompt that was computed again for its last token's logits, that token's row is there.
        state.first_own = hit.covered if hit.rows is not None else max(hit.covered, twin.end)
        if slides is not None and whole and req.extend_end == hit.covered + 1:
            state.cells, state.sliding, state.evicted = slides.cells, slides.rows, hit.covered
            state.kept, state.kept_slots = slides.kept, slides.kept_slots
            newest = slice(hit.covered - len(slides.slots), hit.covered)
            self.req_to_token_pool.write((req.kv.req_pool_idx, newest), slides.slots)
        else:
            state.cells, state.kept = hit.cells(), hit.positions(n)
            rows = sum(layer.shape[1] for layer in state.kept)
            own = 0 if state.pending else max(0, n - state.first_own)
            state.kept_slots = -(-rows // self.pool.layer_num) + own
        self.ranks.note("hit", req.rid, hit.covered, hit.rows, twin.key[-1])
        if whole:
            state.voted = twin.voted
        self.hold(req, state, twin, hit.rows)
        self.requests.sees(state)
        self.twins.hits += 1
        if self.watchers:
            self.watchers.tell(
                events.TwinHit(
                    twin.node, req.rid, state.prefix_kind, state.prefix_tokens, n, hit.rows_lost
                )
            )

    def _agreed(self, hit: Hit) -> Hit:
        """With the rows that the heads of all ranks have, where a shorter common prefix cuts the twin."""
        if hit.rows is None:
            return hit
        rows = self.ranks.least(hit.rows)
        more = self.pool.head_num * (sum(hit.rows) - sum(rows))
        return replace(hit, rows=rows, rows_lost=hit.rows_lost + more)

    # ---- Twins of live requests ----

    def keep(self, twin: Twin, req: Req) -> None:
        """Gives the slots of a new twin, of rows of ``req``, to the tree, unlocked."""
        stands = twin.parent is not None and twin.parent in self.twins
        before = self.path_device_indices(twin.parent.node) if stands else twin.slots[:0]
        params = InsertParams(
            key=RadixKey(self.twins.name(twin), NAMESPACE),
            value=torch.cat([before.long(), twin.slots.long()]),
            prev_prefix_len=len(before),
            priority=req.priority or 0,
        )
        twin.node = self.insert(params).last_device_node
        self.twins.add(twin)
        if self.watchers and twin.lasting:
            num_bytes = len(twin.slots) * self.pool.slot_bytes
            self.watchers.tell(
                events.TwinCreated(
                    twin.node, req.rid, twin.start, len(twin.tokens), num_bytes, twin.is_run
                )
            )

    def hold(self, req: Req, state: RequestState, twin: Twin, rows: list[int] | None = None) -> None:
        """``state`` reads ``twin`` from now on; its lock is the caller's to take."""
        if state.twin is None:
            # From here on its KV is not what the exact tree may hold.
            state.skips_insert, req.skip_radix_cache_insert = req.skip_radix_cache_insert, True
        else:
            state.twin.add_holders(-1)
        twin.add_holders(1)
        state.twin, state.twin_rows = twin, rows
        if twin in self.twins:
            self.twins.use(twin)
            self.touch_prefix(RadixKey(twin.key, NAMESPACE))

    def claim_kv_row(self, req: Req) -> bool:
        """The request finished, was aborted or was retracted, and its row is about to be freed."""
        if super().claim_kv_row(req):
            return True
        state = self.requests.get(req)
        if state is None or state.row is None or state.twin is None:
            return False
        held = 0 if self.disable else state.twin.num_slots
        state.last_slots = held + req.kv.kv_allocated_len - req.kv.cache_protected_len
        if not self.disable and self.outlives(req, state):
            state.left = self._leave(req, state)
            if req.output_ids and not req.finished():
                # Lost output rows can be computed again behind the prompt's; sliding rows cannot.
                self._pin(req, state.left.twin if state.sliding else state.twin)
        return False

    def outlives(self, req: Req, state: RequestState) -> bool:
        """Whether the rows of ``state`` stay when it ends."""
        return self.settings.twins != OFF and self.space_of(req, state) == state.space

    def space_of(self, req: Req, state: RequestState) -> tuple:
        """Who may use what ``state`` leaves; nobody else where more than the path has shaped it."""
        skips = req.skip_radix_cache_insert if state.twin is None else state.skips_insert
        due = bool(state.asked.reads_draft) and state.plan.compacts
        ordinary = not (skips or state.asked.writes_draft or (due and not state.voted))
        return state.space if ordinary else (*state.space, req.rid)

    def _leave(self, req: Req, state: RequestState) -> Hit:
        """Leaves the rows of the request's own tokens behind as a run; where its path ends then."""
        kv, parent = req.kv, Hit(state.twin, state.first_own, state.twin_rows)
        # The last output token's KV is there under overlap scheduling only; whoever goes on computes it.
        end = min(req.owned_kv_len(), len(req.origin_input_ids) + len(req.output_ids) - 1)
        start = kv.cache_protected_len if state.sliding else max(state.first_own, kv.cache_protected_len)
        if state.pending or end <= start:
            return parent
        run = self._run(req, state, start, end)
        same = self.twins.same(run)
        if same is None:
            self.free_kv_row(kv, [(kv.cache_protected_len, start)])
            self.keep(run, req)
            kv.cache_protected_len = end
        return Hit(same or run, end)

    def _run(self, req: Req, state: RequestState, start: int, end: int) -> Twin:
        """The rows of positions ``[start, end)``, or of the newest ones where rows slide."""
        row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        parent, slides, newest = state.twin, None, start
        per_layer, parent_rows = [end - start] * self.pool.layer_num, state.twin_rows
        if state.sliding:
            newest = max(0, end + 1 - max(state.sliding))
            per_layer = [min(rows, end - newest) for rows in state.sliding]
            held = row[newest:end].clone()
            slides = Slides(state.cells, state.sliding, held, state.kept, state.kept_slots)
            if parent.slides is not None:
                parent_rows = [0] * self.pool.layer_num  # the newest rows are listed anew
        cells, positions = [], []
        for layer, rows in enumerate(per_layer):
            cells.append(row[end - rows : end] + layer * self.pool.cells_per_layer)
            at = torch.arange(end - rows, end, dtype=torch.int32)
            positions.append(at.expand(self.pool.head_num, -1))
        return Twin(
            state.space,
            start,
            (req.origin_input_ids + req.output_ids)[start:end],
            len(req.origin_input_ids),
            cells,
            positions,
            slots=row[start:end].clone(),
            parent=parent,
            parent_rows=parent_rows,
            lossy_end=parent.lossy_end if state.twin_rows is None else start,
            all_or_nothing=bool(state.sliding),
            slides=slides,
            sparsity=parent.sparsity,
            voted=parent.voted,
        )

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
                    self._drop(piece)
            self._limit()
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
        freed = self._evict_doubled(params.num_tokens)
        params = replace(params, num_tokens=max(0, params.num_tokens - freed))
        result = super()._evict(params, *args, **kwargs)
        while result.num_tokens_evicted < params.num_tokens and self._pins:
            if sum(req.kv.holds_kv for req in self.decoding) > 1:
                break  # one of them can be retracted
            self.unpin(next(iter(self._pins)))
            missing = params.num_tokens - result.num_tokens_evicted
            more = super()._evict(replace(params, num_tokens=missing), *args, **kwargs)
            result.num_tokens_evicted += more.num_tokens_evicted
        result.num_tokens_evicted += freed
        return result

    def _evict_doubled(self, num_tokens: int) -> int:
        """Evicts exact KV that a twin can stand in for; returns the number of slots."""
        if self.disable or self.settings.twins not in (FALLBACK, PREFER):
            return 0
        tracker = dict.fromkeys(self.tree_components, 0)
        for twin in self.twins.with_exact():
            if tracker[ComponentType.FULL] >= num_tokens:
                break
            _, extra_key, cache_salt = twin.space
            key = RadixKey(twin.tokens, extra_key, cache_salt=cache_salt)
            if self._evict_end(key, num_tokens, tracker):
                self.twins.exact_is_gone(twin)
        return tracker[ComponentType.FULL]

    def _evict_end(self, key: RadixKey, num_tokens: int, tracker: dict[ComponentType, int]) -> bool:
        """Evicts an exact path from its end on; False where more of it can go later."""
        matched, last, reach = self.tree_core.match_full_device_prefix(key)
        if reach > matched:  # it ends inside somebody else's
            return True
        gone = 0  # children of the node at hand
        for node in reversed(self.tree_core.collect_path_info([last])[0]):
            if node.num_children > gone:
                return True
            if tracker[ComponentType.FULL] >= num_tokens or self._is_locked(node.node_id):
                return False
            self._evict_device_leaf(node.node_id, tracker)
            gone = 1
        return True

    def _is_locked(self, node_id: int) -> bool:
        """A lock moves what nobody else has locked from evictable to protected."""
        before = self.protected_size()
        lock = self.lock(node_id)
        moved = self.protected_size() > before
        self.unlock(lock)
        return not moved

    def _drop(self, twin: Twin) -> bool:
        """Gives a twin's slots back, unless somebody needs them."""
        idle = twin in self.twins and twin.is_idle and not self._is_locked(twin.node)
        if idle:
            self._evict_device_leaf(twin.node, dict.fromkeys(self.tree_components, 0))
        return idle

    def _limit(self) -> None:
        """Holds what nobody reads to the operator's ``max_twins``; the least recently used goes."""
        excess = self.twins.num_slots - self.settings.max_twins * self.token_to_kv_pool_allocator.size
        if excess <= 0:
            return
        twins = self.twins.by_age()
        excess -= sum(len(twin.slots) for twin in twins if twin.holders)
        for twin in twins:
            while excess > 0 and twin is not None and self._drop(twin):
                excess -= len(twin.slots)
                twin = twin.parent

    def slots_read(self) -> int:
        """Slots of twins that requests read, or will where they were retracted."""
        ends = {state.twin for state in self.requests.holders() if state.twin is not None}
        ends |= {twin for twin, _ in self._pins.values()}
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

    # ---- Retracted requests ----

    def _pin(self, req: Req, twin: Twin) -> None:
        """Keeps what a retracted request goes on from, until it does."""
        if twin not in self.twins:
            return
        twin.add_holders(1)
        self._pins[req] = twin, self.lock(twin.node)

    def unpin(self, req: Req) -> None:
        twin, lock = self._pins.pop(req, (None, None))
        if twin is not None:
            self.unlock(lock)
            twin.add_holders(-1)

    def unpin_all_but(self, waiting: Iterable[Req]) -> None:
        """Requests that wait no more, because they were aborted, need nothing."""
        if self._pins:
            waiting = set(waiting)
            for req in [req for req in self._pins if req not in waiting]:
                self.unpin(req)

    def unpin_for(self, req: Req) -> bool:
        """Gives up the oldest pin that is not ``req``'s own; False where there is none."""
        for other in self._pins:
            if other is not req:
                self.unpin(other)
                return True
        return False


def create(ctx: TreeCacheBuildContext) -> TwinRadixCache:
    """The factory registered under :data:`BACKEND`."""
    return create_unified_radix_cache(ctx, cache_class=TwinRadixCache)
