"""Render what ``eval`` measures beside the scores of responses as tables and sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import RenderableType

from distillm_cli import plugins
from distillm_cli.runs.run_results import EvalResult
from distillm_cli.training.events import Note
from distillm_cli.ui.summary import table
from distillm_cli.utils.text import signed

_Row = list[object]


def analysis_tables(result: EvalResult) -> Iterator[RenderableType | Note]:
    """Yield the tables of pass@k, references, leakage and comparisons, and a sentence per difference inside the noise."""
    for title, heads, make_rows in (
        ("pass@k", ("suite", "metric", "k", "pass@k"), _pass_rows),
        ("Tasks of lm-eval", ("task", "rows", "metric", "value", "standard error"), _lm_eval_rows),
        ("On the references", _REFERENCES, _reference_rows),
        ("Ratings of the judge, 1 to 10", ("suite", "rows", "rated", "rating"), _rating_rows),
        ("Rows that occur in the training data", _LEAKAGE, _leakage_rows),
    ):
        rows = _rows(result, make_rows)
        if rows:
            lead = ["checkpoint"] if len(result.checkpoints) > 1 else []
            yield table(title, [*lead, *heads], rows)
    if result.comparisons:
        yield table("Comparison", _COMPARISON, [_comparison(found) for found in result.comparisons])
        for found in result.comparisons:
            if found["inside_noise"] is not False:
                yield f"{found['sentence']}."

    if result.judge is not None:
        pairs: list[_Row] = [[pair[key] for key in _PAIR_KEYS] for pair in result.judge["pairs"]]
        if pairs:
            yield table("Pairs that the judge compared", _PAIRS, pairs)
        yield _cost(result.judge)


def _cost(judge: Mapping[str, Any]) -> Note:
    cost = f", {judge['cost']:.4f} at the given prices" if "cost" in judge else ""
    requests = f"{judge['requests']:,} requests ({judge['cached']:,} cached, {judge['failed']:,} failed)"
    tokens = f"{judge['tokens_in']:,} tokens in, {judge['tokens_out']:,} tokens out"
    return Note(f"judge {judge['model']}: {requests}, {tokens}{cost}")


_PAIR_KEYS = ("suite", "b", "a", "wins", "losses", "ties", "order_dependent", "unjudged", "win_rate")
_PAIRS = (
    "suite",
    "checkpoint",
    "compared with",
    "wins",
    "losses",
    "ties",
    "depends on order",
    "unjudged",
    "win rate, %",
)
_REFERENCES = (
    "suite",
    "rows",
    "perplexity ↓",
    "KL(teacher ‖ student) ↓",
    "KL(student ‖ teacher) ↓",
    "same top token, %",
    "teacher's perplexity",
)
_LEAKAGE = ("suite", "training rows", "same prompt", "same row", "13-gram", "rows left", "metric", "score", "without")
_COMPARISON = (
    "suite",
    "metric",
    "checkpoint",
    "score",
    "compared with",
    "score of that",
    "difference",
    "95 % interval",
    "p",
)


def _rows(result: EvalResult, make_rows: Callable[[str, Mapping[str, Any]], Iterator[_Row]]) -> list[_Row]:
    found: list[_Row] = []
    for checkpoint in result.checkpoints:
        lead: _Row = [checkpoint.checkpoint] if len(result.checkpoints) > 1 else []
        for name, suite in checkpoint.suites.items():
            found += [[*lead, *row] for row in make_rows(name, suite)]
    return found


def _pass_rows(name: str, suite: Mapping[str, Any]) -> Iterator[_Row]:
    for metric, score in suite.items():
        for k, value in (score.get("pass_at") or {}).items() if isinstance(score, Mapping) else ():
            yield [name, _label(metric), k, f"{value:.2f}"]


def _reference_rows(name: str, suite: Mapping[str, Any]) -> Iterator[_Row]:
    found = suite.get("references")
    if found is None:
        return
    divergences = [found.get("kl_teacher_student"), found.get("kl_student_teacher")]
    agreement = None if "agreement" not in found else f"{found['agreement']:.2f}"
    yield [name, found["rows"], found["perplexity"], *divergences, agreement, found.get("teacher_perplexity")]


def _lm_eval_rows(name: str, suite: Mapping[str, Any]) -> Iterator[_Row]:
    for metric, found in suite.get("lm_eval", {}).items():
        arrow = {True: " ↑", False: " ↓", None: ""}[found["higher_is_better"]]
        error = None if found["stderr"] is None else f"{found['stderr']:.4f}"
        yield [name, suite["rows"], f"{metric}{arrow}", f"{found['value']:.4f}", error]


def _rating_rows(name: str, suite: Mapping[str, Any]) -> Iterator[_Row]:
    found = suite.get("judge")
    if found is not None:
        yield [name, found["rows"], found["rated"], None if found["mean"] is None else f"{found['mean']:.2f}"]


def _leakage_rows(name: str, suite: Mapping[str, Any]) -> Iterator[_Row]:
    found = suite.get("leakage")
    if found is None:
        return
    counts = [found[key] for key in ("train_rows", "same_prompts", "same_rows", "ngram_rows", "clean_rows")]
    for metric, score in found["without"].items() or [(None, None)]:
        if score is None:
            yield [name, *counts, None, None, None]
        else:
            yield [name, *counts, _label(metric), _mean_sd(suite[metric]), _mean_sd(score)]


def _comparison(found: Mapping[str, Any]) -> _Row:
    interval = None if found["low"] is None else f"{signed(found['low'], 2)} to {signed(found['high'], 2)}"
    return [
        found["suite"],
        _label(found["metric"]),
        found["b"],
        _mean_sd({"mean": found["mean_b"], "sd": found["sd_b"]}),
        found["a"],
        _mean_sd({"mean": found["mean_a"], "sd": found["sd_a"]}),
        signed(found["difference"], 2),
        interval,
        None if found["p"] is None else f"{found['p']:.4f}",
    ]


def _mean_sd(score: Mapping[str, Any]) -> str | None:
    if score["mean"] is None:
        return None
    return f"{score['mean']:.2f} ± {score['sd']:.2f}" if score["sd"] else f"{score['mean']:.2f}"


def _label(name: str) -> str:
    return plugins.metrics[name].label if name in plugins.metrics else name.replace("_", " ")
