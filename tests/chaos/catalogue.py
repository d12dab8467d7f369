"""What is asked: a seeded catalogue of prompts with policies, and the answer to each given alone."""

from __future__ import annotations

import random

from sglang_vlkv.policies import policies
from tests.chaos.plan import Alone, Spec
from tests.conversation import Conversation, evict_exact_kv
from tests.prompts import CLIP, picture, words
from tests.serving import POSITIONS, Server, report, user_message

MIN_PROMPT = 48  # tokens; pictures of 64 are compacted too
KINDS = {"image": 10, "images": 4, "video": 1, "text": 5, "turns": 4}  # how many of each, about
CHOSEN = [name for name in policies() if name not in ("none", "given")]
DEFAULT = "vlcache"  # the server's own


def draw_custom(rng: random.Random, drafts: bool) -> dict:
    """A policy with a budget and options; a third of all take what the server runs."""
    if rng.random() < 0.3:
        return {}
    name = rng.choice(CHOSEN)
    options = {
        "min_prompt_tokens": MIN_PROMPT,
        "merge": rng.choice(["none", "none", "bucket_mean", "similar"]),
        "decode": rng.choice(["append", "append", "fixed_point"]),
        "sink_tokens": rng.choice([0, 0, 2]),
    }
    if drafts and policies()[name].can_draft and rng.random() < 0.25:
        options["draft_tokens"] = 4
    return {"kv_policy": name, "kv_budget": rng.choice([0.05, 0.1, 0.3]), "kv_policy_config": options}


def answered(server: Server, seed: int, conversations: int, pool: int, drafts: bool = False) -> list[Spec]:
    """The catalogue: ``conversations``, most of a single turn, with the answers given alone.

    Args:
        server: idle, under ``twins`` fallback, with ``pool`` slots.
        drafts: some policies draft.
    """
    specs = []
    for index in range(conversations):
        specs += converse(server, random.Random(f"chaos{seed}-{index}"), str(index), drafts)
    for spec in specs:
        if spec.shows:
            spec.resumed = behind_its_twin(server, spec, pool)
    return specs


def behind_its_twin(server: Server, spec: Spec, pool: int) -> Alone | None:
    """What it is answered when its own twin is there and its exact KV is not."""
    server.flush()
    # One token keeps no rows; and a shorter answer's draft is a shorter one.
    server.many([spec.request(max_new_tokens=max(2, min(spec.max_new_tokens, 8)))])
    evict_exact_kv(server, pool)
    again = ask(server, spec)
    whole = again.found == spec.alone.prompt_tokens - 1 and again.prefix == "twin"
    return again if whole else None


def converse(server: Server, rng: random.Random, name: str, drafts: bool) -> list[Spec]:
    """The turns of one conversation, each asked cold; the next goes on from its answer. Every other first
    turn is also asked of another policy, which must not see what the one left."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    count = {"text": 0, "video": 0, "images": rng.randint(2, 3)}.get(kind, 1)
    low, high = (5, 7) if kind == "images" else (8, 11)
    images = [picture(rng, 28 * rng.randint(low, high), 28 * rng.randint(low, high)) for _ in range(count)]
    film = CLIP if kind == "video" else None
    custom = draw_custom(rng, drafts)
    said, messages, specs = Conversation(), [], []
    for turn in range(rng.randint(2, 3) if kind == "turns" else 1):
        question = words(rng, rng.randint(10, 30) if kind == "text" else rng.randint(2, 8))
        shown = (tuple(images), film) if turn == 0 else ()
        length = 16 if kind == "turns" else rng.choice([1, 2, 8, 24, 96, 200])
        said = said.ask(question, *shown)
        messages = [*messages, user_message(question, *shown)]
        spec = Spec(f"{name}-{kind}-{turn}", said.body(length, custom=custom | POSITIONS), messages)
        server.flush()
        spec.alone, asked = ask(server, spec), said
        said = said.answered({"text": spec.alone.text})
        messages = [*messages, {"role": "assistant", "content": spec.alone.text}]
        specs.append(spec)
        if turn == 0 and spec.shows and rng.random() < 0.5:
            otherwise = asked.body(length, custom=draw_custom(rng, drafts) | POSITIONS)
            specs.append(Spec(f"{name}-{kind}-otherwise", otherwise, spec.messages))
            server.flush()
            specs[-1].alone = ask(server, specs[-1])
    return specs


def ask(server: Server, spec: Spec) -> Alone:
    [answer] = server.many([spec.body])
    margins = [pair[0][0] - pair[1][0] for pair in answer["meta_info"]["output_top_logprobs"]]
    seen = report(answer)
    if len(answer["text"]) != len(answer["output_ids"]):
        raise ValueError(f"{spec.name}: a token is not a character, and answers as text say less")
    return Alone(
        answer["text"], margins, seen["prompt_tokens"], seen["policy"], seen.get("config", ""),
        seen.get("draft_rows", 0), seen.get("positions"), seen["prefix"]["kind"],
        seen["prefix"]["tokens"],
    )  # fmt: skip
