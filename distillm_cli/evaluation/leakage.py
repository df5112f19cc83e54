"""Find rows of a suite that occur in training data: the same prompt, or 13 words in a row (Brown et al. 2020, GPT-3).

Words are lower-case runs of letters and digits. A 13-gram that occurs in many rows of the suite is text of a template and
does not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from distillm_cli.data.rows import Row

NGRAM = 13
_TEMPLATE_ROWS = 3  # a 13-gram in this many rows, and in more than this share of them, is text of a template
_TEMPLATE_SHARE = 0.1
_WORD = re.compile(r"\w+")
Words = tuple[str, ...]


@dataclass(frozen=True)
class Leakage:
    """Hold which rows of a suite occur in training data.

    train_rows: number of training rows. same_prompts, same_rows, ngram_rows: indices of the rows with the prompt of a
    training row, with its prompt and response, and with a 13-gram in common.
    """

    rows: int
    train_rows: int
    same_prompts: frozenset[int]
    same_rows: frozenset[int]
    ngram_rows: frozenset[int]

    @property
    def leaked(self) -> frozenset[int]:
        """Return the rows with the same prompt or a common 13-gram."""
        return self.same_prompts | self.ngram_rows

    @property
    def clean(self) -> list[int]:
        """Return the other rows."""
        return [i for i in range(self.rows) if i not in self.leaked]

    def as_json(self) -> dict[str, Any]:
        """Return the counts."""
        counts = {name: len(getattr(self, name)) for name in ("same_prompts", "same_rows", "ngram_rows")}
        return {"train_rows": self.train_rows, **counts, "leaked_rows": len(self.leaked), "clean_rows": len(self.clean)}


def find_leakage(rows: list[Row], train: Iterable[Row]) -> Leakage:
    """Compare the rows of a suite with training rows, which are read once."""
    prompts: dict[Words, list[int]] = {}
    members: dict[Words, set[int]] = {}
    answers: list[set[Words]] = []
    for i, row in enumerate(rows):
        prompt = _words(_prompt_text(row))
        prompts.setdefault(prompt, []).append(i)
        answers.append({_words(text) for text in row.references})
        for reference in row.references or ("",):
            for ngram in _ngrams(prompt + _words(reference)):
                members.setdefault(ngram, set()).add(i)
    limit = max(_TEMPLATE_ROWS - 1, _TEMPLATE_SHARE * len(rows))
    counted = {ngram: of_rows for ngram, of_rows in members.items() if len(of_rows) <= limit}
    same_prompts: set[int] = set()
    same_rows: set[int] = set()
    with_ngram: set[int] = set()
    train_rows = 0
    for row in train:
        train_rows += 1
        prompt = _words(_prompt_text(row))
        found = {_words(text) for text in row.references}
        for i in prompts.get(prompt, ()):
            same_prompts.add(i)
            if found & answers[i]:
                same_rows.add(i)
        for response in found or {()}:
            for ngram in _ngrams(prompt + response):
                with_ngram |= counted.get(ngram, set())
    return Leakage(len(rows), train_rows, frozenset(same_prompts), frozenset(same_rows), frozenset(with_ngram))


def _prompt_text(row: Row) -> str:
    """Return the text of a row's prompt, without a template if the row has none."""
    if row.instruction is not None:
        return f"{row.instruction}\n{row.input}"
    if row.messages is not None:
        return "\n".join(str(message.get("content") or "") for message in row.messages)
    return row.prompt or ""


def _words(text: str) -> Words:
    return tuple(_WORD.findall(text.lower()))


def _ngrams(words: Words) -> Iterator[Words]:
    return (words[i : i + NGRAM] for i in range(len(words) - NGRAM + 1))
