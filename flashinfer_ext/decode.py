"""Decode over layers whose requests keep different numbers of rows per layer."""

from __future__ import annotations

import torch

from . import upstream
from .layout import (
    DECODE_GROUP_SIZES,
    Grid,
    Heads,
    Layout,
    cuda_core_layout,
    prefers_tensor_cores,
    tensor_core_layout,
)
from .plan_kernel import plan_layers

EIGHT_BIT = (torch.float8_e4m3fn, torch.float8_e5m2)
ALIGNMENT = 256  # of a layer's int workspace


def check_heads(
    num_q_heads: int, num_kv_heads: int, head_dim: int, q_dtype: torch.dtype, kv_dtype: torch.dtype
) -> Heads:
    """The shape, once FlashInfer's kernels are known to take it.

    Raises:
        ValueError: they do not.
    """
    if num_kv_heads < 1 or num_q_heads % num_kv_heads:
        raise ValueError(f"num_q_heads is a multiple of num_kv_heads, not {num_q_heads} of {num_kv_heads}")
    if q_dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"q_dtype is float16 or bfloat16, not {q_dtype}")
    if kv_dtype != q_dtype and kv_dtype not in EIGHT_BIT:
        raise ValueError(f"kv_dtype is q_dtype, float8_e4m3fn or float8_e5m2, not {kv_dtype} under {q_dtype}")
    if head_dim not in (64, 128, 256):
        raise ValueError(f"head_dim is 64, 128 or 256, not {head_dim}")
    return Heads(num_q_heads, num_kv_heads, head_dim)


def check_operands(
    heads: Heads,
    dtypes: tuple[torch.dtype, torch.dtype],
    q: torch.Tensor,
    k_cells: torch.Tensor,
    v_cells: torch.Tensor,
    integers: tuple[torch.Tensor, ...],
    out: torch.Tensor,
) -> None:
    """That FlashInfer's kernels, which look at neither shapes nor strides, stay inside these tensors.

    Args:
        dtypes: of q and of the cells, as planned.
        integers: the index arrays.

    Raises:
        ValueError: they do not.
    """
    q_dtype, kv_dtype = dtypes
    cell = (heads.num_kv_heads, heads.head_dim)
    if q.dim() != 3 or q.shape[1:] != (heads.num_q_heads, heads.head_dim) or q.stride(2) != 1:
        raise ValueError(
            f"q is [rows, {heads.num_q_heads}, {heads.head_dim}], not {tuple(q.shape)} {q.stride()}"
        )
    if k_cells.shape != v_cells.shape or k_cells.stride() != v_cells.stride():
        raise ValueError("k_cells and v_cells have equal shapes and strides: one id addresses a row in both")
    if k_cells.dim() != 3 or k_cells.shape[1:] != cell or k_cells.stride(2) != 1:
        raise ValueError(
            f"cells are [num_cells, {heads.num_kv_heads}, {heads.head_dim}], not {tuple(k_cells.shape)}"
        )
    if q.dtype != q_dtype or k_cells.dtype != kv_dtype or v_cells.dtype != kv_dtype:
        raise ValueError(
            f"this object is for {q_dtype} queries and {kv_dtype} cells, not {q.dtype}, {k_cells.dtype}"
        )
    if out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise ValueError(f"out is contiguous, {tuple(q.shape)} and {q.dtype}")
    if any(x.dtype != torch.int32 or x.stride(-1) != 1 for x in integers):
        raise ValueError("index arrays are contiguous int32")


class RaggedDecode:
    """FlashInfer's paged decode at page size 1, planned for all layers by one kernel on the device.

    ``plan`` reads the lengths where they are, on the device, and writes there what FlashInfer's host
    planner would: no copy, no synchronisation, no allocation, so that both ``plan`` and ``run`` can be
    captured in a CUDA graph and replayed with other lengths. A batch size must be planned once before
    it is captured, for its kernels to be compiled and loaded.

    The layers share one float workspace: run them one after the other on one stream, and use one
    object per stream. The int workspace belongs to the batch that was planned last.

    A request may have no rows in a layer (CUDA graphs are padded with such requests): its output is
    zeros. Cells may be shared between requests and layers. Nothing but ``out`` and this object's own
    workspaces is written.

    Args:
        num_layers: L.
        max_requests: largest batch that will be planned.
        num_q_heads, num_kv_heads: Hq and Hkv; Hq is a multiple of Hkv.
        head_dim: D: 64, 128 or 256.
        q_dtype: float16 or bfloat16; also of the output.
        kv_dtype: q_dtype or a float8. A scale of the keys goes into ``run``'s ``scale``, one of the
            values is applied to the output by the caller.
        device: of everything. On a CPU, with ``num_sms``, the object only plans.
        use_tensor_cores: True for FlashInfer's prefill kernel with one query row per request, False
            for its CUDA-core decode, which exists for 1, 2, 3, 4, 6, 8 and 16 query heads per KV
            head. None chooses as SGLang does, tensor cores for float8 and for 4 or more, and where
            CUDA-core decode does not exist.
        float_workspace_bytes: None for what batches up to ``max_requests`` need.
        num_sms: the device's SMs; None asks it. Fewer makes coarser chunks.
        num_blocks_per_sm: thread blocks of the CUDA-core kernel per SM; None asks the device. Not
            read for tensor cores, where FlashInfer counts on 2.
        enable_pdl: programmatic dependent launch. FlashInfer's kernels read their plan before they
            wait for the kernel in front of them, so with True some other kernel, launched without
            it, must stand between ``plan`` and the first ``run``.

    Raises:
        ValueError: no kernel for this shape, or the float workspace is too small.
        RuntimeError: FlashInfer is missing, its version is unknown here or the device too old.
    """

    def __init__(
        self,
        num_layers: int,
        max_requests: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_dtype: torch.dtype,
        kv_dtype: torch.dtype,
        device: torch.device | str,
        use_tensor_cores: bool | None = None,
        float_workspace_bytes: int | None = None,
        *,
        num_sms: int | None = None,
        num_blocks_per_sm: int | None = None,
        enable_pdl: bool = False,
    ) -> None:
        self.heads = heads = check_heads(num_q_heads, num_kv_heads, head_dim, q_dtype, kv_dtype)
        group = heads.group_size
        if use_tensor_cores is None:
            use_tensor_cores = prefers_tensor_cores(group, kv_dtype) or group not in DECODE_GROUP_SIZES
        elif not use_tensor_cores and group not in DECODE_GROUP_SIZES:
            sizes = ", ".join(map(str, DECODE_GROUP_SIZES))
            raise ValueError(
                f"FlashInfer's CUDA-core decode takes {sizes} query heads per KV head, not {group}; "
                "use tensor cores (use_tensor_cores=True or None)"
            )
        if num_layers < 1 or max_requests < 1:
            raise ValueError(f"at least one layer and one request, not {num_layers} and {max_requests}")
        self.num_layers, self.max_requests = num_layers, max_requests
        self.use_tensor_cores = use_tensor_cores
        self.device = device = torch.device(device)
        self._q_dtype, self._kv_dtype, self._enable_pdl = q_dtype, kv_dtype, enable_pdl
        self._module = None
        if device.type == "cuda":
            upstream.check(device)
            load = upstream.prefill_module if use_tensor_cores else upstream.decode_module
            self._module = load(q_dtype, kv_dtype, head_dim)
        self.grid = self._make_grid(num_sms, num_blocks_per_sm)

        self._layouts: dict[int, Layout] = {}
        # Either workspace is largest at the smallest batch, where requests are split, or at the largest.
        ends = self.layout(1), self.layout(max_requests)
        need = max(16, *(layout.float_bytes for layout in ends))
        if float_workspace_bytes is None:
            float_workspace_bytes = need
        elif float_workspace_bytes < need:
            raise ValueError(
                f"float_workspace_bytes {float_workspace_bytes}: {max_requests} requests need {need}"
            )
        int_bytes = max(layout.int_bytes for layout in ends)
        int_bytes = -(-int_bytes // ALIGNMENT) * ALIGNMENT
        self._floats = torch.empty(float_workspace_bytes, dtype=torch.uint8, device=device)
        self._ints = torch.zeros(num_layers, int_bytes, dtype=torch.uint8, device=device)
        self._qo_indptr = torch.arange(max_requests + 1, dtype=torch.int32, device=device)
        self._last_page_len = torch.ones(max_requests, dtype=torch.int32, device=device)

    def _make_grid(self, num_sms: int | None, num_blocks_per_sm: int | None) -> Grid:
        if self._module is not None:
            decode = None if self.use_tensor_cores else self._module
            grid = upstream.device_grid(self.device, self.heads, self._q_dtype, self._kv_dtype, decode)
            return Grid(num_sms or grid.num_sms, num_blocks_per_sm or grid.num_blocks_per_sm)
        if num_sms is None or (num_blocks_per_sm is None and not self.use_tensor_cores):
            raise ValueError(f"there is no GPU to ask on {self.device}: give num_sms and num_blocks_per_sm")
        return Grid(num_sms, num_blocks_per_sm or 1)

    def layout(self, batch_size: int) -> Layout:
        """Where batches of ``batch_size`` requests have their arrays, in either workspace."""
        if not 1 <= batch_size <= self.max_requests:
            raise ValueError(f"a batch has 1 to {self.max_requests} requests, not {batch_size}")
        if batch_size not in self._layouts:
            layout_of = tensor_core_layout if self.use_tensor_cores else cuda_core_layout
            self._layouts[batch_size] = layout_of(batch_size, self.heads, self.grid)
        return self._layouts[batch_size]

    @property
    def int_workspace(self) -> torch.Tensor:
        """``[L, n]`` uint8: row l is what FlashInfer reads of layer l's plan."""
        return self._ints

    def plan(self, indptr: torch.Tensor) -> None:
        """Plan every layer's next ``run``.

        Args:
            indptr: ``[L, B + 1]`` int32 on the device, rows contiguous: layer l's request b has the
                cells ``indices[indptr[l, b] : indptr[l, b + 1]]`` of ``run``'s flat ``indices``, in
                which a layer's part may begin anywhere.
        """
        if indptr.dim() != 2 or indptr.shape[0] != self.num_layers:
            raise ValueError(f"indptr is [{self.num_layers}, B + 1], not {tuple(indptr.shape)}")
        plan_layers(indptr, self._ints, self.layout(indptr.shape[1] - 1))

    def run(
        self,
        layer: int,
        q: torch.Tensor,
        k_cells: torch.Tensor,
        v_cells: torch.Tensor,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        scale: float,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one layer, as planned.

        Args:
            layer: l.
            q: ``[B, Hq, D]``; heads and rows may be strided.
            k_cells, v_cells: ``[num_cells, Hkv, D]`` with equal strides; the same id addresses a
                row's K and V.
            indptr: ``[L, B + 1]`` int32, as planned.
            indices: ``[nnz]`` int32, all layers' cells.
            scale: of the logits, usually ``D ** -0.5``.
            out: ``[B, Hq, D]`` contiguous, in q's dtype, to write to.

        Returns:
            ``[B, Hq, D]``.

        Raises:
            ValueError: a shape, stride or dtype that the kernels would read or write beyond.
        """
        if self._module is None:
            raise RuntimeError(f"FlashInfer has no kernels for {self.device}; this object can only plan")
        batch_size = q.shape[0]
        layout = self.layout(batch_size)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
        check_operands(
            self.heads, (self._q_dtype, self._kv_dtype), q, k_cells, v_cells, (indptr, indices), out
        )
        if indptr.shape != (self.num_layers, batch_size + 1):
            raise ValueError(f"indptr is [{self.num_layers}, {batch_size + 1}], not {tuple(indptr.shape)}")
        workspaces = self._floats, self._ints[layer], layout.plan_info
        cells = k_cells.unsqueeze(1), v_cells.unsqueeze(1)  # NHD pages of one row
        paged = indptr[layer], indices, self._last_page_len[:batch_size]
        if self.use_tensor_cores:
            self._module.paged_run(
                *workspaces,
                *(q, *cells, self._qo_indptr[: batch_size + 1], *paged, out, None),
                *(upstream.NON_CAUSAL, upstream.NHD, upstream.NO_WINDOW, self._enable_pdl),
                *(None, None, None, None, None, None),  # masks, slopes, multi-item scoring
                *(0.0, scale, None, None, None, 1.0, 1e4, 0, self._floats.numel()),
            )
        else:
            self._module.run(
                *workspaces,
                *(q, *cells, *paged, out, None),
                *(upstream.NHD, upstream.NO_WINDOW, self._enable_pdl, None, 0.0, scale, 1.0, 1e4),
            )
        return out
