"""Draws what a server kept of a prompt: ``python -m sglang_vlkv.inspect --image X --question "..."``."""


class Problem(Exception):
    """What keeps a drawing from being made; a sentence for the person who asked."""
