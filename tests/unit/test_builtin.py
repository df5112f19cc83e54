"""Test the built-in instruction set: correct answers, disjoint splits, the same rows on every machine."""

from __future__ import annotations

import calendar
import datetime
import hashlib
import re
from collections import Counter
from itertools import islice

import pytest

from distillm_cli.data.builtin import MONTHS, TASKS, rows, split_of
from tests.codes import raises_code

ALPHABET = re.compile(r"[A-Za-z0-9 ,:?+-]+")
VOWELS = set("aeiou")


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[tuple[str, tuple[str, ...], str]]]:
    return {split: list(rows(split, 6000, seed=1)) for split in ("train", "valid", "test")}


# Solve each task from the text of the instruction alone, in another way than the generator.


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def word_of(text: str) -> str:
    """Return the word of the question: the text after a colon, otherwise the words that are not boilerplate."""
    boilerplate = {"Write", "backwards", "Spell", "with", "dashes", "Name", "Pick", "a", "letter", "of", "Mix", "up"}
    boilerplate |= {"A", "rhyme", "for", "What", "rhymes"}
    if counted := re.fullmatch(r"How many letters has (\w+)\?", text):
        return counted[1]
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
    days_of_month = (first + datetime.timedelta(n) for n in range(31))
    return {f"{day.day} {month} {year}" for day in days_of_month if day.month == first.month}


def shuffles(text: str) -> set[str]:
    word = word_of(text)
    found = {""}
    for _ in word:
        found = {order + letter for order in found for letter in word if letter not in order}
    return found - {word}


# The accepted answers of each task: one for closed tasks, all of them for open tasks.
SOLVERS = {
    "sort": lambda text: {"".join(letter for letter in map(chr, range(97, 123)) if letter in text.split(": ")[1])},
    "reverse": lambda text: {"".join(reversed(word_of(text)))},
    "add": lambda text: {str(sum(numbers(text)))},
    "count": lambda text: {str(len(word_of(text)))},
    "compare": lambda text: {solve_compare(text)},
    "date": lambda text: {solve_date(text)},
    "spell": lambda text: {re.sub(r"(?<=\w)(?=\w)", "-", word_of(text))},
    "letter": lambda text: set(word_of(text)),
    "shuffle": shuffles,
    "within": lambda text: {str(n) for n in range(100) if numbers(text)[0] < n < numbers(text)[1]},
    "rhyme": lambda text: {c + word_of(text)[1:] for c in "bcdfghjklmnpqrstvwxz"} - {word_of(text)},
    "day": days,
}
OPEN = {"letter", "shuffle", "within", "rhyme", "day"}


def test_each_of_twelve_tasks_has_a_solver():
    assert len(TASKS) == 12
    assert SOLVERS.keys() == TASKS.keys()
    assert all(task.name == name and task.summary for name, task in TASKS.items())


def test_answers_match_the_solver(drawn):
    for split in drawn.values():
        for instruction, answers, task in split:
            assert set(answers) == SOLVERS[task](instruction), instruction
            assert len(set(answers)) == len(answers)
            assert len(answers) == 1 or task in OPEN


def test_first_answer_is_uniform_among_correct_ones(drawn):
    """Check that the rank of the first answer among the sorted answers is spread evenly."""
    for task in OPEN:
        ranks = [sorted(answers).index(answers[0]) / (len(answers) - 1) for _, answers, name in drawn["train"]
                  if name == task]  # fmt: skip
        assert 0.43 < sum(ranks) / len(ranks) < 0.57
        assert min(ranks) == 0
        assert max(ranks) == 1


def test_rows_are_short_with_a_small_alphabet(drawn):
    for split in drawn.values():
        for instruction, answers, _ in split:
            assert 9 <= len(instruction) <= 32
            assert all(1 <= len(answer) <= 17 for answer in answers)
            assert ALPHABET.fullmatch(instruction), instruction
            assert all(ALPHABET.fullmatch(answer) for answer in answers), answers


def content(instruction: str, task: str) -> tuple:
    """Return the content of a question in a form that equal questions share, read from the instruction."""
    match task:
        case "sort" | "shuffle":
            return tuple(sorted(word_of(instruction)))
        case "rhyme":
            return (word_of(instruction)[1:],)
        case "day":
            return tuple(re.split("[ :]", instruction)[-2:])
        case "reverse":
            return tuple(sorted((word_of(instruction), word_of(instruction)[::-1])))
        case "add" | "compare" | "within":
            return tuple(sorted(numbers(instruction)))
        case "date":
            return tuple(numbers(instruction))
    return (word_of(instruction),)


def test_splits_share_no_questions(drawn):
    seen = {name: {(task, content(text, task)) for text, _, task in split} for name, split in drawn.items()}
    more = {(task, content(text, task)) for text, _, task in rows("train", 20_000, seed=2)}
    assert not seen["valid"] & seen["test"]
    for held_out in ("valid", "test"):
        assert not seen[held_out] & (seen["train"] | more)
        # Every task has enough rows to score on. Sums have the fewest, 405 in all splits together.
        assert min(Counter(task for task, _ in seen[held_out]).values()) > 25


def test_split_shares_are_80_10_10():
    shares = Counter(split_of("add", f"{a} {b}") for a in range(100) for b in range(a, 100))
    total = shares.total()
    assert shares["train"] / total == pytest.approx(0.8, abs=0.03)
    assert shares["valid"] / total == pytest.approx(0.1, abs=0.02)
    assert shares["test"] / total == pytest.approx(0.1, abs=0.02)


def test_tasks_have_equal_shares(drawn):
    for split in drawn.values():
        assert set(Counter(task for *_, task in split).values()) == {500}


def test_every_phrasing_is_used(drawn):
    # Match the text of a phrasing with any words in its fields.
    for task in TASKS.values():
        texts = [text for text, _, name in drawn["train"] if name == task.name]
        for phrasing in task.phrasings:
            pattern = re.sub(r"\\\{\d\\\}", r"\\w[\\w -]*", re.escape(phrasing))
            assert sum(bool(re.fullmatch(pattern, text)) for text in texts) > len(texts) / 4


def test_rows_are_deterministic_and_smaller_n_is_a_prefix(drawn):
    assert list(rows("train", 37, seed=1)) == drawn["train"][:37]
    assert list(islice(rows("test", None, seed=1), 37)) == drawn["test"][:37]
    assert list(rows("train", 37, seed=2)) != drawn["train"][:37]
    assert list(rows("train", 0, seed=1)) == []


def test_rows_are_the_same_on_every_machine():
    # A changed digest means that models were trained on other rows, which belongs in the change log.
    text = "\n".join("\t".join((i, *answers, task)) for i, answers, task in rows("train", 1000, seed=1))
    assert hashlib.blake2b(text.encode(), digest_size=8).hexdigest() == "df9fa7fe7c4d65b4"


def test_order_of_tasks_does_not_matter():
    assert {task for *_, task in rows("valid", 20, 1, tasks=["sort", "add"])} == {"sort", "add"}
    assert list(rows("valid", 20, 1, tasks=["sort", "add"])) == list(rows("valid", 20, 1, tasks=("add", "sort", "add")))


def test_unknown_task_is_rejected():
    with raises_code("recipe.unknown_task", "data.tasks", "'revers'", "reverse"):
        rows("train", 5, 1, tasks=["sort", "revers"])
    with raises_code("recipe.unknown_task", "sort, reverse"):
        rows("train", 5, 1, tasks=["zzzzz"])
    with raises_code("recipe.unknown_task"):
        rows("train", 5, 1, tasks=[])


def test_unknown_split_is_rejected():
    with pytest.raises(ValueError, match="train, valid or test"):
        rows("dev", 5, 1)


def test_month_names_are_english():
    assert MONTHS[0] == "January"
    assert MONTHS[-1] == "December"
    assert len(MONTHS) == 12
