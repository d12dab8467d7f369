"""Draws what a server kept of a prompt: ``python -m sglang_vlkv.inspect --image X --question "..."``."""
