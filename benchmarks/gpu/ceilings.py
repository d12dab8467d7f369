"""What the device can do at best: bytes moved, and operations of a matrix product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benchmarks.gpu.record import Part
from benchmarks.gpu.shapes import Model, models
from benchmarks.gpu.subjects import COPYING
from benchmarks.gpu.timing import Clock

CASE = "device"
BLOCK_ROWS = 32


@triton.jit(do_not_specialize=["num_rows"])  # a list per layer, and none compiles it again
def _gather(k_ptr, v_ptr, indices_ptr, out_ptr, num_rows, H: tl.constexpr, D: tl.constexpr,
            ROWS: tl.constexpr, COPY: tl.constexpr):  # fmt: skip
    """Program ``i * H + h`` reads head h of ROWS rows, K and V, and writes them or, else, their sum.

    As in the decode kernel, the heads of the same rows are neighbours.
    """
    block, head = tl.program_id(0) // H, tl.program_id(0) % H
    at = block * ROWS + tl.arange(0, ROWS)
    inside = at < num_rows
    d = tl.arange(0, D)
    rows = tl.load(indices_ptr + at, mask=inside, other=0).to(tl.int64)
    source = rows[:, None] * (H * D) + head * D + d[None, :]  # [ROWS, D]
    k = tl.load(k_ptr + source, mask=inside[:, None], other=0.0)
    v = tl.load(v_ptr + source, mask=inside[:, None], other=0.0)
    if COPY:
        target = at.to(tl.int64)[:, None] * (H * D) + head * D + d[None, :]
        tl.store(out_ptr + target, k, mask=inside[:, None])
        tl.store(out_ptr + num_rows.to(tl.int64) * (H * D) + target, v, mask=inside[:, None])
    else:
        total = tl.sum(tl.sum(k.to(tl.float32) + v.to(tl.float32), 1), 0)
        tl.store(out_ptr + block.to(tl.int64) * H + head, total)


def gather_read(k_cells: torch.Tensor, v_cells: torch.Tensor, indices: torch.Tensor, sums: torch.Tensor) -> None:
    """Reads K and V of the rows ``indices [n]``; ``sums [blocks, H]`` float32 takes a sum per program."""
    _, heads, dim = k_cells.shape
    grid = (triton.cdiv(len(indices), BLOCK_ROWS) * heads,)
    _gather[grid](k_cells, v_cells, indices, sums, len(indices), heads, dim, BLOCK_ROWS, False, num_warps=4)


def gather_copy(k_cells: torch.Tensor, v_cells: torch.Tensor, indices: torch.Tensor, out: torch.Tensor) -> None:
    """``out[0] = k_cells[indices]``, ``out[1] = v_cells[indices]``, ``[2, n, H, D]``."""
    _, heads, dim = k_cells.shape
    grid = (triton.cdiv(len(indices), BLOCK_ROWS) * heads,)
    _gather[grid](k_cells, v_cells, indices, out, len(indices), heads, dim, BLOCK_ROWS, True, num_warps=4)


def sums_for(num_rows: int, model: Model, device: torch.device) -> torch.Tensor:
    return torch.empty(triton.cdiv(num_rows, BLOCK_ROWS), model.kv_heads, device=device)


def run(part: Part, clock: Clock) -> None:
    size = 1 << 10 if clock.rehearsal else 1 << 30  # float32 elements: 4 GiB
    source = torch.randn(size, device=clock.device)
    target = torch.empty_like(source)
    num_bytes = source.nbytes
    part.add(CASE, "copy", clock.measure(lambda: target.copy_(source)), moved=2 * num_bytes)
    total = torch.empty((), device=clock.device)
    part.add(CASE, "read (sum)", clock.measure(lambda: torch.sum(source, 0, out=total)), moved=num_bytes)
    for model in models(clock.rehearsal):
        row = model.kv_heads * model.head_dim
        flat = target.view(clock.dtype)
        num_rows = len(flat) // row // 2 * 2  # K in one half and V in the other
        cells = torch.randn(num_rows, model.kv_heads, model.head_dim, dtype=clock.dtype, device=clock.device)
        half = num_rows // 2
        k, v = cells[:half], cells[half:]
        indices = torch.randperm(half, device=clock.device).int()
        out = flat[: num_rows * row].view(2, half, model.kv_heads, model.head_dim)
        with part.about(COPYING):
            _by_index(part, clock, model, k, v, indices, out)
    n = 64 if clock.rehearsal else 8192
    a, b = (torch.randn(n, n, dtype=clock.dtype, device=clock.device) for _ in range(2))
    product = torch.empty_like(a)
    timing = clock.measure(lambda: torch.mm(a, b, out=product))
    part.add(CASE, f"matrix product {n}x{n}x{n}", timing, flops=2 * n**3)


def _by_index(
    part: Part, clock: Clock, model: Model, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, out: torch.Tensor
) -> None:
    """Copies and reads all rows ``[n, H, D]`` in the order of ``indices [n]``; ``out`` is ``[2, n, H, D]``."""
    half, row = len(indices), model.kv_heads * model.head_dim
    gather_copy(k, v, indices, out)
    same = torch.equal(out[0], k[indices.long()]) and torch.equal(out[1], v[indices.long()])
    part.check(f"gathered copy, {model.name}", same)
    sums = sums_for(half, model, clock.device)
    chunk = f"{2 * model.head_dim} B chunks of {2 * row} B rows"
    copied, read = (lambda: gather_copy(k, v, indices, out)), (lambda: gather_read(k, v, indices, sums))
    moved = k.nbytes + v.nbytes + indices.nbytes
    part.add(CASE, f"copy by index, {chunk}", clock.measure(copied), moved=moved + k.nbytes + v.nbytes)
    part.add(CASE, f"read by index, {chunk}", clock.measure(read), moved=moved)
    layers = indices.chunk(model.layers)
    each = clock.capture(lambda: [gather_read(k, v, mine, sums) for mine in layers])
    part.add(CASE, f"read by index, {chunk}, {len(layers)} launches", clock.measure(each), moved=moved)
