"""Define what ``eval`` does beside scoring responses: figures of the references, a comparison, leakage, a judge."""

from __future__ import annotations

from dataclasses import dataclass

from distillm_cli.errors import UsageError
from distillm_cli.servers.judge_client import check_judge


@dataclass(frozen=True)
class JudgeOptions:
    """Describe a judge. model: its name on the server. url: base of an OpenAI-compatible API; None: the client's default.

    prices: money per million tokens of input and of output.
    """

    model: str
    url: str | None = None
    prices: tuple[float, float] | None = None


@dataclass(frozen=True)
class EvalOptions:
    """Hold the options of an evaluation that are no settings of a run.

    rescore: score also what has results of the same weights, rows and settings. perplexity: measure the references.
    teacher: also measure the distance to this model there. compare: compare every checkpoint with the first. leakage: count
    training rows in the suites. train_data: the training rows, by default those of the checkpoint's recipe.
    """

    rescore: bool = False
    perplexity: bool = False
    teacher: str | None = None
    compare: bool = False
    leakage: bool = False
    train_data: str | None = None
    judge: JudgeOptions | None = None

    @property
    def measures_references(self) -> bool:
        """Return whether the references are measured."""
        return self.perplexity or self.teacher is not None

    @property
    def counts_leakage(self) -> bool:
        """Return whether training rows in the suites are counted."""
        return self.leakage or self.train_data is not None

    def check(self, checkpoints: int, *, on_server: bool) -> None:
        """Raise UsageError for options that do not fit each other or the number of checkpoints."""
        if self.compare and checkpoints < 2:
            what = "--compare needs two checkpoints or more"
            raise UsageError("usage.missing_value", what, hint="try distillm eval A B --compare")
        if self.judge is not None:
            check_judge(self.judge.url)
        if on_server and self.measures_references:
            what = "--perplexity and --teacher need the model's weights"
            raise UsageError("usage.not_on_server", what, where="--server", hint="score the model without --server")


NO_OPTIONS = EvalOptions()
