"""Define data sets with a short name: their files on the hub, and the conversion of their records.

A name selects rows in ``--data``, and the test rows of a suite in ``--suite``. Under $DISTILLM_DATA a set of such a
name may have its own columns or those that every file may have (``rows.py``). A plug-in adds others in a module like
this one:

    register_dataset("squares", GeneratedDataset(read, splits=("train", "test")))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from distillm_cli import plugins
from distillm_cli.utils.storage import ASSETS

Columns = dict[str, Any]  # one record, by the names of its columns
Reshape = Callable[[Columns], Columns]

# The branch with the hub's parquet copy of a data set whose loading script is no longer supported.
_CONVERTED = "refs/convert/parquet"


@dataclass(frozen=True)
class HubDataset:
    """Describe a data set of the hub by its files, so that they are found offline and errors name a line.

    files: by the hub's name of the split. revision: unset is main. reshape: converts a record
    with columns of this set alone to one with common columns; it returns other records unchanged. columns: those that
    ``reshape`` reads.
    alias: another name of the set.
    """

    repo: str
    files: dict[str, tuple[str, ...]]
    revision: str | None = None
    reshape: Reshape | None = None
    columns: frozenset[str] = frozenset()
    alias: str | None = None


@dataclass(frozen=True)
class GeneratedDataset:
    """Describe a data set that a function returns. read: takes the name of a split and returns its records."""

    read: Callable[[str], Iterable[Columns]]
    splits: tuple[str, ...] = ("train",)
    reshape: Reshape | None = None
    columns: frozenset[str] = frozenset()
    alias: str | None = None


KnownDataset = HubDataset | GeneratedDataset


def register_dataset(name: str, dataset: KnownDataset, origin: str | None = None) -> None:
    """Register a data set under a short name. origin: the module that it comes from, for messages."""
    plugins.datasets.register(name, dataset, origin)


def _to_summary_row(record: Columns, column: str, task: str) -> Columns:
    if column not in record:
        return record
    rest = {name: value for name, value in record.items() if name not in (column, "summary")}
    return {**rest, "instruction": task, "input": record[column], "output": record.get("summary")}


_LANGUAGES = {"de": "German", "en": "English"}


def _to_translation_row(record: Columns, source: str, target: str) -> Columns:
    pair = record.get("translation", record)
    if not isinstance(pair, dict) or source not in pair:
        return record
    task = f"Translate {_LANGUAGES[source]} to {_LANGUAGES[target]}."
    rest = {name: value for name, value in record.items() if name not in ("translation", source, target)}
    return {**rest, "instruction": task, "input": pair[source], "output": pair.get(target)}


def _numbered_files(form: str, **counts: int) -> dict[str, tuple[str, ...]]:
    """Return the hub's names of parquet files by split. counts: number of files per split."""
    return {split: tuple(form.format(split, index, n) for index in range(n)) for split, n in counts.items()}


_WMT14 = _numbered_files("de-en/{}-{:05d}-of-{:05d}.parquet", train=3, validation=1, test=1)
_IWSLT = _numbered_files("iwslt2017-en-de/{}/{:04d}.parquet", train=1, validation=1, test=1)
_ONE_OF_EACH = {"train": 1, "validation": 1, "test": 1}
_SAMSUM = {split: (f"{split}.csv",) for split in ("train", "validation", "test")}
_DIALOGUE = partial(_to_summary_row, column="dialogue", task="Summarize the conversation.")
_DOCUMENT = partial(_to_summary_row, column="document", task="Summarize the article in one sentence.")
_SUMMARIES = frozenset(("dialogue", "document", "summary"))
_TRANSLATIONS = frozenset(("translation", *_LANGUAGES))
_DE_EN = partial(_to_translation_row, source="de", target="en")
_EN_DE = partial(_to_translation_row, source="en", target="de")

# The first five are MiniLLM's processed sets (docs/methods.md#settings). Without file names the loader would also read
# their plain-text copies and, in the last two, every subset by length of the reference (`11_`: eleven words or more).
for _name, _dataset in {
    "dolly": HubDataset("MiniLLM/dolly", {"train": ("raw.jsonl",), "test": ("valid.jsonl",)}),
    "self-inst": HubDataset("MiniLLM/self-inst", {"test": ("valid.jsonl",)}),
    "vicuna": HubDataset("MiniLLM/Vicuna", {"test": ("valid.jsonl",)}),
    "sni": HubDataset("MiniLLM/sinst", {"test": ("11_/valid.jsonl",)}, alias="sinst"),
    "unni": HubDataset("MiniLLM/uinst", {"test": ("11_/valid.jsonl",)}, alias="uinst"),
    "samsum": HubDataset("knkarthick/samsum", _SAMSUM, reshape=_DIALOGUE, columns=_SUMMARIES),
    "xsum": HubDataset(
        "EdinburghNLP/xsum",
        _numbered_files("default/{}/{:04d}.parquet", train=1, validation=1, test=1),
        revision=_CONVERTED,
        reshape=_DOCUMENT,
        columns=_SUMMARIES,
    ),
    "wmt14-de-en": HubDataset("wmt/wmt14", _WMT14, reshape=_DE_EN, columns=_TRANSLATIONS),
    "wmt14-en-de": HubDataset("wmt/wmt14", _WMT14, reshape=_EN_DE, columns=_TRANSLATIONS),
    "iwslt": HubDataset("IWSLT/iwslt2017", _IWSLT, revision=_CONVERTED, reshape=_EN_DE, columns=_TRANSLATIONS),
    "stsb": HubDataset(
        "sentence-transformers/stsb", _numbered_files("data/{}-{:05d}-of-{:05d}.parquet", **_ONE_OF_EACH)
    ),
    "gsm8k": HubDataset("openai/gsm8k", _numbered_files("main/{}-{:05d}-of-{:05d}.parquet", train=1, test=1)),
}.items():
    register_dataset(_name, _dataset)


def _read_pronounce(split: str) -> Iterable[Columns]:
    """Return records of the words and phonemes shipped with this package, an excerpt of CMUdict."""
    lines = (ASSETS / "pronounce" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return map(json.loads, lines)


register_dataset("pronounce", GeneratedDataset(_read_pronounce, splits=("train", "valid", "test")))


def dataset_names() -> list[str]:
    """Return the short names of all data sets, the one that is generated here (``builtin``) last."""
    return [*plugins.datasets, "builtin"]


def dataset_aliases() -> dict[str, str]:
    """Return the other name of each data set that has two names, in both directions."""
    found = {}
    for name, dataset in plugins.datasets.items():
        if dataset.alias is not None:
            found[name] = dataset.alias
            found[dataset.alias] = name
    return found


def find_dataset(name: str) -> KnownDataset | None:
    """Return the data set with a short name or its alias; None if there is none."""
    dataset = plugins.datasets.get(name)
    return plugins.datasets.get(dataset_aliases().get(name, name)) if dataset is None else dataset
