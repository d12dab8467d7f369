"""Obvious float32 loops, for tests."""

from __future__ import annotations

import torch

from sglang_vlkv.kernels.ragged_attention.rows import RowTable


def ragged_decode(
    q: torch.Tensor,
    k_cells: torch.Tensor,
    v_cells: torch.Tensor,
    indices: list[torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """See the CPU version."""
    num_requests, num_q_heads, _ = q.shape
    group = num_q_heads // k_cells.shape[1]
    out = torch.empty_like(q, dtype=torch.float32)
    for request in range(num_requests):
        for head in range(num_q_heads):
            cells = indices[request].long()
            logits = k_cells[cells, head // group].float() @ q[request, head].float() * scale
            out[request, head] = torch.softmax(logits, 0) @ v_cells[cells, head // group].float()
    return out


def build_indices(
    table: RowTable,
    fixed_cells: list[torch.Tensor | None],
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    req_to_token: torch.Tensor,
    cells_per_layer: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``RaggedIndices.build``; ``fixed_cells`` holds, per row, what ``table.cells`` points to."""
    indptr, indices = [], []
    for layer in range(table.fixed.shape[1] - 1):
        starts = [len(indices)]
        for row, seq_len in zip(rows.tolist(), seq_lens.tolist(), strict=True):
            own = seq_len - int(table.first_own[row])
            fixed, sliding = table.fixed[row].tolist(), table.sliding[row].tolist()
            if own > 0:
                for i in range(fixed[layer], fixed[layer + 1]):
                    indices.append(int(fixed_cells[row][i]))
                seen = sliding[layer + 1] - sliding[layer] if sliding[-1] > 0 else own
                for position in range(seq_len - seen, seq_len):
                    indices.append(layer * cells_per_layer + int(req_to_token[row, position]))
            starts.append(len(indices))
        indptr.append(starts)
    return torch.tensor(indptr, dtype=torch.int32), torch.tensor(indices, dtype=torch.int32)


def plan_chunks(lengths: list[int], tile: int, max_chunks: int) -> list[tuple[int, int, int]]:
    """See ``RaggedDecode.plan``: one layer's chunks as (request, first row, end)."""
    size = tile
    while sum(-(-length // size) for length in lengths) > max_chunks:
        size += tile
    return [
        (request, start, min(start + size, length))
        for request, length in enumerate(lengths)
        for start in range(0, length, size)
    ]


def ragged_extend(
    q: torch.Tensor,
    k_cells: torch.Tensor,
    v_cells: torch.Tensor,
    qo_indptr: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """See the Triton version; requests without rows are left at zero."""
    group = q.shape[1] // k_cells.shape[1]
    out = torch.zeros_like(q, dtype=torch.float32)
    for request in range(len(qo_indptr) - 1):
        first, end = qo_indptr[request : request + 2].tolist()
        cells = indices[indptr[request] : indptr[request + 1]].long()
        for query in range(first, end):
            seen = cells[: len(cells) - (end - 1 - query)]
            for head in range(q.shape[1] if len(seen) else 0):
                logits = k_cells[seen, head // group].float() @ q[query, head].float() * scale
                out[query, head] = torch.softmax(logits, 0) @ v_cells[seen, head // group].float()
    return out
