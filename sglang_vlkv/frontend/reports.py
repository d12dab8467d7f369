"""Reports of ended requests, kept for whoever asks for them later."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import NamedTuple

from sglang_vlkv.scheduler.report import POSITIONS


class _Entry(NamedTuple):
    """What is kept of one request: when it was written, reports and what they count for by choice,
    and the ids that lead here."""

    written: float
    reports: dict[int, tuple[int, dict]]
    ids: set[str]

    @property
    def weight(self) -> int:
        return sum(weight for weight, _ in self.reports.values())


class ReportStore:
    """Reports for clients that see no ``meta_info``, by the ids of requests and of responses.

    Args:
        max_age: seconds that a request's reports are kept after the last of them.
        max_reports: most reports kept; the oldest go first. Every thousand positions in a report, or
            8 KB of options and ids, count as one more.
    """

    def __init__(self, max_age: float = 600.0, max_reports: int = 10_000) -> None:
        self._max_age, self._max_reports = max_age, max_reports
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._found: dict[str, tuple[str, int]] = {}  # id -> key of its entry, choice
        self._weight = 0

    def put(self, response_id: str, report: dict, request_ids: tuple[str, ...] = (), choice: int = 0) -> None:
        """Keeps the report of a request's ``choice`` under the id of its response.

        Args:
            request_ids: lead to all choices of the request. The first is no other request's; without
                any the response has a request of its own.
        """
        key = request_ids[0] if request_ids else response_id
        earlier = self._entries.pop(key, None)
        self._weight -= earlier.weight if earlier else 0
        reports, ids = (earlier.reports, earlier.ids) if earlier and request_ids else ({}, set())
        numbers = sum(len(head) for layer in report.get(POSITIONS, ()) for head in layer)
        letters = len(report.get("config", "")) + len(response_id) + sum(map(len, request_ids))
        reports[choice] = (1 + (numbers + letters // 8) // 1000, report)
        ids |= {response_id, *request_ids}
        self._found |= {name: (key, 0) for name in request_ids} | {response_id: (key, choice)}
        self._entries[key] = kept = _Entry(time.monotonic(), reports, ids)
        self._weight += kept.weight
        self._expire()

    def get(self, name: str) -> dict | None:
        """The report of the response with this id, or of the first choice of the request."""
        self._expire()
        key, choice = self._found.get(name, (None, 0))
        return None if key is None else self._entries[key].reports.get(choice, (0, None))[1]

    def choices(self, name: str) -> list[dict | None] | None:
        """The reports of all choices of the request; None for those that have not finished."""
        self._expire()
        if name not in self._found:
            return None
        reports = self._entries[self._found[name][0]].reports
        return [reports.get(choice, (0, None))[1] for choice in range(max(reports) + 1)]

    def _expire(self) -> None:
        oldest = time.monotonic() - self._max_age
        while self._entries:
            key, entry = next(iter(self._entries.items()))
            if entry.written >= oldest and self._weight <= self._max_reports:
                break
            del self._entries[key]
            self._weight -= entry.weight
            for name in entry.ids:
                if self._found.get(name, ("", 0))[0] == key:  # else another request took the id
                    del self._found[name]

