"""What a storm amounts to: counts, what was wrong, and tables for readers."""

from __future__ import annotations

from collections import Counter
from statistics import median

import numpy as np

from benchmarks.common import table
from tests.chaos.judge import BOUNDS, EQUAL, WRONG
from tests.chaos.plan import Malformed
from tests.chaos.storm import Storm

GRACE = 5.0  # seconds in which what an outage did to a request may still reach its client
DELAY = 2.0  # and what an abort of all did to it
GROWTH = 0.05  # most that a process's memory may grow from the middle third of a soak to the last
NOT_SENT = "not sent"  # to our server: it brings the stock server down
SERVER_ERRORS = 500, 502, 504  # 503 is what SGLang answers to a request that is aborted
SOAK = 600.0  # seconds from which on that says something


def summary(storm: Storm) -> dict:
    """Counts as JSON values."""
    answered = [event for event in storm.events if "verdict" in event]
    verdicts = Counter(v for event in answered for v in event.get("verdicts", [event["verdict"]]))
    outcomes: dict[str, Counter] = {}
    for event in storm.events:
        outcomes.setdefault(event["action"], Counter())[event["outcome"]] += 1
    latencies: dict[str, list[float]] = {}
    for event in answered:
        kind = " ".join([event.get("endpoint", "several")] + ["stream"] * event.get("stream", False))
        latencies.setdefault(kind, []).append(event["ended"] - event["began"])
    return {
        "requests": len(storm.events),
        "seconds": round(storm.seconds, 1),
        "outcomes": {action: dict(counts) for action, counts in sorted(outcomes.items())},
        "verdicts": dict(verdicts),
        "compacted": sum(event["compacted"] for event in answered),
        "prefixes": dict(Counter(event["prefix"] for event in answered)),
        "retracted answers": sum(event["retractions"] > 0 for event in answered),
        "retractions in logs": storm.retractions,
        "latency_s": {kind: quantiles(seconds) for kind, seconds in sorted(latencies.items())},
        "outages": storm.outages,
        "ended by themselves": storm.crashes,
        "calm": storm.calm,
        "memory": [{role: growth(points) for role, points in server.items()} for server in storm.memory],
    }


def quantiles(seconds: list[float]) -> dict:
    p50, p99 = np.percentile(seconds, [50, 99])
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3), "answers": len(seconds)}


def growth(points: list[list[float]]) -> dict:
    """Of one process: MiB, its slope, and the last third against the middle one, by their medians."""
    times, sizes = zip(*points)
    thirds = [[s for t, s in points if i * times[-1] / 3 <= t <= (i + 1) * times[-1] / 3] for i in range(3)]
    slope = np.polyfit(times, sizes, 1)[0] if len(set(times)) > 2 else 0.0
    grown = median(thirds[2]) / median(thirds[1]) - 1 if all(thirds) else None
    return {
        "seconds": times[-1],
        "mib": {"first": round(sizes[0] / 2**20), "largest": round(max(sizes) / 2**20)},
        "mib_per_hour": round(float(slope) * 3600 / 2**20, 1),
        "last third above the middle": None if grown is None else round(grown, 4),
    }


def problems(storm: Storm, cases: dict[str, Malformed], statuses: dict[str, dict]) -> list[str]:
    """What must not have happened, a sentence each; none where all is well.

    Args:
        statuses: by malformed request, what an idle server of ours and the stock one answer; without
            those that ours always answers as it should.
    """
    found, counts = [], summary(storm)
    verdicts = counts["verdicts"]
    compared = sum(verdicts.values())
    found += [f"{verdicts.get(WRONG)} wrong answers"] * (WRONG in verdicts)
    for verdict, bound in BOUNDS.items():
        if verdicts.get(verdict, 0) > bound * compared + 1:
            found.append(f"{verdicts[verdict]} of {compared} answers: {verdict}; at most {bound:.0%} may")
    if not verdicts.get(EQUAL):
        found.append("no answer was equal; nothing was tested")
    found += [f"{len(storm.crashes)} servers ended by themselves"] * bool(storm.crashes)
    outages = [(outage["at"] - GRACE, outage["back"] + GRACE) for outage in storm.outages]
    cuts = outages + [
        (event["began"] - DELAY, event["ended"] + DELAY)
        for event in storm.events
        if event["action"] == "abort all" or event.get("mode") == "abort"
    ]
    for event in storm.events:
        name = f"{event['rid']} ({event.get('case', event['action'])})"
        span = event["began"], event["ended"]
        if event["outcome"] == "stuck" and not overlaps(span, outages):
            found.append(f"{name} had no end")
        if event["outcome"] == "lost" and not overlaps(span, outages):
            found.append(f"{name} lost its server while that was up: {event['error']}")
        if event["outcome"] == "aborted by others" and not overlaps(span, cuts):
            found.append(f"{name} was not answered: {event['error']}")
        if event["action"] == "malformed" and "status" in event:
            case = cases[event["case"]]
            known = statuses.get(case.name, {})
            upstream = event["status"] == known.get("ours") and fault(case, **known) != "ours"
            if not as_it_should(case, event["status"]) and not upstream:
                found.append(
                    f"{case.name} was answered with HTTP {event['status']}, on stock {known.get('stock')}"
                )
        elif not overlaps(span, outages):
            found += [f"{name} was answered with HTTP {status}" for status in faults(event)]
    for name, known in statuses.items():
        if fault(cases[name], **known) == "ours":
            found.append(
                f"{name} is answered with {known['ours']}, by the stock server with {known['stock']}"
            )
    wanted = {"flushed": True, "alive": True, "twins": 0, "twin slots": 0, "used slots": 0}
    wanted |= {"running": 0, "waiting": 0, "leaks in logs": 0}
    for name, value in wanted.items():
        if storm.calm.get(name) != value:
            found.append(f"after the storm, {name} is {storm.calm.get(name)}")
    for role, process in counts["memory"][-1].items():
        grown = process["last third above the middle"]
        if process["seconds"] >= SOAK and grown is not None and grown > GROWTH:
            found.append(f"the {role} grew by {grown:.1%} from the middle third to the last")
    return found


def overlaps(span: tuple[float, float], others: list[tuple[float, float]]) -> bool:
    return any(span[0] <= end and start <= span[1] for start, end in others)


def faults(event: dict) -> list[int]:
    """Statuses that nothing well-formed is answered with, and the 200 that garbage must not get."""
    statuses = event.get("statuses", [event.get("status")])
    return [s for s in statuses if s in SERVER_ERRORS or (s == 200 and event["action"] == "raw")]


def as_it_should(case: Malformed, status: int | str) -> bool:
    return isinstance(status, int) and (400 <= status < 500 or (case.odd and status == 200))


def fault(case: Malformed, ours: int | str, stock: int | str) -> str:
    """Whose it is that a malformed request is not refused as it should be; empty where it is."""
    if as_it_should(case, ours):
        return ""
    return "upstream" if ours == stock and not case.ours else "ours"


def malformed(statuses: dict[str, dict], cases: dict[str, Malformed]) -> dict:
    """For the record: how many were refused by both servers, and what both did with the others."""
    others = {
        name: known | {"fault": "upstream" if known["ours"] == NOT_SENT else fault(cases[name], **known)}
        for name, known in statuses.items()
    }
    others = {name: known for name, known in others.items() if known["fault"]}
    return {"sent": len(statuses), "as they should be": len(statuses) - len(others), "others": others}


def thinned(memory: list[dict]) -> list[dict]:
    """For the record: some fifty samples of each process."""
    return [{role: points[:: len(points) // 50 + 1] for role, points in server.items()} for server in memory]


def text(record: dict) -> str:
    """The record for readers."""
    counts = record["summary"]
    kinds = sorted({outcome for row in counts["outcomes"].values() for outcome in row})
    lines = [
        [action, *(str(row.get(kind, "")) for kind in kinds)] for action, row in counts["outcomes"].items()
    ]
    parts = [table(["requests", *kinds], lines)]
    compared = sum(counts["verdicts"].values())
    lines = [[verdict, str(n), f"{n / compared:.2%}"] for verdict, n in sorted(counts["verdicts"].items())]
    parts.append(table(["answers compared", "", ""], lines))
    lines = [[k, str(s["answers"]), str(s["p50"]), str(s["p99"])] for k, s in counts["latency_s"].items()]
    parts.append(table(["latency, seconds", "answers", "p50", "p99"], lines))
    lines = [
        [f"server {i + 1}, {role}", f"{p['seconds']:.0f}", str(p["mib"]["first"]), str(p["mib"]["largest"])]
        + [str(p["mib_per_hour"]), str(p["last third above the middle"])]
        for i, server in enumerate(counts["memory"])
        for role, p in server.items()
    ]
    header = ["memory", "seconds", "MiB first", "largest", "MiB per hour", "last third above the middle"]
    parts.append(table(header, lines))
    others = record["malformed"]["others"]
    lines = [[name, str(s["ours"]), str(s["stock"]), s["fault"]] for name, s in others.items()]
    parts.append(table(["malformed, not refused", "ours", "stock", "whose"], lines))
    parts.append("\n".join(record["problems"]) or "No problems.")
    return "\n\n".join(parts)
