"""Policies, selection and merging where tensors lie on a GPU: the same results, nothing that mixes
devices, and no wait for the GPU before a layer's scores are there."""

import pytest
import torch

from sglang_vlkv.kernels.compaction.cpu import gather_rows
from sglang_vlkv.policies import policies, votes
from sglang_vlkv.stages import merging
from sglang_vlkv.stages.layer import Layer, Rows
from sglang_vlkv.stages.prompt import Modality, Prompt
from sglang_vlkv.stages.rope import Rope
from sglang_vlkv.stages.select import select
from tests.pretend import GPU, OnGpu, PretendGpu

N, LAYERS, HEADS, DIM, VOTING = 300, 2, 2, 16, 30
TAGS = torch.zeros(N, dtype=torch.uint8)
TAGS[10:200] = Modality.VIDEO
TAGS[200:210] = Modality.SYSTEM
NEWEST = torch.arange(N)  # as if the first 60 tokens of the video were a picture that comes again
NEWEST[10:70] += 100
PROMPT = Prompt(TAGS, last_turn=280, newest=NEWEST)
WAITS = {  # and why
    "aircache": "how many text rows are its elite is data",
}
pytestmark = pytest.mark.usefixtures("one_thread")


def tensors(seed: int) -> list[torch.Tensor]:
    """Queries of the prompt, keys, values and the rotary embedding's cache."""
    random = torch.Generator().manual_seed(seed)
    shapes = (N, 3 * HEADS, DIM), (N, HEADS, DIM), (N, HEADS, DIM), (N, DIM)
    return [torch.randn(shape, generator=random) for shape in shapes]


def scores_of(policy, q, k, v, cache, index: int, prompt: Prompt = PROMPT):
    rope = Rope(cache, None, True)
    whole = Layer(prompt, q, Rows(k), Rows(v), 0.2, index, rope)
    seen = policy.observe(None, whole) if policy.observes else None
    return policy.score(Layer(prompt, q[-VOTING:], Rows(k), Rows(v), 0.2, index, rope, seen))


def on_cpu(x):
    return x.inner if isinstance(x, OnGpu) else x


def outcome(policy, move=lambda x: x):
    """What a policy keeps and merges, from scoring to the gathered rows."""
    layers = [[move(x) for x in tensors(layer)] for layer in range(LAYERS)]
    scored = [scores_of(policy, *own, index) for index, own in enumerate(layers)]
    sparsity = [int(s.zeros) / int(s.entries) for s in scored] if scored[0].entries else None
    profiles = None if scored[0].profile is None else [s.profile.cpu() for s in scored]
    selection = select(policy, PROMPT, scored, sparsity, profiles)
    slots, kept = move(torch.arange(N)), torch.cat(selection.kept, dim=1)
    if policy.merge == "similar":
        both = [merging.merge(policy, own[1], own[2], k) for own, k in zip(layers, selection.kept)]
        rows = torch.cat([torch.stack(pair) for pair in both], dim=1)
    else:
        cells = [torch.cat([own[i] for own in layers]) for i in (1, 2)]
        merges = policy.merge == "bucket_mean"
        rows = gather_rows(*cells, slots, kept, selection.num_kept, N, merges, policy.sink_tokens)
    return scored, kept, rows


CHOICES = [
    *((name, {}) for name in policies() if name not in ("none", "given")),
    ("vlcache", dict(merge="bucket_mean", sink_tokens=4)),
    ("vlcache", dict(merge="similar")),
    ("vlcache", dict(modality_floors={"text": 1.0, "video": 0.05}, floors_share=0.8)),
    ("vlkv", dict(quota=0.3)),
]


@pytest.mark.parametrize("name, options", CHOICES, ids=[f"{name} {options}" for name, options in CHOICES])
def test_a_gpu_keeps_what_the_cpu_keeps(name, options):
    policy = policies()[name](min_rows=4, **options)
    expected_scores, expected_kept, expected_rows = outcome(policy)
    with PretendGpu():
        scores, kept, rows = outcome(policy, lambda x: x.to(GPU))
    for one, other in zip(expected_scores, scores, strict=True):
        assert isinstance(other.scores, OnGpu) and torch.equal(on_cpu(other.scores), one.scores)
    assert isinstance(kept, OnGpu) and torch.equal(on_cpu(kept), expected_kept)
    assert isinstance(rows, OnGpu) and torch.equal(on_cpu(rows), expected_rows)


@pytest.mark.parametrize("name", sorted(set(policies()) - {"none", "given"}))
def test_scoring_waits_for_nothing(name, monkeypatch):
    """A GPU scores attention in its own kernel, so that part waits for nothing either."""
    policy = policies()[name](min_rows=4)
    own = tensors(0)
    with PretendGpu() as gpu:
        moved = [x.to(GPU) for x in own]
        monkeypatch.setattr(votes, "post_vision_scores", Attention(gpu))
        prompt = Prompt(PROMPT.tags, PROMPT.last_turn, newest=NEWEST)
        scores_of(policy, *moved, index=0, prompt=prompt)
        assert bool(gpu.waits) == (name in WAITS), gpu.waits
        gpu.sent.clear()
        scores_of(policy, *moved, index=1, prompt=prompt)
        # What all layers need is copied once; noise is the same on every device.
        assert bool(gpu.sent) == (name == "random"), gpu.sent


class Attention:
    """The CPU's attention scoring; what it waits for is not counted."""

    def __init__(self, gpu: PretendGpu) -> None:
        self.scores, self.gpu = votes.post_vision_scores, gpu

    def __call__(self, *args, **kwargs):
        before = len(self.gpu.waits)
        scores = self.scores(*args, **kwargs)
        del self.gpu.waits[before:]
        return scores


def test_mixed_devices_and_waits_are_seen():
    with PretendGpu() as gpu:
        x = torch.ones(3).to(GPU)
        assert isinstance(x + 1, OnGpu) and not gpu.waits
        with pytest.raises(RuntimeError, match="mixes devices"):
            x + torch.ones(3)
        assert x.sum().item() == 3 and gpu.waits == ["aten::_local_scalar_dense"]
        assert not isinstance(x.cpu(), OnGpu) and len(gpu.waits) == 2
        assert len((x > 0).nonzero()) == 3 and len(gpu.waits) == 3
