"""Tokenize rows once, and order the examples by arithmetic on (seed, epoch, index), bucketed by length."""

from __future__ import annotations

import io
import math
import os
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_all_start_methods, get_context
from typing import Any

import numpy as np

from distillm_cli.config.schema import DataConfig
from distillm_cli.data.encoder import Encoded, Encoder, LeftOut, TooLong
from distillm_cli.data.row_store import JoinedRows
from distillm_cli.data.rows import Row
from distillm_cli.data.sources import LISTED, Rows, named_parts, pick
from distillm_cli.data.token_ids import CHUNK, TokenIds
from distillm_cli.errors import DataError, PeerProcessError
from distillm_cli.training.events import Listener, Note, Progress, Warned, silent
from distillm_cli.types import (
    PackedSequences,
    Sequence,
    SequencePacker,
    SequenceView,
    as_int32,
    lengths_of,
    supervised_of,
)
from distillm_cli.utils.text import all_are, counted

_WARNING_SHARE = 0.2  # share of dropped rows above which a warning is printed
_CHUNKS_AHEAD = 4  # chunks of rows that wait for each tokenizing process
_ROUND = 0x526F756E  # separates the seeds of the rounds of a source from those of epochs
_COVERED_SHARE = 0.95  # share of rows within the limits that the warning suggests


@dataclass(frozen=True, eq=False)
class Examples:
    """Hold the examples to train on. sequences[i] comes from rows[i] and has ``row == i``.

    dropped: number of rows that are too long. dropped_prompts: number of those whose prompt alone is too long.
    truncated: responses that were cut. unsupervised: rows without a response to train on. refused: the reason for each
    row that could not be rendered (``data.skip_bad_rows``). spanning: rows in which a token spans the end of the prompt.
    end_ids: end tokens of responses other than the usual one. part_sizes: number of examples of each source of a mixture,
    which are one after the other.
    """

    sequences: SequenceOf[Sequence]
    rows: SequenceOf[Row]
    dropped: int = 0
    dropped_prompts: int = 0
    truncated: int = 0
    unsupervised: int = 0
    refused: list[str] = field(default_factory=list)
    spanning: int = 0
    end_ids: set[int] = field(default_factory=set)
    part_sizes: tuple[int, ...] = ()

    @classmethod
    def joined(cls, parts: SequenceOf[Examples]) -> Examples:
        """Return the examples of several sources, one source after the other."""
        return cls(
            SequenceView.joined([part.sequences for part in parts]),
            JoinedRows([part.rows for part in parts]),
            dropped=sum(part.dropped for part in parts),
            dropped_prompts=sum(part.dropped_prompts for part in parts),
            truncated=sum(part.truncated for part in parts),
            unsupervised=sum(part.unsupervised for part in parts),
            refused=[reason for part in parts for reason in part.refused],
            spanning=sum(part.spanning for part in parts),
            end_ids=set().union(*(part.end_ids for part in parts)),
            part_sizes=tuple(len(part) for part in parts),
        )

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of prompt and response, per sequence."""
        return lengths_of(self.sequences)

    @property
    def tokens(self) -> int:
        """Return the number of supervised tokens, including end-of-sequence."""
        return int(supervised_of(self.sequences).sum())


@dataclass
class Tokenized:
    """Describe rows that were tokenized, apart from the tokens. Each list or count is of one kind of row.

    rows: number of all rows. kept: indices of the rows that became examples. too_long, left_out: the other rows.
    truncated: responses that were cut. spanning: rows in which a token spans the end of the prompt. special_tokens: number
    of rows with a special token in their text, by token, and special_at: the first of them. ignored_fields: rows with a
    field that the chat template does not write, by field. end_ids: end tokens of responses other than the usual one.
    """

    rows: int = 0
    kept: array[int] = field(default_factory=lambda: array("q"))
    too_long: list[TooLong] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    truncated: int = 0
    spanning: int = 0
    special_tokens: Counter[str] = field(default_factory=Counter)
    special_at: dict[str, str] = field(default_factory=dict)
    ignored_fields: Counter[str] = field(default_factory=Counter)
    end_ids: set[int] = field(default_factory=set)

    @property
    def refused(self) -> list[str]:
        """Return the reason for each row that could not be rendered."""
        return [row.reason for row in self.left_out if row.reason]

    def add(self, row: Row, outcome: Encoded | TooLong | LeftOut) -> bool:
        """Count the next row; return whether it became an example."""
        index = self.rows
        self.rows += 1
        if isinstance(outcome, TooLong):
            self.too_long.append(outcome)
            return False
        if isinstance(outcome, LeftOut):
            self.left_out.append(outcome)
            return False
        self.kept.append(index)
        self.truncated += outcome.truncated
        self.spanning += outcome.spans_prompt_end
        self.end_ids |= outcome.end_ids
        self.ignored_fields.update(outcome.ignored_fields)
        self.special_tokens.update(outcome.special_tokens)
        for token in outcome.special_tokens:
            self.special_at.setdefault(token, row.where)
        return True

    def facts(self) -> dict[str, Any]:
        """Return the arguments of ``Examples`` other than sequences and rows."""
        return {
            "dropped": len(self.too_long),
            "dropped_prompts": sum(row.part == "prompt" for row in self.too_long),
            "truncated": self.truncated,
            "unsupervised": sum(not row.reason for row in self.left_out),
            "refused": self.refused,
            "spanning": self.spanning,
            "end_ids": self.end_ids,
        }


def tokenize(
    rows: SequenceOf[Row],
    encoder: Encoder,
    data: DataConfig,
    listener: Listener = silent,
    max_context: int | None = None,
    prefetched: Callable[[int], list[TokenIds] | None] | None = None,
) -> Examples:
    """Turn rows into sequences. Rows that are too long are dropped, cut or refused, by ``data.too_long``, and reported.

    data.workers processes tokenize when it is above 0; the result is the same. max_context: positions of the model.
    prefetched: returns the prefetched token ids of the chunk that begins at a row, None without them. Raises DataError
    when a row is refused or when no row is left.
    """
    ids = io.BytesIO()
    turns = io.BytesIO()
    packer = SequencePacker(ids, turns)
    found = tokenize_into(packer, rows, encoder, data, listener, max_context, prefetched)
    sequences = PackedSequences(as_int32(ids), packer.sizes_S3, as_int32(turns), packer.digest)
    own_rows = rows.rows if isinstance(rows, Rows) else rows
    return Examples(sequences, pick(own_rows, found.kept), **found.facts())


def by_source(name: str, rows: SequenceOf[Row], make: Callable[[str, SequenceOf[Row]], Examples]) -> Examples:
    """Return the examples that ``make`` returns for the rows of each source, given their name (``named_parts``)."""
    parts = [make(part_name, part) for part_name, part in named_parts(name, rows).items()]
    return Examples.joined(parts) if getattr(rows, "parts", ()) else parts[0]


def tokenize_into(
    packer: SequencePacker,
    rows: SequenceOf[Row],
    encoder: Encoder,
    data: DataConfig,
    listener: Listener = silent,
    max_context: int | None = None,
    prefetched: Callable[[int], list[TokenIds] | None] | None = None,
) -> Tokenized:
    """Tokenize rows like ``tokenize``, but add the sequences to ``packer``. A chunk of rows is in memory at a time."""
    found = Tokenized()
    name = str(rows) if isinstance(rows, Rows) else ""
    chunks = ((rows[start : start + CHUNK], start, max_context) for start in range(0, len(rows), CHUNK))
    workers = min(data.workers, math.ceil(len(rows) / CHUNK)) if len(rows) > CHUNK else 0
    for chunk, outcomes in _encode_chunks(chunks, encoder, workers, prefetched):
        for row, outcome in zip(chunk, outcomes, strict=True):
            if found.add(row, outcome):
                packer.append(outcome.sequence)
        listener(Progress(f"tokenizing {name}".rstrip(), found.rows, len(rows), "rows"))
    if not len(packer):
        raise _no_rows_error(found.too_long, found.left_out, encoder.limit(max_context), name)
    prefix = f"{name}: " if name else ""
    _report_lengths(found, packer.sizes_S3, prefix, encoder, max_context, listener)
    _report_texts(found, prefix, data, listener)
    return found


def _report_texts(found: Tokenized, prefix: str, data: DataConfig, listener: Listener) -> None:
    """Report unusual texts of the rows."""
    rows = len(found.kept)
    refused = found.refused
    for reason in refused[:LISTED]:
        listener(Warned(f"skipped {reason}"))
    if len(refused) > LISTED:
        listener(Warned(f"{prefix}skipped {counted(len(refused), 'row')} in total that could not be rendered"))
    if unsupervised := len(found.left_out) - len(refused):
        dropped = counted(unsupervised, "row")
        listener(Note(f"{prefix}{dropped} dropped: no response to train on (weight 0, train false, or none)"))
    if found.spanning:
        share = f"{found.spanning:,} of {counted(rows, 'row')}"
        listener(Note(f"{prefix}in {share} a token spans the end of the prompt: it counts as part of the response"))
    if found.special_tokens and data.special_tokens_in_text != "text":
        tokens = ", ".join(
            f"{token} in {counted(count, 'row')} (first {found.special_at[token]})"
            for token, count in found.special_tokens.most_common(5)
        )
        message = f"{prefix}special tokens in the text of rows are encoded as special tokens: {tokens}"
        listener(Warned(f"{message}; --set data.special_tokens_in_text=text encodes them as text"))
    for field_name, count in found.ignored_fields.items():
        share = f"{count / rows * 100:.0f} % of rows"
        listener(Note(f"{prefix}the chat template omits `{field_name}` of the responses ({share})"))


def _report_lengths(
    found: Tokenized, sizes_S3: np.ndarray, prefix: str, encoder: Encoder, context: int | None, listener: Listener
) -> None:
    """Report rows that were dropped and responses that were cut. sizes_S3: of the examples (``PackedSequences``)."""
    limit = encoder.limit(context)
    dropped = len(found.too_long)
    prompts = sum(row.part == "prompt" for row in found.too_long)
    rows = len(found.kept) + dropped
    if dropped:
        prompt_limit = min(encoder.max_prompt_length, limit)
        reasons = []
        if prompts:
            reasons.append(f"{prompts:,} with a prompt over {prompt_limit:,} tokens")
        if dropped > prompts:
            reasons.append(f"{dropped - prompts:,} over {limit:,} tokens in total")
        message = f"{prefix}{dropped:,} of {counted(rows, 'row')} dropped as too long: {', '.join(reasons)}"
        if dropped > _WARNING_SHARE * rows:
            listener(Warned(f"{message}; {_suggest_limits(sizes_S3, found.too_long, encoder, context)}"))
        else:
            listener(Note(message))
    if found.truncated:
        share = f"{found.truncated:,} of {counted(rows, 'response')}"
        listener(Note(f"{prefix}{share} cut at {limit:,} tokens, including the prompt"))


def _suggest_limits(sizes_S3: np.ndarray, too_long: list[TooLong], encoder: Encoder, context: int | None) -> str:
    """Return the options that keep ``_COVERED_SHARE`` of the rows, or a message if the model's context is too short."""
    prompts = [*sizes_S3[:, 0].tolist(), *(row.prompt for row in too_long)]
    lengths = [*sizes_S3[:, :2].sum(axis=1).tolist(), *(row.prompt + row.response for row in too_long)]
    length = sorted(lengths)[math.ceil(_COVERED_SHARE * len(lengths)) - 1]
    longest_prompt = max(prompt for prompt, total in zip(prompts, lengths, strict=True) if total <= length)
    if context is not None and length > context:
        return f"keeping {_COVERED_SHARE:.0%} needs {length:,} tokens, but the model's context is {context:,}"
    options = []
    if length > encoder.limit(context):
        options.append(f"--max-length {length}")
    if longest_prompt > encoder.max_prompt_length:
        options.append(f"--set data.max_prompt_length={longest_prompt}")
    return f"{' '.join(options)} would keep {_COVERED_SHARE:.0%}"


def _no_rows_error(too_long: list[TooLong], others: list[LeftOut], limit: int, name: str) -> DataError:
    """Return the error for a source without usable rows. name: of the source; may be empty."""
    prefix = f"{name}: " if name else ""
    if not too_long:
        if not others:
            return DataError("data.no_rows", f"{prefix}no rows to tokenize", hint="check the source")
        reasons = [row.reason for row in others if row.reason]
        if not reasons:
            message = f"{prefix}{all_are(len(others), 'row')} without a response to train on"
            return DataError(
                "data.no_answer", message, where=others[0].where, hint="check the messages' weight and train fields"
            )
        return DataError("data.no_rows", f"{prefix}no rows left: {reasons[0]}", hint="check the rows")
    shortest = min(too_long, key=lambda row: row.prompt + row.response)
    prompt_limit = min(row.limit for row in too_long if row.part == shortest.part)
    limits = f"{limit:,} tokens in total"
    if shortest.part != "row":
        limits = f"{prompt_limit:,} for the prompt, {limit:,} in total"
    return DataError(
        "data.row_too_long",
        f"{prefix}{all_are(len(too_long), 'row')} too long: the shortest has {shortest.prompt:,} + "
        f"{shortest.response:,} tokens (prompt + response), the limit is {limits}",
        where=shortest.where,
        hint="raise --max-length (and data.max_prompt_length), or use a model with a longer context",
    )


Chunk = tuple[SequenceOf[Row], int, int | None]  # rows, the number of the first, the model's context


def _encode_chunks(
    chunks: Iterable[Chunk],
    encoder: Encoder,
    workers: int,
    prefetched: Callable[[int], list[TokenIds] | None] | None,
) -> Iterator[tuple[SequenceOf[Row], list[Encoded | TooLong | LeftOut]]]:
    """Encode the chunks in order, in this process or in ``workers`` processes, and yield rows and outcomes."""
    if workers == 0:
        for rows, start, context in chunks:
            yield rows, encoder.encode(rows, start, context, None if prefetched is None else prefetched(start))
        return
    # Not forked from this process: a child would inherit the locks of threads that do not exist in it. A fork server
    # imports the heavy libraries once for all workers; without a fork server, each worker imports them.
    context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__, type(encoder.tokenizer).__module__])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(encoder,))
    pending: deque[tuple[SequenceOf[Row], Future[list[Encoded | TooLong | LeftOut]]]] = deque()
    try:
        for chunk in chunks:
            pending.append((chunk[0], pool.submit(_encode_in_worker, chunk)))
            if len(pending) > _CHUNKS_AHEAD * workers:
                rows, outcomes = pending.popleft()
                yield rows, outcomes.result()
        for rows, outcomes in pending:
            yield rows, outcomes.result()
    except BrokenProcessPool:
        raise PeerProcessError("process.died", "a tokenizing process died", hint="try --set data.workers=0") from None
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None  # of a worker process


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # parallel by processes, not by threads
    _encoder = encoder


def _encode_in_worker(chunk: Chunk) -> list[Encoded | TooLong | LeftOut]:
    return _encoder.encode(*chunk)


def steps_per_epoch(rows: int, batch: int) -> int:
    """Return the number of batches of an epoch. An incomplete batch counts only if there is no other."""
    return rows // min(batch, rows)


def steps_of_tokens(rows: int, total: float, tokens: int) -> int:
    """Return the number of batches of about ``tokens`` tokens in an epoch of ``rows`` rows with ``total`` tokens."""
    return max(1, min(rows, round(total / tokens)))


class Order:
    """Compute which examples a step trains on, as a function of (seed, epoch, index) alone: a resume needs one integer.

    Each epoch permutes the examples and cuts the permutation into batches. With ``bucket`` > 1 it is first cut into
    buckets of up to that many batches, each bucket is sorted by length, and the batches of the epoch are shuffled: the
    sequences of a batch have about the same length, and both the composition and the position of a batch are random.
    That saves forward passes, but adds gradient noise if length depends on the kind of task. An epoch has only complete
    batches; the remaining examples (fewer than one batch, different ones in every epoch) are not used in that epoch.
    Fewer examples than one batch are one batch.

    tokens: cut the permutation into batches of about this number of tokens, in place of ``batch`` examples. Every example
    is then used in every epoch, and all epochs have the same number of batches.
    """

    def __init__(
        self,
        lengths: SequenceOf[int] | np.ndarray,
        batch: int,
        seed: int,
        bucket: int = 1,
        tokens: int | None = None,
    ):
        self._tokens = tokens
        self._lengths = np.asarray(lengths, dtype=np.int64)
        if not len(self._lengths):
            raise ValueError("no examples to order")
        self._batch = min(batch, len(self._lengths))
        self._seed = seed
        self._bucket = bucket
        self.steps_per_epoch = steps_per_epoch(len(self._lengths), batch)
        if tokens is not None:
            self.steps_per_epoch = steps_of_tokens(len(self._lengths), float(self._lengths.sum()), tokens)
        self._cached_epoch = -1
        self._cached_batches: SequenceOf[np.ndarray] = []

    def batch(self, step: int) -> list[int]:
        """Return the indices of the examples of a (micro-)step, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._cached_epoch != epoch:
            self._cached_batches = self._batches(epoch)
            self._cached_epoch = epoch
        return self._cached_batches[index].tolist()

    def _batches(self, epoch: int) -> SequenceOf[np.ndarray]:
        steps = self.steps_per_epoch
        # Raw bits sorted, rather than a shuffle: their stream is the same in every version of numpy.
        bits = np.random.Philox(np.random.SeedSequence([self._seed, epoch]))
        permutation = self._examples(epoch, bits)
        if self._tokens is not None:
            return self._cut_by_tokens(permutation)
        # A short epoch is cut into several buckets too: with one bucket, every epoch would have the same batches.
        size = max(1, min(self._bucket, steps // 4)) * self._batch
        whole = len(permutation) // size * size  # the last bucket may be smaller
        buckets = (permutation[:whole].reshape(-1, size), permutation[whole:].reshape(1, -1))
        by_length = [
            np.take_along_axis(bucket, np.argsort(self._lengths[bucket], axis=1, kind="stable"), axis=1)
            for bucket in buckets
        ]
        batches = np.concatenate([bucket.ravel() for bucket in by_length]).reshape(steps, self._batch)
        return batches[np.argsort(bits.random_raw(steps), kind="stable")]

    def _examples(self, epoch: int, bits: np.random.Philox) -> np.ndarray:
        """Return the examples of an epoch in random order."""
        permutation = np.argsort(bits.random_raw(len(self._lengths)), kind="stable")
        return permutation if self._tokens is not None else permutation[: self.steps_per_epoch * self._batch]

    def _cut_by_tokens(self, examples: np.ndarray) -> list[np.ndarray]:
        """Cut an epoch into batches of about the same number of tokens, each with at least one example."""
        steps = self.steps_per_epoch
        lengths = self._lengths[examples]
        middles = np.cumsum(lengths) - lengths / 2
        cuts = np.searchsorted(middles, lengths.sum() * np.arange(1, steps) / steps)
        least = np.arange(1, steps)  # examples before each cut, so that no batch is empty
        spare = np.maximum.accumulate(np.clip(cuts - least, 0, len(examples) - steps))
        return np.split(examples, spare + least)


class MixedOrder(Order):
    """Order the examples of a mixture. An epoch has a fixed number of examples of each source.

    A source goes through its examples in rounds, each a permutation of all of them: an example is not repeated before all
    of its source were used, and an epoch continues where the one before it stopped. The numbers of an epoch add up to
    complete batches, so that no examples remain. Everything else is as in ``Order``.

    sizes: number of examples of each source, which are one after the other. wanted: number of examples of each source in
    an epoch, before it is rounded to complete batches. counts: the same afterwards.
    """

    def __init__(
        self,
        lengths: SequenceOf[int] | np.ndarray,
        batch: int,
        seed: int,
        bucket: int = 1,
        *,
        sizes: SequenceOf[int],
        wanted: SequenceOf[float],
        tokens: int | None = None,
    ):
        super().__init__(lengths, batch, seed, bucket, tokens)
        total = round(sum(wanted))
        self._batch = min(batch, total)
        self.steps_per_epoch = steps_per_epoch(total, batch)
        self._sizes = sizes
        if tokens is None:
            self.counts = apportioned(self.steps_per_epoch * self._batch, wanted)
            return
        self.counts = apportioned(total, wanted)
        of_source = np.split(self._lengths, np.cumsum(sizes)[:-1])
        expected = sum(count * float(part.mean()) for count, part in zip(self.counts, of_source, strict=True))
        self.steps_per_epoch = steps_of_tokens(total, expected, tokens)

    def _examples(self, epoch: int, bits: np.random.Philox) -> np.ndarray:
        starts = np.cumsum([0, *self._sizes])
        chosen = [
            start + self._rounds(source, epoch * count, (epoch + 1) * count)
            for source, (start, count) in enumerate(zip(starts, self.counts, strict=False))
        ]
        together = np.concatenate(chosen)
        return together[np.argsort(bits.random_raw(len(together)), kind="stable")]

    def _rounds(self, source: int, first: int, end: int) -> np.ndarray:
        """Return places ``first`` to ``end`` of a source's rounds, one after the other."""
        size = self._sizes[source]
        rounds = []
        for number in range(first // size, -(-end // size)):
            bits = np.random.Philox(np.random.SeedSequence([self._seed, number, source, _ROUND]))
            rounds.append(np.argsort(bits.random_raw(size), kind="stable"))
        skipped = first // size * size
        return np.concatenate([np.empty(0, dtype=np.int64), *rounds])[first - skipped : end - skipped]


def apportioned(total: int, wanted: SequenceOf[float]) -> list[int]:
    """Return whole numbers in proportion to ``wanted`` that add up to ``total``, by largest remainder."""
    exact = np.asarray(wanted, dtype=np.float64) * (total / sum(wanted))
    counts = np.floor(exact).astype(np.int64)
    missing = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts.tolist()


def batches_by_length(sequences: SequenceOf[Sequence], batch: int) -> list[list[Sequence]]:
    """Return all sequences, each once, in batches of about the same length, for scoring.

    The longest come first, so that a lack of memory shows immediately.
    """
    ordered = sorted(sequences, key=len, reverse=True)
    return [ordered[start : start + batch] for start in range(0, len(ordered), batch)]
