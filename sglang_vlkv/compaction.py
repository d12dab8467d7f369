"""After the last prefill chunk: select, gather, release, and decode from the ragged rows."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Callable, NamedTuple

import torch
from sglang.srt.mem_cache.common import evict_from_tree_cache

from sglang_vlkv.base import Modality, Policy, Selection
from sglang_vlkv.kernels.compaction import gather_rows, scatter_rows
from sglang_vlkv.radix import ExactRadixCache
from sglang_vlkv.requests import RequestState
from sglang_vlkv.select import select

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Gathered(NamedTuple):
    """A prompt's kept rows outside the pool, its exact rows already given back.

    Attributes:
        keys, values: per layer, ``[num_kept[l], H, D]``.
        tail: K and V rows ``[2, L, T, H, D]`` of output tokens that the tree owns; T is 0 except
            for a retracted request whose outputs were published with a chunk.
    """

    req: Req
    state: RequestState
    selection: Selection
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    tail: torch.Tensor


class Compactor:
    """Replaces the exact prompts of freshly prefilled requests by their kept rows.

    It runs on the scheduler's thread after a finished prefill has joined the running batch and
    before anything is admitted, so that admission sees the freed memory and nothing decodes from
    an uncompacted prompt.

    Args:
        policy: the server's policy.
        tree: the scheduler's radix cache.
        num_q_heads: query heads of the whole model.
        sum_over_ranks: adds a list of integers over the tensor-parallel ranks.

    Attributes:
        resting: requests that the last run retracted. Their prefill's result is still to come, so
            they must not be admitted before the next run.
    """

    def __init__(
        self,
        policy: Policy,
        tree: ExactRadixCache,
        num_q_heads: int,
        sum_over_ranks: Callable[[list[int]], list[int]],
    ) -> None:
        self.resting: list[Req] = []
        self._policy = policy
        self._num_q_heads = num_q_heads
        self._tree = tree
        self._pool = tree.pool
        self._req_to_token_pool = tree.req_to_token_pool
        self._sum_over_ranks = sum_over_ranks

    def run(self, scheduler: Scheduler, batch: ScheduleBatch) -> None:
        """Compacts what is pending in ``batch``; a request for whose rows there is no room is
        retracted, never decoded from its exact prompt."""
        self.resting = []
        if not any(state.pending for state in self._pool.requests.holders()):
            return
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
        # All exact prompts go before any kept row is placed: they may share what they free.
        gathered = [
            self._gather(req, state, sparsity)
            for (req, state), sparsity in zip(fresh, self._sparsity(fresh), strict=True)
        ]
        homeless = [item.req for item in gathered if not self._place(item)]
        if homeless:
            self._retract(scheduler, batch, homeless)
        # SGLang clears this flag only when a request leaves; the freed rows can admit others now.
        batch.batch_is_full = False

    def _sparsity(self, fresh: list[tuple[Req, RequestState]]) -> list[list[float]]:
        """Per request and layer, the fraction of zeros over all ranks' heads."""
        layers = range(self._pool.layer_num)
        for req, state in fresh:
            if len(state.scores) != len(layers):
                raise RuntimeError(
                    f"request {req.rid} reached decode with {len(state.scores)} of {len(layers)} "
                    "layers scored; please report this as a bug of sglang_vlkv"
                )
        zeros = [state.scores[layer].zeros for _, state in fresh for layer in layers]
        entries = []
        for _, state in fresh:
            n, rows = state.plan.prompt.num_tokens, state.plan.num_voting
            entries.append(rows * n - rows * (rows - 1) // 2)  # causally valid, per head
        zeros = self._sum_over_ranks(zeros)
        return [
            [z / (self._num_q_heads * valid) for z in zeros[i * len(layers) : (i + 1) * len(layers)]]
            for i, valid in enumerate(entries)
        ]

    def _gather(self, req: Req, state: RequestState, sparsity: list[float]) -> Gathered:
        tree, pool, prompt = self._tree, self._pool, state.plan.prompt
        n = prompt.num_tokens
        if req.kv.cache_protected_len < n and not req.skip_radix_cache_insert:
            # May re-point the row to an identical prefix, so the slots are read after it.
            tree.checkpoint(req, up_to=n)
        protected = req.kv.cache_protected_len
        row = self._req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        slots = row[:n].long()
        layers = [state.scores[layer].scores for layer in range(pool.layer_num)]
        selection = select(self._policy, prompt, layers, sparsity)
        chosen = [slots[kept] for kept in selection.kept]
        tail = pool.storage[:, :, row[n : max(n, protected)].long()].transpose(0, 1)
        gathered = Gathered(
            req,
            state,
            selection,
            [gather_rows(pool.k_buffer[layer], at) for layer, at in enumerate(chosen)],
            [gather_rows(pool.v_buffer[layer], at) for layer, at in enumerate(chosen)],
            tail.clone(),
        )
        if protected < n:
            tree.free_kv_row(req.kv, [(protected, n)])
        tree.unlock(req.lock)
        req.lock = None
        return gathered

    def _place(self, item: Gathered) -> bool:
        """Moves the kept rows to slots of their own; False where the pool has no room for them."""
        req, state, pool = item.req, item.state, self._pool
        n = state.plan.prompt.num_tokens
        num_kept = item.selection.num_kept
        num_slots = -(-sum(num_kept) // pool.layer_num)
        num_tail = item.tail.shape[2]
        # The request owns nothing below its outputs now; what follows only ever adds to that.
        req.kv.cache_protected_len = n + num_tail
        evict_from_tree_cache(self._tree, num_slots + num_tail)
        slots = self._tree.token_to_kv_pool_allocator.alloc(num_slots + num_tail)
        if slots is None:
            return False
        kept, tail = slots[:num_slots], slots[num_slots:]
        cells = pool.packed_cells(kept, num_kept)
        for layer, at in enumerate(cells):
            scatter_rows(pool.k_cells, at, item.keys[layer])
            scatter_rows(pool.v_cells, at, item.values[layer])
        pool.storage[:, :, tail] = item.tail.transpose(0, 1)
        pool.tags[kept], pool.tags[tail] = Modality.MERGED, Modality.TEXT
        # Right-aligned, "private = [cache_protected_len, kv_allocated_len)" is exactly the kept
        # rows and the outputs, so SGLang's release, retraction and leak checks hold unmodified.
        row = req.kv.req_pool_idx
        self._req_to_token_pool.write((row, slice(0, n - num_slots)), 0)
        self._req_to_token_pool.write((row, slice(n - num_slots, n)), kept.to(torch.int32))
        self._req_to_token_pool.write((row, slice(n, n + num_tail)), tail.to(torch.int32))
        req.kv.cache_protected_len = n - num_slots
        state.skips_insert, req.skip_radix_cache_insert = req.skip_radix_cache_insert, True
        state.cells, state.kept_slots, state.selection = cells, num_slots, item.selection
        state.scores = {}
        return True

    def _retract(self, scheduler: Scheduler, batch: ScheduleBatch, reqs: list[Req]) -> None:
        logger.warning(
            "No room for the kept rows of %d prefilled requests; they are retracted and prefilled "
            "again once others have finished.",
            len(reqs),
        )
        self.resting = reqs
        for req in reqs:
            index = batch.reqs.index(req)
            batch.release_req(index, len(batch.reqs) - 1)
            batch.filter_batch(keep_indices=[i for i in range(len(batch.reqs)) if i != index])
            scheduler._add_request_to_queue(req, is_retracted=True)
