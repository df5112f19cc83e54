"""Tokenize rows in a thread while the main thread imports and loads the models.

What limits, ends and drops a row is known only with the models, so only ids without special tokens are made ahead, and
only of rows that no chat template writes: these depend on how the models end a turn.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from distillm_cli.config.schema import DataConfig
from distillm_cli.data.early import Early, Made, begun, ids_of_rows
from distillm_cli.data.rows import Row
from distillm_cli.data.templates import Renderer
from distillm_cli.data.token_ids import Affixes, TokenIds, find_affixes

T = TypeVar("T")


class Ahead:
    """Tokenize all rows of some sources in the background. To be used as a context: leaving it ends the work.

    tokenizer: None makes nothing. Inside the context it may be asked and saved elsewhere, but must tokenize nothing: it
    changes settings of its own before each text, and that is an error while another thread is in it. It releases the
    interpreter's lock while it works, and the thread ends between chunks, so neither imports nor Ctrl-C wait long for it.
    early: what was begun before there was a tokenizer; where it made what this one makes, nothing is made again.
    """

    def __init__(
        self, sources: Iterable[SequenceOf[Row]], data: DataConfig, tokenizer: Any | None, early: Early | None = None
    ):
        self._sources = list(sources)  # held, since they are known by their identity
        self._renderer = Renderer(data)
        self._early = early
        has_chat = getattr(tokenizer, "chat_template", None) is not None
        if (
            has_chat
            or data.special_tokens_in_text == "text"
            or any(self._renderer.form(row) == "chat" for rows in self._sources for row in rows)
        ):
            tokenizer = None
        self._tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenizing")
        self._affixes: Future[Affixes] | None = None
        self._chunks: Made = {}

    def __enter__(self) -> Ahead:
        if self._tokenizer is None:
            return self
        # First: it asks the tokenizer, which then belongs to the thread.
        made = {} if self._early is None else self._early.made(self._tokenizer)
        self._affixes = self._pool.submit(find_affixes, self._tokenizer)
        self._chunks = made or begun(self._pool, self._sources, self._make)
        return self

    def _make(self, rows: SequenceOf[Row]) -> list[TokenIds]:
        return ids_of_rows(rows, self._renderer, self._tokenizer)

    def __exit__(self, *_: Any) -> None:
        self._end()

    def _end(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._early is not None:
            self._early.end()

    def affixes(self, tokenizer: Any) -> Affixes | None:
        """Return what this tokenizer puts around a text; None as in ``take``."""
        return self._made(self._affixes, tokenizer)

    def take(self, rows: SequenceOf[Row], at: int, tokenizer: Any) -> list[TokenIds] | None:
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
