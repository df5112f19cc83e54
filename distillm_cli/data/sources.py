"""A named source → rows: `builtin`, a file, a directory, a name under ``$DISTILLM_DATA``, a data set of the hub.

Local paths never touch the network. Every complaint about a row names the place it stands at.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from distillm_cli.config.schema import Columns, Data
from distillm_cli.core.events import Listener, Note, Warned, silent
from distillm_cli.data.files import FORMATS, Fault, Records, read
from distillm_cli.data.hub import hub_splits
from distillm_cli.data.known import ALIASES, Reshape, known, names
from distillm_cli.data.rows import BadRow, Row, parse
from distillm_cli.errors import DataError
from distillm_cli.storage import leads_nowhere
from distillm_cli.words import all_are, counted

Split = Literal["train", "valid", "test"]
T = TypeVar("T")

_FILE_ENDINGS = (*FORMATS, ".txt", ".tsv", ".gz", ".zst", ".zip", ".arrow")
_SPLIT_FILE = re.compile(r"(train|dev|valid|validation|val|test)(-\d+-of-\d+)?", re.IGNORECASE)
_HELD_OUT_SHARE = 20  # one row in so many, when a source has no held-out rows of its own
_LISTED = 20  # broken rows named one by one; all of them are in Rows.skipped


@dataclass(frozen=True, eq=False)
class Rows(SequenceOf[Row]):
    """The rows of one split. name: what to call the source. path: where it is, when local.

    skipped: a message per broken row that was left out (`data.skip_bad_rows`). split: the one that was asked for. splits:
    those that the source has of its own.
    """

    rows: list[Row]
    name: str
    path: Path | None = None
    skipped: list[str] = field(default_factory=list)
    split: str = ""
    splits: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        return f"{self.name} {self.split}".rstrip()


@dataclass(frozen=True)
class _Source:
    """Where rows may be read. parts: by split, each a call that reads it. whole: a single file, which has no splits.

    reshape: of the records of a set with a short name, where no column is named.
    """

    name: str
    parts: Mapping[str, Callable[[], Records]]
    path: Path | None = None
    whole: bool = False
    reshape: Reshape | None = None


def load_rows(
    data: Data,
    split: Split,
    *,
    listener: Listener = silent,
    require_output: bool = True,
    limit: int | None = None,
    stand_in: bool = True,
) -> Rows:
    """The rows of one split of ``data.source`` (of ``data.valid``, for split "valid", when that is given).

    A directory (and a hub data set) names its splits: train is ``train.*``; where there is a ``dev.*``, that is valid and
    ``valid.*`` is test, else valid is ``valid.*`` or ``validation.*`` and test is ``test.*``; test falls back on valid.
    A single file is all of them: "test" is the whole file. Where nothing is held out, "valid" is a seeded slice of the
    training rows, one in twenty and at most ``data.valid_limit``, which "train" then leaves out; rows that ask the same
    thing stay on the same side. A file given as ``data.valid`` is read whole.

    ``data.limit`` holds for the training rows (and the slice made of them), ``data.valid_limit`` for "valid", ``limit``
    for whatever is asked; each keeps the first rows. require_output=False: rows may lack a response. stand_in=False: "test"
    is test rows, and neither the whole of a file nor a slice.

    Raises DataError: no such source, nothing in it, or its first broken row (unless ``data.skip_bad_rows``).
    """
    own_valid = split == "valid" and data.valid is not None
    named = data.valid if own_valid else data.source
    if named == "builtin":
        rows, splits = _builtin(data, split, limit), ("train", "valid", "test")
    else:
        source = _resolve(named, listener)
        splits = tuple(source.parts)
        if split == "test" and "test" not in splits and not stand_in:
            found = splits if "valid" in splits else (*splits, "valid (held out of train)")
            raise DataError(
                f"{source.name}: no test rows; there are {' and '.join(found)}",
                where=_where(source),
                hint="ask for one of those, or leave --split out",
            )
        rows = _of_source(source, data, split, own_valid, limit, require_output, listener)
    return replace(rows, split=split, splits=splits)


def overlap(rows: SequenceOf[Row], others: SequenceOf[Row]) -> int:
    """How many different prompts occur on both sides (held-out ones that were trained on, say)."""
    return len({row.key for row in rows} & {row.key for row in others})


def _of_source(
    source: _Source,
    data: Data,
    split: Split,
    own_valid: bool,
    limit: int | None,
    require_output: bool,
    listener: Listener,
) -> Rows:
    load = partial(
        _load,
        source,
        columns=data.columns,
        skip_bad_rows=data.skip_bad_rows,
        require_output=require_output,
        listener=listener,
    )
    if own_valid:
        part = next(name for name in ("valid", "test", "train") if name in source.parts)
        return load(part, _least(data.valid_limit, limit))
    if source.whole and split == "test":
        return load("train", limit)
    if split == "test" and "test" not in source.parts and data.valid is not None:
        raise DataError(f"{source.name}: no test rows", where=_where(source), hint="add a test file, or name a file")
    sliced = "train" in source.parts and "valid" not in source.parts and data.valid is None
    if split in source.parts and not (split == "train" and sliced):
        of_recipe = {"train": data.limit, "valid": data.valid_limit, "test": None}[split]
        return load(split, _least(of_recipe, limit))
    if "train" not in source.parts:
        raise DataError(
            f"{source.name}: no {split} rows, only {', '.join(source.parts)}",
            where=_where(source),
            hint="add a train file, or name another source with --data",
        )
    if split != "train":
        load = partial(load, listener=silent)  # what is said of these rows is said where they are trained on
    return _slice(load("train", data.limit), split, data, listener, limit)


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _where(source: _Source) -> str | None:
    return str(source.path) if source.path is not None else None


# ---------------------------------------------------------------------------------------------------- rows of a part


def _load(
    source: _Source,
    part: str,
    limit: int | None,
    *,
    columns: Columns,
    skip_bad_rows: bool,
    require_output: bool,
    listener: Listener,
) -> Rows:
    def complain(where: str, what: str) -> str:
        if not skip_bad_rows:
            place = _where(source)
            hint = "mend the row, or leave such rows out with --skip-bad-rows"
            raise DataError(f"{where}: {what}", where=None if place and where.startswith(place) else place, hint=hint)
        return f"{where}: {what}"

    reshape = source.reshape if columns == Columns() else None

    def good() -> Iterator[Row]:
        for where, record in source.parts[part]():
            if isinstance(record, Fault):
                skipped.append(complain(where, record.what))
                continue
            if reshape is not None and isinstance(record, dict):
                record = reshape(record)
            try:
                row = parse(record, where, columns, require_output=require_output)
            except BadRow as error:
                skipped.append(complain(where, str(error)))
                continue
            yield row

    skipped: list[str] = []
    rows = list(islice(good(), limit))
    if not rows:
        first = "" if len(skipped) == 1 else ", the first"
        what = f"{all_are(len(skipped), 'row')} broken{first}: {skipped[0]}" if skipped else "no rows in it"
        raise DataError(f"{source.name}: {what}", where=_where(source), hint="check that it is the right source")
    for message in skipped[:_LISTED]:
        listener(Warned(f"skipped {message}"))
    if len(skipped) > _LISTED:
        listener(
            Warned(f"skipped {counted(len(skipped), 'broken row')} of {source.name}; the first {_LISTED} are above")
        )
    return Rows(rows, name=source.name, path=source.path, skipped=skipped)


def _slice(whole: Rows, split: Split, data: Data, listener: Listener, limit: int | None) -> Rows:
    """The training rows without the held-out ones, or the held-out ones: a pure function of the rows and data.seed."""
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(whole):
        groups.setdefault(row.key, []).append(index)
    members = list(groups.values())
    wanted = min(data.valid_limit, max(1, len(whole) // _HELD_OUT_SHARE)) if len(members) > 1 else 0
    # Raw bits sorted, rather than a shuffle: their stream is the same in every version of numpy.
    bits = np.random.Philox(np.random.SeedSequence(data.seed % 2**64)).random_raw(len(members))
    held: set[int] = set()
    for group in np.argsort(bits, kind="stable"):
        if len(held) + len(members[group]) <= wanted:
            held.update(members[group])
    if split == "train":
        if held:
            share = f"{len(held):,} of its {len(whole):,} {'is' if len(held) == 1 else 'are'} kept for validation"
            listener(Note(f"{whole.name} has no held-out rows of its own: {share}"))
        kept = [row for index, row in enumerate(whole) if index not in held]
    elif held:
        kept = [whole[index] for index in sorted(held)]
    else:
        raise DataError(
            f"{whole.name}: {_why_none_held(len(whole), len(members), wanted)}",
            where=str(whole.path) if whole.path else None,
            hint="name held-out rows with --set data.valid=FILE",
        )
    return Rows(kept[:limit], name=whole.name, path=whole.path, skipped=whole.skipped)


def _why_none_held(rows: int, prompts: int, wanted: int) -> str:
    if rows == 1:
        return "1 row is too few to hold some of them out"
    if prompts == 1:
        return f"all {rows:,} rows ask the same thing, so that none of them can be held out"
    return f"its {rows:,} rows ask {prompts:,} things, each of them more often than the {wanted:,} to be held out"


def _builtin(data: Data, split: Split, limit: int | None) -> Rows:
    from distillm_cli.data import builtin

    trained_on, held_out = _least(data.size, data.limit, limit), _least(data.valid_limit, limit)
    n = {"train": trained_on, "valid": held_out, "test": limit or builtin.TEST_ROWS}[split]
    made = builtin.rows(split, n, data.seed, data.tasks)
    rows = [
        # One answer is enough to train on, and a hundred times fewer strings.
        Row(
            instruction=instruction,
            references=answers[:1] if split == "train" else answers,
            where=f"builtin {split} row {number}",
            task=task,
        )
        for number, (instruction, answers, task) in enumerate(made, start=1)
    ]
    return Rows(rows, name="builtin")


# ------------------------------------------------------------------------------------------------- where a source is


def local_place(named: str) -> Path | None:
    """The file or directory that a source's name stands for, None where it is none: `builtin`, or a name of the hub."""
    return None if named == "builtin" else next((p for p in _places(named.strip()) if p.exists()), None)


def is_path(text: str) -> bool:
    """Whether a source's name can only be a path: it never is looked for on the hub."""
    return _is_explicit(text) or Path(text).suffix.lower() in _FILE_ENDINGS


def _is_explicit(text: str) -> bool:
    return text.startswith(("./", "../", "/", "~")) or text in (".", "..")


def _places(text: str) -> list[Path]:
    """Where to look for a source, in order."""
    path = Path(text).expanduser()
    places = [path] if "/" in text or is_path(text) else []
    root = os.environ.get("DISTILLM_DATA")
    if root and not _is_explicit(text):
        places += [Path(root).expanduser() / spelling for spelling in _spellings(text)]
    return places if path in places else [*places, path]


def _resolve(named: str, listener: Listener) -> _Source:
    """What ``named`` is. A bare name is looked for under $DISTILLM_DATA before the working directory, a path after."""
    set_of_that_name = known(named.strip())
    source = _find(named, listener)
    return source if set_of_that_name is None else replace(source, reshape=set_of_that_name.reshape)


def _find(named: str, listener: Listener) -> _Source:
    text = named.strip()
    if not text:
        raise DataError("an empty name for a data source", hint="name a file, a directory, a data set, or builtin")
    path, root = Path(text).expanduser(), os.environ.get("DISTILLM_DATA")
    for place in _places(text):
        if place.is_dir():
            return _directory(place, text if place != path else place.resolve().name)
        if place.exists():
            return _Source(place.name, {"train": partial(read, place)}, path=place, whole=True)
    if leads_nowhere(path):
        raise DataError(f"{text} is a symbolic link that leads nowhere", hint="correct the link, or pass another path")
    if is_path(text):
        raise DataError(f"{text}: no such file or directory", hint="check the path")
    looked = f"not under $DISTILLM_DATA ({root})" if root else "$DISTILLM_DATA is not set"
    found = hub_splits(ALIASES.get(text, text), text, looked, listener, _meant(text, root))
    parts = _arrange(found)
    if not parts:
        raise DataError(f"{text}: no train, valid or test on the hub, but {', '.join(found)}", hint="pass a file")
    return _Source(text, parts)


def _meant(text: str, root: str | None) -> str | None:
    """The known set, or the one under $DISTILLM_DATA, whose name is nearly that; None where it is the name of one."""
    here = Path(root).expanduser() if root else None
    there = (
        [*names(), *ALIASES.values(), *(path.name for path in here.iterdir())] if here and here.is_dir() else names()
    )
    return None if text in there else next(iter(get_close_matches(text.lower(), there, n=1, cutoff=0.7)), None)


def _spellings(name: str) -> list[str]:
    twins = ALIASES | {long: short for short, long in ALIASES.items()}
    return [name, twins[name]] if name in twins else [name]


def _directory(path: Path, name: str) -> _Source:
    found: dict[str, list[Path]] = {}
    folders = [path, path / "data"]  # the second is where a cloned data set of the hub has its files
    for folder in (folder for folder in folders if folder.is_dir() and not found):
        for file in sorted(folder.iterdir()):
            match = _SPLIT_FILE.fullmatch(file.stem)
            if match and file.suffix.lower() in FORMATS and file.is_file():
                found.setdefault(match[1].lower(), []).append(file)
    for split, files in found.items():
        if len(files) > 1 and not all(_SPLIT_FILE.fullmatch(file.stem)[2] for file in files):
            names = ", ".join(file.name for file in files)
            raise DataError(f"{path}: several files for {split} ({names})", hint="keep one of them")
    if found:
        parts = {split: partial(_chained, files) for split, files in _arrange(found).items()}
        return _Source(name, parts, path=path)
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in FORMATS and file.is_file())
    if not files:
        raise DataError(
            f"{path}: no data file in it", hint=f"put train.jsonl there, or name a {', '.join(FORMATS)} file"
        )
    if len(files) != 1:
        there = ", ".join(file.name for file in files[:5])
        raise DataError(f"{path}: no train.*, valid.* or test.* in it, but {there}", hint="name a file of it instead")
    return _Source(name, {"train": partial(read, files[0])}, path=files[0], whole=True)


def _chained(files: list[Path]) -> Records:
    return chain.from_iterable(map(read, files))


def _arrange(found: Mapping[str, T]) -> dict[str, T]:
    """Names of splits as people give them → train, valid, test as they are meant."""
    named_valid = found.get("valid", found.get("validation", found.get("val")))
    valid = found.get("dev", named_valid)
    test = found.get("test", named_valid if named_valid is not None else valid)
    parts = {"train": found.get("train"), "valid": valid, "test": test}
    return {split: part for split, part in parts.items() if part is not None}
