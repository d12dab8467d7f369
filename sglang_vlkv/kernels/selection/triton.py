"""Radix select: one program per layer and head finds the key of its last winner, 8 bits at a time.

A key of 40 bits orders by tier, then by descending score: winners are the smallest, and of those
that equal the last one the earliest.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Callable, Sequence

import torch
import triton
import triton.language as tl

from sglang_vlkv.kernels import on_device
from sglang_vlkv.kernels.selection.cpu import check

MOST_POSITIONS = 1 << 30  # positions are counted in 32 bits


@triton.jit
def _keys(scores, tier, at, inside):
    """[BLOCK] int64: ``tier + 128`` above the 32 bits of the score, turned around."""
    bits = tl.load(scores + at, mask=inside, other=0.0).to(tl.int32, bitcast=True).to(tl.int64)
    bits = tl.where(bits == -(1 << 31), 0, bits)  # -0.0 equals 0.0
    # As integers, positive floats ascend and negative ones descend.
    turned = tl.where(bits >= 0, (1 << 31) - 1 - bits, (1 << 32) + bits)
    turned = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0, turned)  # NaN sorts first, as in torch
    return ((tl.load(tier + at, mask=inside, other=0).to(tl.int64) + 128) << 32) + turned


@triton.jit(do_not_specialize=["num_positions", "num_out"])  # else a server compiles while it serves
def _select_rows(scores, tier, starts, out, num_positions, num_out, num_heads, BLOCK: tl.constexpr):
    layer, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(starts + layer)
    wanted = (tl.load(starts + layer + 1) - start).to(tl.int32)
    first = (layer * num_heads + head).to(tl.int64) * num_positions
    scores += first
    tier += first
    out += head.to(tl.int64) * num_out + start

    bins = tl.arange(0, 256)
    last = tl.full([], 0, tl.int64)  # the leading digits of the last winner's key
    left = wanted  # winners among the keys that begin with them
    for digit in range(5):
        shift = 32 - 8 * digit
        counts = tl.zeros([256], tl.int32)
        for block in range(0, num_positions, BLOCK):
            at = block + tl.arange(0, BLOCK)
            inside = at < num_positions
            key = _keys(scores, tier, at, inside)
            alike = inside & ((key >> (shift + 8)) == last)
            counts += tl.histogram(tl.where(alike, (key >> shift) & 255, 0).to(tl.int32), 256)
            counts -= tl.where(bins == 0, BLOCK - tl.sum(alike.to(tl.int32), 0), 0)
        value = tl.sum((tl.cumsum(counts, 0) < left).to(tl.int32), 0)
        left -= tl.sum(tl.where(bins < value, counts, 0), 0)
        last = last * 256 + value

    smaller = tl.full([], 0, tl.int32)  # keys so far
    equal = tl.full([], 0, tl.int32)
    for block in range(0, num_positions, BLOCK):
        at = block + tl.arange(0, BLOCK)
        inside = at < num_positions
        key = _keys(scores, tier, at, inside)
        is_smaller, is_equal = inside & (key < last), inside & (key == last)
        both = tl.cumsum(is_smaller.to(tl.int32) + (is_equal.to(tl.int32) << 16), 0)
        equals = equal + (both >> 16)
        wins = is_smaller | (is_equal & (equals <= left))
        place = smaller + (both & 0xFFFF) + tl.minimum(equals, left) - 1
        tl.store(out + place, at.to(tl.int64), mask=wins)
        smaller += tl.sum(is_smaller.to(tl.int32), 0)
        equal += tl.sum(is_equal.to(tl.int32), 0)


def select_rows(scores: torch.Tensor, tier: torch.Tensor, num_kept: Sequence[int]) -> torch.Tensor:
    """See the CPU version. One launch; nothing waits for the device.

    Raises:
        ValueError: as the CPU version; scores or tier not contiguous, or on different devices.
    """
    check(scores, tier, num_kept)
    if not scores.is_contiguous() or not tier.is_contiguous():
        raise ValueError(f"scores have strides {scores.stride()} and tier {tier.stride()}; contiguous ones needed")
    if tier.device != scores.device:
        raise ValueError(f"tier is on {tier.device} and scores on {scores.device}")
    num_layers, num_heads, n = scores.shape
    if n > MOST_POSITIONS:
        raise ValueError(f"{n} positions; at most {MOST_POSITIONS} can be ranked")
    starts = list(accumulate(num_kept, initial=0))
    out = torch.empty(num_heads, starts[-1], dtype=torch.int64, device=scores.device)
    starts = on_device(starts, scores.device)
    _select_rows[num_layers, num_heads](
        scores, tier, starts, out, n, out.shape[1], num_heads, BLOCK=1024 if n <= 1024 else 4096,
        num_warps=8,
    )  # fmt: skip
    return out


def aot_cases() -> dict[str, Callable[[], None]]:
    """Launches at production shapes with tensors on the CPU, for compiling ahead of time."""

    def case(num_layers: int, num_heads: int, n: int) -> None:
        shape = num_layers, num_heads, n
        select_rows(torch.empty(shape), torch.empty(shape, dtype=torch.int8), [n // 10] * num_layers)

    return {
        "qwen2.5-vl-7b": lambda: case(28, 4, 32_768),
        "llava-v1.6-mistral-7b": lambda: case(32, 8, 32_768),
        "llava-v1.6-mistral-7b short": lambda: case(32, 8, 2501),
    }
