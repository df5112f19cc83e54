"""Load the rows of a named source. Every error about a row names its file and line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from distillm_cli.config.schema import ColumnsConfig, DataConfig
from distillm_cli.data.files import UnreadableRecord
from distillm_cli.data.formats import readable_columns
from distillm_cli.data.locations import DataSource, find_source, is_path, local_path, path_kind, user_path
from distillm_cli.data.row_store import (
    JoinedRows,
    StoredRows,
    kinds_of,
    map_rows,
    pick,
    prompt_keys,
    store_rows,
    with_template,
)
from distillm_cli.data.rows import BadRow, Row, Split, read_row
from distillm_cli.data.store import fingerprint, key_of, open_or_make
from distillm_cli.errors import DataError, StorageError
from distillm_cli.training.events import Listener, Note, Warned, silent
from distillm_cli.utils.storage import cache_root
from distillm_cli.utils.text import all_are, counted, listed_shares

__all__ = ["Row", "Rows", "Split", "is_path", "load_rows", "local_path", "overlap", "path_kind", "user_path"]


@dataclass(frozen=True)
class RowForm:
    """Describe what records are read as. read: as ``read_row``. columns: of those that it reads, for a recipe's columns."""

    read: Callable[..., tuple[Row, set[str]]]
    columns: Callable[[ColumnsConfig], frozenset[str]]


PROMPTS = RowForm(read_row, readable_columns)
_HELD_OUT_SHARE = 20  # one row in this many is held out if a source has no held-out rows of its own
STORED_BYTES = 256_000_000  # size of the training files from which `data.store: auto` stores their rows
LISTED = 20  # maximum number of broken rows reported one by one; Rows.skipped has all of them


@dataclass(frozen=True, eq=False)
class Rows(SequenceOf[Row]):
    """Hold the rows of one split.

    name: of the source, for display. path: of a local source. skipped: a message per broken row that was left out
    (`data.skip_bad_rows`). split: the requested one. splits: those of the source itself. read_columns: the columns that
    were read. unread_columns: the other columns, with the share of rows that have a value there. parts: the rows of each
    source of a mixture, in order.
    """

    rows: SequenceOf[Row]
    name: str
    path: Path | None = None
    skipped: list[str] = field(default_factory=list)
    split: str = ""
    splits: tuple[str, ...] = ()
    read_columns: tuple[str, ...] = ()
    unread_columns: dict[str, float] = field(default_factory=dict)
    parts: tuple[Rows, ...] = ()

    @property
    def formats(self) -> dict[str, int]:
        """Return the formats of the rows, each with its number of rows."""
        if self.parts:
            found = sum((Counter(part.formats) for part in self.parts), Counter[str]())
        elif isinstance(self.rows, StoredRows):
            found = self.rows.formats
        else:
            found = Counter(row.format for row in self.rows if row.format)
        return dict(found.most_common())

    @property
    def kinds(self) -> Iterable[Row]:
        """Return ``kinds_of`` the rows."""
        return kinds_of(self.rows)

    @property
    def are_stored(self) -> bool:
        """Return whether the rows are on disk, and each is read when it is accessed."""
        return isinstance(self.rows, StoredRows)

    @property
    def format_summary(self) -> str:
        """Return the formats of the rows and the columns read, for display: "prompt-completion (prompt, completion)"."""
        formats = self.formats
        found = ", ".join(f"{n:,} {name}" for name, n in formats.items()) if len(formats) > 1 else "".join(formats)
        return f"{found} ({', '.join(self.read_columns)})" if self.read_columns else found

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        return f"{self.name} {self.split}".rstrip()


def load_rows(
    data: DataConfig,
    split: Split,
    *,
    listener: Listener = silent,
    require_output: bool = True,
    limit: int | None = None,
    stand_in: bool = True,
    form: RowForm = PROMPTS,
    stored: bool = False,
) -> Rows:
    """Load the rows of one split of ``data.source`` (of ``data.valid``, for split "valid", when that is given).

    A directory (and a hub data set) names its splits: train is ``train.*``. With a ``dev.*``, that is valid and
    ``valid.*`` is test. Else valid is ``valid.*`` or ``validation.*`` and test is ``test.*``. Without a test split,
    test is valid. A single file has no splits: "test" is the whole file. Without held-out rows, "valid" is a seeded
    slice of the training rows, one in twenty and at most ``data.valid_limit``, which "train" then leaves out. Rows with
    the same prompt are in the same split. A file given as ``data.valid`` is read completely.

    ``data.limit`` applies to the training rows (and the slice of them), ``data.valid_limit`` to "valid", ``limit`` to
    any split. Each selects the first rows. A mixture (``data.sources``) has the rows of its sources one after the other,
    and each source has an equal part of ``data.valid_limit`` and of ``limit``. require_output=False: rows may lack a
    response. stand_in=False: "test" returns test rows only, neither a whole file nor a slice. form: what records are read
    as; not for `builtin`. stored: training rows may be read from the store on disk, by ``data.store``.

    Raises DataError if the source does not exist, is empty, or has a broken row (unless ``data.skip_bad_rows``).
    """
    uses_valid_source = split == "valid" and data.valid is not None
    if data.sources and not uses_valid_source:
        load = partial(
            load_rows,
            split=split,
            listener=listener,
            require_output=require_output,
            limit=None if limit is None else _equal_part(limit, data),
            stand_in=stand_in,
            form=form,
            stored=stored,
        )
        return _joined(data, [load(alone) for alone in _each_alone(data)], limit)
    name = data.valid if uses_valid_source else data.source
    if name == "builtin":
        if stored and data.store == "on" and split == "train":
            raise _not_stored(name)
        rows = _load_builtin(data, split, limit)
        splits = ("train", "valid", "test")
    else:
        source = find_source(name, listener)
        splits = tuple(source.parts)
        if split == "test" and "test" not in splits and not stand_in:
            found = splits if "valid" in splits else (*splits, "valid (held out of train)")
            raise DataError(
                "data.no_split",
                f"{source.name}: no test rows; there are {' and '.join(found)}",
                where=_location(source),
                hint="choose one of those, or remove --split",
            )
        store = TrainingStore(data) if stored else None
        load = partial(
            _load_part, source, data=data, require_output=require_output, form=form, store=store, listener=listener
        )
        rows = _load_split(source, data, split, limit, load, listener)
    return replace(rows, split=split, splits=splits)


def overlap(rows: SequenceOf[Row], others: SequenceOf[Row]) -> int:
    """Return the number of distinct prompts in both, such as held-out prompts that are also trained on."""
    keys_N2, others_M2 = prompt_keys(_plain(rows)), prompt_keys(_plain(others))
    candidates_M2 = others_M2[np.isin(others_M2[:, 0], keys_N2[:, 0])]
    return len({*map(tuple, keys_N2.tolist())} & {*map(tuple, candidates_M2.tolist())})


def _each_alone(data: DataConfig) -> list[DataConfig]:
    """Return the section for each source of a mixture alone."""
    valid_limit = _equal_part(data.valid_limit, data)
    return [data.of(one.source, limit=one.limit or data.limit, valid_limit=valid_limit) for one in data.sources]


def _equal_part(limit: int, data: DataConfig) -> int:
    """Return the limit of each source, so that all of them reach the limit together."""
    return -(-limit // len(data.sources))


def _joined(data: DataConfig, loaded: list[Rows], limit: int | None) -> Rows:
    """Return the rows of a mixture: those of each source with its template, one source after the other."""
    parts = [
        replace(part, rows=with_template(part.rows, one.template))
        for part, one in zip(loaded, data.sources, strict=True)
    ]
    rows = JoinedRows([part.rows for part in parts])
    if limit is not None:
        rows = rows.pick(np.arange(min(limit, len(rows))))
        parts = [replace(part, rows=cut) for part, cut in zip(parts, rows.parts, strict=True)]
    columns: dict[str, float] = {}
    for part in parts:
        for column, share in part.unread_columns.items():
            columns[column] = columns.get(column, 0.0) + share * len(part) / max(len(rows), 1)
    return Rows(
        rows,
        name=" + ".join(part.name for part in parts),
        skipped=[message for part in parts for message in part.skipped],
        split=parts[0].split,
        splits=tuple(name for name in parts[0].splits if all(name in part.splits for part in parts)),
        read_columns=tuple(dict.fromkeys(column for part in parts for column in part.read_columns)),
        unread_columns=columns,
        parts=tuple(parts),
    )


def named_parts(name: str, rows: SequenceOf[Row]) -> dict[str, SequenceOf[Row]]:
    """Return the rows of each source by a name of its own: rows that are not of a mixture are of one source."""
    parts = rows.parts if isinstance(rows, Rows) else ()
    return {f"{name} {i}": part for i, part in enumerate(parts)} or {name: rows}


def _plain(rows: SequenceOf[Row]) -> SequenceOf[Row]:
    return rows.rows if isinstance(rows, Rows) else rows


def _groups(keys_N2: np.ndarray) -> np.ndarray:
    """Return the number of each row's group, the rows with an equal key, in order of first appearance."""
    order = np.lexsort((keys_N2[:, 1], keys_N2[:, 0]))  # stable: the rows of a group stay in order
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (keys_N2[order[1:]] != keys_N2[order[:-1]]).any(axis=1)
    by_key = np.cumsum(is_first) - 1
    numbers = np.empty(int(is_first.sum()), dtype=np.int64)
    numbers[np.argsort(order[is_first], kind="stable")] = np.arange(len(numbers))
    groups = np.empty(len(order), dtype=np.int64)
    groups[order] = numbers[by_key]
    return groups


def _load_split(
    source: DataSource, data: DataConfig, split: Split, limit: int | None, load: Callable[..., Rows], listener: Listener
) -> Rows:
    if split == "valid" and data.valid is not None:
        part = next(name for name in ("valid", "test", "train") if name in source.parts)
        return load(part, _smallest(data.valid_limit, limit), store=None)
    if source.single_file and split == "test":
        return load("train", limit)
    if split == "test" and "test" not in source.parts and data.valid is not None:
        raise DataError(
            "data.no_split",
            f"{source.name}: no test rows",
            where=_location(source),
            hint="add a test file, or use a file",
        )
    holds_out = "train" in source.parts and "valid" not in source.parts and data.valid is None
    if split in source.parts and not (split == "train" and holds_out):
        recipe_limit = {"train": data.limit, "valid": data.valid_limit, "test": None}[split]
        return load(split, _smallest(recipe_limit, limit))
    if "train" not in source.parts:
        raise DataError(
            "data.no_split",
            f"{source.name}: no {split} rows, only {', '.join(source.parts)}",
            where=_location(source),
            hint="add a train file, or choose another source with --data",
        )
    if split != "train":
        load = partial(load, listener=silent)  # these rows are reported where they are trained on
    return _hold_out(load("train", data.limit), split, data, listener, limit)


def _smallest(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _location(source: DataSource) -> str | None:
    return str(source.path) if source.path is not None else None


# ---------------------------------------------------------------------------------------------------- rows of a split


def _load_part(
    source: DataSource,
    part: str,
    limit: int | None,
    *,
    data: DataConfig,
    require_output: bool,
    form: RowForm,
    store: TrainingStore | None,
    listener: Listener,
) -> Rows:
    read = partial(_read_part, source, part, limit, data=data, require_output=require_output, form=form)
    key = [source.name, part, limit, require_output, data.columns.model_dump(), data.skip_bad_rows]
    if store is None or part != "train" or not store.is_used(source):
        found = read(list)
    else:
        found = store.rows(source, key, read, listener)
    _report(found, source, part, listener)
    return found


def _read_part(
    source: DataSource,
    part: str,
    limit: int | None,
    collect: Callable[[Iterable[Row]], SequenceOf[Row]],
    *,
    data: DataConfig,
    require_output: bool,
    form: RowForm,
) -> Rows:
    """Read the rows of a part of a source, one after the other, into ``collect``."""
    columns = data.columns

    def skipped_message(where: str, message: str, *, is_json: bool = True) -> str:
        """Return the message for a row that is skipped. Raises DataError if rows must not be skipped."""
        if not data.skip_bad_rows:
            path = _location(source)
            hint = "fix the row, or skip such rows with --skip-bad-rows"
            place = None if path and where.startswith(path) else path
            if not is_json:
                raise DataError("data.invalid_json", f"{where}: {message}", where=place, hint=hint)
            raise DataError("data.invalid_row", f"{where}: {message}", where=place, hint=hint)
        return f"{where}: {message}"

    reshape = source.reshape if columns == ColumnsConfig() else None

    def readable_rows() -> Iterator[Row]:
        for where, record in source.parts[part](form.columns(columns) | source.columns):
            if isinstance(record, UnreadableRecord):
                skipped.append(skipped_message(where, record.reason, is_json=record.is_json))
                continue
            if reshape is not None and isinstance(record, dict):
                record = reshape(record)
            try:
                row, columns_read = form.read(record, where, columns, require_output=require_output)
            except BadRow as error:
                skipped.append(skipped_message(where, str(error)))
                continue
            seen.update((name, name in columns_read) for name, value in record.items() if value not in (None, ""))
            yield row

    skipped: list[str] = []
    seen: Counter[tuple[str, bool]] = Counter()  # rows with a value in a column, by its name and whether it was read
    rows = collect(islice(readable_rows(), limit))
    if not rows:
        first = "" if len(skipped) == 1 else ", the first"
        message = f"{all_are(len(skipped), 'row')} broken{first}: {skipped[0]}" if skipped else "no rows"
        raise DataError(
            "data.no_rows",
            f"{source.name}: {message}",
            where=_location(source),
            hint="check that it is the right source",
        )
    return Rows(
        rows,
        name=source.name,
        path=source.path,
        skipped=skipped,
        read_columns=tuple(name for name, was_read in seen if was_read),
        unread_columns={name: n / len(rows) for (name, was_read), n in seen.items() if not was_read},
    )


def _report(found: Rows, source: DataSource, part: str, listener: Listener) -> None:
    """Report what was read of a part of a source."""
    for message in found.skipped[:LISTED]:
        listener(Warned(f"skipped {message}"))
    if len(found.skipped) > LISTED:
        skipped = counted(len(found.skipped), "broken row")
        listener(Warned(f"skipped {skipped} of {source.name}; the first {LISTED} are above"))
    several = len(source.parts) > 1
    rows = counted(len(found), "row")
    listener(Note(f"{source.name}{f' {part}' if several else ''}: {rows}, {found.format_summary}"))
    # Reported once per source: its validation rows have the same columns as its training rows.
    if found.unread_columns and (part != "valid" or "train" not in source.parts):
        listener(Note(f"{source.name}: columns not read: {listed_shares(found.unread_columns)}"))


def _not_stored(name: str) -> DataError:
    return DataError(
        "data.cannot_store",
        f"{name}: only the rows of local files are stored (data.store on)",
        hint="save the data set as a file, or try --set data.store=auto",
    )


class TrainingStore:
    """Read training rows from the store on disk, which is made first if it does not exist (``data.store``)."""

    def __init__(self, data: DataConfig):
        self._data = data

    def is_used(self, source: DataSource) -> bool:
        """Return whether this source's training rows are stored. Raises DataError if they must be and cannot."""
        files = source.files.get("train")
        if self._data.store == "on" and not files:
            raise _not_stored(source.name)
        if self._data.store != "auto" or not files:
            return self._data.store == "on"
        return self._data.limit is None and sum(path.stat().st_size for path in files) >= STORED_BYTES

    def rows(self, source: DataSource, settings: list[Any], read: Callable[..., Rows], listener: Listener) -> Rows:
        """Return the rows of a source's training files from their store.

        settings: those that the rows depend on. read: reads the rows into the function that it is given.
        """
        what = f"rows of {source.name}"
        key = key_of("rows", fingerprint(source.files["train"]), settings)

        def make(directory: Path) -> dict[str, Any]:
            formats: list[str] = []

            def collect(rows: Iterable[Row]) -> SequenceOf[Row]:
                formats.extend(store_rows(rows, directory, listener, what))
                return map_rows(directory, formats, key)

            made = read(collect)
            return {
                "formats": formats,
                "skipped": made.skipped,
                "read_columns": made.read_columns,
                "unread_columns": made.unread_columns,
            }

        try:
            store = open_or_make(cache_root("rows", self._data.store_dir), "rows", key, make, listener, what=what)
        except (StorageError, DataError) as error:
            may_read = isinstance(error, StorageError) or error.code == "data.cannot_store"
            if self._data.store == "on" or not may_read:
                raise
            listener(Warned(f"{error.what}: reading the rows into memory (data.store auto)"))
            return read(list)
        facts = store.facts
        return Rows(
            map_rows(store.directory, facts["formats"], key),
            name=source.name,
            path=source.path,
            skipped=facts["skipped"],
            read_columns=tuple(facts["read_columns"]),
            unread_columns=facts["unread_columns"],
        )


def _hold_out(rows: Rows, split: Split, data: DataConfig, listener: Listener, limit: int | None) -> Rows:
    """Return the training rows without the held-out ones, or the held-out ones, by the rows and data.seed alone."""
    groups = _groups(prompt_keys(rows.rows))
    sizes = np.bincount(groups)
    target = min(data.valid_limit, max(1, len(rows) // _HELD_OUT_SHARE)) if len(sizes) > 1 else 0
    # Raw bits sorted, rather than a shuffle: their stream is the same in every version of numpy.
    bits = np.random.Philox(np.random.SeedSequence(data.seed % 2**64)).random_raw(len(sizes))
    chosen: list[int] = []
    count = 0
    for group in np.argsort(bits, kind="stable"):
        if count == target:
            break
        if count + sizes[group] <= target:
            chosen.append(int(group))
            count += int(sizes[group])
    held_out = np.isin(groups, chosen)
    if split == "train":
        if count:
            share = f"{count:,} of its {len(rows):,} {'is' if count == 1 else 'are'} held out for validation"
            listener(Note(f"{rows.name} has no held-out rows: {share}"))
        remaining = np.flatnonzero(~held_out)
    elif count:
        remaining = np.flatnonzero(held_out)
    else:
        raise DataError(
            "data.no_held_out_rows",
            f"{rows.name}: {_no_held_out_reason(len(rows), len(sizes), target)}",
            where=str(rows.path) if rows.path else None,
            hint="set held-out rows with --set data.valid=FILE",
        )
    return replace(rows, rows=pick(rows.rows, remaining[:limit]))


def _no_held_out_reason(rows: int, prompts: int, target: int) -> str:
    if rows == 1:
        return "1 row is too few for a held-out slice"
    if prompts == 1:
        return f"all {rows:,} rows have the same prompt, so none can be held out"
    return f"its {rows:,} rows have {prompts:,} distinct prompts, each with more rows than the {target:,} to hold out"


def _load_builtin(data: DataConfig, split: Split, limit: int | None) -> Rows:
    from distillm_cli.data import builtin

    count_by_split = {
        "train": _smallest(data.size, data.limit, limit),
        "valid": _smallest(data.valid_limit, limit),
        "test": limit or builtin.TEST_ROWS,
    }
    generated = builtin.rows(split, count_by_split[split], data.seed, data.tasks)
    rows = [
        # One answer is enough to train on, and saves memory: a question has up to 119.
        Row(
            instruction=instruction,
            references=answers[:1] if split == "train" else answers,
            where=f"builtin {split} row {number}",
            task=task,
            format="instruction",
        )
        for number, (instruction, answers, task) in enumerate(generated, start=1)
    ]
    return Rows(rows, name="builtin")
