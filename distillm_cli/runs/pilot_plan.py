"""Plan a pilot from measured seconds, so that it ends within its budget.

Every arm gets the same seconds: the fewer steps, the more a step costs. It is scored after a quarter, half and all of its
steps. After each of the first two, the better half of each family continues. The first round has every temperature and rate
on the rows, and SFT; the second its best arm with other divergences and schedules; the third the best arm once more, with
half of its steps, and that on rows with the seconds of the best with student outputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from distillm_cli.config.pilot_grid import ROWS_ALONE, SFT_ARM, Arm, Grid
from distillm_cli.errors import UsageError
from distillm_cli.utils.text import format_duration

RUNGS = (0.25, 0.5, 1.0)  # shares of an arm's steps after which it is scored
SEARCHED_RATES = 1  # rates outside the grid for which time is reserved in the search, at each temperature
MIN_STEPS = 80  # of a run on rows
_WISHED_SHARE = 0.25  # of the steps of the recipe: the grid becomes smaller before runs become shorter
# Share of the steps that sample from the student, an expectation for kinds that adapt it.
_FRESH = {"off": 0.0, "adaptive": 0.1, "auto": 0.2, "mixed": 0.5, "annealed": 0.5, "on": 1.0}
# The order in which values are left out, and how many of each setting remain while runs have the wished number of steps.
_LEFT_OUT = {"temperature": 2, "divergence": 2, "schedule": 2, "lr": 3}


@dataclass(frozen=True)
class Costs:
    """Hold measured seconds. rows, sft, fresh: of a step on rows, of SFT, and on new student outputs.

    teacher: of the teacher, for the rows of a step. score: of one scoring. switch: from one trial to another.
    """

    rows: float
    sft: float
    fresh: float
    teacher: float
    score: float
    switch: float

    def step(self, arm: Arm) -> float:
        """Return the expected seconds of a step of an arm, with the teacher's states cached."""
        share = _FRESH[arm.schedule]
        return self.sft if arm.divergence == SFT_ARM else (1 - share) * self.rows + share * self.fresh


@dataclass(frozen=True)
class PilotPlan:
    """Hold the plan of a pilot. seconds: of the steps of each arm. left_out: what did not fit, sentences."""

    grid: Grid
    costs: Costs
    seconds: float
    left_out: tuple[str, ...] = ()

    def steps(self, arm: Arm) -> int:
        """Return the steps of an arm's whole run."""
        return max(len(RUNGS) + 1, round(arm.share * self.seconds / self.costs.step(arm)))

    def rung_steps(self, arm: Arm, rung: int) -> int:
        """Return the step after which an arm is scored."""
        return max(1, round(RUNGS[rung] * self.steps(arm)))

    def trial_seconds(self, arm: Arm, rung: int, reached: float) -> float:
        """Return the expected seconds of an arm, of which a share is trained, to a rung, with its scoring."""
        return (RUNGS[rung] - reached) * arm.share * self.seconds + self.costs.score + self.costs.switch

    def round_seconds(self, arms: Iterable[Arm], first_rung: int = 0) -> float:
        """Return the expected seconds of a round, from this rung to the end."""
        whole = Arm(SFT_ARM, 1.0)
        reached = [0.0, *RUNGS]
        return sum(count * self.trial_seconds(whole, rung, reached[rung]) for rung, count in _trials(arms, first_rung))

    @property
    def last_round_seconds(self) -> float:
        """Return the expected seconds of the best arm with half of its steps, and of one with the seconds of another."""
        has_outputs = self.grid.schedule != (ROWS_ALONE,)
        return (1.5 if has_outputs else 0.5) * self.seconds + (1 + has_outputs) * (self.costs.score + self.costs.switch)

    @property
    def total_seconds(self) -> float:
        """Return the expected seconds of all rounds, without the teacher."""
        first, second = rounds_of(self.grid)
        return self._search_seconds + self.round_seconds(first) + self.round_seconds(second) + self.last_round_seconds

    @property
    def _search_seconds(self) -> float:
        """Return the seconds reserved for rates outside the grid, which are trained to the first rung."""
        searches = len(self.grid.temperature) if self.grid.searches_rates else 0
        return searches * SEARCHED_RATES * self.trial_seconds(Arm(SFT_ARM, 1.0), 0, 0.0)


def rounds_of(grid: Grid) -> tuple[list[Arm], list[Arm]]:
    """Return the arms of the first two rounds, as many as there will be."""
    first = grid.first_round(dict.fromkeys(grid.temperature, grid.lr))
    return first, grid.variations(Arm(grid.divergence[0], grid.lr[0], grid.temperature[0]))


def kept(count: int) -> int:
    """Return how many of a family's arms continue."""
    return math.ceil(count / 2)


def _trials(arms: Iterable[Arm], first_rung: int) -> Iterable[tuple[int, int]]:
    """Yield each rung from the first with its number of trials."""
    families = Counter(arm.family for arm in arms)
    for rung in range(first_rung, len(RUNGS)):
        yield rung, sum(families.values())
        families = Counter({name: kept(count) for name, count in families.items()})


def make_plan(grid: Grid, costs: Costs, available: float, full_steps: int, teacher_steps: int) -> PilotPlan:
    """Return the plan for this number of seconds. full_steps: of the recipe's run. teacher_steps: steps until the teacher
    has seen every row.

    Arms have at most the seconds of a whole run on rows. The grid becomes smaller if runs would have too few steps. Raises
    UsageError if even one value of each setting does not fit.
    """
    full = full_steps * costs.rows
    left_out: list[str] = []
    least = max(MIN_STEPS, min(full_steps, round(_WISHED_SHARE * full_steps))) * costs.rows
    remaining = dict(_LEFT_OUT)
    while True:
        seconds = min(full, _seconds_that_fit(grid, costs, available, teacher_steps))
        if seconds >= min(least, full):
            return PilotPlan(grid, costs, seconds, tuple(left_out))
        axis = next((name for name, count in remaining.items() if len(getattr(grid, name)) > count), None)
        if axis is not None:
            grid, dropped = _without_last(grid, axis)
            left_out.append(dropped)
        elif least > MIN_STEPS * costs.rows:
            least = MIN_STEPS * costs.rows
            remaining = dict.fromkeys(_LEFT_OUT, 1) | {"schedule": 2 if len(grid.schedule) > 1 else 1}
        else:
            raise _too_small(grid, costs, available, teacher_steps, min(least, full))


def _seconds_that_fit(grid: Grid, costs: Costs, available: float, teacher_steps: int) -> float:
    """Return the seconds of an arm with which all rounds fit. The total is linear in it."""
    fixed = PilotPlan(grid, costs, 0.0).total_seconds
    each = PilotPlan(grid, costs, 1.0).total_seconds - fixed
    teacher_each = costs.teacher / costs.rows  # until every row has been seen
    seconds = (available - fixed) / (each + teacher_each)
    if seconds > teacher_steps * costs.rows:
        seconds = (available - fixed - teacher_steps * costs.teacher) / each
    return seconds


def _without_last(grid: Grid, axis: str) -> tuple[Grid, str]:
    """Return the grid without the last value of a setting, and a sentence."""
    *values, last = getattr(grid, axis)
    changes: dict[str, Any] = {axis: tuple(values)}
    if axis == "lr" and len(values) == 1:
        changes["searches_rates"] = False
    name = "learning rate" if axis == "lr" else axis
    return replace(grid, **changes), f"{name} {last if isinstance(last, str) else f'{last:g}'}"


def _too_small(grid: Grid, costs: Costs, available: float, teacher_steps: int, seconds: float) -> UsageError:
    needed = PilotPlan(grid, costs, seconds).total_seconds + min(teacher_steps, seconds / costs.rows) * costs.teacher
    what = f"the budget is too small for the smallest pilot, runs of {round(seconds / costs.rows)} steps"
    where = f"it needs {format_duration(needed)}, and {format_duration(max(available, 0))} are left after loading"
    hint = f"add {math.ceil((needed - available) / 60)} to --minutes"
    return UsageError("usage.budget_too_small", what, where=where, hint=hint)
