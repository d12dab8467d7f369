"""Ragged attention through FlashInfer's paged kernels: per-layer lengths, planned on the device.

``RaggedDecode`` plans decode for all layers by one kernel, inside a CUDA graph if need be;
``RaggedExtend`` plans prefill over ragged prefixes on the host. Page size 1, flat cells. Importing
this package imports torch and triton only; FlashInfer is imported when an object is made on a GPU.
"""

from .decode import RaggedDecode
from .extend import RaggedExtend

__all__ = ["RaggedDecode", "RaggedExtend"]
