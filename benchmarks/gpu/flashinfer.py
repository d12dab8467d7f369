"""Our engine on FlashInfer's kernels, where FlashInfer is: right, and planned as its own wrappers plan."""

from __future__ import annotations

import torch

from benchmarks.gpu.correctness import LAYERS, decoding
from benchmarks.gpu.engines import OURS_FLASHINFER, have_flashinfer_ext
from benchmarks.gpu.record import Part
from benchmarks.gpu.replay import replaying, without_waiting
from benchmarks.gpu.shapes import Model, models
from benchmarks.gpu.storm import SECONDS as STORM_SECONDS
from benchmarks.gpu.storm import storming
from benchmarks.gpu.timing import Clock

COMPILING_SECONDS = 45  # with nvcc, where FlashInfer's cache is empty


def run(part: Part, clock: Clock) -> None:
    if missing := have_flashinfer_ext(clock):
        part.skip("our FlashInfer decode", missing)
        return
    for full in models(clock.rehearsal):
        model = full._replace(layers=min(LAYERS, full.layers))
        seconds, what = 8 if clock.flashinfer_is_compiled else COMPILING_SECONDS, f"our FlashInfer decode, {full.name}"
        if part.has(seconds, what) and part.attempt_optional(OURS_FLASHINFER, what, _engine, clock, model):
            clock.flashinfer_is_compiled = True
    part.extra["compiled"] = clock.flashinfer_is_compiled


def _engine(part: Part, clock: Clock, model: Model) -> None:
    """The engine, and what it shares with FlashInfer's own wrappers."""
    decoding(part, clock, model, True)
    replaying(part, clock, model, True)
    without_waiting(part, clock, model, True)
    if part.has(STORM_SECONDS, f"storm, {model.name}"):
        storming(part, clock, model, True)
    if part.has(15, f"plans against FlashInfer's wrappers, {model.name}"):
        _against_flashinfer(part, model)


def _against_flashinfer(part: Part, model: Model) -> None:
    """Plans and outputs against FlashInfer's own wrappers, and extend, as its longer check does."""
    from flashinfer_ext.check import check_decode, check_extend

    shape = model.q_heads, model.kv_heads, model.head_dim, torch.bfloat16, None
    for name, found in (("plans", check_decode(shape, 8)), ("extend", check_extend(shape))):
        for what, value in found.items():
            if isinstance(value, bool):
                part.check(f"flashinfer_ext's check of {name}, {model.name}: {what}", value, **_evidence(found))


def _evidence(found: dict) -> dict:
    return {name: found[name] for name in ("deviation", "plans_compared") if name in found}
