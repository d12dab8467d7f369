"""The server's arguments: our flags on SGLang's parser, ServerArgs and resolution."""

from __future__ import annotations

import logging
from copy import copy

from sglang_vlkv.observe import publisher
from sglang_vlkv.options import config
from sglang_vlkv.options.backends import ATTENTION, BACKENDS, OTHERS_OF_HARDWARE, RADIX_CACHE, takes

logger = logging.getLogger(__name__)

MOST_TIMES, MOST_CAPTURED = 4, 1024  # of SGLang's largest captured batch, and requests in ours


def add_flags(_result, parser) -> None:
    """After ``ServerArgs.add_cli_args``."""
    config.add_flags(parser)


def keep_flags(server_args, _cls, args):
    """After ``ServerArgs.from_cli_args``."""
    return _carry(server_args, {name: getattr(args, name, value) for name, value in config.DEFAULTS.items()})


class EngineServerArgs:
    """Stands for ``Engine.server_args_class``: takes our keyword arguments beside SGLang's."""

    def __call__(self, **kwargs):
        from sglang.srt.server_args import ServerArgs

        ours = {name: kwargs.pop(name, value) for name, value in config.DEFAULTS.items()}
        return _carry(ServerArgs(**kwargs), ours)


def _carry(server_args, values: dict):
    """Sets ``values`` on ``server_args``; they survive pickling to SGLang's processes."""
    for name, value in values.items():
        setattr(server_args, name, value)
    return server_args


def register_resolution() -> None:
    """Adds our part to the resolution of server arguments, which runs before anything loads."""
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    register_resolution_hook("handle_gpu_memory_settings")(_capture_larger_batches)
    register_resolution_hook("handle_attention_backend_compatibility")(_choose_attention_backend)
    register_resolution_hook("handle_other_validations")(_validate)


def _capture_larger_batches(server_args, previous) -> None:
    """Compaction makes room for more requests than SGLang captures decode steps for.

    As many times its default as the budget has room for, at most :data:`MOST_TIMES`, and at most
    :data:`MOST_CAPTURED` and ``--max-running-requests``; only where the operator chose neither the
    sizes nor the memory, which then grows with them.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    settings, cfg = config.settings_of(server_args), resolving_view(server_args)
    graphs = cfg.cuda_graph_config
    chosen = {(Phase.DECODE, "max_bs"), (Phase.DECODE, "bs")} & server_args._cuda_graph_config_locked
    if (
        settings is not None
        and cfg.device == "cuda"
        and graphs.decode.backend != Backend.DISABLED
        and cfg.mem_fraction_static is None
        and not chosen
    ):
        trial = copy(server_args)
        trial._resolved_overrides = list(server_args._resolved_overrides)
        previous(trial)
        default = resolving_view(trial).cuda_graph_config.decode.max_bs
        times = min(MOST_TIMES, int(1 / settings.policy.budget))
        raised = min(default * times, MOST_CAPTURED, cfg.max_running_requests or MOST_CAPTURED)
        if raised > default:
            graphs = with_phase(graphs, Phase.DECODE, max_bs=raised)
            declare_resolution(server_args, "sglang_vlkv", cuda_graph_config=graphs)
    previous(server_args)


def _choose_attention_backend(server_args, previous) -> None:
    """One backend scores prompts and reads kept rows: what the operator named, else one for the
    hardware. A model's own defaults may name one for each of these.

    It runs before SGLang resolves its own choice, which would decide on the page size too.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution

    backends = config.settings_of(server_args) and (_named(server_args) or _by_hardware(server_args))
    if backends:
        fields = dict(zip(BACKENDS, backends, strict=True))
        if server_args.page_size is None:
            fields["page_size"] = 1
        declare_resolution(server_args, "sglang_vlkv", **fields)
    previous(server_args)


def _named(server_args) -> tuple[str, str, str] | None:
    """:data:`BACKENDS` as the operator named them, what is left out like the others; None where none is."""
    # What SGLang itself declares is not in the arguments' own fields.
    base, prefill, decode = (getattr(server_args, name) for name in BACKENDS)
    if not (base or prefill or decode):
        return None
    return base or prefill or decode, prefill or base or decode, decode or base or prefill


def _by_hardware(server_args) -> tuple[str, str, str] | None:
    """SGLang's choice where it can be served, else one that can; None where the model needs its own."""
    from sglang.srt.arg_groups.model_override_base import get_default_attn_backend, model_config_of
    from sglang.srt.arg_groups.overrides import resolving_view, use_mla_backend

    cfg, model = resolving_view(server_args), model_config_of(server_args)
    if cfg.device == "cpu":
        return ("torch_native",) * 3
    if cfg.device != "cuda":
        return None
    declared = [backend for name in BACKENDS if (backend := getattr(cfg, name))]
    default = get_default_attn_backend(server_args, use_mla_backend(server_args), model)
    if not {default, *declared} <= {*ATTENTION["cuda"], *OTHERS_OF_HARDWARE}:
        return None
    backend = cfg.prefill_attention_backend or cfg.attention_backend or default
    served = backend in ATTENTION["cuda"] and takes(backend, model.head_dim)
    return (backend if served else "triton",) * 3


def _validate(server_args, previous) -> None:
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    from sglang_vlkv.options.refusals import refuse

    previous(server_args)
    endpoint = getattr(server_args, "kv_events_endpoint", None)
    address = None if endpoint is None else publisher.address(endpoint)
    if config.settings_of(server_args) is None:
        given = [name for name in config.DEFAULTS if name != "kv_policy" and getattr(server_args, name, None)]
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            logger.warning("Without --kv-policy these have no effect: %s.", flags)
        return
    cfg = resolving_view(server_args)
    refuse(server_args, model_config_of(server_args))
    if address is not None:
        _check_address(address, cfg)
    declare_resolution(server_args, "sglang_vlkv", radix_cache_backend=RADIX_CACHE)
    graphs = cfg.cuda_graph_config
    if graphs is not None and graphs.prefill.backend != Backend.DISABLED:
        logger.info("Prefill CUDA graphs are off: policies look at every prefill. Decode keeps its own.")
        graphs = with_phase(graphs, Phase.PREFILL, backend=Backend.DISABLED)
        declare_resolution(server_args, "sglang_vlkv", cuda_graph_config=graphs)


def _check_address(address: str, cfg) -> None:
    """Before anything loads: live events can be published there.

    Raises:
        ValueError: they cannot.
    """
    from sglang.srt.runtime_context import num_dp_ranks_of

    if cfg.node_rank == 0:
        publisher.check_free(address, num_dp_ranks_of(cfg))
    if publisher.is_public(address):
        logger.warning(
            "%s %s: whoever reaches that port reads the ids of requests, their sizes and times; never "
            "what they say. A port alone (5558) is for this machine only.",
            publisher.FLAG,
            address,
        )
