"""Pages of the reader: what is asked about them stands on them, and what is right is right."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from random import Random

import pytest

from benchmarks.reader.pages import arrangements, splits
from benchmarks.reader.pages.draw import draw, together
from benchmarks.reader.pages.families import FAMILIES, HELD_OUT, SEEN
from benchmarks.reader.pages.grading import grade
from benchmarks.reader.pages.layout import Text, lay_out
from benchmarks.reader.pages.page import BLANK, DECORATIONS, LINE_END, Page, Question, Sample, holds_text
from benchmarks.reader.pages.pieces import stand_in, vocabulary

SHARES = (0, 0.5, 0.8)
SEEDS = range(4)


@cache
def sample(family: str, seed: int = 0, size: int = 400, blank_share: float = 0.5) -> Sample:
    return draw(family, seed, size, blank_share, stand_in)


def asked(answer: str, kind: str, text: str = "What is it?") -> Question:
    return Question(text, answer, answer, kind, 1, ())


every_page = pytest.mark.parametrize("blank_share", SHARES)
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
@every_page
@pytest.mark.parametrize("size", [100, 400, 2000])
def test_a_page_has_the_size_and_the_blank_cells_that_were_asked_for(family, blank_share, size):
    for seed in SEEDS:
        page = sample(family, seed, size, blank_share).pages[0]
        assert {len(row) for row in page.rows} == {page.width} and 8 <= page.width <= 32
        assert len(page.cells) == pytest.approx(size, rel=0.15)
        assert page.blank_share == pytest.approx(blank_share, abs=0.05)


@every_family
@every_page
@pytest.mark.parametrize("size", [100, 400])
def test_the_places_of_an_answer_spell_it(family, blank_share, size):
    for seed in SEEDS:
        drawn = sample(family, seed, size, blank_share)
        page, questions = drawn.pages[0], drawn.questions
        assert {question.length for question in questions} >= {1, 5}
        for question in questions:
            read = [page.cells[place].strip() for place in question.places]
            if question.length == 80:
                at = 0
                for piece in read:
                    at = question.answer.index(piece, at) + len(piece)
            else:
                assert "".join(read) == question.answer.replace(", ", "").replace(" ", "")


@every_family
def test_the_text_of_a_page_is_its_lines_in_order_wherever_they_stand(family):
    for seed in SEEDS:
        apart = sample(family, seed)
        lines = apart.pages[0].text.split(LINE_END)
        assert lines.pop() == "" and all(line.startswith(" ") for line in lines)
        for question in apart.asked("word", "number", length=5):
            before = "".join(filter(holds_text, apart.pages[0].cells[: question.places[0]]))
            line = lines[before.count(LINE_END)]
            assert question.answer in line


@every_family
def test_a_perfect_reader_is_right_and_the_question_alone_is_not(family):
    for seed in SEEDS:
        for question in sample(family, seed, 400, 0).questions:
            assert grade(question, question.reply) == (None if question.length == 80 else 1)
            if question.length < 20:
                assert grade(question, question.text) == 0


@every_family
def test_large_pages_have_answers_of_every_length_and_kind(family):
    for seed in SEEDS:
        questions = sample(family, seed, 2000, 0).questions
        assert {q.kind for q in questions} == {"word", "number", "list", "summary", "caption"}
        for question in questions:
            low, high = {1: (1, 10), 5: (5, 30), 20: (15, 30), 80: (60, 130)}[question.length]
            assert low <= len(stand_in(question.reply)) <= high, question


@every_family
def test_no_question_has_two_answers_or_says_its_own(family):
    for seed in SEEDS:
        drawn = sample(family, seed, 2000, 0)
        everything = draw(family, seed, 2000, 0, stand_in, facts=10_000).questions
        assert len(everything) > len(drawn.questions)
        assert len({question.text for question in everything}) == len(everything)
        assert not any(grade(question, question.text) for question in everything if question.length < 20)


def test_questions_about_several_pages_are_about_one_of_them():
    drawn = [draw(family, seed, 400, 0, stand_in, facts=10_000) for seed, family in enumerate(FAMILIES)]
    joined = together(drawn)
    assert joined.pages == tuple(one.pages[0] for one in drawn)
    assert len({question.text for question in joined.questions}) == len(joined.questions)
    for question in joined.asked("number"):
        cells = joined.pages[question.page].cells
        assert "".join(cells[place] for place in question.places).strip() == question.answer
    with pytest.raises(ValueError, match="different families; these are form, form"):
        together([sample("form", 0), sample("form", 1)])
    with pytest.raises(ValueError, match="must have one page"):
        together([joined, sample("form")])


@every_family
def test_a_seed_gives_one_page_and_another_seed_another(family):
    again = draw(family, 3, 400, 0.5, stand_in)
    assert again == sample(family, 3)
    assert draw(family, 3, 400, 0, stand_in) == draw(family, 3, 400, 0.0, stand_in)
    assert len({sample(family, seed).pages for seed in SEEDS}) == len(SEEDS)


def test_the_vocabulary_holds_the_pieces_of_all_pages():
    pieces = vocabulary(stand_in)
    assert pieces == sorted(set(pieces)) and not set(pieces) & {BLANK, *DECORATIONS}
    for family in FAMILIES:
        for seed in SEEDS:
            assert set(filter(holds_text, sample(family, seed, 2000, 0).pages[0].cells)) <= set(pieces)


def test_needles_stand_at_any_depth():
    firsts = {draw("needle", seed, 400, 0, stand_in).pages[0].text.split(LINE_END)[1] for seed in range(10)}
    assert any("code" in line or "belongs" in line for line in firsts)
    assert not all("code" in line or "belongs" in line for line in firsts)


@every_page
def test_only_blank_cells_are_decorated(blank_share):
    texts = [Text(stand_in(f" line {index} of a page") + [LINE_END]) for index in range(12)]
    total = sum(len(text.pieces) for text in texts)
    seen = set()
    for seed in range(20):
        page, places = lay_out(Random(seed), texts, round(total / (1 - blank_share)), blank_share)
        taken = [place for where in places for place in where]
        assert taken == sorted(set(taken))
        assert [page.cells[place] for place in taken] == [piece for text in texts for piece in text.pieces]
        rest = [cell for place, cell in enumerate(page.cells) if place not in set(taken)]
        assert set(rest) <= {BLANK, *DECORATIONS}
        seen |= set(rest)
    assert blank_share == 0 or seen == {BLANK, *DECORATIONS}


def holes(page: Page) -> int:
    """How many runs without text there are between two pieces."""
    return "".join("x" if holds_text(cell) else " " for cell in page.cells).strip().count("x ")


def test_blank_cells_are_spread_between_the_lines():
    for seed in range(20):
        lines = [Text(["a"] * 6 + [LINE_END])] * 20
        running_on = lay_out(Random(seed), lines, 148, 0.05)[0]
        assert holes(running_on) >= 3
        in_rows = lay_out(Random(seed), lines, 700, 0.8)[0]
        assert holes(in_rows) >= 10
        wholly_blank = [not any(map(holds_text, row)) for row in in_rows.rows]
        first, last = wholly_blank.index(False), len(wholly_blank) - 1 - wholly_blank[::-1].index(False)
        assert any(wholly_blank[first:last])


def test_rooms_of_a_plan_stand_above_each_other():
    abreast = 0
    for seed in range(20):
        page = sample("plan", seed).pages[0]
        columns = {}
        for row in page.rows:
            for x, (letter, digit) in enumerate(zip(row, row[1:])):
                if letter in (" A", " B", " C", " D") and digit.isdigit():
                    columns.setdefault(letter, set()).add(x)
        abreast += len(columns) > 1 and min(columns[" B"]) > max(columns[" A"])
    assert abreast


def test_lines_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="90 pieces do not fill a page of 100 cells that is 80% blank"):
        lay_out(Random(0), [Text(["a"] * 90)], 100, 0.8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("novel", 0, 400, 0), "no family 'novel'; choose one of form, "),
        (("form", 0, 50, 0), "size is 50; a page has 100 to 2000 cells"),
        (("form", 0, 400, 0.9), "blank_share is 0.9; it must be between 0 and 0.8"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(*arguments, stand_in)


def test_a_splitter_must_keep_the_text():
    with pytest.raises(ValueError, match="the pieces must spell the text"):
        draw("form", 0, 400, 0, str.split)
    with pytest.raises(ValueError, match="is no whole number of the pieces"):
        draw("form", 0, 400, 0, lambda text: [text])


@pytest.mark.parametrize("rows", [(), ((),), (("a", "b"), ("c",))])
def test_a_page_is_a_rectangle(rows):
    with pytest.raises(ValueError, match="rows of one width"):
        Page(rows)


def test_the_splits_share_no_seed_and_held_out_families_are_only_reported():
    seeds = list(splits.SEEDS.values())
    assert sorted(seeds, key=lambda seeds: seeds.start) == seeds
    assert all(before.stop <= after.start for before, after in zip(seeds, seeds[1:]))
    assert len(HELD_OUT) >= 2 and not set(HELD_OUT) & set(SEEN)
    for split in ("training", "tuning"):
        assert set(splits.families(split)) == set(SEEN)
        with pytest.raises(ValueError, match=f"'letter' is no family of {split}"):
            splits.draw_for(split, "letter", 0, 400, 0, stand_in)
        last = len(splits.SEEDS[split])
        with pytest.raises(ValueError, match=f"{split} has {last} samples"):
            splits.draw_for(split, "form", last, 400, 0, stand_in)
    reported = splits.draw_for("report", "letter", 5, 400, 0, stand_in)
    assert reported == draw("letter", splits.SEEDS["report"][5], 400, 0, stand_in)
    with pytest.raises(ValueError, match="no split 'test'; choose one of training, tuning, report"):
        splits.families("test")


def contents(messages: list[arrangements.Message]) -> list[list[str | Page]]:
    return [message["content"] for message in messages]


def test_a_question_stands_after_before_and_around_the_pages():
    drawn = together([sample("form"), sample("story")])
    question = drawn.questions[-1]
    pages, text = list(drawn.pages), question.text
    assert {name: contents(arrange(drawn, question)) for name, arrange in arrangements.SINGLE.items()} == {
        "question_after": [[*pages, text]],
        "question_before": [[text, *pages]],
        "question_around": [[text, *pages, text]],
        "page_twice": [[*pages, *pages, text]],
    }


def test_three_turns_ask_for_different_answers_over_one_page():
    drawn = sample("table")
    questions = arrangements.apart(drawn.asked("word", "number", length=5), 3)
    assert len({question.answer for question in questions}) == 3
    asked = arrangements.turns(drawn, questions)
    first, second, third = (question.text for question in questions)
    page = drawn.pages[0]
    assert contents(arrangements.conversation(asked, [])) == [[page, first]]
    second_turn = arrangements.conversation(asked, ["one"])
    assert contents(second_turn) == [[page, first], ["one"], [second]]
    third_turn = arrangements.conversation(asked, ["one", "two"])
    assert contents(third_turn) == [[page, first], ["one"], [second], ["two"], [third]]
    assert [message["role"] for message in third_turn] == ["user", "assistant"] * 2 + ["user"]
    returned = arrangements.returning(drawn, questions)
    assert returned == arrangements.conversation(asked, [question.reply for question in questions[:2]])
    with pytest.raises(ValueError, match="3 replies to 3 messages"):
        arrangements.conversation(asked, ["one", "two", "three"])
    with pytest.raises(ValueError, match="must ask for different answers"):
        arrangements.turns(drawn, [questions[0], replace(questions[0], text="Again?")])
    with pytest.raises(ValueError, match="has 1 different answers; 3 turns"):
        arrangements.apart([questions[0]] * 5, 3)


@pytest.mark.parametrize(
    ("answer", "output", "right"),
    [
        ("15", "15", True),
        ("15", "It is 15.", True),
        ("15", "\n\n**15**, I think", True),
        ("15", "It costs $15", True),
        ("15", "915", False),
        ("15", "150", False),
        ("15", "15.20", False),
        ("15", "9:15", False),
        ("15", "1,150 or 1,15", False),
        ("15", "-15", False),
        ("15", "15th", False),
        ("15", "a15", False),
        ("15", "1 5", False),
        ("15", "015", False),
        ("15", "15 or 16", False),
        ("15", "14\n15", False),
        ("15", "", False),
        ("15", "fifteen", False),
        ("2.50", "$2.50.", True),
        ("2.50", "2.5", False),
        ("2.50", "12.50", False),
        ("9:15", "It leaves at 9:15, from 12.", False),
        ("9:15", "at 9:15,", True),
        ("9:15", "9.15", False),
    ],
)
def test_numbers_are_right_digit_by_digit(answer, output, right):
    assert grade(asked(answer, "number"), output) == right


def test_numbers_of_the_question_may_be_said_again():
    question = asked("9:15", "number", "When does train 482 leave?")
    assert grade(question, "Train 482 leaves at 9:15.") == 1
    assert grade(question, "Train 482 leaves at 482.") == 0
    assert grade(question, "Train 483 leaves at 9:15.") == 0


@pytest.mark.parametrize(
    ("answer", "output", "right"),
    [
        ("teacher", "The job of Ann is Teacher.", True),
        ("teacher", '"teacher"', True),
        ("teacher", "teachers", False),
        ("art", "party", False),
        ("art", "nothing\nart", False),
        ("little hall", "the little  hall", True),
        ("little hall", "the hall is little", False),
        ("little hall", "a hall", False),
        ("teacher", "", False),
    ],
)
def test_words_are_right_as_whole_words(answer, output, right):
    assert grade(asked(answer, "word"), output) == right


@pytest.mark.parametrize(
    ("output", "share"),
    [
        ("milk, rice, tea, salt.", 1),
        ("Milk, rice, tea and salt", 1),
        ("milk, tea, salt", 0.75),
        ("rice, milk, tea, salt", 0.75),
        ("salt, tea, rice, milk", 0.25),
        ("milk, rice, tea, salt, oil, corn, beer, wine", 0.5),
        ("milk, milk, milk, milk", 0.25),
        ("buttermilk, rice, tea, salt", 0.75),
        ("milk, rice\ntea, salt", 0.5),
        ("", 0),
    ],
)
def test_lists_are_graded_by_the_items_in_order(output, share):
    assert grade(asked("milk, rice, tea, salt", "list"), output) == share


def test_long_answers_are_not_graded_here():
    assert grade(asked("A page.", "caption"), "A page.") is None
