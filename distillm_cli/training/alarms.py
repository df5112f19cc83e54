"""Raise an alarm when the recent figures of a run show that it goes wrong, with a setting to try.

An alarm is a function of the run's ``History``, registered by ``register_alarm``. It returns None, or what is wrong, with
its figures, and what to try. Each alarm is raised at most once in a run. A false alarm is worse than a late one, so the
thresholds are wide, and an alarm needs figures that agree over several parts of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from distillm_cli.training.events import Alarmed, Event, Stepped, Validated

WINDOWS = 40  # parts of a run; figures are means over the steps of a part
MIN_WATCHED_STEPS = 40  # a shorter run is too noisy for alarms on its steps
LOSS_ON = "loss on "  # before the name of a source

Problem = tuple[str, str]  # what is wrong; what to try


@dataclass
class History:
    """Hold the figures of a run so far.

    steps: of the whole run. selects_best: whether the run returns the best weights of its validations. cuts_outputs: whether
    student outputs are cut on purpose (``rollout.prefix``). windows: means by figure for each part of the run that has
    ended. validations: figures of each validation, the one before training included.
    """

    steps: int
    selects_best: bool = False
    cuts_outputs: bool = False
    windows: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)

    @property
    def progress(self) -> float:
        """Return the part of the run that is done, from 0 to 1."""
        return len(self.windows) * window_steps(self.steps) / self.steps

    def series(self, name: str) -> list[float]:
        """Return the means of a figure, of the parts that have it."""
        return [window[name] for window in self.windows if name in window]

    def validation_series(self, name: str) -> list[float]:
        """Return a figure of the validations that have it."""
        return [figures[name] for figures in self.validations if name in figures]


ALARMS: dict[str, Callable[[History], Problem | None]] = {}


def register_alarm(name: str) -> Callable[[Callable[[History], Problem | None]], Callable[[History], Problem | None]]:
    """Register a function of the history as an alarm. Names are part of the interface for scripts."""

    def register(check: Callable[[History], Problem | None]) -> Callable[[History], Problem | None]:
        ALARMS[name] = check
        return check

    return register


def window_steps(steps: int) -> int:
    """Return the number of steps of a part of a run."""
    return max(1, math.ceil(steps / WINDOWS))


@register_alarm("outputs_grow")
def outputs_grow(history: History) -> Problem | None:
    """Find student outputs that become longer in six parts in a row, until the limit cuts more and more of them."""
    lengths = history.series("rollout_length")[-6:]
    cut = history.series("rollout_cut")[-6:]
    if history.cuts_outputs or len(lengths) < 6 or len(cut) < 6:
        return None
    is_rising = all(b > a for a, b in pairwise(lengths)) and lengths[-1] >= 1.5 * lengths[0]
    if not is_rising or cut[-1] < cut[0] + 0.1:
        return None
    what = f"student outputs keep growing: {lengths[0]:.0f} to {lengths[-1]:.0f} tokens, "
    what += f"{cut[0]:.0%} to {cut[-1]:.0%} of them cut"
    cure = "check that the teacher's answers and the rows end with the student's end token (data.eos), "
    return what, cure + "or mix in rows with --schedule mixed"


@register_alarm("outputs_cut")
def outputs_cut(history: History) -> Problem | None:
    """Find student outputs of which most are cut, after a quarter of the run, with no sign of a fall."""
    cut = history.series("rollout_cut")[-5:]
    if history.cuts_outputs or history.progress < 0.25 or len(cut) < 5:
        return None
    if min(cut) < 0.5 or cut[-1] < cut[0] - 0.05:
        return None
    what = f"most student outputs are cut before they end: {cut[-1]:.0%}"
    return what, "raise rollout.max_new_tokens, set rollout.prefix, or check the end token (data.eos)"


@register_alarm("outputs_repeat")
def outputs_repeat(history: History) -> Problem | None:
    """Find student outputs that begin to repeat themselves: few distinct pairs of tokens in three parts in a row."""
    distinct = history.series("rollout_distinct2")
    if len(distinct) < 4:
        return None
    before = max(distinct[:-3])
    if max(distinct[-3:]) >= min(0.5, 0.6 * before):
        return None
    what = f"student outputs repeat themselves: {distinct[-1]:.0%} of adjacent token pairs are distinct, {before:.0%} before"
    return what, "lower --lr, mix in rows with --schedule mixed, or choose --divergence skl"


@register_alarm("entropy_collapse")
def entropy_collapse(history: History) -> Problem | None:
    """Find a student that is certain of tokens of which the teacher is not, in five measurements in a row."""
    students = history.series("student_entropy")[-5:]
    teachers = history.series("teacher_entropy")[-5:]
    if len(students) < 5 or len(teachers) < 5 or min(teachers) < 0.3:
        return None
    if any(q >= 0.1 * p for q, p in zip(students, teachers, strict=True)):
        return None
    what = f"the student's entropy collapsed to {students[-1]:.3f} nats, with a teacher at {teachers[-1]:.3f}"
    return what, "choose a divergence that covers the teacher's distribution (--divergence skl), or lower --lr"


@register_alarm("loss_stuck")
def loss_stuck(history: History) -> Problem | None:
    """Find a run of which half is done and in which nothing moves: neither loss nor validation nor agreement.

    A loss that rises with the learning rate and falls later is normal for a student that was trained before. Steps
    train on different rows, so their figures may vary more than validations, if there are any.
    """
    if history.progress < 0.5:
        return None
    names = sorted({name for window in history.windows for name in window if name.startswith(LOSS_ON)})
    measured = [series for series in map(history.series, names) if len(series) >= 9]
    held_out = history.validation_series("valid_loss")
    accepted = history.series("acceptance")
    tolerance = 0.05 if len(held_out) > 2 else 0.01
    if not measured or not all(_is_flat(series, tolerance) for series in [*measured, accepted]):
        return None
    if not _is_flat(held_out, 0.01) or (accepted and accepted[-1] > 0.9):
        return None
    first, last = _mean(measured[0][:3]), _mean(measured[0][-3:])
    return (
        f"the loss does not move: {first:.3f} at first, {last:.3f} now",
        "raise --lr, or check that teacher and rows fit",
    )


def _is_flat(values: list[float], tolerance: float) -> bool:
    """Return whether the means of the first, the middle and the last third differ by less than a share of them."""
    if len(values) < 2:
        return True
    third = -(-len(values) // 3)
    middle = (len(values) - third) // 2
    means = [_mean(part) for part in (values[:third], values[middle : middle + third], values[-third:])]
    return max(means) - min(means) < tolerance * max(map(abs, means))


@register_alarm("models_differ")
def models_differ(history: History) -> Problem | None:
    """Find a pair whose most likely tokens agree no better after half of the run than at its start."""
    overlap = history.series("top16_overlap")
    accepted = history.series("acceptance")
    if history.progress < 0.5 or len(overlap) < 8:
        return None
    if _mean(overlap[-3:]) > min(0.5, _mean(overlap[:2]) + 0.02):
        return None
    if _mean(accepted[-3:]) > min(0.5, _mean(accepted[:2]) + 0.02):
        return None
    what = f"student and teacher share {overlap[-1]:.0%} of their 16 most likely tokens, {overlap[0]:.0%} at the start"
    return (
        what,
        "check template and tokenizer with `distillm plan`, start from --set student.sft_epochs=3, or raise --lr",
    )


@register_alarm("validation_rises")
def validation_rises(history: History) -> Problem | None:
    """Find three rises of the validation loss in a row, to well above the best, in a run that returns the last weights.

    The loss on reference responses may rise while the student approaches the teacher, so a divergence has to rise too.
    """
    losses = history.validation_series("valid_loss")
    divergences = history.validation_series("kl_teacher_student")
    if history.selects_best:
        return None
    for figures in (losses, divergences) if divergences else (losses,):
        recent = figures[-4:]
        if len(recent) < 4 or not all(b > a for a, b in pairwise(recent)) or recent[-1] < 1.05 * min(figures):
            return None
    what = f"the validation loss rose three times: {losses[-4]:.3f} to {losses[-1]:.3f}"
    return what, "try --set train.select=valid_loss, fewer epochs, more rows, or --schedule auto"


class AlarmWatch:
    """Collect the figures of a run from its events, and raise its alarms."""

    def __init__(self, history: History):
        self.history = history
        self.raised: list[Alarmed] = []
        self._new: list[Alarmed] = []
        self._sums: dict[str, list[float]] = {}  # sum and number of values, of the current part

    def observe(self, event: Event) -> None:
        """Add the figures of an event, and raise the alarms that they cause."""
        if isinstance(event, Stepped):
            for name, value in {f"{LOSS_ON}{event.source}": event.loss, **event.health}.items():
                pair = self._sums.setdefault(name, [0.0, 0])
                pair[0] += value
                pair[1] += 1
            if event.step % window_steps(self.history.steps):
                return
            self.history.windows.append({name: total / count for name, (total, count) in self._sums.items()})
            self._sums = {}
            if self.history.steps >= MIN_WATCHED_STEPS:
                self._check(event.step, ALARMS)
        if isinstance(event, Validated):
            figures = {"valid_loss": event.valid_loss, **event.scores}
            self.history.validations.append({name: value for name, value in figures.items() if value is not None})
            self._check(event.step, ("validation_rises",))

    def _check(self, step: int, names: Iterable[str]) -> None:
        known = {alarm.name for alarm in self.raised}
        for name in names:
            if name not in known and (finding := ALARMS[name](self.history)) is not None:
                self._new.append(Alarmed(step, name, *finding))
                self.raised.append(self._new[-1])

    def take(self) -> list[Alarmed]:
        """Return the alarms raised since the last call."""
        new, self._new = self._new, []
        return new

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "windows": self.history.windows,
            "validations": self.history.validations,
            "sums": self._sums,
            "raised": [asdict(alarm) for alarm in self.raised],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.history.windows = list(state["windows"])
        self.history.validations = list(state["validations"])
        self._sums = {name: list(pair) for name, pair in state["sums"].items()}
        self.raised = [Alarmed(**alarm) for alarm in state["raised"]]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
