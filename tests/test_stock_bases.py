"""The GPU backends over the stock backends that they really come before: made, asked what a CUDA graph
asks of them, and run. SGLang's CUDA and Triton calls, and no more, are done in torch."""

import importlib.machinery
import sys
from contextlib import ExitStack
from pkgutil import resolve_name
from types import ModuleType, SimpleNamespace

import pytest
import sglang.srt.utils
import torch
from sglang.kernels.ops.attention import flash_attention_v3
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.mem_cache import kv_index_translator
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.runtime_context import get_context, get_parallel
from torch.nn.functional import scaled_dot_product_attention

from sglang_vlkv.attention import device
from sglang_vlkv.kernels.ragged_attention import decode, indices
from sglang_vlkv.kernels.ragged_attention.triton import RaggedDecode, ragged_extend
from sglang_vlkv.options.backends import ATTENTION
from tests.test_device_backends import DIM, GROUP, HEADS, LAYERS, SLOTS, World

STOCK = {
    "fa3": "FlashAttentionBackend",
    "flashinfer": "FlashInferAttnBackend",
    "triton": "TritonAttnBackend",
}
pytestmark = pytest.mark.usefixtures("one_thread")


def attention(q, keys, values, scale: float) -> torch.Tensor:
    """The new tokens ``q`` ``[T, Hq, D]`` are the last of ``keys`` and ``values`` ``[n, H, D]``."""
    seen = torch.ones(len(q), len(keys), dtype=torch.bool).tril(len(keys) - len(q))
    q, keys, values = (x.transpose(0, 1)[None] for x in (q, keys, values))
    out = scaled_dot_product_attention(q, keys, values, attn_mask=seen, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def fill_indices(rows, row_ids, lengths, indptr, starts, out, stride, **_) -> None:
    """``create_flashinfer_kv_indices_triton``."""
    for row, length, begin in zip(row_ids.tolist(), lengths.tolist(), indptr.tolist()):
        out[begin : begin + length] = rows.view(-1)[row * stride : row * stride + length]


def flash_attn_with_kvcache(q, k_cache, v_cache, *others, **_) -> torch.Tensor:
    """FlashAttention 3's, by its arguments' places in SGLang's call."""
    lengths, table, bounds, scale = others[5], others[8], others[9].tolist(), others[16]
    outs = []
    for b, (length, begin, end) in enumerate(zip(lengths.tolist(), bounds, bounds[1:])):
        slots = table[b, :length].long()
        outs.append(attention(q[begin:end], k_cache[slots, 0], v_cache[slots, 0], scale))
    return torch.cat(outs)


def extend_attention(q, k, v, out, k_buffer, v_buffer, qo_indptr, kv_indptr, kv_indices, *rest, **_):
    """SGLang's Triton extend: a cached prefix, then the new tokens."""
    bounds, cached = qo_indptr.tolist(), kv_indptr.tolist()
    for b, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        slots = kv_indices[cached[b] : cached[b + 1]].long()
        keys, values = torch.cat([k_buffer[slots], k[begin:end]]), torch.cat([v_buffer[slots], v[begin:end]])
        out[begin:end] = attention(q[begin:end], keys, values, rest[6])


class Wrapper:
    """FlashInfer's, of a prefill with its rows in pages of one or in a tensor."""

    def __init__(self, *_, **__) -> None:
        self._jit_module = None

    def begin_forward(self, qo_indptr, kv_indptr, *rest, **_) -> None:
        self.bounds, self.cached, self.rest = qo_indptr.tolist(), kv_indptr.tolist(), rest

    plan = begin_forward

    def forward(self, q, k, v=None, *, sm_scale, **_) -> torch.Tensor:
        if v is None:  # paged
            slots = self.rest[0][: self.cached[-1]].long()
            k, v = (x.view(-1, HEADS, DIM)[slots] for x in k)
        pieces = zip(self.bounds, self.bounds[1:], self.cached, self.cached[1:])
        return torch.cat([attention(q[b:e], k[s:t], v[s:t], sm_scale) for b, e, s, t in pieces])


class Planned:
    """FlashInfer's kernels behind compacted rows, from the same lists; decode is our Triton kernel."""

    def __init__(self, *shape) -> None:
        pass

    def plan(self, qo_indptr, indptr) -> None:
        self.bounds, self.ends = qo_indptr.tolist(), indptr.tolist()

    def run(self, layer, q, k, v, qo_indptr, indptr, indices, scale, *, causal, out) -> None:
        assert causal and self.bounds == qo_indptr.tolist()
        assert self.ends[layer] == (indptr[layer] - indptr[layer, 0]).tolist()
        ragged_extend(q, k, v, qo_indptr, indptr[layer], indices, scale, len(q), out)


@pytest.fixture
def context():
    with ExitStack() as stack:
        stack.enter_context(get_parallel().override(attn_dcp_rank=0, attn_tp_rank=0))
        yield stack


@pytest.fixture(params=STOCK)
def name(request, monkeypatch, context):
    """A backend's, with all that it imports and calls of CUDA in torch."""
    name = request.param
    for module in ("sglang.srt.layers.attention", "sglang_vlkv.attention"):
        for stem in ("flashattention", "flashinfer", "flashattention_backend", "flashinfer_backend"):
            monkeypatch.setitem(sys.modules, f"{module}.{stem}", None)  # gone again afterwards
            monkeypatch.delitem(sys.modules, f"{module}.{stem}")
    stub, kernels = ModuleType("sgl_kernel"), ModuleType("sgl_kernel.flash_attn")
    stub.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None)
    stub.merge_state_v2 = kernels.flash_attn_varlen_func = kernels.get_scheduler_metadata = None
    kernels.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "sgl_kernel", stub)
    monkeypatch.setitem(sys.modules, "sgl_kernel.flash_attn", kernels)
    monkeypatch.setattr(flash_attention_v3, "_is_fa3_supported", lambda: True)
    monkeypatch.setattr(flash_attention_v3, "_load_fa3_kernels", flash_attention_v3._load_fa3_kernel_from_sgl)
    monkeypatch.setattr(sglang.srt.utils, "is_flashinfer_available", lambda: True)
    launched = type("Launched", (), {"__getitem__": lambda self, grid: fill_indices})()
    monkeypatch.setattr(kv_index_translator, "create_flashinfer_kv_indices_triton", launched)
    context.enter_context(get_context().override_server_args(attention_backend=name, device="cpu"))
    return name


@pytest.fixture
def world(name, monkeypatch) -> World:
    """With the backend that a server on a GPU would run."""
    monkeypatch.setattr(device, "captured_sizes", lambda runner: [1, 2, 4])
    monkeypatch.setattr(device, "leaves_queries", lambda: False)
    monkeypatch.setattr(indices, "PROGRAMS", LAYERS)  # the interpreter runs them one after another
    monkeypatch.setattr(decode, "HOPPER", (1, 233_472))
    world = World()
    runner = world.runner
    allocator = TokenToKVPoolAllocator(SLOTS, torch.float32, "cpu", world.pool, need_sort=False)
    runner.model_config = SimpleNamespace(
        num_attention_heads=HEADS * GROUP,
        get_max_num_attention_heads=lambda: HEADS * GROUP,
        get_num_kv_heads=lambda *sizes: HEADS,
        head_dim=DIM,
        v_head_dim=DIM,
        swa_v_head_dim=DIM,
        context_len=2048,
        dtype=torch.float32,
        attention_arch=AttentionArch.MHA,
        attention_chunk_size=None,
        is_encoder_decoder=False,
        is_multimodal=True,
        is_local_attention_model=False,
        is_draft_model=False,
        linear_attn_registry_result=None,
        hf_config=SimpleNamespace(architectures=["Qwen2ForCausalLM"], get_text_config=SimpleNamespace),
        hf_text_config=SimpleNamespace(num_attention_heads=HEADS * GROUP),
    )
    others = dict(
        token_to_kv_pool_allocator=allocator,
        sliding_window_size=None,
        decode_num_tokens_per_req=lambda: 1,
        is_draft_worker=False,
        is_hybrid_swa=False,
        dtype=torch.float32,
        kv_cache_dtype=torch.float32,
        kv_cache_dtype_str="auto",
        page_size=1,
        gpu_id=0,
        spec_algorithm=SimpleNamespace(is_dspark=bool),
        server_args=get_context().server_args,
        prefill_attention_backend_str=name,
        decode_attention_backend_str=name,
    )
    vars(runner).update(others)
    runner.kv_index_translator = kv_index_translator.KVIndexTranslator(
        req_to_token=world.rows.req_to_token,
        token_to_kv_pool_allocator=allocator,
        token_to_kv_pool=world.pool,
        page_size=1,
        device="cpu",
        is_draft_worker=False,
    )
    world.device = made(name, runner, monkeypatch)
    return world


def made(name: str, runner, monkeypatch):
    cls = resolve_name(ATTENTION["cuda"][name])
    assert cls.__mro__[-4].__name__ == STOCK[name], "not torch_native in its place"
    if name == "flashinfer":
        module, stock = sys.modules[cls.__module__], sys.modules[cls.__mro__[2].__module__]
        for wrapper in ("BatchPrefillWithPagedKVCacheWrapper", "BatchPrefillWithRaggedKVCacheWrapper"):
            monkeypatch.setattr(stock, wrapper, Wrapper)
        monkeypatch.setattr(stock, "BatchDecodeWithPagedKVCacheWrapper", Wrapper)
        monkeypatch.setattr(module, "RaggedExtend", Planned)
        monkeypatch.setattr(module, "RaggedDecode", lambda *shape: RaggedDecode(*shape[:5], "cpu", num_sms=1))
    backend = cls(runner)
    if name == "triton":
        backend.extend_attention_fwd = extend_attention
    return backend


def extend(world: World, rows: list[int], starts: list[int], ends: list[int]) -> ForwardBatch:
    """With what SGLang also keeps of a batch on the host."""
    batch = world.batch(ForwardMode.EXTEND, rows, starts, ends)
    counts = [end - start for start, end in zip(starts, ends)]
    batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu = starts, counts
    batch.seq_lens_cpu, batch.extend_num_tokens = torch.tensor(ends), sum(counts)
    batch.extend_start_loc = torch.tensor([0, *counts[:-1]]).cumsum(0)
    return batch


def test_exact_prefills_are_the_stock_backends(world):
    world.request(1, 0), world.request(2, 7)
    world.assert_alike(extend(world, [1, 2], [0, 7], [13, 20]))


def test_a_turn_on_compacted_rows_and_captured_decode_steps(world, monkeypatch):
    turn, backend = world.request(1, 20), world.device
    world.compact(turn, [9, 2, 4])
    world.request(2, 0)
    world.assert_alike(extend(world, [1, 2], [20, 0], [26, 9]))
    backend.init_cuda_graph_state(4, 4)

    def as_captured(batch) -> None:
        backend.init_forward_metadata_out_graph(batch, in_capture=True)
        backend.init_forward_metadata_in_graph(batch)

    monkeypatch.setattr(backend, "init_forward_metadata", as_captured)
    world.assert_alike(world.batch(ForwardMode.DECODE, [1, 2], [26, 9], [27, 10]))
