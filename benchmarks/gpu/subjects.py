"""What checks speak for and rows rest on: what is wrong hides the ratios that rest on it, and no others."""

from __future__ import annotations

EVERYTHING = "everything of ours"
ATTENTION, EXTEND = "decode attention", "extend attention"  # the former with its index lists and plan
SCORING, SELECTION, MOVING = "scoring", "selection", "gather and scatter"
COMPRESSION = SCORING, SELECTION, MOVING
COPYING = "reads and copies by index"
STORM = "decoding while rows change"
