"""A byte-level tokenizer and a chat template, as files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

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


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
