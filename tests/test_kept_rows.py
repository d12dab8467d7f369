"""Which rows stay, and that exactly those are attended to."""

from __future__ import annotations

import pytest

from tests.conftest import POOL
from tests.equality import assert_same, first_difference
from tests.hf_reference import reference_budgets, reference_selection
from tests.prompts import draw_prompt
from tests.serving import POSITIONS, Server, report

PICTURES = [draw_prompt(seed, kind) for kind in ("image", "images") for seed in range(10, 14)]


def body_of(prompt):
    return prompt.body(16, custom=POSITIONS)


@pytest.fixture(scope="module")
def cold(vlcache):
    """Each prompt alone on an empty cache."""
    answers = []
    for prompt in PICTURES:
        vlcache.flush()
        answers.append(vlcache.many([body_of(prompt)])[0])
        assert report(answers[-1])["prefix"] == {"kind": "cold", "tokens": 0}
    return answers


@pytest.fixture(scope="module")
def references(hugging_face):
    return [hugging_face.scores(prompt) for prompt in PICTURES]


def test_kept_set_equals_the_reference(cold, references):
    equal = total = 0
    for answer, (scores, sparsity) in zip(cold, references, strict=True):
        seen = report(answer)
        n = scores[0].shape[1]
        assert seen["prompt_tokens"] == n
        assert seen["sparsity_per_layer"] == pytest.approx(sparsity, abs=1e-3)
        assert seen["kept_per_layer"] == reference_budgets(seen["sparsity_per_layer"], 0.1, n)
        assert seen["kept_per_layer"] == reference_budgets(sparsity, 0.1, n)
        assert sum(seen["kept_per_layer"]) == round(0.1 * n * len(sparsity))
        for layer, heads in enumerate(seen["positions"]):
            for head, kept in enumerate(heads):
                head_scores = scores[layer][head]
                wanted = reference_selection(head_scores, seen["kept_per_layer"][layer])
                assert kept == sorted(set(kept)) and len(kept) == len(wanted)
                extra, missed = sorted(set(kept) - set(wanted)), sorted(set(wanted) - set(kept))
                equal, total = equal + len(kept) - len(extra), total + len(kept)
                for ours, theirs in zip(extra, missed):
                    margin = abs(float(head_scores[ours] - head_scores[theirs]))
                    print(f"layer {layer} head {head}: kept {ours}, reference {theirs}, {margin:.1e}")
                    assert margin < 1e-4 * float(head_scores[theirs])
    print(f"{equal} of {total} positions equal the reference")
    assert total > 1000 and equal >= 0.98 * total


def test_decoding_attends_to_exactly_the_kept_rows(cold, hugging_face, tolerance):
    expected = [
        hugging_face.generate(prompt, 16, report(answer)["positions"])
        for prompt, answer in zip(PICTURES, cold, strict=True)
    ]
    assert_same(expected, cold, tolerance, "attention over the kept rows")
    full = [hugging_face.generate(prompt, 16) for prompt in PICTURES]
    changed = sum(first_difference(a, b) is not None for a, b in zip(full, cold))
    assert changed > len(PICTURES) // 2, "the budget is too large for this test to see anything"


def same_kept(one: list[dict], other: list[dict], references, title: str) -> None:
    """Equal kept sets, up to swaps of keys whose scores rounding cannot tell apart."""
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        first, second = report(a), report(b)
        assert first["kept_per_layer"] == second["kept_per_layer"], f"{title}: prompt {index}"
        for layer, heads in enumerate(zip(first["positions"], second["positions"])):
            for head, (x, y) in enumerate(zip(*heads)):
                for p, q in zip(sorted(set(x) - set(y)), sorted(set(y) - set(x))):
                    scores = references[index][0][layer][head]
                    margin = abs(float(scores[p] - scores[q]))
                    print(f"{title}: prompt {index} layer {layer} head {head}: {p} or {q}, {margin:.1e}")
                    assert margin < 1e-4 * float(scores[q])


def test_warm_equals_cold(vlcache, stock, cold, references, tolerance):
    stock.flush()
    for prompt, answer, (scores, _) in zip(PICTURES, cold, references, strict=True):
        vlcache.flush()
        vlcache.many([body_of(prompt)])
        [warm] = vlcache.many([body_of(prompt)])
        stock.many([prompt.body(1)])
        [stock_warm] = stock.many([prompt.body(1)])
        n, voting = report(warm)["prompt_tokens"], report(warm)["voting_rows"]
        hit = min(stock_warm["meta_info"]["cached_tokens"], n - voting)
        assert report(warm)["prefix"] == {"kind": "exact", "tokens": hit}
        assert warm["meta_info"]["cached_tokens"] == hit
        same_kept([answer], [warm], [(scores, None)], "warm")
        assert_same([answer], [warm], tolerance, "warm")


def test_among_others_in_a_tight_pool(cold, references, tolerance):
    """Twelve other requests beside it, in a pool that holds three."""
    others = [draw_prompt(seed, "image").body(24) for seed in range(100, 112)]
    with Server("--max-total-tokens", "1600", "--kv-policy", "vlcache") as server:
        for index in range(3):
            bodies = [*others[:6], body_of(PICTURES[index]), *others[6:]]
            answers = server.many(bodies)
            assert all(report(answer)["policy"] == "vlcache" for answer in answers)
            assert all(report(answer)["kept_per_layer"] for answer in answers)
            same_kept([cold[index]], [answers[6]], [references[index]], "among others")
            assert_same([cold[index]], [answers[6]], tolerance, "among others")
        assert server.alive(), server.log()[-4000:]


@pytest.fixture(scope="module")
def chunked():
    flags = ("--kv-policy", "vlcache", "--kv-policy-config", '{"allow_override": true}')
    with Server(*POOL, *flags, "--chunked-prefill-size", "256") as server:
        yield server
        assert server.alive(), server.log()[-4000:]


def test_chunked_prefill_keeps_the_same_rows(chunked, cold, references, tolerance):
    chunked.flush()
    for prompt, answer, (scores, _) in zip(PICTURES, cold, references, strict=True):
        chunked.flush()
        assert 2 <= -(-report(answer)["prompt_tokens"] // 256) <= 3
        [pieces] = chunked.many([body_of(prompt)])
        same_kept([answer], [pieces], [(scores, None)], "2 or 3 chunks")
        assert_same([answer], [pieces], tolerance, "2 or 3 chunks")


def test_five_chunks(chunked, vlcache, hugging_face, tolerance):
    prompt = draw_prompt(3, "long")
    vlcache.flush()
    chunked.flush()
    [whole], [pieces] = vlcache.many([body_of(prompt)]), chunked.many([body_of(prompt)])
    assert -(-report(whole)["prompt_tokens"] // 256) >= 4
    same_kept([whole], [pieces], [hugging_face.scores(prompt)], "5 chunks")
    assert_same([whole], [pieces], tolerance, "5 chunks")


@pytest.mark.parametrize("policy", ["h2o", "elastic", "lookm", "expected"])
def test_scores_over_the_whole_prompt_do_not_depend_on_its_chunks(chunked, any_policy, policy):
    body = draw_prompt(3, "long").body(4, custom={"kv_policy": policy, "kv_report": "positions"})
    [whole], [pieces] = any_policy.many([body]), chunked.many([body])
    assert report(whole)["prefix"] == report(pieces)["prefix"] == {"kind": "cold", "tokens": 0}
    assert report(whole)["kept_per_layer"] == report(pieces)["kept_per_layer"]
    equal = total = 0
    for one, other in zip(report(whole)["positions"], report(pieces)["positions"], strict=True):
        for a, b in zip(one, other, strict=True):
            equal, total = equal + len(set(a) & set(b)), total + len(a)
    print(f"{policy}: {equal} of {total} positions equal in 5 chunks")
    assert equal >= 0.98 * total > 0


def test_a_voting_window_that_straddles_chunks(chunked, vlcache, hugging_face, tolerance):
    """The last chunk is shorter than the voting rows."""
    prompt = draw_prompt(0, "image")
    n, voting = 0, 0
    while not 1 <= n % 256 < voting:
        prompt.text += " and"
        n = hugging_face.inputs(prompt).input_ids.shape[1]
        voting = 16
    vlcache.flush()
    chunked.flush()
    [whole], [pieces] = vlcache.many([body_of(prompt)]), chunked.many([body_of(prompt)])
    assert report(whole)["prompt_tokens"] % 256 < report(whole)["voting_rows"]
    same_kept([whole], [pieces], [hugging_face.scores(prompt)], "straddling")
    assert_same([whole], [pieces], tolerance, "straddling")
