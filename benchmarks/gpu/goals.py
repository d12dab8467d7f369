"""What was to be reached, and whether it was: rows are tagged ``goals=[...]`` where they are measured."""

from __future__ import annotations

from typing import NamedTuple

DECODE, EQUAL_BYTES, UNEVEN_COST = "decode bandwidth", "equal bytes", "uneven layers"
COMPRESSION, PAPER_DECODE, PAPER_WHOLE, INDEX = "compression", "paper decode", "paper end to end", "index and plan"
STOCK_RATIO, EVEN_RATIO = "vs best stock engine, equal bytes", "vs equal layers"
TOGETHER = "vs HF-style full cache, engine and compression together"


class Goal(NamedTuple):
    """The worst row with its tag has to reach the bound.

    Attributes:
        metric: a field of a row's ``derived``, or of the ratios in it; ``p50`` is the row's time.
        least: whether the bound is the least allowed, else the most.
        unit: what the metric is multiplied by, and called.
    """

    text: str
    metric: str
    bound: float
    least: bool
    unit: tuple[float, str]


GOALS = {
    DECODE: Goal(
        "ragged decode at alpha 0.1 and 128K tokens reaches 85 % of copy bandwidth",
        "of_copy", 0.85, True, (100, " %"),
    ),
    EQUAL_BYTES: Goal(
        "its attention is within 5 % of the best stock kernel's for equal bytes", STOCK_RATIO, 1 / 1.05, True, (1, "x")
    ),
    UNEVEN_COST: Goal("uneven layers cost at most 3 %", EVEN_RATIO, 1 / 1.03, True, (1, "x")),
    COMPRESSION: Goal(
        "scoring, selection and compaction take at most 1 % of a prefill of 32K", "share", 0.01, False, (100, " %")
    ),
    PAPER_DECODE: Goal("the paper's 7.08x in decode, 1x128K", TOGETHER, 7.08, True, (1, "x")),
    PAPER_WHOLE: Goal("the paper's 2.33x end to end, 64x2K", TOGETHER, 2.33, True, (1, "x")),
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


def lines(record: dict) -> list[str]:
    """A line per goal: pass, fail or not measured, with the worst row. Needs what ``derive`` adds."""
    found = []
    for tag, goal in GOALS.items():
        tagged = [row for part in record["parts"].values() for row in part["rows"] if tag in row.get("goals", ())]
        if record["context"]["rehearsal"]:
            tagged = []  # its times mean nothing
        values = [(figure, row) for row in tagged if (figure := value(row, goal.metric)) is not None]
        if not values:
            why = next((f" ({row['derived']['refused']})" for row in tagged if "refused" in row["derived"]), "")
            found.append(f"not measured: {goal.text}{why}")
            continue
        worst, row = (min if goal.least else max)(values, key=lambda one: one[0])
        passed = worst >= goal.bound if goal.least else worst <= goal.bound
        missing = f", {len(tagged) - len(values)} without a figure" if len(values) < len(tagged) else ""
        factor, unit = goal.unit
        base = row["derived"].get("bases", {}).get(goal.metric)
        against = f" against {base}" if base else ""
        seen = f"worst of {len(values)}{missing}: {factor * worst:.3g}{unit}, {row['case']}, {row['row']}{against}"
        found.append(f"{'pass' if passed else 'FAIL'}: {goal.text} ({seen})")
    return found
