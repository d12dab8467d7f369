"""Scoring, selection and compaction on what a GPU server gives them: a pool's rows through slots,
several requests at once, all layers at once. Triton kernels run in its interpreter."""

from __future__ import annotations

import math

import pytest
import torch

from sglang_vlkv import kernels
from sglang_vlkv.kernels.compaction import triton as compaction
from sglang_vlkv.kernels.post_vision import triton as post_vision
from sglang_vlkv.kernels.selection import triton as selection
from tests.rounding import assert_scored
from tests.test_kernels import NAN, count, normal, twins

pytestmark = pytest.mark.usefixtures("one_thread")

OUT_OF_RANGE = 10**9


def beside_poison(x: torch.Tensor) -> torch.Tensor:
    """The same numbers in the middle of numbers that must not be read."""
    around = x.new_full((len(x) + 2,), OUT_OF_RANGE)
    around[1:-1] = x
    return around[1:-1]


def in_a_pool(k: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer with gaps between its rows and heads that holds ``k`` somewhere, NaN everywhere else,
    and the slots."""
    n, heads, dim = k.shape
    pool = k.new_full((n + 40, heads + 1, dim + 7), NAN)[:, 1:, 3 : 3 + dim]
    slots = torch.randperm(n + 40, generator=torch.Generator().manual_seed(seed))[:n]
    pool[slots] = k
    return pool, slots


@twins("post_vision")
@pytest.mark.parametrize("rows", [None, [2, 3, 3, 40, 62]])
@pytest.mark.parametrize("dtype, slot_dtype", [(torch.float32, torch.int32), (torch.bfloat16, torch.int64)])
@pytest.mark.parametrize("hq, hkv, dim, reduce", [(14, 2, 100, "sum"), (3, 3, 5, "max")])
def test_keys_are_read_through_their_slots_and_no_other(kernel, reduce, rows, dtype, slot_dtype, hq, hkv, dim):
    rows = None if rows is None else torch.tensor(rows)
    q = normal(7 if rows is None else len(rows), hq, dim, dtype=dtype) * 3
    k, scale = normal(63, hkv, dim, seed=1, dtype=dtype), 0.7 * dim**-0.5
    pool, slots = in_a_pool(k, seed=2)
    args = scale, 0.05, reduce, None if rows is None else beside_poison(rows)
    through = kernel.post_vision_scores(q, pool, *args, slots=beside_poison(slots.to(slot_dtype)))
    gathered = kernel.post_vision_scores(q, k, *args)
    assert torch.equal(through.scores, gathered.scores)
    assert count(through.zeros) == count(gathered.zeros) and count(through.entries) == count(gathered.entries)
    assert_scored(through.scores, count(through.zeros), q, k, scale, 0.05, reduce, rows)


# Voting rows and keys of each request: one of each, more rows than a tile, nobody votes, no keys.
BATCHES = [[(1, 1), (17, 33), (0, 9), (3, 140), (5, 5)], [(3, 41), (0, 0), (1, 7)]]


@twins("post_vision")
@pytest.mark.parametrize("pooled, dtype", [(True, torch.float32), (True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize("hq, hkv, dim, reduce", [(7, 1, 100, "sum"), (4, 2, 16, "max")])
@pytest.mark.parametrize("batch", BATCHES)
def test_requests_of_a_batch_do_not_see_each_other(kernel, reduce, dtype, hq, hkv, dim, pooled, batch):
    num_rows, num_keys = ([0, *(sizes[i] for sizes in batch)] for i in (0, 1))
    q_indptr, kv_indptr = (torch.tensor(sizes, dtype=torch.int32).cumsum(0).int() for sizes in (num_rows, num_keys))
    q = normal(int(q_indptr[-1]), hq, dim, dtype=dtype) * 3
    k, scale = normal(int(kv_indptr[-1]), hkv, dim, seed=1, dtype=dtype), 0.7 * dim**-0.5
    rows = torch.cat([torch.arange(n - r, n) for r, n in batch])
    rows[2:7] = rows[2:7].clamp_max(40)  # not only the last ones vote
    rows = torch.cat([part.sort().values for part in rows.split(num_rows[1:])])
    pool, slots = in_a_pool(k, seed=2) if pooled else (k, None)
    scores, zeros = kernel.post_vision_scores_ragged(
        q,
        pool,
        beside_poison(q_indptr),
        beside_poison(kv_indptr),
        None if slots is None else beside_poison(slots),
        beside_poison(rows),
        scale,
        0.05,
        reduce,
        max(num_rows),
        max(num_keys) + 3,
    )
    assert scores.shape == (hkv, len(k)) and scores.dtype == torch.float32
    assert zeros.shape == (len(batch),) and zeros.dtype == torch.int64
    for request, (r, n) in enumerate(batch):
        voting = slice(int(q_indptr[request]), int(q_indptr[request + 1]))
        keys = slice(int(kv_indptr[request]), int(kv_indptr[request + 1]))
        if not r:
            assert not scores[:, keys].any() and zeros[request] == 0
            continue
        assert_scored(scores[:, keys], int(zeros[request]), q[voting], k[keys], scale, 0.05, reduce, rows[voting])


@pytest.mark.parametrize("num_splits", [1, 2, 5, 64])
@pytest.mark.parametrize("strength", [1.0, 60.0])
def test_scores_hardly_depend_on_how_the_keys_are_split(monkeypatch, num_splits, strength):
    """Attention on a single key, too: the other splits have next to nothing to add."""
    q, k = normal(5, 14, 64) * strength, normal(90, 2, 64, seed=1)
    monkeypatch.setattr(post_vision, "PROGRAMS", num_splits * 2 * math.ceil(5 * 7 / 16))
    result = post_vision.post_vision_scores(q, k, 0.1, 0.01)
    assert_scored(result.scores, count(result.zeros), q, k, 0.1, 0.01)


def test_operands_of_two_types_are_multiplied_in_float32():
    q, k = normal(5, 4, 100) * 3, normal(63, 2, 100, seed=1, dtype=torch.bfloat16)
    result = post_vision.post_vision_scores(q, k, 0.1, 0.05)
    assert_scored(result.scores, count(result.zeros), q, k, 0.1, 0.05)


def scores_of(kind: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape, generator=generator)
    few = torch.randint(0, 4, shape, generator=generator)
    special = torch.tensor([math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38])
    return {
        "distinct": lambda: scores,
        "positive": lambda: scores.exp() * 1e-4,
        "tied": lambda: few.float() - 2,
        "alike": lambda: torch.full(shape, -0.25),
        "one bit apart": lambda: (few + 0x3F800000).to(torch.int32).view(torch.float32),
        "special": lambda: special[torch.randint(0, 8, shape, generator=generator)],
    }[kind]()


KINDS = ["distinct", "positive", "tied", "alike", "one bit apart", "special"]
TIERED = [*((kind, (0, 4)) for kind in KINDS), ("distinct", (0, 1)), ("tied", (-128, 128))]


@twins("selection")
@pytest.mark.parametrize("n, num_kept", [(63, [1, 63, 20]), (300, [299, 7, 0, 150]), (1, [1, 1]), (16, [3])])
@pytest.mark.parametrize("kind, tiers", TIERED)
def test_winners_of_all_layers_go_by_tier_score_and_position(kernel, kind, n, num_kept, tiers):
    """Against sorting by the very rule, for each layer and head by itself."""
    shape = len(num_kept), 2, n
    scores = scores_of(kind, shape, seed=n)
    tier = torch.randint(*tiers, shape, generator=torch.Generator().manual_seed(n)).to(torch.int8)
    kept = kernel.select_rows(scores, tier, num_kept)
    assert kept.dtype == torch.int64 and kept.shape == (2, sum(num_kept))
    for layer, own in enumerate(kept.split(num_kept, dim=1)):
        for head in range(2):
            ranks, values = tier[layer, head].tolist(), scores[layer, head].tolist()
            ranking = sorted(range(n), key=lambda j: (ranks[j], -values[j], j))
            assert own[head].tolist() == sorted(ranking[: num_kept[layer]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_may_be_longer_than_a_block(kind):
    """Ties reach over blocks of 4096, of which the last is not full."""
    n = 9001
    scores = scores_of(kind, (2, 1, n), seed=5)
    tier = (torch.arange(2 * n).view(2, 1, n) % 900 > 2).to(torch.int8)
    num_kept = [n // 3, 4321]
    expected = kernels.selection.select_rows(scores, tier, num_kept)
    assert torch.equal(selection.select_rows(scores, tier, num_kept), expected)


def test_what_is_not_a_number_sorts_as_in_torch():
    scores = scores_of("special", (1, 2, 63), seed=0)
    scores[0, :, 5::9] = NAN
    scores[0, :, 7::9] = -scores[0, :, 5::9]  # with the sign bit set
    tier = torch.zeros(1, 2, 63, dtype=torch.int8)
    for num_kept in (1, 10, 30):
        expected = kernels.selection.select_rows(scores, tier, [num_kept])
        assert torch.equal(selection.select_rows(scores, tier, [num_kept]), expected)


@twins("compaction")
@pytest.mark.parametrize("n", [2, 15, 16, 17, 18, 31, 32, 33, 34, 49])
def test_a_bucket_is_read_to_its_end(kernel, n):
    """Of one row, whatever the size of the pieces it is read in."""
    x = torch.arange(n, dtype=torch.float32).view(n, 1, 1)
    rows = kernel.gather_rows(x, x * 2, torch.arange(n), torch.tensor([[0]]), [1], 0, True)
    assert rows.flatten().tolist() == [(n - 1) / 2, n - 1]


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int64)


def score(q=(3, 4, 8), k=(9, 2, 8), **others):
    q, k = (x if isinstance(x, torch.Tensor) else floats(*x) for x in (q, k))
    return lambda: post_vision.post_vision_scores(q, k, 1.0, **others)


def choose(scores=(2, 3, 9), tier=(2, 3, 9), num_kept=(1, 2), dtype=torch.float32):
    scores, tier = floats(*scores, dtype=dtype), ints(*tier).to(torch.int8)
    return lambda: selection.select_rows(scores, tier, list(num_kept))


def gather(k=(20, 2, 8), v=(20, 2, 8), slots=(9,), kept=(2, 3), num_kept=(1, 2), dtype=torch.float32, **others):
    k, v = floats(*k, dtype=dtype), floats(*v, dtype=dtype)
    return lambda: compaction.gather_rows(k, v, ints(*slots), ints(*kept), list(num_kept), 10, **others)


def scatter(k=(20, 2, 8), cells=(3,), rows=(2, 3, 2, 8), dtype=torch.float32):
    return lambda: compaction.scatter_rows(floats(*k), floats(*k), ints(*cells), floats(*rows, dtype=dtype))


@pytest.mark.parametrize("call, words", [
    (score(q=(5, 4, 8), k=(4, 2, 8)), "R <= n and Hkv"),
    (score(q=(3, 5, 8)), "R <= n and Hkv"),
    (score(q=(3, 4, 7)), "q is .* and k is"),
    (score(q=(0, 4, 8)), "0 voting rows"),
    (score(k=floats(9, 2, 8, dtype=torch.float64)), "k is torch.float64"),
    (score(k=floats(9, 8, 2).mT), "k has strides"),
    (score(slots=floats(9)), "slots is .* torch.float32"),
    (score(slots=ints(18)[::2]), "slots is"),
    (score(rows=ints(4)), "one row per query"),
    (score(reduce="mean"), "reduce is 'mean'"),
    (choose(tier=(2, 3, 8)), "tier .2, 3, 8."),
    (choose(num_kept=(1,)), "1 counts"),
    (choose(num_kept=(1, 10)), "keeps 0 to n = 9"),
    (choose(num_kept=(-1, 1)), "keeps 0 to n = 9"),
    (choose(dtype=torch.bfloat16), "scores are torch.bfloat16"),
    (gather(v=(20, 2, 7)), "v_cells"),
    (gather(kept=(1, 3)), "with H = 2"),
    (gather(num_kept=(1, 1)), "of sum 2"),
    (gather(slots=(9, 1)), "slots .9, 1."),
    (gather(dtype=torch.int8, merge=True), "rows of numbers"),
    (scatter(rows=(2, 3, 2, 7)), "3. cells and"),
    (scatter(cells=(4,)), "4. cells and"),
    (scatter(dtype=torch.float16), "torch.float16 rows"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_layouts_that_the_kernels_would_misread_are_refused():
    k, v = floats(20, 2, 8), floats(20, 8, 2).mT
    with pytest.raises(ValueError, match="strides"):
        compaction.gather_rows(k, v, ints(9), ints(2, 3), [3], 10)
    with pytest.raises(ValueError, match="kept has strides"):
        compaction.gather_rows(k, k, ints(9), ints(3, 2).T, [3], 10)
    with pytest.raises(ValueError, match="contiguous ones"):
        selection.select_rows(floats(2, 3, 18)[..., ::2], ints(2, 3, 9).to(torch.int8), [1, 1])
