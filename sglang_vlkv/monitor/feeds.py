"""Where messages come from: a server, or a file that an earlier watch has recorded."""

from __future__ import annotations

import time
from pathlib import Path
from typing import BinaryIO, Iterator

import orjson
import zmq

from sglang_vlkv.commands import Problem
from sglang_vlkv.monitor.messages import known
from sglang_vlkv.observe.publisher import as_ascii, of_replica

Received = tuple[float, dict]  # unix seconds, message


class LiveFeed:
    """A server's messages; of all its data-parallel replicas, once one has said how many there are.

    Args:
        address: as :func:`sglang_vlkv.observe.publisher.address` returns it. Nobody need be there yet.
        record: every message is written there as it came, a line each.

    Raises:
        Problem: nobody can be there.
    """

    done = False

    def __init__(self, address: str, record: BinaryIO | None = None) -> None:
        self._address = address.replace("://*:", "://127.0.0.1:")
        self._record = record
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, 100_000)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IPV6, "[" in address)
        self._socket.subscribe(b"")
        self._connected: set[str] = set()
        self._connect(1)

    def _connect(self, replicas: int) -> None:
        try:
            addresses = {of_replica(self._address, dp_rank) for dp_rank in range(replicas)}
            for address in addresses - self._connected:
                self._socket.connect(address)
                self._connected.add(address)
        except ValueError as error:
            self.close()
            raise Problem(f"{error}.") from error
        except zmq.ZMQError as error:
            self.close()
            raise Problem(f"{self._address} cannot be listened to: {zmq.strerror(error.errno)}.") from error

    def read(self, seconds: float, most: int = 1000) -> Iterator[Received]:
        """What has arrived; waits so long for the first."""
        patience = 1000 * seconds
        while most and self._socket.poll(patience):
            received, sent = time.time(), decode(self._socket.recv_multipart())
            if self._record is not None:
                self._record.write(as_ascii({"received": received, "message": sent}) + b"\n")
            message = known(sent)
            if message.get("kind") == "server":
                self._connect(message["replicas"])
            yield received, message
            most, patience = most - 1, 0

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class Replay:
    """A recording, at its own pace.

    Args:
        speed: how much faster; 0 leaves out the pauses.

    Attributes:
        done: there is no more.

    Raises:
        Problem: a line is no message. One at the end may be cut off.
    """

    def __init__(self, file: Path, speed: float = 1.0) -> None:
        self.done, self._speed, self._next = False, speed, 0
        self._messages = list(_recorded(file))
        self._started = time.monotonic()

    def read(self, seconds: float, most: int = 1000) -> Iterator[Received]:
        """Those that are due; waits at most so long for the first."""
        until = time.monotonic() + seconds
        for _ in range(most):
            if self._next == len(self._messages):
                self.done = True
                time.sleep(max(0.0, until - time.monotonic()))
                return
            if (wait := self._due() - time.monotonic()) > 0:
                time.sleep(max(0.0, min(wait, until - time.monotonic())))
                if self._due() > time.monotonic():
                    return
            self._next += 1
            yield self._messages[self._next - 1]

    def _due(self) -> float:
        if not self._speed:
            return self._started
        return self._started + (self._messages[self._next][0] - self._messages[0][0]) / self._speed

    def close(self) -> None:
        self._messages = []


def _recorded(file: Path) -> Iterator[Received]:
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            if line:
                record = orjson.loads(line)
                yield float(record["received"]), known(dict(record["message"]))
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            if number < len(lines):
                raise Problem(f"{file}, line {number}: not a recorded message.") from None


def decode(frames: list[bytes]) -> dict:
    """The message in a ZeroMQ message's ``[topic, payload]``; empty where somebody else sent it."""
    try:
        message = orjson.loads(frames[-1])
    except orjson.JSONDecodeError:
        return {}
    return message if isinstance(message, dict) else {}
