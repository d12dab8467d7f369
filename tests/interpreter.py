"""Triton's interpreter computes in bfloat16 as a GPU does: rounded to nearest, products in float32.

It holds bfloat16 as uint16; left alone it truncates to it and ``tl.dot`` multiplies the integers.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _widened(data: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(data).view(np.int16)).view(torch.bfloat16).float().numpy()


def _rounded(data: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)


def repair_bfloat16() -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, src, dst_type):
        types = src.dtype.scalar, dst_type.scalar
        if types == (tl.bfloat16, tl.float32):
            return handle(_widened(src.data), tl.float32)
        if types == (tl.float32, tl.bfloat16):
            return handle(_rounded(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, d, *options):
        a, b = (handle(_widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, d, *options)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
