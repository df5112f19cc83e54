"""Keep what was read or tokenized once in a directory on disk, from which every later run maps it.

    KIND-KEY/        KEY: start of the SHA-256 of everything that the content depends on
      *.bin          arrays
      store.json     format, whole key, size and SHA-256 of each file, and the facts about them

A store is written by one process, under a lock, to a temporary directory that is flushed and renamed, so it is complete or
absent. Its files are checked before they are used. A store that is damaged, or of another key, is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from distillm_cli.errors import StorageError
from distillm_cli.training.events import Listener, Note, Warned
from distillm_cli.utils.storage import atomic_directory, flush, known_sha256, locked, storing, sweep

STORE_FORMAT = 1
STORE_FILE = "store.json"
_ALTERNATIVES = "choose another --set data.store_dir=DIR, or --set data.store=off"
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "numpy")  # whose versions may change rows or token ids


class _Unusable(Exception):
    """Describe why the directory of a store cannot be used."""


@dataclass(frozen=True)
class Store:
    """Hold an open store. facts: what its maker returned."""

    directory: Path
    key: str
    facts: dict[str, Any]


def mapped(path: Path, dtype: Any) -> np.ndarray:
    """Return the array in a file, memory-mapped and read-only, so that processes share one copy."""
    if not path.stat().st_size:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def key_of(*parts: object) -> str:
    """Return the SHA-256 of everything that a store depends on, this package's code and its libraries included."""
    described = json.dumps([STORE_FORMAT, _code_digest(), *parts], sort_keys=True, default=str)
    return hashlib.sha256(described.encode()).hexdigest()


def open_or_make(
    root: Path, kind: str, key: str, make: Callable[[Path], dict[str, Any]], listener: Listener, *, what: str
) -> Store:
    """Return the store of this kind and key, which is made first if it does not exist or cannot be used.

    make: writes the files into an empty directory and returns facts, as JSON. what: its content, for messages. Another
    process that makes the same store is waited for. Raises StorageError if it cannot be written.
    """
    directory = root / f"{kind}-{key[:32]}"
    try:
        return _open(directory, key)
    except _Unusable as error:
        problem = str(error)
    if directory.exists():
        listener(Warned(f"the stored {what} in {directory} cannot be used ({problem}): making them again"))

    def busy() -> None:
        listener(Note(f"another process stores the {what} in {directory}: waiting"))

    with _storing(directory):
        root.mkdir(parents=True, exist_ok=True)
        with locked(directory.with_name(f".{directory.name}.lock"), busy) as is_alone:
            try:
                return _open(directory, key)  # made while this process waited
            except _Unusable:
                pass
            _check_nothing_else(directory)
            if is_alone:
                sweep(root, directory.name)
            with atomic_directory(directory) as staged:
                facts = make(staged)
                _write_metadata(staged, key, facts)
    listener(Note(f"stored the {what} in {directory}"))
    try:
        return _open(directory, key)
    except _Unusable as error:
        raise StorageError(
            "storage.failed", f"the stored {what} in {directory} cannot be read back ({error})", hint=_ALTERNATIVES
        ) from None


def fingerprint(paths: Iterable[Path]) -> list[tuple[str, str]]:
    """Return the name and the SHA-256 of each file."""
    return [(path.name, known_sha256(path)) for path in paths]


def _open(directory: Path, key: str) -> Store:
    """Return an existing store, after its files were compared with their SHA-256. Raises _Unusable."""
    try:
        metadata = json.loads((directory / STORE_FILE).read_text(encoding="utf-8"))
        if metadata["format"] != STORE_FORMAT or metadata["key"] != key:
            raise _Unusable("it is of other rows, settings or another version")
        for name, (size, digest) in metadata["files"].items():
            path = directory / name
            if (found := path.stat().st_size) != size:
                raise _Unusable(f"{name} has {found:,} bytes instead of {size:,}")
            if known_sha256(path) != digest:
                raise _Unusable(f"{name} differs from its SHA-256")
        return Store(directory, key, metadata["facts"])
    except OSError as error:
        raise _Unusable(f"{Path(error.filename or directory).name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _Unusable(f"{STORE_FILE} is not of a store") from None


def _write_metadata(staged: Path, key: str, facts: dict[str, Any]) -> None:
    """Write store.json for the files in the directory, and flush them all."""
    files = {}
    for path in sorted(staged.iterdir()):
        flush(path)
        files[path.name] = [path.stat().st_size, known_sha256(path)]
    metadata = {"format": STORE_FORMAT, "key": key, "files": files, "facts": facts}
    (staged / STORE_FILE).write_text(json.dumps(metadata, indent=1), encoding="utf-8")
    flush(staged / STORE_FILE)


def _check_nothing_else(directory: Path) -> None:
    """Raise StorageError if a directory that is to be replaced has files that are not part of a store."""
    names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    if others := [name for name in names if name != STORE_FILE and not name.endswith(".bin")]:
        raise StorageError(
            "storage.not_a_cache",
            f"{directory} contains other files than stored rows ({others[0]}) and is not replaced",
            hint="choose another --set data.store_dir=DIR, or move the other files",
        )


def _storing(directory: Path) -> AbstractContextManager[None]:
    return storing(
        f"cannot write the stored rows {directory}", _ALTERNATIVES, hint_if_full=f"free disk space, {_ALTERNATIVES}"
    )


@cache
def _code_digest() -> str:
    """Return the SHA-256 of the code that reads and tokenizes rows, and of the versions of its libraries."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    for name in _LIBRARIES:
        try:
            digest.update(f"{name} {version(name)} ".encode())
        except PackageNotFoundError:
            continue
    return digest.hexdigest()
