"""Read the teacher's responses from a file that ``generate`` wrote, and match them with the training rows."""

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
class TeacherSamples:
    """Hold the rows of a file of teacher samples. by_key: rows by the key of their prompt (``Row.key``)."""

    path: Path
    rows: SequenceOf[Row]
    by_key: dict[str, list[Row]]


def read_teacher_samples(data: DataConfig, rows: SequenceOf[Row], listener: Listener = silent) -> TeacherSamples:
    """Read the samples of ``data.teacher_samples`` for these rows.

    Raises DataError if the file does not exist, a row of it cannot be read, or a training row has no sample. The file
    has conversations as rendered by a chat template, which ``encode_teacher_samples`` matches with a tokenizer.
    """
    path = Path(data.teacher_samples).expanduser()
    hint = "create it with `distillm generate --model TEACHER --data SOURCE --split train --output FILE`"
    if not path.is_file():
        raise DataError("data.not_found", f"{path}: no such file (data.teacher_samples)", hint=hint)
    sample_data = data.of(str(path.absolute()), valid=None, limit=None, columns=ColumnsConfig())
    found = load_rows(sample_data, "test", listener=listener)  # for a single file, test is the whole file
    by_key: dict[str, list[Row]] = defaultdict(list)
    for row in found:
        by_key[row.key].append(row)
    unmatched_rows = [row for row in rows if row.messages is None and row.key not in by_key]
    if unmatched_rows:
        raise _missing_sample_error(unmatched_rows, len(rows), path)
    listener(Note(f"teacher samples: {len(found):,} from {path}"))
    return TeacherSamples(path, found, dict(by_key))


def encode_teacher_samples(
    samples: TeacherSamples, examples: Examples, encoder: Encoder, context: int | None
) -> dict[int, list[Rollout]]:
    """Return the samples of each training row as rollouts, in the order of the file. Long ones are cut at the limit.

    Raises DataError for a conversation without a sample.
    """
    matches = {i: samples.by_key.get(row.key) for i, row in enumerate(examples.rows)}
    if unmatched := [i for i, found in matches.items() if found is None]:
        auto_encoder = encoder.with_settings(template="auto")
        by_prompt: dict[bytes, list[Row]] = defaultdict(list)
        for row, ids in zip(samples.rows, auto_encoder.prompts(samples.rows), strict=True):
            by_prompt[ids.tobytes()].append(row)
        matches |= {i: by_prompt.get(examples.sequences[i].prompt.tobytes()) for i in unmatched}
    if unmatched_rows := [examples.rows[i] for i, found in matches.items() if found is None]:
        raise _missing_sample_error(unmatched_rows, len(examples), samples.path)
    truncating_encoder = encoder.with_settings(too_long="truncate")
    pairs = [(i, sample) for i, found in matches.items() for sample in found]
    answered_rows = [
        replace(examples.rows[i], references=sample.references, answer=None, raw=sample.raw, truncated=sample.truncated)
        for i, sample in pairs
    ]
    sequences: dict[int, list[Rollout]] = defaultdict(list)
    for (i, _), sequence in zip(pairs, truncating_encoder.sequences(answered_rows, context=context), strict=True):
        seen = examples.sequences[i].teacher_prompt
        sequences[i].append(Rollout(sequence.prompt, sequence.response, i, sequence.turns, teacher_prompt=seen))
    return dict(sequences)


def _missing_sample_error(unmatched_rows: Iterable[Row], rows: int, path: Path) -> DataError:
    unmatched_rows = list(unmatched_rows)
    more = f" ({len(unmatched_rows):,} of {rows:,} rows have none)" if len(unmatched_rows) > 1 else ""
    return DataError(
        "data.no_teacher_sample",
        f"{unmatched_rows[0].where}: no teacher sample has this prompt{more}",
        where=f"data.teacher_samples = {path}",
        hint="generate samples with this --data and --split train, or train on fewer rows with --set data.limit=N",
    )
