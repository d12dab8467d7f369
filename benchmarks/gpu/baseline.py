"""A decoder with dummy weights of a real model's sizes, as Hugging Face runs it and as an engine would."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from benchmarks.gpu.shapes import Model
from benchmarks.gpu.timing import Clock

MLP_TOKENS = 32768  # of a prompt at a time: bounds the MLP's activations, which need no neighbours


class Layer:
    """One decoder layer's weights, random normal, 0.02."""

    def __init__(self, model: Model, clock: Clock) -> None:
        def weight(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=clock.dtype, device=clock.device).normal_(0, 0.02)

        q, kv = model.q_heads * model.head_dim, model.kv_heads * model.head_dim
        self.sizes = q, kv, kv
        self.qkv = weight(q + 2 * kv, model.hidden)
        self.o = weight(model.hidden, q)
        self.gate_up = weight(2 * model.intermediate, model.hidden)
        self.down = weight(model.hidden, model.intermediate)
        self.norms = [torch.ones(model.hidden, dtype=clock.dtype, device=clock.device) for _ in range(2)]


Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Decoder:
    """Everything but attention and its cache, which the caller brings.

    Attributes:
        layers: of ``model``, or fewer where one layer's time is to be scaled.
    """

    def __init__(self, model: Model, clock: Clock, num_layers: int | None = None) -> None:
        self.model, self.clock = model, clock
        self.layers = [Layer(model, clock) for _ in range(num_layers or model.layers)]
        shape = model.vocabulary, model.hidden
        self.embedding, self.head = (
            torch.empty(shape, dtype=clock.dtype, device=clock.device).normal_(0, 0.02) for _ in range(2)
        )
        half = torch.arange(0, model.head_dim, 2, device=clock.device, dtype=torch.float32) / model.head_dim
        self.inverse_frequency = model.rope_theta**-half

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine ``[..., 1, D]`` of ``positions [...]``."""
        angles = positions[..., None].float() * self.inverse_frequency
        angles = torch.cat([angles, angles], -1)[..., None, :]
        return angles.cos().to(self.clock.dtype), angles.sin().to(self.clock.dtype)

    def hidden(self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """The last layer's output ``[B, T, hidden]``.

        Args:
            tokens, positions: ``[B, T]``.
            attend: of layer, q ``[B, T, Hq, D]``, k and v ``[B, T, Hkv, D]``, gives ``[B, T, Hq, D]``.
        """
        x = self.embedding[tokens]
        rotation = self.rotation(positions)
        for number, layer in enumerate(self.layers):
            x = self.layer(number, layer, x, rotation, attend)
        return x

    def layer(
        self, number: int, layer: Layer, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], attend: Attend
    ) -> torch.Tensor:
        model = self.model
        normed = rms_norm(x, (model.hidden,), layer.norms[0], 1e-5)
        parts = linear(normed, layer.qkv).split(layer.sizes, -1)
        del normed
        q, k, v = (part.unflatten(-1, (-1, model.head_dim)) for part in parts)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        attended = attend(number, q, k, v)
        del parts, q, k, v
        x = x + linear(attended.flatten(-2), layer.o)
        del attended
        out = torch.empty_like(x)
        tokens = x.flatten(0, 1)
        for start in range(0, len(tokens), MLP_TOKENS):
            rows = tokens[start : start + MLP_TOKENS]
            gate, up = linear(rms_norm(rows, (model.hidden,), layer.norms[1], 1e-5), layer.gate_up).chunk(2, -1)
            out.flatten(0, 1)[start : start + MLP_TOKENS] = rows + linear(silu(gate) * up, layer.down)
        return out

    def logits(self, last: torch.Tensor) -> torch.Tensor:
        """Of the last token's hidden state, ``[B, vocabulary]``; the prompt's are never computed."""
        return linear(rms_norm(last, (self.model.hidden,), None, 1e-5), self.head)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def repeat_kv(x: torch.Tensor, times: int) -> torch.Tensor:
    """``[B, Hkv, n, D] -> [B, Hq, n, D]``, copied, as transformers does before SDPA."""
    size, heads, n, dim = x.shape
    return x[:, :, None].expand(size, heads, times, n, dim).reshape(size, heads * times, n, dim)


class DynamicCache:
    """Hugging Face's cache: per layer K and V ``[B, Hkv, n, D]``, concatenated at every step.

    Attributes:
        voters: per layer, the queries of the prompt's last ``num_voting`` tokens, ``[B, R, Hq, D]``.
    """

    def __init__(self, model: Model, num_voting: int) -> None:
        self.model, self.num_voting = model, num_voting
        self.kv: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.voters: list[torch.Tensor] = []

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v, heads = k.transpose(1, 2), v.transpose(1, 2), q.transpose(1, 2)
        prefill = layer == len(self.kv)
        if prefill:
            self.kv.append((k.contiguous(), v.contiguous()))
            self.voters.append(q[:, -self.num_voting :].clone())
        else:
            self.kv[layer] = tuple(torch.cat(pair, 2) for pair in zip(self.kv[layer], (k, v), strict=True))
        times = self.model.q_heads // self.model.kv_heads
        k, v = (repeat_kv(x, times) for x in self.kv[layer])
        out = scaled_dot_product_attention(heads, k, v, is_causal=prefill, scale=self.model.scale)
        return out.transpose(1, 2)

    def compacted(self, alpha: float) -> DynamicCache:
        """VL-Cache with plain torch: layer budgets by post-vision sparsity, rows by their scores.

        All requests of the batch get the same layer budgets, since they share one tensor.
        """
        from sglang_vlkv.stages.budgets import proportional

        layers, length = len(self.kv), self.kv[0][0].shape[2]
        scores, density = [], []
        for (k, _), q in zip(self.kv, self.voters, strict=True):
            of_layer, dense = self._score(q, k)
            scores.append(of_layer)
            density.append(dense)
        total = round(alpha * length * layers)
        budgets = proportional(torch.stack(density).tolist(), total, length)
        small = DynamicCache(self.model, self.num_voting)
        for (k, v), score, num_kept in zip(self.kv, scores, budgets, strict=True):
            kept = score.topk(num_kept, dim=-1).indices.sort(-1).values  # [B, Hkv, kept]
            at = kept[..., None].expand(-1, -1, -1, k.shape[-1])
            small.kv.append((k.gather(2, at), v.gather(2, at)))
        return small

    def _score(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores ``[B, Hkv, n]`` and the fraction of entries of 1 % of their row's maximum or more."""
        size, rows, _, dim = q.shape
        num_kv_heads, length = k.shape[1:3]
        tile = q.view(size, rows, num_kv_heads, -1, dim).transpose(1, 2).flatten(2, 3)
        logits = (tile @ k.mT * self.model.scale).float()  # [B, Hkv, R * G, n]
        future = torch.arange(length, device=q.device) > torch.arange(length - rows, length, device=q.device)[:, None]
        logits.masked_fill_(future.repeat_interleave(tile.shape[2] // rows, 0), -torch.inf)
        attention = logits.softmax(-1)
        dense = (attention >= 0.01 * attention.amax(-1, keepdim=True)).float().mean()
        return attention.sum(2), dense
