"""The one place that touches SGLang: every door and hook, and the upstream symbol behind it.

SGLang calls :func:`register` in every process, before arguments are parsed, and logs and swallows
what it raises. A plugin that failed there would serve uncompressed and look healthy, so everything
that can be missing is checked here and ends the process, and the scheduler checks once more that
it runs what was registered.
"""

from __future__ import annotations

import inspect
import pkgutil
from functools import cache
from importlib.metadata import version
from typing import Callable, NamedTuple

from sglang_vlkv import SUPPORTED_SGLANG, __version__

AFTER, AROUND, BEFORE = "after", "around", "before"


class Hook(NamedTuple):
    """A patch of one upstream function.

    Attributes:
        target: dotted name of the upstream symbol.
        kind: when ours runs.
        ours: ``module:name`` in this package, imported when it is first called.
        parameters: the upstream parameters that ours relies on.
        why: what ours does there.
    """

    target: str
    kind: str
    ours: str
    parameters: tuple[str, ...]
    why: str


HOOKS = (
    Hook(
        "sglang.srt.server_args.ServerArgs.add_cli_args", AFTER,
        "sglang_vlkv.options.arguments:add_flags", ("parser",),
        "the --kv-* flags",
    ),
    Hook(
        "sglang.srt.server_args.ServerArgs.from_cli_args", AFTER,
        "sglang_vlkv.options.arguments:keep_flags", ("cls", "args"),
        "their values ride on ServerArgs to every process",
    ),
    Hook(
        "sglang.srt.platforms.interface.SRTPlatform.get_kv_pool_cls", AFTER,
        "sglang_vlkv.scheduler.wiring:pool_class", ("self", "kind"),
        "the pool of cells",
    ),
    Hook(
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes", AFTER,
        "sglang_vlkv.scheduler.wiring:pool_budget", ("self", "pre_model_load_memory"),
        "index lists and workspaces are made after the pool, and must find room beside it",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.__init__", AFTER,
        "sglang_vlkv.scheduler.wiring:arm", ("self", "server_args"),
        "planner and compactor, once the scheduler has a tokenizer",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_init_info", AFTER,
        "sglang_vlkv.scheduler.wiring:report_armed", ("self",),
        "/server_info says what the scheduler runs",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_internal_state", AFTER,
        "sglang_vlkv.scheduler.wiring:report_twins", ("self", "recv_req"),
        "live counts of twins and of live events",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler._should_defer_prefill", BEFORE,
        "sglang_vlkv.scheduler.wiring:compact", ("self", "running_batch"),
        "the moment between a prefill's merge and the next admission, in every path to a decode",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_prefill_adder_class", AFTER,
        "sglang_vlkv.scheduler.wiring:adder_class", ("self",),
        "reserves room for the kept rows",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_output_streamer_class", AFTER,
        "sglang_vlkv.scheduler.wiring:streamer_class", ("self",),
        "sends the report",
    ),
    Hook(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.can_run_graph",
        AROUND,
        "sglang_vlkv.scheduler.wiring:decode_graph", ("self", "forward_batch"),
        "a step that reads more rows than its graph's buffers list, or has to leave queries that its graph "
        "does not copy, runs eagerly",
    ),
    Hook(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.execute", AFTER,
        "sglang_vlkv.scheduler.wiring:decode_replayed", ("self", "forward_batch"),
        "requests that leave their queries find them where the graph has copied them",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request", AFTER,
        "sglang_vlkv.frontend.endpoints:validate_request", ("self", "obj", "input_ids"),
        "bad custom_params are an HTTP 400",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request", AROUND,
        "sglang_vlkv.frontend.endpoints:generate", ("self", "obj", "request"),
        "a draft of our own goes before a request whose policy wants one; the store keeps reports",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.abort_request", BEFORE,
        "sglang_vlkv.frontend.drafting:abort", ("self", "rid", "abort_all"),
        "a request that is aborted while its draft runs does not begin",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.update_request_meta_info", AROUND,
        "sglang_vlkv.frontend.endpoints:receive_report",
        ("self", "meta_info", "state", "customized_info", "index", "finish_reason"),
        "meta_info holds the report as an object",
    ),
    Hook(
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server", BEFORE,
        "sglang_vlkv.frontend.routes:add", ("server_args",),
        "GET /kv_policy/requests/{id} and /kv_policy/twins",
    ),
    Hook(
        "sglang.srt.entrypoints.http_server.serve_generate_request", AROUND,
        "sglang_vlkv.frontend.endpoints:serve_generate", ("obj", "request"),
        "bad custom_params are an HTTP 400 also for a stream; the response says where its report is",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat.handle_request", AROUND,
        "sglang_vlkv.frontend.endpoints:serve_openai", ("self", "request", "raw_request"),
        "the response says where its report is",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion.handle_request",
        AROUND,
        "sglang_vlkv.frontend.endpoints:serve_openai", ("self", "request", "raw_request"),
        "the response says where its report is",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses.create_responses",
        AROUND,
        "sglang_vlkv.frontend.endpoints:serve_responses", ("self", "request", "raw_request"),
        "takes the custom_params that the model of the body drops",
    ),
    Hook(
        "sglang.srt.entrypoints.anthropic.serving.AnthropicServing.handle_messages", AROUND,
        "sglang_vlkv.frontend.endpoints:serve_anthropic", ("self", "request", "raw_request"),
        "takes the custom_params that the model of the body drops",
    ),
    Hook(
        "sglang.srt.entrypoints.ollama.serving.OllamaServing.handle_chat", AROUND,
        "sglang_vlkv.frontend.endpoints:serve_ollama", ("self", "request", "raw_request"),
        "takes the custom_params in options",
    ),
    Hook(
        "sglang.srt.entrypoints.ollama.serving.OllamaServing.handle_generate", AROUND,
        "sglang_vlkv.frontend.endpoints:serve_ollama", ("self", "request", "raw_request"),
        "takes the custom_params in options",
    ),
)

# Upstream symbols that are called or subclassed, by module, with the parameters relied on.
USES = {
    "sglang.srt.arg_groups.resolution_hooks": {
        "register_resolution_hook": "name",
    },
    "sglang.srt.arg_groups.overrides": {
        "declare_resolution": "server_args source fields",
        "resolving_view": "server_args",
        "use_mla_backend": "server_args",
    },
    "sglang.srt.arg_groups.model_override_base": {
        "model_config_of": "server_args",
        "get_default_attn_backend": "server_args use_mla_backend model_config",
    },
    "sglang.srt.layers.attention.attention_registry": {
        "register_attention_backend": "name",
        "ATTENTION_BACKENDS": "",
    },
    "sglang.srt.layers.attention.torch_native_backend": {
        "TorchNativeAttnBackend.init_forward_metadata": "self forward_batch",
        "TorchNativeAttnBackend.forward_extend": "self q k v layer forward_batch save_kv_cache",
        "TorchNativeAttnBackend.forward_decode": "self q k v layer forward_batch save_kv_cache",
    },
    "sglang.srt.layers.attention.triton_backend": {
        "TritonAttnBackend.__init__": "self model_runner",
        "TritonAttnBackend.init_forward_metadata": "self forward_batch",
        "TritonAttnBackend.forward_extend": "self q k v layer forward_batch save_kv_cache",
    },
    "sglang.srt.layers.attention.base_attn_backend": {
        "AttentionBackend.init_forward_metadata_out_graph": "self forward_batch in_capture",
        "AttentionBackend.init_forward_metadata_in_graph": "self forward_batch",
        "AttentionBackend.init_cuda_graph_state": "self max_bs max_num_tokens",
        "AttentionBackend._snapshot_prefill_shared_reads": "self forward_batch num_qo_tokens",
        "SharedReadEnds.UNKNOWN": "",
    },
    "sglang.srt.model_executor.runner.base_cuda_graph_runner": {
        "get_batch_sizes_to_capture": "model_runner",
    },
    "sglang.srt.disaggregation.kv_events": {
        "is_kv_publisher_rank": "kv_events_config",
        "select_kv_publisher_dp_rank": "attn_dp_size attn_dp_rank dp_rank",
    },
    "sglang.srt.runtime_context": {
        "attention_backends": "",
        "get_exec": "",
        "get_parallel": "",
        "num_dp_ranks_of": "cfg",
    },
    "sglang.srt.constants": {
        "HEALTH_CHECK_RID_PREFIX": "",
    },
    "sglang.srt.observability.metrics_collector": {
        "SchedulerMetricsCollector.__init__": "self labels",
        "SchedulerMetricsCollectorContext.current_scheduler_metrics_enabled": "",
        "SchedulerMetricsCollectorContext.collector": "",
    },
    "sglang.srt.layers.radix_attention": {
        "RadixAttention.__init__": (
            "self logit_cap v_head_dim sliding_window_size is_cross_attention attn_type"
        ),
        "AttentionType.DECODER": "",
    },
    "sglang.srt.layers.rotary_embedding.base": {
        "RotaryEmbedding.__init__": "self head_size rotary_dim is_neox_style",
    },
    "sglang.srt.mem_cache.memory_pool": {
        "MHATokenToKVPool._create_buffers_normal": "self",
        "MHATokenToKVPool._kv_buffer_shapes": "self",
        "MHATokenToKVPool.set_kv_buffer": "self layer loc_info cache_k cache_v",
        "KVWriteLoc.for_batch": "forward_batch",
    },
    "sglang.srt.mem_cache.kv_cache_configurator": {
        "KVCacheConfigurator.resolve_max_num_reqs": "self token_capacity",
    },
    "sglang.srt.mem_cache.registry": {
        "register_radix_cache_backend": "name factory",
        "create_unified_radix_cache": "ctx cache_class",
    },
    "sglang.srt.mem_cache.radix_cache": {
        "RadixKey.__init__": "self token_ids extra_key cache_salt",
    },
    "sglang.srt.mem_cache.unified_cache.unified_tree_core_interface": {
        "UnifiedTreeCoreInterface.match_full_device_prefix": "self key",
        "UnifiedTreeCoreInterface.collect_path_info": "self end_node_ids",
    },
    "sglang.srt.mem_cache.unified_radix_cache": {
        "UnifiedRadixCache.reset": "self",
        "UnifiedRadixCache.match_prefix": "self params",
        "UnifiedRadixCache.touch_prefix": "self key",
        "UnifiedRadixCache.insert": "self params",
        "UnifiedRadixCache.take_events": "self",
        "UnifiedRadixCache.lock": "self node_id",
        "UnifiedRadixCache.protected_size": "self",
        "UnifiedRadixCache.prefix_device_indices": "self req",
        "UnifiedRadixCache.path_device_indices": "self node",
        "UnifiedRadixCache.claim_kv_row": "self req",
        "UnifiedRadixCache._evict": "self params",
        "UnifiedRadixCache._evict_device_leaf": "self node_id tracker",
        "UnifiedRadixCache.checkpoint": "self req up_to",
        "UnifiedRadixCache.swa_reprefill_tail_tokens": "self req",
        "UnifiedRadixCache.maybe_hand_to_session": "self req",
        "UnifiedRadixCache.on_release": "self req checkpointed",
        "UnifiedRadixCache.unlock": "self lock",
    },
    "sglang.srt.mem_cache.base_prefix_cache": {
        "BasePrefixCache.free_kv_row": "self kv ranges",
    },
    "sglang.srt.mem_cache.common": {
        "evict_from_tree_cache": "tree_cache num_tokens",
    },
    "sglang.srt.managers.schedule_batch": {
        "FINISH_ABORT": "",
        "MultimodalDataItem.padding_values": "self",
        "MultimodalDataItem.model_specific_data": "",
        "Req.owned_kv_len": "self",
        "ScheduleBatch.release_req": "self idx remaing_req_count",
        "ScheduleBatch.filter_batch": "self keep_indices",
    },
    "sglang.srt.managers.scheduler": {
        "Scheduler.init_metrics_collector": "self",
        "Scheduler._reqs_finishing_inflight": "self batch",
        "Scheduler._add_request_to_queue": "self req is_retracted",
        "Scheduler._apply_war_barrier": "self",
    },
    "sglang.srt.managers.schedule_policy": {
        "PrefillAdder.add_one_req": "self req",
        "PrefillAdder.add_chunked_req": "self req",
        "PrefillAdder._request_slot_reserve_for_req": "self req extend_input_len",
        "PrefillAdder._get_running_request_total_token_offset": "self req",
    },
    "sglang.srt.managers.scheduler_components.output_streamer": {
        "SchedulerOutputStreamer.build_additional_customized_info": "self reqs",
    },
    "sglang.srt.entrypoints.http_server": {
        "app": "",
        "get_global_state": "",
    },
    "sglang.srt.managers.io_struct": {
        "GenerateReqInput.routed_dp_rank": "",
    },
    "sglang.srt.entrypoints.engine": {
        "Engine.server_args_class": "",
    },
    "sglang.lang.backend.runtime_endpoint": {
        "RuntimeEndpoint.generate": "self s sampling_params",
        "RuntimeEndpoint.generate_stream": "self s sampling_params",
    },
    "sglang.lang.ir": {
        "SglSamplingParams.to_srt_kwargs": "self",
    },
}


def register() -> None:
    """Entry point of group ``sglang.srt.plugins``.

    Raises:
        SystemExit: the installed SGLang is not the one this version was built for.
    """
    problems = mismatches()
    if problems:
        raise SystemExit(
            f"sglang_vlkv {__version__} is built for SGLang {SUPPORTED_SGLANG} and does not fit the "
            f"installed {version('sglang')}:\n  " + "\n  ".join(problems) + "\n"
            f"Install it with: pip install 'sglang=={SUPPORTED_SGLANG}' -- or leave this plugin out "
            "with SGLANG_PLUGINS set to the names of the others."
        )
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_vlkv.options import arguments
    from sglang_vlkv.scheduler import wiring

    for hook in HOOKS:
        HookRegistry.register(hook.target, _lazy(hook.ours), HookType(hook.kind))
    # Engine's own override point. Not a REPLACE hook: that would replace ServerArgs everywhere.
    pkgutil.resolve_name("sglang.srt.entrypoints.engine.Engine").server_args_class = (
        arguments.EngineServerArgs()
    )
    arguments.register_resolution()
    wiring.register_backends()


def mismatches() -> list[str]:
    """What is expected of the installed SGLang and not found, a sentence each."""
    installed = version("sglang")
    if installed != SUPPORTED_SGLANG:
        return [f"expected sglang {SUPPORTED_SGLANG}, found {installed}"]
    expected = {hook.target: hook.parameters for hook in HOOKS}
    for module, symbols in USES.items():
        expected |= {f"{module}.{name}": tuple(names.split()) for name, names in symbols.items()}
    return [problem for target, names in expected.items() if (problem := _mismatch(target, names))]


def _mismatch(target: str, parameters: tuple[str, ...]) -> str:
    try:
        symbol = pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        return f"expected {target}, found none ({error})"
    if not parameters:
        return ""
    symbol = inspect.unwrap(symbol)
    found = list(inspect.signature(getattr(symbol, "__func__", symbol)).parameters)
    missing = [name for name in parameters if name not in found]
    if not missing:
        return ""
    return f"expected {target} to take {', '.join(missing)}, found ({', '.join(found)})"


def hooks_missing() -> list[str]:
    """Targets that SGLang's hook applier did not patch; it logs its failures and goes on."""
    return [
        hook.target
        for hook in HOOKS
        if not hasattr(pkgutil.resolve_name(hook.target), "__wrapped__")
    ]


def _lazy(ours: str) -> Callable:
    """Calls ``module:name``, importing the module at the first call."""
    resolve = cache(lambda: pkgutil.resolve_name(ours))

    def call(*args, **kwargs):
        return resolve()(*args, **kwargs)

    call.__name__ = call.__qualname__ = ours.split(":")[1]
    return call
