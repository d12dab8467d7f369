"""After the last prefill chunk: select, gather, release, and decode from the ragged rows."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Callable, NamedTuple

import torch
from sglang.srt.mem_cache.common import evict_from_tree_cache

from sglang_vlkv.cache.radix import TwinRadixCache
from sglang_vlkv.cache.requests import RequestState
from sglang_vlkv.cache.twins import Twin
from sglang_vlkv.kernels.compaction import gather_rows, scatter_rows
from sglang_vlkv.observe import events
from sglang_vlkv.stages.layer import LayerScores, Selection
from sglang_vlkv.stages.merging import merge
from sglang_vlkv.stages.policy import Policy
from sglang_vlkv.stages.select import select

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Gathered(NamedTuple):
    """A prompt's kept rows outside the pool, its exact rows already given back.

    Attributes:
        positions: per layer, of the kept rows in the request's sequence, ``[Hkv, num_kept[l]]`` int32,
            on the host.
        sparsity: per layer, as in :class:`Selection`.
        rows: K and V of all layers, ``[2, sum(num_kept), H, D]``, layer after layer.
        tail: K and V rows ``[2, L, T, H, D]`` of output tokens that the tree owns; T is 0 except
            for a retracted request whose outputs were published with a chunk.
    """

    req: Req
    state: RequestState
    positions: list[torch.Tensor]
    sparsity: list[float] | None
    rows: torch.Tensor
    tail: torch.Tensor

    @property
    def num_kept(self) -> list[int]:
        return [layer.shape[1] for layer in self.positions]


class Compactor:
    """Replaces the exact prompts of freshly prefilled requests by their kept rows.

    It runs on the scheduler's thread after a finished prefill has joined the running batch and
    before anything is admitted, so that admission sees the freed memory and nothing decodes from
    an uncompacted prompt.

    Args:
        tree: the scheduler's radix cache.
        await_forward: what is issued from here on runs after all forwards issued so far, which may
            still write what is read here, or read what is given back. The host does not wait.
    """

    def __init__(self, tree: TwinRadixCache, await_forward: Callable[[], None] = lambda: None) -> None:
        self._tree = tree
        self._pool = tree.pool
        self._req_to_token_pool = tree.req_to_token_pool
        self._await_forward = await_forward

    def run(self, scheduler: Scheduler, batch: ScheduleBatch) -> None:
        """Compacts what is pending in ``batch``; a request for whose rows there is no room is
        retracted, never decoded from its exact prompt."""
        self._tree.resting = []
        self._tree.decoding = batch.reqs
        self._tree.pins.keep_only(scheduler.waiting_queue)
        self._slide(batch)
        if any(state.pending for state in self._pool.requests.holders()):
            self._compact(scheduler, batch)
        self._tree.watchers.sample(lambda: self._pool_use(scheduler, batch))
        # With overlap the host has not seen the newest token yet, and the next one joins it.
        decoding = ((req, req.seqlen + 2) for req in batch.reqs)
        self._pool.requests.expect(decoding, self._pool.layer_num)

    def _compact(self, scheduler: Scheduler, batch: ScheduleBatch) -> None:
        finishing = scheduler._reqs_finishing_inflight(batch)
        fresh = [
            (req, state)
            for req in batch.reqs
            if (state := self._pool.requests.get(req)) is not None
            and state.row is not None
            and state.pending
            and req not in finishing
            and not req.finished()
        ]
        if not fresh:
            return
        start = time.perf_counter()
        self._await_forward()
        # All exact prompts go before any kept row is placed: they may share what they free.
        selections = self._select(fresh)
        gathered = [
            self._gather(req, state, selection, positions)
            for (req, state), selection, positions in zip(
                fresh, selections, _on_host(selections), strict=True
            )
        ]
        homeless = [item.req for item in gathered if not self._place(item)]
        if homeless:
            self._retract(scheduler, batch, homeless)
        if watchers := self._tree.watchers:
            for req, state in fresh:
                homed = req not in homeless
                watchers.tell(self._compacted(req, state) if homed else events.NoRoom(req.rid))
            watchers.tell(events.Pass(len(fresh), time.perf_counter() - start))
        # SGLang clears this flag only when a request leaves; the freed rows can admit others now.
        batch.batch_is_full = False

    def _select(self, fresh: list[tuple[Req, RequestState]]) -> list[Selection]:
        """What each request keeps; the layers' budgets are equal on all ranks."""
        num_layers = self._pool.layer_num
        counted = []
        for req, state in fresh:
            if len(state.scores) != num_layers:
                raise RuntimeError(
                    f"request {req.rid!r} reached decode with {len(state.scores)} of {num_layers} "
                    "layers scored; please report this as a bug of sglang_vlkv"
                )
            for layer in range(num_layers):
                counted += _counted(state.scores[layer])
        self._note(fresh)
        sizes = [len(numbers) for numbers in counted]
        # The first of two waits for the device: all layers of all requests in one copy.
        totals = iter(self._tree.ranks.sum(torch.cat(counted).cpu()).split(sizes))
        selections = []
        for _, state in fresh:
            sums = [(next(totals).tolist(), next(totals)) for _ in range(num_layers)]
            sparsity = None
            if all(entries for (_, entries), _ in sums):
                sparsity = [zeros / entries for (zeros, entries), _ in sums]
            layers = [state.scores[layer] for layer in range(num_layers)]
            profiles = [profile for _, profile in sums]
            plan = state.plan
            selections.append(select(plan.policy, plan.prompt, layers, sparsity, profiles))
        return selections

    def _note(self, fresh: list[tuple[Req, RequestState]]) -> None:
        allocator = self._tree.token_to_kv_pool_allocator
        requests = [(req.rid, state.plan.start, state.plan.end) for req, state in fresh]
        self._tree.ranks.note("compact", requests, allocator.available_size(), self._tree.evictable_size())

    def _slide(self, batch: ScheduleBatch) -> None:
        """Gives back the slots of rows that neither the next decode step sees nor, if the request is
        retracted before it, the one that then takes its place one token earlier.

        Those lie right behind the kept rows that never slide; these move up in the request's row,
        so that what it owns stays one range of it.
        """
        for req in batch.reqs:
            state = self._pool.requests.get(req)
            if state is None or not state.sliding or state.row is None:
                continue
            kv, start = req.kv, state.evicted
            end = kv.kv_allocated_len - max(state.sliding)
            if end <= start:
                continue
            self._tree.free_kv_row(kv, [(start, end)])
            row = self._req_to_token_pool.req_to_token[kv.req_pool_idx]
            fixed = row[kv.cache_protected_len : start].clone()
            self._req_to_token_pool.write((kv.req_pool_idx, slice(kv.cache_protected_len, end)), 0)
            owned = end - len(fixed)
            self._req_to_token_pool.write((kv.req_pool_idx, slice(owned, end)), fixed)
            kv.cache_protected_len = owned
            state.evicted = end
            batch.batch_is_full = False

    def _gather(
        self, req: Req, state: RequestState, selection: Selection, positions: list[torch.Tensor]
    ) -> Gathered:
        tree, pool = self._tree, self._pool
        start, n = state.plan.start, state.plan.end
        if req.kv.cache_protected_len < n and not req.skip_radix_cache_insert:
            # May re-point the row to an identical prefix, so the slots are read after it.
            tree.checkpoint(req, up_to=n)
        protected = req.kv.cache_protected_len
        row = self._req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        slots = row[start:n].long()
        rows = self._rows(state.plan.policy, slots, selection)
        tail = pool.storage[:, :, row[n : max(n, protected)].long()].transpose(0, 1).clone()
        positions = [layer + start for layer in positions]
        gathered = Gathered(req, state, positions, selection.sparsity, rows, tail)
        if protected < n:
            tree.free_kv_row(req.kv, [(protected, n)])
        # The request owns nothing below its outputs now; what follows only ever adds to that.
        req.kv.cache_protected_len = max(n, protected)
        if state.twin is None:  # else it goes on reading what the lock holds
            tree.unlock(req.lock)
            req.lock = None
        return gathered

    def _rows(self, policy: Policy, slots: torch.Tensor, selection: Selection) -> torch.Tensor:
        """K and V ``[2, sum(num_kept), H, D]`` of all layers, with what was merged into them."""
        pool = self._pool
        if policy.merge == "similar":
            layers = zip(pool.k_buffer, pool.v_buffer, selection.kept, strict=True)
            merged = [merge(policy, keys[slots], values[slots], kept) for keys, values, kept in layers]
            return torch.cat([torch.stack(both) for both in merged], dim=1)
        return gather_rows(
            pool.k_cells,
            pool.v_cells,
            slots,
            torch.cat(selection.kept, dim=1),
            selection.num_kept,
            pool.cells_per_layer,
            merge=policy.merge == "bucket_mean",
            sink_tokens=policy.sink_tokens,
        )

    def _place(self, item: Gathered) -> bool:
        """Moves the kept rows to slots of their own, or to those of a twin that holds the same;
        False where the pool has no room for them."""
        req, state, pool, tree = item.req, item.state, self._pool, self._tree
        n, num_kept = state.plan.end, item.num_kept
        slides = state.plan.policy.decode == "fixed_point"
        sliding = [state.plan.policy.num_sliding(k) if slides else 0 for k in num_kept]
        num_fixed = [k - s for k, s in zip(num_kept, sliding, strict=True)]
        twin = self._new_twin(item, num_fixed, slides)
        same = tree.twins.same(twin)
        lock = None if same is None else tree.lock(same.node)  # what follows may evict
        num_packed = -(-sum(num_fixed) // pool.layer_num) if same is None else 0
        num_tail = item.tail.shape[2]
        slots = self._alloc(num_packed + max(sliding) + num_tail)
        if slots is None:
            tree.unlock(lock)
            return False
        packed, newest, tail = slots.split([num_packed, max(sliding), num_tail])
        if slides:
            # Rows that slide lie like tokens, one slot for the same row of every layer.
            at = [newest[max(sliding) - count :] for count in sliding]
            at = torch.cat([slots + layer * pool.cells_per_layer for layer, slots in enumerate(at)])
            layers = zip(item.rows.split(num_kept, dim=1), num_fixed, strict=True)
            rows = torch.cat([layer[:, fixed:] for layer, fixed in layers], dim=1)
            scatter_rows(pool.k_cells, pool.v_cells, at, rows)
        pool.storage[:, :, tail] = item.tail.transpose(0, 1)
        if same is None:
            self._fill(twin, packed, item)
            if not tree.disable and num_packed:  # else every row slides
                tree.live.keep(twin, req)
                lock = tree.lock(twin.node)
        elif same.holders:
            state.prefix_kind = "shared"
        twin = same or twin
        # "Private = [cache_protected_len, kv_allocated_len)" is exactly what the tree does not own,
        # so SGLang's release, retraction and leak checks hold unmodified.
        private = torch.cat([newest, tail] if lock else [packed, newest, tail]).to(torch.int32)
        row, end = req.kv.req_pool_idx, n + num_tail
        self._req_to_token_pool.write((row, slice(0, end - len(private))), 0)
        self._req_to_token_pool.write((row, slice(end - len(private), end)), private)
        req.kv.cache_protected_len = end - len(private)
        newest = [kept[:, k:] for kept, k in zip(item.positions, num_fixed)]
        pieces = [state.kept, twin.positions, newest] if state.kept else [twin.positions, newest]
        state.kept = [torch.cat(layer, dim=1) for layer in zip(*pieces)]
        state.kept_slots += len(twin.slots) + max(sliding)
        if state.cells is None:
            state.cells = twin.cells
        else:
            state.cells = [torch.cat(both) for both in zip(state.cells, twin.cells, strict=True)]
        state.first_own = n
        state.sliding, state.evicted = sliding if slides else [], n - max(sliding)
        state.scores, state.pending = {}, False
        tree.ranks.note("kept", req.rid, num_kept, sliding, num_packed, twin.key[-1:].tolist())
        tree.live.hold(req, state, twin)
        pool.requests.sees(state)
        tree.twins.exact_is_there(twin)
        tree.unlock(req.lock)
        req.lock = lock
        return True

    def _alloc(self, num_slots: int) -> torch.Tensor | None:
        evict_from_tree_cache(self._tree, num_slots)
        if not num_slots:
            return torch.empty(0, dtype=torch.int64, device=self._pool.device)
        return self._tree.token_to_kv_pool_allocator.alloc(num_slots)

    def _new_twin(self, item: Gathered, num_fixed: list[int], slides: bool) -> Twin:
        """The piece that the rows that never slide will be, without its slots."""
        req, state = item.req, item.state
        lasting = self._tree.live.outlives(req, state) and not slides
        return Twin(
            self._tree.live.space_of(req, state),
            state.plan.start,
            req.origin_input_ids[state.plan.start : state.plan.end],
            state.plan.end,
            cells=[],
            positions=[kept[:, :count] for kept, count in zip(item.positions, num_fixed, strict=True)],
            slots=torch.empty(0),
            parent=state.twin,
            parent_rows=state.twin_rows,
            lossy_end=state.plan.end,
            all_or_nothing=state.plan.policy.merge != "none",
            lasting=lasting,
            sparsity=item.sparsity,
            voted=state.voted,
        )

    def _fill(self, twin: Twin, slots: torch.Tensor, item: Gathered) -> None:
        """Puts the rows that never slide into ``slots``, which become the twin's."""
        pool = self._pool
        twin.slots, twin.cells = slots, pool.packed_cells(slots, twin.num_rows)
        rows, num_kept = item.rows, item.num_kept
        if twin.num_rows != num_kept:
            layers = zip(rows.split(num_kept, dim=1), twin.num_rows, strict=True)
            rows = torch.cat([layer[:, :fixed] for layer, fixed in layers], dim=1)
        scatter_rows(pool.k_cells, pool.v_cells, torch.cat(twin.cells), rows)

    def _compacted(self, req: Req, state: RequestState) -> events.Compacted:
        kept, prompt, policy = state.rows_of_prompt(), state.asked.prompt, state.asked.policy
        return events.Compacted(
            rid=req.rid,
            policy=policy.name,
            budget=policy.budget,
            prompt_tokens=prompt.num_tokens,
            visual_tokens=prompt.num_visual,
            kept_per_layer=[layer.shape[1] for layer in kept],
            kept_per_modality=prompt.per_modality(kept),
            unseen_pictures=sum(not picture.least for picture in prompt.per_picture(kept)),
            sparsity_per_layer=state.twin.sparsity,
            kept_bytes=state.kept_slots * self._pool.slot_bytes,
            full_bytes=prompt.num_tokens * self._pool.slot_bytes,
            shared=state.twin.holders > 1,
            draft=bool(state.asked.writes_draft),
        )

    def _pool_use(self, scheduler: Scheduler, batch: ScheduleBatch) -> events.PoolUse:
        allocator = self._tree.token_to_kv_pool_allocator
        return events.PoolUse(
            size=allocator.size,
            free=allocator.available_size(),
            evictable=self._tree.evictable_size(),
            twins=self._tree.twins.num_slots,
            twins_read=self._tree.slots_read(),
            slot_bytes=self._pool.slot_bytes,
            running=len(batch.reqs),
            waiting=len(scheduler.waiting_queue),
        )

    def _retract(self, scheduler: Scheduler, batch: ScheduleBatch, reqs: list[Req]) -> None:
        logger.warning(
            "No room for the kept rows of %d prefilled requests; they are retracted and prefilled "
            "again once others have finished.",
            len(reqs),
        )
        self._tree.resting = reqs
        for req in reqs:
            index = batch.reqs.index(req)
            batch.release_req(index, len(batch.reqs) - 1)
            batch.filter_batch(keep_indices=[i for i in range(len(batch.reqs)) if i != index])
            scheduler._add_request_to_queue(req, is_retracted=True)


def _on_host(selections: list[Selection]) -> list[list[torch.Tensor]]:
    """What the selections keep, on the host and as int32; all of it is one wait for the device."""
    layers = [layer for selection in selections for layer in selection.kept]
    flat = torch.cat([layer.to(torch.int32).flatten() for layer in layers]).cpu()
    pieces = zip(flat.split([layer.numel() for layer in layers]), layers, strict=True)
    on_host = iter([piece.view(layer.shape) for piece, layer in pieces])
    return [[next(on_host) for _ in selection.kept] for selection in selections]


def _counted(scores: LayerScores) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's zeros and entries ``[2]`` and its profile, int64, where its scores are."""
    device = scores.scores.device
    counts = [
        x if isinstance(x, torch.Tensor) else torch.full((), x, dtype=torch.int64, device=device)
        for x in (scores.zeros, scores.entries)
    ]
    none = torch.empty(0, dtype=torch.int64, device=device)  # a float here would round all counts
    return torch.stack(counts), none if scores.profile is None else scores.profile.to(device)
