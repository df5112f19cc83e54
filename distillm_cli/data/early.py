"""Read and tokenize rows, by the rules in a tokenizer's file, while torch and transformers are still being imported.

Importing them takes seconds in which a core has nothing to do, and the rows need neither. Nothing is decided here: which
tokenizer a run has is known only with its models, and what was made by other rules than its own is not used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from distillm_cli.config.schema import DataConfig
from distillm_cli.data.helper import Helper, Lost
from distillm_cli.data.rows import Row
from distillm_cli.data.sources import Rows, Split, load_rows, local_place
from distillm_cli.data.templates import Renderer
from distillm_cli.data.token_ids import CHUNK, TokenIds, chunks, rules_for, same_rules, token_ids
from distillm_cli.training.events import Event, Listener
from distillm_cli.utils.host import cores

_MOST = 1 << 28  # bytes of rows on disk up to which a second process may hold them, too, for a while
Made = dict[tuple[int, int], "Future[list[TokenIds]]"]  # (identity of the rows, number of the first) → ids of a chunk


def begun(
    pool: ThreadPoolExecutor,
    sources: Iterable[SequenceOf[Row]],
    make: Callable[[SequenceOf[Row]], list[TokenIds]],
) -> Made:
    """Tokenize all rows of some sources in a pool, chunk by chunk."""
    return {(id(rows), at): pool.submit(make, rows[at : at + CHUNK]) for rows, at in chunks(sources)}


class Early:
    """Read and tokenize training and held-out rows in the background. To be used as a context: leaving it ends the work.

    find: the ``tokenizer.json`` that the run will most likely turn out to have, None for none; can be pickled.
    require_output: where false, rows may lack a response.
    Entering it again is nothing new, so that whoever begins it and whoever needs it may both see to its end.
    Rows on the hub are only begun when they are asked for. The work is done in a thread; while torch is yet to be
    imported, and there is a core for it, by a process that the thread waits for.
    """

    def __init__(self, data: DataConfig, find: Callable[[], Path | None], require_output: bool = True):
        self._data, self._find = data, find
        self._require_output = require_output
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenizing")
        self._helper: Helper | None = None
        self._said: dict[Split, SimpleQueue[Event | None]] = {}
        self._rows: dict[Split, Future[Rows]] = {}
        self._planned: Future[tuple[str, Made] | None] | None = None
        self._is_over = False

    def __enter__(self) -> Early:
        # What is on the hub waits for torch: `datasets` imports it too, and two threads would be in each other's way.
        if self._planned is None and (places := self._places()) is not None:
            if "torch" not in sys.modules and cores() > 1 and _size(places) <= _MOST:
                with suppress(OSError):  # no more processes allowed, say
                    self._helper = Helper(self._data, self._find, self._require_output)
            self._begin()
        return self

    def _places(self) -> list[Path] | None:
        """The files and directories to read; None where there are others than those."""
        named = [name for name in (self._data.source, self._data.valid) if name not in (None, "builtin")]
        places = [local_place(name) for name in named]
        return None if None in places else places

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
        self._is_over = True
        if self._helper is not None:
            self._helper.stop()
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
        say = self._said[split].put
        try:
            found = self._helped()
            if found is None:
                return load_rows(self._data, split, listener=say, require_output=self._require_output)
            rows, said = found
            for event in said:
                say(event)
            return rows
        finally:
            say(None)

    def _helped(self) -> tuple[Rows, list[Event]] | None:
        """The process's next rows. None where there is none (any more): they are read here, and what is wrong is told."""
        if self._helper is None:
            return None
        try:
            return self._helper.rows()
        except Lost:
            if self._is_over:
                raise
            self._helper.stop()
            self._helper = None
            return None

    def _plan(self) -> tuple[str, Made] | None:
        sources = [rows.result() for rows in self._rows.values()]
        if self._helper is not None:
            rules = self._helper.rules()
            return None if rules is None else (rules, begun(self._pool, sources, lambda _: self._helper.ids()))
        renderer = Renderer(self._data)
        rules = rules_for(sources, renderer, self._find)
        if rules is None:
            return None
        return rules.to_str(), begun(self._pool, sources, partial(ids_of_rows, renderer=renderer, tokenizer=rules))


def ids_of_rows(rows: SequenceOf[Row], renderer: Renderer, tokenizer: Any) -> list[TokenIds]:
    """Tokenize prompts and responses of rows that no chat template writes."""
    return token_ids([renderer.text(row) for row in rows], tokenizer)


def _size(places: Iterable[Path]) -> int:
    """Bytes of files, and of those in directories and in their ``data``."""
    files = [file for place in places for file in (place, *place.glob("*"), *place.glob("data/*"))]
    return sum(file.stat().st_size for file in files if file.is_file())
