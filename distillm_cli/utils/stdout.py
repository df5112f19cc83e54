"""Write results to stdout: text, one JSON object, or rows of JSON lines. Imports no slow modules.

Everything that a command prints as its result goes through ``write_rendered``. It raises the interrupt that arrived during
an import, so that a result and an error are never printed both, and flushes. A closed pipe raises BrokenPipeError, a closed
terminal discards the text, and any other failure, such as a full disk, raises StorageError.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping

from distillm_cli.utils.signals import raise_delayed
from distillm_cli.utils.storage import discard_stdout, is_closed_terminal, storage_error
from distillm_cli.utils.text import escaped, json_value, printable


def write_rendered(text: str) -> None:
    """Write text that is rendered for this stdout, control sequences of a terminal included, and flush."""
    raise_delayed()
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        if is_closed_terminal(error):
            discard_stdout()
            return
        hint = "free disk space; files that the command wrote are complete"
        raise storage_error(error, "cannot write the result to standard output", hint) from error


def write_stdout(text: str) -> None:
    """Write text: unchanged to files and pipes, without control characters to a terminal."""
    write_rendered(printable(text) if sys.stdout.isatty() else text)


def write_json(value: Mapping[str, object]) -> None:
    """Write an object as one line of ASCII, for any locale. Numbers that are not finite become null."""
    write_rendered(json.dumps(json_value(value), allow_nan=False) + "\n")


def write_rows(rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows, one JSON object per line; in ASCII if stdout is not UTF-8."""
    ascii_only = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    write_rendered("".join(escaped(json.dumps(row, ensure_ascii=ascii_only) + "\n") for row in rows))
