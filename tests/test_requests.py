"""Who owns which rows and cells, from a request's prefill to its end."""

import weakref
from types import SimpleNamespace

import pytest
import torch

from sglang_vlkv.cache.pool import CellPool
from sglang_vlkv.cache.requests import Drafted, Plan, Requests
from sglang_vlkv.kernels.compaction import gather_rows, scatter_rows
from sglang_vlkv.policies.vlcache import VLCache
from sglang_vlkv.scheduler.compaction import Compactor, _counted
from sglang_vlkv.stages.layer import LayerScores, Selection
from sglang_vlkv.stages.merging import merge as merged
from sglang_vlkv.stages.prompt import Modality, Prompt


class Request:
    """Stands for SGLang's ``Req``: known by identity."""


PROMPT = Prompt(torch.tensor([Modality.IMAGE] * 40 + [Modality.TEXT] * 23, dtype=torch.uint8))
COMPACTS = Plan(PROMPT, num_voting=23, max_slots=7)
LEFT_ALONE = Plan(PROMPT, left_alone="no image or video")


def prefill_and_compact(state) -> None:
    state.queries[0] = [torch.zeros(1, 8, 100)]
    state.scores[0] = LayerScores(torch.zeros(2, 63), 5)
    state.kept, state.kept_slots = [torch.arange(4).expand(2, 4)], 4
    state.cells, state.pending = [torch.arange(4)], False


def test_plan_says_whether_it_compacts_and_where_voting_begins():
    assert COMPACTS.compacts and not LEFT_ALONE.compacts
    assert COMPACTS.first_voting == 40


def test_a_state_is_found_by_its_request_and_by_its_row():
    requests, request = Requests(), Request()
    assert requests.get(request) is None
    state = requests.add(request, COMPACTS)
    assert requests.get(request) is state and requests.get(Request()) is None
    assert state.row is None and requests.at_row(3) is None and not list(requests.holders())
    requests.take_row(state, 3)
    assert state.row == 3 and requests.at_row(3) is state and list(requests.holders()) == [state]


def test_a_prompt_is_pending_until_it_is_compacted():
    requests = Requests()
    state, plain = requests.add(Request(), COMPACTS), requests.add(Request(), LEFT_ALONE)
    for row, each in enumerate((state, plain)):
        requests.take_row(each, row)
    assert state.pending and not plain.pending
    prefill_and_compact(state)
    assert not state.pending


def test_a_released_state_gives_up_its_row_and_tensors_and_keeps_what_the_report_needs():
    requests, request = Requests(), Request()
    state = requests.add(request, COMPACTS)
    requests.take_row(state, 3)
    prefill_and_compact(state)
    kept = state.kept
    requests.release_row(state)
    assert requests.at_row(3) is None and not list(requests.holders())
    assert state.row is None and state.cells is None and not state.queries and not state.scores
    assert requests.get(request) is state
    assert state.kept is kept and state.kept_slots == 4


def test_drafted_queries_are_there_until_the_weights_may_be_others():
    requests, policy = Requests(), VLCache(draft_tokens=2)
    draft = requests.add(Request(), Plan(PROMPT, policy, writes_draft="d"))
    reader = requests.add(Request(), Plan(PROMPT, policy, reads_draft="d"))
    requests.take_row(draft, 0)
    draft.drafted = {0: [torch.ones(1, 8, 100)] * 3}
    requests.leave_draft(draft, [5, 6, 7])
    assert requests.draft_for(reader).tokens == (5, 6)
    assert requests.draft_for(reader).queries[0].shape == (2, 8, 100)
    requests.drop_drafts()
    assert requests.draft_for(reader) == Drafted()


def test_the_oldest_drafts_make_room_and_the_newest_stays(monkeypatch, caplog):
    monkeypatch.setattr("sglang_vlkv.cache.requests.MAX_DRAFT_BYTES", 7 * 8 * 100 * 4)
    requests, readers = Requests(), []
    for name, count in (("a", 3), ("b", 3), ("c", 4), ("d", 20)):
        draft = requests.add(Request(), Plan(PROMPT, VLCache(draft_tokens=count), writes_draft=name))
        readers.append(requests.add(Request(), Plan(PROMPT, VLCache(draft_tokens=count), reads_draft=name)))
        draft.drafted = {0: [torch.ones(1, 8, 100)] * count}
        requests.leave_draft(draft, list(range(count + 1)))
        found = [len(requests.draft_for(reader).tokens) for reader in readers]
        assert found == {"a": [3], "b": [3, 3], "c": [0, 3, 4], "d": [0, 0, 0, 20]}[name]
    assert caplog.text.count("votes without it") == 3


def test_queries_with_a_gap_are_left_by_no_draft():
    requests = Requests()
    draft = requests.add(Request(), Plan(PROMPT, VLCache(draft_tokens=2), writes_draft="d"))
    reader = requests.add(Request(), Plan(PROMPT, VLCache(draft_tokens=2), reads_draft="d"))
    draft.drafted = {0: [torch.ones(1, 8, 100)] * 2, 1: [torch.ones(1, 8, 100)]}
    requests.leave_draft(draft, [5, 6, 7])
    assert requests.draft_for(reader) == Drafted()


def test_the_last_token_of_a_draft_never_votes():
    """Overlap scheduling may have computed its query, and may not."""
    requests = Requests()
    draft = requests.add(Request(), Plan(PROMPT, VLCache(draft_tokens=8), writes_draft="d"))
    reader = requests.add(Request(), Plan(PROMPT, VLCache(draft_tokens=8), reads_draft="d"))
    for queries in (1, 2):
        draft.drafted = {0: [torch.ones(1, 8, 100)] * queries}
        requests.leave_draft(draft, [5, 6])
        assert requests.draft_for(reader).queries[0].shape == (1, 8, 100)
    requests.drop_drafts()
    requests.leave_draft(draft, [5])
    assert requests.draft_for(reader) == Drafted()


def test_a_retracted_request_starts_afresh_in_another_row():
    requests = Requests()
    state = requests.add(Request(), COMPACTS)
    requests.take_row(state, 3)
    prefill_and_compact(state)
    requests.release_row(state)
    requests.take_row(state, 5)
    assert requests.at_row(5) is state and requests.at_row(3) is None
    assert state.pending and not state.kept and state.kept_slots == 0
    assert not state.queries and not state.scores


def test_a_prefill_interrupted_between_chunks_leaves_nothing_to_the_next():
    requests = Requests()
    state = requests.add(Request(), COMPACTS)
    requests.take_row(state, 3)
    state.queries[0] = [torch.zeros(1, 8, 100)]
    requests.release_row(state)
    requests.take_row(state, 3)
    assert not state.queries


def test_releasing_twice_leaves_the_rows_next_owner_alone():
    requests = Requests()
    first, second = (requests.add(Request(), COMPACTS) for _ in range(2))
    requests.take_row(first, 3)
    requests.release_row(first)
    requests.take_row(second, 3)
    requests.release_row(first)
    assert requests.at_row(3) is second and second.row == 3


def test_a_request_that_never_held_a_row_can_be_released():
    requests, request = Requests(), Request()
    requests.release_row(requests.add(request, COMPACTS))
    assert not list(requests.holders())


def test_a_state_ends_with_its_request():
    requests, request = Requests(), Request()
    state = requests.add(request, COMPACTS)
    requests.take_row(state, 3)
    requests.release_row(state)
    kept = weakref.ref(state)
    del state
    assert requests.get(request) is kept() is not None
    del request
    assert kept() is None


LAYERS, SIZE, HEADS, DIM = 5, 63, 2, 100


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def pool(request) -> CellPool:
    return CellPool(SIZE, 1, request.param, HEADS, DIM, LAYERS, "cpu", enable_memory_saver=False)


def test_a_cell_is_the_row_of_its_layer_and_slot(pool):
    rows = SIZE + 1  # slot 0 is SGLang's padding
    assert len(pool.k_buffer) == len(pool.v_buffer) == LAYERS
    pool.storage.copy_(torch.randn(pool.storage.shape))
    for layer in range(LAYERS):
        cells = torch.arange(rows) + layer * pool.cells_per_layer
        for buffers, flat in ((pool.k_buffer, pool.k_cells), (pool.v_buffer, pool.v_cells)):
            assert buffers[layer].shape == (rows, HEADS, DIM) and buffers[layer].is_contiguous()
            assert torch.equal(flat[cells], buffers[layer])
            flat[cells[7]] = layer
            assert (buffers[layer][7] == layer).all()
    assert not torch.equal(pool.k_cells[cells], pool.v_cells[cells])


def test_sglang_finds_its_buffers_and_their_size(pool):
    for layer in range(LAYERS):
        assert pool.get_key_buffer(layer).data_ptr() == pool.k_buffer[layer].data_ptr()
        assert pool.get_value_buffer(layer).data_ptr() == pool.v_buffer[layer].data_ptr()
    assert sum(pool.get_kv_size_bytes()) == pool.storage.nbytes == pool.slot_bytes * (SIZE + 1)
    assert pool.slot_bytes == 2 * LAYERS * HEADS * DIM * pool.dtype.itemsize


def random_splits():
    """Ugly splits of kept rows over layers, with the fewest slots that hold them."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        num_kept = torch.randint(1, 40, (LAYERS,), generator=generator).tolist()
        num_slots = -(-sum(num_kept) // LAYERS)
        yield num_kept, 1 + torch.randperm(SIZE, generator=generator)[:num_slots]
    yield [1] * LAYERS, torch.tensor([SIZE])
    yield [1, 1, 1, 1, 60], torch.arange(1, 14)


def test_packed_cells_are_distinct_and_within_their_slots_layer_after_layer(pool):
    for num_kept, slots in random_splits():
        cells = pool.packed_cells(slots, num_kept)
        assert [len(layer) for layer in cells] == num_kept
        assert all(layer.dtype == torch.int32 for layer in cells)
        used = torch.cat(cells)
        assert len(used.unique()) == sum(num_kept)
        bases = torch.arange(LAYERS)[:, None] * pool.cells_per_layer
        owned = (bases + slots).flatten()  # all of one layer's buffer, then the next's
        assert torch.equal(used.long(), owned[: len(used)])


def test_packed_rows_come_back_and_no_other_slot_is_touched(pool):
    for num_kept, slots in list(random_splits())[:10]:
        pool.storage.fill_(torch.nan)
        cells = pool.packed_cells(slots, num_kept)
        rows = [torch.randn(k, HEADS, DIM).to(pool.dtype) for k in num_kept]
        both = torch.cat(rows)
        scatter_rows(pool.k_cells, pool.v_cells, torch.cat(cells), torch.stack([both, -both]))
        for at, layer_rows in zip(cells, rows):
            everything = torch.arange(len(at)).expand(HEADS, -1)
            read = gather_rows(pool.k_cells, pool.v_cells, at, everything, [len(at)], 0)
            assert torch.equal(read, torch.stack([layer_rows, -layer_rows]))
        others = torch.ones(SIZE + 1, dtype=torch.bool).index_fill(0, slots, False)
        assert pool.storage[:, :, others].isnan().all()
        assert int((~pool.storage.isnan()).sum()) == 2 * sum(num_kept) * HEADS * DIM


def test_a_gpu_servers_counts_are_those_of_a_cpu_server():
    """It leaves them in tensors, which are read once for all layers."""
    scores, profile = torch.zeros(2, 63), torch.arange(4) + 2**53
    numbers = _counted(LayerScores(scores, 5, 2**40, profile=profile))
    assert [x.tolist() for x in numbers] == [[5, 2**40], profile.tolist()]
    for entries in (2**40, torch.tensor(2**40)):
        tensors = _counted(LayerScores(scores, torch.tensor(5), entries, profile=profile))
        assert all(map(torch.equal, numbers, tensors))
    assert [x.tolist() for x in _counted(LayerScores(scores))] == [[0, 0], []]
    assert torch.cat(_counted(LayerScores(scores))).dtype == torch.int64


@pytest.mark.parametrize("merge", ["none", "bucket_mean", "similar"])
@pytest.mark.parametrize("num_fixed", [[7, 2, 5, 1, 9], [3, 0, 5, 1, 8]])
def test_kept_rows_of_all_layers_come_to_lie_in_their_cells(pool, merge, num_fixed):
    """What slides is left out of a twin's rows, layer by layer."""
    policy, num_kept = VLCache(merge=merge), [7, 2, 5, 1, 9]
    pool.storage.copy_(torch.randn(pool.storage.shape))
    slots = torch.randperm(SIZE)[:20] + 1
    kept = [torch.stack([torch.randperm(20)[:k].sort().values for _ in range(HEADS)]) for k in num_kept]
    compactor = object.__new__(Compactor)
    compactor._pool = pool
    rows = compactor._rows(policy, slots, Selection(kept, None))
    expected = []
    for layer, own in enumerate(kept):
        k, v = pool.k_buffer[layer][slots], pool.v_buffer[layer][slots]
        if merge == "none":
            expected.append(torch.stack([x[own.t(), torch.arange(HEADS)] for x in (k, v)]))
        else:
            expected.append(torch.stack(merged(policy, k, v, own)))
    assert torch.equal(rows, torch.cat(expected, dim=1))
    twin = SimpleNamespace(num_rows=num_fixed)
    item = SimpleNamespace(rows=rows, num_kept=num_kept)
    compactor._fill(twin, torch.arange(1, 1 - (-sum(num_fixed) // LAYERS)), item)
    for layer, (at, own) in enumerate(zip(twin.cells, expected, strict=True)):
        assert len(at) == num_fixed[layer]
        assert torch.equal(pool.k_cells[at], own[0, : len(at)])
        assert torch.equal(pool.v_cells[at], own[1, : len(at)])


def test_values_of_another_size_are_refused():
    with pytest.raises(ValueError, match="K and V heads of one size.*--kv-policy none"):
        CellPool(SIZE, 1, torch.float32, HEADS, DIM, 1, "cpu", False, v_head_dim=DIM + 1)


def test_a_cache_that_the_checkpoint_quantises_is_refused():
    """Unlike --kv-cache-dtype fp8_e4m3, known only when the pool is made."""
    with pytest.raises(ValueError, match="float8_e4m3fn KV cache.*--kv-cache-dtype bfloat16"):
        CellPool(SIZE, 1, torch.float8_e4m3fn, HEADS, DIM, LAYERS, "cpu", False)


def test_more_cells_than_an_int32_counts_are_refused(monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda shape, **_: torch.empty(1, dtype=torch.int8).expand(shape))
    with pytest.raises(ValueError, match="int32; lower --max-total-tokens"):
        CellPool(2**28, 1, torch.int8, 1, 1, 4, "cpu", enable_memory_saver=False)
