"""The mistakes found in public code (ALGORITHMS.md, section 7): each made here once, beside ours.

Every test asserts that ours is right and that the erroneous form would have shown on its input.
Mistakes 9 (nothing physically freed) and 10 (a failure caught, the server going on) have no small
form: tests/test_pressure.py counts free slots and plants a leak, tests/test_start.py and
tests/test_requests.py watch servers end or answer with an error.
"""

from __future__ import annotations

import pytest
import torch

from sglang_vlkv.kernels.compaction import gather_rows
from sglang_vlkv.kernels.post_vision import post_vision_scores
from sglang_vlkv.policies import policies
from sglang_vlkv.policies.h2o import H2O
from sglang_vlkv.policies.uniform import Uniform
from sglang_vlkv.policies.vlcache import VLCache
from sglang_vlkv.stages.layer import LayerScores
from sglang_vlkv.stages.merging import merge
from sglang_vlkv.stages.prompt import Modality, Prompt
from sglang_vlkv.stages.select import rank, select, tiers, top_positions
from tests.naive import Rotary
from tests.test_policies import layer_of, make_case, observed, rope_of, scored, selected

T, P, S = Modality.TEXT, Modality.IMAGE, Modality.SYSTEM
N, HEADS = 63, 2
PROMPT = Prompt(torch.tensor([S] * 3 + [P] * 40 + [T] * 20, dtype=torch.uint8))
FREE = torch.zeros(N, dtype=torch.int8)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def largest(scores: torch.Tensor, k: int) -> list[list[int]]:
    return [sorted(sorted(range(len(head)), key=head.__getitem__)[-k:]) for head in scores.tolist()]


def test_1_argsort_is_not_a_rank():
    """It says which token stands at place j, not at which place token j stands."""
    scores, k = noise(HEADS, N), 20

    def erroneous(scores: torch.Tensor) -> list[list[int]]:
        kept = scores.argsort(dim=1, descending=True) < k
        return [head.nonzero().flatten().tolist() for head in kept]

    assert top_positions(scores, k, FREE).tolist() == largest(scores, k) != erroneous(scores)
    places = rank(scores)
    assert [(head < k).nonzero().flatten().tolist() for head in places] == largest(scores, k)
    assert not torch.equal(places, scores.argsort(dim=1, descending=True))


def test_2_an_offset_belongs_to_the_kept_and_to_the_lost():
    """Scores from the first token behind the sinks on: both lists count from there."""
    sinks, k, v = 4, noise(N, 1, 8), noise(N, 1, 8, seed=1)
    kept = torch.tensor([[0, 1, 2, 3, 10, 11, 30, 62]])

    def merged(offset_of_the_lost: int) -> torch.Tensor:
        chosen = kept[0, sinks:] - sinks
        lost = sorted(set(range(N - sinks)) - set(chosen.tolist()))
        buckets = {int(j) + sinks: [int(j) + sinks] for j in chosen}
        for j in lost:
            nearest = min(chosen.tolist(), key=lambda i: (abs(i - j), i))
            if (j < chosen[0] and chosen[0] - j > j + 1) or nearest + sinks == N - 1:
                continue  # a sink's, or the last position's
            buckets[nearest + sinks].append(j + offset_of_the_lost)
        rows = [v[members, 0].mean(0) for _, members in sorted(buckets.items())]
        return torch.stack([*v[:sinks, 0], *rows])

    policy = VLCache(merge="bucket_mean", sink_tokens=sinks)
    ours = merge(policy, k, v, kept)[1][:, 0]
    torch.testing.assert_close(ours, merged(offset_of_the_lost=sinks))
    assert not torch.allclose(ours, merged(offset_of_the_lost=0), atol=0.05)


@pytest.mark.parametrize("name", policies())
def test_3_a_budget_is_what_stays(name):
    policy = policies()[name](budget=0.3)
    sizes = list(torch.randint(1, 9, (4, N), generator=torch.Generator().manual_seed(0)))
    erroneous = 4 * N - round(0.3 * N * 4)
    assert sum(policy.layer_budgets([0.5] * 4, N, sizes)) == policy.max_total(N, 4) == 76 != erroneous


@pytest.mark.parametrize(
    "options, num_images",
    [
        ({"modality_floors": {"image": 0.3}}, 12),  # of 40; 28 would have to go
        ({"modality_floors": {"image": 1.0}, "floors_share": 0.3}, 9),  # of 30, not 21
        ({"quota": 0.3}, 9),  # of 29, not 20
    ],
)
def test_3_so_are_all_other_ratios(options, num_images):
    """Of 30 kept rows so many are images, of which scores alone would keep 7."""
    policy, image = VLCache(recent_fraction=0.0, **options), PROMPT.tags == P
    scores = torch.rand(HEADS, N, generator=torch.Generator().manual_seed(0)).masked_fill(image, -1.0)
    quota_scores = (scores * 0).masked_fill(~image, -torch.inf)
    for told, expected in ((policy, num_images), (VLCache(), 30 - int((~image).sum()))):
        kept = top_positions(scores, 30, tiers(told, PROMPT, scores, 30, quota_scores))
        assert image[kept].sum(1).tolist() == [expected] * HEADS
    assert VLCache(recent_fraction=0.3).num_recent(30) == 9


@pytest.mark.parametrize("name", policies())
def test_4_the_recent_window_is_inside_the_budget(name):
    policy = policies()[name](budget=0.3)
    sizes = list(torch.randint(1, 9, (4, N), generator=torch.Generator().manual_seed(0)))
    layers = [LayerScores(noise(HEADS, N, seed=seed), profile=sizes[seed]) for seed in range(4)]
    kept = select(policy, PROMPT, layers, [0.5] * 4, sizes).num_kept
    erroneous = sum(k + policy.num_recent(k) for k in kept)
    assert sum(kept) == round(0.3 * N * 4) < erroneous


def test_5_the_threshold_is_relative_to_the_rows_largest():
    """300 keys that get the same: no entry is small beside the others, all are below 0.01."""
    q, k = noise(5, 4, 8), torch.zeros(300, 2, 8)
    ours = post_vision_scores(q, k, 1.0, p=0.01)
    attention = torch.full((5 * 4, 300), 1 / 300)
    assert ours.zeros == 0
    assert int((attention < 0.01).sum()) == 6000


@pytest.mark.parametrize("top", [256.0, 300.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_6_protection_is_no_score(top, dtype):
    """The last position, which nothing looks at, among others at the maximum."""
    scores = torch.full((1, N), top, dtype=dtype)
    scores[0, -1] = 0.0
    policy = VLCache(recent_fraction=0.0)

    def erroneous(scores: torch.Tensor) -> torch.Tensor:
        raised = scores.clone()
        raised[0, -1] = scores.max() + 1
        return top_positions(raised, 5, FREE)

    assert top_positions(scores, 5, tiers(policy, PROMPT, scores, 5)).tolist() == [[0, 1, 2, 3, N - 1]]
    ties = dtype == torch.bfloat16
    assert (erroneous(scores)[0, -1] != N - 1) == ties
    assert tiers(policy, PROMPT, scores, 5).dtype == torch.int8, "a mask, not a score"


def test_7_kept_keys_keep_their_positions():
    """What a later query sees of a kept key is what it would have seen of it in the full prompt."""
    case = make_case(3, [(S, 2), (P, 41), (T, 20)], HEADS, 2, 32, Rotary(32, (0,) * 16))
    kept = selected(Uniform(budget=0.3), case).kept[0]
    rope, num_kept = rope_of(case.rope), kept.shape[1]
    keys, _ = gather_rows(case.k[0], case.v[0], torch.arange(N), kept, [num_kept], 0)

    def erroneous() -> torch.Tensor:
        rows = []
        for head in range(HEADS):
            before = rope.unrotate(case.k[0, kept[head]][:, head : head + 1], kept[head : head + 1])
            cos, sin = rope.angles(torch.arange(num_kept)[None])
            rows.append(rope.rotate(before, cos, sin))
        return torch.cat(rows, dim=1)

    query = noise(HEADS, 32)  # of the next token, after RoPE
    full = torch.einsum("hd,nhd->hn", query, case.k[0]).gather(1, kept)
    for head in range(HEADS):
        assert torch.equal(keys[:, head], case.k[0, kept[head], head])
    torch.testing.assert_close(torch.einsum("hd,nhd->hn", query, keys), full)
    assert not torch.allclose(torch.einsum("hd,nhd->hn", query, erroneous()), full, atol=0.1)


@pytest.mark.parametrize("name", policies())
def test_8_requests_do_not_vote_in_each_others_prompts(name):
    """Scored in turns, as a batch that prefills two requests in chunks does it."""
    policy = policies()[name](budget=0.3)
    spans = [(S, 2), (P, 31), (T, 30)]
    one, two = (make_case(seed, spans, HEADS, 2, 32, Rotary(32, (0,) * 16)) for seed in (8, 9))
    alone = [selected(policy, case).kept for case in (one, two)]
    if policy.observes:
        apart = [observed(policy, case, 0, (20,)) for case in (one, two)]
        seen = [None, None]
        for start, end in ((0, 20), (20, N)):
            for request, case in enumerate((one, two)):
                seen[request] = policy.observe(seen[request], layer_of(case, 0, start, end))
        for a, b in zip(apart, seen, strict=True):
            pairs = [(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, torch.Tensor)]
            assert pairs and all(torch.equal(x, y) for x, y in pairs)
    again = [selected(policy, case).kept for case in (two, one)]
    for a, b in zip(alone, reversed(again), strict=True):
        assert all(map(torch.equal, a, b))


def test_8_a_sum_over_the_batch_axis_would_show():
    spans = [(S, 2), (P, 31), (T, 30)]
    cases = [make_case(seed, spans, HEADS, 2, 32, Rotary(32, (0,) * 16)) for seed in (8, 9)]
    policy = H2O(budget=0.3)
    batch = torch.stack([scored(policy, case, 0).scores for case in cases])  # [requests, H, n]
    k = selected(policy, cases[0]).num_kept[0]
    recent = torch.ones(N, dtype=torch.int8)
    recent[N - policy.num_recent(k) :] = 0
    erroneous = top_positions(batch.sum(0), k, recent)
    for request, case in enumerate(cases):
        ours = selected(policy, case).kept[0]
        assert torch.equal(ours, top_positions(batch[request], k, recent))
        assert not torch.equal(ours, erroneous)
