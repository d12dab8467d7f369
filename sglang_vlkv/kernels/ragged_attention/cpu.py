"""Vectorised torch; what a CPU server runs."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def ragged_decode(
    q: torch.Tensor,
    k_cells: torch.Tensor,
    v_cells: torch.Tensor,
    indices: list[torch.Tensor],
    scale: float,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query token per request attends to that request's cells.

    Args:
        q: ``[B, Hq, D]``.
        k_cells, v_cells: ``[num_cells, Hkv, D]``; the same id addresses a row's K and V.
        indices: per request, its cell ids ``[num_rows]`` integer, at least one. A list, not one
            flat array with an ``indptr``: torch reads it request by request, and a request's
            compacted part is the same tensor at every step.
        out: ``[B, Hq, D]`` to write to.
        workspace: ``[2, rows, Hkv, D]`` in the cells' dtype, overwritten, with at least as many
            rows as the longest request. Memory that is used again spares its page faults, which
            for long requests cost more than the copy.

    Returns:
        ``[B, Hq, D]`` in q's dtype.
    """
    num_requests, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cells.shape[1]
    out = torch.empty_like(q) if out is None else out
    # The query heads of a KV head are its query rows: [B, 1, Hkv, G, D], nothing is repeated.
    q = q.view(num_requests, 1, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    if workspace is None:
        longest = max(len(cells) for cells in indices)
        workspace = k_cells.new_empty(2, longest, num_kv_heads, head_dim)
    for request, cells in enumerate(indices):
        k, v = workspace[:, : len(cells)]
        torch.index_select(k_cells, 0, cells, out=k)
        torch.index_select(v_cells, 0, cells, out=v)
        k, v = (x.to(q.dtype).transpose(0, 1)[None] for x in (k, v))  # [1, Hkv, rows, D]
        attended = scaled_dot_product_attention(q[request], k, v, scale=scale)
        out[request] = attended.view(num_q_heads, head_dim)
    return out


EXTEND_ROWS = 256  # query rows at a time: bounds the mask to 256 * G x n entries


def causal_extend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The last E of n tokens attend causally to all n.

    Args:
        q: ``[E, Hq, D]``.
        k, v: ``[n, Hkv, D]``.

    Returns:
        ``[E, Hq, D]``.
    """
    num_queries, num_q_heads, head_dim = q.shape
    num_keys, num_kv_heads, _ = k.shape
    group = num_q_heads // num_kv_heads
    k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]  # [1, Hkv, n, D]
    if num_queries == num_keys:
        # The very call of SGLang's torch_native backend, so that results are equal to the bit.
        q = q.transpose(0, 1)[None]
        options = dict(scale=scale, is_causal=True, enable_gqa=group > 1)
        return scaled_dot_product_attention(q, k, v, **options)[0].transpose(0, 1)
    out = torch.empty_like(q)
    for start in range(0, num_queries, EXTEND_ROWS):
        rows = q[start : start + EXTEND_ROWS]
        end = num_keys - num_queries + start + len(rows)  # keys that the tile's last row sees
        # [rows, Hkv, G, D] -> [1, Hkv, rows * G, D]
        tile = rows.view(len(rows), num_kv_heads, group, head_dim).transpose(0, 1)
        visible = torch.ones(len(rows), end, dtype=torch.bool).tril(end - len(rows))
        attended = scaled_dot_product_attention(
            tile.reshape(1, num_kv_heads, -1, head_dim),
            k[:, :, :end],
            v[:, :, :end],
            attn_mask=visible.repeat_interleave(group, dim=0).to(q.device),
            scale=scale,
        )
        attended = attended.view(num_kv_heads, len(rows), group, head_dim).transpose(0, 1)
        out[start : start + len(rows)] = attended.reshape(len(rows), num_q_heads, head_dim)
    return out
