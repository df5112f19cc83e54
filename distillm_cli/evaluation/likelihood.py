"""Measure a model on the references of a suite, without generating: perplexity, and the distance to a teacher.

The responses are those of the rows (teacher forcing): each token is predicted after the row's own earlier tokens. KL and
agreement are over the tokens that both models have. No table of all tokens and the vocabulary is stored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillm_cli import plugins
from distillm_cli.data.batching import batches_by_length
from distillm_cli.data.encoder import Encoded, Encoder
from distillm_cli.data.rows import Row
from distillm_cli.data.sides import are_aligned
from distillm_cli.errors import DataError
from distillm_cli.evaluation.results import load_summary, write_results
from distillm_cli.evaluation.suites import Suite, answered_sequences, unlimited
from distillm_cli.losses.fused import target_log_probs, token_divergences
from distillm_cli.losses.plain import top_tokens
from distillm_cli.teachers.local import LanguageModel, LocalTeacher
from distillm_cli.training.distributed import in_first_process
from distillm_cli.training.events import Listener, Progress, Warned, silent
from distillm_cli.types import Batch, Sequence, TeacherPrompt, collate
from distillm_cli.utils.text import counted

DIRECTORY = "references"  # of the results of a suite
_ROWS = "references.jsonl"
# Sums over the tokens of a row. The figures of a set of rows are their sums divided by the tokens.
LOSS = "loss"
TEACHER_LOSS = "teacher_loss"
KL_TEACHER_STUDENT = "kl_teacher_student"
KL_STUDENT_TEACHER = "kl_student_teacher"
AGREEMENT = "agreement"


@dataclass(frozen=True)
class ReferenceResult:
    """Hold the figures of a model on the references of a suite.

    where: of each measured row. tokens: response tokens of each row. sums: by name, a sum over the tokens of each row:
    cross-entropy, KL(teacher ‖ student) and KL(student ‖ teacher) in nats, and the tokens that are the most likely one of
    both models.
    """

    suite: Suite
    where: list[str]
    tokens: np.ndarray
    sums: Mapping[str, np.ndarray]

    def as_json(self) -> dict[str, Any]:
        """Return the object ``references`` of the suite's JSON: means over all tokens, agreement in percent."""
        tokens = int(self.tokens.sum())
        found: dict[str, Any] = {"rows": len(self.where), "tokens": tokens}
        means = {name: float(values.sum()) / tokens for name, values in self.sums.items()}
        found |= {"perplexity": math.exp(means[LOSS]), LOSS: means[LOSS]}
        if AGREEMENT in means:
            found |= {name: means[name] for name in (KL_TEACHER_STUDENT, KL_STUDENT_TEACHER)}
            found |= {AGREEMENT: 100 * means[AGREEMENT], "teacher_perplexity": math.exp(means[TEACHER_LOSS])}
        return found

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield a line per row: where, tokens, and the sums."""
        for i, where in enumerate(self.where):
            sums = {name: float(values[i]) for name, values in self.sums.items()}
            yield {"where": where, "tokens": int(self.tokens[i]), **sums}


@dataclass(frozen=True)
class ComparedTeacher:
    """Hold a teacher to compare a model with. encoder: of the prompts that it sees; None if they are the model's."""

    model: LanguageModel
    encoder: Encoder | None = None


@torch.no_grad()
def measure_references(
    model: LanguageModel,
    encoder: Encoder,
    suite: Suite,
    *,
    teacher: ComparedTeacher | None = None,
    context: int | None,
    device: torch.device,
    batch_size: int,
    listener: Listener = silent,
) -> ReferenceResult:
    """Measure a model on the first reference of each row. The models are in evaluation mode and have the same ``vocab``.

    Rows are left out with a warning if they are longer than ``context``, have a token that one of the models lacks, or have
    earlier answers with other tokens for the teacher. Raises DataError if no row is left.
    """
    rows, encoded = answered_sequences(suite, encoder, context)
    sequences = [s for s in encoded if len(s.response) and s.response.max() < model.vocab]
    if teacher is not None and teacher.encoder is not None:
        sequences = _with_teacher_prompts(sequences, rows, teacher.encoder, context)
    if not sequences:
        raise DataError(
            "data.no_references",
            f"{suite.name}: no row has a reference within the model's context",
            where=suite.source,
            hint="use a suite with references, or leave out --perplexity and --teacher",
        )
    if left_out := len(suite.rows) - len(sequences):
        what = "too long, or no reference of tokens that the models have"
        if teacher is not None and teacher.encoder is not None:
            what = f"{what}, or earlier answers with other tokens in the teacher's prompt"
        listener(Warned(f"{suite.name}: {counted(left_out, 'row')} left out of the perplexity: {what}"))
    where = [rows[s.row].where for s in sequences]
    position = {s.row: i for i, s in enumerate(sequences)}
    tokens = np.zeros(len(sequences), dtype=np.int64)
    sums: dict[str, np.ndarray] = {}
    done = 0
    for batch_rows in batches_by_length(sequences, batch_size):
        batch = collate(batch_rows).to(device)
        found = _token_values(model, None if teacher is None else teacher.model, batch, batch_rows)
        index = np.array([position[s.row] for s in batch_rows])[batch.rows_N.cpu().numpy()]
        np.add.at(tokens, index, 1)
        for name, values_N in found.items():
            total = sums.setdefault(name, np.zeros(len(sequences)))
            np.add.at(total, index, values_N.cpu().double().numpy())
        done += len(batch_rows)
        listener(Progress(f"references of {suite.name}", done, len(sequences)))
    return ReferenceResult(suite, where, tokens, sums)


def _with_teacher_prompts(
    sequences: SequenceOf[Sequence], rows: SequenceOf[Row], encoder: Encoder, context: int | None
) -> list[Sequence]:
    """Return the sequences with the prompts that the teacher sees, without those that do not fit its side."""
    encoder = unlimited(encoder, context)
    found = []
    for own, outcome in zip(sequences, encoder.encode([rows[s.row] for s in sequences]), strict=True):
        if not isinstance(outcome, Encoded) or not are_aligned(own, outcome.sequence):
            continue
        seen = outcome.sequence
        if len(seen.prompt) + len(own.response) <= encoder.limit(context):
            found.append(replace(own, teacher_prompt=TeacherPrompt(seen.prompt, seen.turns)))
    return found


def _token_values(
    model: LanguageModel, teacher: LanguageModel | None, batch: Batch, rows: SequenceOf[Sequence]
) -> dict[str, Tensor]:
    """Return the values of each response token [N] of a batch of rows, by name."""
    hidden_ND = model.hidden(batch)
    head = model.head()
    values = {LOSS: -target_log_probs(hidden_ND, head, batch.targets_N)}
    if teacher is None:
        return values
    teacher_ND = teacher.hidden(LocalTeacher.seen(batch, rows))
    teacher_head = teacher.head()
    values[TEACHER_LOSS] = -target_log_probs(teacher_ND, teacher_head, batch.targets_N)
    for name, divergence in ((KL_TEACHER_STUDENT, "kl"), (KL_STUDENT_TEACHER, "rkl")):
        chosen = plugins.divergences[divergence].default()
        values[name] = token_divergences(hidden_ND, head, teacher_ND, teacher_head, chosen)
    values[AGREEMENT] = top_tokens(hidden_ND, head) == top_tokens(teacher_ND, teacher_head)
    return values


@in_first_process
def save_references(result: ReferenceResult, root: Path, about: Mapping[str, Any]) -> None:
    """Write the figures and their sums by row under ``root``. Raises StorageError."""
    directory = root / result.suite.name / DIRECTORY
    write_results(directory, {**about, **result.as_json()}, {_ROWS: result.lines()})


@in_first_process
def load_references(suite: Suite, root: Path, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the object that was saved for the same ``about``, None if none was."""
    return load_summary(root / suite.name / DIRECTORY, about, (_ROWS,))


def read_references(suite_directory: Path) -> list[dict[str, Any]]:
    """Return the lines by row that ``save_references`` wrote for a suite; none if there are none."""
    path = suite_directory / DIRECTORY / _ROWS
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
