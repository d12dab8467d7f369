"""Which cells each request sees, where an accelerator can read it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class RowTable(NamedTuple):
    """What the rows of SGLang's ``req_to_token`` see of a compacted prompt, ``N`` rows, ``L`` layers.

    A request at sequence length s with ``own = s - first_own`` sees, in layer l, first its fixed
    cells ``cells[fixed[l] : fixed[l + 1]]`` and then slots of its own, ``req_to_token[row, s - m : s]``
    with ``m = sliding[l + 1] - sliding[l]`` where ``sliding[L] > 0``, else ``m = own``. It sees nothing
    where ``own <= 0``: SGLang pads the batches of a CUDA graph with such requests. A request whose
    prompt is exact has ``first_own`` 0 and no fixed cells.

    Attributes:
        cells: ``[N]`` int64, the address of the row's fixed cells: int32, layer after layer; read only
            where there are any.
        fixed: ``[N, L + 1]`` int32, where each layer's begin among them.
        sliding: ``[N, L + 1]`` int32, prefix sums over the layers of how many of its newest slots the
            request sees; all 0 where it sees them all.
        first_own: ``[N]`` int32; tokens from this sequence position on have slots of their own.
    """

    cells: torch.Tensor
    fixed: torch.Tensor
    sliding: torch.Tensor
    first_own: torch.Tensor

    @classmethod
    def empty(cls, num_rows: int, num_layers: int, device: torch.device | str) -> RowTable:
        """A table of exact rows."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        per_layer = num_rows, num_layers + 1
        return cls(zeros(num_rows, dtype=torch.int64), zeros(*per_layer), zeros(*per_layer), zeros(num_rows))
