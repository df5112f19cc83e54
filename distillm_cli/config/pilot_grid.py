"""Define the grid of ``distillm pilot``: the values of four settings, and the recipe of each combination that is tried."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from distillm_cli import plugins
from distillm_cli.config.field_usage import value_of
from distillm_cli.config.load import Resolved, resolve
from distillm_cli.config.schedule import OWN_BUFFERED_KINDS
from distillm_cli.config.schema import AUTO, Recipe, chosen
from distillm_cli.config.shortcuts import Flag
from distillm_cli.errors import UsageError

SFT_ARM = "sft"  # in place of a divergence: cross-entropy on the rows
ROWS_ALONE = "off"
AXES = {
    "lr": "train.lr",
    "divergence": "objective.divergence",
    "temperature": "objective.temperature",
    "schedule": "schedule.kind",
}
SCHEDULES = (ROWS_ALONE, *OWN_BUFFERED_KINDS)
_ORIGIN = "distillm pilot"
_DIVERGENCES = ("kl", "skl", "ab")
_TEMPERATURES = (1.0, 2.0, 4.0)
_FACTORS = (1.0, 2.0, 0.5)  # of the learning rate


@dataclass(frozen=True)
class Arm:
    """Name one combination of settings. share: of the steps of a whole run, for a shorter one."""

    divergence: str
    lr: float
    temperature: float = 1.0
    schedule: str = ROWS_ALONE
    share: float = 1.0

    @property
    def source(self) -> str:
        """Return what the arm trains on: SFT_ARM, "rows" or "outputs", those of the student."""
        if self.divergence == SFT_ARM:
            return SFT_ARM
        return "rows" if self.schedule == ROWS_ALONE else "outputs"

    @property
    def family(self) -> str:
        """Return the group within which arms are eliminated, so that one of each group is trained to the end.

        On rows each temperature is a group: a high one gains late, and would lose a comparison after few steps.
        """
        return f"rows at {self.temperature:g}" if self.source == "rows" else self.source

    @property
    def settings(self) -> str:
        """Return the settings other than the learning rate, for tables: "kl, auto, T 2", with "× 0.5" for half the steps."""
        if self.divergence == SFT_ARM:
            return SFT_ARM
        soft = "" if self.temperature == 1 else f", T {self.temperature:g}"
        short = "" if self.share == 1 else f", × {self.share:g}"
        return f"{self.divergence}, {self.schedule}{soft}{short}"

    @property
    def name(self) -> str:
        """Return the name of its directory."""
        parts = [self.divergence, f"lr{self.lr:.3g}"]
        if self.divergence != SFT_ARM:
            parts += [f"T{self.temperature:g}", self.schedule]
        if self.share != 1:
            parts.append(f"x{self.share:g}")
        return "-".join(parts)


@dataclass(frozen=True)
class Grid:
    """Hold the values of each setting, the most important first.

    searches_rates: the rates are around that of the recipe, and larger or smaller ones may be added.
    """

    lr: tuple[float, ...]
    divergence: tuple[str, ...]
    temperature: tuple[float, ...]
    schedule: tuple[str, ...]
    searches_rates: bool = False

    def first_round(self, rates: Mapping[float, Iterable[float]]) -> list[Arm]:
        """Return the arms of the first round: the first divergence on rows with the rates of each temperature, and SFT.

        SFT has the rates of the first temperature.
        """
        of_sft = [Arm(SFT_ARM, lr) for lr in rates[self.temperature[0]]]
        return of_sft + [Arm(self.divergence[0], lr, value) for value in self.temperature for lr in rates[value]]

    def variations(self, best: Arm) -> list[Arm]:
        """Return the arms of the second round: the best of the first with other divergences, and with other schedules."""
        of_divergences = [replace(best, divergence=name) for name in self.divergence]
        of_schedules = [replace(best, schedule=name) for name in self.schedule]
        return [arm for arm in of_divergences + of_schedules if arm != best]


def parse_grid(texts: Iterable[str], recipe: Recipe) -> Grid:
    """Return the grid of ``--grid NAME=VALUE,…`` texts, with defaults around the recipe's values for other settings.

    Raises UsageError for a name or a value that is not one.
    """
    given: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        name, _, words = text.partition("=")
        if name not in AXES:
            where = f"names are {', '.join(AXES)}"
            raise UsageError("usage.unknown_axis", f"--grid {text}", where=where, hint="try --grid lr=1e-4,2e-4")
        if name in given:
            raise UsageError("usage.given_twice", f"--grid {name} is given twice", hint="keep one of them")
        values = dict.fromkeys(_value(name, word.strip(), text) for word in words.split(","))
        given[name] = tuple(values)
    if recipe.train.lr == AUTO and "lr" not in given:
        what = f"no learning rate is known for {recipe.student.path}, since its config cannot be read"
        raise UsageError("usage.no_rate", what, hint="check the name, or try --grid lr=1e-4,2e-4")
    lr = 0.0 if recipe.train.lr == AUTO else chosen(recipe.train.lr)
    objective, schedule = recipe.objective, recipe.schedule.kind
    own = () if objective.kd_weight == 0 else (objective.divergence,)
    defaults: dict[str, tuple[Any, ...]] = {
        "lr": tuple(factor * lr for factor in _FACTORS),
        "divergence": tuple(dict.fromkeys((*own, *_DIVERGENCES)))[: len(_DIVERGENCES)],
        "temperature": tuple(dict.fromkeys((objective.temperature, *_TEMPERATURES))),
        "schedule": tuple(dict.fromkeys((ROWS_ALONE, "auto", schedule, "on"))),
    }
    schedules = given.get("schedule")
    if schedules is not None and ROWS_ALONE not in schedules:  # the first round has it anyway
        given["schedule"] = (ROWS_ALONE, *schedules)
    return Grid(**(defaults | given), searches_rates="lr" not in given)


def _value(name: str, word: str, text: str) -> Any:
    """Return a value of an axis. Raises UsageError."""
    if name in ("divergence", "schedule"):
        names = SCHEDULES if name == "schedule" else tuple(plugins.divergences)
        if word in names:
            return word
        raise UsageError(
            "usage.invalid_value", f"--grid {text}: no {name} {word!r}", where=f"one of {', '.join(names)}"
        )
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        what = f"--grid {text}: {word!r} is not a number above 0"
        raise UsageError("usage.invalid_value", what, hint=f"try --grid {name}=1")
    return number


def check_has_grid(recipe: Recipe) -> None:
    """Raise UsageError for a recipe whose method is not an objective with a schedule that can be replaced."""
    default = Recipe()
    reasons = {
        f"schedule.kind {recipe.schedule.kind}": recipe.schedule.kind not in SCHEDULES,
        "disco.enabled": recipe.disco.enabled,
        "student.ptp": recipe.student.ptp > 0,
        "data.mixup": recipe.data.mixup > 0,
        "rollout.teacher_mix": recipe.rollout.teacher_mix > 0,
        str(recipe.teacher_trainer): recipe.teacher_trainer is not None,
    }
    for name in ("by_source", "curriculum", "policy_gradient", "row_weight", "input_gradient", "hidden"):
        reasons[f"objective.{name}"] = getattr(recipe.objective, name) != getattr(default.objective, name)
    found = next((reason for reason, applies in reasons.items() if applies), None)
    if found is not None:
        what = f"a pilot has no grid for method {recipe.method} ({found})"
        hint = "use a method of one divergence, such as distillm, kd, gkd or ab"
        raise UsageError("usage.no_pilot", what, hint=hint)


def arm_recipe(base: Resolved, arm: Arm) -> Resolved:
    """Return the recipe of an arm: the base with the arm's settings, its other values unchanged."""
    values: dict[str, Any] = {"train.lr": arm.lr, "schedule.kind": arm.schedule}
    if arm.divergence == SFT_ARM:
        values["objective.kd_weight"] = 0.0
    else:
        values |= {"objective.divergence": arm.divergence, "objective.temperature": arm.temperature}
        if base.recipe.objective.kd_weight == 0:
            values["objective.kd_weight"] = 1.0
    same = {key for key, value in values.items() if value == value_of(base.recipe, key)}
    flags = {key: Flag(_ORIGIN, value) for key, value in values.items() if key not in same}
    return resolve(command="distill", recipe=base, flags=flags)


def trial_recipe(recipe: Recipe, steps: int, full_steps: int) -> Recipe:
    """Return the recipe of a trial of ``steps`` steps, from that of a run of ``full_steps``.

    Validations are as many as in the run if the schedule depends on them. The last weights are used.
    """
    train = recipe.train
    every: int | str = steps
    if recipe.schedule.has_phi:
        every = train.eval_steps
        if isinstance(every, int):
            every = max(1, round(every * steps / full_steps))
    changes = {"steps": steps, "eval_steps": every, "save_steps": steps, "select": "last", "patience": None, "keep": 1}
    return recipe.model_copy(update={"train": train.model_copy(update=changes)})
