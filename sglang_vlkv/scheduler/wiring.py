"""Puts the parts together inside SGLang's scheduler process. Without a policy nothing changes."""

from __future__ import annotations

import logging
import pkgutil
import time

import torch

from sglang_vlkv.attention import COUNTERPARTS
from sglang_vlkv.observe import publisher
from sglang_vlkv.observe.publisher import Publisher
from sglang_vlkv.options import config

logger = logging.getLogger(__name__)


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


def register_backends() -> None:
    """Our radix cache under its name, and our attention in front of SGLang's."""
    from sglang.srt.layers.attention.attention_registry import (
        ATTENTION_BACKENDS,
        register_attention_backend,
    )
    from sglang.srt.mem_cache.registry import register_radix_cache_backend

    from sglang_vlkv.cache import radix

    register_radix_cache_backend(radix.BACKEND, radix.create)

    def counterpart(stock, ours: str):
        def create(runner):
            if _settings() is None:
                return stock(runner)
            logger.info("Attention: %s, reading ragged rows", ours)
            return pkgutil.resolve_name(ours)(runner)

        return create

    for counterparts in COUNTERPARTS.values():
        for name, ours in counterparts.items():
            register_attention_backend(name)(counterpart(ATTENTION_BACKENDS[name], ours))


def arm(_result, scheduler, *args, **kwargs) -> None:
    """After ``Scheduler.__init__``: the parts that need the whole scheduler.

    Raises:
        RuntimeError: SGLang did not build what was registered, and serving would go uncompressed; or the
            model's attention is more than ours.
    """
    settings = _settings()
    if settings is None:
        return
    from sglang_vlkv.attention.layers import unserved
    from sglang_vlkv.cache.pool import CellPool
    from sglang_vlkv.cache.radix import TwinRadixCache
    from sglang_vlkv.cache.ranks import Ranks
    from sglang_vlkv.compatibility import hooks_missing
    from sglang_vlkv.scheduler.compaction import Compactor
    from sglang_vlkv.scheduler.planning import Planner
    from sglang_vlkv.scheduler.report import ReportingOutputStreamer

    tree = scheduler.tree_cache
    found = {
        "radix cache": (type(tree), TwinRadixCache),
        "KV pool": (type(scheduler.token_to_kv_pool_allocator.get_kvcache()), CellPool),
        "output streamer": (type(scheduler.output_streamer), ReportingOutputStreamer),
        "attention backend": (
            f"{type(scheduler.tp_worker.model_runner.attn_backend).__module__}."
            f"{type(scheduler.tp_worker.model_runner.attn_backend).__name__}",
            *COUNTERPARTS[scheduler.device].values(),
        ),
    }
    wrong = [f"{part} {have}" for part, (have, *wanted) in found.items() if have not in wanted]
    wrong += [f"unpatched {target}" for target in hooks_missing()]
    if wrong:
        raise RuntimeError(
            "--kv-policy is set but SGLang runs " + "; ".join(wrong) + ". Another plugin may have "
            "replaced these; list the plugins to load in SGLANG_PLUGINS, or use --kv-policy none."
        )
    beyond = unserved(scheduler.tp_worker.model_runner.model)
    if beyond:
        raise RuntimeError(
            f"--kv-policy cannot serve a model that {beyond}: its kernels compute softmax attention over "
            "the rows that a request kept and nothing else. Serve another model, or use --kv-policy none."
        )
    has_rope = scheduler.tp_worker.model_runner.attn_backend.rope is not None
    if settings.policy.needs_rope and not has_rope:
        raise RuntimeError(
            f"--kv-policy {settings.policy.name} needs a rotary position embedding and this model "
            "has none that SGLang names rotary_emb. Use another policy."
        )
    tokenizer = scheduler.tokenizer
    tree.settings = settings
    tree.planner = Planner(
        settings,
        num_layers=tree.pool.layer_num,
        has_rope=has_rope,
        special_ids=set(tokenizer.all_special_ids) if tokenizer else set(),
        end_of_turn_ids=set(scheduler.model_config.hf_eos_token_id or ()),
    )
    tree.ranks = Ranks(scheduler.tp_cpu_group)
    tree.compactor = Compactor(tree, _forward_barrier(scheduler))
    if scheduler.metrics_collector_context.current_scheduler_metrics_enabled:
        tree.watchers.add(_metrics(scheduler, settings))
    if tree.pool.requests.on_device is not None:
        scheduler.tp_worker.model_runner.attn_backend.warm_up()
        graphs = getattr(scheduler.tp_worker.model_runner.decode_cuda_graph_runner, "capture_bs", None)
        if graphs and max(graphs) < scheduler.max_running_requests:
            logger.info(
                "Compaction makes room for up to %d requests at once, and decode steps of more than %d run "
                "without a CUDA graph. --cuda-graph-max-bs-decode raises that.",
                scheduler.max_running_requests,
                max(graphs),
            )
    tree.publisher = _publisher(scheduler, settings)
    logger.info("KV policy armed: %r", settings)


def _publisher(scheduler, settings: config.Settings) -> Publisher | None:
    """Sends live events, where the operator asked for them: one publisher per data-parallel replica.

    Raises:
        ValueError: the address cannot be had.
    """
    from sglang.srt.disaggregation.kv_events import is_kv_publisher_rank, select_kv_publisher_dp_rank
    from sglang.srt.runtime_context import get_parallel

    args, parallel, tree = scheduler.server_args, get_parallel(), scheduler.tree_cache
    endpoint = getattr(args, "kv_events_endpoint", None)
    if endpoint is None or not is_kv_publisher_rank(endpoint):
        return None
    dp_rank = select_kv_publisher_dp_rank(parallel.attn_dp_size, parallel.attn_dp_rank, parallel.dp_rank)
    server = {
        "model": args.served_model_name or args.model_path,
        "policy": settings.policy.name,
        "budget": settings.policy.budget,
        "options": settings.describe(),
        "layers": tree.pool.layer_num,
        "kv_heads": tree.pool.head_num,
        "slots": tree.token_to_kv_pool_allocator.size,
        "slot_bytes": tree.pool.slot_bytes,
        "replicas": parallel.num_dp_ranks,
        "started": time.time(),
    }
    address = publisher.of_replica(publisher.address(endpoint), dp_rank)
    made = Publisher(address, dp_rank, lambda: server | {"twins": tree.describe_twins()})
    tree.watchers.add(made)
    logger.info("Live events: %s", address)
    return made


def _metrics(scheduler, settings: config.Settings):
    from sglang_vlkv.observe.metrics import Metrics

    pool, twins = scheduler.tree_cache.pool, scheduler.tree_cache.twins
    slot_bytes = pool.slot_bytes
    return Metrics(
        scheduler.metrics_collector_context.collector.labels,
        settings.policy.name,
        pool_bytes=scheduler.token_to_kv_pool_allocator.size * slot_bytes,
        row_bytes=slot_bytes // (pool.layer_num * pool.head_num),
        twins=lambda: (len(twins), twins.num_slots * slot_bytes),
    )


def _forward_barrier(scheduler):
    """Holds the scheduler's stream back until the forward stream has done what it was given."""
    if scheduler.device == "cpu":
        return lambda: None
    return lambda: torch.cuda.current_stream().wait_stream(scheduler.forward_stream)


def report_armed(info: dict, scheduler) -> dict:
    """After ``Scheduler.get_init_info``: becomes ``kv_policy`` in ``/server_info``."""
    settings = _settings()
    armed = {"policy": config.NONE} if settings is None else settings.describe()
    return info | {"kv_policy": armed}


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
    compactor = getattr(scheduler.tree_cache, "compactor", None)
    if compactor is not None:
        compactor.run(scheduler, running_batch)


def decode_graph(original, runner, forward_batch) -> bool:
    """Around ``DecodeCudaGraphRunner.can_run_graph``."""
    requests = getattr(runner.model_runner.token_to_kv_pool, "requests", None)
    on_device = None if requests is None else requests.on_device
    return (on_device is None or on_device.graph_serves) and original(runner, forward_batch)


def adder_class(result, scheduler):
    """After ``Scheduler.get_prefill_adder_class``."""
    if getattr(scheduler.tree_cache, "compactor", None) is None:
        return result
    from sglang_vlkv.scheduler.admission import ReservingPrefillAdder

    return ReservingPrefillAdder


def streamer_class(result, _scheduler):
    """After ``Scheduler.get_output_streamer_class``."""
    if _settings() is None:
        return result
    from sglang_vlkv.scheduler.report import ReportingOutputStreamer

    return ReportingOutputStreamer
