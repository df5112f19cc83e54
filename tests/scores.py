"""Figures of a set of predictions, by the metric's name."""

from __future__ import annotations

from collections.abc import Sequence

from distillm_cli import plugins


def corpus(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return a metric's figure of a set of predictions."""
    return plugins.metrics[name].corpus_score(predictions, references)
