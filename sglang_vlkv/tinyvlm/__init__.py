"""A tiny random-weight Qwen2.5-VL checkpoint for tests and benchmarks, built by :mod:`.build`."""
