"""How things are timed, on a GPU or, in the rehearsal, by a stand-in whose times mean nothing."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import NamedTuple

import torch

BATCH_SECONDS = 0.12  # of each of a timing's two batches
FEWEST, MOST = 5, 60  # repeats per batch
SLOW_SECONDS, FEWEST_SLOW = 0.1, 2  # of calls that take longer than that
AHEAD_CYCLES = 2_000_000  # the GPU waits about a millisecond, so that launches queue up behind it


class Timing(NamedTuple):
    """Seconds of one call; two batches of repeats, one after the other.

    Attributes:
        p20, p50, p80: over the repeats of both batches.
        samples: how many repeats those are.
        spread: by how much the batches' medians differ, as a fraction of the smaller; a difference
            between two rows that is smaller than this is noise. None of a single repeat.
    """

    p20: float
    p50: float
    p80: float
    samples: int
    spread: float | None

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float] = ()) -> Timing:
        values = torch.tensor([*first, *second], dtype=torch.float64)
        p20, p50, p80 = values.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        spread = None
        if len(second):
            medians = sorted(torch.tensor(x, dtype=torch.float64).median().item() for x in (first, second))
            spread = medians[1] / medians[0] - 1
        return cls(p20, p50, p80, len(values), spread)

    def minus(self, other: Timing) -> Timing:
        """Without what ``other`` took, whose median is subtracted; never below a nanosecond."""
        without = {name: max(getattr(self, name) - other.p50, 1e-9) for name in ("p20", "p50", "p80")}
        return self._replace(**without, spread=None)

    def scaled(self, factor: float) -> Timing:
        """Of ``factor`` times the work, computed: one of L equal layers, say."""
        return self._replace(p20=self.p20 * factor, p50=self.p50 * factor, p80=self.p80 * factor)


class Clock:
    """Times work on a CUDA device with its own events.

    Attributes:
        rehearsal: times mean nothing, and models are toys.
        small: few rows, so that a kernel takes no time.
        flashinfer_is_compiled: it has run on this machine; until then it may compile for a minute.
    """

    rehearsal = small = False
    flashinfer_is_compiled = False

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        properties = torch.cuda.get_device_properties(self.device)
        self.l2_bytes = properties.L2_cache_size
        self.num_sms = properties.multi_processor_count
        self.dtype = torch.bfloat16

    def sync(self) -> None:
        torch.cuda.synchronize()

    def free_bytes(self) -> int:
        """What may still be allocated, what the caching allocator holds included."""
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def peak_bytes(self) -> int:
        """Most memory that was allocated at once since the last call."""
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak

    def capture(self, work: Callable[[], object], times: int = 1) -> Callable[[], None]:
        """A replay of ``times`` calls of ``work`` as one CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and lets lazily made workspaces be made outside the graph
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                work()
        return graph.replay

    @contextmanager
    def never_waiting(self) -> Iterator[None]:
        """Whatever waits for the device in between raises an error."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def evictor(self) -> Callable[[], object]:
        """Reads four times the L2 cache, so that what was in it is not."""
        buffer = torch.zeros(max(1, self.l2_bytes), device=self.device)  # of four bytes each
        total = torch.empty((), device=self.device)
        return lambda: torch.sum(buffer, 0, out=total)

    def measure(self, *works: Callable[[], object], per: int = 1, seconds: float = BATCH_SECONDS) -> Timing:
        """Device time of one call, by events; ``works`` do the same on different data, in rotation.

        Args:
            per: divides the times: how often a call does what is to be timed.
        """
        for work in works:
            work()
        self.sync()
        once = self.wall(works[0])
        fewest = FEWEST_SLOW if once > SLOW_SECONDS else FEWEST
        repeats = min(max(fewest, int(seconds / max(once, 1e-6))), MOST)
        return Timing.of(*([t / per for t in self._batch(works, repeats)] for _ in range(2)))

    def _batch(self, works: Sequence[Callable[[], object]], repeats: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda._sleep(AHEAD_CYCLES)
        for i, (start, end) in enumerate(events):
            start.record()
            works[i % len(works)]()
            end.record()
        self.sync()
        return [1e-3 * start.elapsed_time(end) for start, end in events]

    def wall(self, work: Callable[[], object]) -> float:
        """Seconds of one call by the host's clock: what eager code costs with its launches."""
        self.sync()
        start = time.perf_counter()
        work()
        self.sync()
        return time.perf_counter() - start


class Small(Clock):
    """Few rows of real models, nothing captured: for a tool that looks at every access."""

    small = True

    def capture(self, work: Callable[[], object], times: int = 1) -> Callable[[], None]:
        return work


class Rehearsal(Clock):
    """Runs the same code at toy sizes on the CPU, kernels in Triton's interpreter."""

    rehearsal = small = True

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.l2_bytes = 1 << 10
        self.num_sms = 2
        self.dtype = torch.float32
        # The interpreter takes a millisecond per program, and index building launches as many as a GPU runs.
        indices = import_module("sglang_vlkv.kernels.ragged_attention.indices")
        indices.PROGRAMS = min(indices.PROGRAMS, 4)

    def sync(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 16 << 30

    def peak_bytes(self) -> int:
        return 0

    def capture(self, work: Callable[[], object], times: int = 1) -> Callable[[], None]:
        return work

    @contextmanager
    def never_waiting(self) -> Iterator[None]:
        yield

    def measure(self, *works: Callable[[], object], per: int = 1, seconds: float = 0.0) -> Timing:
        once = max(self.wall(works[0]) / per, 1e-9)
        return Timing.of([once], [once])
