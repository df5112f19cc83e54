"""Score predictions with a registered metric."""

from __future__ import annotations

from collections.abc import Sequence

from distillm_cli import plugins


def corpus(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the corpus score of the metric with this name."""
    return plugins.metrics[name].corpus_score(predictions, references)
