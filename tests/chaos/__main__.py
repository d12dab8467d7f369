"""The long form: ``python -m tests.chaos --requests 10000 --minutes 60 --out FILE.json``.

A record as JSON and tables on standard output; exit status 1 where anything was wrong. docs/chaos.md says
what it does.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Callable

from benchmarks.common import context, note
from sglang_vlkv.commands import values
from sglang_vlkv.commands.door import Parser, command
from tests.chaos import report
from tests.chaos.catalogue import DEFAULT, MIN_PROMPT, answered
from tests.chaos.malformed import SPARED, all_cases, options, raw
from tests.chaos.plan import Malformed, Plan
from tests.chaos.storm import probe, rage
from tests.prefork import Prefork
from tests.serving import LEAK_CHECKS, ROOT, SMALL_SERVER, Server, environment

ROOMY = 3_000  # slots of the server that answers alone
STOCK = {"SGLANG_PLUGINS": "vlkv_cpu"}
# Of what is free when a server starts, which on a busy machine is anything; the pool is sized by its slots.
MEMORY = ("--mem-fraction-static", "0.9")


def flags(pool: int, twins: str, *more: str, **config) -> tuple[str, ...]:
    """Of a server whose requests may choose their policy."""
    config = {"allow_override": True, "twins": twins, "min_prompt_tokens": MIN_PROMPT} | config
    config = "--kv-policy", DEFAULT, "--kv-policy-config", json.dumps(config)
    return "--max-total-tokens", str(pool), *MEMORY, *config, *more


def start_stock(pool: int) -> Server:
    """SGLang on our CPU platform without the plugin that brings the policies."""
    return Server("--max-total-tokens", str(pool), *MEMORY, env=STOCK)


def statuses(start: Callable[[], Server], cases: list[Malformed]) -> dict[str, int | str]:
    """How an idle server answers each; it is started again where one brings it down."""
    found, server = {}, start()
    for case in cases:
        found[case.name] = probe(server, case)
        if not server.alive():
            server.stop()
            server = start()
    server.stop()
    return found


@command
def main(arguments: list[str] | None = None) -> int:
    parser, count = Parser("python -m tests.chaos", description=__doc__), values.whole()
    parser.add_argument("--requests", type=count, default=10_000, help="at most")
    parser.add_argument("--minutes", type=values.positive, default=60.0, help="at most, for the storm itself")
    parser.add_argument("--out", type=values.new_file, help="where the record goes")
    parser.add_argument("--seed", type=values.whole(0), default=0)
    parser.add_argument("--conversations", type=count, default=80, help="in the catalogue")
    parser.add_argument("--processes", type=count, default=4, help="of clients")
    parser.add_argument("--clients", type=count, default=6, help="requests at once, per process")
    parser.add_argument("--pool", type=values.whole(256), default=1000, help="slots")
    parser.add_argument("--twins", choices=["off", "resume"], default="resume")
    parser.add_argument("--drafts", action="store_true", help="with policies that draft")
    parser.add_argument("--mixed", action="store_true", help="with --enable-mixed-chunk")
    parser.add_argument("--kills", type=values.whole(0), default=2, help="in the first quarter")
    parser.add_argument("--trust", action="store_true", help="what the stock server is known not to survive")
    parser.add_argument("--deadline", type=values.positive, default=240.0, help="seconds for every request")
    args = parser.parse_args(arguments)
    mixed = ("--enable-mixed-chunk", "--chunked-prefill-size", "128") if args.mixed else ()
    tight = flags(args.pool, args.twins, "--schedule-conservativeness", "0.01", *mixed)
    record = context({}, *tight) | {
        "environment": SMALL_SERVER | LEAK_CHECKS,
        "arguments": {k: str(v) for k, v in vars(args).items() if k != "out"},
    }

    Server.prefork = Prefork(ROOT, environment())  # not for the storm
    cases = {case.name: case for case in [*all_cases(), *options()]}
    note(f"{len(cases)} malformed requests to the stock server")
    trusted = SPARED if args.trust else ()
    stock = dict.fromkeys(trusted, "not sent")
    theirs = [case for case in cases.values() if not case.ours and case.name not in trusted]
    stock |= statuses(partial(start_stock, args.pool), theirs)
    fatal = SPARED.union(name for name, status in stock.items() if not isinstance(status, int))
    served = {name: case for name, case in cases.items() if name not in fatal}
    note(f"{len(fatal)} of them bring it down, or are never answered; {len(served)} to ours")
    ours = statuses(partial(Server, *tight), list(served.values()))
    both = {name: {"ours": ours.get(name, report.NOT_SENT), "stock": stock.get(name)} for name in cases}
    asked = {name: known for name, known in both.items() if name in ours}

    note(f"{args.conversations} conversations, each alone")
    with Server(*flags(ROOMY, "fallback", max_twins=1.0)) as server:
        specs = answered(server, args.seed, args.conversations, ROOMY, args.drafts)
    Server.prefork.stop()
    Server.prefork = None
    note(f"the storm: {len(specs)} prompts, at most {args.requests} requests or {args.minutes} minutes")
    plan = Plan(
        args.seed, specs, list(served.values()), list(raw()), args.clients, args.requests // args.processes,
        time.time() + 60 * args.minutes, args.deadline,
    )  # fmt: skip
    kills = [60 * args.minutes * 0.25 * (i + 1) / max(1, args.kills) for i in range(args.kills)]
    with tempfile.TemporaryDirectory() as folder:
        storm = rage(partial(Server, *tight), plan, Path(folder), args.processes, kills, every=5.0)
    found = report.problems(storm, cases, asked)
    record |= {
        "prompts": len(specs),
        "policies": dict(Counter(spec.alone.policy for spec in specs)),
        "summary": report.summary(storm),
        "problems": found,
        "malformed": report.malformed(both, cases),
        "unequal": [event for event in storm.events if event.get("verdict", "equal") != "equal"][:100],
        "memory": report.thinned(storm.memory),
    }
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(report.text(record))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
