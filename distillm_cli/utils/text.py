"""Format text for output: numbers, printable characters, addresses without credentials. Imports no slow modules."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

# C0 and C1 controls but tab and newline, line and paragraph separators, bidirectional overrides and isolates.
_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
HIDDEN = "***"
_COLUMNS_LISTED = 8
# One slash is enough: a path removes the second. Quotes end an address in JSON and YAML.
_USER = re.compile(r"""\b([a-z][a-z0-9+.-]+:/{1,2})[^\s/?#"'<>]*@""", re.IGNORECASE)
_SECRET = re.compile(
    r"""([?&;][\w.%-]*(?:token|key|secret|passw|pwd|sig|auth|cred|session|user|login)[\w.%-]*=)[^\s&;#"'<>]+""",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """Replace credentials in the addresses of a text: user and password, and parameters such as ``token=…``."""
    if ":/" not in text and "=" not in text:
        return text
    return _SECRET.sub(rf"\1{HIDDEN}", _USER.sub(rf"\1{HIDDEN}@", text))


def counted(n: int, noun: str) -> str:
    """Return a count with its noun, given in the singular: "1 row", "1,000 rows"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def all_are(n: int, noun: str) -> str:
    """Return the beginning of a sentence about all items: "its one row is", "all 1,000 rows are"."""
    return f"its one {noun} is" if n == 1 else f"all {n:,} {noun}s are"


def signed(change: float, digits: int) -> str:
    """Format a difference with its sign, or ± if it is rounded to zero: "+0.006", "−1.500", "±0.000"."""
    size = f"{abs(change):.{digits}f}"
    sign = "±" if float(size) == 0 else "−" if change < 0 else "+"
    return sign + size


def format_count(number: float) -> str:
    """Format a number: in full up to 9,999, beyond that three digits and a unit ("226 k", "1.56 G")."""
    size = abs(number)
    if size < 9999.5:
        return f"{number:,.0f}"
    units = iter("kMGT")
    unit = ""
    while size >= 999.5 and unit != "T":
        size = size / 1000
        number = number / 1000
        unit = next(units)
    digits = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{number:.{digits}f} {unit}"


def format_bytes(count: float) -> str:
    """Format a number of bytes as ``format_count`` does: "3,200 B", "1.56 GB"."""
    text = format_count(count)
    return f"{text}B" if text[-1].isalpha() else f"{text} B"


def format_parameters(count: int) -> str:
    """Format a number of weights, in billions rather than giga: "226 k parameters", "1.56 B parameters"."""
    return f"{format_count(count).replace('G', 'B')} parameters"


def format_duration(seconds: float) -> str:
    """Format a duration: "1:05", "2:03:11", "3 days 4 h"."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def format_percent(share: float) -> str:
    """Format a share as whole percents. Only shares of exactly 0 and 1 become 0% and 100%."""
    whole = round(share * 100)
    if 0 < share < 1:
        whole = min(max(whole, 1), 99)
    return f"{whole}%"


def listed_shares(shares: Mapping[str, float]) -> str:
    """Return the names of columns with their shares of rows: "id (100 % of rows), source (40 %)"."""
    listed = list(shares.items())[:_COLUMNS_LISTED]
    texts = [f"{name} ({share * 100:.0f} %{'' if i else ' of rows'})" for i, (name, share) in enumerate(listed)]
    more = len(shares) - len(listed)
    return ", ".join(texts) + (f", and {more} more" if more else "")


@overload
def json_value(value: Mapping[str, object]) -> dict[str, Any]: ...
@overload
def json_value(value: object) -> object: ...
def json_value(value: object) -> object:
    """Convert a value for JSON: keys and paths to text, numbers that are not finite to null."""
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def printable(text: str) -> str:
    """Replace control characters, escape sequences and overrides of the writing direction by �. Newlines and tabs stay."""
    return _CONTROL_CHARACTERS.sub("�", text)


def escaped(line: str) -> str:
    """Escape control characters in a line of JSON without changing its value."""
    return _CONTROL_CHARACTERS.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


def described_source(figures: Mapping[str, Any]) -> str:
    """Return the figures of a source as text: "g2p 25% (500 of 2,000 rows)"."""
    rows, count = figures["rows"], figures["rows_per_epoch"]
    times = f"{count:,} of {rows:,} rows" if count <= rows else f"{rows:,} rows, {count / rows:.3g} times"
    return f"{figures['source']} {figures['share']:.1%} ({times})"
