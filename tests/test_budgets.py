"""Ratios become counts once, and counts are split over layers exactly."""

import random

import pytest
import torch

from sglang_vlkv.policies.vlcache import VLCache
from sglang_vlkv.stages import budgets
from sglang_vlkv.stages.prompt import num_tokens
from tests.naive import cumulative_split, exact_split, least_rows


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


def test_no_layer_goes_below_a_hundredth_of_the_prompt_or_an_equal_share():
    cases = {(5, 5, 1000): 1, (50, 5, 1000): 10, (49, 5, 1000): 9, (500, 5, 1001): 11, (9, 2, 63): 1}
    assert {case: budgets.least(*case) for case in cases} == cases


def test_cumulative_split_equals_row_by_row_spending():
    rng = random.Random(3)
    for _ in range(300):
        num_layers, n, top = rng.randint(1, 9), rng.choice([1, 2, 63, 130]), rng.choice([1, 3, 10**4])
        importance = [
            [rng.randint(0, top) ** rng.choice([1, 3]) for _ in range(n)] for _ in range(num_layers)
        ]
        for total in {num_layers, rng.randint(num_layers, n * num_layers), n * num_layers}:
            kept = budgets.cumulative([torch.tensor(layer) for layer in importance], total)
            assert sum(kept) == total and max(kept) <= n and min(kept) >= least_rows(total, n, num_layers)
            covering = [layer for layer in importance if any(layer)]
            if len(covering) == num_layers:
                assert kept == cumulative_split(importance, total), (importance, total)


@pytest.mark.parametrize(
    "importance, total, expected",
    [
        ([[5, 5, 5, 5], [17, 1, 1, 1]], 4, [3, 1]),  # 17 of 20 is more than two fives are
        ([[1, 1, 17, 1], [5, 5, 5, 5]], 5, [1, 4]),  # whatever the order
        ([[4, 4, 4], [1, 1, 1]], 3, [2, 1]),  # shares, not sums; ties to the lower layer
        ([[9, 0, 0], [9, 0, 0]], 4, [3, 1]),  # nothing left to cover
        ([[1, 1], [1, 1], [1, 1]], 6, [2, 2, 2]),
    ],
)
def test_cumulative_split_of_small_cases(importance, total, expected):
    before = [torch.tensor(layer) for layer in importance]
    assert budgets.cumulative(before, total) == expected
    assert [layer.tolist() for layer in before] == importance
