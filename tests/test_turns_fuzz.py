"""Conversations that are chunked, mixed, aborted, retracted, flushed and paused, in tiny pools."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import requests

from tests.conftest import FLEET
from tests.conversation import Conversation, evict_exact_kv, talk, twins
from tests.equality import alike, assert_same, first_difference
from tests.prompts import CLIP, draw_prompt, picture, words
from tests.serving import POSITIONS, Server, report
from tests.test_turns import prefix, turns

REQUESTS = int(os.environ.get("VLKV_FUZZ", 120))  # over four servers
POLICIES = ["vlcache", "vlkv", "h2o", "elastic", "snapkv", "prefixkv", "lookm", "expected", "infinipotv"]


@dataclass
class Turn:
    prompt: Conversation
    body: dict
    answer: dict
    shows: bool  # something new to see


def converse(server: Server, index: int, counts: Counter) -> list[Turn]:
    """One client: up to five turns, until one of them is aborted. Its pictures are its own, so that
    nobody else's twins begin like its prompts."""
    rng = random.Random(f"conversation{index}")
    options = {
        "merge": rng.choice(["none", "none", "similar", "bucket_mean"]),
        "decode": rng.choice(["append", "append", "fixed_point"]),
    }
    custom = {"kv_budget": rng.choice([0.05, 0.1, 0.3]), **POSITIONS}
    if rng.random() < 0.7:
        custom |= {"kv_policy": rng.choice(POLICIES), "kv_policy_config": options}
    conversation, done = Conversation(), []
    for turn in range(rng.randint(2, 5)):
        shows = turn == 0 or rng.random() < 0.2
        film = CLIP if shows and turn == 0 and rng.random() < 0.15 else None
        images = (picture(rng, 28 * rng.randint(16, 18), 28 * 16),) if shows else ()
        conversation = conversation.ask(words(rng, rng.randint(2, 12)), images, film)
        body = conversation.body(rng.choice([2, 8, 24, 60]), rid=f"{index}-{turn}", custom=custom)
        fate = rng.choices(["finish", "abort", "disconnect", "pause", "flush"], [80, 5, 5, 5, 5])[0]
        counts[fate] += 1
        if fate == "disconnect":
            stream = server.url + "/generate", body | {"stream": True}
            with requests.post(stream[0], json=stream[1], stream=True, timeout=300) as response:
                next(response.iter_lines(), None)
            return done
        if fate == "flush":
            server.post("/flush_cache")  # refused while busy
        if fate == "pause":
            server.post("/pause_generation", {"mode": rng.choice(["in_place", "retract"])})
            server.post("/continue_generation", {})
        with ThreadPoolExecutor(1) as aside:
            response = aside.submit(server.post, "/generate", body)
            if fate == "abort":
                time.sleep(rng.random() * 0.5)
                server.post("/abort_request", {"rid": body["rid"]})
                response.result()
                return done
            answer = Server._checked(response.result())
        assert answer["meta_info"]["finish_reason"]["type"] == "length"
        done.append(Turn(conversation, body, answer, shows))
        conversation = conversation.answered(answer)
    return done


class Unequal(AssertionError):
    """Another selection, or another answer, than alone."""


def replay(server: Server, done: list[Turn], mode: str, tolerance: float, counts: Counter) -> None:
    """Asks a conversation again on an idle server that keeps everything, from the same prefixes.

    A prompt that was scored as a whole is asked cold. One that went on from a twin follows the turns
    before it; behind the same compactions it is the same attention, wherever the twin ended.
    """
    server.flush()
    for index, turn in enumerate(done):
        seen, retracted = prefix(turn.answer), report(turn.answer)["retractions"] > 0
        n, on_twin = report(turn.answer)["prompt_tokens"], seen["kind"] in ("twin", "shared")
        resumed = on_twin and seen["tokens"] >= n
        if retracted and not resumed:
            counts["prefilled again"] += 1  # its outputs too, under full attention
            return
        went_on = on_twin and index > 0 and mode not in ("off", "resume")
        # What a retracted request went on from at first is not reported.
        tries = [True, False] if went_on and resumed else [went_on]
        for behind_twin in tries:
            if not behind_twin:
                server.flush()
            [alone] = server.many([turn.body])
            if behind_twin and prefix(alone)["kind"] != "twin":
                raise Unequal(f"turn {index} went on from a twin {seen}, alone {prefix(alone)}")
            same_start = prefix(alone)["tokens"] == seen["tokens"] or resumed
            slides = report(alone)["config"].count("fixed_point'") > 0
            if behind_twin and not same_start and (turn.shows or slides):
                counts["another start"] += 1  # another part of it competes, or slid
                return
            try:
                alike(alone, turn.answer)
            except AssertionError as error:
                if behind_twin is not tries[-1]:
                    continue
                raise Unequal(f"turn {index}, {seen}, alone {prefix(alone)}: {error}") from None
            break
        counts["compared"] += 1
        counts["behind twins"] += behind_twin
        counts["after retractions"] += retracted
        if report(alone)["positions"] != report(turn.answer)["positions"]:
            counts["ties"] += 1  # rounding chose other rows, and answers part
            return
        difference = first_difference(alone, turn.answer)
        if difference is not None:
            # Put back before it was compacted, and then again: its second token saw the exact prompt.
            if report(turn.answer)["retractions"] > 1 and difference.index == 1:
                counts["before compaction"] += 1
                return
            counts["coin tosses"] += 1
            if difference.margin >= tolerance:
                raise Unequal(f"turn {index}, {seen}, alone {prefix(alone)}: {difference}")


@pytest.fixture(scope="module", params=["resume", "off", "mixed", "no overlap"])
def name(request) -> str:
    """Of a server; pytest runs all tests of one before those of the next."""
    return request.param


def test_every_answer_is_the_one_given_alone(fleet, tolerance, name):
    server, mode = fleet[name], FLEET[name][1]["twins"]
    counts, met = Counter(), Counter()
    share = -(-REQUESTS // 4)
    conversations, first = [], 100_000 * list(FLEET).index(name)

    def client(_) -> None:
        while sum(counts.values()) < share:
            met["clients"] += 1
            conversations.append(converse(server, first + met["clients"], counts))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(client, range(6)))
    answers = [turn.answer for done in conversations for turn in done]
    kinds = Counter(prefix(answer)["kind"] for answer in answers)
    retractions = sum(report(answer)["retractions"] for answer in answers)
    server.flush()
    time.sleep(1.5)  # the idle check runs when the loop comes round
    assert server.alive(), server.log()[-4000:]
    assert (twins(server)["twins"], twins(server)["slots"]) == (0, 0)
    assert "leak" not in server.log().lower().replace("leak_", "")
    unequal = []
    for done in conversations:
        try:
            replay(fleet["prefer"], done, mode, 10 * tolerance, met)
        except Unequal as error:
            unequal.append(f"{done[0].body['rid']} {report(done[0].answer).get('config')}: {error}")
    print(f"{name}: {dict(counts)}, {dict(kinds)}, {retractions} retractions; alone: {dict(met)}")
    assert not unequal, "\n".join(unequal)
    assert met["compared"] >= len(answers) // 2
    assert met["ties"] <= 0.05 * met["compared"] + 1
    assert met["before compaction"] <= 0.02 * met["compared"] + 1
    assert met["coin tosses"] <= 0.05 * met["compared"] + 1
    assert mode in ("off", "resume") or met["behind twins"] > 0


# ---- On the same servers ----


@pytest.mark.parametrize("name", ["off"], indirect=True)
def test_off_keeps_nothing(fleet, name):
    server = fleet[name]
    server.flush()
    prompts, answers = talk(server, turns(5, "image", 3))
    server._checked(server.post("/generate", draw_prompt(1, "image").body(8, n=4)))
    assert (twins(server)["twins"], twins(server)["slots"]) == (0, 0)
    evict_exact_kv(server, FLEET[name][0])
    [answer] = server.many([prompts[-1].body(4)])
    assert {prefix(each)["kind"] for each in (answer, *answers[1:])} <= {"exact", "cold"}
    assert prefix(answer)["tokens"] < 10


@pytest.mark.parametrize("name", ["mixed", "no overlap"], indirect=True)
def test_a_new_turn_in_chunks_equals_one_at_once(fleet, tolerance, name):
    """New pictures behind a twin, prefilled in several chunks; "mixed", beside others that decode."""
    server, whole = fleet[name], fleet["prefer"]
    for each in (server, whole):
        each.flush()
    said = list(turns(7, "image", 5))
    _, expected = talk(whole, said)
    others = [draw_prompt(seed, "image").body(200) for seed in range(3)] if name == "mixed" else []
    before = None if others else lambda: evict_exact_kv(server, FLEET[name][0])
    start = len(server.log())
    with ThreadPoolExecutor(1) as aside:
        beside = aside.submit(server.many, others)
        _, answers = talk(server, said, before=before)
        beside.result()
    assert report(answers[3])["prompt_tokens"] - prefix(answers[3])["tokens"] > 2 * 128
    chunks = server.log()[start:].count("Prefill batch")
    assert chunks >= 5 + 2 + 2, "the pictures were not cut into chunks"
    for one, other in zip(expected[1:], answers[1:], strict=True):
        assert prefix(one) == prefix(other) and prefix(one)["kind"] == "twin"
    for one, other in zip(expected, answers, strict=True):
        alike(one, other)
    assert_same(expected, answers, tolerance, f"{name} against whole")
