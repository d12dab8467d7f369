"""What scoring, selecting and moving add to a prefill, over all layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu import subjects
from benchmarks.gpu.baseline import Decoder
from benchmarks.gpu.correctness import kernel
from benchmarks.gpu.goals import COMPRESSION
from benchmarks.gpu.pool import Pool
from benchmarks.gpu.record import Part, importable
from benchmarks.gpu.shapes import ALPHA, Model, kept_rows, models
from benchmarks.gpu.timing import Clock, Timing
from sglang_vlkv.stages.budgets import proportional

ATTENTION, STEP = "fastest prefill attention, scaled", "prefill with it, scaled"
GOAL_LENGTH = 32768
CUDNN, FA3 = "torch SDPA, cuDNN", "FlashAttention 3"
VOTING_ROWS = 64, 256
TIMED_LAYERS = 1  # of the prefill; its layers are alike


def case_name(model: Model, length: int) -> str:
    return f"{model.name}, {length} tokens"


def with_budgets_row(voting: int) -> str:
    return f"all of it with budgets, {voting} voting rows"


def run(part: Part, clock: Clock) -> None:
    part.notes.append(
        "compaction is all layers, eager: the time that passes on the stream, gaps between launches included; "
        f"prefill is {TIMED_LAYERS} layer with dummy weights times the number of layers; selection keeps {ALPHA:g} "
        "of the prompt, geometric over layers. The layers' budgets are computed on the host, which waits for "
        "their densities once: the rows with budgets include it, by the host's clock, the others leave it out"
    )
    lengths = (96,) if clock.rehearsal else (8192, GOAL_LENGTH, 131072)
    for model in models(clock.rehearsal):
        for voting in VOTING_ROWS:
            part.expect(COMPRESSION, case_name(model, GOAL_LENGTH), with_budgets_row(voting))
    for model in models(clock.rehearsal):
        for length in lengths:
            name = case_name(model, length)
            seconds = 2 + 10 * (length / 131072) ** 2
            if part.has(seconds, name):
                part.attempt(name, _case, clock, model, length)
            clock.free_bytes()


def _case(part: Part, clock: Clock, model: Model, length: int) -> None:
    case = case_name(model, length)
    timed = _prefill(part, clock, model, length, case)
    goals = _goals(part, case, length, timed)
    clock.free_bytes()
    pool = Pool(model, length + length // 4 + 64, clock)
    order = torch.randperm(pool.rows, device=clock.device)
    slots, target = order[:length], order[length:]
    num_kept = kept_rows(model.layers, length, ALPHA, uneven=True)
    target = pool.cells_of(target[: -(-sum(num_kept) // model.layers)])[: sum(num_kept)].contiguous()
    score, select = kernel("post_vision", "post_vision_scores"), kernel("selection", "select_rows")
    gather, scatter = kernel("compaction", "gather_rows"), kernel("compaction", "scatter_rows")
    for voting in (4,) if clock.rehearsal else VOTING_ROWS:
        q = torch.randn(model.layers, voting, model.q_heads, model.head_dim, dtype=clock.dtype, device=clock.device)

        def scoring() -> list[torch.Tensor]:
            layers = zip(q, pool.storage, strict=True)
            return [score(voters, layer[0], model.scale, slots=slots).scores for voters, layer in layers]

        scores = torch.stack(scoring())
        tier = torch.full_like(scores, 3, dtype=torch.int8)
        tier[..., length - length // 100 :] = 0
        kept = select(scores, tier, num_kept).long()
        cells = pool.k_cells, pool.v_cells
        rows = gather(*cells, slots, kept, num_kept, pool.cells_per_layer)

        def compaction() -> None:
            scatter(*cells, target, gather(*cells, slots, kept, num_kept, pool.cells_per_layer))

        def everything() -> None:
            chosen = select(torch.stack(scoring()), tier, num_kept).long()
            scatter(*cells, target, gather(*cells, slots, chosen, num_kept, pool.cells_per_layer))

        def with_budgets() -> None:
            layers = zip(q, pool.storage, strict=True)
            found = [score(voters, layer[0], model.scale, slots=slots) for voters, layer in layers]
            density = torch.stack([1 - one.zeros / one.entries for one in found]).tolist()
            budgets = proportional(density, sum(num_kept), length)
            chosen = select(torch.stack([one.scores for one in found]), tier, budgets).long()
            scatter(*cells, target, gather(*cells, slots, chosen, budgets, pool.cells_per_layer))

        more = dict(voting_rows=voting, model=model._asdict(), kept_rows=sum(num_kept))
        with_rows = f"{voting} voting rows"

        def add(row: str, timing: Timing, *rests_on: str, share_of: str = ATTENTION, **others) -> None:
            with part.about(*rests_on):
                part.add(case, row, timing, share_of=share_of, **others, **more)  # noqa: B023

        flops = 2 * 2 * voting * model.q_heads * length * model.head_dim * model.layers  # two passes over the keys
        add(f"scoring, {with_rows}", clock.measure(scoring), subjects.SCORING, flops=flops)
        timing = clock.measure(lambda: select(scores, tier, num_kept))
        add(f"selection, {with_rows}", timing, subjects.SELECTION)
        timing = clock.measure(compaction)
        add(f"gather and scatter, {with_rows}", timing, subjects.MOVING, moved=4 * rows.nbytes)
        timing = clock.measure(everything)
        add(f"all of it, {with_rows}, beside attention", timing, *subjects.COMPRESSION)
        add(f"all of it, {with_rows}, beside the prefill", timing, *subjects.COMPRESSION, share_of=STEP)
        with_budgets()
        walls = [clock.wall(with_budgets) for _ in range(2 if clock.rehearsal else 10)]
        timing = Timing.of(walls[: len(walls) // 2], walls[len(walls) // 2 :])
        add(with_budgets_row(voting), timing, *subjects.COMPRESSION, share_of=STEP, goals=goals)


def _goals(part: Part, case: str, length: int, timed: set[str]) -> list[str]:
    """What the case is judged by: beside attention that is slower than a server's, any share is small."""
    if length == GOAL_LENGTH and not timed & {CUDNN, FA3}:
        part.skip(f"{case}: the goal", f"neither {CUDNN} nor {FA3} ran: the prefill is slower than it need be")
        return []
    return [COMPRESSION] if length == GOAL_LENGTH else []


def _prefill(part: Part, clock: Clock, model: Model, length: int, case: str) -> set[str]:
    """One layer's attention alone, then one whole layer, each timed and scaled to all layers.

    Returns:
        The attentions that were timed, of which the fastest counts.
    """
    decoder = Decoder(model, clock, TIMED_LAYERS)
    shape = 1, length, model.hidden
    x = torch.randn(shape, dtype=clock.dtype, device=clock.device)
    rotation = decoder.rotation(torch.arange(length, device=clock.device)[None])

    def heads(count: int) -> torch.Tensor:
        return torch.randn(1, length, count, model.head_dim, dtype=clock.dtype, device=clock.device)

    qkv = heads(model.q_heads), heads(model.kv_heads), heads(model.kv_heads)
    scale = model.layers / TIMED_LAYERS
    flops = 2 * model.q_heads * model.head_dim * length**2 * model.layers  # the causal half of both products
    repeats = dict(seconds=0.3)
    about = dict(scaled_from_layers=TIMED_LAYERS, model=model._asdict())
    timings: dict[str, Timing] = {}
    for name, attention in attentions(clock).items():
        if isinstance(attention, str):
            part.skip(f"{case}: {name}", attention)
            continue
        try:
            timings[name] = clock.measure(lambda: attention(*qkv, model.scale), **repeats)  # noqa: B023
        except (RuntimeError, TypeError) as error:  # a backend that does not take these shapes
            part.skip(f"{case}: {name}", str(error)[-200:])
            continue
        part.add(case, f"prefill attention, {name}, scaled", timings[name].scaled(scale), flops=flops, **about)
    fastest = min(timings, key=lambda name: timings[name].p50)
    attention = attentions(clock)[fastest]
    part.notes.append(f"{case}: the fastest prefill attention is {fastest}")
    part.add(case, ATTENTION, timings[fastest].scaled(scale), flops=flops, backend=fastest, **about)

    def attend(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, model.scale)

    layer = decoder.layers[0]
    flops += 2 * length * model.layers * sum(w.numel() for w in (layer.qkv, layer.o, layer.gate_up, layer.down))
    timing = clock.measure(lambda: decoder.layer(0, layer, x, rotation, attend), **repeats)
    part.add(case, STEP, timing.scaled(scale), flops=flops, backend=fastest, **about)
    return set(timings)


def attentions(clock: Clock) -> dict[str, Callable[..., torch.Tensor] | str]:
    """Causal attention of q ``[B, n, Hq, D]``, k and v ``[B, n, Hkv, D]`` and a scale; or why there is none."""

    def sdpa(*backends: SDPBackend) -> Callable[..., torch.Tensor]:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(list(backends)) if backends else nullcontext():
                out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            return out.transpose(1, 2)

        return attend

    if clock.rehearsal:
        return {"torch SDPA": sdpa(), FA3: "it runs on a GPU only"}
    found: dict = {
        "torch SDPA, FlashAttention": sdpa(SDPBackend.FLASH_ATTENTION),
        CUDNN: sdpa(SDPBackend.CUDNN_ATTENTION),
        FA3: "flash_attn_interface is not installed",
    }
    if importable("flash_attn_interface"):
        try:
            from flash_attn_interface import flash_attn_func
        except Exception as error:  # a library that does not load
            return found | {FA3: f"{type(error).__name__}: {error}"}

        def fa3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
            out = flash_attn_func(q, k, v, softmax_scale=scale, causal=True)
            return out[0] if isinstance(out, tuple) else out

        found[FA3] = fa3
    return found


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, clock: Clock) -> torch.Tensor:
    """For a prefill that is not itself compared: causal SDPA with grouped heads; FlashAttention's backend on a GPU."""
    if clock.rehearsal:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
