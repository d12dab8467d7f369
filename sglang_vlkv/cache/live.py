"""Twins of live requests: made at their compaction, read while they run, left when they end."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_vlkv.cache.lookup import is_whole_prompt
from sglang_vlkv.cache.requests import RequestState
from sglang_vlkv.cache.twins import NAMESPACE, Hit, Slides, Twin
from sglang_vlkv.observe import events
from sglang_vlkv.options.config import OFF

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_vlkv.cache.radix import TwinRadixCache


class LiveTwins:
    """Who of a tree's requests reads which twin, and what becomes of it."""

    def __init__(self, tree: TwinRadixCache) -> None:
        self._tree = tree

    def go_on_from(self, req: Req, state: RequestState, hit: Hit) -> None:
        twin = hit.twin
        if (req.prefix_len, req.last_node) != (hit.covered, twin.node):
            raise RuntimeError(
                f"request {req.rid} was given a prefix of {req.prefix_len} tokens where a twin covers "
                f"{hit.covered}; please report this as a bug of sglang_vlkv"
            )
        self._tree.pins.drop(req)
        hit = self._agreed(hit)
        n, slides, whole = state.asked.end, twin.slides, is_whole_prompt(req, hit)
        state.prefix_kind = "shared" if twin.holders else "twin"
        state.plan, state.pending, state.rows_lost = state.hit_plan, state.hit_plan.compacts, hit.rows_lost
        # Of a prompt that was computed again for its last token's logits, that token's row is there.
        state.first_own = hit.covered if hit.rows is not None else max(hit.covered, twin.end)
        if slides is not None and whole and req.extend_end == hit.covered + 1:
            state.cells, state.sliding, state.evicted = slides.cells, slides.rows, hit.covered
            state.kept, state.kept_slots = slides.kept, slides.kept_slots
            newest = slice(hit.covered - len(slides.slots), hit.covered)
            self._tree.req_to_token_pool.write((req.kv.req_pool_idx, newest), slides.slots)
        else:
            state.cells, state.kept = hit.cells(), hit.positions(n)
            rows = sum(layer.shape[1] for layer in state.kept)
            own = 0 if state.pending else max(0, n - state.first_own)
            state.kept_slots = -(-rows // self._tree.pool.layer_num) + own
        self._tree.ranks.note("hit", req.rid, hit.covered, hit.rows, twin.key[-1])
        if whole:
            state.voted = twin.voted
        self.hold(req, state, twin, hit.rows)
        self._tree.requests.sees(state)
        self._tree.twins.hits += 1
        if self._tree.watchers:
            self._tree.watchers.tell(
                events.TwinHit(
                    twin.node, req.rid, state.prefix_kind, state.prefix_tokens, n, hit.rows_lost
                )
            )

    def _agreed(self, hit: Hit) -> Hit:
        """With the rows that the heads of all ranks have, where a shorter common prefix cuts the twin."""
        if hit.rows is None:
            return hit
        rows = self._tree.ranks.least(hit.rows)
        more = self._tree.pool.head_num * (sum(hit.rows) - sum(rows))
        return replace(hit, rows=rows, rows_lost=hit.rows_lost + more)

    def keep(self, twin: Twin, req: Req) -> None:
        """Gives the slots of a new twin, of rows of ``req``, to the tree, unlocked."""
        stands = twin.parent is not None and twin.parent in self._tree.twins
        before = self._tree.path_device_indices(twin.parent.node) if stands else twin.slots[:0]
        params = InsertParams(
            key=RadixKey(self._tree.twins.name(twin), NAMESPACE),
            value=torch.cat([before.long(), twin.slots.long()]),
            prev_prefix_len=len(before),
            priority=req.priority or 0,
        )
        twin.node = self._tree.insert(params).last_device_node
        self._tree.twins.add(twin)
        if self._tree.watchers and twin.lasting:
            num_bytes = len(twin.slots) * self._tree.pool.slot_bytes
            self._tree.watchers.tell(
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
        if twin in self._tree.twins:
            self._tree.twins.use(twin)
            self._tree.touch_prefix(RadixKey(twin.key, NAMESPACE))

    def outlives(self, req: Req, state: RequestState) -> bool:
        """Whether the rows of ``state`` stay when it ends."""
        return self._tree.settings.twins != OFF and self.space_of(req, state) == state.space

    def space_of(self, req: Req, state: RequestState) -> tuple:
        """Who may use what ``state`` leaves; nobody else where more than the path has shaped it."""
        skips = req.skip_radix_cache_insert if state.twin is None else state.skips_insert
        due = bool(state.asked.reads_draft) and state.plan.compacts
        ordinary = not (skips or state.asked.writes_draft or (due and not state.voted))
        return state.space if ordinary else (*state.space, req.rid)

    def leave(self, req: Req, state: RequestState) -> Hit:
        """Leaves the rows of the request's own tokens behind as a run; where its path ends then."""
        kv, parent = req.kv, Hit(state.twin, state.first_own, state.twin_rows)
        # The last output token's KV is there under overlap scheduling only; whoever goes on computes it.
        end = min(req.owned_kv_len(), len(req.origin_input_ids) + len(req.output_ids) - 1)
        start = kv.cache_protected_len if state.sliding else max(state.first_own, kv.cache_protected_len)
        if state.pending or end <= start:
            return parent
        run = self._run(req, state, start, end)
        same = self._tree.twins.same(run)
        if same is None:
            self._tree.free_kv_row(kv, [(kv.cache_protected_len, start)])
            self.keep(run, req)
            kv.cache_protected_len = end
        return Hit(same or run, end)

    def _run(self, req: Req, state: RequestState, start: int, end: int) -> Twin:
        """The rows of positions ``[start, end)``, or of the newest ones where rows slide."""
        row = self._tree.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        parent, slides, newest = state.twin, None, start
        per_layer, parent_rows = [end - start] * self._tree.pool.layer_num, state.twin_rows
        if state.sliding:
            newest = max(0, end + 1 - max(state.sliding))
            per_layer = [min(rows, end - newest) for rows in state.sliding]
            held = row[newest:end].clone()
            slides = Slides(state.cells, state.sliding, held, state.kept, state.kept_slots)
            if parent.slides is not None:
                parent_rows = [0] * self._tree.pool.layer_num  # the newest rows are listed anew
        cells, positions = [], []
        for layer, rows in enumerate(per_layer):
            cells.append(row[end - rows : end] + layer * self._tree.pool.cells_per_layer)
            at = torch.arange(end - rows, end, dtype=torch.int32)
            positions.append(at.expand(self._tree.pool.head_num, -1))
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
