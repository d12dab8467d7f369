"""The same choice, refusal and report on every endpoint that generates; and what no client can break."""

from __future__ import annotations

import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, NamedTuple
from urllib.parse import quote

import anthropic
import openai
import pytest
import requests

from sglang_vlkv.policies import policies
from tests.prompts import Prompt, draw_prompt
from tests.serving import CHECKPOINT, Server, data_url, for_anthropic, report, user_message, user_turn

HEADER = "X-KV-Policy-Request"
CHOICE = {"kv_policy": "snapkv", "kv_budget": 0.2}
IMAGE = draw_prompt(70, "image")


class Endpoint(NamedTuple):
    """One that generates.

    Attributes:
        body: of a request with a prompt and ``custom_params``, for six tokens.
        refusal: body of its HTTP 400 with a message.
        sees: whether it takes pictures.
        streams: whether it can stream.
        nested: whether ``custom_params`` stands deeper than at the top level.
    """

    path: str
    body: Callable[[Prompt, object], dict]
    refusal: Callable[[str], dict]
    sees: bool = True
    streams: bool = True
    nested: bool = False

    def ask(self, server: Server, custom: object, stream: bool = False) -> requests.Response:
        body = self.body(IMAGE, custom)
        return server.post(self.path, body | {"stream": stream} if self.streams else body)


def generate(prompt: Prompt, custom: object) -> dict:
    body = prompt.body(6)
    body["sampling_params"]["custom_params"] = custom
    return body


def vertex(prompt: Prompt, custom: object) -> dict:
    instance = {"text": user_turn(prompt.text, 1, False), "image_data": [data_url(prompt.images[0])]}
    params = {"max_new_tokens": 6, "temperature": 0, "custom_params": custom}
    return {"instances": [instance], "parameters": {"sampling_params": params}}


def chat(prompt: Prompt, custom: object) -> dict:
    return conversation(user_message(prompt.text, prompt.images[:1]), custom)


def conversation(message: dict, custom: object) -> dict:
    return {
        "model": "m", "messages": [message], "max_tokens": 6, "temperature": 0, "custom_params": custom,
    }  # fmt: skip


def completions(prompt: Prompt, custom: object) -> dict:
    return {"model": "m", "prompt": prompt.text, "max_tokens": 6, "custom_params": custom}


def responses(prompt: Prompt, custom: object) -> dict:
    picture = {"type": "input_image", "image_url": data_url(prompt.images[0])}
    content = [picture, {"type": "input_text", "text": prompt.text}]
    return {
        "model": str(CHECKPOINT), "input": [{"role": "user", "content": content}],
        "max_output_tokens": 8, "temperature": 0, "custom_params": custom,
    }  # fmt: skip


def messages(prompt: Prompt, custom: object) -> dict:
    return conversation(for_anthropic(user_message(prompt.text, prompt.images[:1])), custom)


def ollama_chat(prompt: Prompt, custom: object) -> dict:
    options = {"num_predict": 6, "custom_params": custom}
    return {"model": "m", "messages": [{"role": "user", "content": prompt.text}], "options": options}


def ollama_generate(prompt: Prompt, custom: object) -> dict:
    return {"model": "m", "prompt": prompt.text, "options": {"num_predict": 6, "custom_params": custom}}


def refusal(message: str) -> dict:
    return {"error": {"message": message}}


def openai_refusal(message: str) -> dict:
    return {"object": "error", "message": message, "type": "BadRequestError", "param": None, "code": 400}


def responses_refusal(message: str) -> dict:
    return {"error": {"message": message, "type": "Bad Request", "param": None, "code": 400}}


def anthropic_refusal(message: str) -> dict:
    return {"type": "error", "error": {"type": "invalid_request_error", "message": message}}


def ollama_refusal(message: str) -> dict:
    return openai_refusal(message) | {"type": "400"}


ENDPOINTS = (
    Endpoint("/generate", generate, refusal, nested=True),
    Endpoint("/vertex_generate", vertex, refusal, streams=False, nested=True),
    Endpoint("/v1/chat/completions", chat, openai_refusal),
    Endpoint("/invocations", chat, openai_refusal),
    Endpoint("/v1/completions", completions, openai_refusal, sees=False),
    Endpoint("/v1/responses", responses, responses_refusal),
    Endpoint("/v1/messages", messages, anthropic_refusal),
    Endpoint("/api/chat", ollama_chat, ollama_refusal, sees=False, nested=True),
    Endpoint("/api/generate", ollama_generate, ollama_refusal, sees=False, nested=True),
)
WAYS = [(endpoint, stream) for endpoint in ENDPOINTS for stream in {False, endpoint.streams}]
every_way = pytest.mark.parametrize(
    "endpoint, stream", WAYS, ids=[f"{endpoint.path}{' stream' * stream}" for endpoint, stream in WAYS]
)


def stored(server: Server, request_id: str, more: str = "") -> dict | list:
    answer = requests.get(f"{server.url}/kv_policy/requests/{request_id}{more}", timeout=10)
    assert answer.status_code == 200, answer.text
    return answer.json()


@every_way
def test_an_endpoint_takes_a_choice_and_tells_its_report(any_policy, endpoint, stream):
    answer = endpoint.ask(any_policy, CHOICE | {"kv_report": "positions"}, stream)
    assert answer.status_code == 200, answer.text
    seen = stored(any_policy, answer.headers[HEADER])
    if endpoint.sees:
        assert (seen["policy"], seen["budget"]) == ("snapkv", 0.2)
        assert [len(head) for head, _ in seen["positions"]] == seen["kept_per_layer"]
    else:
        assert (seen["policy"], seen["reason"]) == ("none", "no image or video")
    assert stored(any_policy, answer.headers[HEADER], "/choices") == [seen]
    plain = endpoint.ask(any_policy, None, stream)
    assert plain.status_code == 200 and plain.headers[HEADER] != answer.headers[HEADER]
    assert stored(any_policy, plain.headers[HEADER])["policy"] == "none"


@every_way
def test_an_endpoint_refuses_before_it_answers(any_policy, endpoint, stream):
    for custom, words in [
        ({"kv_policy": "snapkw"}, ["custom_params.kv_policy", "'snapkw'", "snapkv"]),
        ({"kv_budgets": 1}, ["custom_params.kv_budgets", "kv_budget"]),
        ({"kv_report": "all"}, ["custom_params.kv_report", "'all'", "'positions'"]),
        ("snapkv", ["custom_params"]),
        (nested(33), ["custom_params is nested deeper than 32 levels"]),
        (nested(600), ["custom_params is nested deeper than 32 levels"]),
    ]:
        answer = endpoint.ask(any_policy, custom, stream)
        assert answer.status_code == 400, answer.text
        body = answer.json()
        message = body.get("message") or body["error"]["message"]
        if isinstance(custom, dict):  # SGLang itself refuses what is none
            assert body == endpoint.refusal(message), "not the endpoint's own envelope"
        assert all(word in message for word in words), message


def nested(levels: int) -> dict:
    """``custom_params`` so deep."""
    return {"mine": json.loads("[" * (levels - 1) + "]" * (levels - 1))}


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda e: e.path)
def test_an_endpoint_takes_what_is_as_deep_as_may_be(any_policy, endpoint):
    answer = endpoint.ask(any_policy, nested(32) | CHOICE)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("endpoint", [e for e in ENDPOINTS if e.nested], ids=lambda e: e.path)
def test_a_choice_in_the_wrong_place_is_refused(any_policy, endpoint):
    body = endpoint.body(IMAGE, None) | {"custom_params": CHOICE}
    answer = any_policy.post(endpoint.path, body)
    home = "options" if "/api/" in endpoint.path else "sampling_params"
    assert answer.status_code == 400 and f"custom_params belongs into {home}" in answer.text


def test_choices_of_requests_at_once_are_their_own(any_policy):
    names = [name for name in policies() if name not in ("none", "given")]
    seeing = [endpoint for endpoint in ENDPOINTS if endpoint.sees]
    asked = [(seeing[i % len(seeing)], names[i % len(names)], bool(i % 2)) for i in range(36)]

    def ask(endpoint, name, stream) -> str:
        answer = endpoint.ask(any_policy, {"kv_policy": name}, stream)
        return stored(any_policy, answer.headers[HEADER])["policy"]

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(lambda one: ask(*one), asked)) == [name for _, name, _ in asked]


def test_a_batch_chooses_for_each_of_its_prompts(any_policy):
    names = ["h2o", "none", "random"]
    bodies = [generate(IMAGE, {"kv_policy": name}) for name in names]
    batch = {key: [body[key] for body in bodies] for key in ("text", "image_data", "sampling_params")}
    answer = any_policy.post("/generate", batch | {"rid": ["a", "b", "c"]})
    assert [report(one)["policy"] for one in answer.json()] == names
    reports = stored(any_policy, answer.headers[HEADER], "/choices")
    assert [seen["policy"] for seen in reports] == names
    assert [stored(any_policy, name) for name in "abc"] == reports
    bodies[1]["sampling_params"]["custom_params"] = {"kv_policy": "best"}
    refused = any_policy.post("/generate", batch)
    assert refused.status_code == 400 and "custom_params.kv_policy is 'best'" in refused.text


@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_of_a_request_has_its_report(any_policy, stream):
    body = chat(IMAGE, CHOICE) | {"n": 3, "temperature": 1, "rid": f"mine {stream}", "stream": stream}
    answer = any_policy.post("/v1/chat/completions", body)
    reports = stored(any_policy, answer.headers[HEADER], "/choices")
    assert [seen["policy"] for seen in reports] == ["snapkv"] * 3
    assert stored(any_policy, f"mine {stream}", "/choices") == reports
    assert stored(any_policy, answer.headers[HEADER]) == reports[0]


def test_the_openai_client_chooses_on_responses(any_policy):
    client = openai.OpenAI(base_url=any_policy.url + "/v1", api_key="none")
    body = responses(IMAGE, None)
    options = {name: body[name] for name in ("model", "input", "max_output_tokens", "temperature")}
    answer = client.responses.create(**options, extra_body={"custom_params": CHOICE})
    assert answer.output_text and stored(any_policy, answer.id)["policy"] == "snapkv"
    stream = client.responses.create(**options, extra_body={"custom_params": CHOICE}, stream=True)
    *_, last = stream
    assert stored(any_policy, last.response.id)["policy"] == "snapkv"
    with pytest.raises(openai.BadRequestError, match="custom_params.kv_budget is 3"):
        client.responses.create(**options, extra_body={"custom_params": {"kv_budget": 3}}, stream=True)


def test_the_anthropic_client_chooses(any_policy):
    client = anthropic.Anthropic(base_url=any_policy.url, api_key="none")
    body = messages(IMAGE, None)
    options = {name: body[name] for name in ("model", "messages", "max_tokens")}
    options["extra_body"] = {"custom_params": CHOICE}
    answer = client.messages.with_raw_response.create(**options)
    assert answer.parse().content[0].text
    assert stored(any_policy, answer.headers[HEADER])["policy"] == "snapkv"
    with client.messages.stream(**options) as stream:
        assert stream.get_final_text()
        assert stored(any_policy, stream.response.headers[HEADER])["policy"] == "snapkv"
    options["extra_body"] = {"custom_params": {"kv_policy": "snapkw"}}
    with pytest.raises(anthropic.BadRequestError, match="custom_params.kv_policy is 'snapkw'"):
        client.messages.create(**options)


def test_a_server_that_allows_no_choice_refuses_it_everywhere(vlcache):
    for endpoint, stream in WAYS:
        answer = endpoint.ask(vlcache, CHOICE, stream)
        assert answer.status_code == 400 and "custom_params.kv_policy" in answer.text
        assert "allow_override" in answer.text


def test_what_asks_for_no_generation_is_left_alone(any_policy):
    for path in ("/health", "/model_info", "/v1/models", "/kv_policy/twins"):
        assert HEADER not in requests.get(any_policy.url + path, timeout=10).headers
    body = {"model": "m", "query": "a", "items": ["b"], "label_token_ids": [1, 2], "custom_params": CHOICE}
    answer = any_policy.post("/v1/score", body)
    assert answer.status_code == 200 and HEADER not in answer.headers


UNKNOWN = ["nobody", "..%2f..%2fetc%2fpasswd", "a/b", "%00", "é%F0%9F%98%80", "x" * 8000, "%s%n{0}", ""]


def test_an_unknown_id_is_a_404_that_says_so(any_policy):
    for name in UNKNOWN:
        for more in ("", "/choices"):
            answer = requests.get(f"{any_policy.url}/kv_policy/requests/{name}{more}", timeout=10)
            assert answer.status_code == 404 and answer.json()["message"].startswith("No report for ")
            assert len(answer.text) < 1000
    for method in ("post", "put", "delete", "patch"):
        answer = requests.request(method, any_policy.url + "/kv_policy/requests/nobody", timeout=10)
        assert (answer.status_code, answer.json()) == (405, {"detail": "Method Not Allowed"})


def test_an_id_of_ones_own_may_be_anything(any_policy):
    for name in ("a/b", "é😀", "choices", "x" * 2000, "50%"):
        answer = any_policy.post("/generate", generate(IMAGE, CHOICE) | {"rid": name}).json()
        assert stored(any_policy, requests.utils.quote(name, safe="")) == report(answer)


def test_an_unfinished_request_has_no_report_yet(any_policy):
    body = generate(IMAGE, CHOICE) | {"stream": True, "rid": "unfinished", "return_logprob": False}
    body["sampling_params"]["max_new_tokens"] = 600
    with requests.post(any_policy.url + "/generate", json=body, stream=True, timeout=60) as stream:
        lines = (line for line in stream.iter_lines() if line.startswith(b"data: {"))
        assert json.loads(next(lines)[6:])["meta_info"]["finish_reason"] is None
        for name in ("unfinished", stream.headers[HEADER]):
            early = requests.get(f"{any_policy.url}/kv_policy/requests/{name}", timeout=10)
            assert early.status_code == 404 and "not finished" in early.text
        *_, last = (json.loads(line[6:])["meta_info"] for line in lines)
    assert (last["finish_reason"]["type"], last["completion_tokens"]) == ("length", 600)
    assert stored(any_policy, "unfinished")["policy"] == "snapkv"


IDS = [
    "a/b", "/a", "a/", "//", ".", "..", "../twins", "twins", "", " ", "a b", "a\nb", "\n", "\r\n", "\x00", "\x1b[31m\x07",
    "\x7f\x9b", "?a=b", "#a", "%", "%2F", "%252F", "50%", "+", "a&b=c;d", "\\", "'\"<>", "~", "ünï漢😀",
    "\u202e\u2028\u2029", "x", "x/choices", "x/choices/choices", "/choices", "choices", "choices/", "x" * 3000,
]  # fmt: skip


def raw(server: Server, path: str) -> dict | list:
    """What is found at a path that nothing on the way rewrites."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.putrequest("GET", path)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    assert answer.status == 200, (path, body)
    return json.loads(body)


def test_a_report_is_found_by_any_id(any_policy):
    """Each of its own prompt's length, and all at once, so that no id is taken for another."""
    bodies = [
        {"text": "x" * (3 + length), "rid": rid, "sampling_params": {"max_new_tokens": 1}}
        for length, rid in enumerate(IDS)
    ]
    for answer, rid in zip(any_policy.many(bodies), IDS, strict=True):
        assert answer["meta_info"]["id"] == rid
    for length, rid in enumerate(IDS):
        path = "/kv_policy/requests/" + quote(rid, safe="")
        assert raw(any_policy, path)["prompt_tokens"] == 3 + length, rid
        [choice] = raw(any_policy, path + "/choices")
        assert choice["prompt_tokens"] == 3 + length, rid


def test_an_id_that_ends_in_choices_and_the_choices_of_an_id(any_policy):
    """Where both are there, the slash decides; where one is, it is found either way."""

    def ask(rid: str, tokens: int, **sampling) -> None:
        params = {"max_new_tokens": 1, "temperature": 1.0, **sampling}
        answer = any_policy.post("/generate", {"text": "x" * tokens, "rid": rid, "sampling_params": params})
        assert answer.status_code == 200, answer.text

    def at(path: str) -> list[int]:
        found = raw(any_policy, f"/kv_policy/requests/{path}")
        return [one["prompt_tokens"] for one in (found if isinstance(found, list) else [found])]

    ask("alone/choices", 5)
    assert at("alone/choices") == at("alone%2Fchoices") == [5]
    ask("many", 6, n=2)
    assert at("many/choices") == at("many%2Fchoices") == [6, 6] and at("many") == [6]
    ask("many/choices", 7)
    assert at("many/choices") == [6, 6] and at("many%2Fchoices") == [7]
    assert at("many%2Fchoices/choices") == at("many/choices/choices") == [7]
    missing = requests.get(f"{any_policy.url}/kv_policy/requests/none/choices", timeout=10)
    assert missing.status_code == 404 and "No report for 'none/choices'" in missing.text


def test_no_refusal_repeats_what_a_terminal_obeys(any_policy):
    """Names and values that a client chose, in what it is told."""
    nasty = "\x1b]0;T\x07\n\x7f\x9b31m\u202e\u2028"
    h2o = {"kv_policy": "h2o"}
    for custom in [
        {f"kv_{nasty}": 1}, {"kv_policy": nasty}, {"kv_report": nasty}, {"kv_budget": nasty},
        h2o | {"kv_policy_config": nasty}, h2o | {"kv_policy_config": {nasty: 1}},
        h2o | {"kv_policy_config": {"merge": nasty}}, h2o | {"kv_policy_config": {"sink_tokens": nasty}},
        h2o | {"kv_policy_config": {"modality_floors": {nasty: 1}}},
        h2o | {"kv_budget": 0.2, "kv_policy_config": {"budget": nasty}},
    ]:  # fmt: skip
        for endpoint in ENDPOINTS:
            answer = endpoint.ask(any_policy, custom)
            assert answer.status_code == 400, (endpoint.path, custom)
            said = str(answer.json())
            assert "\\x1b" in said and not [c for c in "\x1b\x07\x7f\x9b\u202e\u2028\n" if c in said], said


def test_the_routes_are_documented(any_policy):
    paths = requests.get(any_policy.url + "/openapi.json", timeout=30).json()["paths"]
    ours = {path: methods["get"] for path, methods in paths.items() if path.startswith("/kv_policy/")}
    assert set(ours) == {
        "/kv_policy/twins", "/kv_policy/requests/{request_id}", "/kv_policy/requests/{request_id}/choices",
    }  # fmt: skip
    for described in ours.values():
        assert len(described["description"]) > 60 and "404" in described["responses"]


def test_the_servers_api_key_guards_reports():
    keys = ("--api-key", "user", "--admin-api-key", "operator", "--kv-policy", "vlcache")
    body = {"text": "hello", "sampling_params": {"max_new_tokens": 2}, "rid": "mine"}
    with Server("--max-total-tokens", "4000", *keys) as server:

        def status(method: str, path: str, key: str | None, **options) -> int:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            answer = requests.request(method, server.url + path, headers=headers, timeout=60, **options)
            return answer.status_code

        paths = "/kv_policy/requests/mine", "/kv_policy/requests/mine/choices", "/kv_policy/twins"
        assert status("post", "/generate", "user", json=body) == 200
        for path in paths:
            assert [status("get", path, key) for key in (None, "wrong", "user")] == [401, 401, 200], path
