"""What the documents show runs, and what they point to is there."""

from __future__ import annotations

import re

import pytest
import torch

from sglang_vlkv.options.refusals import REFUSALS, table
from sglang_vlkv.stages.layer import Layer, Rows
from sglang_vlkv.stages.prompt import Modality, Prompt
from sglang_vlkv.stages.select import select
from tests.documents import anchors, links
from tests.serving import ROOT

FOLDERS = ("*.md", "docs/**/*.md", "*/README.md", "examples/*/README.md", "benchmarks/*/README.md")
DOCUMENTS = sorted(path for folder in FOLDERS for path in ROOT.glob(folder))


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_links_lead_somewhere(document):
    found = links(document.read_text())
    assert not [link.path for link in found if not (document.parent / link.path).exists()]
    for path, anchor in found:
        aim = document.parent / path if path else document
        assert not anchor or anchor in anchors(aim.read_text()), f"{path}#{anchor}"


def test_anchors_are_named_as_on_github():
    text = "# A `x`, or 1\n```bash\n# no heading\n```\n## B_c-d: e/f\n## B_c-d: e/f\n"
    assert anchors(text) == {"a-x-or-1", "b_c-d-ef", "b_c-d-ef-1"}


def test_all_that_is_refused_is_listed():
    assert len(REFUSALS) > 30 and table() in (ROOT / "docs" / "features.md").read_text()


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
