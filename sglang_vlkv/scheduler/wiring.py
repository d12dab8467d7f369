"""Puts the parts together inside SGLang's scheduler process. Without a policy nothing changes."""

from __future__ import annotations

import logging
import pkgutil
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from sglang_vlkv.options import config
from sglang_vlkv.options.backends import ATTENTION, RADIX_CACHE

if TYPE_CHECKING:
    from sglang_vlkv.scheduler.compaction import Compactor

logger = logging.getLogger(__name__)
_compactors: WeakKeyDictionary[object, Compactor] = WeakKeyDictionary()  # of armed schedulers


def _settings() -> config.Settings | None:
    """What this process's server arguments ask for, or None."""
    from sglang.srt.runtime_context import get_context

    return config.settings_of(get_context().server_args)


def pool_class(result, _platform, *, kind: str):
    """After ``SRTPlatform.get_kv_pool_cls``."""
    if _settings() is None or kind != "mha":
        return result
    if result is not None:
        raise ValueError(
            f"--kv-policy needs its own KV pool and this platform brings {result.__name__}; "
            "use --kv-policy none on it."
        )
    from sglang_vlkv.cache.pool import CellPool

    return CellPool


def pool_budget(budget: int, configurator, _pre_model_load_memory) -> int:
    """After ``KVCacheConfigurator._profile_available_bytes``: on a GPU, what is ours comes off it."""
    if _settings() is None or configurator.device != "cuda":
        return budget
    from sglang.srt.runtime_context import attention_backends, get_exec

    from sglang_vlkv.attention import memory

    shape, backend = memory.shape_of(configurator, budget), attention_backends()[1]
    sms = torch.cuda.get_device_properties(configurator.gpu_id).multi_processor_count
    copied = get_exec().graph.cuda_graph_config.decode.max_bs if memory.leaves_queries() else 0
    rest = memory.pool_budget(budget, shape, backend, sms, copied)
    logger.info("%.2f GB of the KV budget are for what lies beside the pool.", (budget - rest) / (1 << 30))
    return rest


def register_backends() -> None:
    """Our radix cache under its name, and our attention in front of SGLang's."""
    from sglang.srt.layers.attention.attention_registry import (
        ATTENTION_BACKENDS,
        register_attention_backend,
    )
    from sglang.srt.mem_cache.registry import register_radix_cache_backend

    from sglang_vlkv.cache import radix

    register_radix_cache_backend(RADIX_CACHE, radix.create)

    def counterpart(stock, ours: str):
        def create(runner):
            if _settings() is None:
                return stock(runner)
            logger.info("Attention: %s, reading ragged rows", ours)
            return pkgutil.resolve_name(ours)(runner)

        return create

    for counterparts in ATTENTION.values():
        for name, ours in counterparts.items():
            register_attention_backend(name)(counterpart(ATTENTION_BACKENDS[name], ours))


def arm(_result, scheduler, *args, **kwargs) -> None:
    """After ``Scheduler.__init__``: the parts that need the whole scheduler."""
    settings = _settings()
    if settings is not None:
        from sglang_vlkv.scheduler.arming import armed

        _compactors[scheduler] = armed(scheduler, settings)


def report_armed(info: dict, scheduler) -> dict:
    """After ``Scheduler.get_init_info``: becomes ``kv_policy`` in ``/server_info``."""
    settings = _settings()
    runs = {"policy": config.NONE} if settings is None else settings.describe()
    return info | {"kv_policy": runs}


def report_twins(output, scheduler, _request):
    """After ``Scheduler.get_internal_state``: also a part of ``/server_info``."""
    if _settings() is not None:
        tree = scheduler.tree_cache
        tree.ranks.sum(torch.empty(0, dtype=torch.int64))  # every rank is asked, so that all are compared
        output.internal_state["kv_policy"] = tree.describe_twins() | tree.ranks.describe()
        if tree.publisher is not None:
            output.internal_state["kv_events"] = tree.publisher.describe()
    return output


def compact(scheduler, running_batch) -> None:
    """Before ``Scheduler._should_defer_prefill``."""
    if scheduler in _compactors:
        _compactors[scheduler].run(scheduler, running_batch)


def decode_graph(original, runner, forward_batch) -> bool:
    """Around ``DecodeCudaGraphRunner.can_run_graph``."""
    requests = getattr(runner.model_runner.token_to_kv_pool, "requests", None)
    on_device = None if requests is None else requests.on_device
    return (on_device is None or on_device.graph_serves) and original(runner, forward_batch)


def decode_replayed(result, runner, forward_batch, *_args, **_kwargs):
    """After ``DecodeCudaGraphRunner.execute``."""
    requests = getattr(runner.model_runner.token_to_kv_pool, "requests", None)
    if requests is not None and requests.on_device is not None:
        runner.model_runner.attn_backend.keep_replayed(forward_batch)
    return result


def adder_class(result, scheduler):
    """After ``Scheduler.get_prefill_adder_class``."""
    if scheduler not in _compactors:
        return result
    from sglang_vlkv.scheduler.admission import ReservingPrefillAdder

    return ReservingPrefillAdder


def streamer_class(result, _scheduler):
    """After ``Scheduler.get_output_streamer_class``."""
    if _settings() is None:
        return result
    from sglang_vlkv.scheduler.report import ReportingOutputStreamer

    return ReportingOutputStreamer
