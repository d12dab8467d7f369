"""Tensor-parallel ranks keep what one rank keeps, and stop where they part; data-parallel replicas."""

from __future__ import annotations

import random
import re

import pytest
import requests

from sglang_vlkv.cache.ranks import agree, carried
from sglang_vlkv.policies import policies
from tests.conftest import POOL, TIGHT
from tests.conversation import Conversation, evict_exact_kv, twins
from tests.equality import alike, assert_same
from tests.listening import Listener, of_kind
from tests.prompts import Prompt, draw_prompt, picture, words
from tests.scrape import Scrape
from tests.serving import POSITIONS, Server, free_port, install_entry_point, interrupted, report
from tests.test_turns import prefix

PICTURES = [draw_prompt(seed, kind) for kind in ("image", "images") for seed in range(10, 13)]
MOST_ASKED = ("vlcache", "vlkv", "h2o")  # about all of PICTURES; other policies about the first
DIFFERENT = ("elastic", "aircache", "random")  # docs/parallel.md says how
ALIKE = sorted(policies().keys() - {"none", "given", *DIFFERENT})
SMALL_POOL = 1600
TWO_RANKS = ("--tp-size", "2", "--kv-policy", "vlcache")
BOUND = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
MIXED = [
    {"kv_policy": "vlkv", "kv_policy_config": {"draft_tokens": 4}},
    {"kv_policy": "vlcache"},
    {"kv_policy": "h2o", "kv_policy_config": {"decode": "fixed_point"}},
    {"kv_policy": "prefixkv", "kv_policy_config": {"merge": "bucket_mean"}},
    {"kv_policy": "lookm"},
    {"kv_policy": "elastic"},
]
LOCKSTEP = [
    {"kv_policy": "vlkv", "kv_policy_config": {"draft_tokens": 4}},
    {"kv_policy": "h2o", "kv_policy_config": {"decode": "fixed_point"}},
    {"kv_policy": "prefixkv", "kv_policy_config": {"merge": "bucket_mean"}},
    {"kv_policy": "snapkv", "kv_policy_config": {"merge": "similar"}},
]


def bodies_for(first: int, customs: list[dict], length: int) -> list[dict]:
    """A request for each of ``customs``, with a picture of its own."""
    bodies = []
    for seed, custom in enumerate(customs, first):
        rng = random.Random(seed)
        prompt = Prompt(words(rng, 10), [picture(rng, 28 * rng.randint(16, 18), 28 * 17)])
        bodies.append(prompt.body(length, custom=custom | POSITIONS))
    return bodies


@pytest.fixture(scope="module")
def two_ranks():
    config = '{"allow_override": true, "twins": "fallback"}'
    flags = ("--kv-policy-config", config, "--chunked-prefill-size", "256", *TIGHT, "--sleep-on-idle")
    flags += ("--enable-metrics",)
    with Server("--max-total-tokens", str(SMALL_POOL), *TWO_RANKS, *flags, env=BOUND) as server:
        yield server
        assert server.alive(), server.log()[-4000:]


def ranks(server: Server) -> dict:
    return server.info()["internal_states"][0]["kv_policy"]["ranks"]


@pytest.mark.parametrize("policy", ALIKE)
def test_every_head_keeps_what_one_rank_keeps_for_it(two_ranks, any_policy, tolerance, policy):
    prompts = PICTURES if policy in MOST_ASKED else PICTURES[:1]
    bodies = [prompt.body(16, custom={"kv_policy": policy, **POSITIONS}) for prompt in prompts]
    expected, answers = any_policy.many(bodies), two_ranks.many(bodies)
    assert_same(expected, answers, tolerance, f"{policy}, two ranks")
    for one, two in zip(expected, answers, strict=True):
        alike(one, two)
        first, second = report(one), report(two)
        assert [len(heads) for heads in second["positions"]] == [2] * len(second["kept_per_layer"])
        for field in ("kept_bytes", "full_bytes", "budget"):
            assert first[field] == second[field], field
        kept = second["kept_per_modality"]
        assert sum(kept.values()) == 2 * sum(second["kept_per_layer"])
        assert kept == pytest.approx(first["kept_per_modality"], rel=0.02, abs=1)
        assert "ranks" not in first and second["ranks"]["tp"] == 2


def test_one_rank_counts_for_both(two_ranks):
    before = Scrape(two_ranks)
    reports = [report(two_ranks.many([draw_prompt(seed, "image").body(4)])[0]) for seed in (20, 21)]
    after = Scrape(two_ranks)
    compactions, kept = (
        after(name) - before(name)
        for name in ("sglang_vlkv_compactions_total", "sglang_vlkv_kept_bytes_total")
    )
    assert compactions == 2
    assert 2 * kept == sum(seen["kept_bytes"] for seen in reports), "a rank's bytes are half of all"


def test_a_twin_is_cut_to_the_rows_that_all_ranks_have(two_ranks):
    rng = random.Random(10)
    shown, text = (picture(rng, 28 * 16, 28 * 16),), words(rng, 12)
    questions = [Conversation().ask(f"{text}{mark} {words(rng, 8)}", shown) for mark in ".?"]
    [first] = two_ranks.many([questions[0].body(8, custom=POSITIONS)])
    evict_exact_kv(two_ranks, SMALL_POOL)
    [other] = two_ranks.many([questions[1].body(8, custom=POSITIONS)])
    common = prefix(other)["tokens"]
    assert prefix(other)["kind"] == "twin" and common > report(first)["visual_tokens"]
    kept = [[[p for p in head if p < common] for head in layer] for layer in report(first)["positions"]]
    rows = [min(map(len, layer)) for layer in kept]
    assert any(len({len(head) for head in layer}) > 1 for layer in kept), "the ranks would agree anyway"
    used = [[[p for p in head if p < common] for head in layer] for layer in report(other)["positions"]]
    assert used == [[head[:r] for head in layer] for layer, r in zip(kept, rows)]
    lost = sum(len(head) - r for layer, r in zip(kept, rows) for head in layer)
    assert prefix(other)["rows_lost"] == lost > 0


def test_ranks_stay_in_lockstep(two_ranks, any_policy, tolerance):
    """Retractions, an abort, chunks, drafts, merging and sliding rows, in one batch."""
    bodies = bodies_for(500, LOCKSTEP, 250)
    expected = any_policy.many(bodies)
    [gone] = bodies_for(600, [{"kv_policy": "elastic"}], 5000)
    two_ranks.flush()
    before = ranks(two_ranks)["digest"]

    def interrupt() -> None:
        assert two_ranks.post("/pause_generation", {"mode": "retract"}).status_code == 200
        two_ranks.post("/abort_request", {"rid": "gone"})
        two_ranks.post("/continue_generation", {})

    *answers, aborted = interrupted(two_ranks, [*bodies, gone | {"rid": "gone"}], interrupt)
    assert aborted["meta_info"]["finish_reason"]["type"] == "abort"
    retracted = [answer for answer in answers if report(answer)["retractions"]]
    assert retracted
    assert {prefix(answer)["kind"] for answer in retracted} == {"twin"}, "its outputs were selected from"
    for one, two in zip(expected, answers, strict=True):
        alike(one, two)
        assert report(one)["draft_rows"] == report(two)["draft_rows"]
    assert report(answers[0])["draft_rows"] == 4
    # Rounding grows over merged rows.
    assert_same(expected, answers, 10 * tolerance, "two ranks, retracted")
    assert ranks(two_ranks)["digest"] != before
    two_ranks.flush()
    assert (twins(two_ranks)["twins"], twins(two_ranks)["slots"]) == (0, 0)


SKEWED = """
import torch.distributed
from sglang_vlkv.policies.uniform import Uniform

class Skewed(Uniform):
    name = "skewed"

    def layer_budgets(self, *args):
        first, second, *others = super().layer_budgets(*args)
        rank = torch.distributed.get_rank()
        return [first - rank, second + rank, *others]
"""


def test_a_rank_that_decides_otherwise_stops_the_server(tmp_path):
    """A policy whose second rank moves one row to another layer, which no count of slots shows."""
    (tmp_path / "skewed.py").write_text(SKEWED)
    install_entry_point(tmp_path, "sglang_vlkv.policies", "skewed", "skewed:Skewed")
    flags = ("--max-total-tokens", "3000", "--tp-size", "2", "--kv-policy", "skewed")
    with Server(*flags, env=BOUND | {"PYTHONPATH": str(tmp_path)}) as server:
        try:
            assert server.post("/generate", draw_prompt(0, "image").body(8), timeout=60).status_code != 200
        except requests.RequestException:
            pass  # the connection went with the server
        assert server.ends(within=60)
        assert "RuntimeError: The 2 tensor-parallel ranks no longer agree" in server.log()
        assert "its layer_budgets must follow from sparsity and profiles alone" in server.log()


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8, 64])
def test_ranks_agree_on_equal_digests_only(num_ranks):
    rng = random.Random(num_ranks)
    for bit in range(48):
        digest = rng.getrandbits(48) if bit % 2 else (1 << 48) - 1  # the largest sums
        other = digest ^ (1 << bit)
        for differing in {0, 1, num_ranks // 2, num_ranks}:
            mine = [other] * differing + [digest] * (num_ranks - differing)
            totals = [sum(column) for column in zip(*(carried(f"{x:012x}") for x in mine))]
            assert max(totals) < 2**63
            assert agree(totals, num_ranks) == (len(set(mine)) == 1)


# ---- Replicas ----


@pytest.fixture(scope="module")
def events_port():
    """Of the first replica; the other one's is the next."""
    return free_port()


@pytest.fixture(scope="module")
def replicas(events_port):
    flags = ("--kv-policy", "vlcache", "--kv-policy-config", '{"allow_override": true}', "--sleep-on-idle")
    flags += ("--enable-metrics", "--kv-events-endpoint", str(events_port))
    with Server(*POOL, "--dp-size", "2", *flags, env=BOUND) as server:
        yield server
        assert server.alive(), server.log()[-4000:]


def test_replicas_answer_as_one_server_does(replicas, any_policy, tolerance):
    """Every draft goes to the replica that its request goes to."""
    bodies = bodies_for(600, MIXED * 2, 24)
    expected, answers = any_policy.many(bodies, workers=4), replicas.many(bodies, workers=8)
    assert_same(expected, answers, 10 * tolerance, "two replicas")
    assert {answer["meta_info"]["dp_rank"] for answer in answers} == {0, 1}
    for one, other in zip(expected, answers, strict=True):
        alike(one, other)
        drafted = 4 if report(one)["policy"] == "vlkv" else 0
        assert report(one)["draft_rows"] == report(other)["draft_rows"] == drafted
        found = requests.get(f"{replicas.url}/kv_policy/requests/{other['meta_info']['id']}", timeout=60)
        assert found.json() == report(other)


def test_counts_aborts_and_flushes_reach_all_replicas(replicas):
    replicas.flush()
    prompt = draw_prompt(0, "image")
    for rank in (0, 1, 0, 1):
        [answer] = replicas.many([prompt.body(4) | {"routed_dp_rank": rank}])
        assert answer["meta_info"]["dp_rank"] == rank
    states = [state["kv_policy"] for state in replicas.info()["internal_states"]]
    assert [state["twins"] for state in states] == [states[0]["twins"]] * 2 and states[0]["twins"] > 0
    assert twins(replicas) == {name: states[0][name] + states[1][name] for name in states[0]}
    for rank in (0, 1):
        body = prompt.body(5000, rid=f"long {rank}") | {"routed_dp_rank": rank, "stream": True}
        with requests.post(replicas.url + "/generate", json=body, stream=True, timeout=120) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            replicas.post("/abort_request", {"rid": f"long {rank}"})
            assert re.search(rb'"type": ?"abort"', b"".join(lines))
    replicas.flush()
    assert (twins(replicas)["twins"], twins(replicas)["slots"]) == (0, 0)


def test_each_replica_publishes_and_counts_its_own(replicas, events_port):
    endpoints = [f"tcp://127.0.0.1:{events_port + rank}" for rank in (0, 1)]
    published = [state["kv_events"]["endpoint"] for state in replicas.info()["internal_states"]]
    assert sorted(published) == sorted(endpoints)
    routed = {"a": 0, "b": 1, "c": 1}
    bodies = [
        draw_prompt(seed, "image").body(4, rid=rid) | {"routed_dp_rank": rank}
        for seed, (rid, rank) in enumerate(routed.items(), 700)
    ]
    before = Scrape(replicas)
    with Listener(endpoints[0]) as first, Listener(endpoints[1]) as second:
        replicas.many(bodies)
        twins(replicas)  # answered when all before it has been put away
        heard = first.read_all(), second.read_all()
    after = Scrape(replicas)
    for rank, messages in enumerate(heard):
        own = sorted(rid for rid in routed if routed[rid] == rank)
        assert {message["dp_rank"] for message in messages} == {rank}
        for kind in ("compacted", "released"):
            assert sorted(message["rid"] for message in of_kind(messages, kind)) == own
        name, labels = "sglang_vlkv_finished_requests_total", {"dp_rank": str(rank)}
        assert after(name, **labels) - before(name, **labels) == len(own)
