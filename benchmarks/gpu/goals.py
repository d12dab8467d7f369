"""What was to be reached, and whether it was.

Parts say at their start by which rows a goal is to be judged (``Part.expect``), and tag those rows
``goals=[...]`` as they are measured. A goal passes only when each of them has its figure.
"""

from __future__ import annotations

from typing import NamedTuple

DECODE, EQUAL_BYTES, UNEVEN_COST = "decode bandwidth", "equal bytes", "uneven layers"
COMPRESSION, INDEX = "compression", "index and plan"
PAPER_DECODE, PAPER_WHOLE = "paper decode", "paper end to end"
ENGINE_DECODE, ENGINE_WHOLE = "engine decode", "engine end to end"
STOCK_RATIO, EVEN_RATIO = "vs best stock engine, equal bytes", "vs equal layers"
PASS, FAIL, NOT_MEASURED, MEASURED = "pass", "FAIL", "not measured", "measured"


class Goal(NamedTuple):
    """The worst row with its tag has to reach the bound.

    Attributes:
        metric: a field of a row's ``derived``, or of the ratios in it; ``p50`` is the row's time.
        bound: None where the figure is wanted and nothing is promised.
        least: whether the bound is the least allowed, else the most.
        unit: what the metric is multiplied by, and called.
    """

    text: str
    metric: str
    bound: float | None
    least: bool
    unit: tuple[float, str]


TIMES = (1, "x")
GOALS = {
    DECODE: Goal(
        "ragged decode at alpha 0.1 and 128K tokens reaches 85 % of copy bandwidth",
        "of_copy", 0.85, True, (100, " %"),
    ),
    EQUAL_BYTES: Goal(
        "its attention is within 5 % of the best stock kernel's for equal bytes", STOCK_RATIO, 1 / 1.05, True, TIMES
    ),
    UNEVEN_COST: Goal("uneven layers cost at most 3 %", EVEN_RATIO, 1 / 1.03, True, TIMES),
    COMPRESSION: Goal(
        "scoring, selection and compaction take at most 1 % of a prefill of 32K", "share", 0.01, False, (100, " %")
    ),
    PAPER_DECODE: Goal(
        "the paper's 7.08x in decode, 1x128K, Hugging Face-style code against itself", "speedup", 7.08, True, TIMES
    ),
    PAPER_WHOLE: Goal(
        "the paper's 2.33x end to end, 64x2K, Hugging Face-style code against itself", "speedup", 2.33, True, TIMES
    ),
    ENGINE_DECODE: Goal("the engine against itself in decode, 1x128K", "speedup", None, True, TIMES),
    ENGINE_WHOLE: Goal("the engine against itself end to end, 64x2K", "speedup", None, True, TIMES),
    INDEX: Goal(
        "index building and planning take at most 30 microseconds for 28 layers", "p50", 30e-6, False, (1e6, " us")
    ),
}  # fmt: skip


def value(row: dict, metric: str) -> float | None:
    """A row's figure; None where it is refused or its base was not measured."""
    derived = row["derived"]
    if "refused" in derived:
        return None
    if metric == "p50":
        return row["seconds"]["p50"]
    return derived.get(metric, derived.get("ratios", {}).get(metric))


def judge(record: dict, tag: str) -> tuple[str, str]:
    """The verdict and what it rests on. Needs what ``report.derive`` adds."""
    goal, parts = GOALS[tag], record["parts"].values()
    if record["context"]["rehearsal"]:
        return NOT_MEASURED, "the times of a rehearsal mean nothing"
    rows = {(row["case"], row["row"]): row for part in parts for row in part["rows"] if tag in row.get("goals", ())}
    wanted = {tuple(at) for part in parts for at in part.get("expected", {}).get(tag, ())} | set(rows)
    values = [(figure, row) for row in rows.values() if (figure := value(row, goal.metric)) is not None]
    measured = {(row["case"], row["row"]) for _, row in values}
    missing = [_without(rows.get(at), at, goal.metric) for at in sorted(wanted - measured)]
    if not values:
        return NOT_MEASURED, missing[0] if missing else "its part did not run"
    worst, row = (min if goal.least else max)(values, key=lambda one: one[0])
    factor, unit = goal.unit
    base = row["derived"].get("bases", {}).get(goal.metric) or row["derived"].get("versus")
    against = f" against {base}" if base and goal.metric in (STOCK_RATIO, EVEN_RATIO, "speedup") else ""
    seen = f"worst of {len(values)}: {factor * worst:.3g}{unit}, {row['case']}, {row['row']}{against}"
    if goal.bound is not None and not (worst >= goal.bound if goal.least else worst <= goal.bound):
        return FAIL, seen
    if missing:
        return NOT_MEASURED, f"{len(missing)} of {len(wanted)} are missing, among them {missing[0]}; {seen}"
    return (MEASURED if goal.bound is None else PASS), seen


def _without(row: dict | None, at: tuple[str, str], metric: str) -> str:
    """Where a figure is missing, and why."""
    why = "was not measured"
    if row is not None:
        derived = row["derived"]
        why = derived.get("refused") or derived.get("missing", {}).get(metric) or "has nothing to be held against"
    return f"{at[0]}, {at[1]}: {why}"


def verdicts(record: dict) -> dict[str, tuple[str, str]]:
    """For each goal, by its tag."""
    return {tag: judge(record, tag) for tag in GOALS}


def lines(record: dict) -> list[str]:
    """A line per goal, and how many of them there are of each verdict."""
    found = verdicts(record)
    counts = [verdict for verdict, _ in found.values()]
    summary = ", ".join(f"{counts.count(v)} {v}" for v in (PASS, FAIL, NOT_MEASURED, MEASURED) if v in counts)
    return [f"{verdict}: {GOALS[tag].text} ({seen})" for tag, (verdict, seen) in found.items()] + [summary]


def all_met(record: dict) -> bool:
    return all(verdict in (PASS, MEASURED) for verdict, _ in verdicts(record).values())
