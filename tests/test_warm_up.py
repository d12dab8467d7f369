"""What is compiled before the first request is what the first request runs."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from triton.backends.compiler import BaseBackend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import native_specialize_impl

from sglang_vlkv.attention import device
from sglang_vlkv.cache.requests import Plan
from sglang_vlkv.policies import policies
from sglang_vlkv.scheduler.compaction import Compactor
from sglang_vlkv.stages.layer import Layer
from sglang_vlkv.stages.prompt import Modality, Prompt
from sglang_vlkv.stages.rope import Rope
from sglang_vlkv.stages.select import select
from tests import test_device_backends
from tests.test_device_backends import LAYERS, World, decode

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def compiled(monkeypatch) -> set[tuple]:
    """What Triton would compile, by kernel: the types of its arguments, which of their values are 1 or
    divisible by 16, and its constants. Nothing runs, and tensors say that they are on a GPU."""
    keys = set()

    def run(kernel, *args, grid, warmup, **constants):
        alike = kernel.kwargs.get("do_not_specialize") or ()
        arguments = dict(zip(kernel.arg_names, args))
        # const?, specialise?, align?
        types = [
            (name, native_specialize_impl(BaseBackend, value, False, name not in alike, name not in alike))
            for name, value in arguments.items()
        ]
        keys.add((kernel.__name__, *types, *sorted(constants.items())))

    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(Layer, "scored_keys", property(lambda layer: layer.keys))
    return keys


def named(keys: set[tuple]) -> set[str]:
    return {name for name, *_ in keys}


@pytest.fixture
def large_world(monkeypatch, compiled) -> World:
    """With heads and prompts of a size that models have."""
    for name, value in dict(DIM=64, SLOTS=4000, ROWS=70, LENGTH=2048).items():
        monkeypatch.setattr(test_device_backends, name, value)
    monkeypatch.setattr(device, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1))
    monkeypatch.setattr(device, "captured_sizes", lambda runner: [1, 2, 4])
    monkeypatch.setattr(device, "leaves_queries", lambda: False)
    world = World()
    world.device.rope = Rope(torch.zeros(2048, 64), None, True)
    return world


def test_first_requests_run_what_warming_up_compiled(large_world, compiled):
    """Prompts are scored, selected, gathered and scattered, new turns go on from them, and more
    requests decode than there are graphs for."""
    world, pool = large_world, large_world.pool
    assert pool.cells_per_layer % 16, "or a 0 in its place would be compiled alike"
    world.device.warm_up()
    warm = set(compiled)
    compiled.clear()
    compactor = SimpleNamespace(_pool=pool)
    for row, (name, length) in enumerate((("vlcache", 70), ("elastic", 99), ("vlkv", 1500)), 1):
        prompt = Prompt(torch.full((length,), int(Modality.IMAGE), dtype=torch.uint8))
        state = world.request(row, 0, Plan(prompt, policies()[name](min_rows=4), num_voting=6))
        state.pending = True
        world.run(world.device, world.batch(ForwardMode.EXTEND, [row], [0], [length]))
        layers = [state.scores[layer] for layer in range(LAYERS)]
        selection = select(state.plan.policy, prompt, layers, [0.9, 0.5, 0.7])
        slots = world.rows.req_to_token[row, :length].long()
        rows = Compactor._rows(compactor, state.plan.policy, slots, selection)
        twin = SimpleNamespace(num_rows=selection.num_kept)
        packed = world.slots(-(-sum(twin.num_rows) // LAYERS)).long()
        Compactor._fill(compactor, twin, packed, SimpleNamespace(rows=rows, num_kept=twin.num_rows))
        world.compact(state, selection.num_kept)
        for end in (length + 1, length + 40):
            world.run(world.device, world.batch(ForwardMode.EXTEND, [row], [length], [end]))
    for size in (5, 17, 66):
        world.run(world.device, decode(world, dict.fromkeys(range(4, 4 + size), 2)))
    assert named(compiled) == named(warm)
    assert compiled == warm
