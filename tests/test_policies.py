"""Every policy against its definition, and what holds for all of them; a new one is found by itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import MISSING, field, fields, make_dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Mapping, Sequence

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_vlkv.kernels.post_vision.cpu import TILE_ELEMENTS
from sglang_vlkv.policies import policies
from sglang_vlkv.policies.vlcache import VLCache
from sglang_vlkv.stages.layer import Layer, LayerScores, Rows, Selection
from sglang_vlkv.stages.policy import Policy
from sglang_vlkv.stages.prompt import Modality, Prompt, num_tokens
from sglang_vlkv.stages.rope import Rope
from sglang_vlkv.stages.select import select, tiers
from tests import naive
from tests.naive import Case, Rotary

T, P, V, A, S = Modality.TEXT, Modality.IMAGE, Modality.VIDEO, Modality.AUDIO, Modality.SYSTEM
THREE_AXES = tuple(lane % 3 for lane in range(16))


pytestmark = pytest.mark.usefixtures("one_thread")


def layout(spans: list[tuple]) -> tuple[list[Modality], list[tuple[int, int, int]]]:
    """Tags and M-RoPE positions of spans ``(tag, length)`` or ``(tag, frames, height, width)``."""
    tags, positions = [], []
    for tag, *shape in spans:
        start = max(map(max, positions), default=-1) + 1
        frames, height, width = shape if len(shape) == 3 else (0, 0, 0)
        grid = [(t, y, x) for t in range(frames) for y in range(height) for x in range(width)]
        steps = grid or [(i, i, i) for i in range(shape[0])]
        tags += [tag] * len(steps)
        positions += [tuple(start + step for step in place) for place in steps]
    return tags, positions


def make_case(
    seed: int,
    spans: list[tuple],
    hkv: int,
    group: int,
    dim: int,
    rope: Rotary,
    dtype=torch.float32,
    num_layers=3,
    last_turn=0,
    drafted=0,
    alike=1.0,
    copies=(),
    turn_end=None,
) -> Case:
    """Keys share a direction, the more the larger ``alike``; layers differ in the strength of attention.
    ``copies`` are where a picture begins, and where its newest copy does, and its size."""
    generator = torch.Generator().manual_seed(seed)
    tags, positions = layout(spans)
    n, axes = len(tags), 1 + max(rope.axes)
    if axes == 1:
        positions = [(j,) for j in range(n)]

    def normal(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(num_layers, rows, heads, dim, generator=generator, dtype=torch.float64)

    turns = torch.stack([rope.matrix(position, dim) for position in positions])
    strength = torch.linspace(0.7, 2.0, num_layers)[:, None, None, None]
    q, k = normal(n, hkv * group) * strength, normal(n, hkv) + alike * normal(1, hkv)
    q, k = (torch.einsum("nde,lnhe->lnhd", turns, x).to(dtype) for x in (q, k))
    v, draft = normal(n, hkv).to(dtype), normal(drafted, hkv * group).to(dtype)
    newest = list(range(n)) * bool(copies)
    for start, latest, size in copies:
        newest[start : start + size] = range(latest, latest + size)
    return Case(tags, q, k, v, draft, 1.5 * dim**-0.5, rope, positions, last_turn, turn_end, tuple(newest))


PLAIN = Rotary(100, (0,) * 50)
CASES = {
    "T63-H2-HQ8-D100": lambda: make_case(
        0, [(S, 3), (T, 4), (P, 30), (T, 5), (A, 6), (T, 15)], 2, 4, 100, PLAIN, last_turn=45
    ),
    "bf16": lambda: make_case(
        1, [(S, 2), (P, 37), (T, 20), (S, 4)], 2, 4, 100, PLAIN, torch.bfloat16, last_turn=50
    ),
    "one KV head, M-RoPE, video, two pictures, draft": lambda: make_case(
        2,
        [(S, 2), (T, 3), (V, 5, 2, 3), (T, 2), (P, 1, 3, 3), (A, 5), (P, 1, 2, 2), (T, 15), (S, 1)],
        *(1, 7, 32),
        Rotary(32, THREE_AXES),
        last_turn=60,
        drafted=3,
        alike=0.1,
    ),
    "G=1, D=5, partial rotary, R > text": lambda: make_case(
        3,
        [(P, 8), (T, 6), (P, 11), (S, 1), (P, 12), (T, 3)],
        *(3, 1, 5),
        Rotary(4, (0, 0), neox=False, limit=50),
        last_turn=39,
    ),
    "ends with a picture, one layer": lambda: make_case(
        4, [(T, 4), (V, 2, 2, 2), (P, 1, 1, 3)], 2, 2, 8, Rotary(8, (0, 1, 2, 2)), num_layers=1, drafted=2
    ),
    "one visual token": lambda: make_case(5, [(T, 7), (P, 1), (T, 9)], 2, 1, 6, Rotary(6, (0,) * 3)),
    "a picture three times, and another": lambda: make_case(
        8,
        [(S, 1), (P, 9), (T, 4), (P, 9), (S, 1), (P, 7), (T, 1), (P, 9), (T, 12)],
        *(2, 2, 8),
        Rotary(8, (0,) * 4),
        last_turn=44,
        copies=[(1, 33, 9), (14, 33, 9)],
    ),
    "asked before the picture": lambda: make_case(
        9,
        [(T, 9), (S, 2), (T, 5), (S, 1), (P, 20), (S, 2), (T, 3)],
        *(2, 2, 8),
        Rotary(8, (0,) * 4),
        last_turn=10,
        turn_end=38,
    ),
    "frames of two sizes": lambda: make_case(
        6, [(V, 2, 1, 3), (T, 2), (V, 2, 2, 2), (T, 6)], 1, 2, 8, Rotary(8, (0, 1, 2, 0)), alike=0.0
    ),
}  # fmt: skip
case_of = cache(lambda name: CASES[name]())


def prompt_of(case: Case) -> Prompt:
    positions = torch.tensor(case.positions).T if len(case.positions[0]) > 1 else None
    newest = torch.tensor(case.newest) if case.newest else None
    tags = torch.tensor(case.tags, dtype=torch.uint8)
    return Prompt(tags, case.last_turn, positions, newest=newest, turn_end=case.turn_end)


def table(rope: Rotary) -> Rope:
    """The embedding's table of cosines and sines."""
    angles = [[rope.angle(i, j) for i in range(rope.dim // 2)] for j in range(rope.limit)]
    angles = torch.tensor(angles, dtype=torch.float64)
    axes = torch.tensor(rope.axes) if max(rope.axes) else None
    return Rope((torch.cat([angles.cos(), angles.sin()], dim=1) * rope.gain).float(), axes, rope.neox)


rope_of = cache(table)


def layer_of(case: Case, index: int, start: int, end: int) -> Layer:
    """Queries ``[start, end)`` and the keys up to ``end``, as the attention backend passes them."""
    return Layer(
        prompt=prompt_of(case),
        q=case.q[index, start:end],
        keys=Rows(case.k[index, :end]),
        values=Rows(case.v[index, :end]),
        scale=case.scale,
        index=index,
        rope=rope_of(case.rope),
    )


def observed(policy: Policy, case: Case, index: int, cuts=()) -> object:
    seen = None
    for start, end in pairwise([0, *cuts, case.n]):
        seen = policy.observe(seen, layer_of(case, index, start, end))
    return seen


def scored(policy: Policy, case: Case, index: int, cuts=()) -> LayerScores:
    seen = observed(policy, case, index, cuts) if policy.observes else None
    layer = layer_of(case, index, case.n - policy.num_voting(prompt_of(case)), case.n)
    return policy.score(replace(layer, seen=seen, draft=case.draft[index]))


def selected(policy: Policy, case: Case, cuts=()) -> Selection:
    layers = [scored(policy, case, index, cuts) for index in range(case.num_layers)]
    sparsity = [layer.zeros / layer.entries for layer in layers if layer.entries]
    return select(policy, prompt_of(case), layers, sparsity or None, [layer.profile for layer in layers])


# What rounding may turn around: relative difference of two scores.
TOLERANCE = {"expected": 1e-4, "vlkv": 1e-4}


def assert_same_kept(kept: list, wanted: list, judged: naive.Verdict, tolerance: float) -> None:
    """Equal kept sets, up to swaps of keys whose scores rounding cannot tell apart."""
    assert [len(heads[0]) for heads in kept] == [len(heads[0]) for heads in wanted]
    for layer, heads in enumerate(zip(kept, wanted, strict=True)):
        for head, (ours, theirs) in enumerate(zip(*heads, strict=True)):
            by = [scores[layer][head] for scores in (judged.scores, judged.quota) if scores]
            swaps = zip(sorted({*ours} - {*theirs}), sorted({*theirs} - {*ours}), strict=True)
            for a, b in swaps:
                both = [(s[a], s[b]) for s in by if s[a] is not None and s[b] is not None]
                margin = min(abs(x - y) / max(abs(x), abs(y)) for x, y in both)
                assert margin < tolerance, (layer, head, a, b, margin)


OPTIONS = [
    *((name, {}) for name in policies()),
    *(
        (name, dict(sink_tokens=2, recent_fraction=0.3, modality_floors=floors, floors_share=0.6, **more))
        for name in policies()
        for floors in [{"image": 0.5, "audio": 1.0, "text": 0.4}]
        for more in [dict(quota=0.3, voting="last_turn", min_rows=5)]
    ),
    ("vlcache", dict(p=0.3)),
    ("vlcache", dict(renormalise=False)),
    ("vlcache", dict(min_rows=3, max_rows=7)),
    ("h2o", dict(importance="mean")),
    ("h2o", dict(importance="window", recent_fraction=0.0)),
    ("elastic", dict(importance="window")),
    ("elastic", dict(importance="mean", sink_tokens=3)),
    ("lookm", dict(importance="window", floors_share=0.5)),
    ("snapkv", dict(window_size=5, kernel_size=1)),
    ("snapkv", dict(window_size=2, kernel_size=9)),
    ("pyramidkv", dict(beta=3, window_size=3)),
    ("pyramidkv", dict(beta=1, window_size=3)),
    ("mixkv", dict(window_size=4, kernel_size=3)),
    ("aircache", dict(elite=0.0, modality_floors={})),
    ("aircache", dict(elite=0.5, modality_floors={})),
    ("aircache", dict(elite=1.0, modality_floors={}, max_rows=16)),
    ("vlkv", dict(reduce="sum", question_weight=1.0, value_norm=0.0)),
    ("vlkv", dict(prior=0.0, question_weight=9.0)),
    ("vlkv", dict(prior=2.0, ridge=0.5, voting="post_vision", value_norm=2.5)),
    ("vlkv", dict(quota=0.4, prior=0.0)),
    ("vlkv", dict(repeats="each", quota=0.2)),
    ("infinipotv", dict(recent_frames=0.5, kernel_size=1, modality_floors={})),
    ("infinipotv", dict(recent_frames=1.0, quota=1.0, modality_floors={})),
    ("infinipotv", dict(recent_frames=0.1, quota=0.7, modality_floors={}, kernel_size=7)),
    ("expected", dict(future=1, epsilon=0.0, sink_tokens=0)),
    ("expected", dict(future=7, epsilon=1.0)),
    ("random", dict(seed=3)),
    ("given", dict(visual=[0, 3, 5, 9, 1000])),
    ("given", dict(visual=[0, 3, 5, 9, 1000], keep=False)),
]
named = [f"{name} {options}" if options else name for name, options in OPTIONS]
every_option = pytest.mark.parametrize("name, options", OPTIONS, ids=named)
every_case = pytest.mark.parametrize("case", CASES)
every_policy = pytest.mark.parametrize("name", policies())


def lists(selection: Selection) -> list[list[list[int]]]:
    return [layer.tolist() for layer in selection.kept]


@every_case
@every_option
def test_kept_rows_are_the_defined_ones(name, options, case):
    case = case_of(case)
    for budget in (0.12, 0.45, 0.8):
        policy = policies()[name](budget=budget, **options)
        judged = naive.judge(policy, case)
        wanted = [
            [naive.choose(policy, judged, layer, head, case) for head in case.kv_heads]
            for layer in range(case.num_layers)
        ]
        selection = selected(policy, case)
        assert selection.num_kept == judged.budgets
        assert_same_kept(lists(selection), wanted, judged, TOLERANCE.get(name, 1e-5))


@pytest.mark.parametrize("budget", [0.12, 0.5, 1.0])
@every_option
def test_budget_is_spent_the_protected_stay_and_nothing_is_written_to(name, options, budget):
    policy = policies()[name](budget=budget, picture_share=0.0, **options)
    case = case_of("T63-H2-HQ8-D100")
    inputs = [case.q, case.k, case.v]
    before = [x.clone() for x in inputs]
    layers = [scored(policy, case, index) for index in range(case.num_layers)]
    outputs = [x for layer in layers for x in layer if isinstance(x, torch.Tensor)]
    scores_before = [x.clone() for x in outputs]
    profiles = [layer.profile for layer in layers]
    kept = select(policy, prompt_of(case), layers, [0.9, 0.3, 0.5], profiles).kept
    for old, new in zip(before + scores_before, inputs + outputs, strict=True):
        assert torch.equal(old, new)

    num_kept, clips = [layer.shape[1] for layer in kept], not getattr(policy, "renormalise", True)
    total = round(budget * case.n * case.num_layers)
    assert sum(num_kept) <= policy.max_total(case.n, case.num_layers) if clips else sum(num_kept) == total
    for layer, k in zip(kept, num_kept, strict=True):
        assert layer.dtype == torch.int64 and 0 <= layer.min() and layer.max() < case.n
        assert (layer.diff() > 0).all()
        num_recent = policy.num_recent(k)
        assert layer[:, k - num_recent :].tolist() == [[*range(case.n - num_recent, case.n)]] * 2
        num_sinks = min(policy.sink_tokens, k - num_recent)
        assert layer[:, :num_sinks].tolist() == [[*range(num_sinks)]] * 2
        assert clips or budget < 1 or layer.tolist() == [[*range(case.n)]] * 2


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@every_policy
def test_floors_take_their_share_of_a_layer_and_no_more(name, share):
    """Of text that no score would keep."""
    options = {"budget": 0.5, "modality_floors": {"text": 1.0}, "floors_share": share, "picture_share": 0.0}
    policy, prompt = policies()[name](**options), prompt_of(case_of("T63-H2-HQ8-D100"))
    n, generator = prompt.num_tokens, torch.Generator().manual_seed(0)
    members = torch.stack([group for group, _ in policy.floors(prompt)]).any(0)
    scores = torch.rand(2, n, generator=generator).masked_fill(members, -1.0)
    importance = torch.randint(1, 9, (3, n), generator=generator)
    layers = [LayerScores(scores, profile=profile) for profile in importance]
    for kept in select(policy, prompt, layers, [0.9, 0.3, 0.5], list(importance)).kept:
        k = kept.shape[1]
        free = n - policy.num_recent(k)
        protected = torch.arange(n) >= free
        protected[: min(policy.sink_tokens, k - int(protected.sum()))] = True
        room = min(num_tokens(share, k), k - int(protected.sum()))
        others = int((~members & ~protected).sum())
        wanted = max(min(room, int((members & ~protected).sum())), k - int(protected.sum()) - others)
        for head in kept:
            assert int((members & ~protected)[head].sum()) == wanted


OBSERVING = [
    (name, options)
    for name, options in OPTIONS
    if policies()[name]().observes and options.get("importance") != "window"
]


def test_those_that_need_the_whole_prompts_queries_say_so():
    assert {name for name, _ in OBSERVING} == {"h2o", "lookm", "elastic", "expected"}


@every_case
@pytest.mark.parametrize("name, options", OBSERVING)
def test_chunks_of_the_prefill_do_not_matter(name, options, case):
    policy, case = policies()[name](budget=0.45, **options), case_of(case)
    judged, whole = naive.judge(policy, case), lists(selected(policy, case))
    hq, dim = case.q.shape[2:]
    for cuts in [(case.n // 2,), (1, 2, case.n // 2, case.n - 1)]:
        pieces = lists(selected(policy, case, cuts))
        assert_same_kept(pieces, whole, judged, TOLERANCE.get(name, 1e-5))
        one, many = scored(policy, case, 0), scored(policy, case, 0, cuts)
        assert many.entries == one.entries and abs(many.zeros - one.zeros) <= 2
        seen = observed(policy, case, 0, cuts)
        size = sum(x.numel() if isinstance(x, torch.Tensor) else 1 for x in seen if x is not None)
        assert size <= max(len(case.kv_heads) * case.n, hq * dim * (dim + 1)) + 2, "grows with the queries"


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@every_policy
def test_no_more_than_a_tile_of_attention_is_alive(name):
    """Where every row votes, or is observed in one chunk."""
    n, heads = 1200, 4
    rope = Rotary(8, (0,) * 4)
    q, k = torch.randn(1, n, heads, 8), torch.randn(1, n, 1, 8)
    case = Case([P] * (n - 9) + [T] * 9, q, k, k, q[:, :0], 0.3, rope, [(j,) for j in range(n)])
    all_rows = {"min_rows": n, "max_rows": n, "window_size": n}
    policy = policies()[name]
    policy = policy(**{x.name: all_rows[x.name] for x in fields(policy) if x.name in all_rows})
    with Largest() as watch:
        selected(policy, case)
    assert n * heads <= watch.elements <= TILE_ELEMENTS < n * n * heads


@pytest.mark.parametrize("name", policies())
def test_keys_and_values_may_lie_anywhere_in_a_pool(name):
    """As an attention backend hands them over: a buffer, whose other rows nobody reads, and slots."""
    case = case_of("one KV head, M-RoPE, video, two pictures, draft")
    policy, n = policies()[name](budget=0.3), case.n
    slots = torch.randperm(n + 20, generator=torch.Generator().manual_seed(0))[:n]

    def in_a_pool(x: torch.Tensor) -> Rows:
        pool = torch.full((n + 20, *x.shape[1:]), float("nan"))
        pool[slots] = x
        return Rows(pool, slots)

    layer = layer_of(case, 1, n - policy.num_voting(prompt_of(case)), n)
    seen = observed(policy, case, 1) if policy.observes else None
    layer = replace(layer, seen=seen, draft=case.draft[1] if policy.can_draft else None)
    pooled = replace(layer, keys=in_a_pool(layer.k), values=in_a_pool(layer.v))
    for ours, expected in zip(policy.score(pooled), policy.score(layer), strict=True):
        equal = torch.equal(ours, expected) if isinstance(ours, torch.Tensor) else ours == expected
        assert equal


def test_a_draft_may_be_longer_than_the_prompt():
    case = make_case(7, [(T, 3), (P, 4), (T, 2)], 2, 2, 8, Rotary(8, (0,) * 4), drafted=12)
    policy = policies()["uniform"](budget=0.4)
    judged = naive.judge(policy, case)
    wanted = [[naive.choose(policy, judged, layer, head, case) for head in case.kv_heads] for layer in range(3)]
    assert_same_kept(lists(selected(policy, case)), wanted, judged, 1e-5)


def test_random_keeps_the_same_rows_for_a_seed_and_others_for_another():
    case = case_of("T63-H2-HQ8-D100")
    one, again, other = (lists(selected(policies()["random"](seed=seed), case)) for seed in (1, 1, 2))
    assert one == again != other
    assert one[0] != one[1] and one[0][0] != one[0][1], "layers and heads differ"


@pytest.mark.parametrize(
    "quota, left", [(0.07, 150), (0.14, 75), (0.15, 190), (0.25, 30), (0.3, 33), (1.0, 9)]
)
def test_a_quota_is_counted_like_every_other_ratio(quota, left):
    prompt = Prompt(torch.full((left + 100,), P, dtype=torch.uint8))
    scores = torch.rand(1, prompt.num_tokens, generator=torch.Generator().manual_seed(0))
    policy = VLCache(quota=quota, recent_fraction=0.0)
    tier = tiers(policy, prompt, scores, left + 1, quota_scores=-scores)
    chosen = (tier == 2).flatten()
    assert int(chosen.sum()) == num_tokens(quota, left)
    assert scores[0, :-1][chosen[:-1]].max() <= scores[0, :-1][~chosen[:-1]].min()


# Options

BASE_DEFAULTS = dict(
    budget=0.1, recent_fraction=0.1, sink_tokens=0, min_rows=16, max_rows=256, voting="post_vision",
    min_prompt_tokens=256, modality_floors={}, floors_share=1.0, picture_share=0.1, quota=0.0, merge="none",
    merge_threshold=0.0, decode="append", fixed_point_distance=25, draft_tokens=0, compact_always=False,
)  # fmt: skip
NO_PICTURE = {"text": 1.0, "system": 1.0, "audio": 1.0}
DEFAULTS = {
    "none": dict(budget=1.0),
    "vlcache": dict(p=0.01, renormalise=True),
    "vlkv": dict(
        voting="last_turn", reduce="max", value_norm=1.0, question_weight=2.0, prior=0.15, ridge=0.01,
        repeats="newest",
    ),
    "elastic": dict(
        recent_fraction=0.0, sink_tokens=1, merge="bucket_mean", decode="fixed_point", importance="prompt"
    ),
    "uniform": {},
    "snapkv": dict(window_size=32, kernel_size=5),
    "pyramidkv": dict(window_size=32, kernel_size=5, beta=20.0),
    "h2o": dict(recent_fraction=0.5, importance="prompt"),
    "streamingllm": dict(sink_tokens=4),
    "lookm": dict(modality_floors=NO_PICTURE, merge="similar", importance="prompt"),
    "prefixkv": {},
    "aircache": dict(modality_floors=NO_PICTURE, elite=0.9),
    "mixkv": dict(window_size=32, kernel_size=5),
    "infinipotv": dict(modality_floors=NO_PICTURE, quota=0.5, recent_frames=0.25, kernel_size=3),
    "expected": dict(sink_tokens=4, future=512, epsilon=0.02),
    "random": dict(seed=0),
    "given": dict(recent_fraction=0.0, picture_share=0.0, modality_floors=NO_PICTURE, visual=(), keep=True),
}
NAN, INF = float("nan"), float("inf")
FRACTION = "in [0, 1]", [-0.1, 1.1, NAN]
REFUSED = {
    "budget": ("in (0, 1]", [0, -0.1, 1.01, NAN]),
    "recent_fraction": FRACTION,
    "sink_tokens": ("at least 0", [-1]),
    "min_rows": ("at least 1", [0]),
    "max_rows": ("at least min_rows", [15]),
    "voting": ("last_turn", ["newest"]),
    "min_prompt_tokens": ("at least 1 / budget", [0]),
    "modality_floors": ("in [0, 1]", [{"text": 1.5}, {"text": True}]),
    "floors_share": FRACTION,
    "picture_share": FRACTION,
    "quota": FRACTION,
    "merge": ("bucket_mean", ["mean"]),
    "merge_threshold": ("in [-1, 1]", [-1.1, 1.1, NAN]),
    "decode": ("fixed_point", ["evict"]),
    "fixed_point_distance": ("at least 1", [0]),
    "draft_tokens": ("in [0, ", [-1, 257]),
    "compact_always": ("true or false", [0, "no"]),
    "p": ("in (0, 1)", [0.0, 1.0, NAN]),
    "renormalise": ("true or false", [1]),
    "reduce": ("one of max, sum", ["mean"]),
    "value_norm": ("in [0, 4]", [-0.1, 4.1, NAN]),
    "question_weight": ("in [1, 1e6]", [0.9, INF, NAN]),
    "prior": ("in [0, 1e6]", [-0.1, INF, NAN]),
    "ridge": ("in [1e-6, 1e6]", [0, -1.0, 1e-7, INF, NAN]),
    "repeats": ("one of newest, each", ["all"]),
    "importance": ("one of prompt, mean, window", ["all"]),
    "window_size": ("at least 1", [0]),
    "kernel_size": ("odd, from 1 to 99", [0, -1, 4, 101]),
    "beta": ("finite and at least 1", [0.9, INF, NAN]),
    "elite": FRACTION,
    "recent_frames": ("in (0, 1]", [0, 1.1, NAN]),
    "future": ("in [1, 65536]", [0, 65_537]),
    "epsilon": ("finite and at least 0", [-0.01, INF, NAN]),
    "seed": ("an integer", [0.5]),
    "visual": ("numbers from 0", [[-1], [3, -2]]),
    "keep": ("true or false", [1]),
}
WRONG_TYPES = {
    "float": ("a number", ["1", None, True]),
    "int": ("an integer", ["1", 1.0, None, True, 2**31, -(2**70)]),
    "bool": ("true or false", ["true", None]),
    "str": ("a string", [1, None]),
    "Sequence[int]": ("a list of integers", ["1", 1, [1.0], [True], [2**31], None]),
    "Mapping[str, float]": ("an object", [[], "text", None]),
}


def default_of(option) -> object:
    return option.default if option.default is not MISSING else option.default_factory()


@every_policy
def test_defaults_are_the_stated_ones_and_each_option_is_explained(name):
    policy = policies()[name]
    assert {x.name: default_of(x) for x in fields(policy)} == BASE_DEFAULTS | DEFAULTS[name]
    explained = " ".join(cls.__doc__ for cls in policy.__mro__[:-1])
    assert all(f" {x.name}:" in explained or f" {x.name}," in explained for x in fields(policy))
    assert policy.name == name
    assert eval(repr(policy()), {policy.__name__: policy}) == policy(), "no record of a run"


@every_policy
def test_wrong_options_are_refused_naming_value_and_range(name):
    policy = policies()[name]
    for option in fields(policy):
        for allowed, values in (REFUSED[option.name], WRONG_TYPES[option.type]):
            for value in values:
                with pytest.raises(ValueError) as error:
                    policy(**{option.name: value})
                shown = next(iter(value.values())) if isinstance(value, dict) else value
                assert all(words in str(error.value) for words in (option.name, repr(shown), allowed))


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (float, 0.5, "1"),
        (int, 3, 1.5),
        (bool, True, 1),
        (str, "word", 1),
        (Sequence[int], [1, 2], ["1"]),
        (Mapping[str, float], {"text": 0.5}, ["text"]),
    ],
)
def test_options_may_be_annotated_by_types_or_their_names(kind, good, bad):
    """Without ``from __future__ import annotations`` a package's fields hold the types themselves."""
    written = kind.__name__ if isinstance(kind, type) else str(kind).removeprefix("typing.")
    for annotation in (kind, written):
        option = ("extra", annotation, field(kw_only=True))
        policy = make_dataclass("Extra", [option], bases=(Policy,), frozen=True, namespace={"name": "extra"})
        assert policy(extra=good).extra == good
        with pytest.raises(ValueError, match="extra"):
            policy(extra=bad)


@pytest.mark.parametrize(
    "name, option, value",
    [
        ("random", "seed", 2**31 - 1),
        ("random", "seed", 2**62),
        ("random", "seed", -(2**31) + 1),
        ("given", "visual", [2**31 - 1]),
        ("given", "visual", [2**70]),
        ("snapkv", "window_size", 2**31 - 1),
        ("snapkv", "kernel_size", 99),
        ("snapkv", "kernel_size", 2**40 + 1),
        ("infinipotv", "kernel_size", 99),
        ("pyramidkv", "beta", INF),
        ("pyramidkv", "beta", 1e300),
        ("vlkv", "ridge", INF),
        ("vlkv", "ridge", 1e-6),
        ("vlkv", "ridge", 1e300),
        ("vlkv", "prior", 1e300),
        ("vlkv", "question_weight", 1e300),
        ("expected", "future", 65_536),
        ("expected", "future", 10**14),
        ("expected", "epsilon", INF),
        ("expected", "epsilon", 1e300),
        ("expected", "sink_tokens", 2**31 - 1),
        ("vlcache", "max_rows", 2**31 - 1),
        ("vlcache", "p", 1e-320),
    ],
)
def test_extreme_options_are_refused_or_work(name, option, value):
    """A request may set them, and what fails while a prompt is scored ends the server."""
    case = case_of("T63-H2-HQ8-D100")
    try:
        policy = policies()[name](**{option: value})
    except ValueError as error:
        assert option in str(error)
        return
    layers = [scored(policy, case, index) for index in range(case.num_layers)]
    assert not any(x.isnan().any() for layer in layers for x in layer[::3] if x is not None)
    assert selected(policy, case).num_kept


# Fixed-point elimination

FIXED = [(sinks, distance) for sinks in (0, 1, 4, 30) for distance in (1, 25, 60)]


@pytest.mark.parametrize("sinks, distance", FIXED)
def test_sliding_rows_are_those_that_elimination_leaves(sinks, distance):
    """Before each append the row at max(sinks, k - distance) goes, the last where there are no more."""
    policy = VLCache(sink_tokens=sinks, fixed_point_distance=distance, decode="fixed_point")
    for k in (1, 2, 4, 5, 24, 25, 26, 27, 61, 90):
        rows = [f"row {i}" for i in range(k)]
        head, tail = rows[: k - policy.num_sliding(k)], rows[k - policy.num_sliding(k) :]
        for step in range(100):
            del rows[min(max(sinks, k - distance), k - 1)]
            rows.append(f"output {step}")
            tail.append(f"output {step}")
            assert rows == head + tail[-policy.num_sliding(k) :]


@pytest.mark.parametrize("sinks, distance", FIXED)
@pytest.mark.parametrize("decode", ["append", "fixed_point"])
def test_slots_of_the_kept_rows_stay_within_what_admission_reserves(decode, sinks, distance):
    """Fixed rows of all layers share slots; a row that slides has the same slot in every layer."""
    generator = torch.Generator().manual_seed(0)
    options = dict(sink_tokens=sinks, fixed_point_distance=distance, decode=decode, budget=0.2)
    tightest = 10**9
    for num_layers in (1, 2, 7, 28):
        for n in (30, 63, 301):
            weights = torch.rand(num_layers, generator=generator) ** 4
            policy = VLCache(**options)
            num_kept = policy.layer_budgets((1 - weights).tolist(), n)
            sliding = [policy.num_sliding(k) if decode == "fixed_point" else 0 for k in num_kept]
            slots = -(-(sum(num_kept) - sum(sliding)) // num_layers) + max(sliding)
            tightest = min(tightest, policy.max_slots(n, num_layers) - slots)
    assert 0 <= tightest <= distance


# Policies of other packages

GOOD = """
from __future__ import annotations

from dataclasses import dataclass

from sglang_vlkv.stages.layer import Layer, LayerScores
from sglang_vlkv.stages.options import require
from sglang_vlkv.stages.policy import Policy


@dataclass(frozen=True)
class KeyNorm(Policy):
    \"\"\"Keeps the keys with the smallest norm.

    Attributes:
        power: of the norm.
    \"\"\"

    name = "keynorm"

    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.power > 0, "power", self.power, "above 0")

    def score(self, layer: Layer) -> LayerScores:
        return LayerScores(-layer.k.float().norm(dim=-1).T ** self.power)
"""
PACKAGES = {
    "good": ("keynorm = good:KeyNorm", GOOD),
    "real_annotations": ("keynorm = real_annotations:KeyNorm", GOOD.replace("from __future__", "# ")),
    "function": ("fast = function:fast", "def fast(layer): ..."),
    "misnamed": ("fast = misnamed:KeyNorm", GOOD),
    "unnamed": ("fast = unnamed:Fast", "from sglang_vlkv.base import Policy\nclass Fast(Policy): ..."),
    "taken": ("snapkv = taken:KeyNorm", GOOD.replace('"keynorm"', '"snapkv"')),
    "absent": ("fast = nowhere_at_all:Fast", ""),
}
LOADER = """
import json, sys
from sglang_vlkv.options.config import build_policy
from sglang_vlkv.policies import policies

answers, before = {}, list(policies())
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    policies.cache_clear()
    try:
        policies()
        policy = build_policy("keynorm", 0.25, {"power": 2})
        answers[folder] = [sorted(set(policies()) - set(before)), repr(policy)]
        try:
            build_policy("keynorm", 0.25, {"power": 0})
        except ValueError as error:
            answers[folder].append(str(error))
    except Exception as error:
        answers[folder] = f"{type(error).__name__}: {error}"
    sys.path.remove(folder)
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> dict[str, object]:
    """Per package, what a process says that has it installed."""
    folders = {}
    for name, (entry_point, code) in PACKAGES.items():
        folders[name] = folder = tmp_path_factory.mktemp(name)
        (folder / f"{name}.py").write_text(code)
        info = folder / f"{name}-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
        (info / "entry_points.txt").write_text(f"[sglang_vlkv.policies]\n{entry_point}\n")
    command = [sys.executable, "-c", LOADER, *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    return {name: answers[str(folder)] for name, folder in folders.items()}


@pytest.mark.parametrize("package", ["good", "real_annotations"])
def test_a_package_adds_a_policy_in_under_30_lines(loaded, package):
    assert isinstance(loaded[package], list), loaded[package]
    new, record, refusal = loaded[package]
    assert new == ["keynorm"]
    assert record.startswith("KeyNorm(budget=0.25, ") and record.endswith(", power=2)")
    assert "--kv-policy keynorm: power is 0; it must be above 0" in refusal
    assert len(GOOD.strip().splitlines()) < 30


@pytest.mark.parametrize(
    "package, message",
    [
        ("function", "ValueError: entry point fast = function:fast of .* is no subclass"),
        ("misnamed", "ValueError: entry point fast = misnamed:KeyNorm .* whose name is 'keynorm'"),
        ("unnamed", "ValueError: entry point fast = unnamed:Fast .* whose name is None"),
        ("taken", "ValueError: entry point snapkv = taken:KeyNorm .* takes a name that .*snapkv has"),
        ("absent", "ModuleNotFoundError: .*nowhere_at_all"),
    ],
)  # fmt: skip
def test_what_is_no_policy_of_its_own_is_refused_where_it_comes_from(loaded, package, message):
    assert isinstance(loaded[package], str)
    assert re.search(message, loaded[package])
