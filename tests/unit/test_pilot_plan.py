"""Test the plan of a pilot: what fits into a budget, and what is left out."""

from dataclasses import replace

import pytest

from distillm_cli.config.pilot_grid import SFT_ARM, Arm, Grid
from distillm_cli.runs.pilot_plan import MIN_STEPS, RUNGS, Costs, PilotPlan, kept, make_plan, rounds_of
from tests.codes import raises_code

GRID = Grid((1e-3, 2e-3, 5e-4), ("kl", "skl", "ab"), (1.0, 2.0, 4.0), ("off", "auto", "on"), searches_rates=True)
COSTS = Costs(rows=0.05, sft=0.04, fresh=0.2, teacher=0.03, score=1.0, switch=0.2)
ONE = Grid((1e-3,), ("kl",), (1.0,), ("off",))


def plan(available, grid=GRID, costs=COSTS, full_steps=1240, teacher_steps=31):
    return make_plan(grid, costs, available, full_steps, teacher_steps)


@pytest.mark.parametrize("available", [40, 60, 100, 300, 600, 3000])
def test_every_plan_fits_into_its_budget(available):
    found = plan(available)
    teacher = min(31, found.seconds / COSTS.rows) * COSTS.teacher
    assert found.total_seconds + teacher <= available * (1 + 1e-9)
    assert found.steps(Arm("kl", 1.0)) >= MIN_STEPS


def test_total_is_the_sum_of_all_trials():
    """Count the trials of a plan one by one, as the rounds run them."""
    found = plan(600, grid=replace(GRID, searches_rates=False))
    total = 0.0
    for arms in rounds_of(found.grid):
        reached = 0.0
        for rung in range(len(RUNGS)):
            total += sum(found.trial_seconds(arm, rung, reached) for arm in arms)
            families = {}
            for arm in arms:
                families.setdefault(arm.family, []).append(arm)
            arms = [arm for members in families.values() for arm in members[: kept(len(members))]]
            reached = RUNGS[rung]
    for share in (0.5, 1.0):  # half of the steps; equal seconds
        total += found.trial_seconds(Arm("kl", 1.0, share=share), 2, 0.0)
    assert found.total_seconds == pytest.approx(total)


def test_arms_have_the_same_seconds():
    found = plan(600)
    for arm in (Arm("kl", 1.0), Arm(SFT_ARM, 1.0), Arm("kl", 1.0, 2.0, "on"), Arm("kl", 1.0, 1.0, "auto")):
        assert found.steps(arm) * COSTS.step(arm) == pytest.approx(found.seconds, rel=0.02)
    assert found.steps(Arm("kl", 1.0)) > 2 * found.steps(Arm("kl", 1.0, schedule="on"))
    assert found.steps(Arm("kl", 1.0, share=0.5)) == pytest.approx(found.steps(Arm("kl", 1.0)) / 2, abs=1)


def test_runs_are_never_longer_than_that_of_the_recipe():
    found = plan(1e6)
    assert found.grid == GRID
    assert found.left_out == ()
    assert found.steps(Arm("kl", 1.0)) == 1240


def test_smaller_budgets_have_smaller_grids():
    sizes = []
    for available in (40, 100, 300, 1000):
        found = plan(available)
        sizes.append(sum(map(len, rounds_of(found.grid))))
        left_out = len(found.left_out)
        values = [
            len(getattr(GRID, name)) - len(getattr(found.grid, name))
            for name in ("lr", "divergence", "temperature", "schedule")
        ]
        assert left_out == sum(values)
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    assert plan(150).left_out[:2] == ("temperature 4", "divergence ab")


def test_a_budget_for_less_than_the_smallest_pilot_is_refused():
    with raises_code("usage.budget_too_small", "80 steps", "--minutes"):
        plan(5)
    least = PilotPlan(ONE, COSTS, MIN_STEPS * COSTS.rows)
    teacher = 31 * COSTS.teacher
    assert plan(least.total_seconds + teacher + 0.01, grid=ONE).steps(Arm("kl", 1.0)) == MIN_STEPS
    with raises_code("usage.budget_too_small"):
        plan(least.total_seconds + teacher - 0.01, grid=ONE)


def test_a_short_run_needs_no_minimum():
    assert plan(60, full_steps=10).steps(Arm("kl", 1.0)) == 10
