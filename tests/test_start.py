"""Starting: flags, refusals, other ways in, an installed wheel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sglang_vlkv.compatibility import CPU
from sglang_vlkv.cpu import activate
from tests.prompts import draw_prompt
from tests.serving import CHECKPOINT, ROOT, SMALL_SERVER, Server, free_port, report

RESOLVE = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
for flags in json.loads(sys.argv[1]):
    try:
        args = prepare_server_args(flags)
        args.resolve_once()
        print("RESULT", json.dumps("accepted"))
    except SystemExit as error:
        print("RESULT", json.dumps(f"exit {error.code}"))
    except Exception as error:
        print("RESULT", json.dumps(f"{type(error).__name__}: {error}"))
"""


# Of google/gemma-3-4b-it, as published: five layers of six slide.
GEMMA_3 = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "image_token_index": 262144,
    "eos_token_id": [1, 106],
    "mm_tokens_per_image": 256,
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
SLIDING = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
REFUSED = {  # by what is said
    "--page-size": ["--page-size", "16"],
    "--speculative-algorithm": ["--speculative-algorithm", "NGRAM"],
    "--disaggregation-mode": ["--disaggregation-mode", "prefill"],
    "--pp-size": ["--pp-size", "2"],
    "hierarchical": ["--enable-hierarchical-cache"],
    "--attention-backend triton": ["--attention-backend", "triton"],
    "--enable-streaming-session,": ["--enable-streaming-session"],
    "--kv-cache-dtype": ["--kv-cache-dtype", "fp8_e5m2"],
    "KV heads": ["--tp-size", "4"],
    "in (0, 1]": ["--kv-budget", "1.5"],
    "it must be in (0, 1]": ["--kv-budget", "0"],
    "vlcache knows budget, recent_fraction": ["--kv-policy-config", '{"recent": 0.2}'],
    "neither a JSON object nor a readable file": ["--kv-policy-config", "no/such/file.json"],
    "not valid JSON": ["--kv-policy-config", "{budget: 1}"],
    "max_rows": ["--kv-policy-config", '{"max_rows": 4}'],
    "sliding-window": ["--model-path", "sliding"],
    "--kv-events-endpoint is 'udp://*:5558'; it must be": ["--kv-events-endpoint", "udp://*:5558"],
    "192.0.2.1:5558 cannot be bound": ["--kv-events-endpoint", "tcp://192.0.2.1:5558"],
    "a model with sliding-window or chunked attention layers: they drop rows": ["--model-path", "gemma-3"],
}
MODEL = ["--model-path", str(CHECKPOINT)]
VLCACHE = [*MODEL, "--kv-policy", "vlcache"]
PUBLIC = f"tcp://*:{free_port()}"
ACCEPTED = [
    MODEL,
    [*MODEL, "--page-size", "16"],
    VLCACHE,
    [*VLCACHE, "--kv-policy-config", "policy.json"],
    [*VLCACHE, "--enable-mixed-chunk"],
    [*VLCACHE, "--disable-radix-cache"],
    ["--config", "server.yaml"],
    [*VLCACHE, "--kv-events-endpoint", PUBLIC],
    [*MODEL, "--kv-events-endpoint", "5558"],
]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> dict[str, Future]:
    """Processes that mostly import, by name; two at a time."""
    folder = tmp_path_factory.mktemp("flags")
    checkpoint_like(folder / "sliding", text_config=SLIDING)
    (folder / "gemma-3").mkdir()
    (folder / "gemma-3" / "config.json").write_text(json.dumps(GEMMA_3))
    (folder / "policy.json").write_text('{"p": 0.02, "modality_floors": {"text": 1.0}}')
    ours = "kv-policy: vlcache\nkv-budget: 0.2\nkv-events-endpoint: ipc://events\n"
    (folder / "server.yaml").write_text(f"model-path: {CHECKPOINT}\n{ours}")
    launch = ("-m", "sglang.launch_server")
    resolve = json.dumps([VLCACHE + flags for flags in REFUSED.values()] + ACCEPTED)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-W", "ignore", *arguments],
            capture_output=True, text=True, timeout=300, cwd=folder,
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        yield {
            "resolve": pool.submit(run, "-c", RESOLVE, resolve),
            "help": pool.submit(run, *launch, "--help"),
            "unknown": pool.submit(run, *launch, *MODEL, "--kv-policy", "vlcash"),
        }
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def resolved(done) -> list[str]:
    """What SGLang's own argument resolution, which runs before anything loads, says to each."""
    run = done["resolve"].result()
    results = [json.loads(line[7:]) for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(results) == len(REFUSED) + len(ACCEPTED), run.stdout + run.stderr
    return results


def checkpoint_like(folder: Path, **changes) -> None:
    """The example checkpoint's configuration with ``changes``; enough to be refused."""
    folder.mkdir()
    for file in CHECKPOINT.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].update(changes.pop("text_config", {}))
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_what_cannot_be_served_is_refused_before_loading(resolved):
    for (said, flags), result in zip(REFUSED.items(), resolved):
        print(flags, "->", result)
        assert result != "accepted", flags
        assert said in result, (flags, result)
        assert "\n" not in result, "one sentence, please"


def test_what_can_be_served_is_accepted(resolved):
    assert resolved[len(REFUSED) :] == ["accepted"] * len(ACCEPTED)


def test_what_an_endpoint_does_not_do_is_said(done, resolved):
    said = done["resolve"].result().stderr
    assert "Without --kv-policy these have no effect: --kv-events-endpoint." in said
    assert f"{PUBLIC}: whoever reaches that port reads the ids of requests" in said


def test_help_and_unknown_policy(done):
    flags = ("--kv-policy {none,vlcache,vlkv,", "--kv-budget", "--kv-policy-config", "--kv-events-endpoint")
    for flag in flags:
        assert flag in done["help"].result().stdout
    unknown = done["unknown"].result()
    assert unknown.returncode != 0
    assert "invalid choice: 'vlcash'" in unknown.stderr and "vlcache" in unknown.stderr


ENGINE = """
import base64, json, sys
import sglang as sgl
if __name__ == "__main__":
    engine = sgl.Engine(
        model_path=sys.argv[1], dtype="float32", max_total_tokens=4000, mem_fraction_static=0.3,
        kv_policy="vlcache", kv_budget=0.2, kv_policy_config={"recent_fraction": 0.5},
        kv_events_endpoint=int(sys.argv[3]),
    )
    body = json.loads(sys.argv[2])
    answer = engine.generate(
        prompt=body["text"], image_data=body["image_data"], sampling_params=body["sampling_params"]
    )
    [state] = engine.get_server_info()["internal_states"]
    print("RESULT", json.dumps([answer["meta_info"]["kv_policy"], state["kv_events"]["endpoint"]]))
    engine.shutdown()
"""


def test_engine_takes_the_options_as_keywords(tmp_path):
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    body, port = draw_prompt(0, "image").body(8), free_port()
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(CHECKPOINT), json.dumps(body), str(port)],
        capture_output=True, text=True, timeout=300, env=os.environ | SMALL_SERVER,
    )  # fmt: skip
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, run.stdout[-2000:] + run.stderr[-4000:]
    seen, endpoint = json.loads(lines[0][7:])
    assert endpoint == f"tcp://127.0.0.1:{port}"
    assert seen["budget"] == 0.2
    assert sum(seen["kept_per_layer"]) == round(0.2 * seen["prompt_tokens"] * 4)


def test_sglang_serve_and_yaml(tmp_path):
    yaml = tmp_path / "server.yaml"
    yaml.write_text("kv-policy: vlcache\nkv-budget: 0.2\nmax-total-tokens: 4000\n")
    serve = (str(Path(sys.executable).with_name("sglang")), "serve")
    with Server("--config", str(yaml), command=serve) as server:
        info = server.info()
        assert (info["kv_policy"]["policy"], info["kv_policy"]["budget"]) == ("vlcache", 0.2)
        prompt = draw_prompt(0, "image")
        assert report(server.generate(prompt.text, prompt.images))["budget"] == 0.2


@pytest.mark.parametrize("accelerator, engine, wanted", [
    (False, "0", "sglang_vlkv.cpu.platform.TorchCpuPlatform"),
    (True, "0", None),
    (False, "1", None),
])  # fmt: skip
def test_the_cpu_platform_stays_out_of_the_way(monkeypatch, accelerator, engine, wanted):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", engine)
    monkeypatch.setenv(CPU.variable, "")
    assert activate() == wanted


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> tuple[Path, str]:
    """The built wheel in a virtual environment that has SGLang but not the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)],
        check=True, timeout=300,
    )  # fmt: skip
    [wheel] = folder.glob("sglang_vlkv-*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    target = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], text=True
    ).strip()
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, str(wheel)],
        check=True, timeout=300,
    )  # fmt: skip
    Path(target, "stock.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder, str(python)


def test_the_wheel_holds_the_page_of_inspect(installed):
    folder, python = installed
    code = "from sglang_vlkv.inspect import page; print(*(len(page.resource(k)) for k in page.PARTS))"
    sizes = subprocess.check_output([python, "-c", code], text=True, cwd=folder).split()
    assert len(sizes) == 3 and min(map(int, sizes)) > 1000


def test_the_wheel_serves_outside_the_checkout(installed):
    folder, python = installed
    where = subprocess.check_output(
        [python, "-c", "import sglang_vlkv; print(sglang_vlkv.__file__)"], text=True, cwd=folder
    )
    assert str(folder) in where
    with Server("--max-total-tokens", "4000", "--kv-policy", "vlcache", python=python, cwd=folder) as server:
        prompt = draw_prompt(0, "image")
        assert report(server.generate(prompt.text, prompt.images))["policy"] == "vlcache"
