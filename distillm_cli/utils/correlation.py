"""Compute the correlation of two lists of numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pearson(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float | None:
    """Return Pearson's r, −1 to 1; None if one of them is constant."""
    a = np.asarray(x, dtype=np.float64)
    b = np.asarray(y, dtype=np.float64)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    a = a - a.mean()
    b = b - b.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float | None:
    """Return Spearman's ρ, −1 to 1: Pearson's r of the ranks; None if one of them is constant."""
    return pearson(average_ranks(x), average_ranks(y))


def average_ranks(x: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the ranks, from 1. Equal numbers have the mean of their ranks."""
    _, inverse, counts = np.unique(np.asarray(x, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
