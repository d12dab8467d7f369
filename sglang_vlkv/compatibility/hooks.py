"""The functions of SGLang that are patched."""

from __future__ import annotations

from typing import NamedTuple

AFTER, AROUND, BEFORE = "after", "around", "before"


class Hook(NamedTuple):
    """A patch of one upstream function.

    Attributes:
        target: dotted name of the upstream symbol.
        kind: when ours runs.
        ours: ``module:name`` in this package, imported when it is first called.
        parameters: what the upstream function is expected to take, written as in ``uses``.
        why: what ours does there.
    """

    target: str
    kind: str
    ours: str
    parameters: str
    why: str


HOOKS = (
    Hook(
        "sglang.srt.server_args.ServerArgs.add_cli_args", AFTER,
        "sglang_vlkv.options.arguments:add_flags", "parser",
        "the --kv-* flags",
    ),
    Hook(
        "sglang.srt.server_args.ServerArgs.from_cli_args", AFTER,
        "sglang_vlkv.options.arguments:keep_flags", "cls args",
        "their values ride on ServerArgs to every process",
    ),
    Hook(
        "sglang.srt.platforms.interface.SRTPlatform.get_kv_pool_cls", AFTER,
        "sglang_vlkv.scheduler.wiring:pool_class", "self kind",
        "the pool of cells",
    ),
    Hook(
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes", AFTER,
        "sglang_vlkv.scheduler.wiring:pool_budget", "self pre_model_load_memory",
        "index lists and workspaces are made after the pool, and must find room beside it",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.__init__", AFTER,
        "sglang_vlkv.scheduler.wiring:arm", "self server_args *",
        "planner and compactor, once the scheduler has a tokenizer",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_init_info", AFTER,
        "sglang_vlkv.scheduler.wiring:report_armed", "self",
        "/server_info says what the scheduler runs",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_internal_state", AFTER,
        "sglang_vlkv.scheduler.wiring:report_twins", "self recv_req",
        "live counts of twins and of live events",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler._should_defer_prefill", BEFORE,
        "sglang_vlkv.scheduler.wiring:compact", "self running_batch",
        "the moment between a prefill's merge and the next admission, in every path to a decode",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_prefill_adder_class", AFTER,
        "sglang_vlkv.scheduler.wiring:adder_class", "self",
        "reserves room for the kept rows",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_output_streamer_class", AFTER,
        "sglang_vlkv.scheduler.wiring:streamer_class", "self",
        "sends the report",
    ),
    Hook(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.can_run_graph",
        AROUND,
        "sglang_vlkv.scheduler.wiring:decode_graph", "self forward_batch",
        "a step that reads more rows than its graph's buffers list, or has to leave queries that its graph "
        "does not copy, runs eagerly",
    ),
    Hook(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.execute", AFTER,
        "sglang_vlkv.scheduler.wiring:decode_replayed", "self forward_batch *",
        "requests that leave their queries find them where the graph has copied them",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request", AFTER,
        "sglang_vlkv.frontend.endpoints:validate_request", "self obj input_ids",
        "bad custom_params are an HTTP 400",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request", AROUND,
        "sglang_vlkv.frontend.endpoints:generate", "self obj request",
        "a draft of our own goes before a request whose policy wants one; the store keeps reports",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.abort_request", BEFORE,
        "sglang_vlkv.frontend.drafting:abort", "self rid abort_all",
        "a request that is aborted while its draft runs does not begin",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.update_request_meta_info", AROUND,
        "sglang_vlkv.frontend.endpoints:receive_report",
        "self meta_info state customized_info index finish_reason",
        "meta_info holds the report as an object",
    ),
    Hook(
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server", BEFORE,
        "sglang_vlkv.frontend.routes:add", "server_args *",
        "GET /kv_policy/requests/{id} and /kv_policy/twins",
    ),
    Hook(
        "sglang.srt.entrypoints.http_server.serve_generate_request", AROUND,
        "sglang_vlkv.frontend.endpoints:serve_generate", "obj request",
        "bad custom_params are an HTTP 400 also for a stream; the response says where its report is",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat.handle_request", AROUND,
        "sglang_vlkv.frontend.endpoints:serve_openai", "self request raw_request",
        "the response says where its report is",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion.handle_request",
        AROUND,
        "sglang_vlkv.frontend.endpoints:serve_openai", "self request raw_request",
        "the response says where its report is",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses.create_responses",
        AROUND,
        "sglang_vlkv.frontend.endpoints:serve_responses", "self request raw_request",
        "takes the custom_params that the model of the body drops",
    ),
    Hook(
        "sglang.srt.entrypoints.anthropic.serving.AnthropicServing.handle_messages", AROUND,
        "sglang_vlkv.frontend.endpoints:serve_anthropic", "self request raw_request",
        "takes the custom_params that the model of the body drops",
    ),
    Hook(
        "sglang.srt.entrypoints.ollama.serving.OllamaServing.handle_chat", AROUND,
        "sglang_vlkv.frontend.endpoints:serve_ollama", "self request raw_request",
        "takes the custom_params in options",
    ),
    Hook(
        "sglang.srt.entrypoints.ollama.serving.OllamaServing.handle_generate", AROUND,
        "sglang_vlkv.frontend.endpoints:serve_ollama", "self request raw_request",
        "takes the custom_params in options",
    ),
)
