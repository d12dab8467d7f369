"""What else of SGLang is relied on: called, subclassed, read.

What a symbol is expected to take:

- ``"self req"``: these parameters, in this order, and no others. What is patched or overridden is called with
  all of them.
- ``"self req ..."``: these, and others that need not be given. What is only called.
- ``"self req *"``: these, and any others, which ours hands on as it is given them.
- ``""``: anything; it only has to be there.

The fields of ``ServerArgs`` are not listed: where a refusal looks at one that is gone, a server with
``--kv-policy`` ends at its start, which nobody overlooks.
"""

# By module.
USES = {
    "sglang.srt.plugins.hook_registry": {
        "HookRegistry.register": "cls target hook hook_type ...",
        "HookType": "",
    },
    "sglang.srt.arg_groups.resolution_hooks": {
        "register_resolution_hook": "name ...",
    },
    "sglang.srt.arg_groups.attention_hook": {
        "handle_attention_backend_compatibility": "server_args",
    },
    "sglang.srt.arg_groups.memory_hook": {
        "handle_gpu_memory_settings": "server_args",
    },
    "sglang.srt.arg_groups.serving_hook": {
        "handle_other_validations": "server_args",
    },
    "sglang.srt.arg_groups.overrides": {
        "declare_resolution": "server_args source fields",
        "resolving_view": "server_args ...",
        "use_mla_backend": "server_args ...",
    },
    "sglang.srt.arg_groups.model_override_base": {
        "model_config_of": "server_args ...",
        "get_default_attn_backend": "server_args use_mla_backend model_config ...",
    },
    "sglang.srt.configs.hybrid_arch": {
        "mambaish_config": "model_config ...",
    },
    "sglang.srt.configs.model_config": {
        "ModelConfig.get_total_num_kv_heads": "self ...",
        "is_minimax_sparse": "config ...",
    },
    "sglang.srt.model_executor.cuda_graph_config": {
        "with_phase": "config phase *",
    },
    "sglang.srt.utils.common": {
        "get_bool_env_var": "name default ...",
    },
    "sglang.srt.layers.attention.attention_registry": {
        "register_attention_backend": "name ...",
        "ATTENTION_BACKENDS": "",
        "create_flashattention_v3_backend": "runner",
        "create_flashinfer_backend": "runner",
        "create_torch_native_backend": "runner",
        "create_triton_backend": "runner",
    },
    "sglang.srt.layers.attention.torch_native_backend": {
        "TorchNativeAttnBackend.__init__": "self model_runner ...",
        "TorchNativeAttnBackend.init_forward_metadata": "self forward_batch",
        "TorchNativeAttnBackend.forward_extend": "self q k v layer forward_batch save_kv_cache",
        "TorchNativeAttnBackend.forward_decode": "self q k v layer forward_batch save_kv_cache",
    },
    "sglang.srt.layers.attention.flashattention_backend": {
        "FlashAttentionBackend.__init__": "self model_runner *",
        "FlashAttentionBackend.init_forward_metadata": "self forward_batch",
        "FlashAttentionBackend.forward_extend": "self q k v layer forward_batch save_kv_cache *",
    },
    "sglang.srt.layers.attention.flashinfer_backend": {
        "FlashInferAttnBackend.__init__": "self model_runner *",
        "FlashInferAttnBackend.init_forward_metadata": "self forward_batch",
        "FlashInferAttnBackend.forward_extend": "self q k v layer forward_batch save_kv_cache *",
    },
    "sglang.srt.layers.attention.triton_backend": {
        "TritonAttnBackend.__init__": "self model_runner *",
        "TritonAttnBackend.init_forward_metadata": "self forward_batch",
        "TritonAttnBackend.forward_extend": "self q k v layer forward_batch save_kv_cache *",
    },
    "sglang.srt.layers.attention.base_attn_backend": {
        "AttentionBackend.init_forward_metadata_out_graph": "self forward_batch in_capture",
        "AttentionBackend.init_forward_metadata_in_graph": "self forward_batch",
        "AttentionBackend.init_cuda_graph_state": "self max_bs max_num_tokens",
        "AttentionBackend._snapshot_prefill_shared_reads": "self forward_batch num_qo_tokens",
    },
    "sglang.srt.model_executor.forward_batch_info": {
        "ForwardMode.is_decode": "self",
        "ForwardMode.is_decode_or_idle": "self",
        "ForwardMode.is_extend": "self ...",
    },
    "sglang.srt.disaggregation.kv_events": {
        "is_kv_publisher_rank": "kv_events_config ...",
        "select_kv_publisher_dp_rank": "attn_dp_size attn_dp_rank dp_rank ...",
    },
    "sglang.srt.mem_cache.kv_cache_configurator": {
        "KVCacheConfigurator.resolve_max_num_reqs": "self token_capacity",
    },
    "sglang.srt.model_executor.runner.base_cuda_graph_runner": {
        "get_batch_sizes_to_capture": "model_runner ...",
    },
    "sglang.srt.runtime_context": {
        "attention_backends": "...",
        "get_context": "...",
        "get_exec": "...",
        "get_parallel": "...",
        "num_dp_ranks_of": "cfg ...",
    },
    "sglang.srt.constants": {
        "HEALTH_CHECK_RID_PREFIX": "",
    },
    "sglang.srt.mem_cache.memory_pool": {
        "MHATokenToKVPool._create_buffers_normal": "self",
        "MHATokenToKVPool._kv_buffer_shapes": "self ...",
        "MHATokenToKVPool.get_key_buffer": "self layer_id ...",
        "MHATokenToKVPool.get_value_buffer": "self layer_id ...",
        "MHATokenToKVPool.set_kv_buffer": "self layer loc_info cache_k cache_v ...",
        "KVWriteLoc.__init__": "self loc swa_loc ...",
        "KVWriteLoc.for_batch": "cls forward_batch ...",
        "ReqToTokenPool.write": "self indices values ...",
    },
    "sglang.srt.mem_cache.registry": {
        "TreeCacheBuildContext": "",
        "register_radix_cache_backend": "name factory ...",
        "create_unified_radix_cache": "ctx cache_class ...",
    },
    "sglang.srt.mem_cache.radix_cache": {
        "RadixKey.__init__": "self token_ids extra_key cache_salt ...",
    },
    "sglang.srt.mem_cache.unified_cache.unified_tree_core_interface": {
        "UnifiedTreeCoreInterface.match_full_device_prefix": "self key ...",
        "UnifiedTreeCoreInterface.collect_path_info": "self end_node_ids ...",
    },
    "sglang.srt.mem_cache.unified_radix_cache": {
        "UnifiedRadixCache.__init__": "self params ...",
        "UnifiedRadixCache.reset": "self",
        "UnifiedRadixCache.match_prefix": "self params",
        "UnifiedRadixCache.touch_prefix": "self key ...",
        "UnifiedRadixCache.insert": "self params ...",
        "UnifiedRadixCache.take_events": "self",
        "UnifiedRadixCache.lock": "self node_id ...",
        "UnifiedRadixCache.evictable_size": "self ...",
        "UnifiedRadixCache.protected_size": "self ...",
        "UnifiedRadixCache.prefix_device_indices": "self req",
        "UnifiedRadixCache.path_device_indices": "self node ...",
        "UnifiedRadixCache.claim_kv_row": "self req",
        "UnifiedRadixCache._evict": "self params *",
        "UnifiedRadixCache._evict_device_leaf": "self node_id tracker",
        "UnifiedRadixCache.checkpoint": "self req up_to ...",
        "UnifiedRadixCache.swa_reprefill_tail_tokens": "self req",
        "UnifiedRadixCache.maybe_hand_to_session": "self req",
        "UnifiedRadixCache.on_release": "self req checkpointed",
        "UnifiedRadixCache.unlock": "self lock ...",
    },
    "sglang.srt.mem_cache.base_prefix_cache": {
        "BasePrefixCache.free_kv_row": "self kv ranges ...",
        "InsertParams.__init__": "self key value prev_prefix_len priority ...",
        "TreeLock": "",
    },
    "sglang.srt.mem_cache.common": {
        "evict_from_tree_cache": "tree_cache num_tokens ...",
    },
    "sglang.srt.managers.schedule_batch": {
        "FINISH_ABORT": "",
        "MultimodalDataItem.padding_values": "self ...",
        "Req.finished": "self ...",
        "Req.owned_kv_len": "self ...",
        "ScheduleBatch.filter_batch": "self keep_indices ...",
        "ScheduleBatch.release_req": "self idx remaing_req_count ...",
    },
    "sglang.srt.managers.scheduler": {
        "Scheduler.init_metrics_collector": "self ...",
        "Scheduler._reqs_finishing_inflight": "self batch ...",
        "Scheduler._add_request_to_queue": "self req is_retracted ...",
        "Scheduler._apply_war_barrier": "self ...",
    },
    "sglang.srt.managers.schedule_policy": {
        "PrefillAdder.add_one_req": "self req *",
        "PrefillAdder.add_chunked_req": "self req",
        "PrefillAdder._request_slot_reserve_for_req": "self req extend_input_len",
        "PrefillAdder._get_running_request_total_token_offset": "self req",
    },
    "sglang.srt.managers.scheduler_components.output_streamer": {
        "SchedulerOutputStreamer.build_additional_customized_info": "self reqs",
    },
    "sglang.srt.entrypoints.http_server": {
        "app": "",
        "get_global_state": "...",
    },
    "sglang.lang.backend.runtime_endpoint": {
        "RuntimeEndpoint.__init__": "self base_url ...",
        "RuntimeEndpoint.generate": "self s sampling_params",
        "RuntimeEndpoint.generate_stream": "self s sampling_params",
    },
    "sglang.lang.interpreter": {
        "ProgramState.sync": "self ...",
    },
    "sglang.lang.ir": {
        "SglSamplingParams.to_srt_kwargs": "self",
    },
}

# Attributes of classes and members of enumerations.
READS = {
    "sglang.srt.configs.model_config.AttentionArch": "MLA SSM",
    "sglang.srt.configs.model_config.ModelConfig": (
        "attention_chunk_size hf_eos_token_id hf_text_config is_encoder_decoder is_generation "
        "is_hybrid_swa sliding_window_size"
    ),
    "sglang.srt.model_executor.cuda_graph_config.Backend": "DISABLED",
    "sglang.srt.model_executor.cuda_graph_config.Phase": "PREFILL",
    "sglang.srt.layers.attention.base_attn_backend.SharedReadEnds": "UNKNOWN",
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch": (
        "batch_size extend_prefix_lens extend_prefix_lens_cpu extend_seq_lens extend_seq_lens_cpu "
        "forward_mode out_cache_loc req_pool_indices req_pool_indices_cpu seq_lens"
    ),
    "sglang.srt.disaggregation.kv_events.BlockRemoved": "block_hashes",
    "sglang.srt.disaggregation.kv_events.BlockStored": "block_hashes token_ids",
    "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector": "labels",
    "sglang.srt.observability.metrics_collector.SchedulerMetricsCollectorContext": (
        "current_scheduler_metrics_enabled collector"
    ),
    "sglang.srt.layers.radix_attention.AttentionType": "DECODER",
    "sglang.srt.layers.radix_attention.RadixAttention": (
        "attn_type is_cross_attention layer_id logit_cap qk_head_dim scaling sliding_window_size "
        "tp_q_head_num v_head_dim xai_temperature_len"
    ),
    "sglang.srt.layers.rotary_embedding.base.RotaryEmbedding": "is_neox_style",
    "sglang.srt.mem_cache.memory_pool.ReqToTokenPool": "req_to_token",
    "sglang.srt.mem_cache.radix_cache.RadixKey": "token_ids",
    "sglang.srt.mem_cache.unified_cache.component_type.ComponentType": "FULL",
    "sglang.srt.mem_cache.unified_cache.unified_tree_core_interface.TreePathNodeInfo": "node_id num_children",
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache": (
        "disable req_to_token_pool token_to_kv_pool_allocator tree_components tree_core"
    ),
    "sglang.srt.mem_cache.base_prefix_cache.EvictParams": "num_tokens",
    "sglang.srt.mem_cache.base_prefix_cache.EvictResult": "num_tokens_evicted",
    "sglang.srt.mem_cache.base_prefix_cache.InsertResult": "last_device_node",
    "sglang.srt.mem_cache.base_prefix_cache.MatchPrefixParams": "key req",
    "sglang.srt.mem_cache.base_prefix_cache.MatchResult": (
        "best_match_node device_prefix_len full_kv_hit_length last_device_node last_host_node"
    ),
    "sglang.srt.multimodal.modality.Modality": "AUDIO IMAGE VIDEO",
    "sglang.srt.managers.schedule_batch.MultimodalDataItem": "modality model_specific_data offsets",
    "sglang.srt.managers.schedule_batch.MultimodalInputs": (
        "im_token_id mm_items mrope_positions video_token_id"
    ),
    "sglang.srt.managers.schedule_batch.Req": (
        "beam_group cache_salt extend_end extra_key finished_reason full_untruncated_fill_ids kv "
        "last_node lock logprob_start_len multimodal_inputs origin_input_ids output_ids prefix_len "
        "priority retraction_count return_logprob rid sampling_params seqlen skip_radix_cache_insert"
    ),
    "sglang.srt.managers.schedule_batch.ReqKvInfo": (
        "cache_protected_len holds_kv kv_allocated_len req_pool_idx"
    ),
    "sglang.srt.managers.schedule_batch.ScheduleBatch": "batch_is_full reqs",
    "sglang.srt.managers.schedule_policy.AddReqResult": "NO_TOKEN OTHER",
    "sglang.srt.managers.schedule_policy.PrefillAdder": "can_run_list memory_budget running_batch tree_cache",
    "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer": (
        "has_additional_customized_info tree_cache"
    ),
    "sglang.srt.managers.io_struct.GenerateReqInput": "routed_dp_rank",
    "sglang.srt.entrypoints.engine.Engine": "server_args_class",
    "sglang.lang.interpreter.ProgramState": "stream_executor",
}

# What the CPU platform relies on, by dotted name.
CPU_PLATFORM = {
    "sglang.srt.platforms.cpu.CpuDeviceMixin.get_device": "self device_id",
    "sglang.srt.platforms.device_mixin.PlatformEnum.OOT": "",
    "sglang.srt.platforms.interface.SRTPlatform.apply_server_args_defaults": "self server_args",
    "sglang.srt.platforms.interface.SRTPlatform.get_default_attention_backend": "self",
    "sglang.srt.platforms.interface.SRTPlatform.get_dispatch_key_name": "self",
}
