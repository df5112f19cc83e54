"""Read rows as sentences or as sentence pairs, for embeddings (``--method disco``) and for suites of pairs.

{"sentence1": …, "sentence2": …, "score": 3.8}   a scored pair, as in STS-B
{"anchor": …, "positive": …, "negative": …}      a pair of similar sentences; the negative is optional
{"sentence": …}                                  a sentence
any other row                                    its text or its prompt is one sentence
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any

from distillm_cli.config.schema import ColumnsConfig, DataConfig
from distillm_cli.data.conversations import content_text
from distillm_cli.data.formats import readable_columns
from distillm_cli.data.records import BadRow, Record, kind
from distillm_cli.data.rows import Row, read_row
from distillm_cli.data.sources import RowForm, Rows, Split, load_rows
from distillm_cli.training.events import Listener, silent

_SCORED = ("sentence1", "sentence2", "score")
_SIMILAR = ("anchor", "positive", "negative")
_COLUMNS = frozenset((*_SCORED, *_SIMILAR, "sentence"))


@dataclass(frozen=True, slots=True)
class SentenceRow(Row):
    """Hold one, two or three sentences. score: their similarity, of two sentences, on the scale of the data."""

    sentences: tuple[str, ...] = ()
    score: float | None = None

    @property
    def key(self) -> str:
        return json.dumps(self.sentences)


def load_sentences(data: DataConfig, split: Split, listener: Listener = silent) -> list[SentenceRow]:
    """Load the rows of one split as sentences; the arguments are those of ``load_rows``. Raises DataError."""
    rows = load_rows(data, split, listener=listener, require_output=False, form=SENTENCES)
    return [_as_sentence(row) for row in rows]


def scored_pairs(rows: SequenceOf[Row]) -> list[SentenceRow]:
    """Return the rows that are pairs with a score."""
    return [row for row in rows if isinstance(row, SentenceRow) and row.score is not None]


def is_pair_suite(rows: Rows | SequenceOf[Row]) -> bool:
    """Return whether every row is a pair with a score."""
    return len(scored_pairs(rows)) == len(rows)


def _read_sentences(
    record: Any, where: str, columns: ColumnsConfig, *, require_output: bool = True
) -> tuple[Row, set[str]]:
    if isinstance(record, dict) and columns.prompt is None:
        reader = Record(record)
        if reader.has("sentence1") and reader.has("sentence2"):
            return _read(reader, where, _SCORED[:2], score=reader.has("score")), reader.read
        if reader.has("anchor") and reader.has("positive"):
            names = _SIMILAR if reader.has("negative") else _SIMILAR[:2]
            return _read(reader, where, names), reader.read
        if reader.has("sentence"):
            return _read(reader, where, ("sentence",)), reader.read
    try:
        row, read = read_row(record, where, columns, require_output=False)
    except BadRow:
        if isinstance(record, dict) and columns.prompt is None and Record(record).has("text"):
            reader = Record(record)  # of language modeling, which has no prompt
            return _read(reader, where, ("text",)), reader.read
        raise
    return _as_sentence(row), read


def _read_row_or_pair(
    record: Any, where: str, columns: ColumnsConfig, *, require_output: bool = True
) -> tuple[Row, set[str]]:
    """Read a row of a suite: a scored pair, or a prompt with references."""
    if isinstance(record, dict) and columns.prompt is None:
        reader = Record(record)
        if reader.has("sentence1") and reader.has("sentence2"):
            if not reader.has("score"):
                raise BadRow(f"no column `score` beside `sentence1` and `sentence2`; found {reader.names()}")
            return _read(reader, where, _SCORED[:2], score=True), reader.read
    return read_row(record, where, columns, require_output=require_output)


def _read(reader: Record, where: str, names: SequenceOf[str], *, score: bool = False) -> SentenceRow:
    sentences = tuple(reader.text(name).strip() for name in names)
    for name, sentence in zip(names, sentences, strict=True):
        if not sentence:
            raise BadRow(f"column `{name}` is empty")
    value = _number(reader.take("score")) if score else None
    form = {1: "sentences", 2: "sentence pairs", 3: "sentence triples"}[len(names)]
    return SentenceRow(
        where=where,
        sentences=sentences,
        score=value,
        references=() if value is None else (f"{value:g}",),
        format=f"scored {form}" if score else form,
    )


def _number(value: Any) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise BadRow(f"column `score` must be a number, found {value!r}") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow(f"column `score` must be a number, found {kind(value)}")
    return float(value)


def _as_sentence(row: Row) -> SentenceRow:
    """Return a row as one sentence: its instruction with its input, its prompt, its text or its last question."""
    if isinstance(row, SentenceRow):
        return row
    text: str | None
    if row.instruction is not None:
        text = "\n".join(filter(None, (row.instruction, row.input)))
    elif row.messages is not None:
        text = content_text(row.messages[-1].get("content"))
    else:
        text = row.prompt or next(iter(row.references), None)
    if not (text or "").strip():
        raise BadRow("no text for a sentence")
    assert text is not None
    return SentenceRow(where=row.where, sentences=(text.strip(),), task=row.task, format=row.format)


def with_score_scale(rows: SequenceOf[SentenceRow], highest: float) -> list[SentenceRow]:
    """Return scored pairs with scores from 0 to 1. highest: the score of the most similar pairs, which becomes 1."""
    return [row if row.score is None else replace(row, score=row.score / highest) for row in rows]


def _columns(columns: ColumnsConfig) -> frozenset[str]:
    return readable_columns(columns) | _COLUMNS


SENTENCES = RowForm(_read_sentences, _columns)
ROWS_OR_PAIRS = RowForm(_read_row_or_pair, _columns)
