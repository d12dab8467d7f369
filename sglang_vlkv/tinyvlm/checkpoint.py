"""A checkpoint in Hugging Face layout: its configuration, its processors, and all of its files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save

from sglang_vlkv.tinyvlm.tokenizer import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    TOKEN_ID,
    VOCAB_SIZE,
    write_json,
    write_tokenizer,
)

PATCH_SIZE = 14  # pixels
MERGE_SIZE = 2  # patches per visual token, each way: one visual token covers 28x28 pixels
TEMPORAL_PATCH_SIZE = 2  # frames per patch
VISION_DEPTH = 2
VISION_HIDDEN = 64
VISION_INTERMEDIATE = 128
VISION_HEADS = 4


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
        "text_config": _text_config(
            num_layers, num_heads, num_kv_heads, head_dim, hidden_size, intermediate_size,
            max_position_embeddings, mrope_section, rope_theta, vocab_size, dtype,
        ),
        "vision_config": _vision_config(
            vision_hidden, vision_intermediate, hidden_size, window_size, full_attention_blocks
        ),
    }  # fmt: skip


def _text_config(
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    hidden_size: int,
    intermediate_size: int,
    max_position_embeddings: int,
    mrope_section: list[int],
    rope_theta: float,
    vocab_size: int,
    dtype: str,
) -> dict:
    return {
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
    }


def _vision_config(
    hidden_size: int, intermediate_size: int, out_hidden_size: int, window_size: int,
    full_attention_blocks: tuple[int, ...],
) -> dict:  # fmt: skip
    return {
        "model_type": "qwen2_5_vl_vision",
        "depth": VISION_DEPTH,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_heads": VISION_HEADS,
        "hidden_act": "silu",
        "in_channels": 3,
        "in_chans": 3,
        "out_hidden_size": out_hidden_size,
        "patch_size": PATCH_SIZE,
        "spatial_patch_size": PATCH_SIZE,
        "spatial_merge_size": MERGE_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "tokens_per_second": 2,
        "window_size": window_size,
        "fullatt_block_indexes": list(full_attention_blocks),
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
