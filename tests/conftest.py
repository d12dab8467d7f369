"""Servers that several modules share; each is started at its first use."""

from __future__ import annotations

import pytest
import torch

from tests.equality import largest_deviation
from tests.prompts import draw_prompt
from tests.serving import ROOT, Server, install_entry_point

POOL = ("--max-total-tokens", "24000")


@pytest.fixture(scope="module")
def one_thread():
    """For small shapes: threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def stock():
    """SGLang on our CPU platform without the plugin that brings the policies."""
    with Server(*POOL, env={"SGLANG_PLUGINS": "vlkv_cpu"}) as server:
        yield server
        assert server.alive(), server.log()[-4000:]


@pytest.fixture(scope="session")
def vlcache():
    """VL-Cache at its defaults, a budget of 10%."""
    with Server(*POOL, "--kv-policy", "vlcache") as server:
        yield server
        assert server.alive(), server.log()[-4000:]


@pytest.fixture(scope="session")
def any_policy(tmp_path_factory):
    """Stays out of the way unless a request asks for a policy; knows the one in examples/policy."""
    example, installed = ROOT / "examples" / "policy", tmp_path_factory.mktemp("installed")
    install_entry_point(installed, "sglang_vlkv.policies", "knorm", "knorm:KNorm")
    env = {"PYTHONPATH": f"{installed}:{example}"}
    allow = '{"allow_override": true}'
    with Server(*POOL, "--kv-policy", "none", "--kv-policy-config", allow, env=env) as server:
        yield server
        assert server.alive(), server.log()[-4000:]


@pytest.fixture(scope="session")
def hugging_face():
    from tests.hf_reference import Reference

    return Reference()


@pytest.fixture(scope="session")
def tolerance(stock, hugging_face) -> float:
    """Least margin between two tokens, in nats, that rounding cannot turn around.

    Measured: four times the largest deviation of SGLang's logprobs from Hugging Face's, both in
    float32, over prompts of every kind.
    """
    deviation = 0.0
    for kind in ("image", "images", "text"):
        prompt = draw_prompt(1000, kind)
        answer = stock.generate(prompt.text, prompt.images)
        deviation = max(deviation, largest_deviation(hugging_face.generate(prompt, 16), answer))
    print(f"largest logprob deviation of stock SGLang from Hugging Face: {deviation:.2e}")
    assert 0 < deviation < 1e-3
    return 4 * deviation
