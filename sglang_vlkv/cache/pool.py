"""SGLang's token-to-KV pool as one storage of cells."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_vlkv.cache.requests import Requests


class CellPool(MHATokenToKVPool):
    """All layers' K and V in one allocation, so that any layer's rows may lie in any buffer.

    ``storage[L, 2, rows, H, D]`` with ``k_buffer[l] = storage[l, 0]`` and ``v_buffer[l] =
    storage[l, 1]`` keeps the per-layer layout that SGLang's kernels expect. Cell ``l * 2 * rows +
    slot`` of ``k_cells`` is the K row of layer l and slot, and of ``v_cells`` its V row. A slot
    from SGLang's allocator is L cells, one per layer, which a compacted prompt fills regardless of
    the layer its rows come from.

    Attributes:
        requests: the owners of rows.
    """

    def _create_buffers_normal(self) -> None:
        k_shape, v_shape = self._kv_buffer_shapes()
        if k_shape != v_shape:
            raise ValueError(
                f"--kv-policy needs K and V heads of one size; this model has {k_shape[-1]} and "
                f"{v_shape[-1]}. Serve it with --kv-policy none."
            )
        if self.store_dtype != self.dtype:
            raise ValueError(
                f"--kv-policy cannot serve a {self.dtype} KV cache, which this checkpoint asks for: rows of "
                "a quantised cache share scales. Use --kv-cache-dtype bfloat16, or --kv-policy none."
            )
        rows = k_shape[0]
        with self.memory_saver_adapter.region("kv_cache"):
            self.storage = torch.zeros(
                (self.layer_num, 2, *k_shape), dtype=self.store_dtype, device=self.device
            )
        self.k_buffer = [layer[0] for layer in self.storage]
        self.v_buffer = [layer[1] for layer in self.storage]
        flat = self.storage.view(-1, *k_shape[1:])
        if flat.shape[0] > torch.iinfo(torch.int32).max:
            raise ValueError(
                f"the KV pool has {flat.shape[0]} cells and a cell id is an int32; "
                "lower --max-total-tokens"
            )
        self.k_cells, self.v_cells = flat[: flat.shape[0] - rows], flat[rows:]
        self.cells_per_layer = 2 * rows
        self.requests = Requests()

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot: K and V of all layers."""
        return self.storage[:, :, 0].nbytes

    def packed_cells(self, slots: torch.Tensor, num_kept: list[int]) -> list[torch.Tensor]:
        """Lays layers of different sizes over the cells of ``slots``, layer after layer.

        Cell j is slot ``j % M`` in layer ``j // M``'s buffer.

        Args:
            slots: ``[M]`` with ``M * L >= sum(num_kept)``.
            num_kept: rows per layer.

        Returns:
            Per layer, its cell ids ``[num_kept[l]]`` int32.
        """
        bases = torch.arange(self.layer_num, device=slots.device) * self.cells_per_layer
        cells = (bases[:, None] + slots[None, :]).flatten().to(torch.int32)
        return list(cells[: sum(num_kept)].split(num_kept))
