"""Elastic Cache through the real server: merged anchors, and a cache that stays at its size."""

from __future__ import annotations

import re

import pytest

from tests.equality import assert_same, first_difference
from tests.prompts import draw_prompt
from tests.serving import Server, report

PICTURES = [draw_prompt(seed, kind) for kind in ("image", "images") for seed in range(20, 23)]


def elastic(prompt, num_tokens: int = 48, **config) -> dict:
    custom = {"kv_policy": "elastic", "kv_policy_config": config, "kv_report": "positions"}
    return prompt.body(num_tokens, custom=custom)


@pytest.mark.parametrize(
    "config", [{}, {"budget": 0.03, "importance": "window"}, {"fixed_point_distance": 7, "sink_tokens": 4}]
)
def test_answers_are_those_of_the_method_row_by_row(any_policy, hugging_face, tolerance, config):
    answers = any_policy.many([elastic(prompt, **config) for prompt in PICTURES])
    sinks, distance = config.get("sink_tokens", 1), config.get("fixed_point_distance", 25)
    expected = [
        hugging_face.generate_sliding(prompt, 48, report(answer)["positions"], sinks, distance)
        for prompt, answer in zip(PICTURES, answers, strict=True)
    ]
    # Rounding grows over merged rows; the margin of a token that may flip is ten times as wide.
    assert_same(expected, answers, 10 * tolerance, f"elastic {config}")
    others = any_policy.many([elastic(p, merge="none", decode="append", **config) for p in PICTURES])
    changed = sum(first_difference(a, b) is not None for a, b in zip(answers, others))
    assert changed > len(PICTURES) // 2, "neither merging nor eviction shows; the test sees nothing"


def test_one_anchor_set_per_layer_with_its_sink_and_last_token(any_policy):
    for answer in any_policy.many([elastic(prompt, 4) for prompt in PICTURES]):
        seen = report(answer)
        for heads in seen["positions"]:
            assert heads[0] == heads[1]
            assert heads[0][0] == 0 and heads[0][-1] == seen["prompt_tokens"] - 1


def test_resident_rows_are_constant_to_two_thousand_tokens(any_policy):
    """Elastic's do not grow; without elimination every output token adds a slot."""
    prompt = PICTURES[0]
    lengths = (2, 40, 400, 2000)
    held = {}
    for decode in ("fixed_point", "append"):
        answers = any_policy.many([elastic(prompt, length, decode=decode) for length in lengths])
        assert [a["meta_info"]["completion_tokens"] for a in answers] == list(lengths)
        slot = report(answers[0])["full_bytes"] // report(answers[0])["prompt_tokens"]
        kept = {report(answer)["kept_bytes"] // slot for answer in answers}
        assert len(kept) == 1
        held[decode] = [report(answer)["last_bytes"] // slot - kept.copy().pop() for answer in answers]
    # One slot more than the rows that stay: the newest token's, before the next step evicts.
    assert max(held["fixed_point"]) <= 1
    assert [abs(grown - length) <= 1 for grown, length in zip(held["append"], lengths)] == [True] * 4


def test_slots_given_back_admit_others():
    """Twelve long answers in a pool that holds two of them whole; nothing has to be retracted."""
    flags = ("--max-total-tokens", "2000", "--kv-policy", "elastic", "--schedule-conservativeness", "0.01")
    bodies = [draw_prompt(seed, "image").body(700) for seed in range(300, 312)]
    with Server(*flags) as server:
        answers = server.many(bodies)
        log = server.log()
        server.flush()
        assert server.alive(), log[-4000:]
    assert all(report(answer)["policy"] == "elastic" for answer in answers)
    assert all(answer["meta_info"]["completion_tokens"] == 700 for answer in answers)
    assert all(report(answer)["retractions"] == 0 for answer in answers)
    assert max(int(count) for count in re.findall(r"#running-req: (\d+)", log)) >= 6
