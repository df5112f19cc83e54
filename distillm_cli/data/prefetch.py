"""Read and tokenize rows in a thread while the main thread imports torch and transformers and loads the models.

The imports take seconds in which a core is idle, and the rows need none of them: they are tokenized by the rules in a
tokenizer's file. The run's tokenizer is known only after its models are loaded, and prefetched token ids are used only
if it returns the same ones. Length limits and end tokens are also known only then, so only ids without special tokens
are computed here, and only of rows without a chat template.
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
from distillm_cli.data.sources import Rows, Split, kinds_of, load_rows, local_path, named_parts
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
    """Read and tokenize rows in a thread. As a context manager it ends the thread at exit, after the current chunk.

    find_tokenizer: returns the most likely ``tokenizer.json`` of the run, or None. require_output: if false, rows may
    lack a response. The context may be entered more than once, by the code that starts the prefetcher and by the code
    that uses it. Rows on the hub are read only on request: `datasets` imports torch as well, and two threads would wait
    for each other.
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
        names = [name for name in (*self._data.names, self._data.valid) if name not in (None, "builtin")]
        if all(local_path(name) is not None for name in names):
            self._start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the thread after its current chunk."""
        self._pool.shutdown(cancel_futures=True)

    def rows(self, split: Split, listener: Listener) -> Rows:
        """Return the rows as ``load_rows`` does, with its events and errors, in the calling thread."""
        self._start()
        reading = self._readings[split]
        while (event := reading.events.get()) is not None:
            listener(event)
        return reading.rows.result()

    def expect(self, tokenizer: Any | None, sources: Mapping[str, SequenceOf[Row]]) -> None:
        """Tokenize the rows with this tokenizer, or with its file if that has the same rules.

        tokenizer: the most likely tokenizer of the run, of transformers; None: nothing is tokenized. Until its ids are
        taken only the thread may tokenize with it, since it changes its own settings before each text; others may read
        and save it. sources: results of ``rows``, by name.
        """
        if tokenizer is None or not self._can_tokenize(tokenizer, sources):
            return
        # First, because these use the tokenizer, which only the thread may use later.
        chunks = self._chunks_by_file(tokenizer) if self._started is not None else {}
        with suppress(Exception):  # reported when the rows are tokenized again
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
        """Wait for the ids of the chunk of a source that begins at a row, and return them. They are returned once.

        Returns None if they are of another tokenizer, or could not be computed. The caller then tokenizes the rows and
        reports errors, and nothing more is prefetched.
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
            return load_rows(self._data, split, listener=events.put, require_output=self._require_output, stored=True)
        finally:
            events.put(None)

    def _tokenize_by_file(self) -> tuple[str, _Chunks] | None:
        """Submit all rows; return the tokenization rules as text, and the chunks. None without such a file."""
        sources: dict[str, SequenceOf[Row]] = {}
        for split in _SPLITS:
            sources |= named_parts(split, self._readings[split].rows.result())
        rules = load_tokenizer_rules(sources.values(), self._renderer, self._find_tokenizer)
        return None if rules is None else (rules.to_str(), self._submit(sources, rules))

    def _submit(self, sources: Mapping[str, SequenceOf[Row]], tokenizer: Any) -> _Chunks:
        tokenize = partial(self._token_ids, tokenizer=tokenizer)
        return {
            (name, start): self._pool.submit(tokenize, rows[start : start + CHUNK])
            for name, rows in sources.items()
            if not getattr(rows, "are_stored", False)
            for start in range(0, len(rows), CHUNK)
        }

    def _token_ids(self, rows: SequenceOf[Row], tokenizer: Any) -> list[TokenIds]:
        texts = [self._renderer.text(row) for row in rows]
        with _one_tokenizer_thread() if cores() <= 2 else nullcontext():
            return token_ids(texts, tokenizer)

    def _can_tokenize(self, tokenizer: Any, sources: Mapping[str, SequenceOf[Row]]) -> bool:
        """Return whether ids can be computed before the models are loaded: a chat template depends on their stop tokens."""
        if getattr(tokenizer, "chat_template", None) is not None or self._data.special_tokens_in_text == "text":
            return False
        return all(self._renderer.form(row) != "chat" for rows in sources.values() for row in kinds_of(rows))

    def _chunks_by_file(self, tokenizer: Any) -> _Chunks:
        """Return the pending chunks if ``tokenizer`` has the same rules; else cancel them."""
        try:
            started = self._started.result()
        except Exception:  # a damaged file: reported when the tokenizer is loaded
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
    """Limit the tokenizers library, which reads the environment on each call, to one core: the imports need the other."""
    name = "TOKENIZERS_PARALLELISM"
    if name in os.environ:
        yield
        return
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name, None)
