"""Data sets with a short name: where the hub keeps them, and how their records become rows.

Under $DISTILLM_DATA a set of such a name may have its own columns or those that every file may have (``rows.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

Reshape = Callable[[dict[str, Any]], dict[str, Any]]

# Where the hub keeps its own parquet copy of sets whose loading script is no longer run.
_CONVERTED = "refs/convert/parquet"


@dataclass(frozen=True)
class Known:
    """Describe a set of the hub file by file: named one by one they are found offline, and errors name a line.

    files: by the hub's name of the split. revision: unset is main. reshape: a record with columns of this set alone → one
    with those that every file may have; records of another form are left as they are. columns: those that it reads.
    """

    repo: str
    files: dict[str, tuple[str, ...]]
    revision: str | None = None
    reshape: Reshape | None = None
    columns: frozenset[str] = frozenset()


def _summary(record: dict[str, Any], column: str, task: str) -> dict[str, Any]:
    if column not in record:
        return record
    rest = {name: value for name, value in record.items() if name not in (column, "summary")}
    return {**rest, "instruction": task, "input": record[column], "output": record.get("summary")}


_LANGUAGES = {"de": "German", "en": "English"}


def _translation(record: dict[str, Any], source: str, target: str) -> dict[str, Any]:
    pair = record.get("translation", record)
    if not isinstance(pair, dict) or source not in pair:
        return record
    task = f"Translate {_LANGUAGES[source]} to {_LANGUAGES[target]}."
    rest = {name: value for name, value in record.items() if name not in ("translation", source, target)}
    return {**rest, "instruction": task, "input": pair[source], "output": pair.get(target)}


def _splits(form: str, **counts: int) -> dict[str, tuple[str, ...]]:
    """Names of parquet files as the hub writes them, so many for each split."""
    return {split: tuple(form.format(split, at, n) for at in range(n)) for split, n in counts.items()}


_WMT14 = _splits("de-en/{}-{:05d}-of-{:05d}.parquet", train=3, validation=1, test=1)
_IWSLT = _splits("iwslt2017-en-de/{}/{:04d}.parquet", train=1, validation=1, test=1)
_SAMSUM = {split: (f"{split}.csv",) for split in ("train", "validation", "test")}
_DIALOGUE = partial(_summary, column="dialogue", task="Summarize the conversation.")
_DOCUMENT = partial(_summary, column="document", task="Summarize the article in one sentence.")
_SUMMARIES = frozenset(("dialogue", "document", "summary"))
_TRANSLATIONS = frozenset(("translation", *_LANGUAGES))
_DE_EN, _EN_DE = (partial(_translation, source=s, target=t) for s, t in (("de", "en"), ("en", "de")))

# The first five are MiniLLM's processed sets (METHODS D). Left to itself the loader would read the plain-text twins that lie
# beside their rows, and in the last two every subset by length of the reference (`11_`: eleven words or more).
KNOWN = {
    "dolly": Known("MiniLLM/dolly", {"train": ("raw.jsonl",), "test": ("valid.jsonl",)}),
    "self-inst": Known("MiniLLM/self-inst", {"test": ("valid.jsonl",)}),
    "vicuna": Known("MiniLLM/Vicuna", {"test": ("valid.jsonl",)}),
    "sinst": Known("MiniLLM/sinst", {"test": ("11_/valid.jsonl",)}),
    "uinst": Known("MiniLLM/uinst", {"test": ("11_/valid.jsonl",)}),
    "samsum": Known("knkarthick/samsum", _SAMSUM, reshape=_DIALOGUE, columns=_SUMMARIES),
    "xsum": Known(
        "EdinburghNLP/xsum",
        _splits("default/{}/{:04d}.parquet", train=1, validation=1, test=1),
        revision=_CONVERTED,
        reshape=_DOCUMENT,
        columns=_SUMMARIES,
    ),
    "wmt14-de-en": Known("wmt/wmt14", _WMT14, reshape=_DE_EN, columns=_TRANSLATIONS),
    "wmt14-en-de": Known("wmt/wmt14", _WMT14, reshape=_EN_DE, columns=_TRANSLATIONS),
    "iwslt": Known("IWSLT/iwslt2017", _IWSLT, revision=_CONVERTED, reshape=_EN_DE, columns=_TRANSLATIONS),
    "gsm8k": Known("openai/gsm8k", _splits("main/{}-{:05d}-of-{:05d}.parquet", train=1, test=1)),
}

# Either is looked for under $DISTILLM_DATA; the table knows the second.
ALIASES = {"sni": "sinst", "unni": "uinst"}


def names() -> list[str]:
    """What a person may call the sets that are known, and the one that is made here."""
    shorter = {long: short for short, long in ALIASES.items()}
    return [*(shorter.get(name, name) for name in KNOWN), "builtin"]


def known(name: str) -> Known | None:
    """The set of this short name, in either spelling."""
    return KNOWN.get(ALIASES.get(name, name))
