"""Extend: new tokens over prefixes that keep different numbers of rows per layer."""

from __future__ import annotations

import torch

from . import upstream
from .decode import check_heads, check_operands


class RaggedExtend:
    """FlashInfer's paged prefill at page size 1, planned on the host by FlashInfer itself.

    A plan depends on the numbers of rows only, so layers in which all requests have as many rows
    share one, and layers that differ are planned one by one. Lengths are known on the host when a
    batch is extended; nothing is copied back from the device. Not for CUDA graphs.

    Layers share one float workspace: run them one after the other on one stream.

    Args:
        num_q_heads, num_kv_heads, head_dim, q_dtype, kv_dtype: as for ``RaggedDecode``; any group size.
        device: a GPU.

    Raises:
        ValueError: no kernel for this shape.
        RuntimeError: FlashInfer is missing, its version is unknown here, or no GPU.
    """

    def __init__(
        self,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_dtype: torch.dtype,
        kv_dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.heads = check_heads(num_q_heads, num_kv_heads, head_dim, q_dtype, kv_dtype)
        self.device = torch.device(device)
        upstream.check(self.device)
        self._q_dtype, self._kv_dtype = q_dtype, kv_dtype
        self._module = upstream.prefill_module(q_dtype, kv_dtype, head_dim)
        self._floats = self._bytes(1)
        self._ints, self._pinned = self._bytes(1, 1), torch.empty(1, 1, dtype=torch.uint8)
        self._copied = torch.cuda.Event()
        self._last_page_len = torch.ones(1, dtype=torch.int32, device=self.device)
        self._plan_infos: list[list[int]] = []
        self._plan_of_layer: list[int] = []
        self._num_rows = 0

    def _bytes(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.uint8, device=self.device)

    def plan(self, qo_indptr: torch.Tensor, indptr: torch.Tensor) -> int:
        """Plan every layer's next ``run``.

        Args:
            qo_indptr: ``[B + 1]`` int32 on the CPU: request b's rows of ``q``.
            indptr: ``[L, B + 1]`` int32 on the CPU: its cells of each layer, as in ``run``.

        Returns:
            How many plans the layers needed.
        """
        batch_size = len(qo_indptr) - 1
        if batch_size < 1 or indptr.dim() != 2 or indptr.shape[1] != batch_size + 1:
            raise ValueError(f"indptr is [L, {batch_size + 1}], not {tuple(indptr.shape)}")
        lengths = indptr.diff(dim=1)
        distinct, plan_of_layer = torch.unique(lengths, dim=0, return_inverse=True)
        offsets = torch.zeros(len(distinct), batch_size + 1, dtype=torch.int32)
        offsets[:, 1:] = distinct.cumsum(1)
        num_rows = int(qo_indptr[-1])
        shape = (
            *(num_rows, batch_size, self.heads.num_q_heads, self.heads.num_kv_heads),
            *(1, False, self.heads.head_dim, self.heads.head_dim),  # page size, enable_cuda_graph
            *(True, upstream.NO_WINDOW),  # causal
            *(-1, False, 0, 0),  # fixed_split_size, disable_split_kv, num_colocated_ctas, uniform_q_len
        )
        arguments = [(qo_indptr, offsets[i], distinct[i].contiguous(), *shape) for i in range(len(distinct))]
        sizes = [self._module.workspace_size(self._floats, *a) for a in arguments]
        float_bytes, int_bytes = (max(int(size[i]) for size in sizes) for i in (0, 1))
        self._copied.synchronize()  # the last plans may still be on their way from the pinned memory
        if float_bytes > self._floats.numel():
            self._floats = self._bytes(float_bytes)
        if len(distinct) > self._ints.shape[0] or int_bytes > self._ints.shape[1]:
            per_plan = -(-max(int_bytes, self._ints.shape[1]) // 256) * 256
            count = max(len(distinct), self._ints.shape[0])
            self._ints = self._bytes(count, per_plan)
            self._pinned = torch.empty(
                count, per_plan, dtype=torch.uint8, pin_memory=self.device.type == "cuda"
            )
        if batch_size > len(self._last_page_len):
            self._last_page_len = torch.ones(batch_size, dtype=torch.int32, device=self.device)
        self._plan_infos = [
            [int(x) for x in self._module.plan(self._floats, self._ints[i], self._pinned[i], *a)]
            for i, a in enumerate(arguments)
        ]
        self._copied.record()
        self._plan_of_layer, self._num_rows = plan_of_layer.tolist(), num_rows
        return len(distinct)

    def run(
        self,
        layer: int,
        q: torch.Tensor,
        k_cells: torch.Tensor,
        v_cells: torch.Tensor,
        qo_indptr: torch.Tensor,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        scale: float,
        causal: bool = True,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one layer, as planned.

        Args:
            layer: l.
            q: ``[nnz_q, Hq, D]``; heads and rows may be strided.
            k_cells, v_cells: ``[num_cells, Hkv, D]`` of equal dtype.
            qo_indptr: ``[B + 1]`` int32 on the device, as planned.
            indptr: ``[L, B + 1]`` int32 on the device, with the planned lengths; a layer's part of
                ``indices`` may begin anywhere.
            indices: ``[nnz]`` int32, all layers' cells. A request's last cells are its query rows' own.
            scale: of the logits.
            causal: query row e of a request's E sees all but its last ``E - 1 - e`` cells; else all.
            out: ``[nnz_q, Hq, D]`` contiguous, in q's dtype, to write to.

        Returns:
            ``[nnz_q, Hq, D]``.

        Raises:
            ValueError: a shape, stride or dtype that the kernels would read or write beyond, or
                ``plan`` was of another batch.
        """
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
        integers = qo_indptr, indptr, indices
        check_operands(self.heads, (self._q_dtype, self._kv_dtype), q, k_cells, v_cells, integers, out)
        batch_size, plan = len(qo_indptr) - 1, self._plan_of_layer[layer]
        if indptr.shape != (len(self._plan_of_layer), batch_size + 1) or len(q) != self._num_rows:
            planned = f"{len(self._plan_of_layer)} layers and {self._num_rows} query rows"
            raise ValueError(f"{planned} were planned, not {tuple(indptr.shape)} and {len(q)}")
        self._module.paged_run(
            *(self._floats, self._ints[plan], self._plan_infos[plan]),
            *(q, k_cells.unsqueeze(1), v_cells.unsqueeze(1)),
            *(qo_indptr, indptr[layer], indices, self._last_page_len[:batch_size], out, None),
            *(upstream.CAUSAL if causal else upstream.NON_CAUSAL, upstream.NHD, upstream.NO_WINDOW, False),
            *(None, None, None, None, None, None),  # masks, slopes, multi-item scoring
            *(0.0, scale, None, None, None, 1.0, 1e4, 0, self._floats.numel()),
        )
        return out
