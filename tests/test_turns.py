"""Conversations, retractions and forks that go on from twins."""

from __future__ import annotations

import random
import re

import pytest

from tests.conftest import FLEET
from tests.conversation import Conversation, evict_exact_kv, talk, twins
from tests.equality import alike, assert_same
from tests.prompts import CLIP, draw_prompt, picture, words
from tests.serving import POSITIONS, Server, report
from tests.test_kept_rows import same_kept

LAYERS = 4
POOL = FLEET["fallback"][0]
CHOICES = {
    "vlcache": {},
    "vlkv, merging": {"kv_policy": "vlkv", "kv_policy_config": {"merge": "similar"}},
    "elastic": {"kv_policy": "elastic"},
    "h2o": {"kv_policy": "h2o"},
}


def turns(seed: int, kind: str, count: int = 6):
    """What a user asks, turn by turn: ``(text, images, video)``; a new picture in the fourth."""
    rng = random.Random(f"turns{seed}")
    for turn in range(count):
        images, video = (), CLIP if kind == "video" and turn == 0 else None
        if kind == "image" and turn in (0, 3):
            images = (picture(rng, 28 * rng.randint(15, 18), 28 * 16),)
        yield words(rng, rng.randint(4, 12)), images, video


def prefix(answer: dict) -> dict:
    return report(answer)["prefix"]


def end(answer: dict) -> int:
    """Tokens of a request's path that have KV when it ends: all but the last."""
    return report(answer)["prompt_tokens"] + answer["meta_info"]["completion_tokens"] - 1


def held(answer: dict) -> int:
    """Slots that the kept rows of the prompt take."""
    seen = report(answer)
    return seen["kept_bytes"] // (seen["full_bytes"] // seen["prompt_tokens"])


# ---- Conversations ----


@pytest.mark.parametrize("kind", ["image", "video"])
def test_with_its_exact_kv_resident_every_turn_is_scored_anew(fleet, hugging_face, tolerance, kind):
    """No drift: the sixth turn keeps what it would keep of the same prompt asked cold."""
    server = fleet["fallback"]
    server.flush()
    prompts, answers = talk(server, turns(0, kind))
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        server.flush()
        [cold] = server.many([prompt.body(16, custom=POSITIONS)])
        assert prefix(cold) == {"kind": "cold", "tokens": 0}
        if index:
            n, voting = report(answer)["prompt_tokens"], report(answer)["voting_rows"]
            resident = report(answers[index - 1])["prompt_tokens"]
            assert prefix(answer) == {"kind": "exact", "tokens": min(resident, n - voting)}
            assert answer["meta_info"]["cached_tokens"] == prefix(answer)["tokens"]
        if kind == "image":
            same_kept([cold], [answer], [hugging_face.scores(prompt)], f"turn {index}")
        alike(cold, answer)
        assert_same([cold], [answer], tolerance, f"{kind}, turn {index}, exact against cold")


@pytest.mark.parametrize("name, kind", [*((name, "image") for name in CHOICES), ("vlcache", "video")])
def test_without_exact_kv_only_the_new_turn_is_prefilled(fleet, tolerance, name, kind):
    """Pressure takes the exact KV before every turn; where nothing else ran, the same is answered."""
    tight, roomy, custom = fleet["fallback"], fleet["prefer"], CHOICES[name]
    for server in (tight, roomy):
        server.flush()
    evictions = [twins(server)["evictions"] for server in (tight, roomy)]
    said = list(turns(1, kind))
    prompts, answers = talk(tight, said, custom, lambda: evict_exact_kv(tight, POOL))
    _, undisturbed = talk(roomy, said, custom)
    assert [twins(server)["evictions"] for server in (tight, roomy)] == evictions
    for one, other in ((answers, tight), (undisturbed, roomy)):
        for before, answer in zip(one, one[1:]):
            covered, n = end(before), report(answer)["prompt_tokens"]
            assert prefix(answer) == {"kind": "twin", "tokens": covered}, other.log()[-2000:]
            assert answer["meta_info"]["cached_tokens"] == covered
            new = n - report(before)["prompt_tokens"] - before["meta_info"]["completion_tokens"]
            assert n - covered == new + 1  # the last output token has no KV yet
    assert prefix(answers[0])["kind"] in ("cold", "exact")
    for answer, other in zip(answers, undisturbed, strict=True):
        assert report(answer)["kept_per_layer"] == report(other)["kept_per_layer"]
        rows = sum(report(answer)["kept_per_layer"])
        if name != "elastic":  # its sliding rows take a slot for all layers
            assert 0 <= held(answer) - rows / LAYERS <= 8, "a piece wastes less than a slot"
    assert_same(undisturbed, answers, 10 * tolerance if name == "elastic" else tolerance, f"{name}, {kind}")


@pytest.mark.parametrize("name", ["fallback", "prefer"])
def test_a_conversation_on_its_twin_attends_to_exactly_those_rows(fleet, hugging_face, tolerance, name):
    """Hugging Face, under masks made of the reported positions, gives every turn's logprobs."""
    server = fleet[name]
    server.flush()
    before = None if name == "prefer" else lambda: evict_exact_kv(server, POOL)
    prompts, answers = talk(server, turns(2, "image"), before=before)
    compactions = []
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        expected = hugging_face.logprobs_behind(prompt, answer["text"], compactions)
        if index in (0, 3):  # the turns with a picture are compacted once they are prefilled
            compactions.append((report(answer)["prompt_tokens"], report(answer)["positions"]))
            expected = hugging_face.logprobs_behind(prompt, answer["text"], compactions)
        got = [value for value, *_ in answer["meta_info"]["output_token_logprobs"]]
        deviation = max(abs(a - b) for a, b in zip(expected, got, strict=True))
        print(f"turn {index}: largest deviation from Hugging Face {deviation:.1e}")
        assert deviation < tolerance
    wrong = hugging_face.logprobs_behind(prompt, answer["text"], [])
    assert max(abs(a - b) for a, b in zip(wrong, got)) > 10 * tolerance, "the test sees nothing"


# ---- Retractions ----


def retracted(server: Server, roomy: Server, bodies: list[dict], tolerances: list[float]) -> int:
    """Answers under retraction equal those without; returns how many retractions there were."""
    roomy.flush()
    undisturbed = roomy.many(bodies, workers=4)  # a burst of pictures takes gigabytes
    assert not any(report(answer)["retractions"] for answer in undisturbed)
    server.flush()
    answers = server.together(bodies)
    counts = [report(answer)["retractions"] for answer in answers]
    print(f"{sum(counts)} retractions of {sum(map(bool, counts))} out of {len(bodies)} requests")
    for index, (one, other, count) in enumerate(zip(undisturbed, answers, counts, strict=True)):
        assert_same([one], [other], tolerances[index], f"request {index}, retracted {count} times")
        assert report(one).get("kept_per_layer") == report(other).get("kept_per_layer")
        if count and report(other)["policy"] != "none":  # which a short prompt is left to
            assert prefix(other)["kind"] in ("twin", "shared"), report(other)
            assert prefix(other)["tokens"] >= report(other)["prompt_tokens"], "its prompt ran again"
    return sum(counts)


def test_retractions_in_a_pool_that_runs_dry(fleet, tolerance):
    """Three policies at once; what slides gives back a slot for each that it takes."""
    names = [list(CHOICES)[seed % 3] for seed in range(24)]
    bodies = [
        # SGLang reserves room for all output tokens of those that cannot end early.
        draw_prompt(600 + seed, "image").body(400, custom=CHOICES[name], ignore_eos=False)
        for seed, name in enumerate(names)
    ]
    tolerances = [tolerance * (10 if name == "elastic" else 1) for name in names]
    before = fleet["fallback"].log().count("Retract requests")
    count = retracted(fleet["fallback"], fleet["prefer"], bodies, tolerances)
    assert count >= 10 and fleet["fallback"].log().count("Retract requests") > before


# ---- Samples and forks ----


def peak_tokens(log: str) -> int:
    """Most slots that running requests held."""
    return max(int(count) for count in re.findall(r"Decode batch.*?#token: (\d+)", log))


@pytest.mark.parametrize("name", ["fallback", "prefer"])
def test_samples_share_one_copy(fleet, name):
    """Eight samples hold the prompt's rows once, and each its own output. SGLang sends them to its scheduler
    one after another, faster than one of them is answered."""
    server = fleet[name]
    server.flush()
    start = len(server.log())
    body = draw_prompt(1, "image").body(64, temperature=1.0, n=8)
    answers = server._checked(server.post("/generate", body))
    assert len({tuple(answer["output_ids"]) for answer in answers}) == 8
    kinds = [prefix(answer)["kind"] for answer in answers]
    assert kinds.count("shared") >= 7, kinds
    rows = held(answers[0])
    assert rows == -(-sum(report(answers[0])["kept_per_layer"]) // LAYERS)
    assert {held(answer) for answer in answers} == {rows}
    assert peak_tokens(server.log()[start:]) <= rows + 8 * 64
    left = twins(server)
    assert left["twins"] == 9 and left["slots"] == rows + 8 * 63


@pytest.mark.parametrize("name", ["fallback", "prefer"])
def test_eight_requests_with_one_prompt_share_one_copy(fleet, name, tolerance):
    server = fleet[name]
    server.flush()
    prompt = draw_prompt(2, "images")
    [alone] = server.many([prompt.body(96)])
    server.flush()
    start = len(server.log())
    answers = server.together([prompt.body(96) for _ in range(8)])
    assert [prefix(answer)["kind"] for answer in answers] == ["cold", *["shared"] * 7]
    assert_same([alone] * 8, answers, tolerance, f"eight at once, {name}")
    rows = held(alone)
    assert peak_tokens(server.log()[start:]) <= rows + 8 * 96
    # Equal answers are one twin too; a repeated prompt may leave its last token beside it.
    assert twins(server)["slots"] <= rows + 2 * 96


@pytest.mark.parametrize("name", ["fallback", "prefer"])
def test_a_fork_holds_its_beginning_once(fleet, name, tolerance):
    """Eight continuations of one answered question about a picture, all at once: who came after another
    has been answered would find more than its beginning."""
    server = fleet[name]
    server.flush()
    [base], [first] = talk(server, list(turns(3, "image", 1)), length=24)
    if name == "fallback":
        evict_exact_kv(server, POOL)
    before, start, rng = twins(server), len(server.log()), random.Random(3)
    branches = [base.answered(first).ask(words(rng, 6)) for _ in range(8)]
    answers = server.together([branch.body(48, custom=POSITIONS) for branch in branches])
    assert {prefix(answer)["tokens"] for answer in answers} == {end(first)}
    assert [prefix(answer)["kind"] for answer in answers] == ["twin", *["shared"] * 7]
    own = sum(end(answer) - end(first) for answer in answers)
    assert twins(server)["slots"] == before["slots"] + own
    assert peak_tokens(server.log()[start:]) <= before["slots"] + own + 8
    for branch, answer in zip(branches, answers):
        server.flush()
        [prompt], [again] = talk(server, list(turns(3, "image", 1)), length=24)
        if name == "fallback":
            evict_exact_kv(server, POOL)
        [alone] = server.many([branch.body(48, custom=POSITIONS)])
        assert prefix(alone) == {"kind": "twin", "tokens": end(again)}
        assert_same([alone], [answer], tolerance, f"a branch alone, {name}")


def test_questions_behind_one_picture_share_its_rows(fleet):
    """Prompts that begin alike and differ before their end, all at once: the twin serves what is
    common."""
    server = fleet["fallback"]
    server.flush()
    rng = random.Random(8)
    shown = (picture(rng, 28 * 16, 28 * 16),)
    lead = words(rng, 20)
    asked = [Conversation().ask(f"{lead} {letter} {words(rng, 5)}", shown) for letter in "ABCDEFGH"]
    [first] = server.many([asked[0].body(16)])
    evict_exact_kv(server, POOL)
    before, start = twins(server), len(server.log())
    answers = server.together([prompt.body(48) for prompt in asked[1:]])
    common = report(first)["prompt_tokens"] - len(tokens_after(asked[0], "A"))
    assert {prefix(answer)["tokens"] for answer in answers} == {common}
    assert [prefix(answer)["kind"] for answer in answers] == ["twin", *["shared"] * 6]
    own = sum(end(answer) - common for answer in answers)
    assert twins(server)["slots"] == before["slots"] + own
    assert peak_tokens(server.log()[start:]) <= before["slots"] + own + 7


def tokens_after(prompt: Conversation, mark: str) -> list[str]:
    """The tokens from ``mark`` on, which is not among the pictures; chat delimiters are one each."""
    return re.findall(r"<\|im_\w+\|>|.", prompt.text[prompt.text.index(mark) :], re.DOTALL)


@pytest.mark.parametrize("name", ["fallback", "prefer"])
def test_a_hundred_askers_of_one_prompt_leave_one_copy(fleet, name):
    server = fleet[name]
    server.flush()
    body = draw_prompt(4, "image").body(4)
    first = [server.many([body])[0] for _ in range(3)]
    left = twins(server)
    for _ in range(97):
        server.many([body])
    assert {key: twins(server)[key] for key in ("twins", "slots")} == {
        key: left[key] for key in ("twins", "slots")
    }
    assert left["slots"] <= held(first[0]) + 2 * 4


# ---- Who may go on from what ----


@pytest.fixture
def begun(fleet):
    """A server, a prompt that follows a first turn there, and that turn's answer; its exact KV has
    gone. The first turn's text is in two parts, before and behind an ``A``."""
    server = fleet["fallback"]
    server.flush()
    rng = random.Random(9)
    shown = (picture(rng, 28 * 16, 28 * 16),)
    [prompt], [answer] = talk(server, [(words(rng, 8) + "A" + words(rng, 8), shown)])
    evict_exact_kv(server, POOL)
    return server, prompt, answer


def follow_up(prompt: Conversation, answer: dict) -> Conversation:
    return prompt.answered(answer).ask(words(random.Random(11), 8))


OTHERS = {
    "none": ({"kv_policy": "none"}, {}),
    "policy": ({"kv_policy": "uniform"}, {}),
    "budget": ({"kv_budget": 0.2}, {}),
    "option": ({"kv_policy_config": {"sink_tokens": 4}}, {}),
    "extra_key": ({}, {"extra_key": "adapter"}),
    "cache_salt": ({}, {"cache_salt": "tenant"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_nobody_goes_on_from_a_twin_of_others(begun, tolerance, name):
    server, prompt, first = begun
    asked, (custom, fields) = follow_up(prompt, first), OTHERS[name]
    body = asked.body(16, custom=custom) | fields
    [other] = server.many([body])
    assert prefix(other)["tokens"] < 10, prefix(other)  # the chat template's, if any
    evict_exact_kv(server, POOL)
    if name == "none":  # leaves no twin
        [again] = server.many([body])
        assert prefix(again) == {"kind": "cold", "tokens": 0}
    else:
        [mine, again] = [server.many([each])[0] for each in (asked.body(16), body)]
        assert prefix(mine) == {"kind": "twin", "tokens": end(first)}
        assert prefix(again) == {"kind": "twin", "tokens": report(other)["prompt_tokens"] - 1}
    server.flush()
    [cold] = server.many([body])
    assert_same([cold], [other], tolerance, f"another {name}")


def test_a_shorter_common_prefix_uses_part_of_a_twin(begun, hugging_face, tolerance):
    server, prompt, first = begun
    common = report(first)["prompt_tokens"] - len(tokens_after(prompt, "A"))
    text = re.search(r"end\|>([^<]*)A", prompt.text)[1]
    other = Conversation().ask(f"{text}? {words(random.Random(12), 10)}", prompt.images)
    [answer] = server.many([other.body(16, custom=POSITIONS)])
    seen = prefix(answer)
    assert (seen["kind"], seen["tokens"]) == ("twin", common)
    kept = [[[p for p in head if p < common] for head in layer] for layer in report(first)["positions"]]
    rows = [min(map(len, layer)) for layer in kept]
    assert seen["rows_lost"] == sum(len(head) - r for layer, r in zip(kept, rows) for head in layer) > 0
    used = [[[p for p in head if p < common] for head in layer] for layer in report(answer)["positions"]]
    assert used == [[head[:r] for head in layer] for layer, r in zip(kept, rows)]
    expected = hugging_face.logprobs_behind(other, answer["text"], [(common, used)])
    got = [value for value, *_ in answer["meta_info"]["output_token_logprobs"]]
    assert max(abs(a - b) for a, b in zip(expected, got, strict=True)) < tolerance


@pytest.mark.parametrize("name", ["vlkv, merging", "elastic"])
def test_merged_rows_serve_no_shorter_prefix(fleet, name):
    server, rng = fleet["fallback"], random.Random(10)
    server.flush()
    shown, text = (picture(rng, 28 * 16, 28 * 16),), words(rng, 12)
    [prompt], [answer] = talk(server, [(text, shown)], CHOICES[name])
    other = Conversation().ask(text[: len(text) // 2] + "? " + words(rng, 10), shown)
    evict_exact_kv(server, POOL)
    [answer] = server.many([follow_up(prompt, answer).body(8, custom=CHOICES[name])])
    assert prefix(answer)["kind"] == "twin" and "rows_lost" not in prefix(answer)
    before = twins(server)
    [answer] = server.many([other.body(8, custom=CHOICES[name])])
    assert prefix(answer)["tokens"] < 10 and "rows_lost" not in prefix(answer)
    assert twins(server)["evictions"] == before["evictions"] and before["slots"] > 0


def test_logprobs_of_the_input_are_computed_from_exact_kv(begun, stock, tolerance):
    server, prompt, first = begun
    asked, n = follow_up(prompt, first), end(first)
    body = asked.body(8) | {"logprob_start_len": 0}
    [answer], [expected] = server.many([body]), stock.many([body])
    assert prefix(answer)["tokens"] < 10
    logprobs = [a["meta_info"]["input_token_logprobs"] for a in (answer, expected)]
    assert len(logprobs[0]) == len(logprobs[1]) == report(answer)["prompt_tokens"]
    pairs = list(zip(*logprobs))
    assert all(a[1] == b[1] for a, b in pairs)
    assert max(abs(a[0] - b[0]) for a, b in pairs[1:]) < tolerance
    # Those of the new turn alone need no more than that.
    server.flush()
    server.many([prompt.body(16)])
    evict_exact_kv(server, POOL)
    [answer] = server.many([asked.body(8) | {"logprob_start_len": n}])
    assert prefix(answer) == {"kind": "twin", "tokens": n}
    assert len(answer["meta_info"]["input_token_logprobs"]) == report(answer)["prompt_tokens"] - n


def test_flushing_drops_all(begun):
    server, prompt, _ = begun
    assert twins(server)["slots"] > 0
    server.flush()
    assert (twins(server)["twins"], twins(server)["slots"]) == (0, 0)
    [answer] = server.many([prompt.body(4)])
    assert prefix(answer) == {"kind": "cold", "tokens": 0}


def test_exact_kv_with_a_twin_leaves_before_older_kv_without(fleet):
    server = fleet["fallback"]
    server.flush()
    evictions = twins(server)["evictions"]

    def text(seed: int, length: int) -> dict:
        sampling = {"max_new_tokens": 1, "temperature": 0.0}
        return {"text": words(random.Random(f"order{seed}"), length)[:length], "sampling_params": sampling}

    server.many([text(0, 1000)])
    prompt = draw_prompt(5, "image")
    [answer] = server.many([prompt.body(8)])
    n = report(answer)["prompt_tokens"]
    free = POOL - 1000 - n - twins(server)["slots"]
    server.many([text(1, free + n // 2)])
    [old] = server.many([text(0, 1000)])
    assert old["meta_info"]["cached_tokens"] >= 999, "the older KV has gone"
    [again] = server.many([prompt.body(8)])
    assert prefix(again) == {"kind": "twin", "tokens": n - 1}, "the exact KV is still there"
    assert twins(server)["evictions"] == evictions


# ---- Only what was retracted ----


def test_resume_answers_the_same_prompt_and_no_new_turn(fleet, tolerance):
    server = fleet["resume"]
    server.flush()
    said = list(turns(6, "image", 2))
    [prompt], [answer] = talk(server, said[:1])
    evict_exact_kv(server, FLEET["resume"][0])
    [again] = server.many([prompt.body(16)])
    n = report(answer)["prompt_tokens"]
    assert prefix(again) == {"kind": "twin", "tokens": n - 1}
    [third] = server.many([prompt.body(16)])
    assert_same([again], [third], tolerance, "the same prompt, twice from its twin")
    follow_up = prompt.answered(answer).ask(*said[1])
    evict_exact_kv(server, FLEET["resume"][0])
    [other] = server.many([follow_up.body(8)])
    assert prefix(other)["kind"] == "cold" and twins(server)["slots"] > 0


def test_a_draft_votes_the_same_whether_a_twin_is_there_or_not(fleet):
    """It would say what the kept rows say, not what the prompt says."""
    server = fleet["resume"]
    server.flush()
    custom = {"kv_policy": "vlcache", "kv_policy_config": {"draft_tokens": 4}} | POSITIONS
    bodies = [draw_prompt(77, "image").body(8, custom=custom)]
    [first] = server.many(bodies)
    evict_exact_kv(server, FLEET["resume"][0])
    [again] = server.many(bodies)
    assert report(first)["draft_rows"] == report(again)["draft_rows"] == 4
    assert prefix(again)["kind"] == "exact", "the draft computed the prompt"
    assert report(again)["positions"] == report(first)["positions"]


def test_what_a_shorter_draft_kept_serves_no_longer_one(fleet):
    """An answer of three tokens has drafted two of the four."""
    server = fleet["resume"]
    server.flush()
    custom = {"kv_policy": "vlcache", "kv_policy_config": {"draft_tokens": 4}} | POSITIONS
    prompt = draw_prompt(79, "image")
    lengths = (8, 3, 8, 3)
    alone, short, again, short_again = (server.many([prompt.body(n, custom=custom)])[0] for n in lengths)
    assert [report(one)["draft_rows"] for one in (alone, short, again, short_again)] == [4, 2, 4, 2]
    for one, other in ((alone, again), (short, short_again)):
        assert one["text"] == other["text"] and report(one)["positions"] == report(other)["positions"]
    assert report(alone)["positions"] != report(short)["positions"]


def test_a_retracted_draft_is_drafted_again(fleet):
    """Every third step retracts the newest of several requests here."""
    custom = {"kv_policy": "vlcache", "kv_policy_config": {"draft_tokens": 4}} | POSITIONS
    bodies = [draw_prompt(seed, "image").body(12, custom=custom) for seed in range(660, 668)]
    roomy, server = fleet["prefer"], fleet["resume"]
    roomy.flush()
    undisturbed = roomy.many(bodies, workers=4)
    assert all(report(one)["draft_rows"] == 4 for one in undisturbed)
    server.flush()
    before = server.log().count("#retracted_reqs: 1")
    older = draw_prompt(668, "text").body(2000, custom={"kv_policy": "none"})
    _, *answers = server.many([older, *bodies])
    rows = [report(one)["draft_rows"] for one in answers]
    retractions = server.log().count("#retracted_reqs: 1") - before
    own = sum(report(one)["retractions"] for one in answers)
    print(f"{rows}: drafted rows; {own} retractions of requests, {retractions - own} of drafts")
    assert set(rows) <= {0, 4} and rows.count(4) >= 2 and retractions > own
    for one, other, drafted in zip(undisturbed, answers, rows, strict=True):
        if drafted:
            assert report(one)["positions"] == report(other)["positions"]


def test_twins_take_no_more_than_the_operator_allows(fleet):
    server, most = fleet["resume"], int(FLEET["resume"][0] * FLEET["resume"][1]["max_twins"])
    server.flush()
    evicted, largest = twins(server)["evictions"], 0
    for seed in range(40):
        server.many([draw_prompt(seed, "image").body(2)])
        largest = max(largest, twins(server)["slots"])
        assert largest <= most
    assert largest > 0.8 * most and twins(server)["evictions"] > evicted


@pytest.mark.parametrize("name", ["vlcache", "vlkv, merging", "elastic"])
def test_every_third_step_retracts_a_request(fleet, tolerance, name):
    bodies = [draw_prompt(seed, "image").body(170, custom=CHOICES[name]) for seed in range(640, 644)]
    tolerances = [tolerance * (10 if name == "elastic" else 1)] * len(bodies)
    assert retracted(fleet["resume"], fleet["prefer"], bodies, tolerances) >= 50
