"""What becomes of lost rows, against loops over one head, one position and one row at a time."""

from __future__ import annotations

import pytest
import torch

from sglang_vlkv.policies.vlcache import VLCache
from sglang_vlkv.stages import merging
from sglang_vlkv.stages.merging import bucket_means, merge
from tests import naive
from tests.rounding import assert_mean

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def policy_of(how: str, sinks: int = 0, threshold: float = 0.0) -> VLCache:
    return VLCache(merge=how, sink_tokens=sinks, merge_threshold=threshold)


def rows_of(n: int, heads: int, dim: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, heads, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def kept_of(n: int, heads: int, num_kept: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    picks = [torch.randperm(n, generator=generator)[:num_kept].sort().values for _ in range(heads)]
    return torch.stack(picks)


def assert_merged(how, k, v, kept, sinks=0, threshold=0.0) -> list[list[list[int]]]:
    """That rows are exact means of the defined buckets, and rows of one to the bit; the buckets."""
    everything = []
    before = k.clone(), v.clone(), kept.clone()
    merged = merge(policy_of(how, sinks, threshold), k, v, kept)
    assert all(map(torch.equal, before, (k, v, kept)))
    for head, positions in enumerate(kept.tolist()):
        everything.append(naive.buckets(k[:, head], positions, how, sinks, threshold))
        for x, ours in zip((k, v), merged, strict=True):
            assert ours.dtype == x.dtype and ours.shape == (len(positions), *x.shape[1:])
            for row, members in enumerate(everything[-1]):
                assert_mean(ours[row, head], x[members, head])
                if len(members) == 1:
                    bits = BITS[x.dtype]
                    assert torch.equal(ours[row, head].view(bits), x[members[0], head].view(bits))
    return everything


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, heads, dim, num_kept", [
    (63, 2, 100, 7), (63, 2, 100, 40), (63, 2, 100, 1), (63, 2, 100, 62),
    (130, 1, 32, 9), (41, 3, 5, 20), (2, 1, 8, 1),
])  # fmt: skip
@pytest.mark.parametrize("how, sinks, threshold", [
    ("bucket_mean", 0, 0.0), ("bucket_mean", 3, 0.0),
    ("similar", 0, 0.0), ("similar", 1, -1.0), ("similar", 3, 0.1),
])  # fmt: skip
def test_rows_are_the_means_of_their_buckets_per_head(how, sinks, threshold, n, heads, dim, num_kept, dtype):
    k, v = rows_of(n, heads, dim, dtype), rows_of(n, heads, dim, dtype, seed=1)
    buckets = assert_merged(how, k, v, kept_of(n, heads, num_kept), sinks, threshold)
    assert heads == 1 or num_kept in (1, 62) or buckets[0] != buckets[1]


@pytest.mark.parametrize("how", ["bucket_mean", "similar"])
def test_nothing_changes_where_nothing_is_lost(how):
    """Not even the sign of a zero."""
    k, v = rows_of(63, 2, 100, torch.bfloat16), rows_of(63, 2, 100, torch.bfloat16, seed=1)
    k[:, :, ::17] = v[:, :, ::17] = -0.0
    merged = merge(policy_of(how), k, v, torch.arange(63).repeat(2, 1))
    assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(merged, (k, v)))


@pytest.mark.parametrize(
    "kept, sinks, buckets",
    [
        ([4, 8], 0, [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11]]),  # 6 is the midpoint
        ([4, 9], 0, [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11]]),  # there is none
        ([0, 4, 8], 1, [[0], [3, 4, 5, 6], [7, 8, 9, 10, 11]]),  # 1 and 2 are a sink's
        ([0, 2, 4, 8], 2, [[0], [2, 3], [4, 5, 6], [7, 8, 9, 10, 11]]),  # 2 is no sink
        ([1, 6], 2, [[1], [4, 5, 6, 7, 8, 9, 10, 11]]),  # 0, 2 and 3 are a sink's
        ([3, 11], 0, [[0, 1, 2, 3, 4, 5, 6, 7], [11]]),  # 8 to 10 are the last position's
        ([11], 0, [[11]]),
        ([0], 1, [[0]]),
        ([0], 0, [[*range(12)]]),
    ],
)
def test_buckets_by_hand(kept, sinks, buckets):
    """Powers of four: a sum says what is in it."""
    v = (4.0 ** torch.arange(12)).view(12, 1, 1)
    _, means = merge(policy_of("bucket_mean", sinks), v, v, torch.tensor([kept]))
    sums = [sum(4.0**j for j in members) for members in buckets]
    counts = torch.tensor([len(members) for members in buckets])
    assert (means.flatten() * counts).tolist() == pytest.approx(sums, rel=1e-6)
    assert naive.buckets(v[:, 0], kept, "bucket_mean", sinks, 0.0) == [
        [j, *(i for i in members if i != j)] for j, members in zip(kept, buckets)
    ]


def unit(degrees: float) -> list[float]:
    angle = torch.tensor(degrees).deg2rad()
    return [float(angle.cos()), float(angle.sin())]


@pytest.mark.parametrize(
    "threshold, sinks, buckets",
    [
        (0.0, 0, [[0, 5], [2, 3, 4]]),  # 3 is longer but points the same way; 1 points away from both
        (-1.0, 0, [[0, 5], [1, 2, 3, 4]]),
        (0.95, 0, [[0], [2, 3]]),
        (0.0, 1, [[0], [2, 3, 4, 5]]),  # the sink takes nothing in; 5 goes to its second best
        (-1.0, 3, [[0], [2]]),  # nobody takes anything in
    ],
)
def test_similarity_by_hand(threshold, sinks, buckets):
    """Of the direction of the keys, whatever the values; -1 keeps every row."""
    degrees, lengths = [0, 200, 60, 65, 90, 25, 0], [1, 1, 1, 50, 0.1, 1, 1]
    k = torch.tensor([[x * length for x in unit(d)] for d, length in zip(degrees, lengths)])[:, None]
    v = (4.0 ** torch.arange(7)).view(7, 1, 1)
    kept = torch.tensor([[0, 2, 6]])
    _, means = merge(policy_of("similar", sinks, threshold), k, v, kept)
    expected = [sum(4.0**j for j in members) / len(members) for members in [*buckets, [6]]]
    assert means.flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_equally_similar_rows_are_given_to_the_lower_one():
    k, v = torch.ones(9, 1, 4), (4.0 ** torch.arange(9)).view(9, 1, 1)
    _, means = merge(policy_of("similar"), k, v, torch.tensor([[2, 5, 6]]))
    everything = (4.0**9 - 1) / 3
    assert means.flatten().tolist() == pytest.approx([(everything - 4**5 - 4**6) / 7, 4**5, 4**6])


def test_similarity_does_not_depend_on_the_tile_and_no_more_than_one_is_alive(monkeypatch):
    k, kept = rows_of(63, 2, 100), kept_of(63, 2, 20)
    whole = merge(policy_of("similar"), k, k, kept)
    seen, matmul = [], torch.Tensor.__matmul__

    def watched(a, b):
        seen.append(matmul(a, b))
        return seen[-1]

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    for tile in (1, 2 * 20 * 5, 2 * 20 * 62):
        monkeypatch.setattr(merging, "TILE_ELEMENTS", tile)
        seen.clear()
        pieces = merge(policy_of("similar"), k, k, kept)
        assert all(map(torch.equal, whole, pieces))
        assert len(seen) > 1 and max(x.numel() for x in seen) <= max(tile, 2 * 20)


def test_what_is_in_no_bucket_is_not_read():
    """Rows of one head that are dropped, and rows of the other head."""
    x = rows_of(20, 2, 8)
    bucket = torch.tensor([[0] * 5 + [-1] * 10 + [1] * 5, [1] * 20])
    expected = bucket_means(x, bucket, 2)
    x[5:15, 0] = float("nan")
    actual = bucket_means(x, bucket, 2)
    assert torch.equal(actual[:, 0], expected[:, 0]) and torch.equal(actual[1, 1], expected[1, 1])
    torch.testing.assert_close(actual[1, 1], x[:, 1].mean(0))
