"""Try a small grid of settings with short runs (``distillm pilot``), by successive halving within a budget of minutes.

All trials run in one process with the same models, rows and teacher cache. A trial continues from its own checkpoint, so
that an arm trained to the end equals an uninterrupted run of that length.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from distillm_cli.config.derived import fixed_values
from distillm_cli.config.load import Resolved, to_yaml, with_resolved_values
from distillm_cli.config.pilot_grid import (
    ROWS_ALONE,
    SFT_ARM,
    Arm,
    Grid,
    arm_recipe,
    check_has_grid,
    parse_grid,
    trial_recipe,
)
from distillm_cli.config.schema import Recipe
from distillm_cli.errors import Interrupted, UsageError, signal_number
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.runs import output_dir
from distillm_cli.runs.build import build_trainer
from distillm_cli.runs.cache_planning import open_teacher, plan_cache
from distillm_cli.runs.defaults import fitted
from distillm_cli.runs.pilot_costs import MEASURED, CostMeter, reset_student
from distillm_cli.runs.pilot_plan import RUNGS, PilotPlan, kept, make_plan
from distillm_cli.runs.pilot_record import ARMS, PilotRecord, Trial, read_pilot, write_pilot
from distillm_cli.runs.pilot_result import Ranking, choose_best, conclude
from distillm_cli.runs.pilot_scores import HeldOutScorer
from distillm_cli.runs.prepare import prepare
from distillm_cli.runs.resume import check_unchanged, find_checkpoint, restore_student
from distillm_cli.runs.run_results import PilotResult
from distillm_cli.runs.stages import StageCheckpoints, read_checkpoints, run_prior_stages, stages_of, start_trainer
from distillm_cli.runs.start import TrainOptions
from distillm_cli.runs.train import FineTuning
from distillm_cli.runs.weight_mean import WeightMean, snapshot_steps
from distillm_cli.teachers.local import LocalTeacher
from distillm_cli.training.distributed import world
from distillm_cli.training.events import Event, Listener, Note, Progress, Warned
from distillm_cli.training.trainer import Trainer
from distillm_cli.utils.memory import keep_freed_memory
from distillm_cli.utils.text import counted, format_duration

SCORED_ROWS = 500  # held-out rows on which arms are compared
_FEWEST_SCORED = 100
_SCORING_SHARE = 0.15  # of an arm's seconds, at most, for one scoring with more than the fewest rows
_RESERVE = 0.05  # share of the budget that is not planned
_MARGIN = 0.02  # share of the budget for the conclusion
_SLICE_SECONDS = 2.0  # of training between two looks at the clock
_SAVE_SECONDS = 60.0  # between two checkpoints within a trial
_CONTINUE = "run the same command again to continue"
_MOST_SEARCHED = 6  # turns of the search for a learning rate
_NEAR = 0.1  # largest relative difference of seconds that count as equal
_SEARCH_SHARE = 0.5  # of the budget that must be left for another turn


@dataclass(frozen=True)
class PilotOptions:
    """Hold the settings of a pilot that are not in its recipe. grid: texts of ``--grid``."""

    minutes: float
    grid: tuple[str, ...] = ()


def _neighbors(arm: Arm) -> list[Arm]:
    return [replace(arm, lr=2 * arm.lr), replace(arm, lr=arm.lr / 2)]


class _OutOfTime(Exception):
    """Report that the budget is used up."""


def run_pilot(resolved: Resolved, output: Path, listener: Listener, options: PilotOptions) -> PilotResult:
    """Run a pilot into ``output``, or continue the one there. A finished one is returned again.

    Raises DistillmError.
    """
    started = time.perf_counter()
    if not options.minutes > 0:
        raise UsageError(
            "usage.invalid_value", f"--minutes {options.minutes:g} is not above 0", hint="try --minutes 20"
        )
    if world().size > 1:
        what = "a pilot runs in one process"
        raise UsageError(
            "usage.one_process", what, where=f"{world().size} processes", hint="start it without a launcher"
        )
    check_has_grid(resolved.recipe)
    grid = parse_grid(options.grid, resolved.recipe)
    for arm in (Arm(SFT_ARM, grid.lr[0]), *(Arm(name, grid.lr[0]) for name in grid.divergence)):
        arm_recipe(resolved, arm)  # reports a combination that the recipe excludes
    settings = {**fixed_values(resolved.recipe), "--grid": asdict(grid), "--minutes": options.minutes}
    record = read_pilot(output, settings)
    if record.result is not None:
        listener(Note(f"already finished: {output}"))
        return PilotResult.from_json(record.result)
    is_new = not output.exists()
    with output_dir.claimed(output, is_new=is_new):
        try:
            pilot = _Pilot(resolved, grid, output, listener, options.minutes * 60, record, started)
            return pilot.run()
        except Interrupted as stop:
            raise Interrupted(stop.what, signal_number=stop.exit_code - 128, hint=_CONTINUE) from None
        except KeyboardInterrupt as stop:
            raise Interrupted("interrupted", signal_number=signal_number(stop), hint=_CONTINUE) from None


@dataclass
class _Pilot:
    """Run the rounds of one pilot. budget: seconds. started: of this process, by ``time.perf_counter``."""

    resolved: Resolved
    grid: Grid
    output: Path
    listener: Listener
    budget: float
    record: PilotRecord
    started: float
    taken: float = 0.0
    expected: float = 0.0
    warned: set[str] = field(default_factory=set)

    def run(self) -> PilotResult:
        """Prepare, measure, plan, and run the rounds."""
        self.used_before = self.record.seconds
        self._prepare()
        self.plan = self.record.planned() or self._plan()
        self._report_plan()
        try:
            self._rounds()
        except _OutOfTime:
            self._note("the budget ended before the last trials")
        steps_per_epoch = self.run_of_pair.order.steps_per_epoch
        result = conclude(self.ranking, self.output, self.full_steps, steps_per_epoch, self.seconds())
        self._write_recipe(Arm(**result.best), result.steps)
        self.record.result = result.as_json()
        self._save()
        for place in (self.output / ARMS, *self.output.glob(f"{MEASURED}*")):
            shutil.rmtree(place, ignore_errors=True)
        self.listener(Progress("pilot", 1, 1))
        return result

    @property
    def ranking(self) -> Ranking:
        """Return the arms' ranking, by the trials so far."""
        return Ranking(self.record, self.plan, self.scorer.metric)

    # Time

    def seconds(self) -> float:
        """Return the seconds that the pilot has used, in all processes that have worked on it."""
        return self.used_before + time.perf_counter() - self.started

    @property
    def remaining(self) -> float:
        """Return the seconds that are left for trials."""
        return self.budget * (1 - _MARGIN) - self.seconds()

    def _save(self) -> None:
        self.record.seconds = self.seconds()
        write_pilot(self.output, self.record)

    def _note(self, text: str) -> None:
        if text not in self.record.notes:
            self.record.notes.append(text)

    # Preparation

    def _prepare(self) -> None:
        """Load rows and models, train the stage before the run, and open the teacher with a cache for all trials."""
        chosen = {key: (value, origin) for key, (value, origin) in self.record.chosen.items()}
        self.resolved = with_resolved_values(self.resolved, chosen)
        # With student outputs, so that rows need responses and the whole teacher is loaded.
        widest = arm_recipe(self.resolved, Arm(self.grid.divergence[0], self.grid.lr[0], schedule="auto"))
        run = prepare(fitted(widest).recipe, self.listener)
        self.base = with_resolved_values(fitted(self.resolved), run.resolved_values)
        self.record.chosen |= {key: list(value) for key, value in run.resolved_values.items()}
        self.full_steps = run.steps
        inputs = dict(run.inputs)
        check_unchanged(self.record.inputs, inputs, self.output)
        self.record.inputs = inputs
        if run.device.type == "cpu":
            keep_freed_memory()
        stages = stages_of(self.base, [FineTuning()])
        options = TrainOptions(resume=output_dir.may_resume(self.output))
        checkpoints = StageCheckpoints(None, {})
        if options.resume:
            recipes = {stage.name: recipe for stage, recipe in stages.items()}
            checkpoints = read_checkpoints(self.base, recipes, self.output, options)
        self._save()
        run = run_prior_stages(run, stages, self.base, self.output, checkpoints, None, self.listener)
        initial = {name: weight.to("cpu", copy=True) for name, weight in run.student.state().items()}
        self.run_of_pair = replace(run, initial_weights=initial.copy)
        self.teacher = self._shared_teacher()
        limit = SCORED_ROWS if self.record.plan is None else self.record.plan["rows"]
        self.scorer = HeldOutScorer(self.run_of_pair, limit)
        self.meter = CostMeter(self.run_of_pair, self.teacher, self._recipe, self.output)

    def _shared_teacher(self) -> LocalTeacher:
        """Return the teacher with a cache that serves every trial: of rows, held-out rows and replayed rollouts."""
        recipe = arm_recipe(self.base, Arm(self.grid.divergence[0], 1.0, schedule="auto")).recipe
        train = recipe.train.model_copy(update={"steps": None, "epochs": 2.0})
        recipe = recipe.model_copy(update={"train": train, "data": self.run_of_pair.recipe.data})
        run = replace(self.run_of_pair, recipe=recipe)
        handle = open_teacher(run, plan_cache(run), self.listener)
        assert handle is not None
        return handle.teacher

    def _recipe(self, arm: Arm, steps: int) -> Recipe:
        """Return the recipe of a trial."""
        recipe = fitted(arm_recipe(self.base, arm)).recipe
        return trial_recipe(recipe.model_copy(update={"data": self.run_of_pair.recipe.data}), steps, self.full_steps)

    # The plan

    def _plan(self) -> PilotPlan:
        """Measure what steps and scorings cost, and plan the rounds."""
        costs = self.meter.costs(self.grid, self.scorer)
        teacher_steps = self.run_of_pair.order.steps_per_epoch
        make = partial(make_plan, self.grid, full_steps=self.full_steps, teacher_steps=teacher_steps)
        plan = make(costs=costs, available=self._available())
        rows = len(self.scorer.rows)
        if costs.score > _SCORING_SHARE * plan.seconds and rows > _FEWEST_SCORED:
            fewer = max(_FEWEST_SCORED, int(rows * _SCORING_SHARE * plan.seconds / costs.score))
            self.scorer = self.scorer.limited(fewer)
            costs = replace(costs, score=costs.score * fewer / rows)
            plan = make(costs=costs, available=self._available())
        for left_out in plan.left_out:
            self._note(f"not tried, did not fit into the budget: {left_out}")
        self.record.plan = {**asdict(plan), "rows": len(self.scorer.rows)}
        self._save()
        return plan

    def _available(self) -> float:
        return self.budget * (1 - _RESERVE) - self.seconds()

    def _report_plan(self) -> None:
        plan = self.plan
        steps = plan.steps(Arm(plan.grid.divergence[0], plan.grid.lr[0]))
        epochs = steps / self.run_of_pair.order.steps_per_epoch
        what = f"{steps:,} steps ({epochs:.1f} epochs) on rows in {format_duration(plan.seconds)}"
        self.listener(
            Note(f"pilot: runs of at most {what}, scored on {counted(len(self.scorer.rows), 'held-out row')}")
        )
        for note in self.record.notes:
            self.listener(Note(note))

    # Rounds

    def _rounds(self) -> None:
        """Run the three rounds of ``pilot_plan``."""
        grid = self.plan.grid
        rates = dict.fromkeys(grid.temperature, grid.lr)
        if grid.searches_rates:
            for value in grid.temperature:
                found = self._decide(f"rates at {value:g}", partial(self._search_rates, value))
                rates[value] = tuple(arm.lr for arm in found)
        first = grid.first_round(rates)
        later = self.plan.round_seconds(grid.variations(first[-1])) + self.plan.last_round_seconds
        finished = self._halve("temperatures", first, later)
        distilled = [arm for arm in finished if arm.divergence != SFT_ARM]
        if not distilled:
            return
        variations = grid.variations(distilled[0])
        if any(arm.schedule != ROWS_ALONE for arm in variations):
            self._measure_outputs(distilled[0])
        finished += self._halve("variations", variations, self.plan.last_round_seconds)
        for arm in self._decide("equal seconds", partial(self._equal_seconds, finished)):
            self._advance(arm, len(RUNGS) - 1)
        (best,) = self._decide("best", lambda: [choose_best(self.ranking, finished, self.full_steps)])
        self._advance(replace(best, share=0.5), len(RUNGS) - 1)

    def _equal_seconds(self, finished: list[Arm]) -> list[Arm]:
        """Return the best arm on rows with as many steps as take the seconds of the best one with student outputs.

        None if its own seconds are near them.
        """
        last = len(RUNGS) - 1
        ranked = self.ranking.ranked(finished)
        pair = [next((arm for arm in ranked if arm.source == source), None) for source in ("outputs", "rows")]
        if pair[0] is None or pair[1] is None:
            return []
        outputs, rows = (self.record.trial(arm, last) for arm in pair if arm is not None)
        assert outputs is not None
        assert rows is not None
        share = round(outputs.train_s / rows.train_s, 2)
        return [] if abs(share - 1) <= _NEAR else [replace(pair[1], share=share)]

    def _measure_outputs(self, best: Arm) -> None:
        """Measure a step on student outputs again, with the weights of the best arm so far, which end their answers.

        The steps of the arms with student outputs depend on it, so that they take the same seconds.
        """
        if "fresh" not in self.record.decided_costs:
            run = self.run_of_pair
            checkpoint = find_checkpoint(self.output / ARMS / best.name, self._recipe(best, self.plan.steps(best)))
            assert checkpoint is not None
            restore_student(run.student, checkpoint)
            weights = {name: weight.to("cpu", copy=True) for name, weight in run.student.state().items()}
            fresh = self.meter.fresh(best, weights)
            self.record.decided_costs["fresh"] = max(self.plan.costs.rows, fresh)
            self._save()
        self.plan = replace(self.plan, costs=replace(self.plan.costs, **self.record.decided_costs))

    def _decide(self, place: str, make: Callable[[], list[Arm]]) -> list[Arm]:
        """Return the arms that were chosen at this place before, or choose them now."""
        arms = self.record.decide(place, make)
        self._save()
        return arms

    def _search_rates(self, temperature: float) -> list[Arm]:
        """Return arms of the best learning rate of the first divergence, at the first rung, and of its neighbors.

        From the recipe's rate it goes up or down by factors of 2 until the score is worse.
        """
        center = Arm(self.plan.grid.divergence[0], self.plan.grid.lr[0], temperature)
        arms = [replace(center, lr=lr) for lr in self.plan.grid.lr]
        for _ in range(_MOST_SEARCHED):
            scored = self.ranking.ranked([arm for arm in arms if self._advance(arm, 0)])
            best = scored[0] if scored else center
            missing = [arm for arm in _neighbors(best) if arm not in arms]
            if not missing or self.remaining < _SEARCH_SHARE * self.budget:
                break
            arms += missing
        return [best, *_neighbors(best)][: len(self.plan.grid.lr)]

    def _halve(self, round_name: str, arms: list[Arm], later: float) -> list[Arm]:
        """Train arms to the end by successive halving within each family; return those that reached it, best first.

        later: expected seconds of the rounds that follow.
        """
        for rung in range(len(RUNGS)):
            if rung:
                arms = self._decide(f"{round_name} {rung}", partial(self._continuing, arms, rung, later))
            arms = [arm for arm in arms if self._advance(arm, rung)]
        return self.ranking.ranked(arms)

    def _continuing(self, arms: list[Arm], rung: int, later: float) -> list[Arm]:
        """Return the better half of each family, or the best of each if time is short."""
        by_family: dict[str, list[Arm]] = {}
        for arm in self.ranking.ranked(arms):
            by_family.setdefault(arm.family, []).append(arm)
        half = [arm for members in by_family.values() for arm in members[: kept(len(members))]]
        one = [members[0] for members in by_family.values()]
        fits = self._pace() * (self.plan.round_seconds(half, rung) + later) <= self.remaining
        if not fits and len(one) < len(half):
            self._note(f"time was short: {counted(len(half) - len(one), 'arm')} stopped early")
        selected = half if fits else one
        for arm in arms:
            if arm not in selected:
                shutil.rmtree(self.output / ARMS / arm.name, ignore_errors=True)
        return selected

    def _pace(self) -> float:
        """Return how many times the planned seconds the trials of this process have taken so far, at least 1."""
        return max(1.0, self.taken / self.expected) if self.expected else 1.0

    # Trials

    def _advance(self, arm: Arm, rung: int) -> bool:
        """Train an arm to a rung and score it, unless that is done. Return whether it has the score.

        Raises _OutOfTime when the budget is used up.
        """
        if self.record.trial(arm, rung) is not None:
            return True
        reached = next((RUNGS[at] for at in reversed(range(rung)) if self.record.trial(arm, at)), 0.0)
        expected = self.plan.trial_seconds(arm, rung, reached)
        if self._pace() * expected > self.remaining:
            self._note(f"not trained to the end, for lack of time: {arm.settings}, lr {arm.lr:g}")
            return False
        started = time.perf_counter()
        trainer, mean = self._train(arm, rung)
        state = trainer.state
        with mean.used_by(self.run_of_pair.student):
            scores = self.scorer.score(self.run_of_pair.student)
        self.taken += time.perf_counter() - started
        self.expected += expected
        of_outputs = state.steps_with(Source.ROLLOUT) + state.steps_with(Source.REPLAY)
        train_s = round(sum(state.source_seconds.values()), 3)
        self.record.add(arm, rung, Trial(state.step, train_s, scores, of_outputs / state.step))
        self._save()
        label = self.scorer.metric.label
        done = f"step {state.step:,} of {self.plan.steps(arm):,}"
        self.listener(Note(f"{arm.settings}, lr {arm.lr:g} · {done} · {label} {scores.figure:.2f}"))
        self.listener(Progress("pilot", int(self.seconds()), int(max(self.budget, self.seconds() + 1)), "s"))
        return True

    def _train(self, arm: Arm, rung: int) -> tuple[Trainer, WeightMean]:
        """Train an arm to a rung, from its checkpoint if there is one, and save it. Return also the mean of its weights."""
        run = replace(self.run_of_pair, recipe=self._recipe(arm, self.plan.steps(arm)))
        place = self.output / ARMS / arm.name
        place.mkdir(parents=True, exist_ok=True)
        checkpoint = find_checkpoint(place, run.recipe, is_required=False)
        if checkpoint is None:
            reset_student(run)
        else:
            restore_student(run.student, checkpoint)

        def build(log: Listener) -> Trainer:
            return build_trainer(run, place, log, teacher=self.teacher)

        trainer = start_trainer(build, place, run.recipe.train, checkpoint, self._listen)
        until = self.plan.rung_steps(arm, rung)
        mean = WeightMean.load(place, trainer.state.step)
        snapshots = [] if until == run.steps else snapshot_steps(until)
        try:
            self._train_in_slices(trainer, until, snapshots, mean, place)
        except Interrupted:
            mean.save(place, trainer.state.step)
            raise
        finally:
            trainer.student_loss.release()
        return trainer, mean

    def _train_in_slices(
        self, trainer: Trainer, until: int, snapshots: SequenceOf[int], mean: WeightMean, place: Path
    ) -> None:
        """Train to a step, with a look at the clock after every slice, and add the weights after these steps to a mean."""
        saved = time.perf_counter()
        while (step := trainer.state.step) < until:
            stops = [stop for stop in (*snapshots, until) if stop > step]
            each = max(1, round(_SLICE_SECONDS / self.plan.costs.rows))
            trainer.train(until=min(stops[0], step + each))
            if trainer.state.step in snapshots:
                mean.add(self.run_of_pair.student.state())
            if trainer.state.step < until and self.remaining < 0:
                raise _OutOfTime
            if trainer.state.step < until and time.perf_counter() - saved > _SAVE_SECONDS:
                mean.save(place, trainer.state.step)
                trainer.save()
                saved = time.perf_counter()
        trainer.save()

    def _listen(self, event: Event) -> None:
        """Pass on the warnings of trials, each once."""
        if isinstance(event, Warned) and event.text not in self.warned:
            self.warned.add(event.text)
            self.listener(event)

    # The recipe

    def _write_recipe(self, arm: Arm, steps: int) -> None:
        """Write the recipe of the best arm, with the number of steps that is worth it."""
        resolved = fitted(arm_recipe(self.base, replace(arm, share=1.0)))
        changes: Mapping[str, tuple[object, str]] = {"train.steps": (steps, "distillm pilot")}
        output_dir.write_recipe(self.output, to_yaml(with_resolved_values(resolved, changes)))
