"""Ragged extend: new tokens attend causally behind prefixes of any length."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_vlkv.kernels.ragged_attention.decode import LOG2_E, STAGES, check_attention


def ragged_extend(
    q: torch.Tensor,
    k_cells: torch.Tensor,
    v_cells: torch.Tensor,
    qo_indptr: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
    max_extend_len: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The E new tokens of each request are the last E of its n rows and attend causally.

    Query i sees rows ``j < n - E + i + 1``; the new tokens' K and V are in the cells already, at the
    end of the request's list.

    Args:
        q: ``[T, Hq, D]`` float32, bfloat16 or float16; tokens may be further apart.
        k_cells, v_cells: ``[num_cells, Hkv, D]`` contiguous, one dtype; converted to q's.
        qo_indptr: ``[B + 1]`` int32, request b's queries are ``q[qo_indptr[b] : qo_indptr[b + 1]]``.
        indptr: ``[B + 1]`` int32, one layer's, offsets into ``indices``.
        indices: flat int32 cell ids.
        scale: of the logits, before the softmax.
        max_extend_len: the largest E, known to the host; queries beyond it would be left unwritten.
        out: ``[T, Hq, D]`` contiguous, in q's dtype.

    Returns:
        ``[T, Hq, D]``; zeros for queries that see no row, which only requests with n < E have. Tokens
        of no request, behind the last, are left as they are.
    """
    out = check_attention(q, k_cells, v_cells, indices, out)
    num_requests = qo_indptr.shape[0] - 1
    for name, x in (("qo_indptr", qo_indptr), ("indptr", indptr)):
        if x.shape != (num_requests + 1,) or x.dtype != torch.int32 or not x.is_contiguous():
            raise ValueError(f"{name} must be [B + 1] contiguous int32; it is {list(x.shape)} {x.dtype}")
    _, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cells.shape[1]
    group = num_q_heads // num_kv_heads
    if max_extend_len <= 0 or num_requests == 0:
        return out
    block_d = max(16, triton.next_power_of_2(head_dim))
    row_bytes = block_d * q.element_size()
    lines = max_extend_len * group
    block_m = 16 if lines <= 16 else 128 if row_bytes <= 256 else 64
    grid = triton.cdiv(lines, block_m), num_kv_heads, num_requests
    _extend[grid](
        q,
        k_cells,
        v_cells,
        out,
        qo_indptr,
        indptr,
        indices,
        scale * LOG2_E,
        q.stride(0),
        HKV=num_kv_heads,
        GROUP=group,
        D=head_dim,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        TILE=max(16, 32 * 256 // max(256, row_bytes)),  # 64 spill on sm_80
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=4 if block_m == 16 else 8,
        num_stages=STAGES,
    )
    return out


@triton.jit(do_not_specialize=["qo_indptr_ptr", "indptr_ptr"])  # a layer's may begin anywhere
def _extend(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    qo_indptr_ptr,
    indptr_ptr,
    indices_ptr,
    scale_log2,
    q_stride,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (t, h, b): a tile of ``query * G + g`` lines of KV head h, so that the G query heads
    share what is read. The longest tiles come first."""
    kv_head = tl.program_id(1)
    request = tl.program_id(2)
    first_query = tl.load(qo_indptr_ptr + request)
    num_queries = tl.load(qo_indptr_ptr + request + 1) - first_query
    first_line = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    if first_line >= num_queries * GROUP:
        return
    begin = tl.load(indptr_ptr + request)
    num_rows = tl.load(indptr_ptr + request + 1) - begin

    line = first_line + tl.arange(0, BLOCK_M)
    query = line // GROUP
    head = kv_head * GROUP + line % GROUP
    d = tl.arange(0, BLOCK_D)
    real = (query < num_queries)[:, None] & (d < D)[None, :]
    token = (first_query + query).to(tl.int64)
    at = (token * q_stride + head * D)[:, None] + d[None, :]  # [BLOCK_M, BLOCK_D]
    q = tl.load(q_ptr + at, mask=real, other=0.0)

    # Lines past the last query see as much as it does.
    seen_rows = num_rows - num_queries + tl.minimum(query, num_queries - 1) + 1  # [BLOCK_M]
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    n = tl.arange(0, TILE)
    for start in range(0, tl.max(seen_rows, 0), TILE):
        listed = start + n < num_rows
        cell = tl.load(indices_ptr + begin + start + n, mask=listed, other=0).to(tl.int64)
        row = (cell * HKV + kv_head) * D  # [TILE]
        mask = listed[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + row[:, None] + d[None, :], mask=mask, other=0.0).to(q.dtype)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [BLOCK_M, TILE]
        logits = tl.where((start + n)[None, :] < seen_rows[:, None], logits, -float("inf"))
        v = tl.load(v_ptr + row[:, None] + d[None, :], mask=mask, other=0.0).to(q.dtype)
        peak_now = tl.maximum(peak, tl.max(logits, 1))
        # A line without a row so far has a peak of minus infinity, which must not be subtracted.
        safe = tl.where(peak_now == -float("inf"), 0.0, peak_now)
        weights = tl.exp2(logits - safe[:, None])
        keep = tl.exp2(peak - safe)
        total = total * keep + tl.sum(weights, 1)
        acc = acc * keep[:, None]
        acc = tl.dot(weights.to(q.dtype), v, acc, input_precision=PRECISION)
        peak = peak_now

    acc = acc / tl.where(seen_rows > 0, total, 1.0)[:, None]
    at = (token * (HKV * GROUP * D) + head * D)[:, None] + d[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=real)
