"""The policies by name; each is one file with one frozen dataclass."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from sglang_vlkv.policies.aircache import AirCache
from sglang_vlkv.policies.elastic import Elastic
from sglang_vlkv.policies.expected import Expected
from sglang_vlkv.policies.given import Given
from sglang_vlkv.policies.h2o import H2O
from sglang_vlkv.policies.infinipotv import InfiniPotV
from sglang_vlkv.policies.lookm import LookM
from sglang_vlkv.policies.mixkv import MixKV
from sglang_vlkv.policies.none import KeepAll
from sglang_vlkv.policies.prefixkv import PrefixKV
from sglang_vlkv.policies.pyramidkv import PyramidKV
from sglang_vlkv.policies.random import Random
from sglang_vlkv.policies.snapkv import SnapKV
from sglang_vlkv.policies.streamingllm import StreamingLLM
from sglang_vlkv.policies.uniform import Uniform
from sglang_vlkv.policies.vlcache import VLCache
from sglang_vlkv.policies.vlkv import VLKV
from sglang_vlkv.stages.policy import Policy

BUILT_IN = (
    KeepAll, VLCache, VLKV, Elastic, Uniform, SnapKV, PyramidKV, H2O, StreamingLLM, LookM, PrefixKV,
    AirCache, MixKV, InfiniPotV, Expected, Random, Given,
)  # fmt: skip
GROUP = "sglang_vlkv.policies"  # entry points of other packages: name -> Policy subclass


@cache
def policies() -> dict[str, type[Policy]]:
    """All policies by name: those built in, then those of installed packages.

    Raises:
        ValueError: an entry point that is no policy, or a name that is taken.
    """
    found = {policy.name: policy for policy in BUILT_IN}
    for entry in entry_points(group=GROUP):
        where = f"entry point {entry.name} = {entry.value} of group {GROUP}"
        policy = entry.load()
        if not (isinstance(policy, type) and issubclass(policy, Policy)):
            raise ValueError(f"{where} is no subclass of sglang_vlkv.base.Policy")
        if getattr(policy, "name", None) != entry.name:
            raise ValueError(f"{where} names a policy whose name is {getattr(policy, 'name', None)!r}")
        if entry.name in found:
            raise ValueError(f"{where} takes a name that {found[entry.name].__module__} has")
        found[entry.name] = policy
    return found
