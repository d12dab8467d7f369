"""Anything at all in ``custom_params``, on every endpoint: 200, or 400 with a reason; nobody else notices.

Drawn from a seed. ``VLKV_FUZZ=100`` draws a hundred times as much.
"""

from __future__ import annotations

import json
import math
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import orjson
import requests

from sglang_vlkv.options import config
from sglang_vlkv.policies import policies
from sglang_vlkv.stages.policy import Policy
from tests.equality import assert_same
from tests.prompts import draw_prompt
from tests.test_endpoints import WAYS

TIMES = int(os.environ.get("VLKV_FUZZ", 1))
KEYS = ("kv_policy", "kv_budget", "kv_policy_config", "kv_report")
WORDS = (*policies(), "positions", "", "kv_policy", "none\0", "НЕТ", "😀" * 50, "x" * 5000, "../..", "%s{0}")
NUMBERS = (
    0, 1, -1, 2**31 - 1, 2**31, 2**63 - 1, -(2**63), 2**64, 10**400, 0.0, -0.0, 1e-9, 5e-324, 0.05, 0.5,
    1 - 1e-16, 1.0, 1.5, 1e308, -1e308, math.inf, -math.inf, math.nan,
)  # fmt: skip


def anything(rng: random.Random, depth: int = 0):
    """A JSON value of any type; NaN and infinities among them."""
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        names = (*KEYS, "kv_", "self", "__class__", "budget", "", "text")
        return {rng.choice(names): anything(rng, depth + 1) for _ in range(rng.randrange(4))}
    if kind == 5:
        return nested(rng.choice([5, 300, 900]), rng.random() < 0.5)
    return rng.choice([(None,), (True, False), NUMBERS, WORDS, NUMBERS][kind])


def nested(depth: int, objects: bool):
    value = 1
    for _ in range(depth):
        value = {"budget": value} if objects else [value]
    return value


def plausible(rng: random.Random, name: str) -> dict:
    """Options of a policy, of their types and at the edges of their ranges."""
    policy = policies()[name]
    chosen = rng.sample(fields(policy), rng.randint(1, 3))
    return {option.name: edge(rng, option) for option in chosen}


def edge(rng: random.Random, option):
    kind = str(option.type)
    if rng.random() < 0.1:
        return anything(rng)
    if words := option.metadata.get("choices"):
        return rng.choice(words)
    if "Mapping" in kind:
        names = rng.sample(["text", "image", "video", "audio", "system"], rng.randint(0, 3))
        return {name: rng.choice([0, 0.5, 1, 1.0, 2]) for name in names}
    if "Sequence" in kind:
        return [rng.choice([0, 1, 50, 299, 10**6, 2**31 - 1, -1]) for _ in range(rng.randrange(300))]
    pools = {
        "bool": [True, False],
        "int": [0, 1, 2, 15, 16, 100, 256, 4096, 10**6, 2**31 - 1, -1],
        "float": [0, 5e-324, 1e-12, 1e-9, 0.1, 0.5, 0.999999, 1, 1 - 1e-16, 2, 1e6, 1e308],
    }
    return rng.choice(pools.get(kind, WORDS))


def draw(rng: random.Random):
    """``custom_params``: half of them nonsense, half of them such that many are served."""
    if rng.random() < 0.1:
        return anything(rng)
    if rng.random() < 0.5:
        return {rng.choice(KEYS): anything(rng) for _ in range(rng.randint(1, 3))}
    name = rng.choice([name for name in policies() if name != "none"])
    budget = {"kv_budget": rng.choice([0.01, 0.02, 0.1, 0.5, 1])} if rng.random() < 0.7 else {}
    return budget | {"kv_policy": name, "kv_policy_config": plausible(rng, name)}


def is_json(value: object) -> bool:
    """Whether the server's parser reads it: no NaN, no infinity, no number beyond 64 bits."""
    try:
        orjson.loads(json.dumps(value))
    except orjson.JSONDecodeError:
        return False
    return True


def test_settings_take_it_or_say_why_not():
    """Straight into what reads ``custom_params``: far more of them than a server could be asked."""
    rng = random.Random(1)
    settings = [
        config.build_settings("vlcache", 0.1, {"allow_override": True}),
        config.build_settings("none", None, {"allow_override": ["h2o", "none"], "max_budget": 0.5}),
    ]
    taken = 0
    for _ in range(3000 * TIMES):
        custom = draw(rng)
        try:
            policy = rng.choice(settings).for_request(custom if isinstance(custom, dict) else {})
        except ValueError as error:
            assert len(str(error)) < 5000
        else:
            assert isinstance(policy, Policy)
            taken += 1
    assert 200 < taken / TIMES < 2800


def test_any_body_is_served_or_refused_and_nobody_else_notices(any_policy, tolerance):
    good = [draw_prompt(seed, "image").body(12, custom={"kv_policy": "h2o"}) for seed in range(71, 75)]
    expected = any_policy.many(good)
    rng = random.Random(2)
    bodies = [(rng.choice(WAYS), draw(rng)) for _ in range(160 * TIMES)]
    prompt = draw_prompt(71, "image")

    def ask(way, custom) -> tuple[int, str]:
        endpoint, stream = way
        body = endpoint.body(prompt, custom) | ({"stream": stream} if endpoint.streams else {})
        url, headers = any_policy.url + endpoint.path, {"Content-Type": "application/json"}
        try:
            answer = requests.post(url, json.dumps(body), headers=headers, timeout=60)
        except requests.RequestException as error:
            return 0, repr(error)
        return answer.status_code, answer.text

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: ask(*one), bodies))
    for (way, custom), (status, text) in zip(bodies, answers, strict=True):
        short = len(text) < 20_000 and ("custom_params" in text or not is_json(custom))
        assert status == 200 or status == 400 and short, (way, custom, status, text[:2000])
    statuses = [status for status, _ in answers]
    assert min(statuses.count(200), statuses.count(400)) > len(bodies) // 10
    any_policy.flush()  # an idle server only, with nothing in its pool: SGLang's strict checks are on
    assert_same(expected, any_policy.many(good), tolerance, "after nonsense")
