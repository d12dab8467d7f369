"""What policies see of a prefill, whichever attention backend computes it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Iterator, NamedTuple

import torch

from sglang_vlkv.cache.requests import RequestState
from sglang_vlkv.stages.layer import Layer, Rows

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_vlkv.cache.pool import CellPool
    from sglang_vlkv.stages.rope import Rope


class Extend(NamedTuple):
    """A request that prefills ``[start, end)`` of its sequence; its queries begin at ``offset``."""

    row: int
    start: int
    end: int
    offset: int


def extends_of(batch: ForwardBatch) -> Iterator[Extend]:
    """The requests of an extend batch, from what it holds on the host."""
    rows = batch.req_pool_indices if batch.req_pool_indices_cpu is None else batch.req_pool_indices_cpu
    offset = 0
    lengths = zip(_on_host(batch, "extend_prefix_lens"), _on_host(batch, "extend_seq_lens"))
    for row, (start, length) in zip(rows.tolist(), lengths, strict=True):
        yield Extend(row, start, start + length, offset)
        offset += length


def _on_host(batch: ForwardBatch, name: str) -> list[int]:
    known = getattr(batch, f"{name}_cpu")
    return getattr(batch, name).tolist() if known is None else list(known)


class Chunk(NamedTuple):
    """The prompt positions among a request's queries, where its policy looks at them.

    Attributes:
        queries: which queries of the batch are the chunk's, prompt positions only.
        votes: which of them are voting rows; may be empty.
        slots: of what competes, up to the chunk's end, ``[positions]``.
        is_last: the chunk ends the prompt.
    """

    state: RequestState
    queries: slice
    votes: slice
    slots: torch.Tensor
    is_last: bool


def chunk_of(extend: Extend, pool: CellPool, req_to_token: torch.Tensor) -> Chunk | None:
    """What ``extend`` shows to its request's policy; None where that is nothing."""
    state = pool.requests.at_row(extend.row)
    if state is None or not state.pending:
        return None
    n = state.plan.end
    end = min(extend.end, n)  # outputs of a retracted request do not vote
    if extend.start >= end:
        return None
    shift = extend.offset - extend.start
    first_voting = min(max(extend.start, state.plan.first_voting), end)
    if not (state.plan.policy.observes or first_voting < end):
        return None
    return Chunk(
        state,
        queries=slice(extend.start + shift, end + shift),
        votes=slice(first_voting + shift, end + shift),
        slots=req_to_token[extend.row, state.plan.start : end],
        is_last=end == n,
    )


def score(
    chunks: list[Chunk], layer: RadixAttention, q: torch.Tensor, pool: CellPool, rope: Rope | None
) -> None:
    """Shows the chunks of one layer to their policies, which score a prompt at its last chunk.

    Args:
        q: the batch's queries after RoPE, ``[tokens, Hq, D]``.
    """
    index = layer.layer_id
    keys, values = pool.get_key_buffer(index), pool.get_value_buffer(index)
    for chunk in chunks:
        state, policy = chunk.state, chunk.state.plan.policy
        state.queries.setdefault(index, []).append(q[chunk.votes].clone())
        if not (policy.observes or chunk.is_last):
            continue
        prompt_layer = Layer(
            prompt=state.plan.prompt,
            q=q[chunk.queries],
            keys=Rows(keys, chunk.slots),
            values=Rows(values, chunk.slots),
            scale=layer.scaling,
            index=index,
            rope=rope,
        )
        if policy.observes:
            state.seen[index] = policy.observe(state.seen.get(index), prompt_layer)
        if chunk.is_last:
            voting = torch.cat(state.queries.pop(index))
            seen = state.seen.pop(index, None)
            voted, drafts = pool.requests.draft_for(state)
            prompt_layer = replace(prompt_layer, q=voting, seen=seen, draft=drafts.get(index))
            state.scores[index] = policy.score(prompt_layer)
            state.voted = voted


def heads(x: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
    """``[tokens, Hq * D]`` or ``[tokens, Hq, D]`` as ``[tokens, Hq, D]``, sharing memory."""
    return x.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
