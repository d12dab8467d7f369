"""Room for the kept rows, reserved when a request is admitted."""

from __future__ import annotations

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder

from sglang_vlkv.cache.radix import TwinRadixCache
from sglang_vlkv.observe import events


class ReservingPrefillAdder(PrefillAdder):
    """Admits a request only where its kept rows will find room too.

    A compaction gives back the part of the prompt that the request computed itself. A prefix that
    it found in the tree may be locked by others and then frees nothing, so the kept rows are
    charged where they exceed the computed part. A request on its own is charged nothing: nobody
    else can hold its prefix, and SGLang promises that what fits the pool is admitted then.
    """

    tree_cache: TwinRadixCache

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # Between its chunks a request's published part can be locked by others as well.
        self._pending = sum(
            state.plan.max_slots
            for state in self.tree_cache.requests.holders()
            if state.pending
        )
        self._charge(self._pending)

    def _charge(self, num_slots: int) -> None:
        self.memory_budget.total_offset += num_slots
        self.memory_budget.current_offset += num_slots

    def add_chunked_req(self, req: Req):
        """A next chunk is not held up by reservations: only its end frees anything."""
        self._charge(-self._pending)
        try:
            return super().add_chunked_req(req)
        finally:
            self._charge(self._pending)

    def add_one_req(self, req: Req, *args, **kwargs):
        if req in self.tree_cache.resting:
            return AddReqResult.OTHER
        result = super().add_one_req(req, *args, **kwargs)
        while result is AddReqResult.NO_TOKEN and not (self.running_batch.reqs or self.can_run_list):
            # Nobody runs who could free what waiting requests have pinned.
            if not self.tree_cache.pins.drop_for(req):
                break
            result = super().add_one_req(req, *args, **kwargs)
        if result is AddReqResult.NO_TOKEN and self.tree_cache.watchers:
            self._note_deferred(req)
        return result

    def _note_deferred(self, req: Req) -> None:
        state = self.tree_cache.state_of(req)
        waits = req not in self.can_run_list  # upstream says NO_TOKEN of the last that it admits too
        if waits and not state.deferred and (self._pending or self._reserve(req)):
            state.deferred = True
            self.tree_cache.watchers.tell(events.Deferred(req.rid))

    def _request_slot_reserve_for_req(
        self, req: Req, *, extend_input_len: int | None = None
    ) -> int:
        """Upstream's seam for what a request needs beside its new tokens."""
        reserve = super()._request_slot_reserve_for_req(req, extend_input_len=extend_input_len)
        return reserve + self._reserve(req)

    def _reserve(self, req: Req) -> int:
        """Slots that its kept rows need beyond those that its own prefill takes."""
        state = self.tree_cache.state_of(req)
        plan = state.asked if state.hit is None else state.hit_plan
        alone = not (self.running_batch.reqs or self.can_run_list or self._pending)
        # Before its prefix is matched, as when preemption asks, nothing is known of its needs.
        matched = len(req.full_untruncated_fill_ids) > 0
        if plan.left_alone or req.kv.holds_kv or alone or not matched:
            return 0
        computed = max(0, len(req.origin_input_ids) - req.prefix_len)
        return max(0, plan.max_slots - computed)

    def _get_running_request_total_token_offset(self, req: Req) -> int:
        """A request under fixed-point elimination grows no more."""
        state = self.tree_cache.requests.get(req)
        if state is not None and state.sliding:
            return 0
        return super()._get_running_request_total_token_offset(req)
