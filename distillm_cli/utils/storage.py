"""Write files and directories atomically, lock and remove them, and report errors of the file system.

Imports no slow modules. Names that begin with ``.staging-`` or ``.old-`` are reserved: a process that is killed leaves
only such names behind, and they are not read.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import itertools
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from distillm_cli.errors import DistillmError, StorageError

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None  # type: ignore[assignment]  # a module cannot be declared optional

ASSETS = Path(__file__).resolve().parent.parent / "assets"  # models and data shipped with this package
PROBE = ".writable-"  # prefix of the name of a probe, if it has a name
STAGING = ".staging-"  # prefix of names of files that are being written
REMOVED = ".old-"  # prefix of names of files that are being removed

_FULL_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Errors of sockets, pipes and processes. All other errors of an OSError are the file system's.
_NOT_FILE_ERRORS = frozenset(
    getattr(errno, name)
    for name in (
        "EPIPE", "EINTR", "EAGAIN", "ECHILD", "ESRCH", "ENOMEM", "ENOEXEC", "ENOTTY",
        "ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "EADDRINUSE", "EADDRNOTAVAIL", "ENETUNREACH", "ENETDOWN",
        "EHOSTUNREACH", "ENOTSOCK", "ENOTCONN", "EISCONN", "EAFNOSUPPORT", "EPROTONOSUPPORT", "EDESTADDRREQ",
    )
    if hasattr(errno, name)
)  # fmt: skip
# Error numbers in messages of libraries that raise no OSError: tokenizers and safetensors (Rust, two forms), pyarrow.
_ERROR_NUMBER = re.compile(r"\(os error (\d+)\)|\bOs \{ code: (\d+)|\[errno (\d+)\]", re.I)


# --- errors ---------------------------------------------------------------------------------------------------------


@contextmanager
def storing(what: str, hint: str, *, hint_if_full: str | None = None) -> Iterator[None]:
    """Turn the file system's errors, also those in messages of libraries, into StorageError.

    what: "cannot write FILE". hint_if_full: the hint if the disk is full.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DistillmError) or os_error_number(error) is None:
            raise
        raise storage_error(error, what, hint, hint_if_full=hint_if_full) from error


def storage_error(error: BaseException, what: str, hint: str, *, hint_if_full: str | None = None) -> StorageError:
    """Return the StorageError for an error that the file system reported."""
    if hint_if_full is not None and is_full(os_error_number(error)):
        hint = hint_if_full
    return StorageError("storage.failed", f"{what}: {reason(error)}", hint=hint)


def os_error_number(error: BaseException) -> int | None:
    """Return the number of the file system's error that this exception reports; None if it reports none."""
    if isinstance(error, OSError) and error.errno is not None:
        number = error.errno
    elif found := _ERROR_NUMBER.search(str(error)):
        number = int(next(filter(None, found.groups())))
    else:
        return None
    return None if number in _NOT_FILE_ERRORS else number


def is_full(number: int | None) -> bool:
    """Return whether an error number means a full disk, an exceeded quota, or a limit on file sizes."""
    return number in _FULL_DISK_ERRORS


def reason(error: BaseException) -> str:
    """Return the file system's description of an error: "No space left on device"."""
    number = os_error_number(error)
    return getattr(error, "strerror", None) or (os.strerror(number) if number is not None else str(error))


# --- writing --------------------------------------------------------------------------------------------------------


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file atomically and flush it: it is complete or absent if the process is killed. Raises OSError."""
    staged = path.with_name(f"{STAGING}{path.name}")
    try:
        staged.write_bytes(content if isinstance(content, bytes) else content.encode())
        flush(staged)
        staged.replace(path)
    except OSError as error:
        with suppress(OSError):
            staged.unlink()
        error.filename = str(path)  # a failed write names no file, or the staged one
        raise


@contextmanager
def staging_directory(final: Path) -> Iterator[Path]:
    """Yield an empty directory next to ``final``, which need not exist, and remove it when the block ends."""
    staged = final.with_name(f"{STAGING}{final.name}-{os.getpid()}")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Yield a directory to fill that replaces ``final`` when the block ends.

    The caller flushes the files in it. If the block or the renaming fails, ``final`` is unchanged. If another process
    has created ``final`` in the meantime, that directory remains.
    """
    with staging_directory(final) as staged:
        yield staged
        replaced = _rename_aside(final)
        try:
            staged.rename(final)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                if replaced is not None:
                    replaced.rename(final)
                raise
        flush(final.parent)
        if replaced is not None:
            _delete(replaced)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex, read from the disk."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex. A process computes it again only after the file has changed."""
    found = path.stat()
    return _known_sha256(path, found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=1024)
def _known_sha256(path: Path, *_: int) -> str:
    return file_sha256(path)


def flush(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reserve_space(descriptor: int, size: int) -> None:
    """Give an open file, which will be mapped into memory, its size. Raises OSError if the space is not there.

    A file that is only as large as asked for ends the process (SIGBUS) if the space runs out at a write.
    """
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def move_into(directory: Path, files: list[Path]) -> None:
    """Move files into a directory, one by one. A file of the same name is replaced."""
    directory.mkdir(exist_ok=True)
    for path in files:
        path.replace(directory / path.name)


# --- removing -------------------------------------------------------------------------------------------------------


def remove(path: Path) -> OSError | None:
    """Remove a file, or a directory with its contents, so that a kill leaves no incomplete directory under its name.

    A directory is renamed first, to a name that ``sweep`` deletes. Returns the error if something could not be removed;
    the name may be free even then (``os.path.lexists(path)``).
    """
    try:
        if path.is_dir() and not path.is_symlink():
            aside = _rename_aside(path)
            if aside is not None:
                shutil.rmtree(aside)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        return error
    return None


def _rename_aside(path: Path) -> Path | None:
    """Rename a file or directory to a reserved name, and return that; None if it does not exist."""
    names = (path.with_name(f"{REMOVED}{path.name}{n}") for n in itertools.chain([""], itertools.count(1)))
    aside = next(name for name in names if not os.path.lexists(name))
    try:
        path.rename(aside)
    except FileNotFoundError:
        return None
    return aside


def _delete(path: Path) -> None:
    """Delete a file or directory. Files that cannot be deleted are left."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


def leftovers(directory: Path, name: str = "") -> Iterator[Path]:
    """Yield files and directories left by killed processes, for all names or for one."""
    for prefix in (STAGING, REMOVED):
        yield from directory.glob(f"{prefix}{glob.escape(name)}*")


def sweep(directory: Path, name: str = "") -> None:
    """Delete ``leftovers``. Those that cannot be deleted are left for the next call."""
    for leftover in list(leftovers(directory, name)):
        _delete(leftover)


# --- locks and paths ------------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, busy: Callable[[], None]) -> Iterator[bool]:
    """Lock a directory, or a file, which is created, against other processes until the block ends.

    busy: called if another process holds the lock. If it returns, this call waits for the lock. The lock is released
    when its process ends. Yields False if this file system does not support locks.
    """
    if fcntl is None:
        yield False
        return
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags, 0o666)
    try:
        yield _lock(descriptor, busy)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, busy: Callable[[], None]) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        pass
    except OSError:
        return False
    busy()
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return True


def is_locked(path: Path) -> bool | None:
    """Return whether another process holds the lock of a directory; None if this file system does not support locks.

    It is tried with a shared lock for an instant.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def cache_root(kind: str, directory: str | None) -> Path:
    """Return the directory of the caches of a kind: ``directory`` if it is given, else the user's."""
    if directory is not None:
        return Path(directory).expanduser()
    return Path(os.environ.get("DISTILLM_CACHE") or Path.home() / ".cache" / "distillm").expanduser() / kind


def check_writable(directory: Path) -> None:
    """Create a temporary file without a name in the directory. Raises OSError if that fails."""
    import tempfile

    with tempfile.TemporaryFile(prefix=PROBE, dir=directory):
        pass


def nearest_directory(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def is_broken_link(path: Path) -> bool:
    """Return whether the path is a symbolic link to a path that does not exist, or to itself."""
    try:
        return path.is_symlink() and not path.exists()
    except OSError:  # a name that is too long is not a link
        return False


def discard_stdout() -> None:
    """Redirect stdout to /dev/null, so that flushing its buffer at exit does not fail and change the exit code."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        sys.stdout.flush()


def is_closed_terminal(error: OSError) -> bool:
    """Return whether writing to stdout failed because its terminal was closed, which is not a disk error."""
    try:
        return error.errno == errno.EIO and stat.S_ISCHR(os.fstat(sys.stdout.fileno()).st_mode)
    except (OSError, ValueError):
        return False
