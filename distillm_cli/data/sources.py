"""Load the rows of a named source. Every error about a row names its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from distillm_cli.config.schema import ColumnsConfig, DataConfig
from distillm_cli.data.files import Fault
from distillm_cli.data.formats import readable_columns
from distillm_cli.data.locations import DataSource, find_source, is_path, kind_of, local_place, user_path
from distillm_cli.data.rows import BadRow, Row, Split, read_row
from distillm_cli.errors import DataError
from distillm_cli.training.events import Listener, Note, Warned, silent
from distillm_cli.utils.text import all_are, counted, listed_shares

__all__ = ["Row", "Rows", "Split", "is_path", "kind_of", "load_rows", "local_place", "overlap", "user_path"]

_HELD_OUT_SHARE = 20  # one row in so many, when a source has no held-out rows of its own
LISTED = 20  # broken rows named one by one; all of them are in Rows.skipped


@dataclass(frozen=True, eq=False)
class Rows(SequenceOf[Row]):
    """Hold the rows of one split.

    name: of the source, for display. path: where it is, when local. skipped: a message per broken row that was left out
    (`data.skip_bad_rows`). split: the requested one. splits: those that the source has of its own. read: the
    columns that were read. not_read: the other columns, with the share of rows that have a value there.
    """

    rows: list[Row]
    name: str
    path: Path | None = None
    skipped: list[str] = field(default_factory=list)
    split: str = ""
    splits: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    not_read: dict[str, float] = field(default_factory=dict)

    @property
    def formats(self) -> dict[str, int]:
        """Return the formats of the rows, each with its number of rows."""
        return dict(Counter(row.format for row in self.rows if row.format).most_common())

    @property
    def described(self) -> str:
        """Return the formats of the rows and the columns read, for display: "prompt-completion (prompt, completion)"."""
        formats = self.formats
        found = ", ".join(f"{n:,} {name}" for name, n in formats.items()) if len(formats) > 1 else "".join(formats)
        return f"{found} ({', '.join(self.read)})" if self.read else found

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
        source = find_source(named, listener)
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
    source: DataSource,
    data: DataConfig,
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


def _where(source: DataSource) -> str | None:
    return str(source.path) if source.path is not None else None


# ---------------------------------------------------------------------------------------------------- rows of a part


def _load(
    source: DataSource,
    part: str,
    limit: int | None,
    *,
    columns: ColumnsConfig,
    skip_bad_rows: bool,
    require_output: bool,
    listener: Listener,
) -> Rows:
    def complain(where: str, what: str) -> str:
        if not skip_bad_rows:
            place = _where(source)
            hint = "fix the row, or skip such rows with --skip-bad-rows"
            raise DataError(f"{where}: {what}", where=None if place and where.startswith(place) else place, hint=hint)
        return f"{where}: {what}"

    reshape = source.reshape if columns == ColumnsConfig() else None

    def good() -> Iterator[Row]:
        for where, record in source.parts[part](readable_columns(columns) | source.columns):
            if isinstance(record, Fault):
                skipped.append(complain(where, record.what))
                continue
            if reshape is not None and isinstance(record, dict):
                record = reshape(record)
            try:
                row, columns_read = read_row(record, where, columns, require_output=require_output)
            except BadRow as error:
                skipped.append(complain(where, str(error)))
                continue
            seen.update((name, name in columns_read) for name, value in record.items() if value not in (None, ""))
            yield row

    skipped: list[str] = []
    seen: Counter[tuple[str, bool]] = Counter()  # rows with a value in a column, by its name and whether it was read
    rows = list(islice(good(), limit))
    if not rows:
        first = "" if len(skipped) == 1 else ", the first"
        what = f"{all_are(len(skipped), 'row')} broken{first}: {skipped[0]}" if skipped else "no rows in it"
        raise DataError(f"{source.name}: {what}", where=_where(source), hint="check that it is the right source")
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
        read=tuple(name for name, was_read in seen if was_read),
        not_read={name: n / len(rows) for (name, was_read), n in seen.items() if not was_read},
    )
    several = len(source.parts) > 1
    listener(Note(f"{source.name}{f' {part}' if several else ''}: {counted(len(rows), 'row')}, {found.described}"))
    # Once for a source: its validation rows have the columns of its training rows.
    if found.not_read and (part != "valid" or "train" not in source.parts):
        listener(Note(f"{source.name}: columns not read: {listed_shares(found.not_read)}"))
    return found


def _slice(whole: Rows, split: Split, data: DataConfig, listener: Listener, limit: int | None) -> Rows:
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
    return replace(whole, rows=kept[:limit])


def _why_none_held(rows: int, prompts: int, wanted: int) -> str:
    if rows == 1:
        return "1 row is too few to hold some of them out"
    if prompts == 1:
        return f"all {rows:,} rows ask the same thing, so that none of them can be held out"
    return f"its {rows:,} rows ask {prompts:,} things, each of them more often than the {wanted:,} to be held out"


def _builtin(data: DataConfig, split: Split, limit: int | None) -> Rows:
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
            format="instruction",
        )
        for number, (instruction, answers, task) in enumerate(made, start=1)
    ]
    return Rows(rows, name="builtin")
