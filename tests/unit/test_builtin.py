"""The procedural instruction set: right answers, splits that never meet, the same rows everywhere."""

from __future__ import annotations

import calendar
import datetime
import hashlib
import re
from collections import Counter
from itertools import islice

import pytest

from distillm_cli.data.builtin import MONTHS, TASKS, rows, split_of
from distillm_cli.errors import RecipeError

ALPHABET = re.compile(r"[A-Za-z0-9 ,:?+-]+")
VOWELS = set("aeiou")


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[tuple[str, tuple[str, ...], str]]]:
    return {split: list(rows(split, 6000, seed=1)) for split in ("train", "valid", "test")}


# Each answer again, from the words of the instruction alone, by another road than the generator's.


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def the_word(text: str) -> str:
    """The word asked about: what follows a colon, else what is left when the phrasing is taken away."""
    boilerplate = {"Write", "backwards", "Spell", "with", "dashes", "Name", "Pick", "a", "letter", "of", "Mix", "up"}
    boilerplate |= {"A", "rhyme", "for", "What", "rhymes"}
    if asked := re.fullmatch(r"How many letters has (\w+)\?", text):
        return asked[1]
    if ": " in text:
        return text.split(": ")[1]
    (word,) = [word for word in text.rstrip("?").split() if word not in boilerplate]
    return word


def solve_compare(text: str) -> str:
    return str(sorted(numbers(text))[-1 if "larger" in text else 0])


def solve_date(text: str) -> str:
    date = datetime.date(*numbers(text))
    return f"{date.day} {calendar.month_name[date.month]} {date.year}"


def days(text: str) -> set[str]:
    month, year = text.split()[-2:]
    first = datetime.datetime.strptime(f"1 {month} {year}", "%d %B %Y")
    every = (first + datetime.timedelta(n) for n in range(31))
    return {f"{day.day} {month} {year}" for day in every if day.month == first.month}


def shuffles(text: str) -> set[str]:
    word = the_word(text)
    found = {""}
    for _ in word:
        found = {order + letter for order in found for letter in word if letter not in order}
    return found - {word}


# What each kind accepts: one answer where there is one, else all of them.
SOLVERS = {
    "sort": lambda text: {"".join(letter for letter in map(chr, range(97, 123)) if letter in text.split(": ")[1])},
    "reverse": lambda text: {"".join(reversed(the_word(text)))},
    "add": lambda text: {str(sum(numbers(text)))},
    "count": lambda text: {str(len(the_word(text)))},
    "compare": lambda text: {solve_compare(text)},
    "date": lambda text: {solve_date(text)},
    "spell": lambda text: {re.sub(r"(?<=\w)(?=\w)", "-", the_word(text))},
    "letter": lambda text: set(the_word(text)),
    "shuffle": shuffles,
    "within": lambda text: {str(n) for n in range(100) if numbers(text)[0] < n < numbers(text)[1]},
    "rhyme": lambda text: {c + the_word(text)[1:] for c in "bcdfghjklmnpqrstvwxz"} - {the_word(text)},
    "day": days,
}
OPEN = {"letter", "shuffle", "within", "rhyme", "day"}


def test_there_are_twelve_kinds_each_with_a_solver_here():
    assert len(TASKS) == 12
    assert SOLVERS.keys() == TASKS.keys()
    assert all(task.name == name and task.summary for name, task in TASKS.items())


def test_the_answers_are_all_that_are_right_and_no_other(drawn):
    for split in drawn.values():
        for instruction, answers, task in split:
            assert set(answers) == SOLVERS[task](instruction), instruction
            assert len(set(answers)) == len(answers)
            assert len(answers) == 1 or task in OPEN


def test_the_answer_that_a_row_shows_is_any_of_them(drawn):
    """Where among the right ones, in the order of the alphabet, it stands: everywhere about as often."""
    for task in OPEN:
        places = [sorted(answers).index(answers[0]) / (len(answers) - 1) for _, answers, name in drawn["train"]
                  if name == task]  # fmt: skip
        assert 0.43 < sum(places) / len(places) < 0.57
        assert min(places) == 0
        assert max(places) == 1


def test_rows_are_short_and_in_a_small_alphabet(drawn):
    for split in drawn.values():
        for instruction, answers, _ in split:
            assert 9 <= len(instruction) <= 32
            assert all(1 <= len(answer) <= 17 for answer in answers)
            assert ALPHABET.fullmatch(instruction), instruction
            assert all(ALPHABET.fullmatch(answer) for answer in answers), answers


def content(instruction: str, task: str) -> tuple:
    """What a question is about, in a form that equal questions share; read from the instruction, not from the key."""
    match task:
        case "sort" | "shuffle":
            return tuple(sorted(the_word(instruction)))
        case "rhyme":
            return (the_word(instruction)[1:],)
        case "day":
            return tuple(re.split("[ :]", instruction)[-2:])
        case "reverse":
            return tuple(sorted((the_word(instruction), the_word(instruction)[::-1])))
        case "add" | "compare" | "within":
            return tuple(sorted(numbers(instruction)))
        case "date":
            return tuple(numbers(instruction))
    return (the_word(instruction),)


def test_a_held_out_question_occurs_in_no_other_split(drawn):
    seen = {name: {(task, content(text, task)) for text, _, task in split} for name, split in drawn.items()}
    more = {(task, content(text, task)) for text, _, task in rows("train", 20_000, seed=2)}
    assert not seen["valid"] & seen["test"]
    for held_out in ("valid", "test"):
        assert not seen[held_out] & (seen["train"] | more)
        # Enough of every kind to score on; sums are the fewest, 405 in all splits together.
        assert min(Counter(task for task, _ in seen[held_out]).values()) > 25


def test_the_split_of_a_key_is_eight_one_one():
    shares = Counter(split_of("add", f"{a} {b}") for a in range(100) for b in range(a, 100))
    total = shares.total()
    assert shares["train"] / total == pytest.approx(0.8, abs=0.03)
    assert shares["valid"] / total == pytest.approx(0.1, abs=0.02)
    assert shares["test"] / total == pytest.approx(0.1, abs=0.02)


def test_kinds_come_in_equal_shares(drawn):
    for split in drawn.values():
        assert set(Counter(task for *_, task in split).values()) == {500}


def test_every_phrasing_is_used(drawn):
    # Text and white space of a phrasing, whatever stands in its fields.
    for task in TASKS.values():
        texts = [text for text, _, name in drawn["train"] if name == task.name]
        for phrasing in task.phrasings:
            pattern = re.sub(r"\\\{\d\\\}", r"\\w[\\w -]*", re.escape(phrasing))
            assert sum(bool(re.fullmatch(pattern, text)) for text in texts) > len(texts) / 4


def test_split_and_seed_fix_the_rows_and_a_smaller_n_is_a_prefix(drawn):
    assert list(rows("train", 37, seed=1)) == drawn["train"][:37]
    assert list(islice(rows("test", None, seed=1), 37)) == drawn["test"][:37]
    assert list(rows("train", 37, seed=2)) != drawn["train"][:37]
    assert list(rows("train", 0, seed=1)) == []


def test_the_rows_are_the_same_on_every_machine():
    # A changed digest means that models trained on these rows saw other rows: a change worth a line in the change log.
    text = "\n".join("\t".join((i, *answers, task)) for i, answers, task in rows("train", 1000, seed=1))
    assert hashlib.blake2b(text.encode(), digest_size=8).hexdigest() == "df9fa7fe7c4d65b4"


def test_tasks_can_be_chosen_in_any_order():
    assert {task for *_, task in rows("valid", 20, 1, tasks=["sort", "add"])} == {"sort", "add"}
    assert list(rows("valid", 20, 1, tasks=["sort", "add"])) == list(rows("valid", 20, 1, tasks=("add", "sort", "add")))


def test_an_unknown_task_is_answered_with_the_nearest_name():
    with pytest.raises(RecipeError, match=r"'revers'; data\.tasks; did you mean reverse\?"):
        rows("train", 5, 1, tasks=["sort", "revers"])
    with pytest.raises(RecipeError, match="known: sort, reverse"):
        rows("train", 5, 1, tasks=["zzzzz"])
    with pytest.raises(RecipeError, match="no builtin task is selected"):
        rows("train", 5, 1, tasks=[])


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="expected train, valid or test"):
        rows("dev", 5, 1)


def test_months_are_english_everywhere():
    assert MONTHS[0] == "January"
    assert MONTHS[-1] == "December"
    assert len(MONTHS) == 12
