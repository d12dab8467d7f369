"""VL-Cache's own protocol, twice: Hugging Face-style code against itself, and engine against engine.

A decoder with dummy weights of LLaVA-v1.6-Mistral-7B's sizes; the prompt's last 50 tokens vote, one
token in ten stays, 100 tokens are decoded. The paper's figures stand beside ours as they were read in
third-party summaries, not in its PDF.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.gpu.baseline import Decoder, DynamicCache
from benchmarks.gpu.compression import flash
from benchmarks.gpu.correctness import attend, compare, error, kernel
from benchmarks.gpu.goals import ENGINE_DECODE, ENGINE_WHOLE, PAPER_DECODE, PAPER_WHOLE
from benchmarks.gpu.record import Part, Ratio
from benchmarks.gpu.shapes import ALPHA, MISTRAL, TOY_MISTRAL, Batch
from benchmarks.gpu.subjects import ATTENTION, COMPRESSION, MOVING
from benchmarks.gpu.timing import Clock, Timing
from sglang_vlkv.kernels.ragged_attention.rows import RowTable

VOTING, OUTPUTS = 50, 100
HF, HF_COMPACTED = "HF-style, full cache", "HF-style, compacted"
ENGINE, ENGINE_COMPACTED = "engine path, full cache", "engine path, compacted"
PAPER = {  # decode speedup, end to end speedup; read in third-party summaries
    "1x2K": (1.19, 1.16),
    "1x32K": (3.32, 1.85),
    "1x128K": (7.08, 1.66),
    "4x32K": (6.07, 2.06),
    "64x2K": (5.23, 2.33),
}
# The order in which time is spent, and about how many seconds each takes with all four rows.
ESTIMATES = {"1x128K": 46, "64x2K": 30, "1x2K": 5, "1x32K": 12, "4x32K": 31}
DECODE, WHOLE = "decode, per step", "end to end"
GOALS = {
    ("1x128K", DECODE): {HF_COMPACTED: PAPER_DECODE, ENGINE_COMPACTED: ENGINE_DECODE},
    ("64x2K", WHOLE): {HF_COMPACTED: PAPER_WHOLE, ENGINE_COMPACTED: ENGINE_WHOLE},
}
TOGETHER = "vs HF-style full cache"
# What a stage of a row rests on; Hugging Face-style rows are plain torch.
RESTS_ON = {
    (ENGINE, DECODE): (ATTENTION,),
    (ENGINE, WHOLE): (ATTENTION,),
    (ENGINE_COMPACTED, "compression"): COMPRESSION,
    (ENGINE_COMPACTED, DECODE): (ATTENTION, MOVING),
    (ENGINE_COMPACTED, WHOLE): (ATTENTION, *COMPRESSION),
}
CLOSE = 0.2  # first logits of both paths, after all layers in 16 bits


def workloads(rehearsal: bool) -> dict[str, Batch]:
    if rehearsal:
        return {"64x2K": Batch("64x2K", (52,) * 2), "1x2K": Batch("1x2K", (60,))}
    lengths = {"2K": 2048, "32K": 32768, "128K": 131072}
    return {name: Batch(name, (lengths[name.split("x")[1]],) * int(name.split("x")[0])) for name in ESTIMATES}


class Steps:
    """Seconds of the stages of one row: the prefill, the compression and the tokens after the first."""

    def __init__(
        self, prefill: float, compression: float, decode: float, outputs: int, kv_bytes: int, compressed: bool
    ) -> None:
        self.kv_bytes = kv_bytes  # of the prompts, once decoding begins
        self.prefill, self.compression, self.decode = prefill, compression, decode
        self.outputs, self.compressed = outputs, compressed

    @property
    def total(self) -> float:
        return self.prefill + self.compression + self.decode


def run(part: Part, clock: Clock) -> None:
    model = TOY_MISTRAL if clock.rehearsal else MISTRAL
    outputs = 4 if clock.rehearsal else OUTPUTS
    for (name, stage), rows in GOALS.items():
        for row, goal in rows.items():
            part.expect(goal, name, f"{row}: {stage}")
    decoder = Decoder(model, clock)
    weights = sum(w.numel() for layer in decoder.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down))
    part.notes.append(
        f"{model.name} with dummy weights ({2 * weights / 1e9:.1f} GB in its layers); the last {VOTING} tokens "
        f"vote, alpha {ALPHA}, {outputs} decode steps. HF-style: torch.cat of K and V per layer and step, "
        "repeat_kv, SDPA, eager, by the host's clock. Engine path: preallocated cells, one CUDA graph per step "
        "with embedding, norms and rotary embedding in plain torch, ragged Triton attention, by the host's "
        "clock over all steps. In brackets the paper's own speedup, read in third-party summaries. Prefill is "
        "measured once per row, the engine path's has no repeat_kv; compression is warm, the faster of two. "
        "Speedups are what compression gives either path, and the goals are about these; the engine against "
        "Hugging Face-style code is another comparison"
    )
    _warm(decoder, clock)
    done: dict[str, dict[str, Steps]] = {}
    for name, batch in workloads(clock.rehearsal).items():
        if part.has(0 if clock.rehearsal else ESTIMATES[name], name):
            done[name] = {}
            part.attempt(name, _workload, clock, decoder, name, batch, outputs, done[name])
        clock.free_bytes()


def _warm(decoder: Decoder, clock: Clock) -> None:
    """Loads cuBLAS and SDPA, which the first prefill would pay for."""
    batch = Batch("warm", (64,) if clock.rehearsal else (2048,))
    baseline = Baseline(decoder, clock, batch, 2)
    baseline.prefill()
    baseline.decode(baseline.cache)


class Baseline:
    """Hugging Face's way: eager, dynamic caches."""

    def __init__(self, decoder: Decoder, clock: Clock, batch: Batch, outputs: int) -> None:
        self.decoder, self.clock, self.outputs = decoder, clock, outputs
        self.size, self.length = len(batch.lengths), batch.lengths[0]
        shape = self.size, self.length
        self.tokens = torch.randint(0, decoder.model.vocabulary, shape, device=clock.device)
        self.first = torch.randint(0, decoder.model.vocabulary, (self.size, 1), device=clock.device)
        self.step_seconds: list[float] = []

    def prefill(self) -> None:
        self.cache = DynamicCache(self.decoder.model, VOTING)
        positions = torch.arange(self.length, device=self.clock.device).expand(self.size, -1)
        last = self.decoder.hidden(self.tokens, positions, self.cache.attend)[:, -1]
        self.decoder.logits(last).argmax(-1)

    def compress(self) -> None:
        self.small = self.cache.compacted(ALPHA)

    def decode(self, cache: DynamicCache) -> torch.Tensor:
        """All steps; the first one's logits ``[B, vocabulary]``."""
        token, first = self.first, None
        for step in range(self.outputs):
            positions = torch.full((self.size, 1), self.length + step, device=self.clock.device)
            logits = self.decoder.logits(self.decoder.hidden(token, positions, cache.attend)[:, -1])
            first = logits if first is None else first
            token = logits.argmax(-1, keepdim=True)
        return first


class Engine:
    """Our way: cells that were allocated before, and a decode step that is one CUDA graph."""

    def __init__(self, decoder: Decoder, clock: Clock, baseline: Baseline) -> None:
        from sglang_vlkv.kernels.ragged_attention.triton import RaggedDecode, RaggedIndices

        self.decoder, self.clock, self.outputs = decoder, clock, baseline.outputs
        self.size, self.length = baseline.size, baseline.length
        self.tokens, self.first = baseline.tokens, baseline.first
        model = self.model = decoder.model
        layers, device = model.layers, clock.device
        self.num_kept = -(-round(ALPHA * self.length * layers) // layers)  # slots of a compacted request
        own = baseline.outputs + 4  # capturing a graph runs a step too
        self.rows_per_request = self.length + own + self.num_kept
        rows = self.size * self.rows_per_request + 1
        shape = layers, 2, rows, model.kv_heads, model.head_dim
        self.storage = torch.zeros(shape, dtype=clock.dtype, device=device)
        flat = self.storage.view(-1, model.kv_heads, model.head_dim)
        self.k_cells, self.v_cells, self.cells_per_layer = flat[:-rows], flat[rows:], 2 * rows
        slots = torch.randperm(rows - 1, device=device).add_(1).view(self.size, -1)
        self.prompt_slots, self.compact_slots = slots[:, : self.length], slots[:, self.length + own :]
        self.req_to_token = slots[:, : self.length + own].int().contiguous()
        self.table = RowTable.empty(self.size, layers, device)
        self.rows = torch.arange(self.size, device=device)
        self.lists = RaggedIndices(layers, self.size, layers * self.size * (self.length + own), device)
        heads = model.q_heads, model.kv_heads, model.head_dim
        self.engine = RaggedDecode(layers, self.size, *heads, device, num_sms=clock.num_sms)
        self.seq_lens = torch.full((self.size,), self.length, device=device)
        self.token = self.first.clone()
        self.next_logits = torch.zeros(self.size, model.vocabulary, dtype=clock.dtype, device=device)
        self.voters: list[torch.Tensor] = []
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None  # per layer q and output, if asked for

    def prefill(self) -> None:
        """Writes the prompt's K and V into the cells; the voting rows' queries are kept."""

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.storage[layer, 0][self.prompt_slots] = k
            self.storage[layer, 1][self.prompt_slots] = v
            self.voters.append(q[:, -VOTING:].clone())
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return flash(q, k, v, self.model.scale, self.clock).transpose(1, 2)

        self.voters.clear()
        positions = torch.arange(self.length, device=self.clock.device).expand(self.size, -1)
        last = self.decoder.hidden(self.tokens, positions, attend)[:, -1]
        self.decoder.logits(last).argmax(-1)

    def compress(self) -> None:
        """Scores all requests of a layer in one call, then selects and moves request by request."""
        from sglang_vlkv.stages.budgets import proportional

        layers, n, device = self.model.layers, self.length, self.clock.device
        score = kernel("post_vision", "post_vision_scores_ragged")
        select = kernel("selection", "select_rows")
        gather, scatter = kernel("compaction", "gather_rows"), kernel("compaction", "scatter_rows")
        voting = self.voters[0].shape[1]
        starts = torch.arange(self.size + 1, device=device)
        slots = self.prompt_slots.flatten()
        positions = torch.arange(n - voting, n, device=device).repeat(self.size)
        scores, zeros = [], []
        for layer in range(layers):
            of_layer, zeros_of_layer = score(
                self.voters[layer].flatten(0, 1), self.storage[layer, 0], starts * voting, starts * n, slots,
                positions, self.model.scale, 0.01, "sum", voting, n,
            )  # fmt: skip
            scores.append(of_layer)
            zeros.append(zeros_of_layer)
        scores = torch.stack(scores).unflatten(-1, (self.size, n))  # [L, Hkv, B, n]
        entries = self.model.q_heads * voting * (n - (voting - 1) / 2)
        density = (1 - torch.stack(zeros) / entries).T.tolist()  # [B][L]; waits for the device
        tier = torch.full((layers, self.model.kv_heads, n), 3, dtype=torch.int8, device=device)
        cells = self.k_cells, self.v_cells
        self.fixed = []
        offsets = torch.arange(layers, device=device)[:, None] * self.cells_per_layer
        for request in range(self.size):
            num_kept = proportional(density[request], round(ALPHA * n * layers), n)
            kept = select(scores[:, :, request].contiguous(), tier, num_kept).long()
            if request == 0:
                self.kept = kept.split(num_kept, 1)
            rows = gather(*cells, self.prompt_slots[request], kept, num_kept, self.cells_per_layer)
            target = (offsets + self.compact_slots[request]).flatten()[: sum(num_kept)].int().contiguous()
            scatter(*cells, target, rows)
            self.fixed.append(target)
            self.table.cells[request] = target.data_ptr()
            self.table.fixed[request] = torch.tensor([0, *num_kept]).cumsum(0).int().to(device)
            self.table.first_own[request] = n

    def num_fixed(self) -> list[list[int]]:
        """Rows that each request's table names in every layer, ``[B][L]``."""
        return self.table.fixed.diff(dim=1).tolist()

    def _step(self) -> None:
        """One token of every request; everything it reads and writes stays on the device."""
        self.seq_lens.add_(1)
        newest = self.req_to_token.gather(1, self.seq_lens[:, None] - 1)[:, 0].long()
        lists = self.lists.build(self.table, self.rows, self.seq_lens, self.req_to_token, self.cells_per_layer)
        self.engine.plan(lists[0])

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.storage[layer, 0].index_copy_(0, newest, k[:, 0])
            self.storage[layer, 1].index_copy_(0, newest, v[:, 0])
            out = self.engine.run(layer, q[:, 0], self.k_cells, self.v_cells, *lists, self.model.scale)
            if self.seen is not None:
                self.seen[layer] = q[:, 0].clone(), out.clone()
            return out[:, None]

        last = self.decoder.hidden(self.token, self.seq_lens[:, None] - 1, attend)[:, -1]
        self.next_logits.copy_(self.decoder.logits(last))
        self.token.copy_(self.next_logits.argmax(-1, keepdim=True))

    def capture(self) -> None:
        self.step = self.clock.capture(self._step)

    def reset(self) -> None:
        self.seq_lens.fill_(self.length)
        self.token.copy_(self.first)

    def decode(self) -> torch.Tensor:
        """All steps; the first one's logits."""
        self.step()
        first = self.next_logits.clone()
        for _ in range(self.outputs - 1):
            self.step()
        return first


def _workload(
    part: Part, clock: Clock, decoder: Decoder, name: str, batch: Batch, outputs: int, done: dict[str, Steps]
) -> None:
    baseline = Baseline(decoder, clock, batch, outputs)
    model = decoder.model
    full = len(batch.lengths) * batch.lengths[0] * model.layers * model.row_bytes
    kept = len(batch.lengths) * round(ALPHA * batch.lengths[0] * model.layers) * model.row_bytes
    prefill, compress = clock.wall(baseline.prefill), _warmed(clock, baseline.compress)
    small, baseline.small = baseline.small, None
    _count(part, name, HF_COMPACTED, batch, model.layers, [[k.shape[2] for k, _ in small.kv]] * len(batch.lengths))
    seconds, full_logits = _timed(clock, lambda: baseline.decode(small))
    done[HF_COMPACTED] = Steps(prefill, compress, seconds, outputs, kept, True)
    del small
    seconds, full_logits = _timed(clock, lambda: baseline.decode(baseline.cache))
    done[HF] = Steps(prefill, 0.0, seconds, outputs, full, False)
    _rows(part, name, done, (HF, HF_COMPACTED))
    baseline.cache = None
    clock.free_bytes()

    engine = Engine(decoder, clock, baseline)
    prefill = clock.wall(engine.prefill)
    engine.capture()
    engine.reset()
    seconds, logits = _timed(clock, engine.decode)
    done[ENGINE] = Steps(prefill, 0.0, seconds, outputs, full, False)
    close = error(logits, full_logits.double())
    what = f"{name}: first logits of {ENGINE} are those of {HF}"
    part.check(what, close < CLOSE, about=(same_model(name),), relative_difference=close)
    with part.about(ATTENTION):
        _check(part, engine, name, ENGINE)
    compress = _warmed(clock, engine.compress)
    _count(part, name, ENGINE_COMPACTED, batch, model.layers, engine.num_fixed())
    engine.reset()
    engine.capture()
    engine.reset()
    seconds, logits = _timed(clock, engine.decode)
    with part.about(ATTENTION, MOVING):
        part.check(f"{name}: logits of {ENGINE_COMPACTED} are finite", bool(logits.isfinite().all()))
        _check(part, engine, name, ENGINE_COMPACTED)
    done[ENGINE_COMPACTED] = Steps(prefill, compress, seconds, outputs, kept, True)
    _rows(part, name, done, (ENGINE, ENGINE_COMPACTED))


def _warmed(clock: Clock, work: Callable[[], object]) -> float:
    """The faster of two, after one that compiles and allocates."""
    first = clock.wall(work)
    return first if clock.rehearsal else min(clock.wall(work) for _ in range(2))


def same_model(name: str) -> str:
    """What a ratio between the two paths rests on beside their rows."""
    return f"{name}: both paths compute the same"


def keeps(name: str, row: str) -> str:
    return f"{name}: {row}, as many rows as it says"


def _count(part: Part, name: str, row: str, batch: Batch, layers: int, kept: list[list[int]]) -> None:
    """That every request keeps what its budget allows, no less: ``kept`` is ``[B][L]``."""
    wanted = [round(ALPHA * length * layers) for length in batch.lengths]
    found = [sum(layers) for layers in kept]
    part.check(keeps(name, row), found == wanted, about=(keeps(name, row),), kept=found[:4], wanted=wanted[:4])


def _check(part: Part, engine: Engine, name: str, what: str) -> None:
    """One more step: request 0's attention over the prompt's rows that it sees and its own, in two layers.

    Kept rows are looked up by the positions that selection gave, in the prompt's own slots.
    """
    engine.seen = {}
    engine._step()
    own = engine.req_to_token[0, engine.length : int(engine.seq_lens[0])].long()
    heads = torch.arange(engine.model.kv_heads, device=own.device)
    for layer in sorted({0, engine.model.layers - 1}):
        q, out = engine.seen[layer]
        at = engine.prompt_slots[0][:, None].expand(-1, len(heads))
        if what == ENGINE_COMPACTED:
            at = engine.prompt_slots[0][engine.kept[layer]].T  # [kept, Hkv]
        k, v = (torch.cat([cells[at, heads], cells[own]]) for cells in engine.storage[layer])
        reference = attend(q[:1].double(), k.double(), v.double(), engine.model.scale)
        check = f"{name}: {what}, layer {layer}, {len(at)} rows of the prompt and {len(own)} own ones"
        compare(part, check, out[:1], reference, attend(q[:1], k, v, engine.model.scale))
    engine.seen = None


def _timed(clock: Clock, work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    clock.sync()
    start = time.perf_counter()
    result = work()
    clock.sync()
    return time.perf_counter() - start, result


def _rows(part: Part, name: str, done: dict[str, Steps], names: tuple[str, ...]) -> None:
    """Four lines per row; the paper's figures beside those that are the paper's comparison."""
    for row in names:
        steps, base = done[row], {HF_COMPACTED: HF, ENGINE_COMPACTED: ENGINE}.get(row)
        quoted = dict(zip((DECODE, WHOLE), PAPER[name])) if row == HF_COMPACTED else {}

        def add(stage: str, seconds: float, **more) -> None:
            compacted = [keeps(name, row)] if base and stage != "prefill" else []  # noqa: B023
            with part.about(*RESTS_ON.get((row, stage), ()), *compacted):  # noqa: B023
                part.add(name, f"{row}: {stage}", Timing.of([seconds]), **more)  # noqa: B023

        add("prefill", steps.prefill)
        if steps.compressed:
            add("compression", steps.compression, share_of=f"{row}: prefill")
        for stage, seconds in ((DECODE, steps.decode / steps.outputs), (WHOLE, steps.total)):
            more = {"versus": f"{base}: {stage}"} if base else {}
            if row in (ENGINE, ENGINE_COMPACTED):
                more["ratios"] = {TOGETHER: Ratio(name, [f"{HF}: {stage}"], rests_on=[same_model(name)])}
            if stage in quoted:
                more["paper_speedup"] = quoted[stage]
            goals = [goal for of, goal in GOALS.get((name, stage), {}).items() if of == row]
            add(stage, seconds, kv_bytes=steps.kv_bytes, goals=goals, **more)
