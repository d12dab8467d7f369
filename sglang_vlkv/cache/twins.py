"""Twins: compacted KV that outlives its request, found again by token path.

The radix tree's exact KV has one row per token. A twin has fewer: it is a piece of somebody's token
path, read-only, in pool slots that SGLang's tree owns under a key of the twin's own, so that locks,
eviction and every count are SGLang's. Pieces chain: a later turn's stand on those of the turns
before it. Everything here is host state; nothing imports SGLang.
"""

from __future__ import annotations

import uuid
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Iterator, NamedTuple

import torch

NAMESPACE = uuid.uuid4().hex  # extra_key of the twins' keys, which clients must not guess
FIRST_NAME = 1 << 48  # above the ids of text; those of pictures are hashes of 63 bits
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
    """One piece: rows that stand for a stretch of a path, behind those of ``parent``.

    Attributes:
        space: who may use it: the policy with its options, ``extra_key`` (LoRA included) and
            ``cache_salt``.
        start: first path position that it stands for.
        tokens: the stretch.
        num_prompt: prompt tokens of the request that left it.
        cells: per layer, the cells of its rows, ``[rows]`` int32.
        positions: per layer, the path positions of its rows on the host, ascending per KV head,
            ``[Hkv, rows]`` int32. The ranks' heads differ in them, so what they decide is agreed on.
        slots: its pool slots.
        parent: the piece it stands on; ``parent_rows`` are the rows per layer that it sees of it,
            None for all.
        lossy_end: before this position, rows are missing.
        all_or_nothing: its rows hold more than their positions say (merged or sliding ones), so it
            serves only paths that go on from its end.
        slides: of a request under fixed-point elimination.
        lasting: it outlives the requests that read it, and a lookup may return it.
        sparsity: per layer, as it was measured for its selection.
        voted: the drafted tokens whose queries voted for its selection.
        key, node: where the tree keeps it.
        holders: live requests that read it, through a later piece or directly.
        children: pieces that stand on it.
    """

    space: tuple
    start: int
    tokens: array
    num_prompt: int
    cells: list[torch.Tensor]
    positions: list[torch.Tensor]
    slots: torch.Tensor
    parent: Twin | None = None
    parent_rows: list[int] | None = None
    lossy_end: int = 0
    all_or_nothing: bool = False
    slides: Slides | None = None
    lasting: bool = True
    sparsity: list[float] | None = None
    voted: tuple[int, ...] = ()
    key: array = field(default_factory=lambda: array("q"))
    node: int = 0
    holders: int = 0
    children: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def num_rows(self) -> list[int]:
        """Rows of its own, per layer."""
        return [positions.shape[1] for positions in self.positions]

    @property
    def is_run(self) -> bool:
        """It lost no rows: it holds what was computed behind its parent, token by token."""
        return self.lossy_end < self.end

    @property
    def is_idle(self) -> bool:
        """Nobody reads it, and nothing stands on it."""
        return not self.holders and not self.children

    @property
    def num_slots(self) -> int:
        """Pool slots of its whole path."""
        return sum(len(piece.slots) for piece in self.chain())

    def chain(self) -> list[Twin]:
        """The pieces of its path, the first one first."""
        pieces, piece = [], self
        while piece is not None:
            pieces.append(piece)
            piece = piece.parent
        return pieces[::-1]

    def add_holders(self, count: int) -> None:
        """As many more live requests read the pieces of its path."""
        for piece in self.chain():
            piece.holders += count

    def stretches(self) -> list[tuple[int, array]]:
        """Its path: where every piece's part of it begins, and the tokens."""
        pieces = self.chain()
        ends = [piece.start for piece in pieces[1:]] + [self.end]
        return [(p.start, p.tokens[: end - p.start]) for p, end in zip(pieces, ends, strict=True)]

    def common(self, tokens: array) -> int:
        """How many tokens its path and ``tokens`` have in common from the beginning on."""
        for start, mine in self.stretches():
            theirs = tokens[start : start + len(mine)]
            if mine != theirs:
                length = min(len(mine), len(theirs))
                if mine[:length] == theirs[:length]:
                    return start + length
                pair = (torch.frombuffer(stretch[:length], dtype=torch.int64) for stretch in (mine, theirs))
                return start + int(torch.ne(*pair).nonzero()[0])
        return self.end


@dataclass(frozen=True)
class Hit:
    """What a request goes on from.

    Attributes:
        covered: tokens of the request's path that need no prefill.
        rows: of the twin's own rows, how many per layer are usable, by this rank's KV heads until the
            ranks have agreed; None for all.
        rows_lost: kept rows of covered tokens that a shorter common prefix cannot use, over all
            layers and this rank's KV heads. For the report only: ranks differ in it.
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
        """Per layer, the cells of all usable rows of the path, ``[rows]`` int32."""
        used = [
            [cells[:count] for cells, count in zip(piece.cells, rows, strict=True)]
            for piece, rows in self._pieces()
        ]
        return [torch.cat(layer) for layer in zip(*used)]

    def positions(self, end: int) -> list[torch.Tensor]:
        """Per layer, the path positions behind :meth:`cells` ``[Hkv, rows]``, up to ``end``."""
        used = []
        for piece, rows in self._pieces():
            if piece.start < end:
                own = [p[:, :count] for p, count in zip(piece.positions, rows, strict=True)]
                used.append([p[:, : int((p < end).sum(1).min())] for p in own])
        return [torch.cat(layer, dim=1) for layer in zip(*used)]

    def _pieces(self) -> list[tuple[Twin, list[int]]]:
        """The pieces of the path, the first one first, and the usable rows of each."""
        pieces, piece, rows = [], self.twin, self.rows
        while piece is not None:
            pieces.append((piece, rows or piece.num_rows))
            piece, rows = piece.parent, piece.parent_rows
        return pieces[::-1]


class Twins:
    """All twins of a scheduler.

    Attributes:
        hits: requests that went on from a twin.
        evictions: twins that made room.
        num_slots: pool slots of all of them.
    """

    def __init__(self) -> None:
        self.hits = self.evictions = self._count = 0
        self.clear()

    def clear(self) -> None:
        """Forgets all; their slots have been given back."""
        self._by_node: OrderedDict[int, Twin] = OrderedDict()  # the least recently used first
        self._same: dict[tuple, dict[Twin, None]] = {}
        self._by_block: dict[int, dict[Twin, None]] = {}  # the oldest first
        self._ending: dict[int, dict[Twin, None]] = {}  # within the block that follows
        self._by_end: dict[tuple[int, bytes], dict[Twin, None]] = {}
        self._with_exact: dict[Twin, None] = {}
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
        slots, of an id that is no other twin's."""
        self._count += 1
        before = twin.parent.key if twin.parent else array("q")
        twin.key = before + array("q", [FIRST_NAME + self._count]) * len(twin.slots)
        return twin.key

    def is_name(self, token: int) -> bool:
        """Whether ``token`` has been given to a twin; that of a picture is one by chance in 10**12."""
        return FIRST_NAME < token <= FIRST_NAME + self._count

    def add(self, twin: Twin) -> None:
        """``twin`` is in the tree, at ``twin.node``."""
        self._by_node[twin.node] = twin
        for index, key in self._entries(twin):
            index.setdefault(key, {})[twin] = None
        if twin.parent is not None:
            twin.parent.children += 1
        self.num_slots += len(twin.slots)
        self.exact_is_there(twin)

    def remove(self, node: int) -> Twin | None:
        """The tree has given the slots at ``node`` back: those of the twin returned, if any."""
        twin = self._by_node.pop(node, None)
        if twin is None:
            return None
        for index, key in self._entries(twin):
            del index[key][twin]
            if not index[key]:
                del index[key]
        if twin.parent is not None:
            twin.parent.children -= 1
        self.num_slots -= len(twin.slots)
        self.exact_is_gone(twin)
        self.evictions += twin.lasting
        return twin

    def _entries(self, twin: Twin) -> list[tuple[dict, object]]:
        """Where it is listed: under the blocks that it stands for part of, since only a path that
        shares more than its parent's can use it, and under its end."""
        entries = [(self._same, _identity(twin))]
        path = array("q")
        for _, tokens in twin.stretches():
            path += tokens
        blocks = _blocks(twin.space, path)
        if twin.lasting and blocks:
            if not twin.all_or_nothing:
                entries += [(self._by_block, block) for block in blocks[twin.start // BLOCK :]]
            tail = path[len(blocks) * BLOCK :].tobytes()
            entries += [(self._ending, blocks[-1]), (self._by_end, (blocks[-1], tail))]
        return entries

    def with_exact(self) -> list[Twin]:
        """Those whose exact KV may be in the tree too, the oldest first."""
        return list(self._with_exact)

    def exact_is_there(self, twin: Twin) -> None:
        """The exact KV of its path has just been computed."""
        if twin.start == 0 and twin.lasting and twin in self:
            self._with_exact[twin] = None

    def exact_is_gone(self, twin: Twin) -> None:
        """All of it that only this twin's path had."""
        self._with_exact.pop(twin, None)

    def use(self, twin: Twin) -> None:
        """It and what it stands on are the most recently used."""
        for piece in twin.chain():
            if piece in self:
                self._by_node.move_to_end(piece.node)

    def same(self, twin: Twin) -> Twin | None:
        """A twin with the same rows as the new ``twin``: of one space, draft and path, on one parent."""
        for other in self._same.get(_identity(twin), ()):
            if other.tokens == twin.tokens and other.slides is None and twin.slides is None:
                return other
        return None

    def find(self, space: tuple, tokens: array, limit: int, beyond: int = 0) -> Iterator[Hit]:
        """Twins whose path begins like ``tokens``: of the newest that share most with it, the longest
        first, and then shorter ones that are covered whole.

        Args:
            limit: most tokens that may be covered.
            beyond: fewer are of no use.
        """
        blocks, cut = _blocks(space, tokens), False
        for depth in range(len(blocks), 0, -1):
            length = depth * BLOCK
            if length + BLOCK <= beyond:
                return
            alike = dict.fromkeys(self._ending_at(blocks[depth - 1], tokens, length))
            if not cut:  # others share less than these
                newest = list(self._by_block.get(blocks[depth - 1], ()))[-MOST_ALIKE:]
                alike, cut = alike | dict.fromkeys(newest), bool(newest)
            hits = [hit for twin in alike if (hit := _hit(twin, tokens, limit)) is not None]
            yield from sorted(hits, key=lambda hit: (-hit.covered, hit.rows is not None))

    def _ending_at(self, block: int, tokens: array, length: int) -> Iterator[Twin]:
        """Twins of the beginnings of ``tokens`` that hold ``block``, which ends at ``length``, and
        not the next; the longest and newest first."""
        most = min(BLOCK - 1, len(tokens) - length) if block in self._ending else -1
        for tail in range(most, -1, -1):
            key = block, tokens[length : length + tail].tobytes()
            yield from reversed(self._by_end.get(key, ()))


def _identity(twin: Twin) -> tuple:
    return twin.space, twin.voted, twin.start, twin.end, hash(twin.tokens.tobytes()), id(twin.parent)


def _blocks(space: tuple, tokens: array) -> list[int]:
    """Hashes of the path's beginnings, a block longer each."""
    hashes, last = [], hash(space)
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        last = hash((last, tokens[start : start + BLOCK].tobytes()))
        hashes.append(last)
    return hashes


def _hit(twin: Twin, tokens: array, limit: int) -> Hit | None:
    """What ``twin`` covers of ``tokens``; None where that is nothing of its own."""
    common = twin.common(tokens)
    # The last token of a repeated prompt is computed again, for its logits only.
    if common == twin.end and (limit >= twin.end or limit == twin.end - 1 == len(tokens) - 1):
        return Hit(twin, min(twin.end, limit))
    common = min(common, limit)
    if twin.all_or_nothing or common <= twin.start:
        return None
    counts = [(positions < common).sum(1) for positions in twin.positions]  # [Hkv] of every layer
    rows = [int(count.min()) for count in counts]
    lost = sum(int((count - least).sum()) for count, least in zip(counts, rows, strict=True))
    return Hit(twin, common, rows, lost)
