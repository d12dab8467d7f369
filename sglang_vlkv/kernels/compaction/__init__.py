"""Moving kept rows: exact copies, no arithmetic."""

from sglang_vlkv.kernels.compaction.cpu import gather_rows, scatter_rows

__all__ = ["gather_rows", "scatter_rows"]
