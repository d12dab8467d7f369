"""Ratios become counts once, and counts are split over layers exactly."""

import random
from fractions import Fraction
from math import floor

import pytest

from sglang_vlkv import budgets
from sglang_vlkv.base import num_tokens
from sglang_vlkv.policies.vlcache import VLCache


def least_rows(total: int, n: int, num_layers: int) -> int:
    return min(max(1, -(-n // 100)), total // num_layers)


def exact_split(weights: list[float], total: int, n: int) -> list[int]:
    """The specification in rational arithmetic: t by bisection, then solved for exactly."""
    w = [Fraction(x) for x in weights]
    low = least_rows(total, n, len(w))

    def shares(t):
        return [min(max(t * x, low), n) for x in w]

    below, above = Fraction(0), n / min(w)
    for _ in range(160):
        middle = (below + above) / 2
        below, above = (middle, above) if sum(shares(middle)) < total else (below, middle)
    free = [low < above * x < n for x in w]
    if any(free):
        fixed = sum(s for s, is_free in zip(shares(above), free) if not is_free)
        above = (total - fixed) / sum(x for x, is_free in zip(w, free) if is_free)
    exact = shares(above)
    assert abs(sum(exact) - total) < Fraction(1, 10**9)
    kept = [floor(s) for s in exact]
    by_fraction = sorted(range(len(w)), key=lambda layer: (kept[layer] - exact[layer], layer))
    for layer in [layer for layer in by_fraction if kept[layer] < n][: total - sum(kept)]:
        kept[layer] += 1
    return kept


def random_splits(count: int):
    """(weights, total, n): even, spiky and repeated weights; total from the least to the most."""
    rng = random.Random(0)
    for _ in range(count):
        num_layers, n = rng.randint(1, 33), rng.choice([1, 2, 63, 100, 101, 357, 4001])
        spread, few = rng.choice([0.1, 1, 6]), rng.choice([3, num_layers])
        values = [10 ** -rng.uniform(0, spread) for _ in range(few)]
        weights = [rng.choice(values) for _ in range(num_layers)]
        lowest, highest = num_layers, n * num_layers
        tenth = min(max(round(0.1 * n * num_layers), lowest), highest)
        for total in {lowest, tenth, rng.randint(lowest, highest), highest - 1, highest}:
            if total >= lowest:
                yield weights, total, n


def test_ratio_becomes_a_count_of_what_stays_rounded_half_to_even():
    assert [num_tokens(0.5, n) for n in (1, 3, 5, 7)] == [0, 2, 2, 4]
    assert num_tokens(0.1, 63, 4) == 25
    assert num_tokens(0.25, 63, 2) == 32  # 31.5
    assert num_tokens(1.0, 63, 28) == 63 * 28


def test_split_equals_the_exact_one():
    for weights, total, n in random_splits(300):
        assert budgets.proportional(weights, total, n) == exact_split(weights, total, n), (weights, total, n)


def test_split_spends_the_total_within_bounds_and_never_gives_a_denser_layer_less():
    for weights, total, n in random_splits(300):
        kept = budgets.proportional(weights, total, n)
        assert sum(kept) == total
        assert min(kept) >= least_rows(total, n, len(weights)) and max(kept) <= n
        by_weight = sorted(zip(weights, kept))
        for (lighter, fewer), (heavier, more) in zip(by_weight, by_weight[1:]):
            assert fewer <= more if lighter < heavier else abs(fewer - more) <= 1


@pytest.mark.parametrize(
    "weights, total, n, expected",
    [
        ([1, 1, 1], 8, 10, [3, 3, 2]),  # equal fractions: the lower layers
        ([1, 2, 3], 9, 50, [2, 3, 4]),  # 1.5, 3, 4.5: the lower of two halves
        ([4, 3, 3], 4, 50, [2, 1, 1]),  # 1.6, 1.2, 1.2: the largest fraction, not the lowest layer
        ([0.98, 0.01, 0.01], 15, 10, [10, 3, 2]),  # a full layer's excess goes to the others
        ([1e-6, 1.0], 200, 1000, [10, 190]),  # 1% of the prompt stays everywhere
        ([1e-6, 1.0], 200, 1001, [11, 189]),  # rounded up
        ([1e-6, 1.0], 10, 1000, [5, 5]),  # but no more than an equal share
        ([0.0, 1.0], 15, 10, [5, 10]),  # a layer without weight takes what the others cannot
        ([0.0, 0.0], 7, 10, [4, 3]),
    ],
)
def test_split_of_small_cases(weights, total, n, expected):
    assert budgets.proportional(weights, total, n) == expected


@pytest.mark.parametrize("total", [2, 31])
def test_totals_that_cannot_be_split_are_refused(total):
    with pytest.raises(ValueError, match=f"{total} rows .* 3 layers of 10 tokens"):
        budgets.proportional([1.0, 2.0, 3.0], total, 10)


def clipped_shares(weights: list[float], budget: float) -> list[float]:
    return [min(max(w / sum(weights) * budget * len(weights), 0.01), 1.0) for w in weights]


def test_papers_split_clips_and_does_not_renormalise():
    assert budgets.clipped([1.0, 0.0, 0.0, 0.0], 0.01, 1000) == [40, 10, 10, 10]  # overspent: 70 of 40
    assert budgets.clipped([1.0, 0.0, 0.0, 0.0], 0.4, 1000) == [1000, 10, 10, 10]  # underspent
    rng = random.Random(1)
    for _ in range(200):
        weights = [rng.random() ** 4 for _ in range(rng.randint(1, 33))]
        n, budget = rng.choice([10, 63, 1001]), rng.choice([0.01, 0.1, 0.4, 1.0])
        kept = budgets.clipped(weights, budget, n)
        for rows, share in zip(kept, clipped_shares(weights, budget), strict=True):
            assert 1 <= rows <= n and abs(rows - max(share * n, 1)) < 1


def test_papers_split_stays_within_the_bound_that_admission_reserves():
    rng = random.Random(2)
    for _ in range(500):
        num_layers, n = rng.randint(1, 33), rng.randint(1, 500)
        budget = rng.choice([0.004, 0.01, 0.1, 0.4, 1.0])
        weights = [rng.choice([0.0, 0.0, rng.random()]) for _ in range(num_layers)]
        bound = budgets.clipped_bound(budget, n, num_layers)
        assert sum(budgets.clipped(weights, budget, n)) <= bound <= n * num_layers


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.37, 1.0])
def test_vlcache_spends_exactly_its_budget_and_more_on_denser_layers(budget):
    policy, sparsity = VLCache(budget=budget), [0.9, 0.2, 0.55, 0.2]
    kept = policy.layer_budgets(sparsity, num_prompt=363)
    assert sum(kept) == round(budget * 363 * 4) == policy.max_total(363, 4)
    assert kept == exact_split([1 - gamma for gamma in sparsity], sum(kept), 363)
    assert kept[1] > kept[2] > kept[0] or budget == 1.0


def test_vlcache_without_renormalisation_is_the_papers_split_and_reserves_its_bound():
    policy, sparsity = VLCache(budget=0.1, renormalise=False), [0.99, 0.2, 0.55, 0.999]
    kept = policy.layer_budgets(sparsity, num_prompt=363)
    assert kept == budgets.clipped([1 - gamma for gamma in sparsity], 0.1, 363)
    assert sum(kept) <= policy.max_total(363, 4) == budgets.clipped_bound(0.1, 363, 4)
