"""Data sets of the Hugging Face hub, through ``datasets``: the one place of this room that uses the network."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from distillm_cli.data.files import Records, read
from distillm_cli.data.known import known
from distillm_cli.data.tables import records
from distillm_cli.errors import DataError
from distillm_cli.training.events import Listener, Note

_T = TypeVar("_T")

_AT_ONCE = 1000  # rows


def hub_splits(
    typed: str, looked: str, listener: Listener, meant: str | None = None
) -> dict[str, Callable[[Collection[str]], Records]]:
    """Return the splits of a data set by the hub's names for them, each a call that reads it and receives the
    columns to convert.

    typed: a known short name, or ``owner/name``, with ``:config`` where a set has several. looked: where else was looked,
    for the message. meant: a name like it, which there is.
    Raises DataError when the hub has no such set or cannot be reached.
    """
    import datasets

    found = known(typed)
    repo, _, config = (typed if found is None else found.repo).partition(":")
    ask = partial(_asked, typed, repo, looked, meant)
    _reach(ask, repo)
    listener(Note(f"{typed}: reading {repo} of the hub"))
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # a counter elsewhere is no reason to phone there
    if found is not None:
        return {split: partial(_files, ask, repo, files, found.revision) for split, files in found.files.items()}
    splits = ask(datasets.get_dataset_split_names, repo, config or None)
    return {split: partial(_rows, ask, repo, config, split) for split in splits}


def _files(
    ask: Callable[..., Any], repo: str, files: tuple[str, ...], revision: str | None, wanted: Collection[str]
) -> Records:
    import huggingface_hub

    for file in files:
        at = ask(huggingface_hub.hf_hub_download, repo, file, repo_type="dataset", revision=revision)
        yield from read(Path(at), wanted)


def _rows(ask: Callable[..., Any], repo: str, config: str, split: str, wanted: Collection[str]) -> Records:
    import datasets

    loaded = ask(datasets.load_dataset, repo, config or None, split=split)
    batches = (batch for table in loaded.with_format("arrow").iter(_AT_ONCE) for batch in table.to_batches())
    found = (record for batch in batches for record in records(batch, wanted, batch.schema.names))
    for number, record in enumerate(found, start=1):
        yield f"{repo} {split} row {number}", record


def _reach(ask: Callable[..., Any], repo: str) -> None:
    """One question to the hub first: without a network the loader would repeat its own for half a minute."""
    import huggingface_hub

    # Offline by choice: what was downloaded before is read, and what was not is refused at once.
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        ask(huggingface_hub.HfApi().dataset_info, repo, timeout=20)


def _asked(
    typed: str, repo: str, looked: str, meant: str | None, question: Callable[..., _T], *args: Any, **kwargs: Any
) -> _T:
    """``question(…)`` to the hub. Whatever goes wrong there is a DataError that says where else was looked."""
    try:
        return question(*args, **kwargs)
    except Exception as error:  # the hub's clients raise errors of four libraries with no common base
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

        said = str(error).strip().splitlines()
        reason = said[0] if said else type(error).__name__
        absent = isinstance(error, RepositoryNotFoundError | HFValidationError | FileNotFoundError)
        absent &= not isinstance(error, LocalEntryNotFoundError)  # not among earlier downloads, and offline
        found = "is not on the hub" if absent else "cannot be read from the hub"
        hint = "set DISTILLM_DATA to a directory that holds it, or pass a file"
        hint = f"did you mean {meant}?" if meant else hint
        raise DataError(f"no data set `{typed}`: {looked}, and {repo} {found} ({reason})", hint=hint) from error
