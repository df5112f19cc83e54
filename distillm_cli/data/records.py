"""Read the columns of a record and check their values."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


class BadRow(ValueError):
    """Report an invalid record. The caller adds the file and line."""


@dataclass(frozen=True, slots=True)
class UnreadableValue:
    """Replace a value that could not be converted, which is an error only if the column is read.

    reason: "is not UTF-8".
    """

    reason: str


@dataclass(frozen=True, slots=True)
class NotConverted:
    """Replace the value of a column that no format reads. The value exists and was not converted."""


class Record:
    """Hold the columns of one record, and track which were read."""

    __slots__ = ("read", "values")

    def __init__(self, values: dict[str, Any]):
        self.values = values
        self.read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def has(self, name: str) -> bool:
        """Return whether the column exists and is not null."""
        return self.values.get(name) is not None

    def take(self, name: str) -> Any:
        """Return a column's value, or None, and record that it was read. Raises BadRow."""
        self.read.add(name)
        value = self.values.get(name)
        if isinstance(value, UnreadableValue):
            raise BadRow(f"column `{name}` {value.reason}")
        return value

    def text(self, name: str) -> str:
        """Return the text of a column. Raises BadRow if it is not text."""
        value = self.take(name)
        if not isinstance(value, str):
            raise BadRow(f"column `{name}` must be text, found {kind(value)}")
        return valid_text(value, f"column `{name}`")

    def decoded(self, name: str) -> Any:
        """Return the value of a column that may hold JSON as text; None if it is blank. Raises BadRow."""
        value = self.take(name)
        if not isinstance(value, str):
            return value
        return decode_json(value, f"column `{name}`") if value.strip() else None

    def names(self) -> str:
        """Return the names of all columns, for an error."""
        return ", ".join(f"`{name}`" for name in self.values) or "no columns"


def kind(value: Any) -> str:
    """Describe a JSON value for an error: "null", "a number (42)", "a list"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"a number ({str(value)[:20]})"
    return {str: "text", list: "a list", dict: "an object"}.get(type(value), f"a {type(value).__name__}")


def valid_text(text: str, name: str) -> str:
    """Return the text. Raises BadRow if it cannot be encoded as UTF-8."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # JSON can contain half of a surrogate pair, which no tokenizer accepts
            raise BadRow(f"{name} has half of a character (a lone surrogate)") from None
    return text


def decode_json(text: str, name: str) -> Any:
    """Return the value of JSON text. Raises BadRow."""
    try:
        return json.loads(text)
    except RecursionError:
        raise BadRow(f"{name} is not JSON (nested too deeply)") from None
    except ValueError as error:
        raise BadRow(f"{name} is not JSON ({error})") from None
