"""What retracted requests go on from stays until they do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterable, Iterator

from sglang_vlkv.cache.twins import Twin

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.base_prefix_cache import TreeLock

    from sglang_vlkv.cache.radix import TwinRadixCache


class Pins:
    """Twins that retracted requests hold locked while they wait, the oldest first."""

    def __init__(self, tree: TwinRadixCache) -> None:
        self._tree = tree
        self._pins: dict[Req, tuple[Twin, TreeLock]] = {}

    def __bool__(self) -> bool:
        return bool(self._pins)

    def twins(self) -> Iterator[Twin]:
        """Those that are pinned."""
        return (twin for twin, _ in self._pins.values())

    def clear(self) -> None:
        """The tree holds nothing any more."""
        self._pins.clear()

    def add(self, req: Req, twin: Twin) -> None:
        """Keeps what a retracted request goes on from, until it does."""
        if twin not in self._tree.twins:
            return
        twin.add_holders(1)
        self._pins[req] = twin, self._tree.lock(twin.node)

    def drop(self, req: Req) -> None:
        twin, lock = self._pins.pop(req, (None, None))
        if twin is not None:
            self._tree.unlock(lock)
            twin.add_holders(-1)

    def keep_only(self, waiting: Iterable[Req]) -> None:
        """Requests that wait no more, because they were aborted, need nothing."""
        if self._pins:
            waiting = set(waiting)
            for req in [req for req in self._pins if req not in waiting]:
                self.drop(req)

    def drop_for(self, req: Req) -> bool:
        """Gives up the oldest pin that is not ``req``'s own; False where there is none."""
        for other in self._pins:
            if other is not req:
                self.drop(other)
                return True
        return False

    def drop_oldest(self) -> None:
        """Gives up the oldest pin."""
        self.drop(next(iter(self._pins)))
