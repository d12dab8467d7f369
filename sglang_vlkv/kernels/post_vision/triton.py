"""Two passes over tiles of the attention, which is never held.

The first finds every row's maximum and sum of exponentials, its keys split over programs; the
second, one program per block of keys, adds up columns. A KV head's query heads and voting rows are
the rows of one matrix: row ``m`` is voting row ``m // G`` of query head ``m % G``.
"""

from __future__ import annotations

import math
from typing import Callable, NamedTuple

import torch
import triton
import triton.language as tl

from sglang_vlkv.kernels.post_vision.scores import PostVisionScores

PROGRAMS = 512  # of the first pass, where there are keys enough for as many: a few per SM
MAX_SPLITS = 64


@triton.jit
def _keys(k, slots, stride_kr, at, inside, start, d, HEAD_DIM: tl.constexpr, HAS_SLOTS: tl.constexpr):
    """The keys at ``at`` [BLOCK_N], [BLOCK_N, BLOCK_D]; ``k`` points to the head's first."""
    if HAS_SLOTS:
        cell = tl.load(slots + start + at, mask=inside, other=0).to(tl.int64)
    else:
        cell = start + at
    mask = inside[:, None] & (d < HEAD_DIM)[None, :]
    return tl.load(k + cell[:, None] * stride_kr + d[None, :], mask=mask, other=0.0)


@triton.jit
def _queries(
    q, stride_qr, stride_qh, m, valid, start, d, scale,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The rows ``m`` [BLOCK_M], [BLOCK_M, BLOCK_D]; ``q`` points to the KV head's first query head."""
    row = start + m // GROUP
    offset = row * stride_qr + (m % GROUP).to(tl.int64) * stride_qh
    mask = valid[:, None] & (d < HEAD_DIM)[None, :]
    queries = tl.load(q + offset[:, None] + d[None, :], mask=mask, other=0.0)
    if UPCAST:
        queries = queries.to(tl.float32) * scale
    return queries


@triton.jit
def _product(a, b, scale, UPCAST: tl.constexpr):
    """Scaled logits in float32. 16-bit operands multiply exactly; others are float32 already."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b) * scale


# What differs from prompt to prompt is not specialised on: a server would compile while it serves.
@triton.jit(do_not_specialize=["slots", "rows", "maxima", "sums", "num_flat", "num_splits"])
def _row_statistics(
    q, k, slots, rows, q_indptr, kv_indptr, maxima, sums,
    stride_qr, stride_qh, stride_kr, stride_kh, num_flat, num_splits, num_kv_heads, scale,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, HAS_SLOTS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of exponentials of BLOCK_M rows over one split of the keys."""
    tile, request = tl.program_id(0), tl.program_id(2)
    split, head = tl.program_id(1) // num_kv_heads, tl.program_id(1) % num_kv_heads
    q_start, kv_start = tl.load(q_indptr + request).to(tl.int64), tl.load(kv_indptr + request).to(tl.int64)
    num_flat_rows = (tl.load(q_indptr + request + 1) - q_start).to(tl.int32) * GROUP
    num_keys = (tl.load(kv_indptr + request + 1) - kv_start).to(tl.int32)
    if tile * BLOCK_M >= num_flat_rows:
        return
    q += (head * GROUP).to(tl.int64) * stride_qh
    k += head.to(tl.int64) * stride_kh
    d = tl.arange(0, BLOCK_D)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = m < num_flat_rows
    position = tl.load(rows + q_start + m // GROUP, mask=valid, other=-1).to(tl.int32)  # [BLOCK_M]
    queries = _queries(q, stride_qr, stride_qh, m, valid, q_start, d, scale, HEAD_DIM, GROUP, UPCAST)

    per_split = tl.cdiv(tl.cdiv(num_keys, BLOCK_N), num_splits) * BLOCK_N
    start = split * per_split
    end = tl.minimum(tl.minimum(start + per_split, num_keys), tl.max(position, 0) + 1)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for block in range(start, end, BLOCK_N):
        at = block + tl.arange(0, BLOCK_N)
        inside = at < num_keys
        keys = _keys(k, slots, stride_kr, at, inside, kv_start, d, HEAD_DIM, HAS_SLOTS)
        logits = _product(queries, tl.trans(keys), scale, UPCAST)  # [BLOCK_M, BLOCK_N]
        seen = inside[None, :] & (at[None, :] <= position[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        new = tl.maximum(largest, tl.max(logits, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
        largest = new
    place = (split * num_kv_heads + head).to(tl.int64) * num_flat + q_start * GROUP + m
    tl.store(maxima + place, largest, mask=valid)
    tl.store(sums + place, total, mask=valid)


@triton.jit(
    do_not_specialize=["maxima", "sums", "largest_out", "inverse_out", "num_rows", "num_splits"]
)
def _combine(maxima, sums, largest_out, inverse_out, num_rows, num_splits, BLOCK: tl.constexpr):
    """One maximum and reciprocal sum per row, from those of ``num_splits`` pieces."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_rows
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(num_splits):
        maximum = tl.load(maxima + at, mask=inside, other=float("-inf"))
        new = tl.maximum(largest, maximum)
        base = tl.where(new == float("-inf"), 0.0, new)
        added = tl.load(sums + at, mask=inside, other=0.0) * tl.exp(maximum - base)
        total = total * tl.exp(largest - base) + added
        largest = new
        maxima += num_rows
        sums += num_rows
    tl.store(largest_out + at, largest, mask=inside)
    tl.store(inverse_out + at, 1.0 / tl.where(inside, total, 1.0), mask=inside)


@triton.jit(do_not_specialize=["slots", "rows", "largest", "inverse", "num_flat", "num_scores"])
def _column_sums(
    q, k, slots, rows, q_indptr, kv_indptr, largest, inverse, scores, zeros,
    stride_qr, stride_qh, stride_kr, stride_kh, num_flat, num_scores, scale, log_p,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, HAS_SLOTS: tl.constexpr, UPCAST: tl.constexpr,
    MAXIMUM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys' columns over all rows of a KV head: sums or maxima, and entries below p."""
    head, request = tl.program_id(1), tl.program_id(2)
    first_key = tl.program_id(0) * BLOCK_N
    q_start, kv_start = tl.load(q_indptr + request).to(tl.int64), tl.load(kv_indptr + request).to(tl.int64)
    num_rows = (tl.load(q_indptr + request + 1) - q_start).to(tl.int32)
    num_keys = (tl.load(kv_indptr + request + 1) - kv_start).to(tl.int32)
    if first_key >= num_keys:
        return
    q += (head * GROUP).to(tl.int64) * stride_qh
    k += head.to(tl.int64) * stride_kh
    statistics = head.to(tl.int64) * num_flat + q_start * GROUP
    d = tl.arange(0, BLOCK_D)
    at = first_key + tl.arange(0, BLOCK_N)
    inside = at < num_keys
    keys = _keys(k, slots, stride_kr, at, inside, kv_start, d, HEAD_DIM, HAS_SLOTS)

    # Rows ascend: the first of them see none of these keys.
    blind = tl.zeros([BLOCK_R], tl.int32)
    for block in range(0, num_rows, BLOCK_R):
        r = block + tl.arange(0, BLOCK_R)
        position = tl.load(rows + q_start + r, mask=r < num_rows, other=first_key)
        blind += (position < first_key).to(tl.int32)
    first_row = tl.sum(blind, 0) * GROUP // BLOCK_M * BLOCK_M

    column = tl.zeros([BLOCK_N], tl.float32)
    small = tl.zeros([BLOCK_N], tl.int32)
    for block in range(first_row, num_rows * GROUP, BLOCK_M):
        m = block + tl.arange(0, BLOCK_M)
        valid = m < num_rows * GROUP
        position = tl.load(rows + q_start + m // GROUP, mask=valid, other=-1).to(tl.int32)  # [BLOCK_M]
        maximum = tl.load(largest + statistics + m, mask=valid, other=0.0)
        reciprocal = tl.load(inverse + statistics + m, mask=valid, other=0.0)
        queries = _queries(q, stride_qr, stride_qh, m, valid, q_start, d, scale, HEAD_DIM, GROUP, UPCAST)
        logits = _product(keys, tl.trans(queries), scale, UPCAST)  # [BLOCK_N, BLOCK_M]
        seen = inside[:, None] & (at[:, None] <= position[None, :])
        logits = tl.where(seen, logits, float("-inf"))
        attention = tl.exp(logits - maximum[None, :]) * reciprocal[None, :]
        if MAXIMUM:
            column = tl.maximum(column, tl.max(attention, 1))
        else:
            column += tl.sum(attention, 1)
        small += tl.sum((seen & (logits < (maximum + log_p)[None, :])).to(tl.int32), 1)
    tl.store(scores + head.to(tl.int64) * num_scores + kv_start + at, column, mask=inside)
    tl.atomic_add(zeros + request, tl.sum(small.to(tl.int64), 0), sem="relaxed")


class Tiles(NamedTuple):
    """Rows, keys and head dimensions that a program works on at a time."""

    m: int
    n: int
    d: int
    upcast: bool

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor) -> Tiles:
        """Tensor cores multiply 16-bit operands of one type; all else is float32 without them."""
        d = max(16, triton.next_power_of_2(q.shape[2]))
        if q.dtype == k.dtype != torch.float32:
            return cls(64, 128 if d <= 128 else 64, d, False)
        return cls(16, 16, d, True)


def post_vision_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    p: float = 0.01,
    reduce: str = "sum",
    rows: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> PostVisionScores:
    """See the CPU version; the keys are read where they lie.

    Returns:
        ``zeros`` as a 0-dim int64 tensor on the device, and ``entries`` as one where ``rows`` is given.
    """
    num_rows, num_q_heads, _ = q.shape
    num_keys = len(k) if slots is None else len(slots)
    if (rows is None and num_rows > num_keys) or num_q_heads % k.shape[1]:
        shape = [num_keys, *k.shape[1:]]
        raise ValueError(f"q is {list(q.shape)} and k is {shape}; R <= n and Hkv | Hq needed")
    if not num_rows or not num_keys:
        raise ValueError(f"{num_rows} voting rows and {num_keys} keys; at least one of each needed")
    if rows is None:
        positions = torch.arange(num_keys - num_rows, num_keys, device=q.device)
        entries = num_q_heads * num_rows * (2 * num_keys - num_rows + 1) // 2
    else:
        positions, entries = rows, num_q_heads * (rows + 1).sum()
    # [0, R] and [0, n], made on the device.
    q_indptr, kv_indptr = (torch.arange(0, x + 1, x, device=q.device) for x in (num_rows, num_keys))
    scores, zeros = post_vision_scores_ragged(
        q, k, q_indptr, kv_indptr, slots, positions, scale, p, reduce, num_rows, num_keys
    )
    return PostVisionScores(scores, zeros[0], entries)


def post_vision_scores_ragged(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    q_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    slots: torch.Tensor | None,
    rows: torch.Tensor,
    scale: float,
    p: float,
    reduce: str,
    max_q_len: int,
    max_kv_len: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the CPU version. Nothing waits for the device; results do not depend on its size."""
    _check(q, k_buffer, q_indptr, kv_indptr, slots, rows, reduce)
    (num_rows, num_q_heads, head_dim), num_kv_heads = q.shape, k_buffer.shape[1]
    group, num_requests = num_q_heads // num_kv_heads, len(q_indptr) - 1
    num_scores = len(k_buffer) if slots is None else len(slots)
    scores = torch.zeros(num_kv_heads, num_scores, dtype=torch.float32, device=q.device)
    zeros = torch.zeros(num_requests, dtype=torch.int64, device=q.device)
    if not num_rows or not num_scores:
        return scores, zeros
    tiles = Tiles.of(q, k_buffer)
    num_tiles, num_blocks = triton.cdiv(max_q_len * group, tiles.m), triton.cdiv(max_kv_len, tiles.n)
    num_splits = PROGRAMS // (num_tiles * num_kv_heads * num_requests)
    num_splits = max(1, min(num_splits, num_blocks, MAX_SPLITS))

    pieces = torch.empty(2, num_splits, num_kv_heads, num_rows * group, device=q.device)
    statistics = torch.empty_like(pieces[:, 0])
    strides = q.stride(0), q.stride(1), k_buffer.stride(0), k_buffer.stride(1), num_rows * group
    inputs = q, k_buffer, rows if slots is None else slots, rows, q_indptr, kv_indptr
    shape = dict(
        HEAD_DIM=head_dim,
        GROUP=group,
        HAS_SLOTS=slots is not None,
        UPCAST=tiles.upcast,
        BLOCK_M=tiles.m,
        BLOCK_N=tiles.n,
        BLOCK_D=tiles.d,
        num_stages=2,
    )
    _row_statistics[num_tiles, num_splits * num_kv_heads, num_requests](
        *inputs, *pieces, *strides, num_splits, num_kv_heads, scale, **shape, num_warps=8 if tiles.upcast else 4
    )
    num_statistics = statistics[0].numel()
    _combine[(triton.cdiv(num_statistics, 128),)](
        *pieces, *statistics, num_statistics, num_splits, BLOCK=128, num_warps=4
    )
    _column_sums[num_blocks, num_kv_heads, num_requests](
        *inputs, *statistics, scores, zeros, *strides, num_scores, scale, math.log(p),
        MAXIMUM=reduce == "max", BLOCK_R=1024, **shape, num_warps=8,
    )  # fmt: skip
    return scores, zeros


def _check(q, k, q_indptr, kv_indptr, slots, rows, reduce) -> None:
    """Raises ValueError for what the kernels would misread."""
    if q.dim() != 3 or k.dim() != 3 or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q is {list(q.shape)} and k is {list(k.shape)}; [R, Hq, D], [n, Hkv, D] and Hkv | Hq needed")
    for name, x in ("q", q), ("k", k):
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{name} is {x.dtype}; float32, float16 or bfloat16 needed")
        if x.stride(2) != 1:
            raise ValueError(f"{name} has strides {x.stride()}; its last dimension must be contiguous")
    lists = {"q_indptr": q_indptr, "kv_indptr": kv_indptr, "rows": rows}
    lists |= {} if slots is None else {"slots": slots}
    for name, x in lists.items():
        if x.dim() != 1 or x.dtype not in (torch.int32, torch.int64) or not x.is_contiguous():
            raise ValueError(f"{name} is {list(x.shape)} {x.dtype}; a contiguous list of int32 or int64 needed")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}")
    if k.device != q.device:
        raise ValueError(f"k is on {k.device} and q on {q.device}")
    if len(rows) != len(q) or len(q_indptr) != len(kv_indptr) or len(q_indptr) < 2:
        sizes = {name: len(x) for name, x in lists.items()}
        raise ValueError(f"{sizes} for {len(q)} queries; one row per query and two indptr of B + 1 needed")
    if reduce not in ("sum", "max"):
        raise ValueError(f"reduce is {reduce!r}; sum or max needed")


def aot_cases() -> dict[str, Callable[[], None]]:
    """Launches at production shapes with tensors on the CPU, for compiling ahead of time."""

    def case(num_q_heads: int, num_kv_heads: int, dtype: torch.dtype, reduce: str, pooled: bool, num_rows: int):
        n = 32_768
        q = torch.empty(num_rows, num_q_heads, 128, dtype=dtype)
        k = torch.empty(n, num_kv_heads, 128, dtype=dtype)
        post_vision_scores(q, k, 0.088, 0.01, reduce, slots=torch.arange(n) if pooled else None)

    qwen, mistral = (28, 4), (32, 8)
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return {
        "qwen2.5-vl-7b": lambda: case(*qwen, bf16, "sum", True, 64),
        "qwen2.5-vl-7b max": lambda: case(*qwen, bf16, "max", True, 64),
        "qwen2.5-vl-7b whole prompt": lambda: case(*qwen, bf16, "sum", True, 8192),
        "llava-v1.6-mistral-7b": lambda: case(*mistral, bf16, "sum", True, 64),
        "llava-v1.6-mistral-7b max": lambda: case(*mistral, bf16, "max", True, 64),
        "llava-v1.6-mistral-7b gathered": lambda: case(*mistral, bf16, "sum", False, 64),
        "llava-v1.6-mistral-7b float16": lambda: case(*mistral, fp16, "sum", True, 64),
        "llava-v1.6-mistral-7b float32": lambda: case(*mistral, fp32, "sum", True, 64),
    }
