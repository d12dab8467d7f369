"""One decode step's attention over all layers, against the bytes that it has to read."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu import engines
from benchmarks.gpu.ceilings import gather_copy, gather_read, sums_for
from benchmarks.gpu.correctness import attention_sample
from benchmarks.gpu.engines import OURS, OURS_FLASHINFER, Decode, Ours
from benchmarks.gpu.goals import DECODE, EQUAL_BYTES, EVEN_RATIO, INDEX, STOCK_RATIO, UNEVEN_COST
from benchmarks.gpu.pool import OWN, Pool, Residents, sets_for, slots_needed
from benchmarks.gpu.record import Part, Ratio
from benchmarks.gpu.shapes import ALPHA, UNEVEN, Batch, Model, batches, models
from benchmarks.gpu.subjects import ATTENTION, COPYING
from benchmarks.gpu.timing import Clock, Timing

ROWS_READ = "the same rows read by index"
ROWS_READ_PER_LAYER, ROWS_COPIED = f"{ROWS_READ}, a launch per layer", "the same rows copied by index"
EQUAL = ", equal bytes"  # a stock engine on a batch of as many rows as are kept
SERVING_STOCK = [engines.FLASHINFER, engines.SGLANG]  # what a server decodes with
STOCK = [*SERVING_STOCK, engines.SDPA]
ALONE, COLD = ": attention alone", ": index building and plan, cold"
SPLITS = (1.0, False), (ALPHA, False), (ALPHA, True)  # alpha, and whether layers are uneven
GOAL_TOKENS, GOAL_LAYERS = 128 * 1024, 28
COPIED_AT_ONCE = 1 << 30  # bytes that a copy writes before it overwrites them
PARTS_REPEATED = 10  # index building and planning in one graph, since each takes microseconds
RESERVED = 6 << 30  # bytes left free beside the pool: workspaces, graphs, index lists
SECONDS_PER_CASE = 4.5


def case_name(model: Model, batch: Batch, alpha: float, uneven: bool) -> str:
    split = "" if alpha == 1 else ", uneven layers" if uneven else ", equal layers"
    return f"{model.name}, {batch.name}, alpha {alpha:g}{split}"


def goals_of(model: Model, batch: Batch, alpha: float, uneven: bool) -> dict[str, list[str]]:
    """The goals that a case's rows are judged by, by row."""
    if alpha == 1:
        return {}
    return {
        OURS: [UNEVEN_COST] * uneven + [DECODE] * (batch.tokens == GOAL_TOKENS),
        OURS + ALONE: [] if uneven else [EQUAL_BYTES],
        OURS + COLD: [INDEX] if model.layers == GOAL_LAYERS else [],
    }


def expect(part: Part, model: Model, batch: Batch) -> None:
    """Says which rows goals are to be judged by, before any is measured."""
    for alpha, uneven in SPLITS:
        for row, goals in goals_of(model, batch, alpha, uneven).items():
            for goal in goals:
                part.expect(goal, case_name(model, batch, alpha, uneven), row)


def run(part: Part, clock: Clock) -> None:
    for model in models(clock.rehearsal):
        for batch in batches(clock.rehearsal):
            expect(part, model, batch)
    part.notes.append(
        f"all layers; bytes are K, V and the index of every row; compacted requests have {OWN} tokens of their own; "
        "uneven: geometric, each layer keeps "
        f"{UNEVEN} of the one before, in another order per request; slots are random; sets of requests "
        "rotate such that at least four times the L2 cache is read between two reads of a row; speedups "
        "are against the same engine at alpha 1, those of alpha 1 against the best stock engine here. Equal "
        "bytes: a stock engine on a batch of as many rows in every layer; a ratio against the best of them needs "
        "FlashInfer's or SGLang's kernel among them. Warm: index building and planning "
        "again and again; cold: after reading four times the L2 cache, whose own time is subtracted"
    )
    for model in models(clock.rehearsal):
        _model(part, clock, model)
        clock.free_bytes()  # gives the pool back before the next is made


def _model(part: Part, clock: Clock, model: Model) -> None:
    most = max(batch.tokens for batch in batches(clock.rehearsal))
    rotating = 1 << 12 if clock.rehearsal else 512 << 20  # bytes of small sets
    rows = most + rotating // (model.layers * model.row_bytes) + 512
    fits = max(0, clock.free_bytes() - RESERVED) // (model.layers * model.row_bytes)
    if fits < rows:
        part.notes.append(f"{model.name}: a pool of {fits} tokens instead of {rows}: that is what fits")
        rows = fits
    pool = Pool(model, rows, clock)
    for batch in batches(clock.rehearsal):
        for alpha, uneven in SPLITS:
            name = case_name(model, batch, alpha, uneven)
            if slots_needed(model, batch, alpha) >= rows:
                part.skip(name, f"its KV does not fit beside a pool of {rows} tokens")
            elif part.has(SECONDS_PER_CASE, name):
                part.attempt(name, _case, clock, pool, batch, alpha, uneven)


def _case(part: Part, clock: Clock, pool: Pool, batch: Batch, alpha: float, uneven: bool) -> None:
    """Times one case with every engine there is."""
    model = pool.model
    case = case_name(model, batch, alpha, uneven)
    sets = sets_for(model, batch, alpha, pool.rows, clock.l2_bytes)
    residents = Residents(pool, batch, alpha, uneven, sets)
    about = dict(
        moved=residents.moved, sets=sets, rows_per_step=residents.num_rows, model=model._asdict(), alpha=alpha,
        uneven=uneven,
    )  # fmt: skip
    ours = Ours(residents, clock)
    lists = []
    for of_set in range(sets):
        ours.build(of_set)
        lists.append(ours.indices[: residents.num_rows].clone())
    with part.about(COPYING):
        _reads(part, clock, case, pool, lists, ours.indptr, about)
    with part.about(ATTENTION):
        part.attempt(f"{case}: {OURS}", _ours, clock, case, OURS, ours, about, lists)

    if engines.have_flashinfer_ext(clock) is None and clock.flashinfer_is_compiled:
        what = f"{case}: {OURS_FLASHINFER}"
        part.attempt_optional(OURS_FLASHINFER, what, _our_flashinfer, clock, case, residents, about, lists)
    if alpha == 1:
        _stocks(part, clock, case, "", residents, about)
    elif not uneven:
        lengths = [-(-sum(residents.kept[row]) // model.layers) + OWN for row in range(len(batch.lengths))]
        equal = Residents(pool, Batch(f"equal bytes of {batch.name}", tuple(lengths)), 1.0, False, sets)
        _stocks(part, clock, case, EQUAL, equal, about | dict(moved=equal.moved, rows_per_step=equal.num_rows))


def _reads(
    part: Part, clock: Clock, case: str, pool: Pool, lists: list[torch.Tensor], indptr: torch.Tensor, about: dict
) -> None:
    """The bandwidth there is for these rows: read in one launch and in one per layer, and copied."""
    k, v, model = pool.k_cells, pool.v_cells, pool.model
    sums = sums_for(len(lists[0]), model, clock.device)
    ends = indptr[:, -1].tolist()
    per_layer = [[indices[a:b] for a, b in zip([0, *ends], ends)] for indices in lists]
    of_row = 2 * model.kv_heads * model.head_dim * pool.storage.element_size()
    at_once = min(len(lists[0]), COPIED_AT_ONCE // of_row)
    out = torch.empty(2, at_once, model.kv_heads, model.head_dim, dtype=clock.dtype, device=clock.device)

    def copy(indices: torch.Tensor) -> None:
        for mine in indices.split(at_once):
            gather_copy(k, v, mine, out.view(-1)[: len(mine) * of_row // pool.storage.element_size()])

    reads = [clock.capture(lambda x=x: gather_read(k, v, x, sums)) for x in lists]
    part.add(case, ROWS_READ, clock.measure(*reads), **about)
    reads = [clock.capture(lambda x=x: [gather_read(k, v, mine, sums) for mine in x]) for x in per_layer]
    part.add(case, ROWS_READ_PER_LAYER, clock.measure(*reads), **about)
    copies = [clock.capture(lambda x=x: copy(x)) for x in lists]
    moved = len(lists[0]) * (2 * of_row + 4)
    part.add(case, ROWS_COPIED, clock.measure(*copies), **about | dict(moved=moved))


def _our_flashinfer(
    part: Part, clock: Clock, case: str, residents: Residents, about: dict, lists: list[torch.Tensor]
) -> None:
    _ours(part, clock, case, OURS_FLASHINFER, Ours(residents, clock, flashinfer=True), about, lists)


def _ours(
    part: Part, clock: Clock, case: str, name: str, engine: Ours, about: dict, lists: list[torch.Tensor]
) -> None:
    """Times a whole step, its attention and what comes before it."""
    residents, sets = engine.residents, about["sets"]
    model, batch, alpha, uneven = residents.pool.model, residents.batch, about["alpha"], about["uneven"]
    steps = [clock.capture(lambda s=s: engine.step(s)) for s in range(sets)]
    engine.out.fill_(torch.nan)
    steps[0]()
    clock.sync()
    _sample(part, case, name, engine)
    against = dict(versus=name, versus_case=case_name(model, batch, 1.0, False))
    ratios = {}
    if alpha == 1:
        against = dict(versus_best_of=STOCK)
    elif uneven:
        ratios = {EVEN_RATIO: Ratio(case_name(model, batch, alpha, False), [name])}
    else:
        stocks, needs = ([stock + EQUAL for stock in names] for names in (STOCK, SERVING_STOCK))
        ratios = {STOCK_RATIO: Ratio(case, stocks, needs)}
    goals = goals_of(model, batch, alpha, uneven) if name == OURS else {}
    more = dict(share_of=ROWS_READ, copied_by=ROWS_COPIED)
    timing = clock.measure(*steps)
    part.add(case, name, timing, **more, **about, **against, ratios=ratios, goals=goals.get(name, []))

    engine.build(0)
    engine.plan()  # of every set: they differ in where rows are, not in how many
    alone = [clock.capture(lambda x=x: engine.attend(x)) for x in lists]
    row = f"{name}{ALONE}"
    more |= dict(moved=about["moved"], goals=goals.get(row, []), ratios={} if uneven else ratios)
    part.add(case, row, clock.measure(*alone), **more)
    _before_attention(part, clock, case, name, engine, goals)


def _before_attention(
    part: Part, clock: Clock, case: str, name: str, engine: Ours, goals: dict[str, list[str]]
) -> None:
    """Index building and planning, from the L2 cache and not."""
    many, evict = PARTS_REPEATED, clock.evictor()

    def both() -> None:
        engine.build(0)
        engine.plan()

    def timed(*works: Callable[[], object]) -> Timing:
        return clock.measure(clock.capture(lambda: [work() for work in works], many), per=many)

    part.add(case, f"{name}: index building, warm", timed(lambda: engine.build(0)), share_of=name)
    warm = timed(both)
    part.add(case, f"{name}: index building and plan, warm", warm, share_of=name)
    cold, row = timed(evict, both).minus(timed(evict)), f"{name}{COLD}"
    if cold.p50 < warm.p50 and not clock.rehearsal:
        part.skip(f"{case}: {row}", "it is lost in the noise of what empties the cache")
    else:
        part.add(case, row, cold, share_of=name, goals=goals.get(row, []))


def _stocks(part: Part, clock: Clock, case: str, suffix: str, residents: Residents, about: dict) -> None:
    """Every stock engine that there is, all layers over the same slots."""
    for name, engine in engines.stock_engines(clock).items():
        what = f"{case}: {name}{suffix}"
        if isinstance(engine, str):
            part.skip(what, engine)
        elif name == engines.FLASHINFER and not clock.flashinfer_is_compiled:
            part.skip(what, "FlashInfer did not run in the correctness part")
        elif name == engines.SDPA and len(set(residents.batch.lengths)) > 1:
            part.skip(what, "requests of different lengths are not one tensor")
        else:
            part.attempt_optional(name, what, _stock, clock, case, name, suffix, engine, residents, about)


def _stock(
    part: Part, clock: Clock, case: str, name: str, suffix: str, kind: type, residents: Residents, about: dict
) -> None:
    """A stock engine, its attention captured for each set; host planning is timed apart."""
    of_sets: list[Decode] = [kind(residents, clock, of_set) for of_set in range(about["sets"])]
    for engine in of_sets:
        engine.fresh()
    clock.sync()
    replays = [clock.capture(engine.attend) for engine in of_sets]
    first = of_sets[0]
    first.out.fill_(torch.nan)
    replays[0]()
    clock.sync()
    _sample(part, case, name + suffix, first)
    part.add(case, name + suffix, clock.measure(*replays), share_of=ROWS_READ, **about)
    if name == engines.FLASHINFER:
        walls = [clock.wall(first.fresh) for _ in range(5)]
        timing = Timing.of(walls[1:3], walls[3:])
        part.add(case, f"{name}{suffix}: plan, by the host's clock", timing, share_of=name + suffix)


def _sample(part: Part, case: str, name: str, engine: Decode) -> None:
    """The first and last request in the first and last layer against float64, and no NaN anywhere."""
    pool, last = engine.residents.pool, len(engine.residents.batch.lengths) - 1
    for layer in sorted({0, engine.model.layers - 1}):
        for row in sorted({0, last}):
            what = f"{case}: {name}, layer {layer}, request {row}"
            attention_sample(part, what, pool, engine.cells(row, layer), engine.q[layer, row], engine.out[layer, row])
    part.check(f"{case}: {name}, all outputs are finite", bool(engine.out.isfinite().all()))
