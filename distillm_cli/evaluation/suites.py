"""Load suites: prompts with accepted answers, found by a short name or read from a file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any

from distillm_cli.config.schema import ColumnsConfig, DataConfig, Recipe
from distillm_cli.data.files import stem_of
from distillm_cli.data.known import find_dataset
from distillm_cli.data.sentences import ROWS_OR_PAIRS, is_pair_suite, scored_pairs
from distillm_cli.data.sources import Row, Rows, Split, load_rows, path_kind, user_path
from distillm_cli.errors import DataError
from distillm_cli.training.events import Listener, silent

HELD_OUT = "held-out"
_GENERIC = {"train", "valid", "validation", "val", "dev", "test", "data"}


@dataclass(frozen=True)
class Suite:
    """Hold the rows of a suite.

    name: short, valid as a directory name, unique in a call. source: name or path of the rows. skipped: broken ones.
    """

    name: str
    rows: list[Row]
    source: str
    skipped: tuple[str, ...] = ()

    @property
    def is_pairs(self) -> bool:
        """Return whether its rows are sentence pairs with scores, for embeddings."""
        return is_pair_suite(self.rows)

    def select(self, indices: SequenceOf[int]) -> Suite:
        """Return the suite with these rows only."""
        return replace(self, rows=[self.rows[i] for i in indices])

    def digest(self) -> str:
        """Return the SHA-256 of prompts and accepted answers, in order."""
        content = [(row.key, list(row.references)) for row in self.rows]
        return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()


def load_suites(recipe: Recipe, listener: Listener = silent) -> list[Suite]:
    """Load the suites of ``recipe.eval.suites``, else the run's held-out rows; duplicate names get a number."""
    if not recipe.eval.suites:
        return [held_out(recipe, listener)]
    return distinct(load_suite(name, recipe, listener) for name in recipe.eval.suites)


def load_suite(name: str, recipe: Recipe, listener: Listener = silent) -> Suite:
    """Load the test rows of a known data set (``data/known.py``), ``builtin``, a data file or directory, or a hub name.

    A short name is searched under $DISTILLM_DATA first, then on the hub. ``recipe.data`` sets how rows are read
    (columns, skip_bad_rows), ``recipe.eval.limit`` how many. Raises DataError when they cannot be found or read.
    """
    # Settings of the training source, such as its held-out file, do not apply to the suite.
    changes: dict[str, Any] = {"valid": None, "limit": None}
    if find_dataset(name) is not None:  # the recipe's columns are those of its own data
        changes["columns"] = ColumnsConfig()
    data = recipe.data.of(name, **changes)
    return _suite(short_name(name), _load(data, "test", recipe, listener))


def held_out(recipe: Recipe, listener: Listener = silent) -> Suite:
    """Load the validation rows of the recipe's own data, at most ``data.valid_limit`` and ``eval.limit`` of them."""
    return _suite(HELD_OUT, _load(recipe.data, "valid", recipe, listener))


def _load(data: DataConfig, split: Split, recipe: Recipe, listener: Listener) -> Rows:
    """Load prompts with references, or scored sentence pairs. Raises DataError for a mixture of both."""
    rows = load_rows(data, split, listener=listener, limit=recipe.eval.limit, form=ROWS_OR_PAIRS)
    if scored_pairs(rows) and not is_pair_suite(rows):
        raise DataError(
            "data.mixed_rows",
            f"{rows.name}: {len(scored_pairs(rows)):,} of {len(rows):,} rows are sentence pairs, the others are not",
            where=str(rows.path) if rows.path else None,
            hint="put the pairs into a file of their own",
        )
    return rows


def distinct(suites: Iterable[Suite]) -> list[Suite]:
    """Return the suites with distinct names: test, test-2, …"""
    found: dict[str, Suite] = {}
    for suite in suites:
        name, n = suite.name, 1
        while name in found:
            n += 1
            name = f"{suite.name}-{n}"
        found[name] = replace(suite, name=name)
    return list(found.values())


def short_name(source: str) -> str:
    """Return a suite's name: dolly → dolly; data/g2p/test.jsonl → g2p-test; MiniLLM/dolly → MiniLLM-dolly."""
    path = user_path(source)
    name = source
    if path_kind(path) == "file":
        resolved = path.resolve()
        stem = stem_of(resolved)
        name = f"{resolved.parent.name}-{stem}" if stem in _GENERIC else stem
    elif path_kind(path) == "directory":
        name = path.resolve().name
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "suite"


def _suite(name: str, rows: Rows) -> Suite:
    return Suite(name, list(rows), str(rows.path or rows.name), tuple(rows.skipped))
