"""Load suites: prompts with accepted answers, found by a short name or read from a file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any

from distillm_cli.config.schema import ColumnsConfig, DataConfig, EvalConfig, Recipe
from distillm_cli.config.suite_file import SuiteFile, read_suite_file, suite_path
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.files import stem_of
from distillm_cli.data.known import find_dataset
from distillm_cli.data.sentences import ROWS_OR_PAIRS, is_pair_suite, scored_pairs
from distillm_cli.data.sources import Row, Rows, Split, load_rows, path_kind, user_path
from distillm_cli.errors import DataError
from distillm_cli.training.events import Listener, Warned, silent
from distillm_cli.types import Sequence
from distillm_cli.utils.text import counted

HELD_OUT = "held-out"
_NO_LIMIT = 2**31  # tokens
_GENERIC = {"train", "valid", "validation", "val", "dev", "test", "data"}


@dataclass(frozen=True)
class Suite:
    """Hold the rows of a suite.

    name: short, valid as a directory name, unique in a call. source: name or path of the rows. skipped: broken ones.
    file: the suite file, if it comes from one.
    """

    name: str
    rows: list[Row]
    source: str
    skipped: tuple[str, ...] = ()
    file: SuiteFile | None = None

    @property
    def license(self) -> str | None:
        """Return the license of the rows that the suite file names."""
        return None if self.file is None else self.file.license

    def config(self, own: EvalConfig, by_hand: Collection[str] = ()) -> EvalConfig:
        """Return the settings for the suite. own: of the command. by_hand: keys that its file does not change."""
        return own if self.file is None else self.file.config(own, by_hand)

    def template(self, own: str, by_hand: Collection[str] = ()) -> str:
        """Return the template for the suite, as ``config``."""
        given = None if self.file is None or "data.template" in by_hand else self.file.template
        return given or own

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


def answered_sequences(suite: Suite, encoder: Encoder, context: int | None) -> tuple[list[Row], list[Sequence]]:
    """Return the rows that have a response, and the sequences of those that fit into the model's context.

    The response is the first reference. ``Sequence.row`` is the index in the returned rows.
    """
    rows = [row for row in suite.rows if row.is_answered]
    return rows, [found for found in unlimited(encoder, context).sequences(rows) if isinstance(found, Sequence)]


def unlimited(encoder: Encoder, context: int | None) -> Encoder:
    """Return an encoder with no other limit than a model's context. Rows that do not fit are dropped."""
    limit = context or _NO_LIMIT
    return encoder.with_settings(max_length=limit, max_prompt_length=limit, too_long="drop")


def load_suites(recipe: Recipe, listener: Listener = silent) -> list[Suite]:
    """Load the suites of ``recipe.eval.suites``, else the run's held-out rows; duplicate names get a number."""
    if not recipe.eval.suites:
        return [held_out(recipe, listener)]
    return distinct(load_suite(name, recipe, listener) for name in recipe.eval.suites)


def load_suite(name: str, recipe: Recipe, listener: Listener = silent) -> Suite:
    """Load a suite file, or the test rows of a known data set, ``builtin``, a data file or directory, or a hub name.

    A short name is searched under $DISTILLM_DATA first, then on the hub. ``recipe.data`` sets how rows are read
    (columns, skip_bad_rows), ``recipe.eval.limit`` how many. Raises DataError when they cannot be found or read.
    """
    path = suite_path(name)
    if path is not None:
        file = read_suite_file(path)
        limit = recipe.eval.limit or file.limit
        limited = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"limit": limit})})
        found = replace(load_suite(file.source, limited, listener), file=file)
        if found.is_pairs and (file.settings() or file.template):
            what = f"{path}: its rows are sentence pairs, which have no template, metrics or generation"
            raise DataError("data.invalid_suite", what, hint="leave these keys out")
        return replace(found, name=short_name(file.name or path.stem))
    # Settings of the training source, such as its held-out file, do not apply to the suite.
    changes: dict[str, Any] = {"valid": None, "limit": None}
    if find_dataset(name) is not None:  # the recipe's columns are those of its own data
        changes["columns"] = ColumnsConfig()
    data = recipe.data.of(name, **changes)
    suite = _suite(short_name(name), _load(data, "test", recipe, listener, require_output=False))
    return suite if suite.is_pairs else _with_references(suite, listener)


def _with_references(suite: Suite, listener: Listener) -> Suite:
    """Return the suite without the rows that have no reference, with a warning; all rows if none has one."""
    missing = [row for row in suite.rows if not row.is_answered]
    if not missing:
        return suite
    if len(missing) == len(suite.rows):
        listener(Warned(f"{suite.name}: no row has a reference, so that only metrics without references are defined"))
        return suite
    listener(
        Warned(f"{suite.name}: {counted(len(missing), 'row')} without a reference left out, first {missing[0].where}")
    )
    return replace(suite, rows=[row for row in suite.rows if row.is_answered])


def held_out(recipe: Recipe, listener: Listener = silent) -> Suite:
    """Load the validation rows of the recipe's own data, at most ``data.valid_limit`` and ``eval.limit`` of them."""
    return _suite(HELD_OUT, _load(recipe.data, "valid", recipe, listener))


def _load(data: DataConfig, split: Split, recipe: Recipe, listener: Listener, *, require_output: bool = True) -> Rows:
    """Load prompts with references, or scored sentence pairs. Raises DataError for a mixture of both.

    require_output: if false, prompts may have no reference.
    """
    limit = recipe.eval.limit
    rows = load_rows(data, split, listener=listener, limit=limit, form=ROWS_OR_PAIRS, require_output=require_output)
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
