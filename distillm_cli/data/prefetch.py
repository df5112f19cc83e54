"""Read and tokenize rows in a thread while the main thread imports torch and transformers and loads the models.

The imports take seconds in which a core has nothing to do, and the rows need none of them: they are tokenized by the rules
in a tokenizer's file. Which tokenizer a run has is known only with its models, so token ids that it would not have made
itself are not used. What limits, ends and drops a row is known only with the models, too: only ids without special tokens
are made here, and only of rows that no chat template writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from distillm_cli.config.schema import DataConfig
from distillm_cli.data.rows import Row
from distillm_cli.data.sources import Rows, Split, load_rows, local_path
from distillm_cli.data.templates import Renderer
from distillm_cli.data.token_ids import (
    CHUNK,
    Affixes,
    TokenIds,
    find_affixes,
    has_same_rules,
    load_tokenizer_rules,
    token_ids,
)
from distillm_cli.training.events import Event, Listener
from distillm_cli.utils.threads import cores

_SPLITS: tuple[Split, ...] = ("train", "valid")
_Chunks = dict[tuple[str, int], "Future[list[TokenIds]]"]  # (name of the rows, number of the first) → ids of a chunk


@dataclass(frozen=True)
class _Reading:
    """Hold a split that is being read: the events for its listener, then None, and the rows."""

    events: SimpleQueue[Event | None]
    rows: Future[Rows]


class Prefetcher:
    """Read and tokenize rows in a thread. A context: leaving it ends the thread, after the chunk it is working on.

    find_tokenizer: returns the ``tokenizer.json`` that the run will most likely turn out to have, None for none.
    require_output: where false, rows may lack a response. Entering it again changes nothing, so that whoever starts it and
    whoever needs it may both end it. Rows on the hub are only read when they are asked for: `datasets` imports torch as
    well, and two threads would wait for each other.
    """

    def __init__(
        self, data: DataConfig, find_tokenizer: Callable[[], Path | None] = lambda: None, require_output: bool = True
    ):
        self._data = data
        self._find_tokenizer = find_tokenizer
        self._require_output = require_output
        self._renderer = Renderer(data)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenizing")
        self._readings: dict[Split, _Reading] = {}
        self._started: Future[tuple[str, _Chunks] | None] | None = None
        self._tokenizer: Any | None = None
        self._affixes: Affixes | None = None
        self._chunks: _Chunks = {}

    def __enter__(self) -> Prefetcher:
        named = [name for name in (self._data.source, self._data.valid) if name not in (None, "builtin")]
        if all(local_path(name) is not None for name in named):
            self._start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the thread. Waits for the chunk it is working on."""
        self._pool.shutdown(cancel_futures=True)

    def rows(self, split: Split, listener: Listener) -> Rows:
        """Return the rows as ``load_rows`` does, with its events and errors, in the calling thread."""
        self._start()
        reading = self._readings[split]
        while (event := reading.events.get()) is not None:
            listener(event)
        return reading.rows.result()

    def expect(self, tokenizer: Any | None, sources: Mapping[str, SequenceOf[Row]]) -> None:
        """Tokenize the rows as this tokenizer does: by its file, where that has the same rules, else with itself.

        tokenizer: transformers', which the run will most likely have; None tokenizes nothing. From here on the tokenizer
        belongs to the thread until its ids are taken: it may be read and saved elsewhere, but not tokenize, since it
        changes settings of its own before each text. sources: what ``rows`` returned, by name.
        """
        if tokenizer is None or not self._can_tokenize(tokenizer, sources):
            return
        # First: these ask the tokenizer, which then belongs to the thread.
        chunks = self._chunks_by_file(tokenizer) if self._started is not None else {}
        with suppress(Exception):  # whoever tokenizes the rows meets it again, and reports it
            self._affixes = find_affixes(tokenizer)
        self._tokenizer = tokenizer
        self._chunks = chunks or self._submit(sources, tokenizer)

    def affixes(self, tokenizer: Any) -> Affixes | None:
        """Return the special tokens that this tokenizer puts around a text; None as in ``take``."""
        if tokenizer is self._tokenizer:
            return self._affixes
        self.close()
        return None

    def take(self, name: str, tokenizer: Any, start: int) -> list[TokenIds] | None:
        """Return, once, the ids of the chunk of a source that begins at a row. Waits for them.

        None where they are of another tokenizer, or could not be made: whoever tokenizes the rows then meets the same
        error, and reports it. From then on nothing is prefetched.
        """
        chunk = self._chunks.pop((name, start), None)
        is_made = chunk is not None and tokenizer is self._tokenizer and not chunk.cancelled()
        if is_made and chunk.exception() is None:
            return chunk.result()
        self.close()
        return None

    def _start(self) -> None:
        if self._started is not None:
            return
        for split in _SPLITS:
            events: SimpleQueue[Event | None] = SimpleQueue()
            self._readings[split] = _Reading(events, self._pool.submit(self._read, split, events))
        self._started = self._pool.submit(self._tokenize_by_file)

    def _read(self, split: Split, events: SimpleQueue[Event | None]) -> Rows:
        try:
            return load_rows(self._data, split, listener=events.put, require_output=self._require_output)
        finally:
            events.put(None)

    def _tokenize_by_file(self) -> tuple[str, _Chunks] | None:
        """Submit all rows; return the rules they are tokenized by as text, and their chunks. None without such a file."""
        sources = {split: self._readings[split].rows.result() for split in _SPLITS}
        rules = load_tokenizer_rules(sources.values(), self._renderer, self._find_tokenizer)
        return None if rules is None else (rules.to_str(), self._submit(sources, rules))

    def _submit(self, sources: Mapping[str, SequenceOf[Row]], tokenizer: Any) -> _Chunks:
        tokenize = partial(self._token_ids, tokenizer=tokenizer)
        return {
            (name, start): self._pool.submit(tokenize, rows[start : start + CHUNK])
            for name, rows in sources.items()
            for start in range(0, len(rows), CHUNK)
        }

    def _token_ids(self, rows: SequenceOf[Row], tokenizer: Any) -> list[TokenIds]:
        texts = [self._renderer.text(row) for row in rows]
        with _one_tokenizer_thread() if cores() <= 2 else nullcontext():
            return token_ids(texts, tokenizer)

    def _can_tokenize(self, tokenizer: Any, sources: Mapping[str, SequenceOf[Row]]) -> bool:
        """Return whether ids can be made before the models are known: a chat template depends on how they end a turn."""
        if getattr(tokenizer, "chat_template", None) is not None or self._data.special_tokens_in_text == "text":
            return False
        return all(self._renderer.form(row) != "chat" for rows in sources.values() for row in rows)

    def _chunks_by_file(self, tokenizer: Any) -> _Chunks:
        """Return the chunks being tokenized, where they are what ``tokenizer`` makes; else none, and they are canceled."""
        try:
            started = self._started.result()
        except Exception:  # a damaged file: whoever loads the tokenizer reports it
            started = None
        if started is None:
            return {}
        rules, chunks = started
        if has_same_rules(rules, tokenizer):
            return chunks
        for chunk in chunks.values():
            chunk.cancel()
        return {}


@contextmanager
def _one_tokenizer_thread() -> Iterator[None]:
    """Keep the tokenizers library, which asks the environment at each call, to one core: the imports need the other."""
    name = "TOKENIZERS_PARALLELISM"
    if name in os.environ:
        yield
        return
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name, None)
