"""Attention over ragged lists of cells on a GPU."""

from __future__ import annotations

from functools import partial
from typing import Callable

import torch

from sglang_vlkv.kernels.ragged_attention.decode import RaggedDecode
from sglang_vlkv.kernels.ragged_attention.extend import ragged_extend
from sglang_vlkv.kernels.ragged_attention.indices import RaggedIndices
from sglang_vlkv.kernels.ragged_attention.rows import RowTable

__all__ = ["RaggedDecode", "RaggedIndices", "ragged_extend"]

# Layers, query heads, KV heads, head size.
MODELS = {"Qwen2.5-VL-7B": (28, 28, 4, 128), "LLaVA-v1.6-Mistral-7B": (32, 32, 8, 128)}


def aot_cases() -> dict[str, Callable[[], None]]:
    """See :mod:`sglang_vlkv.kernels.aot`."""
    cases: dict[str, Callable[[], None]] = {}
    for name, model in MODELS.items():
        cases[f"{name}, decode"] = partial(_decode, *model)
        cases[f"{name}, extend"] = partial(_extend, *model, 2048)
        cases[f"{name}, extend by few"] = partial(_extend, *model, 2)
    return cases


def _pool(num_kv_heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.empty(1_000_000, num_kv_heads, head_dim, dtype=torch.bfloat16) for _ in "kv")


def _decode(num_layers: int, num_q_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """One compilation of each kernel serves all layers, and batch sizes over a range."""
    max_requests, dtype = 256, torch.bfloat16
    lists = RaggedIndices(num_layers, max_requests, 1 << 24, "cpu")
    decode = RaggedDecode(num_layers, max_requests, num_q_heads, num_kv_heads, head_dim, "cpu")
    table = RowTable.empty(4096, num_layers, "cpu")
    req_to_token = torch.empty(4096, 131_080, dtype=torch.int32)
    pool = _pool(num_kv_heads, head_dim)
    for requests in (17, 32, 33):
        rows = torch.empty(requests, dtype=torch.int64)
        indptr, indices = lists.build(table, rows, rows, req_to_token, 2_000_000)
        decode.plan(indptr)
        q = torch.empty(requests, num_q_heads, head_dim, dtype=dtype)
        for layer in range(num_layers):
            decode.run(layer, q, *pool, indptr, indices, head_dim**-0.5)


def _extend(num_layers: int, num_q_heads: int, num_kv_heads: int, head_dim: int, longest: int) -> None:
    q = torch.empty(2 * longest, num_q_heads, head_dim, dtype=torch.bfloat16)
    indices, qo_indptr = torch.empty(1 << 24, dtype=torch.int32), torch.empty(3, dtype=torch.int32)
    pool = _pool(num_kv_heads, head_dim)
    for indptr in torch.empty(num_layers, 3, dtype=torch.int32):
        ragged_extend(q, *pool, qo_indptr, indptr, indices, head_dim**-0.5, longest)
