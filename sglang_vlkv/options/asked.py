"""What a server is to run, as refusals look at it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.configs.model_config import is_minimax_sparse

from sglang_vlkv.observe.metrics import LABELS
from sglang_vlkv.options.backends import ATTENTION, BACKENDS

# Their configurations state a window, which SGLang's models of them never read.
IGNORE_THEIR_WINDOW = (
    "MistralForCausalLM",
    "Mistral3ForConditionalGeneration",
    "MixtralForCausalLM",
    "Phi3ForCausalLM",
    "Phi4MMForCausalLM",
    "Starcoder2ForCausalLM",
)

# Of theirs no configuration tells.
BEYOND_SOFTMAX = (
    "Grok1ForCausalLM",  # caps logits
    "Grok1ModelForCausalLM",
    "HrmTextForCausalLM",  # sees rows behind a token
    "IQuestLoopCoderForCausalLM",  # goes over its layers again, within windows
    "LLaDA2MoeModelLM",
    "SDARForCausalLM",
    "SDARMoeForCausalLM",
)


@dataclass(frozen=True)
class Asked:
    """What a server is to run.

    Attributes:
        args: SGLang's server arguments, as the operator gave them.
        model: SGLang's ModelConfig.
    """

    args: object
    model: object

    @property
    def cfg(self):
        """What SGLang has made of the arguments so far."""
        return resolving_view(self.args)

    def gave(self, field: str) -> bool:
        """Whether the value of ``field`` is the operator's, not one that SGLang chose."""
        return getattr(self.args, field) == getattr(self.cfg, field)

    @property
    def prefill(self) -> str | None:
        """The attention backend of prefills."""
        return self.cfg.prefill_attention_backend or self.cfg.attention_backend

    @property
    def decode(self) -> str | None:
        """The attention backend of decode steps."""
        return self.cfg.decode_attention_backend or self.cfg.attention_backend

    @property
    def prefill_named(self) -> str:
        """How the backend of prefills was asked for."""
        return self._named(self.prefill, "prefill_attention_backend")

    @property
    def decode_named(self) -> str:
        """How the backend of decode steps was asked for."""
        return self._named(self.decode, "decode_attention_backend")

    def _named(self, backend: str, first: str) -> str:
        for field in (first, *BACKENDS):
            if getattr(self.args, field) == backend:
                return f"--{field.replace('_', '-')} {backend}"
        return f"the {backend} attention that SGLang chose"

    @property
    def pages(self) -> str:
        size = self.cfg.page_size
        chosen = f"the pages of {size} tokens that SGLang chose"
        return f"--page-size {size}" if self.gave("page_size") else chosen

    @property
    def kv_dtype(self) -> str:
        dtype = self.cfg.kv_cache_dtype
        chosen = f"the {dtype} KV cache that SGLang chose"
        return f"--kv-cache-dtype {dtype}" if self.gave("kv_cache_dtype") else chosen

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
        """Whether layers drop rows on their own. Some models state a window that they do not use."""
        stated_only = getattr(self.model.hf_text_config, "use_sliding_window", True) is False
        unused = stated_only or self._is_one_of(IGNORE_THEIR_WINDOW)
        window = self.model.sliding_window_size and not unused
        return bool(self.model.is_hybrid_swa or self.model.attention_chunk_size or window)

    @property
    def is_sparse(self) -> bool:
        """Whether layers choose rows on their own."""
        config = self.model.hf_config
        return is_minimax_sparse(config) or bool(getattr(config, "has_minicpm_sparse_attention", False))

    @property
    def beyond_softmax(self) -> bool:
        """Whether layers do more than softmax attention over the rows before a token, as far as a
        configuration tells; see :func:`sglang_vlkv.attention.layers.unserved`."""
        text = self.model.hf_text_config
        capped = (getattr(text, "attn_logit_softcapping", None) or 0) > 0
        return bool(self.model.has_attention_sinks or capped or self._is_one_of(BEYOND_SOFTMAX))

    def _is_one_of(self, architectures: tuple[str, ...]) -> bool:
        """Whether the model, or its language model, is one of these."""
        configs = self.model.hf_config, self.model.hf_text_config
        named = {name for config in configs for name in getattr(config, "architectures", None) or ()}
        return not named.isdisjoint(architectures)

    @property
    def labels(self) -> str:
        """Labels of ours that the operator's have the names of."""
        return " and ".join(sorted(set(LABELS) & set(self.cfg.extra_metric_labels or {})))
