"""Live events: every kind, the report's numbers, lost messages, addresses, and their documentation."""

from __future__ import annotations

import re
import select
import subprocess
import sys
from collections import Counter, defaultdict

import orjson
import pytest
import zmq

from sglang_vlkv.monitor.state import State
from sglang_vlkv.observe import events, publisher
from sglang_vlkv.observe.publisher import KINDS, Publisher, address, check_free, encode, is_public, of_replica
from sglang_vlkv.options.config import DEFAULTS, REQUEST_KEYS
from tests.documents import quoted, section, table
from tests.listening import Listener, attempts, num_missed, of_kind
from tests.prompts import draw_prompt
from tests.serving import ROOT, free_port, report

DOCUMENTATION = (ROOT / "docs" / "events.md").read_text()


# ---- A server's ----


def test_every_kind_arrives_and_nothing_is_lost(watched):
    """``no_room`` takes a defect: tests/test_pressure.py plants it."""
    kinds = Counter(message["kind"] for message in watched.messages)
    print(kinds)
    assert set(kinds) == {*KINDS.values(), "server"} - {"no_room"}
    assert num_missed(watched.messages) == 0
    assert {message["dropped"] for message in watched.messages} == {0}
    assert {message["schema"] for message in watched.messages} == {1}
    assert {message["dp_rank"] for message in watched.messages} == {0}
    counts = [message["counts"] for message in of_kind(watched.messages, "server")]
    for kind in set(KINDS.values()) - {"no_room"}:
        assert counts[-1][kind] - counts[0].get(kind, 0) <= kinds[kind] <= counts[-1][kind]


def test_a_messages_fields_are_the_documented_ones(watched):
    for message in watched.messages:
        assert list(message) == [*documented("Messages"), *documented(f"`{message['kind']}`")]


def test_events_say_what_the_reports_say(watched):
    """Of every request. One that was retracted goes on from its rows, or is compacted again; what its
    report says is of the last time."""
    compacted = {message["rid"]: message for message in of_kind(watched.messages, "compacted")}
    released = {message["rid"]: message for message in of_kind(watched.messages, "released")}
    hits = {message["rid"]: message for message in of_kind(watched.messages, "twin_hit")}
    met = Counter()
    for answer in watched.answers:
        seen, rid = report(answer), answer["meta_info"]["id"]
        event = compacted.get(rid)
        if seen["policy"] == "none":
            assert event is None
        elif seen["retractions"]:  # it may have been compacted before, after, or found a twin at once
            assert event is not None or rid in hits
        else:
            assert (event is None) == (rid in hits)
        if event is not None:
            shared = ("policy", "budget", "prompt_tokens", "visual_tokens", "kept_per_layer")
            shared += ("kept_per_modality", "sparsity_per_layer", "kept_bytes", "full_bytes")
            assert {name: event[name] for name in shared} == {name: seen[name] for name in shared}
        end = released[rid]
        found = {"kind": end["prefix"], "tokens": end["prefix_tokens"]}
        assert end["policy"] == seen["policy"] and found.items() <= seen["prefix"].items()
        assert end["prompt_tokens"] == seen["prompt_tokens"]
        assert end["output_tokens"] == answer["meta_info"]["completion_tokens"]
        assert bool(end["reason"]) == (seen["policy"] == "none")
        if seen["policy"] != "none":
            assert end["bytes"] == seen["last_bytes"]
        if rid in hits:
            assert (hits[rid]["prefix"], hits[rid]["covered"]) == tuple(seen["prefix"].values())[:2]
        met.update(compacted=event is not None, hit=rid in hits, retracted=bool(seen["retractions"]))
    print(met)
    assert min(met.values()) >= 2


def test_every_row_is_given_back_once(watched):
    """As often as its report says that it was retracted, and at its end."""
    outcomes, retractions = defaultdict(Counter), Counter()
    for message in of_kind(watched.messages, "released"):
        outcomes[message["rid"]][message["outcome"]] += 1
    for answer in watched.answers:
        rid, times = answer["meta_info"]["id"], report(answer)["retractions"]
        assert outcomes.pop(rid) == Counter(finished=1, retracted=times)
        retractions[rid] = times
    assert retractions.total() >= 2
    # What is left are the requests that press exact KV out of the pool.
    assert all(outcome == Counter(finished=1) for outcome in outcomes.values())
    compacted = Counter(message["rid"] for message in of_kind(watched.messages, "compacted"))
    assert len(compacted) >= 25
    assert all(count <= 1 + retractions[rid] for rid, count in compacted.items())


def test_passes_add_up_to_compactions(watched):
    """A pass is told behind its requests."""
    pending = 0
    for message in watched.messages:
        if message["kind"] == "compacted":
            pending += 1
        elif message["kind"] == "pass":
            assert message["requests"] == pending and 0 < message["seconds"] < 60
            pending = 0
    assert pending == 0


def test_twins_come_and_go_one_by_one(watched):
    """Ids, bytes and the pool's count agree at every eviction and at the end."""
    alive, hits, idle, newest = {}, 0, {}, {}
    for message in watched.messages:
        match message["kind"]:
            case "twin_created":
                assert message["twin"] not in alive
                alive[message["twin"]] = message["bytes"]
            case "twin_evicted":
                assert alive.pop(message["twin"]) == message["bytes"]
            case "twin_hit":
                assert message["twin"] in alive
                hits += 1
            case "flushed":
                assert message["twins"] == len(alive)
                assert idle["twins"] * idle["slot_bytes"] == sum(alive.values())
                alive = {}
            case "pool":
                idle = message
            case "server" if not message["queued"]:
                newest = message
    assert not alive and hits >= 2
    begin = of_kind(watched.messages, "server")[0]
    assert newest["twins"]["hits"] - begin["twins"]["hits"] == hits
    evicted = len(of_kind(watched.messages, "twin_evicted"))
    assert newest["twins"]["evictions"] - begin["twins"]["evictions"] >= evicted >= 2


def test_the_pool_is_whole(watched):
    """Free, exact cache, idle twins and what requests hold are all of it."""
    pools = of_kind(watched.messages, "pool")
    assert len(pools) >= 5
    for pool in pools:
        idle = pool["twins"] - pool["twins_read"]
        assert 0 <= idle <= pool["evictable"] and pool["twins_read"] >= 0
        assert pool["size"] - pool["free"] - pool["evictable"] >= pool["twins_read"]
    idle = pools[-1]
    assert idle["free"] + idle["evictable"] == idle["size"]
    assert idle["running"] == idle["waiting"] == idle["twins_read"] == 0
    assert max(pool["running"] for pool in pools) > 4
    assert any(pool["twins_read"] for pool in pools) and any(pool["waiting"] for pool in pools)


def test_a_server_is_the_same_without_subscribers(watched):
    """It counts on, and who comes later is told at once."""
    with Listener(watched.address) as listener:
        before = listener.read_all()[-1]
    watched.server.many([draw_prompt(seed, "image").body(4) for seed in (70, 71)])
    with Listener(watched.address) as listener:
        after = listener.read_all()[-1]
    for kind in ("released", "compacted"):
        assert after["counts"][kind] - before["counts"].get(kind, 0) == 2
    happened = sum(after["counts"].values()) - sum(before["counts"].values())
    assert after["seq"] - before["seq"] > happened and after["started"] == before["started"]
    assert (after["layers"], after["slots"], after["policy"]) == (4, 3000, "vlcache")


def test_who_never_reads_holds_up_nobody(watched):
    """Thousands of messages that a subscriber leaves lying; answers, and what others get, are the same."""
    server = watched.server
    bodies = [draw_prompt(seed, "image").body(16) for seed in (80, 81)]
    server.flush()
    undisturbed = server.many(bodies, workers=1)
    server.flush()
    with zmq.Context() as context, context.socket(zmq.SUB) as stalled, Listener(watched.address) as listener:
        stalled.setsockopt(zmq.LINGER, 0)
        stalled.setsockopt(zmq.RCVHWM, 1)
        stalled.setsockopt(zmq.RCVBUF, 4096)
        stalled.subscribe(b"")
        stalled.connect(watched.address)
        texts = {"text": ["how are you"] * 500, "sampling_params": {"max_new_tokens": 1}}
        for _ in range(4):
            assert server.post("/generate", texts).status_code == 200
        answers = server.many(bodies, workers=1)
        messages = listener.read_all()
    assert len(of_kind(messages, "released")) >= 2002
    assert num_missed(messages) == 0 and messages[-1]["dropped"] == 0
    for one, other in zip(undisturbed, answers, strict=True):
        assert one["output_ids"] == other["output_ids"]
        assert report(one)["kept_per_layer"] == report(other)["kept_per_layer"]


def test_server_info_has_the_endpoint_and_what_was_dropped(watched):
    [state] = watched.server.info()["internal_states"]
    assert state["kv_events"] == {"endpoint": watched.address, "schema": 1, "queued": 0, "dropped": 0}


def test_requests_cannot_name_an_endpoint(watched):
    assert set(DEFAULTS) - set(REQUEST_KEYS) == {"kv_events_endpoint"}
    body = draw_prompt(0, "text").body(1, custom={"kv_events_endpoint": "5558"})
    answer = watched.server.post("/generate", body)
    assert answer.status_code == 400 and "kv_events_endpoint is unknown" in answer.text


# ---- The queue, and subscribers that lag ----

USE = events.PoolUse(100, 50, 25, 10, 5, 2048, 1, 0)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes publishers, and closes them. They say who they are to new subscribers only."""
    monkeypatch.setattr(publisher, "SERVER_SECONDS", 3600.0)
    publishers = []

    def make(address: str = f"ipc://{tmp_path}/events", **described) -> Publisher:
        publishers.append(Publisher(address, 3, lambda: described))
        return publishers[-1]

    yield make
    for one in publishers:
        one.close()


def test_what_finds_the_queue_full_is_dropped_and_counted(made, monkeypatch):
    monkeypatch.setattr(publisher, "MAX_QUEUED", 100)
    monkeypatch.setattr(publisher, "ROUND_EVENTS", 0)  # the sender sends nothing meanwhile
    one = made()
    with Listener(one.address) as listener:
        for number in range(250):
            one(events.Deferred(f"request {number}"))
        assert one.describe() == {"endpoint": one.address, "schema": 1, "queued": 100, "dropped": 150}
        monkeypatch.setattr(publisher, "ROUND_EVENTS", 256)
        messages = listener.read_all()
    told = of_kind(messages, "deferred")
    assert [message["rid"] for message in told] == [f"request {number}" for number in range(100)]
    assert {message["dropped"] for message in told} == {150} and num_missed(messages) == 0
    assert {message["dp_rank"] for message in messages} == {3}
    one(events.Deferred("later"))
    assert one.dropped == 150


def test_who_lags_misses_messages_and_sees_that(made, monkeypatch):
    """Others miss none."""
    monkeypatch.setattr(publisher, "MAX_UNREAD", 500)
    one = made()
    with zmq.Context() as context, context.socket(zmq.SUB) as stalled, Listener(one.address) as listener:
        stalled.setsockopt(zmq.LINGER, 0)
        stalled.setsockopt(zmq.RCVHWM, 1)
        stalled.subscribe(b"")
        stalled.connect(one.address)
        assert stalled.poll(10_000), "it has subscribed, and is answered"
        for _ in range(40):
            for _ in range(100):
                one(USE)
            listener.read_all()
        assert num_missed(listener.messages) == 0
        assert len(listener.of_kind("pool")) == 4000
        late = []
        while stalled.poll(500):
            late.append(orjson.loads(stalled.recv_multipart()[1]))
    print(f"{len(late)} messages were kept for the one that did not read")
    assert 500 <= len(late) < 4000 and one.dropped == 0
    state = State()
    for message in late:
        assert message in listener.messages
        state.fold(message, 0.0)
    assert late[0]["seq"] + len(late) + state.missed == late[-1]["seq"] + 1
    one(USE)
    with Listener(one.address) as another:
        assert another.messages[-1]["counts"] == {"pool": 4001}


def test_closing_sends_what_is_queued_and_frees_the_address(monkeypatch):
    monkeypatch.setattr(publisher, "ROUND_EVENTS", 10_000)
    monkeypatch.setattr(publisher, "LAST_SECONDS", 60)  # for machines that are slow
    one = Publisher(f"tcp://127.0.0.1:{free_port()}", 0, dict)
    with Listener(one.address) as listener:
        for _ in range(9000):
            one(USE)
        one.close()
        for _ in attempts("all that was queued"):
            listener.read_on()
            if len(listener.of_kind("pool")) == 9000:
                break
    check_free(one.address, 1)


IDS = {
    "long": "x" * 1000, "half": "half of a pair: \ud83d", "accents": "ünï", "controls": "\x1b[31m\x07\n\x7f\x00",
    "C1": "\x9b2J", "directions": "a\u202eb\u2028c\U000e0041",
}  # fmt: skip


@pytest.mark.parametrize("rid", IDS.values(), ids=IDS)
def test_any_id_can_be_sent(rid):
    """As the client wrote it, for whoever asks for its report; and no byte of it is an order to a terminal."""
    sent = encode({"rid": rid, "seconds": 1e-7, "sparsity_per_layer": None})
    message = orjson.loads(sent)
    assert len(message["rid"]) <= 256 and message["rid"] == rid[:256].replace("\ud83d", "?")
    assert message["seconds"] == 1e-7 and message["sparsity_per_layer"] is None
    assert all(0x20 <= byte < 0x7F for byte in sent)


# ---- Addresses ----


@pytest.mark.parametrize("given, meant", [
    (5558, "tcp://127.0.0.1:5558"),
    ("5558", "tcp://127.0.0.1:5558"),
    ("tcp://localhost:5558", "tcp://127.0.0.1:5558"),
    ("tcp://*:5558", "tcp://*:5558"),
    ("tcp://[::1]:5558", "tcp://[::1]:5558"),
    ("ipc:///run/kv-events", "ipc:///run/kv-events"),
])  # fmt: skip
def test_addresses(given, meant):
    assert address(given) == meant


@pytest.mark.parametrize("given", [
    "", "0", "65536", "-1", "5558x", "localhost:5558", "tcp://5558", "tcp://*", "tcp://*:0", "tcp://a b:1",
    "udp://127.0.0.1:5558", "inproc://events", "ipc://", "http://127.0.0.1:5558", True, "tcp://127.0.0.1:*",
])  # fmt: skip
def test_what_is_no_address_is_refused(given):
    with pytest.raises(ValueError, match="--kv-events-endpoint is .*; it must be a port"):
        address(given)


def test_only_loopback_and_files_are_private():
    private = ("tcp://127.0.0.1:1", "tcp://127.9.9.9:1", "tcp://[::1]:1", "ipc:///run/kv-events")
    public = ("tcp://*:1", "tcp://0.0.0.0:1", "tcp://[::]:1", "tcp://10.0.0.7:1", "tcp://127.0.0.1.example:1")
    assert [is_public(one) for one in private + public] == [False] * 4 + [True] * 5


def test_replicas_publish_next_to_each_other():
    assert [of_replica("tcp://*:5558", rank) for rank in (0, 2)] == ["tcp://*:5558", "tcp://*:5560"]
    assert [of_replica("ipc://x", rank) for rank in (0, 2)] == ["ipc://x", "ipc://x.2"]
    with pytest.raises(ValueError, match="no port for replica 2"):
        of_replica("tcp://127.0.0.1:65534", 2)


@pytest.mark.parametrize("kind", ["tcp", "ipc"])
def test_an_address_that_is_taken_is_refused_and_left_alone(made, tmp_path, kind):
    base = f"tcp://127.0.0.1:{free_port()}" if kind == "tcp" else f"ipc://{tmp_path}/events"
    taken = made(of_replica(base, 1))
    check_free(base, 1)
    for attempt in (lambda: check_free(base, 2), lambda: Publisher(taken.address, 1, dict)):
        with pytest.raises(ValueError, match="cannot be bound: Address already in use. Another server may"):
            attempt()
    with Listener(taken.address) as listener:
        taken(USE)
        listener.read_all()
        assert len(listener.of_kind("pool")) == 1


# ---- Documentation ----


def documented(heading: str) -> list[str]:
    """The fields in the table of a section of docs/events.md."""
    return [quoted(row[0])[0] for row in table(section(DOCUMENTATION, heading), "field")]


def test_all_fields_of_all_kinds_are_documented():
    for event, kind in KINDS.items():
        assert list(event._fields) == documented(f"`{kind}`"), kind
    kinds = re.findall(r"^### `(\w+)`$", DOCUMENTATION, re.M)
    assert sorted(kinds) == sorted([*KINDS.values(), "server"])
    assert f"| `schema` | int | {publisher.SCHEMA} |" in DOCUMENTATION


def test_events_are_those_of_the_seam():
    """A new one needs a kind, and a place in the documentation."""
    assert set(KINDS) == set(events.Event.__args__)


def test_the_documented_subscriber_prints_compactions(watched):
    [code] = re.findall(r"```python\n(.*?)```", DOCUMENTATION, re.S)
    assert len(code.strip().splitlines()) <= 14
    command, reports = [sys.executable, "-c", code, watched.address], {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        for seed in range(100, 200):
            answer = watched.server.generate("what", draw_prompt(seed, "image").images, max_new_tokens=2)
            reports[answer["meta_info"]["id"]] = report(answer)
            if select.select([reader.stdout], [], [], 0.1)[0]:  # it takes a moment to connect
                break
        rid, policy, share = reader.stdout.readline().split()
        reader.terminate()
    seen = reports[rid]
    assert (policy, share) == ("vlcache", str(seen["kept_bytes"] / seen["full_bytes"]))
