"""Ratios and tables. What is wrong, or was not checked, hides the ratios that rest on it, in the record as in
the table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from benchmarks.gpu.goals import lines as goal_lines
from benchmarks.gpu.goals import verdicts
from benchmarks.gpu.record import Ratio
from benchmarks.gpu.subjects import EVERYTHING

HIDDEN = "not shown"  # how a reason begins
MEANINGLESS = "–"


def table(header: list[str], lines: list[list[str]], text_columns: int = 2) -> str:
    """A Markdown table, numbers to the right."""
    rule = [":---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def checks(record: dict) -> Iterator[dict]:
    for part in record["parts"].values():
        yield from part["checks"]


def failed(record: dict) -> list[str]:
    """Names of the checks that failed; correctness that broke off has failed."""
    missing = [f"{what} broke off" for name, what in broken(record) if name == "correctness"]
    return [check["name"] for check in checks(record) if not check["ok"]] + missing


def broken(record: dict) -> list[tuple[str, str]]:
    """Part and name of what broke off."""
    return [(name, one["what"]) for name, part in record["parts"].items() for one in part["broken"]]


class Trust(NamedTuple):
    """What the checks of a record say.

    Attributes:
        wrong: subjects of failed checks.
        checked: subjects of checks. Those of a correctness part that did not end are not among them.
    """

    wrong: frozenset[str]
    checked: frozenset[str]

    @classmethod
    def of(cls, record: dict) -> Trust:
        wrong = {about for check in checks(record) if not check["ok"] for about in check["about"]}
        if any(name == "correctness" for name, _ in broken(record)):
            wrong.add(EVERYTHING)
        parts = [part for name, part in record["parts"].items() if name != "correctness" or part["ended"]]
        return cls(frozenset(wrong), frozenset(about for p in parts for c in p["checks"] for about in c["about"]))

    def refusal(self, rests_on: Iterable[str]) -> str | None:
        """Why a figure that rests on these is not shown; None where it is."""
        rests_on = list(rests_on)
        if not rests_on:
            return None
        if wrong := [EVERYTHING] * (EVERYTHING in self.wrong) or [one for one in rests_on if one in self.wrong]:
            return f"{HIDDEN}: wrong: {', '.join(wrong)}"
        if unchecked := [one for one in rests_on if one not in self.checked]:
            return f"{HIDDEN}: not checked: {', '.join(unchecked)}"
        return None


def _shown(record: dict, part: str) -> list[dict]:
    return [row for row in record["parts"].get(part, {}).get("rows", []) if "refused" not in row["derived"]]


def ceilings(record: dict) -> tuple[float, float] | None:
    """Most bytes and operations per second that were measured; None without that part."""
    rows = _shown(record, "ceilings")
    bandwidth = [row["moved"] / row["seconds"]["p50"] for row in rows if "moved" in row]
    rate = [row["flops"] / row["seconds"]["p50"] for row in rows if "flops" in row]
    return (max(bandwidth), max(rate)) if bandwidth and rate else None


def copy_rate(record: dict) -> float | None:
    """Bytes per second, read and written, of a plain copy."""
    rows = _shown(record, "ceilings")
    return next((row["moved"] / row["seconds"]["p50"] for row in rows if row["row"] == "copy"), None)


def derive(record: dict) -> None:
    """Adds to every row its rate and what may be shown of its ratios, and to the record its goals."""
    trust = Trust.of(record)
    for part in record["parts"].values():
        for row in part["rows"]:
            refused = trust.refusal(row.get("rests_on", ()))
            row["derived"] = {"refused": refused} if refused else {}
    best, copy = ceilings(record), copy_rate(record)
    for part in record["parts"].values():
        bases = {(row["case"], row["row"]): row for row in part["rows"]}
        for row in part["rows"]:
            _rates(row, best, copy)
            if "refused" not in row["derived"]:
                _ratios(row, bases, trust)
    record["goals"] = {tag: list(found) for tag, found in verdicts(record).items()}


def _rates(row: dict, best: tuple[float, float] | None, copy: float | None) -> None:
    seconds, derived = row["seconds"]["p50"], row["derived"]
    for amount, at in (("moved", 0), ("flops", 1)):
        if amount in row:
            derived[f"{amount}_per_s"] = row[amount] / seconds
            if best and "refused" not in derived:
                derived["of_ceiling"] = row[amount] / seconds / best[at]
    if "moved" in row and copy and "refused" not in derived:
        derived["of_copy"] = row["moved"] / seconds / copy


def _ratios(row: dict, bases: dict[tuple[str, str], dict], trust: Trust) -> None:
    """What the row is held against; where that is missing or wrong, ``missing`` says so."""
    seconds, derived, case = row["seconds"]["p50"], row["derived"], row["case"]

    def base(figure: str, ratio: Ratio) -> dict | None:
        there = [bases[ratio.case, name] for name in ratio.of if (ratio.case, name) in bases]
        right = [one for one in there if "refused" not in one["derived"]]
        why = trust.refusal(ratio.rests_on)
        if not why and ratio.needs and not any(one["row"] in ratio.needs for one in right):
            why = f"{HIDDEN}: none of {', '.join(ratio.needs)} ran and was right"
        if not why and not right:
            why = there[0]["derived"]["refused"] if there else None
        if why:
            derived.setdefault("missing", {})[figure] = why
        return None if why or not right else min(right, key=lambda one: one["seconds"]["p50"])

    if "copied_by" in row and (copied := base("of_copy_by_index", Ratio(case, [row["copied_by"]]))):
        derived["of_copy_by_index"] = (row["moved"] / seconds) / (copied["moved"] / copied["seconds"]["p50"])
    for name, ratio in row.get("ratios", {}).items():
        if found := base(name, Ratio(*ratio)):
            derived.setdefault("bases", {})[name] = found["row"]
            derived.setdefault("ratios", {})[name] = found["seconds"]["p50"] / seconds
    names = row.get("versus_best_of") or ([row["versus"]] if "versus" in row else [])
    if names and (found := base("speedup", Ratio(row.get("versus_case", case), names))):
        derived["speedup"], derived["versus"] = found["seconds"]["p50"] / seconds, found["row"]
    if "share_of" in row and (found := base("share", Ratio(case, [row["share_of"]]))):
        derived["share"] = seconds / found["seconds"]["p50"]


def _cells(row: dict, rehearsal: bool) -> list[str]:
    seconds, derived = row["seconds"], row["derived"]
    refused = derived.get("refused")
    if rehearsal:
        return [row["case"], row["row"], *[MEANINGLESS] * 8]
    spread = seconds["spread"]
    cells = [row["case"], row["row"]] + [f"{1e3 * seconds[p]:.4g}" for p in ("p20", "p50", "p80")]
    cells.append("" if spread is None else f"{100 * spread:.1f} %")
    if "moved_per_s" in derived:
        cells.append(f"{derived['moved_per_s'] / 1e9:.0f} GB/s")
    elif "flops_per_s" in derived:
        cells.append(f"{derived['flops_per_s'] / 1e12:.0f} TFLOP/s")
    else:
        cells.append("")
    wants = {
        "of_ceiling": "moved" in row or "flops" in row,
        "speedup": "versus" in row or "versus_best_of" in row,
        "share": "share_of" in row,
    }
    shown = {
        "of_ceiling": lambda: f"{100 * derived['of_ceiling']:.0f} %",
        "speedup": lambda: f"{derived['speedup']:.2f}x vs {derived['versus']}",
        "share": lambda: f"{100 * derived['share']:.1f} % of {row['share_of']}",
    }
    for name, wanted in wants.items():
        missing = derived.get("missing", {}).get(name, "")
        cells.append("" if not wanted else refused or (shown[name]() if name in derived else missing))
    more = [f"{ratio:.2f}x {name}" for name, ratio in derived.get("ratios", {}).items()]
    missing = derived.get("missing", {})
    more += [f"{name} {missing[name]}" for name in row.get("ratios", {}) if name in missing]
    cells[-2] = "; ".join(filter(None, [cells[-2], *more]))
    if "of_copy_by_index" in derived:
        cells[-3] += f" ({100 * derived['of_copy_by_index']:.0f} % of the copy by index)"
    if "paper_speedup" in row:
        cells[-2] += f" (paper {row['paper_speedup']:.2f}x)"
    return cells


def brief(record: dict) -> str:
    """What ends up on a terminal: every row that has a speedup, or did before it was refused."""
    derive(record)
    lines = []
    for name, part in record["parts"].items():
        rows = [row for row in part["rows"] if "versus" in row or "versus_best_of" in row or name == "ceilings"]
        for cells in (_cells(row, record["context"]["rehearsal"]) for row in rows):
            lines.append(" | ".join([name, cells[0], cells[1], f"{cells[3]} ms", *filter(None, cells[6:9])]))
        lines += [f"{name}: {len(part['skipped'])} skipped"] * bool(part["skipped"])
        lines += [f"{name}: BROKE OFF: {one['what']}" for one in part["broken"]]
    lines += [f"WRONG: {name}" for name in failed(record)[:20]]
    lines += goal_lines(record)
    return "\n".join(lines)


def _wrong(record: dict) -> Iterator[str]:
    """A line per failed check, with what it hides."""
    for check in checks(record):
        if not check["ok"]:
            hides = f"hides what rests on {', '.join(check['about'])}" if check["about"] else "hides no ratio"
            yield f"- **FAILED: {check['name']}** ({hides})"
    for name, what in broken(record):
        if name == "correctness":
            yield f"- **BROKE OFF: {what}** (hides what rests on {EVERYTHING})"


HEADER = ["case", "row", "ms p20", "p50", "p80", "spread", "rate", "of ceiling", "speedup", "share"]


def markdown(record: dict) -> str:
    """The whole run; calls :func:`derive` first."""
    derive(record)
    rehearsal = record["context"]["rehearsal"]
    context = record["context"]
    device = context.get("device", {})
    lines = [
        "# GPU benchmark",
        "",
        f"{device.get('name', 'no device')}, driver {device.get('driver_version', '-')}; "
        + ", ".join(f"{name} {value}" for name, value in context["versions"].items() if value)
        + f"; commit {context['commit']}; {context['date']}",
        "",
        f"The run: {record.get('ended', 'unknown')}.",
    ]
    if rehearsal:
        lines += ["", "**A rehearsal on a CPU with toy sizes: its times mean nothing and are not shown.**"]
    if wrong := list(_wrong(record)):
        lines += ["", *wrong]
    lines += ["", f"{sum(check['ok'] for check in checks(record))} correctness checks passed."]
    lines += ["", "## Goals", "", *(f"- {line}" for line in goal_lines(record))]
    lines += ["", "Times are of one call. Spread: how far the medians of two batches of repeats are apart."]
    for name, part in record["parts"].items():
        lines += ["", f"## {name} ({part['seconds']} s)", ""]
        lines += [*(f"{note}." for note in part["notes"]), ""]
        if part["rows"]:
            lines.append(table(HEADER, [_cells(row, rehearsal) for row in part["rows"]]))
        lines += ["", *(f"- Skipped: {what}" for what in part["skipped"])]
        for one in part["broken"]:
            lines += [f"- BROKE OFF: {one['what']}: {one['traceback'].strip().splitlines()[-1]}"]
    return "\n".join(lines) + "\n"
