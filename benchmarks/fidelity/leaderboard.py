"""The tables and sentences of LEADERBOARD.md, all computed from the record."""

from __future__ import annotations

import json
from typing import Iterable

from benchmarks.common import table
from benchmarks.fidelity.questions import SIZED, family
from benchmarks.fidelity.rows import COMPARISONS, FILLED, FROM_TWINS, FULL, OURS, PAPERS, REFERENCES, ROWS
from benchmarks.fidelity.statistics import ALL, wilson

MAIN = 0.1  # the budget of the tables that show one
ORACLE = "oracle"


def compact(record: dict) -> str:
    """JSON with one line per entry of the long lists, so that it is short and can be compared."""
    record = json.loads(json.dumps(record))
    parts, long_lists = record | {"summary": {}}, {}
    for name, value in record["summary"].items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            long_lists[name] = value
            value = f"<{name}>"
        parts["summary"][name] = value
    text = json.dumps(parts, indent=2)
    for name, entries in long_lists.items():
        lines = ",\n".join("      " + json.dumps(entry, separators=(",", ":")) for entry in entries)
        text = text.replace(f'"<{name}>"', f"[\n{lines}\n    ]")
    return text + "\n"


def percent(value: float) -> str:
    return f"{100 * value:.0f}"


def interval(estimate: list[float]) -> str:
    """"83 [75, 89]", in percent."""
    mean, low, high = (percent(x) for x in estimate)
    return f"{mean} [{low}, {high}]"


def points(estimate: list[float]) -> str:
    """"+8.3 [+1.0, +15.1]", in percentage points; bold where the interval leaves out 0."""
    mean, low, high = (f"{100 * x:+.1f}" for x in estimate)
    text = f"{mean} [{low}, {high}]"
    return f"**{text}**" if estimate[1] > 0 or estimate[2] < 0 else text


def label(budget: float | None) -> str:
    return "-" if budget is None else f"{100 * budget:g}%"


class Board:
    """Looks things up in one record, and writes its sections.

    Args:
        record: what ``fidelity.json`` holds.
        pictures: title -> file name of the plots.
    """

    def __init__(self, record: dict, pictures: dict[str, str]) -> None:
        self.record, self.pictures = record, pictures
        self.summary = record["summary"]
        self.checkpoints, self.tasks = self.summary["checkpoints"], self.summary["tasks"]
        self.first = self.checkpoints[0]
        self.headline = {(e["row"], e["budget"], e["checkpoint"]): e for e in self.summary["headline"]}
        self.cell = {
            (e["row"], e["budget"], e["checkpoint"], e["task"]): e for e in self.summary["cells"]
        }
        self.paired = {
            (e["a"], e["b"], e["budget"], e["scope"], e["checkpoint"]): e["difference"]
            for e in self.summary["paired"]
        }
        budgets = sorted({e["budget"] for e in self.summary["cells"]} - {None})
        self.budgets = budgets
        self.main = min(budgets, key=lambda b: abs(b - MAIN)) if budgets else None

    def score(self, row: str, budget: float | None, checkpoint: str = ALL) -> float:
        """For sorting; rows without a headline go last."""
        entry = self.headline.get((row, budget, checkpoint)) or self.headline.get((row, None, checkpoint))
        return entry["exact"][0] if entry else -1.0

    def rows(self, budget: float | None, references: bool = False) -> list[str]:
        """The rows that were measured at ``budget``, but for those from twins; best headline first."""
        measured = (e["row"] for e in self.summary["cells"] if e["budget"] == budget)
        rows = dict.fromkeys(row for row in measured if row not in FROM_TWINS)
        if references:
            rows |= dict.fromkeys(e["row"] for e in self.summary["cells"] if e["budget"] is None)
        return sorted(rows, key=lambda row: -self.score(row, budget))

    def pooled(self, row: str, budget: float | None, task: str) -> list[float] | None:
        """[mean, low, high] of exact matches over all checkpoints' questions."""
        found = []
        for checkpoint in self.checkpoints:
            for at in (budget, None):
                cell = self.cell.get((row, at, checkpoint, task))
                if cell:
                    found.append(cell)
                    break
        if not found:
            return None
        count = sum(cell["n"] for cell in found)
        return list(wilson(round(sum(cell["exact"][0] * cell["n"] for cell in found)), count))

    def sections(self) -> Iterable[tuple[str, str]]:
        """(heading, text)."""
        yield "How it was measured", self.context()
        if self.budgets:
            yield f"Headline at {label(self.main)}", self.headline_table()
            yield f"Exact answers at {label(self.main)}, by task", self.task_table()
            yield "Headline by budget", self.budget_tables()
            yield f"{OURS} against every other row, on the same questions", self.paired_table()
        yield "Reference rows", self.reference_table()
        if self.budgets:
            yield f"Per checkpoint at {label(self.main)}", self.checkpoint_table()
            yield f"Where {OURS} loses", self.losses()
            yield "Decoys", self.decoys()
            yield "Pictures of other sizes", self.sizes()
            yield "Turns: from exact prefixes and from twins", self.later_turns()
            yield "One thing changed", self.comparisons()
            yield "Beside the papers' orderings", self.papers()
        yield "Not applicable", self.left_out()
        if self.pictures:
            yield "Plots", "\n\n".join(f"![{t}]({name})" for t, name in self.pictures.items())

    def context(self) -> str:
        record = self.record
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        rates = ", ".join(
            f"{name}: {r['requests']} requests at {r['per_second']}/s" for name, r in record["rates"].items()
        )
        headline = ", ".join(self.summary["headline_tasks"])
        seeds = "{} to {}".format(*self.summary["seeds"]) + " (tuning)" * record["tuning"]
        lines = [
            f"    {record['command']}",
            "",
            f"Commit {record['commit'][:12]}{'-dirty' * record['commit'].endswith('-dirty')}, {versions}, "
            f"{record['cores']} cores of {record['cpu']}, {record['date']}. {self.summary['samples']} samples per "
            f"task and checkpoint, seeds {seeds}; checkpoints {', '.join(self.checkpoints)}. {rates}.",
            "",
            f"Headline: the mean of exact answers over {headline}. Means over checkpoints weigh them "
            "alike. Brackets: 95% intervals (Wilson for one task, bootstrap over samples otherwise); "
            "differences are paired, on the same questions, and bold where the interval leaves out 0, "
            "with no correction for how many there are.",
        ]
        for old in record.get("resumed", []):
            lines += ["", f"Resumed; before: `{old['command']}` at {old['commit'][:12]}, {old['date']}."]
        return "\n".join(lines)

    def headline_table(self) -> str:
        lines = []
        for row in self.rows(self.main, references=True):
            entry = self.headline.get((row, self.main, ALL)) or self.headline.get((row, None, ALL))
            if entry is None:
                continue
            modalities = entry.get("kept_rows_per_modality", {})
            total = sum(modalities.values())
            visual = sum(modalities.get(name, 0) for name in ("image", "video"))
            lines.append(
                [row, interval(entry["exact"])]
                + [interval(entry["items"]) if "items" in entry else "-"]
                + [f"{100 * entry['agreement'][0]:.1f}", f"{entry['kl'][0]:.3f}"]
                + [f"{100 * entry['kept']:.2f}", percent(visual / total) if total else "-"]
            )
        header = ["row", "exact %", "digits %", "tokens as full %", "KL nats", "kept %", "of it visual %"]
        return table(header, lines)

    def task_table(self) -> str:
        lines = []
        tasks = [task for task in self.tasks if task not in SIZED]
        for row in self.rows(self.main, references=True):
            found = [self.pooled(row, self.main, task) for task in tasks]
            lines.append([row, *(interval(e) if e else "-" for e in found)])
        return table(["row", *tasks], lines)

    def budget_tables(self) -> str:
        parts = []
        groups = [(ALL, f"Over {', '.join(self.checkpoints)}:")] if len(self.checkpoints) > 1 else []
        for checkpoint, title in [*groups, (self.first, f"Checkpoint {self.first}:")]:
            wanted = self.checkpoints if checkpoint == ALL else [checkpoint]
            have = [
                budget
                for budget in self.budgets
                if any(
                    e["budget"] == budget and e["checkpoint"] == checkpoint
                    for e in self.summary["headline"]
                    if checkpoint != ALL or e.get("checkpoints") == wanted
                )
            ]
            if not have:
                continue
            rows = [row for row in self.rows(self.main) if (row, self.main, checkpoint) in self.headline]
            lines = []
            for row in sorted(rows, key=lambda row: -self.score(row, self.main, checkpoint)):
                found = [self.headline.get((row, budget, checkpoint)) for budget in have]
                lines.append([row, *(interval(e["exact"]) if e else "-" for e in found)])
            parts.append(title + "\n\n" + table(["row", *map(label, have)], lines))
        return "\n\n".join(parts) or "No row answered every headline task."

    def paired_table(self) -> str:
        others = list(dict.fromkeys(b for a, b, _, s, c in self.paired if a == OURS and s == "headline"))
        budgets = sorted({x for a, _, x, s, _ in self.paired if a == OURS and s == "headline"})
        if not others:
            return f"{OURS} was not measured with another row."
        lines = []
        for other in sorted(others, key=lambda row: -self.score(row, self.main)):
            found = [self.paired.get((OURS, other, x, "headline", ALL)) for x in budgets]
            lines.append([f"{OURS} - {other}", *(points(d) if d else "-" for d in found)])
        text = "Headline, percentage points."
        for x in budgets:
            measured = self.headline.get((OURS, x, ALL), {}).get("checkpoints", self.checkpoints)
            if measured != self.checkpoints:
                text += f" {label(x)}: {', '.join(measured)} only."
        return text + "\n\n" + table(["", *map(label, budgets)], lines)

    def reference_table(self) -> str:
        rows = [row for row in (FULL, *REFERENCES) if any(e["row"] == row for e in self.summary["cells"])]
        lines = []
        for row in rows:
            cells = [e for e in self.summary["cells"] if e["row"] == row]
            lines.append(
                [row]
                + [f"{100 * sum(e['kept'][0] for e in cells) / len(cells):.1f}"]
                + [interval(e) if (e := self.pooled(row, None, task)) else "-" for task in self.tasks]
            )
        text = (
            "`oracle` keeps all text and the cells that the answer needs; `all-but-asked` keeps "
            "everything but those cells, `text-only` no visual token. Every digit of an answer is decoded "
            "after the compaction, so the last two should be at chance: 10% per digit. A model that never "
            f"saw so few visual tokens may fail on `oracle`; `{FILLED}`, among the rows with a budget, "
            "keeps the latest positions beside the same cells.\n\n"
        )
        return text + table(["row", "kept %", *self.tasks], lines)

    def checkpoint_table(self) -> str:
        lines = []
        for row in self.rows(self.main, references=True):
            found = [
                self.headline.get((row, self.main, c)) or self.headline.get((row, None, c))
                for c in self.checkpoints
            ]
            lines.append([row, *(interval(e["exact"]) if e else "-" for e in found)])
        text = table(["row", *self.checkpoints], lines)
        rows = [row for row in self.rows(self.main) if row != FILLED and self.score(row, self.main) >= 0]
        if not rows:
            return text
        best = {c: max(rows, key=lambda row: self.score(row, self.main, c)) for c in self.checkpoints}
        return f"{text}\n\nBest: " + "; ".join(f"{row} on {c}" for c, row in best.items()) + "."

    def losses(self) -> str:
        """Every task and budget where another row is better by an interval that leaves out 0."""
        lines = []
        for (a, b, budget, scope, checkpoint), found in self.paired.items():
            if a == OURS and b not in (FULL, FILLED, *REFERENCES) and found[2] < 0:
                lines.append([b, scope, checkpoint, label(budget), points(found)])
        if not lines:
            return f"No row is better than {OURS} on a task or checkpoint beyond the noise of these samples."
        lines.sort(key=lambda line: (line[1] != "headline", line[1], line[0]))
        text = f"{len(lines)} comparisons where the interval of {OURS} - row lies below 0:\n\n"
        return text + table(["row", "scope", "checkpoint", "budget", "difference"], lines)

    def decoys(self) -> str:
        if not {"decoys", "multi"} <= set(self.tasks):
            return "Not measured."
        lines = []
        for row in self.rows(self.main, references=True):
            plain, hard = (self.pooled(row, self.main, task) for task in ("multi", "decoys"))
            if plain and hard:
                lines.append([row, interval(plain), interval(hard), f"{100 * (hard[0] - plain[0]):+.0f}"])
        text = "Letters and shapes in the colours that the question names, at the main budget.\n\n"
        return text + table(["row", "multi", "decoys", "points"], lines)

    def sizes(self) -> str:
        tasks = [task for task in self.tasks if task in SIZED]
        if not tasks:
            return "Not measured."
        parts = []
        for budget in self.budgets:
            wanted = [t for t in tasks if any((row, budget, self.first, t) in self.cell for row in ROWS)]
            if not wanted:
                continue
            lines = []
            for row in self.rows(budget, references=True):
                found = [self.pooled(row, budget, task) for task in wanted]
                if any(found):
                    lines.append([row, *(interval(e) if e else "-" for e in found)])
            parts.append(f"At {label(budget)}:\n\n" + table(["row", *wanted], lines))
        return "\n\n".join(parts)

    def later_turns(self) -> str:
        entries = self.summary["later_turns"]
        if not entries:
            return "Not measured."
        parts = [
            "From exact prefixes, the policy selects anew for every turn, out of the whole prompt. From "
            "twins, what it kept for turn 1 and every later token stay. Only questions that all three "
            "answered; the difference is in points. Samples that only turns were asked for count here alone."
        ]
        order = list(FROM_TWINS)
        header = ["", "budget", "questions", "full", "exact", "kept %", "twins", "kept %", "twins - exact"]
        for turn in dict.fromkeys(e["turn"] for e in entries):
            own = [e for e in entries if e["turn"] == turn]
            lines = [
                [FROM_TWINS[e["row"]], label(e["budget"]), str(e["n"]), interval(e["full"])]
                + [interval(e["exact"]), f"{100 * e['kept_exact'][0]:.1f}"]
                + [interval(e["twins"]), f"{100 * e['kept_twins'][0]:.1f}", points(e["difference"])]
                for e in sorted(own, key=lambda e: (order.index(e["row"]), e["budget"]))
            ]
            parts.append(f"{turn.capitalize()}:\n\n{table(header, lines)}")
        return "\n\n".join(parts)

    def comparisons(self) -> str:
        """Pairs that differ in one option."""
        parts = []
        for topic, pairs in COMPARISONS.items():
            sentences = []
            for a, b in pairs:
                at = {x: d for (p, q, x, s, c), d in self.paired.items()
                      if (p, q, s, c) == (a, b, "headline", ALL)}  # fmt: skip
                if at:
                    found = "; ".join(f"{label(x)}: {points(d)}" for x, d in sorted(at.items()))
                    own = f"At {label(self.main)} by checkpoint: {self.per_checkpoint(a, b)}."
                    sentences.append(f"- {a} - {b}: {found}. {self.verdict(a, b, at)} {own}")
            if sentences:
                parts.append(f"{topic}\n\n" + "\n".join(sentences))
        return "\n\n".join(parts) or "None of the pairs was measured."

    def per_checkpoint(self, a: str, b: str) -> str:
        """"a +3, b -1": points at the main budget."""
        keys = {c: (a, b, self.main, "headline", c) for c in self.checkpoints}
        found = {c: self.paired[key] for c, key in keys.items() if key in self.paired}
        return ", ".join(f"{c} {100 * d[0]:+.0f}" for c, d in found.items())

    @staticmethod
    def verdict(a: str, b: str, at: dict[float, list[float]]) -> str:
        """A sentence over all budgets."""
        better = [label(x) for x, d in sorted(at.items()) if d[1] > 0]
        worse = [label(x) for x, d in sorted(at.items()) if d[2] < 0]
        parts = [f"{a} is better at {', '.join(better)}"] * bool(better)
        parts += [f"{b} is better at {', '.join(worse)}"] * bool(worse)
        return " and ".join(parts) + "." if parts else "No difference that these samples show."

    def papers(self) -> str:
        lines = []
        for a, b, figures in PAPERS:
            found = self.paired.get((a, b, self.main, "headline", ALL))
            if not found:
                continue
            verdict = "no difference shown"
            if found[1] > 0:
                verdict = f"{a} is better"
            elif found[2] < 0:
                verdict = f"{b} is better"
            lines.append([f"{a} : {b}", figures, points(found), verdict, self.per_checkpoint(a, b)])
        if not lines:
            return "None of the pairs was measured."
        text = (
            f"Differences of the headline at {label(self.main)}, in points. The papers' figures were read in "
            "third-party summaries, not in the PDFs, and are of other models and tasks: the order is "
            "comparable, the size is not.\n\n"
        )
        return text + table(["pair", "papers", "here, points", "so", "per checkpoint"], lines)

    def left_out(self) -> str:
        entries = self.summary["not_applicable"]
        if not entries:
            return "Every request was compacted."
        lines = {}
        for e in entries:
            key = (e["reason"], family(e["task"]), label(e["budget"]))
            lines.setdefault(key, [0, set()])
            lines[key][0] += e["n"]
            lines[key][1].add(e["row"])
        return table(
            ["reason", "task", "budget", "rows", "requests"],
            [[*key, str(len(rows)), str(count)] for key, (count, rows) in sorted(lines.items())],
        )


def render(record: dict, pictures: dict[str, str]) -> str:
    """LEADERBOARD.md.

    Args:
        record: what ``fidelity.json`` holds.
        pictures: title -> file name, beside the text.
    """
    board = Board(record, pictures)
    parts = ["# Fidelity: what a KV-cache policy costs in answers"]
    parts += [f"## {heading}\n\n{text}" for heading, text in board.sections()]
    return "\n\n".join(parts) + "\n"
