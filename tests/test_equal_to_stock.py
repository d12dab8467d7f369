"""Keeping everything, and being left alone, give stock SGLang's answers."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from sglang_vlkv.frontend.routes import HEADER
from sglang_vlkv.observe.metrics import PREFIX
from tests.conftest import POOL
from tests.conversation import talk
from tests.equality import assert_same
from tests.prompts import CLIP, draw_prompt, picture, words
from tests.scrape import Scrape
from tests.serving import Server, report

KINDS = ("image", "images", "video", "text")
PROMPTS = [draw_prompt(seed, kind) for kind in KINDS for seed in range(3 if kind != "video" else 1)]
BODIES = [prompt.body(24) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def everything():
    """Budget 1: every row is gathered, moved to other cells and decoded from there."""
    config = {"compact_always": True, "min_prompt_tokens": 16, "twins": "prefer"}
    flags = ("--kv-policy", "vlcache", "--kv-budget", "1.0", "--kv-policy-config", json.dumps(config))
    with Server(*POOL, *flags) as server:
        yield server
        assert server.alive(), server.log()[-4000:]


@pytest.fixture(scope="module")
def expected(stock):
    answers = [stock.many([body])[0] for body in BODIES]
    assert len({tuple(a["output_ids"]) for a in answers}) == len(answers), "outputs do not vary"
    assert all(len(set(a["output_ids"])) > 3 for a in answers), "a degenerate model proves nothing"
    return answers


def test_stock_alone_and_in_a_batch(stock, expected, tolerance):
    stock.flush()
    assert_same(expected, stock.many(BODIES), tolerance, "stock alone against stock in a batch")


def test_budget_of_one_alone(everything, expected, tolerance):
    answers = [everything.many([body])[0] for body in BODIES]
    for prompt, answer in zip(PROMPTS, answers):
        seen = report(answer)
        if prompt.images or prompt.video:
            assert seen["policy"] == "vlcache"
            assert seen["kept_per_layer"] == [seen["prompt_tokens"]] * 4
            assert seen["kept_bytes"] == seen["full_bytes"]
        else:
            assert (seen["policy"], seen["reason"]) == ("none", "no image or video")
    assert_same(expected, answers, tolerance, "budget 1 alone")


def test_budget_of_one_in_a_batch(everything, expected, tolerance):
    everything.flush()
    assert_same(expected, everything.many(BODIES), tolerance, "budget 1 in a batch")


def five_turns(seed: int, video: bool):
    """About half of the later ones with a picture more."""
    rng = random.Random(seed)
    for turn in range(5):
        shows = rng.random() < 0.5 if turn else not video
        pictures = (picture(rng, 28 * 16, 28 * 14),) * shows
        yield words(rng, rng.randint(4, 12)), pictures, CLIP if video and not turn else None


def converse(server: Server, seed: int, video: bool) -> list[dict]:
    _, answers = talk(server, five_turns(seed, video), length=12)
    return answers


@pytest.mark.parametrize("video", [False, True], ids=["images", "video"])
def test_conversations_on_twins_that_hold_every_row(everything, stock, tolerance, video):
    """Ragged extend attention over the pieces of all turns before, and a compaction of each new one."""
    with ThreadPoolExecutor(4) as pool:
        ours = [a for each in pool.map(lambda s: converse(everything, s, video), range(4)) for a in each]
    theirs = [a for seed in range(4) for a in converse(stock, seed, video)]
    for answer, reference in zip(ours, theirs, strict=True):
        seen, cached = report(answer), reference["meta_info"]["cached_tokens"]
        assert seen["kept_per_layer"] == [seen["prompt_tokens"]] * 4
        later = cached > seen["prompt_tokens"] // 2 and seen["prefix"]["kind"] == "twin"
        assert not later or seen["prefix"]["tokens"] == cached, "it prefills what stock would"
    assert sum(report(answer)["prefix"]["kind"] == "twin" for answer in ours) == 16
    assert_same(theirs, ours, tolerance, "turns on twins that hold every row")


def test_left_alone_beside_compacted_ones(vlcache, expected, tolerance):
    vlcache.flush()
    answers = vlcache.many(BODIES)
    alone = [i for i, prompt in enumerate(PROMPTS) if not (prompt.images or prompt.video)]
    compacted = [i for i in range(len(PROMPTS)) if i not in alone]
    assert all(report(answers[i])["policy"] == "vlcache" for i in compacted)
    assert_same(
        [expected[i] for i in alone], [answers[i] for i in alone], tolerance, "text beside compacted"
    )


@pytest.fixture(scope="module")
def without_policy():
    with Server(*POOL, "--kv-policy", "none", "--enable-metrics") as server:
        yield server
        assert server.alive(), server.log()[-4000:]


def test_policy_none_is_stock(without_policy, expected, tolerance):
    answers, info = without_policy.many(BODIES), without_policy.info()
    assert info["kv_policy"] == {"policy": "none"}
    assert info["radix_cache_backend"] is None
    assert all("kv_policy" not in answer["meta_info"] for answer in answers)
    assert_same(expected, answers, tolerance, "policy none")


def test_policy_none_counts_nothing(without_policy):
    [prompt, *_] = PROMPTS
    without_policy.many([prompt.body(2)])
    exported = Scrape(without_policy)
    assert exported("sglang:num_requests_total") >= 1
    assert not [name for name in exported.types if name.startswith(PREFIX)]


@pytest.mark.parametrize("custom", [{"kv_policy": "h2o"}, {"kv_x": 1}], ids=lambda custom: [*custom][0])
def test_policy_none_refuses_what_is_asked_of_it(without_policy, custom):
    answer = without_policy.post("/generate", PROMPTS[0].body(1, custom=custom))
    assert answer.status_code == 400 and [*custom][0] in answer.text


def test_policy_none_has_no_reports(without_policy):
    answer = without_policy.post("/generate", PROMPTS[0].body(2, rid="somebody"))
    assert answer.status_code == 200 and HEADER not in answer.headers
    for path in ("requests/somebody", "requests/nobody", "requests/somebody/choices", "twins"):
        found = requests.get(f"{without_policy.url}/kv_policy/{path}", timeout=60)
        assert found.status_code == 404 and "polic" in found.text.lower(), path
