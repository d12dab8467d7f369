"""What is known of a server from the messages so far."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from typing import Callable

from sglang_vlkv.observe.publisher import SCHEMA

BINS = 20  # of the histogram of kept shares, from 0 to 1
REMEMBERED = 200  # requests
AVERAGED = 50  # compactions that the layers' means run over
WINDOW_SECONDS = 10.0  # of the rates
RATES = ("requests", "prompt tokens", "output tokens", "freed bytes", "pass seconds")


@dataclass
class Request:
    """A request as far as it is known; None where nothing has been heard of that.

    Attributes:
        reason: why its prompt was left alone.
        kept: share of its prompt's memory that stays.
        freed: bytes that its compaction gave back, on one rank.
        outcome: ``running``, ``waits``, ``put back``, or how it ended.
    """

    rid: str
    policy: str | None = None
    reason: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    kept: float | None = None
    freed: int | None = None
    prefix: str | None = None
    outcome: str = "running"


@dataclass
class Replica:
    """One publisher.

    Attributes:
        server: its last message of kind ``server``.
        pool: its last of kind ``pool``.
        next_seq: of the message that comes next if none is lost.
        missed: messages that were published and did not arrive.
        dropped: events that it could not queue.
        restarts: how often it began to count anew.
    """

    server: dict = field(default_factory=dict)
    pool: dict = field(default_factory=dict)
    next_seq: int | None = None
    missed: int = 0
    dropped: int = 0
    restarts: int = 0


@dataclass
class State:
    """All replicas together. Equal after equal messages.

    Attributes:
        messages: how many there were.
        foreign: of them, those that this version cannot read, by their schema.
        last: when the last one was received, unix seconds.
        now: the newest time on a message.
        since: the first.
        kinds: events since then, by kind.
        ended: requests that ended, by outcome.
        prefixes: of those that ended.
        histogram: compactions by kept share.
        kept_total, full_total: bytes of all compacted prompts.
        kept_last: the last compaction's share.
        layers, sparsity: of the last compactions, a list per compaction with a share per layer.
        requests: the last ones heard of, the newest last.
        rates: per name, when and how much.
    """

    replicas: dict[int, Replica] = field(default_factory=dict)
    messages: int = 0
    foreign: Counter = field(default_factory=Counter)
    last: float | None = None
    now: float = -math.inf
    since: float | None = None
    kinds: Counter = field(default_factory=Counter)
    ended: Counter = field(default_factory=Counter)
    prefixes: Counter = field(default_factory=Counter)
    histogram: list[int] = field(default_factory=lambda: [0] * BINS)
    kept_total: int = 0
    full_total: int = 0
    kept_last: float | None = None
    layers: deque = field(default_factory=lambda: deque(maxlen=AVERAGED))
    sparsity: deque = field(default_factory=lambda: deque(maxlen=AVERAGED))
    requests: OrderedDict[str, Request] = field(default_factory=OrderedDict)
    rates: dict[str, deque] = field(default_factory=lambda: {name: deque() for name in RATES})

    def fold(self, message: dict, received: float) -> None:
        """Takes in one message, received at this unix time."""
        self.messages, self.last = self.messages + 1, received
        if message.get("schema") != SCHEMA:
            self.foreign[str(message.get("schema"))] += 1
            return
        self.now = max(self.now, message["time"])
        self.since = self.now if self.since is None else self.since
        replica = self.replicas.setdefault(message["dp_rank"], Replica())
        self._count(replica, message)
        kind = message["kind"]
        if kind == "server":
            replica.server = message
        elif kind == "pool":
            replica.pool = message
        else:
            self.kinds[kind] += 1
            take = _TAKE.get(kind)
            if take is not None:
                take(self, message)

    def _count(self, replica: Replica, message: dict) -> None:
        seq = message["seq"]
        if replica.next_seq is not None and seq < replica.next_seq:
            replica.restarts += 1
            replica.server, replica.pool = {}, {}
        elif replica.next_seq is not None:
            replica.missed += seq - replica.next_seq
        replica.next_seq, replica.dropped = seq + 1, message["dropped"]

    def _request(self, message: dict) -> Request:
        request = self.requests.pop(message["rid"], None) or Request(message["rid"])
        self.requests[request.rid] = request
        while len(self.requests) > REMEMBERED:
            self.requests.popitem(last=False)
        return request

    def _compacted(self, message: dict) -> None:
        request, n = self._request(message), message["prompt_tokens"]
        share = message["kept_bytes"] / message["full_bytes"]
        request.policy, request.prompt_tokens, request.kept = message["policy"], n, share
        request.freed, request.outcome = message["full_bytes"] - message["kept_bytes"], "running"
        if message["shared"]:
            request.prefix = "shared"
        self.kept_last = share
        self.kept_total += message["kept_bytes"]
        self.full_total += message["full_bytes"]
        self.histogram[min(BINS - 1, int(share * BINS))] += 1
        layers = [rows / n for rows in message["kept_per_layer"]]
        for past, new in ((self.layers, layers), (self.sparsity, message["sparsity_per_layer"])):
            if past and new is not None and len(new) != len(past[0]):
                past.clear()  # another model
            if new is not None:
                past.append(new)
        self._add("freed bytes", message, request.freed)

    def _pass(self, message: dict) -> None:
        self._add("pass seconds", message, message["seconds"])

    def _twin_hit(self, message: dict) -> None:
        request = self._request(message)
        request.prefix, request.prompt_tokens = message["prefix"], message["prompt_tokens"]
        request.outcome = "running"

    def _waits(self, message: dict) -> None:
        self._request(message).outcome = "waits"

    def _no_room(self, message: dict) -> None:
        self._request(message).outcome = "put back"

    def _released(self, message: dict) -> None:
        request = self._request(message)
        if message.get("draft") and message["outcome"] != "aborted":  # its request is still to come
            request.outcome = "drafted"
            return
        for name in ("policy", "reason", "prefix", "prompt_tokens", "output_tokens", "outcome"):
            setattr(request, name, message[name])
        self.ended[message["outcome"]] += 1
        if message["outcome"] != "retracted":  # else it comes again
            self.prefixes[message["prefix"]] += 1
            self._add("requests", message, 1)
            self._add("prompt tokens", message, message["prompt_tokens"])
            self._add("output tokens", message, message["output_tokens"])

    def _add(self, name: str, message: dict, amount: float) -> None:
        past = self.rates[name]
        past.append((message["time"], amount))
        while past[0][0] < message["time"] - WINDOW_SECONDS:
            past.popleft()

    def rate(self, name: str) -> float:
        """Per second, over the last ten or since the first message."""
        start = max(self.since or 0, self.now - WINDOW_SECONDS)
        amount = sum(amount for at, amount in self.rates[name] if at >= start)
        return amount / (self.now - start) if self.now > start else 0.0

    def pool(self, name: str) -> int:
        """A count of the last ``pool`` messages, over all replicas."""
        return sum(replica.pool.get(name, 0) for replica in self.replicas.values())

    def bytes(self, name: str) -> int:
        """The same of slots, in bytes."""
        return sum(r.pool.get(name, 0) * r.pool.get("slot_bytes", 0) for r in self.replicas.values())

    def twins(self, name: str) -> int:
        """A count of the last ``server`` messages' ``twins``, over all replicas."""
        return sum(replica.server.get("twins", {}).get(name, 0) for replica in self.replicas.values())

    @property
    def missed(self) -> int:
        return sum(replica.missed for replica in self.replicas.values())

    @property
    def dropped(self) -> int:
        return sum(replica.dropped for replica in self.replicas.values())

    @property
    def server(self) -> dict:
        """What a replica says of itself; they were started alike."""
        return next((replica.server for replica in self.replicas.values() if replica.server), {})


def means(rows: deque) -> list[float]:
    """Per layer."""
    return [sum(layer) / len(rows) for layer in zip(*rows, strict=True)]


_TAKE: dict[str, Callable[[State, dict], None]] = {
    "compacted": State._compacted,
    "pass": State._pass,
    "twin_hit": State._twin_hit,
    "deferred": State._waits,
    "no_room": State._no_room,
    "released": State._released,
}
