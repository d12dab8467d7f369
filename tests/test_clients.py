"""Real clients: curl, the OpenAI client, SGLang's own benchmark, streams; and what they are told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import requests

from tests.prompts import CLIP, draw_prompt
from tests.serving import ROOT, Server, report, user_message

REPORT_FIELDS = {
    "policy", "budget", "prompt_tokens", "visual_tokens", "voting_rows", "sparsity_per_layer",
    "kept_per_layer", "kept_bytes", "full_bytes", "prefix",
}  # fmt: skip
SLOT_BYTES = 4 * 2 * 2 * 32 * 4  # 4 layers, K and V, 2 KV heads of 32 float32


@pytest.fixture(scope="module")
def client(vlcache):
    return openai.OpenAI(base_url=vlcache.url + "/v1", api_key="none")


def messages(prompt) -> list[dict]:
    return [user_message(prompt.text, prompt.images, prompt.video)]


def test_report_of_a_compacted_request(vlcache):
    vlcache.flush()
    prompt = draw_prompt(50, "image")
    answer = vlcache.generate(prompt.text, prompt.images, rid="my-own-id", custom={"kv_report": "positions"})
    seen = report(answer)
    assert REPORT_FIELDS <= set(seen)
    n = answer["meta_info"]["prompt_tokens"]
    width, height = prompt.images[0].size
    assert (seen["prompt_tokens"], seen["visual_tokens"]) == (n, width * height // 28**2)
    assert seen["voting_rows"] == max(16, n - seen["visual_tokens"] - 7)
    assert seen["prefix"] == {"kind": "cold", "tokens": 0}
    assert seen["full_bytes"] == n * SLOT_BYTES
    slots = -(-sum(seen["kept_per_layer"]) // 4)
    assert seen["kept_bytes"] == slots * SLOT_BYTES
    assert [[len(head) for head in layer] for layer in seen["positions"]] == [
        [kept] * 2 for kept in seen["kept_per_layer"]
    ]
    for kept, heads in zip(seen["kept_per_layer"], seen["positions"]):
        recent = max(1, kept // 10)
        assert all(head[-recent:] == list(range(n - recent, n)) for head in heads)
    assert sum(seen["kept_per_modality"].values()) == 2 * sum(seen["kept_per_layer"])
    stored = requests.get(vlcache.url + "/kv_policy/requests/my-own-id", timeout=10)
    assert stored.status_code == 200 and stored.json() == seen


@pytest.mark.parametrize(
    "kind, length, reason",
    [("text", 4, "no image or video"), ("image", 1, "finished at its first token")],
)
def test_report_of_what_is_left_alone(vlcache, kind, length, reason):
    prompt = draw_prompt(51, kind)
    seen = report(vlcache.generate(prompt.text, prompt.images, max_new_tokens=length))
    assert (seen["policy"], seen["reason"]) == ("none", reason)


def test_a_short_prompt_is_left_alone(vlcache):
    prompt = draw_prompt(52, "image")
    small = prompt.images[0].resize((28 * 6, 28 * 6))
    seen = report(vlcache.generate("what", [small], max_new_tokens=4))
    assert seen["policy"] == "none" and "min_prompt_tokens 256" in seen["reason"]


def test_every_sample_of_one_request_has_its_report(vlcache):
    body = draw_prompt(53, "image").body(6, temperature=1.0, n=3)
    answers = vlcache.many([body])[0]
    assert len(answers) == 3 and all(report(answer)["policy"] == "vlcache" for answer in answers)


def test_an_unknown_report_option_is_a_400(vlcache):
    body = draw_prompt(0, "image").body(4, custom={"kv_report": "everything"})
    response = vlcache.post("/generate", body)
    assert response.status_code == 400
    assert "kv_report" in response.text and "positions" in response.text


def test_unknown_response_id_is_a_404(vlcache):
    response = requests.get(vlcache.url + "/kv_policy/requests/nobody", timeout=10)
    assert response.status_code == 404


def test_server_info_says_what_is_armed(vlcache):
    armed = vlcache.info()["kv_policy"]
    assert (armed["policy"], armed["budget"], armed["p"]) == ("vlcache", 0.1, 0.01)


def test_generate_stream(vlcache):
    body = draw_prompt(54, "image").body(100) | {"stream": True}
    chunks = []
    with requests.post(vlcache.url + "/generate", json=body, stream=True, timeout=120) as stream:
        for line in stream.iter_lines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                chunks.append(json.loads(line[6:]))
    assert len(chunks) > 1  # a busy server sends several tokens at a time
    assert "kv_policy" not in chunks[0]["meta_info"]
    assert report(chunks[-1])["policy"] == "vlcache"


def test_openai_client(vlcache, client):
    prompt = draw_prompt(55, "images")
    options = dict(model="tinyvlm", messages=messages(prompt), max_tokens=8, temperature=0)
    answer = client.chat.completions.create(**options, extra_body={"return_meta_info": True})
    assert answer.choices[0].message.content
    direct = requests.get(f"{vlcache.url}/kv_policy/requests/{answer.id}", timeout=10).json()
    assert direct["policy"] == "vlcache"
    assert direct["visual_tokens"] == sum(i.width * i.height // 28**2 for i in prompt.images)
    assert answer.choices[0].meta_info["kv_policy"] == direct


def test_openai_stream_and_video(vlcache, client):
    prompt = draw_prompt(0, "video")
    assert prompt.video == CLIP
    options = dict(model="tinyvlm", messages=messages(prompt), max_tokens=8, temperature=0)
    chunks = list(client.chat.completions.create(**options, stream=True))
    seen = requests.get(f"{vlcache.url}/kv_policy/requests/{chunks[0].id}", timeout=10).json()
    assert seen["policy"] == "vlcache"
    assert seen["kept_per_modality"]["video"] > 0 and "image" not in seen["kept_per_modality"]


def test_openai_completions(vlcache, client):
    answer = client.completions.create(model="tinyvlm", prompt="hello", max_tokens=4)
    seen = requests.get(f"{vlcache.url}/kv_policy/requests/{answer.id}", timeout=10).json()
    assert (seen["policy"], seen["reason"]) == ("none", "no image or video")


def test_the_curl_line_of_the_readme(vlcache):
    readme = (ROOT / "README.md").read_text()
    [command] = re.findall(r"```bash\n(curl .*?chat/completions.*?)```", readme, re.DOTALL)
    command = command.replace("http://127.0.0.1:30000", vlcache.url)
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=120)
    answer = json.loads(run.stdout)
    assert answer["choices"][0]["meta_info"]["kv_policy"]["policy"] == "vlcache"


def completed(server: Server, tmp_path: Path, *dataset: str) -> int:
    """Requests that SGLang's own benchmark completed."""
    run = subprocess.run(
        [
            sys.executable, "-W", "ignore", "-m", "sglang.benchmark.serving", "--backend", "sglang-oai-chat",
            "--host", "127.0.0.1", "--port", str(server.port), *dataset,
            "--output-file", str(tmp_path / "result.jsonl"),
        ],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return json.loads((tmp_path / "result.jsonl").read_text().splitlines()[-1])["completed"]


def test_sglang_benchmark_with_images(vlcache, tmp_path):
    dataset = (
        "--dataset-name", "image", "--num-prompts", "8", "--image-count", "1", "--image-resolution", "448x448",
        "--random-input-len", "64", "--random-output-len", "16", "--random-range-ratio", "1.0",
    )  # fmt: skip
    assert completed(vlcache, tmp_path, *dataset) == 8


def test_sglang_benchmark_with_shared_prefixes_over_turns(vlcache, tmp_path):
    dataset = (
        "--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "2", "--gsp-prompts-per-group", "3",
        "--gsp-system-prompt-len", "64", "--gsp-question-len", "16", "--gsp-output-len", "8",
        "--gsp-num-turns", "3",
    )  # fmt: skip
    assert completed(vlcache, tmp_path, *dataset) == 2 * 3 * 3
