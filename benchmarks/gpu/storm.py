"""Decode steps in a CUDA graph on one stream, while another changes what they read.

The order is that of SGLang's overlap scheduling. The schedule stream goes on as soon as the graph has built
and planned its index lists, which an event recorded inside the graph says; from then on it gives rows to
other requests, moves rows, allocates and overwrites slots, while the layers still attend. The next step waits
for it. Slots that a step in flight reads rest until the change after the next. Every output of every step is
held against float64 over copies of what its request had to see.

On a CPU there are no streams: a change is made between the lists and the attention of the step before, which
is what a GPU may do at worst.
"""

from __future__ import annotations

import random
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from benchmarks.gpu.correctness import attend, kernel
from benchmarks.gpu.engines import decode_engine
from benchmarks.gpu.pool import Pool
from benchmarks.gpu.record import Part
from benchmarks.gpu.shapes import Model, models
from benchmarks.gpu.subjects import STORM
from benchmarks.gpu.timing import Clock
from sglang_vlkv.cache.device_rows import DeviceRows
from sglang_vlkv.kernels import on_device

PADDING_SLOT, POISON_SLOT, PADDING_ROW = 0, 1, 0  # never given to a request; the second holds NaN
LEAVES, MOVES, COMES = 0.2, 0.2, 0.7  # how probable each is in a change
COMPACTED, EXACT, SLIDING, SHARED = "compacted", "exact", "sliding", "shared"
KINDS = COMPACTED, SHARED, SLIDING, EXACT  # in the order in which they come
SECONDS = 25  # of one engine, compiling included


class Sizes(NamedTuple):
    """``repeats``: how often a graph attends, so that it takes longer than a change does on the host."""

    layers: int
    requests: int
    steps: int
    longest: int
    repeats: int


def sizes(clock: Clock) -> Sizes:
    return Sizes(2, 3, 20, 20, 1) if clock.small else Sizes(6, 32, 120, 600, 150)


class Packed:
    """Rows of a compacted prompt, in slots of their own; ``rows`` is a copy, ``[2, sum(counts), H, D]``."""

    def __init__(self, slots: list[int], cells: torch.Tensor, rows: torch.Tensor, counts: list[int]) -> None:
        self.slots, self.cells, self.rows, self.counts = slots, cells, rows, counts
        self.users = 1


class Request:
    """One request, and what its steps have to see.

    Attributes:
        tokens: copies of its own tokens' K and V, ``[L, 2, H, D]`` each, the oldest at position ``start``.
        slots: theirs; None where they slid out and were given back.
        sliding: per layer, how many of its newest tokens it sees; empty where it sees all.
    """

    def __init__(self, kind: str, row: int, first_own: int, packed: Packed | None, sliding: list[int]) -> None:
        self.kind, self.row, self.first_own, self.packed, self.sliding = kind, row, first_own, packed, sliding
        self.start = first_own - max(sliding, default=0)
        self.tokens: list[torch.Tensor] = []
        self.slots: list[int | None] = []
        self.name = ""

    def visible(self, tokens: torch.Tensor, layer: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V ``[n, H, D]`` that its ``count``-th token sees in a layer, of all its ``[L, 2, n, H, D]``."""
        first = count - self.sliding[layer] if self.sliding else 0
        rows = tokens[layer, :, first:count]
        if self.packed is not None:
            before, here = sum(self.packed.counts[:layer]), self.packed.counts[layer]
            rows = torch.cat([self.packed.rows[:, before : before + here], rows], 1)
        return rows[0], rows[1]


class Batch(NamedTuple):
    """What a step reads, made on the schedule stream; ``seen``: place, request and its tokens by then."""

    rows: torch.Tensor
    seq_lens: torch.Tensor
    newest: torch.Tensor
    seen: list[tuple[int, Request, int]]


class Taken(NamedTuple):
    """A step's queries and outputs, ``[L, B, Hq, D]``."""

    batch: Batch
    q: torch.Tensor
    out: torch.Tensor


class Storm:
    """Requests that come, grow, move and go.

    Args:
        rests: whether slots rest before they are overwritten. Without it a storm has to find wrong outputs.
    """

    def __init__(self, model: Model, clock: Clock, flashinfer: bool = False, seed: int = 0, rests: bool = True) -> None:
        from sglang_vlkv.kernels.ragged_attention.triton import RaggedIndices

        self.sizes, self.clock, self.rests = sizes(clock), clock, rests
        self.model = model = model._replace(layers=self.sizes.layers)
        layers, size, longest = model.layers, self.sizes.requests, self.sizes.longest
        self.rng, self.did = random.Random(seed), Counter()
        slots = 4 * size * longest + 64
        self.pool, device = Pool(model, slots, clock), clock.device
        self.pool.storage[:, :, POISON_SLOT] = torch.nan
        self.free = list(range(2, slots - 1))
        self.resting: list[int] = []
        self.free_rows = list(range(1, size + 1))  # the last one that is given back is the next to be given
        context = longest + self.sizes.steps + 8
        self.req_to_token = torch.zeros(size + 1, context, dtype=torch.int32, device=device)
        capacity = size * layers * (2 * context)
        self.device_rows = DeviceRows(len(self.req_to_token), layers, capacity, device)
        self.lists = RaggedIndices(layers, size, capacity, device)
        self.engine = decode_engine(model, size, clock, flashinfer)
        self.rows, self.seq_lens, self.newest = (torch.zeros(size, dtype=torch.int64, device=device) for _ in "rsn")
        new = layers, 2, size, model.kv_heads, model.head_dim
        self.new_kv = torch.zeros(new, dtype=clock.dtype, device=device)
        self.q = torch.zeros(layers, size, model.q_heads, model.head_dim, dtype=clock.dtype, device=device)
        self.out = torch.full_like(self.q, torch.nan)
        self.places: list[Request | None] = [None] * size
        self.steps: list[Taken] = []
        self.streams = (torch.cuda.Stream(), torch.cuda.Stream()) if device.type == "cuda" else None
        self.built = torch.cuda.Event(external=True) if self.streams else None
        self._replay = clock.capture(self._graph) if self.streams else None
        clock.sync()

    # ---- The two streams ----

    def run(self, steps: int | None = None) -> None:
        with self._on(1):
            batch = self.change()
        for _ in range(self.sizes.steps if steps is None else steps):
            batch = self.step(batch)
        self.clock.sync()

    def step(self, batch: Batch) -> Batch:
        """Launches a step, and makes the next one's change while it attends."""
        if self.streams:
            self.streams[0].wait_stream(self.streams[1])
        with self._on(0):
            self.begin(batch)
        if self.streams:
            self.streams[1].wait_event(self.built)
        with self._on(1):
            following = self.change()
        with self._on(0):
            self.end(batch)
        return following

    def _on(self, which: int) -> AbstractContextManager:
        return torch.cuda.stream(self.streams[which]) if self.streams else nullcontext()

    def begin(self, batch: Batch) -> None:
        for static, value in zip((self.rows, self.seq_lens, self.newest), batch):
            static.copy_(value)
        self.new_kv.normal_()
        self.q.normal_()
        self.out.fill_(torch.nan)
        (self._replay or self._plan)()

    def end(self, batch: Batch) -> None:
        if not self.streams:
            self._attend()
        new = self.new_kv.clone()
        for place, request, _ in batch.seen:
            request.tokens.append(new[:, :, place])
        self.steps.append(Taken(batch, self.q.clone(), self.out.clone()))

    def _graph(self) -> None:
        self._plan()
        self.built.record()
        for _ in range(self.sizes.repeats):
            self._attend()

    def _plan(self) -> None:
        at = self.rows, self.seq_lens, self.req_to_token, self.pool.cells_per_layer
        self._index = self.lists.build(self.device_rows.table, *at)
        self.engine.plan(self._index[0])

    def _attend(self) -> None:
        pool = self.pool
        for layer in range(self.model.layers):
            for cells, new in zip(pool.storage[layer], self.new_kv[layer], strict=True):
                cells.index_copy_(0, self.newest, new)
            lists = *self._index, self.model.scale
            self.engine.run(layer, self.q[layer], pool.k_cells, pool.v_cells, *lists, out=self.out[layer])

    # ---- Changes, on the schedule stream ----

    def change(self) -> Batch:
        """What the next step sees. Nothing in it waits for the device."""
        self._overwrite(self.resting)
        self.resting = []
        for place, request in enumerate(self.places):
            if request is not None and self.rng.random() < LEAVES:
                self._leave(place, request)
            elif request is not None and request.kind == COMPACTED and self.rng.random() < MOVES:
                self._move(request)
        for place, request in enumerate(self.places):
            if request is None and self.rng.random() < COMES:
                self.places[place] = self._admit(KINDS[sum(self.did[kind] for kind in KINDS) % len(KINDS)])
        return self._grow()

    def _release(self, slots: list[int]) -> None:
        """Gives back slots that the step in flight may still read."""
        if self.rests:
            self.resting += slots
        else:
            self._overwrite(slots)

    def _overwrite(self, slots: list[int]) -> None:
        if slots:
            self.pool.storage.index_fill_(2, self._send(slots), torch.nan)
            self.free += slots
            self.did["overwritten"] += len(slots)

    def _send(self, numbers: list[int]) -> torch.Tensor:
        return on_device(numbers, self.clock.device)

    def _take(self, count: int) -> list[int]:
        """Free slots in no order."""
        taken = []
        for _ in range(count):
            at = self.rng.randrange(len(self.free))
            self.free[at], self.free[-1] = self.free[-1], self.free[at]
            taken.append(self.free.pop())
        return taken

    def _random(self, *shape: int) -> torch.Tensor:
        shape = *shape, self.model.kv_heads, self.model.head_dim
        return torch.randn(shape, dtype=self.clock.dtype, device=self.clock.device)

    def _leave(self, place: int, request: Request) -> None:
        self.places[place] = None
        self.device_rows.clear(request.row)
        self.did["cleared"] += request.kind != EXACT
        self.free_rows.append(request.row)
        self._release([slot for slot in request.slots if slot is not None])
        if request.packed is not None:
            request.packed.users -= 1
            if not request.packed.users:
                self._release(request.packed.slots)
                self._churn(len(request.packed.cells))

    def _churn(self, size: int) -> None:
        """Memory like that of cells that were let go, in which every one is poison."""
        _ = [torch.full((size,), POISON_SLOT, dtype=torch.int32, device=self.clock.device) for _ in range(3)]

    def _pack(self, rows: torch.Tensor, counts: list[int]) -> Packed:
        """Scatters ``rows`` into slots of their own, layer after layer."""
        slots = self._take(-(-sum(counts) // self.model.layers))
        cells = self.pool.cells_of(self._send(slots))[: sum(counts)].contiguous()
        kernel("compaction", "scatter_rows")(self.pool.k_cells, self.pool.v_cells, cells, rows)
        self.did["scattered"] += 1
        return Packed(slots, cells, rows, counts)

    def _move(self, request: Request) -> None:
        """Its rows, read from where they are, go elsewhere; who shares them moves too."""
        old, pool = request.packed, self.pool
        rows = torch.stack([cells[old.cells.long()] for cells in (pool.k_cells, pool.v_cells)])
        new = self._pack(rows, old.counts)
        old.slots, gone, old.cells, before = new.slots, old.slots, new.cells, old.cells
        for other in self.places:
            if other is not None and other.packed is old:
                self._set(other)
        self._release(gone)
        self._churn(len(before))
        self.did["moved"] += 1

    def _set(self, request: Request) -> None:
        packed = request.packed
        cells = list(packed.cells.split(packed.counts))
        self.device_rows.set(request.row, cells, request.sliding, request.first_own)
        self.did["set"] += 1

    def _admit(self, kind: str) -> Request:
        layers, longest = self.model.layers, self.sizes.longest
        length = self.rng.randint(longest // 2, longest)
        packed, sliding = None, []
        shares = [r.packed for r in self.places if r is not None and r.kind == COMPACTED]
        kind = COMPACTED if kind == SHARED and not shares else kind
        if kind == SHARED:
            packed = self.rng.choice(shares)
            packed.users += 1
        elif kind != EXACT:
            counts = [self.rng.randint(0, length // 2) for _ in range(layers - 1)] + [length // 3]
            packed = self._pack(self._random(2, sum(counts)), counts)
        if kind == SLIDING:
            sliding = [self.rng.randint(1, max(2, longest // 8)) for _ in range(layers)]
        request = Request(kind, self.free_rows.pop(), 0 if kind == EXACT else length, packed, sliding)
        own = length if kind == EXACT else max(sliding, default=0)
        if own:
            self._write(request, self._take(own), self._random(layers, 2, own))
        if packed is not None:
            self._set(request)
        self.did[kind] += 1
        request.name = f"{kind} request {sum(self.did[k] for k in KINDS)}"
        return request

    def _write(self, request: Request, slots: list[int], kv: torch.Tensor) -> None:
        """Its first tokens: K and V ``[L, 2, n, H, D]``."""
        at = self._send(slots)
        self.pool.storage[:, :, at] = kv
        self.req_to_token[request.row, request.start : request.start + len(slots)] = at.int()
        request.slots, request.tokens = list(slots), list(kv.unbind(2))

    def _grow(self) -> Batch:
        """Every request's next token gets its slot; tokens that no layer sees any more give theirs back."""
        size = self.sizes.requests
        rows, seq_lens, newest = [PADDING_ROW] * size, [0] * size, [PADDING_SLOT] * size
        seen = []
        for place, request in enumerate(self.places):
            if request is None:
                continue
            if request.sliding:  # the step in flight sees this one, the coming one does not
                gone = len(request.slots) - max(request.sliding)
                self._release([request.slots[gone]])
                request.slots[gone] = None
                self.did["slid"] += 1
            slot = self._take(1)[0]
            request.slots.append(slot)
            count = len(request.slots)
            rows[place], seq_lens[place], newest[place] = request.row, request.start + count, slot
            seen.append((place, request, count))
        self.did["padded"] += size - len(seen)
        if seen:
            at = self._send([rows[place] for place, *_ in seen])
            positions = self._send([seq_lens[place] - 1 for place, *_ in seen])
            self.req_to_token[at, positions] = self._send([newest[place] for place, *_ in seen]).int()
        return Batch(self._send(rows), self._send(seq_lens), self._send(newest), seen)

    # ---- What came out ----

    def wrong(self) -> tuple[int, list[str]]:
        """How many outputs there were, and which were wrong: further from float64 than twice plain PyTorch."""
        requests = {request for step in self.steps for _, request, _ in step.batch.seen}
        tokens = {request: torch.stack(request.tokens, 2) for request in requests}
        errors, names = [], []
        for number, (batch, q, out) in enumerate(self.steps):
            for place, request, count in batch.seen:
                for layer in range(self.model.layers):
                    k, v = request.visible(tokens[request], layer, count)
                    mine, scale = q[layer, place][None], self.model.scale
                    exact = attend(mine.double(), k.double(), v.double(), scale)
                    both = out[layer, place], attend(mine, k, v, scale)[0]
                    errors.append(torch.stack([(x.double() - exact[0]).norm() / exact.norm() for x in both]))
                    names.append(f"step {number}, layer {layer}, {request.name}, {len(k)} rows")
        if not errors:
            return 0, []
        ours, plain = torch.stack(errors).T
        right = ours <= (2 * plain).clamp_min(16 * torch.finfo(torch.float32).eps)  # NaN is not
        return len(names), [name for name, ok in zip(names, right.tolist(), strict=True) if not ok]

    def padding_is_zero(self) -> bool:
        everywhere = set(range(self.sizes.requests))
        return all(
            bool((step.out[:, sorted(everywhere - {place for place, *_ in step.batch.seen})] == 0).all())
            for step in self.steps
        )


EVENTS = *KINDS, "set", "cleared", "scattered", "moved", "overwritten", "slid", "padded"


def storming(part: Part, clock: Clock, model: Model, flashinfer: bool = False) -> None:
    """One storm, and a short one with a planted fault, which it has to see: else nothing overlapped."""
    storm = Storm(model, clock, flashinfer)
    storm.run()
    what = f"storm, {storm.model.name}{', FlashInfer' if flashinfer else ''}"
    outputs, wrong = storm.wrong()
    name = f"{what}: {outputs} outputs of {len(storm.steps)} steps against float64"
    part.check(name, outputs > 0 and not wrong, wrong=len(wrong), first=wrong[:8], events=dict(storm.did))
    part.check(f"{what}: padding is zero", storm.padding_is_zero())
    missing = [event for event in EVENTS if not storm.did[event]]
    part.check(f"{what}: everything happened that is to happen", not missing, missing=missing)
    del storm
    clock.free_bytes()
    planted = Storm(model, clock, flashinfer, seed=1, rests=False)
    planted.run()
    _, wrong = planted.wrong()
    part.check(f"{what}: slots overwritten too early are seen", bool(wrong), wrong=len(wrong), first=wrong[:3])


def run(part: Part, clock: Clock) -> None:
    with part.about(STORM):
        for model in models(clock.rehearsal):
            if part.has(1 if clock.rehearsal else SECONDS, f"storm, {model.name}"):
                storming(part, clock, model)
            clock.free_bytes()
