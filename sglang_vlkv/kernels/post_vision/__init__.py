"""Post-vision attention: per-key scores and zero counts of the voting rows."""

from sglang_vlkv.kernels.post_vision.cpu import post_vision_scores

__all__ = ["post_vision_scores"]
