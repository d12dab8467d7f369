"""One decode step's attention over all layers, against the bytes that it has to read."""

from __future__ import annotations

import torch

from benchmarks.gpu import engines
from benchmarks.gpu.ceilings import gather_read, sums_for
from benchmarks.gpu.correctness import attention_sample
from benchmarks.gpu.engines import OURS, OURS_FLASHINFER, Decode, Ours
from benchmarks.gpu.pool import OWN, Pool, Residents, sets_for, slots_needed
from benchmarks.gpu.record import Part
from benchmarks.gpu.shapes import ALPHA, UNEVEN, Batch, Model, batches, models
from benchmarks.gpu.timing import Clock

ROWS_READ = "the same rows read by index"
PARTS_REPEATED = 10  # index building and planning in one graph, since each takes microseconds
RESERVED = 6 << 30  # bytes left free beside the pool: workspaces, graphs, index lists
SECONDS_PER_CASE = 4.0


def case_name(model: Model, batch: Batch, alpha: float, uneven: bool) -> str:
    split = "" if alpha == 1 else ", uneven layers" if uneven else ", equal layers"
    return f"{model.name}, {batch.name}, alpha {alpha:g}{split}"


def run(part: Part, clock: Clock) -> None:
    part.notes.append(
        f"all layers; bytes are K, V and the index of every row; compacted requests have {OWN} tokens of their own; "
        "uneven: geometric, each layer keeps "
        f"{UNEVEN} of the one before, in another order per request; slots are random; sets of requests "
        "rotate such that at least four times the L2 cache is read between two reads of a row; speedups "
        "are against the same engine at alpha 1, those of alpha 1 against the best stock engine here; "
        "the target of index building and plan together is 30 microseconds"
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
        full: dict[str, str] = {}
        for alpha, uneven in ((1.0, False), (ALPHA, False), (ALPHA, True)):
            name = case_name(model, batch, alpha, uneven)
            if slots_needed(model, batch, alpha) >= rows:
                part.skip(name, f"its KV does not fit beside a pool of {rows} tokens")
            elif part.has(SECONDS_PER_CASE, name):
                part.attempt(name, _case, clock, pool, batch, alpha, uneven, full)


def _case(
    part: Part, clock: Clock, pool: Pool, batch: Batch, alpha: float, uneven: bool, full: dict[str, str]
) -> None:
    """Times one case with every engine there is.

    Args:
        full: per engine, the case of alpha 1 that compacted ones are held against; filled at alpha 1.
    """
    model = pool.model
    case = case_name(model, batch, alpha, uneven)
    sets = sets_for(model, batch, alpha, pool.rows, clock.l2_bytes)
    residents = Residents(pool, batch, alpha, uneven, sets)
    about = dict(
        moved=residents.moved, sets=sets, rows_per_step=residents.num_rows, model=model._asdict(), alpha=alpha
    )

    ours = Ours(residents, clock)
    names = {OURS: ours}
    if engines.have_flashinfer_ext(clock) is None and clock.flashinfer_is_compiled:
        names[OURS_FLASHINFER] = Ours(residents, clock, flashinfer=True)
    ours.build(0)
    lists = []
    for of_set in range(sets):
        ours.build(of_set)
        lists.append(ours.indices[: residents.num_rows].clone())
    sums = sums_for(residents.num_rows, model, clock.device)
    reads = [lambda x=x: gather_read(pool.k_cells, pool.v_cells, x, sums) for x in lists]
    part.add(case, ROWS_READ, clock.measure(*[clock.capture(read) for read in reads]), **about)

    if alpha == 1:
        for name, engine in engines.stock_engines(clock).items():
            if isinstance(engine, str):
                part.skip(f"{case}: {name}", engine)
            elif name == engines.FLASHINFER and not clock.flashinfer_is_compiled:
                part.skip(f"{case}: {name}", "FlashInfer was not compiled in the correctness part")
            elif name == engines.SDPA and len(set(batch.lengths)) > 1:
                part.skip(f"{case}: {name}", "requests of different lengths are not one tensor")
            else:
                part.attempt(f"{case}: {name}", _stock, clock, case, name, engine, residents, about)
    for name, engine in names.items():
        if alpha == 1:
            full[name] = case
        part.attempt(f"{case}: {name}", _ours, clock, case, name, engine, about, lists, full.get(name))


def _ours(
    part: Part,
    clock: Clock,
    case: str,
    name: str,
    engine: Ours,
    about: dict,
    lists: list[torch.Tensor],
    full: str | None,
) -> None:
    """Times a whole step, its attention and what comes before it."""
    residents, sets = engine.residents, about["sets"]
    steps = [clock.capture(lambda s=s: engine.step(s)) for s in range(sets)]
    engine.out.fill_(torch.nan)
    steps[0]()
    clock.sync()
    _sample(part, case, name, engine, residents)
    against = dict(versus=name, versus_case=full) if full and full != case else {}
    if full == case:
        against = dict(versus_best_of=[engines.FLASHINFER, engines.SGLANG, engines.SDPA])
    part.add(case, name, clock.measure(*steps), share_of=ROWS_READ, **about, **against)

    engine.build(0)
    engine.plan()  # of every set: they differ in where rows are, not in how many
    alone = [clock.capture(lambda x=x: engine.attend(x)) for x in lists]
    part.add(case, f"{name}: attention alone", clock.measure(*alone), share_of=ROWS_READ, moved=about["moved"])
    many = PARTS_REPEATED
    builds = clock.capture(lambda: engine.build(0), many)
    both = clock.capture(lambda: (engine.build(0), engine.plan()), many)
    part.add(case, f"{name}: index building", clock.measure(builds, per=many), share_of=name)
    part.add(case, f"{name}: index building and plan", clock.measure(both, per=many), share_of=name)


def _stock(part: Part, clock: Clock, case: str, name: str, kind: type, residents: Residents, about: dict) -> None:
    """A stock engine on the full cache, its attention captured; host planning is timed apart."""
    engine: Decode = kind(residents, clock)
    engine.fresh()
    clock.sync()
    replay = clock.capture(engine.attend)
    engine.out.fill_(torch.nan)
    replay()
    clock.sync()
    if name != engines.SDPA:  # it reads the pool's first rows, whatever the slots are
        _sample(part, case, name, engine, residents)
    part.add(case, name, clock.measure(replay), share_of=ROWS_READ, **about)
    walls = [clock.wall(engine.fresh) for _ in range(5)]
    if name == engines.FLASHINFER:
        from benchmarks.gpu.timing import Timing

        part.add(case, f"{name}: plan, by the host's clock", Timing.of(walls[1:3], walls[3:]), share_of=name)


def _sample(part: Part, case: str, name: str, engine: Decode, residents: Residents) -> None:
    """The first and last request in the first and last layer against float64, and no NaN anywhere."""
    last = len(residents.batch.lengths) - 1
    for layer in sorted({0, engine.model.layers - 1}):
        for row in sorted({0, last}):
            what = f"{case}: {name}, layer {layer}, request {row}"
            attention_sample(part, what, residents, row, layer, engine.q[layer, row], engine.out[layer, row])
    part.check(f"{case}: {name}, all outputs are finite", bool(engine.out.isfinite().all()))
