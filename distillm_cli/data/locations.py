"""Find the data source of a name: a file, a directory, a name under ``$DISTILLM_DATA``, or a data set on the hub.

Local paths need no network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, TypeVar

from distillm_cli.data.files import COMPRESSIONS, FORMATS, Records, format_of, read, stem_of
from distillm_cli.data.hub import hub_splits
from distillm_cli.data.known import GeneratedDataset, Reshape, dataset_aliases, dataset_names, find_dataset
from distillm_cli.data.tables import read_saved, saved_splits
from distillm_cli.errors import DataError
from distillm_cli.training.events import Listener
from distillm_cli.utils.storage import is_broken_link

_T = TypeVar("_T")
Read = Callable[[Collection[str]], Records]

_FILE_SUFFIXES = (*FORMATS, *COMPRESSIONS, ".txt", ".tsv", ".zip", ".arrow")
_SPLIT_FILE = re.compile(r"(train|dev|valid|validation|val|test)(-\d+-of-\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class DataSource:
    """Describe a data source by functions that read its splits.

    parts: by split, a function that takes the columns to convert and returns records. single_file: a file without splits.
    reshape: converts the records of a set with a short name, if the recipe names no columns. columns: those that
    ``reshape`` reads. files: the local files of each split, if it is read from such files alone.
    """

    name: str
    parts: Mapping[str, Read]
    path: Path | None = None
    single_file: bool = False
    reshape: Reshape | None = None
    columns: frozenset[str] = frozenset()
    files: Mapping[str, Sequence[Path]] = field(default_factory=dict)


def local_path(name: str) -> Path | None:
    """Return the file or directory that a source's name refers to; None for `builtin` and for a hub name."""
    return None if name == "builtin" else next(filter(path_kind, _candidate_paths(name.strip())), None)


def user_path(text: str) -> Path:
    """Return the path of a name, with ``~`` expanded if that home directory exists."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def path_kind(path: Path) -> Literal["file", "directory"] | None:
    """Return the kind of a path; None if it does not exist or the name is too long."""
    try:
        if path.is_dir():
            return "directory"
        return "file" if path.exists() else None
    except OSError:
        return None


def is_path(text: str) -> bool:
    """Return whether a source's name can only be a path and is not searched on the hub."""
    return _is_explicit(text) or Path(text).suffix.lower() in _FILE_SUFFIXES


def _is_explicit(text: str) -> bool:
    return text.startswith(("./", "../", "/", "~")) or text in (".", "..")


def _candidate_paths(text: str) -> list[Path]:
    """Return the paths at which a source is searched, in order."""
    path = user_path(text)
    paths = [path] if "/" in text or is_path(text) else []
    root = os.environ.get("DISTILLM_DATA")
    if root and not _is_explicit(text):
        paths += [user_path(root) / spelling for spelling in _name_and_alias(text)]
    return paths if path in paths else [*paths, path]


def find_source(name: str, listener: Listener) -> DataSource:
    """Return the source of a name. A bare name is searched under $DISTILLM_DATA before the working directory.

    Raises DataError if there is none.
    """
    dataset = find_dataset(name.strip())
    source = _find_by_name(name, listener)
    if dataset is None:
        return source
    return replace(source, reshape=dataset.reshape, columns=dataset.columns)


def _find_by_name(name: str, listener: Listener) -> DataSource:
    text = name.strip()
    if not text:
        raise DataError(
            "data.not_found", "empty name of a data source", hint="use a file, a directory, a data set, or builtin"
        )
    root = os.environ.get("DISTILLM_DATA")
    for path in _candidate_paths(text):
        kind = path_kind(path)
        if kind == "directory":
            return _directory(path, path.resolve().name if path == user_path(text) else text)
        if kind == "file":
            return _single_file(path.name, path)
    if is_broken_link(user_path(text)):
        raise DataError(
            "data.not_found",
            f"{text} is a broken symbolic link",
            hint="correct the link, or pass another path",
        )
    if isinstance(dataset := find_dataset(text), GeneratedDataset):
        return DataSource(
            text, _canonical_splits({split: partial(_read_generated, text, dataset, split) for split in dataset.splits})
        )
    if is_path(text):
        raise DataError("data.not_found", f"{text}: no such file or directory", hint="check the path")
    local_search = f"not under $DISTILLM_DATA ({root})" if root else "$DISTILLM_DATA is not set"
    found = hub_splits(text, local_search, listener, _similar_name(text, root))
    parts = _canonical_splits(found)
    if not parts:
        raise DataError(
            "data.no_split",
            f"{text}: no split train, valid or test on the hub, but {', '.join(found)}",
            hint="pass a file",
        )
    return DataSource(text, parts)


def _similar_name(text: str, root: str | None) -> str | None:
    """Return a similar name of a known set or of one under $DISTILLM_DATA; None if ``text`` is such a name itself."""
    candidates = dataset_names()
    directory = user_path(root) if root else None
    if directory is not None and directory.is_dir():
        candidates = [*candidates, *dataset_aliases(), *(path.name for path in directory.iterdir())]
    if text in candidates:
        return None
    return next(iter(get_close_matches(text.lower(), candidates, n=1, cutoff=0.7)), None)


def _name_and_alias(name: str) -> list[str]:
    alias = dataset_aliases().get(name)
    return [name] if alias is None else [name, alias]


def _read_generated(name: str, dataset: GeneratedDataset, split: str, columns: Collection[str]) -> Records:
    for number, record in enumerate(dataset.read(split), start=1):
        yield f"{name} {split} row {number}", record


def _directory(path: Path, name: str) -> DataSource:
    saved = saved_splits(path)
    if saved is not None:
        return _saved_dataset(path, name, saved)
    found: dict[str, list[Path]] = {}
    folders = [path, path / "data"]  # a cloned data set of the hub has its files in data/
    for folder in (folder for folder in folders if folder.is_dir() and not found):
        for file in sorted(folder.iterdir()):
            match = _SPLIT_FILE.fullmatch(stem_of(file))
            if match and format_of(file) is not None and file.is_file():
                found.setdefault(match[1].lower(), []).append(file)
    for split, files in found.items():
        if len(files) > 1 and not all(_SPLIT_FILE.fullmatch(stem_of(file))[2] for file in files):
            file_names = ", ".join(file.name for file in files)
            raise DataError(
                "data.ambiguous_split", f"{path}: several files for {split} ({file_names})", hint="keep one of them"
            )
    if found:
        files_by_split = _canonical_splits(found)
        parts = {split: partial(_read_files, files) for split, files in files_by_split.items()}
        return DataSource(name, parts, path=path, files=files_by_split)
    files = sorted(file for file in path.iterdir() if format_of(file) is not None and file.is_file())
    if not files:
        raise DataError(
            "data.not_found",
            f"{path}: no data files",
            hint=f"add train.jsonl, or use a {', '.join(FORMATS)} file",
        )
    if len(files) != 1:
        file_names = ", ".join(file.name for file in files[:5])
        raise DataError(
            "data.no_split",
            f"{path}: no train.*, valid.* or test.*, but {file_names}",
            hint="use one of these files",
        )
    return _single_file(name, files[0])


def _single_file(name: str, path: Path) -> DataSource:
    return DataSource(name, {"train": partial(read, path)}, path=path, single_file=True, files={"train": [path]})


def _saved_dataset(path: Path, name: str, saved: dict[str, Path]) -> DataSource:
    """Return the source for a directory that `datasets` saved."""
    if "" in saved:
        own_files = {"train": _files_in(path)}
        return DataSource(name, {"train": partial(read_saved, path)}, path=path, single_file=True, files=own_files)
    directories = _canonical_splits(saved)
    parts = {split: partial(read_saved, directory) for split, directory in directories.items()}
    if not parts:
        raise DataError(
            "data.no_split", f"{path}: no split train, valid or test, but {', '.join(saved)}", hint="use one of these"
        )
    files = {split: _files_in(directory) for split, directory in directories.items()}
    return DataSource(name, parts, path=path, files=files)


def _files_in(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file()) if directory.is_dir() else []


def _read_files(files: list[Path], columns: Collection[str]) -> Records:
    return chain.from_iterable(read(file, columns) for file in files)


def _canonical_splits(found: Mapping[str, _T]) -> dict[str, _T]:
    """Map the common names of splits (dev, validation, val) to train, valid and test."""
    named_valid = found.get("valid", found.get("validation", found.get("val")))
    valid = found.get("dev", named_valid)
    test = found.get("test", named_valid if named_valid is not None else valid)
    parts = {"train": found.get("train"), "valid": valid, "test": test}
    return {split: part for split, part in parts.items() if part is not None}
