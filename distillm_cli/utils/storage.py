"""Classify errors of the disk, and remove files. Used everywhere; loads nothing slow."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
from pathlib import Path

PROBE = ".writable-"  # begins the name of a probe, where it has a name
REMOVED = ".old-"  # begins the name of what is being removed

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Errors of sockets, pipes and processes; every other one of an OSError is the file system's.
_OF_NO_FILE = frozenset(
    getattr(errno, name)
    for name in (
        "EPIPE", "EINTR", "EAGAIN", "ECHILD", "ESRCH", "ENOMEM", "ENOEXEC", "ENOTTY",
        "ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "EADDRINUSE", "EADDRNOTAVAIL", "ENETUNREACH", "ENETDOWN",
        "EHOSTUNREACH", "ENOTSOCK", "ENOTCONN", "EISCONN", "EAFNOSUPPORT", "EPROTONOSUPPORT", "EDESTADDRREQ",
    )
    if hasattr(errno, name)
)  # fmt: skip
# How libraries report one without an OSError: tokenizers and safetensors (Rust, two forms), pyarrow.
_REPORTED = re.compile(r"\(os error (\d+)\)|\bOs \{ code: (\d+)|\[errno (\d+)\]", re.I)


def failed_with(error: BaseException) -> int | None:
    """Return the number of the file system's error that this exception reports; None where it reports none."""
    if isinstance(error, OSError) and error.errno is not None:
        number = error.errno
    elif found := _REPORTED.search(str(error)):
        number = int(next(filter(None, found.groups())))
    else:
        return None
    return None if number in _OF_NO_FILE else number


def is_full(number: int) -> bool:
    """Return whether room is what lacks: on the disk, in a quota, under a limit of the size of files."""
    return number in _FULL


def reason(error: BaseException) -> str:
    """Return what the file system reported, in its words: "No space left on device"."""
    number = failed_with(error)
    return getattr(error, "strerror", None) or (os.strerror(number) if number is not None else str(error))


def remove(path: Path) -> OSError | None:
    """Remove a directory and all in it, so that a process that is killed meanwhile leaves no half of it under its name.

    It is renamed first, to a name that ``sweep`` knows. Return the error where something could not be removed; whether the
    name is free then, ``path.exists()`` shows.
    """
    try:
        names = (path.with_name(f"{REMOVED}{path.name}{n}") for n in itertools.chain([""], itertools.count(1)))
        aside = next(name for name in names if not os.path.lexists(name))
        path.rename(aside)
        shutil.rmtree(aside)
    except OSError as error:
        return error
    return None


def sweep(directory: Path, *patterns: str) -> None:
    """Remove what killed processes left in a directory: parts of removed directories, and ``patterns``.

    What cannot be removed is left for the next time.
    """
    for pattern in (f"{REMOVED}*", *patterns):
        for leftover in directory.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def check_writable(directory: Path) -> None:
    """Create a file without a name in the directory; raise OSError where that fails. Nothing is left, even by a kill."""
    import tempfile

    with tempfile.TemporaryFile(prefix=PROBE, dir=directory):
        pass


def leads_nowhere(path: Path) -> bool:
    """Return whether the path is a symbolic link to nothing, or to itself."""
    try:
        return path.is_symlink() and not path.exists()
    except OSError:  # a name that is too long is no link
        return False
