"""No picture vanishes without a word: what is its own, and what requests are told about it."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from PIL import Image

from sglang_vlkv.options.config import build_settings
from sglang_vlkv.policies import policies
from sglang_vlkv.policies.vlcache import VLCache
from sglang_vlkv.scheduler.planning import Planner
from sglang_vlkv.stages.layer import LayerScores
from sglang_vlkv.stages.pictures import own_rows, split
from sglang_vlkv.stages.prompt import Modality, Prompt
from sglang_vlkv.stages.select import select
from sglang_vlkv.tinyvlm import tasks
from tests.conversation import Conversation
from tests.prompts import CLIP, picture
from tests.scrape import Scrape
from tests.serving import POSITIONS, ROOT, Server, report, user_message

T, P, V, S = Modality.TEXT, Modality.IMAGE, Modality.VIDEO, Modality.SYSTEM
LAYERS, HEADS = 3, 2
NAMES = [name for name in policies() if name not in ("none", "given")]
DIGITS = Image.open(ROOT / "examples" / "digits.png").convert("RGB")
TALK = "the list of all digits is from the picture. "
QUESTION = "digits of cyan green yellow orange?"


def prompt_of(sizes: list[int], text: int, tags: tuple = (P,)) -> Prompt:
    """Pictures with a delimiter before each, then text; numbered as a server numbers them."""
    spans, numbers = [], []
    for number, size in enumerate(sizes):
        spans += [S, *[tags[number % len(tags)]] * size]
        numbers += [-1, *[number] * size]
    spans, numbers = [*spans, *[T] * text], [*numbers, *[-1] * text]
    return Prompt(torch.tensor(spans, dtype=torch.uint8), pictures=torch.tensor(numbers))


def scores_of(prompt: Prompt, seed: int = 0, ties: bool = False) -> list[LayerScores]:
    generator = torch.Generator().manual_seed(seed)
    shape = LAYERS, HEADS, prompt.num_tokens
    scores = torch.rand(shape, generator=generator)
    return [LayerScores((layer * 3).floor() if ties else layer) for layer in scores]


def kept_by(policy, prompt: Prompt, layers: list[LayerScores]) -> list[torch.Tensor]:
    return select(policy, prompt, layers, [0.9, 0.2, 0.6]).kept


def counts_of(prompt: Prompt, kept: list[torch.Tensor]) -> torch.Tensor:
    """Kept rows ``[L, H, P]`` of each picture, by a loop."""
    pictures = prompt.pictures.tolist()
    heads = [[Counter(pictures[j] for j in head) for head in layer.tolist()] for layer in kept]
    numbers = sorted({*pictures} - {-1})
    return torch.tensor([[[head[number] for number in numbers] for head in layer] for layer in heads])


def test_what_is_the_pictures_own():
    """The share, or one for each; never the last tenth; half where one for each does not fit."""
    assert [own_rows(0.1, k, 1) for k in (1, 2, 10, 27, 100)] == [0, 1, 1, 3, 10]
    assert [own_rows(0.1, 60, pictures) for pictures in (0, 1, 6, 7, 54, 55, 500)] == [0, 6, 6, 7, 54, 30, 30]
    assert own_rows(0.1, 40, 50) == 20
    assert own_rows(1.0, 40, 3) == 36
    assert own_rows(0.0, 40, 3) == 0


@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [256], [64, 256, 1024], [3, 1, 40], [7] * 50])
def test_one_each_and_the_rest_by_size(sizes):
    given = [1, 2, len(sizes), len(sizes) + 1, sum(sizes) - 1, sum(sizes), 5000]
    found = split(torch.tensor(sizes), given, HEADS)
    assert found.shape == (len(given), HEADS, len(sizes))
    for rows, layer in zip(given, found):
        assert (layer <= torch.tensor(sizes)).all()
        assert layer.sum(-1).tolist() == [min(rows, sum(sizes))] * HEADS
        if rows >= len(sizes):
            more = min(rows, sum(sizes)) - len(sizes)
            shares = [1 + more * (size - 1) / max(1, sum(sizes) - len(sizes)) for size in sizes]
            assert all(abs(a - b) < 1 for a, b in zip(layer[0].tolist(), shares))


def test_where_rows_do_not_suffice_heads_take_turns():
    """50 pictures, 20 rows of their own: of 6 heads of all layers each picture is in 2 or 3."""
    found = split(torch.tensor([9] * 50), [20, 21, 19], HEADS)
    assert found.amax() == 1 and found.sum(-1).tolist() == [[20, 20], [21, 21], [19, 19]]
    assert sorted(set(found.sum((0, 1)).tolist())) == [2, 3]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"sink_tokens": 3}, {"modality_floors": {"text": 0.1}}, {"recent_fraction": 1.0}]
)
@pytest.mark.parametrize("sizes", [[40], [9, 60, 3], [5] * 7])
def test_nothing_changes_where_pictures_have_their_rows_and_else_they_get_them(sizes, options, ties):
    prompt = prompt_of(sizes, 80, (P, V))
    own, free = VLCache(budget=0.25, **options), VLCache(budget=0.25, picture_share=0.0, **options)
    budgets = own.layer_budgets([0.9, 0.2, 0.6], prompt.num_tokens)
    needed = split(torch.tensor(sizes), [own_rows(0.1, k, len(sizes)) for k in budgets], HEADS)
    met = Counter()
    for seed in range(12):
        layers = scores_of(prompt, seed, ties)
        if seed % 2:  # nobody looks at the pictures
            layers = [LayerScores(layer.scores.masked_fill(prompt.visual, -1.0)) for layer in layers]
        ours, plain = kept_by(own, prompt, layers), kept_by(free, prompt, layers)
        before, after = counts_of(prompt, plain), counts_of(prompt, ours)
        assert (after >= needed).all()
        for layer in range(LAYERS):
            assert ours[layer].shape == plain[layer].shape
            for head in range(HEADS):
                enough = bool((before[layer, head] >= needed[layer, head]).all())
                met[enough] += 1
                assert torch.equal(ours[layer][head], plain[layer][head]) or not enough
                assert ours[layer][head, -1] == prompt.num_tokens - 1
    assert met[False] and (met[True] or options == {"recent_fraction": 1.0})


def test_the_oldest_of_the_recent_go_first_then_the_last_of_the_sinks():
    prompt = prompt_of([1] * 10, 40)
    policy = VLCache(budget=0.25, sink_tokens=2, recent_fraction=0.8)
    n = prompt.num_tokens
    layers = [LayerScores(torch.rand(HEADS, n, generator=torch.Generator().manual_seed(0)))] * LAYERS
    for head in select(policy, prompt, layers, [0.5] * LAYERS).kept[0].tolist():
        assert len(head) == 15
        assert set(head) == {0, *prompt.visual.nonzero().flatten().tolist(), *range(n - 4, n)}
    own = VLCache(budget=0.2, sink_tokens=8, recent_fraction=0.0)  # a picture each, the last token, a sink
    for head in select(own, prompt, layers, [0.5] * LAYERS).kept[0].tolist():
        assert set(head) == {0, *prompt.visual.nonzero().flatten().tolist(), n - 1}


def test_pictures_are_counted_by_number_or_else_by_runs():
    """Two that touch, a video with text between its frames, and the rest of a prompt behind a twin."""
    tags = torch.tensor([S, P, P, P, P, T, V, T, V, T], dtype=torch.uint8)
    numbers = torch.tensor([-1, 0, 0, 1, 1, -1, 2, -1, 2, -1])
    known, unknown = Prompt(tags, pictures=numbers), Prompt(tags)
    assert known.shown.sizes.tolist() == [2, 2, 2] and unknown.shown.sizes.tolist() == [4, 1, 1]
    rest = known.since(4)
    assert rest.shown.sizes.tolist() == [1, 2] and rest.shown.positions.tolist() == [0, 2, 4]
    assert unknown.since(4).shown.sizes.tolist() == [1, 1, 1]
    assert Prompt(tags[:1]).shown.sizes.tolist() == []
    kept = [torch.tensor([[0, 1, 3, 8], [1, 2, 8, 9]], dtype=torch.int32)]
    told = [(one.modality, one.tokens, one.rows, one.least) for one in known.per_picture(kept)]
    assert told == [(P, 2, 3, 1), (P, 2, 1, 0), (V, 2, 2, 1)]


# ---- On a server ----


def body(images, text: str, custom: dict, tokens: int = 4) -> dict:
    return Server.body(text, images, max_new_tokens=tokens, custom=custom | POSITIONS)


def assert_as_told(seen: dict) -> None:
    """What a report says of pictures follows from the positions in it."""
    assert len(seen["pictures"]) == len(seen["visual"])
    for told, at in zip(seen["pictures"], seen["visual"], strict=True):
        own = {j for start, end in at["spans"] for j in range(start, end)}
        counts = [len(own & {*head}) for layer in seen["positions"] for head in layer]
        expected = {"modality": at["modality"], "tokens": len(own), "rows": sum(counts), "least": min(counts)}
        assert told == expected


@pytest.mark.parametrize("talk", [7, 60])
@pytest.mark.parametrize("name", NAMES)
def test_text_does_not_drive_the_picture_out(any_policy, name, talk):
    """However much there is of it, and whatever the policy's floors and windows."""
    [answer] = any_policy.many([body([DIGITS], TALK * talk + QUESTION, {"kv_policy": name})])
    seen = report(answer)
    assert_as_told(seen)
    [told] = seen["pictures"]
    assert told["tokens"] == 256
    for kept, heads in zip(seen["kept_per_layer"], seen["positions"], strict=True):
        assert told["least"] >= 1 and len(heads[0]) == kept
    fewest = min(seen["kept_per_layer"])
    assert told["least"] >= min(own_rows(0.1, k, 1) for k in seen["kept_per_layer"]) >= fewest // 10


@pytest.mark.parametrize("name", ["vlkv", "vlcache", "aircache", "snapkv", "streamingllm"])
def test_each_of_many_pictures_keeps_a_row_and_equal_ones_count_each(any_policy, name):
    """A large one does not drive small ones out; the first and the last are the same."""
    rng = random.Random(0)
    small = [picture(rng, 28 * 3, 28 * 3) for _ in range(11)]
    [answer] = any_policy.many([body([*small, DIGITS, small[0]], QUESTION, {"kv_policy": name})])
    seen = report(answer)
    assert_as_told(seen)
    assert [one["tokens"] for one in seen["pictures"]] == [9] * 11 + [256, 9]
    assert min(one["least"] for one in seen["pictures"]) >= 1


def test_a_video_is_one_picture_and_a_new_turn_has_pictures_of_its_own(fleet):
    """Behind a twin only the new turn competes; its picture has its share of that."""
    server, rng = fleet["prefer"], random.Random(3)
    server.flush()
    talk = Conversation().ask("what is this?", (picture(rng, 28 * 15, 28 * 15),), CLIP)
    answer = server.many([talk.body(8)])[0]
    first = report(answer)
    assert [one["modality"] for one in first["pictures"]] == ["image", "video"]
    talk = talk.answered(answer).ask(TALK * 30, (picture(rng, 28 * 10, 28 * 10),))
    [answer] = server.many([talk.body(8)])
    seen = report(answer)
    assert seen["prefix"]["kind"] == "twin" and len(seen["pictures"]) == 3
    assert all(one["least"] >= 1 for one in first["pictures"] + seen["pictures"])


def test_a_picture_that_nobody_keeps_is_counted(fleet):
    """The share turned off by the request; more pictures than rows."""
    server = fleet["fallback"]
    rng = random.Random(1)
    lost = {"kv_policy": "lookm", "kv_policy_config": {"picture_share": 0.0}}
    small = [picture(rng, 28 * 2, 28 * 2) for _ in range(50)]
    requests = [body([DIGITS], TALK * 7 + QUESTION, lost), body(small, QUESTION, {"kv_policy": "vlcache"})]
    requests.append(body([DIGITS], TALK * 7 + QUESTION, {"kv_policy": "lookm"}))
    server.flush()
    before = Scrape(server)
    seen = [report(server.many([one])[0]) for one in requests]
    after = Scrape(server)
    unseen = [sum(not one["least"] for one in of_one["pictures"]) for of_one in seen]
    assert unseen[0] == 1 and unseen[1] > 0 and unseen[2] == 0
    assert seen[0]["pictures"][0]["rows"] == 0
    rows = [one["rows"] for one in seen[1]["pictures"]]
    assert min(rows) >= 1, "as fair as possible: some head of some layer sees each"
    for name, count in (("lookm", unseen[0]), ("vlcache", unseen[1])):
        counted = [one("sglang_vlkv_unseen_pictures_total", policy=name) for one in (before, after)]
        assert counted[1] - counted[0] == count


# ---- How it is asked ----


def chat(server: Server, messages: list[dict], custom: dict, max_tokens: int = 4) -> tuple[str, dict]:
    """The answer and its report."""
    body = {
        "model": "default", "messages": messages, "max_tokens": max_tokens, "temperature": 0,
        "custom_params": custom | POSITIONS, "return_meta_info": True,
    }  # fmt: skip
    choice = Server._checked(server.post("/v1/chat/completions", body))["choices"][0]
    return choice["message"]["content"], choice["meta_info"]["kv_policy"]


def parts(*content: Image.Image | str) -> dict:
    """A user's message of pictures and text, in this order."""
    texts = [{"type": "text", "text": part} if isinstance(part, str) else None for part in content]
    images = [text or user_message("", [part])["content"][0] for text, part in zip(texts, content)]
    return {"role": "user", "content": images}


def behind(seen: dict) -> int:
    """Prompt tokens behind the last picture."""
    return seen["prompt_tokens"] - seen["visual"][-1]["spans"][-1][1]


@pytest.mark.parametrize(
    "content", [(QUESTION, DIGITS), (DIGITS, QUESTION, DIGITS), (TALK * 5 + QUESTION, DIGITS)]
)
def test_a_question_before_the_picture_lets_the_template_vote_alone(any_policy, content):
    """Its own words cannot see the picture, and the picture's last tokens have nothing to ask."""
    _, seen = chat(any_policy, [parts(*content)], {"kv_policy": "vlkv"})
    assert seen["voting_rows"] == behind(seen) < 16
    _, paper = chat(any_policy, [parts(*content)], {"kv_policy": "vlcache"})
    assert paper["voting_rows"] == 16, "as its paper says"


@pytest.mark.parametrize("content", [(DIGITS, "?"), ("look: ", DIGITS, "?"), (DIGITS,)])
def test_whoever_asks_behind_the_picture_votes_as_ever(any_policy, content):
    _, seen = chat(any_policy, [parts(*content)], {"kv_policy": "vlkv"})
    asked = any(isinstance(part, str) for part in content[1:])
    assert seen["voting_rows"] == (max(16, behind(seen)) if asked else behind(seen))


@pytest.mark.parametrize("more", ["ok", "no digit was found there, look again"])
@pytest.mark.parametrize("calls", [1, 2])
def test_a_tools_answer_does_not_silence_the_question(any_policy, calls, more):
    question = [parts(DIGITS, QUESTION)]
    tools = [{"role": "assistant", "content": "zoom"}, {"role": "tool", "content": more}] * calls
    _, before = chat(any_policy, question, {"kv_policy": "vlkv"})
    _, seen = chat(any_policy, question + tools, {"kv_policy": "vlkv"})
    assert seen["voting_rows"] == behind(seen) > behind(before) >= before["voting_rows"] - 16
    told = [*question, {"role": "assistant", "content": "zoom"}, {"role": "user", "content": more}]
    _, answered = chat(any_policy, told, {"kv_policy": "vlkv"})
    assert answered["voting_rows"] < behind(answered), "a newer question silences it"


def planned(turns: list[list[int]], user: list[int], tool: list[int]) -> int:
    """Where the planner says that the newest turn begins; 90 ends a turn."""
    ids = torch.tensor([token for turn in turns for token in turn])
    planner = Planner(build_settings("vlkv"), 2, True, {80, 90}, {90}, user, tool)
    return planner._last_turn(ids, (ids == 90).nonzero().flatten().tolist())


def test_the_newest_turn_is_the_users():
    """80 begins a message and 90 ends it; 7 is a line break, 1 2 the user, 3 4 the assistant, 5 a tool."""
    system, user = [80, 9, 7, 6, 90], [7, 80, 1, 2, 7, 6, 6, 90]
    reply, head = [7, 80, 3, 4, 7, 6, 90], [7, 80, 3, 4]
    tool, wrapped = [7, 80, 5, 7, 6, 90], [7, 80, 1, 2, 7, 8, 6, 90]
    assert planned([system, user, head], [1, 2], [8]) == 5
    assert planned([user[1:], head], [1, 2], [8]) == 0
    assert planned([system, user, reply, user, head], [1, 2], [8]) == 20
    for answer in (tool, wrapped):
        assert planned([system, user, reply, answer, head], [1, 2], [8]) == 5
    assert planned([system, user, reply, tool, head], [], []) == 20, "no such role: the newest of all"
    assert planned([[6, 6]], [1, 2], [8]) == 0


# ---- Pictures that come again ----


@pytest.fixture(scope="module")
def answers(trained) -> dict[float, list[bool]]:
    """By budget, which answers are right where each picture is sent three times."""
    found = {}
    for budget in (0.1, 0.2, 0.4):
        jobs = []
        for seed in range(8):
            sample = tasks.draw("multi", seed)
            jobs.append((parts(*sample.images * 3, sample.questions[0].text), sample.questions[0].answer))
        custom = {"kv_policy": "vlkv", "kv_budget": budget}
        with ThreadPoolExecutor(8) as pool:
            told = list(pool.map(lambda job: chat(trained, [job[0]], custom, 40)[0], jobs))
        found[budget] = [text == answer for text, (_, answer) in zip(told, jobs, strict=True)]
    return found


def test_more_budget_answers_no_worse(answers):
    right = [sum(found) for found in answers.values()]
    assert all(later >= earlier - 1 for earlier, later in pairwise(right)), right
    assert sum(right) >= 22, right


@pytest.mark.parametrize("order", ["turns", "between others"])
def test_rows_of_a_picture_that_comes_again_go_to_its_newest_copy(any_policy, order):
    other = picture(random.Random(4), 28 * 12, 28 * 12)
    messages = [parts(DIGITS, other, DIGITS, QUESTION)]
    if order == "turns":
        reply = {"role": "assistant", "content": "1"}
        messages = [parts(DIGITS, QUESTION), reply, parts(other, "and this?"), reply, parts(DIGITS, "again?")]
    _, seen = chat(any_policy, messages, {"kv_policy": "vlkv"})
    assert_as_told(seen)
    first, second, newest = seen["pictures"]
    heads = sum(len(layer) for layer in seen["positions"])
    assert first["tokens"] == newest["tokens"] == 256
    assert first["rows"] == heads and first["least"] == 1, "one that stands for it in each head"
    assert newest["rows"] > 2 * heads and second["least"] >= 1
    each = {"kv_policy": "vlkv", "kv_policy_config": {"repeats": "each"}}
    assert chat(any_policy, messages, each)[1]["pictures"][0]["rows"] > heads
