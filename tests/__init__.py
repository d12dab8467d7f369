"""Triton kernels that tests of this process import run in Triton's interpreter.

Triton decides when a kernel is decorated, its own library's included, so they are all imported here.
Servers are processes of their own and never see the variable.
"""

import os
from importlib import import_module
from importlib.util import find_spec
from pkgutil import walk_packages

import numpy as np
import torch

os.environ["TRITON_INTERPRET"] = "1"
if find_spec("triton"):
    import_module("triton.experimental.gluon")  # which Triton imports at a first launch
    import_module("tests.interpreter").repair_bfloat16()
for package in ("sglang_vlkv.kernels", "flashinfer_ext"):
    if find_spec(package):
        for module in walk_packages(import_module(package).__path__, f"{package}."):
            import_module(module.name)
import_module("triton.experimental.gluon")  # which the interpreter imports at the first launch
del os.environ["TRITON_INTERPRET"]

# The interpreter keeps bfloat16 in integers of 16 bits: it would multiply those, and it cuts float32
# off where a GPU rounds to even.
language, interpreter = import_module("triton.language"), import_module("triton.runtime.interpreter")
builder = interpreter.InterpreterBuilder
multiply, convert = builder.create_dot, builder.cast_impl


def create_dot(self, a, b, *rest):
    return multiply(self, *(as_float32(x) if x.dtype.scalar == language.bfloat16 else x for x in (a, b)), *rest)


def as_float32(x):
    values = (x.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(values, language.float32)


def cast_impl(self, source, target_type):
    if source.dtype.scalar != language.float32 or target_type.scalar != language.bfloat16:
        return convert(self, source, target_type)
    rounded = torch.from_numpy(np.atleast_1d(source.data)).bfloat16().view(torch.uint16).numpy()
    return interpreter.TensorHandle(rounded.reshape(source.data.shape), language.bfloat16)


builder.create_dot, builder.cast_impl = create_dot, cast_impl
