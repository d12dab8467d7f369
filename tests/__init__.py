"""Triton kernels that tests of this process import run in Triton's interpreter.

Triton decides when a kernel is decorated, its own library's included, so they are all imported here.
Servers are processes of their own and never see the variable.
"""

import os
from importlib import import_module
from importlib.util import find_spec
from pkgutil import walk_packages

os.environ["TRITON_INTERPRET"] = "1"
if find_spec("triton"):
    import_module("triton.experimental.gluon")  # which Triton imports at a first launch
    import_module("tests.interpreter").repair_bfloat16()
for package in ("sglang_vlkv.kernels", "flashinfer_ext"):
    if find_spec(package):
        for module in walk_packages(import_module(package).__path__, f"{package}."):
            import_module(module.name)
del os.environ["TRITON_INTERPRET"]
