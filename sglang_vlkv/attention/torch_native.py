"""The ragged counterpart of SGLang's ``torch_native`` attention backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_vlkv.base import Modality, Policy
from sglang_vlkv.kernels.ragged_attention import causal_extend, ragged_decode
from sglang_vlkv.requests import RequestState

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class Extend(NamedTuple):
    """A request that prefills ``[start, end)`` of its sequence; its queries begin at ``offset``."""

    row: int
    start: int
    end: int
    offset: int


class Decode(NamedTuple):
    """A request's newest token, query ``offset``, which sees ``cells`` and then ``slots``.

    Attributes:
        cells: per layer, the compacted prompt's cells; None where the prompt is exact.
        slots: every token that has its own slot, ``[tokens]`` int32.
    """

    offset: int
    cells: list[torch.Tensor] | None
    slots: torch.Tensor

    def indices(self, layer: int, base: int) -> torch.Tensor:
        """Cell ids of what the token sees in ``layer``; ``base`` is the cell of slot 0 there."""
        own = self.slots + base
        return own if self.cells is None else torch.cat([self.cells[layer], own])


class Vote(NamedTuple):
    """The voting rows among a request's queries: ``q[start:end]``.

    Attributes:
        keys: the whole prompt's slots ``[n]`` where its last chunk runs, else None.
    """

    state: RequestState
    start: int
    end: int
    keys: torch.Tensor | None


@dataclass
class Work:
    """What one forward pass has to do, found once and used by every layer."""

    extends: list[Extend] = field(default_factory=list)
    decodes: list[Decode] = field(default_factory=list)
    votes: list[Vote] = field(default_factory=list)


class RaggedTorchNativeBackend(TorchNativeAttnBackend):
    """Prefill as in SGLang, scoring on the way; decode from per-layer ragged rows.

    A prompt without a cached prefix makes the very attention call of SGLang's backend. Behind a
    prefix only the new rows are computed, where SGLang's backend computes all.
    """

    def __init__(self, model_runner, policy: Policy) -> None:
        super().__init__(model_runner)
        self._policy = policy
        self._work = Work()
        self._workspace = torch.empty(0)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        self._work = Work()
        rows = forward_batch.req_pool_indices.tolist()
        if forward_batch.forward_mode.is_decode():
            lengths = forward_batch.seq_lens.tolist()
            for offset, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                self._work.decodes.append(self._decode(row, length, offset))
            self.token_to_kv_pool.tags[forward_batch.out_cache_loc] = Modality.TEXT
        elif forward_batch.forward_mode.is_extend():
            offset = 0
            starts, lengths = forward_batch.extend_prefix_lens, forward_batch.extend_seq_lens
            for row, start, length in zip(rows, starts.tolist(), lengths.tolist(), strict=True):
                self._add_extend(Extend(row, start, start + length, offset))
                offset += length

    def _decode(self, row: int, length: int, offset: int) -> Decode:
        state = self.token_to_kv_pool.requests.at_row(row)
        slots = self.req_to_token_pool.req_to_token[row, :length]
        if state is None or state.cells is None:
            return Decode(offset, None, slots)
        return Decode(offset, state.cells, slots[state.plan.prompt.num_tokens :])

    def _add_extend(self, extend: Extend) -> None:
        state = self.token_to_kv_pool.requests.at_row(extend.row)
        if state is not None and state.cells is not None:
            # A decoding request that rides a mixed batch.
            self._work.decodes.append(self._decode(extend.row, extend.end, extend.offset))
            return
        self._work.extends.append(extend)
        if state is None or not state.pending:
            return
        n = state.plan.prompt.num_tokens
        first = max(extend.start, state.plan.first_voting)
        last = min(extend.end, n)
        if first < last:
            keys = self.req_to_token_pool.req_to_token[extend.row, :n] if last == n else None
            shift = extend.offset - extend.start
            self._work.votes.append(Vote(state, first + shift, last + shift, keys))

    def forward_decode(
        self, q, k, v, layer: RadixAttention, forward_batch: ForwardBatch, save_kv_cache=True
    ):
        out = torch.empty_like(q)
        if save_kv_cache:
            self._write(layer, forward_batch, k, v)
        self._ragged_decode(layer, _heads(q, layer), _heads(out, layer))
        return out

    def forward_extend(
        self, q, k, v, layer: RadixAttention, forward_batch: ForwardBatch, save_kv_cache=True
    ):
        out = torch.empty_like(q)
        if save_kv_cache:
            self._write(layer, forward_batch, k, v)
        q_heads, out_heads = _heads(q, layer), _heads(out, layer)
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        for extend in self._work.extends:
            slots = self.req_to_token_pool.req_to_token[extend.row, : extend.end]
            queries = slice(extend.offset, extend.offset + extend.end - extend.start)
            out_heads[queries] = causal_extend(
                q_heads[queries], keys[slots].to(q.dtype), values[slots].to(q.dtype), layer.scaling
            )
        if self._work.decodes:
            offsets = torch.tensor([decode.offset for decode in self._work.decodes])
            queries = q_heads[offsets]
            attended = torch.empty_like(queries)
            self._ragged_decode(layer, queries, attended)
            out_heads[offsets] = attended
        self._score(layer, q_heads, keys)
        return out

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

    def _workspace_of(self, rows: int) -> torch.Tensor:
        """At least ``rows`` rows of K and V; grows by half, so seldom."""
        if self._workspace.numel() == 0 or self._workspace.shape[1] < rows:
            cells = self.token_to_kv_pool.k_cells
            self._workspace = cells.new_empty(2, rows + rows // 2, *cells.shape[1:])
        return self._workspace

    def _score(self, layer: RadixAttention, q: torch.Tensor, keys: torch.Tensor) -> None:
        for vote in self._work.votes:
            pieces = vote.state.queries.setdefault(layer.layer_id, [])
            pieces.append(q[vote.start : vote.end].clone())
            if vote.keys is not None:
                queries = torch.cat(vote.state.queries.pop(layer.layer_id))
                scores = self._policy.score(queries, keys[vote.keys], layer.scaling)
                vote.state.scores[layer.layer_id] = scores


def _heads(x: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
    """``[tokens, Hq * D]`` or ``[tokens, Hq, D]`` as ``[tokens, Hq, D]``, sharing memory."""
    return x.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
