"""The ragged counterpart of SGLang's ``triton`` attention backend."""

from __future__ import annotations

import torch
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

from sglang_vlkv.attention.device import DecodeKernel, RaggedDeviceBackend
from sglang_vlkv.kernels.ragged_attention.triton import RaggedDecode


class TritonDecode(RaggedDeviceBackend):
    """Decodes with our split-KV kernel."""

    def decode_kernel(self, max_requests: int, num_q_heads: int, dtype: torch.dtype) -> DecodeKernel:
        pool = self.token_to_kv_pool
        heads = num_q_heads, pool.head_num, pool.head_dim
        return RaggedDecode(pool.layer_num, max_requests, *heads, pool.device)


class RaggedTritonBackend(TritonDecode, TritonAttnBackend):
    """Prefill as SGLang's Triton backend does it, all else from ragged rows."""
