# Two commands do everything on a fresh machine with Python 3.11: `make serve` and `make test`.

PYTHON ?= python3.11
PORT ?= 30000
POLICY ?= vlkv
BUDGET ?= 0.1
READY := .venv/.ready

.PHONY: serve test bench install

# TORCHDYNAMO_DISABLE saves 20 s at the first request, and a model this small gains nothing from
# more than one thread.
serve: $(READY)
	TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=1 .venv/bin/python -m sglang.launch_server \
	  --model-path examples/tinyvlm --dtype float32 --mem-fraction-static 0.3 \
	  --max-total-tokens 65536 --port $(PORT) --kv-policy $(POLICY) --kv-budget $(BUDGET) \
	  --kv-policy-config '{"allow_override": true}'

# The page of examples/video_chat is tested in a browser.
test: $(READY)
	@which chromium chromedriver > /dev/null || { apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends chromium chromium-driver; } || \
	  echo "No browser: its tests are skipped. Install the packages chromium and chromium-driver."
	.venv/bin/python -m pytest --numprocesses 2 --dist loadgroup

bench: $(READY)
	.venv/bin/python -m benchmarks.decode_cpu
	.venv/bin/python -m benchmarks.policies_cpu
	.venv/bin/python -m benchmarks.capacity
	.venv/bin/python -m benchmarks.multi_turn
	.venv/bin/python -m benchmarks.overhead
	.venv/bin/python -m pip install --quiet --editable '.[bench]'
	.venv/bin/python -m benchmarks.fidelity

install: $(READY)

# SGLang decodes video with torchcodec, which needs FFmpeg's libraries from the system.
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[test]'
	@ldconfig -p | grep -q libavutil || { apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends ffmpeg; } || \
	  echo "No FFmpeg libraries: images work, video does not. Install the package ffmpeg."
	touch $@
