"""Ranking: scores and tiers in, winners out."""

from sglang_vlkv.kernels import by_device
from sglang_vlkv.kernels.selection import cpu
from sglang_vlkv.kernels.selection.cpu import rank, top_positions

select_rows = by_device(cpu.select_rows)

__all__ = ["rank", "select_rows", "top_positions"]
