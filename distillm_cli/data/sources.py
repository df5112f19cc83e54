"""Load the rows of a named source. Every error about a row names its file and line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from distillm_cli.config.schema import ColumnsConfig, DataConfig
from distillm_cli.data.files import UnreadableRecord
from distillm_cli.data.formats import readable_columns
from distillm_cli.data.locations import DataSource, find_source, is_path, local_path, path_kind, user_path
from distillm_cli.data.rows import BadRow, Row, Split, read_row
from distillm_cli.errors import DataError
from distillm_cli.training.events import Listener, Note, Warned, silent
from distillm_cli.utils.text import all_are, counted, listed_shares

__all__ = ["Row", "Rows", "Split", "is_path", "load_rows", "local_path", "overlap", "path_kind", "user_path"]


@dataclass(frozen=True)
class RowForm:
    """Describe what records are read as. read: as ``read_row``. columns: of those that it reads, for a recipe's columns."""

    read: Callable[..., tuple[Row, set[str]]]
    columns: Callable[[ColumnsConfig], frozenset[str]]


PROMPTS = RowForm(read_row, readable_columns)
_HELD_OUT_SHARE = 20  # one row in this many is held out if a source has no held-out rows of its own
LISTED = 20  # maximum number of broken rows reported one by one; Rows.skipped has all of them


@dataclass(frozen=True, eq=False)
class Rows(SequenceOf[Row]):
    """Hold the rows of one split.

    name: of the source, for display. path: of a local source. skipped: a message per broken row that was left out
    (`data.skip_bad_rows`). split: the requested one. splits: those of the source itself. read_columns: the columns that
    were read. unread_columns: the other columns, with the share of rows that have a value there.
    """

    rows: list[Row]
    name: str
    path: Path | None = None
    skipped: list[str] = field(default_factory=list)
    split: str = ""
    splits: tuple[str, ...] = ()
    read_columns: tuple[str, ...] = ()
    unread_columns: dict[str, float] = field(default_factory=dict)

    @property
    def formats(self) -> dict[str, int]:
        """Return the formats of the rows, each with its number of rows."""
        return dict(Counter(row.format for row in self.rows if row.format).most_common())

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
) -> Rows:
    """Load the rows of one split of ``data.source`` (of ``data.valid``, for split "valid", when that is given).

    A directory (and a hub data set) names its splits: train is ``train.*``. With a ``dev.*``, that is valid and
    ``valid.*`` is test. Else valid is ``valid.*`` or ``validation.*`` and test is ``test.*``. Without a test split,
    test is valid. A single file has no splits: "test" is the whole file. Without held-out rows, "valid" is a seeded
    slice of the training rows, one in twenty and at most ``data.valid_limit``, which "train" then leaves out. Rows with
    the same prompt are in the same split. A file given as ``data.valid`` is read completely.

    ``data.limit`` applies to the training rows (and the slice of them), ``data.valid_limit`` to "valid", ``limit`` to
    any split. Each selects the first rows. require_output=False: rows may lack a response. stand_in=False: "test"
    returns test rows only, neither a whole file nor a slice. form: what records are read as; not for `builtin`.

    Raises DataError if the source does not exist, is empty, or has a broken row (unless ``data.skip_bad_rows``).
    """
    uses_valid_source = split == "valid" and data.valid is not None
    name = data.valid if uses_valid_source else data.source
    if name == "builtin":
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
        rows = _load_split(source, data, split, uses_valid_source, limit, require_output, form, listener)
    return replace(rows, split=split, splits=splits)


def overlap(rows: SequenceOf[Row], others: SequenceOf[Row]) -> int:
    """Return the number of distinct prompts in both, such as held-out prompts that are also trained on."""
    return len({row.key for row in rows} & {row.key for row in others})


def _load_split(
    source: DataSource,
    data: DataConfig,
    split: Split,
    uses_valid_source: bool,
    limit: int | None,
    require_output: bool,
    form: RowForm,
    listener: Listener,
) -> Rows:
    load = partial(
        _load_part,
        source,
        columns=data.columns,
        skip_bad_rows=data.skip_bad_rows,
        require_output=require_output,
        form=form,
        listener=listener,
    )
    if uses_valid_source:
        part = next(name for name in ("valid", "test", "train") if name in source.parts)
        return load(part, _smallest(data.valid_limit, limit))
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
    columns: ColumnsConfig,
    skip_bad_rows: bool,
    require_output: bool,
    form: RowForm,
    listener: Listener,
) -> Rows:
    def skipped_message(where: str, message: str, *, is_json: bool = True) -> str:
        """Return the message for a row that is skipped. Raises DataError if rows must not be skipped."""
        if not skip_bad_rows:
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
    rows = list(islice(readable_rows(), limit))
    if not rows:
        first = "" if len(skipped) == 1 else ", the first"
        message = f"{all_are(len(skipped), 'row')} broken{first}: {skipped[0]}" if skipped else "no rows"
        raise DataError(
            "data.no_rows",
            f"{source.name}: {message}",
            where=_location(source),
            hint="check that it is the right source",
        )
    for message in skipped[:LISTED]:
        listener(Warned(f"skipped {message}"))
    if len(skipped) > LISTED:
        listener(
            Warned(f"skipped {counted(len(skipped), 'broken row')} of {source.name}; the first {LISTED} are above")
        )
    found = Rows(
        rows,
        name=source.name,
        path=source.path,
        skipped=skipped,
        read_columns=tuple(name for name, was_read in seen if was_read),
        unread_columns={name: n / len(rows) for (name, was_read), n in seen.items() if not was_read},
    )
    several = len(source.parts) > 1
    listener(Note(f"{source.name}{f' {part}' if several else ''}: {counted(len(rows), 'row')}, {found.format_summary}"))
    # Reported once per source: its validation rows have the same columns as its training rows.
    if found.unread_columns and (part != "valid" or "train" not in source.parts):
        listener(Note(f"{source.name}: columns not read: {listed_shares(found.unread_columns)}"))
    return found


def _hold_out(rows: Rows, split: Split, data: DataConfig, listener: Listener, limit: int | None) -> Rows:
    """Return the training rows without the held-out ones, or the held-out ones, by the rows and data.seed alone."""
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.key, []).append(index)
    members = list(groups.values())
    target = min(data.valid_limit, max(1, len(rows) // _HELD_OUT_SHARE)) if len(members) > 1 else 0
    # Raw bits sorted, rather than a shuffle: their stream is the same in every version of numpy.
    bits = np.random.Philox(np.random.SeedSequence(data.seed % 2**64)).random_raw(len(members))
    held_out: set[int] = set()
    for group in np.argsort(bits, kind="stable"):
        if len(held_out) + len(members[group]) <= target:
            held_out.update(members[group])
    if split == "train":
        if held_out:
            share = f"{len(held_out):,} of its {len(rows):,} {'is' if len(held_out) == 1 else 'are'} held out for validation"
            listener(Note(f"{rows.name} has no held-out rows: {share}"))
        remaining = [row for index, row in enumerate(rows) if index not in held_out]
    elif held_out:
        remaining = [rows[index] for index in sorted(held_out)]
    else:
        raise DataError(
            "data.no_held_out_rows",
            f"{rows.name}: {_no_held_out_reason(len(rows), len(members), target)}",
            where=str(rows.path) if rows.path else None,
            hint="set held-out rows with --set data.valid=FILE",
        )
    return replace(rows, rows=remaining[:limit])


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
