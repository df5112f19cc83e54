"""Check the values of a row's columns."""

from __future__ import annotations

import json
from typing import Any


class BadRow(ValueError):
    """Say what is wrong with a record, without the place: the caller knows it."""


def kind(value: Any) -> str:
    """Name a JSON value in an error: "null", "a number (42)", "a list"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"a number ({str(value)[:20]})"
    return {str: "text", list: "a list", dict: "an object"}.get(type(value), f"a {type(value).__name__}")


def valid_text(text: str, name: str) -> str:
    """Return the text. Raises BadRow where it cannot be encoded as UTF-8."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; no tokenizer takes it
            raise BadRow(f"{name} holds half of a character (a lone surrogate)") from None
    return text


def decode_json(text: str, name: str) -> Any:
    """Return the value of a column that holds JSON as text. Raises BadRow."""
    try:
        return json.loads(text)
    except RecursionError:
        raise BadRow(f"column `{name}` is not JSON (nested too deeply)") from None
    except ValueError as error:
        raise BadRow(f"column `{name}` is not JSON ({error})") from None
