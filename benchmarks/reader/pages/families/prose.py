"""Pages of sentences: stories, needles in other text, letters."""

from __future__ import annotations

from random import Random
from typing import Iterator

from benchmarks.reader.pages import words
from benchmarks.reader.pages.lines import Family, Line, line, titled


def story(r: Random) -> Iterator[Line]:
    for name in words.people(r):
        yield line(
            f"[{name}] is a [{r.choice(words.JOBS)}] from [{r.choice(words.CITIES)}].",
            (1, f"What is the job of {name}?", f"The job of {name} is _."),
            (2, f"Which city is {name} from?", f"{name} is from _."),
            key=0,
        )
        yield line(
            f"{name} is [{r.randint(20, 79)}] and likes [{r.choice(words.SPORTS)}].",
            (0, f"How old is {name}?", f"The age of {name} is _."),
            (1, f"Which sport does {name} like?", f"{name} likes _."),
        )
        yield line(
            f"{name} has [{r.randint(100, 999)}] friends and a [{r.choice(words.ANIMALS)}].",
            (0, f"How many friends does {name} have?", f"The friends of {name} are _."),
            (1, f"Which animal does {name} have?", f"{name} has a _."),
        )


def needle(r: Random) -> Iterator[Line]:
    """One line in four holds a fact."""
    for index, (thing, color) in enumerate(words.pairs(r, words.THINGS, words.COLORS)):
        name = f"{color} {thing}"
        if index % 2:
            yield line(
                f"The code of the [{name}] is [{r.randint(1000, 9999)}].",
                (1, f"What is the code of the {name}?", f"The code of the {name} is _."),
                key=0,
            )
        else:
            yield line(
                f"The [{name}] belongs to [{r.choice(words.NAMES)}].",
                (1, f"Whom does the {name} belong to?", f"The {name} belongs to _."),
                key=0,
            )
        yield from map(line, r.sample(words.SCENES, 3))


def letter(r: Random) -> Iterator[Line]:
    for month, year in words.pairs(r, words.MONTHS, range(1950, 2000)):
        date = f"{month} {year}"
        if r.random() < 0.5:
            yield line(
                f"In [{date}] I lived in [{r.choice(words.CITIES)}] with [{r.choice(words.NAMES)}].",
                (1, f"Where did the writer live in {date}?", f"In {date} the writer lived in _."),
                (2, f"With whom did the writer live in {date}?", f"In {date} the writer lived with _."),
                key=0,
            )
        else:
            yield line(
                f"In [{date}] I sold a [{r.choice(words.THINGS)}] for $[{r.randint(10, 999)}].",
                (1, f"What did the writer sell in {date}?", f"In {date} the writer sold a _."),
                (
                    2,
                    f"For how much did the writer sell it in {date}?",
                    f"In {date} the writer sold it for $_.",
                ),
                key=0,
            )


def letter_heading(r: Random) -> Line:
    return line(
        f"Dear [{r.choice(words.NAMES)}], you asked about my life.",
        (0, "Whom is the letter to?", "The letter is to _."),
    )


STORY = Family("story", titled("People of our town"), story, "people")
NEEDLE = Family("notebook", titled("Notes of a long day"), needle, "things", shuffled=True)
LETTER = Family("letter", letter_heading, letter, "dates")
