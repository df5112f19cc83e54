"""Compare two checkpoints on the same rows by a paired bootstrap (Efron and Tibshirani 1993; Koehn 2004 for translation).

Rows are drawn with replacement, the same for both checkpoints. The figure of a checkpoint is the mean over its passes, so
that each row has the randomness of its responses.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from distillm_cli.evaluation.predictions import PassSums, mean_and_sd

RESAMPLES = 9999
LEVEL = 0.95
_SEED = 10
_COUNTS = 10**7  # counts of rows in memory at once
FigureOfSums = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class ComparedSide:
    """Hold what a comparison needs of one checkpoint. figures: of each pass. sums: of rows, None if they do not exist."""

    name: str
    figures: SequenceOf[float]
    sums: PassSums | None = None


@dataclass(frozen=True)
class Difference:
    """Hold the comparison of checkpoint ``b`` with checkpoint ``a`` by one metric on one suite.

    mean, sd: over the passes of each. difference: b − a. low, high: the 95 % interval of the difference, and p: two-sided;
    None if the metric has no figures of rows. better: b is better by more than the noise (True), worse (False), or neither
    (None).
    """

    suite: str
    metric: str
    a: str
    b: str
    rows: int
    mean_a: float
    sd_a: float
    mean_b: float
    sd_b: float
    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    better: bool | None = None

    @property
    def is_noise(self) -> bool | None:
        """Return whether the interval includes 0; None without an interval."""
        return None if self.low is None or self.high is None else self.low <= 0 <= self.high

    def as_json(self) -> dict[str, Any]:
        """Return the comparison's object in ``--json``."""
        return {**asdict(self), "inside_noise": self.is_noise}


def compare_sides(
    suite: str, metric: str, sides: SequenceOf[ComparedSide], of_sums: FigureOfSums, *, higher_is_better: bool | None
) -> Difference:
    """Compare the second of two checkpoints with the first, by one metric.

    of_sums: returns the figures of sets of rows from their sums, [sets, K].
    """
    a, b = sides
    rows = 0 if a.sums is None else a.sums.shape[1]
    mean_a, sd_a = mean_and_sd(a.figures)
    mean_b, sd_b = mean_and_sd(b.figures)
    found = Difference(suite, metric, a.name, b.name, rows, mean_a, sd_a, mean_b, sd_b, mean_b - mean_a)
    if a.sums is None or b.sums is None or rows < 2:
        return found
    low, high, p = paired_bootstrap(a.sums, b.sums, of_sums)
    better = None
    if higher_is_better is not None and not low <= 0 <= high:
        better = (found.difference > 0) == higher_is_better
    return Difference(**{**asdict(found), "low": low, "high": high, "p": p, "better": better})


def paired_bootstrap(a: PassSums, b: PassSums, of_sums: FigureOfSums) -> tuple[float, float, float]:
    """Return the percentile interval of the difference b − a, and its two-sided p.

    p is twice the smaller share of resamples with a difference of at most, or at least, 0, with one added to both counts.
    """
    random = np.random.default_rng(_SEED)
    most = max(1, _COUNTS // a.shape[1])
    parts = []
    for done in range(0, RESAMPLES, most):
        counts_RN = _resampled_counts(random, min(most, RESAMPLES - done), a.shape[1])
        parts.append(_mean_figures(b, counts_RN, of_sums) - _mean_figures(a, counts_RN, of_sums))
    differences_R = np.concatenate(parts)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(differences_R, [tail, 1 - tail])
    smaller = min(int((differences_R <= 0).sum()), int((differences_R >= 0).sum()))
    return float(low), float(high), min(1.0, 2 * (smaller + 1) / (RESAMPLES + 1))


def _resampled_counts(random: np.random.Generator, sets: int, rows: int) -> np.ndarray:
    """Return how often each row is in each of ``sets`` sets of ``rows`` rows, drawn with replacement, [sets, rows]."""
    drawn_RN = random.integers(0, rows, (sets, rows))
    flat = (drawn_RN + rows * np.arange(sets)[:, None]).ravel()
    return np.bincount(flat, minlength=sets * rows).reshape(sets, rows).astype(np.float64)


def _mean_figures(sums: PassSums, counts_RN: np.ndarray, of_sums: FigureOfSums) -> np.ndarray:
    """Return the mean figure over the passes of each set of rows, [sets]."""
    return np.mean([of_sums(counts_RN @ sums_NK) for sums_NK in sums], axis=0)
