"""Prepare the inputs of a run of sentence embeddings: rows, models and their sentences (``--method disco``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distillm_cli.config.schema import Recipe, chosen
from distillm_cli.config.student_spec import ConfigFile, RandomModel, TeacherLayers, TeacherWidth, parse_student
from distillm_cli.data.locations import find_source
from distillm_cli.data.sentences import SentenceRow, load_sentences
from distillm_cli.errors import DataError, ModelError, UsageError
from distillm_cli.evaluation.pairs import correlations, cosine
from distillm_cli.extras.disco import embed_together
from distillm_cli.models.activations import offload_activations
from distillm_cli.models.devices import check_offload, resolve_device, resolve_dtype
from distillm_cli.models.layers import build_trunk_from_layers
from distillm_cli.models.loading import read_config
from distillm_cli.models.model_paths import locate_model
from distillm_cli.models.sentence import (
    SentenceEncoder,
    check_vocabulary,
    load_encoder,
    read_declared,
    shortest,
    usable_context,
)
from distillm_cli.models.students import build_random_trunk, build_trunk, set_dropout
from distillm_cli.models.tokenizer_files import has_tokenizer, quiet
from distillm_cli.training.distributed import launched_processes
from distillm_cli.training.events import Listener, Note, silent
from distillm_cli.types import Sequence, rows_digest
from distillm_cli.utils.memory import resume_garbage_collection
from distillm_cli.utils.modules import weights_fingerprint
from distillm_cli.utils.optimizers import check_optimizer
from distillm_cli.utils.threads import set_threads

Figures = dict[str, float | None]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Hold the held-out sentences, each once, and the pairs among them. scores: of each pair, or None.

    sequences: by the student's tokenizer. embed: returns the teacher's embeddings.
    """

    rows: SequenceOf[SentenceRow]
    sequences: list[Sequence]
    embed: Callable[[], Tensor]

    @cached_property
    def teacher_ND(self) -> Tensor:
        """Return the teacher's normalized embeddings."""
        return F.normalize(self.embed(), dim=1)

    @cached_property
    def columns(self) -> list[np.ndarray]:
        """Return the indices of the first, second, … sentences of the pairs; empty if the rows are not pairs."""
        width = min((len(row.sentences) for row in self.rows), default=1)
        if width < 2:
            return []
        index = {text: i for i, text in enumerate(distinct_sentences(self.rows))}
        return [np.array([index[row.sentences[side]] for row in self.rows]) for side in range(width)]

    @property
    def scores(self) -> list[float]:
        """Return the scores of the pairs, empty if not every row has one."""
        scores = [row.score for row in self.rows if row.score is not None]
        return scores if self.columns and len(scores) == len(self.rows) else []

    def correlations(self, embeddings_ND: Tensor) -> Figures:
        """Return the correlations of the pairs' cosines with their scores, ×100; nothing without scores."""
        if not self.scores:
            return {}
        embeddings = embeddings_ND.float().cpu().numpy()
        first, second = self.columns[:2]
        return correlations(cosine(embeddings[first], embeddings[second]), self.scores)


@dataclass(frozen=True, eq=False)
class EmbeddingRun:
    """Hold the prepared inputs of a run: rows, sentences and models.

    new_student: returns the student with its initial weights. sequences: of the distinct training sentences, by the
    student's tokenizer; teacher_sequences: by the teacher's.
    """

    recipe: Recipe
    listener: Listener
    device: torch.device
    dtype: torch.dtype
    rows: list[SentenceRow]
    teacher: SentenceEncoder
    student: SentenceEncoder
    new_student: Callable[[], SentenceEncoder]
    sequences: list[Sequence]
    teacher_sequences: list[Sequence]
    held_out: HeldOut
    has_test_rows: bool
    fingerprints: Mapping[str, str]

    @property
    def inputs(self) -> dict[str, str]:
        """Return fingerprints of the run's models and rows, by name. A resume compares them."""
        rows = {"training rows": self.sequences, "held-out rows": self.held_out.sequences}
        found = {**self.fingerprints, **{name: rows_digest(sequences) for name, sequences in rows.items()}}
        if self.recipe.disco.pairs_epochs:
            pairs = [(row.sentences, row.score) for row in (*self.rows, *self.held_out.rows)]
            found["pairs"] = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
        return found


def distinct_sentences(rows: SequenceOf[SentenceRow]) -> list[str]:
    """Return the sentences of the rows, each once, in the order of their first occurrence."""
    return list(dict.fromkeys(text for row in rows for text in row.sentences))


def prepare_embeddings(recipe: Recipe, listener: Listener) -> EmbeddingRun:
    """Read, load and check all inputs of a run. Raises DataError, ModelError."""
    set_threads(recipe.train.threads, listener)
    torch.manual_seed(recipe.train.seed)
    device = resolve_device(recipe.train.device)
    check_optimizer(recipe.train.optimizer, device)
    check_offload(recipe, device)
    assert recipe.teacher.path is not None
    pooling = recipe.disco.pooling
    read_declared(recipe.teacher.path, recipe.teacher.revision, pooling=pooling)  # before rows and weights
    _check_student_modules(recipe)
    rows = load_sentences(recipe.data, "train", listener)
    valid_rows = load_sentences(recipe.data, "valid", listener)
    check_pairs(recipe, rows, valid_rows)
    resume_garbage_collection()
    longest = chosen(recipe.data.max_length)
    teacher = load_encoder(
        recipe.teacher.path,
        dtype=resolve_dtype(recipe.teacher.dtype, device),
        device=device,
        revision=recipe.teacher.revision,
        pooling=pooling,
        max_length=longest,
        listener=listener,
    )
    teacher.requires_grad_(False)

    def new_student(listen: Listener = silent) -> SentenceEncoder:
        return create_embedding_student(recipe, teacher, device, listen)

    student = new_student(listener)
    if recipe.train.gradient_checkpointing:
        student.model.gradient_checkpointing_enable()
        if recipe.train.offload_activations:
            offload_activations(student.model)
    texts = distinct_sentences(rows)
    held_out_texts = distinct_sentences(valid_rows)
    same = student.tokenizer is teacher.tokenizer and student.prompt == teacher.prompt
    same = same and (student.max_length, student.lower_case) == (teacher.max_length, teacher.lower_case)
    sequences = student.sequences(texts)
    listener(Note(f"{len(texts):,} distinct training sentences, {len(held_out_texts):,} held out"))
    listener(
        Note(
            f"pooling: teacher {teacher.pooling}, student {student.pooling}; embeddings of {teacher.width} and "
            f"{student.width} numbers"
        )
    )
    return EmbeddingRun(
        recipe=recipe,
        listener=listener,
        device=device,
        dtype=resolve_dtype(recipe.student.dtype, device),
        rows=rows,
        teacher=teacher,
        student=student,
        new_student=new_student,
        sequences=sequences,
        teacher_sequences=sequences if same else teacher.sequences(texts),
        held_out=HeldOut(
            valid_rows,
            student.sequences(held_out_texts),
            lambda: embed_together(
                teacher, teacher.sequences(held_out_texts), listener, "embedding held-out sentences"
            ),
        ),
        has_test_rows=recipe.data.source != "builtin" and "test" in find_source(recipe.data.source, silent).parts,
        fingerprints={
            role: weights_fingerprint(model.model.state_dict().items(), torch.bfloat16)
            for role, model in (("teacher", teacher), ("student", student))
        },
    )


def _check_student_modules(recipe: Recipe) -> None:
    """Raise ModelError if the student is loaded from a directory with modules that it cannot be trained with."""
    path = recipe.student.required_path
    if recipe.student.is_built:
        parse_student(path)  # a malformed specification is reported before models are loaded
        return
    if read_declared(path, recipe.student.revision, pooling=recipe.disco.pooling).dense is not None:
        raise ModelError(
            "model.unsupported_module",
            f"{path} has a Dense module, and a student's embeddings are its pooled states",
            hint="use a copy of the directory with config.json, model.safetensors and the tokenizer alone",
        )


def check_pairs(recipe: Recipe, rows: SequenceOf[SentenceRow], valid_rows: SequenceOf[SentenceRow]) -> None:
    """Raise DataError if the run needs pairs or scores that the rows do not have."""
    if recipe.disco.pairs_epochs:
        if launched_processes() > 1 and any(row.score is None for row in rows):
            what = "fine-tuning on pairs without scores (disco.pairs_epochs) does not run in several processes"
            where = "its negatives are the other rows of a micro-batch"
            raise UsageError("usage.one_process", what, where=where, hint="start it without a launcher")
        for row in (*rows, *valid_rows):
            if len(row.sentences) < 2:
                raise DataError(
                    "data.no_pairs",
                    "a row without a sentence pair, and disco.pairs_epochs needs pairs",
                    where=row.where,
                    hint="use columns sentence1, sentence2, score or anchor, positive, or disco.pairs_epochs=0",
                )
        kinds = {(len(row.sentences), row.score is not None): row.where for row in (*valid_rows, *rows)}
        if len(kinds) > 1:
            raise DataError(
                "data.mixed_rows",
                f"the rows are {' and '.join(sorted({row.format for row in (*rows, *valid_rows)}))}",
                where=" and ".join(kinds.values()),
                hint="use rows of one form",
            )
        if rows[0].score is not None and max(row.score or 0.0 for row in rows) <= 0:
            raise DataError("data.no_pairs", "no training pair has a score above 0", where=rows[0].where)
    if recipe.train.select == "spearman" and not all(row.score is not None for row in valid_rows):
        raise DataError(
            "data.no_held_out_rows",
            "train.select = spearman needs held-out rows that are all scored pairs",
            where=next(row.where for row in valid_rows if row.score is None),
            hint="set data.valid to a file with sentence1, sentence2 and score, or try --set train.select=valid_loss",
        )


def create_embedding_student(
    recipe: Recipe, teacher: SentenceEncoder, device: torch.device, listener: Listener = silent
) -> SentenceEncoder:
    """Load or build the student, with float32 weights, in evaluation mode. The result depends on the recipe alone.

    A built student, and one without a tokenizer, has the teacher's.
    """
    config = recipe.student
    path = config.required_path
    spec = parse_student(path)
    longest = chosen(recipe.data.max_length)
    seed = recipe.train.seed
    with torch.random.fork_rng(devices=[]), quiet():
        if isinstance(spec, TeacherLayers):
            model = build_trunk_from_layers(path, teacher.model, dropout=config.dropout)
        elif isinstance(spec, RandomModel | TeacherWidth):
            model = build_random_trunk(path, teacher.model.config, seed=seed, dropout=config.dropout)
        elif isinstance(spec, ConfigFile):
            shape = read_config(str(Path(path).expanduser()), file=True)
            if config.dropout is not None:
                set_dropout(shape, config.dropout, where=path)
            model = build_trunk(shape, seed=seed, where=path)
        else:
            name, local = locate_model(path)
            return load_encoder(
                path,
                dtype=torch.float32,
                device=device,
                revision=config.revision,
                pooling=recipe.disco.pooling,
                default_pooling=teacher.pooling,
                max_length=longest,
                dropout=config.dropout,
                tokenizer=teacher.tokenizer if local and not has_tokenizer(Path(name)) else None,
                listener=listener,
            )
    student = SentenceEncoder(
        model,
        teacher.tokenizer,
        teacher.pooling,
        max_length=shortest(longest, teacher.max_length, usable_context(model.config)),
        lower_case=teacher.lower_case,
    )
    check_vocabulary(student, path)
    return student.to(device)
