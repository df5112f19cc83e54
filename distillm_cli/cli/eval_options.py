"""Define the options of ``distillm eval`` that set no field of a recipe, and list the suites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from distillm_cli.cli import options
from distillm_cli.config.shortcuts import MODELS_PANEL
from distillm_cli.errors import UsageError

if TYPE_CHECKING:
    from distillm_cli.runs.eval_options import EvalOptions

ANALYSIS_PANEL = "Analysis"

ListSuites = Annotated[
    bool,
    options.switch("--list", "List the suites with source, license, metrics and generation settings.", MODELS_PANEL),
]


@dataclass(frozen=True)
class AnalysisFlags:
    """Hold the options for figures beside the scores of the responses."""

    compare: Annotated[
        bool,
        options.switch(
            "--compare",
            "Compare each checkpoint with the first: difference, interval and p by a paired bootstrap over rows.",
            ANALYSIS_PANEL,
        ),
    ] = False
    perplexity: Annotated[
        bool,
        options.switch("--perplexity", "Measure the perplexity of the references.", ANALYSIS_PANEL),
    ] = False
    teacher: Annotated[
        str | None,
        options.named(
            "--teacher",
            "PATH|NAME",
            "Measure KL in both directions and top-token agreement with this model, on the references.",
            ANALYSIS_PANEL,
        ),
    ] = None
    leakage: Annotated[
        bool,
        options.switch(
            "--leakage",
            "Count training rows and 13-grams that occur in a suite, and score it without them.",
            ANALYSIS_PANEL,
        ),
    ] = False
    train_data: Annotated[
        str | None,
        options.named(
            "--train-data",
            "PATH|NAME",
            r"Training rows for --leakage. [dim]\[default: those of the checkpoint's recipe][/]",
            ANALYSIS_PANEL,
        ),
    ] = None
    judge: Annotated[
        str | None,
        options.named(
            "--judge",
            "MODEL",
            "Let a model on a server rate the responses, and with --compare choose the better of two.",
            ANALYSIS_PANEL,
        ),
    ] = None
    judge_url: Annotated[
        str | None,
        options.named(
            "--judge-url",
            "URL",
            r"OpenAI-compatible API of the judge. [dim]\[default: $OPENAI_BASE_URL, else OpenAI's][/]",
            ANALYSIS_PANEL,
        ),
    ] = None
    judge_prices: Annotated[
        str | None,
        options.named(
            "--judge-prices",
            "IN,OUT",
            "Prices of a million tokens of input and output, to show the cost.",
            ANALYSIS_PANEL,
        ),
    ] = None
    rescore: Annotated[
        bool,
        options.switch(
            "--rescore",
            "Score again, even if results of the same weights, rows and settings exist.",
            options.OUTPUT_PANEL,
        ),
    ] = False

    def to_options(self) -> EvalOptions:
        """Return the options as ``evaluate`` takes them. Raises UsageError."""
        from distillm_cli.runs.eval_options import EvalOptions, JudgeOptions

        judge = None if self.judge is None else JudgeOptions(self.judge, self.judge_url, _prices(self.judge_prices))
        for flag, value in (("--judge-url", self.judge_url), ("--judge-prices", self.judge_prices)):
            if value is not None and judge is None:
                raise UsageError(
                    "usage.unused_option", f"{flag} has no effect without --judge", hint="add --judge MODEL"
                )
        return EvalOptions(
            rescore=self.rescore,
            perplexity=self.perplexity,
            teacher=self.teacher,
            compare=self.compare,
            leakage=self.leakage,
            train_data=self.train_data,
            judge=judge,
        )


def _prices(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        price_in, price_out = (float(part) for part in text.split(","))
    except ValueError:
        price_in = price_out = -1.0
    if not (0 <= price_in < float("inf") and 0 <= price_out < float("inf")):
        where = "expected two numbers ≥ 0"
        raise UsageError(
            "usage.invalid_value", f"--judge-prices = {text}", where=where, hint="try --judge-prices 0.5,1.5"
        )
    return price_in, price_out


def print_suites(*, as_json: bool) -> None:
    """Print the shipped suites and the known data sets."""
    from distillm_cli import plugins
    from distillm_cli.config.suite_file import read_suite_file, shipped_suites
    from distillm_cli.ui.console import console
    from distillm_cli.ui.summary import table

    found: dict[str, dict[str, Any]] = {}
    for name, path in shipped_suites().items():
        suite = read_suite_file(path)
        found[name] = {"file": str(path), **suite.model_dump(mode="json", exclude={"name"}, exclude_none=True)}
    for name, dataset in plugins.datasets.items():
        found[name] = {"source": getattr(dataset, "repo", "generated")}
    rows = [
        [
            name,
            suite["source"],
            suite.get("license"),
            ", ".join(suite.get("metrics", ())) or None,
            _generation(suite),
        ]
        for name, suite in found.items()
    ]
    with console(json_mode=as_json) as ui:
        ui.answer(table("Suites", ["suite", "source", "license", "metrics", "generation"], rows))
        ui.result({"command": "eval", "status": "ok", "suites": found})


def _generation(suite: dict[str, Any]) -> str | None:
    """Return the generation settings of a suite for the table."""
    parts = [f"{name} {value}" for name, value in suite.get("generation", {}).items() if value is not True]
    parts += [name for name, value in suite.get("generation", {}).items() if value is True]
    if "seeds" in suite:
        parts.append(f"{len(suite['seeds'])} seeds")
    return ", ".join(sorted(parts)) or None
