"""KV-cache compression for vision-language models in unmodified SGLang.

Importing this package changes nothing; SGLang calls ``sglang_vlkv.plugin.register`` through its
plugin entry point.
"""

__version__ = "0.1.0"

TESTED_SGLANG = ("0.5.23",)  # oldest first
