"""Ratios and tables. Where a kernel is wrong there are no ratios, in the record as in the table."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu.goals import lines as goal_lines

REFUSED = "not shown: correctness failed"
REFUSED_ENGINE = "not shown: this engine's results are wrong"
UNCHECKED = "not shown: correctness was not checked"
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
    return [check["name"] for check in checks(record) if not check["ok"] and "engine" not in check] + missing


def failed_optional(record: dict) -> list[str]:
    """Names of the failed checks of engines that need not be there."""
    return [check["name"] for check in checks(record) if not check["ok"] and "engine" in check]


def broken(record: dict) -> list[tuple[str, str]]:
    """Part and name of what broke off."""
    return [(name, one["what"]) for name, part in record["parts"].items() for one in part["broken"]]


def why_no_ratios(record: dict) -> str | None:
    """What stands in place of every ratio, None where they may be shown."""
    if failed(record):
        return REFUSED
    return None if record["parts"].get("correctness", {}).get("checks") else UNCHECKED


def wrong_engines(record: dict) -> set[str]:
    """Optional engines of which a result is wrong."""
    return {check["engine"] for check in checks(record) if not check["ok"] and "engine" in check}


def ceilings(record: dict) -> tuple[float, float] | None:
    """Most bytes and operations per second that were measured; None without that part."""
    rows = record["parts"].get("ceilings", {}).get("rows", [])
    bandwidth = [row["moved"] / row["seconds"]["p50"] for row in rows if "moved" in row]
    rate = [row["flops"] / row["seconds"]["p50"] for row in rows if "flops" in row]
    return (max(bandwidth), max(rate)) if bandwidth and rate else None


def copy_rate(record: dict) -> float | None:
    """Bytes per second, read and written, of a plain copy."""
    rows = record["parts"].get("ceilings", {}).get("rows", [])
    return next((row["moved"] / row["seconds"]["p50"] for row in rows if row["row"] == "copy"), None)


def derive(record: dict) -> None:
    """Adds to every row its rate and, where all kernels are right, its ratios."""
    refused_all, best, copy = why_no_ratios(record), ceilings(record), copy_rate(record)
    wrong = wrong_engines(record)
    for part in record["parts"].values():
        right = [row for row in part["rows"] if row.get("engine") not in wrong]
        found = {(row["case"], row["row"]): row for row in right}
        for row in part["rows"]:
            seconds = row["seconds"]["p50"]
            derived = row["derived"] = {}
            refused = refused_all or (REFUSED_ENGINE if row.get("engine") in wrong else None)
            if refused:
                derived["refused"] = refused
            for amount, at in (("moved", 0), ("flops", 1)):
                if amount in row:
                    derived[f"{amount}_per_s"] = row[amount] / seconds
                    if best and not refused:
                        derived["of_ceiling"] = row[amount] / seconds / best[at]
            if refused:
                continue
            if "moved" in row and copy:
                derived["of_copy"] = row["moved"] / seconds / copy
            base = found.get((row["case"], row.get("copied_by")))
            if base:
                derived["of_copy_by_index"] = (row["moved"] / seconds) / (base["moved"] / base["seconds"]["p50"])
            for name, (case, candidates) in row.get("ratios", {}).items():
                bases = [(found[case, one]["seconds"]["p50"], one) for one in candidates if (case, one) in found]
                if bases:
                    base, derived.setdefault("bases", {})[name] = min(bases)
                    derived.setdefault("ratios", {})[name] = base / seconds
            names = row.get("versus_best_of") or ([row["versus"]] if "versus" in row else [])
            case = row.get("versus_case", row["case"])
            bases = [(found[case, name]["seconds"]["p50"], name) for name in names if (case, name) in found]
            if bases:
                base, name = min(bases)
                derived["speedup"], derived["versus"] = base / seconds, name
            base = found.get((row["case"], row.get("share_of")))
            if base:
                derived["share"] = seconds / base["seconds"]["p50"]


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
        cells.append("" if not wanted else refused or (shown[name]() if name in derived else ""))
    more = [f"{ratio:.2f}x {name}" for name, ratio in derived.get("ratios", {}).items()]
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
    lines += [f"WRONG: {name}" for name in [*failed(record), *failed_optional(record)][:20]]
    lines += goal_lines(record)
    return "\n".join(lines)


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
    if wrong := failed(record):
        lines += ["", f"**{len(wrong)} checks FAILED; no ratio is shown:**", *(f"- {name}" for name in wrong[:40])]
    else:
        lines += ["", f"{sum(1 for _ in checks(record))} correctness checks passed."]
    if wrong := failed_optional(record):
        lines += ["", "**An optional engine is WRONG; none of its ratios is shown:**", *(f"- {w}" for w in wrong[:40])]
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
