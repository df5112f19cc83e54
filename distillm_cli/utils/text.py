"""Format text for people: numbers, printable characters, addresses without credentials. Loads nothing slow."""

from __future__ import annotations

import re

# C0 and C1 controls but tab and newline, line and paragraph separators, bidirectional overrides and isolates.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
HIDDEN = "***"
# One slash too: a path takes the other one away. Not beyond quotes, which end an address in JSON and YAML.
_USER = re.compile(r"""\b([a-z][a-z0-9+.-]+:/{1,2})[^\s/?#"'<>]*@""", re.IGNORECASE)
_SECRET = re.compile(
    r"""([?&;][\w.%-]*(?:token|key|secret|passw|pwd|sig|auth|cred|session|user|login)[\w.%-]*=)[^\s&;#"'<>]+""",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """Replace what gives access in the addresses of a text: user and password, and parameters such as ``token=…``."""
    if ":/" not in text and "=" not in text:
        return text
    return _SECRET.sub(rf"\1{HIDDEN}", _USER.sub(rf"\1{HIDDEN}@", text))


def counted(n: int, noun: str) -> str:
    """A count with its noun, given in the singular: "1 row", "1,000 rows"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def all_are(n: int, noun: str) -> str:
    """The beginning of what is wrong with all of them: "its one row is", "all 1,000 rows are"."""
    return f"its one {noun} is" if n == 1 else f"all {n:,} {noun}s are"


def signed(change: float, digits: int) -> str:
    """A difference with its sign, which one that is seen as nothing does not have: "+0.006", "−1.500", "±0.000"."""
    size = f"{abs(change):.{digits}f}"
    sign = "±" if float(size) == 0 else "−" if change < 0 else "+"
    return sign + size


def printable(text: str) -> str:
    """Replace what would command a terminal (control characters, escape sequences, overrides of the writing direction)
    by �. Newlines and tabs stay."""
    return _COMMANDS.sub("�", text)


def escaped(line: str) -> str:
    """Escape what would command a terminal in a line of JSON; it stays JSON of the same value."""
    return _COMMANDS.sub(lambda found: f"\\u{ord(found[0]):04x}", line)
