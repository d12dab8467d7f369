"""Every kernel and its loop twin against float64, with poison in what must not be read."""

import math
from importlib import import_module
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_vlkv import kernels
from tests import naive
from tests.rounding import assert_attended, assert_mean, assert_scored, gamma, last

NAN = float("nan")


pytestmark = pytest.mark.usefixtures("one_thread")


def twins(op: str) -> pytest.MarkDecorator:
    """Parametrises ``kernel`` over what ``kernels/<op>`` exports, its reference and, interpreted, its
    Triton version. Attention's has a form of its own, and tests of its own."""
    found = {"exported": "", "reference": ".reference", "triton": ".triton"}
    if op == "ragged_attention":
        del found["triton"]
    modules = [import_module(f"{kernels.__name__}.{op}{twin}") for twin in found.values()]
    return pytest.mark.parametrize("kernel", modules, ids=found)


def count(x: int | torch.Tensor) -> int:
    """Of a result: a Triton kernel's is a tensor, which nobody has waited for."""
    assert type(x) is int or x.dtype == torch.int64 and x.dim() == 0
    return int(x)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# n, R, Hq, Hkv, D
SHAPES = [(63, 17, 8, 2, 100), (63, 63, 8, 2, 100), (130, 16, 7, 1, 64), (41, 1, 3, 3, 5), (1, 1, 4, 2, 8)]


@twins("post_vision")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, rows, hq, hkv, dim", SHAPES)
def test_scores_are_column_sums_and_zeros_are_relative_to_the_rows_maximum(
    kernel, dtype, n, rows, hq, hkv, dim
):
    q, k = normal(rows, hq, dim, dtype=dtype) * 3, normal(n, hkv, dim, seed=1, dtype=dtype)
    p, scale = 0.05, 0.7 * dim**-0.5
    result = kernel.post_vision_scores(q, k, scale, p)
    fewest, most = assert_scored(result.scores, count(result.zeros), q, k, scale, p)
    assert n < 40 or 0 < fewest and most < hq * int((last(rows, n) + 1).sum())


# n, positions of the voting rows: with gaps, the first alone, equal ones, all
ROWS = [(63, [0, 1, 17, 40, 62]), (63, [0]), (41, [40, 40, 40]), (63, [20, 30]), (30, list(range(30)))]


@twins("post_vision")
@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("hq, hkv, dim", [(8, 2, 100), (7, 1, 64), (3, 3, 5)])
@pytest.mark.parametrize("n, rows", [*ROWS, (63, None)])
def test_rows_may_stand_anywhere_and_votes_be_summed_or_the_largest(kernel, n, rows, hq, hkv, dim, reduce):
    """Each row sees what is not behind it; nothing may depend on where the last row stands."""
    positions = torch.tensor(range(n - 17, n) if rows is None else rows)
    q, k = normal(len(positions), hq, dim) * 3, normal(n, hkv, dim, seed=1)
    p, scale = 0.05, 0.7 * dim**-0.5
    result = kernel.post_vision_scores(q, k, scale, p, reduce, None if rows is None else positions)

    assert_scored(result.scores, count(result.zeros), q, k, scale, p, reduce, positions)
    assert count(result.entries) == hq * int((positions + 1).sum())


@twins("post_vision")
def test_no_entry_is_zero_where_attention_is_even(kernel):
    """Every entry is 1 / 300 at most: far below p, but not below p of the row's maximum."""
    result = kernel.post_vision_scores(normal(5, 4, 8), torch.zeros(300, 2, 8), 1.0, p=0.01)
    assert result.zeros == 0
    # Each is ten powers of 1, exactly, over their sum.
    assert result.scores.double().sum(1).tolist() == pytest.approx([10.0, 10.0], rel=gamma(2 + 10))


@twins("post_vision")
@pytest.mark.parametrize("gap, zero", [(math.log(100) - 0.01, False), (math.log(100) + 0.01, True)])
def test_threshold_and_causality_count_by_hand(kernel, gap, zero):
    q = torch.ones(3, 4, 1)
    k = torch.zeros(10, 2, 1)
    k[0] = gap
    result = kernel.post_vision_scores(q, k, 1.0, p=0.01)
    assert result.zeros == (4 * (7 + 8 + 9) if zero else 0)


@twins("post_vision")
def test_scores_are_of_unfiltered_attention(kernel):
    """Nothing is lost where most entries count as zero: each row and query head adds 1."""
    q, k = normal(17, 8, 100), normal(63, 2, 100, seed=1)
    few, many = (kernel.post_vision_scores(q, k, 0.1, p) for p in (0.01, 0.9))
    assert many.zeros > few.zeros
    assert torch.equal(many.scores, few.scores)
    assert_scored(many.scores, count(many.zeros), q, k, 0.1, 0.9)


@twins("post_vision")
def test_a_key_reaches_only_its_own_heads(kernel):
    q, k = normal(6, 4, 8), normal(20, 2, 8, seed=1)
    before = kernel.post_vision_scores(q, k, 0.3, 0.01)
    k[19, 1] = NAN
    after = kernel.post_vision_scores(q, k, 0.3, 0.01)
    assert torch.equal(after.scores[0], before.scores[0])


@twins("post_vision")
def test_views_into_poisoned_memory_are_scored(kernel):
    q, k = torch.full((30, 9, 110), NAN), torch.full((70, 3, 110), NAN)
    q, k = q[5:22, 1:, 3:103], k[2:65, 1:, 3:103]
    q.copy_(normal(17, 8, 100))
    k.copy_(normal(63, 2, 100, seed=1))
    views = kernel.post_vision_scores(q, k, 0.1, 0.3)
    assert_scored(views.scores, count(views.zeros), normal(17, 8, 100), normal(63, 2, 100, seed=1), 0.1, 0.3)


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("rows", [None, torch.arange(3, 63, 4)[:15]])
@pytest.mark.parametrize("tile", [1, 63, 4 * 63, 1000, 1 << 22])
def test_any_tile_gives_the_scores(tile, rows, reduce):
    q, k = normal(15, 8, 100), normal(63, 2, 100, seed=1)
    result = kernels.post_vision.post_vision_scores(q, k, 0.1, 0.3, reduce, rows, tile=tile)
    fewest, _ = assert_scored(result.scores, result.zeros, q, k, 0.1, 0.3, reduce, rows)
    assert fewest > 0
    assert result.entries == 8 * int(((last(15, 63) if rows is None else rows) + 1).sum())


def test_no_more_than_a_tile_of_attention_is_alive():
    """A tile of one row of all 4 query heads of a KV head."""
    n, rows, dim = 1000, 20, 4
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        kernels.post_vision.post_vision_scores(
            normal(rows, 8, dim), normal(n, 2, dim, seed=1), 0.5, 0.01, tile=4 * n
        )
    assert 0 < largest <= max(4 * n, n * 2 * dim)


@pytest.mark.parametrize("q, k", [((5, 4, 8), (4, 2, 8)), ((3, 5, 8), (9, 2, 8))])
def test_impossible_shapes_are_refused(q, k):
    with pytest.raises(ValueError, match="R <= n"):
        kernels.post_vision.post_vision_scores(normal(*q), normal(*k), 1.0, 0.01)


class Cells(NamedTuple):
    """A prompt of 63 tokens in a pool of 3 layers: ``k`` and ``v`` ``[num_cells, H, D]``."""

    k: torch.Tensor
    v: torch.Tensor
    per_layer: int
    slots: torch.Tensor
    kept: torch.Tensor
    num_kept: list[int]

    def of(self, x: torch.Tensor, layer: int, head: int) -> torch.Tensor:
        """The prompt's rows ``[63, D]``."""
        return x[self.slots + layer * self.per_layer, head]


def cells_of(num_kept: list[int], heads: int, dim: int, dtype: torch.dtype, seed: int = 0) -> Cells:
    """Laid out as in the pool; poison in every row of a slot that is not the prompt's."""
    generator = torch.Generator().manual_seed(seed)
    n, pool_rows = 63, 90
    storage = torch.full((len(num_kept), 2, pool_rows, heads, dim), NAN, dtype=dtype)
    slots = torch.randperm(pool_rows, generator=generator)[:n]
    storage[:, :, slots] = normal(len(num_kept), 2, n, heads, dim, seed=seed, dtype=dtype)
    picks = [
        torch.stack([torch.randperm(n, generator=generator)[:count].sort().values for _ in range(heads)])
        for count in num_kept
    ]
    flat = storage.view(-1, heads, dim)
    k, v = flat[: len(flat) - pool_rows], flat[pool_rows:]
    return Cells(k, v, 2 * pool_rows, slots, torch.cat(picks, dim=1), num_kept)


def bits(x: torch.Tensor) -> torch.Tensor:
    """What equal says no about for NaN and -0.0."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


HEADS = [(2, 100, torch.float32), (2, 100, torch.bfloat16), (1, 5, torch.float16)]


@twins("compaction")
@pytest.mark.parametrize("heads, dim, dtype", HEADS)
@pytest.mark.parametrize("num_kept", [[1, 1, 1], [7, 63, 40], [33, 0, 2], [20]])
@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
def test_each_head_gathers_its_own_rows_of_every_layer_and_reads_no_other(
    kernel, num_kept, heads, dim, dtype, slot_dtype
):
    """A slot that nobody keeps is out of range, and so is what lies beside the lists."""
    cells = cells_of(num_kept, heads, dim, dtype)
    k, v = (torch.full_like(x, NAN) for x in (cells.k, cells.v))
    unread = torch.ones(63, dtype=torch.bool).index_fill(0, cells.kept.flatten(), False)
    at, first, expected = cells.slots.masked_fill(unread, 10**9), 0, []
    for layer, count in enumerate(num_kept):
        for head, positions in enumerate(cells.kept[:, first : first + count]):
            own = at[positions] + layer * cells.per_layer
            k[own, head], v[own, head] = cells.k[own, head], cells.v[own, head]
        own = at[cells.kept[:, first : first + count].t()] + layer * cells.per_layer
        expected.append(torch.stack([x[own, torch.arange(heads)] for x in (cells.k, cells.v)]))
        first += count
    at = torch.cat([torch.tensor([10**9]), at, torch.tensor([10**9])]).to(slot_dtype)[1:-1]
    kept = torch.full((heads, sum(num_kept) + 2), 10**9)
    kept[:, 1:-1] = cells.kept
    rows = kernel.gather_rows(k, v, at, kept[:, 1:-1], num_kept, cells.per_layer)
    assert torch.equal(rows, torch.cat(expected, dim=1))
    k.fill_(NAN), v.fill_(NAN)
    assert rows.isfinite().all(), "a view of the buffer, whose slots are about to be reused"


@twins("compaction")
@pytest.mark.parametrize("heads, dim, dtype", HEADS)
@pytest.mark.parametrize("num_kept", [[1, 1, 1], [7, 62, 40], [33, 0, 2], [63]])
@pytest.mark.parametrize("sinks", [0, 3])
def test_merged_rows_are_the_means_of_their_buckets(kernel, num_kept, heads, dim, dtype, sinks):
    """Of each layer's and head's own; a bucket of one to the bit, the sign of a zero included."""
    cells = cells_of(num_kept, heads, dim, dtype, seed=sum(num_kept))
    cells.k[:, :, ::3] = -0.0
    before = bits(cells.k).clone(), bits(cells.v).clone()
    rows = kernel.gather_rows(*cells[:2], *cells[3:], cells.per_layer, True, sinks)
    assert rows.dtype == dtype and rows.shape == (2, sum(num_kept), heads, dim)
    assert torch.equal(bits(cells.k), before[0]) and torch.equal(bits(cells.v), before[1])
    first, sizes = 0, set()
    for layer, count in enumerate(num_kept):
        for head, kept in enumerate(cells.kept[:, first : first + count].tolist() if count else []):
            for x, ours in zip((cells.k, cells.v), rows[:, first : first + count, head], strict=True):
                exact = cells.of(x, layer, head)
                for row, members in enumerate(naive.buckets(exact, kept, "bucket_mean", sinks, 0.0)):
                    sizes.add(len(members))
                    if len(members) == 1:
                        assert torch.equal(bits(ours[row]), bits(exact[members[0]]))
                    assert_mean(ours[row], exact[members])
        first += count
    assert num_kept == [63] or max(sizes) > 1


@twins("compaction")
@pytest.mark.parametrize("kept", [[4, 8], [4, 9], [0, 4, 8], [3, 11], [11], [0], [1, 2, 3]])
@pytest.mark.parametrize("sinks", [0, 1, 2])
def test_buckets_meet_at_the_midpoint_which_belongs_to_the_lower(kernel, kept, sinks):
    """Powers of four: a sum says what is in it."""
    x = (4.0 ** torch.arange(12)).view(12, 1, 1)
    rows = kernel.gather_rows(x, -x, torch.arange(12), torch.tensor([kept]), [len(kept)], 0, True, sinks)
    buckets = naive.buckets(x[:, 0], kept, "bucket_mean", sinks, 0.0)
    sums = rows[0].flatten() * torch.tensor([len(members) for members in buckets])
    assert sums.tolist() == pytest.approx([sum(4.0**j for j in members) for members in buckets], rel=1e-6)
    assert torch.equal(rows[1], -rows[0])


@twins("compaction")
@pytest.mark.parametrize("heads, dim, dtype", [(2, 100, torch.bfloat16), (3, 5, torch.float32)])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_rows", [0, 1, 50])
def test_rows_are_written_to_their_cells_and_nowhere_else(kernel, id_dtype, heads, dim, dtype, num_rows):
    flat = torch.full((2 * 2 * 31, heads, dim), NAN, dtype=dtype)  # two layers of 31 slots, as in the pool
    k, v = flat[:-31], flat[31:]
    slots = torch.randperm(31, generator=torch.Generator().manual_seed(0))
    ids = torch.cat([slots, slots + 2 * 31])[:num_rows]
    rows = normal(2, num_rows + 3, heads, dim, dtype=dtype)[:, 2:-1]
    kernel.scatter_rows(k, v, ids.to(id_dtype), rows)
    assert torch.equal(k[ids], rows[0]) and torch.equal(v[ids], rows[1])
    assert int(flat.isfinite().sum()) == rows.numel()


@twins("compaction")
def test_rows_survive_a_move_within_one_buffer(kernel):
    """The kept rows may be written over slots that other kept rows came from."""
    k, v = normal(63, 2, 100), normal(63, 2, 100, seed=1)
    before = k.clone(), v.clone()
    kept = torch.stack([torch.arange(0, 60, 3), torch.arange(1, 61, 3)])
    target = torch.arange(1, 40, 2)
    kernel.scatter_rows(k, v, target, kernel.gather_rows(k, v, torch.arange(63), kept, [20], 0))
    for head in range(2):
        for x, old in zip((k, v), before, strict=True):
            assert torch.equal(x[target, head], old[kept[head], head])


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@twins("ragged_attention")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hq, hkv, dim", [(8, 2, 100), (7, 1, 64), (5, 5, 40)])
def test_decode_attends_to_its_own_cells_and_reads_no_other(kernel, dtype, hq, hkv, dim):
    lengths, scale = [63, 1, 17], 0.7 * dim**-0.5
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    indices = list(order[: sum(lengths)].to(torch.int32).split(lengths))
    k = normal(200, hkv, dim, seed=1, dtype=dtype)
    v = normal(200, hkv, dim, seed=2, dtype=dtype)
    k[order[sum(lengths) :]], v[order[sum(lengths) :]] = NAN, NAN
    q = normal(3, hq, dim, dtype=dtype) * 2
    out = kernel.ragged_decode(q, k, v, indices, scale).to(dtype)
    for request, cells in enumerate(indices):
        one = slice(request, request + 1)
        assert_attended(out[one], q[one], k[cells], v[cells], scale)


@twins("ragged_attention")
def test_order_and_repetition_of_requests_do_not_matter(kernel):
    """Two requests may read the same cells, and neither sees the other's."""
    k, v, q = normal(90, 2, 100, seed=1), normal(90, 2, 100, seed=2), normal(3, 8, 100)
    a, b = torch.arange(0, 63, dtype=torch.int32), torch.arange(40, 90, dtype=torch.int32)
    out = kernel.ragged_decode(q[[0, 1, 0]], k, v, [a, b, a], 0.1)
    assert torch.equal(out[0], out[2])
    assert torch.equal(kernel.ragged_decode(q[[1, 0]], k, v, [b, a], 0.1), out[[1, 0]])


def test_decode_writes_to_the_given_output_and_converts_a_pool_of_another_dtype():
    k, v = (normal(30, 2, 100, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
    q, cells = normal(2, 8, 100), [torch.arange(30), torch.arange(5, 9)]
    out = torch.full_like(q, NAN)
    returned = kernels.ragged_attention.ragged_decode(q, k, v, cells, 0.1, out=out)
    assert returned.data_ptr() == out.data_ptr()
    assert torch.equal(out, kernels.ragged_attention.ragged_decode(q, k.float(), v.float(), cells, 0.1))


# n, E: a whole prompt, a chunk behind a prefix, one row, more rows than one tile
@pytest.mark.parametrize("n, rows", [(63, 63), (63, 17), (63, 1), (363, 300)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hq, hkv, dim", [(8, 2, 100), (7, 1, 64), (5, 5, 40)])
def test_extend_attends_causally(n, rows, dtype, hq, hkv, dim):
    q = normal(rows, hq, dim, dtype=dtype) * 2
    k, v = normal(n, hkv, dim, seed=1, dtype=dtype), normal(n, hkv, dim, seed=2, dtype=dtype)
    out = kernels.ragged_attention.causal_extend(q, k, v, 0.7 * dim**-0.5)
    assert_attended(out, q, k, v, 0.7 * dim**-0.5)


@pytest.mark.parametrize("n, rows", [(63, 63), (63, 17), (363, 300)])
def test_extend_does_not_see_the_future(n, rows):
    q, k, v = normal(rows, 8, 100), normal(n, 2, 100, seed=1), normal(n, 2, 100, seed=2)
    before = kernels.ragged_attention.causal_extend(q, k, v, 0.1)
    cut = n - rows // 2
    k[cut:], v[cut:] = 1e3, 1e6
    after = kernels.ragged_attention.causal_extend(q, k, v, 0.1)
    seen = cut - (n - rows)
    assert torch.equal(after[:seen], before[:seen])
    assert (after[seen:] != before[seen:]).any()
