"""The monitor: what it makes of messages, how it shows them, recordings, and a real terminal."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from urllib.parse import quote

import orjson
import pytest
import requests
from rich.console import Console

from sglang_vlkv.commands import Problem
from sglang_vlkv.monitor.feeds import LiveFeed, Replay
from sglang_vlkv.monitor.lines import line
from sglang_vlkv.monitor.messages import known
from sglang_vlkv.monitor.state import State
from sglang_vlkv.monitor.view import pool_parts, view
from sglang_vlkv.monitor.words import bars_of, resample, size_of
from sglang_vlkv.observe.publisher import Publisher
from sglang_vlkv.printable import printable
from tests.listening import attempts, of_kind
from tests.prompts import draw_prompt
from tests.serving import free_port, report

COMMAND = (sys.executable, "-m", "sglang_vlkv.monitor")


def screen(state: State, width: int, height: int, now: float | None = None) -> list[str]:
    """The lines that a terminal without colours would show."""
    console = Console(width=width, height=height, file=io.StringIO(), highlight=False)
    console.print(view(state, "tcp://127.0.0.1:5558", now or state.last or 0.0, width, height))
    return console.file.getvalue().splitlines()


# ---- What it makes of a server's messages ----


def test_a_replay_gives_the_state_that_was_watched(watched):
    replayed = State()
    feed = Replay(watched.recording, speed=0)
    while not feed.done:
        for received, message in feed.read(1.0):
            replayed.fold(message, received)
    assert replayed == watched.state
    assert replayed.messages >= 200 and not replayed.missed and not replayed.foreign


def test_it_counts_what_the_reports_say(watched):
    reports = [report(answer) for answer in watched.answers]
    state, compactions = watched.state, of_kind(watched.messages, "compacted")
    compacted = {message["rid"] for message in compactions}
    prefixes = Counter(seen["prefix"]["kind"] for seen in reports)
    assert state.ended["finished"] - len(reports) == state.prefixes.total() - prefixes.total() <= 2
    for kind in ("twin", "shared", "exact"):
        assert state.prefixes[kind] == prefixes[kind]
    assert state.ended["retracted"] == sum(seen["retractions"] for seen in reports)
    assert state.kinds["compacted"] == len(compactions) == sum(state.histogram)
    assert state.full_total == sum(message["full_bytes"] for message in compactions)
    assert state.kept_total == sum(message["kept_bytes"] for message in compactions)
    for answer in watched.answers:
        seen, request = report(answer), state.requests[answer["meta_info"]["id"]]
        assert request.prompt_tokens == seen["prompt_tokens"]
        assert request.output_tokens == answer["meta_info"]["completion_tokens"]
        assert (request.policy, request.prefix) == (seen["policy"], seen["prefix"]["kind"])
        assert request.outcome == "finished"
        if request.rid in compacted:
            assert request.kept == seen["kept_bytes"] / seen["full_bytes"]
            assert request.freed == seen["full_bytes"] - seen["kept_bytes"]
    assert sum(part.slots for part in pool_parts(state)) == 3000
    assert all(part.slots >= 0 for part in pool_parts(state))


SIZES = [(60, 24), (60, 50), (80, 24), (100, 30), (140, 50), (30, 60), (20, 5)]


@pytest.mark.parametrize("width, height", SIZES)
def test_every_terminal_gets_lines_that_fit(watched, width, height):
    lines = screen(watched.state, width, height)
    assert len(lines) <= height and all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    assert "live" in text
    if width >= 60:
        assert "Pool of 3,000 slots" in text and "twins" in text and "none lost" in text
        assert all(f"{part.sign} {part.name}" in text for part in pool_parts(watched.state))
        mean = 100 * watched.state.kept_total / watched.state.full_total
        assert f"mean {mean:.1f}%, last" in text
        if height > 40:
            newest = next(reversed(watched.state.requests))
            assert newest[:6] in text and "✓ finished" in text


def test_a_line_per_event_of_note(watched):
    lines = [words for message in watched.messages if (words := line(message)) is not None]
    silent = ("pool", "server", "pass")
    assert len(lines) == sum(message["kind"] not in silent for message in watched.messages)
    answer = watched.answers[-8]
    rid, seen = answer["meta_info"]["id"], report(answer)
    share = 100 * seen["kept_bytes"] / seen["full_bytes"]
    said = f"{rid} vlcache keeps {share:.1f}% of {seen['prompt_tokens']} tokens"
    assert any(said in words for words in lines)


# ---- Messages that go missing, restarts, strangers ----


def message(seq: int, kind: str = "deferred", **fields) -> dict:
    head = {"schema": 1, "kind": kind, "seq": seq, "time": 100.0 + seq, "dp_rank": 0, "dropped": 0}
    return head | ({"rid": str(seq)} if kind == "deferred" else {}) | fields


def folded(*messages: dict) -> State:
    state = State()
    for each in messages:
        state.fold(each, each.get("time", 0.0))
    return state


def test_a_draft_is_no_request_of_its_own():
    draft = {
        "rid": "a", "policy": "vlkv", "reason": "", "outcome": "finished", "prefix": "cold",
        "prompt_tokens": 300, "output_tokens": 9, "draft": True,
    }  # fmt: skip
    state = folded(message(0, "released", **draft))
    assert state.requests["a"].outcome == "drafted" and not state.prefixes and not state.ended
    request = draft | {"draft": False, "output_tokens": 20, "prefix": "exact"}
    state.fold(message(1, "released", **request), 101.0)
    assert state.ended == {"finished": 1} and state.prefixes == {"exact": 1}
    assert state.requests["a"].output_tokens == 20
    aborted = folded(message(0, "released", **draft | {"outcome": "aborted"}))
    assert aborted.ended == {"aborted": 1}, "nothing follows it"


def test_what_is_missing_is_shown():
    state = folded(message(7), message(8), message(11), message(12, dropped=5))
    assert (state.missed, state.dropped) == (2, 5)
    last = screen(state, 80, 24)[-1]
    assert "4 messages" in last and "2 lost on the way" in last and "5 dropped by the server" in last


def test_replicas_are_told_apart_and_added_up():
    pool = {"size": 10, "free": 4, "evictable": 2, "twins": 1, "twins_read": 0, "slot_bytes": 8}
    both = [message(0, "pool", dp_rank=rank, running=1 + rank, waiting=0, **pool) for rank in (0, 1)]
    state = folded(*both, message(1, dp_rank=0), message(1, dp_rank=1))
    assert state.missed == 0
    assert (state.pool("size"), state.pool("running"), state.bytes("size")) == (20, 3, 160)
    assert [part.slots for part in pool_parts(state)] == [8, 2, 2, 8]


def test_a_server_that_starts_again_loses_nothing():
    state = folded(message(40), message(41), message(0), message(1))
    assert state.missed == 0 and state.replicas[0].restarts == 1
    assert "server restarted once" in screen(state, 80, 24)[-1]


def test_silence_and_other_schemas_are_said():
    assert "silent for 90 s" in screen(folded(message(0)), 80, 24, now=190.0)[0]
    lines = screen(folded(message(0, schema=2), {}), 80, 24)
    assert any("messages of schema 2, None arrive; this version reads schema 1" in line for line in lines)
    assert any("waiting for tcp://127.0.0.1:5558" in line for line in screen(State(), 80, 24))


def test_rates_are_those_of_the_last_ten_seconds():
    end = {"rid": "a", "policy": "none", "reason": "short", "outcome": "finished", "prefix": "cold"}
    ends = [message(n, "released", prompt_tokens=30, output_tokens=n, **end) for n in range(100)]
    state = folded(*ends)
    assert state.rate("prompt tokens") == 33.0  # eleven of them in a closed interval of ten seconds
    assert state.rate("output tokens") == sum(range(89, 100)) / 10
    assert folded(ends[0]).rate("requests") == 0.0
    assert folded(*ends, message(105)).rate("requests") == 0.5  # of the last five, nothing is heard
    assert folded(*ends, message(150)).rate("requests") == 0.0


def test_bars_and_sizes():
    assert bars_of([0, 0.01, 0.5, 1], 4) == " ▁▄█"
    assert bars_of([0.5, 1], 40) == "▄▄▄ ███ "
    assert resample(list(range(10)), 5) == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert [size_of(n) for n in (0, 1023, 1024, 123 * 2**20, 2**50)] == [
        "0 B", "1023 B", "1.0 KiB", "123 MiB", "1024.0 TiB",
    ]  # fmt: skip


# ---- Strings that a client chose, or a server that means ill ----

NASTY = "x\x1b]0;T\x07\x1b[31m\nFAKE 12:00:00 line\r\x9b2J\u202e\u2028\x7f"
ORDERS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\u2066-\u2069]")  # all but ends of lines
SERVER = {
    "model": "m", "policy": "vlkv", "budget": 0.1, "options": {"twins": "off", "allow_override": True},
    "replicas": 1, "started": 50.0, "twins": {"twins": 1, "hits": 2, "evictions": 3},
}  # fmt: skip
POOL = dict.fromkeys(("size", "free", "evictable", "twins", "twins_read", "slot_bytes", "running", "waiting"), 3)
KINDS = {
    "compacted": {
        "rid": "a", "policy": "vlkv", "prompt_tokens": 300, "kept_per_layer": [30, 30], "sparsity_per_layer": [0.5, 1],
        "kept_bytes": 100, "full_bytes": 1000, "shared": True,
    },
    "pass": {"requests": 1, "seconds": 0.1},
    "twin_created": {"twin": 1, "rid": "a", "bytes": 3},
    "twin_hit": {"twin": 1, "rid": "a", "prefix": "twin", "covered": 9, "prompt_tokens": 300},
    "twin_evicted": {"twin": 1, "bytes": 3},
    "flushed": {"twins": 3},
    "deferred": {"rid": "a"},
    "no_room": {"rid": "a"},
    "released": {
        "rid": "a", "policy": "none", "reason": "short_prompt", "outcome": "finished", "prefix": "cold",
        "prompt_tokens": 30, "output_tokens": 4,
    },
    "pool": POOL,
    "server": SERVER,
}  # fmt: skip


def told(messages: list[dict]) -> str:
    """All that the monitor would ever show of them."""
    state, lines = folded(*map(known, messages)), []
    for each in messages:
        lines.append(line(known(each)))
    screens = [screen(state, width, height) for width, height in SIZES] if state.last is not None else []
    return "\n".join([*filter(None, lines), *(line for lines in screens for line in lines)])


def test_no_string_of_a_message_is_an_order_to_the_terminal():
    """Every one of them, in every kind."""
    for kind, fields in KINDS.items():
        whole = message(5, kind, **fields)
        for name, value in whole.items():
            if not isinstance(value, str) or name == "kind":
                continue
            for nasty in (NASTY, "\x1b", "\n" * 99):
                shown = told([message(4, "server", **SERVER), whole | {name: nasty}])
                assert not ORDERS.search(shown), (kind, name)
    server = SERVER | {"options": {"twins": NASTY, "allow_override": NASTY}, "model": f"a/{NASTY}/"}
    shown = told([message(0, "server", **server), message(1, NASTY), message(2, schema=NASTY)])
    assert not ORDERS.search(shown) and printable(NASTY)[:30] in shown
    assert not ORDERS.search(told([message(2, schema=NASTY)]))
    assert "\x1b" not in "".join(screen(State(), 80, 24)) and not ORDERS.search(told([]))


WRONG = [None, True, -1, 0, 2**63, 2**200, 1.5, -0.5, 1e300, "", NASTY, [], [NASTY], [[]], {}, {"a": NASTY}, [0], [-1]]


def test_messages_that_are_not_as_documented_are_counted_and_end_nothing():
    """Each field of each kind missing, and of every wrong kind."""
    for kind, fields in KINDS.items():
        whole = message(5, kind, **fields)
        assert known(whole) is whole
        for name in whole:
            wrong = [{key: value for key, value in whole.items() if key != name}]
            wrong += [whole | {name: value} for value in WRONG]
            for one in wrong:
                shown = told([one, message(6, "server", **SERVER)])
                assert not ORDERS.search(shown), one
    for name in KINDS["compacted"]:
        missing = message(5, "compacted", **KINDS["compacted"])
        del missing[name]
        assert folded(known(missing)).foreign == {"1, but not as it is documented": 1}
    assert "of another schema" in screen(folded(message(0), known(missing)), 80, 24)[-1]


def test_a_hostile_id_in_every_form_of_the_monitor(watched, tmp_path):
    """Live, plain, recorded and replayed; a recording is exact, and as text it is no order either."""
    recording = tmp_path / "events.jsonl"
    picture = draw_prompt(96, "image").images
    command = [*COMMAND, watched.address, "--plain", "--seconds", "600", "--record", str(recording)]
    plain = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with Terminal(watched.address, columns=140, lines=50) as terminal:
        terminal.until("● live")
        for _ in attempts("the first recorded message"):
            time.sleep(0.05)
            if recording.exists() and recording.read_bytes():
                break
        watched.server.generate("what", picture, max_new_tokens=2, rid=NASTY)
        shown = terminal.until(re.escape(printable(NASTY)[:9]) + r"(.*)✓ finished")
        assert "\x07" not in shown and "\x9b" not in shown and "\nFAKE" not in shown and "]0;T\x07" not in terminal.output
        terminal.type("q")
        terminal.ends_cleanly()
    for _ in attempts("the end of the request, recorded"):
        time.sleep(0.05)
        ends = [each["message"] for each in lines_of(recording) if each["message"]["kind"] == "released"]
        if NASTY in (each["rid"] for each in ends):
            break
    plain.send_signal(signal.SIGINT)
    printed = plain.communicate(timeout=30)[0]
    data = recording.read_bytes()
    assert data.isascii() and not ORDERS.search(data.decode())
    replayed = run("--replay", str(recording), "--speed", "0").stdout
    once = run("--replay", str(recording), "--speed", "0", "--once").stdout
    for text in (printed, replayed, once):
        assert not ORDERS.search(text) and printable(NASTY)[:9] in text
    assert f"{printable(NASTY)} finished" in printed and "\nFAKE" not in printed
    found = watched.server.url + "/kv_policy/requests/" + quote(NASTY, safe="")
    assert requests.get(found, timeout=10).status_code == 200, "the published id leads to its report"


def lines_of(recording) -> list[dict]:
    return [orjson.loads(each) for each in recording.read_bytes().split(b"\n")[:-1]]


# ---- Feeds ----


def test_all_replicas_are_found_from_the_first():
    port, server = free_port(), {**SERVER, "replicas": 2}
    made = [Publisher(f"tcp://127.0.0.1:{port + rank}", rank, lambda: server) for rank in (0, 1)]
    feed, state = LiveFeed(f"tcp://*:{port}"), State()
    deadline = time.monotonic() + 20
    while len(state.replicas) < 2 and time.monotonic() < deadline:
        for received, each in feed.read(0.2):
            state.fold(each, received)
    feed.close()
    for one in made:
        one.close()
    assert sorted(state.replicas) == [0, 1]


def recorded(*times: float) -> bytes:
    lines = [{"received": at, "message": message(seq)} for seq, at in enumerate(times)]
    return b"".join(orjson.dumps(line) + b"\n" for line in lines)


def test_a_recording_that_was_cut_off_replays_up_to_there(tmp_path):
    file = tmp_path / "events.jsonl"
    file.write_bytes(recorded(1, 2, 3)[:-9])
    feed = Replay(file, speed=0)
    assert [each["seq"] for _, each in feed.read(1.0)] == [0, 1]
    file.write_bytes(recorded(1)[:-9] + b"\n" + recorded(2))
    with pytest.raises(Problem, match="line 1: not a recorded message"):
        Replay(file)


def test_a_replay_keeps_its_pace(tmp_path):
    file = tmp_path / "events.jsonl"
    file.write_bytes(recorded(0, 60, 1e7))
    feed = Replay(file, speed=1000)
    deadline, seen = time.monotonic() + 20, []
    while len(seen) < 2 and time.monotonic() < deadline:
        seen += feed.read(0.05)
    assert [each["seq"] for _, each in seen] == [0, 1] and list(feed.read(0)) == [] and not feed.done


# ---- The program ----


class Terminal:
    """The monitor in a pseudo-terminal; a context manager."""

    def __init__(self, *arguments: str, columns: int = 80, lines: int = 30) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.before = termios.tcgetattr(theirs)
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env=environment | {"TERM": "xterm-256color"},
        )  # fmt: skip
        self._theirs, self.output = theirs, ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)

    def until(self, pattern: str, timeout: float = 30) -> str:
        """What has been shown until ``pattern`` is; without control sequences."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if select.select([self._ours], [], [], 0.1)[0]:
                self.output += os.read(self._ours, 1 << 16).decode(errors="replace")
            text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.output)
            if re.search(pattern, text):
                return text
        raise TimeoutError(f"{pattern!r} was not shown:\n{self.output[-4000:]}")

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def ends_cleanly(self) -> None:
        """With status 0, the screen as it was and the keyboard as it was."""
        self.until("")
        assert self.process.wait(20) == 0
        while select.select([self._ours], [], [], 0.1)[0]:
            self.output += os.read(self._ours, 1 << 16).decode(errors="replace")
        assert "Traceback" not in self.output
        assert self.output.count("\x1b[?1049h") == self.output.count("\x1b[?1049l") == 1
        assert "\x1b[?25h" in self.output, "the cursor is back"
        assert termios.tcgetattr(self._theirs) == self.before


def test_in_a_terminal_it_shows_requests_as_they_come(watched):
    with Terminal(watched.address) as terminal:
        terminal.until("● live(.|\n)*vlcache 10.0%")
        picture = draw_prompt(95, "image").images
        answer = watched.server.generate("what", picture, max_new_tokens=2, rid="seen live")
        terminal.until(rf"seen live +vlcache +{report(answer)['prompt_tokens']}(.*)✓ finished")
        terminal.type("q")
        terminal.ends_cleanly()


@pytest.mark.parametrize("end", ["q", "\x03", "SIGTERM"])
def test_without_a_server_it_waits_and_ends_when_told(end):
    with Terminal(str(free_port()), columns=60) as terminal:
        terminal.until(r"waiting for tcp://127\.0\.0\.1:\d+")
        if end == "q":
            terminal.type(end)
        else:  # what Ctrl-C sends, or a service manager
            os.kill(terminal.process.pid, signal.SIGINT if end == "\x03" else signal.SIGTERM)
        terminal.ends_cleanly()


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)


def test_in_a_pipe_it_prints_text(watched):
    once = run(watched.address, "--once")
    assert once.returncode == 0 and "Pool of 3,000 slots" in once.stdout and "\x1b" not in once.stdout
    plain = run("--replay", str(watched.recording), "--speed", "0")
    lines = plain.stdout.splitlines()
    told = [each for each in map(line, watched.messages) if each]
    assert told == lines[: len(told)]
    assert "none lost" in lines[-1]
    replayed = run("--replay", str(watched.recording), "--speed", "0", "--once").stdout.splitlines()
    assert replayed[-20:] == lines[-20:]


def test_mistakes_are_a_sentence(tmp_path):
    (tmp_path / "messages").write_bytes(b"no message\n\n")
    for arguments, said in {
        ("somewhere",): "the endpoint is 'somewhere'; it must be a port",
        ("--replay", "no/such/file"): "No such file",
        ("--replay", str(tmp_path / "messages"), "--record", "other"): "give it without --replay",
        ("--replay", str(tmp_path / "messages")): "line 1: not a recorded message",
        ("--seconds", "nan", "--once"): "'nan' is not a finite number above 0",
        ("--speed", "-1"): "'-1' is not a finite number of at least 0",
        (f"ipc://{'x' * 200}", "--once"): "cannot be listened to: File name too long",
    }.items():
        done = run(*arguments)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    nobody = run(str(free_port()), "--once", "--seconds", "0.5")
    assert nobody.returncode == 1 and "waiting for" in nobody.stdout
