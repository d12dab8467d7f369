"""What lengths that change under a captured graph show, and whether anything waits for the device."""

from __future__ import annotations

import torch

from benchmarks.gpu.correctness import attention_sample, kernel, newest, small_batch
from benchmarks.gpu.engines import decode_engine
from benchmarks.gpu.pool import Residents
from benchmarks.gpu.record import Part
from benchmarks.gpu.shapes import Model
from benchmarks.gpu.timing import Clock


class Step:
    """One decode step as an engine captures it: index lists, plan, all layers.

    Attributes:
        seq_lens: ``[B]``, read where it lies: a captured step sees what is written there later.
        out: ``[L, B, Hq, D]``.
    """

    def __init__(
        self, residents: Residents, rows: torch.Tensor, seq_lens: torch.Tensor, clock: Clock, flashinfer: bool
    ) -> None:
        from sglang_vlkv.kernels.ragged_attention.triton import RaggedIndices

        self.residents, self.rows, self.seq_lens = residents, rows, seq_lens.clone()
        model, size = residents.pool.model, len(rows)
        self.lists = RaggedIndices(model.layers, size, residents.num_rows + 1, clock.device)
        self.engine = decode_engine(model, size, clock, flashinfer)
        shape = model.layers, size, model.q_heads, model.head_dim
        self.q = torch.randn(shape, dtype=clock.dtype, device=clock.device)
        self.out = torch.full_like(self.q, torch.nan)

    def run(self) -> None:
        pool, at = self.residents.pool, self.residents
        lists = self.lists.build(at.table, self.rows, self.seq_lens, at.req_to_token, pool.cells_per_layer)
        self.engine.plan(lists[0])
        for layer, (q, out) in enumerate(zip(self.q, self.out, strict=True)):
            self.engine.run(layer, q, pool.k_cells, pool.v_cells, *lists, pool.model.scale, out=out)


def replaying(part: Part, clock: Clock, model: Model, flashinfer: bool) -> None:
    """A graph captured with fewer rows, replayed with more: against an eager step and float64."""
    residents, rows, seq_lens = small_batch(model, clock)
    step = Step(residents, rows, seq_lens, clock, flashinfer)
    own = [residents.num_own(row) for row in range(len(rows) - 1)]
    fewer = [max(2 * n // 5, min(n, model.layers + 1)) for n in own]
    step.seq_lens[:-1] -= torch.tensor(own, device=clock.device) - torch.tensor(fewer, device=clock.device)
    replay = clock.capture(step.run)
    replay()
    before = step.out.clone()
    step.seq_lens.copy_(seq_lens)
    step.out.fill_(torch.nan)
    replay()
    clock.sync()
    replayed = step.out.clone()
    what = f"{'FlashInfer decode' if flashinfer else 'decode'}, {model.name}, replayed with other lengths"
    for layer in sorted({0, model.layers - 1}):
        for row in range(len(rows) - 1):
            name, cells = f"{what}, layer {layer}, request {row}", residents.cells(row, layer, newest(row, layer))
            attention_sample(part, name, residents.pool, cells, step.q[layer, row], replayed[layer, row])
    eager = Step(residents, rows, seq_lens, clock, flashinfer)
    eager.q = step.q
    eager.run()
    part.check(f"{what}: as the eager step, to the bit", torch.equal(replayed, eager.out))
    part.check(f"{what}: lengths matter", not torch.equal(replayed, before))


def without_waiting(part: Part, clock: Clock, model: Model, flashinfer: bool) -> None:
    """A decode step and a compaction while whatever waits for the device raises."""
    residents, rows, seq_lens = small_batch(model, clock)
    step, pool = Step(residents, rows, seq_lens, clock, flashinfer), residents.pool
    select, gather, scatter = (
        kernel(op, name)
        for op, name in (("selection", "select_rows"), ("compaction", "gather_rows"), ("compaction", "scatter_rows"))
    )
    num_keys, layers = residents.batch.lengths[1], model.layers
    scores = torch.rand(layers, model.kv_heads, num_keys, device=clock.device)
    tier = torch.zeros_like(scores, dtype=torch.int8)
    num_kept = [num_keys // (layer + 3) for layer in range(layers)]
    slots = residents.req_to_token[1, :num_keys].long()
    target = pool.cells_of(slots)[: sum(num_kept)].contiguous()

    def work() -> None:
        step.run()
        if not flashinfer:
            kept = select(scores, tier, num_kept).long()
            rows_moved = gather(pool.k_cells, pool.v_cells, slots, kept, num_kept, pool.cells_per_layer)
            scatter(pool.k_cells, pool.v_cells, target, rows_moved)

    work()  # compiles
    clock.sync()
    try:
        with clock.never_waiting():
            work()
        waited = ""
    except RuntimeError as error:
        waited = str(error)
    what = "FlashInfer decode step" if flashinfer else "decode step, selection and compaction"
    # What waits is slower than it could be, and not wrong.
    part.check(f"{what}, {model.name}: nothing waits for the device", not waited, about=(), error=waited)
