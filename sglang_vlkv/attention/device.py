"""What the ragged counterparts of SGLang's GPU attention backends have in common."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Iterator, NamedTuple, Protocol

import torch
from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_parallel

from sglang_vlkv.attention.memory import captured_sizes, leaves_queries, list_capacity, most_padding
from sglang_vlkv.attention.rotary import find_rope
from sglang_vlkv.attention.scoring import chunk_of, extends_of, heads, score
from sglang_vlkv.cache.device_rows import DeviceRows
from sglang_vlkv.kernels.compaction import gather_rows, scatter_rows
from sglang_vlkv.kernels.post_vision import post_vision_scores
from sglang_vlkv.kernels.ragged_attention.arguments import lanes
from sglang_vlkv.kernels.ragged_attention.triton import RaggedIndices, ragged_extend
from sglang_vlkv.kernels.selection import select_rows

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_vlkv.attention.scoring import Extend
    from sglang_vlkv.cache.requests import RequestState


class DecodeKernel(Protocol):
    """Decode attention of all layers of one step."""

    def plan(self, indptr: torch.Tensor) -> None:
        """Divides the work of every layer, on the device: ``indptr`` is ``[L, B + 1]``."""

    def run(self, layer, q, k_cells, v_cells, indptr, indices, scale, out=None) -> torch.Tensor:
        """Attention of ``q`` ``[B, Hq, D]`` in one layer."""


class Extends(NamedTuple):
    """Which rows a prefill sees, on the device.

    Attributes:
        qo_indptr: ``[B + 1]`` int32, where each request's new tokens begin.
        indptr: ``[L, B + 1]`` int32, where each one's rows begin in ``indices``.
        indices: cell ids, int32.
        longest: most new tokens of a request.
    """

    qo_indptr: torch.Tensor
    indptr: torch.Tensor
    indices: torch.Tensor
    longest: int


def _rows_seen(state: RequestState | None, end: int, num_layers: int) -> list[int]:
    """Rows that the request's token at ``end - 1`` sees in every layer."""
    if state is None or state.cells is None:
        return [end] * num_layers
    own = state.sliding or [end - state.first_own] * num_layers
    return [len(cells) + count for cells, count in zip(state.cells, own, strict=True)]


class RaggedDeviceBackend:
    """Comes before a stock backend among a class's bases, and takes over what that one cannot read.

    A prefill whose requests are all exact is the stock backend's, to the last instruction. Decode
    steps, and prefills that go on from compacted rows, read per-layer index lists. Those of a decode
    step are built and planned by kernels inside its CUDA graph, from ``req_to_token`` and
    :class:`DeviceRows`; the host neither computes nor sends anything.

    Attributes:
        rope: the model's rotary embedding, None where none is known.
    """

    def __init__(self, model_runner, *args, **kwargs) -> None:
        super().__init__(model_runner, *args, **kwargs)
        pool = self.token_to_kv_pool
        self.rope = find_rope(model_runner.model)
        self._req_to_token = model_runner.req_to_token_pool.req_to_token
        num_rows = len(self._req_to_token)
        sizes = captured_sizes(model_runner)
        padding = most_padding(sizes)
        slots = pool.cells_per_layer // 2
        capacity = list_capacity(pool.layer_num, slots, pool.storage.nbytes // slots, padding)
        room = capacity - padding * pool.layer_num
        self._rows = pool.requests.on_device = DeviceRows(num_rows, pool.layer_num, room, pool.device)
        self._indices = RaggedIndices(pool.layer_num, num_rows, capacity, pool.device)
        config = model_runner.model_config
        num_q_heads = config.num_attention_heads // get_parallel().attn_tp_size
        self._queries = num_q_heads, config.dtype
        self._kernel = self.decode_kernel(num_rows, *self._queries)
        # [L, B, Hq, D], of the last replayed step; None where no request may leave its queries.
        self._replayed = None
        if sizes and leaves_queries():
            flat = self._zero_queries(pool.layer_num * max(sizes))
            self._replayed = flat.unflatten(0, (pool.layer_num, -1))
        self._rows.graph_copies, self._capturing = self._replayed is not None, False
        self._lists: tuple[torch.Tensor, torch.Tensor] = ()
        self._chunks, self._drafting, self._extends = [], [], None

    def decode_kernel(self, max_requests: int, num_q_heads: int, dtype: torch.dtype) -> DecodeKernel:
        """What attends in decode steps."""
        raise NotImplementedError

    def _snapshot_prefill_shared_reads(self, forward_batch: ForwardBatch, *, num_qo_tokens: int):
        """Scoring reads the row tables to a prefill's last layer."""
        return SharedReadEnds.UNKNOWN

    # ---- Metadata ----

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing: the buffers of decode steps are those of eager ones."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self._capturing = False
        if forward_batch.forward_mode.is_decode_or_idle():
            indices, needed = self._indices, self._rows.visible
            if needed > self._rows.capacity:
                pool = self.token_to_kv_pool
                indices = RaggedIndices(pool.layer_num, forward_batch.batch_size, needed, pool.device)
            self._plan_decode(forward_batch, indices)
            return
        super().init_forward_metadata(forward_batch)
        extends = list(extends_of(forward_batch))
        found = (chunk_of(extend, self.token_to_kv_pool, self._req_to_token) for extend in extends)
        self._chunks = [chunk for chunk in found if chunk is not None]
        self._extends = self._list_extends(forward_batch, extends)
        self._drafting = list(self._decoding_drafts(extends))

    def _decoding_drafts(self, extends: list[Extend]) -> Iterator[tuple[int, RequestState]]:
        """Drafts that decode in a mixed batch, each with its query."""
        for extend in extends:
            state = self.token_to_kv_pool.requests.at_row(extend.row)
            decodes = state is not None and state.cells is not None and not state.pending
            if decodes and state.plan.writes_draft and extend.end == extend.start + 1 > state.asked.end:
                yield extend.offset, state

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        if not forward_batch.forward_mode.is_decode_or_idle():
            super().init_forward_metadata_out_graph(forward_batch, in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        if forward_batch.forward_mode.is_decode_or_idle():
            self._plan_decode(forward_batch, self._indices)
            self._capturing = True
        else:
            super().init_forward_metadata_in_graph(forward_batch)

    def _plan_decode(self, batch: ForwardBatch, indices: RaggedIndices) -> None:
        """Builds and plans the index lists of all layers; recorded where a graph is captured."""
        if not batch.batch_size:
            return
        rows = self._rows
        self._lists = self._build(indices, batch)
        self._kernel.plan(self._lists[0])
        self._drafting = list(self._leaving(batch)) if rows.drafts else []

    def _leaving(self, batch: ForwardBatch) -> Iterator[tuple[int, RequestState]]:
        """The requests of a decode step that leave their queries, each with its place."""
        on_host = batch.req_pool_indices_cpu
        rows = batch.req_pool_indices if on_host is None else on_host
        for place, row in enumerate(rows[: batch.batch_size].tolist()):
            state = self.token_to_kv_pool.requests.at_row(row)
            if state is not None and state.plan.writes_draft:
                yield place, state

    def keep_replayed(self, batch: ForwardBatch) -> None:
        """After a replayed decode step, on its stream: the queries that its requests leave."""
        if not self._rows.drafts:
            return
        for place, state in self._leaving(batch):
            for layer, query in enumerate(self._replayed[:, place : place + 1].clone()):
                state.drafted.setdefault(layer, []).append(query)

    def _build(self, indices: RaggedIndices, batch: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """``indptr`` and ``indices`` of what the batch's newest tokens see."""
        cells_per_layer = self.token_to_kv_pool.cells_per_layer
        rows, lengths = batch.req_pool_indices, batch.seq_lens
        return indices.build(self._rows.table, rows, lengths, self._req_to_token, cells_per_layer)

    def _list_extends(self, batch: ForwardBatch, extends: list[Extend]) -> Extends | None:
        """The lists of a prefill that goes on from compacted rows; None where all rows are exact."""
        pool = self.token_to_kv_pool
        states = [pool.requests.at_row(extend.row) for extend in extends]
        if all(state is None or state.cells is None for state in states):
            return None
        seen = [_rows_seen(state, extend.end, pool.layer_num) for state, extend in zip(states, extends)]
        lists = RaggedIndices(pool.layer_num, len(extends), sum(map(sum, seen)), pool.device)
        indptr, indices = self._build(lists, batch)
        qo_indptr = torch.zeros(len(extends) + 1, dtype=torch.int32, device=pool.device)
        torch.cumsum(batch.extend_seq_lens, 0, out=qo_indptr[1:])
        counts = [extend.end - extend.start for extend in extends]
        self.plan_extend(counts, seen)
        return Extends(qo_indptr, indptr, indices, max(counts))

    def plan_extend(self, num_new: list[int], num_rows: list[list[int]]) -> None:
        """What :meth:`extend` needs to know on the host.

        Args:
            num_new: new tokens of every request.
            num_rows: rows that each sees in every layer, ``[B][L]``.
        """

    def extend(self, layer: int, q: torch.Tensor, lists: Extends, scale: float, out: torch.Tensor) -> None:
        """Causal attention of new tokens ``[tokens, Hq, D]``, the last of their requests' rows."""
        cells = self.token_to_kv_pool.k_cells, self.token_to_kv_pool.v_cells
        per_layer = lists.qo_indptr, lists.indptr[layer], lists.indices
        ragged_extend(q, *cells, *per_layer, scale, lists.longest, out)

    def warm_up(self, num_keys: tuple[int, ...] = (512, 4096), num_new: tuple[int, ...] = (1, 256)) -> None:
        """Compiles the kernels that no CUDA graph has compiled, on zeros and on SGLang's padding slot:
        a first request would wait seconds for them.

        Args:
            num_keys: prompt lengths, one on each side of what kernels are compiled for.
            num_new: likewise, new tokens behind compacted rows.
        """
        pool, layers = self.token_to_kv_pool, self.token_to_kv_pool.layer_num
        for n in num_keys:
            q, slots = self._zero_queries(16), self._zeros(n)
            for reduce in ("sum", "max"):
                post_vision_scores(q, pool.get_key_buffer(0), 1.0, reduce=reduce, slots=slots)
            scores = self._zeros(layers, pool.head_num, n, dtype=torch.float32)
            kept = select_rows(scores, scores.to(torch.int8), [1] * layers)
            for merge in (False, True):
                prompt = pool.k_cells, pool.v_cells, slots.long(), kept, [1] * layers
                rows = gather_rows(*prompt, pool.cells_per_layer, merge=merge)
        scatter_rows(pool.k_cells, pool.v_cells, self._zeros(rows.shape[1]), rows)
        for count in num_new:
            ends = [0, count]
            lists = torch.tensor([ends] * (layers + 1), dtype=torch.int32, device=pool.device)
            self.plan_extend([count], [[count] * layers])
            q = self._zero_queries(count)
            extends = Extends(lists[0], lists[1:], self._zeros(count), count)
            self.extend(0, q, extends, 1.0, torch.empty_like(q))
        self._warm_up_decode()

    def _warm_up_decode(self) -> None:
        """Steps of more requests than CUDA graphs were captured of, one for each number of lanes."""
        pool, most, size = self.token_to_kv_pool, self._indices.max_requests, 1
        while size <= most:
            size = min(lanes(size), most)
            batch = SimpleNamespace(
                req_pool_indices=self._zeros(size, dtype=torch.int64),
                seq_lens=self._zeros(size, dtype=torch.int64) + 1,
            )
            lists = self._build(self._indices, batch)
            self._kernel.plan(lists[0])
            q = self._zero_queries(size)
            self._kernel.run(0, q, pool.k_cells, pool.v_cells, *lists, 1.0, torch.empty_like(q))
            size += 1

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.token_to_kv_pool.device)

    def _zero_queries(self, count: int) -> torch.Tensor:
        num_q_heads, dtype = self._queries
        return self._zeros(count, num_q_heads, self.token_to_kv_pool.head_dim, dtype=dtype)

    # ---- Attention ----

    def forward_decode(
        self, q, k, v, layer: RadixAttention, forward_batch: ForwardBatch, save_kv_cache=True, **others
    ):
        self._refuse(layer, others)
        q_heads, out = heads(q, layer), torch.empty_like(q, memory_format=torch.contiguous_format)
        if save_kv_cache:
            self._write(layer, forward_batch, k, v)
        cells = self.token_to_kv_pool.k_cells, self.token_to_kv_pool.v_cells
        self._kernel.run(layer.layer_id, q_heads, *cells, *self._lists, layer.scaling, heads(out, layer))
        if self._capturing and self._replayed is not None:
            self._replayed[layer.layer_id, : len(q_heads)] = q_heads
        else:
            self._keep_drafted(layer.layer_id, q_heads)
        return out

    def _keep_drafted(self, layer: int, q: torch.Tensor) -> None:
        for query, state in self._drafting:
            state.drafted.setdefault(layer, []).append(q[query : query + 1].clone())

    def forward_extend(
        self, q, k, v, layer: RadixAttention, forward_batch: ForwardBatch, save_kv_cache=True, **others
    ):
        q_heads = heads(q.contiguous(), layer)
        if self._extends is None:
            out = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **others)
        else:
            self._refuse(layer, others)
            out = torch.empty_like(q)
            if save_kv_cache:
                self._write(layer, forward_batch, k, v)
            self.extend(layer.layer_id, q_heads, self._extends, layer.scaling, heads(out, layer))
        score(self._chunks, layer, q_heads, self.token_to_kv_pool, self.rope)
        self._keep_drafted(layer.layer_id, q_heads)
        return out

    def _write(self, layer: RadixAttention, forward_batch: ForwardBatch, k, v) -> None:
        if k is not None and v is not None:
            location = KVWriteLoc.for_batch(forward_batch)
            self.token_to_kv_pool.set_kv_buffer(layer, location, k, v)

    @staticmethod
    def _refuse(layer: RadixAttention, others: dict) -> None:
        asked = [name for name, value in others.items() if value is not None]
        if layer.logit_cap:
            asked.append(f"logit_cap {layer.logit_cap}")
        if asked:
            raise NotImplementedError(
                f"attention over compacted rows knows no {', '.join(asked)}, which this model asks for; "
                "serve it with --kv-policy none"
            )
