"""The ragged counterpart of SGLang's ``flashinfer`` attention backend."""

from __future__ import annotations

import torch
from flashinfer_ext import RaggedDecode
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend

from sglang_vlkv.attention.device import DecodeKernel, RaggedDeviceBackend


class RaggedFlashInferBackend(RaggedDeviceBackend, FlashInferAttnBackend):
    """Prefill and decode with FlashInfer's kernels, decode planned on the device.

    Prefills that go on from compacted rows use our Triton kernel.
    """

    def decode_kernel(self, max_requests: int, num_q_heads: int, dtype: torch.dtype) -> DecodeKernel:
        pool = self.token_to_kv_pool
        heads = num_q_heads, pool.head_num, pool.head_dim
        return RaggedDecode(pool.layer_num, max_requests, *heads, dtype, pool.dtype, pool.device)
