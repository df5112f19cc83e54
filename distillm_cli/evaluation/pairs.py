"""Score sentence embeddings on a suite of pairs: correlation of their cosines with the given scores.

Spearman's ρ is the usual figure of STS-B. Both correlations are multiplied by 100, as in papers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distillm_cli.data.sentences import scored_pairs
from distillm_cli.evaluation.pass_store import predictions_file
from distillm_cli.evaluation.results import load_summary, write_results
from distillm_cli.evaluation.suites import Suite
from distillm_cli.training.distributed import in_first_process
from distillm_cli.utils.correlation import pearson, spearman

PAIR_METRICS = ("spearman", "pearson")
_PASS = "cosine"  # the name of the only pass, which has no randomness

# Return the embeddings [B, D] of sentences.
Embed = Callable[[SequenceOf[str]], np.ndarray]


@dataclass(frozen=True)
class PairResult:
    """Hold the cosines of a suite's pairs, and the correlations with their scores, ×100."""

    suite: Suite
    cosines: list[float]
    scores: dict[str, float | None]

    def as_json(self) -> dict[str, Any]:
        """Return the suite's object in ``distillm eval --json`` and in ``results.json``."""
        found: dict[str, Any] = {"rows": len(self.suite.rows)}
        for name, value in self.scores.items():
            found[name] = {"mean": value, "sd": None if value is None else 0.0, "seeds": {_PASS: value}}
        return found


def evaluate_pairs(embed: Embed, suite: Suite) -> PairResult:
    """Score embeddings on a suite of pairs. Each distinct sentence is embedded once."""
    rows = scored_pairs(suite.rows)
    texts = list(dict.fromkeys(text for row in rows for text in row.sentences))
    index = {text: i for i, text in enumerate(texts)}
    embeddings = embed(texts)
    first, second = (np.array([index[row.sentences[side]] for row in rows]) for side in (0, 1))
    cosines = cosine(embeddings[first], embeddings[second])
    golds = [row.score for row in rows if row.score is not None]
    return PairResult(suite, cosines.tolist(), correlations(cosines, golds))


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of one matrix with the same row of the other."""
    a = np.asarray(first, dtype=np.float64)
    b = np.asarray(second, dtype=np.float64)
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def correlations(cosines: np.ndarray, scores: SequenceOf[float]) -> dict[str, float | None]:
    """Return the correlations of cosines and scores by name, ×100; None for an undefined one."""
    found = {"spearman": spearman(cosines, scores), "pearson": pearson(cosines, scores)}
    return {name: None if value is None else 100 * value for name, value in found.items()}


@in_first_process
def save_pairs(result: PairResult, root: Path, about: Mapping[str, Any], limit: int | None) -> None:
    """Write cosines and results under ``root``, as ``save_results`` does for responses. Raises StorageError."""
    rows = scored_pairs(result.suite.rows)
    lines = [
        {"where": row.where, "sentences": list(row.sentences), "score": row.score, "cosine": value}
        for row, value in zip(rows, result.cosines, strict=True)
    ]
    summary = _head(result.suite, about, limit) | result.as_json()
    write_results(_directory(result.suite, root, limit), summary, {predictions_file(_PASS): lines})


@in_first_process
def load_pairs(suite: Suite, root: Path, about: Mapping[str, Any], limit: int | None) -> dict[str, Any] | None:
    """Return the object of ``--json`` that was saved for the same suite and ``about``, None if none was."""
    return load_summary(_directory(suite, root, limit), _head(suite, about, limit), (predictions_file(_PASS),))


def _directory(suite: Suite, root: Path, limit: int | None) -> Path:
    return root / suite.name / (_PASS if limit is None else f"{_PASS}-limit{limit}")


def _head(suite: Suite, about: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    return {"suite": suite.name, "source": suite.source, **about, "settings": {"limit": limit}}
