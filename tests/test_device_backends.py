"""The GPU backends' own part, in Triton's interpreter, beside the CPU backend on the same rows.

SGLang's torch_native backend stands where a GPU would have SGLang's Triton, FlashInfer or
FlashAttention backend; pools, attention layers and batches are SGLang's own.
"""

import re
from array import array
from bisect import bisect_left
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.runtime_context import get_context
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from sglang_vlkv.attention import device, memory
from sglang_vlkv.attention.torch_native import RaggedTorchNativeBackend
from sglang_vlkv.attention.triton import RaggedDecode, TritonDecode
from sglang_vlkv.cache.pool import CellPool
from sglang_vlkv.cache.requests import Plan
from sglang_vlkv.cache.twins import Twin
from sglang_vlkv.kernels.ragged_attention import indices
from sglang_vlkv.policies import policies
from sglang_vlkv.scheduler import wiring
from sglang_vlkv.stages.prompt import Modality, Prompt

LAYERS, HEADS, GROUP, DIM, SLOTS, ROWS, LENGTH = 3, 2, 3, 20, 400, 8, 128
VLCACHE = policies()["vlcache"](min_rows=4)
pytestmark = pytest.mark.usefixtures("one_thread")


class OnDevice(TritonDecode, TorchNativeAttnBackend):
    """What is common to the GPU backends, for a GPU of one multiprocessor."""

    def decode_kernel(self, max_requests, num_q_heads, dtype):
        return RaggedDecode(LAYERS, max_requests, num_q_heads, HEADS, DIM, "cpu", num_sms=1)


class Request:
    """Something to hang a state on."""


class World:
    """Pools with random KV, and both backends over them."""

    def __init__(self) -> None:
        self.pool = CellPool(SLOTS, 1, torch.float32, HEADS, DIM, LAYERS, "cpu", enable_memory_saver=False)
        self.rows = ReqToTokenPool(ROWS, LENGTH, "cpu", enable_memory_saver=False)
        self.random = torch.Generator().manual_seed(0)
        self.pool.storage.normal_(generator=self.random)
        free = torch.randperm(SLOTS, generator=self.random) + 1
        self.free = iter(free.tolist())
        runner = SimpleNamespace(
            device="cpu",
            model=torch.nn.Module(),
            token_to_kv_pool=self.pool,
            req_to_token_pool=self.rows,
            model_config=SimpleNamespace(num_attention_heads=HEADS * GROUP, dtype=torch.float32),
        )
        self.runner, self.cpu, self.device = runner, RaggedTorchNativeBackend(runner), OnDevice(runner)
        self.layers = [RadixAttention(HEADS * GROUP, DIM, 0.3, HEADS, layer) for layer in range(LAYERS)]
        self.alive = []

    def slots(self, count: int) -> torch.Tensor:
        return torch.tensor([next(self.free) for _ in range(count)], dtype=torch.int32)

    def request(self, row: int, length: int, plan: Plan | None = None):
        """A request whose first ``length`` tokens have slots of their own."""
        self.alive.append(Request())
        plan = plan or Plan(Prompt(torch.zeros(length, dtype=torch.uint8)), VLCACHE, "text")
        state = self.pool.requests.add(self.alive[-1], plan)
        self.pool.requests.take_row(state, row)
        self.rows.req_to_token[row, :length] = self.slots(length)
        return state

    def compact(self, state, num_kept: list[int], sliding=()) -> None:
        """Of its prompt, rows of its own in fresh cells stay; with ``sliding``, the newest slots too."""
        packed = self.slots(-(-sum(num_kept) // LAYERS)).long()
        state.cells, state.first_own = self.pool.packed_cells(packed, num_kept), state.plan.end
        state.sliding, state.pending = list(sliding), False
        positions = [torch.zeros(HEADS, count, dtype=torch.int32) for count in num_kept]
        state.twin = Twin((), 0, array("q", [0]), state.plan.end, state.cells, positions, packed)
        self.pool.requests.sees(state)

    def batch(self, mode: ForwardMode, rows: list[int], starts: list[int], ends: list[int]) -> ForwardBatch:
        counts = [end - start for start, end in zip(starts, ends)]
        for row, start, end in zip(rows, starts, ends):
            missing = (self.rows.req_to_token[row, start:end] == 0).nonzero().flatten()
            self.rows.req_to_token[row, start + missing] = self.slots(len(missing))
        written = torch.cat([self.rows.req_to_token[r, s:e] for r, s, e in zip(rows, starts, ends)])
        return ForwardBatch(
            forward_mode=mode,
            batch_size=len(rows),
            input_ids=torch.zeros(sum(counts), dtype=torch.int64),
            req_pool_indices=torch.tensor(rows),
            seq_lens=torch.tensor(ends),
            out_cache_loc=written.long(),
            seq_lens_sum=sum(ends),
            extend_prefix_lens=torch.tensor(starts),
            extend_seq_lens=torch.tensor(counts),
        )

    def run(self, backend, batch: ForwardBatch, seed: int = 0) -> list[torch.Tensor]:
        """What every layer attends to; the new tokens' KV is written on the way."""
        backend.init_forward_metadata(batch)
        random, tokens, outs = torch.Generator().manual_seed(seed), len(batch.input_ids), []
        for layer in self.layers:
            q = torch.randn(LENGTH, HEADS * GROUP * DIM, generator=random)[:tokens]
            k, v = torch.randn(2, LENGTH, HEADS, DIM, generator=random)[:, :tokens]
            decodes = batch.forward_mode.is_decode()
            forward = backend.forward_decode if decodes else backend.forward_extend
            outs.append(forward(q, k, v, layer, batch))
        return outs

    def assert_alike(self, batch: ForwardBatch) -> list[torch.Tensor]:
        expected = self.run(self.cpu, batch)
        actual = self.run(self.device, batch)
        for one, other in zip(expected, actual, strict=True):
            torch.testing.assert_close(other, one, rtol=2e-5, atol=2e-5)
        return actual


@pytest.fixture
def world(monkeypatch) -> World:
    monkeypatch.setattr(device, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1))
    monkeypatch.setattr(device, "captured_sizes", lambda runner: [1, 2, 4])
    monkeypatch.setattr(device, "leaves_queries", lambda: False)
    monkeypatch.setattr(indices, "PROGRAMS", LAYERS)  # the interpreter runs them one after another
    return World()


def decode(world: World, lengths: dict[int, int]) -> ForwardBatch:
    """One token more for the requests of these rows."""
    return world.batch(
        ForwardMode.DECODE, [*lengths], [n - 1 for n in lengths.values()], [*lengths.values()]
    )


def test_decode_of_exact_compacted_and_sliding_requests(world):
    world.request(3, 17)
    compacted, slid = world.request(1, 40), world.request(5, 30)
    world.compact(compacted, [9, 1, 5])
    world.compact(slid, [4, 7, 2], sliding=[3, 5, 1])
    for step in range(3):
        batch = decode(world, {1: 41 + step, 3: 18 + step, 5: 31 + step})
        world.assert_alike(batch)


def test_a_row_that_is_given_away_is_exact_again(world):
    gone = world.request(2, 25)
    world.compact(gone, [6, 6, 6])
    world.assert_alike(decode(world, {2: 26}))
    world.pool.requests.release_row(gone)
    world.request(2, 12)
    world.assert_alike(decode(world, {2: 13}))


def test_requests_that_pad_a_graph_see_nothing_and_change_nothing(world):
    """SGLang pads with row 0, which nobody owns, and sequences of one token."""
    state = world.request(4, 30)
    world.compact(state, [3, 8, 4])
    alone = world.run(world.device, decode(world, {4: 31}))
    batch = decode(world, {4: 31})
    padded = world.batch(ForwardMode.DECODE, [4, 0, 0], [30, 0, 0], [31, 1, 1])
    padded.out_cache_loc = torch.cat([batch.out_cache_loc, torch.zeros(2, dtype=torch.int64)])
    for one, other in zip(alone, world.run(world.device, padded), strict=True):
        assert torch.equal(one[0], other[0])


def test_prefills_that_go_on_from_compacted_rows_beside_exact_ones_and_a_decode(world):
    """A mixed batch: a new turn on a twin, a fresh prompt, a chunk, and a compacted request that decodes."""
    turn, decodes = world.request(1, 20), world.request(6, 30)
    world.request(2, 0), world.request(3, 11)
    world.compact(turn, [9, 2, 4])
    world.compact(decodes, [5, 5, 5])
    world.assert_alike(world.batch(ForwardMode.EXTEND, [2, 1, 3, 6], [0, 20, 11, 30], [13, 29, 30, 31]))


def test_exact_prefills_are_the_stock_backends(world, monkeypatch):
    world.request(1, 10)
    monkeypatch.setattr(device, "ragged_extend", None)
    world.assert_alike(world.batch(ForwardMode.EXTEND, [1], [10], [30]))


def test_the_host_knows_how_many_rows_a_prefill_sees(world, monkeypatch):
    """FlashInfer plans a prefill on the host: in every layer what the device lists."""
    turn, slid = world.request(1, 20), world.request(6, 30)
    world.request(3, 11)
    world.compact(turn, [9, 2, 4])
    world.compact(slid, [5, 6, 7], sliding=[3, 1, 2])
    planned = []
    monkeypatch.setattr(world.device, "plan_extend", lambda *arguments: planned.extend(arguments))
    batch = world.batch(ForwardMode.EXTEND, [1, 3, 6], [20, 11, 30], [29, 30, 31])
    world.device.init_forward_metadata(batch)
    num_new, num_rows = planned
    lists = world.device._extends
    assert num_new == [9, 19, 1] == lists.qo_indptr.diff().tolist() and lists.longest == 19
    assert num_rows == [[18, 11, 13], [30, 30, 30], [8, 7, 9]] == lists.indptr.diff(dim=1).T.tolist()


@pytest.mark.parametrize("compacted", [False, True])
def test_prompts_are_scored_over_chunks(world, compacted):
    """The voting rows straddle two chunks; the second rides with a request on compacted rows or not."""
    scores = []
    for backend in (world.cpu, world.device):
        row = 1 if backend is world.cpu else 2
        plan = Plan(Prompt(torch.full((40,), int(Modality.IMAGE), dtype=torch.uint8)), VLCACHE, num_voting=6)
        state = world.request(row, 0, plan)
        state.pending = True
        world.run(backend, world.batch(ForwardMode.EXTEND, [row], [0], [36]), seed=1)
        assert not state.scores
        rows, starts, ends = [row], [36], [40]
        if compacted:
            other = world.request(row + 2, 15)
            world.compact(other, [3, 3, 3])
            rows, starts, ends = [*rows, row + 2], [*starts, 15], [*ends, 18]
        world.run(backend, world.batch(ForwardMode.EXTEND, rows, starts, ends), seed=2)
        scores.append(state.scores)
    cpu, on_device = scores
    assert sorted(cpu) == sorted(on_device) == list(range(LAYERS))
    for layer in cpu:
        torch.testing.assert_close(cpu[layer].scores, on_device[layer].scores, rtol=1e-4, atol=1e-5)
        assert int(cpu[layer].zeros) == int(on_device[layer].zeros)


def test_a_draft_leaves_its_queries_and_runs_eagerly(world):
    plan = Plan(Prompt(torch.zeros(20, dtype=torch.uint8)), VLCACHE, writes_draft="id")
    state = world.request(1, 20, plan)
    world.compact(state, [4, 4, 4])
    world.pool.requests.expect([(world.alive[-1], 21)], LAYERS)
    runner = SimpleNamespace(model_runner=SimpleNamespace(token_to_kv_pool=world.pool))
    assert wiring.decode_graph(lambda runner, batch: True, runner, None) is False
    world.run(world.device, decode(world, {1: 21}), seed=3)
    left = {layer: torch.cat(queries) for layer, queries in state.drafted.items()}
    state.drafted = {}
    world.run(world.cpu, decode(world, {1: 21}), seed=3)
    assert sorted(left) == list(range(LAYERS))
    for layer, queries in state.drafted.items():
        assert torch.equal(left[layer], torch.cat(queries))


def test_a_replayed_step_leaves_the_queries_of_those_who_ask(world, monkeypatch):
    """The graph copies all of them; what runs at a replay is what was captured, and the copy after it."""
    monkeypatch.setattr(device, "leaves_queries", lambda: True)
    backend = OnDevice(world.runner)
    leaves = Plan(Prompt(torch.zeros(20, dtype=torch.uint8)), VLCACHE, writes_draft="id")
    first, second, third = world.request(1, 20, leaves), world.request(2, 20), world.request(3, 20, leaves)
    for state in (first, second, third):
        world.compact(state, [4, 4, 4])
    lengths = {2: 21, 3: 21, 1: 21}
    world.pool.requests.expect(zip(world.alive, lengths.values()), LAYERS)
    assert world.pool.requests.on_device.graph_serves
    expected = world.run(world.cpu, decode(world, lengths), seed=3)
    asked = [(state, state.drafted) for state in (first, third)]
    first.drafted, third.drafted = {}, {}
    monkeypatch.setattr(backend, "init_forward_metadata", backend.init_forward_metadata_in_graph)
    padded = decode(world, lengths | {0: 1})  # as captured, of four
    for one, other in zip(expected, world.run(backend, padded, seed=3), strict=True):
        torch.testing.assert_close(other[:3], one, rtol=2e-5, atol=2e-5)
    assert not first.drafted and not third.drafted
    model_runner = SimpleNamespace(token_to_kv_pool=world.pool, attn_backend=backend)
    wiring.decode_replayed(None, SimpleNamespace(model_runner=model_runner), decode(world, lengths))
    assert not second.drafted
    for state, queries in asked:
        assert sorted(state.drafted) == list(range(LAYERS))
        for layer, query in queries.items():
            assert torch.equal(torch.cat(state.drafted[layer]), torch.cat(query))


@pytest.mark.parametrize("start, drafted", [(20, True), (19, False)])
def test_a_draft_that_decodes_beside_a_prefill_leaves_its_queries(world, start, drafted):
    """In a mixed batch; a prompt's last token, computed for its logits behind a twin, is no output."""
    plan = Plan(Prompt(torch.zeros(20, dtype=torch.uint8)), VLCACHE, writes_draft="id")
    state, left = world.request(1, start, plan), []
    world.compact(state, [4, 4, 4])
    world.request(2, 0)
    for backend in (world.cpu, world.device):
        state.drafted = {}
        world.run(backend, world.batch(ForwardMode.EXTEND, [2, 1], [0, start], [13, start + 1]), seed=3)
        left.append({layer: torch.cat(queries) for layer, queries in state.drafted.items()})
    assert sorted(left[0]) == sorted(left[1]) == (list(range(LAYERS)) if drafted else [])
    for layer, queries in left[0].items():
        assert torch.equal(left[1][layer], queries)


def test_more_rows_than_the_graphs_lists_hold_run_eagerly(world):
    """Many requests may share one compacted prompt, and together see more rows than the pool has."""
    requests = world.pool.requests
    lengths = {}
    for row in (1, 2, 3):
        state = world.request(row, 20)
        world.compact(state, [30, 2, 2])
        lengths[row] = 21
    on_device = requests.on_device
    requests.expect(zip(world.alive, lengths.values()), LAYERS)
    assert on_device.visible == 3 * (34 + LAYERS) and on_device.graph_serves
    on_device.capacity = 100
    world.device._indices = device.RaggedIndices(LAYERS, ROWS + 1, 100, "cpu")
    assert not on_device.graph_serves
    world.assert_alike(decode(world, lengths))
    requests.expect([(world.alive[0], 21), (Request(), 4)], LAYERS)
    assert on_device.visible == 34 + LAYERS + 4 * LAYERS and on_device.graph_serves


class Read(Exception):
    """A GPU would have been waited for."""


class NothingIsRead(TorchDispatchMode):
    """Raises Read for values that the host reads, and shapes that depend on them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if re.match("aten::(_local_scalar_dense|item|nonzero|masked_select|unique|equal)", func.name()):
            raise Read(func.name())
        return func(*args, **kwargs or {})


def test_a_decode_step_reads_nothing_on_the_host(world, monkeypatch):
    """Kernels apart, which a GPU runs on its own."""

    def read(tensor, *args):
        raise Read

    state, sliding = world.request(1, 30), world.request(2, 30)
    world.compact(state, [4, 4, 4])
    world.compact(sliding, [4, 4, 4], sliding=[2, 2, 2])
    batch = decode(world, {1: 31, 2: 31})
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *args, **kwargs: None)
    for name in ("tolist", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, read)
    with NothingIsRead():
        world.run(world.device, batch)
    with NothingIsRead(), pytest.raises(Read):
        world.run(world.cpu, batch)


@pytest.mark.parametrize("bytes_per_slot, times", [(57_344, 8), (14_336, 2.0), (3_584, 1)])
def test_index_lists_take_a_64th_of_the_pool(bytes_per_slot, times):
    """Unless one entry per cell takes more: every request must fit on its own."""
    slots, layers = 400_000, 28
    expected = times * slots * layers + (31 * layers if times == 1 else 0)
    assert memory.list_capacity(layers, slots, bytes_per_slot, padding=31) == expected


SHAPES = {
    "Qwen2.5-VL-7B": memory.Shape(28, 2049, 28, 4, 128, torch.bfloat16, torch.bfloat16),
    "Qwen2.5-VL-3B": memory.Shape(36, 4097, 16, 2, 128, torch.bfloat16, torch.bfloat16),
    "LLaVA-1.5-7B": memory.Shape(32, 301, 32, 32, 128, torch.float16, torch.float16),
    "one small head": memory.Shape(12, 65, 4, 1, 64, torch.float16, torch.float16),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("backend", ["triton", "fa3", "flashinfer"])
@pytest.mark.parametrize("gigabytes", [4, 60])
def test_the_pool_leaves_room_for_what_lies_beside_it(shape, backend, gigabytes):
    budget = gigabytes << 30
    pool = memory.pool_budget(budget, shape, backend, num_sms=132)
    copied = memory.pool_budget(budget, shape, backend, num_sms=132, copied=256)
    queries = shape.num_layers * 256 * shape.num_q_heads * shape.head_dim * 2
    assert 0.95 * queries < pool - copied <= queries
    slots = pool // shape.slot_bytes
    lists = memory.list_capacity(shape.num_layers, slots, shape.slot_bytes, shape.max_requests - 1)
    named = memory.NAMED * slots * shape.num_layers  # cells of compacted requests
    held = pool + 4 * (lists + named) + memory.fixed_bytes(shape, backend, num_sms=132)
    assert 0.998 * budget < held <= budget


def test_what_is_counted_beside_the_pool_is_what_is_made(world):
    made = *world.device._rows.table, world.device._indices.indptr, *vars(world.device._kernel).values()
    held = sum(x.nbytes for x in made if isinstance(x, torch.Tensor))
    shape = memory.Shape(LAYERS, ROWS + 1, HEADS * GROUP, HEADS, DIM, torch.float32, torch.float32)
    assert held == memory.fixed_bytes(shape, "triton", num_sms=1)
    assert shape.slot_bytes == world.pool.slot_bytes


@pytest.mark.parametrize(
    "policy, options, leave",
    [
        ("vlkv", {"draft_tokens": 8}, True),
        ("vlkv", {}, False),
        ("none", {"allow_override": True}, True),
        ("h2o", {"allow_override": ["h2o", "snapkv"]}, True),
        ("h2o", {"allow_override": ["h2o", "random"]}, False),
    ],
)
def test_queries_are_copied_where_a_request_may_leave_them(monkeypatch, policy, options, leave):
    args = SimpleNamespace(kv_policy=policy, kv_budget=None, kv_policy_config=options)
    monkeypatch.setattr(memory, "get_context", lambda: SimpleNamespace(server_args=args))
    assert memory.leaves_queries() is leave


@pytest.mark.parametrize("armed, on", [(True, "cuda"), (False, "cuda"), (True, "cpu")])
def test_the_pool_is_sized_of_what_is_left(monkeypatch, armed, on):
    """SGLang's own configurator says for how many requests there are rows."""
    configurator = KVCacheConfigurator.__new__(KVCacheConfigurator)
    model = dict(num_attention_heads=28, get_num_kv_heads=lambda size: 4, head_dim=128, dtype=torch.bfloat16)
    fields = dict(
        model_config=SimpleNamespace(**model, context_len=32_768),
        layer_info=SimpleNamespace(num_effective_layers=28),
        kv_cache_dtype=torch.bfloat16,
        mambaish_config=None,
        attn_dp_size=1,
        device=on,
        gpu_id=0,
    )
    for name, value in fields.items():
        object.__setattr__(configurator, name, value)
    monkeypatch.setattr(wiring, "_settings", lambda: object() if armed else None)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    backend = dict.fromkeys(("attention_backend", "decode_attention_backend"), "triton")
    monkeypatch.setattr(memory, "leaves_queries", lambda: False)
    with get_context().override_server_args(**backend):
        left = wiring.pool_budget(60 << 30, configurator, 79.0)
    shape = SHAPES["Qwen2.5-VL-7B"]._replace(max_requests=4097)
    expected = memory.pool_budget(60 << 30, shape, "triton", 132)
    assert left == (expected if armed and on == "cuda" else 60 << 30) and expected < 59.2 * (1 << 30)


@pytest.mark.parametrize(
    "sizes, padding", [([], 0), ([1], 0), ([8], 7), ([1, 2, 4, 8, 12], 3), ([1, 512], 510), ([1, 2, 300, 512], 297)]
)
def test_padding_is_what_the_captured_sizes_leave(sizes, padding):
    assert memory.most_padding(sizes) == padding
    largest = max(sizes, default=0)
    assert padding == max((sizes[bisect_left(sizes, n)] - n for n in range(1, largest + 1)), default=0)


def test_the_last_layers_keep_their_rows_beside_all_padding(world, monkeypatch):
    """A full pool, in the widest gap that the captured sizes have."""
    monkeypatch.setattr(device, "captured_sizes", lambda runner: [1, 6])
    tight = CellPool(24, 1, torch.float16, HEADS, DIM, LAYERS, "cpu", enable_memory_saver=False)
    runner = SimpleNamespace(**vars(world.runner) | dict(token_to_kv_pool=tight))
    backend = OnDevice(runner)
    world.rows.req_to_token[1, :24] = torch.arange(1, 25)
    rows, lengths = torch.tensor([1, 0, 0, 0, 0, 0]), torch.tensor([24, 1, 1, 1, 1, 1])
    indptr, _ = backend._build(backend._indices, SimpleNamespace(req_pool_indices=rows, seq_lens=lengths))
    assert indptr.diff(dim=1).tolist() == [[24, 1, 1, 1, 1, 1]] * LAYERS


def test_warming_up_changes_nothing_but_the_padding_slot(world):
    before = world.pool.storage[:, :, 1:].clone()
    world.device.warm_up(num_keys=(40,), num_new=(1, 5))
    assert torch.equal(world.pool.storage[:, :, 1:], before)


@pytest.mark.parametrize("asks", [dict(logit_cap=30.0), dict(sinks=torch.zeros(1))])
def test_attention_that_the_kernels_do_not_know_is_refused(world, asks):
    world.compact(world.request(1, 20), [3, 3, 3])
    batch = decode(world, {1: 21})
    world.device.init_forward_metadata(batch)
    world.layers[0].logit_cap = asks.pop("logit_cap", 0.0)
    q, k = torch.zeros(1, HEADS * GROUP * DIM), torch.zeros(1, HEADS, DIM)
    with pytest.raises(NotImplementedError, match="--kv-policy none"):
        world.device.forward_decode(q, k, k, world.layers[0], batch, **asks)
