"""Nothing leaks and nothing is lost, whatever ends, interrupts or crowds out a request."""

from __future__ import annotations

import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from sglang_vlkv.policies import policies
from tests.chaos.judge import COIN_TOSS
from tests.equality import alike, assert_same
from tests.listening import Listener, events_of
from tests.prompts import Prompt, draw_prompt, picture, words
from tests.scrape import Scrape
from tests.serving import POSITIONS, TOGETHER, Server, install_entry_point, interrupted, report

VLCACHE = ("--kv-policy", "vlcache")


def assert_sound(server: Server) -> None:
    """Idle, strictly checked by SGLang itself, and still answering."""
    server.flush()
    time.sleep(1.5)  # the idle check runs when the loop comes round
    assert server.alive(), server.log()[-4000:]
    prompt = draw_prompt(0, "image")
    assert report(server.generate(prompt.text, prompt.images))["policy"] == "vlcache"
    assert "leak" not in server.log().lower().replace("leak_", "")


def peak_running(log: str) -> int:
    return max(int(count) for count in re.findall(r"#running-req: (\d+)", log))


@pytest.fixture(scope="module")
def tight():
    """A pool that three of the larger prompts fill; decoding may run it dry."""
    flags = ("--max-total-tokens", "2500", "--schedule-conservativeness", "0.01")
    with Server(*flags, *VLCACHE, env=TOGETHER) as server:
        yield server
        assert_sound(server)


def test_one_request_that_fills_the_pool(tight):
    rng = random.Random(5)
    prompt = Prompt(words(rng, 8), [picture(rng, 28 * 48, 28 * 49)])
    answer = tight.generate(prompt.text, prompt.images, max_new_tokens=64)
    seen = report(answer)
    assert 2350 < seen["prompt_tokens"] < 2450
    assert seen["policy"] == "vlcache" and seen["retractions"] == 0
    assert seen["kept_bytes"] < 0.11 * seen["full_bytes"]
    assert answer["meta_info"]["completion_tokens"] == 64


def test_a_warm_request_that_fills_the_pool_is_admitted_again(tight):
    """Its prefix is pinned while its admission is considered; room for its rows is not charged twice."""
    rng = random.Random(6)
    prompt = Prompt(words(rng, 8), [picture(rng, 28 * 44, 28 * 44)])
    tight.flush()
    for attempt in range(3):
        answer = tight.generate(prompt.text, prompt.images, max_new_tokens=4000, stop_regex=".{6}")
        seen = report(answer)
        assert seen["policy"] == "vlcache"
        assert (seen["prefix"]["kind"] == "exact") == (attempt > 0)


def test_a_burst_of_twenty_does_not_pile_up(tight):
    tight.flush()
    before = len(tight.log())
    bodies = [draw_prompt(seed, "image").body(48) for seed in range(200, 220)]
    answers = tight.together(bodies)
    log = tight.log()[before:]
    held = sum(report(answer)["prompt_tokens"] for answer in answers)
    assert held > 2 * 2500, "twenty full prompts would fit; the test sees nothing"
    assert all(report(answer)["policy"] == "vlcache" for answer in answers)
    assert all(report(answer)["retractions"] == 0 for answer in answers)
    assert peak_running(log) >= 12
    assert "Retract" not in log and "retracted" not in log


def test_retracted_requests_complete_and_select_again(tight):
    prompts = [draw_prompt(seed, "image") for seed in range(300, 312)]
    alone = []
    for prompt in prompts:
        tight.flush()
        alone.append(tight.many([prompt.body(4, custom=POSITIONS)])[0])
    tight.flush()
    crowd = tight.together([prompt.body(300, custom=POSITIONS, ignore_eos=False) for prompt in prompts])
    retracted = [answer for answer in crowd if report(answer)["retractions"]]
    assert "KV cache pool is full. Retract requests." in tight.log()
    assert retracted, "the pool never ran dry"
    for solo, answer in zip(alone, crowd, strict=True):
        assert answer["meta_info"]["finish_reason"]["type"] in ("length", "stop")
        assert report(answer)["prompt_tokens"] == report(solo)["prompt_tokens"]
        alike(answer, solo)


@pytest.mark.parametrize("mode", ["in_place", "retract", "abort"])
def test_pause_and_continue(tight, mode):
    bodies = [draw_prompt(seed, "image").body(200) | {"return_logprob": False} for seed in range(6)]

    def interrupt() -> None:
        assert tight.post("/pause_generation", {"mode": mode}).status_code == 200
        tight.info()  # the scheduler answers in its turn, and has paused
        assert tight.post("/continue_generation", {}).status_code == 200

    answers = interrupted(tight, bodies, interrupt)
    assert_sound(tight)
    reasons = [answer["meta_info"]["finish_reason"]["type"] for answer in answers]
    if mode == "abort":
        assert reasons == ["abort"] * 6
    else:
        assert reasons == ["length"] * 6
        assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [200] * 6
        assert [report(answer)["retractions"] > 0 for answer in answers] == [mode == "retract"] * 6


CHOSEN = [name for name in policies() if name != "none"]
CONFIGURATIONS = {
    "overlap": (),
    "no radix cache": ("--disable-radix-cache",),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_randomised_mixed_requests(name):
    """150 requests for each of two configurations (``test_turns_fuzz`` has others): images, video,
    text, one-token answers, aborts, disconnects, pauses and flushes, from eight clients, in a pool of
    a few prompts. Half
    choose a policy of their own: any, at any budget, merging, drafting, of constant size."""
    choice = ("--kv-policy-config", '{"allow_override": true}')
    flags = ("--max-total-tokens", "2600", "--schedule-conservativeness", "0.05", *choice)
    prompts = [draw_prompt(seed, kind) for kind in ("image", "images", "text") for seed in range(5)]
    prompts.append(draw_prompt(0, "video"))
    counts: dict[str, int] = {}
    with Server(*flags, *VLCACHE, *CONFIGURATIONS[name]) as server:

        def one(index: int) -> None:
            rng = random.Random(f"{name}{index}")
            prompt = rng.choice(prompts)
            length = rng.choice([1, 2, 8, 24, 80])
            policy, budget, custom = "vlcache", 0.1, None
            if rng.random() < 0.5:
                policy, budget = rng.choice(CHOSEN), rng.choice([0.02, 0.1, 0.3])
                options = {
                    "merge": rng.choice(["none", "bucket_mean", "similar"]),
                    "decode": rng.choice(["append", "fixed_point"]),
                    "draft_tokens": 4 * (policies()[policy].can_draft and rng.random() < 0.25),
                }
                custom = {"kv_policy": policy, "kv_budget": budget, "kv_policy_config": options}
            ending = {"ignore_eos": rng.random() < 0.5}
            body = prompt.body(length, rid=f"fuzz-{index}", custom=custom, **ending)
            body["return_logprob"] = rng.random() < 0.3
            fate = rng.choices(["finish", "abort", "disconnect", "pause", "flush"], [70, 10, 12, 4, 4])[0]
            if fate == "disconnect":
                body["stream"] = True
                stream = requests.post(server.url + "/generate", json=body, stream=True, timeout=300)
                next(stream.iter_lines(), None)
                stream.close()
            elif fate == "abort":
                with ThreadPoolExecutor(1) as aside:
                    answer = aside.submit(server.post, "/generate", body)
                    time.sleep(rng.random() * 0.5)
                    server.post("/abort_request", {"rid": body["rid"]})
                    assert answer.result().status_code in (200, 400, 503)
            else:
                if fate == "flush":
                    server.post("/flush_cache")  # refused while busy
                if fate == "pause":
                    server.post("/pause_generation", {"mode": rng.choice(["in_place", "retract"])})
                    server.post("/continue_generation", {})
                response = server.post("/generate", body)
                assert response.status_code == 200, response.text
                answer = response.json()
                reason = answer["meta_info"]["finish_reason"]
                assert reason["type"] in ("length", "stop"), reason
                seen = report(answer)
                visual = bool(prompt.images or prompt.video)
                tokens = answer["meta_info"]["completion_tokens"]
                if not visual:
                    assert seen["reason"] == "no image or video"
                elif seen["retractions"] and seen["policy"] == "none":
                    assert seen["reason"] == "finished at its first token after a retraction"
                elif tokens > 1:
                    assert seen["policy"] == policy, seen
                    n = seen["prompt_tokens"]
                    assert sum(seen["kept_per_layer"]) == round(budget * n * 4), seen
            counts[fate] = counts.get(fate, 0) + 1

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, range(150)))
        assert sum(counts.values()) == 150 and len(counts) == 5
        assert_sound(server)
        print(f"{name}: {counts}, peak running {peak_running(server.log())}, "
              f"retractions {server.log().count('Retract requests')}")  # fmt: skip


def plugin(folder: Path, name: str, code: str) -> dict[str, str]:
    """The environment in which SGLang loads ``code`` as a plugin of its own, after ours."""
    (folder / f"{name}.py").write_text(code)
    install_entry_point(folder, "sglang.srt.plugins", name, f"{name}:register")
    return {"PYTHONPATH": str(folder), "SGLANG_PLUGINS": f"vlkv,vlkv_cpu,{name}"}


LEAK = """
def register():
    from sglang_vlkv.scheduler.compaction import Compactor
    place = Compactor._place
    def leaky(self, item):
        self._tree.token_to_kv_pool_allocator.alloc(1)
        return place(self, item)
    Compactor._place = leaky
"""


@pytest.mark.parametrize("busy", ["0", "1"])
def test_a_planted_leak_of_one_slot_is_caught(tmp_path, busy):
    env = plugin(tmp_path, "leaky", LEAK) | {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": busy}
    with Server("--max-total-tokens", "2500", *VLCACHE, env=env) as server:
        prompt = draw_prompt(0, "image")
        try:
            server.generate(prompt.text, prompt.images)
        except (requests.RequestException, RuntimeError):
            pass
        assert server.ends(within=30), "the leak went unnoticed"
        assert re.search(r"leak detected", server.log(), re.IGNORECASE)


CROWDED = """
import collections
SEEN = collections.Counter()
def register():
    from sglang_vlkv.scheduler.compaction import Compactor
    place, alloc = Compactor._place, None
    def crowded(self, item):
        SEEN[item.req.rid] += 1
        allocator = self._tree.token_to_kv_pool_allocator
        if item.req.rid.startswith("homeless") and SEEN[item.req.rid] == 1:
            alloc, allocator.alloc = allocator.alloc, lambda need: None
            try:
                return place(self, item)
            finally:
                allocator.alloc = alloc
        return place(self, item)
    Compactor._place = crowded
"""


def test_without_room_for_its_rows_a_request_is_prefilled_again(tmp_path):
    prompts = [draw_prompt(seed, kind) for seed in (20, 21) for kind in ("image", "images")]
    prompts.append(draw_prompt(0, "video"))
    env = plugin(tmp_path, "crowded", CROWDED)
    told = ("--enable-metrics", "--kv-events-endpoint", f"ipc://{tmp_path}/events")
    with (
        Server("--max-total-tokens", "12000", *VLCACHE, *told, env=env) as server,
        Listener(events_of(server)) as listener,
    ):
        undisturbed = server.many([prompt.body(16, rid=f"a{i}") for i, prompt in enumerate(prompts)])
        server.flush()
        bodies = [prompt.body(16, rid=f"homeless{i}") for i, prompt in enumerate(prompts)]
        answers = server.many(bodies)
        exported = Scrape(server)
        assert_sound(server)
        listener.read_all()
    put_back = [message["rid"] for message in listener.of_kind("no_room")]
    assert sorted(put_back) == [f"homeless{i}" for i in range(len(prompts))]
    assert all(report(answer)["retractions"] == 1 for answer in answers)
    assert all(report(answer)["retractions"] == 0 for answer in undisturbed)
    assert_same(undisturbed, answers, COIN_TOSS, "prefilled again")
    for one, other in zip(undisturbed, answers, strict=True):
        assert report(one)["kept_per_layer"] == report(other)["kept_per_layer"]
    assert "No room for the kept rows" in server.log()
    assert exported("sglang_vlkv_no_room_requests_total") == len(prompts)
    assert exported("sglang_vlkv_retractions_total", policy="none") == len(prompts)
    assert exported("sglang_vlkv_compactions_total") == 2 * len(prompts)
