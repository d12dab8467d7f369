"""Who makes room: exact KV that a twin can stand in for, and twins beyond the operator's limit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from sglang_vlkv.cache.twins import Twin
from sglang_vlkv.options.config import FALLBACK, PREFER

if TYPE_CHECKING:
    from sglang_vlkv.cache.radix import TwinRadixCache


class Eviction:
    """Gives slots of a tree back, leaf by leaf."""

    def __init__(self, tree: TwinRadixCache) -> None:
        self._tree = tree

    def evict_doubled(self, num_tokens: int) -> int:
        """Evicts exact KV that a twin can stand in for; returns the number of slots."""
        if self._tree.disable or self._tree.settings.twins not in (FALLBACK, PREFER):
            return 0
        tracker = dict.fromkeys(self._tree.tree_components, 0)
        for twin in self._tree.twins.with_exact():
            if tracker[ComponentType.FULL] >= num_tokens:
                break
            _, extra_key, cache_salt = twin.space
            key = RadixKey(twin.tokens, extra_key, cache_salt=cache_salt)
            if self._evict_end(key, num_tokens, tracker):
                self._tree.twins.exact_is_gone(twin)
        return tracker[ComponentType.FULL]

    def _evict_end(self, key: RadixKey, num_tokens: int, tracker: dict[ComponentType, int]) -> bool:
        """Evicts an exact path from its end on; False where more of it can go later."""
        matched, last, reach = self._tree.tree_core.match_full_device_prefix(key)
        if reach > matched:  # it ends inside somebody else's
            return True
        gone = 0  # children of the node at hand
        for node in reversed(self._tree.tree_core.collect_path_info([last])[0]):
            if node.num_children > gone:
                return True
            if tracker[ComponentType.FULL] >= num_tokens or self._is_locked(node.node_id):
                return False
            self._tree._evict_device_leaf(node.node_id, tracker)
            gone = 1
        return True

    def _is_locked(self, node_id: int) -> bool:
        """A lock moves what nobody else has locked from evictable to protected."""
        before = self._tree.protected_size()
        lock = self._tree.lock(node_id)
        moved = self._tree.protected_size() > before
        self._tree.unlock(lock)
        return not moved

    def drop(self, twin: Twin) -> bool:
        """Gives a twin's slots back, unless somebody needs them."""
        idle = twin in self._tree.twins and twin.is_idle and not self._is_locked(twin.node)
        if idle:
            self._tree._evict_device_leaf(twin.node, dict.fromkeys(self._tree.tree_components, 0))
        return idle

    def limit(self) -> None:
        """Holds what nobody reads to the operator's ``max_twins``; the least recently used goes."""
        excess = self._tree.twins.num_slots - self._tree.settings.max_twins * self._tree.token_to_kv_pool_allocator.size
        if excess <= 0:
            return
        twins = self._tree.twins.by_age()
        excess -= sum(len(twin.slots) for twin in twins if twin.holders)
        for twin in twins:
            while excess > 0 and twin is not None and self.drop(twin):
                excess -= len(twin.slots)
                twin = twin.parent
