"""Qwen2.5-VL in plain torch, for training: the same parameters, and the same values as Transformers'.

Two things make it train in minutes on a CPU. A picture is a grid of known sprites, so that under a
local vision tower each sprite is embedded once per step and gathered. And the questions about one
picture share its prefix: a question sees the picture and itself, at the positions that it would have
in a prompt of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class VisionAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """x: [..., N, dim], all N see each other; rope: [2, ..., N, 1, dim / heads], cosine and sine."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        q, k = (rotate(t, rope).to(v.dtype).transpose(-2, -3) for t in (q, k))
        out = F.scaled_dot_product_attention(q, k, v.transpose(-2, -3))
        return self.proj(out.transpose(-2, -3).flatten(-2))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class VisionBlock(nn.Module):
    def __init__(self, dim: int, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=1e-6)
        self.norm2 = nn.RMSNorm(dim, eps=1e-6)
        self.attn = VisionAttention(dim, num_heads)
        self.mlp = MLP(dim, hidden, bias=True)

    def forward(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, dim: int, config: dict) -> None:
        super().__init__()
        kernel = (config["temporal_patch_size"], config["patch_size"], config["patch_size"])
        self.proj = nn.Conv3d(3, dim, kernel, stride=kernel, bias=False)


class Merger(nn.Module):
    def __init__(self, dim: int, out: int, merge: int) -> None:
        super().__init__()
        self.ln_q = nn.RMSNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(dim * merge**2, dim * merge**2), nn.GELU(), nn.Linear(dim * merge**2, out)
        )


class Vision(nn.Module):
    """The vision tower; ``config`` is ``vision_config`` of config.json."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        dim = config["hidden_size"]
        self.patch, self.merge = config["patch_size"], config["spatial_merge_size"]
        self.head_dim = dim // config["num_heads"]
        self.window = config["window_size"] // (self.patch * self.merge)  # cells
        self.full_blocks = tuple(config["fullatt_block_indexes"])
        self.local = self.window == 1 and not self.full_blocks
        self.patch_embed = PatchEmbed(dim, config)
        self.blocks = nn.ModuleList(
            VisionBlock(dim, config["intermediate_size"], config["num_heads"]) for _ in range(config["depth"])
        )
        self.merger = Merger(dim, config["out_hidden_size"], self.merge)

    def forward(self, cells: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """Visual embeddings.

        Args:
            cells: Normalised pixels of the distinct cells [S, 3, 28, 28]; each stands for two equal
                frames.
            grid: Which cell is where, [B, rows, columns]; for a tower that is not local, rows and
                columns are multiples of the window.

        Returns:
            [B, rows * columns, out_hidden_size]
        """
        p, m = self.patch, self.merge
        patches = cells.unflatten(2, (m, p)).unflatten(4, (m, p)).permute(0, 2, 4, 1, 3, 5)
        weight = self.patch_embed.proj.weight.sum(2).flatten(1)  # two equal frames
        x = F.linear(patches.reshape(len(cells), m * m, -1), weight)  # [S, 4, dim]
        if self.local:
            rope = self._rope(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
            for block in self.blocks:
                x = block(x, rope)
            return self._merged(x)[grid.flatten(1)]
        batch, rows, columns = grid.shape
        w = self.window
        x = x[grid].unflatten(2, (columns // w, w)).unflatten(1, (rows // w, w))
        x = x.transpose(2, 3).reshape(batch, rows * columns // w**2, w * w * m * m, -1)
        order = torch.arange(rows * columns).view(rows // w, w, columns // w, w).transpose(1, 2).flatten()
        rope = self._rope(order // columns, order % columns)
        rope = rope.unflatten(1, (-1, w * w)).flatten(2, 3)  # [2, windows, patches, 1, head_dim]
        for i, block in enumerate(self.blocks):
            if i in self.full_blocks:
                x = block(x.flatten(1, 2), rope.flatten(1, 2)).view_as(x)
            else:
                x = block(x, rope)
        return self._merged(x.reshape(batch, rows * columns, m * m, -1))[:, order.argsort()]

    def _merged(self, x: torch.Tensor) -> torch.Tensor:
        return self.merger.mlp(self.merger.ln_q(x).flatten(-2))

    def _rope(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Cosine and sine [2, cells, patches of a cell, 1, head_dim] for cells at rows and columns."""
        m = self.merge
        inside = torch.arange(m)
        y = rows[:, None] * m + inside.repeat_interleave(m)
        x = columns[:, None] * m + inside.repeat(m)
        frequency = 10000.0 ** -(torch.arange(0, self.head_dim // 2, 2) / (self.head_dim // 2))
        angle = torch.cat([y[..., None] * frequency, x[..., None] * frequency], dim=-1)
        angle = torch.cat([angle, angle], dim=-1)[:, :, None]
        return torch.stack([angle.cos(), angle.sin()])


class Attention(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        hidden, self.head_dim = config["hidden_size"], config["head_dim"]
        self.num_heads, self.num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = nn.Linear(hidden, self.num_heads * self.head_dim)
        self.k_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim)
        self.v_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden, bias=False)

    def queries(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """[B, N, hidden] -> [B, heads, N, head_dim]"""
        q = self.q_proj(x)
        return rotate(q.unflatten(-1, (self.num_heads, -1)), rope).to(q.dtype).transpose(1, 2)

    def keys_values(self, x: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, N, hidden] -> two of [B, KV heads, N, head_dim]"""
        k, v = self.k_proj(x), self.v_proj(x)
        k = rotate(k.unflatten(-1, (self.num_kv_heads, -1)), rope).to(v.dtype)
        return k.transpose(1, 2), v.unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None):
        """Queries over keys and values, causal without a mask; [B, N, hidden]."""
        group = self.num_heads // self.num_kv_heads
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def log_attention(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, head: int) -> torch.Tensor:
        """The logarithm of one head's attention, float32 [B, N, keys]."""
        scores = q[:, head] @ k[:, head // (self.num_heads // self.num_kv_heads)].transpose(1, 2)
        scores = scores.float() * self.head_dim**-0.5
        return scores.masked_fill(~mask, -torch.inf).log_softmax(-1)


class Layer(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config["hidden_size"], eps=config["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(config["hidden_size"], eps=config["rms_norm_eps"])
        self.self_attn = Attention(config)
        self.mlp = MLP(config["hidden_size"], config["intermediate_size"], bias=False)

    def after(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Language(nn.Module):
    """The language model; ``config`` is ``text_config`` of config.json."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(config["hidden_size"], eps=config["rms_norm_eps"])
        half = config["head_dim"] // 2
        section = torch.tensor(config["rope_scaling"]["mrope_section"])
        # Which of time, height and width turns each of the head_dim / 2 pairs.
        self.axis = torch.arange(3).repeat_interleave(section)
        self.frequency = config["rope_theta"] ** -(torch.arange(half) / half)

    def rope(self, positions: torch.Tensor) -> torch.Tensor:
        """Cosine and sine [2, B, N, 1, head_dim] of M-RoPE positions [3, B, N]."""
        angle = positions.float()[self.axis].permute(1, 2, 0) * self.frequency
        angle = torch.cat([angle, angle], dim=-1)[:, :, None]
        return torch.stack([angle.cos(), angle.sin()])

    def forward(
        self,
        prefix: torch.Tensor,
        prefix_positions: torch.Tensor,
        tail: torch.Tensor,
        tail_positions: torch.Tensor,
        mask: torch.Tensor,
        watch: tuple[int, int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of the tail.

        Args:
            prefix: Embeddings [B, P, hidden] that attend causally among themselves.
            prefix_positions: [3, 1 or B, P]
            tail: Embeddings [B, T, hidden].
            tail_positions: [3, B, T]
            mask: bool [B, T, P + T], what each row of the tail sees of the prefix and of the tail.
            watch: A layer and a head whose attention to return as well.

        Returns:
            Logits [B, T, vocabulary], and the logarithm of the watched attention [B, T, P + T] or None.
        """
        near, far = self.rope(prefix_positions), self.rope(tail_positions)
        mask = mask[:, None]
        watched = None
        for i, layer in enumerate(self.layers):
            attn = layer.self_attn
            x, y = layer.input_layernorm(prefix), layer.input_layernorm(tail)
            k, v = attn.keys_values(x, near)
            tail_k, tail_v = attn.keys_values(y, far)
            both_k, both_v = torch.cat([k, tail_k], dim=2), torch.cat([v, tail_v], dim=2)
            q = attn.queries(y, far)
            if watch and watch[0] == i:
                watched = attn.log_attention(q, both_k, mask[:, 0], watch[1])
            tail = layer.after(tail, attn.attend(q, both_k, both_v, mask))
            # Nothing reads the prefix's last output.
            if i + 1 < len(self.layers):
                prefix = layer.after(prefix, attn.attend(attn.queries(x, near), k, v))
        return F.linear(self.norm(tail), self.embed_tokens.weight), watched


class TinyVLM(nn.Module):
    """Parameters named as in Qwen's own checkpoints; ``config`` is the content of config.json."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.visual = Vision(config["vision_config"])
        self.model = Language(config["text_config"])


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """x: [..., N, heads, head_dim], turned in pairs (i, i + head_dim / 2); rope: cosine and sine."""
    first, second = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat([-second, first], dim=-1) * rope[1]
