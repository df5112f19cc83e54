"""Define the errors. Each has its exit code; each message names what, where, and what to try.

Exit codes are part of what scripts rely on:
0 done · 1 unexpected · 2 usage or recipe · 3 data · 4 model or tokenizer · 5 checkpoint · 6 non-finite numbers ·
7 out of memory · 8 storage · 9 a peer process died · 129/130/143 interrupted (SIGHUP, Ctrl-C, SIGTERM).
"""

from __future__ import annotations

import errno
import re
import sys

from distillm_cli.utils.text import redact

# What to type where a run cannot be resumed. A pipeline, which has no --overwrite, puts its own advice in its place.
START_OVER = "start over with --overwrite"

# How a plain RuntimeError says that memory ran out: torch's allocators and its mmap; Python, without room for a stack;
# oneDNN, without room for compiled code (of a product that it cannot do at all it says "a primitive descriptor"); cuBLAS
# and cuDNN, which take memory for themselves on a GPU that torch has filled.
_MEMORY = re.compile(
    "allocate memory|not enough memory|out of memory|can't start new thread|failed to map segment"
    "|could not create a primitive(?! desc)|_status_alloc_failed"
)


class DistillmError(Exception):
    """Base of every error a person may cause or meet.

    what: the fact, with the offending value. where: file and line, or the recipe key. hint: what to try.
    ``str(error)`` is one line, ``what; where; hint``, with the absent parts left out.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None):
        what, where, hint = (None if part is None else redact(part) for part in (what, where, hint))
        self.what, self.where, self.hint = what, where, hint
        parts = (" ".join(part.split()) for part in (what, where, hint) if part)
        super().__init__("; ".join(parts))


class UsageError(DistillmError):
    """A flag, a combination of flags, or an output directory that cannot be used."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that does not parse or validate; names the file, the key, the value."""


class DataError(DistillmError):
    """A source, a row, a column, an empty set."""

    exit_code = 3


class ModelError(DistillmError):
    """A model or tokenizer: not found, not a model, or a pair that does not fit."""

    exit_code = 4


class CheckpointError(DistillmError):
    """A checkpoint: damaged, missing, or of another recipe."""

    exit_code = 5


class NonFiniteError(DistillmError):
    """A loss or gradient that is not a number any more."""

    exit_code = 6


class OutOfMemoryError(DistillmError):
    """Host or device memory ran out."""

    exit_code = 7


class StorageError(DistillmError):
    """A disk that is full, read-only, or failing."""

    exit_code = 8


class PeerProcessError(DistillmError):
    """Another rank of a distributed run died."""

    exit_code = 9


class Interrupted(DistillmError):
    """A signal asked the run to stop; it did, after the step in hand. 128 + the signal's number."""

    def __init__(self, what: str, *, signal_number: int, where: str | None = None, hint: str | None = None):
        super().__init__(what, where=where, hint=hint)
        self.exit_code = 128 + signal_number


class CtrlC(KeyboardInterrupt):
    """Ctrl-C. A kind of its own: of a plain KeyboardInterrupt that comes through ``exec`` of a text, with which imports make
    their data classes, ``python -m`` remembers that it came, and ends by the signal, whatever the exit code."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as Ctrl-C comes: at once, through every ``finally``, past every ``except Exception``."""


class Hangup(KeyboardInterrupt):
    """Report SIGHUP, as SIGTERM: the terminal was closed."""


def signal_number(stop: KeyboardInterrupt) -> int:
    """Return the number of the signal that raised this."""
    return 15 if isinstance(stop, Terminated) else 1 if isinstance(stop, Hangup) else 2


def typed_options(argv: list[str]) -> list[str]:
    """The words of a command line that may be options: those before ``--``."""
    return argv[: argv.index("--")] if "--" in argv else argv


def is_tokenizer_failure(error: BaseException) -> bool:
    """Return whether a tokenizer failed inside its library, written in Rust: by a panic, which is no Exception, or by a bare
    Exception, which nothing else raises."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


def out_of_memory(error: BaseException) -> bool:
    """Whether memory, the machine's or a device's, is what ran out."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    torch = sys.modules.get("torch")  # never imported just to ask
    if torch is not None and isinstance(error, getattr(torch, "OutOfMemoryError", ())):
        return True
    # ImportError: a library that there is no room for.
    said = str(error).lower() if isinstance(error, RuntimeError | ImportError) else ""
    return _MEMORY.search(said) is not None
