"""The index of twins: what is found for a path, how much of it is usable, and what is left behind."""

from __future__ import annotations

import random
from array import array
from itertools import count

import pytest
import torch

from sglang_vlkv.cache.twins import BLOCK, MOST_ALIKE, Hit, Slides, Twin, Twins

LAYERS, HEADS = 3, 2
SPACE = ("VLCache(budget=0.1)", None, None)
node_ids = count(1)


def path(length: int, seed: int = 0) -> array:
    rng = random.Random(seed)
    return array("q", [rng.randrange(1000) for _ in range(length)])


def make(
    tokens: array,
    start: int = 0,
    positions: list[list[list[int]]] | None = None,
    parent: Twin | None = None,
    parent_rows: list[int] | None = None,
    **fields,
) -> Twin:
    """A twin of ``tokens[start:]`` that keeps ``positions`` ``[layer][head]``; all by default."""
    if positions is None:
        positions = [[list(range(start, len(tokens)))] * HEADS] * LAYERS
    positions = [torch.tensor(layer, dtype=torch.int32) for layer in positions]
    own = [layer.shape[1] for layer in positions]
    fresh = torch.arange(sum(own), dtype=torch.int32) + 10_000 * next(node_ids)
    slots = torch.arange(-(-sum(own) // LAYERS))
    fields = {"space": SPACE} | fields
    twin = Twin(
        tokens=tokens[start:], start=start, num_prompt=len(tokens), cells=list(fresh.split(own)), positions=positions,
        slots=slots, parent=parent, parent_rows=parent_rows, lossy_end=len(tokens), **fields,
    )  # fmt: skip
    twin.node = next(node_ids)
    return twin


def added(twins: Twins, tokens: array, *args, **fields) -> Twin:
    twin = make(tokens, *args, **fields)
    twins.name(twin)
    twins.add(twin)
    return twin


def found(twins: Twins, tokens: array, limit: int | None = None, space: tuple = SPACE) -> list[Hit]:
    return list(twins.find(space, tokens, len(tokens) if limit is None else limit))


# ---- What is found ----


def test_the_longest_common_beginning_comes_first_and_shorter_whole_ones_follow():
    twins = Twins()
    short, long = added(twins, path(100)), added(twins, path(200))
    other = added(twins, path(64) + path(100, seed=1))
    hits = found(twins, path(250))
    assert (hits[0].twin, hits[0].covered, hits[0].rows, hits[0].rows_lost) == (long, 200, None, 0)
    assert [hit.twin for hit in hits] == [long, short]
    hits = found(twins, path(150))
    assert (hits[0].twin, hits[0].covered) == (long, 150)
    assert (hits[-1].twin, hits[-1].covered, hits[-1].rows) == (short, 100, None)
    hits = found(twins, path(64) + path(99, seed=1) + path(9))
    assert (hits[0].twin, hits[0].covered) == (other, 163)


def test_a_path_that_is_covered_whole_comes_before_a_cut_one():
    twins = Twins()
    long, short = added(twins, path(200)), added(twins, path(100))
    hits = found(twins, path(100) + path(50, seed=1))
    assert [(hit.twin, hit.covered, hit.rows) for hit in hits[:2]] == [
        (short, 100, None),
        (long, 100, [100] * LAYERS),
    ]


def test_less_than_a_block_is_nothing():
    twins = Twins()
    added(twins, path(BLOCK - 1))
    twin = added(twins, path(BLOCK))
    assert not found(twins, path(BLOCK - 1) + path(20, seed=1))
    assert [hit.twin for hit in found(twins, path(BLOCK))] == [twin]
    assert not found(Twins(), path(500))


def test_spaces_never_mix():
    twins = Twins()
    spaces = [SPACE, ("VLCache(budget=0.2)", None, None), (SPACE[0], "lora", None), (SPACE[0], None, "salt")]
    mine = {space: added(twins, path(100), space=space) for space in spaces}
    for space in spaces:
        assert {hit.twin for hit in found(twins, path(120), space=space)} == {mine[space]}
    assert not found(twins, path(120), space=(*SPACE, "draft"))


def test_of_many_that_begin_alike_the_newest_are_looked_at():
    twins = Twins()
    all_alike = [added(twins, path(90) + path(30, seed=i)) for i in range(1, MOST_ALIKE + 5)]
    hits = found(twins, path(90) + path(30, seed=99))
    assert {hit.twin for hit in hits} == set(all_alike[-MOST_ALIKE:])
    assert {hit.covered for hit in hits} == {90}


def test_what_ends_with_its_requests_is_only_shared():
    twins = Twins()
    hidden = added(twins, path(100), lasting=False)
    assert not found(twins, path(100))
    assert twins.same(make(path(100))) is hidden


# ---- How much of it is usable ----


def test_a_shorter_prefix_uses_the_rows_that_every_head_has_of_it():
    """Per layer as many as the head with the fewest; what the others have beyond is lost."""
    twins = Twins()
    positions = [
        [[0, 40, 60, 99], [0, 1, 2, 3]],  # before 50: 2 and 4 of each head
        [[10, 20, 49], [50, 60, 70]],  # 3 and 0
        [[49, 50], [0, 49]],  # 1 and 2
    ]
    added(twins, path(100), 0, positions)
    [hit] = found(twins, path(50) + path(40, seed=1))
    assert (hit.covered, hit.rows, hit.rows_lost) == (50, [2, 0, 1], 2 + 3 + 1)
    assert [len(cells) for cells in hit.cells()] == [2, 0, 1]
    kept = [layer.tolist() for layer in hit.positions(100)]
    assert kept == [[[0, 40], [0, 1]], [[], []], [[49], [0]]]


def test_a_path_that_is_covered_whole_uses_every_row():
    twins = Twins()
    twin = added(twins, path(100), 0, [[[5, 50, 99], [1, 2, 3]]] * LAYERS)
    hit = found(twins, path(130))[0]
    assert (hit.covered, hit.rows, hit.rows_lost) == (100, None, 0)
    assert all(torch.equal(a, b) for a, b in zip(hit.cells(), twin.cells, strict=True))
    assert [layer.tolist() for layer in hit.positions(130)] == [[[5, 50, 99], [1, 2, 3]]] * LAYERS


@pytest.mark.parametrize("whole", [False, True])
def test_a_repeated_prompt_uses_every_row_though_its_last_token_is_computed_again(whole):
    twins = Twins()
    added(twins, path(100), 0, [[[5, 99], [98, 99]]] * LAYERS, all_or_nothing=whole)
    hit = found(twins, path(100), limit=99)[0]
    assert (hit.covered, hit.rows, hit.rows_lost) == (99, None, 0)
    # A longer prompt that may not be covered so far is no repetition, nor is a lower limit.
    for tokens, limit in ((path(130), 99), (path(100), 98)):
        hits = found(twins, tokens, limit)
        assert [hit.covered for hit in hits] == ([] if whole else [limit])
        assert whole or (hits[0].rows == [1, 1, 1] if limit == 99 else hits[0].rows == [0, 0, 0])


def test_merged_rows_serve_their_full_path_only():
    twins = Twins()
    twin = added(twins, path(100), all_or_nothing=True)
    assert not found(twins, path(99) + path(40, seed=1))
    assert found(twins, path(100) + path(40, seed=1))[0] == Hit(twin, 100)
    assert not found(twins, path(140), limit=99)


def test_a_piece_is_used_with_what_it_stands_on():
    twins = Twins()
    first = added(twins, path(100), 0, [[[3, 70], [4, 99]]] * LAYERS)
    second = added(twins, path(160), 100, None, first)
    hit = found(twins, path(130) + path(40, seed=1))[0]
    assert (hit.twin, hit.covered, hit.rows) == (second, 130, [30, 30, 30])
    assert [len(cells) for cells in hit.cells()] == [32] * LAYERS
    assert hit.positions(110)[0].tolist() == [[3, 70, *range(100, 110)], [4, 99, *range(100, 110)]]
    hit = found(twins, path(80) + path(40, seed=1))[0]
    assert (hit.twin, hit.covered, hit.rows, hit.rows_lost) == (first, 80, [1, 1, 1], 3)


def test_a_piece_on_a_part_of_another_sees_that_part():
    """Its positions and cells leave out the rows that a shorter prefix could not use."""
    twins = Twins()
    first = added(twins, path(100), 0, [[[3, 70, 90], [4, 5, 80]]] * LAYERS)
    tokens = path(75) + path(60, seed=1)
    cut = found(twins, tokens)[0]
    assert cut.rows == [2] * LAYERS
    branch = added(twins, tokens, 75, [[[80, 100], [90, 134]]] * LAYERS, first, cut.rows)
    hit = found(twins, tokens + path(9))[0]
    assert (hit.twin, hit.covered) == (branch, 135)
    assert [len(cells) for cells in hit.cells()] == [4] * LAYERS
    assert hit.positions(200)[1].tolist() == [[3, 70, 80, 100], [4, 5, 90, 134]]
    assert torch.equal(hit.cells()[1], torch.cat([first.cells[1][:2], branch.cells[1]]))
    assert branch.chain() == [first, branch]
    assert branch.num_slots == len(first.slots) + len(branch.slots)


def test_rows_are_missing_before_the_last_compaction_only():
    twin = make(path(160))
    twin.lossy_end = 100
    assert Hit(twin, 160).lossy_end == 100 and Hit(twin, 60, [1] * LAYERS).lossy_end == 60


# ---- What is kept ----


def test_removal_leaves_nothing_of_a_twin():
    twins = Twins()
    first = added(twins, path(100))
    second = added(twins, path(160), 100, None, first)
    gone = added(twins, path(100, seed=2), lasting=False)
    assert len(twins) == 3 and twins.num_slots == 260 and first.children == 1 and not first.is_idle
    twins.remove(gone.node)
    assert twins.evictions == 0, "what ends with its requests makes no room"
    assert second in twins and gone not in twins and not found(twins, path(100, seed=2))
    twins.remove(second.node)
    assert found(twins, path(160))[0] == Hit(first, 100)
    assert first.is_idle and twins.same(make(path(160), 100, None, first)) is None
    twins.remove(12345678)  # a node of exact KV
    twins.remove(first.node)
    assert (len(twins), twins.num_slots, twins.evictions) == (0, 0, 2)
    assert not found(twins, path(160)) and not twins.with_exact() and not list(twins.by_age())
    indices = twins._same, twins._by_block, twins._by_end, twins._ending
    assert not any(indices), "an index leaks"


def test_clearing_forgets_all_and_keys_stay_unique():
    twins = Twins()
    before = added(twins, path(100))
    twins.clear()
    assert not len(twins) and not twins.num_slots and not found(twins, path(100)) and before not in twins
    assert twins.same(make(path(100))) is None and not twins.with_exact()
    assert added(twins, path(100)).key != before.key


def test_keys_chain_and_are_no_tokens():
    twins = Twins()
    first = added(twins, path(100))
    second = added(twins, path(160), 100, None, first)
    assert len(first.key) == len(first.slots) and len(second.key) == second.num_slots
    assert second.key[: len(first.key)] == first.key
    assert all(map(twins.is_name, second.key)) and len(set(second.key)) == 2
    assert not twins.is_name(0) and not twins.is_name(max(second.key) + 1)


def test_the_least_recently_used_go_first_and_a_chain_is_used_as_one():
    twins = Twins()
    a, b = added(twins, path(100)), added(twins, path(100, seed=1))
    c = added(twins, path(160), 100, None, a)
    assert list(twins.by_age()) == [a, b, c]
    twins.use(c)
    assert list(twins.by_age()) == [b, a, c]
    twins.use(b)
    assert list(twins.by_age()) == [a, c, b]
    for twin in twins.by_age():  # may be changed meanwhile
        twins.remove(twin.node)
    assert not len(twins)


def test_the_same_rows_are_one_twin():
    twins = Twins()
    twin = added(twins, path(100))
    assert twins.same(make(path(100))) is twin
    assert twins.same(make(path(100), space=(SPACE[0], "lora", None))) is None
    assert twins.same(make(path(101))) is None and twins.same(make(path(99) + path(1, seed=5))) is None
    child = added(twins, path(160), 100, None, twin)
    assert twins.same(make(path(160), 100, None, twin)) is child
    assert twins.same(make(path(160), 100, None, make(path(100)))) is None, "another parent"
    assert twins.same(make(path(160), 99, None, twin, [90] * LAYERS)) is None, "less of the parent"
    assert twins.same(make(path(160), 101, None, twin)) is None
    slides = Slides([], [1] * LAYERS, torch.arange(1), [], 1)
    assert twins.same(make(path(100), slides=slides)) is None
    sliding = added(twins, path(70), slides=slides)
    assert sliding in twins and twins.same(make(path(70))) is None


def test_paths_are_compared_where_their_hashes_are_equal(monkeypatch):
    monkeypatch.setattr("sglang_vlkv.cache.twins._identity", lambda twin: 0)
    twins = Twins()
    twin = added(twins, path(100))
    assert twins.same(make(path(100, seed=1))) is None and twins.same(make(path(100))) is twin


def test_exact_kv_is_doubled_by_lasting_pieces_from_the_beginning():
    twins = Twins()
    first = added(twins, path(100))
    added(twins, path(160), 100, None, first)
    added(twins, path(100, seed=1), lasting=False)
    added(twins, path(100, seed=2), lasting=False)
    last = added(twins, path(100, seed=3))
    assert twins.with_exact() == [first, last]
    twins.exact_is_gone(first)
    assert twins.with_exact() == [last]
    twins.exact_is_there(first)
    assert twins.with_exact() == [last, first]


# ---- Against a search that compares everything ----


def common(a: array, b: array) -> int:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


def whole_path(twin: Twin) -> array:
    before = array("q") if twin.parent is None else whole_path(twin.parent)
    return before[: twin.start] + twin.tokens


def naive(twin: Twin, tokens: array, limit: int) -> tuple[int, list[int] | None, int] | None:
    """``covered``, ``rows`` and ``rows_lost``, by the words of the contract."""
    shared = common(whole_path(twin), tokens)
    repeated = whole_path(twin) == tokens and limit == len(tokens) - 1
    if shared == twin.end and (twin.end <= limit or repeated):
        return min(twin.end, limit), None, 0
    covered = min(shared, limit)
    if twin.all_or_nothing or covered <= twin.start:
        return None
    rows, lost = [], 0
    for layer in twin.positions:
        have = [sum(position < covered for position in head) for head in layer.tolist()]
        rows.append(min(have))
        lost += sum(have) - len(have) * min(have)
    return covered, rows, lost


def test_random_paths_against_a_naive_search():
    rng = random.Random(1)
    looked_up = cut = repeated = 0
    for _ in range(60):
        twins, alive = Twins(), []
        for step in range(25):
            start, parent = 0, rng.choice(alive) if alive and rng.random() < 0.7 else None
            before = path(0) if parent is None else whole_path(parent)
            if parent is not None and rng.random() < 0.5:
                before, parent = before[: rng.randint(1, len(before))], None  # branches off
            start = 0 if parent is None else parent.end
            tokens = before + path(rng.randint(1, 90), seed=rng.randrange(10**9))
            positions = []
            for _ in range(LAYERS):
                size = rng.randint(1, len(tokens) - start)
                heads = [sorted(rng.sample(range(start, len(tokens)), size)) for _ in range(HEADS)]
                positions.append(heads)
            space = rng.choice([SPACE, (*SPACE[:2], "salt")]) if parent is None else parent.space
            alive.append(
                added(twins, tokens, start, positions, parent, space=space, all_or_nothing=rng.random() < 0.2)
            )
            if rng.random() < 0.2:
                idle = [twin for twin in alive if not twin.children]
                gone = rng.choice(idle)
                alive.remove(gone)
                twins.remove(gone.node)
        assert len(twins) == len(alive)
        assert twins.num_slots == sum(len(twin.slots) for twin in alive)
        for _ in range(20):
            like = whole_path(rng.choice(alive)) if rng.random() < 0.9 else path(50, seed=rng.randrange(99))
            tokens = like[: rng.randint(1, len(like))] if rng.random() < 0.5 else like
            if rng.random() < 0.5:
                tokens = tokens + path(rng.randint(1, 60), seed=rng.randrange(10**9))
            limit = rng.choice([len(tokens), len(tokens) - 1, rng.randint(0, len(tokens))])
            mine = [twin for twin in alive if twin.space == SPACE]
            expected = {twin: naive(twin, tokens, limit) for twin in mine}
            hits = found(twins, tokens, limit)
            for hit in hits:
                assert (hit.covered, hit.rows, hit.rows_lost) == expected[hit.twin]
            usable = {twin: e for twin, e in expected.items() if e is not None}
            whole = {t for t, e in usable.items() if e[1] is None and t.end >= BLOCK}
            assert {hit.twin for hit in hits if hit.rows is None} == whole
            assert len({hit.twin for hit in hits}) == len(hits)
            most = max((covered for covered, _, _ in usable.values()), default=0)
            assert most < BLOCK or max((hit.covered for hit in hits), default=0) > most - BLOCK
            if not hits:
                continue
            assert hits[0].covered == max(hit.covered for hit in hits)
            looked_up += 1
            cut += any(hit.rows is not None for hit in hits)
            repeated += any(hit.rows is None and hit.covered == hit.twin.end - 1 for hit in hits)
    assert looked_up > 400 and cut > 100 and repeated > 15, (looked_up, cut, repeated)
