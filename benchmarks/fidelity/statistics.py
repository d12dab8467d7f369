"""Means with 95% confidence intervals, paired differences, and the summary of all records.

A record is the dict that ``metrics.measure`` makes, with ``checkpoint``, ``task``, ``seed``, ``row``
and ``budget`` (None for rows without one), or with ``not_applicable``, a reason, in place of measures.
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import cache
from typing import Iterable, NamedTuple, Sequence
from zlib import crc32

import numpy as np

from benchmarks.fidelity.questions import COLUMNS, HEADLINE, TURNS, family
from benchmarks.fidelity.rows import COMPARISONS, CORE, FROM_TWINS, FULL, OURS, PAPERS

RESAMPLES = 1000
MEASURES = ("exact", "items", "agreement", "kl")
ALL = "all"  # checkpoints


class Estimate(NamedTuple):
    """A mean and the ends of its 95% confidence interval."""

    mean: float
    low: float
    high: float

    def rounded(self) -> list[float]:
        return [round(float(x), 5) for x in self]


def wilson(successes: int, count: int) -> Estimate:
    """The Wilson score interval of a proportion."""
    z = 1.959964
    share = successes / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return Estimate(share, max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale))


@cache
def resamples(count: int, name: str) -> np.ndarray:
    """Weights ``[RESAMPLES, count]`` of samples drawn with replacement; rows sum to 1. Seeded by ``name``."""
    rng = np.random.default_rng(crc32(name.encode()))
    drawn = rng.integers(0, count, (RESAMPLES, count))
    weights = np.zeros((RESAMPLES, count))
    np.add.at(weights, (np.arange(RESAMPLES)[:, None], drawn), 1 / count)
    return weights


def bootstrap(values: Sequence[float], name: str = "") -> Estimate:
    """The percentile interval of a mean."""
    values = np.asarray(values, dtype=float)
    means = resamples(len(values), name) @ values
    return Estimate(values.mean(), *np.percentile(means, [2.5, 97.5]))


def mean_of_means(groups: dict[tuple[str, str], np.ndarray]) -> Estimate:
    """The mean over checkpoints of the mean over columns of the mean over samples.

    Args:
        groups: (checkpoint, family) -> values ``[samples, columns]``. Samples are drawn anew within a
            group, all columns of a sample together.
    """
    columns = defaultdict(list)  # checkpoint -> the columns' means [RESAMPLES + 1]
    for (checkpoint, name), values in groups.items():
        weights = np.vstack(
            [np.full(len(values), 1 / len(values)), resamples(len(values), f"{checkpoint} {name}")]
        )
        columns[checkpoint] += list((weights @ values).T)
    means = np.mean([np.mean(own, axis=0) for own in columns.values()], axis=0)
    return Estimate(means[0], *np.percentile(means[1:], [2.5, 97.5]))


Values = dict[tuple[str, str], dict[int, float]]  # (checkpoint, task) -> seed -> value


def grouped(values: Values, checkpoints: Iterable[str], tasks: Iterable[str]) -> dict | None:
    """``mean_of_means``' argument, over the seeds that all columns of a family have.

    None if a column of a checkpoint has no value at all.
    """
    families = defaultdict(list)
    for task in tasks:
        families[family(task)].append(task)
    groups = {}
    for checkpoint in checkpoints:
        for name, columns in families.items():
            own = [values.get((checkpoint, column), {}) for column in columns]
            seeds = sorted(set.intersection(*(set(column) for column in own)))
            if not seeds:
                return None
            groups[checkpoint, name] = np.array([[column[s] for column in own] for s in seeds], dtype=float)
    return groups


def difference(a: Values, b: Values) -> Values:
    """``a - b`` on the questions that both answered."""
    return {
        key: {seed: value - b[key][seed] for seed, value in own.items() if seed in b[key]}
        for key, own in a.items()
        if key in b
    }


def shared(values: Sequence[Values]) -> list[Values]:
    """The same, on the questions that all have."""
    keys = [key for key in values[0] if all(key in own for own in values)]
    seeds = {key: set.intersection(*(set(own[key]) for own in values)) for key in keys}
    return [{key: {seed: own[key][seed] for seed in sorted(seeds[key])} for key in keys} for own in values]


class Table:
    """All records, by row and budget."""

    def __init__(self, records: Iterable[dict]) -> None:
        self.records = list(records)
        self.measured = [r for r in self.records if "not_applicable" not in r]
        self.checkpoints = list(dict.fromkeys(r["checkpoint"] for r in self.records))
        tasks = dict.fromkeys(r["task"] for r in self.records)
        self.tasks = [t for t in COLUMNS if t in tasks] + [t for t in tasks if t not in COLUMNS]
        self.headline = [t for t in HEADLINE if t in self.tasks] or self.tasks
        self._by_key = defaultdict(list)
        self._values: dict[tuple, Values] = {}
        for record in self.measured:
            self._by_key[record["row"], record["budget"]].append(record)
            for measure in (*MEASURES, "kept"):
                if measure in record:
                    values = self._values.setdefault((record["row"], record["budget"], measure), {})
                    column = values.setdefault((record["checkpoint"], record["task"]), {})
                    column[record["seed"]] = record[measure]

    @property
    def keys(self) -> list[tuple[str, float | None]]:
        """Every (row, budget)."""
        return list(self._by_key)

    def of(self, row: str, budget: float | None) -> list[dict]:
        return self._by_key[row, budget]

    def values(self, row: str, budget: float | None, measure: str) -> Values:
        """Also of a row without budgets, whatever the budget."""
        return self._values.get((row, budget, measure)) or self._values.get((row, None, measure), {})

    def with_headline(self, values: Values) -> list[str]:
        """The checkpoints on which every headline column has values."""
        return [c for c in self.checkpoints if all(values.get((c, t)) for t in self.headline)]

    def estimate(self, values: Values, checkpoint: str, tasks: list[str]) -> Estimate | None:
        """Over one checkpoint, or over ``ALL`` that have values for each of ``tasks``."""
        chosen = [checkpoint]
        if checkpoint == ALL:
            chosen = [c for c in self.checkpoints if all(values.get((c, t)) for t in tasks)]
        groups = grouped(values, chosen, tasks) if chosen else None
        return mean_of_means(groups) if groups else None


def cells(table: Table) -> list[dict]:
    """Per row, budget, checkpoint and task."""
    result = []
    for row, budget in table.keys:
        own = defaultdict(list)
        for record in table.of(row, budget):
            own[record["checkpoint"], record["task"]].append(record)
        for (checkpoint, task), records in own.items():
            cell = dict(row=row, budget=budget, checkpoint=checkpoint, task=task, n=len(records))
            cell["exact"] = wilson(sum(r["exact"] for r in records), len(records)).rounded()
            for measure in MEASURES[1:]:
                if measure in records[0]:
                    cell[measure] = bootstrap([r[measure] for r in records]).rounded()
            differ = [r["first_difference"] for r in records if r["first_difference"] is not None]
            cell["first_difference"] = round(float(np.mean(differ)), 2) if differ else None
            kept = [r["kept"] for r in records]
            cell["kept"] = [round(x, 5) for x in (float(np.mean(kept)), min(kept), max(kept))]
            result.append(cell)
    return result


def headlines(table: Table) -> list[dict]:
    """Per row, budget and checkpoint, and over all: means over the headline columns."""
    result = []
    for row, budget in table.keys:
        for checkpoint in (*table.checkpoints, ALL):
            entry = dict(row=row, budget=budget, checkpoint=checkpoint)
            for measure in MEASURES:
                values = table.values(row, budget, measure)
                estimate = table.estimate(values, checkpoint, table.headline)
                if estimate:
                    entry[measure] = estimate.rounded()
            if "exact" not in entry:
                continue
            entry["checkpoints"] = (
                table.with_headline(table.values(row, budget, "exact")) if checkpoint == ALL else [checkpoint]
            )
            entry |= kept(
                r
                for r in table.of(row, budget)
                if r["checkpoint"] in entry["checkpoints"] and r["task"] in table.headline
            )
            result.append(entry)
    return result


def kept(records: Iterable[dict]) -> dict:
    """Means of what stayed: fraction, rows per layer and modality, sparsity per layer."""
    records = list(records)
    result = {"kept": round(float(np.mean([r["kept"] for r in records])), 5)}
    compacted = [r for r in records if "kept_per_layer" in r]
    if not compacted or len({len(r["kept_per_layer"]) for r in compacted}) > 1:
        return result
    layers = np.array([np.divide(r["kept_per_layer"], r["prompt_tokens"]) for r in compacted])
    result["kept_per_layer"] = [round(float(x), 4) for x in layers.mean(0)]
    sparse = [r["sparsity_per_layer"] for r in compacted if r["sparsity_per_layer"]]
    if sparse:
        result["sparsity_per_layer"] = [round(float(x), 4) for x in np.mean(sparse, axis=0)]
    rows = defaultdict(float)
    for record in compacted:
        total = sum(record["kept_per_modality"].values())
        per_head = sum(record["kept_per_layer"]) / len(record["kept_per_layer"])
        for modality, count in record["kept_per_modality"].items():
            rows[modality] += count / total * per_head / len(compacted)
    result["kept_rows_per_modality"] = {modality: round(x, 2) for modality, x in rows.items()}
    return result


def paired(table: Table) -> list[dict]:
    """Differences of exact matches, a - b, on the same questions.

    ``scope`` is ``headline``, per checkpoint and over all of them, or a task, over all.
    """
    rows = list(dict.fromkeys(row for row, _ in table.keys))
    pairs = [(OURS, row) for row in rows if row != OURS and row not in FROM_TWINS]
    pairs += [pair for topic in COMPARISONS.values() for pair in topic] + [(a, b) for a, b, _ in PAPERS]
    result = []
    for a, b in dict.fromkeys(pairs):
        for budget in sorted({budget for row, budget in table.keys if row == a and budget}):
            values = difference(table.values(a, budget, "exact"), table.values(b, budget, "exact"))
            scopes = [("headline", c, table.headline) for c in (*table.checkpoints, ALL)]
            if budget in CORE:
                scopes += [(task, ALL, [task]) for task in table.tasks]
            for scope, checkpoint, tasks in scopes:
                estimate = table.estimate(values, checkpoint, tasks)
                if estimate:
                    entry = dict(a=a, b=b, budget=budget, scope=scope, checkpoint=checkpoint)
                    result.append(entry | {"difference": estimate.rounded()})
    return result


def later_turns(table: Table) -> list[dict]:
    """Exact matches from twins, from exact KV and of the full cache, over all checkpoints.

    Per row from twins, budget and turn, on the questions that all three answered.
    """
    result = []
    for row, budget in table.keys:
        if row not in FROM_TWINS:
            continue
        exact = FROM_TWINS[row]
        asked = {
            "twins": (row, "exact"), "exact": (exact, "exact"), "full": (FULL, "exact"),
            "kept_twins": (row, "kept"), "kept_exact": (exact, "kept"),
        }  # fmt: skip
        own = shared([table.values(name, budget, measure) for name, measure in asked.values()])
        measures = dict(zip(asked, own)) | {"difference": difference(own[0], own[1])}
        for turn in TURNS[1:]:
            count = sum(len(seeds) for (_, task), seeds in own[0].items() if task == turn)
            if count:
                entry = dict(row=row, budget=budget, turn=turn, n=count)
                for name, values in measures.items():
                    entry[name] = table.estimate(values, ALL, [turn]).rounded()
                result.append(entry)
    return result


def summary(records: Iterable[dict]) -> dict:
    """Every aggregate, as JSON values.

    ``later_turns`` counts all samples, the rest of the turns' only those that other tasks have too.
    """
    everything = list(records)
    seeds = {r["seed"] for r in everything if r["task"] not in TURNS}
    table = Table(r for r in everything if r["task"] not in TURNS or not seeds or r["seed"] in seeds)
    asked = sorted({r["seed"] for r in table.records})
    left_out = defaultdict(int)
    for r in everything:
        if "not_applicable" in r:
            left_out[r["row"], r["budget"], r["task"], r["not_applicable"]] += 1
    return {
        "checkpoints": table.checkpoints,
        "tasks": table.tasks,
        "headline_tasks": table.headline,
        "requests": sum("not_applicable" not in r for r in everything),
        "samples": len(asked),
        "seeds": [asked[0], asked[-1]],
        "later_turns": later_turns(Table(everything)),
        "headline": headlines(table),
        "paired": paired(table),
        "cells": cells(table),
        "not_applicable": [
            dict(row=row, budget=budget, task=task, reason=reason, n=count)
            for (row, budget, task, reason), count in left_out.items()
        ],
    }
