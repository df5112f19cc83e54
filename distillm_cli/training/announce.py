"""Describe a run for users: its settings at the start, and halfway through the condition on which φ will rise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distillm_cli.rollouts.scheduler import AdaptiveScheduler, Source
from distillm_cli.training.events import RunStarted
from distillm_cli.utils.text import counted

if TYPE_CHECKING:
    from distillm_cli.training.trainer import Trainer

_RAISE_PHI = "--schedule auto, or --set schedule.phi=0.2"


def run_started(trainer: Trainer) -> RunStarted:
    """Return the event that starts a run."""
    scheduler = trainer.scheduler
    objective = trainer.objective
    loss = objective.name
    for extra in trainer.student_loss.extras.values():
        loss = extra.loss_name(loss)
    trained = trainer.student_loss.named_parameters()
    parameters = sum(p.numel() for name, p in trained if p.requires_grad and not name.startswith("extras."))
    _, *teachers = trainer.student_loss.trained_parts()
    epsilon = None
    if isinstance(scheduler, AdaptiveScheduler) and trainer.validator.batches:
        epsilon = scheduler.config.epsilon
    return RunStarted(
        steps=trainer.run.steps,
        first_step=trainer.state.step,
        steps_per_epoch=trainer.run.steps_per_epoch,
        method=trainer.run.method,
        parameters=parameters,
        teacher_parameters=sum(p.numel() for part in teachers for p in part),
        device=str(trainer.run.device),
        dtype=str(trainer.run.dtype).removeprefix("torch."),
        has_phi=scheduler.has_phi,
        loss=loss,
        divergence=objective.held_out_name,
        valid=objective.valid_name,
        phi=scheduler.phi,
        epsilon=epsilon,
        trigger=scheduler.trigger,
    )


def phi_advice(trainer: Trainer) -> str | None:
    """Return a hint on when φ of an adaptive schedule rises, for a run halfway through without student outputs."""
    state = trainer.state
    scheduler = trainer.scheduler
    is_half = state.step == (trainer.run.steps + 1) // 2 < trainer.run.steps
    if not is_half or not isinstance(scheduler, AdaptiveScheduler):
        return None
    if state.steps_with(Source.ROLLOUT) or state.steps_with(Source.REPLAY):
        return None
    half_done = f"half of the steps are done, and none used student outputs: φ is {scheduler.phi:g}"
    if scheduler.phi > 0:
        return f"{half_done}, and none were drawn yet; to use them more often, try --set schedule.phi=0.5"
    if not trainer.validator.batches:
        hint = f"set some with --set data.valid=PATH, or try {_RAISE_PHI}"
        return f"{half_done}, and it cannot rise without held-out rows; {hint}"
    every = trainer.run.steps_per_epoch if trainer.config.eval_steps == "epoch" else trainer.config.eval_steps
    remaining = max(0, -(-trainer.run.steps // every) - state.step // every)
    rise = 1 / scheduler.config.levels
    epsilon = scheduler.config.epsilon
    if scheduler.reference is None:
        change = f"risen by {epsilon:g} or more" if epsilon > 0 else f"fallen by {abs(epsilon):g} or less"
        wait = f"it rises by {rise:.2g} at a validation where valid CE has {change} since before training"
        wait += f", with no validation so far ({counted(remaining, 'validation')} left)"
        return (
            f"{half_done}; {wait}; to validate more often, try --set train.eval_steps={max(1, trainer.run.steps // 10)}"
        )
    since = "at the validation before" if scheduler.config.reference == "previous" else "at first"
    wait = f"it rises by {rise:.2g} at a valid CE of {scheduler.trigger:.3f} or more (now {state.valid_loss:.3f}; "
    wait += f"{scheduler.reference:.3f} {since}, schedule.epsilon {epsilon:g})"
    wait += f"; {counted(remaining, 'validation')} left"
    return f"{half_done}; {wait}; to use student outputs sooner, try {_RAISE_PHI}"


def resume_advice(before: int, now: int) -> str | None:
    """Return a note on what a resume with another number of processes does not reproduce; None for the same number."""
    if before == now:
        return None
    what = f"the run had {before} {'process' if before == 1 else 'processes'} and continues in {now}"
    return (
        f"{what}: the same rows, samples and schedule; rounding and dropout differ from those of an uninterrupted run"
    )
