"""Tokenising begun ahead: rows become token ids in a thread of its own, while this one imports and loads the models.

Nothing is decided here. What limits, ends and drops a row is known only with the models, so only the bare ids are made
ahead, and whoever needs them takes them chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from distillm_cli.data.bare_ids import BareIds, Ends, bare_ids, find_ends
from distillm_cli.data.early import Early, Made, begun
from distillm_cli.data.rows import Row

T = TypeVar("T")


class Ahead:
    """The bare ids of all rows of some sources, on their way. To be used as a context: leaving it ends the work.

    tokenizer: None makes nothing. Inside the context it may be asked and saved elsewhere, but must tokenise nothing: it
    changes settings of its own before each text, and that is an error while another thread is in it. It releases the
    interpreter's lock while it works, and the thread ends between chunks, so neither imports nor Ctrl-C wait long for it.
    early: what was begun before there was a tokenizer; where it made what this one makes, nothing is made again.
    """

    def __init__(
        self, sources: Iterable[SequenceOf[Row]], template: str, tokenizer: Any | None, early: Early | None = None
    ):
        self._tokenizer, self._template, self._early = tokenizer, template, early
        self._sources = list(sources)  # held, since they are known by their identity
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenising")
        self._ends: Future[Ends] | None = None
        self._chunks: Made = {}

    def __enter__(self) -> Ahead:
        if self._tokenizer is None:
            return self
        # First: it asks the tokenizer, which then belongs to the thread.
        made = {} if self._early is None else self._early.made(self._tokenizer)
        self._ends = self._pool.submit(find_ends, self._tokenizer)
        self._chunks = made or begun(self._pool, self._sources, self._make)
        return self

    def _make(self, rows: SequenceOf[Row]) -> BareIds:
        return bare_ids(rows, self._template, self._tokenizer)

    def __exit__(self, *_: Any) -> None:
        self._end()

    def _end(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._early is not None:
            self._early.end()

    def ends(self, tokenizer: Any) -> Ends | None:
        """What this tokenizer puts around a text; None as of ``take``."""
        return self._made(self._ends, tokenizer)

    def take(self, rows: SequenceOf[Row], at: int, tokenizer: Any) -> BareIds | None:
        """Those of the chunk of ``rows`` that begins at ``at``, once; waits for them.

        None where they are not made, or of another tokenizer, or could not be made. What was wrong is not told here: whoever
        then makes them meets it again, in its own turn. From then on nothing is made ahead.
        """
        return self._made(self._chunks.pop((id(rows), at), None), tokenizer)

    def _made(self, found: Future[T] | None, tokenizer: Any) -> T | None:
        if found is not None and tokenizer is self._tokenizer and not found.cancelled() and found.exception() is None:
            return found.result()
        self._end()
        return None
