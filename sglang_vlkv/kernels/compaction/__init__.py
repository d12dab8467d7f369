"""Moving kept rows: exact copies, and means of what is merged into them."""

from sglang_vlkv.kernels import by_device
from sglang_vlkv.kernels.compaction import cpu

gather_rows = by_device(cpu.gather_rows)
scatter_rows = by_device(cpu.scatter_rows)

__all__ = ["gather_rows", "scatter_rows"]
