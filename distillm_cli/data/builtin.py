"""Generate an instruction data set with twelve kinds of task and any number of rows.

A small character-level model can learn every kind, and answers are easy to check. Seven kinds have one correct answer
(sort, add, …). Five are open (shuffle, rhyme, …): a row has one of up to 119 correct answers, drawn at random, so that
a teacher's distribution has more information than the row. Prompts are at most 32 characters and answers at most 17,
both in letters, digits, the space and ``,:?+-``.

The three splits are disjoint by construction. A question has a key: its content without the phrasing. Questions whose
answers follow from one another have the same key (the larger and the smaller of 48 and 73, a word reversed and reversed
back, one set of letters in any order). A hash of the key determines the split, so a held-out question does not occur in
train in any phrasing or order. Rows are drawn with replacement: the 405 sums repeat often, the dates, words and strings
rarely.
"""

from __future__ import annotations

import calendar
import difflib
import hashlib
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import islice, permutations
from random import Random
from typing import TypeVar

from distillm_cli.data.rows import Split
from distillm_cli.errors import RecipeError

_T = TypeVar("_T")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"
TEST_ROWS = 1000  # default size of the test split, which has no limit
CONSONANTS = "bcdfghjklmnpqrstvwxz"  # without y, which is sometimes a vowel


@dataclass(frozen=True, slots=True)
class Question:
    """Hold the content of a question.

    fields: arguments of a phrasing. answers: all correct ones. key: determines the split.
    """

    fields: tuple[str | int, ...]
    answers: tuple[str, ...]
    key: str


@dataclass(frozen=True, slots=True)
class Task:
    """Describe a kind of task: its phrasings, and the function that draws its questions."""

    name: str
    summary: str
    phrasings: tuple[str, ...]
    draw: Callable[[Random], Question]

    def make(self, rng: Random, split: Split) -> tuple[str, tuple[str, ...]]:
        """Return the instruction and the correct answers of a random question of ``split``, in a random phrasing.

        The first answer is the row's output, drawn at random.
        """
        question = self.draw(rng)
        while split_of(self.name, question.key) != split:
            question = self.draw(rng)
        first_answer = _choice(rng, question.answers)
        others = (answer for answer in question.answers if answer != first_answer)
        return _choice(rng, self.phrasings).format(*question.fields), (first_answer, *others)


def split_of(task: str, key: str) -> Split:
    """Return the split of a question: one key in ten is test, one in ten valid, the rest train."""
    digest = hashlib.blake2b(f"{task} {key}".encode(), digest_size=8).digest()
    return {0: "test", 1: "valid"}.get(int.from_bytes(digest, "big") % 10, "train")


def rows(
    split: Split, count: int | None, seed: int, tasks: SequenceOf[str] | None = None
) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Yield rows as (instruction, correct answers, task). The first answer is the row's output. count: None: no limit.

    (split, seed, tasks) determines the rows on every machine, and a smaller count yields a prefix. Every task occurs
    once in each round of as many rows as there are tasks, in a random order. The order and number of names in ``tasks``
    do not matter; None is all of them.

    Raises RecipeError for an unknown task or an empty selection.
    """
    if split not in ("train", "valid", "test"):
        raise ValueError(f"split is {split!r}; expected train, valid or test")
    return islice(_stream(split, seed, _select_tasks(tasks)), count)


def _stream(split: Split, seed: int, selected: list[Task]) -> Iterator[tuple[str, tuple[str, ...], str]]:
    rng = Random(f"builtin {split} {seed}")
    while True:
        for task in sorted(selected, key=lambda _: rng.random()):
            yield *task.make(rng, split), task.name


def _select_tasks(names: SequenceOf[str] | None) -> list[Task]:
    if names is None:
        return list(TASKS.values())
    known = ", ".join(TASKS)
    for name in names:
        if name not in TASKS:
            similar = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
            hint = f"did you mean {similar[0]}? Known: {known}" if similar else f"known: {known}"
            raise RecipeError("recipe.unknown_task", f"no builtin task named {name!r}", where="data.tasks", hint=hint)
    if not names:
        raise RecipeError(
            "recipe.unknown_task", "no builtin task is selected", where="data.tasks", hint=f"known: {known}"
        )
    return [task for name, task in TASKS.items() if name in names]


# Only `random()` of the random module is guaranteed to stay the same across Python versions, so all draws use it.


def _randint(rng: Random, low: int, high: int) -> int:
    """Return a random integer from low to high, both included."""
    return low + int(rng.random() * (high - low + 1))


def _choice(rng: Random, choices: SequenceOf[_T]) -> _T:
    return choices[_randint(rng, 0, len(choices) - 1)]


def _word(rng: Random, longest: int = 6) -> str:
    """Return a pronounceable word of three letters or more, with consonants and vowels alternating."""
    kinds = (CONSONANTS, VOWELS) if rng.random() < 0.75 else (VOWELS, CONSONANTS)
    return "".join(_choice(rng, kinds[i % 2]) for i in range(_randint(rng, 3, longest)))


def _two_digits(rng: Random) -> int:
    """Return a number of exactly two digits: a small model learns arithmetic in minutes if digits are aligned."""
    return _randint(rng, 10, 99)


def _digit(rng: Random) -> int:
    return _randint(rng, 1, 9)


def _distinct_letters(rng: Random, longest: int) -> list[str]:
    """Return at least three different letters in random order."""
    return sorted(LETTERS, key=lambda _: rng.random())[: _randint(rng, 3, longest)]


def _sort(rng: Random) -> Question:
    letters = _distinct_letters(rng, longest=6)
    answer = "".join(sorted(letters))
    return Question(("".join(letters),), (answer,), key=answer)


def _reverse(rng: Random) -> Question:
    word = _word(rng)
    return Question((word,), (word[::-1],), key=min(word, word[::-1]))


def _addition(rng: Random) -> Question:
    """Draw a sum without a carry, since carries take a small model most of its training."""
    units = _randint(rng, 0, 8)
    a = 10 * _digit(rng) + units
    b = _randint(rng, 1, 9 - units)
    return Question((a, b), (str(a + b),), key=f"{a} {b}")


def _count(rng: Random) -> Question:
    word = _word(rng, longest=9)
    return Question((word,), (str(len(word)),), key=word)


def _compare(rng: Random) -> Question:
    a = b = _two_digits(rng)
    while a == b:
        b = _two_digits(rng)
    word, answer = _choice(rng, (("larger", max(a, b)), ("smaller", min(a, b))))
    return Question((word, a, b), (str(answer),), key=f"{min(a, b)} {max(a, b)}")


def _month(rng: Random) -> tuple[int, int]:
    return _randint(rng, 1900, 2099), _randint(rng, 1, 12)


def _date(rng: Random) -> Question:
    year, month = _month(rng)
    day = _randint(rng, 1, calendar.monthrange(year, month)[1])
    iso = f"{year}-{month:02}-{day:02}"
    return Question((iso,), (f"{day} {MONTHS[month - 1]} {year}",), key=iso)


def _spell(rng: Random) -> Question:
    word = _word(rng)
    return Question((word,), ("-".join(word),), key=word)


def _letter(rng: Random) -> Question:
    word = _word(rng)
    return Question((word,), tuple(sorted(set(word))), key=word)


def _shuffle(rng: Random) -> Question:
    letters = _distinct_letters(rng, longest=5)
    orders = tuple("".join(order) for order in permutations(letters) if order != tuple(letters))
    return Question(("".join(letters),), orders, key="".join(sorted(letters)))


def _within(rng: Random) -> Question:
    low = high = 0
    while high - low < 5:
        low, high = sorted((_two_digits(rng), _two_digits(rng)))
    return Question((low, high), tuple(map(str, range(low + 1, high))), key=f"{low} {high}")


def _rhyme(rng: Random) -> Question:
    word = _word(rng)
    while word[0] in VOWELS:
        word = _word(rng)
    return Question((word,), tuple(c + word[1:] for c in CONSONANTS if c != word[0]), key=word[1:])


def _day(rng: Random) -> Question:
    year, month = _month(rng)
    month_name = f"{MONTHS[month - 1]} {year}"
    days = range(1, calendar.monthrange(year, month)[1] + 1)
    return Question((month_name,), tuple(f"{day} {month_name}" for day in days), key=month_name)


# Not calendar.month_name, which depends on the locale.
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)

_TASK_LIST = (
    Task("sort", "letters in alphabetical order", ("Sort the letters: {0}", "Put in order: {0}"), _sort),
    Task("reverse", "a word backwards", ("Reverse the word: {0}", "Write {0} backwards"), _reverse),
    Task("add", "a two-digit number plus a digit, no carry", ("What is {0} + {1}?", "Add {0} and {1}"), _addition),
    Task("count", "how many letters a word has", ("How many letters has {0}?", "Count the letters: {0}"), _count),
    Task(
        "compare",
        "the larger or smaller of two two-digit numbers",
        ("Which is {0}: {1} or {2}?", "The {0} of {1} and {2}"),
        _compare,
    ),
    Task("date", "a date in words", ("Write as a date: {0}", "Which day is {0}?"), _date),
    Task("spell", "a word letter by letter", ("Spell the word: {0}", "Spell {0} with dashes"), _spell),
    Task("letter", "any letter of a word", ("Name a letter of {0}", "Pick a letter: {0}"), _letter),
    Task("shuffle", "letters in any other order", ("Shuffle the letters: {0}", "Mix up {0}"), _shuffle),
    Task(
        "within",
        "any number between two others",
        ("Write a number between {0} and {1}", "More than {0}, less than {1}"),
        _within,
    ),
    Task("rhyme", "a word with another first letter", ("A rhyme for {0}", "What rhymes with {0}?"), _rhyme),
    Task("day", "any day of a month", ("A day in {0}", "Pick a day: {0}"), _day),
)

TASKS: dict[str, Task] = {task.name: task for task in _TASK_LIST}
