"""Attention over ragged lists of cells (FlashInfer's paged layout, page size 1)."""

from sglang_vlkv.kernels.ragged_attention.cpu import causal_extend, ragged_decode

__all__ = ["causal_extend", "ragged_decode"]
