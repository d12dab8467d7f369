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


def install(folder: Path) -> dict[str, str]:
    """Writes the plugin's entry point into ``folder``; the environment in which SGLang finds it."""
    from tests.serving import ROOT, install_entry_point  # not in SGLang's processes

    install_entry_point(folder, "sglang.srt.plugins", NAME, "benchmarks.narrow:register")
    return {"PYTHONPATH": f"{folder}:{ROOT}"}
