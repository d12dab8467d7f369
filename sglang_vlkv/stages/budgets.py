"""Splitting a budget over layers: counts in, counts out."""

from __future__ import annotations

import math

import torch


def least(total: int, num_layers: int, num_prompt: int) -> int:
    """Rows that no layer goes below: one in a hundred, where the total allows it."""
    return min(max(1, math.ceil(num_prompt / 100)), total // num_layers)


def proportional(weights: list[float], total: int, num_prompt: int) -> list[int]:
    """Splits exactly ``total`` rows over the layers in proportion to ``weights``.

    The real-valued shares are ``clamp(t * w, lo, n)`` with the one t at which they sum to
    ``total`` and ``lo = min(max(1, ceil(n / 100)), total // L)``. They are floored, and what is
    missing goes to the largest fractions, ties to the lower layer, never past n.

    Args:
        weights: one per layer, >= 0.
        total: rows to give out, in [L, n * L].
        num_prompt: n, the most that a layer can keep.

    Returns:
        Rows per layer; their sum is ``total``.

    Raises:
        ValueError: ``total`` is outside its range.
    """
    num_layers, n = len(weights), num_prompt
    if not num_layers <= total <= n * num_layers:
        raise ValueError(
            f"{total} rows cannot be split over {num_layers} layers of {n} tokens; "
            f"at least {num_layers} and at most {n * num_layers} can"
        )
    low = least(total, num_layers, n)
    # A layer of weight zero would never reach n, which a total near n * L needs.
    tiny = max(weights) * 1e-9 or 1.0
    weights = [max(w, tiny) for w in weights]

    shares = _clamped_shares(weights, float(total), float(low), float(n))
    kept = [min(math.floor(s), n) for s in shares]
    order = sorted(range(num_layers), key=lambda layer: (kept[layer] - shares[layer], layer))
    missing = total - sum(kept)
    while missing > 0:
        for layer in order:
            if missing and kept[layer] < n:
                kept[layer] += 1
                missing -= 1
    while missing < 0:  # float error made the floors sum to more
        for layer in reversed(order):
            if missing and kept[layer] > low:
                kept[layer] -= 1
                missing += 1
    return kept


def _clamped_shares(weights: list[float], total: float, low: float, high: float) -> list[float]:
    """``clamp(t * w, low, high)`` for the t at which the sum is ``total``.

    The sum is piecewise linear and increasing in t; its corners are where a layer leaves ``low``
    or reaches ``high``, so t is interpolated between the two corners around ``total``.
    """

    def at(t: float) -> list[float]:
        return [min(max(t * w, low), high) for w in weights]

    corners = sorted(bound / w for w in weights for bound in (low, high))
    before = 0.0
    for corner in corners:
        if sum(at(corner)) >= total:
            break
        before = corner
    middle = (before + corner) / 2
    slope = sum(w for w in weights if low < middle * w < high)
    return at(before + (total - sum(at(before))) / slope if slope else corner)


def cumulative(importance: list[torch.Tensor], total: int) -> list[int]:
    """Splits exactly ``total`` rows so that all layers cover the same share of their importance.

    Every layer takes its keys best first; the next row goes to the layer whose keys so far cover
    the smallest share of its sum, ties to the lower layer, and no layer goes below :func:`least`.

    Args:
        importance: per layer, one number >= 0 per key, ``[n]``.
        total: rows to give out, in [L, n * L].

    Returns:
        Rows per layer; their sum is ``total``.
    """
    num_layers, n = len(importance), len(importance[0])
    covered = []
    for layer in importance:
        best_first = layer.double().sort(descending=True).values
        before = best_first.cumsum(0) - best_first  # share covered before each row is taken
        covered.append(before / best_first.sum().clamp_min(1e-300))
    covered = torch.stack(covered)
    covered[:, : least(total, num_layers, n)] = -1.0
    taken = covered.flatten().sort(stable=True).indices[:total] // n
    return torch.bincount(taken, minlength=num_layers).tolist()


def clipped(weights: list[float], budget: float, num_prompt: int) -> list[int]:
    """VL-Cache's own split: ``clip(w / sum(w) * budget * L, 0.01, 1)`` of each layer.

    Nothing is renormalised after the clip, so the sum follows the data, up to
    :func:`clipped_bound`.

    Returns:
        Rows per layer, each at least 1.
    """
    scale = budget * len(weights) / (sum(weights) or 1.0)
    shares = [min(max(w * scale, 0.01), 1.0) for w in weights]
    return [max(1, math.floor(s * num_prompt)) for s in shares]


def clipped_bound(budget: float, num_prompt: int, num_layers: int) -> int:
    """Most rows that :func:`clipped` can give out: every clip from below adds at most 1%."""
    bound = math.ceil(budget * num_prompt * num_layers) + num_layers * math.ceil(num_prompt / 100)
    return min(bound, num_prompt * num_layers)
