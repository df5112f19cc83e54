"""Test the grid of a pilot: its arms and their recipes."""

from dataclasses import replace

import pytest

from distillm_cli.config.load import resolve
from distillm_cli.config.pilot_grid import SFT_ARM, Arm, arm_recipe, check_has_grid, parse_grid, trial_recipe
from tests.codes import raises_code

PAIR = {"teacher.path": "teacher", "student.path": "student", "train.lr": 1e-3}


def base(**fields):
    return resolve(command="distill", flags=PAIR | {name.replace("__", "."): value for name, value in fields.items()})


def test_defaults_begin_with_the_values_of_the_recipe():
    recipe = base(objective__divergence="srkl", schedule__kind="mixed", objective__temperature=4.0).recipe
    grid = parse_grid((), recipe)
    assert grid.lr == (1e-3, 2e-3, 5e-4)
    assert grid.divergence == ("srkl", "kl", "skl")
    assert grid.temperature == (4.0, 1.0, 2.0)
    assert grid.schedule == ("off", "auto", "mixed", "on")
    assert grid.searches_rates


def test_given_values_replace_the_defaults_of_their_setting():
    grid = parse_grid(("lr=1e-4,3e-4", "schedule=on"), base().recipe)
    assert grid.lr == (1e-4, 3e-4)
    assert not grid.searches_rates
    assert grid.schedule == ("off", "on")  # the first round trains on rows
    assert grid.divergence == ("skl", "kl", "ab")


def test_rounds_have_each_combination_once():
    grid = parse_grid(("lr=1,2", "divergence=kl,ab", "temperature=1,2", "schedule=off,on"), base().recipe)
    first = grid.first_round({1: (1, 2), 2: (3, 4)})
    assert len(set(first)) == len({arm.name for arm in first}) == 6
    assert [arm.family for arm in first] == [SFT_ARM] * 2 + ["rows at 1"] * 2 + ["rows at 2"] * 2
    assert [(arm.divergence, arm.lr) for arm in first[1:4]] == [(SFT_ARM, 2), ("kl", 1), ("kl", 2)]
    best = Arm("kl", 2.0, 2.0)
    assert grid.variations(best) == [replace(best, divergence="ab"), replace(best, schedule="on")]
    assert [arm.family for arm in grid.variations(best)] == ["rows at 2", "outputs"]


@pytest.mark.parametrize(
    ("texts", "code", "mention"),
    [
        (["rate=1"], "usage.unknown_axis", "lr, divergence"),
        (["lr"], "usage.invalid_value", "lr"),
        (["lr=fast"], "usage.invalid_value", "fast"),
        (["lr=0"], "usage.invalid_value", "above 0"),
        (["temperature=inf"], "usage.invalid_value", "inf"),
        (["divergence=kll"], "usage.invalid_value", "kll"),
        (["schedule=pairs"], "usage.invalid_value", "adaptive"),
        (["lr=1", "lr=2"], "usage.given_twice", "lr"),
    ],
)
def test_values_that_are_none_are_refused(texts, code, mention):
    with raises_code(code, mention):
        parse_grid(texts, base().recipe)


def test_a_student_without_a_known_rate_needs_one():
    unknown = base(train__lr="auto").recipe
    with raises_code("usage.no_rate", "--grid lr"):
        parse_grid((), unknown)
    assert parse_grid(("lr=1e-4",), unknown).lr == (1e-4,)


def test_arms_change_their_own_settings_only():
    resolved = base(train__batch_size=3, objective__alpha=0.3, schedule__kind="adaptive", rollout__bulk=2)
    same = arm_recipe(resolved, Arm("skl", 1e-3, schedule="adaptive"))
    assert same.recipe == resolved.recipe
    arm = arm_recipe(resolved, Arm("ab", 2e-3, 2.0, "on"))
    assert (arm.recipe.objective.divergence, arm.recipe.objective.temperature) == ("ab", 2.0)
    assert (arm.recipe.schedule.kind, arm.recipe.train.lr, arm.recipe.train.batch_size) == ("on", 2e-3, 3)
    assert arm.origin["train.lr"] == "distillm pilot"
    sft = arm_recipe(resolved, Arm(SFT_ARM, 1e-3)).recipe
    assert (sft.objective.kd_weight, sft.schedule.kind) == (0.0, "off")


def test_a_trial_validates_as_often_as_the_run():
    recipe = base(train__eval_steps=50, train__select="valid_loss", train__patience=3, schedule__kind="auto").recipe
    trial = trial_recipe(recipe, 100, 1000)
    assert (trial.train.steps, trial.train.eval_steps, trial.train.select) == (100, 5, "last")
    assert trial_recipe(arm_recipe(base(), Arm("kl", 1.0)).recipe, 100, 1000).train.eval_steps == 100


@pytest.mark.parametrize(
    ("fields", "mention"),
    [
        ({"method": "minillm"}, "rounds"),
        ({"method": "distillm2"}, "pairs"),
        ({"method": "seqkd"}, "teacher"),
        ({"method": "skd"}, "interleaved"),
        ({"method": "okd"}, "okd.rank"),
        ({"method": "kdiga"}, "objective.input_gradient"),
        ({"method": "peakd"}, "student.ptp"),
        ({"method": "mixkd"}, "mixup"),
    ],
)
def test_methods_without_a_grid_are_refused(fields, mention):
    with raises_code("usage.no_pilot", mention):
        check_has_grid(base(**fields).recipe)


@pytest.mark.parametrize("method", ["distillm", "kd", "gkd", "ab", "taid", "amid"])
def test_methods_of_one_divergence_have_a_grid(method):
    check_has_grid(base(method=method).recipe)
