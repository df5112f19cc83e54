"""Store the rows of a source as JSON in one file, read each when it is accessed, and join the rows of several sources."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import MISSING, fields, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, overload

import numpy as np

from distillm_cli.data.rows import Row
from distillm_cli.data.store import mapped
from distillm_cli.errors import DataError
from distillm_cli.training.events import Listener, Progress

TEXT = "text.bin"
INDEX = "index.bin"
# Of each row: its place in text.bin, the digest of ``Row.key``, its kind (``_kind_of``) and the number of its format.
_INDEX = np.dtype([("start", "<i8"), ("size", "<i4"), ("key", "<u8", 2), ("kind", "u1"), ("format", "u1")])
_DEFAULTS = {f.name: f.default for f in fields(Row) if f.default is not MISSING}
_STRUCTURED = ("messages", "answer", "tools", "documents", "template_kwargs")  # fields with values of any kind
_PROGRESS_ROWS = 10_000


class StoredRows(SequenceOf[Row]):
    """Hold rows on disk.

    text: bytes of all rows. index: of these rows (``_INDEX``). formats: their names, by number. key: of the store.
    template: ``Row.template`` of all rows.
    """

    def __init__(
        self, text: np.ndarray, index: np.ndarray, formats: SequenceOf[str], key: str, template: str | None = None
    ):
        self._text = text
        self._index = index
        self._formats = formats
        self._key = key
        self._template = template

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self._read(i) for i in range(*index.indices(len(self)))]
        return self._read(range(len(self))[index])

    def __iter__(self) -> Iterator[Row]:
        return (self._read(i) for i in range(len(self)))

    def pick(self, indices: SequenceOf[int] | np.ndarray) -> StoredRows:
        """Return the rows at these indices."""
        index = self._index[np.asarray(indices, dtype=np.int64)]
        return StoredRows(self._text, index, self._formats, self._key, self._template)

    def with_template(self, template: str) -> StoredRows:
        """Return the rows with a template of their own."""
        return StoredRows(self._text, self._index, self._formats, self._key, template)

    @cached_property
    def digest(self) -> str:
        """Return a digest of the rows: of their store, of their places in it, and of their template."""
        key = self._key + (self._template or "")
        return hashlib.sha256(key.encode() + self._index["start"].tobytes()).hexdigest()

    @property
    def keys_N2(self) -> np.ndarray:
        """Return the digest of each row's ``Row.key``, as two numbers."""
        return self._index["key"]

    @property
    def kinds(self) -> list[Row]:
        """Return the first row of each kind, in order. Templates treat rows of a kind alike."""
        _, first = np.unique(self._index["kind"], return_index=True)
        return [self[int(i)] for i in sorted(first)]

    @property
    def formats(self) -> Counter[str]:
        """Return the formats of the rows, each with its number of rows, in order of first appearance."""
        numbers, first, counts = np.unique(self._index["format"], return_index=True, return_counts=True)
        order = np.argsort(first)
        named = {self._formats[int(numbers[i])]: int(counts[i]) for i in order}
        return Counter({name: count for name, count in named.items() if name})

    def _read(self, i: int) -> Row:
        start, size, *_ = self._index[i].item()
        found = json.loads(self._text[start : start + size].tobytes().decode("utf-8", "surrogatepass"))
        found["references"] = tuple(found.get("references", ()))
        return Row(**found, template=self._template)


class JoinedRows(SequenceOf[Row]):
    """Hold the rows of several sources, one after the other, where they are: in memory or on disk."""

    def __init__(self, parts: SequenceOf[SequenceOf[Row]]):
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        number = int(np.searchsorted(self._ends, i, side="right"))
        part = self.parts[number]
        start = int(self._ends[number]) - len(part)
        return part[i - start]

    def __iter__(self) -> Iterator[Row]:
        return chain.from_iterable(self.parts)

    def pick(self, indices: SequenceOf[int] | np.ndarray) -> JoinedRows:
        """Return the rows at these ascending indices."""
        starts = [0, *self._ends[:-1]]
        cuts = np.split(np.asarray(indices, dtype=np.int64), np.searchsorted(indices, self._ends[:-1]))
        picked = zip(self.parts, cuts, starts, strict=True)
        return JoinedRows([pick(part, cut - start) for part, cut, start in picked])

    @property
    def kinds(self) -> list[Row]:
        """Return the rows of ``kinds_of`` every part."""
        return [row for part in self.parts for row in kinds_of(part)]


def store_rows(rows: Iterable[Row], directory: Path, listener: Listener, what: str) -> list[str]:
    """Write the rows' files, one row in memory at a time; return the names of the formats.

    what: of the source, for messages. Raises DataError for a row with values that JSON cannot represent.
    """
    formats: dict[str, int] = {}
    start = 0
    task = f"storing {what}"
    with (directory / TEXT).open("wb") as text, (directory / INDEX).open("wb") as index:
        entry = np.zeros(1, dtype=_INDEX)
        count = 0
        for row in rows:
            encoded = _as_json(row)
            text.write(encoded)
            format_number = formats.setdefault(row.format, len(formats))
            entry[0] = (start, len(encoded), _key_digest(row), _kind_of(row), format_number)
            index.write(entry.tobytes())
            start += len(encoded)
            count += 1
            if count % _PROGRESS_ROWS == 0:
                listener(Progress(task, count, count + 1, "rows"))
        listener(Progress(task, count, count, "rows"))
    return list(formats)


def map_rows(directory: Path, formats: SequenceOf[str], key: str) -> StoredRows:
    """Return the rows of a store, memory-mapped. formats: as ``store_rows`` returned them. key: of the store."""
    return StoredRows(mapped(directory / TEXT, np.uint8), mapped(directory / INDEX, _INDEX), formats, key)


def prompt_keys(rows: SequenceOf[Row]) -> np.ndarray:
    """Return a digest of each row's ``Row.key`` [N, 2], equal for rows with the same prompt."""
    if isinstance(rows, StoredRows):
        return rows.keys_N2
    if isinstance(rows, JoinedRows):
        return np.concatenate([prompt_keys(part) for part in rows.parts])
    return np.array([_key_digest(row) for row in rows], dtype=np.uint64).reshape(-1, 2)


def kinds_of(rows: SequenceOf[Row]) -> Iterable[Row]:
    """Return rows among which each kind of row occurs that templates distinguish, without reading all stored rows."""
    return getattr(rows, "kinds", rows)


def pick(rows: SequenceOf[Row], indices: SequenceOf[int] | np.ndarray) -> SequenceOf[Row]:
    """Return the rows at these indices, from disk if they are stored."""
    return rows.pick(indices) if isinstance(rows, StoredRows | JoinedRows) else [rows[i] for i in indices]


def with_template(rows: SequenceOf[Row], template: str | None) -> SequenceOf[Row]:
    """Return the rows with a template of their own; None leaves them to the template of the run."""
    if template is None:
        return rows
    if isinstance(rows, StoredRows):
        return rows.with_template(template)
    return [replace(row, template=template) for row in rows]


def _key_digest(row: Row) -> tuple[int, int]:
    digest = hashlib.blake2b(row.key.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], sys.byteorder), int.from_bytes(digest[8:], sys.byteorder)


def _kind_of(row: Row) -> int:
    """Return the kind of a row: which fields it has, by which a template renders it (``templates.form_of``)."""
    is_set = (row.messages is not None, row.instruction is not None, row.prompt is not None, row.is_question)
    return sum(value << place for place, value in enumerate(is_set))


def _as_json(row: Row) -> bytes:
    found: dict[str, Any] = {
        name: getattr(row, name) for name, default in _DEFAULTS.items() if getattr(row, name) != default
    }
    try:
        text = json.dumps(found, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _not_json(row, str(error)) from None
    structured = {name: found[name] for name in _STRUCTURED if name in found}
    if structured:
        reread = json.loads(text)
        if any(reread[name] != value for name, value in structured.items()):
            raise _not_json(row, "a value changes")
    return text.encode("utf-8", "surrogatepass")


def _not_json(row: Row, reason: str) -> DataError:
    return DataError(
        "data.cannot_store",
        f"{row.where}: a value cannot be stored as JSON ({reason})",
        hint="try --set data.store=off",
    )
