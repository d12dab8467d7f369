"""Checks this package against the FlashInfer that is installed, on the GPU that is there.

``python -m flashinfer_ext.check`` plans and runs batches of several shapes, and prints JSON: whether
each plan is FlashInfer's own byte for byte, each output bit for bit what FlashInfer's wrapper
computes and close to attention in float64, in eager mode, with synchronisation forbidden, and
replayed from a CUDA graph that was captured with other lengths; and how long a plan takes. Exits
with 1 where anything differs, with 2 where there is no GPU or no supported FlashInfer, with 5 where
``--seconds`` were over before all was checked. ``--compile`` compiles every kernel that the check loads
and ends; with ``FLASHINFER_CUDA_ARCH_LIST=9.0a``, say, it needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from . import RaggedDecode, RaggedExtend, reference, upstream
from .layout import Heads, Layout, prefers_tensor_cores

LAYERS = 5
SHAPES = (  # query heads, KV heads, head dim, kv dtype, tensor cores
    (28, 4, 128, torch.bfloat16, None),
    (32, 8, 128, torch.bfloat16, None),
    (40, 8, 128, torch.bfloat16, None),
    (16, 1, 64, torch.bfloat16, None),
    (28, 4, 128, torch.float8_e4m3fn, None),
    (16, 16, 128, torch.bfloat16, None),
    (24, 8, 128, torch.bfloat16, None),
    (32, 8, 128, torch.bfloat16, False),
    (16, 16, 64, torch.float8_e4m3fn, False),
)
BATCH_SIZES = (1, 8, 67, 300)


class Batch:
    """Random cells and queries of ``LAYERS`` layers; lengths can be drawn again in place.

    Layer l's part of ``indices`` begins at ``l * capacity``.
    """

    def __init__(
        self, heads: Heads, batch_size: int, kv_dtype: torch.dtype, seed: int, capacity: int
    ) -> None:
        self.rng, self.batch_size, self.capacity = random.Random(seed), batch_size, capacity
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device="cuda").to(torch.bfloat16)

        num_cells = 4096
        self.q = normal(LAYERS, batch_size, heads.num_q_heads, heads.head_dim)
        storage = normal(2, num_cells, heads.num_kv_heads, heads.head_dim).to(kv_dtype)
        self.k_cells, self.v_cells = storage
        total = LAYERS * capacity
        self.indices = torch.randint(
            num_cells, (total,), generator=generator, device="cuda", dtype=torch.int32
        )
        self.indptr = torch.zeros(LAYERS, batch_size + 1, dtype=torch.int32, device="cuda")
        self.lengths: list[list[int]] = []

    def draw(self, empty: bool) -> Batch:
        """New lengths: even layers, uneven ones, short ones, with requests that have no rows if ``empty``."""
        share = self.capacity // self.batch_size

        def layer(kind: int) -> list[int]:
            longest = (share, share, min(130, share), 2 * share // 3, 1)[kind % 5]
            shortest = longest if kind == 0 else 0 if empty else 1
            drawn = [self.rng.randint(shortest, longest) for _ in range(self.batch_size)]
            if kind == 3:  # one request has nearly everything
                drawn = [min(n, 1 if not empty else self.rng.randint(0, 1)) for n in drawn]
                drawn[self.rng.randrange(self.batch_size)] = self.capacity - self.batch_size
            return drawn

        self.lengths = [layer(i) for i in range(LAYERS)]
        offsets = torch.tensor(self.lengths).cumsum(1)
        begin = self.capacity * torch.arange(LAYERS)[:, None]
        self.indptr.copy_(torch.cat([begin, begin + offsets], 1).int())
        return self

    def run(self, decode: RaggedDecode, out: torch.Tensor) -> None:
        decode.plan(self.indptr)
        for i in range(LAYERS):
            scale = self.q.shape[-1] ** -0.5
            decode.run(i, self.q[i], self.k_cells, self.v_cells, self.indptr, self.indices, scale, out=out[i])


def arrays(layout: Layout, ints: torch.Tensor, batch_size: int, chunks: int) -> dict[str, list[int]]:
    """The arrays of one layer's plan that lists ``chunks`` chunks."""

    def at(offset: int, count: int) -> list[int]:
        return ints[offset : offset + 4 * count].view(torch.int32).tolist()

    found = {
        "request_indices": at(layout.request_indices, chunks),
        "kv_tile_indices": at(layout.kv_tile_indices, chunks),
        "o_indptr": at(layout.o_indptr, batch_size + 1),
        "kv_chunk_size": at(layout.kv_chunk_size, 1),
    }
    if layout.block_valid_mask >= 0:
        found["block_valid_mask"] = ints[layout.block_valid_mask :][: layout.num_blocks].tolist()
    if layout.qo_tile_indices >= 0:
        found["qo_tile_indices"] = at(layout.qo_tile_indices, chunks)
        found["merge_indptr"] = at(layout.merge_indptr, batch_size + 1)
        found["total_num_rows"] = at(layout.total_num_rows, 1)
    return found


def flashinfers(decode: RaggedDecode, batch: Batch, layer: int, floats: torch.Tensor) -> Any:
    """FlashInfer's CUDA-graph wrapper, planned on the host for one layer."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    begin, end = batch.indptr[layer, 0].item(), batch.indptr[layer, -1].item()
    indices = batch.indices[begin:end] if end > begin else batch.indices[:1]
    indptr = batch.indptr[layer] - begin
    last_page_len = torch.ones(batch.batch_size, dtype=torch.int32, device="cuda")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        floats,
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=decode.use_tensor_cores,
        paged_kv_indptr_buffer=torch.empty_like(indptr),
        paged_kv_indices_buffer=torch.empty_like(indices),
        paged_kv_last_page_len_buffer=torch.empty_like(last_page_len),
        backend="fa2",
    )
    heads = decode.heads
    kv_dtype = batch.k_cells.dtype
    wrapper.plan(
        *(indptr, indices, last_page_len, heads.num_q_heads, heads.num_kv_heads, heads.head_dim, 1),
        **dict(q_data_type=batch.q.dtype, kv_data_type=kv_dtype, sm_scale=heads.head_dim**-0.5),
    )
    return wrapper


def deviation(batch: Batch, layer: int, out: torch.Tensor) -> float:
    """The largest deviation from attention in float64, over the output's largest value."""
    k_cells, v_cells = (x.to(torch.bfloat16).cpu() for x in (batch.k_cells, batch.v_cells))
    indptr, indices = batch.indptr[layer].cpu(), batch.indices.cpu()
    q = batch.q[layer].cpu()
    exact = reference.ragged_decode(q, k_cells, v_cells, indptr, indices, q.shape[-1] ** -0.5)
    return ((out.double().cpu() - exact).abs().max() / exact.abs().max().clamp_min(1e-3)).item()


def check_decode(shape: tuple, batch_size: int) -> dict[str, Any]:
    """One shape at one batch size; every value of the result that is a bool must be true."""
    num_q_heads, num_kv_heads, head_dim, kv_dtype, tensor_cores = shape
    decode = RaggedDecode(
        *(
            LAYERS,
            batch_size,
            num_q_heads,
            num_kv_heads,
            head_dim,
            torch.bfloat16,
            kv_dtype,
            "cuda",
            tensor_cores,
        )
    )
    capacity = max(6000, 40 * batch_size)
    batch = Batch(decode.heads, batch_size, kv_dtype, seed=batch_size, capacity=capacity)
    floats = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    result: dict[str, Any] = dict(
        **dict(q_heads=num_q_heads, kv_heads=num_kv_heads, head_dim=head_dim, kv_dtype=str(kv_dtype)),
        **dict(kernels="tensor cores" if decode.use_tensor_cores else "CUDA cores", batch_size=batch_size),
        **vars(decode.grid),
        **dict(num_blocks=decode.layout(batch_size).num_blocks),
        **dict(plan_info_equal=True, plans_equal=True, outputs_equal=True, plans_compared=0, deviation=0.0),
    )
    out = torch.full_like(batch.q, torch.nan)
    batch.draw(empty=False).run(decode, out)  # compiles
    torch.cuda.synchronize()
    for empty in (False, True):
        batch.draw(empty)
        out.fill_(torch.nan)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            batch.run(decode, out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        compare(decode, batch, out, floats, result)
    result["without_synchronisation"] = True

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch.run(decode, out)
    result["graph_equal"] = True
    for empty in (True, False):
        batch.draw(empty)
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        replayed = out.clone()
        batch.run(decode, out)
        result["graph_equal"] &= torch.equal(replayed, out) and bool(replayed.isfinite().all())
    result["close"] = result["deviation"] < 0.02
    result["compared"] = result["plans_compared"] > 0
    return result


def compare(
    decode: RaggedDecode, batch: Batch, out: torch.Tensor, floats: torch.Tensor, result: dict[str, Any]
) -> None:
    """Plans and outputs of a batch that has been run, against FlashInfer's; into ``result``."""
    layout = decode.layout(batch.batch_size)
    ours = decode.int_workspace.cpu()
    planner = reference.tensor_core_plan if decode.use_tensor_cores else reference.cuda_core_plan
    for i, lengths in enumerate(batch.lengths):
        if batch.batch_size <= 8 or i == 3:
            result["deviation"] = max(result["deviation"], deviation(batch, i, out[i]))
        plan = planner(lengths, decode.heads, decode.grid)
        if plan.overflows:
            continue
        wrapper = flashinfers(decode, batch, i, floats)
        theirs = wrapper._int_workspace_buffer.cpu()
        chunks = len(plan.request_indices)
        result["plan_info_equal"] &= tuple(map(int, wrapper._plan_info)) == layout.plan_info
        result["plans_equal"] &= arrays(layout, ours[i], batch.batch_size, chunks) == arrays(
            layout, theirs, batch.batch_size, chunks
        )
        theirs = wrapper.run(
            batch.q[i], (batch.k_cells.unsqueeze(1), batch.v_cells.unsqueeze(1)), enable_pdl=False
        )
        result["outputs_equal"] &= torch.equal(out[i], theirs)
        result["plans_compared"] += 1


def check_extend(shape: tuple) -> dict[str, Any]:
    """Extend over prefixes of two kinds of layers."""
    num_q_heads, num_kv_heads, head_dim, kv_dtype, _ = shape
    extend = RaggedExtend(num_q_heads, num_kv_heads, head_dim, torch.bfloat16, kv_dtype, "cuda")
    batch = Batch(extend.heads, 4, kv_dtype, seed=1, capacity=4000)
    rows = torch.tensor([0, 3, 4, 104, 141], dtype=torch.int32)
    even, odd = [3, 700, 1100, 40], [900, 1, 100, 38]
    lengths = torch.tensor([even, odd, even, odd, [30, 30, 900, 900]])
    begin = batch.capacity * torch.arange(LAYERS)[:, None]
    indptr = torch.cat([begin, begin + lengths.cumsum(1)], 1).int()
    q = torch.randn(int(rows[-1]), num_q_heads, head_dim, device="cuda").bfloat16()
    plans, worst, scale = extend.plan(rows, indptr), 0.0, head_dim**-0.5
    k_cells, v_cells = (x.to(torch.bfloat16).cpu() for x in (batch.k_cells, batch.v_cells))
    for i in range(LAYERS):
        out = extend.run(i, q, batch.k_cells, batch.v_cells, rows.cuda(), indptr.cuda(), batch.indices, scale)
        exact = reference.ragged_extend(
            q.cpu(), k_cells, v_cells, rows, indptr[i], batch.indices.cpu(), scale
        )
        worst = max(worst, ((out.double().cpu() - exact).abs().max() / exact.abs().max()).item())
    kind = dict(
        kernels="extend",
        q_heads=num_q_heads,
        kv_heads=num_kv_heads,
        head_dim=head_dim,
        kv_dtype=str(kv_dtype),
    )
    return kind | dict(plans_shared=plans == 3, deviation=worst, close=worst < 0.02)


def plan_microseconds(batch_size: int, num_layers: int = 28) -> float:
    """One plan of all layers, replayed from a CUDA graph that holds 50 of them."""
    decode = RaggedDecode(num_layers, batch_size, 28, 4, 128, torch.bfloat16, torch.bfloat16, "cuda")
    lengths = torch.randint(1, 4000, (num_layers, batch_size))
    indptr = torch.cat([torch.zeros(num_layers, 1), lengths.cumsum(1)], 1).int().cuda()
    decode.plan(indptr)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(50):
            decode.plan(indptr)
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1000 / 50


def attempt(check: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """The check's result, with ``ok``; an exception is a result too."""
    try:
        result = check(*args)
    except Exception as error:  # reported, and fails the run
        return {
            "ok": False,
            "check": check.__name__,
            "args": str(args),
            "error": f"{type(error).__name__}: {error}",
        }
    return result | {"ok": all(value for value in result.values() if isinstance(value, bool))}


def cases() -> Iterator[tuple]:
    """All checks with their arguments, those that say most first: by batch size, then by shape."""
    for batch_size in sorted(BATCH_SIZES, key=lambda size: size != 8):
        yield from ((check_decode, shape, batch_size) for shape in SHAPES)
        if batch_size == 8:
            yield from ((check_extend, shape) for shape in SHAPES[:2] + SHAPES[5:6])


def compile_kernels() -> None:
    """Every module of FlashInfer that the checks load, into FlashInfer's cache, but for those it came with."""
    seen = set()
    for num_q_heads, num_kv_heads, head_dim, kv_dtype, tensor_cores in SHAPES:
        if tensor_cores is None:
            tensor_cores = prefers_tensor_cores(num_q_heads // num_kv_heads, kv_dtype)
        spec = upstream.kernel_spec(torch.bfloat16, kv_dtype, head_dim, tensor_cores)
        if spec.name not in seen and not spec.is_aot:
            start = time.monotonic()
            spec.build(need_lock=True)
            print(f"{time.monotonic() - start:6.1f} s  {spec.name}", flush=True)
        seen.add(spec.name)


def write(path: Path | None, report: dict[str, Any]) -> None:
    """At once, so that a check that is cut off leaves the last whole report."""
    if path is not None:
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(report, indent=1) + "\n")
        unfinished.replace(path)


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the report, written after every check")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no check begins")
    parser.add_argument("--compile", action="store_true", help="only compile FlashInfer's kernels")
    args = parser.parse_args(argv)
    if args.compile:
        compile_kernels()
        return 0
    end = time.monotonic() + args.seconds
    if not torch.cuda.is_available():
        print("flashinfer_ext.check needs an NVIDIA GPU; none is visible here.")
        return 2
    try:
        version = upstream.check(torch.device("cuda"))
    except RuntimeError as error:
        print(error)
        return 2
    todo, checks = list(cases()), []
    report = dict(
        **dict(ok=False, device=torch.cuda.get_device_name(), flashinfer=version, torch=torch.__version__),
        **dict(triton=triton.__version__, plan_us={}, checks=checks),
    )
    for case in todo:
        if time.monotonic() > end:
            break
        checks.append(attempt(*case))
        write(args.json, report | {"unchecked": len(todo) - len(checks)})
    if len(checks) == len(todo):
        report["plan_us"] = {b: plan_microseconds(b) for b in (1, 16, 64, 256, 512)}
    right = all(check["ok"] for check in checks)
    report |= {"ok": right and len(checks) == len(todo), "unchecked": len(todo) - len(checks)}
    write(args.json, report)
    print(json.dumps(report, indent=1))
    return 0 if report["ok"] else 5 if right else 1


if __name__ == "__main__":
    sys.exit(main())
