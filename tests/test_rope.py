"""Rotary embedding, against explicit matrices and against SGLang's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sglang_vlkv.stages.rope import Rope
from tests.naive import Rotary
from tests.test_policies import table

N, HEADS = 40, 3
# head size, rotary embedding
KINDS = {
    "whole head": (32, Rotary(32, (0,) * 16)),
    "pairs side by side": (32, Rotary(32, (0,) * 16, neox=False)),
    "odd head, four dimensions turn": (5, Rotary(4, (0, 0))),
    "the same, side by side": (5, Rotary(4, (0, 0), neox=False)),
    "M-RoPE sections": (100, Rotary(100, (0,) * 10 + (1,) * 20 + (2,) * 20)),
    "M-RoPE interleaved": (32, Rotary(20, (0, 1, 2) * 3 + (0,))),
    "YaRN, whose table is longer than 1": (32, Rotary(32, (0,) * 16, gain=1.139)),
    "YaRN on a part of the head": (36, Rotary(20, (0,) * 10, neox=False, gain=1.139)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def drawn(kind: str) -> tuple[torch.Tensor, Rotary, torch.Tensor, torch.Tensor]:
    """Vectors ``[n, H, D]``, the embedding, positions ``[axes, n]``, the vectors rotated."""
    dim, rotary = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, HEADS, dim, generator=generator, dtype=torch.float64)
    positions = torch.randint(0, rotary.limit, (1 + max(rotary.axes), N), generator=generator)
    turns = torch.stack([rotary.matrix(position, dim) for position in positions.T.tolist()])
    return x, rotary, positions, torch.einsum("nde,nhe->nhd", turns, x)


@every_kind
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2.0**-6)])
def test_rope_comes_off_as_the_matrix_put_it_on(kind, dtype, tolerance):
    x, rotary, positions, rotated = drawn(kind)
    before = (rotated := rotated.to(dtype)).clone()
    bare = table(rotary).unrotate(rotated, positions)
    assert bare.dtype == torch.float32 and torch.equal(rotated, before)
    torch.testing.assert_close(bare.double(), x, rtol=tolerance, atol=4 * tolerance)


@every_kind
def test_rotating_is_the_matrix(kind):
    x, rotary, positions, rotated = drawn(kind)
    rope = table(rotary)
    ours = rope.rotate(x, *rope.angles(positions))
    torch.testing.assert_close(ours.double(), rotated, rtol=0, atol=2e-6)


def test_equal_axes_are_one_position():
    """Text prompts of an M-RoPE model have positions with one axis."""
    x, rotary, positions, _ = drawn("M-RoPE interleaved")
    rope, one = table(rotary), positions[:1]
    assert torch.equal(rope.unrotate(x, one), rope.unrotate(x, one.expand(3, -1)))
    assert not torch.equal(rope.unrotate(x, one), rope.unrotate(x, positions))


SECTIONS = dict(mrope_section=[4, 6, 6])


@pytest.mark.parametrize("kind, neox, options", [
    ("base.RotaryEmbedding", True, {}),
    ("base.RotaryEmbedding", False, {}),
    ("mrope.MRotaryEmbedding", True, SECTIONS),
    ("mrope.MRotaryEmbedding", True, SECTIONS | {"mrope_interleaved": True}),
    ("yarn.YaRNScalingRotaryEmbedding", True, {"scaling_factor": 4.0}),
])  # fmt: skip
def test_what_sglang_put_on_comes_off(kind, neox, options):
    from importlib import import_module

    from sglang_vlkv.attention.rotary import find_rope

    module, name = kind.split(".")
    rotary = getattr(import_module(f"sglang.srt.layers.rotary_embedding.{module}"), name)
    common = dict(head_size=40, rotary_dim=32, max_position_embeddings=512, base=10_000, dtype=torch.float32)
    attention, model = nn.Module(), nn.Module()
    attention.rotary_emb = rotary(**common, is_neox_style=neox, **options)
    model.layers = nn.ModuleList([attention])
    rope = find_rope(model)
    assert isinstance(rope, Rope)

    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(N, HEADS * 40, generator=generator), torch.randn(N, 40, generator=generator)
    positions = torch.randint(0, 512, (3 if "mrope_section" in options else 1, N), generator=generator)
    native = positions if len(positions) > 1 else positions[0]
    for x, rotated in zip((q, k), attention.rotary_emb.forward_native(native, q.clone(), k.clone())):
        bare = rope.unrotate(rotated.view(N, -1, 40), positions)
        torch.testing.assert_close(bare, x.view(N, -1, 40), rtol=1e-4, atol=1e-4)


def test_a_model_without_rope_has_none():
    from sglang_vlkv.attention.rotary import find_rope

    assert find_rope(nn.Sequential(nn.Linear(2, 2))) is None
