"""SGLang's other features, beside a KV policy and beside stock SGLang with the same flags."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import requests
import zmq
from sglang.srt.disaggregation.kv_events import BlockRemoved, BlockStored, KVEventBatch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from transformers import AutoTokenizer

from sglang_vlkv.tinyvlm import build
from tests.adapters import FLAGS as LORA
from tests.adapters import install_unpinned, write_adapter
from tests.conversation import evict_exact_kv, twins
from tests.equality import assert_same
from tests.prompts import draw_prompt
from tests.serving import (
    CHECKPOINT,
    POSITIONS,
    TOGETHER,
    Server,
    free_port,
    interrupted,
    report,
    user_message,
    user_turn,
)

POOL = 4000
# Every row is gathered, moved to other cells and decoded from there.
FULL = {"kv_budget": 1.0, "kv_policy_config": {"compact_always": True, "min_prompt_tokens": 16}}
POLICY = ("--kv-policy", "vlcache", "--kv-policy-config", '{"allow_override": true, "twins": "fallback"}')
EOS = 258
PROMPT = draw_prompt(1, "image")
SCHEMA = {
    "type": "object",
    "properties": {"shape": {"enum": ["circle", "square"]}, "count": {"enum": [1, 2, 3]}},
    "required": ["shape", "count"],
    "additionalProperties": False,
}


@dataclass
class Pair:
    """Stock SGLang and ours, which take the same features.

    Attributes:
        events: port of our server's KV events; stock's are at the next.
    """

    stock: Server
    ours: Server
    adapters: dict[str, Path]
    events: int

    def both(self, body: dict) -> tuple[dict, dict]:
        """The answers to ``body``, ours from a compacted prompt that holds every row."""
        params = body["sampling_params"]
        full = body | {"sampling_params": params | {"custom_params": params.get("custom_params", {}) | FULL}}
        return self.stock.many([body])[0], self.ours.many([full])[0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("adapters"), free_port()
    env = install_unpinned(tmp_path_factory.mktemp("installed"))
    adapters = {name: write_adapter(folder / name, seed) for seed, name in enumerate(("one", "two"))}
    flags = (
        "--max-total-tokens", str(POOL), "--max-running-requests", "4", "--schedule-conservativeness", "0.01",
        *LORA, "--lora-paths", *(f"{name}={path}" for name, path in adapters.items()),
        "--enable-custom-logit-processor", "--enable-return-hidden-states", "--enable-metrics",
        "--enable-priority-scheduling", "--radix-eviction-policy", "priority", "--tool-call-parser", "qwen25",
        "--constrained-json-disable-any-whitespace", "--enable-multimodal", "--served-model-name", "tiny",
    )  # fmt: skip

    def events(number: int) -> tuple[str, str]:
        endpoint = f"tcp://127.0.0.1:{number}"
        return "--kv-events-config", json.dumps({"publisher": "zmq", "endpoint": endpoint, "bind": True})

    with (
        Server(*flags, *events(port + 1), env=env | {"SGLANG_PLUGINS": "vlkv_cpu,unpinned"}) as stock,
        Server(*flags, *events(port), *POLICY, env=env) as ours,
    ):
        yield Pair(stock, ours, adapters, port)
        assert stock.alive() and ours.alive(), ours.log()[-4000:]


def ends_alike(theirs: dict, ours: dict, tolerance: float, title: str) -> None:
    """Both stopped at the same place for the same reason, after the same tokens."""
    assert theirs["meta_info"]["finish_reason"] == ours["meta_info"]["finish_reason"]
    assert report(ours)["kept_per_layer"] == [report(ours)["prompt_tokens"]] * 4
    assert_same([theirs], [ours], tolerance, title)


# ---- What is sampled ----

OPTIONS = {
    "json_schema": dict(json_schema=json.dumps(SCHEMA), ignore_eos=False),
    "regex": dict(regex="[0-9]{3}-(ab|cd)", ignore_eos=False),
    "ebnf": dict(ebnf='root ::= "yes" | "no" " " [0-9]+ "."', ignore_eos=False),
    "stop": dict(stop=["o", "gh"]),
    "stop_token_ids": dict(stop_token_ids=[ord("m")], ignore_eos=False),
    "stop_regex": dict(stop_regex="[h-j]"),
    "min_new_tokens": dict(logit_bias={str(EOS): 100}, ignore_eos=False, min_new_tokens=5),
    "ignore_eos": dict(logit_bias={str(EOS): 100}),
    "logit_bias": dict(logit_bias={str(ord("m")): -100}),
    "frequency_penalty": dict(frequency_penalty=2.0),
    "presence_penalty": dict(presence_penalty=2.0),
    "repetition_penalty": dict(repetition_penalty=1.9),
}


@pytest.fixture(scope="module")
def plain(pair) -> dict:
    return pair.stock.many([PROMPT.body(40)])[0]


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_of_sampling(pair, plain, tolerance, name):
    theirs, ours = pair.both(PROMPT.body(40, **OPTIONS[name]))
    assert theirs["output_ids"] != plain["output_ids"], "the option does nothing"
    ends_alike(theirs, ours, tolerance, name)


def test_samples_of_one_prompt(pair, hugging_face, tolerance):
    """Which are drawn follows from all that the server has drawn before, in the order in which the samples
    came; how likely each was does not."""
    [ours] = pair.ours.many([PROMPT.body(8, n=4, temperature=1.0, custom=FULL)])
    assert len({a["meta_info"]["id"] for a in ours}) == len({tuple(a["output_ids"]) for a in ours}) == 4
    for answer in ours:
        assert report(answer)["policy"] == "vlcache"
        expected = hugging_face.generate(PROMPT, 8, said=answer["output_ids"])
        expected, got = (
            [value for value, *_ in each["meta_info"]["output_token_logprobs"]] for each in (expected, answer)
        )
        assert got == pytest.approx(expected, abs=tolerance)


def test_values_of_logprobs(pair, tolerance):
    body = PROMPT.body(8) | {"logprob_start_len": 0, "top_logprobs_num": 3, "token_ids_logprob": [65, 66]}
    theirs, ours = pair.both(body)
    ends_alike(theirs, ours, tolerance, "logprobs")
    for side in ("input", "output"):
        for kind in ("token_logprobs", "top_logprobs", "token_ids_logprobs"):
            key = f"{side}_{kind}"
            expected, got = (numbers(a["meta_info"][key]) for a in (theirs, ours))
            assert len(expected) >= 8 * 2
            assert got == pytest.approx(expected, abs=tolerance)


def numbers(nested) -> list[float]:
    if isinstance(nested, list):
        return [value for item in nested for value in numbers(item)]
    return [] if nested is None else [float(nested)]


def test_hidden_states(pair, tolerance):
    """Of the tokens that were computed: here all, then those behind the prefix."""
    for server in (pair.stock, pair.ours):
        server.flush()
    theirs, ours = pair.both(PROMPT.body(6) | {"return_hidden_states": True})
    ends_alike(theirs, ours, tolerance, "hidden states")
    expected, got = (numbers(a["meta_info"]["hidden_states"]) for a in (theirs, ours))
    assert len(expected) == (report(ours)["prompt_tokens"] + 5) * 128
    assert got == pytest.approx(expected, abs=1e-3)
    _, again = pair.both(PROMPT.body(6) | {"return_hidden_states": True})
    prompt, prefix = again["meta_info"]["hidden_states"][0], report(again)["prefix"]["tokens"]
    assert len(prompt) == report(again)["prompt_tokens"] - prefix and prefix > 0


def own_ban() -> str:
    """A processor that forbids the token that its request names, and wants to see nothing of others."""

    class OwnBan(CustomLogitProcessor):
        def __call__(self, logits, custom_param_list=None):
            for row, params in zip(logits, custom_param_list, strict=True):
                row[params["banned"]] = -float("inf")
            return logits

    return OwnBan.to_str()


def test_a_logit_processor_gets_its_own_parameters(pair, plain, tolerance):
    """They travel beside ours, in one batch with others."""
    processor, first = own_ban(), plain["output_ids"]
    banned = [first[0], first[1], first[2]]
    bodies = [
        PROMPT.body(8, custom={"banned": token}) | {"custom_logit_processor": processor} for token in banned
    ]
    theirs = pair.stock.many(bodies)
    for body in bodies:
        body["sampling_params"]["custom_params"] |= FULL
    ours = pair.ours.many(bodies)
    assert_same(theirs, ours, tolerance, "logit processors")
    assert len({tuple(a["output_ids"]) for a in ours}) == len(banned)
    for token, answer in zip(banned, ours, strict=True):
        assert token not in answer["output_ids"] and report(answer)["policy"] == "vlcache"


def test_a_draft_under_a_grammar_an_adapter_and_a_processor(pair):
    """Which forbids the digit that is said without it."""
    custom = {"kv_policy": "vlkv", "kv_policy_config": {"draft_tokens": 4}}
    body = PROMPT.body(40, custom=custom, **OPTIONS["json_schema"]) | {"lora_path": "one"}
    [free] = pair.ours.many([body])
    count = json.loads(free["text"])["count"]
    body["sampling_params"]["custom_params"] = custom | {"banned": ord(str(count))}
    [answer] = pair.ours.many([body | {"custom_logit_processor": own_ban()}])
    assert report(answer)["draft_rows"] == 4
    said = json.loads(answer["text"])
    assert said["shape"] in ("circle", "square") and said["count"] in {1, 2, 3} - {count}


@pytest.mark.parametrize("width", [2, 3])
def test_beam_search_leaves_the_prompt_alone(pair, width):
    body = PROMPT.body(8) | {"return_logprob": False}
    body["sampling_params"] |= {"beam_width": width, "n": width}
    theirs, ours = (server.many([body])[0] for server in (pair.stock, pair.ours))
    theirs, ours = ([a] if isinstance(a, dict) else a for a in (theirs, ours))
    assert [a["output_ids"] for a in theirs] == [a["output_ids"] for a in ours]
    assert (report(ours[0])["policy"], report(ours[0])["reason"]) == ("none", "beam search")


@pytest.mark.parametrize(
    "asks",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "shape", "schema": SCHEMA}}},
        {
            "tools": [{"type": "function", "function": {"name": "draw", "parameters": SCHEMA}}],
            "tool_choice": "required",
        },
    ],
    ids=["response_format", "tools"],
)
def test_structure_on_the_openai_endpoint(pair, asks):
    body = {"model": "tiny", "max_tokens": 80, "temperature": 0, "return_meta_info": True} | asks
    body["messages"] = [user_message(PROMPT.text, PROMPT.images)]
    theirs, ours = (
        Server._checked(server.post("/v1/chat/completions", body | more))["choices"][0]
        for server, more in ((pair.stock, {}), (pair.ours, {"custom_params": FULL}))
    )
    for name in ("content", "tool_calls"):
        parts = [choice["message"].get(name) for choice in (theirs, ours)]
        if name == "tool_calls" and parts[0]:
            parts = [[call["function"] for call in calls] for calls in parts]
        assert parts[0] == parts[1]
    if "tools" in asks:
        assert ours["message"]["tool_calls"][0]["function"]["name"] == "draw"
    else:
        assert set(json.loads(ours["message"]["content"])) == {"shape", "count"}
    assert ours["meta_info"]["kv_policy"]["policy"] == "vlcache"


# ---- Adapters ----


def test_adapters_answer_as_in_stock(pair, tolerance):
    answers = []
    for adapter in (None, "one", "two", "one"):
        theirs, ours = pair.both(PROMPT.body(16) | {"lora_path": adapter})
        ends_alike(theirs, ours, tolerance, f"adapter {adapter}")
        answers.append(tuple(ours["output_ids"]))
    assert len(set(answers)) == 3 and answers[1] == answers[3]


def test_adapters_in_one_batch(pair, tolerance):
    bodies = [draw_prompt(seed, "image").body(16, custom=POSITIONS) for seed in range(6)]
    bodies = [body | {"lora_path": (None, "one", "two")[i % 3]} for i, body in enumerate(bodies)]
    pair.ours.flush()
    alone = [pair.ours.many([body])[0] for body in bodies]
    pair.ours.flush()
    together = pair.ours.many(bodies)
    assert all(report(answer)["policy"] == "vlcache" for answer in together)
    assert_same(alone, together, tolerance, "adapters in one batch")


def test_a_twin_serves_nobody_with_another_adapter(pair):
    server, body = pair.ours, PROMPT.body(8, custom=POSITIONS)
    server.flush()
    first = {name: server.many([body | {"lora_path": name}])[0] for name in (None, "one")}
    evict_exact_kv(server, POOL)
    for name in (None, "one"):
        [again] = server.many([body | {"lora_path": name}])
        assert report(again)["prefix"]["kind"] == "twin"
        assert report(again)["positions"] == report(first[name])["positions"]
    evict_exact_kv(server, POOL)
    [other] = server.many([body | {"lora_path": "two"}])
    assert report(other)["prefix"] == {"kind": "cold", "tokens": 0}
    assert len({tuple(a["output_ids"]) for a in (*first.values(), other)}) == 3


def test_an_adapter_that_is_replaced_leaves_nothing_to_its_name(pair):
    server, body = pair.ours, PROMPT.body(8) | {"lora_path": "other"}
    answers = []
    for name in ("one", "two"):
        load = {"lora_name": "other", "lora_path": str(pair.adapters[name])}
        Server._checked(server.post("/load_lora_adapter", load))
        answers.append(server.many([body])[0])
        Server._checked(server.post("/unload_lora_adapter", {"lora_name": "other"}))
    assert [report(a)["prefix"]["kind"] for a in answers] == ["cold", "cold"]
    assert answers[0]["output_ids"] != answers[1]["output_ids"]


# ---- Who goes first ----


def test_preempted_requests_go_on_from_their_twins(pair, tolerance):
    """A higher priority takes their places in a full batch; they say what they would have said."""
    server = pair.ours
    low = [draw_prompt(seed, "image").body(400) | {"priority": 0} for seed in range(20, 24)]
    high = draw_prompt(30, "image").body(8) | {"priority": 100}
    server.flush()
    undisturbed = server.many(low)
    assert not any(report(answer)["retractions"] for answer in undisturbed)
    server.flush()
    urgent = []
    crowd = interrupted(server, low, lambda: urgent.extend(server.many([high])))
    [first] = urgent
    assert report(first)["policy"] == "vlcache" and not report(first)["retractions"]
    preempted = [answer for answer in crowd if report(answer)["retractions"]]
    assert preempted, "nobody made room"
    assert {report(answer)["prefix"]["kind"] for answer in preempted} == {"twin"}
    assert_same(undisturbed, crowd, tolerance, "preempted")


# ---- What is counted ----


def test_metrics_count_what_the_reports_say(pair):
    server = pair.ours
    before = metrics(server)
    bodies = [draw_prompt(seed, "image").body(8) for seed in (40, 41, 40)]
    answers = [server.many([body])[0] for body in bodies]
    after = metrics(server)
    counted = {name: after[name] - before.get(name, 0) for name in after}
    assert counted["prompt_tokens_total"] == sum(report(a)["prompt_tokens"] for a in answers)
    assert counted["cached_tokens_total"] == sum(report(a)["prefix"]["tokens"] for a in answers) > 0
    assert counted["generation_tokens_total"] == 24


def metrics(server: Server) -> dict[str, float]:
    """Sums over labels."""
    found: dict[str, float] = {}
    for line in requests.get(server.url + "/metrics", timeout=60).text.splitlines():
        if line.startswith("sglang:"):
            name, value = line.removeprefix("sglang:").rsplit(" ", 1)
            name = name.split("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def test_kv_events_tell_of_exact_kv_only(pair):
    """A router learns the prompt's tokens, as from stock, and nothing of the twins and their eviction."""
    stored, removed = [], []
    context = zmq.Context()
    for server, port in ((pair.ours, pair.events), (pair.stock, pair.events + 1)):
        with context.socket(zmq.SUB) as socket:
            socket.subscribe(b"")
            socket.connect(f"tcp://127.0.0.1:{port}")
            while not socket.poll(200):  # the subscription has not arrived
                server.flush()
            [answer] = server.many([PROMPT.body(8)])
            [again] = server.many([draw_prompt(2, "image").body(8)])
            if server is pair.ours:
                evict_exact_kv(server, POOL)
            events = list(received(socket))
        blocks = [event for event in events if isinstance(event, BlockStored)]
        stored.append([token for event in blocks for token in event.token_ids])
        announced = {block for event in blocks for block in event.block_hashes}
        gone = {b for event in events if isinstance(event, BlockRemoved) for b in event.block_hashes}
        assert gone <= announced
        removed.append(gone)
    context.destroy()
    assert twins(pair.ours)["twins"] and removed[0]
    first, second = (a["meta_info"]["prompt_tokens"] for a in (answer, again))
    ours, theirs = stored
    assert ours[:first] == theirs[:first]
    assert len(set(ours)) <= len(set(theirs)) and set(ours) <= set(theirs)
    assert first + second - 16 <= len(ours) <= first + second


def received(socket):
    while socket.poll(1000):
        *_, payload = socket.recv_multipart()
        yield from msgspec.msgpack.decode(payload, type=KVEventBatch).events


# ---- What the server is told while it serves ----


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "other"
    build.build(path, seed=1)
    return path


def load(server: Server, weights: Path) -> None:
    told = {"model_path": str(weights)}
    assert Server._checked(server.post("/update_weights_from_disk", told))["success"]


def test_new_weights_find_no_twins(pair, other_weights, tolerance):
    old = pair.both(PROMPT.body(16))[1]
    assert twins(pair.ours)["twins"]
    try:
        for server in (pair.stock, pair.ours):
            load(server, other_weights)
        assert twins(pair.ours)["twins"] == 0
        theirs, ours = pair.both(PROMPT.body(16))
        assert report(ours)["prefix"]["kind"] == "cold" and ours["output_ids"] != old["output_ids"]
        ends_alike(theirs, ours, tolerance, "other weights")
    finally:
        for server in (pair.stock, pair.ours):
            load(server, CHECKPOINT)


def test_new_weights_in_a_pause_are_what_retracted_requests_go_on_with(pair, other_weights, tolerance):
    server, prompt = pair.ours, draw_prompt(50, "image")
    server.flush()
    # The first tokens may be long on their way to a busy client, and logprobs make a stream heavy.
    body = prompt.body(800, custom=FULL) | {"return_logprob": False}
    undisturbed = server.many([body])[0]["output_ids"]
    server.flush()

    def interrupt() -> None:
        assert server.post("/pause_generation", {"mode": "retract"}).status_code == 200
        load(server, other_weights)
        assert twins(server)["twins"] == 0
        assert server.post("/continue_generation", {}).status_code == 200

    try:
        [answer] = interrupted(server, [body], interrupt)
        assert report(answer)["retractions"] == 1 and report(answer)["prefix"]["tokens"] == 0
        pairs = zip(undisturbed, answer["output_ids"], strict=True)
        parted = next(i for i, (old, new) in enumerate(pairs) if old != new)
        text = bytes(answer["output_ids"][:parted]).decode()
        # What follows is the new weights' continuation of what the old ones had said.
        body = prompt.body(8, custom=FULL)
        body["text"] += text
        [continued] = server.many([body])
        went_on = {"output_ids": answer["output_ids"][parted : parted + 8]}
        assert_same([continued], [went_on], tolerance, "new weights")
    finally:
        load(server, CHECKPOINT)


def test_a_session_goes_on_from_what_was_said(pair, tolerance):
    answers = []
    for server, custom in ((pair.stock, None), (pair.ours, FULL)):
        session = Server._checked(server.post("/open_session", {"capacity_of_str_len": 100_000}))
        first = PROMPT.body(8, custom=custom) | {"session_params": {"id": session}}
        [before] = server.many([first])
        turn = Server.body("", max_new_tokens=8, custom=custom)
        turn |= {"text": user_turn("and below it?", 0, False)}
        turn["session_params"] = {"id": session, "rid": before["meta_info"]["id"]}
        answers.append(server.many([turn])[0])
        assert server.post("/close_session", {"session_id": session}).status_code == 200
    theirs, ours = answers
    assert ours["meta_info"]["prompt_tokens"] == theirs["meta_info"]["prompt_tokens"]
    ends_alike(theirs, ours, tolerance, "session")
    assert report(ours)["prefix"]["tokens"] > 200


def test_a_generating_model_gives_no_embeddings(pair):
    for server in (pair.stock, pair.ours):
        answer = server.post("/v1/embeddings", {"model": "tiny", "input": "circles"})
        assert answer.status_code == 400 and "--is-embedding" in answer.text


# ---- Other flags ----

SERVERS = {
    "longest prefix first, llguidance": (
        "--schedule-policy", "lpm", "--grammar-backend", "llguidance", "--radix-eviction-policy", "lfu",
        "--prefill-decode-interval", "3",
    ),
    "by weight, outlines": (
        "--schedule-policy", "dfs-weight", "--grammar-backend", "outlines", "--radix-eviction-policy", "slru",
        "--num-continuous-decode-steps", "3",
    ),
}  # fmt: skip


# SGLang reserves room for all output tokens of those that cannot end early.
CROWD = [draw_prompt(seed, "image").body(150, ignore_eos=False) for seed in range(60, 72)]


@pytest.fixture(scope="module")
def alone(pair) -> list[dict]:
    """Answers to CROWD, each scored from its exact prompt."""
    pair.ours.flush()
    answers = [pair.ours.many([body])[0] for body in CROWD]
    assert all(report(answer)["prefix"]["kind"] != "twin" for answer in answers)
    return answers


@pytest.mark.parametrize("name", SERVERS)
def test_other_schedules_and_grammars(pair, alone, tolerance, name):
    """In a pool that cannot hold all, everybody says what they would have said alone."""
    constrained = PROMPT.body(40, custom=FULL, **OPTIONS["regex"])
    pool = 1000
    assert sum(report(answer)["prompt_tokens"] for answer in alone) > 2 * pool
    flags = ("--max-total-tokens", str(pool), "--schedule-conservativeness", "0.01", *SERVERS[name], *POLICY)
    with Server(*flags, env=TOGETHER) as server:
        assert_same(pair.both(constrained)[1:], server.many([constrained]), tolerance, name)
        answers = server.together(CROWD)
        assert server.alive(), server.log()[-4000:]
        assert "Retract requests" in server.log(), "the pool did not run dry"
    assert all(report(answer)["policy"] == "vlcache" for answer in answers)
    assert_same(alone, answers, tolerance, name)


def test_without_a_tokenizer_and_with_a_narrower_cache(pair):
    """Prompts come as ids; a cache in bfloat16 holds half the bytes of one in float32."""
    body = PROMPT.body(8, custom=POSITIONS)
    [expected] = pair.ours.many([body])
    ids = AutoTokenizer.from_pretrained(CHECKPOINT)(body.pop("text"))["input_ids"]
    pool = ("--max-total-tokens", str(POOL))
    with Server(*pool, "--skip-tokenizer-init", "--kv-cache-dtype", "bfloat16", *POLICY) as server:
        [answer] = server.many([body | {"input_ids": ids}])
        assert server.alive(), server.log()[-4000:]
    for name in ("prompt_tokens", "visual_tokens", "voting_rows"):
        assert report(answer)[name] == report(expected)[name]
    assert 2 * report(answer)["full_bytes"] == report(expected)["full_bytes"]
    for layer, other in zip(report(answer)["positions"], report(expected)["positions"], strict=True):
        for head, others in zip(layer, other, strict=True):
            assert len(set(head) & set(others)) >= 0.8 * len(head)
