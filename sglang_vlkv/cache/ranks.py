"""The tensor-parallel ranks of a replica: what they add up, and whether they still agree."""

from __future__ import annotations

import hashlib
from typing import TypeVar

import torch
import torch.distributed

PIECES, PIECE_BITS = 2, 24  # of a digest; the square of a piece, summed over ranks, fits an int64

T = TypeVar("T")


class Ranks:
    """Ranks that schedule the same requests, each over the KV heads that are its own.

    Nothing tells a rank what the others decide: all decide alike, from equal numbers. What must come
    out equal is noted in a running digest, which every :meth:`sum` carries along, so that a rank that
    went another way is seen by all of them at the next one.

    All methods but :meth:`note` and :meth:`describe` are collectives, to be called by every rank in the
    same order. With one rank none does anything.

    Args:
        group: of host communication between the ranks; None for a rank on its own.
    """

    def __init__(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        self._group = group
        self.size = 1 if group is None else torch.distributed.get_world_size(group)
        self._noted = hashlib.blake2b(digest_size=PIECES * PIECE_BITS // 8)

    def note(self, *facts: object) -> None:
        """Takes in something that is equal on all ranks: numbers and strings, and lists of them."""
        if self.size > 1:
            self._noted.update(repr(facts).encode())

    def sum(self, counts: torch.Tensor) -> torch.Tensor:
        """``counts``, ``[any]`` int64 on the host, added over the ranks.

        Raises:
            RuntimeError: on every rank, where not all have noted the same.
        """
        if self.size == 1:
            return counts
        total = torch.cat([counts, torch.tensor(carried(self._noted.hexdigest()))])
        torch.distributed.all_reduce(total, group=self._group)
        if not agree(total[-2 * PIECES :].tolist(), self.size):
            raise RuntimeError(
                f"The {self.size} tensor-parallel ranks no longer agree on which KV rows they hold, and "
                "answers would be wrong, so the server stops. Restart it. If the policy is your own, its "
                "layer_budgets must follow from sparsity and profiles alone, which are added over the "
                "ranks; otherwise please report this as a bug of sglang_vlkv, with the log of "
                "SGLANG_ENABLE_RANK_CONSENSUS_CHECKER=1."
            )
        return total[: -2 * PIECES]

    def least(self, counts: list[int]) -> list[int]:
        """The least of every number over the ranks."""
        if self.size == 1:
            return counts
        least = torch.tensor(counts)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, self._group)
        return least.tolist()

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, in the order of the ranks, which is that of the model's KV heads."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        torch.distributed.all_gather_object(values, value, self._group)
        return values

    def describe(self) -> dict:
        """For reports and ``/server_info``: the digest as it stands; empty for one rank."""
        return {"ranks": {"tp": self.size, "digest": self._noted.hexdigest()}} if self.size > 1 else {}


def carried(digest: str) -> list[int]:
    """What a rank adds to the others' for its digest: its pieces, and their squares."""
    digits = PIECE_BITS // 4
    pieces = [int(digest[i : i + digits], 16) for i in range(0, len(digest), digits)]
    return pieces + [piece**2 for piece in pieces]


def agree(totals: list[int], num_ranks: int) -> bool:
    """Whether ``totals``, over the ranks, of :func:`carried` are those of one digest.

    ``n * sum(x**2) == sum(x)**2`` holds for equal numbers only, by the inequality of Cauchy and Schwarz.
    """
    return all(num_ranks * squares == pieces**2 for pieces, squares in zip(totals, totals[PIECES:]))
