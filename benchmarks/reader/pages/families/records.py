"""Pages of records: forms, receipts, tables, inventories, order lines."""

from __future__ import annotations

from random import Random
from typing import Iterator

from benchmarks.reader.pages import words
from benchmarks.reader.pages.lines import Family, Line, line, titled

ROLES = """owner buyer seller tenant agent witness manager driver partner guest client sponsor trainer visitor
neighbor landlord""".split()
FIELDS = {
    "name": words.NAMES,
    "city": words.CITIES,
    "country": words.COUNTRIES,
    "job": words.JOBS,
    "pet": words.ANIMALS,
    "sport": words.SPORTS,
    "company": words.COMPANIES,
    "department": words.DEPARTMENTS,
    "colour": words.COLORS,
    "birthday": words.DAYS,
    "phone": (1000, 9999),
    "account": (10000, 99999),
    "age": (20, 79),
    "room": (100, 999),
    "height": (150, 199),
    "weight": (50, 99),
    "salary": (1000, 9900),
    "floor": (10, 99),
    "code": (1000, 9999),
    "house number": (10, 99),
}


def form(r: Random) -> Iterator[Line]:
    for field, role in words.pairs(r, tuple(FIELDS), ROLES):
        choices = FIELDS[field]
        value = str(r.randint(*choices)) if isinstance(choices, tuple) else r.choice(choices)
        name = f"{role} {field}"
        yield line(f"[{name}]: [{value}]", (1, f"What is the {name}?", f"The {name} is _."), key=0)


def form_heading(r: Random) -> Line:
    return line(
        f"Form of the [{r.choice(words.DEPARTMENTS)}] department",
        (0, "Which department is the form of?", "The form is of the department _."),
    )


def receipt(r: Random) -> Iterator[Line]:
    for food, quality in words.pairs(r, words.FOODS, words.QUALITIES):
        name = f"{quality} {food}"
        yield line(
            f"[{name}]: $[{words.price(r)}]",
            (1, f"What is the price of the {name}?", f"The price of the {name} is $_."),
            key=0,
        )


def receipt_heading(r: Random) -> Line:
    return line(
        f"Bill from [{r.choice(words.COMPANIES)}] Market by [{r.choice(words.NAMES)}]",
        (0, "Which market is the receipt from?", "The receipt is from the market _."),
        (1, "Who wrote the receipt?", "The receipt was written by _."),
    )


def table(r: Random) -> Iterator[Line]:
    for name in words.people(r):
        city, age, job = r.choice(words.CITIES), r.randint(20, 79), r.choice(words.JOBS)
        yield line(
            f"[{name}] | [{city}] | [{age}] | [{job}]",
            (1, f"Which city does the table give for {name}?", f"The table gives for {name} the city _."),
            (2, f"Which age does the table give for {name}?", f"The table gives for {name} the age _."),
            (3, f"Which job does the table give for {name}?", f"The table gives for {name} the job _."),
            key=0,
        )


def inventory(r: Random) -> Iterator[Line]:
    shelves = words.numbers(r, 100, 999)
    for thing, material in words.pairs(r, words.THINGS, words.MATERIALS):
        if thing == material:
            continue
        name = f"{material} {thing}"
        yield line(
            f"[{name}]: [{r.randint(10, 99)}] from [{r.choice(words.COUNTRIES)}], shelf [{next(shelves)}]",
            (1, f"How many pieces of the {name} are there?", f"The pieces of the {name} are _."),
            (2, f"Which country is the {name} from?", f"The {name} is from _."),
            (3, f"On which shelf is the {name}?", f"The {name} is on shelf _."),
            key=0,
        )


def orders(r: Random) -> Iterator[Line]:
    for name, number in zip(words.people(r), words.numbers(r, 100, 999)):
        thing, city = r.choice(words.THINGS), r.choice(words.CITIES)
        yield line(
            f"Order [{number}]: [{name}] bought a [{thing}] in [{city}].",
            (0, f"Which order did {name} make?", f"{name} made order _."),
            (1, f"Who made order {number}?", f"Order {number} was made by _."),
            (2, f"What was bought in order {number}?", f"In order {number} was bought a _."),
            (3, f"In which city was order {number} made?", f"Order {number} was made in _."),
            key=1,
        )


FORM = Family("form", form_heading, form, "fields")
RECEIPT = Family("receipt", receipt_heading, receipt, "goods")
TABLE = Family("table", titled("name | city | age | job"), table, "people")
INVENTORY = Family("inventory", titled("Inventory of the store"), inventory, "articles")
ORDERS = Family("order book", titled("Orders of the week"), orders, "buyers")
