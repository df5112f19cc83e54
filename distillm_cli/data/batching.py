"""Tokenize rows once, and order the examples by arithmetic on (seed, epoch, index), bucketed by length."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import get_all_start_methods, get_context

import numpy as np

from distillm_cli.config.schema import DataConfig
from distillm_cli.data.encoder import Encoded, Encoder, LeftOut, TooLong
from distillm_cli.data.rows import Row
from distillm_cli.data.sources import LISTED, Rows
from distillm_cli.data.token_ids import CHUNK, TokenIds
from distillm_cli.errors import DataError, PeerProcessError
from distillm_cli.training.events import Listener, Note, Progress, Warned, silent
from distillm_cli.types import Sequence
from distillm_cli.utils.text import all_are, counted

_WARNING_SHARE = 0.2  # share of dropped rows above which a warning is printed
_COVERED_SHARE = 0.95  # share of rows within the limits that the warning suggests


@dataclass(frozen=True, eq=False)
class Examples:
    """Hold the examples to train on. sequences[i] comes from rows[i] and has ``row == i``.

    dropped: number of rows that are too long. dropped_prompts: number of those whose prompt alone is too long.
    truncated: responses that were cut. unsupervised: rows without a response to train on. refused: the reason for each
    row that could not be rendered (``data.skip_bad_rows``). spanning: rows in which a token spans the end of the
    prompt. special_tokens: rows that have a special token in their text, by token. ignored_fields: rows with a field
    that the chat template does not write, by field. end_ids: end tokens of responses other than the usual one.
    """

    sequences: list[Sequence]
    rows: list[Row]
    dropped: int = 0
    dropped_prompts: int = 0
    truncated: int = 0
    unsupervised: int = 0
    refused: list[str] = field(default_factory=list)
    spanning: int = 0
    special_tokens: dict[str, list[Row]] = field(default_factory=dict)
    ignored_fields: Counter[str] = field(default_factory=Counter)
    end_ids: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of prompt and response, per sequence."""
        return np.array([len(sequence) for sequence in self.sequences], dtype=np.int64)

    @property
    def tokens(self) -> int:
        """Return the number of supervised tokens, including end-of-sequence."""
        return sum(sequence.supervised for sequence in self.sequences)


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
    chunks = [(rows[start : start + CHUNK], start, max_context) for start in range(0, len(rows), CHUNK)]
    examples = Examples([], [])
    left_out = []
    truncated = 0
    spanning = 0
    name = str(rows) if isinstance(rows, Rows) else ""
    outcomes_by_chunk = _encode_chunks(chunks, encoder, data.workers, prefetched)
    for (chunk, start, _), outcomes in zip(chunks, outcomes_by_chunk, strict=True):
        for row, outcome in zip(chunk, outcomes, strict=True):
            if not isinstance(outcome, Encoded):
                left_out.append(outcome)
                continue
            truncated += outcome.truncated
            spanning += outcome.spans_prompt_end
            examples.end_ids.update(outcome.end_ids)
            examples.ignored_fields.update(outcome.ignored_fields)
            for token in outcome.special_tokens:
                examples.special_tokens.setdefault(token, []).append(row)
            examples.sequences.append(replace(outcome.sequence, row=len(examples)))
            examples.rows.append(row)
        listener(Progress(f"tokenizing {name}".rstrip(), start + len(chunk), len(rows), "rows"))
    too_long = [row for row in left_out if isinstance(row, TooLong)]
    others = [row for row in left_out if isinstance(row, LeftOut)]
    if not examples.sequences:
        raise _no_rows_error(too_long, others, encoder.limit(max_context))
    examples = replace(
        examples,
        dropped=len(too_long),
        dropped_prompts=sum(row.part == "prompt" for row in too_long),
        truncated=truncated,
        unsupervised=sum(not row.reason for row in others),
        refused=[row.reason for row in others if row.reason],
        spanning=spanning,
    )
    prefix = f"{name}: " if name else ""
    _report_lengths(examples, too_long, prefix, encoder, max_context, listener)
    _report_texts(examples, prefix, data, listener)
    return examples


def _report_texts(examples: Examples, prefix: str, data: DataConfig, listener: Listener) -> None:
    """Report unusual texts of the rows."""
    rows = len(examples)
    for reason in examples.refused[:LISTED]:
        listener(Warned(f"skipped {reason}"))
    if len(examples.refused) > LISTED:
        listener(Warned(f"{prefix}skipped {counted(len(examples.refused), 'row')} in total that could not be rendered"))
    if examples.unsupervised:
        dropped = counted(examples.unsupervised, "row")
        listener(Note(f"{prefix}{dropped} dropped: no response to train on (weight 0, train false, or none)"))
    if examples.spanning:
        share = f"{examples.spanning:,} of {counted(rows, 'row')}"
        listener(Note(f"{prefix}in {share} a token spans the end of the prompt: it counts as part of the response"))
    if examples.special_tokens and data.special_tokens_in_text != "text":
        commonest = sorted(examples.special_tokens.items(), key=lambda item: -len(item[1]))[:5]
        tokens = ", ".join(
            f"{token} in {counted(len(found), 'row')} (first {found[0].where})" for token, found in commonest
        )
        message = f"{prefix}special tokens in the text of rows are encoded as special tokens: {tokens}"
        listener(Warned(f"{message}; --set data.special_tokens_in_text=text encodes them as text"))
    for field_name, count in examples.ignored_fields.items():
        share = f"{count / rows * 100:.0f} % of rows"
        listener(Note(f"{prefix}the chat template omits `{field_name}` of the responses ({share})"))


def _report_lengths(
    examples: Examples, too_long: list[TooLong], prefix: str, encoder: Encoder, context: int | None, listener: Listener
) -> None:
    """Report rows that were dropped and responses that were cut."""
    limit = encoder.limit(context)
    dropped = examples.dropped
    prompts = examples.dropped_prompts
    rows = len(examples) + dropped
    if dropped:
        prompt_limit = min(encoder.max_prompt_length, limit)
        reasons = []
        if prompts:
            reasons.append(f"{prompts:,} with a prompt over {prompt_limit:,} tokens")
        if dropped > prompts:
            reasons.append(f"{dropped - prompts:,} over {limit:,} tokens in total")
        message = f"{prefix}{dropped:,} of {counted(rows, 'row')} dropped as too long: {', '.join(reasons)}"
        if dropped > _WARNING_SHARE * rows:
            listener(Warned(f"{message}; {_suggest_limits(examples, too_long, encoder, context)}"))
        else:
            listener(Note(message))
    if examples.truncated:
        share = f"{examples.truncated:,} of {counted(rows, 'response')}"
        listener(Note(f"{prefix}{share} cut at {limit:,} tokens, including the prompt"))


def _suggest_limits(examples: Examples, too_long: list[TooLong], encoder: Encoder, context: int | None) -> str:
    """Return the options that keep ``_COVERED_SHARE`` of the rows, or a message if the model's context is too short."""
    prompts = [len(sequence.prompt) for sequence in examples.sequences] + [row.prompt for row in too_long]
    lengths = [*examples.lengths.tolist(), *(row.prompt + row.response for row in too_long)]
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


def _no_rows_error(too_long: list[TooLong], others: list[LeftOut], limit: int) -> DataError:
    """Return the error for a source without usable rows."""
    if not too_long:
        if not others:
            return DataError("data.no_rows", "no rows to tokenize", hint="check the source")
        reasons = [row.reason for row in others if row.reason]
        if not reasons:
            message = f"{all_are(len(others), 'row')} without a response to train on"
            return DataError(
                "data.no_answer", message, where=others[0].where, hint="check the messages' weight and train fields"
            )
        return DataError("data.no_rows", f"no rows left: {reasons[0]}", hint="check the rows")
    shortest = min(too_long, key=lambda row: row.prompt + row.response)
    prompt_limit = min(row.limit for row in too_long if row.part == shortest.part)
    limits = f"{limit:,} tokens in total"
    if shortest.part != "row":
        limits = f"{prompt_limit:,} for the prompt, {limit:,} in total"
    return DataError(
        "data.row_too_long",
        f"{all_are(len(too_long), 'row')} too long: the shortest has {shortest.prompt:,} + {shortest.response:,} tokens "
        f"(prompt + response), the limit is {limits}",
        where=shortest.where,
        hint="raise --max-length (and data.max_prompt_length), or use a model with a longer context",
    )


Chunk = tuple[SequenceOf[Row], int, int | None]  # rows, the number of the first, the model's context


def _encode_chunks(
    chunks: list[Chunk],
    encoder: Encoder,
    workers: int,
    prefetched: Callable[[int], list[TokenIds] | None] | None,
) -> Iterator[list[Encoded | TooLong | LeftOut]]:
    """Encode the chunks in order, in this process or in ``workers`` processes."""
    if workers == 0 or len(chunks) < 2:
        for rows, start, context in chunks:
            yield encoder.encode(rows, start, context, None if prefetched is None else prefetched(start))
        return
    # Not forked from this process: a child would inherit the locks of threads that do not exist in it. A fork server
    # imports the heavy libraries once for all workers; without a fork server, each worker imports them.
    context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__, type(encoder.tokenizer).__module__])
    pool = ProcessPoolExecutor(
        min(workers, len(chunks)), mp_context=context, initializer=_start_worker, initargs=(encoder,)
    )
    try:
        yield from pool.map(_encode_in_worker, chunks)
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


class Order:
    """Compute which examples a step trains on, as a function of (seed, epoch, index) alone: a resume needs one integer.

    Each epoch permutes the examples and cuts the permutation into batches. With ``bucket`` > 1 it is first cut into
    buckets of up to that many batches, each bucket is sorted by length, and the batches of the epoch are shuffled: the
    sequences of a batch have about the same length, and both the composition and the position of a batch are random.
    That saves forward passes, but adds gradient noise if length depends on the kind of task. An epoch has only complete
    batches; the remaining examples (fewer than one batch, different ones in every epoch) are not used in that epoch.
    Fewer examples than one batch are one batch.
    """

    def __init__(self, lengths: SequenceOf[int] | np.ndarray, batch: int, seed: int, bucket: int = 1):
        self._lengths = np.asarray(lengths, dtype=np.int64)
        if not len(self._lengths):
            raise ValueError("no examples to order")
        self._batch = min(batch, len(self._lengths))
        self._seed = seed
        self._bucket = bucket
        self.steps_per_epoch = steps_per_epoch(len(self._lengths), batch)
        self._cached_epoch = -1
        self._cached_batches = np.empty((0, 0), dtype=np.int64)

    def batch(self, step: int) -> list[int]:
        """Return the indices of the examples of a (micro-)step, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._cached_epoch != epoch:
            self._cached_batches = self._batches(epoch)
            self._cached_epoch = epoch
        return self._cached_batches[index].tolist()

    def _batches(self, epoch: int) -> np.ndarray:
        steps = self.steps_per_epoch
        # Raw bits sorted, rather than a shuffle: their stream is the same in every version of numpy.
        bits = np.random.Philox(np.random.SeedSequence([self._seed, epoch]))
        permutation = np.argsort(bits.random_raw(len(self._lengths)), kind="stable")[: steps * self._batch]
        # A short epoch is cut into several buckets too: with one bucket, every epoch would have the same batches.
        size = max(1, min(self._bucket, steps // 4)) * self._batch
        buckets = (permutation[start : start + size] for start in range(0, len(permutation), size))
        by_length = [bucket[np.argsort(self._lengths[bucket], kind="stable")] for bucket in buckets]
        batches = np.concatenate(by_length).reshape(steps, self._batch)
        return batches[np.argsort(bits.random_raw(steps), kind="stable")]


def batches_by_length(sequences: SequenceOf[Sequence], batch: int) -> list[list[Sequence]]:
    """Return all sequences, each once, in batches of about the same length, for scoring.

    The longest come first, so that a lack of memory shows immediately.
    """
    ordered = sorted(sequences, key=len, reverse=True)
    return [ordered[start : start + batch] for start in range(0, len(ordered), batch)]
