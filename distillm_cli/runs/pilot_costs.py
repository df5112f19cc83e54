"""Measure what the parts of a pilot cost, on a few steps that are thrown away."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from distillm_cli.config.pilot_grid import ROWS_ALONE, SFT_ARM, Arm, Grid
from distillm_cli.config.schema import Recipe
from distillm_cli.runs.build import build_trainer
from distillm_cli.runs.pilot_plan import Costs
from distillm_cli.runs.pilot_scores import HeldOutScorer
from distillm_cli.runs.prepare import Prepared
from distillm_cli.teachers.local import LocalTeacher
from distillm_cli.training.events import Event, Stepped

MEASURED = "measure-"  # begins the names of temporary directories
_STEPS = 8
_ROWS = 64


def reset_student(run: Prepared) -> None:
    """Give the student its initial weights, and the random state of the seed."""
    run.student.load_state(run.start_weights())
    torch.manual_seed(run.recipe.train.seed)


@dataclass(frozen=True)
class CostMeter:
    """Measure seconds with the models of a pilot. recipe: of an arm with a number of steps. place: for temporary files."""

    run: Prepared
    teacher: LocalTeacher
    recipe: Callable[[Arm, int], Recipe]
    place: Path

    def costs(self, grid: Grid, scorer: HeldOutScorer) -> Costs:
        """Return the seconds of steps of each kind, of a scoring and of a checkpoint."""
        on_rows = Arm(grid.divergence[0], grid.lr[0])
        new_rows, _ = self._steps(on_rows, _STEPS)
        known_rows, switch = self._steps(on_rows, _STEPS)
        sft, _ = self._steps(Arm(SFT_ARM, grid.lr[0]), _STEPS)
        rows = statistics.median(known_rows)
        has_outputs = grid.schedule != (ROWS_ALONE,)
        few = scorer.limited(_ROWS)
        started = time.perf_counter()
        few.score(self.run.student)
        score = time.perf_counter() - started
        return Costs(
            rows=rows,
            sft=statistics.median(sft),
            fresh=max(rows, self.fresh(on_rows)) if has_outputs else rows,
            teacher=max(0.0, statistics.median(new_rows) - rows),
            score=score * len(scorer.rows) / len(few.rows),
            switch=switch,
        )

    def fresh(self, arm: Arm, weights: Mapping[str, Tensor] | None = None) -> float:
        """Return the seconds of a step on new student outputs, as a mean over as many steps as are sampled for at once.

        weights: of the student, if not its initial ones.
        """
        seconds, _ = self._steps(replace(arm, schedule="on"), self.run.recipe.rollout.bulk, weights)
        return statistics.fmean(seconds)

    def _steps(self, arm: Arm, steps: int, weights: Mapping[str, Tensor] | None = None) -> tuple[list[float], float]:
        """Return the seconds of an arm's first steps, and those of building its trainer and of saving and loading."""
        run = self.run
        seconds: list[float] = []

        def listen(event: Event) -> None:
            if isinstance(event, Stepped):
                seconds.append(event.seconds)

        started = time.perf_counter()
        trial = replace(run, recipe=self.recipe(arm, 1000 * steps))
        with tempfile.TemporaryDirectory(dir=self.place, prefix=MEASURED) as place:
            run.student.load_state(run.start_weights() if weights is None else weights)
            trainer = build_trainer(trial, Path(place), listen, teacher=self.teacher)
            trainer.train(until=steps)
            trainer.save()
            trainer.student_loss.release()
        reset_student(run)
        return seconds, max(0.0, 2 * (time.perf_counter() - started - sum(seconds)))
