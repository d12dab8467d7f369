"""Write a complete random-weight Qwen2.5-VL checkpoint in Hugging Face layout.

``python -m sglang_vlkv.tinyvlm.build OUT_DIR`` gives a model of about 2 MB that stock Transformers
and stock SGLang load offline: weights, configs, a byte-level tokenizer, processors, a chat template.
The text it writes means nothing, but it depends on all of the prompt, images included, and its
attention is peaked, so which KV entries are kept matters as it does in a trained model.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

# Ids 0..255 are the bytes themselves; these follow from 256 in this order.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TOKEN_ID = {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

PATCH_SIZE = 14  # pixels
MERGE_SIZE = 2  # patches per visual token, each way: one visual token covers 28x28 pixels
TEMPORAL_PATCH_SIZE = 2  # frames per patch
VISION_DEPTH = 2
VISION_HIDDEN = 64
VISION_INTERMEDIATE = 128
VISION_HEADS = 4

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] in ('video', 'video_url') -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def build(
    out_dir: Path,
    *,
    seed: int = 0,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    hidden_size: int | None = None,
    intermediate_size: int = 256,
    max_position_embeddings: int = 32768,
    attention_scale: float = 3.0,
    dtype: str = "bfloat16",
    write_weights: bool = True,
) -> None:
    """Write the checkpoint into ``out_dir``, which is created if missing.

    The same arguments give byte-identical files.

    Args:
        out_dir: Target directory; files of the same names are replaced.
        seed: Seed of the weights.
        num_layers, num_heads, num_kv_heads, head_dim: Shape of the language model.
        hidden_size: Width of the residual stream, ``num_heads * head_dim`` if None. Another value
            is for SGLang on an accelerator only: Transformers' Qwen2.5-VL, and SGLang with
            ``--device cpu``, take ``hidden_size / num_heads`` for ``head_dim``.
        intermediate_size: Width of the MLP.
        max_position_embeddings: Context length in tokens.
        attention_scale: Standard deviation of the attention logits (natural-log units) of the
            language model: 0 is near-uniform attention, 3 puts half of the mass on some 2 % of the
            keys.
        dtype: ``"bfloat16"`` or ``"float32"``, of the stored weights.
        write_weights: False leaves ``model.safetensors`` out (for ``--load-format dummy``).

    Raises:
        ValueError: For a shape that the architecture does not allow, or an unknown dtype.
    """
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}")
    if head_dim % 16:
        raise ValueError(f"head_dim={head_dim} is not a multiple of 16")
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype={dtype!r} is neither 'bfloat16' nor 'float32'")
    hidden_size = num_heads * head_dim if hidden_size is None else hidden_size

    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    # Same proportions of time, height and width as Qwen2.5-VL ([16, 24, 24] of 64).
    section_t = head_dim // 8
    section_hw = (head_dim // 2 - section_t) // 2
    config = model_config(
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_position_embeddings,
        mrope_section=[section_t, section_hw, section_hw],
        dtype=dtype,
    )
    weights = None
    if write_weights:
        weights = _vision_weights(seed, hidden_size) | language_weights(
            seed,
            num_layers,
            hidden_size,
            num_heads * head_dim,
            num_kv_heads * head_dim,
            intermediate_size,
            attention_scale,
        )
    write_checkpoint(out_dir, config, weights)


def model_config(
    *,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    hidden_size: int,
    intermediate_size: int,
    max_position_embeddings: int,
    mrope_section: list[int],
    rope_theta: float = 10000.0,
    vocab_size: int = VOCAB_SIZE,
    tie_word_embeddings: bool = False,
    vision_hidden: int = VISION_HIDDEN,
    vision_intermediate: int = VISION_INTERMEDIATE,
    window_size: int = 112,
    full_attention_blocks: tuple[int, ...] = (VISION_DEPTH - 1,),
    dtype: str = "bfloat16",
) -> dict:
    """The content of ``config.json``.

    ``mrope_section`` shares the ``head_dim / 2`` rotated pairs out to time, height and width, the
    fastest first. ``window_size`` is in pixels; the vision blocks not in ``full_attention_blocks``
    attend within windows of it.
    """
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": tie_word_embeddings,
        "torch_dtype": dtype,
        "vision_start_token_id": TOKEN_ID["<|vision_start|>"],
        "vision_end_token_id": TOKEN_ID["<|vision_end|>"],
        "vision_token_id": TOKEN_ID["<|vision_pad|>"],
        "image_token_id": TOKEN_ID["<|image_pad|>"],
        "video_token_id": TOKEN_ID["<|video_pad|>"],
        # SGLang's model reads head_dim here, its KV pool in text_config.
        "head_dim": head_dim,
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": max_position_embeddings,
            "max_window_layers": num_layers,
            "use_sliding_window": False,
            # Qwen's 1e6 would leave so few dimensions hardly any sense of height and width.
            "rope_theta": rope_theta,
            "rope_scaling": {
                "type": "mrope",
                "mrope_section": mrope_section,
            },
            "torch_dtype": dtype,
            "bos_token_id": TOKEN_ID["<|endoftext|>"],
            "eos_token_id": TOKEN_ID["<|im_end|>"],
            "pad_token_id": TOKEN_ID["<|endoftext|>"],
        },
        "vision_config": {
            "model_type": "qwen2_5_vl_vision",
            "depth": VISION_DEPTH,
            "hidden_size": vision_hidden,
            "intermediate_size": vision_intermediate,
            "num_heads": VISION_HEADS,
            "hidden_act": "silu",
            "in_channels": 3,
            "in_chans": 3,
            "out_hidden_size": hidden_size,
            "patch_size": PATCH_SIZE,
            "spatial_patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "tokens_per_second": 2,
            "window_size": window_size,
            "fullatt_block_indexes": list(full_attention_blocks),
        },
    }


def write_checkpoint(
    out_dir: Path, config: dict, weights: dict[str, torch.Tensor] | None, words: tuple[str, ...] = ()
) -> None:
    """Write all files of a checkpoint, except the weights if they are None.

    Args:
        out_dir: An existing directory.
        config: From ``model_config``.
        weights: Named as in Qwen's own checkpoints; stored in the config's ``torch_dtype``.
        words: Strings that are one token each, with ids from 264 on after those of their prefixes.
    """
    write_json(out_dir / "config.json", config)
    write_json(
        out_dir / "generation_config.json",
        {
            "bos_token_id": TOKEN_ID["<|endoftext|>"],
            "eos_token_id": [TOKEN_ID["<|im_end|>"], TOKEN_ID["<|endoftext|>"]],
            "pad_token_id": TOKEN_ID["<|endoftext|>"],
            "do_sample": False,
        },
    )
    _write_processors(out_dir)
    write_tokenizer(
        out_dir,
        SPECIAL_TOKENS,
        CHAT_TEMPLATE,
        words,
        # Transformers' Qwen2 class brings its own splitting, which parts a digit from its space.
        tokenizer_class="PreTrainedTokenizerFast" if words else "Qwen2TokenizerFast",
        processor_class="Qwen2_5_VLProcessor",
        model_max_length=config["text_config"]["max_position_embeddings"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    write_weights(out_dir / "model.safetensors", weights, config["torch_dtype"])


def write_weights(path: Path, weights: dict[str, torch.Tensor] | None, dtype: str) -> None:
    """Store ``weights`` in ``dtype``; None only removes what is there."""
    # A stale file of another shape must not survive a rebuild.
    path.unlink(missing_ok=True)
    if weights is not None:
        weights = {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in weights.items()}
        path.write_bytes(save(weights, metadata={"format": "pt"}))


class Sampler:
    """Random tensors, float32 on the CPU, in an order fixed by the calls."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator) * std

    def linear(self, out_features: int, in_features: int, gain: float = 1.0) -> torch.Tensor:
        """A weight [out, in] that turns unit-variance inputs into outputs of std ``gain``."""
        return self.normal(out_features, in_features, std=gain / math.sqrt(in_features))


def _vision_weights(seed: int, out_hidden: int) -> dict[str, torch.Tensor]:
    """The vision tower, named as in Qwen's own checkpoints."""
    sample = Sampler(2 * seed)
    dim, mlp = VISION_HIDDEN, VISION_INTERMEDIATE
    merged = dim * MERGE_SIZE**2
    pixels = 3 * TEMPORAL_PATCH_SIZE * PATCH_SIZE**2
    patch_weight = sample.linear(dim, pixels, gain=3.0)
    # Zero-mean filters see edges and texture as well as the patch's mean colour, which would
    # otherwise drown them.
    per_channel = patch_weight.view(dim, 3, -1)
    per_channel -= 0.9 * per_channel.mean(-1, keepdim=True)
    weights = {
        "visual.patch_embed.proj.weight": patch_weight.view(
            dim, 3, TEMPORAL_PATCH_SIZE, PATCH_SIZE, PATCH_SIZE
        )
    }

    def dense(name: str, out_features: int, in_features: int, gain: float) -> None:
        weights[f"{name}.weight"] = sample.linear(out_features, in_features, gain)
        weights[f"{name}.bias"] = sample.normal(out_features, std=0.1)

    for layer in range(VISION_DEPTH):
        block = f"visual.blocks.{layer}"
        weights[f"{block}.norm1.weight"] = torch.ones(dim)
        weights[f"{block}.norm2.weight"] = torch.ones(dim)
        dense(f"{block}.attn.qkv", 3 * dim, dim, gain=1.4)
        dense(f"{block}.attn.proj", dim, dim, gain=1.0)
        dense(f"{block}.mlp.gate_proj", mlp, dim, gain=1.4)
        dense(f"{block}.mlp.up_proj", mlp, dim, gain=1.4)
        dense(f"{block}.mlp.down_proj", dim, mlp, gain=1.0)
    weights["visual.merger.ln_q.weight"] = torch.ones(dim)
    dense("visual.merger.mlp.0", merged, merged, gain=1.4)
    dense("visual.merger.mlp.2", out_hidden, merged, gain=1.2)
    return weights


def language_weights(
    seed: int,
    num_layers: int,
    hidden: int,
    q_dim: int,
    kv_dim: int,
    intermediate: int,
    attention_scale: float,
    *,
    vocab_size: int = VOCAB_SIZE,
    bias: bool = True,
    norm_dim: int = 0,
) -> dict[str, torch.Tensor]:
    """A decoder, named as Llama's and Qwen's own checkpoints name it.

    Args:
        q_dim, kv_dim: heads x head_dim of the queries, and of the keys and values.
        attention_scale: as in :func:`build`.
        bias: whether queries, keys and values have one (Qwen2).
        norm_dim: head_dim where queries and keys are normalised head by head (Qwen3), else 0.
    """
    sample = Sampler(2 * seed + 1)
    # q.k / sqrt(head_dim) has standard deviation gain_q * gain_k.
    gain_qk = math.sqrt(attention_scale)
    lm_head = sample.linear(vocab_size, hidden, gain=3.0)
    # Logits of all but printable ASCII and newline are small: greedy output is readable, seldom
    # ends early and never holds a visual placeholder.
    printable = torch.zeros(vocab_size, dtype=torch.bool)
    printable[0x20:0x7F] = True
    printable[0x0A] = True
    lm_head[~printable] *= 0.1
    weights = {
        "model.embed_tokens.weight": sample.normal(vocab_size, hidden),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": lm_head,
    }
    for layer in range(num_layers):
        block = f"model.layers.{layer}"
        weights[f"{block}.input_layernorm.weight"] = torch.ones(hidden)
        weights[f"{block}.post_attention_layernorm.weight"] = torch.ones(hidden)
        for name, width, gain in (("q", q_dim, gain_qk), ("k", kv_dim, gain_qk), ("v", kv_dim, 1.0)):
            weights[f"{block}.self_attn.{name}_proj.weight"] = sample.linear(width, hidden, gain)
            if bias:
                weights[f"{block}.self_attn.{name}_proj.bias"] = sample.normal(width, std=0.2)
            if norm_dim and name != "v":
                weights[f"{block}.self_attn.{name}_norm.weight"] = torch.full((norm_dim,), gain_qk)
        # A larger gain lets the context's mean drown the rest, and greedy decoding cycles.
        weights[f"{block}.self_attn.o_proj.weight"] = sample.linear(hidden, q_dim)
        weights[f"{block}.mlp.gate_proj.weight"] = sample.linear(intermediate, hidden, gain=1.4)
        weights[f"{block}.mlp.up_proj.weight"] = sample.linear(intermediate, hidden, gain=1.4)
        weights[f"{block}.mlp.down_proj.weight"] = sample.linear(hidden, intermediate, gain=1.0)
    return weights


def merges_of(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Byte-level BPE merges that make each of ``words`` one token, in the order of their ranks.

    A word is built from left to right, so a word with a leading space comes out whole wherever it
    stands if it precedes the words without one.
    """
    chars = _byte_chars()
    merges = {}
    for word in words:
        pieces = [chars[byte] for byte in word.encode()]
        for i in range(1, len(pieces)):
            merges["".join(pieces[:i]), pieces[i]] = None
    return list(merges)


def vocab_size(words: tuple[str, ...]) -> int:
    return VOCAB_SIZE + len(merges_of(words))


def write_tokenizer(
    out_dir: Path,
    special_tokens: tuple[str, ...],
    chat_template: str,
    words: tuple[str, ...] = (),
    **settings: object,
) -> None:
    """A byte-level BPE: one token per UTF-8 byte, ``special_tokens``, and the merges of ``words``.

    Args:
        settings: of ``tokenizer_config.json``.
    """
    special_ids = {token: 256 + i for i, token in enumerate(special_tokens)}
    vocab = {char: byte for byte, char in enumerate(_byte_chars())}
    merges = merges_of(words)
    if merges:
        vocab |= special_ids
        first = 256 + len(special_ids)
        vocab |= {left + right: first + i for i, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special_tokens]
    )
    tokenizer.save(str(out_dir / "tokenizer.json"))
    write_json(out_dir / "vocab.json", vocab)
    (out_dir / "merges.txt").write_text(
        "".join(f"{line}\n" for line in ("#version: 0.2", *(" ".join(merge) for merge in merges)))
    )
    write_json(
        out_dir / "tokenizer_config.json",
        settings
        | {
            "add_bos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": False,
            "bos_token": None,
            "unk_token": None,
            "additional_special_tokens": list(special_tokens[1:]),
            "added_tokens_decoder": {
                str(token_id): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for token, token_id in special_ids.items()
            },
        },
    )
    (out_dir / "chat_template.jinja").write_text(chat_template)


def _byte_chars() -> list[str]:
    """The character that stands for each byte 0..255 in a byte-level BPE vocabulary."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(256) if byte not in shown)
    stand_in = {byte: 256 + i for i, byte in enumerate(hidden)}
    return [chr(stand_in.get(byte, byte)) for byte in range(256)]


def _write_processors(out_dir: Path) -> None:
    """Image and video processor configs that accept images down to 28x28 pixels."""
    area = (PATCH_SIZE * MERGE_SIZE) ** 2
    common = {
        "processor_class": "Qwen2_5_VLProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "rescale_factor": 1 / 255,
        "resample": 3,
        "merge_size": MERGE_SIZE,
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "size": {"shortest_edge": 4 * area, "longest_edge": 4096 * area},
    }
    write_json(
        out_dir / "preprocessor_config.json",
        {"image_processor_type": "Qwen2VLImageProcessorFast"} | common,
    )
    write_json(
        out_dir / "video_preprocessor_config.json",
        {"video_processor_type": "Qwen2VLVideoProcessor"} | common,
    )


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a tiny random-weight Qwen2.5-VL checkpoint.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", dest="num_layers", type=int, default=4)
    parser.add_argument("--heads", dest="num_heads", type=int, default=4)
    parser.add_argument("--kv-heads", dest="num_kv_heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--hidden", dest="hidden_size", type=int, help="default: heads x head-dim")
    parser.add_argument("--intermediate", dest="intermediate_size", type=int, default=256)
    parser.add_argument("--max-positions", dest="max_position_embeddings", type=int, default=32768)
    parser.add_argument(
        "--scale",
        dest="attention_scale",
        type=float,
        default=3.0,
        help="standard deviation of the attention logits",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--no-weights", dest="write_weights", action="store_false")
    build(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
