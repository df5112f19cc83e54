"""Read the responses that an evaluation has written, to compare checkpoints and to leave out rows."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distillm_cli.config import schema
from distillm_cli.evaluation.evaluate import passes
from distillm_cli.evaluation.metrics import Metric, get_metric, undefined_reason
from distillm_cli.evaluation.pass_store import predictions_file
from distillm_cli.evaluation.reasoning import without_reasoning

# Numbers of each row by pass, [passes, rows, K], whose sums over rows determine a figure of each pass.
PassSums = np.ndarray


@dataclass(frozen=True)
class Predictions:
    """Hold the responses of a checkpoint to a suite. where, prompts, references: of each row. texts: by pass, as scored."""

    config: schema.EvalConfig
    where: list[str]
    prompts: list[str]
    references: list[tuple[str, ...]]
    texts: dict[str, list[str]]

    def select(self, rows: SequenceOf[int]) -> Predictions:
        """Return the predictions of some rows, in their order."""
        return replace(
            self,
            where=[self.where[i] for i in rows],
            prompts=[self.prompts[i] for i in rows],
            references=[self.references[i] for i in rows],
            texts={name: [texts[i] for i in rows] for name, texts in self.texts.items()},
        )

    def metric(self, name: str) -> Metric | None:
        """Return a metric with the settings of the evaluation; None if it is undefined on these rows."""
        tokenizer = self.config.rouge_tokenizer
        return None if undefined_reason(name, self.references, tokenizer) else get_metric(name, tokenizer)

    def figures(self, metric: Metric) -> list[float]:
        """Return the metric of each pass."""
        return [metric.corpus_score(texts, self.references) for texts in self.texts.values()]

    def sums(self, metric: Metric) -> PassSums | None:
        """Return the sums of the metric; None if its figure is not determined by sums."""
        found = [metric.row_sums(texts, self.references) for texts in self.texts.values()]
        return None if any(sums is None for sums in found) else np.stack([s for s in found if s is not None])


def read_predictions(directory: Path, config: schema.EvalConfig) -> Predictions:
    """Read the responses of a suite from the directory of its results."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for name, _, _ in passes(config):
        text = (directory / predictions_file(name)).read_text(encoding="utf-8")
        lines[name] = [json.loads(line) for line in text.splitlines()]
    first = next(iter(lines.values()))
    return Predictions(
        config=config,
        where=[line["where"] for line in first],
        prompts=[line["prompt"] for line in first],
        references=[tuple(line["references"]) for line in first],
        texts={name: [_scored(line, config) for line in of_pass] for name, of_pass in lines.items()},
    )


def _scored(line: dict[str, Any], config: schema.EvalConfig) -> str:
    text: str = line["output"]
    return without_reasoning(text) if config.strip_reasoning else text


def mean_and_sd(figures: SequenceOf[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation of the passes, 0 for a single one."""
    return statistics.fmean(figures), statistics.stdev(figures) if len(figures) > 1 else 0.0
