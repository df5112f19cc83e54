"""Load data sets of the Hugging Face hub through ``datasets``. No other module of this package uses the network."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from distillm_cli.data.files import Records, read
from distillm_cli.data.known import find_dataset
from distillm_cli.data.tables import batch_records
from distillm_cli.errors import DataError
from distillm_cli.training.events import Listener, Note

_T = TypeVar("_T")

_BATCH_ROWS = 1000  # rows


def hub_splits(
    name: str, local_search: str, listener: Listener, suggestion: str | None = None
) -> dict[str, Callable[[Collection[str]], Records]]:
    """Return the splits of a data set by name, each as a function that takes the columns to convert and reads it.

    name: a known short name, or ``owner/name``, with ``:config`` if a set has several. local_search: earlier
    searched locations, for the message. suggestion: an existing name that is similar. Raises DataError when the hub has
    no such set or cannot be reached.
    """
    import datasets

    found = find_dataset(name)
    repo, _, config = (name if found is None else found.repo).partition(":")
    call = partial(_call_hub, name, repo, local_search, suggestion)
    _check_reachable(call, repo)
    listener(Note(f"{name}: reading {repo} of the hub"))
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # no requests that only count downloads
    if found is not None:
        return {split: partial(_read_files, call, repo, files, found.revision) for split, files in found.files.items()}
    splits = call(datasets.get_dataset_split_names, repo, config or None)
    return {split: partial(_read_rows, call, repo, config, split) for split in splits}


def _read_files(
    call: Callable[..., Any], repo: str, files: tuple[str, ...], revision: str | None, columns: Collection[str]
) -> Records:
    import huggingface_hub

    for file in files:
        path = call(huggingface_hub.hf_hub_download, repo, file, repo_type="dataset", revision=revision)
        yield from read(Path(path), columns)


def _read_rows(call: Callable[..., Any], repo: str, config: str, split: str, columns: Collection[str]) -> Records:
    import datasets

    dataset = call(datasets.load_dataset, repo, config or None, split=split)
    batches = (batch for table in dataset.with_format("arrow").iter(_BATCH_ROWS) for batch in table.to_batches())
    found = (record for batch in batches for record in batch_records(batch, columns, batch.schema.names))
    for number, record in enumerate(found, start=1):
        yield f"{repo} {split} row {number}", record


def _check_reachable(call: Callable[..., Any], repo: str) -> None:
    """Send one request to the hub first: without a network the loader would retry for half a minute."""
    import huggingface_hub

    # In offline mode, earlier downloads are read and others fail at once.
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        call(huggingface_hub.HfApi().dataset_info, repo, timeout=20)


def _call_hub(
    name: str,
    repo: str,
    local_search: str,
    suggestion: str | None,
    function: Callable[..., _T],
    *args: Any,
    **kwargs: Any,
) -> _T:
    """Call a function of the hub's clients. Raises DataError for every failure, with the other searched locations."""
    try:
        return function(*args, **kwargs)
    except Exception as error:  # the hub's clients raise errors of four libraries with no common base
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        is_absent = isinstance(error, RepositoryNotFoundError | HFValidationError | FileNotFoundError)
        is_absent &= not isinstance(error, LocalEntryNotFoundError)  # not among earlier downloads, and offline
        found = "is not on the hub" if is_absent else "cannot be read from the hub"
        hint = "set DISTILLM_DATA to a directory that contains it, or pass a file"
        hint = f"did you mean {suggestion}?" if suggestion else hint
        raise DataError(
            "data.not_found", f"no data set `{name}`: {local_search}, and {repo} {found} ({reason})", hint=hint
        ) from error
