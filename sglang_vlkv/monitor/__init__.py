"""Watches a server's live events in a terminal: ``python -m sglang_vlkv.monitor [ENDPOINT]``."""
