"""``python -m benchmarks.fidelity``: see README.md beside this file."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from benchmarks import common
from benchmarks.fidelity import leaderboard, plots, run, statistics
from benchmarks.fidelity.client import Client
from benchmarks.fidelity.questions import REPORT_SEEDS, SIZED, TASKS, TUNING_SEEDS, own
from benchmarks.fidelity.rows import FILLED, FROM_TWINS, FULL, REFERENCES, ROWS, custom_params
from sglang_vlkv.commands import Problem, door, values
from sglang_vlkv.commands.door import Parser
from sglang_vlkv.options.config import build_settings

QUICK = {
    "checkpoints": ["a"],
    "rows": ["oracle", "all-but-asked", "vlcache", "vlkv", "vlkv, from twins", "h2o", "random"],
    "budgets": [0.1],
    "tasks": ["single", "multi", "turns"],
    "samples": 12,
    "out": common.ROOT / "build" / "fidelity_quick",
}
DEFAULT = {
    "checkpoints": ["a", "b", "e", "d", "c"],
    "rows": [*ROWS, FILLED, *REFERENCES],
    "budgets": None,
    "tasks": None,
    "samples": 10,
    "out": common.RESULTS / "fidelity",
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser("python -m benchmarks.fidelity", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows and questions; a smoke test")
    parser.add_argument("--checkpoints", nargs="+", metavar="NAME-OR-DIR", help="default: a b e d c")
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", choices=[FULL, *DEFAULT["rows"]], help="default: all"
    )
    parser.add_argument(
        "--budgets", nargs="+", type=values.share,
        help="fractions; default: 0.01 to 1 on the first checkpoint, else 0.05, 0.1, 0.2, and fewer for rows "
        "with options",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, metavar="TASK",
        help=f"out of {', '.join(TASKS)}; default: all, those with @ on the first checkpoint only",
    )  # fmt: skip
    parser.add_argument("--samples", type=values.whole(), help="per task and checkpoint; default: 10")
    parser.add_argument("--tuning", action="store_true", help="questions that no table reports")
    parser.add_argument("--url", type=values.server, help="a running server, in place of --checkpoints")
    parser.add_argument(
        "--questions", type=values.file, metavar="JSONL", help="own questions, in place of --tasks"
    )
    parser.add_argument(
        "--workers", type=values.whole(1, 1024), default=16, help="requests at once; default: 16"
    )
    parser.add_argument("--out", type=values.new_folder, help="default: benchmarks/results/fidelity")
    parser.add_argument("--resume", action="store_true", help="keep the records that are in --out")
    parser.add_argument("--render", action="store_true", help="only tables and plots, from --out's records")
    args = parser.parse_args(arguments)
    for name, value in (QUICK if args.quick else DEFAULT).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def check_rows(names: list[str]) -> None:
    """Raises Problem where a row has options that its policy does not know, before any server starts."""
    settings = build_settings("none", None, {"allow_override": True})
    for name in names:
        if name in ROWS:
            try:
                settings.for_request(custom_params(ROWS[name], 0.1))
            except ValueError as error:
                raise Problem(f"Row {name!r} of benchmarks/fidelity/rows.py: {error}.") from error


def command(arguments: list[str]) -> str:
    """The command line without this machine's folders."""
    words = [Path(word).name if word.startswith("/") else word for word in arguments]
    return f"python -m benchmarks.fidelity {shlex.join(words)}".rstrip()


def context(arguments: list[str], args: argparse.Namespace, seeds: list[int]) -> dict:
    record = common.context({}, *run.FLAGS)
    del record["rows"]
    return record | {
        "environment": run.ENVIRONMENT,
        "command": command(arguments),
        "samples": len(seeds),
        "seeds": [seeds[0], seeds[-1]],
        "tuning": args.tuning,
        "workers": args.workers,
        "rows": {name: ROWS[name]._asdict() for name in args.rows if name in ROWS},
    }


def write(folder: Path, record: dict, records: run.Records) -> None:
    """The JSON, the tables and the plots of what there is so far."""
    record["policies"] = dict(sorted((record.get("policies", {}) | records.configs).items()))
    record["summary"] = statistics.summary(records.all)
    lines = leaderboard.compact(record)
    (folder / "fidelity.json").write_text(lines)
    pictures = plots.draw(record, folder)
    (folder / "LEADERBOARD.md").write_text(leaderboard.render(record, pictures))


def earlier(path: Path) -> dict:
    """The record that an earlier run has left."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise Problem(f"{path} holds no record to go on from: {error}.") from error


@door.command
def main(arguments: list[str]) -> None:
    args = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped
    path = args.out / "fidelity.json"
    before = earlier(path) if (args.resume or args.render) and path.exists() else None
    if args.render:
        if before is None:
            raise Problem(f"{path} is not there: nothing to render.")
        records = run.Records(args.out, resume=True)
        write(args.out, before, records)
        records.pack()
        return
    if not args.url:
        check_rows(args.rows)
        for checkpoint in args.checkpoints:
            run.folder_of(checkpoint)
    questions = own(args.questions) if args.questions else None
    first_seed = (TUNING_SEEDS if args.tuning else REPORT_SEEDS)[0]
    seeds = list(range(first_seed, first_seed + args.samples))
    record = context(arguments, args, seeds)
    if before:
        if before["tuning"] != args.tuning:
            kind = "tuning" if before["tuning"] else "report"
            raise Problem(f"{path} holds {kind} seeds; use another --out.")
        last = {name: before[name] for name in ("date", "commit", "command", "versions", "flags")}
        record["resumed"] = [*before.get("resumed", []), last]
        record["policies"] = before.get("policies", {})
        record["rates"] = before.get("rates", {})
        record["rows"] = before["rows"] | record["rows"]
    records = run.Records(args.out, args.resume, record["commit"])
    for number, checkpoint in enumerate(["url"] if args.url else args.checkpoints):
        if not args.url:
            common.note(f"starting a server for checkpoint {Path(checkpoint).name}")
        with nullcontext() if args.url else run.serve(checkpoint) as server:
            client = Client(args.url or server.url)
            info = client.info(twins=not args.questions and any(row in FROM_TWINS for row in args.rows))
            label = Path(info["model_path"]).name if args.url else Path(checkpoint).name
            prompts = questions
            if not questions:
                tasks = args.tasks or [t for t in TASKS if number == 0 or t not in SIZED]
                prompts = run.draw_all(tasks, seeds)
            progress = run.ask_all(
                client,
                label,
                prompts,
                lambda prompt: run.jobs(prompt, args.rows, args.budgets and tuple(args.budgets), number == 0),
                records,
                args.workers,
            )
        if progress.count:
            last = record.setdefault("rates", {}).get(label, dict(requests=0, seconds=0.0))
            rate = dict(requests=progress.count + last["requests"])
            rate["seconds"] = round(progress.seconds + last["seconds"], 1)
            rate["per_second"] = round(rate["requests"] / rate["seconds"], 1)
            record["rates"][label] = rate
            common.note(f"{label}: {progress.count} requests in {progress.seconds:.0f} s")
        start = time.monotonic()
        write(args.out, record, records)
        common.note(f"tables in {time.monotonic() - start:.0f} s")
    records.pack()
    print(args.out / "LEADERBOARD.md")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
