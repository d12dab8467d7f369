"""PNG plots of a record; needs matplotlib (``pip install '.[bench]'``)."""

from __future__ import annotations

from pathlib import Path

from benchmarks.common import note
from benchmarks.fidelity.rows import FULL, OURS, REFERENCES, ROWS
from benchmarks.fidelity.statistics import ALL

MAIN = 0.1
MODALITIES = {"system": "tab:gray", "text": "tab:blue", "image": "tab:orange", "video": "tab:red"}


def draw(record: dict, folder: Path) -> dict[str, str]:
    """Draws what the record has data for.

    Returns:
        Title -> file name in ``folder``; empty, with a message, where matplotlib is missing.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        note("no plots: matplotlib is not installed (pip install '.[bench]')")
        return {}
    matplotlib.use("Agg")
    summary = record["summary"]
    entries = {(e["row"], e["budget"], e["checkpoint"]): e for e in summary["headline"]}
    pictures = {}
    for title, name, plot in (
        ("Exact answers against budget", "accuracy.png", accuracy),
        ("Sparsity and kept rows per layer", "layers.png", layers),
        ("Kept rows by modality", "modalities.png", modalities),
    ):
        figure = plot(summary, entries)
        if figure is not None:
            figure.savefig(folder / name, dpi=110, bbox_inches="tight", metadata={"Software": None})
            pictures[title] = name
    return pictures


def _axes(rows: int, columns: int, size: tuple[float, float], **options):
    """A figure that no GUI library holds on to, and its axes as a flat list."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def _style(number: int) -> dict:
    return {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number // 10 % 4]}


def accuracy(summary: dict, entries: dict):
    """Headline against budget, a line per policy at its defaults, a panel per checkpoint."""
    names = [name for name in ROWS if any(row == name for row, *_ in entries) and not ROWS[name].is_variant]
    if not names:
        return None
    checkpoints = summary["checkpoints"]
    figure, axes = _axes(1, len(checkpoints), (4.2 * len(checkpoints) + 2, 4.5), sharey=True)
    for ax, checkpoint in zip(axes, checkpoints):
        for number, name in enumerate(names):
            points = sorted(
                (100 * budget, e)
                for (row, budget, c), e in entries.items()
                if (row, c) == (name, checkpoint) and budget
            )
            if not points:
                continue
            width = {"linewidth": 2.5} if name == OURS else {"linewidth": 1.2}
            ax.plot(
                [x for x, _ in points], [100 * e["exact"][0] for _, e in points],
                marker="o", markersize=3, label=name, **_style(number), **width,
            )  # fmt: skip
        for name, style in ((FULL, "-"), ("oracle", "--"), ("all-but-asked", ":")):
            if (name, None, checkpoint) in entries:
                level = 100 * entries[name, None, checkpoint]["exact"][0]
                ax.axhline(level, color="black", linestyle=style, linewidth=0.8, label=name)
        ax.set(title=f"checkpoint {checkpoint}", xlabel="budget, % of the prompt's KV rows", xscale="log")
        ticks = sorted({100 * budget for _, budget, c in entries if budget and c == checkpoint})
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set_ylim(-3, 103)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("exact answers, %")
    handles = {}
    for ax in axes:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    return figure


def _at_main(entries: dict, checkpoint: str) -> dict[str, dict]:
    """Row -> entry at the budget nearest to ``MAIN``, policies at their defaults and references."""
    budgets = {budget for _, budget, c in entries if budget and c == checkpoint}
    if not budgets:
        return {}
    main = min(budgets, key=lambda budget: abs(budget - MAIN))
    names = [name for name, row in ROWS.items() if not row.is_variant]
    found = {name: entries.get((name, main, checkpoint)) for name in names}
    found |= {name: entries.get((name, None, checkpoint)) for name in REFERENCES}
    return {name: entry for name, entry in found.items() if entry}


def layers(summary: dict, entries: dict):
    """Per checkpoint: measured sparsity, and the fraction of its rows that each layer keeps."""
    checkpoints = [
        c for c in summary["checkpoints"] if any("kept_per_layer" in e for e in _at_main(entries, c).values())
    ]
    if not checkpoints:
        return None
    figure, axes = _axes(2, len(checkpoints), (4.2 * len(checkpoints) + 2, 7))
    for column, checkpoint in enumerate(checkpoints):
        above, below = axes[column], axes[column + len(checkpoints)]
        for number, (name, entry) in enumerate(_at_main(entries, checkpoint).items()):
            if name in REFERENCES:
                continue
            for ax, key in ((above, "sparsity_per_layer"), (below, "kept_per_layer")):
                if key in entry:
                    values = [100 * x for x in entry[key]]
                    style = _style(number) | {"marker": "o", "markersize": 3}
                    ax.plot(range(len(values)), values, label=name, **style)
        above.set(title=f"checkpoint {checkpoint}", ylabel="sparsity, %")
        below.set(xlabel="layer", ylabel="kept rows, %")
        for ax in (above, below):
            ax.grid(alpha=0.3)
            ax.xaxis.get_major_locator().set_params(integer=True)
    handles = {}
    for ax in axes:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    return figure


def modalities(summary: dict, entries: dict):
    """What the kept rows hold, per layer and KV head, over all checkpoints."""
    found = {
        name: e["kept_rows_per_modality"]
        for name, e in _at_main(entries, ALL).items()
        if "kept_rows_per_modality" in e and name != "all-but-asked"
    }
    if not found:
        return None
    figure, (ax,) = _axes(1, 1, (8, 0.3 * len(found) + 1.2))
    left = [0.0] * len(found)
    for modality, colour in MODALITIES.items():
        width = [rows.get(modality, 0.0) for rows in found.values()]
        if any(width):
            ax.barh(list(found), width, left=left, color=colour, label=modality)
            left = [a + b for a, b in zip(left, width)]
    ax.invert_yaxis()
    ax.set_xlabel("rows kept, mean over layers and KV heads")
    ax.legend(fontsize=8)
    return figure
