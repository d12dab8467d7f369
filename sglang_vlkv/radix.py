"""SGLang's radix cache, telling our request states what happens to their rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.mem_cache.registry import TreeCacheBuildContext, create_unified_radix_cache
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_vlkv.base import Modality
from sglang_vlkv.planning import Planner
from sglang_vlkv.pool import CellPool
from sglang_vlkv.requests import Requests, RequestState

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_vlkv.compaction import Compactor

BACKEND = "vlkv"


class ExactRadixCache(UnifiedRadixCache):
    """Holds exact KV only: a compacted request takes no part in it any more.

    Attributes:
        planner, compactor: wired once the scheduler stands, before the first request.
    """

    planner: Planner
    compactor: Compactor

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
        if state is None or state.plan.prompt.num_tokens != len(req.origin_input_ids):
            state = self.requests.add(req, self.planner.plan(req))
        return state

    def swa_reprefill_tail_tokens(self, req: Req | None = None) -> int:
        """Caps the prefix hit so that the queries that the policy needs are computed.

        Upstream's seam for recomputing the end of a cached prefix.
        """
        tail = super().swa_reprefill_tail_tokens(req)
        if req is None:
            return tail
        plan = self.state_of(req).plan
        return max(tail, plan.num_computed + len(req.output_ids)) if plan.compacts else tail

    def maybe_hand_to_session(self, req: Req) -> None:
        """The request's row has just been written for a prefill, or for its next chunk."""
        super().maybe_hand_to_session(req)
        state, row = self.state_of(req), req.kv.req_pool_idx
        if state.row != row:
            self.requests.take_row(state, row)
            state.prefix_tokens = req.prefix_len
        tags = self.pool.tags
        slots = self.req_to_token_pool.req_to_token[row, req.prefix_len : req.extend_end].long()
        tags[slots] = Modality.TEXT
        prompt = state.plan.prompt.tags[req.prefix_len : req.extend_end].to(tags.device)
        tags[slots[: len(prompt)]] = prompt

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        super().on_release(req, checkpointed=checkpointed)
        state = self.requests.get(req)
        if state is None:
            return
        if state.cells is not None:
            # A retracted request is prefilled again, exactly.
            req.skip_radix_cache_insert = state.skips_insert
            state.last_slots = req.kv.kv_allocated_len - req.kv.cache_protected_len
        self.requests.release_row(state)
        if req.finished():  # else it is prefilled again
            self.requests.drop_draft(state)


def create(ctx: TreeCacheBuildContext) -> ExactRadixCache:
    """The factory registered under :data:`BACKEND`."""
    return create_unified_radix_cache(ctx, cache_class=ExactRadixCache)
