"""Conclude a pilot: choose the best arm, and answer its questions with differences on held-out rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from distillm_cli.config.pilot_grid import SFT_ARM, Arm
from distillm_cli.errors import UsageError
from distillm_cli.evaluation.metrics import Metric
from distillm_cli.runs import output_dir
from distillm_cli.runs.pilot_plan import RUNGS, PilotPlan
from distillm_cli.runs.pilot_record import PilotRecord, Trial
from distillm_cli.runs.pilot_scores import PairedDifference, paired_difference
from distillm_cli.runs.run_results import PilotArm, PilotResult

_LAST = len(RUNGS) - 1
_ADAPTIVE = ("auto", "adaptive")
_SHORT = 0.75  # of the recipe's steps, below which a trial says less about student outputs


def conclude(ranking: Ranking, output: Path, full_steps: int, steps_per_epoch: int, seconds: float) -> PilotResult:
    """Return the result of the trials in a record. full_steps: of the recipe's run. seconds: that the pilot has used."""
    record = ranking.record
    whole = [arm for arm in ranking.arms if arm.share == 1]
    if not whole:
        hint = "give more --minutes in another --output"
        raise UsageError("usage.budget_too_small", "the budget ended before the first trial", hint=hint)
    chosen = record.decisions.get("best")
    best = Arm(**chosen[0]) if chosen else ranking.best(whole)
    assert best is not None
    steps, on_steps = _on_steps(ranking, best, full_steps)
    answers = [
        _on_objective(ranking),
        _on_temperature(ranking),
        _on_outputs(ranking, best, full_steps, steps_per_epoch),
        _on_sft(ranking),
        on_steps,
        _on_rate(ranking, best),
    ]
    return PilotResult(
        output=output,
        wall_s=round(seconds, 1),
        recipe=str(output / output_dir.RECIPE),
        best=asdict(best),
        steps=steps,
        metric=ranking.metric.name,
        rows=plan_rows(record),
        arms=tuple(ranking.table(best)),
        answers=tuple(answer for answer in answers if answer),
        notes=tuple(record.notes),
    )


def choose_best(ranking: Ranking, finished: Iterable[Arm], full_steps: int) -> Arm:
    """Return the best of the arms that were trained to the end.

    If trials are shorter than the recipe's run, an adaptive schedule comes before rows alone, unless they are clearly better
    in the same steps or the same seconds: rows repeat more often in the longer run, and there student outputs gain more.
    """
    finished = list(finished)
    best = ranking.best(finished)
    assert best is not None
    adaptive = ranking.best(arm for arm in finished if arm.schedule in _ADAPTIVE)
    if best.source != "rows" or adaptive is None or not is_short(ranking.plan, best, full_steps):
        return best
    rows_are_better = ranking.compare(best, adaptive, _LAST).is_clear
    if (compared := ranking.outputs_against_rows()) is not None:
        in_same_seconds, _ = compared
        rows_are_better |= in_same_seconds.is_clear and in_same_seconds.mean < 0
    return best if rows_are_better else adaptive


def is_short(plan: PilotPlan, arm: Arm, full_steps: int) -> bool:
    """Return whether an arm's trial is much shorter than the recipe's run."""
    return plan.steps(arm) < _SHORT * full_steps


def plan_rows(record: PilotRecord) -> int:
    """Return the number of held-out rows that arms were compared on."""
    assert record.plan is not None
    return int(record.plan["rows"])


@dataclass
class Ranking:
    """Rank the arms of a record, and compare two of them."""

    record: PilotRecord
    plan: PilotPlan
    metric: Metric

    @property
    def arms(self) -> list[Arm]:
        return self.record.arms

    def rung(self, arm: Arm) -> int:
        """Return the last rung of an arm."""
        return max(rung for rung in range(len(RUNGS)) if self.record.trial(arm, rung) is not None)

    def trial(self, arm: Arm, rung: int) -> Trial:
        trial = self.record.trial(arm, rung)
        assert trial is not None
        return trial

    def best(self, arms: Iterable[Arm]) -> Arm | None:
        """Return the arm with the best figure among those that came furthest; None without arms."""
        return next(iter(self.ranked(arms)), None)

    def ranked(self, arms: Iterable[Arm]) -> list[Arm]:
        """Return arms that came furthest first, and of these the best first."""
        sign = 1 if self.metric.higher_is_better else -1
        return sorted(
            arms, key=lambda arm: (self.rung(arm), sign * self.trial(arm, self.rung(arm)).scores.figure), reverse=True
        )

    def best_of_each(self, setting: str, arms: Iterable[Arm]) -> list[Arm]:
        """Return the best arm with each value of a setting, the best first."""
        found: dict[object, Arm] = {}
        for arm in self.ranked(arms):
            found.setdefault(getattr(arm, setting), arm)
        return list(found.values())

    def compare(self, first: Arm, second: Arm, rung: int) -> PairedDifference:
        """Return by how much the first arm is better, both after this rung."""
        scores = [self.trial(arm, rung).scores for arm in (first, second)]
        return paired_difference(*scores, lower_is_better=not self.metric.higher_is_better)

    def versus(self, first: Arm, second: Arm) -> tuple[PairedDifference, str]:
        """Return by how much the first arm is better, after the last rung of both, and a clause with the figures."""
        rung = min(self.rung(first), self.rung(second))
        return self.versus_after(first, rung, second, rung)

    def versus_after(self, first: Arm, rung: int, second: Arm, second_rung: int) -> tuple[PairedDifference, str]:
        """Return the same, after these rungs."""
        trials = [self.trial(first, rung), self.trial(second, second_rung)]
        difference = paired_difference(
            trials[0].scores, trials[1].scores, lower_is_better=not self.metric.higher_is_better
        )
        figures = [
            f"{trial.scores.figure:.2f} with {arm.settings} (lr {arm.lr:g}, {trial.train_s:.0f} s{_after(at)})"
            for arm, trial, at in zip((first, second), trials, (rung, second_rung), strict=True)
        ]
        return difference, f"{self.metric.label} {' against '.join(figures)}, {_interval(difference)}"

    def outputs_against_rows(self) -> tuple[PairedDifference, str] | None:
        """Return by how much the best arm with student outputs is better than rows alone, in the same seconds.

        None if one of them was not tried.
        """
        outputs = self.best(arm for arm in self.arms if arm.source == "outputs" and arm.share == 1)
        rows = self.best(_on_rows(self))
        if outputs is None or rows is None:
            return None
        equal = [Arm(**fields) for fields in self.record.decisions.get("equal seconds", [])]
        return self.versus(outputs, next((arm for arm in equal if arm in self.arms), rows))

    def best_rung(self, arm: Arm) -> int:
        """Return the rung after which an arm had its best figure."""
        sign = 1 if self.metric.higher_is_better else -1
        return max(range(self.rung(arm) + 1), key=lambda rung: sign * self.trial(arm, rung).scores.figure)

    def table(self, best: Arm) -> Iterable[PilotArm]:
        """Yield the lines of the table: arms that came furthest first, each compared with the best after its last rung."""
        for arm in self.ranked(self.arms):
            rung = self.rung(arm)
            trial = self.trial(arm, rung)
            difference = None
            if arm != best:
                of_best = min(rung, self.rung(best))
                difference = self.compare(arm, best, of_best)
            yield PilotArm(
                name=arm.settings,
                lr=arm.lr,
                steps=trial.step,
                of_steps=self.plan.steps(arm),
                train_s=trial.train_s,
                output_share=round(trial.output_share, 3),
                figure=trial.scores.figure,
                difference=None if difference is None else (difference.mean, difference.low, difference.high),
                is_best=arm == best,
            )


def _after(rung: int) -> str:
    return "" if rung == _LAST else f", {RUNGS[rung]:.0%} of the steps"


def _interval(difference: PairedDifference) -> str:
    """Describe a difference: "better by 1.20 (95 % interval 0.40 to 2.00)"."""
    word, sign = ("better", 1) if difference.mean >= 0 else ("worse", -1)
    low, high = sorted((sign * difference.low, sign * difference.high))
    return f"{word} by {abs(difference.mean):.2f} (95 % interval {low:.2f} to {high:.2f})".replace("-", "−")


def _on_objective(ranking: Ranking) -> str | None:
    """Describe which objective is best on the rows, at the best temperature, and how it compares with the next."""
    on_rows = _on_rows(ranking)
    best = ranking.best(on_rows)
    if best is None:
        return None
    ranked = ranking.best_of_each("divergence", (arm for arm in on_rows if arm.temperature == best.temperature))
    if len(ranked) == 1:
        return f"Objective: {best.divergence}, the only one that was tried."
    return f"Objective: {best.divergence} {_ahead_of_next(ranking, ranked)}"


def _on_temperature(ranking: Ranking) -> str | None:
    """Describe which temperature is best on the rows with the first objective, and how it compares with the next."""
    first = ranking.plan.grid.divergence[0]
    ranked = ranking.best_of_each("temperature", (arm for arm in _on_rows(ranking) if arm.divergence == first))
    if len(ranked) < 2:
        return None
    return f"Temperature: {ranked[0].temperature:g} {_ahead_of_next(ranking, ranked)}"


def _ahead_of_next(ranking: Ranking, ranked: list[Arm]) -> str:
    """Return the end of a sentence: how the first of these arms compares with the second."""
    difference, clause = ranking.versus(*ranked[:2])
    verdict = "" if difference.is_clear else ", but the difference to the next is not clear"
    return f"is the best{verdict}: {clause}."


def _on_rows(ranking: Ranking) -> list[Arm]:
    """Return the arms that train on rows alone by a divergence."""
    return [arm for arm in ranking.arms if arm.source == "rows" and arm.share == 1]


def _on_outputs(ranking: Ranking, best: Arm, full_steps: int, steps_per_epoch: int) -> str | None:
    """Describe whether student outputs pay for themselves, in the same seconds."""
    compared = ranking.outputs_against_rows()
    rows = ranking.best(_on_rows(ranking))
    if compared is None or rows is None:
        return None
    difference, clause = compared
    if not difference.is_clear:
        verdict = "It is not clear that student outputs pay for themselves here"
    elif difference.mean > 0:
        verdict = "Student outputs pay for themselves here"
    else:
        verdict = "Student outputs do not pay for themselves here"
    sentence = f"{verdict}: {clause}."
    if is_short(ranking.plan, rows, full_steps):
        epochs = [steps / steps_per_epoch for steps in (ranking.plan.steps(rows), full_steps)]
        sentence += (
            f" The trials had {epochs[0]:.1f} epochs and the recipe has {epochs[1]:.1f}: student outputs gain more"
        )
        sentence += " when rows repeat more often."
        if best.source == "outputs" and difference.mean < 0:
            sentence += f" Therefore {best.schedule} is chosen."
    return sentence


def _on_sft(ranking: Ranking) -> str | None:
    """Describe whether plain SFT is enough. It may stop early, as `distillm sft` does: its best figure counts."""
    sft = ranking.best(arm for arm in ranking.arms if arm.divergence == SFT_ARM and arm.share == 1)
    other = ranking.best(arm for arm in ranking.arms if arm.divergence != SFT_ARM and arm.share == 1)
    if sft is None or other is None:
        return None
    difference, clause = ranking.versus_after(other, ranking.rung(other), sft, ranking.best_rung(sft))
    if not difference.is_clear:
        return f"Plain SFT may be enough, as no difference to distillation is clear: {clause}."
    return f"Plain SFT is {'not ' if difference.mean > 0 else ''}enough: {clause}."


def _on_rate(ranking: Ranking, best: Arm) -> str | None:
    """Describe at which end of those that were tried the best learning rate is; None if it is at neither."""
    rates = [arm.lr for arm in ranking.arms if arm.divergence == best.divergence]
    if len(set(rates)) == 1 or min(rates) < best.lr < max(rates):
        return None
    end, more = ("largest", "larger") if best.lr == max(rates) else ("smallest", "smaller")
    return f"The best learning rate, {best.lr:g}, is the {end} that was tried; {more} ones may be better."


def _on_steps(ranking: Ranking, best: Arm, full_steps: int) -> tuple[int, str | None]:
    """Return the steps that are worth it, and a sentence. Without a trial of half of the steps, they are the recipe's."""
    short = replace(best, share=0.5)
    if short not in ranking.arms:
        return full_steps, None
    steps = [ranking.plan.steps(arm) for arm in (short, best)]
    difference = ranking.compare(best, short, _LAST)
    what = f"twice the steps ({steps[0]:,} to {steps[1]:,}) are {_interval(difference)}"
    if difference.mean > 0:
        verdict = "worth it" if difference.is_clear else "perhaps worth it"
        more = f"; the recipe's {full_steps:,} were not tried" if steps[1] < full_steps else ""
        return full_steps, f"{full_steps:,} steps are {verdict}: {what}{more}."
    enough = steps[0]
    return enough, f"{enough:,} steps are enough: {what}."
