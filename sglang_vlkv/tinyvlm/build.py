"""Write a complete random-weight Qwen2.5-VL checkpoint in Hugging Face layout.

``python -m sglang_vlkv.tinyvlm.build OUT_DIR`` gives a model of about 2 MB that stock Transformers
and stock SGLang load offline: weights, configs, a byte-level tokenizer, processors, a chat template.
The text it writes means nothing, but it depends on all of the prompt, images included, and its
attention is peaked, so which KV entries are kept matters as it does in a trained model.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sglang_vlkv.commands import Problem, values
from sglang_vlkv.commands.door import Parser, command
from sglang_vlkv.tinyvlm.checkpoint import model_config, write_checkpoint
from sglang_vlkv.tinyvlm.weights import language_weights, vision_weights


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
    _check(num_heads, num_kv_heads, head_dim, dtype)
    hidden_size = num_heads * head_dim if hidden_size is None else hidden_size

    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    config = model_config(
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_position_embeddings,
        mrope_section=_sections(head_dim),
        dtype=dtype,
    )
    weights = None
    if write_weights:
        weights = vision_weights(seed, hidden_size) | language_weights(
            seed, num_layers, hidden_size, num_heads * head_dim, num_kv_heads * head_dim, intermediate_size,
            attention_scale,
        )  # fmt: skip
    write_checkpoint(out_dir, config, weights)


def _sections(head_dim: int) -> list[int]:
    """Same proportions of time, height and width as Qwen2.5-VL ([16, 24, 24] of 64)."""
    time = head_dim // 8
    return [time, *[(head_dim // 2 - time) // 2] * 2]


def _check(num_heads: int, num_kv_heads: int, head_dim: int, dtype: str) -> None:
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}")
    if head_dim % 16:
        raise ValueError(f"head_dim={head_dim} is not a multiple of 16")
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype={dtype!r} is neither 'bfloat16' nor 'float32'")


@command
def main(arguments: list[str] | None = None) -> None:
    words = "Write a tiny random-weight Qwen2.5-VL checkpoint."
    parser, count = Parser("python -m sglang_vlkv.tinyvlm.build", description=words), values.whole()
    add = parser.add_argument
    add("out_dir", type=values.new_folder)
    add("--seed", type=values.whole(0), default=0)
    add("--layers", dest="num_layers", type=count, default=4)
    add("--heads", dest="num_heads", type=count, default=4)
    add("--kv-heads", dest="num_kv_heads", type=count, default=2)
    add("--head-dim", type=count, default=32)
    add("--hidden", dest="hidden_size", type=count, help="default: heads x head-dim")
    add("--intermediate", dest="intermediate_size", type=count, default=256)
    add("--max-positions", dest="max_position_embeddings", type=count, default=32768)
    add(
        "--scale", dest="attention_scale", type=values.not_negative, default=3.0,
        help="standard deviation of the attention logits",
    )  # fmt: skip
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--no-weights", dest="write_weights", action="store_false")
    options = parser.parse_args(arguments)
    try:
        build(**vars(options))
    except ValueError as error:
        raise Problem(f"{error}.") from error


if __name__ == "__main__":
    sys.exit(main())
