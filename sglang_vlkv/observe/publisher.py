"""Live events on a ZeroMQ socket, for programs that watch a server (docs/events.md)."""

from __future__ import annotations

import json
import re
import socket
import time
from collections import Counter, deque
from threading import Event as Flag
from threading import Thread
from typing import Callable

import orjson
import zmq

from sglang_vlkv.observe import events

FLAG = "--kv-events-endpoint"
SCHEMA = 1  # raised when a field goes or means something else; new ones may come under the same number
SERVER = "server"  # the kind of the messages that say what publishes and how far it is
KINDS = {
    events.Compacted: "compacted",
    events.Pass: "pass",
    events.TwinCreated: "twin_created",
    events.TwinHit: "twin_hit",
    events.TwinEvicted: "twin_evicted",
    events.Flushed: "flushed",
    events.Released: "released",
    events.Deferred: "deferred",
    events.NoRoom: "no_room",
    events.PoolUse: "pool",
}
MAX_QUEUED = 10_000  # events that wait for the sender
MAX_UNREAD = 10_000  # messages that wait for one subscriber
MAX_ID = 256  # characters of a request's id, which clients choose
ROUND_SECONDS, ROUND_EVENTS = 0.02, 256  # the sender's turns, so that it never holds up the scheduler
SERVER_SECONDS = 2.0
LAST_SECONDS = 1  # for subscribers to take what is sent before a publisher closes

LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|\[::1\]")
TCP = re.compile(r"tcp://(?P<host>\*|[\w.-]+|\[[\w:.%]+\]):(?P<port>\d{1,5})")
IPC = re.compile(r"ipc://.+")


def address(endpoint: str | int, source: str = FLAG) -> str:
    """``endpoint``, given by ``source``, as ZeroMQ writes it; a port alone is on loopback.

    Raises:
        ValueError: says what it may be.
    """
    text = str(endpoint).strip()
    if re.fullmatch(r"\d+", text):
        text = f"tcp://127.0.0.1:{text}"
    tcp = TCP.fullmatch(text)
    if not (IPC.fullmatch(text) or tcp and 0 < int(tcp["port"]) < 1 << 16):
        raise ValueError(
            f"{source} is {endpoint!r}; it must be a port (5558), an address to bind "
            "(tcp://127.0.0.1:5558, or tcp://*:5558 for all networks), or a file's (ipc:///tmp/kv-events)"
        )
    return text.replace("://localhost:", "://127.0.0.1:")


def of_replica(address: str, dp_rank: int) -> str:
    """Where a data-parallel replica publishes: at the next ports, or in files with its number behind.

    Raises:
        ValueError: there is no such port.
    """
    if not dp_rank:
        return address
    if IPC.fullmatch(address):
        return f"{address}.{dp_rank}"
    start, port = address.rsplit(":", 1)
    if int(port) + dp_rank >= 1 << 16:
        raise ValueError(f"{FLAG} {address} leaves no port for replica {dp_rank}; use a lower one")
    return f"{start}:{int(port) + dp_rank}"


def is_public(address: str) -> bool:
    """Whether other machines can reach it."""
    tcp = TCP.fullmatch(address)
    return tcp is not None and not LOOPBACK.fullmatch(tcp["host"])


def check_free(address: str, replicas: int) -> None:
    """Raises ValueError where a replica could not publish: the address is taken, or is not here."""
    for dp_rank in range(replicas):
        with zmq.Context() as context:
            _bound(context, of_replica(address, dp_rank)).close()


def _bound(context: zmq.Context, address: str) -> zmq.Socket:
    """A publishing socket. Of the XPUB type, which is told of subscriptions."""
    publishing = context.socket(zmq.XPUB)
    publishing.setsockopt(zmq.LINGER, 0)
    publishing.setsockopt(zmq.SNDHWM, MAX_UNREAD)
    publishing.setsockopt(zmq.XPUB_VERBOSE, 1)
    publishing.setsockopt(zmq.IPV6, "[" in address)
    try:
        if address.startswith("ipc://") and _is_listened_to(address.removeprefix("ipc://")):
            raise zmq.ZMQError(zmq.EADDRINUSE)  # ZeroMQ would take the file away from its owner
        publishing.bind(address)
    except zmq.ZMQError as error:
        publishing.close()
        raise ValueError(
            f"{FLAG} {address} cannot be bound: {zmq.strerror(error.errno)}. Another server may publish "
            "there; name an address of this machine that is free."
        ) from None
    return publishing


def _is_listened_to(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path.replace("@", "\0", 1) if path.startswith("@") else path)
        except OSError:
            return False
    return True


class Publisher:
    """A watcher that sends events to whoever subscribes, from a thread of its own.

    The scheduler's thread only appends to a queue. What finds it full is dropped and counted; what a
    subscriber does not read in time is lost to it alone, and it sees a gap in ``seq``. Nobody waits.

    Args:
        address: of :func:`address` and :func:`of_replica`.
        dp_rank: the replica's.
        describe: what the messages of kind ``server`` say; called on the sender's thread.

    Attributes:
        address: where it publishes.
        dropped: events that found the queue full.
        counts: events taken from the queue, by kind.

    Raises:
        ValueError: the address cannot be bound.
    """

    def __init__(self, address: str, dp_rank: int, describe: Callable[[], dict]) -> None:
        self.address, self.dropped, self.counts = address, 0, Counter()
        self._dp_rank, self._describe = dp_rank, describe
        self._queue: deque[tuple[float, events.Event]] = deque()
        self._topics: set[bytes] = set()
        self._seq, self._has_new = 0, False  # messages; subscribers that know nothing yet
        self._context = zmq.Context()
        self._socket = _bound(self._context, address)
        self._closing = Flag()
        self._sender = Thread(target=self._run, name="kv-events", daemon=True)
        self._sender.start()

    def __call__(self, event: events.Event) -> None:
        if len(self._queue) < MAX_QUEUED:
            self._queue.append((time.time(), event))
        else:
            self.dropped += 1

    def describe(self) -> dict:
        """For ``/server_info``."""
        queued = len(self._queue)
        return {"endpoint": self.address, "schema": SCHEMA, "queued": queued, "dropped": self.dropped}

    def close(self) -> None:
        """Sends what is queued and gives the address back."""
        self._closing.set()
        self._sender.join()
        self._socket.close(linger=1000 * LAST_SECONDS)
        self._context.term()

    def _run(self) -> None:
        next_server = 0.0
        while not self._closing.is_set() or self._queue:
            patience = 1000 * ROUND_SECONDS
            while self._socket.poll(patience):
                self._note(self._socket.recv())
                patience = 0
            for _ in range(min(len(self._queue), ROUND_EVENTS)):
                happened, event = self._queue.popleft()
                self.counts[KINDS[type(event)]] += 1
                self._send(KINDS[type(event)], happened, event._asdict())
            if time.monotonic() >= next_server or self._has_new:
                next_server, self._has_new = time.monotonic() + SERVER_SECONDS, False
                own = {"queued": len(self._queue), "counts": self.counts}
                self._send(SERVER, time.time(), self._describe() | own)

    def _note(self, message: bytes) -> None:
        """Of a subscription, or of the end of the last one to a topic."""
        begins, topic = message[:1] == b"\1", message[1:]
        if begins:
            self._topics.add(topic)
            self._has_new = True
        else:
            self._topics.discard(topic)

    def _send(self, kind: str, happened: float, fields: dict) -> None:
        if self._topics:
            head = {
                "schema": SCHEMA,
                "kind": kind,
                "seq": self._seq,
                "time": happened,
                "dp_rank": self._dp_rank,
                "dropped": self.dropped,
            }
            self._socket.send_multipart([kind.encode(), encode(head | fields)], zmq.DONTWAIT)
        self._seq += 1


def encode(message: dict) -> bytes:
    """As JSON. A client may have chosen an id that is long, or that UTF-8 cannot hold."""
    if "rid" in message:
        message["rid"] = message["rid"][:MAX_ID].encode(errors="replace").decode()
    return as_ascii(message)


def as_ascii(message: dict) -> bytes:
    """As JSON of printable ASCII: the value is exact, and a terminal that is shown the bytes obeys none."""
    data = orjson.dumps(message)
    plain = data.isascii() and b"\x7f" not in data
    return data if plain else json.dumps(message, separators=(",", ":")).encode()
