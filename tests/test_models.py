"""Other vision-language models: what each keeps, and that keeping everything is stock SGLang's answer.

Every family is a random checkpoint of ``tests.checkpoints``. What is asked for with ``kv_policy`` none on the
same server stands for stock, as ``test_equal_to_stock`` proves; ``VLKV_STOCK=1`` asks stock itself.
"""

from __future__ import annotations

import json
import math
import os
import random
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Iterable

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from sglang_vlkv.tinyvlm.ask import data_url
from tests.checkpoints import FAMILIES, LAYERS, Family, checkpoint
from tests.equality import alike, assert_same, first_difference, largest_deviation
from tests.hf_families import reference, write_transformers_layout
from tests.hf_reference import Reference, reference_selection
from tests.prompts import CLIP, picture, words
from tests.serving import POSITIONS, Server, report, user_message

NUM_OUTPUT = 12
STATE_GRIDS = {"qwen3-vl"}  # as docs/inspect.md says
NUM_FRAMES = 18  # of a LLaVA video, which is a list of pictures; SGLang pools those of more than 16
# Frames, or pairs of them, x rows x columns.
CLIP_TOKENS = {"qwen3-vl": 4 * 10 * 10, "llava-onevision": NUM_FRAMES * 4 * 4, "internvl3": 32 * 8 * 8}
TENTH = {"kv_policy": "vlcache", "kv_budget": 0.1, "kv_policy_config": {"min_prompt_tokens": 64}} | POSITIONS
EVERYTHING = TENTH | {
    "kv_budget": 1.0,
    "kv_policy_config": {"min_prompt_tokens": 64, "compact_always": True},
}


@dataclass
class Asked:
    """A user's turn: texts with a picture, or with a clip, between one and the next.

    Attributes:
        after: what follows the turn, with the beginning of the next answer.
    """

    name: str
    texts: list[str]
    images: list[Image.Image] = field(default_factory=list)
    has_clip: bool = False
    after: str = ""

    @property
    def is_visual(self) -> bool:
        return bool(self.images) or self.has_clip

    def body(self, custom: dict | None = None) -> dict:
        family = FAMILIES[self.name]
        pictures, medium = list(self.images), family.image
        is_frames = self.has_clip and self.name.startswith("llava")
        if is_frames:
            rng = random.Random(0)
            pictures, medium = [picture(rng, 112, 112) for _ in range(NUM_FRAMES)], family.image * NUM_FRAMES
        elif self.has_clip:
            medium = family.video
        sampling = {"temperature": 0.0, "max_new_tokens": NUM_OUTPUT, "ignore_eos": True}
        body = {
            "text": family.turn.format(medium.join(self.texts)) + self.after,
            "sampling_params": sampling | ({"custom_params": custom} if custom else {}),
            "return_logprob": True,
            "top_logprobs_num": 2,
        }
        if pictures:
            body["image_data"] = [data_url(each) for each in pictures]
            body["modalities"] = ["video" if is_frames else "image" if len(pictures) == 1 else "multi-images"]
        elif self.has_clip:
            body["video_data"] = str(CLIP)
        return body


def drawn(name: str) -> dict[str, Asked]:
    rng = random.Random(name)
    # Square ones of a tile's side, or of two, are resized by nobody.
    side = 224 if name.startswith("llava") else 448
    shapes = [(side, side), (224, 448), (320, 320), (256, 224), (352, 288)]
    pictures = iter([picture(rng, *shape) for shape in shapes])
    asked = {
        "picture first": Asked(name, ["", "\n" + words(rng, 12)], [next(pictures)]),
        "picture in the middle": Asked(name, [words(rng, 9), words(rng, 40)], [next(pictures)]),
        "picture last": Asked(name, [words(rng, 20), ""], [next(pictures)]),
        "pictures": Asked(name, ["", words(rng, 5), words(rng, 8)], [next(pictures), next(pictures)]),
        "text": Asked(name, [words(rng, 60)]),
    }
    if FAMILIES[name].video:
        asked["video"] = Asked(name, ["", "\n" + words(rng, 12)], has_clip=True)
    return asked


@dataclass
class Served:
    """A family's servers, its prompts, and stock's answers to them, one by one on an empty cache.

    Attributes:
        tolerance: least margin between two tokens that rounding cannot turn around: four times what
            stock's answers in a batch differ by from those one by one, at least four times the
            rounding of a logprob.
    """

    name: str
    server: Server
    stock: Server
    asked: dict[str, Asked]
    expected: list[dict] = field(default_factory=list)
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        asked = list(self.asked.values())
        self.expected = [self.ask(self.stock, [each])[0] for each in asked]
        outputs = [answer["output_ids"] for answer in self.expected]
        assert len(set(map(tuple, outputs))) == len(outputs), "outputs do not vary"
        assert all(len(set(tokens)) > 3 for tokens in outputs), "a degenerate model proves nothing"
        self.stock.flush()
        batch = self.ask(self.stock, asked)
        deviation = max(largest_deviation(*both) for both in zip(self.expected, batch, strict=True))
        print(f"{self.name}: largest logprob deviation of stock from itself: {deviation:.1e}")
        print(f"{self.name}: rounding of a logprob: {self.rounding:.1e}")
        assert deviation < 16 * self.rounding
        self.tolerance = 4 * max(deviation, self.rounding)

    @cached_property
    def rounding(self) -> float:
        """Of a logprob: in 16 bits that of a logit, which is stored; in 32 that of all sums before it."""
        if self.family.dtype != torch.float32:
            return 8 * torch.finfo(self.family.dtype).eps
        return self.hugging_face.rounding(self.asked["picture first"], NUM_OUTPUT)

    @cached_property
    def hugging_face(self) -> Reference:
        return reference(self.name)

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    def ask(self, server: Server, asked: Iterable[Asked], custom: dict | None = None) -> list[dict]:
        """Answers to all of ``asked`` at once."""
        return server.many([each.body(custom) for each in asked])

    def length(self, text: str) -> int:
        tokenizer = Tokenizer.from_file(str(checkpoint(self.name) / "tokenizer.json"))
        return len(tokenizer.encode(text).ids)

    def after_media(self, asked: Asked) -> int:
        """Tokens behind the last visual one."""
        closes = self.family.closes_video if asked.has_clip else self.family.closes
        return self.length(closes + asked.texts[-1] + self.family.turn.split("{}")[1])

    def visual_tokens(self, asked: Asked, num_tokens: int) -> int:
        """Of a prompt of ``num_tokens``: what is not text."""
        if asked.has_clip:
            return CLIP_TOKENS[self.name]
        between = (self.family.opens + self.family.closes) * len(asked.images)
        return num_tokens - self.length(self.family.turn.format(between + "".join(asked.texts)))


@pytest.fixture(scope="module", params=FAMILIES)
def served(request):
    name = request.param
    flags = ("--max-total-tokens", "24000", *FAMILIES[name].flags)
    config = json.dumps({"allow_override": True, "twins": "prefer"})
    ours = (*flags, "--kv-policy", "none", "--kv-policy-config", config)
    asked = drawn(name)
    with Server(*ours, model=checkpoint(name)) as server:
        if os.environ.get("VLKV_STOCK") != "1":
            yield Served(name, server, server, asked)
        else:
            with Server(*flags, model=checkpoint(name), env={"SGLANG_PLUGINS": "vlkv_cpu"}) as stock:
                yield Served(name, server, stock, asked)
        server.flush()  # the leak checks of an idle server
        assert server.alive(), server.log()[-4000:]


def test_everything_kept_is_stock(served):
    """In a batch with a text that is left alone; then a second turn, which goes on from the twins."""
    served.server.flush()
    asked = list(served.asked.values())
    answers = served.ask(served.server, asked, EVERYTHING)
    for each, answer in zip(asked, answers, strict=True):
        seen = report(answer)
        if each.is_visual:
            assert seen["policy"] == "vlcache"
            assert seen["kept_per_layer"] == [seen["prompt_tokens"]] * LAYERS
        else:
            assert (seen["policy"], seen["reason"]) == ("none", "no image or video")
    assert_same(served.expected, answers, served.tolerance, f"{served.name}: budget 1")
    pairs = [(each, answer) for each, answer in zip(asked, answers) if each.is_visual]
    turn = served.family.turn.format(words(random.Random(0), 9))
    second = [replace(each, after=answer["text"] + turn) for each, answer in pairs]
    later = served.ask(served.server, second, EVERYTHING)
    for (_, first), answer in zip(pairs, later, strict=True):
        prefix = {"kind": "twin", "tokens": report(first)["prompt_tokens"] + NUM_OUTPUT - 1}
        assert report(answer)["prefix"] == prefix
    expected = served.ask(served.stock, second)
    assert_same(expected, later, served.tolerance, f"{served.name}: budget 1, second turn")


@pytest.fixture(scope="module")
def tenth(served):
    served.server.flush()
    return served.ask(served.server, served.asked.values(), TENTH)


def test_a_tenth_is_kept_and_reported(served, tenth):
    for (title, asked), answer in zip(served.asked.items(), tenth, strict=True):
        seen = report(answer)
        if not asked.is_visual:
            assert seen["policy"] == "none"
            continue
        n, kv_heads = answer["meta_info"]["prompt_tokens"], served.family.kv_heads
        visual, after = served.visual_tokens(asked, n), served.after_media(asked)
        assert (seen["prompt_tokens"], seen["visual_tokens"]) == (n, visual), title
        sizes = [sum(end - start for start, end in each["spans"]) for each in seen["visual"]]
        assert sum(sizes) == visual, title
        grids = [each["grid"] for each in seen["visual"]]
        if served.name in STATE_GRIDS:
            assert [math.prod(grid) for grid in grids] == sizes, title
        else:
            assert not any(grids), title
        assert seen["voting_rows"] == max(after, 16), title
        assert sum(seen["kept_per_layer"]) == round(0.1 * n * LAYERS), title
        kept = list(chain(*seen["positions"]))
        assert [len(head) for head in kept] == [k for k in seen["kept_per_layer"] for _ in range(kv_heads)]
        modality = "video" if asked.has_clip else "image"
        modalities = seen["kept_per_modality"]
        assert modalities.keys() <= {modality, "text", "system"} and modalities[modality] > 0, title
        assert sum(modalities.values()) == kv_heads * sum(seen["kept_per_layer"]), title
        if len(asked.images) == 1:  # what was kept of the picture lies where it stands
            end = n - after
            inside = sum(end - visual <= position < end for head in kept for position in head)
            assert modalities["image"] == inside, title


def test_a_prompt_that_comes_again_computes_its_votes_alone(served, tenth):
    for title, first in zip(served.asked, tenth, strict=True):
        if title in ("picture first", "video"):
            [again] = served.ask(served.server, [served.asked[title]], TENTH)
            seen = report(again)
            hit = seen["prompt_tokens"] - seen["voting_rows"]
            assert seen["prefix"] == {"kind": "exact", "tokens": hit}
            alike(first, again)


def test_kept_rows_and_answers_are_those_of_the_reference(served, tenth):
    """VL-Cache's choice recomputed by Transformers, and its decoding over nothing but those rows."""
    hugging_face, asked = served.hugging_face, served.asked["picture first"]
    [ours], [full] = tenth[:1], served.expected[:1]
    plain = hugging_face.generate(asked, NUM_OUTPUT)
    deviation = largest_deviation(plain, full)
    print(f"{served.name}: largest logprob deviation from Transformers: {deviation:.1e}")
    assert deviation < 16 * served.rounding
    seen, tolerance = report(ours), 4 * max(deviation, served.rounding)
    scores, sparsity = hugging_face.scores(asked)
    assert seen["sparsity_per_layer"] == pytest.approx(sparsity, abs=1e-3)
    equal = total = 0
    for layer, heads in zip(scores, seen["positions"], strict=True):
        for head, kept in zip(layer, heads, strict=True):
            equal += len(set(kept) & set(reference_selection(head, len(kept))))
            total += len(kept)
    print(f"{served.name}: {equal} of {total} positions equal the reference")
    assert equal >= (0.98 if served.family.dtype == torch.float32 else 0.95) * total
    masked = hugging_face.generate(asked, NUM_OUTPUT, seen["positions"])
    assert_same([masked], [ours], tolerance, f"{served.name}: attention over the kept rows")
    assert first_difference(plain, ours), "the budget is too large for this test to see anything"


def test_chat_shows_the_policy_the_same_picture(served, tenth):
    """Through the checkpoint's own chat template; for InternVL SGLang has one, with a system message."""
    asked, first = served.asked["picture first"], tenth[0]
    message = user_message(asked.texts[-1], asked.images[:1])
    response = served.server.post(
        "/v1/chat/completions",
        {
            "model": "any", "messages": [message], "max_tokens": 2,
            "temperature": 0.0, "ignore_eos": True, "return_meta_info": True, "custom_params": TENTH,
        },
    )  # fmt: skip
    seen = response.json()["choices"][0]["meta_info"]["kv_policy"]
    for key in ("visual_tokens", *(("prompt_tokens", "voting_rows") if served.name != "internvl3" else ())):
        assert seen[key] == report(first)[key], key
    assert sum(seen["kept_per_layer"]) == round(0.1 * seen["prompt_tokens"] * LAYERS)


def test_policies_that_look_at_more_than_votes(served):
    """Whole-prompt scores, rotary embeddings taken off, values, frames, merging."""
    policies = ("expected", "h2o", "infinipotv", "lookm", "vlkv")
    asked = served.asked["picture in the middle"]
    bodies = [asked.body(TENTH | {"kv_policy": policy}) for policy in policies]
    for policy, answer in zip(policies, served.server.many(bodies), strict=True):
        seen = report(answer)
        assert seen["policy"] == policy, seen
        assert sum(seen["kept_per_layer"]) == round(0.1 * seen["prompt_tokens"] * LAYERS), policy


def test_a_model_that_sglang_serves_with_transformers_code(tmp_path):
    """There prompts keep their placeholders, alike for all pictures, and nothing is shared between them."""
    hugging_face = reference("llava-1.6")
    write_transformers_layout(hugging_face, tmp_path)
    first = drawn("llava-1.6")["picture first"]
    asked = [first, replace(first, images=[picture(random.Random(5), 224, 224)]), first]
    config = json.dumps({"allow_override": True, "twins": "prefer"})
    flags = ("--max-total-tokens", "8000", "--kv-policy", "none", "--kv-policy-config", config)
    with Server(*flags, model=tmp_path) as server:
        stock, everything, tenth = (
            [server.many([each.body(custom)])[0] for each in asked] for custom in (None, EVERYTHING, TENTH)
        )
        assert server.alive(), server.log()[-4000:]
    expected = [hugging_face.generate(each, NUM_OUTPUT) for each in asked[:2]]
    deviation = max(largest_deviation(*pair) for pair in zip(expected, stock))
    assert 0 < deviation < 1e-3 and first_difference(*expected)
    tolerance = 4 * max(deviation, hugging_face.rounding(first, NUM_OUTPUT))
    assert_same(expected + expected[:1], stock, tolerance, "stock")
    assert_same(stock, everything, tolerance, "budget 1")
    masked = [hugging_face.generate(a, NUM_OUTPUT, report(b)["positions"]) for a, b in zip(asked, tenth)]
    assert_same(masked, tenth, tolerance, "attention over the kept rows")
    for answer in everything + tenth:
        seen = report(answer)
        assert (seen["policy"], seen["visual_tokens"]) == ("vlcache", 8 * 8 + 16 * 17)
        assert seen["prefix"] == {"kind": "cold", "tokens": 0}
