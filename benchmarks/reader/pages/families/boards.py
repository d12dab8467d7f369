"""Pages that hang on walls: schedules, floor plans, timetables, weather reports."""

from __future__ import annotations

from random import Random
from typing import Iterator

from benchmarks.reader.pages import words
from benchmarks.reader.pages.lines import Family, Line, line, titled


def schedule(r: Random) -> Iterator[Line]:
    for event, subject in words.pairs(r, words.EVENTS, words.SUBJECTS):
        name = f"{subject} {event}"
        yield line(
            f"[{r.choice(words.DAYS)}] [{words.clock(r)}] [{name}] with [{r.choice(words.NAMES)}]",
            (0, f"On which day is the {name}?", f"The {name} is on _."),
            (1, f"At what time is the {name}?", f"The {name} is at _."),
            (3, f"Who gives the {name}?", f"The {name} is given by _."),
            key=2,
        )


def plan(r: Random) -> Iterator[Line]:
    """Rooms of a floor, row by row; place B3 is the second of the third row."""
    width = r.randint(2, 4)
    for index, (room, quality) in enumerate(words.pairs(r, words.ROOMS, words.QUALITIES)):
        place, name = f"{'ABCD'[index % width]}{index // width + 1}", f"{quality} {room}"
        yield line(
            f"{place} [{name}], size [{r.randint(10, 99)}]: [{r.choice(words.THINGS)}]",
            (0, f"Which room is at {place} of the plan?", f"At {place} of the plan is the _."),
            (1, f"What is the size of the {name}?", f"The size of the {name} is _."),
            (2, f"What stands in the {name}?", f"In the {name} stands a _."),
            key=0,
            column=index % width,
        )


def timetable(r: Random) -> Iterator[Line]:
    for number in words.numbers(r, 100, 999):
        city, platform = r.choice(words.CITIES), r.randint(10, 29)
        yield line(
            f"[{words.clock(r)}] [{city}], train [{number}], platform [{platform}]",
            (0, f"When does train {number} leave?", f"Train {number} leaves at _."),
            (1, f"Where does train {number} go?", f"Train {number} goes to _."),
            (3, f"From which platform does train {number} leave?", f"Train {number} leaves from platform _."),
            key=2,
        )


def weather(r: Random) -> Iterator[Line]:
    for city, day in words.pairs(r, words.CITIES, words.DAYS):
        name, degrees, wind = f"{city} on {day}", r.randint(10, 35), r.randint(10, 99)
        yield line(
            f"[{name}]: [{r.choice(words.WEATHER)}], [{degrees}] degrees, wind [{wind}]",
            (1, f"How is the weather in {name}?", f"The weather in {name} is _."),
            (2, f"How warm is it in {name}?", f"The degrees in {name} are _."),
            (3, f"How strong is the wind in {name}?", f"The wind in {name} is _."),
            key=0,
        )


SCHEDULE = Family("schedule", titled("Schedule of the month"), schedule, "events")
PLAN = Family("floor plan", titled("Plan of the floor"), plan, "rooms")
TIMETABLE = Family("timetable", titled("Train times of the day"), timetable, "trains")
WEATHER = Family("weather report", titled("Weather of the week"), weather, "places")
