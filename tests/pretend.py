"""CPU tensors that say they are on a GPU, to run a GPU's code paths where there is none.

What a GPU would refuse is refused: operations that mix devices. What a GPU would be waited for is
counted: values and shapes that the host reads.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("meta")  # torch knows it everywhere, and nothing of the product asks for it
WAITS = {f"aten::{op}" for op in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim")}


class OnGpu(torch.Tensor):
    """``inner`` on the CPU, with a GPU as its device."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=GPU
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func.name()} outside of PretendGpu")

    def __repr__(self) -> str:
        return f"OnGpu({tuple(self.shape)})"


class PretendGpu(TorchDispatchMode):
    """In it ``device=GPU`` makes :class:`OnGpu` tensors.

    Attributes:
        waits: names of the operations that the host would have waited for.
        sent: shapes of what was copied from the host, for which it would have waited too, had the
            memory not been pinned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.sent: list[torch.Size] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.name().split(".")[0]
        flat = tree_flatten((args, kwargs))[0]
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, OnGpu)]
        target = kwargs.get("device")
        moves = name in ("aten::_to_copy", "aten::copy_")
        if ours and not moves:
            mixed = [x for x in tensors if not isinstance(x, OnGpu) and x.ndim]
            if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
                mixed = [x for x in mixed if x is args[0]]  # indices may lie on the CPU
            if mixed:
                raise RuntimeError(f"{name} mixes devices: {[(type(x).__name__, *x.shape) for x in tensors]}")
        if target is not None:
            to_gpu = torch.device(target).type == GPU.type
            kwargs["device"] = torch.device("cpu")
        elif name == "aten::copy_":
            to_gpu = isinstance(args[0], OnGpu)
        else:
            to_gpu = bool(ours)
        indexed = name == "aten::index" and any(x.dtype == torch.bool for x in ours[1:])
        leaves = moves and bool(ours) and not to_gpu
        if ours and (name in WAITS or indexed) or leaves:
            self.waits.append(name)
        if moves and to_gpu:
            self.sent += [x.shape for x in tensors if not isinstance(x, OnGpu) and x.ndim]
        before = {id(x.inner): x for x in ours}
        bare = tree_map(lambda x: x.inner if isinstance(x, OnGpu) else x, (args, kwargs))
        out = func(*bare[0], **bare[1])

        def wrap(x):
            if not isinstance(x, torch.Tensor) or not to_gpu:
                return x
            same = before.get(id(x))  # what is written in place stays itself
            return OnGpu(x) if same is None else same

        return tree_map(wrap, out)
