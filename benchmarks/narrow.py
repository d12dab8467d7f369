"""A SGLang plugin, for these benchmarks only: layers narrower than their attention, on a CPU.

On a CPU SGLang takes ``hidden_size / num_heads`` for a head's size once it has prepared a model for
head counts that the tensor-parallel size does not divide. Here it divides them, so that step is
left out and the configuration's ``head_dim`` counts. All rows load it, stock too.
"""

from __future__ import annotations

from pathlib import Path

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

NAME = "narrow_heads"


def register() -> None:
    HookRegistry.register(
        "sglang.srt.model_executor.model_runner.adjust_config_with_unaligned_cpu_tp",
        lambda model_config, load_config, tp_size: model_config,
        HookType.REPLACE,
    )


def install(folder: Path) -> None:
    """Makes the plugin known to every process that has ``folder`` on its ``PYTHONPATH``."""
    from tests.serving import install_entry_point  # not in SGLang's processes

    install_entry_point(folder, "sglang.srt.plugins", NAME, "benchmarks.narrow:register")
