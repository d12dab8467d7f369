"""Twins: compacted KV that outlives its request, found again by token path.

The radix tree's exact KV has one row per token. A twin has fewer: it is a piece of somebody's token
path, read-only, in pool slots that SGLang's tree owns under a key of the twin's own, so that locks,
eviction and every count are SGLang's. Pieces chain: a later turn's stand on those of the turns
before it. Everything here is host state; nothing imports SGLang.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Iterator, NamedTuple

import torch

FIRST_NAME = 1 << 48  # no token's id is as large
BLOCK = 32  # tokens from one index entry to the next
MOST_ALIKE = 16  # twins looked at that begin alike; the newest ones


class Slides(NamedTuple):
    """What a request under fixed-point elimination needs in order to go on.

    Attributes:
        cells: per layer, the rows that never slide.
        rows: per layer, how many of the newest slots it sees.
        slots: the newest slots, ``[max(rows)]`` or one less.
        kept, kept_slots: what its prompt's selection kept, for the report.
    """

    cells: list[torch.Tensor]
    rows: list[int]
    slots: torch.Tensor
    kept: list[torch.Tensor]
    kept_slots: int


@dataclass(eq=False)
class Twin:
    """One piece: rows that stand for ``tokens[start:]``, behind those of ``parent``.

    Attributes:
        space: who may use it: the policy with its options, ``extra_key`` (LoRA included) and
            ``cache_salt``.
        tokens: the whole token path.
        start: first token that its own rows stand for.
        num_prompt: prompt tokens of the request that left it.
        seen: per layer, the cells of the whole path's rows, its own at the end, ``[rows]`` int32.
        positions: per layer, the path positions of its own rows, ascending per KV head,
            ``[Hkv, rows]`` int32.
        slots: pool slots of its own rows.
        parent: the piece it stands on; ``parent_rows`` are the rows per layer that it sees of it,
            None for all.
        lossy_end: before this position, rows are missing.
        whole: its rows hold more than their positions say (merged or sliding ones), so it serves
            only paths that go on from its end.
        slides: of a request under fixed-point elimination.
        findable: a lookup may return it; else it is there to be shared and stood on.
        lasting: it outlives the requests that read it.
        sparsity: per layer, as it was measured for its selection.
        key, node: where the tree keeps it.
        holders: live requests that read it, through a later piece or directly.
        children: pieces that stand on it.
    """

    space: tuple
    tokens: array
    start: int
    num_prompt: int
    seen: list[torch.Tensor]
    positions: list[torch.Tensor]
    slots: torch.Tensor
    parent: Twin | None = None
    parent_rows: list[int] | None = None
    lossy_end: int = 0
    whole: bool = False
    slides: Slides | None = None
    findable: bool = True
    lasting: bool = True
    sparsity: list[float] | None = None
    key: array = field(default_factory=lambda: array("q"))
    node: int = 0
    holders: int = 0
    children: int = 0

    @property
    def end(self) -> int:
        return len(self.tokens)

    @property
    def num_own(self) -> list[int]:
        """Rows of its own, per layer."""
        return [positions.shape[1] for positions in self.positions]

    def chain(self) -> list[Twin]:
        """The pieces of its path, the first one first."""
        pieces, piece = [], self
        while piece is not None:
            pieces.append(piece)
            piece = piece.parent
        return pieces[::-1]

    @property
    def is_idle(self) -> bool:
        """Nobody reads it, and nothing stands on it."""
        return not self.holders and not self.children

    @property
    def num_slots(self) -> int:
        """Pool slots of its whole path."""
        return sum(len(piece.slots) for piece in self.chain())


@dataclass(frozen=True)
class Hit:
    """What a lookup found.

    Attributes:
        covered: tokens of the request's path that need no prefill.
        rows: of the twin's own rows, how many per layer are usable; None for all.
        rows_lost: kept rows of covered tokens that a shorter common prefix cannot use, over all
            layers and one rank's KV heads.
    """

    twin: Twin
    covered: int
    rows: list[int] | None = None
    rows_lost: int = 0

    @property
    def lossy_end(self) -> int:
        """Before this position, rows are missing."""
        return min(self.covered, self.twin.lossy_end)

    def cells(self) -> list[torch.Tensor]:
        """Per layer, the cells of all usable rows of the path."""
        if self.rows is None:
            return self.twin.seen
        unusable = [own - rows for own, rows in zip(self.twin.num_own, self.rows, strict=True)]
        return [cells[: len(cells) - n] for cells, n in zip(self.twin.seen, unusable, strict=True)]

    def positions(self, end: int) -> list[torch.Tensor]:
        """Per layer, the path positions behind :meth:`cells` ``[Hkv, rows]``, up to ``end``."""
        pieces, rows, piece = [], self.rows, self.twin
        while piece is not None:
            if piece.start < end:
                own = zip(piece.positions, rows or piece.num_own, strict=True)
                own = [positions[:, :count] for positions, count in own]
                pieces.append([positions[:, : int((positions[0] < end).sum())] for positions in own])
            rows, piece = piece.parent_rows, piece.parent
        return [torch.cat(layer, dim=1) for layer in zip(*reversed(pieces))]


class Twins:
    """All twins of a scheduler.

    Attributes:
        hits: requests that went on from a twin.
        evictions: twins that made room.
    """

    def __init__(self) -> None:
        self.hits = self.evictions = self._count = 0
        self.clear()

    def clear(self) -> None:
        """Forgets all; their slots have been given back."""
        self._by_node: OrderedDict[int, Twin] = OrderedDict()  # the least recently used first
        self._by_path: dict[tuple, dict[Twin, None]] = {}
        self._by_block: dict[int, dict[Twin, None]] = {}  # oldest first
        self._by_end: dict[int, dict[Twin, None]] = {}
        self._doubled: dict[Twin, None] = {}
        self.num_slots = 0

    def __contains__(self, twin: Twin) -> bool:
        return self._by_node.get(twin.node) is twin

    def __len__(self) -> int:
        return len(self._by_node)

    def by_age(self) -> list[Twin]:
        """The least recently used first."""
        return list(self._by_node.values())

    def name(self, twin: Twin) -> array:
        """Gives a new twin its key in the tree: its parent's and then as many tokens as it has
        slots, of an id that is nobody else's and no token's."""
        self._count += 1
        before = twin.parent.key if twin.parent else array("q")
        twin.key = before + array("q", [FIRST_NAME + self._count]) * len(twin.slots)
        return twin.key

    def add(self, twin: Twin) -> None:
        """``twin`` is in the tree, at ``twin.node``."""
        self._by_node[twin.node] = twin
        for index, key in self._entries(twin):
            index.setdefault(key, {})[twin] = None
        if twin.parent is not None:
            twin.parent.children += 1
        self.num_slots += len(twin.slots)
        self.double(twin)

    def remove(self, node: int) -> None:
        """The tree has given the slots at ``node`` back; other nodes are ignored."""
        twin = self._by_node.pop(node, None)
        if twin is None:
            return
        for index, key in self._entries(twin):
            del index[key][twin]
            if not index[key]:
                del index[key]
        if twin.parent is not None:
            twin.parent.children -= 1
        self.num_slots -= len(twin.slots)
        self.single(twin)
        self.evictions += twin.lasting

    def _entries(self, twin: Twin) -> list[tuple[dict, object]]:
        entries = [(self._by_path, _identity(twin))]
        if twin.findable:
            blocks = _blocks(twin.space, twin.tokens)
            entries += [(self._by_block, block) for block in blocks]
            entries += [(self._by_end, block) for block in blocks[-1:]]
        return entries

    def doubled(self) -> list[Twin]:
        """Those whose exact KV may be in the tree too, the oldest first."""
        return list(self._doubled)

    def double(self, twin: Twin) -> None:
        """The exact KV of its path has just been computed."""
        if twin.start == 0 and twin.lasting and twin.findable:
            self._doubled[twin] = None

    def single(self, twin: Twin) -> None:
        """The exact KV that it alone stood in for has gone."""
        self._doubled.pop(twin, None)

    def use(self, twin: Twin) -> None:
        """It and what it stands on are the most recently used."""
        for piece in twin.chain():
            if piece in self:
                self._by_node.move_to_end(piece.node)

    def same(self, twin: Twin) -> Twin | None:
        """A twin with the same rows as the new ``twin``: of one space and path, on one parent."""
        for other in self._by_path.get(_identity(twin), ()):
            if other.tokens == twin.tokens and other.slides is None and twin.slides is None:
                return other
        return None

    def find(self, space: tuple, tokens: array, limit: int) -> Iterator[Hit]:
        """Twins whose path begins like ``tokens``, by at least a block; the longest common beginning
        first, and then shorter ones that are covered whole.

        Args:
            limit: most tokens that may be covered.
        """
        blocks = _blocks(space, tokens)
        while blocks and blocks[-1] not in self._by_block:
            blocks.pop()
        if not blocks:
            return
        deepest = list(self._by_block[blocks[-1]])[-MOST_ALIKE:]
        hits = [_hit(twin, tokens, limit) for twin in deepest]
        # Not by rows lost: the ranks' heads differ in them, and have to agree on the twin.
        yield from sorted(filter(None, hits), key=lambda hit: (-hit.covered, hit.rows is not None))
        for block in reversed(blocks):
            hits = [_hit(twin, tokens, limit) for twin in self._by_end.get(block, ())]
            yield from (hit for hit in hits if hit is not None and hit.rows is None)


def _identity(twin: Twin) -> tuple:
    return twin.space, twin.start, twin.end, hash(twin.tokens.tobytes()), id(twin.parent)


def _blocks(space: tuple, tokens: array) -> list[int]:
    """Hashes of the path's beginnings, a block longer each."""
    hashes, last = [], hash(space)
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        last = hash((last, tokens[start : start + BLOCK].tobytes()))
        hashes.append(last)
    return hashes


def _hit(twin: Twin, tokens: array, limit: int) -> Hit | None:
    """What ``twin`` covers of ``tokens``; None where that is nothing of its own."""
    # The last token of a repeated prompt is computed again, for its logits only.
    enough = limit >= twin.end or limit == twin.end - 1 == len(tokens) - 1
    if enough and tokens[: twin.end] == twin.tokens:
        return Hit(twin, min(twin.end, limit))
    length = min(twin.end, len(tokens), limit)
    mine, theirs = (torch.frombuffer(path, dtype=torch.int64)[:length] for path in (twin.tokens, tokens))
    differing = (mine != theirs).nonzero()
    common = int(differing[0]) if len(differing) else length
    if twin.whole or common <= twin.start:
        return None
    counts = [(positions < common).sum(1) for positions in twin.positions]  # [Hkv] of every layer
    rows = [int(count.min()) for count in counts]
    lost = sum(int((count - least).sum()) for count, least in zip(counts, rows, strict=True))
    return Hit(twin, common, rows, lost)
