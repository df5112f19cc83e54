"""Test the comparison of two models on the same held-out rows."""

import numpy as np
import pytest

from distillm_cli.runs.pilot_scores import RowScores, paired_difference

RNG = np.random.default_rng(3)


def scores(values):
    return RowScores([float(v) for v in values], [1.0] * len(values))


def test_difference_is_positive_for_the_better_model():
    first, second = scores([1, 1, 0, 1]), scores([0, 1, 0, 0])
    assert paired_difference(first, second, lower_is_better=False).mean == 50
    assert paired_difference(first, second, lower_is_better=True).mean == -50
    errors = RowScores([2, 0], [10, 5])
    assert errors.figure == pytest.approx(100 * 2 / 15)


def test_interval_is_that_of_paired_differences():
    """Compare with the normal interval of the mean of differences, and with that of unpaired rows, which is wider."""
    hard = RNG.random(800)
    first = scores(RNG.random(800) < 0.3 + 0.5 * hard)
    second = RowScores([max(0.0, n - (RNG.random() < 0.1)) for n in first.numerators], first.denominators)
    found = paired_difference(first, second, lower_is_better=False)
    gaps = 100 * (np.array(first.numerators) - np.array(second.numerators))
    half = 1.96 * gaps.std(ddof=1) / np.sqrt(len(gaps))
    assert found.mean == pytest.approx(gaps.mean())
    assert (found.low, found.high) == pytest.approx((gaps.mean() - half, gaps.mean() + half), abs=0.3)
    assert found.is_clear


def test_equal_models_have_no_clear_difference():
    one = scores(RNG.random(50) < 0.5)
    found = paired_difference(one, one, lower_is_better=False)
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    assert not found.is_clear
