"""The ragged counterpart of SGLang's ``flashinfer`` attention backend."""

from __future__ import annotations

from itertools import accumulate

import torch
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend

from flashinfer_ext import RaggedDecode, RaggedExtend
from sglang_vlkv.attention.device import DecodeKernel, Extends, RaggedDeviceBackend


class RaggedFlashInferBackend(RaggedDeviceBackend, FlashInferAttnBackend):
    """All attention with FlashInfer's kernels; decode is planned on the device."""

    def decode_kernel(self, max_requests: int, num_q_heads: int, dtype: torch.dtype) -> DecodeKernel:
        pool = self.token_to_kv_pool
        shape = num_q_heads, pool.head_num, pool.head_dim, dtype, pool.dtype, pool.device
        self._extend = RaggedExtend(*shape)
        return RaggedDecode(pool.layer_num, max_requests, *shape)

    def plan_extend(self, num_new: list[int], num_rows: list[list[int]]) -> None:
        by_layer = [list(accumulate(rows, initial=0)) for rows in zip(*num_rows, strict=True)]
        qo_indptr = torch.tensor(list(accumulate(num_new, initial=0)), dtype=torch.int32)
        self._extend.plan(qo_indptr, torch.tensor(by_layer, dtype=torch.int32))

    def extend(self, layer: int, q: torch.Tensor, lists: Extends, scale: float, out: torch.Tensor) -> None:
        cells = self.token_to_kv_pool.k_cells, self.token_to_kv_pool.v_cells
        self._extend.run(
            layer, q, *cells, lists.qo_indptr, lists.indptr, lists.indices, scale, causal=True, out=out
        )
