"""What happens to kept rows, as Prometheus metrics in SGLang's own ``/metrics``."""

from __future__ import annotations

from functools import cache
from typing import Callable

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

from sglang_vlkv.cache.requests import REASONS
from sglang_vlkv.observe import events
from sglang_vlkv.options.config import NONE
from sglang_vlkv.stages.base import Modality

PREFIX = "sglang_vlkv_"  # SGLang's own begin with "sglang:"
LABELS = ("policy", "prefix", "reason", "modality")  # ours, beside SGLang's
# Usual budgets lie inside a bucket, not on an edge that rounding moves them over.
RETENTION_BUCKETS = (0.01, 0.025, 0.04, 0.06, 0.09, 0.12, 0.17, 0.25, 0.35, 0.45, 0.6, 0.8, 1.0)
SECONDS_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class Metrics:
    """A watcher: counts events where SGLang's processes share their metrics.

    Args:
        labels: SGLang's own for this scheduler, by name.
        policy: the server's.
        pool_bytes: of all slots.
        row_bytes: of one KV head's K and V of one token in one layer.
        twins: how many there are, and the bytes of their slots.

    Every event is an addition to shared memory or a few; nothing here waits.
    """

    def __init__(
        self,
        labels: dict,
        policy: str,
        pool_bytes: int,
        row_bytes: int,
        twins: Callable[[], tuple[int, int]],
    ) -> None:
        # It decides on import whether processes share its values; SGLang has told it to by now.
        from prometheus_client import Counter, Gauge, Histogram

        def series(kind: type, name: str, words: str, *own: str, **options) -> Callable:
            """From values of ``own`` labels to their time series."""
            metric = kind(PREFIX + name, words, [*labels, *own], **options)
            return cache(lambda *values: metric.labels(*labels.values(), *values))

        def counter(name: str, words: str, *own: str) -> Callable:
            return series(Counter, name, words, *own)

        def gauge(name: str, words: str) -> Callable:
            return series(Gauge, name, words, multiprocess_mode="mostrecent")

        self._row_bytes, self._count_twins = row_bytes, twins
        self._compactions = counter(
            "compactions_total", "Prompts whose exact rows were replaced by kept ones.", "policy"
        )
        self._kept = counter(
            "kept_bytes_total", "Bytes of the slots that hold compacted prompts' kept rows.", "policy"
        )
        self._freed = counter(
            "freed_bytes_total", "Bytes that compacted prompts would have taken beyond that.", "policy"
        )
        self._kept_of = counter(
            "modality_kept_bytes_total", "Bytes of the kept rows by what they hold.", "modality"
        )
        self._retention = series(
            Histogram, "retention_ratio", "Kept rows of a compacted prompt to all its rows.", "policy",
            buckets=RETENTION_BUCKETS,
        )  # fmt: skip
        self._seconds = series(
            Histogram, "compaction_seconds", "Time that the scheduler stood still for compactions.",
            buckets=SECONDS_BUCKETS,
        )  # fmt: skip
        self._deferred = counter(
            "deferred_requests_total", "Requests that had to wait while room was reserved for kept rows."
        )
        self._no_room = counter(
            "no_room_requests_total", "Prefilled requests that were put back: no room for their kept rows."
        )
        self._finished = counter(
            "finished_requests_total", "Finished requests, by where their prefix came from.",
            "policy", "prefix",
        )  # fmt: skip
        self._left_alone = counter(
            "left_alone_requests_total", "Finished requests whose prompts were left alone.", "reason"
        )
        self._retractions = counter(
            "retractions_total", "Times that a running request was put back.", "policy"
        )
        self._prefix_tokens = counter(
            "prefix_tokens_total", "Prompt tokens of finished requests that needed no prefill.", "prefix"
        )
        self._twins = gauge("twins", "Twins in the pool.")
        self._twins_bytes = gauge("twins_bytes", "Bytes of the slots that twins hold.")
        self._created = counter("twins_created_total", "Twins that were made.")
        self._evicted = counter("twins_evicted_total", "Twins that made room.")
        self._hits = counter("twin_hits_total", "Requests that went on from a twin.", "prefix")
        self._pool = gauge("pool_bytes", "Bytes of all slots of the KV pool.")
        self._on = {
            events.Compacted: self._on_compacted,
            events.Pass: lambda event: self._seconds().observe(event.seconds),
            events.TwinCreated: lambda _: self._created().inc(),
            events.TwinHit: lambda event: self._hits(event.prefix).inc(),
            events.TwinEvicted: lambda _: self._evicted().inc(),
            events.Released: self._on_released,
            events.Deferred: lambda _: self._deferred().inc(),
            events.NoRoom: lambda _: self._no_room().inc(),
        }
        self._begin(policy, pool_bytes)

    def __call__(self, event: events.Event) -> None:
        if (on := self._on.get(type(event))) is not None:
            on(event)
        self._look_at_twins()

    def _begin(self, policy: str, pool_bytes: int) -> None:
        """Series begin at 0, so that their first increase is seen as one; those of policies that only
        requests ask for begin with the first that does."""
        for metric in (self._seconds, self._deferred, self._no_room, self._created, self._evicted):
            metric()
        for metric in (self._compactions, self._kept, self._freed, self._retention):
            metric(policy)
        for modality in set(Modality) - {Modality.MERGED}:
            self._kept_of(modality.name.lower())
        for name in {policy, NONE}:
            self._retractions(name)
        for prefix in events.PREFIX_KINDS:
            self._prefix_tokens(prefix)
            for name in {policy, NONE}:
                self._finished(name, prefix)
        for prefix in ("twin", "shared"):
            self._hits(prefix)
        for reason in REASONS:
            self._left_alone(reason)
        self._look_at_twins()
        self._pool().set(pool_bytes)

    def _on_compacted(self, event: events.Compacted) -> None:
        self._compactions(event.policy).inc()
        self._kept(event.policy).inc(event.kept_bytes)
        self._freed(event.policy).inc(max(0, event.full_bytes - event.kept_bytes))
        rows = len(event.kept_per_layer) * event.prompt_tokens
        self._retention(event.policy).observe(sum(event.kept_per_layer) / rows)
        for modality, kept in event.kept_per_modality.items():
            self._kept_of(modality).inc(kept * self._row_bytes)

    def _on_released(self, event: events.Released) -> None:
        if event.outcome == "retracted":
            self._retractions(event.policy).inc()
        elif event.outcome == "finished" and not event.rid.startswith(HEALTH_CHECK_RID_PREFIX):
            self._finished(event.policy, event.prefix).inc()
            self._prefix_tokens(event.prefix).inc(event.prefix_tokens)
            if event.reason:
                self._left_alone(event.reason).inc()

    def _look_at_twins(self) -> None:
        count, num_bytes = self._count_twins()
        self._twins().set(count)
        self._twins_bytes().set(num_bytes)
