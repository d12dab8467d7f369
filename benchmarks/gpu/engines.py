"""The attention engines under one face: build the index lists, plan, then run every layer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.pool import Residents
from benchmarks.gpu.record import importable
from benchmarks.gpu.shapes import Model
from benchmarks.gpu.timing import Clock

OURS, OURS_FLASHINFER = "ours, Triton", "ours, FlashInfer"
SGLANG_KERNEL = "sglang.kernels.ops.attention.decode_attention"
FLASHINFER, SGLANG, SDPA = "FlashInfer, stock wrapper", "SGLang, stock Triton decode", "torch SDPA"


class Decode:
    """One decode step's attention over all layers of one set of residents.

    Attributes:
        q, out: ``[L, B, Hq, D]``.
        fresh: plans; what the plan is made from was prepared before.
        attend: runs all layers.
    """

    def __init__(self, residents: Residents, clock: Clock, of_set: int = 0) -> None:
        self.of_set = of_set
        self.residents, self.clock = residents, clock
        model = self.model = residents.pool.model
        shape = model.layers, len(residents.batch.lengths), model.q_heads, model.head_dim
        self.q = torch.randn(shape, dtype=clock.dtype, device=clock.device)
        self.out = torch.full_like(self.q, torch.nan)

    def cells(self, row: int, layer: int) -> torch.Tensor:
        """What a request of the set attends to, apart from the engine's own lists, int64."""
        return self.residents.cells(self.of_set * len(self.residents.batch.lengths) + row, layer)


def decode_engine(model: Model, size: int, clock: Clock, flashinfer: bool):
    """Our engine for batches of up to ``size`` requests: in Triton, or FlashInfer's kernels."""
    heads = model.q_heads, model.kv_heads, model.head_dim
    if flashinfer:
        from flashinfer_ext import RaggedDecode

        dtypes = dict(q_dtype=clock.dtype, kv_dtype=clock.dtype)
        return RaggedDecode(model.layers, size, *heads, device=clock.device, **dtypes)
    from sglang_vlkv.kernels.ragged_attention.triton import RaggedDecode

    return RaggedDecode(model.layers, size, *heads, clock.device, num_sms=clock.num_sms)


class Ours(Decode):
    """Index lists and a plan on the device, all capturable."""

    def __init__(self, residents: Residents, clock: Clock, flashinfer: bool = False) -> None:
        super().__init__(residents, clock)
        from sglang_vlkv.kernels.ragged_attention.triton import RaggedIndices

        model, size = self.model, len(residents.batch.lengths)
        capacity = residents.num_rows + model.layers
        self.lists = RaggedIndices(model.layers, size, capacity, clock.device)
        self.engine = decode_engine(model, size, clock, flashinfer)

    def build(self, of_set: int) -> None:
        at, pool = self.residents, self.residents.pool
        arguments = at.rows[of_set], at.seq_lens[of_set], at.req_to_token, pool.cells_per_layer
        self.indptr, self.indices = self.lists.build(at.table, *arguments)

    def plan(self) -> None:
        self.engine.plan(self.indptr)

    def attend(self, indices: torch.Tensor | None = None) -> None:
        """Runs all layers, over other index lists of the same lengths if given."""
        pool = self.residents.pool
        indices = self.indices if indices is None else indices
        for layer in range(self.model.layers):
            self.engine.run(
                layer, self.q[layer], pool.k_cells, pool.v_cells, self.indptr, indices,
                self.model.scale, out=self.out[layer],
            )  # fmt: skip

    def step(self, of_set: int) -> None:
        self.build(of_set)
        self.plan()
        self.attend()


class StockFlashInfer(Decode):
    """``BatchDecodeWithPagedKVCacheWrapper``, page size 1; one host-side plan for equal layers."""

    def __init__(self, residents: Residents, clock: Clock, of_set: int = 0) -> None:
        super().__init__(residents, clock, of_set)
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        size, model, device = len(residents.batch.lengths), self.model, clock.device
        ints = dict(dtype=torch.int32, device=device)
        workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=device)
        self.indices = torch.empty(residents.batch.tokens, **ints)
        self.wrapper = BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=model.q_heads // model.kv_heads >= 4,
            paged_kv_indptr_buffer=torch.zeros(size + 1, **ints),
            paged_kv_indices_buffer=self.indices,
            paged_kv_last_page_len_buffer=torch.ones(size, **ints),
        )
        self.last_page_len = torch.ones(size, dtype=torch.int32)
        indptr, self.slots = slots_of(residents, of_set)
        self.indptr_cpu = indptr.cpu()

    def fresh(self) -> None:
        model, dtype = self.model, self.clock.dtype
        self.wrapper.plan(
            self.indptr_cpu, self.slots, self.last_page_len, model.q_heads, model.kv_heads, model.head_dim, 1,
            q_data_type=dtype, kv_data_type=dtype, sm_scale=model.scale,
        )  # fmt: skip

    def attend(self) -> None:
        for layer, (k, v) in enumerate(self.residents.pool.storage):
            self.wrapper.run(self.q[layer], (k[:, None], v[:, None]), out=self.out[layer])


class StockTriton(Decode):
    """SGLang 0.5.23's Triton decode kernel with its own split heuristic."""

    SPLITS = 8  # --triton-attention-num-kv-splits

    def __init__(self, residents: Residents, clock: Clock, of_set: int = 0) -> None:
        super().__init__(residents, clock, of_set)
        from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
        from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton

        self.kernel, self.splits_of = decode_attention_fwd, get_num_kv_splits_triton
        size, model, device = len(residents.batch.lengths), self.model, clock.device
        shape = size, model.q_heads, self.SPLITS
        self.logits = torch.empty(*shape, model.head_dim, dtype=torch.float32, device=device)
        self.lse = torch.empty(shape, dtype=torch.float32, device=device)
        self.num_splits = torch.empty(size, dtype=torch.int32, device=device)
        self.indptr, self.indices = slots_of(residents, of_set)

    def fresh(self) -> None:
        size, model = len(self.residents.batch.lengths), self.model
        self.splits_of[(1,)](
            self.num_splits, self.residents.seq_lens[self.of_set], size, 1, model.q_heads, model.kv_heads, self.SPLITS,
            self.clock.num_sms, MAX_NUM_SEQ=256,
        )  # fmt: skip

    def attend(self) -> None:
        for layer, (k, v) in enumerate(self.residents.pool.storage):
            self.kernel(
                self.q[layer], k, v, self.out[layer], self.indptr, self.indices, self.logits, self.lse,
                self.num_splits, self.SPLITS, self.model.scale, 1.0, 1.0,
            )  # fmt: skip


class Sdpa(Decode):
    """``scaled_dot_product_attention`` over contiguous rows of equally long requests: the pool's first
    ones, whatever the slots are."""

    def fresh(self) -> None:
        pass

    def cells(self, row: int, layer: int) -> torch.Tensor:
        length, device = self.residents.batch.lengths[0], self.residents.pool.device
        first = (self.of_set * len(self.residents.batch.lengths) + row) * length
        return torch.arange(first, first + length, device=device) + layer * self.residents.pool.cells_per_layer

    def attend(self) -> None:
        size, length = len(self.residents.batch.lengths), self.residents.batch.lengths[0]
        first = self.of_set * size * length
        for layer, (k, v) in enumerate(self.residents.pool.storage):
            k, v = (x[first : first + size * length].view(size, length, *x.shape[1:]).transpose(1, 2) for x in (k, v))
            attended = torch.nn.functional.scaled_dot_product_attention(
                self.q[layer][:, :, None], k, v, scale=self.model.scale, enable_gqa=True
            )
            self.out[layer].copy_(attended[:, :, 0])


def slots_of(residents: Residents, of_set: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One set's slots as every layer of a stock engine reads them: ``[B + 1]``, ``[tokens]`` int32."""
    lengths = residents.batch.lengths
    indptr = torch.tensor([0, *lengths], device=residents.pool.device).cumsum(0).int()
    first = of_set * len(lengths)
    slots = [residents.req_to_token[first + row, :length] for row, length in enumerate(lengths)]
    return indptr, torch.cat(slots)


def stock_engines(clock: Clock) -> dict[str, Callable[[Residents, Clock], Decode] | str]:
    """What serves the full cache elsewhere; a string says why one is missing."""
    found: dict[str, Callable | str] = {SDPA: Sdpa}
    found[FLASHINFER] = StockFlashInfer if importable("flashinfer") else "flashinfer is not installed"
    found[SGLANG] = StockTriton if importable(SGLANG_KERNEL) else f"{SGLANG_KERNEL} is not installed"
    if clock.rehearsal:
        found[FLASHINFER] = "it runs on a GPU only"
    return found


def have_flashinfer_ext(clock: Clock) -> str | None:
    """Why our FlashInfer engine cannot run, None where it can."""
    if clock.rehearsal:
        return "it runs on a GPU only"
    for name in ("flashinfer", "flashinfer_ext"):
        if not importable(name):
            return f"{name} is not there"
    return None
