"""``python -m sglang_vlkv.monitor [ENDPOINT]``: what a server does to its KV cache, live."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from typing import Iterator

from rich.console import Console, Group
from rich.live import Live

from sglang_vlkv.commands import values
from sglang_vlkv.commands.door import Parser, command
from sglang_vlkv.monitor.feeds import LiveFeed, Replay
from sglang_vlkv.monitor.lines import line
from sglang_vlkv.monitor.state import State
from sglang_vlkv.monitor.view import view
from sglang_vlkv.observe.publisher import address

FRAME_SECONDS = 0.25
ONCE_SECONDS = 10.0  # that --once waits without --seconds


@command
def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 where ``--once`` has seen no server."""
    args = (options := parser()).parse_args(arguments)
    if args.record and args.replay:
        options.error("--record writes what a server says; give it without --replay")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(highlight=False)
    with contextlib.ExitStack() as stack:
        record = stack.enter_context(args.record.open("wb", 0)) if args.record else None
        where = str(args.replay or args.endpoint)
        feed = Replay(args.replay, args.speed) if args.replay else LiveFeed(where, record)
        stack.callback(feed.close)
        watch = Watch(feed, where, console, args.seconds)
        if args.once:
            return watch.once()
        return watch.plain() if args.plain or not console.is_terminal else watch.live()


def parser() -> Parser:
    parser = Parser("python -m sglang_vlkv.monitor", description=__doc__.partition(": ")[2])
    add = parser.add_argument
    where = "as in --kv-events-endpoint. Default: 5558"
    add("endpoint", nargs="?", type=_endpoint, default="5558", help=where)
    add("--once", action="store_true", help="print what there is to see once, and end")
    add("--plain", action="store_true", help="a line per event; so it is where no terminal is")
    add("--seconds", type=values.positive, metavar="N", help="end after so long")
    add("--record", type=values.new_file, metavar="FILE", help="write all messages there, as lines of JSON")
    add("--replay", type=values.file, metavar="FILE", help="show what --record wrote, without a server")
    add(
        "--speed", type=values.not_negative, default=1.0, metavar="X",
        help="of the replay; 0: no pauses. Default: 1",
    )  # fmt: skip
    return parser


def _endpoint(text: str) -> str:
    try:
        return address(text, "the endpoint")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class Watch:
    """Folds a feed into a state, and shows it.

    Args:
        seconds: after which it ends; None: when it is told to, or a replay is over.
    """

    def __init__(self, feed: LiveFeed | Replay, where: str, console: Console, seconds: float | None) -> None:
        self.state = State()
        self._feed, self._where, self._console = feed, where, console
        self._seconds, self._end = seconds, None if seconds is None else time.monotonic() + seconds

    def live(self) -> int:
        """The screen, until ``q`` or Ctrl-C."""
        with contextlib.suppress(KeyboardInterrupt), keys() as pressed:
            with Live(console=self._console, screen=True, auto_refresh=False) as live:
                next_frame = 0.0
                while not self._over() or self._feed.done:  # the end of a replay stays on the screen
                    if self._end is not None and time.monotonic() >= self._end or "q" in pressed():
                        break
                    for _ in self._take(0.05):
                        pass
                    if time.monotonic() >= next_frame:
                        live.update(self._view(live=True), refresh=True)
                        next_frame = time.monotonic() + FRAME_SECONDS
        return 0

    def plain(self) -> int:
        """A line per event, and at the end the screen's contents."""
        missed = 0
        with contextlib.suppress(KeyboardInterrupt):
            while not self._over():
                for message in self._take(0.2):
                    if self.state.missed > missed:
                        print(f"{self.state.missed - missed:,} messages are missing here", flush=True)
                        missed = self.state.missed
                    if (words := line(message)) is not None:
                        print(words, flush=True)
        self._console.print(self._view())
        return 0

    def once(self) -> int:
        """The screen's contents as soon as a server has said how it is, or at the end of a replay."""
        if self._end is None and isinstance(self._feed, LiveFeed):
            self._end = time.monotonic() + ONCE_SECONDS
        with contextlib.suppress(KeyboardInterrupt):
            while not self._over():
                for _ in self._take(0.2):
                    pass
                if isinstance(self._feed, LiveFeed) and self._seconds is None and self._knows():
                    break
        self._console.print(self._view())
        return 0 if self.state.replicas else 1

    def _knows(self) -> bool:
        replicas = self.state.replicas.values()
        complete = all(replica.server and replica.pool for replica in replicas)
        return complete and len(replicas) == self.state.server.get("replicas")

    def _over(self) -> bool:
        return self._feed.done or self._end is not None and time.monotonic() >= self._end

    def _take(self, seconds: float) -> Iterator[dict]:
        for received, message in self._feed.read(seconds):
            self.state.fold(message, received)
            yield message

    def _view(self, live: bool = False) -> Group:
        width, height = self._console.size
        if not self._console.is_terminal:
            height = 60
        hint = "q quits" if live else ""
        now = time.time() if isinstance(self._feed, LiveFeed) else None
        return view(self.state, self._where, now, width, height, hint)


@contextlib.contextmanager
def keys() -> Iterator:
    """Gives a function that returns what has been typed; without a keyboard, nothing ever."""
    if not sys.stdin.isatty():
        yield lambda: ""
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)

    def pressed() -> str:
        typed = select.select([sys.stdin], [], [], 0)[0]
        return os.read(sys.stdin.fileno(), 99).decode(errors="replace") if typed else ""

    try:
        yield pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


if __name__ == "__main__":
    sys.exit(main())
