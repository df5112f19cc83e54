"""Describe a run to the person who watches it: what it starts with, and what its schedule waits for at half time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distillm_cli.rollouts.scheduler import Source
from distillm_cli.training.events import RunStarted
from distillm_cli.utils.text import counted

if TYPE_CHECKING:
    from distillm_cli.training.engine import Engine

_HOW = "--set schedule.phi=0.2, or --set schedule.reference=previous --set schedule.epsilon=-0.03"


def opening(engine: Engine) -> RunStarted:
    """Return the event that starts a run."""
    scheduler, criterion = engine.scheduler, engine.objective.criterion
    return RunStarted(
        steps=engine.steps,
        first_step=engine.at.step,
        steps_per_epoch=engine.steps_per_epoch,
        method=engine.method,
        parameters=sum(p.numel() for p in engine.objective.parameters() if p.requires_grad),
        device=str(engine.device),
        dtype=str(engine.dtype).removeprefix("torch."),
        has_phi=scheduler.has_phi,
        loss=criterion.name,
        divergence=criterion.held_out_name,
        phi=scheduler.phi,
        epsilon=scheduler.config.epsilon if scheduler.has_phi and engine.held_out.batches else None,
        trigger=scheduler.trigger,
    )


def half_time(engine: Engine) -> str | None:
    """Return what an adaptive schedule waits for, if half of the steps are just done and none used student outputs."""
    at, scheduler = engine.at, engine.scheduler
    is_half = at.step == (engine.steps + 1) // 2 < engine.steps
    if not (is_half and scheduler.has_phi) or at.steps_with(Source.ROLLOUT) or at.steps_with(Source.REPLAY):
        return None
    head = f"half of the steps are done, and none used the student's own outputs: φ is {scheduler.phi:g}"
    if scheduler.phi > 0:
        return f"{head}, and no draw fell on them yet; to use them more often, try --set schedule.phi=0.5"
    if not engine.held_out.batches:
        return f"{head}, and it cannot rise without held-out rows; name some with --set data.valid=PATH, or try {_HOW}"
    every = engine.steps_per_epoch if engine.train.eval_steps == "epoch" else engine.train.eval_steps
    to_come = max(0, -(-engine.steps // every) - at.step // every)
    rise, epsilon = 1 / scheduler.config.levels, scheduler.config.epsilon
    if scheduler.reference is None:
        moved = f"risen by {epsilon:g} or more" if epsilon > 0 else f"fallen by {abs(epsilon):g} or less"
        wait = f"it rises by {rise:.2g} at a validation where valid CE has {moved} since before training"
        wait += f", and there was none yet ({counted(to_come, 'validation')} to come)"
        return f"{head}; {wait}; to validate more often, try --set train.eval_steps={max(1, engine.steps // 10)}"
    since = "at the validation before" if scheduler.config.reference == "previous" else "at first"
    wait = f"it rises by {rise:.2g} at a valid CE of {scheduler.trigger:.3f} or more (now {at.valid_loss:.3f}; "
    wait += f"{scheduler.reference:.3f} {since}, schedule.epsilon {epsilon:g})"
    return f"{head}; {wait}; {counted(to_come, 'validation')} to come; to use student outputs sooner, try {_HOW}"
