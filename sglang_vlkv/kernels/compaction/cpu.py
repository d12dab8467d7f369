"""Vectorised torch; what a CPU server runs."""

from __future__ import annotations

from typing import Sequence

import torch

TILE_ELEMENTS = 1 << 22  # float32 elements of rows to be merged alive at once: 16 MiB


def gather_rows(
    k_cells: torch.Tensor,
    v_cells: torch.Tensor,
    slots: torch.Tensor,
    kept: torch.Tensor,
    num_kept: Sequence[int],
    cells_per_layer: int,
    merge: bool = False,
    sink_tokens: int = 0,
) -> torch.Tensor:
    """Collects all layers' kept rows: row i of layer l of head h is cell
    ``l * cells_per_layer + slots[kept[h, i]]``.

    Merging (Elastic Cache, arXiv 2407.18121) makes it the mean of its bucket: the positions that no
    other kept row of its layer and head is nearer to, an exact midpoint going to the lower row. A
    sink (the first ``sink_tokens`` positions) and the last position take nothing in; what is nearest
    to them is lost.

    Args:
        k_cells, v_cells: ``[num_cells, H, D]``; the same id addresses a row's K and V.
        slots: of the prompt, ``[n]`` integer.
        kept: positions, ``[H, T]`` int64: layer after layer, ascending within each.
        num_kept: per layer, how many of the ``T = sum(num_kept)`` are its.
        cells_per_layer: from a slot's cell in one layer to that in the next.

    Returns:
        ``[2, T, H, D]``, K and V, a copy. Means are taken in float32; a bucket of one row is that
        row to the bit.

    Raises:
        ValueError: shapes that do not go together.
    """
    check_gather(k_cells, v_cells, slots, kept, num_kept)
    num_heads, num_rows = kept.shape
    heads = torch.arange(num_heads, device=k_cells.device)
    rows = k_cells.new_empty(2, num_rows, num_heads, k_cells.shape[2])
    first = 0
    for layer, count in enumerate(num_kept):
        own = slice(first, first + count)
        cells = slots.long() + layer * cells_per_layer
        if merge and count:
            bucket = _buckets(kept[:, own], len(slots), sink_tokens)
        for into, x in zip(rows, (k_cells, v_cells), strict=True):
            torch.index_select(
                x.flatten(0, 1), 0, (cells[kept[:, own].t()] * num_heads + heads).flatten(),
                out=into[own].flatten(0, 1),
            )  # fmt: skip
            if merge and count:
                into[own] = bucket_means(x, cells, bucket, into[own])
        first += count
    return rows


def _buckets(kept: torch.Tensor, n: int, sink_tokens: int) -> torch.Tensor:
    """Which kept row every position belongs to, ``[H, n]`` int64, -1 for those that are lost."""
    positions = torch.arange(n, device=kept.device).repeat(len(kept), 1)
    right = torch.searchsorted(kept.contiguous(), positions).clamp_max(kept.shape[1] - 1)
    left = (right - 1).clamp_min(0)
    from_left = (positions - kept.gather(1, left)).abs()
    from_right = (positions - kept.gather(1, right)).abs()
    nearest = torch.where(from_left <= from_right, left, right)
    closed = (kept < sink_tokens) | (kept == n - 1)
    nearest.masked_fill_(closed.gather(1, nearest), -1)
    return nearest.scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))


def bucket_means(
    x: torch.Tensor, cells: torch.Tensor, bucket: torch.Tensor, own: torch.Tensor
) -> torch.Tensor:
    """Means of the rows of each bucket, taken in float32.

    Args:
        x: ``[num_cells, H, D]``.
        cells: of the rows, ``[n]`` int64.
        bucket: which of k each row is in, ``[H, n]`` int64 in [-1, k); -1 is in none.
        own: the row that a bucket of one row is, ``[k, H, D]``.

    Returns:
        ``[k, H, D]`` in x's dtype.
    """
    count, num_heads, _ = own.shape
    bases = torch.arange(num_heads, device=x.device) * (count + 1)
    at = bases + bucket.t().remainder(count + 1)  # [n, H]; -1 becomes a bucket that nobody reads
    sums = torch.zeros(num_heads * (count + 1), x.shape[2], device=x.device)
    step = max(1, TILE_ELEMENTS // x[0].numel())
    for start in range(0, len(cells), step):
        tile = x[cells[start : start + step]].float()  # [step, H, D]
        sums.index_add_(0, at[start : start + step].flatten(), tile.flatten(0, 1))
    sizes = torch.bincount(at.flatten(), minlength=len(sums))
    means = (sums / sizes.clamp_min(1)[:, None]).to(x.dtype).view(num_heads, count + 1, -1)
    alone = (sizes == 1).view(num_heads, count + 1, 1)
    return torch.where(alone[:, :count].transpose(0, 1), own, means[:, :count].transpose(0, 1))


def scatter_rows(
    k_cells: torch.Tensor, v_cells: torch.Tensor, cells: torch.Tensor, rows: torch.Tensor
) -> None:
    """Writes rows to cells: ``k_cells[cells[i]] = rows[0, i]``, and V alike.

    Args:
        k_cells, v_cells: ``[num_cells, H, D]``, written in place.
        cells: ``[T]`` integer, all different.
        rows: ``[2, T, H, D]``.

    Raises:
        ValueError: shapes that do not go together.
    """
    check_scatter(k_cells, v_cells, cells, rows)
    k_cells.index_copy_(0, cells.long(), rows[0])
    v_cells.index_copy_(0, cells.long(), rows[1])


def check_gather(k_cells, v_cells, slots, kept, num_kept) -> None:
    """Raises ValueError as :func:`gather_rows` says."""
    _check_cells(k_cells, v_cells)
    if slots.dim() != 1 or kept.dim() != 2 or len(kept) != k_cells.shape[1] or kept.shape[1] != sum(num_kept):
        given = f"slots {list(slots.shape)}, kept {list(kept.shape)} and num_kept of sum {sum(num_kept)}"
        raise ValueError(f"{given}; [n], [H, T] and T needed, with H = {k_cells.shape[1]}")


def check_scatter(k_cells, v_cells, cells, rows) -> None:
    """Raises ValueError as :func:`scatter_rows` says."""
    _check_cells(k_cells, v_cells)
    if cells.dim() != 1 or rows.shape != (2, len(cells), *k_cells.shape[1:]) or rows.dtype != k_cells.dtype:
        given = f"{list(cells.shape)} cells and {rows.dtype} rows {list(rows.shape)}"
        raise ValueError(f"{given}; [T] and {k_cells.dtype} [2, T, {', '.join(map(str, k_cells.shape[1:]))}] needed")


def _check_cells(k_cells, v_cells) -> None:
    if k_cells.dim() != 3 or v_cells.shape != k_cells.shape or v_cells.dtype != k_cells.dtype:
        given = f"k_cells are {list(k_cells.shape)} {k_cells.dtype} and v_cells {list(v_cells.shape)} {v_cells.dtype}"
        raise ValueError(f"{given}; [num_cells, H, D] of one type needed")
