"""Responses that the teacher gave beforehand: a file that ``generate`` wrote, matched to the training rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from pathlib import Path

from distillm_cli.config.schema import ColumnsConfig, DataConfig
from distillm_cli.data.batching import Examples
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.rows import Row
from distillm_cli.data.sources import load_rows
from distillm_cli.errors import DataError
from distillm_cli.training.events import Listener, Note, silent
from distillm_cli.types import Rollout


@dataclass(frozen=True, eq=False)
class Beforehand:
    """The rows of such a file, by what they ask."""

    path: Path
    rows: SequenceOf[Row]
    by_key: dict[str, list[Row]]


def read_beforehand(data: DataConfig, rows: SequenceOf[Row], listener: Listener = silent) -> Beforehand:
    """The samples of ``data.teacher_samples`` for these rows.

    Raises DataError: no such file, a row of it that cannot be read, a training row without a sample. A conversation is asked
    about in the words of a chat template, which only the tokenizer knows: whether it has one, ``encoded`` finds out.
    """
    path = Path(data.teacher_samples).expanduser()
    hint = "make it with `distillm generate --model TEACHER --data SOURCE --split train --output FILE`"
    if not path.is_file():
        raise DataError(f"{path}: no such file (data.teacher_samples)", hint=hint)
    own = data.model_copy(
        update={"source": str(path.absolute()), "valid": None, "limit": None, "columns": ColumnsConfig()}
    )
    found = load_rows(own, "test", listener=listener)  # of a single file, test is all of it
    by_key: dict[str, list[Row]] = defaultdict(list)
    for row in found:
        by_key[row.key].append(row)
    without = [row for row in rows if row.messages is None and row.key not in by_key]
    if without:
        raise _missing(without, len(rows), path)
    listener(Note(f"teacher samples: {len(found):,} from {path}"))
    return Beforehand(path, found, dict(by_key))


def encoded(
    beforehand: Beforehand, examples: Examples, encoder: Encoder, context: int | None
) -> dict[int, list[Rollout]]:
    """The samples of each training row, in the order of the file; one that is too long is cut, as a rollout would be.

    Raises DataError for a conversation without a sample.
    """
    asked = {i: beforehand.by_key.get(row.key) for i, row in enumerate(examples.rows)}
    if unmatched := [i for i, found in asked.items() if found is None]:
        reader = encoder.under(template="auto")
        by_prompt: dict[bytes, list[Row]] = defaultdict(list)
        for row, ids in zip(beforehand.rows, reader.prompts(beforehand.rows), strict=True):
            by_prompt[ids.tobytes()].append(row)
        asked |= {i: by_prompt.get(examples.sequences[i].prompt.tobytes()) for i in unmatched}
    if without := [examples.rows[i] for i, found in asked.items() if found is None]:
        raise _missing(without, len(examples), beforehand.path)
    cutting = encoder.under(too_long="truncate")
    pairs = [(i, sample) for i, found in asked.items() for sample in found]
    answered = [
        replace(examples.rows[i], references=sample.references, answer=None, raw=sample.raw, cut=sample.cut)
        for i, sample in pairs
    ]
    sequences: dict[int, list[Rollout]] = defaultdict(list)
    for (i, _), sequence in zip(pairs, cutting.sequences(answered, context=context), strict=True):
        sequences[i].append(Rollout(sequence.prompt, sequence.response, i, sequence.turns))
    return dict(sequences)


def _missing(without: Iterable[Row], rows: int, path: Path) -> DataError:
    without = list(without)
    more = f" ({len(without):,} of {rows:,} rows have none)" if len(without) > 1 else ""
    return DataError(
        f"{without[0].where}: no teacher sample asks the same{more}",
        where=f"data.teacher_samples = {path}",
        hint="generate with this --data and --split train, or train on fewer rows with --set data.limit=N",
    )
