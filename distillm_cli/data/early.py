"""Rows read, and tokenised by the rules in a tokenizer's file, while torch and transformers are still being imported.

Importing them takes seconds in which a core has nothing to do, and the rows need neither. Nothing is decided here: which
tokenizer a run has is known only with its models, and what was made by other rules than its own is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tokenizers import Tokenizer

from distillm_cli.config.schema import Data
from distillm_cli.core.events import Event, Listener
from distillm_cli.data.bare_ids import BareIds, bare_ids, same_rules
from distillm_cli.data.rows import Row
from distillm_cli.data.sources import Rows, Split, load_rows, local_place
from distillm_cli.data.templates import form_of

CHUNK = 500  # rows tokenised in one call
Made = dict[tuple[int, int], "Future[BareIds]"]  # (identity of the rows, number of the first) → ids of a chunk of them


def begun(pool: ThreadPoolExecutor, sources: Iterable[SequenceOf[Row]], template: str, tokenizer: Any) -> Made:
    """The bare ids of all rows of some sources, chunk by chunk, as the pool comes to them."""
    return {
        (id(rows), at): pool.submit(bare_ids, rows[at : at + CHUNK], template, tokenizer)
        for rows in sources
        for at in range(0, len(rows), CHUNK)
    }


class Early:
    """Training and held-out rows on their way, and their bare ids. To be used as a context: leaving it ends the work.

    find: the ``tokenizer.json`` that the run will most likely turn out to have, None for none; called in the thread.
    Entering it again is nothing new, so that whoever begins it and whoever needs it may both see to its end.
    Rows on the hub are only begun when they are asked for.
    """

    def __init__(self, data: Data, find: Callable[[], Path | None]):
        self._data, self._find = data, find
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenising")
        self._said: dict[Split, SimpleQueue[Event | None]] = {}
        self._rows: dict[Split, Future[Rows]] = {}
        self._planned: Future[tuple[Tokenizer, Made] | None] | None = None

    def __enter__(self) -> Early:
        named = (self._data.source, self._data.valid)
        # What is on the hub waits for torch: `datasets` imports it too, and two threads would be in each other's way.
        if all(name is None or name == "builtin" or local_place(name) for name in named):
            self._begin()
        return self

    def _begin(self) -> None:
        if self._planned is None:
            for split in ("train", "valid"):
                self._said[split] = SimpleQueue()
                self._rows[split] = self._pool.submit(self._read, split)
            self._planned = self._pool.submit(self._plan)

    def __exit__(self, *_: Any) -> None:
        self.end()

    def end(self) -> None:
        """No more is made; waits for the chunk in hand."""
        self._pool.shutdown(cancel_futures=True)

    def rows(self, split: Split, listener: Listener) -> Rows:
        """As ``load_rows``; what there is to say is said while it is waited for, in this thread."""
        self._begin()
        said = self._said[split]
        while (event := said.get()) is not None:
            listener(event)
        return self._rows[split].result()

    def made(self, tokenizer: Any) -> Made:
        """The ids on their way, where they are what ``tokenizer`` makes; else none, and no more are made."""
        self._begin()
        try:
            planned = self._planned.result()
        except Exception:  # rows that cannot be read, a damaged file: told by whoever reads them for the run
            planned = None
        if planned is not None and same_rules(planned[0], tokenizer):
            return planned[1]
        self.end()
        return {}

    def _read(self, split: Split) -> Rows:
        try:
            return load_rows(self._data, split, listener=self._said[split].put)
        finally:
            self._said[split].put(None)

    def _plan(self) -> tuple[Tokenizer, Made] | None:
        file = self._find()
        if file is None:
            return None
        template = self._data.template
        sources = [rows.result() for rows in self._rows.values()]
        # Chat templates are transformers' own.
        if any(form_of(row, template) == "chat" for rows in sources for row in rows):
            return None
        rules = Tokenizer.from_file(str(file))
        rules.no_truncation()
        rules.no_padding()
        return rules, begun(self._pool, sources, template, rules)
