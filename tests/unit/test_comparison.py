"""Test the paired bootstrap against scipy and the normal approximation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from distillm_cli.config.schema import EvalConfig
from distillm_cli.evaluation.bootstrap import ComparedSide, compare_sides, paired_bootstrap
from distillm_cli.evaluation.predictions import Predictions
from distillm_cli.plugins import metrics
from distillm_cli.runs.eval_analysis import ScoredSuite, compare_suite, comparison_sentence
from tests.codes import raises_code

ROWS = 200


def mean_of(sums_RK):
    return sums_RK[:, 0] / sums_RK[:, 1]


def sums(*values_by_pass):
    return np.stack([np.stack([values, np.ones(len(values))], axis=1) for values in values_by_pass])


@pytest.fixture
def scores():
    random = np.random.default_rng(3)
    a = random.normal(50, 10, ROWS)
    return a, a + random.normal(1.0, 2.0, ROWS)


def test_interval_matches_scipy_and_normal_theory(scores):
    a, b = scores
    low, high, p = paired_bootstrap(sums(a), sums(b), mean_of)
    found = scipy.stats.bootstrap(
        (a, b),
        lambda x, y, axis: y.mean(axis) - x.mean(axis),
        paired=True,
        method="percentile",
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert (low, high) == pytest.approx((found.low, found.high), abs=0.03)
    error = (b - a).std(ddof=1) / ROWS**0.5
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert p < 0.001


def test_pairs_show_a_difference_that_unpaired_rows_hide(scores):
    a, b = scores
    paired = paired_bootstrap(sums(a), sums(b), mean_of)
    shuffled = paired_bootstrap(sums(a), sums(np.random.default_rng(1).permutation(b)), mean_of)
    assert shuffled[1] - shuffled[0] > 3 * (paired[1] - paired[0])


def test_false_positives_are_about_five_percent():
    random = np.random.default_rng(0)
    found = [
        paired_bootstrap(sums(random.normal(size=50)), sums(random.normal(size=50)), mean_of)[2] for _ in range(40)
    ]
    assert sum(p < 0.05 for p in found) <= 6
    assert 0.3 < np.mean(found) < 0.7


def test_equal_checkpoints_are_equal(scores):
    sides = [ComparedSide(name, [scores[0].mean()], sums(scores[0])) for name in "ab"]
    found = compare_sides("words", "rouge_l", sides, mean_of, higher_is_better=True)
    assert (found.difference, found.low, found.high, found.p, found.better) == (0, 0, 0, 1, None)
    assert "are equal" in comparison_sentence(found)


def test_better_depends_on_the_direction(scores):
    a, b = scores
    sides = [ComparedSide("a", [a.mean(), a.mean()], sums(a, a)), ComparedSide("b", [b.mean()], sums(b))]
    up = compare_sides("words", "rouge_l", sides, mean_of, higher_is_better=True)
    down = compare_sides("words", "error_rate", sides, mean_of, higher_is_better=False)
    assert (up.better, down.better) == (True, False)
    assert up.difference == pytest.approx((b - a).mean())
    assert "noise" not in comparison_sentence(up)
    noisy = compare_sides(
        "w", "m", [sides[0], ComparedSide("c", [a.mean() + 0.01], sums(a[::-1] + 0.01))], mean_of, higher_is_better=True
    )
    assert noisy.is_noise
    assert "inside the noise" in comparison_sentence(noisy)


def test_ratio_of_sums_is_resampled_not_a_mean_of_ratios():
    counts = np.array([[[1, 1], [0, 99]], [[1, 1], [0, 99]]], dtype=float)
    other = counts.copy()
    other[:, 1, 0] = 99
    metric = metrics["error_rate"]
    sides = [ComparedSide("a", [1.0], counts), ComparedSide("b", [100.0], other)]
    found = compare_sides("w", "error_rate", sides, metric.figure_of_sums, higher_is_better=False)
    assert (found.low, found.high) == (0, 100)


def test_metric_without_sums_has_no_interval():
    found = compare_sides(
        "w", "distinct_2", [ComparedSide("a", [1.0]), ComparedSide("b", [2.0])], mean_of, higher_is_better=True
    )
    assert (found.difference, found.low, found.p) == (1.0, None, None)
    assert "no interval" in comparison_sentence(found)


def scored(checkpoint: str, where: list[str], texts: list[str]) -> ScoredSuite:
    config = EvalConfig(metrics=("exact_match",), greedy=True)
    rows = range(len(where))
    predictions = Predictions(config, where, ["p" for _ in rows], [("x",) for _ in rows], {"greedy": texts})
    return ScoredSuite(checkpoint, predictions, [], {})


def test_common_rows_are_compared_with_a_warning():
    events = []
    a = scored("a", ["t:1", "t:2", "t:3"], ["x", "y", "x"])
    b = scored("b", ["t:3", "t:1"], ["y", "x"])
    (found,) = compare_suite("words", a, b, events.append)
    assert (found.rows, found.mean_a, found.mean_b) == (2, 100, 50)
    assert "2 rows" in events[0].text
    with raises_code("data.no_common_rows", "words"):
        list(compare_suite("words", a, scored("b", ["u:1"], ["x"]), events.append))
