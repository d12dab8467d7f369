"""What the documents show runs, and what they point to is there."""

from __future__ import annotations

import re

import pytest
import torch

from sglang_vlkv.base import Layer, Modality, Prompt, Rows
from sglang_vlkv.select import select
from tests.serving import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text())
    links = [link for link in links if not re.match(r"[a-z]+:", link)]
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


def test_all_that_is_refused_is_listed():
    features = (ROOT / "docs" / "features.md").read_text()
    source = (ROOT / "sglang_vlkv" / "validation.py").read_text()
    flags = set(re.findall(r"--[a-z][a-z-]+[a-z]|SGLANG_[A-Z_]+", source))
    assert len(flags) > 30 and not [flag for flag in flags if f"`{flag}" not in features]


def test_the_policy_of_the_document_selects():
    [source] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "policies.md").read_text(), re.DOTALL)
    found = {"__name__": __name__}
    exec(source, found)
    policy = found["Loud"](fall=0.25)
    with pytest.raises(ValueError, match=r"fall is 0; it must be in \(0, 1\]"):
        found["Loud"](fall=0)
    n, num_layers = 400, 4
    prompt = Prompt(torch.full((n,), int(Modality.IMAGE), dtype=torch.uint8))
    values = torch.ones(num_layers, n, 2, 8)
    values[:, 100:110, 0], values[:, 200:210, 1] = 9.0, 9.0
    keys = Rows(torch.zeros(n, 2, 8))
    layers = [Layer(prompt, torch.zeros(1, 2, 8), keys, Rows(layer), 1.0) for layer in values]
    kept = select(policy, prompt, [policy.score(layer) for layer in layers])
    assert kept.num_kept == sorted(kept.num_kept, reverse=True) and sum(kept.num_kept) == n * num_layers // 10
    for layer in kept.kept:
        assert set(range(100, 110)) <= set(layer[0].tolist())
        assert set(range(200, 210)) <= set(layer[1].tolist())
