"""Read records from Arrow tables: parquet files, and data sets that `datasets` saved with ``save_to_disk``.

Only columns that some format reads are converted to Python values. `datasets` is not used: it uses transformers, which
another thread may be importing at the same time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillm_cli.data.records import NotConverted, UnreadableValue
from distillm_cli.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

_BATCH_ROWS = 1000  # rows
_PRESENT = NotConverted()
Convert = Callable[[Any], Any]

# Files that `save_to_disk` writes next to its Arrow files.
_DATASET_DICT_FILE = "dataset_dict.json"
_DATASET_FILE = "state.json"
_INFO_FILE = "dataset_info.json"


def read_parquet(path: Path, columns: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Yield the records of a parquet file. columns: those to convert."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    with path.open("rb") as file:  # distinguishes absent files from unreadable ones
        try:
            table = ParquetFile(file)
            names = table.schema_arrow.names
            full = {name for name in names if name not in columns and _is_full(table, name)}
            needed = [name for name in names if name not in full]
            number = 0
            for batch in table.iter_batches(_BATCH_ROWS, columns=needed):
                for record in batch_records(batch, columns, names):
                    number += 1
                    yield f"{path.name} row {number}", record
        except (pyarrow.ArrowException, OSError) as error:  # OSError: pages that cannot be unpacked
            raise DataError(
                "data.unreadable", f"{path.name}: not parquet ({error})", where=str(path), hint="write the file again"
            ) from None


def saved_splits(path: Path) -> dict[str, Path] | None:
    """Return the directories of a saved ``DatasetDict`` by split, {"": path} for a ``Dataset``, None for others.

    Raises DataError if the files that describe it are damaged.
    """
    if (path / _DATASET_FILE).is_file() and (path / _INFO_FILE).is_file():
        return {"": path}
    if not (path / _DATASET_DICT_FILE).is_file():
        return None
    splits = _read_description(path / _DATASET_DICT_FILE, "splits")
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise DataError(
            "data.unreadable", f"{path / _DATASET_DICT_FILE}: no list of `splits`", hint="save the data set again"
        )
    return {split: path / split for split in splits}


def read_saved(path: Path, columns: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Yield the records of a ``Dataset`` that was saved at ``path``. columns: those to convert."""
    files = _read_description(path / _DATASET_FILE, "_data_files")
    try:
        names = [file["filename"] for file in files]
    except (TypeError, KeyError):
        raise DataError(
            "data.unreadable", f"{path / _DATASET_FILE}: no list of `_data_files`", hint="save the data set again"
        ) from None
    number = 0
    for name in names:
        for batch in _arrow_batches(path / name):
            for record in batch_records(batch, columns, batch.schema.names):
                number += 1
                yield f"{path.name} row {number}", record


def batch_records(batch: pyarrow.RecordBatch, columns: Collection[str], names: Iterable[str]) -> Iterator[Any]:
    """Yield the records of a batch, with every column of ``names``.

    Values of other columns than ``columns`` are NotConverted, or None if they are null (or an empty list). Columns
    that the batch lacks have a value in every row. A null field of a struct is left out, since a struct has all fields
    of all rows. Only a null ``content`` of a message is retained.
    """
    values_by_name = {name: _values(batch, name, name in columns) for name in names}
    for index in range(batch.num_rows):
        yield {name: _PRESENT if values is None else values[index] for name, values in values_by_name.items()}


def _values(batch: pyarrow.RecordBatch, name: str, is_read: bool) -> list[Any] | None:
    if name not in batch.schema.names:
        return None
    column = batch.column(name)
    if not is_read:
        return [_PRESENT if present else None for present in _presence(column)]
    convert = _converter(column.type)
    try:
        values = column.to_pylist()
        return values if convert is None else [convert(value) for value in values]
    except (
        ValueError,
        OverflowError,
    ):  # not UTF-8, a date after the year 9999, …: one by one, to find the invalid values
        return [_value(scalar, convert) for scalar in column]


def _value(scalar: pyarrow.Scalar, convert: Convert | None) -> Any:
    try:
        value = scalar.as_py()
        return value if convert is None else convert(value)
    except UnicodeDecodeError:
        return UnreadableValue("is not UTF-8")
    except (ValueError, OverflowError) as error:
        return UnreadableValue(f"cannot be converted ({error})")


def _presence(column: pyarrow.Array) -> list[bool]:
    import pyarrow.compute
    from pyarrow import types

    kind = column.type
    if types.is_list(kind) or types.is_large_list(kind):
        return pyarrow.compute.fill_null(pyarrow.compute.greater(column.value_lengths(), 0), False).to_pylist()
    return column.is_valid().to_pylist()


def _is_full(table: ParquetFile, name: str) -> bool:
    """Return whether the file's statistics show that the column has a value in every row, without reading it."""
    meta = table.metadata
    paths = [meta.schema.column(i).path for i in range(meta.num_columns)]
    leaves = [i for i, path in enumerate(paths) if path == name or path.startswith(f"{name}.")]
    return any(all(_no_nulls(meta.row_group(g).column(i)) for g in range(meta.num_row_groups)) for i in leaves)


def _no_nulls(chunk: Any) -> bool:
    found = chunk.statistics
    return found is not None and found.has_null_count and found.null_count == 0


def _converter(kind: pyarrow.DataType) -> Convert | None:
    """Return the function that restores the original form of a stored value of this type; None for no change."""
    from pyarrow import types

    if getattr(kind, "extension_name", None) == "arrow.json":  # the type that `datasets` uses for fields of mixed types
        return lambda text: None if text is None else json.loads(text)
    if types.is_struct(kind):
        return _struct_converter({kind.field(i).name: _converter(kind.field(i).type) for i in range(kind.num_fields)})
    if types.is_map(kind):
        item = _converter(kind.item_type)
        return lambda pairs: None if pairs is None else {k: v if item is None else item(v) for k, v in pairs}
    if hasattr(kind, "value_type") and not types.is_dictionary(kind):
        inner = _converter(kind.value_type)
        return None if inner is None else lambda values: None if values is None else [inner(v) for v in values]
    return None


def _struct_converter(inner: dict[str, Convert | None]) -> Convert:
    always_kept = ("content",) if "role" in inner else ()

    def convert(struct: dict[str, Any] | None) -> dict[str, Any] | None:
        if struct is None:
            return None
        found = {}
        for name, value in struct.items():
            if value is not None or name in always_kept:
                found[name] = value if inner[name] is None else inner[name](value)
        return found

    return convert


def _arrow_batches(path: Path) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file:
            for batch in pyarrow.ipc.open_stream(file):
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    yield batch.slice(start, _BATCH_ROWS)
    except FileNotFoundError:
        raise DataError("data.not_found", f"{path}: no such file", hint="save the data set again") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            "data.unreadable", f"{path.name}: not an Arrow stream ({error})", where=str(path), hint="save it again"
        ) from None


def _read_description(path: Path, key: str) -> Any:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            "data.unreadable", f"{path}: cannot be read ({error})", hint="save the data set again"
        ) from None
    return found.get(key) if isinstance(found, dict) else None
