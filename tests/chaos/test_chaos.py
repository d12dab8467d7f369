"""The short form of the storm: a server under fire that is killed and comes back, and tests of the judge."""

from __future__ import annotations

from functools import partial

import pytest

from tests.chaos import report
from tests.chaos.__main__ import ROOMY, flags, start_stock, statuses
from tests.chaos.catalogue import answered
from tests.chaos.judge import judge
from tests.chaos.malformed import SPARED, all_cases, options, raw
from tests.chaos.plan import Alone, Malformed, Plan
from tests.chaos.storm import Storm, rage
from tests.serving import Server

POOL = 1000
TIGHT = flags(POOL, "resume", "--schedule-conservativeness", "0.01")


@pytest.fixture(scope="module")
def cases() -> dict[str, Malformed]:
    """Malformed requests by name, without those that the stock server does not survive."""
    return {case.name: case for case in [*all_cases(), *options()] if case.name not in SPARED}


@pytest.fixture(scope="module")
def specs():
    with Server(*flags(ROOMY, "fallback", max_twins=1.0)) as server:
        return answered(server, 1, 9, ROOMY)


def test_under_fire(specs, cases, tmp_path):
    """320 requests of every kind from 16 clients in two processes, and a killed scheduler: every whole
    answer is the one given alone, and nothing is left."""
    plan = Plan(2, specs, list(cases.values()), list(raw()), clients=8, requests=160, ends=None, deadline=120)
    storm = rage(partial(Server, *TIGHT), plan, tmp_path, 2, kills=[6.0], every=2.0)
    print(report.summary(storm))
    odd = strange(storm, cases)
    stock = statuses(partial(start_stock, POOL), [cases[name] for name in odd]) if odd else {}
    known = {name: {"ours": odd[name], "stock": stock[name]} for name in odd}
    assert not report.problems(storm, cases, known)
    assert len(storm.events) == 320 and len(storm.outages) == 1
    assert report.summary(storm)["compacted"] > 60


def test_what_is_spared_is_a_case():
    assert SPARED <= {case.name for case in all_cases()}


def strange(storm: Storm, cases: dict[str, Malformed]) -> dict[str, int]:
    """What malformed requests were answered that were not refused as they should have been."""
    sent = {e["case"]: e["status"] for e in storm.events if e["action"] == "malformed" and "status" in e}
    return {name: status for name, status in sent.items() if not report.as_it_should(cases[name], status)}


# ---- The judge ----

KEPT = [[list(range(20)), list(range(20))]]
ALONE = Alone("abcdef", [1.0, 1.0, 1.0, 1e-6, 1.0, 1.0], 100, "vlkv", "VLKV()", 0, KEPT, "cold", 0)
RESUMED = ALONE._replace(text="xbcdef", prefix="twin", found=99)


def seen(kind: str = "exact", tokens: int = 90, retractions: int = 0, **others) -> dict:
    """A report."""
    told = {"policy": "vlkv", "config": "VLKV()", "prompt_tokens": 100, "draft_rows": 0, "positions": KEPT}
    return told | {"prefix": {"kind": kind, "tokens": tokens}, "retractions": retractions} | others


OTHER_ROWS = [[list(range(20)), [*range(19), 50]]]
FAR_ROWS = [[list(range(20)), list(range(30, 50))]]
VERDICTS = {
    "the same": ("abcdef", seen(), "equal"),
    "behind its twin": ("xbcdef", seen("twin", 99), "equal"),
    "as behind a twin, but it was not": ("xbcdef", seen(), "wrong"),
    "shorter": ("abcde", seen(), "wrong"),
    "another token": ("abcdeX", seen(), "wrong"),
    "another token where two were level": ("abcXef", seen(), "coin toss"),
    "another prompt": ("abcdef", seen(prompt_tokens=101), "wrong"),
    "another policy": ("abcdef", seen(policy="h2o"), "wrong"),
    "another policy's options": ("abcdef", seen(config="VLKV(p=1)"), "wrong"),
    "left alone": ("abcdef", seen(policy="none", reason="too short"), "wrong"),
    "other rows": ("abcdeX", seen(positions=OTHER_ROWS), "ties"),
    "quite other rows": ("abcdeX", seen(positions=FAR_ROWS), "wrong"),
    "another draft": ("abcdeX", seen(draft_rows=2), "another draft"),
    "retracted, its twin gone": ("abcdeX", seen(retractions=1), "prefilled again"),
    "retracted, another first token": ("Xbcdef", seen(retractions=1), "wrong"),
    "retracted, on its twin": ("abcdeX", seen("twin", 103, retractions=1), "wrong"),
    "put back twice": ("aXcdef", seen("twin", 103, retractions=2), "before compaction"),
}


@pytest.mark.parametrize("text, told, verdict", VERDICTS.values(), ids=VERDICTS)
def test_verdicts(text, told, verdict):
    assert judge(text, told, ALONE, RESUMED) == verdict


def test_one_token_behind_a_twin_keeps_what_one_token_alone_does_not():
    alone = Alone("a", [1.0], 100, "none", "", 0, None, "cold", 0)
    resumed = RESUMED._replace(text="x", margins=[1.0])
    none = {"policy": "none", "config": "", "positions": None, "reason": "finished at its first token"}
    assert judge("a", seen() | none, alone, resumed) == "equal"
    assert judge("x", seen() | none, alone, resumed) == "wrong"
    assert judge("x", seen("shared", 99), alone, resumed) == "equal"
    assert judge("a", seen("shared", 99), alone, resumed) == "wrong"
    assert judge("x", seen("shared", 99), alone, None) == "wrong"


def asked(**fields) -> dict:
    return {"action": "ask", "rid": "0-1", "began": 100.0, "ended": 101.0, "outcome": "answered"} | fields


CALM = {"flushed": True, "alive": True} | dict.fromkeys(
    ["twins", "twin slots", "used slots", "running", "waiting", "leaks in logs"], 0
)
TOLD = {"prefix": "cold", "retractions": 0, "compacted": True}
EQUAL = [asked(verdict="equal", **TOLD)] * 100
LIST = Malformed("custom/a list", b"", ours=True)
REFUSED = asked(action="malformed", case=LIST.name, outcome="refused")
DONE = asked(action="flush", outcome="done")
GARBAGE = asked(action="raw", case="garbage", outcome="answered")
PROBLEMS = {
    "wrong": ([asked(verdict="wrong", **TOLD)], {}, "1 wrong answers"),
    "too many exemptions": ([asked(verdict="ties", **TOLD)] * 12, {}, "12 of 112 answers: ties"),
    "stuck": ([asked(outcome="stuck")], {}, "0-1 (ask) had no end"),
    "lost": ([asked(outcome="lost", error="reset")], {}, "lost its server while that was up"),
    "aborted by nobody": ([asked(outcome="aborted by others", error="x")], {}, "was not answered"),
    "served, though malformed": ([REFUSED | {"status": 200}], {}, "answered with HTTP 200"),
    "an error of ours": ([REFUSED | {"status": 500}], {}, "answered with HTTP 500"),
    "a failing flush": ([DONE | {"status": 500}], {}, "(flush) was answered with HTTP 500"),
    "a failure of two answers": ([DONE | {"statuses": [502, 200]}], {}, "(flush) was answered with HTTP 502"),
    "garbage served": ([GARBAGE | {"status": 200}], {}, "(garbage) was answered with HTTP 200"),
    "slots used": ([], {"used slots": 3}, "used slots is 3"),
    "twins left": ([], {"twins": 1}, "twins is 1"),
    "not alive": ([], {"alive": False}, "alive is False"),
}


def problems(events: list[dict], memory=((0.0, 100),), outages=(), **left) -> list[str]:
    memory = [{"scheduler": [list(point) for point in memory]}]
    storm = Storm(events=EQUAL + events, calm=CALM | left, memory=memory, outages=list(outages))
    return report.problems(storm, {LIST.name: LIST}, {})


@pytest.mark.parametrize("events, left, words", PROBLEMS.values(), ids=PROBLEMS)
def test_problems(events, left, words):
    assert problems([]) == []
    found = problems(events, **left)
    assert len(found) == 1 and words in found[0], found


def test_what_happens_in_an_outage_is_no_problem():
    lost = [asked(outcome="lost", error="reset"), asked(outcome="stuck")]
    lost += [DONE | {"status": 502}, GARBAGE | {"status": 200}]
    assert not problems(lost, outages=[{"what": "all", "at": 99.0, "back": 120.0}])


@pytest.mark.parametrize("growing", [False, True])
def test_memory_that_grows_shows(growing):
    points = [(float(t), 1000 + growing * t) for t in range(0, 900, 5)]
    assert len(problems([], memory=points)) == growing
