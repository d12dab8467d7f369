"""Post-vision attention: per-key scores and zero counts of the voting rows."""

from sglang_vlkv.kernels import by_device
from sglang_vlkv.kernels.post_vision import cpu

post_vision_scores = by_device(cpu.post_vision_scores)
post_vision_scores_ragged = by_device(cpu.post_vision_scores_ragged)

__all__ = ["post_vision_scores", "post_vision_scores_ragged"]
