"""What a server is to run, as refusals look at it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_vlkv.observe.metrics import LABELS
from sglang_vlkv.options.backends import ATTENTION


@dataclass(frozen=True)
class Asked:
    """What a server is to run.

    Attributes:
        cfg: SGLang's resolving view of the server arguments.
        model: SGLang's ModelConfig.
    """

    cfg: object
    model: object

    @property
    def prefill(self) -> str | None:
        """The attention backend of prefills."""
        return self.cfg.prefill_attention_backend or self.cfg.attention_backend

    @property
    def decode(self) -> str | None:
        """The attention backend of decode steps."""
        return self.cfg.decode_attention_backend or self.cfg.attention_backend

    @property
    def device(self) -> str:
        return "cuda on ROCm" if torch.version.hip else self.cfg.device

    @property
    def served(self) -> str:
        """The attention backends that can be asked for on the device."""
        return " or ".join(ATTENTION.get(self.cfg.device, {}))

    @property
    def kv_heads(self) -> int:
        return self.model.get_total_num_kv_heads()

    @property
    def slides(self) -> bool:
        """Whether layers drop rows on their own; Qwen2 states a window that it does not use."""
        unused = getattr(self.model.hf_text_config, "use_sliding_window", True) is False
        window = self.model.sliding_window_size and not unused
        return bool(self.model.is_hybrid_swa or self.model.attention_chunk_size or window)

    @property
    def labels(self) -> str:
        """Labels of ours that the operator's have the names of."""
        return " and ".join(sorted(set(LABELS) & set(self.cfg.extra_metric_labels or {})))
