"""Prepare the measurement of the KL divergences between teacher and student at each validation of a run."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from distillm_cli.runs.prepare import Prepared
from distillm_cli.teachers.cached import CachedTeacher, HiddenStateTable
from distillm_cli.teachers.local import LocalTeacher
from distillm_cli.training.distributed import world
from distillm_cli.training.state import RunInfo
from distillm_cli.training.validation import DivergenceProbe, sample_rows
from distillm_cli.types import Sequence, collate, length_groups

_ROWS, _TOKENS = 16, 128  # least size of the sample


def divergence_probe(run: Prepared, info: RunInfo) -> DivergenceProbe | None:
    """Return what measures the divergences on a sample of the held-out rows; None if it is off or would be expensive.

    The teacher's states are computed here, before the run may release the teacher, and kept: a few hundred tokens. They are
    not those of the run's teacher cache, whose rounding would depend on this measurement. A teacher that changes computes
    them at each validation. Nothing is measured without a teacher, or with one that is not loaded here.
    """
    model = run.pair.teacher
    recipe = run.recipe
    if run.sft or model is None or not recipe.train.health_every or not run.answered:
        return None
    if model.is_served or not model.is_whole:
        return None
    chosen = sample_rows(run.answered, least_rows=_ROWS, least_tokens=_TOKENS)
    if recipe.teacher_trainer is not None:
        return DivergenceProbe(chosen, info, LocalTeacher(model), batch_rows=recipe.train.batch_size)
    rows = [replace(row, row=i, table=None) for i, row in enumerate(chosen)]
    first = [min(rows, key=len)]
    like = partial(LocalTeacher(model).hidden, collate(first).to(info.device), first)
    teacher = CachedTeacher(model, mode="memory", validation=HiddenStateTable.shared(rows, like))
    probe = DivergenceProbe(rows, info, teacher, batch_rows=recipe.train.batch_size)
    groups = length_groups(rows, probe.batch_rows, info.pass_overhead)
    world().gather(lambda: _compute(teacher, [groups[i] for i in world().share([*map(len, groups)])], info.device))
    teacher.exchange((), info.device)
    return probe


def _compute(teacher: CachedTeacher, groups: list[list[Sequence]], device: torch.device) -> None:
    for sequences in groups:
        teacher.hidden(collate(sequences).to(device), sequences)
