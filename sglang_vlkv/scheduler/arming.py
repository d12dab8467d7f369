"""A policy is armed: the scheduler stands, is looked over, and given the parts that need all of it."""

from __future__ import annotations

import logging
import time

import torch
from sglang.srt.disaggregation.kv_events import is_kv_publisher_rank, select_kv_publisher_dp_rank
from sglang.srt.runtime_context import get_parallel

from sglang_vlkv.attention.layers import unserved
from sglang_vlkv.cache.pool import CellPool
from sglang_vlkv.cache.radix import TwinRadixCache
from sglang_vlkv.cache.ranks import Ranks
from sglang_vlkv.compatibility import hooks_missing
from sglang_vlkv.observe import publisher
from sglang_vlkv.observe.metrics import Metrics
from sglang_vlkv.observe.publisher import Publisher
from sglang_vlkv.options import config
from sglang_vlkv.options.backends import ATTENTION
from sglang_vlkv.scheduler.compaction import Compactor
from sglang_vlkv.scheduler.planning import Planner
from sglang_vlkv.scheduler.report import ReportingOutputStreamer

logger = logging.getLogger(__name__)


def armed(scheduler, settings: config.Settings) -> Compactor:
    """Gives the parts of ``scheduler`` what they need of each other, and returns its compactor.

    Raises:
        RuntimeError: SGLang did not build what was registered, and serving would go uncompressed; or the
            model's attention is more than ours.
    """
    runner = scheduler.tp_worker.model_runner
    _check_parts(scheduler)
    _check_model(runner, settings)
    tree, tokenizer = scheduler.tree_cache, scheduler.tokenizer
    tree.settings = settings
    tree.planner = Planner(
        settings,
        num_layers=tree.pool.layer_num,
        has_rope=runner.attn_backend.rope is not None,
        special_ids=set(tokenizer.all_special_ids) if tokenizer else set(),
        end_of_turn_ids=set(scheduler.model_config.hf_eos_token_id or ()),
        user_ids=tokenizer.encode("user", add_special_tokens=False) if tokenizer else [],
        tool_ids=tokenizer.encode("<tool_response>", add_special_tokens=False) if tokenizer else [],
    )
    tree.ranks = Ranks(scheduler.tp_cpu_group)
    if scheduler.metrics_collector_context.current_scheduler_metrics_enabled:
        tree.watchers.add(_metrics(scheduler, settings))
    if tree.pool.requests.on_device is not None:
        runner.attn_backend.warm_up()
        graphs = getattr(runner.decode_cuda_graph_runner, "capture_bs", None)
        if graphs and max(graphs) < scheduler.max_running_requests:
            logger.info(
                "Compaction makes room for up to %d requests at once, and decode steps of more than %d run "
                "without a CUDA graph. --cuda-graph-max-bs-decode raises that.",
                scheduler.max_running_requests,
                max(graphs),
            )
    tree.publisher = _publisher(scheduler, settings)
    logger.info("KV policy armed: %r", settings)
    return Compactor(tree, _forward_barrier(scheduler))


def _check_parts(scheduler) -> None:
    """Raises RuntimeError unless SGLang runs what was registered."""
    attention = type(scheduler.tp_worker.model_runner.attn_backend)
    found = {
        "radix cache": (type(scheduler.tree_cache), TwinRadixCache),
        "KV pool": (type(scheduler.token_to_kv_pool_allocator.get_kvcache()), CellPool),
        "output streamer": (type(scheduler.output_streamer), ReportingOutputStreamer),
        "attention backend": (
            f"{attention.__module__}.{attention.__name__}", *ATTENTION[scheduler.device].values()
        ),
    }  # fmt: skip
    wrong = [f"{part} {have}" for part, (have, *wanted) in found.items() if have not in wanted]
    wrong += [f"unpatched {target}" for target in hooks_missing()]
    if wrong:
        raise RuntimeError(
            "--kv-policy is set but SGLang runs " + "; ".join(wrong) + ". Another plugin may have "
            "replaced these; list the plugins to load in SGLANG_PLUGINS, or use --kv-policy none."
        )


def _check_model(runner, settings: config.Settings) -> None:
    """Raises RuntimeError where the loaded model's attention cannot be served."""
    beyond = unserved(runner.model)
    if beyond:
        raise RuntimeError(
            f"--kv-policy cannot serve a model that {beyond}: its kernels compute softmax attention over "
            "the rows that a request kept and nothing else. Serve another model, or use --kv-policy none."
        )
    if settings.policy.needs_rope and runner.attn_backend.rope is None:
        raise RuntimeError(
            f"--kv-policy {settings.policy.name} needs a rotary position embedding and this model "
            "has none that SGLang names rotary_emb. Use another policy."
        )


def _publisher(scheduler, settings: config.Settings) -> Publisher | None:
    """Sends live events, where the operator asked for them: one publisher per data-parallel replica.

    Raises:
        ValueError: the address cannot be had.
    """
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
