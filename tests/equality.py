"""Are two greedy answers the same? Equal, or first different where the choice was a coin toss."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from tests.serving import report


class Difference(NamedTuple):
    """Two answers part at ``index``, where the reference preferred its token to the other's by
    ``margin``: infinite unless these two are its best."""

    index: int
    margin: float


def first_difference(reference: dict, other: dict) -> Difference | None:
    """Compares ``/generate`` answers that carry the top-2 logprobs."""
    tokens, others = reference["output_ids"], other["output_ids"]
    for index, (a, b) in enumerate(zip(tokens, others, strict=True)):
        if a != b:
            best = reference["meta_info"]["output_top_logprobs"][index][:2]
            (first, one, *_), (second, two, *_) = best
            is_toss = {a, b} == {one, two} and math.isfinite(first - second)
            return Difference(index, first - second if is_toss else math.inf)
    return None


def largest_deviation(reference: dict, other: dict) -> float:
    """Largest difference of the chosen tokens' logprobs, as far as the answers agree."""
    pairs = zip(
        reference["meta_info"]["output_token_logprobs"], other["meta_info"]["output_token_logprobs"]
    )
    deviations = [0.0]
    for (a, token, *_), (b, other_token, *_) in pairs:
        if token != other_token:
            break
        deviations.append(abs(a - b))
    return float(np.max(deviations))  # NaN where there is one


def assert_same(reference: list[dict], other: list[dict], tolerance: float, title: str) -> None:
    """Every answer equal, or first different at a margin under ``tolerance``; lists all."""
    differences = [
        (i, difference)
        for i, (a, b) in enumerate(zip(reference, other, strict=True))
        if (difference := first_difference(a, b)) is not None
    ]
    for i, difference in differences:
        where = f"first at token {difference.index}, margin {difference.margin:.2e}"
        print(f"{title}: prompt {i} differs {where}")
    print(f"{title}: {len(reference) - len(differences)} of {len(reference)} equal")
    beyond = [(i, d) for i, d in differences if d.margin >= tolerance]
    assert not beyond, f"{title}: beyond the tolerance {tolerance:.1e}: {beyond}"


def alike(one: dict, other: dict) -> None:
    """Kept sets that rounding alone may have parted."""
    assert report(one)["kept_per_layer"] == report(other)["kept_per_layer"]
    pairs = zip(sum(report(one)["positions"], []), sum(report(other)["positions"], []))
    shared = [len(set(a) & set(b)) / len(a) for a, b in pairs]
    assert min(shared) >= 0.9 and sum(shared) / len(shared) >= 0.98, shared
