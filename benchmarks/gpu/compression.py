"""What scoring, selecting and moving add to a prefill, over all layers."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.baseline import Decoder
from benchmarks.gpu.correctness import kernel
from benchmarks.gpu.pool import Pool
from benchmarks.gpu.record import Part
from benchmarks.gpu.shapes import ALPHA, Model, kept_rows, models
from benchmarks.gpu.timing import Clock, Timing

ATTENTION, STEP = "prefill attention, scaled", "prefill, scaled"
TIMED_LAYERS = 1  # of the prefill; its layers are alike


def run(part: Part, clock: Clock) -> None:
    part.notes.append(
        f"compaction is all layers, eager, device time; prefill is {TIMED_LAYERS} layer with dummy weights times "
        f"the number of layers; selection keeps {ALPHA:g} of the prompt, geometric over layers"
    )
    lengths = (96,) if clock.rehearsal else (8192, 32768, 131072)
    for model in models(clock.rehearsal):
        for length in lengths:
            name = f"{model.name}, {length} tokens"
            seconds = 2 + 10 * (length / 131072) ** 2
            if part.has(seconds, name):
                part.attempt(name, _case, clock, model, length)
            clock.free_bytes()


def _case(part: Part, clock: Clock, model: Model, length: int) -> None:
    case = f"{model.name}, {length} tokens"
    _prefill(part, clock, model, length, case)
    clock.free_bytes()
    pool = Pool(model, length + length // 4 + 64, clock)
    order = torch.randperm(pool.rows, device=clock.device)
    slots, target = order[:length], order[length:]
    num_kept = kept_rows(model.layers, length, ALPHA, uneven=True)
    target = pool.cells_of(target[: -(-sum(num_kept) // model.layers)])[: sum(num_kept)].contiguous()
    score, select = kernel("post_vision", "post_vision_scores"), kernel("selection", "select_rows")
    gather, scatter = kernel("compaction", "gather_rows"), kernel("compaction", "scatter_rows")
    for voting in (4,) if clock.rehearsal else (64, 256):
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

        about = dict(voting_rows=voting, model=model._asdict(), kept_rows=sum(num_kept))
        with_rows = f"{voting} voting rows"
        flops = 2 * 2 * voting * model.q_heads * length * model.head_dim * model.layers  # two passes over the keys
        part.add(
            case, f"scoring, {with_rows}", clock.measure(scoring), flops=flops, share_of=ATTENTION, **about
        )  # fmt: skip
        timing = clock.measure(lambda: select(scores, tier, num_kept))
        part.add(case, f"selection, {with_rows}", timing, share_of=ATTENTION, **about)
        part.add(
            case, f"gather and scatter, {with_rows}", clock.measure(compaction), moved=4 * rows.nbytes,
            share_of=ATTENTION, **about,
        )  # fmt: skip
        timing = clock.measure(everything)
        part.add(case, f"all of it, {with_rows}, beside attention", timing, share_of=ATTENTION, **about)
        part.add(case, f"all of it, {with_rows}, beside the prefill", timing, share_of=STEP, **about)


def _prefill(part: Part, clock: Clock, model: Model, length: int, case: str) -> None:
    """One layer's attention alone, then one whole layer, each timed and scaled to all layers."""
    decoder = Decoder(model, clock, TIMED_LAYERS)
    shape = 1, length, model.hidden
    x = torch.randn(shape, dtype=clock.dtype, device=clock.device)
    rotation = decoder.rotation(torch.arange(length, device=clock.device)[None])

    def attend(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return flash(q, k, v, model.scale, clock).transpose(1, 2)

    def heads(count: int) -> torch.Tensor:
        return torch.randn(1, length, count, model.head_dim, dtype=clock.dtype, device=clock.device)

    qkv = heads(model.q_heads), heads(model.kv_heads), heads(model.kv_heads)
    scale = model.layers / TIMED_LAYERS
    flops = 2 * model.q_heads * model.head_dim * length**2 * model.layers  # the causal half of both products
    repeats = dict(seconds=0.3)
    about = dict(scaled_from_layers=TIMED_LAYERS, model=model._asdict())
    timing: Timing = clock.measure(lambda: attend(0, *qkv), **repeats)
    part.add(case, ATTENTION, timing.scaled(scale), flops=flops, **about)
    layer = decoder.layers[0]
    flops += 2 * length * model.layers * sum(w.numel() for w in (layer.qkv, layer.o, layer.gate_up, layer.down))
    timing = clock.measure(lambda: decoder.layer(0, layer, x, rotation, attend), **repeats)
    part.add(case, STEP, timing.scaled(scale), flops=flops, **about)


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, clock: Clock) -> torch.Tensor:
    """Causal SDPA with grouped heads; FlashAttention's backend on a GPU."""
    if clock.rehearsal:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
