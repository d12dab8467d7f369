"""What stands in a document: its sections, tables, links and anchors."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple


class Link(NamedTuple):
    """``path`` is empty for a place in the same document, ``anchor`` for the whole of another."""

    path: str
    anchor: str


def links(text: str) -> list[Link]:
    """Those that lead to other files of the project, and to headings."""
    found = [Link(*parts) for parts in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text)]
    return [link for link in found if not re.match(r"[a-z]+:", link.path)]


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings: without punctuation, and numbered where one comes again."""
    found, times = set(), Counter()
    for heading in re.findall(r"(?m)^#+ +(.+?) *$", re.sub(r"(?ms)^```.*?^```", "", text)):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{slug}-{times[slug]}" if times[slug] else slug)
        times[slug] += 1
    return found


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next one. The title of a document is none."""
    [body] = re.findall(rf"(?ms)^##+ {re.escape(heading)}\n(.*?)(?=^##|\Z)", text)
    return body


def table(text: str, column: str) -> list[list[str]]:
    """Cells of the rows of the first table whose first column is called ``column``."""
    found = re.search(rf"(?m)^\| {re.escape(column)} \|.*\n\|[-|]+\n((?:\|.*(?:\n|\Z))+)", text)
    assert found, f"no table begins with {column}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)
