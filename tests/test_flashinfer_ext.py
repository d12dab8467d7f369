"""flashinfer_ext without a GPU: the device's plans, FlashInfer's own planner, its kernels emulated."""

import ast
import inspect
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib.util import find_spec

import pytest
import torch

from flashinfer_ext import RaggedDecode, RaggedExtend, reference, upstream
from flashinfer_ext.layout import (
    DECODE_GROUP_SIZES,
    Grid,
    Heads,
    Layout,
    cuda_core_layout,
    tensor_core_layout,
)
from flashinfer_ext.plan_kernel import plan_layers
from tests.flashinfer_planner import SENTINEL, Planner, why_not

H100 = Grid(num_sms=132, num_blocks_per_sm=4)
SMALL = Grid(num_sms=20, num_blocks_per_sm=3)
QWEN_7B = Heads(28, 4, 128)  # G = 7
QWEN_32B = Heads(40, 8, 128)  # G = 5
MHA = Heads(16, 16, 64)  # G = 1
G4, G8, G3 = Heads(32, 8, 128), Heads(64, 8, 128), Heads(12, 4, 64)
WIDE = Heads(24, 1, 256)  # 24 packed rows: a tile of 64
TILE_128 = Heads(65, 1, 128)
DIM_256 = Heads(16, 1, 256)
MANY = Heads(140, 2, 256)  # 70 packed rows over tiles of 64: two query tiles

LAYOUTS = {False: cuda_core_layout, True: tensor_core_layout}
REFERENCES = {False: reference.cuda_core_plan, True: reference.tensor_core_plan}


class Case:
    """A batch over several layers."""

    def __init__(
        self, name: str, tensor_cores: bool, heads: Heads, grid: Grid, lengths: list[list[int]]
    ) -> None:
        self.name, self.tensor_cores, self.heads, self.grid, self.lengths = (
            name,
            tensor_cores,
            heads,
            grid,
            lengths,
        )

    def __str__(self) -> str:
        kind = "tensor" if self.tensor_cores else "cuda"
        return f"{self.name}-{kind}-G{self.heads.group_size}-L{len(self.lengths)}-B{len(self.lengths[0])}"

    def layout(self) -> Layout:
        return LAYOUTS[self.tensor_cores](len(self.lengths[0]), self.heads, self.grid)

    def expected(self) -> list[reference.Plan]:
        return [REFERENCES[self.tensor_cores](n, self.heads, self.grid) for n in self.lengths]


SHAPES = [
    ("B1-huge", [[200_000], [0], [128], [129], [131_072]]),
    ("B64-equal", [[900] * 64, [1] * 64, [128] * 64]),
    (
        "uneven",
        [[30_000, 3, 800, 128, 1], [1, 1, 1, 1, 1], [5, 40_000, 129, 256, 257], [64, 64, 64, 64, 90_000]],
    ),
    ("below-chunk", [[1, 2, 127, 64, 128, 3, 9, 100], [128] * 8]),
    ("zeros", [[0, 0, 0], [0, 7, 0], [0, 0, 9000], [500, 0, 0]]),
    ("B64-empty", [[0] * 64, [0] * 63 + [5]]),
    ("B33-ladder", [[37 * i + 1 for i in range(33)], [(7919 * i) % 5000 + 1 for i in range(33)]]),
    ("B512", [[(i * 7919) % 3000 + 1 for i in range(512)], [1] * 512]),
]
KINDS = [
    *((True, heads) for heads in (QWEN_7B, QWEN_32B, G4, G8, WIDE, MANY, TILE_128, DIM_256)),
    *((False, heads) for heads in (MHA, G3, G4, G8)),
]


def ugly() -> Iterator[Case]:
    for name, lengths in SHAPES:
        for i, (tensor_cores, heads) in enumerate(KINDS):
            yield Case(name, tensor_cores, heads, (H100, SMALL)[i % 2], lengths)


UGLY = list(ugly())


def drawn(count: int, seed: int, layers: int = 2) -> Iterator[Case]:
    rng = random.Random(seed)
    for i in range(count):
        tensor_cores, heads = rng.choice(KINDS)
        grid = Grid(rng.choice([1, 8, 46, 108, 132, 148]) + heads.num_kv_heads, rng.randint(1, 8))
        batch_size = rng.choice([1, 2, 3, 7, 8, 15, 16, 17, 40, 100])
        longest = rng.choice([1, 100, 129, 1000, 20_000, 300_000])
        some = [0, 1, 127, 128, 129, longest] if rng.random() < 0.5 else [longest]
        lengths = [
            [rng.choice(some) if rng.random() < 0.5 else rng.randint(0, longest) for _ in range(batch_size)]
            for _ in range(layers)
        ]
        yield Case(f"drawn{i}", tensor_cores, heads, grid, lengths)


DRAWN = list(drawn(50, seed=1))


def indptr_of(lengths: list[list[int]]) -> torch.Tensor:
    """``[L, B + 1]``; layers' segments lie in no order and apart."""
    offsets = torch.tensor(lengths).cumsum(1)
    begin = torch.tensor([1_000_003 * ((3 * i + 2) % 11) for i in range(len(lengths))])[:, None]
    return torch.cat([begin, begin + offsets], 1).int()


@cache  # both the reference and FlashInfer's planner are compared with it
def planned(case: Case) -> torch.Tensor:
    """``[L + 1, n]``: the int workspace after planning, poisoned before, one layer and 48 bytes too large."""
    layout = case.layout()
    ints = torch.full(
        (len(case.lengths) + 1, -(-layout.int_bytes // 16) * 16 + 48), SENTINEL, dtype=torch.uint8
    )
    plan_layers(indptr_of(case.lengths), ints, layout)
    return ints


def written(layout: Layout, plan: reference.Plan, like: torch.Tensor) -> torch.Tensor:
    """The bytes of one layer's workspace that holds ``plan``, poisoned elsewhere; unused list entries are 0."""
    ints = torch.full_like(like, SENTINEL)

    def put(offset: int, values: list[int], dtype: torch.dtype = torch.int32) -> None:
        data = torch.tensor(values, dtype=dtype).view(torch.uint8)
        assert offset >= 0 and (ints[offset : offset + len(data)] == SENTINEL).all(), "arrays overlap"
        ints[offset : offset + len(data)] = data

    def listed(values: list[int]) -> list[int]:
        return values + [0] * (plan.padded_batch_size - len(values))

    put(layout.request_indices, listed(plan.request_indices))
    put(layout.kv_tile_indices, listed(plan.kv_tile_indices))
    put(layout.o_indptr, plan.o_indptr)
    put(layout.kv_chunk_size, [plan.kv_chunk_size])
    if plan.block_valid_mask is not None:
        put(layout.block_valid_mask, plan.block_valid_mask, torch.bool)
    if plan.qo_tile_indices is not None:
        put(layout.qo_tile_indices, listed(plan.qo_tile_indices))
        put(layout.merge_indptr, plan.merge_indptr)
        put(layout.total_num_rows, [plan.total_num_rows])
    return ints


def check_device_plan(case: Case) -> int:
    """Layers whose plan is, byte for byte, the reference's; those that upstream cannot plan are left out."""
    layout, ints, compared = case.layout(), planned(case), 0
    for layer, plan in enumerate(case.expected()):
        if plan.overflows:
            check_every_row_once(case, layer, ints)
            continue
        assert torch.equal(ints[layer], written(layout, plan, ints[layer])), (str(case), layer)
        compared += 1
    assert (ints[-1] == SENTINEL).all()
    return compared


def check_every_row_once(case: Case, layer: int, ints: torch.Tensor) -> None:
    """The plan fits its grid, covers each row of each request once, and gives an empty request one chunk."""
    layout = case.layout()

    def at(offset: int, count: int) -> list[int]:
        return ints[layer, offset : offset + 4 * count].view(torch.int32).tolist()

    (chunk,) = at(layout.kv_chunk_size, 1)
    total = at(layout.o_indptr, len(case.lengths[layer]) + 1)[-1]
    assert total <= layout.num_blocks
    chunks = [(r, t) for r, n in enumerate(case.lengths[layer]) for t in range(-(-max(n, 1) // chunk))]
    assert (
        list(zip(at(layout.request_indices, total), at(layout.kv_tile_indices, total), strict=True)) == chunks
    )
    mask = ints[layer, layout.block_valid_mask :][: layout.num_blocks]
    assert mask.tolist() == [i < total for i in range(layout.num_blocks)]


@pytest.mark.parametrize("case", UGLY, ids=str)
def test_device_plans_are_the_references(case):
    assert check_device_plan(case) >= len(case.lengths) - (case.name == "zeros") * 4


def test_device_plans_are_the_references_on_random_batches():
    assert sum(check_device_plan(case) for case in DRAWN) > 80


def test_empty_requests_that_overflow_upstream_fit_here():
    grid, lengths = (
        Grid(8, 4),
        [[0] * 3 + [50_000, 700, 0], [0, 20_000, 0, 20_000, 0, 0]],
    )  # 2 tiles per KV head of 16
    case = Case("overflow", False, Heads(4, 4, 64), grid, lengths)
    assert [plan.overflows for plan in case.expected()] == [True, True]
    assert check_device_plan(case) == 0


@pytest.fixture(scope="module")
def planner(tmp_path_factory) -> Planner:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    return Planner(tmp_path_factory.mktemp("planner"))


def check_flashinfers_plan(
    planner: Planner, case: Case, plans: list[reference.Plan], ints: torch.Tensor | None
) -> int:
    """Layers that FlashInfer's planner plans as the reference does and, given ``ints``, as the device did."""
    layout, compared = case.layout(), 0
    for layer, (lengths, plan) in enumerate(zip(case.lengths, plans, strict=True)):
        theirs = planner.plan(
            case.tensor_cores, lengths, case.heads, case.grid, layout.int_bytes, layout.float_bytes
        )
        assert theirs.plan_info == list(layout.plan_info)
        if plan.overflows:
            continue
        size = layout.int_bytes
        unused = 4 * (
            plan.padded_batch_size - len(plan.request_indices)
        )  # bytes at a list's end, which they do not write
        lists = [layout.request_indices, layout.kv_tile_indices, layout.qo_tile_indices]
        ours_twice = [
            written(layout, plan, theirs.ints[:size]),
            *([] if ints is None else [ints[layer, :size].clone()]),
        ]
        for ours in ours_twice:
            for end in (begin + 4 * plan.padded_batch_size for begin in lists if begin >= 0):
                ours[end - unused : end] = SENTINEL
            assert torch.equal(theirs.ints[:size], ours), (str(case), layer)
        compared += 1
    return compared


@pytest.mark.parametrize("case", UGLY, ids=str)
def test_device_plans_are_flashinfers(planner, case):
    check_flashinfers_plan(planner, case, case.expected(), planned(case))


def test_device_plans_are_flashinfers_on_random_batches(planner):
    assert sum(check_flashinfers_plan(planner, case, case.expected(), planned(case)) for case in DRAWN) > 80


def test_the_reference_is_flashinfers_planner(planner):
    cases = drawn(1000, seed=3)
    assert sum(check_flashinfers_plan(planner, case, case.expected(), None) for case in cases) > 1700


@pytest.mark.parametrize("tensor_cores, heads", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3, 64, 300])
def test_layouts_take_exactly_what_flashinfer_takes(planner, tensor_cores, heads, batch_size):
    layout = LAYOUTS[tensor_cores](batch_size, heads, H100)
    lengths = [300] * batch_size

    def plan(int_bytes: int, float_bytes: int):
        return planner.plan(tensor_cores, lengths, heads, H100, int_bytes, float_bytes)

    assert plan(layout.int_bytes, layout.float_bytes).plan_info == list(layout.plan_info)
    assert plan(layout.int_bytes - 1, layout.float_bytes) is None
    if layout.split_kv:
        assert plan(layout.int_bytes, layout.float_bytes - 1) is None


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_query_tiles_are_flashinfers_at_every_group_size(planner, head_dim):
    for group in range(1, 132):
        heads = Heads(2 * group, 2, head_dim)
        layout = tensor_core_layout(3, heads, H100)
        theirs = planner.plan(True, [700, 1, 90], heads, H100, layout.int_bytes, layout.float_bytes)
        assert theirs.plan_info == list(layout.plan_info), group


@pytest.mark.parametrize("num_sms", [46, 108, 132, 148])
@pytest.mark.parametrize("num_blocks_per_sm", [1, 3, 7, 16])
def test_the_workspace_tells_the_occupancy(num_sms, num_blocks_per_sm):
    for heads in (MHA, G3, G4, G8, Heads(32, 32, 128)):
        layout = cuda_core_layout(1, heads, Grid(num_sms, num_blocks_per_sm))
        assert upstream.blocks_per_sm(layout.float_bytes, num_sms, heads) == num_blocks_per_sm


def test_larger_batches_never_need_less_than_what_is_allocated():
    for tensor_cores, heads in KINDS:
        decode = RaggedDecode(
            *(
                2,
                70,
                heads.num_q_heads,
                heads.num_kv_heads,
                heads.head_dim,
                torch.bfloat16,
                torch.bfloat16,
                "cpu",
            ),
            use_tensor_cores=tensor_cores,
            num_sms=20,
            num_blocks_per_sm=3,
        )
        for batch_size in range(1, 71):
            layout = decode.layout(batch_size)
            assert (
                layout.int_bytes <= decode.int_workspace.shape[1]
                and layout.float_bytes <= decode._floats.numel()
            )


class Kernels:
    """FlashInfer's decode kernels as their source has them, from the arguments that ``run`` gives them.

    Blocks run in any order; partial results that no block wrote are NaN.
    """

    def run(self, *args: object) -> None:
        a = dict(zip(upstream.RUN_ARGUMENTS, args, strict=True))
        assert (a["kv_layout_code"], a["window_left"], a["enable_pdl"]) == (0, -1, False)
        keys = "blocks v s request_indices kv_tile_indices o_indptr mask chunk graph split".split()
        info = dict(zip(keys, a["plan_info_vec"], strict=True))
        batch_size = a["q"].shape[0]
        at = self.reader(a)
        partial, lse = self.partials(info["blocks"], a, info["split"])
        for block in self.order(info["blocks"]):
            if info["split"] and not at(info["mask"], block, 1):
                continue
            request, tile = at(info["request_indices"], block), at(info["kv_tile_indices"], block)
            chunk = at(info["chunk"], 0) if info["split"] else 1 << 30
            partial[block], lse[block] = self.attend(a, request, tile * chunk, (tile + 1) * chunk)
        rows = [range(at(info["o_indptr"], i), at(info["o_indptr"], i + 1)) for i in range(batch_size)]
        for i in range(batch_size):
            a["o"][i] = self.merged(partial, lse, rows[i]) if info["split"] else partial[i]

    def paged_run(self, *args: object) -> None:
        a = dict(zip(upstream.PAGED_RUN_ARGUMENTS, args, strict=True))
        assert (a["mask_mode"], a["layout"], a["window_left"], a["enable_pdl"]) == (0, 0, -1, False)
        assert a["workspace_size"] == a["float_workspace_buffer"].numel()
        keys = "blocks rows total_rows tile_q request_indices qo_tile_indices kv_tile_indices merge_indptr"
        info = dict(zip(f"{keys} o_indptr chunk v s mask graph split".split(), a["plan_info_vec"], strict=True))
        assert info["split"] == info["graph"] == 1
        num_q_heads, num_kv_heads = a["q"].shape[1], a["paged_k_cache"].shape[2]
        group, at = num_q_heads // num_kv_heads, self.reader(a)
        partial, lse = self.partials(-(-info["blocks"] * info["tile_q"] // group), a)
        chunk = at(info["chunk"], 0)
        for block in self.order(info["blocks"]):
            if not at(info["mask"], block, 1):
                continue
            request = at(info["request_indices"], block)
            q_tile, tile = at(info["qo_tile_indices"], block), at(info["kv_tile_indices"], block)
            assert a["qo_indptr"][request : request + 2].tolist() == [request, request + 1]
            packed = [i for i in range(q_tile * info["tile_q"], (q_tile + 1) * info["tile_q"]) if i < group]
            heads = [h * group + i for h in range(num_kv_heads) for i in packed]
            o, s = self.attend(a, request, tile * chunk, (tile + 1) * chunk)
            row = at(info["o_indptr"], request) + tile
            partial[row, heads], lse[row, heads] = o[heads], s[heads]
        for i in range(at(info["total_rows"], 0)):
            rows = range(at(info["merge_indptr"], i), at(info["merge_indptr"], i + 1))
            a["o"][i] = self.merged(partial, lse, rows)

    @staticmethod
    def order(blocks: int) -> list[int]:
        return random.Random(0).sample(range(blocks), blocks)

    @staticmethod
    def reader(a: dict):
        def at(offset: int, i: int, size: int = 4) -> int:
            data = a["int_workspace_buffer"][offset + size * i : offset + size * (i + 1)]
            return int(data.view(torch.int32 if size == 4 else torch.uint8))

        return at

    @staticmethod
    def partials(rows: int, a: dict, in_workspace: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        _, num_heads, dim = a["q"].shape
        assert not in_workspace or 4 * rows * num_heads * (dim + 1) <= a["float_workspace_buffer"].numel()
        return (torch.full((rows, num_heads, *d), torch.nan, dtype=torch.float64) for d in ((dim,), ()))

    @staticmethod
    def attend(a: dict, request: int, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the request's rows from ``begin`` to before ``end``; no rows weigh nothing."""
        first, behind = a["paged_kv_indptr"][request : request + 2].tolist()
        assert a["paged_kv_last_page_len"].tolist() == [1] * len(a["q"]) and a["paged_k_cache"].shape[1] == 1
        cells = a["paged_kv_indices"][min(first + begin, behind) : min(first + end, behind)].long()
        group = a["q"].shape[1] // a["paged_k_cache"].shape[2]
        caches = a["paged_k_cache"], a["paged_v_cache"]
        k, v = (cache[cells, 0].double().repeat_interleave(group, 1) for cache in caches)
        logits = torch.einsum("hd,nhd->hn", a["q"][request].double(), k) * a["sm_scale"]
        return torch.einsum("hn,nhd->hd", logits.softmax(-1), v), logits.logsumexp(-1).clamp_min(-5e4)

    @staticmethod
    def merged(partial: torch.Tensor, lse: torch.Tensor, rows: range) -> torch.Tensor:
        return torch.einsum("nh,nhd->hd", lse[list(rows)].softmax(0), partial[list(rows)])


def decode_on_emulated_kernels(heads: Heads, tensor_cores: bool | None, **options: object) -> RaggedDecode:
    decode = RaggedDecode(
        *(3, 9, heads.num_q_heads, heads.num_kv_heads, heads.head_dim, torch.float16, torch.float16, "cpu"),
        use_tensor_cores=tensor_cores,
        num_sms=12,
        num_blocks_per_sm=2,
        **options,
    )
    decode._module = Kernels()
    decode.int_workspace.fill_(SENTINEL)
    return decode


@pytest.mark.parametrize(
    "heads, tensor_cores",
    [
        (Heads(14, 2, 64), None),
        (Heads(4, 4, 64), None),
        (Heads(6, 2, 64), False),
        (Heads(70, 1, 256), True),
        (Heads(16, 2, 64), True),
    ],
)
def test_plan_and_run_are_attention(heads, tensor_cores):
    torch.manual_seed(0)
    decode = decode_on_emulated_kernels(heads, tensor_cores)
    storage = torch.randn(2, 700, heads.num_kv_heads, heads.head_dim).half()
    k_cells, v_cells = storage
    for lengths in (
        [[300, 0, 5], [129, 400, 1], [0, 0, 0]],  # the last layer keeps nothing
        [[137] * 9, [1, 2, 3, 0, 0, 0, 500, 8, 9], [128] * 9],
        [[600], [1], [400]],  # a smaller batch behind a larger one
    ):
        batch_size, indptr = len(lengths[0]), indptr_of(lengths) // 1000
        indptr = indptr[:, :1] + torch.cat([torch.zeros(3, 1), torch.tensor(lengths).cumsum(1)], 1).int()
        indices = torch.randint(0, 700, (int(indptr.max()),), dtype=torch.int32)
        decode.plan(indptr)
        for layer in (2, 0, 1):
            q = torch.randn(batch_size, 2 * heads.num_q_heads, heads.head_dim).half()[:, ::2]  # strided heads
            out = decode.run(layer, q, k_cells, v_cells, indptr, indices, 0.11)
            exact = reference.ragged_decode(q, k_cells, v_cells, indptr[layer], indices, 0.11)
            torch.testing.assert_close(out.double(), exact, atol=2.0**-25, rtol=1.01 * 2.0**-11)
            given = torch.full(q.shape, torch.nan, dtype=q.dtype)
            assert decode.run(layer, q, k_cells, v_cells, indptr, indices, 0.11, out=given) is given
            assert torch.equal(given, out)


def test_the_choice_of_kernels_is_sglangs():
    def kind(num_q_heads: int, num_kv_heads: int, kv_dtype: torch.dtype) -> bool:
        shape = 1, 1, num_q_heads, num_kv_heads, 128, torch.bfloat16, kv_dtype, "cpu"
        return RaggedDecode(*shape, num_sms=12, num_blocks_per_sm=2).use_tensor_cores

    for group in (1, 2, 3, 4, 5, 6, 7, 8, 16, 64):
        assert kind(2 * group, 2, torch.bfloat16) == (group >= 4)
        assert kind(2 * group, 2, torch.float8_e4m3fn)


def make(**changes: object) -> RaggedDecode:
    options = dict(
        *(
            zip(
                "num_layers max_requests num_q_heads num_kv_heads head_dim".split(),
                (2, 4, 28, 4, 128),
                strict=True,
            ),
        ),
        **dict(q_dtype=torch.bfloat16, kv_dtype=torch.bfloat16, device="cpu", num_sms=8, num_blocks_per_sm=1),
    )
    return RaggedDecode(**options | changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(use_tensor_cores=False), "1, 2, 3, 4, 6, 8, 16 query heads per KV head, not 7"),
        (dict(num_kv_heads=3), "multiple"),
        (dict(q_dtype=torch.float32), "q_dtype"),
        (dict(kv_dtype=torch.float16), "kv_dtype"),
        (dict(head_dim=80), "head_dim"),
        (dict(num_sms=None), "num_sms"),
        (dict(float_workspace_bytes=1000), "need"),
        (dict(max_requests=0), "at least one"),
    ],
)
def test_what_flashinfer_cannot_do_is_refused(changes, message):
    make()
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_misuse_is_refused():
    decode = make()
    with pytest.raises(ValueError, match="1 to 4 requests, not 5"):
        decode.plan(torch.zeros(2, 6, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"\[2, B \+ 1\]"):
        decode.plan(torch.zeros(3, 3, dtype=torch.int32))
    layout = decode.layout(4)
    with pytest.raises(ValueError, match="hold no"):
        plan_layers(
            torch.zeros(2, 5, dtype=torch.int32), decode.int_workspace, replace(layout, int_bytes=1 << 20)
        )
    with pytest.raises(ValueError, match="int32"):
        decode.plan(torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="can only plan"):
        decode.run(0, *(torch.zeros(1, 28, 128),) * 3, *(torch.zeros(2, 2, dtype=torch.int32),) * 2, 1.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(q=torch.zeros(3, 14, 128).half()), "q is"),
        (dict(q=torch.zeros(3, 64, 14).half().transpose(1, 2)), "q is"),
        (dict(q=torch.zeros(3, 14, 64).bfloat16()), "bfloat16, "),
        (dict(k_cells=torch.zeros(9, 4, 64).half()[:, ::2]), "strides"),
        (dict(v_cells=torch.zeros(8, 2, 64).half()), "shapes"),
        (dict(k_cells=torch.zeros(9, 1, 64).half(), v_cells=torch.zeros(9, 1, 64).half()), "cells are"),
        (dict(indptr=torch.zeros(3, 5, dtype=torch.int32)), r"indptr is \[3, 4\]"),
        (dict(indptr=torch.zeros(3, 4, dtype=torch.int64)), "int32"),
        (dict(indices=torch.zeros(9, dtype=torch.int64)), "int32"),
        (dict(out=torch.zeros(3, 14, 64)), "out is"),
        (dict(out=torch.zeros(14, 3, 64).half().transpose(0, 1)), "out is"),
    ],
)
def test_operands_that_the_kernels_would_leave_are_refused(changes, message):
    decode = decode_on_emulated_kernels(Heads(14, 2, 64), None)
    cells, indptr = torch.zeros(9, 2, 64).half(), torch.zeros(3, 4, dtype=torch.int32)
    operands = dict(q=torch.zeros(3, 14, 64).half(), k_cells=cells, v_cells=cells, indptr=indptr)
    operands |= dict(indices=torch.zeros(9, dtype=torch.int32), out=torch.zeros(3, 14, 64).half(), scale=1.0)
    decode.plan(indptr)
    assert decode.run(0, **operands).eq(0).all()
    with pytest.raises(ValueError, match=message):
        decode.run(0, **operands | changes)


def test_other_versions_of_flashinfer_are_refused(monkeypatch):
    gpu = torch.device("cuda")
    with pytest.raises(RuntimeError, match="NVIDIA"):
        upstream.check(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "flashinfer", type("flashinfer", (), {"__version__": "0.7.2+cu130"}))
    assert upstream.check(gpu) == "0.7.2+cu130"
    monkeypatch.setitem(sys.modules, "flashinfer", type("flashinfer", (), {"__version__": "0.7.20"}))
    with pytest.raises(RuntimeError, match="flashinfer-python 0.7.2; 0.7.20 is installed"):
        upstream.check(gpu)
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(RuntimeError, match="not installed"):
        upstream.check(gpu)


@pytest.mark.skipif(find_spec("flashinfer") is None, reason="FlashInfer is not installed")
def test_calls_have_flashinfers_arguments():
    """The modules' functions are made when they are compiled; their source tells their arguments."""
    from flashinfer import decode, prefill, utils

    def arguments(factory: object, name: str) -> tuple[tuple[str, ...], int]:
        tree = ast.parse(inspect.getsource(inspect.unwrap(factory)))
        (function,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name)
        names = tuple(a.arg for a in function.args.args)
        return names, len(names) - len(function.args.defaults)

    assert arguments(decode.get_batch_decode_module, "run_batch_decode") == (upstream.RUN_ARGUMENTS, 19)
    names, required = arguments(prefill.get_batch_prefill_module, "paged_run")
    assert names[:required] == upstream.PAGED_RUN_ARGUMENTS
    assert (utils.MaskMode.NON_CAUSAL.value, utils.MaskMode.CAUSAL.value) == (
        upstream.NON_CAUSAL,
        upstream.CAUSAL,
    )
    assert utils.TensorLayout.NHD.value == upstream.NHD
    assert utils.PosEncodingMode.NONE.value == upstream.NO_POSITIONS
    compiled = [n for n in range(1, 33) if n in DECODE_GROUP_SIZES]
    header = (utils.__file__.rsplit("/", 1)[0]) + "/data/include/flashinfer/utils.cuh"
    text = open(header).read().split("define DISPATCH_GQA_GROUP_SIZE")[1].split("Unsupported group_size")[0]
    assert compiled == [n for n in range(1, 33) if f"group_size == {n})" in text]


class HostPlanner:
    """FlashInfer's prefill module: plans remember their lengths, runs are the reference."""

    def __init__(self) -> None:
        self.plans: list[tuple] = []

    def workspace_size(self, floats: torch.Tensor, *args: object) -> tuple[int, int]:
        return 4096, 512 + 4 * args[4]

    def plan(
        self, floats: torch.Tensor, ints: torch.Tensor, pinned: torch.Tensor, *args: object
    ) -> list[int]:
        qo_indptr, kv_indptr, kv_lengths, num_rows, batch_size, q_heads, kv_heads, page_size, graph, *rest = (
            args
        )
        assert floats.numel() >= 4096 and ints.numel() == pinned.numel() >= 512 + 4 * batch_size
        assert kv_indptr.diff().tolist() == kv_lengths.tolist() and int(qo_indptr[-1]) == num_rows
        assert (page_size, graph, rest[2:]) == (1, False, [True, -1, -1, False, 0, 0])
        self.plans.append((qo_indptr.tolist(), kv_lengths.tolist(), ints.data_ptr(), q_heads, kv_heads))
        return [len(self.plans) - 1]

    def paged_run(self, *args: object) -> None:
        a = dict(zip(upstream.PAGED_RUN_ARGUMENTS, args, strict=True))
        assert (
            a["mask_mode"] == upstream.CAUSAL and a["workspace_size"] == a["float_workspace_buffer"].numel()
        )
        qo_indptr, lengths, where, *_ = self.plans[a["plan_info_vec"][0]]
        assert a["int_workspace_buffer"].data_ptr() == where and a["qo_indptr"].tolist() == qo_indptr
        assert a["paged_kv_indptr"].diff().tolist() == lengths
        assert a["paged_kv_last_page_len"].tolist() == [1] * len(lengths)
        k_cells, v_cells = a["paged_k_cache"][:, 0], a["paged_v_cache"][:, 0]
        paged = a["qo_indptr"], a["paged_kv_indptr"], a["paged_kv_indices"]
        a["o"].copy_(reference.ragged_extend(a["q"], k_cells, v_cells, *paged, a["sm_scale"]))


def test_extend_plans_equal_layers_once(monkeypatch):
    module = HostPlanner()
    monkeypatch.setattr(upstream, "check", lambda device: None)
    monkeypatch.setattr(upstream, "prefill_module", lambda *args: module)
    nothing = dict(record=lambda self: None, synchronize=lambda self: None)
    monkeypatch.setattr(torch.cuda, "Event", type("Event", (), nothing))
    extend = RaggedExtend(14, 2, 64, torch.float16, torch.float16, "cpu")
    torch.manual_seed(0)
    k_cells, v_cells = torch.randn(2, 90, 2, 64).half()
    for qo_lengths, lengths, plans in (
        ([3, 1], [[5, 9], [4, 7], [5, 9], [4, 7]], 2),
        ([2, 1, 4], [[20, 1, 4]] * 4, 1),
        ([1], [[1], [2], [3], [4]], 4),
    ):
        qo_indptr = torch.tensor([0, *qo_lengths]).cumsum(0).int()
        offsets = torch.tensor(lengths).cumsum(1)
        begin = torch.tensor([[70], [0], [35], [110]])
        indptr = torch.cat([begin, begin + offsets], 1).int()
        indices = torch.randint(0, 90, (int(indptr.max()),), dtype=torch.int32)
        module.plans.clear()
        assert extend.plan(qo_indptr, indptr) == plans == len(module.plans)
        for layer in range(4):
            q = torch.randn(int(qo_indptr[-1]), 14, 64).half()
            out = extend.run(layer, q, k_cells, v_cells, qo_indptr, indptr, indices, 0.1)
            exact = reference.ragged_extend(q, k_cells, v_cells, qo_indptr, indptr[layer], indices, 0.1)
            assert torch.equal(out, exact.half())
        with pytest.raises(ValueError, match="were planned"):
            extend.run(0, q[:0], k_cells, v_cells, qo_indptr, indptr, indices, 0.1)


def test_the_references_attention_is_torchs():
    torch.manual_seed(0)
    q, k_cells, v_cells = torch.randn(3, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    indices, qo_indptr, indptr = (
        torch.tensor([8, 1, 1, 0, 5]),
        torch.tensor([0, 0, 3]),
        torch.tensor([0, 0, 5]),
    )
    k, v = (x[indices].repeat_interleave(2, 1).transpose(0, 1).double() for x in (k_cells, v_cells))
    mask = torch.ones(3, 5, dtype=torch.bool).tril(2)
    exact = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1).double(), k, v, mask, scale=0.3
    )
    ours = reference.ragged_extend(q, k_cells, v_cells, qo_indptr, indptr, indices, 0.3)
    torch.testing.assert_close(ours, exact.transpose(0, 1))


def test_without_a_gpu_flashinfer_is_not_imported_and_the_self_check_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code = """
import sys
from flashinfer_ext.check import main
status = main()
print([m for m in sys.modules if m.split(".")[0] in ("flashinfer", "sglang", "sglang_vlkv")], status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    sentence, modules = done.stdout.splitlines()
    assert "GPU" in sentence and modules == "[] 2"
