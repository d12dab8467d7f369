"""The ragged counterpart of SGLang's ``fa3`` attention backend."""

from __future__ import annotations

from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend

from sglang_vlkv.attention.triton import TritonDecode


class RaggedFlashAttentionBackend(TritonDecode, FlashAttentionBackend):
    """Prefill with FlashAttention 3, all else with our Triton kernels.

    FlashAttention's decode reads a padded page table per request; per-layer ragged rows would need one
    of ``[L, B, longest]``, and pages of one token forgo its bulk copies anyway.
    """
