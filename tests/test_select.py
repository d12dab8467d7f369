"""Which positions vote and which rows stay: exact, whatever the scores."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_vlkv.policies import policies
from sglang_vlkv.policies.vlcache import VLCache
from sglang_vlkv.stages.layer import LayerScores
from sglang_vlkv.stages.prompt import Modality, Prompt
from sglang_vlkv.stages.select import select, tiers, top_positions

T, I, V, A, S = Modality.TEXT, Modality.IMAGE, Modality.VIDEO, Modality.AUDIO, Modality.SYSTEM
N, HEADS, LAYERS = 63, 2, 3


def prompt_of(*spans: tuple[Modality, int], last_turn: int = 0) -> Prompt:
    tags = [tag for tag, length in spans for _ in range(length)]
    return Prompt(torch.tensor(tags, dtype=torch.uint8), last_turn)


PICTURE = prompt_of((S, 3), (T, 4), (I, 30), (T, 5), (A, 6), (T, 15))
assert PICTURE.num_tokens == N


def random_scores(seed: int) -> torch.Tensor:
    """Scores ``[HEADS, N]``: distinct, or few values with many ties, or so large that adding 1 to
    one is lost."""
    generator = torch.Generator().manual_seed(seed)
    kind = seed % 3
    if kind == 0:
        return torch.rand(HEADS, N, generator=generator)
    ties = torch.randint(0, 4, (HEADS, N), generator=generator).float()
    return ties if kind == 1 else 2.0**26 + ties * 8


def winners(scores: list[float], num_kept: int, protected: set[int] = frozenset()) -> list[int]:
    """By score descending, position ascending; the protected always win."""
    ranking = sorted(range(len(scores)), key=lambda j: (j not in protected, -scores[j], j))
    return sorted(ranking[:num_kept])


@pytest.mark.parametrize("seed", range(12))
def test_winners_are_the_best_scored_then_the_earliest_per_head(seed):
    scores, free = random_scores(seed), torch.zeros(N, dtype=torch.int8)
    for num_kept in (1, 2, 31, N - 1, N):
        kept = top_positions(scores, num_kept, free)
        assert kept.dtype == torch.int64
        assert kept.tolist() == [winners(head, num_kept) for head in scores.tolist()]


@pytest.mark.parametrize("seed", range(12))
def test_lower_tiers_win_whatever_their_score(seed):
    scores = random_scores(seed)
    protected = [{0, 5, 62}, {1, 40, 41}]
    tier = torch.tensor([[0 if j in p else 1 for j in range(N)] for p in protected], dtype=torch.int8)
    scores[tier == 0] = scores.min() - 1
    for num_kept in (2, 3, 20):
        expected = [winners(head, num_kept, p) for head, p in zip(scores.tolist(), protected)]
        assert top_positions(scores, num_kept, tier).tolist() == expected


def test_scores_are_not_written_to():
    scores = random_scores(0)
    before = scores.clone()
    select(VLCache(budget=0.3), PICTURE, [LayerScores(scores)] * LAYERS, [0.5] * LAYERS)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize("budget, recent_fraction", [(0.1, 0.1), (0.37, 0.5), (0.1, 0.0), (1.0, 1.0)])
def test_every_layer_keeps_its_budget_with_the_recent_window_inside(seed, budget, recent_fraction):
    policy = VLCache(budget=budget, recent_fraction=recent_fraction, picture_share=0.0)
    scores = [random_scores(3 * seed + layer) for layer in range(LAYERS)]
    sparsity = [0.9, 0.2, 0.6]
    selection = select(policy, PICTURE, [*map(LayerScores, scores)], sparsity)
    assert selection.num_kept == policy.layer_budgets(sparsity, N)
    assert sum(selection.num_kept) == round(budget * N * LAYERS)
    assert selection.sparsity == sparsity
    for layer_scores, kept in zip(scores, selection.kept, strict=True):
        num_recent = max(1, int(recent_fraction * kept.shape[1]))
        recent = set(range(N - num_recent, N))
        expected = [winners(head, kept.shape[1], recent) for head in layer_scores.tolist()]
        assert kept.tolist() == expected


def test_recent_window_is_floored_and_never_empty():
    policy = VLCache(recent_fraction=0.1)
    assert [policy.num_recent(k) for k in (1, 9, 10, 19, 20, 63)] == [1, 1, 1, 1, 2, 6]


@pytest.mark.parametrize("seed", range(6))
def test_all_text_stays_inside_the_budget_where_its_floor_is_one(seed):
    policy = VLCache(budget=0.5, modality_floors={"text": 1.0}, picture_share=0.0)
    text = set((PICTURE.tags == T).nonzero().flatten().tolist())
    scores = [random_scores(seed + layer) for layer in range(LAYERS)]
    for layer_scores in scores:
        layer_scores[:, list(text)] = -1.0
    selection = select(policy, PICTURE, [*map(LayerScores, scores)], [0.5] * LAYERS)
    for layer_scores, kept in zip(scores, selection.kept):
        assert kept.tolist() == [winners(head, kept.shape[1], text) for head in layer_scores.tolist()]


def test_floors_keep_their_best_scored_tokens_per_head():
    policy = VLCache(modality_floors={"image": 0.25, "audio": 0.5})
    scores = random_scores(0)
    scores[:, PICTURE.tags == I] -= 10
    scores[:, PICTURE.tags == A] -= 20
    tier = tiers(policy, PICTURE, scores, 20)
    kept = top_positions(scores, 20, tier)
    for head_scores, positions in zip(scores.tolist(), kept.tolist()):
        for modality, count in ((I, 8), (A, 3)):  # 0.25 * 30 is 7.5, half to even
            members = (PICTURE.tags == modality).nonzero().flatten().tolist()
            best = winners([head_scores[j] for j in members], count)
            assert [j for j in positions if j in members] == [members[b] for b in best]


def test_floors_beyond_the_budget_keep_their_best_behind_the_recent_window():
    policy = VLCache(modality_floors={"image": 1.0}, recent_fraction=0.17)
    scores = random_scores(0)
    scores[:, PICTURE.tags == I] -= 10
    tier = tiers(policy, PICTURE, scores, 12)
    image = (PICTURE.tags == I).nonzero().flatten().tolist()
    for head, positions in zip(scores.tolist(), top_positions(scores, 12, tier).tolist()):
        best = winners([head[j] for j in image], 10)
        assert positions == [image[b] for b in best] + [N - 2, N - 1]


def test_a_policy_without_floors_ignores_modalities():
    scores = [random_scores(layer) for layer in range(LAYERS)]
    everything_text = prompt_of((T, N))
    pictured, plain = (
        select(VLCache(budget=0.3, picture_share=0.0), prompt, [*map(LayerScores, scores)], [0.5] * LAYERS).kept
        for prompt in (PICTURE, everything_text)
    )
    assert all(torch.equal(a, b) for a, b in zip(pictured, plain, strict=True))


def test_vision_ends_behind_the_last_image_or_video_and_audio_is_text():
    assert prompt_of((T, 4), (I, 3), (T, 2), (V, 5), (A, 6), (T, 1)).vision_end == 14
    assert prompt_of((V, 5), (T, 2), (I, 3)).vision_end == 10
    assert prompt_of((T, 4), (A, 3)).vision_end == 0
    assert prompt_of((T, 4), (I, 3), (A, 2), (V, 5), (S, 1)).num_visual == 8


@pytest.mark.parametrize(
    "text_after, rows", [(0, 16), (15, 16), (16, 16), (17, 17), (255, 255), (256, 256), (257, 256)]
)
def test_text_behind_the_last_picture_votes_within_its_limits(text_after, rows):
    prompt = prompt_of((T, 20), (I, 20), (T, 5), (V, 20), (T, text_after))
    assert VLCache().num_voting(prompt) == rows


def test_no_more_rows_vote_than_there_are():
    assert VLCache().num_voting(prompt_of((I, 9), (T, 2))) == 11
    assert VLCache(min_rows=3, max_rows=5).num_voting(prompt_of((I, 9), (T, 8))) == 5
    assert VLCache(min_rows=3, max_rows=5).num_voting(prompt_of((I, 9), (T, 1))) == 3


def test_only_the_newest_turn_votes_where_asked():
    policy = VLCache(voting="last_turn")
    assert policy.num_voting(prompt_of((I, 50), (T, 100), last_turn=110)) == 40
    assert policy.num_voting(prompt_of((I, 50), (T, 100), last_turn=20)) == 100
    assert VLCache().num_voting(prompt_of((I, 50), (T, 100), last_turn=110)) == 100


class Counted(TorchDispatchMode):
    """Counts operations: on a GPU, launches that the scheduler waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "options",
    [{}, dict(sink_tokens=4), dict(quota=0.4), dict(modality_floors={"text": 1.0, "image": 0.2}, floors_share=0.6)],
    ids=str,
)
def test_all_layers_have_the_tiers_of_each_in_no_more_operations(options):
    policy = policies()["vlkv"](min_rows=4, **options)
    random = torch.Generator().manual_seed(0)
    num_layers, n = 12, PICTURE.num_tokens
    scores, quota = torch.rand(2, num_layers, 3, n, generator=random).mul(8).floor()  # with ties
    quota[:, :, ::7] = -torch.inf
    kept = [1 + (n - 1) * layer // (num_layers - 1) for layer in range(num_layers)]
    first, first_quota = scores[:1], quota[:1]
    with Counted() as of_one:
        tiers(policy, PICTURE, first, kept[:1], first_quota)
    with Counted() as of_all:
        together = tiers(policy, PICTURE, scores, kept, quota)
    assert of_all.count == of_one.count
    alone = [tiers(policy, PICTURE, *layer) for layer in zip(scores, kept, quota)]
    assert torch.equal(together, torch.stack(alone)) and len(together.unique()) > 1
