"""Tokenize once; then the order of examples as arithmetic on (seed, epoch, index), bucketed by length."""

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

_MANY = 0.2  # share of dropped rows from which there is a warning
_KEPT = 0.95  # share of rows that the length it names would keep


@dataclass(frozen=True, eq=False)
class Examples:
    """Hold the examples to train on. sequences[i] comes from rows[i] and has ``row == i``.

    dropped: rows left out because they are too long; dropped_prompts: those of them whose prompt alone is. truncated:
    responses that were cut. unsupervised: rows without an answer to train on. refused: rows that could not be written,
    with the reason each (``data.skip_bad_rows``). moved: rows in which a token spans the end of the prompt. written: rows
    that have a special token in their text, by token. ignored: rows with a field that the chat template does not write,
    by field. ends: the tokens that answers end with, the usual one aside.
    """

    sequences: list[Sequence]
    rows: list[Row]
    dropped: int = 0
    dropped_prompts: int = 0
    truncated: int = 0
    unsupervised: int = 0
    refused: list[str] = field(default_factory=list)
    moved: int = 0
    written: dict[str, list[Row]] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    ends: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of prompt and response, per sequence."""
        return np.array([len(sequence) for sequence in self.sequences], dtype=np.int64)

    @property
    def tokens(self) -> int:
        """Supervised tokens, end-of-sequence included."""
        return sum(sequence.supervised for sequence in self.sequences)


def tokenize(
    rows: SequenceOf[Row],
    encoder: Encoder,
    data: DataConfig,
    listener: Listener = silent,
    max_context: int | None = None,
    prefetched: Callable[[int], list[TokenIds] | None] | None = None,
) -> Examples:
    """Rows → sequences, too long ones dropped, cut or refused as ``data.too_long`` says, counted and reported.

    data.workers processes tokenize when it is above 0; the result is the same. max_context: positions of the model.
    prefetched: returns the token ids of the chunk that begins at a row, where they were prefetched. Raises DataError when a
    row is refused or when no row is left.
    """
    chunks = [(rows[at : at + CHUNK], at, max_context) for at in range(0, len(rows), CHUNK)]
    examples, left_out = Examples([], []), []
    truncated = moved = 0
    name = str(rows) if isinstance(rows, Rows) else ""
    for (chunk, at, _), outcomes in zip(chunks, _encoded(chunks, encoder, data.workers, prefetched), strict=True):
        for row, outcome in zip(chunk, outcomes, strict=True):
            if not isinstance(outcome, Encoded):
                left_out.append(outcome)
                continue
            truncated += outcome.cut
            examples.ends.update(outcome.ends)
            moved += outcome.moved
            examples.ignored.update(outcome.ignored)
            for token in outcome.written:
                examples.written.setdefault(token, []).append(row)
            examples.sequences.append(replace(outcome.sequence, row=len(examples)))
            examples.rows.append(row)
        listener(Progress(f"tokenizing {name}".rstrip(), at + len(chunk), len(rows), "rows"))
    too_long = [over for over in left_out if isinstance(over, TooLong)]
    others = [out for out in left_out if isinstance(out, LeftOut)]
    if not examples.sequences:
        raise _nothing_left(too_long, others, encoder.limit(max_context))
    examples = replace(
        examples,
        dropped=len(too_long),
        dropped_prompts=sum(over.part == "prompt" for over in too_long),
        truncated=truncated,
        unsupervised=sum(not out.why for out in others),
        refused=[out.why for out in others if out.why],
        moved=moved,
    )
    _report(examples, too_long, f"{name}: " if name else "", encoder, max_context, listener)
    _report_rows(examples, f"{name}: " if name else "", data, listener)
    return examples


def _report_rows(examples: Examples, name: str, data: DataConfig, listener: Listener) -> None:
    """Report what is unusual about the rows' texts."""
    rows = len(examples)
    for why in examples.refused[:LISTED]:
        listener(Warned(f"skipped {why}"))
    if len(examples.refused) > LISTED:
        listener(Warned(f"{name}skipped {counted(len(examples.refused), 'row')} in all that could not be written"))
    if examples.unsupervised:
        what = (
            f"{counted(examples.unsupervised, 'row')} dropped: no answer to train on (weight 0, train false, or none)"
        )
        listener(Note(f"{name}{what}"))
    if examples.moved:
        what = f"in {examples.moved:,} of {counted(rows, 'row')} a token spans the end of the prompt"
        listener(Note(f"{name}{what}; it belongs to the response"))
    if examples.written and data.special_tokens_in_text != "text":
        most = sorted(examples.written.items(), key=lambda item: -len(item[1]))[:5]
        tokens = ", ".join(f"{token} in {counted(len(found), 'row')} (first {found[0].where})" for token, found in most)
        what = f"{name}special tokens in the text of rows are encoded as special tokens: {tokens}"
        listener(Warned(f"{what}; --set data.special_tokens_in_text=text encodes them as text"))
    for field_name, count in examples.ignored.items():
        share = f"{count / rows * 100:.0f} % of rows"
        listener(Note(f"{name}the chat template does not write `{field_name}` of the answers ({share})"))


def _report(
    examples: Examples, left_out: list[TooLong], name: str, encoder: Encoder, context: int | None, listener: Listener
) -> None:
    limit, dropped, prompts = encoder.limit(context), examples.dropped, examples.dropped_prompts
    rows = len(examples) + dropped
    if dropped:
        prompt_limit = min(encoder.max_prompt_length, limit)
        why = [f"{prompts:,} with a prompt over {prompt_limit:,} tokens"] if prompts else []
        why += [f"{dropped - prompts:,} over {limit:,} tokens in all"] if dropped > prompts else []
        what = f"{name}{dropped:,} of {counted(rows, 'row')} dropped as too long: {', '.join(why)}"
        if dropped > _MANY * rows:
            what = f"{what}; {_keeping(examples, left_out, encoder, context)}"
        listener((Warned if dropped > _MANY * rows else Note)(what))
    if examples.truncated:
        what = f"{examples.truncated:,} of {counted(rows, 'response')}"
        listener(Note(f"{name}{what} cut at {limit:,} tokens, prompt included"))


def _keeping(examples: Examples, left_out: list[TooLong], encoder: Encoder, context: int | None) -> str:
    """Return what to type to keep ``_KEPT`` of the rows, or that the model's context does not allow it."""
    prompts = [len(sequence.prompt) for sequence in examples.sequences] + [over.prompt for over in left_out]
    lengths = [*examples.lengths.tolist(), *(over.prompt + over.response for over in left_out)]
    length = sorted(lengths)[math.ceil(_KEPT * len(lengths)) - 1]
    prompt = max(p for p, whole in zip(prompts, lengths, strict=True) if whole <= length)
    if context is not None and length > context:
        return f"to keep {_KEPT:.0%} takes {length:,} tokens, and the model's context is {context:,}"
    typed = [f"--max-length {length}"] if length > encoder.limit(context) else []
    typed += [f"--set data.max_prompt_length={prompt}"] if prompt > encoder.max_prompt_length else []
    return f"{' '.join(typed)} would keep {_KEPT:.0%}"


def _nothing_left(left_out: list[TooLong], others: list[LeftOut], limit: int) -> DataError:
    if not left_out:
        if not others:
            return DataError("no rows to tokenize", hint="check the source")
        if all(not out.why for out in others):
            what = f"{all_are(len(others), 'row')} without an answer to train on"
            return DataError(what, where=others[0].where, hint="check the messages' weight and train fields")
        return DataError(f"no row is left: {next(out.why for out in others if out.why)}", hint="check the rows")
    least = min(left_out, key=lambda over: over.prompt + over.response)
    prompt_limit = min(over.limit for over in left_out if over.part == least.part)
    limits = f"{limit:,} tokens in all" if least.part == "row" else f"{prompt_limit:,} for the prompt, {limit:,} in all"
    return DataError(
        f"{all_are(len(left_out), 'row')} too long: the shortest has {least.prompt:,} + {least.response:,} tokens "
        f"(prompt + response), the limit is {limits}",
        where=least.where,
        hint="raise --max-length (and data.max_prompt_length), or use a model with a longer context",
    )


Chunk = tuple[SequenceOf[Row], int, int | None]  # rows, the number of the first, the model's context


def _encoded(
    chunks: list[Chunk],
    encoder: Encoder,
    workers: int,
    prefetched: Callable[[int], list[TokenIds] | None] | None,
) -> Iterator[list[Encoded | TooLong | LeftOut]]:
    if workers == 0 or len(chunks) < 2:
        for rows, at, context in chunks:
            yield encoder.encode(rows, at, context, None if prefetched is None else prefetched(at))
        return
    # Not forked from this process: a child would inherit the locks of threads that do not exist in it. A fork server
    # imports the heavy libraries once for all workers; where there is none, each worker imports them.
    context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__, type(encoder.tokenizer).__module__])
    pool = ProcessPoolExecutor(
        min(workers, len(chunks)), mp_context=context, initializer=_start_worker, initargs=(encoder,)
    )
    try:
        yield from pool.map(_work, chunks)
    except BrokenProcessPool:
        raise PeerProcessError("a tokenizing process died", hint="try --set data.workers=0") from None
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None  # of a worker process


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _encoder = encoder


def _work(chunk: Chunk) -> list[Encoded | TooLong | LeftOut]:
    return _encoder.encode(*chunk)


def steps_per_epoch(rows: int, batch: int) -> int:
    """Batches of an epoch: whole ones only, but one where there are fewer rows than a batch has."""
    return rows // min(batch, rows)


class Order:
    """Which examples step s trains on: a pure function of (seed, epoch, index), so resuming needs one integer.

    Each epoch permutes the examples and cuts the permutation into batches. With ``bucket`` > 1 it is cut into stretches
    of up to so many batches first, each stretch is sorted by length, and the batches of the epoch are shuffled: the
    sequences of a batch are of about one length, and both its company and its turn are random. That saves passes and
    costs gradient noise where length goes with the kind of task. An epoch has only whole batches; the examples left
    over (fewer than one batch, others in every epoch) sit that epoch out. Fewer examples than one batch are one batch.
    """

    def __init__(self, lengths: SequenceOf[int] | np.ndarray, batch: int, seed: int, bucket: int = 1):
        self._lengths = np.asarray(lengths, dtype=np.int64)
        if not len(self._lengths):
            raise ValueError("no examples to order")
        self._batch, self._seed, self._bucket = min(batch, len(self._lengths)), seed, bucket
        self.steps_per_epoch = steps_per_epoch(len(self._lengths), batch)
        self._cached: tuple[int, np.ndarray] = (-1, np.empty((0, 0), dtype=np.int64))

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of a (micro-)step, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._cached[0] != epoch:
            self._cached = (epoch, self._epoch(epoch))
        return self._cached[1][index].tolist()

    def _epoch(self, epoch: int) -> np.ndarray:
        steps = self.steps_per_epoch
        # Raw bits sorted, rather than a shuffle: their stream is the same in every version of numpy.
        bits = np.random.Philox(np.random.SeedSequence([self._seed, epoch]))
        drawn = np.argsort(bits.random_raw(len(self._lengths)), kind="stable")[: steps * self._batch]
        # A short epoch is cut into several stretches too; sorted as one, every epoch would have the same batches.
        stretch = max(1, min(self._bucket, steps // 4)) * self._batch
        parts = (drawn[at : at + stretch] for at in range(0, len(drawn), stretch))
        by_length = [part[np.argsort(self._lengths[part], kind="stable")] for part in parts]
        batches = np.concatenate(by_length).reshape(steps, self._batch)
        return batches[np.argsort(bits.random_raw(steps), kind="stable")]


def by_length(sequences: SequenceOf[Sequence], batch: int) -> list[list[Sequence]]:
    """All sequences, each once, in batches of about one length, for scoring. The longest come first, so that memory
    that does not suffice shows at once."""
    ordered = sorted(sequences, key=len, reverse=True)
    return [ordered[at : at + batch] for at in range(0, len(ordered), batch)]
