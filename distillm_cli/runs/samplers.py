"""Which models a run samples from, and how: student rollouts, interleaved drafts, and responses that are kept by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distillm_cli.config.schema import RolloutConfig
from distillm_cli.losses.objectives import Objective
from distillm_cli.losses.policy_gradient import MiniLLM
from distillm_cli.rollouts.interleaved import InterleavedRollouts
from distillm_cli.rollouts.mixture import MixtureRollouts
from distillm_cli.rollouts.rollout import Rollouts, SampledRollouts
from distillm_cli.rollouts.samples import Samples
from distillm_cli.rollouts.scheduler import Scheduler, Source
from distillm_cli.training.events import Listener

if TYPE_CHECKING:
    from distillm_cli.models.backbone import Backbone
    from distillm_cli.runs.prepare import Prepared

_TEACHERS = 1 << 32  # added to the seed: the same uniforms for both would draw a pair's two samples near each other


def teachers(rollout: RolloutConfig) -> RolloutConfig:
    """How the teacher samples, in the terms of a section that says how the student does."""
    own = {"temperature": rollout.teacher_temperature, "top_p": rollout.teacher_top_p, "top_k": 0}
    return rollout.model_copy(update=own)


def samplers(run: Prepared) -> list[Backbone]:
    """The models without whose samples the run could not train."""
    recipe, schedule = run.recipe, Scheduler(run.recipe.schedule, steps=1, seed=0)
    found = []
    if not run.sft and schedule.may_use_student_outputs:
        found.append(run.student)
    beside = schedule.may_use_student_outputs and recipe.decodes_beside_the_teacher
    if run.pair.teacher is not None and (beside or (schedule.may_use_teacher_samples and run.teacher_samples is None)):
        found.append(run.pair.teacher)
    return found


def rollouts(run: Prepared, rule: Objective, listener: Listener) -> Rollouts:
    """Where the run's student outputs come from. rule: what is told of each token, where it wants to know."""
    recipe = run.recipe
    common = {"max_length": _longest(run), "seed": recipe.train.seed, "listener": listener}
    if recipe.schedule.kind == "interleaved":
        return InterleavedRollouts(run.student, run.pair.teacher, recipe.rollout, teachers(recipe.rollout), **common)
    if run.pair.teacher is not None and recipe.mixes_in_the_teacher:
        note = rule.note if isinstance(rule, MiniLLM) else lambda sequence, told_N3: None
        return MixtureRollouts(run.student, run.pair.teacher, recipe.rollout, note=note, **common)
    return SampledRollouts(run.student, recipe.rollout, **common)


def samples(run: Prepared, scheduler: Scheduler, listener: Listener) -> dict[Source, Samples]:
    """The responses that the run keeps by row: the teacher's, and a student's that answers an epoch ahead."""
    recipe, found = run.recipe, {}
    common = {
        "batches": run.batch,
        "steps": run.steps,
        "steps_per_epoch": run.order.steps_per_epoch,
        "bulk": recipe.rollout.bulk,
        "redraw": scheduler.config.redraws,
        "listener": listener,
    }
    own = {"max_length": _longest(run), "by_row": True, "listener": listener}
    if scheduler.may_use_teacher_samples:
        source = SampledRollouts(run.pair.teacher, teachers(recipe.rollout), seed=recipe.train.seed + _TEACHERS, **own)
        found[Source.TEACHER] = Samples(source, given=run.teacher_samples, name="teacher samples", **common)
    if scheduler.draws_student_ahead:
        source = SampledRollouts(run.student, recipe.rollout, seed=recipe.train.seed, **own)
        found[Source.ROLLOUT] = Samples(source, whole_epochs=True, name="student samples", **common)
    return found


def _longest(run: Prepared) -> int:
    context, longest = run.student.context, run.recipe.data.max_length
    return longest if context is None else min(longest, context)
