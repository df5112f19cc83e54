"""Test the choice of a pilot, and its sentences, on given scores."""

import pytest

from distillm_cli.config.pilot_grid import SFT_ARM, Arm, Grid
from distillm_cli.evaluation.metrics import get_metric
from distillm_cli.runs.pilot_plan import Costs, PilotPlan
from distillm_cli.runs.pilot_record import PilotRecord, Trial
from distillm_cli.runs.pilot_result import Ranking, choose_best, conclude
from distillm_cli.runs.pilot_scores import RowScores

GRID = Grid((1e-3,), ("kl", "ab"), (1.0,), ("off", "auto"))
PLAN = PilotPlan(GRID, Costs(0.1, 0.1, 0.1, 0.0, 1.0, 0.1), seconds=10.0)  # 100 steps each
KL, AB, SFT, AUTO = Arm("kl", 1e-3), Arm("ab", 1e-3), Arm(SFT_ARM, 1e-3), Arm("kl", 1e-3, schedule="auto")
METRIC = get_metric("exact_match")
ROWS = 200


def record(scores):
    """Return a record of arms with these numbers of right rows. A pair is (last rung, rows)."""
    made = PilotRecord({}, plan={"rows": ROWS})
    for arm, right in scores.items():
        last, right = right if isinstance(right, tuple) else (2, right)
        for rung in range(last + 1):
            made.add(arm, rung, Trial(100, 9.0, RowScores([1.0] * right + [0.0] * (ROWS - right), [1.0] * ROWS)))
    return made


def ranking(made):
    return Ranking(made, PLAN, METRIC)


def answers(scores, tmp_path, full_steps=100, best=KL):
    made = record(scores)
    made.decisions["best"] = [vars(best)]
    return conclude(ranking(made), tmp_path, full_steps, 10, 1.0)


@pytest.mark.parametrize(
    ("scores", "full_steps", "best"),
    [
        ({KL: 100, AUTO: 98, SFT: 20}, 100, KL),
        ({KL: 100, AUTO: 98, SFT: 20}, 1000, AUTO),  # not clearly worse, in a shorter run
        ({KL: 100, AUTO: 60, SFT: 20}, 1000, KL),  # clearly worse
        ({KL: 100, AUTO: 120, SFT: 20}, 100, AUTO),
        ({KL: 100, SFT: 120}, 1000, SFT),
    ],
)
def test_best_arm(scores, full_steps, best):
    assert choose_best(ranking(record(scores)), scores, full_steps) == best


@pytest.mark.parametrize(("right", "best"), [(100, AUTO), (130, KL)])
def test_rows_that_are_clearly_better_in_the_same_seconds_come_first(right, best):
    longer = Arm("kl", 1e-3, share=1.4)
    made = record({KL: 100, AUTO: 98, longer: right})
    made.decisions["equal seconds"] = [vars(longer)]
    assert choose_best(ranking(made), [KL, AUTO], 1000) == best


def test_sentences_name_clear_differences(tmp_path):
    half = Arm("kl", 1e-3, share=0.5)
    result = answers({KL: 100, AB: (1, 50), AUTO: 60, SFT: 20, half: 70}, tmp_path)
    objective, outputs, sft, steps = result.answers
    assert "kl is the best: exact match 50.00" in objective
    assert "(lr 0.001, 9 s, 50% of the steps) against 25.00 with ab, off (lr 0.001, 9 s, 50% of the steps)" in objective
    assert outputs.startswith("Student outputs do not pay for themselves here: exact match 30.00 with kl, auto")
    assert "worse by 20.00 (95 % interval" in outputs
    assert sft.startswith("Plain SFT is not enough: exact match 50.00 with kl, off")
    assert steps.startswith("100 steps are worth it: twice the steps (50 to 100) are better by 15.00")
    assert result.steps == 100
    assert [arm.name for arm in result.arms if arm.is_best] == ["kl, off"]


def test_sentences_say_when_nothing_is_clear(tmp_path):
    half = Arm("kl", 1e-3, share=0.5)
    result = answers({KL: 100, AB: 99, AUTO: 101, SFT: 99, half: 100}, tmp_path, full_steps=1000)
    objective, outputs, sft, steps = result.answers
    assert "but the difference to the next is not clear" in objective
    assert outputs.startswith("It is not clear that student outputs pay")
    assert "The trials had 10.0 epochs and the recipe has 100.0" in outputs
    assert sft.startswith("Plain SFT may be enough")
    assert steps.startswith("50 steps are enough")
    assert result.steps == 50


def test_best_figure_of_sft_counts(tmp_path):
    made = record({KL: 100, SFT: 20})
    made.add(SFT, 1, Trial(50, 4.0, RowScores([1.0] * 110 + [0.0] * 90, [1.0] * ROWS)))
    made.decisions["best"] = [vars(KL)]
    sentence = conclude(ranking(made), tmp_path, 100, 10, 1.0).answers[1]
    assert sentence.startswith(
        "Plain SFT is enough: exact match 50.00 with kl, off (lr 0.001, 9 s) against 55.00 with sft"
    )
    assert "4 s, 50% of the steps" in sentence


def test_equal_seconds_are_those_of_the_longer_run_on_rows(tmp_path):
    longer = Arm("kl", 1e-3, share=1.4)
    made = record({KL: 100, AUTO: 130, longer: 120})
    made.decisions |= {"best": [vars(AUTO)], "equal seconds": [vars(longer)]}
    outputs = conclude(ranking(made), tmp_path, 100, 10, 1.0).answers[1]
    assert "against 60.00 with kl, off, × 1.4" in outputs
    assert "better by 5.00" in outputs


def test_objectives_are_compared_at_the_best_temperature(tmp_path):
    warm, auto, ab = Arm("kl", 1e-3, 4.0), Arm("kl", 1e-3, 4.0, "auto"), Arm("ab", 1e-3, 4.0)
    made = record({KL: 60, warm: 100, ab: 50, auto: 120})
    objective, temperature, outputs = conclude(ranking(made), tmp_path, 100, 10, 1.0).answers
    assert "50.00 with kl, off, T 4 (" in objective
    assert "against 25.00 with ab, off, T 4 (" in objective
    assert temperature.startswith("Temperature: 4 is the best: ")
    assert "50.00 with kl, off, T 4 (" in temperature
    assert "against 30.00 with kl, off (" in temperature
    assert "60.00 with kl, auto, T 4" in outputs


def test_a_temperature_may_be_best_by_chance(tmp_path):
    made = record({KL: 100, Arm("kl", 1e-3, 2.0): (1, 40), Arm("kl", 1e-3, 4.0): (1, 98)})
    temperature = conclude(ranking(made), tmp_path, 100, 10, 1.0).answers[1]
    assert temperature.startswith("Temperature: 1 is the best, but the difference to the next is not clear: ")
    assert "with kl, off, T 4" in temperature
