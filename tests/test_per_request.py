"""Policies chosen by the request: many in one batch, each as if alone; and what is refused."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice

import openai
import pytest
import requests

from sglang_vlkv.policies import policies
from tests.equality import assert_same
from tests.prompts import draw_prompt
from tests.serving import ROOT, Server, report, user_message

ORDINARY = [name for name in policies() if name != "none"]
REQUESTS = int(os.environ.get("VLKV_REQUESTS", 20))  # for each policy
PICTURES = [draw_prompt(seed, kind) for kind in ("image", "images") for seed in (30, 31)]


def body(prompt, policy: str, budget: float = 0.1, num_tokens: int = 16, **config) -> dict:
    custom = {"kv_policy": policy, "kv_budget": budget, "kv_policy_config": config}
    return prompt.body(num_tokens, custom=custom)


def test_several_policies_in_one_batch_each_as_if_alone(any_policy, tolerance):
    bodies = [body(prompt, name) for name in ORDINARY for prompt in PICTURES[:2]]
    alone = [any_policy.many([one])[0] for one in bodies]
    together = any_policy.many(bodies)
    assert [report(answer)["policy"] for answer in together] == [n for n in ORDINARY for _ in range(2)]
    for one, other in zip(alone, together, strict=True):
        assert report(one)["kept_per_layer"] == report(other)["kept_per_layer"]
    assert_same(alone, together, 10 * tolerance, "together")


def test_a_budget_of_one_is_the_full_cache_whatever_the_policy(any_policy, tolerance):
    full = any_policy.many([prompt.body(16) for prompt in PICTURES])
    assert all(report(answer)["reason"] == "the budget keeps every row" for answer in full)
    for name in ORDINARY:
        kept = any_policy.many(
            [body(prompt, name, 1.0, compact_always=True, decode="append") for prompt in PICTURES]
        )
        for answer in kept:
            seen = report(answer)
            assert seen["policy"] == name and set(seen["kept_per_layer"]) == {seen["prompt_tokens"]}
        assert_same(full, kept, tolerance, f"{name} at a budget of 1")


def test_every_policy_serves_many_requests_and_nothing_leaks(any_policy):
    """Half of them for the first time, half again."""
    prompts = [draw_prompt(seed, "image") for seed in range(400, 410)]
    for name in ORDINARY:
        many = islice(cycle(prompts), REQUESTS)
        bodies = [body(prompt, name, 0.05 + 0.01 * (i % 5)) for i, prompt in enumerate(many)]
        answers = any_policy.many(bodies, workers=32)
        assert {report(answer)["policy"] for answer in answers} == {name}
        any_policy.flush()  # succeeds on an idle server only; SGLang's strict checks are on
        assert any_policy.alive(), any_policy.log()[-4000:]


def test_the_policy_in_examples_serves(any_policy):
    """Third parties add theirs through an entry point; the whole policy is under 30 lines."""
    source = ROOT / "examples" / "policy" / "knorm.py"
    assert len(source.read_text().splitlines()) < 30
    plain, [answer] = any_policy.many([PICTURES[0].body(16)]), any_policy.many([body(PICTURES[0], "knorm")])
    seen = report(answer)
    assert (seen["policy"], seen["config"][:6]) == ("knorm", "KNorm(")
    assert sum(seen["kept_per_layer"]) == round(0.1 * seen["prompt_tokens"] * 4)
    assert seen["sparsity_per_layer"] is None, "it looks at no attention"
    assert answer["output_ids"] != plain[0]["output_ids"]


def test_a_request_inherits_what_it_does_not_say(any_policy):
    prompt = PICTURES[0]
    [seen] = [report(a) for a in any_policy.many([prompt.body(4, custom={"kv_policy": "vlcache"})])]
    assert (seen["policy"], seen["budget"]) == ("vlcache", 0.1)
    assert seen["config"].startswith("VLCache(budget=0.1,")


def test_the_openai_client_chooses_too(any_policy):
    client = openai.OpenAI(base_url=any_policy.url + "/v1", api_key="none")
    extra = {"custom_params": {"kv_policy": "snapkv", "kv_budget": 0.2}, "return_meta_info": True}
    answer = client.chat.completions.create(
        model="m", max_tokens=4, temperature=0, extra_body=extra,
        messages=[user_message("what", PICTURES[0].images)],
    )  # fmt: skip
    seen = answer.choices[0].meta_info["kv_policy"]
    assert (seen["policy"], seen["budget"]) == ("snapkv", 0.2)
    with pytest.raises(openai.BadRequestError, match="kv_policy.*'snapkw'.*snapkv"):
        client.chat.completions.create(
            model="m", max_tokens=4, messages=[{"role": "user", "content": "hello"}],
            extra_body={"custom_params": {"kv_policy": "snapkw"}},
        )  # fmt: skip


BAD = [
    ({"kv_policy": "best"}, ["custom_params.kv_policy", "'best'", *policies()]),
    ({"kv_policy": 3}, ["custom_params.kv_policy", "3"]),
    ({"kv_budget": "a tenth"}, ["custom_params.kv_budget", "'a tenth'", "[0.01, 1.0]"]),
    ({"kv_budget": 2}, ["custom_params.kv_budget", "2", "[0.01, 1.0]"]),
    ({"kv_budget": True}, ["custom_params.kv_budget", "True"]),
    ({"kv_budget": 0.1}, ["custom_params.kv_budget", "0.1", "kv_policy none"]),
    ({"kv_policy": "h2o", "kv_budget": 0.001}, ["custom_params.kv_budget", "0.001", "[0.01, 1.0]"]),
    ({"kv_policy": "h2o", "kv_policy_config": {"ratio": 1}}, ["kv_policy_config", "ratio", "h2o", "budget"]),
    ({"kv_policy": "h2o", "kv_policy_config": {"importance": "sum"}}, ["importance", "'sum'", "window"]),
    ({"kv_policy_config": [1]}, ["custom_params.kv_policy_config", "an object"]),
    ({"kv_policy_config": []}, ["custom_params.kv_policy_config", "an object"]),
    ({"kv_policy_config": -0.0}, ["custom_params.kv_policy_config", "an object"]),
    ({"kv_policy_config": {"allow_override": False}}, ["allow_override"]),
    ({"kv_budgets": 0.1}, ["custom_params.kv_budgets", "kv_budget", "kv_policy_config", "kv_report"]),
    ({"kv_policy": "none", "kv_budget": 0.5}, ["custom_params.kv_budget", "0.5", "name another"]),
    ({"_vlkv_reads_draft": "x"}, ["_vlkv_reads_draft", "not for clients"]),
    ({"_vlkv_writes_draft": [1]}, ["_vlkv_writes_draft", "not for clients"]),
]


@pytest.mark.parametrize("custom, words", BAD, ids=[str(custom) for custom, _ in BAD])
def test_bad_choices_are_refused_naming_the_field_and_what_is_allowed(any_policy, custom, words):
    response = any_policy.post("/generate", PICTURES[0].body(4, custom=custom))
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert all(word in message for word in words), message


def test_bad_requests_disturb_nobody(any_policy, tolerance):
    good = [prompt.body(16) for prompt in PICTURES]
    expected = any_policy.many(good)
    bad = [PICTURES[0].body(4, custom=custom) for custom, _ in BAD]
    with ThreadPoolExecutor(32) as pool:
        refused = pool.map(lambda one: any_policy.post("/generate", one).status_code, bad * 4)
        answers = any_policy.many(good)
        assert set(refused) == {400}
    assert_same(expected, answers, tolerance, "among refused requests")


def test_a_server_that_allows_no_choice_says_so(vlcache):
    refused = vlcache.post("/generate", PICTURES[0].body(4, custom={"kv_budget": 0.2}))
    assert refused.status_code == 400
    message = refused.json()["error"]["message"]
    assert all(word in message for word in ["custom_params.kv_budget", "vlcache", "allow_override"])
    for private in ({"_vlkv_reads_draft": []}, {"_vlkv_writes_draft": "mine"}):
        refused = vlcache.post("/generate", PICTURES[0].body(4, custom=private))
        assert refused.status_code == 400 and "not for clients" in refused.json()["error"]["message"]
    assert requests.get(vlcache.url + "/health", timeout=10).status_code == 200


def test_server_info_says_what_requests_may_choose(any_policy):
    armed = any_policy.info()["kv_policy"]
    assert (armed["policy"], armed["allow_override"]) == ("none", True)
    assert (armed["min_budget"], armed["max_budget"]) == (0.01, 1.0)


def test_a_draft_votes_and_is_never_seen(any_policy, tolerance):
    """Eight drafted rows; the answer is whole, and that of a second run."""
    bodies = [body(prompt, "vlkv", draft_tokens=8, num_tokens=24) for prompt in PICTURES]
    any_policy.flush()
    first, second = any_policy.many(bodies), any_policy.many(bodies)
    for answer in first + second:
        assert report(answer)["draft_rows"] == 8
        assert len(answer["output_ids"]) == 24
    assert_same(first, second, 10 * tolerance, "drafted again")
    plain = any_policy.many([body(prompt, "vlkv", num_tokens=24) for prompt in PICTURES])
    assert all(report(answer)["draft_rows"] == 0 for answer in plain)
    for drafted, other in zip(first, plain, strict=True):
        assert drafted["output_ids"][0] == other["output_ids"][0], "the first token is the prefill's"


def test_a_draft_needs_one_prompt_and_one_choice(any_policy):
    two = body(PICTURES[0], "vlkv", draft_tokens=8)
    two["sampling_params"]["n"] = 2
    response = any_policy.post("/generate", two)
    assert response.status_code == 400 and "draft_tokens" in response.json()["error"]["message"]


@pytest.mark.parametrize("replaces", [True, False])
def test_a_session_has_no_drafts(any_policy, replaces):
    """Its turns are a tree of ids, in which a draft would be a turn."""
    session = Server._checked(any_policy.post("/open_session", {"capacity_of_str_len": 100_000}))
    first = body(PICTURES[0], "vlkv", draft_tokens=4) | {"session_params": {"id": session}}
    [before] = any_policy.many([first])
    turn = {"id": session, "rid": before["meta_info"]["id"]}
    second = body(PICTURES[1], "vlkv", draft_tokens=4) | {"session_params": turn}
    third = second | {"session_params": turn | {"replace": replaces}}
    for asked in (second, third):
        [answer] = any_policy.many([asked])
        assert report(answer)["policy"] == "vlkv" and report(answer)["draft_rows"] == 0
    assert any_policy.post("/close_session", {"session_id": session}).status_code == 200


def test_beams_are_left_alone_by_a_policy_that_drafts(any_policy):
    asked = body(PICTURES[0], "vlkv", draft_tokens=4) | {"return_logprob": False}
    asked["sampling_params"] |= {"beam_width": 2, "n": 2}
    [answer] = any_policy.many([asked])
    assert report(answer)["reason"] == "beam search"


def drafts_long(path: str) -> dict:
    """A request whose draft takes a second or more, and which wants logprobs."""
    custom = {"kv_policy": "vlkv", "kv_policy_config": {"draft_tokens": 250}}
    if path == "/generate":
        return PICTURES[0].body(500, custom=custom)
    return {
        "model": "m", "messages": [user_message("what", PICTURES[0].images)], "max_tokens": 500,
        "temperature": 0, "ignore_eos": True, "custom_params": custom, "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_aborted_while_it_drafts_has_said_nothing(any_policy, path, stream):
    asked = drafts_long(path) | {"stream": stream, "rid": f"drafts {path} {stream}"}
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(any_policy.post, path, asked)
        while not told.done():
            any_policy.post("/abort_request", {"rid": asked["rid"]})
            time.sleep(0.05)
    answer = told.result()
    assert answer.status_code == 200
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    said = [json.loads(line) for line in lines] if stream else [answer.json()]
    if path == "/generate":
        [one] = said
        assert one["meta_info"]["finish_reason"]["type"] == "abort" and not one["text"]
        assert one["meta_info"]["completion_tokens"] == 0 and not one["meta_info"]["output_token_logprobs"]
        assert "kv_policy" not in one["meta_info"]
    else:
        choices = [choice for one in said for choice in one["choices"]]
        assert choices[-1]["finish_reason"] == "abort"
        assert not any((one.get("delta") or one["message"]).get("content") for one in choices)
    assert any_policy.alive() and "Traceback" not in any_policy.log()


def test_a_stream_that_ends_before_its_prompt_is_looked_at_ends_like_others(any_policy):
    """SGLang looks two seconds later whether its client is still there."""
    before = len(any_policy.log())
    refused = body(PICTURES[0], "vlkv", draft_tokens=8) | {"stream": True}
    refused["sampling_params"]["n"] = 2
    assert "draft_tokens serves one prompt" in any_policy.post("/generate", refused).text
    time.sleep(2.5)
    assert "Traceback" not in any_policy.log()[before:]
