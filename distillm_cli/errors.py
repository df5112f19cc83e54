"""Define the errors. Each class has an exit code; each message names the problem, the place, and a solution to try.

Exit codes are part of the interface for scripts:
0 done · 1 unexpected · 2 usage or recipe · 3 data · 4 model or tokenizer · 5 checkpoint · 6 non-finite numbers ·
7 out of memory · 8 storage · 9 a peer process died · 10 a server · 11 an alarm ·
129/130/143 interrupted (SIGHUP, Ctrl-C, SIGTERM).
"""

from __future__ import annotations

import errno
import re
import sys

from distillm_cli.utils.text import redact

# The hint if a run cannot be resumed. A pipeline, which has no --overwrite, uses another one.
START_OVER = "start over with --overwrite"

# Messages of a plain RuntimeError that report a lack of memory: from torch's allocators and mmap; from Python, for a
# thread's stack; from oneDNN, for compiled code (for an unsupported operation its message has "a primitive descriptor");
# from cuBLAS and cuDNN, which allocate memory of their own on a GPU that torch has filled.
_OUT_OF_MEMORY = re.compile(
    "allocate memory|not enough memory|out of memory|can't start new thread|failed to map segment"
    "|could not create a primitive(?! desc)|_status_alloc_failed"
)


class DistillmError(Exception):
    """Report an error to the user. The base of all other errors.

    code: the area and the problem (``data.row_too_long``), which stay the same when a message is reworded; the codes are
    listed in ``docs/troubleshooting.md``. what: the problem, with the offending value. where: file and line, or the recipe
    key. hint: a solution to try. ``str(error)`` is one line, ``what; where; hint``, without the parts that are None.
    """

    exit_code = 1

    def __init__(self, code: str, what: str, *, where: str | None = None, hint: str | None = None):
        self.code = code
        self.what = redact(what)
        self.where = None if where is None else redact(where)
        self.hint = None if hint is None else redact(hint)
        parts = (" ".join(part.split()) for part in (self.what, self.where, self.hint) if part)
        super().__init__("; ".join(parts))

    def __reduce__(self) -> tuple[object, ...]:
        # Exception would call the class with the message alone when the error comes from another process.
        return _new_error, (type(self), *self.args), self.__dict__


def _new_error(cls: type[DistillmError], *args: object) -> DistillmError:
    return cls.__new__(cls, *args)


class UsageError(DistillmError):
    """Report a flag, a combination of flags, or an output directory that cannot be used."""

    exit_code = 2


class RecipeError(UsageError):
    """Report a recipe that does not parse or validate, with the file, the key and the value.

    problems: all errors of a recipe that has several, the first included.
    """

    def __init__(
        self,
        code: str,
        what: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        problems: tuple[RecipeError, ...] = (),
    ):
        super().__init__(code, what, where=where, hint=hint)
        self.problems = problems or (self,)


class DataError(DistillmError):
    """Report a problem with a data source, a row or a column, or an empty set."""

    exit_code = 3


class ModelError(DistillmError):
    """Report a model or tokenizer that is missing, invalid, or incompatible with the other model."""

    exit_code = 4


class CheckpointError(DistillmError):
    """Report a checkpoint that is damaged, missing, or from another recipe."""

    exit_code = 5


class NonFiniteError(DistillmError):
    """Report a loss or gradient that is not finite."""

    exit_code = 6


class OutOfMemoryError(DistillmError):
    """Report that host or device memory ran out."""

    exit_code = 7


class StorageError(DistillmError):
    """Report a disk that is full, read-only, or failing."""

    exit_code = 8


class PeerProcessError(DistillmError):
    """Report that another process of the run died."""

    exit_code = 9


class ServerError(DistillmError):
    """Report a server that cannot be reached, fails, or does not serve what the run needs."""

    exit_code = 10


class AlarmError(DistillmError):
    """Report that an alarm stopped the run (``train.on_alarm``), after a checkpoint was saved."""

    exit_code = 11


class Interrupted(DistillmError):
    """Report that a signal stopped the run after the current step. The exit code is 128 + the signal's number."""

    def __init__(self, what: str, *, signal_number: int, where: str | None = None, hint: str | None = None):
        super().__init__("interrupted", what, where=where, hint=hint)
        self.exit_code = 128 + signal_number


class CtrlC(KeyboardInterrupt):
    """Report Ctrl-C.

    When a plain KeyboardInterrupt passes through ``exec``, which imports use to define data classes, ``python -m`` ends by
    the signal, whatever the exit code.
    """


class Terminated(KeyboardInterrupt):
    """Report SIGTERM, as a KeyboardInterrupt so that ``except Exception`` does not catch it."""


class Hangup(KeyboardInterrupt):
    """Report SIGHUP, in the same way as SIGTERM: the terminal was closed."""


def signal_number(stop: KeyboardInterrupt) -> int:
    """Return the number of the signal that raised this."""
    if isinstance(stop, Terminated):
        return 15
    return 1 if isinstance(stop, Hangup) else 2


def typed_options(argv: list[str]) -> list[str]:
    """Return the arguments of a command line that may be options: those before ``--``."""
    return argv[: argv.index("--")] if "--" in argv else argv


def is_tokenizer_failure(error: BaseException) -> bool:
    """Return whether a tokenizer failed inside its library, which is written in Rust.

    It raises a panic, which is not an Exception, or a bare Exception, which nothing else raises.
    """
    return type(error) is Exception or type(error).__name__ == "PanicException"


def out_of_memory(error: BaseException) -> bool:
    """Return whether the error reports that host or device memory ran out."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    torch = sys.modules.get("torch")  # not imported for this check
    if torch is not None and isinstance(error, getattr(torch, "OutOfMemoryError", ())):
        return True
    # ImportError: a library for which there is not enough memory.
    message = str(error).lower() if isinstance(error, RuntimeError | ImportError) else ""
    return _OUT_OF_MEMORY.search(message) is not None
