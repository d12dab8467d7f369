"""Pictures and questions whose answers are known, for training and testing the tiny model.

A picture is a grid of 28x28-pixel cells, each one visual token. Some cells hold digits in named
colours, one digit per colour and picture; a row of white digits follows a marker; the rest is grey
letters, textures, noise, or nothing. A few of many visual tokens hold what a question needs, and
which they are is known, so that a KV-cache policy's choice can be judged as well as the answer.

Every digit of an answer comes after its first token, so it is looked up while decoding, in the cache
that a policy left, and not during the prefill.

========  ==============================================================================
single    "which digit is red?": " the digit is red 7"
multi     "digits of red blue green?", three to five colours: " digits red 7 blue 3 green 5"
list      "list all": " list red 7 blue 3 ...", the 5 to 8 colours of the picture in palette order
path      "path from red?": " path red 7 blue 3 green 5 pink 1", four cells from left to right
reading   "read the line": " line 7 3 9 1 0 4", the six white digits after the marker
long      "tell all": " all the digit red 7, the digit orange 2, ...", 12 colours, 62 tokens
images    two pictures with the same colours, "picture 2 red?": " picture 2 red 7"
video     two frames with the same colours, "frame 2 red?": " frame 2 red 7"
turns     three questions like single and multi in one conversation
decoys    as multi, among 20 or more letters and shapes in the same colours
========  ==============================================================================

Pictures and frames that come in pairs carry their number in the top left cell.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from PIL import Image

TASKS: tuple[str, ...] = (
    "single",
    "multi",
    "list",
    "path",
    "reading",
    "long",
    "images",
    "video",
    "turns",
    "decoys",
)
CELL = 28  # pixels, each way
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 30, 40),
    "orange": (250, 130, 10),
    "yellow": (250, 230, 60),
    "lime": (140, 245, 40),
    "green": (20, 140, 50),
    "teal": (20, 150, 150),
    "cyan": (70, 240, 250),
    "blue": (50, 80, 250),
    "purple": (130, 40, 190),
    "pink": (255, 130, 200),
    "brown": (150, 90, 45),
    "tan": (225, 190, 140),
}
NAMES = tuple(COLOURS)
PATH_CELLS = 4
LINE_DIGITS = 6
# Words that are one token each, besides the colours and digits; a leading space is part of one.
WORDS = (
    " digit", " digits", " of", " is", " the", " list", " all", " path", " from", " line", " picture",
    " frame", "which", "digits", "list", "path", "tell", "picture", "frame", "read",
)  # fmt: skip


class Question(NamedTuple):
    """One user turn.

    Attributes:
        text: What the user writes.
        answer: What the model should write, without the end-of-turn token.
        cells: The visual tokens that the answer needs, counted over all visual tokens of the sample
            in the order of the prompt.
    """

    text: str
    answer: str
    cells: tuple[int, ...]


class Sample(NamedTuple):
    """A prompt and its answers.

    Attributes:
        task: One of ``TASKS``.
        images: The pictures, RGB, 28 pixels per visual token each way.
        frames: For ``video`` only, and then there are no images: one picture per temporal patch, that
            is, to be shown as two equal frames each.
        questions: The turns of one conversation; more than one for ``turns`` only. The media belong
            to the first turn, before its text.
    """

    task: str
    images: list[Image.Image]
    frames: list[Image.Image]
    questions: tuple[Question, ...]


class Scene(NamedTuple):
    """What one or two pictures hold, before they are painted.

    Attributes:
        grids: Sprite numbers, one array [rows, columns] per picture.
        cells: Per picture, colour number -> cell within the sample.
        digits: Per picture, colour number -> digit.
        run: Colours of the path, from left to right.
        line: Cells of the marker and of the white digits; empty if the picture is too narrow.
        line_digits: The white digits.
    """

    grids: tuple[np.ndarray, ...]
    cells: tuple[dict[int, int], ...]
    digits: tuple[dict[int, int], ...]
    run: tuple[int, ...]
    line: tuple[int, ...]
    line_digits: tuple[int, ...]


def draw(task: str, seed: int, num_visual: int = 256) -> Sample:
    """The sample of this task and seed.

    Args:
        task: One of ``TASKS``.
        seed: Equal arguments give equal samples. Training never uses seeds below 1,000,000.
        num_visual: Visual tokens of the whole sample. A square number from 64 to 1,024; others are
            rounded down to one, or a little below one for the pairs of ``images`` and ``video``.

    Raises:
        ValueError: For an unknown task or fewer than 64 visual tokens.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is none of {', '.join(TASKS)}")
    if num_visual < 64:
        raise ValueError(f"num_visual={num_visual} is below 64: the tasks need 8x8 cells")
    scene, questions = lay_out(task, seed, int(num_visual**0.5))
    pictures = [paint(grid) for grid in scene.grids]
    video = task == "video"
    return Sample(task, [] if video else pictures, pictures if video else [], questions)


def lay_out(task: str, seed: int, side: int) -> tuple[Scene, tuple[Question, ...]]:
    """``draw`` without painting: the scene of ``side`` x ``side`` cells, and its questions."""
    rng = np.random.default_rng([seed, TASKS.index(task)])
    if task in ("images", "video"):
        scene = compose_pair(rng, side // 2, side)
    else:
        low, high = {"list": (5, 8), "long": (12, 12)}.get(task, (8, 12))
        decoys = 20 if task == "decoys" else 0
        scene = compose(rng, side, side, int(rng.integers(low, high + 1)), decoys)
    return scene, ask(task, scene, rng)


def compose(rng: np.random.Generator, rows: int, columns: int, num_colours: int, decoys: int) -> Scene:
    """One picture: ``num_colours`` coloured digits, four of them a path; a line; ``decoys``."""
    grid = _background(rng, rows * columns).reshape(rows, columns)
    free = np.ones((rows, columns), dtype=bool)
    line: tuple[int, ...] = ()
    line_digits: tuple[int, ...] = ()
    if columns > LINE_DIGITS and rows > 4:
        line = _strip(rng, free, LINE_DIGITS + 1)
        line_digits = tuple(int(d) for d in rng.permutation(10)[:LINE_DIGITS])
        grid.flat[list(line)] = [MARKER, *(_digit(WHITE, d) for d in line_digits)]
    colours = [int(c) for c in rng.permutation(len(NAMES))[:num_colours]]
    run_cells = _strip(rng, free, PATH_CELLS)
    places = [*run_cells, *_scatter(rng, free, num_colours - PATH_CELLS + decoys)]
    cells = dict(zip(colours, places))
    digits = {colour: int(rng.integers(10)) for colour in colours}
    for colour, cell in cells.items():
        grid.flat[cell] = _digit(colour, digits[colour])
    for cell in places[num_colours:]:
        grid.flat[cell] = DECOY + int(rng.integers(len(NAMES) * len(DECOY_GLYPHS)))
    return Scene((grid,), (cells,), (digits,), tuple(colours[:PATH_CELLS]), line, line_digits)


def compose_pair(rng: np.random.Generator, rows: int, columns: int) -> Scene:
    """Two numbered pictures that hold the same four to six colours with digits of their own."""
    colours = [int(c) for c in rng.permutation(len(NAMES))[: int(rng.integers(4, 7))]]
    grids, cells, digits = [], [], []
    for picture in range(2):
        grid = _background(rng, rows * columns).reshape(rows, columns)
        free = np.ones((rows, columns), dtype=bool)
        free[0, 0] = False
        grid[0, 0] = LABEL + picture
        places = _scatter(rng, free, len(colours))
        own = {colour: int(rng.integers(10)) for colour in colours}
        for colour, cell in zip(colours, places):
            grid.flat[cell] = _digit(colour, own[colour])
        grids.append(grid)
        cells.append({c: cell + picture * rows * columns for c, cell in zip(colours, places)})
        digits.append(own)
    return Scene(tuple(grids), tuple(cells), tuple(digits), (), (), ())


def ask(task: str, scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    """The turns of one conversation of ``task`` about ``scene``."""
    if task == "turns":
        kinds = rng.choice(["single", "multi"], 3)
        return tuple(ask(kind, scene, rng)[0] for kind in kinds)
    picture = int(rng.integers(len(scene.grids)))
    cells, digits = scene.cells[picture], scene.digits[picture]

    def pairs(colours) -> str:
        return "".join(f" {NAMES[c]} {digits[c]}" for c in colours)

    colours = [int(c) for c in rng.permutation(sorted(cells))]
    if task == "single":
        colours = colours[:1]
        text, answer = f"which digit is {NAMES[colours[0]]}?", " the digit is" + pairs(colours)
    elif task in ("multi", "decoys"):
        colours = colours[: int(rng.integers(3, 6))]
        text = "digits of" + "".join(f" {NAMES[c]}" for c in colours) + "?"
        answer = " digits" + pairs(colours)
    elif task == "list":
        colours = sorted(cells)
        text, answer = "list all", " list" + pairs(colours)
    elif task == "path":
        colours = list(scene.run)
        text, answer = f"path from {NAMES[colours[0]]}?", " path" + pairs(colours)
    elif task == "reading":
        answer = " line" + "".join(f" {d}" for d in scene.line_digits)
        return (Question("read the line", answer, scene.line),)
    elif task == "long":
        colours = sorted(cells)
        text, answer = "tell all", " all" + ",".join(" the digit" + pairs([c]) for c in colours) + ","
    else:
        colours = colours[:1]
        where = f"{'picture' if task == 'images' else 'frame'} {picture + 1}"
        text, answer = f"{where} {NAMES[colours[0]]}?", f" {where}" + pairs(colours)
    return (Question(text, answer, tuple(cells[c] for c in colours)),)


def paint(grid: np.ndarray) -> Image.Image:
    """The picture of sprite numbers [rows, columns]."""
    rows, columns = grid.shape
    pixels = sprites()[grid].transpose(0, 2, 1, 3, 4).reshape(rows * CELL, columns * CELL, 3)
    return Image.fromarray(np.ascontiguousarray(pixels))


def _strip(rng: np.random.Generator, free: np.ndarray, length: int) -> tuple[int, ...]:
    """Takes ``length`` free neighbours in one row; returns the cells from left to right."""
    windows = np.lib.stride_tricks.sliding_window_view(free, length, axis=1).all(-1)
    starts = np.argwhere(windows)
    row, column = starts[rng.integers(len(starts))]
    free[row, column : column + length] = False
    first = int(row * free.shape[1] + column)
    return tuple(range(first, first + length))


def _scatter(rng: np.random.Generator, free: np.ndarray, count: int) -> list[int]:
    """Takes ``count`` free cells at random."""
    cells = [int(cell) for cell in rng.permutation(np.flatnonzero(free))[:count]]
    free.flat[cells] = False
    return cells


def _background(rng: np.random.Generator, count: int) -> np.ndarray:
    """Sprite numbers of cells that answer nothing: two in five are empty."""
    return np.where(rng.random(count) < 0.4, BLANK, rng.integers(GREY, NUM_SPRITES, count))


# Columns of 5x7 dots from left to right, the top dot in the lowest bit.
_GLYPHS = {
    "0": "3e5149453e", "1": "00427f4000", "2": "4261514946", "3": "2141454b31", "4": "1814127f10",
    "5": "2745454539", "6": "3c4a494930", "7": "0171090503", "8": "3649494936", "9": "064949291e",
    "A": "7e1111117e", "C": "3e41414122", "E": "7f49494941", "F": "7f09090901", "H": "7f0808087f",
    "J": "2040413f01", "K": "7f08142241", "L": "7f40404040", "M": "7f020c027f", "N": "7f0408107f",
    "P": "7f09090906", "R": "7f09192946", "T": "01017f0101", "U": "3f4040403f", "V": "1f2040201f",
    "X": "6314081463", "Y": "0708700807", "Z": "6151494543",
    "disc": "1c3e3e3e1c", "box": "7f4141417f", "arrow": "7f7f3e1c08", "bars": "5555555555",
}  # fmt: skip
GREY_GLYPHS = tuple("ACEFHJKLMNPRTUVXYZ")
DECOY_GLYPHS = ("A", "E", "H", "K", "T", "X", "disc", "box")
GREYS = (100, 150, 190)
TEXTURES = 24
NOISES = 24

# Sprite numbers. The digits come first, ten per colour and ten in white.
WHITE = len(NAMES)
BLANK = 10 * (WHITE + 1)
MARKER = BLANK + 1
LABEL = MARKER + 1
DECOY = LABEL + 2
GREY = DECOY + len(NAMES) * len(DECOY_GLYPHS)
NUM_SPRITES = GREY + len(GREY_GLYPHS) * len(GREYS) + TEXTURES + NOISES


def _digit(colour: int, digit: int) -> int:
    return 10 * colour + digit


@functools.cache
def sprites() -> np.ndarray:
    """The pixels of every sprite: uint8 [NUM_SPRITES, 28, 28, 3]."""
    rng = np.random.default_rng(0)
    inks = [*COLOURS.values(), (255, 255, 255)]
    bank = [_glyph(str(digit), ink) for ink in inks for digit in range(10)]
    bank += [_glyph(None, (0, 0, 0)), _glyph("arrow", (255, 255, 255))]
    bank += [_glyph(str(number), (0, 0, 0), paper=(245, 245, 245)) for number in (1, 2)]
    bank += [_glyph(glyph, ink) for ink in COLOURS.values() for glyph in DECOY_GLYPHS]
    bank += [_glyph(glyph, (grey,) * 3) for grey in GREYS for glyph in GREY_GLYPHS]
    y, x = np.mgrid[:CELL, :CELL]
    for _ in range(TEXTURES):
        kx, ky, phase = *rng.uniform(-1.2, 1.2, 2), rng.uniform(0, 6.28)
        bank.append(_grey(110 + 60 * np.sin(kx * x + ky * y + phase)))
    for _ in range(NOISES):
        bank.append(_grey(rng.uniform(40, 200, (CELL, CELL))))
    return np.stack(bank)


def _glyph(name: str | None, ink: tuple[int, ...], paper: tuple[int, ...] = (24, 24, 24)) -> np.ndarray:
    """Pixels [28, 28, 3] of a glyph, 15x21 pixels in the middle of its cell."""
    cell = np.empty((CELL, CELL, 3), dtype=np.uint8)
    cell[:] = paper
    if name is not None:
        columns = np.frombuffer(bytes.fromhex(_GLYPHS[name]), dtype=np.uint8)
        dots = (columns[None, :] >> np.arange(7)[:, None]) & 1
        cell[3:24, 6:21][np.kron(dots, np.ones((3, 3))).astype(bool)] = ink
    return cell


def _grey(level: np.ndarray) -> np.ndarray:
    return np.repeat(level.astype(np.uint8)[..., None], 3, axis=-1)
