"""Find the source of a name: a file, a directory, a name under ``$DISTILLM_DATA``, a data set of the hub.

Local paths never touch the network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, TypeVar

from distillm_cli.data.files import COMPRESSIONS, FORMATS, Records, format_of, read, stem_of
from distillm_cli.data.hub import hub_splits
from distillm_cli.data.known import GeneratedDataset, Reshape, aliases, known, names
from distillm_cli.data.tables import read_saved, saved_splits
from distillm_cli.errors import DataError
from distillm_cli.training.events import Listener
from distillm_cli.utils.storage import leads_nowhere

_T = TypeVar("_T")
Read = Callable[[Collection[str]], Records]

_FILE_ENDINGS = (*FORMATS, *COMPRESSIONS, ".txt", ".tsv", ".zip", ".arrow")
_SPLIT_FILE = re.compile(r"(train|dev|valid|validation|val|test)(-\d+-of-\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class DataSource:
    """Hold where rows can be read.

    parts: by split, a call that reads it; it receives the columns to convert. whole: a single file, which has no splits.
    reshape: of the records of a set with a short name, where no column is named. columns: those that ``reshape`` reads.
    """

    name: str
    parts: Mapping[str, Read]
    path: Path | None = None
    whole: bool = False
    reshape: Reshape | None = None
    columns: frozenset[str] = frozenset()


def local_place(named: str) -> Path | None:
    """Return the file or directory of a source's name; None for `builtin` and for a name of the hub."""
    return None if named == "builtin" else next(filter(kind_of, _places(named.strip())), None)


def user_path(text: str) -> Path:
    """Return the path of a name, ``~`` replaced where there is such a home directory."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def kind_of(path: Path) -> Literal["file", "directory"] | None:
    """Return what there is at a path; None where nothing can be, for example because the name is too long."""
    try:
        if path.is_dir():
            return "directory"
        return "file" if path.exists() else None
    except OSError:
        return None


def is_path(text: str) -> bool:
    """Return whether a source's name can only be a path: it never is looked for on the hub."""
    return _is_explicit(text) or Path(text).suffix.lower() in _FILE_ENDINGS


def _is_explicit(text: str) -> bool:
    return text.startswith(("./", "../", "/", "~")) or text in (".", "..")


def _places(text: str) -> list[Path]:
    """Return where to look for a source, in order."""
    path = user_path(text)
    places = [path] if "/" in text or is_path(text) else []
    root = os.environ.get("DISTILLM_DATA")
    if root and not _is_explicit(text):
        places += [user_path(root) / spelling for spelling in _spellings(text)]
    return places if path in places else [*places, path]


def find_source(named: str, listener: Listener) -> DataSource:
    """Return the source of a name. A bare name is looked for under $DISTILLM_DATA before the working directory.

    Raises DataError where there is none.
    """
    set_of_that_name = known(named.strip())
    source = _find(named, listener)
    if set_of_that_name is None:
        return source
    return replace(source, reshape=set_of_that_name.reshape, columns=set_of_that_name.columns)


def _find(named: str, listener: Listener) -> DataSource:
    text = named.strip()
    if not text:
        raise DataError("an empty name for a data source", hint="name a file, a directory, a data set, or builtin")
    path, root = user_path(text), os.environ.get("DISTILLM_DATA")
    for place in _places(text):
        kind = kind_of(place)
        if kind == "directory":
            return _directory(place, text if place != path else place.resolve().name)
        if kind == "file":
            return DataSource(place.name, {"train": partial(read, place)}, path=place, whole=True)
    if leads_nowhere(path):
        raise DataError(f"{text} is a symbolic link that leads nowhere", hint="correct the link, or pass another path")
    if isinstance(dataset := known(text), GeneratedDataset):
        return DataSource(
            text, _arrange({split: partial(_generated, text, dataset, split) for split in dataset.splits})
        )
    if is_path(text):
        raise DataError(f"{text}: no such file or directory", hint="check the path")
    looked = f"not under $DISTILLM_DATA ({root})" if root else "$DISTILLM_DATA is not set"
    found = hub_splits(text, looked, listener, _meant(text, root))
    parts = _arrange(found)
    if not parts:
        raise DataError(f"{text}: no train, valid or test on the hub, but {', '.join(found)}", hint="pass a file")
    return DataSource(text, parts)


def _meant(text: str, root: str | None) -> str | None:
    """Return the known set, or the one under $DISTILLM_DATA, whose name is nearly that; None where it is the name of one."""
    here = user_path(root) if root else None
    there = [*names(), *aliases(), *(path.name for path in here.iterdir())] if here and here.is_dir() else names()
    return None if text in there else next(iter(get_close_matches(text.lower(), there, n=1, cutoff=0.7)), None)


def _spellings(name: str) -> list[str]:
    twin = aliases().get(name)
    return [name] if twin is None else [name, twin]


def _generated(name: str, dataset: GeneratedDataset, split: str, wanted: Collection[str]) -> Records:
    for number, record in enumerate(dataset.read(split), start=1):
        yield f"{name} {split} row {number}", record


def _directory(path: Path, name: str) -> DataSource:
    saved = saved_splits(path)
    if saved is not None:
        return _saved(path, name, saved)
    found: dict[str, list[Path]] = {}
    folders = [path, path / "data"]  # the second is where a cloned data set of the hub has its files
    for folder in (folder for folder in folders if folder.is_dir() and not found):
        for file in sorted(folder.iterdir()):
            match = _SPLIT_FILE.fullmatch(stem_of(file))
            if match and format_of(file) is not None and file.is_file():
                found.setdefault(match[1].lower(), []).append(file)
    for split, files in found.items():
        if len(files) > 1 and not all(_SPLIT_FILE.fullmatch(stem_of(file))[2] for file in files):
            names = ", ".join(file.name for file in files)
            raise DataError(f"{path}: several files for {split} ({names})", hint="keep one of them")
    if found:
        parts = {split: partial(_chained, files) for split, files in _arrange(found).items()}
        return DataSource(name, parts, path=path)
    files = sorted(file for file in path.iterdir() if format_of(file) is not None and file.is_file())
    if not files:
        raise DataError(
            f"{path}: no data file in it", hint=f"put train.jsonl there, or name a {', '.join(FORMATS)} file"
        )
    if len(files) != 1:
        there = ", ".join(file.name for file in files[:5])
        raise DataError(f"{path}: no train.*, valid.* or test.* in it, but {there}", hint="name a file of it instead")
    return DataSource(name, {"train": partial(read, files[0])}, path=files[0], whole=True)


def _saved(path: Path, name: str, saved: dict[str, Path]) -> DataSource:
    """Return the source of a directory that `datasets` saved."""
    if "" in saved:
        return DataSource(name, {"train": partial(read_saved, path)}, path=path, whole=True)
    parts = {split: partial(read_saved, place) for split, place in _arrange(saved).items()}
    if not parts:
        raise DataError(f"{path}: no train, valid or test in it, but {', '.join(saved)}", hint="name one of these")
    return DataSource(name, parts, path=path)


def _chained(files: list[Path], wanted: Collection[str]) -> Records:
    return chain.from_iterable(read(file, wanted) for file in files)


def _arrange(found: Mapping[str, _T]) -> dict[str, _T]:
    """Names of splits as people give them → train, valid, test as they are meant."""
    named_valid = found.get("valid", found.get("validation", found.get("val")))
    valid = found.get("dev", named_valid)
    test = found.get("test", named_valid if named_valid is not None else valid)
    parts = {"train": found.get("train"), "valid": valid, "test": test}
    return {split: part for split, part in parts.items() if part is not None}
