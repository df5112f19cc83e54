"""Make the standard streams safe to write to, and print errors on them. Imports nothing slow."""

from __future__ import annotations

import io
import json
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from distillm_cli.errors import DistillmError, typed_options
from distillm_cli.utils.storage import discard_stdout
from distillm_cli.utils.text import printable

LONGEST_ERROR = 1000  # characters of an error line
_PATIENCE = 1.0  # seconds to wait for a non-blocking stderr that is full


class _SafeStream(io.RawIOBase):
    """Wrap a file so that writes never fail: output that cannot be written is dropped."""

    def __init__(self, file: io.RawIOBase):
        self._file = file
        self._patience = _PATIENCE

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def isatty(self) -> bool:
        return self._file.isatty()

    def write(self, data: Any) -> int:
        with suppress(OSError, ValueError):  # a full disk, a closed pipe, a closed terminal
            written = self._file.write(data)
            if written is None:  # non-blocking, and full
                select.select([], [self._file], [], self._patience)
                written = self._file.write(data)
            self._patience = 0 if written is None else _PATIENCE  # wait once, not at every write
            return len(data) if written is None else written
        return len(data)


def open_streams() -> None:
    """Make the standard streams usable, in any state in which they were inherited.

    Closed streams are replaced by /dev/null. Writes to the process's own stderr never fail. Characters that an output's
    encoding lacks are escaped (``\\u03c6``).
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
        elif mode == "w" and isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    if sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper):
        raw: Any = getattr(sys.stderr.buffer, "raw", sys.stderr.buffer)  # under PYTHONUNBUFFERED there is no buffer
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(_SafeStream(raw)),
            encoding=sys.stderr.encoding,
            errors=sys.stderr.errors,
            line_buffering=True,
        )


@contextmanager
def muted() -> Iterator[None]:
    """Discard what is printed in the block."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def report(error: DistillmError, argv: list[str]) -> int:
    """Print one line on stderr, and with ``--json`` one object on stdout. Return the exit code.

    ``--debug`` adds the error's own code to the line. The exit code does not change if a stream cannot be written.
    """
    message = str(error)
    options = typed_options(argv)
    print_error(message, f"error [{error.code}]" if "--debug" in options else "error")
    try:
        if "--json" in options:
            print(json.dumps({"status": "error", "code": error.exit_code, "error": error.code, "message": message}))
        sys.stdout.flush()
    except OSError:
        discard_stdout()
    return error.exit_code


def print_error(message: str, kind: str = "error") -> None:
    """Print the line of an error, or of a warning, on stderr."""
    with suppress(OSError):
        print(f"{kind}: {printable(shortened(message, LONGEST_ERROR))}", file=sys.stderr)


def shortened(text: str, length: int) -> str:
    """Return at most ``length`` characters: the start and the end of the text, which have the cause and the remedy."""
    if len(text) <= length:
        return text
    tail = (length - 3) // 2
    return f"{text[: length - 3 - tail]} … {text[-tail:]}"
