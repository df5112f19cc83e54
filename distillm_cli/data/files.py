"""Read local data files into records, each with its file and line: ``train.jsonl:318``.

A record that cannot be read is yielded as an ``UnreadableRecord``, so that the caller decides between stopping and
skipping; a file that cannot be read at all raises DataError. JSON lines, JSON and CSV are not read through ``datasets``,
which guesses the types of CSV cells (an answer of ``42`` becomes a number, ``NA`` a null), fills short rows, and reports
errors without a line number.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from distillm_cli.data.records import UnreadableValue
from distillm_cli.data.tables import read_parquet
from distillm_cli.errors import DataError

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSIONS = (".gz", ".zst")

_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
class UnreadableRecord:
    """Hold the reason why a record could not be read. is_json: False for a line that should be JSON and is not."""

    reason: str
    is_json: bool = True


Records = Iterator[tuple[str, Any]]  # (where, record or UnreadableRecord)


def format_of(path: Path) -> str | None:
    """Return the format of a data file by its name: ".jsonl" for ``rows.jsonl.gz``, None for an unknown one."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        return suffixes[0] if suffixes[0] in _READERS else None
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def stem_of(path: Path) -> str:
    """Return a data file's name without its extensions: "train" for ``train.jsonl.gz``."""
    return Path(path.stem).stem if path.suffix.lower() in COMPRESSIONS else path.stem


def read(path: Path, columns: Collection[str]) -> Records:
    """Yield the records of one file, in order. Blank lines are skipped.

    columns: those to convert, if the file has types. Raises DataError when the file is absent, unreadable, of an
    unknown kind, or broken as a whole.
    """
    file_format = format_of(path)
    if file_format is None:
        known = f"{', '.join(FORMATS)}; all but the last also with {' or '.join(COMPRESSIONS)}"
        raise DataError("data.unknown_format", f"{path}: unknown type of data file", hint=f"known types are {known}")
    try:
        yield from read_parquet(path, columns) if file_format == ".parquet" else _READERS[file_format](path)
    except FileNotFoundError:
        raise DataError("data.not_found", f"{path}: no such file", hint="check the path") from None
    except (EOFError, zlib.error) as error:
        raise DataError(
            "data.unreadable", f"{path}: cannot be decompressed ({error})", hint="write the file again"
        ) from None
    except OSError as error:
        raise DataError(
            "data.unreadable", f"{path}: cannot be read ({error.strerror or error})", hint="check the file"
        ) from error


def _open(path: Path) -> BinaryIO:
    """Open the file for its decompressed bytes."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    return path.open("rb")


def _json_error(error: ValueError) -> str:
    """Describe a JSON error: ``not JSON (expected ',' at column 41)``."""
    if not isinstance(error, json.JSONDecodeError):  # an integer of thousands of digits
        return f"not JSON ({error})"
    message = error.msg.replace("Expecting", "expected").removesuffix(" delimiter").removesuffix(" at")
    return f"not JSON ({message[0].lower()}{message[1:]} at column {error.colno})"


def _jsonl(path: Path) -> Records:
    with _open(path) as lines:
        # Lines are split at \n alone: str.splitlines would also split at U+2028 inside a text.
        for number, raw in enumerate(lines, start=1):
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            raw = raw.rstrip()  # without its line end, so that the column of an error is in this line
            if raw:
                yield f"{path.name}:{number}", _json_line(raw)


def _json_line(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return UnreadableRecord(_not_utf8(error))
    except RecursionError:
        return UnreadableRecord("not JSON (nested too deeply)", is_json=False)
    except ValueError as error:
        return UnreadableRecord(_json_error(error), is_json=False)


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at byte {error.start + 1} of the line)"


def _json(path: Path) -> Records:
    with _open(path) as file:
        raw = file.read().removeprefix(codecs.BOM_UTF8)
    try:
        text = raw.decode("utf-8")
        start = _SPACE.match(text).end()
        if start == len(text):
            return
        if text[start] == "{" and _has_more(text, start):
            yield from _jsonl(path)  # .json files may hold JSON lines
            return
        whole = json.loads(text)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            "data.not_utf8", f"{path.name}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x})", where=str(path)
        ) from None
    except RecursionError:
        raise DataError("data.invalid_json", f"{path.name}: not JSON (nested too deeply)", where=str(path)) from None
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise DataError(
            "data.invalid_json",
            f"{path.name}:{line}: {_json_error(error)}",
            where=str(path),
            hint="correct the file; rows are a JSON list",
        ) from None
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        rows = whole["data"]
        lines = _element_lines(text, _value_start(text, start, "data"))
    elif isinstance(whole, list):
        rows = whole
        lines = _element_lines(text, start)
    else:
        rows = [whole]
        lines = iter([text.count("\n", 0, start) + 1])
    for line, row in zip(lines, rows, strict=True):
        yield f"{path.name}:{line}", row


def _has_more(text: str, start: int) -> bool:
    """Return whether something follows the JSON value at ``start``."""
    _, end = _decode_at(text, start)
    return _SPACE.match(text, end).end() < len(text)


_decode_at = json.JSONDecoder().raw_decode


def _value_start(text: str, position: int, key: str) -> int:
    """Return the start of the value of the last top-level ``key`` in the valid JSON object at ``position``."""
    found = position
    position = _SPACE.match(text, position + 1).end()
    while text[position] != "}":
        name, position = _decode_at(text, position)
        position = _SPACE.match(text, _SPACE.match(text, position).end() + 1).end()  # past the colon
        if name == key:
            found = position
        _, position = _decode_at(text, position)
        position = _SPACE.match(text, position).end()
        if text[position] == ",":
            position = _SPACE.match(text, position + 1).end()
    return found


def _element_lines(text: str, position: int) -> Iterator[int]:
    """Yield the line on which each element of the valid JSON list at ``position`` starts."""
    line = 1
    counted = 0
    position = _SPACE.match(text, position + 1).end()
    while text[position] != "]":
        line += text.count("\n", counted, position)
        counted = position
        yield line
        _, position = _decode_at(text, position)
        position = _SPACE.match(text, position).end()
        if text[position] == ",":
            position = _SPACE.match(text, position + 1).end()


def _csv(path: Path) -> Records:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than some documents
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        cells = csv.reader(text, strict=True)
        try:
            header = next(cells, None)
        except csv.Error as error:
            raise DataError("data.invalid_csv", f"{path.name}:1: not CSV ({error})", where=str(path)) from None
        if header is None:
            return
        names = [name.strip() for name in header]
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(
                "data.invalid_csv",
                f"{path.name}:1: column `{duplicates[0]}` occurs twice",
                where=str(path),
                hint="rename one",
            )
        while True:
            where = f"{path.name}:{cells.line_num + 1}"  # a quoted cell may span lines; this is the row's first
            try:
                row = next(cells, None)
            except csv.Error as error:
                yield where, UnreadableRecord(f"not CSV ({error})")
                continue
            if row is None:
                return
            if row:
                yield where, _csv_record(names, row)


def _csv_record(names: list[str], row: list[str]) -> Any:
    if len(row) != len(names):
        return UnreadableRecord(f"{len(row)} cells where the header has {len(names)}")
    return {name: _cell(cell) for name, cell in zip(names, row, strict=True)}


def _cell(cell: str) -> Any:
    if not cell.isascii() and any("\udc80" <= char <= "\udcff" for char in cell):
        return UnreadableValue("is not UTF-8")
    return cell


_READERS: dict[str, Callable[[Path], Records]] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}
