"""Subscribers of a server's live events, on the test's own thread."""

from __future__ import annotations

import itertools
import random
import time
from contextlib import closing
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import orjson
import zmq

from sglang_vlkv.monitor.feeds import LiveFeed
from sglang_vlkv.monitor.state import State
from tests.conversation import evict_exact_kv, talk
from tests.prompts import draw_prompt, picture
from tests.serving import Server, report


def events_of(server: Server) -> str:
    """Where a server publishes, by its own account."""
    return server.info()["internal_states"][0]["kv_events"]["endpoint"]


class Listener:
    """Subscribes to all kinds, and has been answered; a context manager.

    Attributes:
        messages: those read so far.
    """

    def __init__(self, address: str) -> None:
        self.messages: list[dict] = []
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.set_hwm(1_000_000)
        self._socket.subscribe(b"")
        self._socket.connect(address)
        self._asked = 0
        self.read_all()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_) -> None:
        self._context.destroy(linger=0)

    def read_all(self, timeout: float = 30) -> list[dict]:
        """All messages, with those of what has happened by now.

        A new subscription is answered by a message of kind ``server``, which says whether all is sent.
        """
        asked = time.time()
        self._asked += 1
        self._socket.subscribe(f"nothing {self._asked}".encode())
        while time.time() < asked + timeout:
            message = self._next()
            if message and message["kind"] == "server" and message["time"] > asked and not message["queued"]:
                return self.messages
        raise TimeoutError(f"no server's message after {timeout} s")

    def read_on(self) -> None:
        """What comes until nothing has come for 100 milliseconds; the server may have ended."""
        while self._next():
            pass

    def _next(self) -> dict | None:
        """The next message, if one comes within 100 milliseconds."""
        if not self._socket.poll(100):
            return None
        topic, payload = self._socket.recv_multipart()
        message = orjson.loads(payload)
        assert topic.decode() == message["kind"]
        self.messages.append(message)
        return message

    def of_kind(self, kind: str) -> list[dict]:
        return of_kind(self.messages, kind)


def of_kind(messages: list[dict], kind: str) -> list[dict]:
    return [message for message in messages if message["kind"] == kind]


def attempts(missing: str, seconds: float = 120) -> Iterator[int]:
    """Counts up while the caller waits for what is ``missing``, and fails after so long."""
    deadline = time.monotonic() + seconds
    for attempt in itertools.count():
        yield attempt
        assert time.monotonic() < deadline, f"not there after {seconds} s: {missing}"


def num_missed(messages: list[dict]) -> int:
    """Gaps in their numbers."""
    numbers = [message["seq"] for message in messages]
    return numbers[-1] - numbers[0] + 1 - len(numbers)


class Watched(NamedTuple):
    """What a server did, and what two subscribers saw of it.

    Attributes:
        find: gives the server; another one, started alike, where it has been stopped since.
        answers: of all requests.
        messages: as the first subscriber read them.
        state: as the second, the monitor's, folded them.
        recording: as the monitor recorded them.
    """

    find: Callable[[], Server]
    answers: list[dict]
    messages: list[dict]
    state: State
    recording: Path

    @property
    def server(self) -> Server:
        return self.find()

    @property
    def address(self) -> str:
        return events_of(self.server)


def waiting(server: Server) -> list[dict]:
    """One prompt whose kept rows are more than what is computed of it, asked by many at once, with room
    for the longest output of one of them. They end long before that."""
    body = draw_prompt(9, "image").body(2000, custom={"kv_budget": 0.9}, stop_regex=".{60}")
    return server.many([body]) + server.together([body] * 4)


def watch(find: Callable[[], Server], pool: int, recording: Path) -> Watched:
    """A conversation that goes on from its twins, many questions about one picture, more than the pool
    of ``pool`` slots holds, different pictures, text, and a flush."""
    server = find()
    server.flush()
    address, state, rng = events_of(server), State(), random.Random(7)
    with (
        Listener(address) as listener,
        recording.open("wb") as record,
        closing(LiveFeed(address, record)) as feed,
    ):
        said = [("what is this", [picture(rng, 448, 448)]), ("and left of it", []), ("above", [])]
        _, answers = talk(server, said, None, lambda: evict_exact_kv(server, pool))
        asked = draw_prompt(3, "image").images
        tight = {"max_new_tokens": 64, "ignore_eos": False, "custom": {"kv_budget": 0.3}}
        for attempt in attempts("two retractions"):
            questions = [Server.body(f"number {i} of {attempt}", asked, **tight) for i in range(25)]
            answers += server.many(questions[:1]) + server.many(questions[1:])
            if sum(report(answer)["retractions"] for answer in answers) >= 2:
                break
        for _ in attempts("a request that waits for room"):
            answers += waiting(server)
            listener.read_all()
            if listener.of_kind("deferred"):
                break
        answers += server.many([draw_prompt(seed, "image").body(8, rid=f"image {seed}") for seed in range(4)])
        answers += server.many([draw_prompt(seed, "text").body(8) for seed in range(4)])
        ended = time.time()
        for _ in attempts("what the idle pool holds"):
            time.sleep(0.1)
            listener.read_all()
            if any(message["time"] > ended for message in listener.of_kind("pool")):
                break
        server.flush()
        last = listener.read_all()[-1]["seq"]
        for _ in attempts(f"message {last}, for the monitor"):
            for received, message in feed.read(1.0):
                state.fold(message, received)
            if state.replicas and state.replicas[0].next_seq > last:
                break
    return Watched(find, answers, listener.messages, state, recording)
