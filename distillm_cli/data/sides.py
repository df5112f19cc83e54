"""Render rows for a teacher that sees them by another template than the student, and align both sides.

The teacher gets its own prompt and the student's response tokens: with one tokenizer, its states at the positions of the
response predict the same tokens. The earlier answers of a conversation are aligned in the same way.
"""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np

from distillm_cli.config.schema import DataConfig
from distillm_cli.data.batching import Examples
from distillm_cli.data.encoder import Encoded, Encoder
from distillm_cli.data.row_store import pick
from distillm_cli.data.token_ids import CHUNK
from distillm_cli.errors import DataError
from distillm_cli.training.events import Listener, Note, Warned, silent
from distillm_cli.types import PackedSequences, Sequence, SequencePacker, SequenceView, as_int32
from distillm_cli.utils.text import counted

_MANY = 0.2  # share of rows above which a message is a warning
_NO_TOKENS = np.empty(0, dtype=np.int32)


def with_teacher_prompts(
    examples: Examples, encoder: Encoder, context: int | None = None, listener: Listener = silent, name: str = ""
) -> Examples:
    """Return the examples with the prompts that the teacher sees. Rows that do not fit the teacher's side are dropped.

    encoder: of the teacher's side. context: positions of both models. name: of the rows, for messages. Raises DataError if
    no row is left, or none of a source of a mixture.
    """
    assert isinstance(examples.sequences, PackedSequences)
    ids = io.BytesIO()
    turns = io.BytesIO()
    packer = SequencePacker(ids, turns)
    kept: list[int] = []
    unlike = 0
    unaligned = 0
    for start in range(0, len(examples), CHUNK):
        rows = examples.rows[start : start + CHUNK]
        for i, outcome in enumerate(encoder.encode(rows, start, context), start=start):
            own = examples.sequences[i]
            if not isinstance(outcome, Encoded):
                continue
            seen = outcome.sequence
            if len(seen.prompt) + len(own.response) > encoder.limit(context):
                continue
            if not are_aligned(own, seen):
                unaligned += 1
                continue
            kept.append(i)
            packer.append(Sequence(seen.prompt, _NO_TOKENS, turns=seen.turns))
            unlike += not np.array_equal(own.response[:-1], seen.response[: len(own.response) - 1])
    places = np.array(kept, dtype=np.int64)
    sizes = np.diff(np.searchsorted(places, np.cumsum(examples.part_sizes)), prepend=0).tolist()
    if not kept or 0 in sizes:
        what = "no row fits the teacher's template"
        if unaligned:
            what = "the earlier answers of no row have the same tokens in the teacher's template"
        raise DataError(
            "data.no_teacher_prompt", what, where=name or None, hint="raise --max-length, or unset teacher.template"
        )
    _report(len(examples) - len(kept), unaligned, unlike, len(examples), name, listener)
    seen_prompts = PackedSequences(as_int32(ids), packer.sizes_S3, as_int32(turns), packer.digest)
    view = SequenceView([examples.sequences], np.stack((np.zeros_like(places), places), axis=1), seen_prompts)
    return replace(
        examples,
        sequences=view,
        rows=pick(examples.rows, places),
        dropped=examples.dropped + len(examples) - len(kept),
        part_sizes=tuple(sizes),
    )


def describe_sides(teacher: DataConfig, student: DataConfig) -> str:
    """Return how the teacher's prompts differ from the student's: "template plain instead of exact"."""
    names = [name for name in ("template", "chat_template") if getattr(teacher, name) != getattr(student, name)]
    described = ", ".join(f"{name} {getattr(teacher, name)} instead of {getattr(student, name)}" for name in names)
    return f"the teacher sees its own prompts: {described}"


def are_aligned(own: Sequence, seen: Sequence) -> bool:
    """Return whether both prompts supervise the same tokens. The tokens that end their answers may differ."""
    if own.turns is None or seen.turns is None:
        return own.turns is seen.turns
    if len(own.turns) != len(seen.turns):
        return False
    is_last = np.diff(own.turns, append=own.turns[-1] + 2) > 1
    return bool((is_last | (own.prompt[own.turns] == seen.prompt[seen.turns])).all())


def _report(dropped: int, unaligned: int, unlike: int, rows: int, name: str, listener: Listener) -> None:
    prefix = f"{name}: " if name else ""
    if dropped:
        why = f"{dropped - unaligned:,} too long"
        if unaligned:
            why += f", {unaligned:,} with earlier answers of other tokens"
        message = f"{prefix}{dropped:,} of {counted(rows, 'row')} dropped for the teacher's template: {why}"
        listener(Warned(message) if dropped > _MANY * rows else Note(message))
    if unlike:
        left = rows - dropped
        message = (
            f"{prefix}in {unlike:,} of {counted(left, 'row')} the response has other tokens after the teacher's prompt than "
            "after the student's, which both models get: the teacher may be worse at them"
        )
        listener(Warned(message) if unlike > _MANY * left else Note(message))
