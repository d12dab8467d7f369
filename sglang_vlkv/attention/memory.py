"""What the ragged counterparts hold on a GPU beside the pool, which SGLang sizes before they are made."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from sglang.srt.model_executor.cuda_graph_config import Backend
from sglang.srt.model_executor.runner.base_cuda_graph_runner import get_batch_sizes_to_capture
from sglang.srt.runtime_context import get_context, get_exec, get_parallel

from sglang_vlkv.kernels.ragged_attention.rows import RowTable
from sglang_vlkv.kernels.ragged_attention.triton import RaggedDecode, RaggedIndices
from sglang_vlkv.options import config
from sglang_vlkv.policies import policies

ENTRY = 4  # bytes of one, in an index list
SHARED = 8  # a decode step's index lists may be this often longer than the pool: rows are shared,
MAX_SHARE = 64  # where they then take no more than this part of its memory
NAMED = 2  # entries per cell of the pool: a twin's cells, and the same where the device reads them
BLOCKS_PER_SM = 8  # of FlashInfer's decode on CUDA cores, at most


def list_capacity(num_layers: int, slots: int, slot_bytes: int, padding: int) -> int:
    """Entries of the index lists of a decode step."""
    cells = num_layers * slots
    affordable = slots * slot_bytes // MAX_SHARE // ENTRY
    wanted = max(cells + padding * num_layers, min(SHARED * cells, affordable))
    return min(wanted, torch.iinfo(torch.int32).max)


def captured_sizes(model_runner) -> list[int]:
    """The batch sizes that decode steps will have CUDA graphs of."""
    if get_exec().graph.cuda_graph_config.decode.backend == Backend.DISABLED:
        return []
    sizes, _ = get_batch_sizes_to_capture(model_runner)
    return sizes


def most_padding(sizes: list[int]) -> int:
    """Most requests that SGLang adds to a batch to fill a captured one; each lists a row per layer."""
    return max((end - start - 1 for start, end in pairwise([0, *sizes])), default=0)


def leaves_queries() -> bool:
    """Whether a request of this server may leave the queries of its output tokens: as a draft."""
    settings = config.settings_of(get_context().server_args)
    if settings is None:
        return False
    allowed = settings.allow_override
    chosen = [policies()[name] for name in (policies() if allowed is True else allowed or ())]
    return settings.policy.draft_tokens > 0 or any(policy.can_draft for policy in chosen)


class Shape(NamedTuple):
    """What a rank's attention is made for.

    Attributes:
        max_requests: rows of ``req_to_token``.
        q_dtype, kv_dtype: of queries and of the pool.
    """

    num_layers: int
    max_requests: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    q_dtype: torch.dtype
    kv_dtype: torch.dtype

    @property
    def slot_bytes(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_dtype.itemsize


def pool_budget(budget: int, shape: Shape, backend: str, num_sms: int, copied: int = 0) -> int:
    """Bytes that the pool may have of ``budget``, for it and all that lies beside it to fit.

    Args:
        copied: requests of a step whose queries are copied.
    """
    layers, slot_bytes = shape.num_layers, shape.slot_bytes
    padding = ENTRY * layers * shape.max_requests  # at most
    queries = layers * copied * shape.num_q_heads * shape.head_dim * shape.q_dtype.itemsize
    rest = budget - fixed_bytes(shape, backend, num_sms) - padding - queries
    listed = max(layers, min(SHARED * layers, slot_bytes / MAX_SHARE / ENTRY))
    return max(0, int(rest / (1 + ENTRY * (listed + NAMED * layers) / slot_bytes)))


def shape_of(configurator, budget: int) -> Shape:
    """Of a rank whose pool SGLang's ``KVCacheConfigurator`` makes from ``budget`` bytes."""
    model, size = configurator.model_config, get_parallel().attn_tp_size
    shape = Shape(
        configurator.layer_info.num_effective_layers,
        1,
        model.num_attention_heads // size,
        model.get_num_kv_heads(size),
        model.head_dim,
        model.dtype,
        configurator.kv_cache_dtype,
    )
    rows = configurator.resolve_max_num_reqs(budget // shape.slot_bytes) + 1  # and the one that pads
    return shape._replace(max_requests=rows)


def fixed_bytes(shape: Shape, backend: str, num_sms: int) -> int:
    """Of what does not grow with the pool: tables of rows, offsets, and the decode kernel's workspaces."""
    layers, rows, *heads = shape[:5]
    if backend == "flashinfer":
        import flashinfer_ext

        dtypes = shape.q_dtype, shape.kv_dtype
        grid = dict(num_sms=num_sms, num_blocks_per_sm=BLOCKS_PER_SM)
        kernel = flashinfer_ext.RaggedDecode(layers, rows, *heads, *dtypes, "meta", **grid)
    else:
        kernel = RaggedDecode(layers, rows, *heads, "meta", num_sms)
    lists = RaggedIndices(layers, rows, 1, "meta")
    held = *RowTable.empty(rows, layers, "meta"), lists.indptr, *vars(kernel).values()
    return sum(x.nbytes for x in held if isinstance(x, torch.Tensor))
