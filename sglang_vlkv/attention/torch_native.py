"""The ragged counterpart of SGLang's ``torch_native`` attention backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Sequence

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_vlkv.attention.rotary import find_rope
from sglang_vlkv.attention.scoring import Chunk, Extend, chunk_of, extends_of, heads, score
from sglang_vlkv.cache.requests import RequestState
from sglang_vlkv.kernels.ragged_attention import causal_extend, ragged_decode

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class Prefill(NamedTuple):
    """What an extend sees beside its own tokens.

    Attributes:
        cells: per layer, the cells of the twin that it goes on from; None where all is exact.
        first_own: tokens from this position on have slots of their own.
    """

    extend: Extend
    cells: list[torch.Tensor] | None = None
    first_own: int = 0


class Decode(NamedTuple):
    """A request's newest token, query ``offset``, which sees ``cells`` and then ``slots``.

    Attributes:
        cells: per layer, the compacted prompt's cells; None where the prompt is exact.
        slots: every token that has its own slot, ``[tokens]`` int32.
        sliding: per layer, how many of the last ``slots`` it sees; empty where it sees all.
        draft: the request's state where its queries are to be left as a draft.
    """

    offset: int
    cells: list[torch.Tensor] | None
    slots: torch.Tensor
    sliding: Sequence[int] = ()
    draft: RequestState | None = None

    def indices(self, layer: int, base: int) -> torch.Tensor:
        """Cell ids of what the token sees in ``layer``; ``base`` is the cell of slot 0 there."""
        seen = self.slots[-self.sliding[layer] :] if self.sliding else self.slots
        own = seen + base
        return own if self.cells is None else torch.cat([self.cells[layer], own])


@dataclass
class Work:
    """What one forward pass has to do, found once and used by every layer."""

    prefills: list[Prefill] = field(default_factory=list)
    decodes: list[Decode] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)


class RaggedTorchNativeBackend(TorchNativeAttnBackend):
    """Prefill as in SGLang, scoring on the way; decode from per-layer ragged rows.

    A prompt without a cached prefix makes the very attention call of SGLang's backend. Behind a
    prefix only the new rows are computed, where SGLang's backend computes all.

    Attributes:
        rope: the model's rotary embedding, None where none is known.
    """

    def __init__(self, model_runner) -> None:
        super().__init__(model_runner)
        self.rope = find_rope(model_runner.model)
        self._work = Work()
        self._workspace = torch.empty(0)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        self._work = Work()
        if forward_batch.forward_mode.is_decode():
            rows, lengths = forward_batch.req_pool_indices.tolist(), forward_batch.seq_lens.tolist()
            for offset, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                self._work.decodes.append(self._decode(row, length, offset))
        elif forward_batch.forward_mode.is_extend():
            for extend in extends_of(forward_batch):
                self._add(extend)

    def _decode(self, row: int, length: int, offset: int) -> Decode:
        state = self.token_to_kv_pool.requests.at_row(row)
        slots = self.req_to_token_pool.req_to_token[row, :length]
        if state is None or state.cells is None:
            return Decode(offset, None, slots)
        first = length - max(state.sliding) if state.sliding else state.first_own
        # The last token of a prompt whose rows are there is no output.
        draft = state if state.plan.writes_draft and length > state.asked.end else None
        return Decode(offset, state.cells, slots[first:], state.sliding, draft)

    def _add(self, extend: Extend) -> None:
        state = self.token_to_kv_pool.requests.at_row(extend.row)
        prefill = Prefill(extend)
        if state is not None and state.cells is not None:
            if not state.pending and extend.end - extend.start == 1:
                # It decodes and rides a mixed batch, or has one token to go on from its twin.
                self._work.decodes.append(self._decode(extend.row, extend.end, extend.offset))
                return
            prefill = Prefill(extend, state.cells, state.first_own)
        self._work.prefills.append(prefill)
        chunk = chunk_of(extend, self.token_to_kv_pool, self.req_to_token_pool.req_to_token)
        if chunk is not None:
            self._work.chunks.append(chunk)

    def forward_decode(
        self, q, k, v, layer: RadixAttention, forward_batch: ForwardBatch, save_kv_cache=True
    ):
        out = torch.empty_like(q)
        if save_kv_cache:
            self._write(layer, forward_batch, k, v)
        self._ragged_decode(layer, heads(q, layer), heads(out, layer))
        return out

    def forward_extend(
        self, q, k, v, layer: RadixAttention, forward_batch: ForwardBatch, save_kv_cache=True
    ):
        out = torch.empty_like(q)
        if save_kv_cache:
            self._write(layer, forward_batch, k, v)
        q_heads, out_heads = heads(q, layer), heads(out, layer)
        for prefill in self._work.prefills:
            k, v = self._rows(prefill, layer.layer_id)
            extend = prefill.extend
            queries = slice(extend.offset, extend.offset + extend.end - extend.start)
            out_heads[queries] = causal_extend(q_heads[queries], k.to(q.dtype), v.to(q.dtype), layer.scaling)
        if self._work.decodes:
            offsets = torch.tensor([decode.offset for decode in self._work.decodes])
            queries = q_heads[offsets]
            attended = torch.empty_like(queries)
            self._ragged_decode(layer, queries, attended)
            out_heads[offsets] = attended
        score(self._work.chunks, layer, q_heads, self.token_to_kv_pool, self.rope)
        return out

    def _rows(self, prefill: Prefill, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V ``[rows, H, D]`` that the request's new tokens see, their own at the end."""
        pool, extend = self.token_to_kv_pool, prefill.extend
        own = self.req_to_token_pool.req_to_token[extend.row, prefill.first_own : extend.end]
        if prefill.cells is None:
            return pool.get_key_buffer(layer)[own], pool.get_value_buffer(layer)[own]
        cells = torch.cat([prefill.cells[layer], own + layer * pool.cells_per_layer])
        return pool.k_cells[cells], pool.v_cells[cells]

    def _write(self, layer: RadixAttention, forward_batch: ForwardBatch, k, v) -> None:
        if k is not None and v is not None:
            location = KVWriteLoc(forward_batch.out_cache_loc, None)
            self.token_to_kv_pool.set_kv_buffer(layer, location, k, v)

    def _ragged_decode(self, layer: RadixAttention, q: torch.Tensor, out: torch.Tensor) -> None:
        """Query i is that of the i-th decode: ``q`` and ``out`` are ``[decodes, Hq, D]``."""
        pool = self.token_to_kv_pool
        base = layer.layer_id * pool.cells_per_layer
        indices = [decode.indices(layer.layer_id, base) for decode in self._work.decodes]
        workspace = self._workspace_of(max(len(cells) for cells in indices))
        ragged_decode(q, pool.k_cells, pool.v_cells, indices, layer.scaling, out, workspace)
        for query, decode in enumerate(self._work.decodes):
            if decode.draft is not None:
                decode.draft.drafted.setdefault(layer.layer_id, []).append(q[query : query + 1].clone())

    def _workspace_of(self, rows: int) -> torch.Tensor:
        """At least ``rows`` rows of K and V; grows by half, so seldom."""
        if self._workspace.numel() == 0 or self._workspace.shape[1] < rows:
            cells = self.token_to_kv_pool.k_cells
            self._workspace = cells.new_empty(2, rows + rows // 2, *cells.shape[1:])
        return self._workspace
