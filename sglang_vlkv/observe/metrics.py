"""What happens to kept rows, as Prometheus metrics in SGLang's own ``/metrics``."""

from __future__ import annotations

from functools import cache
from typing import Callable

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

from sglang_vlkv.observe import events
from sglang_vlkv.policies.none import NONE
from sglang_vlkv.stages.prompt import Modality

PREFIX = "sglang_vlkv_"  # SGLang's own begin with "sglang:"
LABELS = ("policy", "prefix", "reason", "modality")  # ours, beside SGLang's
# Usual budgets lie inside a bucket, not on an edge that rounding moves them over.
RETENTION_BUCKETS = (0.01, 0.025, 0.04, 0.06, 0.09, 0.12, 0.17, 0.25, 0.35, 0.45, 0.6, 0.8, 1.0)
SECONDS_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
# By name: what it counts, and its own labels.
COUNTERS = {
    "compactions_total": ("Prompts whose exact rows were replaced by kept ones.", "policy"),
    "kept_bytes_total": ("Bytes of the slots that hold compacted prompts' kept rows.", "policy"),
    "freed_bytes_total": ("Bytes that compacted prompts would have taken beyond that.", "policy"),
    "modality_kept_bytes_total": ("Bytes of the kept rows by what they hold.", "modality"),
    "unseen_pictures_total": ("Pictures and videos of which some layer and head kept no row.", "policy"),
    "deferred_requests_total": ("Requests that had to wait while room was reserved for kept rows.",),
    "no_room_requests_total": ("Prefilled requests that were put back: no room for their kept rows.",),
    "finished_requests_total": ("Finished requests, by where their prefix came from.", "policy", "prefix"),
    "left_alone_requests_total": ("Finished requests whose prompts were left alone.", "reason"),
    "retractions_total": ("Times that a running request was put back.", "policy"),
    "prefix_tokens_total": ("Prompt tokens of finished requests that needed no prefill.", "prefix"),
    "twins_created_total": ("Twins that were made.",),
    "twins_evicted_total": ("Twins that made room.",),
    "twin_hits_total": ("Requests that went on from a twin.", "prefix"),
}
GAUGES = {
    "twins": "Twins in the pool.",
    "twins_bytes": "Bytes of the slots that twins hold.",
    "pool_bytes": "Bytes of all slots of the KV pool.",
}
HISTOGRAMS = {
    "retention_ratio": (RETENTION_BUCKETS, "Kept rows of a compacted prompt to all its rows.", "policy"),
    "compaction_seconds": (SECONDS_BUCKETS, "Time that the scheduler stood still for compactions."),
}

OF_A_COMPACTION = (
    "compactions_total", "kept_bytes_total", "freed_bytes_total", "unseen_pictures_total", "retention_ratio",
)  # fmt: skip


def _series(labels: dict) -> dict[str, Callable]:
    """By name of a metric, from values of its own labels to their time series."""
    # It decides on import whether processes share its values; SGLang has told it to by now.
    from prometheus_client import Counter, Gauge, Histogram

    def series(kind: type, name: str, words: str, *own: str, **options) -> Callable:
        metric = kind(PREFIX + name, words, [*labels, *own], **options)
        return cache(lambda *values: metric.labels(*labels.values(), *values))

    made = {name: series(Counter, name, *words) for name, words in COUNTERS.items()}
    for name, words in GAUGES.items():
        made[name] = series(Gauge, name, words, multiprocess_mode="mostrecent")
    for name, (buckets, *words) in HISTOGRAMS.items():
        made[name] = series(Histogram, name, *words, buckets=buckets)
    return made


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
        self._row_bytes, self._count_twins = row_bytes, twins
        self._series = _series(labels)
        self._on = {
            events.Compacted: self._on_compacted,
            events.Pass: lambda event: self._at("compaction_seconds").observe(event.seconds),
            events.TwinCreated: lambda _: self._at("twins_created_total").inc(),
            events.TwinHit: lambda event: self._at("twin_hits_total", event.prefix).inc(),
            events.TwinEvicted: lambda _: self._at("twins_evicted_total").inc(),
            events.Released: self._on_released,
            events.Deferred: lambda _: self._at("deferred_requests_total").inc(),
            events.NoRoom: lambda _: self._at("no_room_requests_total").inc(),
        }
        self._begin(policy, pool_bytes)

    def __call__(self, event: events.Event) -> None:
        if (on := self._on.get(type(event))) is not None:
            on(event)
        self._look_at_twins()

    def _at(self, name: str, *values: str):
        """The time series of a metric with these values of its own labels."""
        return self._series[name](*values)

    def _begin(self, policy: str, pool_bytes: int) -> None:
        """Series begin at 0, so that their first increase is seen as one; those of policies that only
        requests ask for begin with the first that does."""
        for name in OF_A_COMPACTION:
            self._at(name, policy)
        for name in ("compaction_seconds", *(name for name, (_, *own) in COUNTERS.items() if not own)):
            self._at(name)
        for modality in Modality:
            self._at("modality_kept_bytes_total", modality.name.lower())
        for name in {policy, NONE}:
            self._at("retractions_total", name)
        for prefix in events.PREFIX_KINDS:
            self._at("prefix_tokens_total", prefix)
            for name in {policy, NONE}:
                self._at("finished_requests_total", name, prefix)
        for prefix in ("twin", "shared"):
            self._at("twin_hits_total", prefix)
        for reason in events.REASONS:
            self._at("left_alone_requests_total", reason)
        self._look_at_twins()
        self._at("pool_bytes").set(pool_bytes)

    def _on_compacted(self, event: events.Compacted) -> None:
        self._at("compactions_total", event.policy).inc()
        self._at("kept_bytes_total", event.policy).inc(event.kept_bytes)
        self._at("freed_bytes_total", event.policy).inc(max(0, event.full_bytes - event.kept_bytes))
        self._at("unseen_pictures_total", event.policy).inc(event.unseen_pictures)
        rows = len(event.kept_per_layer) * event.prompt_tokens
        self._at("retention_ratio", event.policy).observe(sum(event.kept_per_layer) / rows)
        for modality, kept in event.kept_per_modality.items():
            self._at("modality_kept_bytes_total", modality).inc(kept * self._row_bytes)

    def _on_released(self, event: events.Released) -> None:
        if event.outcome == "retracted":
            self._at("retractions_total", event.policy).inc()
        elif event.outcome == "finished" and not event.rid.startswith(HEALTH_CHECK_RID_PREFIX):
            self._at("finished_requests_total", event.policy, event.prefix).inc()
            self._at("prefix_tokens_total", event.prefix).inc(event.prefix_tokens)
            if event.reason:
                self._at("left_alone_requests_total", event.reason).inc()

    def _look_at_twins(self) -> None:
        count, num_bytes = self._count_twins()
        self._at("twins").set(count)
        self._at("twins_bytes").set(num_bytes)
