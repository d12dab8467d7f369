"""Attention in float64, and how far from it correct float32 arithmetic may end up: in any order, of any
library, on any machine.

An operation is off by at most ``UNIT`` of its result, and n of them in a row by :func:`gamma` (Higham,
*Accuracy and Stability of Numerical Algorithms*, 3.1 and 4.2): a bound for every single number. As errors
have no common direction, the root mean square of many numbers is off by :func:`usual` at most (Higham and
Mary, *A New Approach to Probabilistic Rounding Error Analysis*).
"""

from __future__ import annotations

import math
from typing import Callable

import torch

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def gamma(n: float, unit: float = UNIT[torch.float32]) -> float:
    return n * unit / (1 - n * unit)


def usual(n: float) -> float:
    return math.sqrt(n) * UNIT[torch.float32]


Growth = Callable[[float], float]


def seen(num_keys: int, rows: torch.Tensor) -> torch.Tensor:
    """``[R, n]``: what voting rows at these positions see."""
    return torch.arange(num_keys) <= rows[:, None]


def last(num_rows: int, num_keys: int) -> torch.Tensor:
    return torch.arange(num_keys - num_rows, num_keys)


def products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """``[Hkv, G, R, n]``."""
    return q.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3) @ k.permute(1, 2, 0)[:, None]


def weights(q: torch.Tensor, k: torch.Tensor, scale: float, rows: torch.Tensor) -> torch.Tensor:
    """``[Hkv, G, R, n]`` in the inputs' dtype; of queries ``[R, Hq, D]`` and keys ``[n, Hkv, D]``."""
    logits = products(q, k) * scale
    return logits.masked_fill(~seen(len(k), rows), -math.inf).softmax(-1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The last R of n positions attend causally, in the inputs' dtype, ``[R, Hq, D]``."""
    out = weights(q, k, scale, last(len(q), len(k))) @ v.transpose(0, 1)[:, None]  # [Hkv, G, R, D]
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def of_logits(q, k, scale, rows, after: Growth) -> torch.Tensor:
    """Of a logit, less its row's largest: D products, their sum, the scale, a base of 2, the difference."""
    error = after(q.shape[2] + 8) * scale * products(q.double().abs(), k.double().abs())
    return error + (error * seen(len(k), rows)).amax(-1, keepdim=True)


def of_weights(q, k, scale, rows, after: Growth) -> torch.Tensor:
    """A part of each weight: of its power, and of the sum, added up in pieces that are scaled anew."""
    return torch.expm1(of_logits(q, k, scale, rows, after) + after(3 * len(k) + 16))


def of_scores(q, k, scale, rows, reduce: str, after: Growth) -> torch.Tensor:
    """``[Hkv, n]``."""
    exact = weights(q.double(), k.double(), scale, rows)
    errors = exact * of_weights(q, k, scale, rows, after)
    if reduce == "max":
        return errors.amax((1, 2))
    return (errors + after(exact.shape[1] * exact.shape[2]) * exact).sum((1, 2))


def of_attention(q, k, v, scale, after: Growth) -> torch.Tensor:
    """``[R, Hq, D]``. Weights and results may be rounded to the inputs' dtype, all else is float32."""
    rows, unit = last(len(q), len(k)), UNIT[q.dtype]
    exact, values = weights(q.double(), k.double(), scale, rows), v.double().abs().transpose(0, 1)[:, None]
    part = of_weights(q, k, scale, rows, after) + after(3 * len(k) + 16) + unit
    smallest = torch.finfo(q.dtype).smallest_normal * unit
    error = (exact * part + smallest) @ values
    error += unit * (exact @ v.double().transpose(0, 1)[:, None]).abs() + smallest
    return error.permute(2, 0, 1, 3).flatten(1, 2)


def assert_mean(actual: torch.Tensor, rows: torch.Tensor) -> None:
    """Of ``rows``, taken in float32 and rounded to their dtype once."""
    rows = rows.double()
    exact, error = rows.mean(0), gamma(len(rows) + 1) * rows.abs().mean(0)
    if actual.dtype != torch.float32:
        unit = UNIT[actual.dtype]
        error += unit * (exact.abs() + error) + unit * torch.finfo(actual.dtype).smallest_normal
    assert ((actual.double() - exact).abs() <= error).all()


def assert_scored(
    scores: torch.Tensor, zeros, q, k, scale: float, p: float, reduce: str = "sum", rows=None
) -> tuple[int, int]:
    """Scores, and zeros up to what rounding can turn around; the fewest and the most of those."""
    rows = last(len(q), len(k)) if rows is None else rows
    assert scores.dtype == torch.float32
    exact = weights(q.double(), k.double(), scale, rows)
    total = exact.sum((1, 2)) if reduce == "sum" else exact.amax((1, 2))
    error = (scores.double() - total).abs()
    assert (error <= of_scores(q, k, scale, rows, reduce, gamma)).all()
    assert error.norm() <= of_scores(q, k, scale, rows, reduce, usual).norm()
    relative, slack = exact / exact.amax(-1, keepdim=True), of_weights(q, k, scale, rows, gamma)
    small = [(relative * factor < p) & seen(len(k), rows) for factor in (1 + slack, 1 - slack)]
    fewest, most = (int(each.sum()) for each in small)
    assert fewest <= int(zeros) <= most
    return fewest, most


def assert_attended(actual: torch.Tensor, q, k, v, scale: float) -> None:
    """In float32 as exact as rounding lets it be; else at most twice the error of plain PyTorch in the
    same dtype, which may round its logits too, or what rounding operands and results alone brings."""
    exact = attend(q.double(), k.double(), v.double(), scale)
    assert actual.dtype == q.dtype and actual.shape == q.shape
    error = (actual.double() - exact).abs()
    allowed = of_attention(q, k, v, scale, usual).norm()
    if q.dtype == torch.float32:
        assert (error <= of_attention(q, k, v, scale, gamma)).all()
    else:
        allowed = max(allowed, 2 * (attend(q, k, v, scale).double() - exact).norm())
    assert error.norm() <= allowed
