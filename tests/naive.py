"""Every policy and every merge by its definition: loops, one number at a time, float64.

Written from the papers and shared/ALGORITHMS.md, not from ``sglang_vlkv``, of which it reads the
values of a policy's options only. A new policy needs a function here, marked :func:`defines`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, reduce
from operator import mul
from typing import Callable, NamedTuple, Sequence

import torch

from sglang_vlkv.stages.prompt import Modality

VISUAL = (Modality.IMAGE, Modality.VIDEO)


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(map(mul, a, b))


def norm(a: Sequence[float]) -> float:
    return math.sqrt(dot(a, a))


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return dot(a, b) / (norm(a) * norm(b))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def softmax(logits: Sequence[float]) -> list[float]:
    powers = [math.exp(x - max(logits)) for x in logits]
    return [p / sum(powers) for p in powers]


def mean_matrix(matrices: list[torch.Tensor]) -> torch.Tensor:
    return reduce(torch.add, matrices) / len(matrices)


class Rotary(NamedTuple):
    """RoPE as a matrix: lane i turns a pair of dimensions by ``position[axes[i]] * base ** (-2i / dim)``.

    Attributes:
        dim: how many of a head's first dimensions turn.
        axes: per lane, which of a position's axes turns it.
        neox: lane i pairs i with i + dim / 2, else 2i with 2i + 1.
        limit: positions from here on turn like the last before it (the table's end).
        gain: what YaRN multiplies the table with.
    """

    dim: int
    axes: tuple[int, ...]
    neox: bool = True
    limit: int = 2000
    gain: float = 1.0
    base: float = 100.0

    def angle(self, lane: int, position: float) -> float:
        return min(position, self.limit - 1) * self.base ** (-2 * lane / self.dim)

    def matrix(self, position: Sequence[int], head_dim: int) -> torch.Tensor:
        rows = [[float(i == j) for j in range(head_dim)] for i in range(head_dim)]
        for lane, axis in enumerate(self.axes):
            a, b = (lane, lane + self.dim // 2) if self.neox else (2 * lane, 2 * lane + 1)
            angle = self.angle(lane, position[axis])
            rows[a][a] = rows[b][b] = self.gain * math.cos(angle)
            rows[b][a] = self.gain * math.sin(angle)
            rows[a][b] = -rows[b][a]
        return torch.tensor(rows, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Case:
    """A prefilled prompt.

    Attributes:
        tags: per position.
        q, k, v: after RoPE, ``[L, n, H, D]``.
        draft: queries of drafted tokens, ``[L, T, Hq, D]``.
        positions: per prompt position, its rotary position on every axis.
    """

    tags: list[Modality]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    draft: torch.Tensor
    scale: float
    rope: Rotary
    positions: list[tuple[int, ...]]
    last_turn: int = 0
    turn_end: int | None = None
    newest: tuple[int, ...] = ()  # per position, where its token stands in the newest copy; () for nowhere else

    @property
    def n(self) -> int:
        return len(self.tags)

    @property
    def num_layers(self) -> int:
        return len(self.k)

    @property
    def kv_heads(self) -> range:
        return range(self.k.shape[2])

    def group(self, head: int) -> range:
        """The query heads of a KV head."""
        size = self.q.shape[2] // self.k.shape[2]
        return range(head * size, (head + 1) * size)

    def tagged(self, *tags: Modality) -> list[int]:
        return [j for j, tag in enumerate(self.tags) if tag in tags]

    @property
    def visual(self) -> list[int]:
        return self.tagged(*VISUAL)

    @property
    def asked_before(self) -> bool:
        """Whether all text of the newest turn stands before its last picture."""
        end = self.n if self.turn_end is None else self.turn_end
        asked = [j for j in self.tagged(Modality.TEXT) if self.last_turn <= j < end]
        return bool(asked) and max(asked) < self.vision_end

    @property
    def old(self) -> list[int]:
        """Positions whose token comes again in a newer copy of its picture."""
        return [j for j, at in enumerate(self.newest) if at != j]

    @property
    def pictures(self) -> list[list[int]]:
        """The positions of each picture or video: neighbours with the same tag."""
        found: list[list[int]] = []
        for j in self.visual:
            if found and found[-1][-1] == j - 1 and self.tags[j] == self.tags[j - 1]:
                found[-1].append(j)
            else:
                found.append([j])
        return found

    @property
    def vision_end(self) -> int:
        return max(self.visual, default=-1) + 1


@cache
def numbers(case: Case, what: str, layer: int) -> list[list[list[float]]]:
    """``[n][H][D]``."""
    return getattr(case, what)[layer].double().tolist()


def attend(case: Case, layer: int, queries: list[list[float]], visible: int) -> list[list[float]]:
    """What one row's query heads pay the first ``visible`` keys, ``[Hq][visible]``."""
    keys = numbers(case, "k", layer)[:visible]
    return [
        softmax([dot(queries[g], key[head]) * case.scale for key in keys])
        for head in case.kv_heads
        for g in case.group(head)
    ]


@cache
def attention(case: Case, layer: int, row: int) -> list[list[float]]:
    """The causal attention of a prompt position, ``[Hq][row + 1]``."""
    return attend(case, layer, numbers(case, "q", layer)[row], row + 1)


@cache
def drafted(case: Case, layer: int) -> list[list[list[float]]]:
    """The attention of the drafted rows, ``[T][Hq][n]``."""
    return [attend(case, layer, queries, case.n) for queries in numbers(case, "draft", layer)]


def per_head(case: Case, function: Callable[[int, int], float]) -> list[list[float]]:
    """``[Hkv][n]`` of a function of KV head and key."""
    return [[function(head, j) for j in range(case.n)] for head in case.kv_heads]


@cache
def votes(case: Case, layer: int, rows: Sequence[int], draft=True, together=sum) -> list[list[float]]:
    """What each key gets from ``rows`` (hashable) and the query heads of its KV head, ``[Hkv][n]``."""
    lines = [attention(case, layer, row) for row in rows] + (drafted(case, layer) if draft else [])

    def received(head: int, j: int) -> float:
        return together([line[g][j] for line in lines for g in case.group(head) if j < len(line[g])] or [0])

    return per_head(case, received)


def voting_rows(policy, case: Case) -> range:
    start = case.vision_end
    if policy.voting == "last_turn":
        start = max(start, case.last_turn)
    num_rows = min(max(case.n - start, policy.min_rows), policy.max_rows, case.n)
    return range(case.n - num_rows, case.n)


def least_rows(total: int, n: int, num_layers: int) -> int:
    return min(max(1, -(-n // 100)), total // num_layers)


def exact_split(weights: Sequence[float], total: int, n: int) -> list[int]:
    """The specification in rational arithmetic: between the two t where a layer meets a bound, solved.

    A layer without weight takes what the others cannot.
    """
    w = [Fraction(x) for x in weights]
    w = [max(x, max(w) / 10**9 or Fraction(1)) for x in w]
    low = least_rows(total, n, len(w))

    def shares(t):
        return [min(max(t * x, low), n) for x in w]

    meets = sorted({bound / x for x in w for bound in (low, n)})
    above = meets[bisect_left(meets, total, key=lambda t: sum(shares(t)))]
    free = [low < above * x <= n for x in w]
    if any(free):
        fixed = sum(s for s, is_free in zip(shares(above), free) if not is_free)
        above = (total - fixed) / sum(x for x, is_free in zip(w, free) if is_free)
    exact = shares(above)
    assert sum(exact) == total
    kept = [math.floor(s) for s in exact]
    by_fraction = sorted(range(len(w)), key=lambda layer: (kept[layer] - exact[layer], layer))
    for layer in [layer for layer in by_fraction if kept[layer] < n][: total - sum(kept)]:
        kept[layer] += 1
    return kept


def cumulative_split(importance: Sequence[Sequence[float]], total: int) -> list[int]:
    """Row by row, to the layer whose best keys so far cover the least of its importance."""
    num_layers, n = len(importance), len(importance[0])
    kept = [least_rows(total, n, num_layers)] * num_layers
    best_first = [sorted(layer, reverse=True) for layer in importance]

    def covered(layer: int):
        return sum(best_first[layer][: kept[layer]]) / (sum(best_first[layer]) or 1)

    while sum(kept) < total:
        open_layers = [layer for layer in range(num_layers) if kept[layer] < n]
        kept[min(open_layers, key=lambda layer: (covered(layer), layer))] += 1
    return kept


class Verdict(NamedTuple):
    """What a policy thinks of a prompt.

    Attributes:
        scores: ``[L][Hkv][n]``.
        budgets: rows per layer.
        recent: a layer's budget -> how many of the last positions stay whatever their score.
        quota: a second score, None where a key takes no part.
        floors: positions, and the fraction of them that stays.
    """

    scores: list
    budgets: list[int]
    recent: Callable[[int], int]
    quota: list | None
    floors: list[tuple[list[int], float]]


DEFINITIONS: dict[str, Callable[..., Verdict]] = {}


def defines(name: str):
    return lambda function: DEFINITIONS.setdefault(name, function)


def judge(policy, case: Case) -> Verdict:
    return DEFINITIONS[policy.name](policy, case)


def verdict(policy, case: Case, score, weights=None, budgets=None, recent=None, quota=None, floors=()):
    """What policies have in common.

    Args:
        score, quota: functions of the layer, to ``[Hkv][n]``.
        weights: of the layers, equal where left out; ``budgets`` are final.
    """
    layers = range(case.num_layers)
    total = round(policy.budget * case.n * case.num_layers)
    modalities = [
        (case.tagged(Modality[name.upper()]), fraction) for name, fraction in policy.modality_floors.items()
    ]
    return Verdict(
        [score(layer) for layer in layers],
        budgets or exact_split(weights or [1] * case.num_layers, total, case.n),
        recent or (lambda k: max(1, math.floor(policy.recent_fraction * k))),
        quota and [quota(layer) for layer in layers],
        [*modalities, *floors],
    )


def best(members, count: int, by: Sequence[float]) -> set[int]:
    """By score descending, position ascending."""
    return set(sorted(members, key=lambda j: (-by[j], j))[:count])


def own_rows(policy, k: int, num_pictures: int) -> int:
    """Rows of a KV head that are its pictures' own."""
    most = k - max(1, k // 10)
    if policy.picture_share == 0 or num_pictures == 0:
        return 0
    one_each = num_pictures if num_pictures <= most else k // 2
    return min(max(round(policy.picture_share * k), one_each), most)


def picture_rows(policy, judged: Verdict, case: Case, layer: int, head: int) -> list[int]:
    """How many of its own rows a KV head gives to each picture; one to those that come again."""
    pictures, heads = case.pictures, len(judged.scores[layer])
    sizes = [1 if {*own} & {*case.old} else len(own) for own in pictures]
    rows = [own_rows(policy, k, len(pictures)) for k in judged.budgets]
    given, spare = rows[layer], sum(sizes) - len(sizes)
    if given < len(pictures):
        turn = heads * sum(rows[:layer]) + head * given
        chosen = {(turn + i) % len(pictures) for i in range(given)}
        return [int(i in chosen) for i in range(len(pictures))]
    more = min(given - len(pictures), spare)
    shares = [Fraction(more * (size - 1), max(1, spare)) for size in sizes]
    counts = [1 + math.floor(share) for share in shares]
    by_fraction = sorted(range(len(sizes)), key=lambda i: (math.floor(shares[i]) - shares[i], i))
    for i in by_fraction[: more + len(sizes) - sum(counts)]:
        counts[i] += 1
    return counts


def choose(policy, judged: Verdict, layer: int, head: int, case: Case) -> list[int]:
    """The positions that a KV head keeps."""
    pictures = case.pictures
    scores, k = judged.scores[layer][head], judged.budgets[layer]
    n = len(scores)
    num_recent = min(judged.recent(k), k)
    window = set(range(n - num_recent, n))
    sinks = [j for j in range(min(policy.sink_tokens, k - num_recent)) if j not in window]
    first = window | set(sinks)
    floors = set()
    for members, fraction in judged.floors:
        floors |= best(members, round(fraction * len(members)), scores)
    second = best(floors - first, min(round(policy.floors_share * k), k - len(first)), scores)
    third = set()
    if judged.quota:
        by = judged.quota[layer][head]
        members = [j for j in range(n) if j not in first | second and by[j] is not None]
        third = best(members, round(policy.quota * (k - len(first | second))), by)

    def place(j: int) -> tuple:
        tier = next((i for i, group in enumerate((first, second, third)) if j in group), 3)
        return tier, -scores[j], j

    own = set()
    counts = picture_rows(policy, judged, case, layer, head)
    for members, count in zip(pictures, counts, strict=True):
        own |= set(sorted(members, key=place)[:count])
    if any(own_rows(policy, other, len(pictures)) for other in judged.budgets):
        own.add(n - 1)
        others = [j for j in [*sinks, *sorted(window, reverse=True)] if j not in own]
        first = own | set(others[: k - len(own)])
    stay = sorted(set(range(n)) - own, key=place)[: k - len(own)]
    return sorted(own | set(stay))


@defines("none")
def none(policy, case):
    return verdict(policy, case, lambda layer: per_head(case, lambda head, j: 0.0))


@defines("uniform")
def uniform(policy, case):
    rows = voting_rows(policy, case)
    return verdict(policy, case, lambda layer: votes(case, layer, rows))


@defines("vlcache")
def vlcache(policy, case):
    rows, weights = voting_rows(policy, case), []
    for layer in range(case.num_layers):
        lines = [line for row in rows for line in attention(case, layer, row)]
        zeros = sum(a < policy.p * max(line) for line in lines for a in line)
        weights.append(1 - zeros / sum(map(len, lines)))
    clipped = None
    if not policy.renormalise:
        shares = [w / sum(weights) * policy.budget * case.num_layers for w in weights]
        clipped = [max(1, math.floor(min(max(share, 0.01), 1.0) * case.n)) for share in shares]
    return verdict(policy, case, lambda layer: votes(case, layer, rows), weights, clipped)


def moments(vectors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance."""
    center = mean_matrix(vectors)
    return center, mean_matrix([torch.outer(x - center, x - center) for x in vectors])


@cache
def unrotations(case: Case) -> list[torch.Tensor]:
    """What takes RoPE off at every prompt position, ``[D, D]``."""
    return [torch.linalg.inv(case.rope.matrix(position, case.k.shape[-1])) for position in case.positions]


@cache
def outliers(case: Case, layer: int, ridge: float, visual: tuple[int, ...]) -> list:
    """The Mahalanobis distance of each of these visual keys from all of them in its head, before RoPE."""
    scores = per_head(case, lambda head, j: None)
    for head in case.kv_heads:
        keys = [unrotations(case)[j] @ case.k[layer, j, head].double() for j in visual]
        center, covariance = moments(keys)
        variance = max(float(covariance.diagonal().mean()), 1e-12)
        inverse = torch.linalg.inv(covariance + ridge * variance * torch.eye(len(center)))
        for j, key in zip(visual, keys):
            scores[head][j] = float((key - center) @ inverse @ (key - center))
    return scores


@defines("vlkv")
def vlkv(policy, case):
    rows, together = voting_rows(policy, case), {"max": max, "sum": sum}[policy.reduce]
    question = set(range(max(case.vision_end, case.last_turn), case.n))
    if case.asked_before:
        first = case.vision_end if case.vision_end < case.n else 0
        rows = range(max(rows[0], first), case.n)
        question |= {j for j in case.tagged(Modality.TEXT) if j >= case.last_turn}
    old = case.old if policy.repeats == "newest" else []
    visual = tuple(j for j in case.visual if j not in old)

    def score(layer: int) -> list[list[float]]:
        attended, values = votes(case, layer, rows, together=together), numbers(case, "v", layer)

        def worth(head: int, j: int) -> float:
            weight = policy.question_weight if j in question else 1.0
            return attended[head][j] * norm(values[j][head]) ** policy.value_norm * weight

        scores = per_head(case, worth)
        for head, distances in zip(scores, outliers(case, layer, policy.ridge, visual)):
            for j in old:
                head[case.newest[j]] = max(head[case.newest[j]], head[j])
                head[j] *= -1
            level = policy.prior * mean([head[j] for j in visual])
            usual = mean([distances[j] for j in visual])
            for j in visual:
                head[j] += level * distances[j] / max(usual, 1e-12)
        return scores

    return verdict(policy, case, score, quota=lambda layer: outliers(case, layer, policy.ridge, visual))


def column_sums(policy, case, layer: int) -> list[list[float]]:
    if policy.importance == "window":
        return votes(case, layer, voting_rows(policy, case), draft=False)
    sums = votes(case, layer, range(case.n), draft=False)
    if policy.importance == "prompt":
        return sums
    return per_head(case, lambda head, j: sums[head][j] / (case.n - j))  # rows j .. n - 1 see key j


@defines("h2o")
@defines("lookm")
def h2o(policy, case):
    return verdict(policy, case, lambda layer: column_sums(policy, case, layer))


@defines("elastic")
def elastic(policy, case):
    def shared(layer: int) -> list[list[float]]:
        sums = column_sums(policy, case, layer)
        return per_head(case, lambda head, j: mean([sums[h][j] for h in case.kv_heads]))

    return verdict(policy, case, shared)


def smooth(values: Sequence[float], size: int) -> list[float]:
    """The mean over the neighbours that there are."""
    reach = size // 2
    return [mean(values[max(0, j - reach) : j + reach + 1]) for j in range(len(values))]


def window_votes(policy, case, layer: int) -> list[list[float]]:
    rows = range(max(0, case.n - policy.window_size), case.n)
    return [smooth(head, policy.kernel_size) for head in votes(case, layer, rows)]


@defines("snapkv")
def snapkv(policy, case, weights=None, score=window_votes):
    return verdict(
        policy,
        case,
        lambda layer: score(policy, case, layer),
        weights,
        recent=lambda k: policy.window_size,
    )


@defines("pyramidkv")
def pyramidkv(policy, case):
    steps = max(1, case.num_layers - 1)
    first, last = 2 - 1 / policy.beta, 1 / policy.beta
    weights = [first + (last - first) * layer / steps for layer in range(case.num_layers)]
    return snapkv(policy, case, weights)


@cache
def alikeness(case: Case, layer: int, head: int) -> tuple[float, list[float]]:
    """A head's mean cosine over pairs of keys, in [0, 1]; each key's cosine with the mean direction."""
    keys = [[x / norm(k[head]) for x in k[head]] for k in numbers(case, "k", layer)]
    pairs = [dot(keys[i], keys[j]) for i in range(case.n) for j in range(i)]
    center = [sum(x) for x in zip(*keys)]
    return min(max(mean(pairs), 0.0), 1.0), [cosine(key, center) for key in keys]


@defines("mixkv")
def mixkv(policy, case):
    def to_unit(values: list[float]) -> list[float]:
        low, high = min(values), max(values)
        return [(x - low) / max(high - low, 1e-12) for x in values]

    def to_level(values: list[float], level: float) -> list[float]:
        values = to_unit(values)
        return [x * level / max(mean(values), 1e-12) for x in values]

    def mixed(policy, case, layer: int) -> list[list[float]]:
        attended, scores = window_votes(policy, case, layer), []
        for head in case.kv_heads:
            importance = to_unit(attended[head])
            level = mean(importance)
            values = to_level([norm(v[head]) for v in numbers(case, "v", layer)], level)
            redundancy, along_mean = alikeness(case, layer, head)
            diversity = to_level([-x for x in along_mean], level)
            scores.append(
                [
                    redundancy * d + (1 - redundancy) * (i + v)
                    for d, i, v in zip(diversity, importance, values)
                ]
            )
        return scores

    return snapkv(policy, case, score=mixed)


@defines("streamingllm")
def streamingllm(policy, case):
    return verdict(policy, case, lambda layer: per_head(case, lambda head, j: j))


@defines("prefixkv")
def prefixkv(policy, case):
    rows = voting_rows(policy, case)
    scores = [votes(case, layer, rows) for layer in range(case.num_layers)]
    total = round(policy.budget * case.n * case.num_layers)
    budgets = cumulative_split([[sum(heads) for heads in zip(*layer)] for layer in scores], total)
    return verdict(policy, case, scores.__getitem__, budgets=budgets)


@defines("aircache")
def aircache(policy, case):
    rows = voting_rows(policy, case)
    scores, strength, skewness = [], [], []
    for layer in range(case.num_layers):
        received = {row: sum(head[row] for head in attention(case, layer, case.n - 1)) for row in rows}
        elite = [row for row in rows if received[row] >= policy.elite * max(received.values())]
        scores.append(votes(case, layer, tuple(elite), draft=False))
        importance = [sum(head[j] for head in scores[-1]) / len(elite) for j in case.visual]
        center = mean(importance)
        deviation = math.sqrt(mean([(x - center) ** 2 for x in importance]))
        strength.append(sum(importance))
        thirds = [((x - center) / deviation) ** 3 if deviation else 0.0 for x in importance]
        skewness.append(max(0.0, mean(thirds)))
    shares = [[x / (sum(values) or 1.0) for x in values] for values in (strength, skewness)]
    return verdict(policy, case, scores.__getitem__, [mean(both) for both in zip(*shares)])


@defines("infinipotv")
def infinipotv(policy, case):
    frames: list[list[int]] = []
    for j in case.tagged(Modality.VIDEO):
        if not frames or case.positions[j][0] != case.positions[frames[-1][-1]][0]:
            frames.append([])
        frames[-1].append(j)
    has_time = len(case.positions[0]) > 1
    comparable = has_time and len(frames) > 1 and len(set(map(len, frames))) == 1
    recent = frames[-max(1, math.floor(policy.recent_frames * len(frames))) :]

    def value_norms(layer: int) -> list[list[float]]:
        values = numbers(case, "v", layer)
        return [smooth([norm(v[head]) for v in values], policy.kernel_size) for head in case.kv_heads]

    def temporal_difference(layer: int) -> list:
        scores, keys = per_head(case, lambda head, j: None), numbers(case, "k", layer)
        for head in case.kv_heads:
            for frame in frames:
                for place, j in enumerate(frame):
                    same = [cosine(keys[j][head], keys[newer[place]][head]) for newer in recent]
                    scores[head][j] = 1.0 if frame in recent else -mean(same)
        return scores

    return verdict(policy, case, value_norms, quota=temporal_difference if comparable else None)


@cache
def expected_weights(case: Case, layer: int, head: int, g: int, sinks: int, future: int) -> list[float]:
    """What a query at the average of the next positions is expected to pay each key of a head."""
    head_dim, last = case.k.shape[-1], max(case.positions[-1])
    ahead = [(last + step,) * 3 for step in range(1, future + 1)]
    rotation = mean_rotation(case.rope, tuple(ahead), head_dim)
    queries = [unrotations(case)[j] @ case.q[layer, j, g].double() for j in range(sinks, case.n)]
    center, covariance = moments(queries or [torch.zeros(head_dim).double()])
    center, covariance = rotation @ center, rotation @ covariance @ rotation.T
    keys = case.k[layer, :, head].double()
    return softmax([float(case.scale * k @ center + case.scale**2 * k @ covariance @ k / 2) for k in keys])


@cache
def mean_rotation(rope: Rotary, positions: tuple, head_dim: int) -> torch.Tensor:
    return mean_matrix([rope.matrix(position, head_dim) for position in positions])


@defines("expected")
def expected(policy, case):
    def score(layer: int) -> list[list[float]]:
        values = numbers(case, "v", layer)

        def times_value(head: int, j: int) -> float:
            paid = [
                expected_weights(case, layer, head, g, policy.sink_tokens, policy.future)[j]
                for g in case.group(head)
            ]
            return (mean(paid) + policy.epsilon) * norm(values[j][head])

        return per_head(case, times_value)

    return verdict(policy, case, score)


@defines("random")
def random(policy, case):
    """Which rows is a matter of record: this seed always keeps these."""

    def noise(layer: int) -> list[list[float]]:
        generator = torch.Generator().manual_seed(65_537 * policy.seed + layer)
        return torch.rand(len(case.kv_heads), case.n, generator=generator).tolist()

    return verdict(policy, case, noise)


@defines("given")
def given(policy, case):
    named = {case.visual[i] for i in policy.visual if i < len(case.visual)}

    def latest(layer: int) -> list[list[float]]:
        return per_head(case, lambda head, j: -1 if j in named and not policy.keep else j)

    return verdict(policy, case, latest, floors=[(sorted(named), float(policy.keep))])


def buckets(k: torch.Tensor, kept: list[int], merge: str, sinks: int, threshold: float) -> list[list[int]]:
    """Per kept row of one head, the positions that its new row is the mean of. ``k`` is ``[n, D]``."""
    n, keys = len(k), k.double().tolist()
    open_rows = [i for i, j in enumerate(kept) if j >= sinks and j != n - 1]
    members = [[j] for j in kept]
    for lost in set(range(n)) - set(kept):
        if merge == "bucket_mean":
            nearest = min(range(len(kept)), key=lambda i: (abs(kept[i] - lost), i))
            taken = nearest in open_rows
        else:
            alike = {i: cosine(keys[lost], keys[kept[i]]) for i in open_rows}
            nearest = min(open_rows, key=lambda i: (-alike[i], i), default=None)
            taken = nearest is not None and alike[nearest] >= threshold
        if taken:
            members[nearest].append(lost)
    return members
