"""Index building, ragged decode and ragged extend in Triton's interpreter, and compiled for three GPUs."""

import json
import os
import subprocess
import sys

import pytest
import torch

from sglang_vlkv.kernels.ragged_attention import decode as decode_module
from sglang_vlkv.kernels.ragged_attention import indices as index_module
from sglang_vlkv.kernels.ragged_attention import reference
from sglang_vlkv.kernels.ragged_attention.rows import RowTable
from sglang_vlkv.kernels.ragged_attention.triton import RaggedDecode, RaggedIndices, ragged_extend
from tests.rounding import assert_attended
from tests.test_kernels import NAN, normal

pytestmark = pytest.mark.usefixtures("one_thread")

NOT_A_CELL = -(10**9)
NUM_ROWS, CONTEXT = 40, 300


class Batch:
    """Requests in rows of a table in which every other row is poison.

    ``requests``: (sequence length, own tokens, fixed cells per layer, sliding slots per layer); an
    exact request owns all.
    """

    def __init__(self, num_layers: int, requests: list[tuple], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.cells_per_layer = 1000
        self.table = RowTable.empty(NUM_ROWS, num_layers, "cpu")
        for part in self.table:
            part.fill_(NOT_A_CELL)
        self.req_to_token = torch.full((NUM_ROWS, CONTEXT), NOT_A_CELL, dtype=torch.int32)
        self.fixed_cells: list[torch.Tensor | None] = [None] * NUM_ROWS
        self.rows = torch.randperm(NUM_ROWS, generator=generator)[: len(requests)]
        self.seq_lens = torch.tensor([length for length, *_ in requests])
        for row, (length, own, fixed, sliding) in zip(self.rows.tolist(), requests):
            self.table.first_own[row] = length - own
            for part, counts in ((self.table.fixed, fixed), (self.table.sliding, sliding)):
                part[row, 0] = 0
                part[row, 1:] = torch.tensor(counts or [0] * num_layers).cumsum(0)
            if fixed:
                ids = torch.randint(0, 2**31, (sum(fixed),), generator=generator).to(torch.int32)
                self.fixed_cells[row] = ids
                self.table.cells[row] = ids.data_ptr()
            slots = torch.randperm(900, generator=generator)[:length]
            self.req_to_token[row, length - max(own, 0) : length] = slots[: max(own, 0)]

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.build_indices(self.table, self.fixed_cells, *self.arguments)

    @property
    def arguments(self) -> tuple:
        return self.rows, self.seq_lens, self.req_to_token, self.cells_per_layer


EXACT, PADDED = (63, 63, None, None), (7, 0, None, None)
BATCHES = {
    "exact": (3, [EXACT, (1, 1, None, None), (300, 300, None, None)]),
    "one": (5, [(299, 299, None, None)]),
    "compacted": (4, [(100, 9, [5, 0, 63, 17], None), (80, 1, [0, 0, 0, 70], None)]),
    "sliding": (3, [(100, 40, [2, 33, 1], [40, 1, 7]), (90, 20, None, [3, 0, 20])]),
    "padded": (2, [PADDED, (7, -3, [4, 4], None), EXACT, PADDED, PADDED]),
    "all padded": (2, [PADDED, PADDED]),
    "mixed": (
        5,
        [
            EXACT,
            (200, 30, [1, 90, 0, 64, 33], None),
            (7, -1, [4, 4, 0, 1, 2], [1, 1, 1, 1, 1]),
            (250, 100, [17, 0, 1, 128, 2], [0, 100, 16, 17, 64]),
            (1, 1, None, None),
        ],
    ),
    "many": (2, [(1 + i, 1 + i % 5 if i % 3 else i - 20, [i % 4, 2], None) for i in range(33)]),
}


@pytest.fixture
def few_programs(monkeypatch):
    """As many tiles and turns as on a GPU, of fewer indices."""
    monkeypatch.setattr(index_module, "TILE", 16)
    monkeypatch.setattr(index_module, "PROGRAMS", 15)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("seq_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_layers, requests", BATCHES.values(), ids=BATCHES)
def test_all_layers_lists_are_built_and_nothing_else_is_written(num_layers, requests, seq_dtype):
    batch = Batch(num_layers, requests)
    batch.seq_lens = batch.seq_lens.to(seq_dtype)
    expected_indptr, expected = batch.expected()
    lists = RaggedIndices(num_layers, len(requests) + 3, max(1, len(expected)) + 37, "cpu")
    lists.indptr.fill_(NOT_A_CELL), lists.indices.fill_(NOT_A_CELL)
    indptr, indices = lists.build(batch.table, *batch.arguments)
    assert indptr.dtype == indices.dtype == torch.int32
    assert torch.equal(indptr, expected_indptr)
    assert torch.equal(indices[: len(expected)], expected)
    assert (indices[len(expected) :] == NOT_A_CELL).all()
    assert (lists.indptr.view(-1)[indptr.numel() :] == NOT_A_CELL).all()


@pytest.mark.usefixtures("few_programs")
def test_an_exact_batch_sees_its_own_slots_in_order():
    """What the reference must not get wrong either."""
    batch = Batch(2, [EXACT, (5, 5, None, None)])
    indptr, indices = RaggedIndices(2, 2, 200, "cpu").build(batch.table, *batch.arguments)
    assert indptr.tolist() == [[0, 63, 68], [68, 131, 136]]
    first, second = (batch.req_to_token[row, :n] for row, n in zip(batch.rows, (63, 5)))
    assert torch.equal(indices[:136], torch.cat([first, second, first + 1000, second + 1000]))


@pytest.mark.usefixtures("few_programs")
def test_lists_that_do_not_fit_end_at_the_capacity():
    batch = Batch(*BATCHES["mixed"])
    expected_indptr, expected = batch.expected()
    lists = RaggedIndices(5, 5, len(expected), "cpu")
    lists.indices.fill_(NOT_A_CELL)
    lists.capacity = 333
    indptr, indices = lists.build(batch.table, *batch.arguments)
    assert torch.equal(indptr, expected_indptr.clamp(max=333))
    assert torch.equal(indices[:333], expected[:333])
    assert (indices[333:] == NOT_A_CELL).all()


@pytest.mark.usefixtures("few_programs")
def test_lists_are_built_again_in_place_for_any_batch_size():
    lists = RaggedIndices(2, 512, 4000, "cpu")
    for name in ("many", "padded", "many"):
        batch = Batch(*BATCHES[name])
        expected_indptr, expected = batch.expected()
        indptr, indices = lists.build(batch.table, *batch.arguments)
        assert indptr.data_ptr() == lists.indptr.data_ptr() and indptr.is_contiguous()
        assert torch.equal(indptr, expected_indptr) and torch.equal(indices[: len(expected)], expected)


def test_wrong_tables_and_batches_are_refused():
    batch = Batch(2, [EXACT])
    lists = RaggedIndices(2, 1, 200, "cpu")
    table, (rows, lens, tokens, cells) = batch.table, batch.arguments
    with pytest.raises(ValueError, match=r"\[N, L \+ 1\]"):
        lists.build(table._replace(fixed=table.fixed[:, :2]), rows, lens, tokens, cells)
    with pytest.raises(ValueError, match="1 <= B <= 1"):
        lists.build(table, rows.repeat(2), lens.repeat(2), tokens, cells)
    with pytest.raises(ValueError, match="contiguous"):
        lists.build(table, rows, lens, tokens.t().contiguous().t(), cells)
    with pytest.raises(ValueError, match="int64"):
        lists.build(table, rows.int(), lens, tokens, cells)


def ragged(lengths: list[list[int]], hkv: int, dim: int, dtype: torch.dtype):
    """Per layer and request that many cells, in no order: indptr, indices, K and V; NaN in all others."""
    counts = torch.tensor(lengths)
    ends = counts.flatten().cumsum(0).view(counts.shape)
    indptr = torch.cat([(ends - counts)[:, :1], ends], 1).to(torch.int32)
    total = int(counts.sum())
    named = torch.randperm(total + 50, generator=torch.Generator().manual_seed(3))[:total]
    k, v = torch.full((2, total + 50, hkv, dim), NAN, dtype=dtype)
    for seed, cells in enumerate((k, v)):
        cells[named] = normal(total, hkv, dim, seed=1 + seed, dtype=dtype)
    # Behind the end no cell's id may be used.
    indices = torch.cat([named, torch.full((9,), 2**31 - 1)]).to(torch.int32)
    return indptr, indices, k, v


def planned(
    indptr: torch.Tensor, hq: int, hkv: int, dim: int, num_sms: int = 1, spare: int = 2
) -> RaggedDecode:
    num_layers, entries = indptr.shape
    decode = RaggedDecode(num_layers, entries - 1 + spare, hq, hkv, dim, "cpu", num_sms)
    for table in (decode.first_chunk, decode.owner, decode.chunk_rows):
        table.fill_(NOT_A_CELL)
    decode.partial.fill_(NAN), decode.partial_lse.fill_(NAN)
    decode.plan(indptr)
    return decode


SHAPES = [(8, 2, 100), (7, 1, 64), (3, 3, 5), (16, 1, 128)]
LENGTHS = [[63, 0, 1, 330, 64, 17], [0, 700, 65, 0, 2, 128]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hq, hkv, dim", SHAPES)
def test_decode_attends_to_its_own_cells_and_reads_no_other(dtype, hq, hkv, dim):
    indptr, indices, k, v = ragged(LENGTHS, hkv, dim, dtype)
    decode, scale = planned(indptr, hq, hkv, dim), 0.7 * dim**-0.5
    chunks = decode.first_chunk[:, :7].diff(dim=1)
    assert chunks.min() == 0 and (chunks == 1).any() and chunks.max() > 2
    q = normal(6, hq, dim, dtype=dtype) * 2
    for layer in range(2):
        out = torch.full_like(q, NAN)
        decode.partial.fill_(NAN), decode.partial_lse.fill_(NAN)
        assert decode.run(layer, q, k, v, indptr, indices, scale, out) is out
        written = torch.zeros(decode.max_chunks, dtype=torch.bool)
        written[: int(chunks[layer].sum())] = (chunks[layer] > 1).repeat_interleave(chunks[layer])
        for partial in (decode.partial, decode.partial_lse):
            assert partial[written].isfinite().all() and partial[~written].isnan().all()
        for request, (start, end) in enumerate(zip(indptr[layer], indptr[layer, 1:])):
            one, cells = slice(request, request + 1), indices[start:end].long()
            if start == end:
                assert (out[one] == 0).all()
            else:
                assert_attended(out[one], q[one], k[cells], v[cells], scale)


def test_decode_agrees_with_the_loops():
    indptr, indices, k, v = ragged([[63, 1, 200]], 2, 100, torch.float32)
    q = normal(3, 8, 100)
    out = planned(indptr, 8, 2, 100).run(0, q, k, v, indptr, indices, 0.1)
    lists = [indices[start:end].long() for start, end in zip(indptr[0], indptr[0, 1:])]
    loops = reference.ragged_decode(q, k, v, lists, 0.1)
    for request, cells in enumerate(lists):
        for attended in (out, loops):
            assert_attended(attended[request, None], q[request, None], k[cells], v[cells], 0.1)


def test_large_logits_neither_overflow_nor_lose_the_smaller_chunks(monkeypatch):
    """The chunks' maxima are far apart: 3e4 where exp ends at 88. They are merged two at a time."""
    monkeypatch.setattr(decode_module, "MERGED", 2)
    indptr, indices, k, v = ragged([[700]], 1, 64, torch.float32)
    q, cells = normal(1, 2, 64) * 1000, indices[:700].long()
    out = planned(indptr, 2, 1, 64, num_sms=4).run(0, q, k, v, indptr, indices, 1.0)
    assert_attended(out, q, k[cells], v[cells], 1.0)


def test_decode_reads_queries_between_others_and_converts_a_pool_of_another_dtype():
    indptr, indices, k, v = ragged([[63, 5]], 2, 64, torch.bfloat16)
    packed = torch.full((2, 7, 64), NAN)
    q = packed[:, 1:5].copy_(normal(2, 4, 64))
    decode = planned(indptr, 4, 2, 64)
    out = decode.run(0, q, k, v, indptr, indices, 0.1)
    assert torch.equal(out, decode.run(0, q.contiguous(), k.float(), v.float(), indptr, indices, 0.1))


@pytest.mark.parametrize("num_sms", [1, 30])
def test_chunks_tile_each_request_and_none_is_larger_than_it_must_be(num_sms):
    lengths = [
        [63, 0, 1, 3300, 64, 17],
        [0, 70_000, 65, 0, 2, 128],
        [0] * 6,
        [5000] * 6,
        [1] * 6,
        [64, 128, 192, 256, 320, 400_000],
    ]
    counts = torch.tensor(lengths)
    ends = counts.flatten().cumsum(0).view(counts.shape)
    indptr = torch.cat([(ends - counts)[:, :1], ends], 1).to(torch.int32)
    decode = planned(indptr, 8, 2, 128, num_sms, spare=506)
    limit = decode.num_chunks(6)
    assert limit <= decode.max_chunks
    for layer, requests in enumerate(lengths):
        expected = reference.plan_chunks(requests, decode.tile, limit)
        first, owner, rows = decode.first_chunk[layer], decode.owner[layer], int(decode.chunk_rows[layer])
        owners = owner[: len(expected)].tolist()
        starts = [(c - int(first[b])) * rows for c, b in enumerate(owners)]
        assert [
            (b, start, min(start + rows, requests[b])) for b, start in zip(owners, starts)
        ] == expected
        assert first[6] == len(expected) <= limit
        assert (owner[len(expected) : limit] == -1).all()
        # Balance: no chunk is more than a fair share of the layer's rows, and a tile.
        share = sum(requests) / (limit - 6) + decode.tile
        assert rows <= decode.tile or rows <= share
        assert (owner[limit:] == NOT_A_CELL).all() and (first[7:] == NOT_A_CELL).all()


def test_decode_refuses_what_was_not_planned_and_what_it_cannot_read():
    indptr, indices, k, v = ragged([[63, 5]], 2, 64, torch.float32)
    decode, q = planned(indptr, 4, 2, 64), normal(2, 4, 64)
    with pytest.raises(ValueError, match="2 requests were planned, not 1"):
        decode.run(0, q[:1], k, v, indptr[:, :2].contiguous(), indices, 1.0)
    with pytest.raises(ValueError, match=r"\[B, Hq, D\]"):
        decode.run(0, q[:, :2], k, v, indptr, indices, 1.0)
    with pytest.raises(ValueError, match="layer 1 of 1"):
        decode.run(1, q, k, v, indptr, indices, 1.0)
    with pytest.raises(ValueError, match="contiguous"):
        decode.run(0, q.transpose(1, 2).contiguous().transpose(1, 2), k, v, indptr, indices, 1.0)
    with pytest.raises(ValueError, match="contiguous"):
        decode.run(0, q, k.transpose(0, 1).contiguous().transpose(0, 1), v, indptr, indices, 1.0)
    with pytest.raises(ValueError, match="one dtype"):
        decode.run(0, q, k, v.bfloat16(), indptr, indices, 1.0)
    with pytest.raises(ValueError, match="out must be"):
        decode.run(0, q, k, v, indptr, indices, 1.0, torch.empty(2, 4, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="int32"):
        decode.plan(indptr.long())
    with pytest.raises(ValueError, match="cannot share"):
        RaggedDecode(1, 1, 5, 2, 64, "cpu")


# Rows and, of them, new tokens of each request.
EXTENDS = [[(63, 17), (0, 0), (1, 1), (130, 40), (20, 0), (33, 33)], [(150, 2), (1, 1)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hq, hkv, dim", SHAPES)
@pytest.mark.parametrize("requests", EXTENDS, ids=["long", "few"])
def test_extend_attends_causally_behind_any_prefix(requests, dtype, hq, hkv, dim):
    # A layer before it: offsets are not the layer's own.
    indptr, indices, k, v = ragged([[7] * len(requests), [n for n, _ in requests]], hkv, dim, dtype)
    qo_indptr = torch.tensor([0, *(new for _, new in requests)]).cumsum(0).to(torch.int32)
    q, scale = normal(int(qo_indptr[-1]), hq, dim, dtype=dtype) * 2, 0.7 * dim**-0.5
    out, longest = torch.full_like(q, NAN), max(new for _, new in requests)
    assert ragged_extend(q, k, v, qo_indptr, indptr[1], indices, scale, longest, out) is out
    for request, (_, new) in enumerate(requests):
        mine = slice(*qo_indptr[request : request + 2].tolist())
        cells = indices[indptr[1, request] : indptr[1, request + 1]].long()
        if new:
            assert_attended(out[mine], q[mine], k[cells], v[cells], scale)


def test_extend_agrees_with_the_loops_and_does_not_see_the_future():
    indptr, indices, k, v = ragged([[40, 25]], 2, 20, torch.float32)
    qo_indptr = torch.tensor([0, 12, 37], dtype=torch.int32)
    q = torch.full((37, 9, 20), NAN)[:, 2:8].copy_(normal(37, 6, 20))
    arguments = qo_indptr, indptr[0], indices, 0.3
    before = ragged_extend(q, k, v, *arguments, 99)
    loops = reference.ragged_extend(q, k, v, *arguments)
    for queries, rows in ((slice(0, 12), slice(0, 40)), (slice(12, 37), slice(40, 65))):
        cells = indices[rows].long()
        for attended in (before, loops):
            assert_attended(attended[queries], q[queries], k[cells], v[cells], 0.3)
    future = indices[34:40].long()
    k[future], v[future] = 1e3, 1e6
    after = ragged_extend(q, k, v, *arguments, 25)
    assert torch.equal(after[:6], before[:6]) and torch.equal(after[12:], before[12:])
    assert (after[6:12] != before[6:12]).any(-1).all()


def test_queries_without_rows_are_zero():
    """More queries than rows: the first see nothing."""
    indptr, indices, k, v = ragged([[3, 0]], 1, 16, torch.float32)
    qo_indptr, q = torch.tensor([0, 5, 7], dtype=torch.int32), normal(7, 2, 16)
    out = ragged_extend(q, k, v, qo_indptr, indptr[0], indices, 0.3, 5)
    assert (out[[0, 1, 5, 6]] == 0).all()
    assert_attended(out[2:5], q[2:5], k[indices[:3].long()], v[indices[:3].long()], 0.3)


def test_extend_refuses_offsets_that_it_cannot_read():
    indptr, indices, k, v = ragged([[3, 2]], 1, 16, torch.float32)
    q, offsets = normal(4, 2, 16), torch.tensor([0, 2, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="qo_indptr"):
        ragged_extend(q, k, v, offsets.long(), indptr[0], indices, 0.3, 2)
    with pytest.raises(ValueError, match="indptr must be"):
        ragged_extend(q, k, v, offsets, indptr[0, :2], indices, 0.3, 2)


def compile_ahead(*arguments, **environment):
    command = [sys.executable, "-m", "sglang_vlkv.kernels.aot", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_kernels_compile_for_three_architectures_without_spilling(tmp_path):
    done = compile_ahead("--json", str(tmp_path / "table.json"))
    assert done.returncode == 0, done.stderr
    compiled = json.loads((tmp_path / "table.json").read_text())
    kernels = {
        "_build_indices", "_plan_chunks", "_decode_chunks", "_merge_chunks", "_extend", "_row_statistics",
        "_combine", "_column_sums", "_select_rows", "_copy_rows", "_merge_rows", "_scatter_rows",
        "_plan_kernel",
    }  # fmt: skip
    assert {(r["kernel"], r["arch"]) for r in compiled} == {(k, a) for k in kernels for a in (80, 90, 100)}
    assert len(done.stdout.splitlines()) == 2 + len(compiled)
    # Not once per layer or batch size of a range: a server would compile while it serves.
    assert len({(r["case"], r["kernel"], r["arch"]) for r in compiled}) == len(compiled)
    for r in compiled:
        stack = 8 if (r["kernel"], r["arch"]) == ("_column_sums", 100) else 0  # of no spilled register
        assert r["spills"] <= stack and 0 < r["registers"] <= 255, r
    decode = [r["shared"] for r in compiled if r["kernel"] == "_decode_chunks"]
    assert all(3 * (shared + 1024) <= 233_472 for shared in decode), "three blocks to a multiprocessor"


FLOAT32 = """
import torch
from sglang_vlkv.kernels.aot import compiled_for
from sglang_vlkv.kernels.ragged_attention.triton import RaggedDecode, ragged_extend

q, cells, indices = torch.empty(2, 4, 64), torch.empty(100, 2, 64), torch.empty(64, dtype=torch.int32)
indptr, decode = torch.empty(1, 3, dtype=torch.int32), RaggedDecode(1, 2, 4, 2, 64, "cpu")
with compiled_for(90) as compiled:
    decode.plan(indptr)
    decode.run(0, q, cells, cells, indptr, indices, 1.0)
    ragged_extend(q, cells, cells, indptr[0], indptr[0], indices, 1.0, 1)
print(*(r.kernel for r in compiled))
"""


def test_float32_is_not_rounded_to_the_tensor_cores_tf32(tmp_path):
    """The interpreter would not notice."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FLOAT32], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["_plan_chunks", "_decode_chunks", "_merge_chunks", "_extend"], done.stderr
    code = [file.read_text() for file in tmp_path.rglob("*.ptx")]
    assert len(code) == 4
    assert not any("mma" in ptx for ptx in code) and sum("fma.rn.f32" in ptx for ptx in code) >= 2


def test_interpreted_kernels_are_not_compiled():
    done = compile_ahead("--only", "ragged_attention", TRITON_INTERPRET="1")
    assert done.returncode != 0 and "TRITON_INTERPRET is set" in done.stderr
    from sglang_vlkv.kernels.aot import compiled_for

    with pytest.raises(RuntimeError, match="when Triton was imported"), compiled_for(90):
        pass
