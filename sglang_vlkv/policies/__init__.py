"""The policies by name; each is one file with one frozen dataclass."""

from __future__ import annotations

from sglang_vlkv.base import Policy
from sglang_vlkv.policies.vlcache import VLCache

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (VLCache,)}
