"""Is an answer that came out of the storm the one given alone? If not, what in its report says why not?

Every verdict but ``equal`` and ``wrong`` is an exemption: something that the README says may change an
answer, read off the request's own report. Each is held to a bound by whoever counts them.
"""

from __future__ import annotations

from tests.chaos.plan import Alone

COIN_TOSS = 1e-3  # nats; of logprobs that batching and chunking alone move by up to 1e-4
EQUAL, WRONG = "equal", "wrong"
# Most of each, as a fraction of all that was compared; one more in any case.
BOUNDS = {
    "coin toss": 0.02,  # the two best tokens were this close, and rounding chose
    "ties": 0.03,  # rounding chose other rows where scores are equal
    "prefilled again": 0.05,  # retracted, and its twin gone: its outputs were seen under full attention
    "before compaction": 0.01,  # put back twice: its second token saw the exact prompt
    "another draft": 0.01,  # its draft was retracted again and again, and did not vote
}


def judge(text: str, seen: dict, alone: Alone, resumed: Alone | None) -> str:
    """The verdict on a whole greedy answer.

    Args:
        text: a character per token.
        seen: its report.
    """
    retracted = seen["retractions"] > 0
    behind_twin = seen["prefix"]["kind"] in ("twin", "shared")
    # Behind a twin of the whole prompt; what a retracted request went on from at first is not told.
    references = [alone, resumed] if resumed and behind_twin else [alone]
    references = [one for one in references if same_policy(seen, one, retracted)]
    if not references or seen["prompt_tokens"] != alone.prompt_tokens:
        return WRONG
    if any(text == reference.text for reference in references):
        return EQUAL
    index, reference = max((parting(text, reference.text), -i) for i, reference in enumerate(references))
    reference = references[-reference]
    if len(text) != len(reference.text):
        return WRONG
    if seen.get("draft_rows", 0) != reference.draft_rows:
        return "another draft"
    kept = seen.get("positions")
    if kept is not None and kept != reference.kept:
        return "ties" if alike(kept, reference.kept) else WRONG
    if reference.margins[index] < COIN_TOSS:
        return "coin toss"
    if retracted and index > 0:
        if not (behind_twin and seen["prefix"]["tokens"] >= seen["prompt_tokens"]):
            return "prefilled again"
        if seen["retractions"] > 1 and index == 1:
            return "before compaction"
    return WRONG


def same_policy(seen: dict, reference: Alone, retracted: bool) -> bool:
    """Whether its prompt was treated so; a request that ends at the first token of a prefill has nothing
    to compact any more."""
    if seen["policy"] == reference.policy:
        return seen.get("config", "") == reference.config
    return seen["policy"] == "none" and retracted and "finished at its first token" in seen["reason"]


def parting(text: str, other: str) -> int:
    """Where two answers differ first."""
    pairs = enumerate(zip(text, other))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))


def alike(kept: list, other: list | None) -> bool:
    """Selections that rounding alone may have parted: of one size, nine tenths in common."""
    if other is None:
        return False
    heads = list(zip(sum(kept, []), sum(other, []), strict=True))
    if any(len(a) != len(b) for a, b in heads):
        return False
    return all(len(set(a) & set(b)) >= 0.9 * len(a) for a, b in heads)
