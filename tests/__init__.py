"""Triton kernels that tests of this process import run in Triton's interpreter.

Triton decides when a kernel is decorated, its own library's included, so they are all imported here.
Servers are processes of their own and never see the variable.
"""

import os
import pkgutil
from importlib import import_module

os.environ["TRITON_INTERPRET"] = "1"
for package in ("sglang_vlkv.kernels", "flashinfer_ext"):
    if pkgutil.find_loader(package) is None:
        continue
    for module in pkgutil.walk_packages(import_module(package).__path__, f"{package}."):
        if module.name.endswith(".triton"):
            import_module(module.name)
del os.environ["TRITON_INTERPRET"]
