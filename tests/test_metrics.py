"""What is exported is what was reported: /metrics against the reports of all requests."""

from __future__ import annotations

import json
import random
import re
import time
from bisect import bisect_left
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import requests
import yaml

from sglang_vlkv.observe.metrics import PREFIX, RETENTION_BUCKETS
from tests.conftest import FLEET
from tests.conversation import Conversation, evict_exact_kv, twins
from tests.documents import quoted, table
from tests.listening import waiting
from tests.prompts import CLIP, Prompt, draw_prompt, picture, words
from tests.scrape import Scrape
from tests.serving import ROOT, Server, report

POOL = FLEET["fallback"][0]
LAYERS, HEADS = 4, 2


@dataclass
class Episode:
    """What a server said before and after some requests, and what these were told.

    Attributes:
        left: ``/kv_policy/twins`` before and after.
        seconds: that it took.
    """

    before: Scrape
    after: Scrape
    left: tuple[dict, dict]
    answers: list[dict]
    seconds: float

    def __call__(self, name: str, **labels: str) -> float:
        """By how much a metric grew."""
        return self.after(PREFIX + name, **labels) - self.before(PREFIX + name, **labels)

    @property
    def reports(self) -> list[dict]:
        return [report(answer) for answer in self.answers]

    @property
    def compacted(self) -> list[dict]:
        """Reports of those whose own prompt lost rows; none was retracted."""
        return [seen for seen in self.reports if seen.get("voting_rows")]


def run(server: Server, requests_of) -> Episode:
    server.flush()
    left, before, start = twins(server), Scrape(server), time.monotonic()
    answers = requests_of(server)
    # The scheduler answers it when it has put away what it has answered before.
    after = twins(server), Scrape(server), time.monotonic()
    return Episode(before, after[1], (left, after[0]), answers, after[2] - start)


def one_by_one(server: Server) -> list[dict]:
    """Requests of every kind, and a conversation that goes on from its twins."""
    rng = random.Random(0)
    seen = draw_prompt(0, "image")
    short = Prompt("what", [picture(rng, 28 * 4, 28 * 4)])
    bodies = [
        seen.body(8),
        seen.body(8),
        draw_prompt(0, "images").body(8),
        draw_prompt(0, "video").body(8),
        draw_prompt(0, "text").body(8),
        short.body(8),
        draw_prompt(1, "image").body(1),
        draw_prompt(2, "image").body(8, custom={"kv_policy": "none"}),
        draw_prompt(3, "image").body(8, custom={"kv_policy": "h2o", "kv_budget": 0.3}),
        draw_prompt(4, "image").body(8, custom={"kv_policy": "elastic"}),
    ]
    answers = [server.many([body])[0] for body in bodies]
    conversation = Conversation()
    for turn in range(4):
        shown = (picture(rng, 28 * 15, 28 * 15),) if turn in (0, 2) else ()
        conversation = conversation.ask(words(rng, 8), shown, CLIP if turn == 3 else None)
        answers += server.many([conversation.body(8)])
        conversation = conversation.answered(answers[-1])
        answers.append(evict_exact_kv(server, POOL))
    return answers


def at_once(server: Server) -> list[dict]:
    """Clients that share a prompt's rows, first with its exact KV there and then without."""
    body = draw_prompt(7, "image").body(24)
    answers = server.together([body] * 4)
    return [*answers, evict_exact_kv(server, POOL), *server.together([body] * 4)]


def samples(server: Server) -> list[dict]:
    return Server._checked(server.post("/generate", draw_prompt(7, "image").body(8, temperature=1.0, n=4)))


def crowd(server: Server) -> list[dict]:
    """More than the pool holds: some are retracted and go on from their twins."""
    bodies = [draw_prompt(700 + seed, "image").body(300, ignore_eos=False) for seed in range(13)]
    return server.together(bodies)


@pytest.fixture(scope="module")
def server(fleet):
    return fleet["fallback"]


@pytest.fixture(scope="module")
def quiet(server) -> Episode:
    episode = run(server, one_by_one)
    assert not any(seen["retractions"] for seen in episode.reports)
    return episode


@pytest.fixture(scope="module")
def shared(server) -> Episode:
    return run(server, at_once)


@pytest.fixture(scope="module")
def crowded(server) -> Episode:
    return run(server, crowd)


def test_rows_and_bytes_are_those_of_the_reports(quiet, shared):
    for episode in (quiet, shared):
        policies = {seen["policy"] for seen in episode.compacted}
        for policy in policies:
            seen = [seen for seen in episode.compacted if seen["policy"] == policy]
            assert episode("compactions_total", policy=policy) == len(seen)
            assert episode("kept_bytes_total", policy=policy) == sum(one["kept_bytes"] for one in seen)
            freed = sum(one["full_bytes"] - one["kept_bytes"] for one in seen)
            assert episode("freed_bytes_total", policy=policy) == freed
            ratios = [sum(one["kept_per_layer"]) / LAYERS / one["prompt_tokens"] for one in seen]
            assert episode("retention_ratio_count", policy=policy) == len(ratios)
            assert episode("retention_ratio_sum", policy=policy) == pytest.approx(sum(ratios))
            for index, edge in enumerate(RETENTION_BUCKETS):
                within = sum(bisect_left(RETENTION_BUCKETS, ratio) <= index for ratio in ratios)
                assert episode("retention_ratio_bucket", policy=policy, le=str(edge)) == within
        assert episode("compactions_total") == len(episode.compacted)
    assert {seen["policy"] for seen in quiet.compacted} == {"vlcache", "h2o", "elastic"}
    assert any(seen["prefix"]["kind"] == "shared" for seen in shared.compacted)


def test_kept_bytes_by_what_they_hold(quiet):
    row_bytes = quiet.reports[0]["full_bytes"] / quiet.reports[0]["prompt_tokens"] / LAYERS / HEADS
    rows = Counter()
    for seen in quiet.compacted:
        rows.update(seen["kept_per_modality"])
    assert {"image", "video", "text", "system"} == set(rows)
    for modality, count in rows.items():
        assert quiet("modality_kept_bytes_total", modality=modality) == count * row_bytes
    assert quiet("modality_kept_bytes_total") == sum(rows.values()) * row_bytes
    assert quiet("modality_kept_bytes_total") <= quiet("kept_bytes_total")


def test_requests_and_the_prefixes_they_found(quiet, shared):
    for episode in (quiet, shared):
        found, tokens = Counter(), Counter()
        for seen in episode.reports:
            found[seen["policy"], seen["prefix"]["kind"]] += 1
            tokens[seen["prefix"]["kind"]] += seen["prefix"]["tokens"]
        for (policy, prefix), count in found.items():
            assert episode("finished_requests_total", policy=policy, prefix=prefix) == count
        assert episode("finished_requests_total") == len(episode.reports)
        for prefix, count in tokens.items():
            assert episode("prefix_tokens_total", prefix=prefix) == count
        assert episode("prefix_tokens_total") == sum(tokens.values())
        # SGLang's own counts of the same, made elsewhere.
        for name, other in ("prefix_tokens", "cached_tokens"), ("finished_requests", "num_requests"):
            other = f"sglang:{other}_total"
            assert episode(f"{name}_total") == episode.after(other) - episode.before(other)
    assert all(quiet("prefix_tokens_total", prefix=prefix) > 0 for prefix in ("exact", "twin"))
    assert shared("prefix_tokens_total", prefix="shared") > 0


def test_samples_have_their_prompt_computed_first(server):
    """By a request that SGLang makes for it, counts like any other, and lets finish at once."""
    episode = run(server, samples)
    assert len(episode.reports) == 4 and len(episode.compacted) == 4
    assert episode("compactions_total") == 4
    assert episode("finished_requests_total") == 4 + 1
    assert episode("left_alone_requests_total", reason="first_token") == 1


def test_requests_left_alone_by_reason(quiet):
    codes = {
        "no image or video": "no_visual",
        "finished at its first token": "first_token",
        "the budget keeps every row": "full_budget",
    }
    told = Counter(seen["reason"] for seen in quiet.reports if seen["policy"] == "none")
    [short] = [reason for reason in told if "fewer than min_prompt_tokens" in reason]
    codes[short] = "short_prompt"
    assert set(told) == set(codes)
    for reason, code in codes.items():
        assert quiet("left_alone_requests_total", reason=code) == told[reason]
    assert quiet("left_alone_requests_total") == quiet("finished_requests_total", policy="none")


def test_twins_are_those_of_the_endpoint(server, quiet, shared, crowded):
    slot_bytes = quiet.reports[0]["full_bytes"] / quiet.reports[0]["prompt_tokens"]
    for episode in (quiet, shared, crowded):
        before, after = episode.left
        assert before["twins"] == before["slots"] == 0
        assert episode("twins") == after["twins"] > 0
        assert episode("twins_bytes") == after["slots"] * slot_bytes
        assert episode("twins_evicted_total") == after["evictions"] - before["evictions"]
        assert episode("twin_hits_total") == after["hits"] - before["hits"]
    for episode in (shared, crowded):  # what stands under sliding rows has not been made to last
        assert episode("twins_created_total") == episode.left[1]["twins"] + episode("twins_evicted_total")
    for episode in (quiet, shared):
        for prefix in ("twin", "shared"):
            # Those that were compacted and then shared the result have found no twin before.
            hits = sum(
                seen["prefix"]["kind"] == prefix and (prefix == "twin" or not seen["voting_rows"])
                for seen in episode.reports
            )
            assert episode("twin_hits_total", prefix=prefix) == hits
    assert quiet("twin_hits_total", prefix="twin") >= 3 and shared("twin_hits_total", prefix="shared") >= 1
    server.flush()
    emptied = Scrape(server)
    assert emptied(PREFIX + "twins") == emptied(PREFIX + "twins_bytes") == 0
    assert emptied(PREFIX + "pool_bytes") == POOL * slot_bytes


def test_how_long_the_scheduler_stands_still(quiet, crowded):
    assert quiet("compaction_seconds_count") == quiet("compactions_total")
    assert 0 < crowded("compaction_seconds_count") <= crowded("compactions_total")
    for episode in (quiet, crowded):
        assert 0 < episode("compaction_seconds_sum") < episode.seconds


def test_retractions(crowded):
    reports = crowded.reports
    assert crowded("finished_requests_total") == len(reports)
    retractions = sum(seen["retractions"] for seen in reports)
    assert crowded("retractions_total") == retractions > 0
    assert crowded("retractions_total", policy="vlcache") > 0
    # Each time that a request ran it was compacted, or went on from what it had left.
    runs = len(reports) + crowded("retractions_total", policy="vlcache")
    assert crowded("compactions_total") + crowded("twin_hits_total") == runs
    assert crowded("no_room_requests_total") == 0


def test_requests_that_wait_for_room_for_kept_rows(server, quiet):
    assert quiet("deferred_requests_total") == 0
    episode = run(server, waiting)
    assert not any(seen["retractions"] for seen in episode.reports)
    assert 1 <= episode("deferred_requests_total") <= 4


def test_aborted_requests_and_health_checks_have_not_finished(server):
    body = draw_prompt(8, "image").body(2000, rid="aborted")

    def abort(server: Server) -> list[dict]:
        with ThreadPoolExecutor(1) as aside:
            compacted = Scrape(server)(PREFIX + "compactions_total")
            answer = aside.submit(server.post, "/generate", body)
            deadline = time.monotonic() + 60
            while Scrape(server)(PREFIX + "compactions_total") == compacted:
                assert time.monotonic() < deadline
            server.post("/abort_request", {"rid": "aborted"})
            answer.result()
        assert requests.get(server.url + "/health_generate", timeout=60).status_code == 200
        return server.many([draw_prompt(8, "text").body(2)])

    episode = run(server, abort)
    assert episode("compactions_total") == 1
    assert episode("finished_requests_total") == episode("left_alone_requests_total") == 1


# ---- Names, documentation and dashboard ----

DOCUMENTED = (ROOT / "docs" / "metrics.md").read_text()
EXAMPLES = ROOT / "examples" / "grafana"
FUNCTIONS = {"sum", "max", "rate", "increase", "histogram_quantile", "scalar"}


def test_what_is_documented_is_what_is_exported(quiet):
    exported, sglangs = quiet.after, quiet.after.labels["sglang:num_running_reqs"]
    documented = {}
    for name, kind, labels, _ in table(DOCUMENTED, "metric"):
        documented[quoted(name)[0]] = kind, set(quoted(labels))
    ours = {name: kind for name, kind in exported.types.items() if name.startswith(PREFIX)}
    assert {name: kind for name, (kind, _) in documented.items()} == ours
    for name, (kind, labels) in documented.items():
        sample = name + "_bucket" * (kind == "histogram")
        assert exported.labels[sample] - sglangs - {"le"} == labels, name
    reasons = {quoted(row[0])[0] for row in table(DOCUMENTED, "reason")}
    assert exported.values(PREFIX + "left_alone_requests_total", "reason") == reasons
    modalities = {"text", "image", "video", "audio", "system"}
    assert exported.values(PREFIX + "modality_kept_bytes_total", "modality") == modalities


def test_names_follow_prometheus_conventions(quiet):
    exported = quiet.after
    ours = [name for name in exported.types if name.startswith(PREFIX)]
    assert len(ours) > 10
    for name in ours:
        kind, parts = exported.types[name], name.split("_")
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", name)
        assert name.endswith("_total") == (kind == "counter")
        assert exported.helps[name].endswith(".")
        assert not set(parts) & {"ms", "kb", "mb", "gb", "percent", "count", "sum", "bucket", kind}
        units = [part for part in parts if part in ("bytes", "seconds", "ratio", "tokens")]
        assert not units or name.removesuffix("_total").endswith(units[-1])
        assert kind != "histogram" or units
    others = {name.replace(":", "_") for name in exported.types if name not in ours}
    assert not any(name.startswith(PREFIX) for name in others)


def dashboard() -> dict:
    return json.loads((EXAMPLES / "dashboard.json").read_text())


def alerts() -> list[dict]:
    groups = yaml.safe_load((EXAMPLES / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> list[str]:
    """All PromQL of the dashboard, its variables, the alerts and the documentation."""
    board = dashboard()
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    variables = [one["definition"] for one in board["templating"]["list"] if one["type"] == "query"]
    found += [re.fullmatch(r"label_values\((.*), \w+\)", one)[1] for one in variables]
    found += [rule["expr"] for rule in alerts()]
    found += re.findall(r"(?:^    .*\n)+", DOCUMENTED, re.MULTILINE)
    assert len(found) > 40
    return found


@pytest.mark.parametrize("expression", expressions())
def test_every_expression_asks_for_what_there_is(quiet, expression):
    exported = quiet.after
    rest = re.sub(r'\{__name__=~"sglang\[:_](\w+)"(?:, )?', r"sglang:\1{", expression)
    rest = re.sub(r"\[[^]]*]", "", rest)
    assert rest.count("(") == rest.count(")") and rest.count("{") == rest.count("}")
    grouped = {label for labels in re.findall(r"\bby \(([^)]*)\)", rest) for label in labels.split(", ")}
    rest = re.sub(r"\bby \([^)]*\)|\bunless\b", "", rest)
    called = set(re.findall(r"(\w++)\s*\((?!\d)", re.sub(r"\{[^}]*}", "", rest)))
    assert called <= FUNCTIONS, called
    known, found = {"instance", "dp_rank"}, re.findall(r"([a-zA-Z_:][\w:]*+)(?:\{([^}]*)})?(?!\s*\()", rest)
    assert found
    for name, matchers in found:
        assert name in exported.labels, name
        asked = set(re.findall(r"(\w+)\s*(?:=|!)", matchers))
        assert asked <= exported.labels[name] | known, name
    assert grouped <= known.union(*(exported.labels[name] for name, _ in found))


def test_every_alert_is_documented():
    documented = [quoted(row[0])[0] for row in table(DOCUMENTED, "alert")]
    assert sorted(documented) == sorted(rule["alert"] for rule in alerts())


def test_the_dashboard_is_laid_out():
    shown = dashboard()["panels"]
    assert len({panel["id"] for panel in shown}) == len(shown)
    taken = set()
    for panel in shown:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["title"] and panel["fieldConfig"]["defaults"]["unit"]
            assert panel["datasource"]["uid"] == "${datasource}"
    assert [panel["title"] for panel in shown if panel["type"] == "row"] == [
        "Memory", "Latency", "Twins and prefixes", "Requests", "SGLang",
    ]  # fmt: skip
