"""A state as text for a terminal of any size. Every colour comes with a sign or a word of its own."""

from __future__ import annotations

from typing import Callable, NamedTuple

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sglang_vlkv.monitor.state import Request, State, means
from sglang_vlkv.monitor.words import BLOCKS, bars_of, count, duration, percent, resample, size_of, times
from sglang_vlkv.observe.events import PREFIX_KINDS
from sglang_vlkv.observe.publisher import SCHEMA
from sglang_vlkv.printable import printable

SILENT_SECONDS = 5.0  # a server says something every two
MINIMUM = 20, 5  # columns and lines that anything is drawn in


class Use(NamedTuple):
    """A part of the pool: its sign in the bar, its name, its style and its slots."""

    sign: str
    name: str
    style: str
    slots: int


class Section(NamedTuple):
    height: int
    body: RenderableType


def view(
    state: State, source: str, now: float | None, width: int, height: int, hint: str = ""
) -> Group:
    """The whole screen.

    Args:
        source: where the messages come from.
        now: unix seconds, by the clock that messages are received by; None in a replay.
        width, height: of the terminal. What finds no room is left out, the most detailed first.
        hint: what a user can do, for the last line.
    """
    width, height = max(width, MINIMUM[0]), max(height, MINIMUM[1])
    head, foot = header(state, source, now, width), footer(state, width, hint)
    if not state.replicas:
        return Group(*head, *waiting(state, source), foot)
    room = height - len(head) - 1
    sections = []
    for section in (_pool(state, width), *_panels(state, width)):
        if section.height > room:
            break
        sections.append(section.body)
        room -= section.height
    if room >= 4:
        sections.append(recent(state, width, room))
    return Group(*head, *sections, foot)


def header(state: State, source: str, now: float | None, width: int) -> list[Text]:
    server = state.server
    if now is None:
        sign = Text("▸ replay", "cyan")
    elif state.last is None:
        sign = Text("○ waiting", "yellow")
    elif now - state.last > SILENT_SECONDS:
        sign = Text(f"○ silent for {duration(now - state.last)}", "bold red")
    else:
        sign = Text("● live", "green")
    first = _apart(Text(printable(source), "bold"), sign, width)
    if not server:
        return [first]
    words = [printable(server["model"].rstrip("/").rsplit("/", 1)[-1]), printable(server["policy"])]
    if server["policy"] != "none":
        words[-1] += f" {percent(server['budget'])}"
    words.append(f"twins {printable(server['options']['twins'])}")
    if server["options"]["allow_override"]:
        words.append("requests choose")
    if len(state.replicas) > 1:
        words.append(f"{len(state.replicas)} replicas")
    words.append(f"up {duration(state.now - server['started'])}")
    return [first, _fit(Text(" · ".join(words)), width)]


def waiting(state: State, source: str) -> list[RenderableType]:
    lines = [Text(f"waiting for {printable(source)}", "bold")]
    if state.foreign:
        schemas = printable(", ".join(sorted(state.foreign)))
        lines.append(Text(f"messages of schema {schemas} arrive; this version reads schema {SCHEMA}", "red"))
    else:
        lines.append(Text("start a server with --kv-policy and --kv-events-endpoint"))
    return [Padding(Group(*lines), (1, 2))]


def footer(state: State, width: int, hint: str) -> Text:
    """What the numbers above have not seen."""
    lost = []
    if state.missed:
        lost.append(f"{state.missed:,} lost on the way: read too slowly")
    if state.dropped:
        lost.append(f"{state.dropped:,} dropped by the server")
    if state.replicas and state.foreign:
        lost.append(f"{state.foreign.total():,} of another schema")
    if restarts := sum(replica.restarts for replica in state.replicas.values()):
        lost.append(f"server restarted {times(restarts)}")
    seen = f"{state.messages:,} messages"
    if lost:
        text = Text.assemble(f"{seen} · ", (f"! {', '.join(lost)}", "bold red"))
    else:
        text = Text(f"{seen}, none lost" if state.replicas else "")
    return _apart(text, Text(hint, "dim"), width)


def _pool(state: State, width: int) -> Section:
    inner = width - 4
    size, parts = state.pool("size"), pool_parts(state)
    requests = f"{state.pool('running')} requests run, {state.pool('waiting')} wait"
    title = f"Pool of {count(size)} slots, {size_of(state.bytes('size'))}: {requests}"
    legend = [
        Text.assemble((part.sign, part.style), f" {part.name} {percent(part.slots / size if size else 0)}")
        for part in parts
    ]
    if sum(map(len, legend)) + 3 * len(legend) > inner:
        half = inner // 2
        lines = [_columns(legend[i : i + 2], [half, inner - half]) for i in (0, 2)]
    else:
        lines = [Text("   ").join(legend)]
    return _panel(title, [_bar(parts, size, inner), *lines], width)


def pool_parts(state: State) -> list[Use]:
    """All slots, each in one part."""
    idle = state.pool("twins") - state.pool("twins_read")
    free, evictable = state.pool("free"), state.pool("evictable")
    held = state.pool("size") - free - evictable
    return [
        Use("█", "requests", "cyan", held),
        Use("▓", "twins", "magenta", idle),
        Use("▒", "exact cache", "yellow", evictable - idle),
        Use("░", "free", "dim", free),
    ]


def _bar(parts: list[Use], size: int, width: int) -> Text:
    """What is not empty takes a cell at least."""
    bar, used = Text(), 0
    if not size:
        return bar
    cells = [max(part.slots > 0, round(width * part.slots / size)) for part in parts]
    cells[cells.index(max(cells))] += width - sum(cells)
    for part, number in zip(parts, cells, strict=True):
        bar.append(part.sign * min(number, width - used), part.style)
        used += number
    return bar


def _panels(state: State, width: int) -> list[Section]:
    if width >= 76:
        rows = [
            {"Memory kept of compacted prompts": _kept, "Layers, first to last": _layers},
            {"Prefixes found": _prefixes, "Twins": _twins, "Per second": _rates},
        ]
    else:
        rows = [
            {"Memory kept": _kept, "Twins": _twins},
            {"Prefixes found": _prefixes, "Per second": _rates},
            {"Layers, first to last": _layers},
        ]
    return [_row(state, row, width) for row in rows]


def _row(state: State, row: dict[str, Callable[[State, int], list[Text]]], width: int) -> Section:
    """Panels side by side, by title."""
    widths = [width // len(row)] * len(row)
    widths[-1] += width - sum(widths)
    panels = zip(row.items(), widths, strict=True)
    cells = [_panel(title, fill(state, w - 4), w) for (title, fill), w in panels]
    grid = Table.grid()
    for w in widths:
        grid.add_column(width=w)
    grid.add_row(*(cell.body for cell in cells))
    return Section(max(cell.height for cell in cells), grid)


def _kept(state: State, width: int) -> list[Text]:
    if not state.full_total:
        return [Text("nothing compacted yet", "dim"), Text(), Text(), Text()]
    mean = percent(state.kept_total / state.full_total)
    freed = size_of(state.full_total - state.kept_total)
    shares = resample(state.histogram, width)
    bars = bars_of([share / max(shares) for share in shares], width)
    return [
        Text(f"mean {mean}, last {percent(state.kept_last)}"),
        Text(bars, "cyan"),
        Text("0%" + "100%".rjust(len(bars) - 2), "dim"),
        Text(f"{state.kinds['compacted']:,} prompts, {freed} freed"),
    ]


def _layers(state: State, width: int) -> list[Text]:
    lines = []
    for name, style, past in (("rows kept", "cyan", state.layers), ("sparsity", "yellow", state.sparsity)):
        if past:
            shares = means(past)
            least, most = min(shares), max(shares)
            lines.append(Text(f"{name}, {BLOCKS[0]} {percent(least)} to {BLOCKS[-1]} {percent(most)}"))
            heights = [(share - least) / (most - least or 1) * 7 / 8 + 1 / 8 for share in shares]
            lines.append(Text(bars_of(resample(heights, width), width), style))
        else:
            lines += [Text(f"{name} -", "dim"), Text()]
    return lines


def _prefixes(state: State, width: int) -> list[Text]:
    total = sum(state.prefixes.values())
    return [
        _apart(Text(name), Text(f"{number:,} {percent(number / total if total else 0):>6}"), width)
        for name in PREFIX_KINDS
        for number in [state.prefixes[name]]
    ]


def _twins(state: State, width: int) -> list[Text]:
    numbers = {
        "in the pool": f"{state.twins('twins'):,}",
        "their memory": size_of(state.bytes("twins")),
        "served": f"{state.twins('hits'):,}",
        "made room": f"{state.twins('evictions'):,}",
    }
    return [_apart(Text(name), Text(number), width) for name, number in numbers.items()]


def _rates(state: State, width: int) -> list[Text]:
    numbers = {
        "requests": f"{state.rate('requests'):.1f}",
        "prompt tokens": f"{state.rate('prompt tokens'):,.0f}",
        "output tokens": f"{state.rate('output tokens'):,.0f}",
        "freed": size_of(state.rate("freed bytes")),
    }
    if width >= 30:
        numbers["freed"] += f" in {1000 * state.rate('pass seconds'):.1f} ms"
    return [_apart(Text(name), Text(number), width) for name, number in numbers.items()]


OUTCOMES = {  # what stands for it in the narrow column, and its style
    "running": ("▸", "cyan"),
    "waits": ("…", "yellow"),
    "put back": ("↺", "yellow"),
    "retracted": ("↺", "yellow"),
    "finished": ("✓", "green"),
    "aborted": ("✗", "red"),
}


def recent(state: State, width: int, height: int) -> RenderableType:
    """The requests heard of last, the newest first."""
    table = Table(
        box=None, width=width - 4, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim"
    )
    columns = {"request": "left", "policy": "left", "prompt": "right", "kept": "right", "freed": "right"}
    columns |= {"prefix": "left", "out": "right", "": "left"}
    for name in ("freed", "out") * (width < 76) + ("policy", "kept") * (width < 50):
        del columns[name]
    for name, side in columns.items():
        sizes = {"ratio": 1, "min_width": 8} if name == "request" else {}
        table.add_column(name, justify=side, overflow="ellipsis", no_wrap=True, **sizes)
    newest = list(state.requests.values())[: -(height - 2) : -1]
    for request in newest:
        cells = _cells(request)
        if width >= 100 and request.reason:
            cells["policy"].append(f": {printable(request.reason)}", "dim")
        table.add_row(*(cells[name] for name in columns))
    height = len(newest) + 3
    return Panel(table, title="Requests", title_align="left", width=width, height=height, border_style="dim")


def _cells(request: Request) -> dict[str, Text]:
    sign, style = OUTCOMES.get(request.outcome, ("·", ""))
    return {
        "request": Text(printable(request.rid)),
        "policy": Text(printable(request.policy or "-")),
        "prompt": Text(_or_dash(request.prompt_tokens, count)),
        "kept": Text(_or_dash(request.kept, percent)),
        "freed": Text(_or_dash(request.freed, size_of)),
        "prefix": Text(printable(request.prefix or "-")),
        "out": Text(_or_dash(request.output_tokens, count)),
        "": Text(f"{sign} {printable(request.outcome)}", style),
    }


def _or_dash(value, words) -> str:
    return "-" if value is None else words(value)


def _fit(text: Text, width: int) -> Text:
    text.truncate(width, overflow="ellipsis")
    text.no_wrap = True
    return text


def _apart(left: Text, right: Text, width: int) -> Text:
    """One line with ``left`` and ``right`` at its ends."""
    left = _fit(left.copy(), width - len(right) - 1)
    return _fit(Text.assemble(left, " " * (width - left.cell_len - right.cell_len), right), width)


def _columns(texts: list[Text], widths: list[int]) -> Text:
    padded = []
    for text, width in zip(texts, widths, strict=True):
        text = _fit(text.copy(), width)
        text.pad_right(width - text.cell_len)
        padded.append(text)
    return Text.assemble(*padded)


def _panel(title: str, lines: list[Text], width: int) -> Section:
    body = Group(*(_fit(line, width - 4) for line in lines))
    panel = Panel(body, title=title, title_align="left", width=width, border_style="dim")
    return Section(len(lines) + 2, panel)
