"""VL-Cache recomputed from Hugging Face eager attention, independently of the product's code."""

from __future__ import annotations

import math
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.equality import largest_deviation
from tests.prompts import Prompt
from tests.rounding import usual
from tests.serving import CHECKPOINT

torch.set_num_threads(1)  # threads that wait for each other starve the servers beside them


class Reference:
    """A checkpoint in float32 with eager attention."""

    def __init__(self, checkpoint: Path = CHECKPOINT) -> None:
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.use(
            AutoModelForImageTextToText.from_pretrained(
                checkpoint, dtype=torch.float32, attn_implementation="eager"
            )
        )

    def use(self, model) -> None:
        self.model = model.eval()
        config = self.model.config
        self.visual_ids = (config.image_token_id, getattr(config, "video_token_id", None))
        text = config.get_text_config()
        self.num_layers = text.num_hidden_layers
        self.num_heads, self.num_kv_heads = text.num_attention_heads, text.num_key_value_heads

    def inputs(self, prompt: Prompt):
        return self.processor(
            text=[prompt.body()["text"]], images=prompt.images or None, return_tensors="pt"
        )

    @torch.no_grad()
    def generate(
        self,
        prompt: Prompt,
        num_tokens: int,
        kept: list[list[list[int]]] | None = None,
        said: list[int] | None = None,
    ) -> dict:
        """A greedy answer in the form of ``/generate``.

        Args:
            kept: ``[layer][kv head]`` positions of the prompt that decoding may attend to.
            said: the answer's tokens, if they are not to be the most likely ones.
        """
        inputs = self.inputs(prompt)
        length = inputs.input_ids.shape[1]
        forced = said and (lambda _, ids: [said[len(ids) - length]])
        handles = self._restrict(kept, length) if kept else []
        try:
            out = self.model.generate(
                **inputs, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False,
                output_logits=True, return_dict_in_generate=True, prefix_allowed_tokens_fn=forced,
            )  # fmt: skip
        finally:
            for handle in handles:
                handle.remove()
        tokens = out.sequences[0, length:].tolist()
        logprobs = [logits[0].log_softmax(-1) for logits in out.logits]
        return self._answer(tokens, logprobs)

    def rounding(self, prompt: Prompt, num_tokens: int) -> float:
        """How far the rounding of another library may move an answer's logprobs."""
        answer = self.generate(prompt, num_tokens)
        with self._shaken():
            return largest_deviation(answer, self.generate(prompt, num_tokens))

    @contextmanager
    def _shaken(self):
        """Every weight is off by what a row of its matrix times a vector may be off by."""
        weights, generator = list(self.model.parameters()), torch.Generator().manual_seed(0)
        before = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for weight in weights:
                sign = 2 * torch.randint(2, weight.shape, generator=generator) - 1
                weight.mul_(1 + usual(weight.shape[-1]) * sign)
            try:
                yield
            finally:
                for weight, old in zip(weights, before, strict=True):
                    weight.copy_(old)

    def _restrict(self, kept: list[list[list[int]]], length: int) -> list:
        """Masks, layer by layer and head by head, what decoding must not see of the prompt."""
        group = self.num_heads // self.num_kv_heads

        def hook_of(layer: int):
            visible = torch.zeros(self.num_heads, length, dtype=torch.bool)
            for head in range(self.num_heads):
                visible[head, kept[layer][head // group]] = True

            def hook(_module, args, kwargs):
                hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                if hidden.shape[1] > 1:
                    return None
                cache = kwargs["past_key_values"]
                num_keys = cache.get_seq_length(layer) + 1
                allowed = torch.ones(1, self.num_heads, 1, num_keys, dtype=torch.bool)
                allowed[0, :, 0, :length] = visible
                mask = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
                return args, kwargs | {"attention_mask": mask}

            return hook

        layers = self.model.model.language_model.layers
        return [
            layer.self_attn.register_forward_pre_hook(hook_of(i), with_kwargs=True)
            for i, layer in enumerate(layers)
        ]

    @torch.no_grad()
    def generate_sliding(
        self, prompt: Prompt, num_tokens: int, kept: list[list[list[int]]], sinks: int, distance: int
    ) -> dict:
        """A greedy answer from a cache that is merged once and then stays at its size.

        Elastic Cache row by row: losers average into the nearest kept position, then every layer
        drops its row ``max(sinks, size - distance)`` before each output token is appended.
        """
        inputs = self.inputs(prompt)
        n = inputs.input_ids.shape[1]
        out = self.model(**inputs, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1]
        for layer, heads in zip(cache.layers, kept):
            rows = [self._merged(layer.keys[0, h], heads[h], sinks, n) for h in range(len(heads))]
            values = [self._merged(layer.values[0, h], heads[h], sinks, n) for h in range(len(heads))]
            layer.keys, layer.values = torch.stack(rows)[None], torch.stack(values)[None]
        position = self.model.model.rope_deltas.item() + n
        tokens, logprobs = [], []
        while True:
            logprobs.append(logits.log_softmax(-1))
            tokens.append(int(logits.argmax()))
            if len(tokens) == num_tokens:
                break
            for layer in cache.layers:
                size = layer.keys.shape[2]
                at = max(sinks, size - distance)
                layer.keys = torch.cat([layer.keys[:, :, :at], layer.keys[:, :, at + 1 :]], 2)
                layer.values = torch.cat([layer.values[:, :, :at], layer.values[:, :, at + 1 :]], 2)
            out = self.model.model.language_model(
                input_ids=torch.tensor([tokens[-1:]]),
                position_ids=torch.full((3, 1, 1), position),
                past_key_values=cache, use_cache=True,
                attention_mask={"full_attention": None},
            )  # fmt: skip
            logits = self.model.lm_head(out.last_hidden_state[0, -1])
            position += 1
        return self._answer(tokens, logprobs)

    @torch.no_grad()
    def logprobs_behind(
        self, prompt: Prompt, answer: str, compactions: list[tuple[int, list[list[list[int]]]]]
    ) -> list[float]:
        """Logprobs of the tokens of ``answer``, whose row and head masks say what was compacted.

        Args:
            compactions: in the order of their ends: positions from ``end`` on see, of those before
                it, only the ``kept`` ones, ``[layer][kv head]``.
        """
        length = self.inputs(prompt).input_ids.shape[1]
        inputs = self.processor(
            text=[prompt.body()["text"] + answer], images=list(prompt.images) or None, return_tensors="pt"
        )
        n, group = inputs.input_ids.shape[1], self.num_heads // self.num_kv_heads
        assert n - length == len(answer), "the answer is not one token per character"

        def hook_of(layer: int):
            visible = torch.ones(self.num_heads, n, n, dtype=torch.bool).tril()
            for end, kept in compactions:
                for head in range(self.num_heads):
                    lost = torch.ones(end, dtype=torch.bool)
                    lost[kept[layer][head // group]] = False
                    visible[head, end:, :end] &= ~lost
            mask = torch.zeros(1, self.num_heads, n, n).masked_fill(~visible, -torch.inf)
            return lambda _module, args, kwargs: (args, kwargs | {"attention_mask": mask})

        layers = self.model.model.language_model.layers
        handles = [
            layer.self_attn.register_forward_pre_hook(hook_of(i), with_kwargs=True)
            for i, layer in enumerate(layers)
        ]
        try:
            logits = self.model(**inputs).logits[0, length - 1 : -1]
        finally:
            for handle in handles:
                handle.remove()
        tokens = inputs.input_ids[0, length:]
        return logits.log_softmax(-1)[torch.arange(n - length), tokens].tolist()

    @staticmethod
    def _merged(rows: torch.Tensor, kept: list[int], sinks: int, n: int) -> torch.Tensor:
        buckets = {anchor: [rows[anchor]] for anchor in kept}
        for position in sorted(set(range(n)) - set(kept)):
            nearest = min(kept, key=lambda anchor: (abs(anchor - position), anchor))
            if sinks <= nearest < n - 1:
                buckets[nearest].append(rows[position])
        return torch.stack([torch.stack(buckets[anchor]).mean(0) for anchor in kept])

    @staticmethod
    def _answer(tokens: list[int], logprobs: list[torch.Tensor]) -> dict:
        """In the form of ``/generate`` with the top-2 logprobs."""
        top = [step.topk(2) for step in logprobs]
        return {
            "output_ids": tokens,
            "meta_info": {
                "output_token_logprobs": [(float(s[t]), t) for s, t in zip(logprobs, tokens)],
                "output_top_logprobs": [list(zip(t.values.tolist(), t.indices.tolist())) for t in top],
            },
        }

    @torch.no_grad()
    def scores(self, prompt: Prompt, p: float = 0.01, min_rows: int = 16, max_rows: int = 256):
        """Token scores ``[L][Hkv, n]`` float64 and sparsities ``[L]``."""
        inputs = self.inputs(prompt)
        ids = inputs.input_ids[0]
        n = len(ids)
        visual = [i for i, token in enumerate(ids.tolist()) if token in self.visual_ids]
        rows = min(max(n - (visual[-1] + 1), min_rows), max_rows, n)
        attentions = self.model(**inputs, output_attentions=True).attentions
        scores, sparsity = [], []
        for layer in attentions:
            attention = layer[0, :, n - rows :].double()  # [Hq, R, n]
            zeros = 0
            for row in range(rows):
                seen = attention[:, row, : n - rows + row + 1]
                zeros += int((seen < p * seen.amax(1, keepdim=True)).sum())
            valid = sum(n - rows + row + 1 for row in range(rows))
            sparsity.append(zeros / (self.num_heads * valid))
            scores.append(attention.sum(1).view(self.num_kv_heads, -1, n).sum(1))
        return scores, sparsity


def reference_budgets(sparsity: list[float], budget: float, n: int) -> list[int]:
    """ALGORITHMS 1.5, by bisection in exact fractions."""
    num_layers = len(sparsity)
    total = round(budget * n * num_layers)
    low = min(max(1, math.ceil(n / 100)), total // num_layers)
    weights = [Fraction(1 - gamma) for gamma in sparsity]

    def shares(t: Fraction) -> list[Fraction]:
        return [min(max(t * w, Fraction(low)), Fraction(n)) for w in weights]

    below, above = Fraction(0), Fraction(n) / min(weights)
    for _ in range(80):
        middle = (below + above) / 2
        below, above = (middle, above) if sum(shares(middle)) < total else (below, middle)
    real = shares(above)
    counts = [int(share) for share in real]
    by_fraction = sorted(range(num_layers), key=lambda i: (-(real[i] - counts[i]), i))
    for layer in by_fraction[: total - sum(counts)]:
        counts[layer] += 1
    return counts


def reference_selection(scores: torch.Tensor, count: int, recent_fraction: float = 0.1) -> list[int]:
    """One head's kept positions: the recent window, then by score, ties to the lower position."""
    n = len(scores)
    recent = min(max(1, int(recent_fraction * count)), count)
    window = list(range(n - recent, n))
    values = scores.tolist()
    others = sorted(range(n - recent), key=lambda i: (-values[i], i))
    return sorted(others[: count - recent] + window)
