"""Every kernel against float64 on fresh random inputs; what must not be read or written is poison."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch

from benchmarks.gpu.engines import decode_engine
from benchmarks.gpu.pool import OWN, Pool, Residents
from benchmarks.gpu.record import Part
from benchmarks.gpu.shapes import ALPHA, Batch, Model, models
from benchmarks.gpu.subjects import ATTENTION, EXTEND, MOVING, SCORING, SELECTION
from benchmarks.gpu.timing import Clock

LAYERS, SMALL_LAYERS = 4, 2  # of each model; kernels do not know how many there are
NEAR = 1e-4  # logits this near to the zero threshold may fall on either side of it


def kernel(op: str, name: str) -> Callable:
    """The Triton version of an operation, whichever device its tensors are on."""
    return getattr(import_module(f"sglang_vlkv.kernels.{op}.triton"), name)


def weights(q: torch.Tensor, k: torch.Tensor, scale: float, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Causal attention weights, ``[Hkv, E * G, n]`` in the inputs' dtype, the softmax at least in float32.

    Args:
        q: ``[E, Hq, D]``.
        k: ``[n, Hkv, D]``.
        rows: positions of the queries, ``[E]``; None for the last E.
    """
    logits = masked_logits(q, k, scale, rows)
    return logits.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)


def masked_logits(q: torch.Tensor, k: torch.Tensor, scale: float, rows: torch.Tensor | None = None) -> torch.Tensor:
    (num_queries, num_q_heads, dim), (num_keys, num_kv_heads, _) = q.shape, k.shape
    group = num_q_heads // num_kv_heads
    positions = torch.arange(num_keys, device=q.device)
    rows = positions[num_keys - num_queries :] if rows is None else rows
    tile = q.view(num_queries, num_kv_heads, group, dim).transpose(0, 1).flatten(1, 2)
    logits = tile @ k.permute(1, 2, 0) * scale
    return logits.masked_fill_(positions > rows.repeat_interleave(group)[:, None], -torch.inf)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Plain PyTorch, ``[E, Hq, D]``, in the inputs' dtype: the reference in float64, the yardstick else."""
    (num_queries, num_q_heads, dim), num_kv_heads = q.shape, k.shape[1]
    out = weights(q, k, scale) @ v.transpose(0, 1)
    return out.view(num_kv_heads, num_queries, -1, dim).transpose(0, 1).reshape(num_queries, num_q_heads, dim)


def error(got: torch.Tensor, reference: torch.Tensor) -> float:
    """``|got - reference| / |reference|``; NaN where anything in ``got`` is."""
    return ((got.double() - reference).norm() / reference.norm()).item()


def compare(part: Part, name: str, got: torch.Tensor, reference: torch.Tensor, plain: torch.Tensor) -> bool:
    """At most twice plain PyTorch's error; in float32 some rounding is allowed in any case."""
    ours, theirs = error(got, reference), error(plain, reference)
    bound = max(2 * theirs, 16 * torch.finfo(torch.float32).eps)
    return part.check(name, ours <= bound, error=ours, error_of_plain_pytorch=theirs)


def attention_sample(
    part: Part, name: str, pool: Pool, cells: torch.Tensor, q: torch.Tensor, out: torch.Tensor
) -> bool:
    """One request's output ``[Hq, D]`` over ``cells`` against float64."""
    k, v = pool.k_cells[cells], pool.v_cells[cells]
    reference = attend(q[None].double(), k.double(), v.double(), pool.model.scale)
    return compare(part, name, out[None], reference, attend(q[None], k, v, pool.model.scale))


def poisoned(residents: Residents) -> None:
    """Makes NaN of every cell that no row of the table sees, keys and values alike."""
    pool = residents.pool
    seen = torch.zeros(pool.cells_per_layer * pool.model.layers, dtype=torch.bool, device=pool.device)
    for row in range(len(residents.kept)):
        for layer in range(pool.model.layers):
            cells = residents.cells(row, layer)
            seen[cells] = seen[cells + pool.rows] = True
    flat = pool.storage.view(len(seen), -1)
    flat[~seen] = torch.nan


def small_batch(model: Model, clock: Clock) -> tuple[Residents, torch.Tensor, torch.Tensor]:
    """Compacted, exact, sliding and padding requests; their rows and sequence lengths."""
    lengths = (70, 40, 33, 1) if clock.small else (40_000, 3_001, 777, 130, 1)
    exact = (1, len(lengths) - 1)
    batch = Batch("mixed", lengths)
    pool = Pool(model, sum(lengths) + OWN * len(lengths) + 64, clock)
    residents = Residents(pool, batch, ALPHA, True, 1, exact)
    poisoned(residents)
    slides = torch.tensor([0, *range(1, model.layers + 1)]).cumsum(0)
    residents.table.sliding[2] = slides.int().to(clock.device)
    # The last request is padding: a compacted row with no token of its own.
    rows = torch.cat([residents.rows[0], residents.rows[0][:1]])
    padding = torch.tensor([lengths[0]], device=clock.device)
    return residents, rows, torch.cat([residents.seq_lens[0], padding])


def newest(row: int, layer: int) -> int | None:
    return layer + 1 if row == 2 else None


def decoding(part: Part, clock: Clock, model: Model, flashinfer: bool) -> None:
    """Index building to the element, and the decode of everything it lists."""
    from sglang_vlkv.kernels.ragged_attention.triton import RaggedIndices

    residents, rows, seq_lens = small_batch(model, clock)
    size, pool = len(rows), residents.pool
    lists = RaggedIndices(model.layers, size, residents.num_rows + 1, clock.device)
    lists.indices.fill_(torch.iinfo(torch.int32).max)
    indptr, indices = lists.build(residents.table, rows, seq_lens, residents.req_to_token, pool.cells_per_layer)
    wanted = [
        residents.cells(row, layer, newest(row, layer)) for layer in range(model.layers) for row in range(size - 1)
    ]
    flat = torch.cat(wanted)
    built = indices[: len(flat)].long()
    untouched = bool((indices[len(flat) :] == torch.iinfo(torch.int32).max).all())
    counts = torch.tensor([len(cells) for cells in wanted], device=clock.device).view(model.layers, size - 1)
    counts = torch.cat([counts, counts.new_zeros(model.layers, 1)], 1)
    starts = torch.cat([counts.new_zeros(1), counts.sum(1).cumsum(0)[:-1]])
    offsets = torch.cat([starts[:, None], starts[:, None] + counts.cumsum(1)], 1)
    same = torch.equal(built, flat) and torch.equal(indptr.long(), offsets)
    if not part.check(f"index lists, {model.name}", same and untouched):
        return
    engine = decode_engine(model, size, clock, flashinfer)
    engine.plan(indptr)
    q = torch.randn(model.layers, size, model.q_heads, model.head_dim, dtype=clock.dtype, device=clock.device)
    out = torch.full_like(q, torch.nan)
    what = "FlashInfer decode" if flashinfer else "decode"
    for layer in range(model.layers):
        engine.run(
            layer, q[layer], pool.k_cells, pool.v_cells, indptr, indices, model.scale, out=out[layer]
        )  # fmt: skip
        for row in range(size - 1):
            name = f"{what}, {model.name}, layer {layer}, request of {int(counts[layer, row])} rows"
            cells = residents.cells(row, layer, newest(row, layer))
            attention_sample(part, name, pool, cells, q[layer, row], out[layer, row])
    finite = bool(out[:, :-1].isfinite().all())
    part.check(f"{what}, {model.name}: all is written", finite)
    part.check(f"{what}, {model.name}: padding is zero", bool((out[:, -1] == 0).all()))


def extending(part: Part, clock: Clock, model: Model) -> None:
    """New tokens behind compacted and exact prefixes."""
    lengths = (70, 40, 9) if clock.small else (20_000, 3_001, 300)
    batch = Batch("extend", lengths)
    pool = Pool(model, sum(lengths) + OWN * 3 + 64, clock)
    residents = Residents(pool, batch, ALPHA, True, 1, exact=(1,))
    poisoned(residents)
    extend = (OWN, 7 if clock.small else 500, OWN)
    layer = model.layers - 1
    cells = [residents.cells(row, layer) for row in range(3)]
    device = clock.device
    indptr, qo_indptr = (
        torch.tensor([0, *sizes], device=device).cumsum(0).int() for sizes in ([len(c) for c in cells], extend)
    )
    q = torch.randn(sum(extend), model.q_heads, model.head_dim, dtype=clock.dtype, device=device)
    out = torch.full_like(q, torch.nan)
    kernel("ragged_attention", "ragged_extend")(
        q, pool.k_cells, pool.v_cells, qo_indptr, indptr, torch.cat(cells).int(), model.scale, max(extend), out=out
    )
    for row, (mine, got) in enumerate(zip(q.split(extend), out.split(extend), strict=True)):
        k, v = pool.k_cells[cells[row]], pool.v_cells[cells[row]]
        reference = attend(mine.double(), k.double(), v.double(), model.scale)
        name = f"extend, {model.name}, {extend[row]} tokens of {len(cells[row])} rows"
        compare(part, name, got, reference, attend(mine, k, v, model.scale))


class Scores(NamedTuple):
    """What scoring has to give: in float64, with plain PyTorch, and how many weights count as zero."""

    reference: torch.Tensor
    plain: torch.Tensor
    zeros: int
    near: int  # of those that rounding may turn either way

    def check(self, part: Part, name: str, got: torch.Tensor, counted: int) -> None:
        compare(part, name, got, self.reference, self.plain)
        ok, near = abs(counted - self.zeros) <= self.near, self.near
        part.check(f"zeros, {name}", ok, counted=counted, reference=self.zeros, near_the_threshold=near)


def reference_scores(q: torch.Tensor, k: torch.Tensor, at: torch.Tensor, scale: float, reduce: str) -> Scores:
    """Of the voting rows ``q`` at positions ``at`` over the keys ``k``."""
    reference = torch.zeros(k.shape[1], len(k), dtype=torch.float64, device=q.device)
    plain = torch.zeros_like(reference, dtype=q.dtype)
    zeros = near = 0
    for start in range(0, len(q), 32):  # bounds the float64 attention
        part_q, part_rows = q[start : start + 32], at[start : start + 32]
        logits = masked_logits(part_q.double(), k.double(), scale, part_rows)
        over = logits - logits.amax(-1, keepdim=True) - torch.tensor(0.01).log().item()
        visible = logits > -torch.inf
        zeros += int(((over < 0) & visible).sum())
        near += int((over.abs() < NEAR).sum())
        for total, attention in ((reference, logits.softmax(-1)), (plain, weights(part_q, k, scale, part_rows))):
            if reduce == "sum":
                total += attention.sum(1)
            else:
                torch.maximum(total, attention.amax(1), out=total)
    return Scores(reference, plain, zeros, near)


def scoring(part: Part, clock: Clock, model: Model, num_keys: int, num_voting: int, reduce: str, tail: bool) -> None:
    device = clock.device
    q = torch.randn(num_voting, model.q_heads, model.head_dim, dtype=clock.dtype, device=device)
    pool_rows = num_keys + num_keys // 4
    buffer = torch.full((pool_rows, model.kv_heads, model.head_dim), torch.nan, dtype=clock.dtype, device=device)
    slots = torch.randperm(pool_rows, device=device)[:num_keys]
    buffer[slots] = k = torch.randn(num_keys, *buffer.shape[1:], dtype=clock.dtype, device=device)
    rows = None if tail else torch.randperm(num_keys, device=device)[:num_voting].sort().values
    scored = kernel("post_vision", "post_vision_scores")(
        q, buffer, model.scale, p=0.01, reduce=reduce, rows=rows, slots=slots
    )
    at = torch.arange(num_keys - num_voting, num_keys, device=device) if rows is None else rows
    expected = reference_scores(q, k, at, model.scale, reduce)
    name = f"scores by {reduce}, {model.name}, {num_voting} voting rows, {num_keys} keys"
    expected.check(part, name, scored.scores, int(scored.zeros))
    entries = model.q_heads * int((at + 1).sum())
    part.check(f"entries, {name}", int(scored.entries) == entries, counted=int(scored.entries), reference=entries)


def scoring_batch(part: Part, clock: Clock, model: Model, lengths: tuple[int, ...], voting: tuple[int, ...]) -> None:
    """Requests of different lengths in one call, in slots of one pool; the last tokens vote."""
    device, total = clock.device, sum(lengths)
    q = torch.randn(sum(voting), model.q_heads, model.head_dim, dtype=clock.dtype, device=device)
    shape = 2 * total, model.kv_heads, model.head_dim
    buffer = torch.full(shape, torch.nan, dtype=clock.dtype, device=device)
    slots = torch.randperm(len(buffer), device=device)[:total]
    buffer[slots] = k = torch.randn(total, *buffer.shape[1:], dtype=clock.dtype, device=device)
    q_indptr, kv_indptr = (torch.tensor([0, *sizes], device=device).cumsum(0) for sizes in (voting, lengths))
    ends = [torch.arange(n - v, n, device=device) for n, v in zip(lengths, voting, strict=True)]
    scores, zeros = kernel("post_vision", "post_vision_scores_ragged")(
        q, buffer, q_indptr, kv_indptr, slots, torch.cat(ends), model.scale, 0.01, "sum", max(voting), max(lengths)
    )
    per_request = zip(q.split(voting), k.split(lengths), ends, scores.split(lengths, 1), zeros.tolist(), strict=True)
    for mine, keys, rows, got, counted in per_request:
        name = f"scores of a mixed batch, {model.name}, {len(rows)} voting rows, {len(keys)} keys"
        reference_scores(mine, keys, rows, model.scale, "sum").check(part, name, got, counted)


def selecting(part: Part, clock: Clock, model: Model, num_keys: int) -> None:
    from sglang_vlkv.stages.select import top_positions

    shape = model.layers, model.kv_heads, num_keys
    scores = torch.randint(0, num_keys // 3, shape, device=clock.device).float()  # many ties
    tier = torch.randint(0, 4, shape, device=clock.device).to(torch.int8)
    num_kept = [max(1, num_keys // (3 + 4 * layer)) for layer in range(model.layers)]
    got = kernel("selection", "select_rows")(scores, tier, num_kept)
    wanted = [top_positions(s, k, t) for s, k, t in zip(scores, num_kept, tier.long(), strict=True)]
    same = torch.equal(got.long(), torch.cat(wanted, 1))
    part.check(f"selection, {model.name}, {num_keys} keys, {num_kept} kept", same)


def moving(part: Part, clock: Clock, model: Model, num_keys: int) -> None:
    """Gathers and scatters to the bit, and merged rows against float64."""
    pool = Pool(model, 2 * num_keys, clock)
    slots = torch.randperm(pool.rows, device=clock.device)[:num_keys]
    unread = torch.ones(pool.rows, dtype=torch.bool, device=clock.device)
    unread[slots] = False
    pool.storage[:, :, unread] = torch.nan
    num_kept = [max(2, num_keys // (3 + 4 * layer)) for layer in range(model.layers)]
    kept = torch.cat(
        [
            torch.rand(model.kv_heads, num_keys, device=clock.device).argsort(1)[:, :n].sort(1).values
            for n in num_kept
        ],
        1,
    )
    gather, scatter = kernel("compaction", "gather_rows"), kernel("compaction", "scatter_rows")
    arguments = pool.k_cells, pool.v_cells, slots, kept, num_kept, pool.cells_per_layer
    got = gather(*arguments)
    heads = torch.arange(model.kv_heads, device=clock.device)
    wanted = [
        torch.stack([pool.storage[layer, kv][slots[mine.t()], heads] for kv in (0, 1)])
        for layer, mine in enumerate(kept.split(num_kept, 1))
    ]
    part.check(f"gather, {model.name}", torch.equal(got, torch.cat(wanted, 1)))

    free = unread.nonzero().flatten()
    cells = pool.cells_of(free)[torch.randperm(len(free) * model.layers, device=clock.device)[: got.shape[1]]]
    rows = torch.cat(wanted, 1).contiguous()
    expected = pool.storage.clone().view(-1, *got.shape[2:])
    expected[cells.long()], expected[cells.long() + pool.rows] = rows
    scatter(pool.k_cells, pool.v_cells, cells, rows)
    moved = pool.storage.view_as(expected)
    same = torch.equal(moved.nan_to_num(1e4), expected.nan_to_num(1e4))
    part.check(f"scatter, {model.name}", same)

    sinks = 4
    merged = gather(*arguments, merge=True, sink_tokens=sinks)
    layers = zip(kept.split(num_kept, 1), merged.split(num_kept, 1), strict=True)
    for layer, (mine, got_layer) in enumerate(layers):
        bucket = buckets(mine, num_keys, sinks)
        kv = [pool.storage[layer, which][slots] for which in (0, 1)]
        reference = torch.stack([means(x.double(), bucket, mine.shape[1]) for x in kv])
        plain = torch.stack([means(x.float(), bucket, mine.shape[1]).to(x.dtype) for x in kv])
        compare(part, f"merging gather, {model.name}, layer {layer}", got_layer, reference, plain)


def buckets(kept: torch.Tensor, num_keys: int, sinks: int) -> torch.Tensor:
    """Which kept row takes in each position, ``[H, n]``: the nearest, midpoints to the lower one.

    The sinks and the last position take in themselves alone; what is nearest to them is lost, in the
    bucket after the last.
    """
    num_kept = kept.shape[1]
    positions = torch.arange(num_keys, device=kept.device).expand(len(kept), -1).contiguous()
    middles = ((kept[:, :-1] + kept[:, 1:]) // 2).contiguous()
    nearest = torch.searchsorted(middles, positions)
    closed = (kept < sinks) | (kept == num_keys - 1)
    nearest = nearest.masked_fill(closed.gather(1, nearest), num_kept)
    return nearest.scatter(1, kept, torch.arange(num_kept, device=kept.device).expand_as(kept))


def means(x: torch.Tensor, bucket: torch.Tensor, num_kept: int) -> torch.Tensor:
    """Means of the buckets' rows in x's dtype, ``[num_kept, H, D]``."""
    _, num_heads, dim = x.shape
    sums = torch.zeros(num_heads, num_kept + 1, dim, dtype=x.dtype, device=x.device)
    sums.scatter_add_(1, bucket[:, :, None].expand(-1, -1, dim), x.transpose(0, 1).contiguous())
    counts = torch.zeros(num_heads, num_kept + 1, dtype=x.dtype, device=x.device)
    counts.scatter_add_(1, bucket, torch.ones_like(bucket, dtype=x.dtype))
    return (sums / counts.clamp_min(1)[:, :, None])[:, :num_kept].transpose(0, 1)


def attempt(part: Part, subject: str, name: str, work: Callable, *arguments) -> None:
    """A kernel that does not even run is a wrong kernel."""
    with part.about(subject):
        try:
            work(part, *arguments)
        except Exception:
            part.check(f"{name} runs", False, traceback=traceback.format_exc()[-3000:])


def run(part: Part, clock: Clock) -> None:
    from benchmarks.gpu.replay import replaying, without_waiting

    layers = SMALL_LAYERS if clock.small else LAYERS
    for full in models(clock.rehearsal):
        model = full._replace(layers=min(layers, full.layers))
        num_keys, voting = (90, 5) if clock.small else (20_011, 64)
        for subject, name, work, *arguments in (
            (ATTENTION, "decode", decoding, False),
            (ATTENTION, "replay", replaying, False),
            (ATTENTION, "no waiting", without_waiting, False),
            (EXTEND, "extend", extending),
            (SCORING, "scores", scoring, num_keys, voting, "sum", True),
            (SCORING, "scores", scoring, num_keys, 2 * voting + 1, "max", False),
            (SCORING, "scores", scoring_batch, *mixed(num_keys, voting)),
            (SELECTION, "selection", selecting, num_keys),
            (MOVING, "moving", moving, num_keys // 2),
        ):
            attempt(part, subject, f"{name}, {model.name}", work, clock, model, *arguments)
    part.notes.append(f"{layers} layers of each model; errors are |x - float64| / |float64|")


def mixed(num_keys: int, voting: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths and voting rows of the requests of one batch."""
    return (num_keys // 2, num_keys // 3, voting + 1, num_keys // 5), (voting, 1, voting, voting - 2)
