"""Define the result of each verb: the object of ``--json``, and the data of the printed tables.

Results are plain data, which ``ui`` renders. ``as_json`` returns the object for scripts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from distillm_cli.training.events import Event
from distillm_cli.utils.text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


SERVER = "server"  # in place of a dtype: a server generated the responses


class Result(Protocol):
    """Describe the result of a verb."""

    def as_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """Hold a model's figures on held-out rows.

    valid_loss: nats per token; None if it was not measured. is_trained: it is the result of the run.
    """

    name: str
    valid_loss: float | None = None
    scores: Mapping[str, float | None] = field(default_factory=dict)
    is_trained: bool = False


@dataclass(frozen=True, slots=True)
class Baseline:
    """Hold a baseline of ``--compare``: a training of the same student without student outputs.

    output: its directory. train_s: seconds of its steps. figures: ``valid_loss`` and scores on the held-out rows.
    """

    name: str
    output: str
    steps: int
    train_s: float
    figures: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Sample:
    """Hold a prompt, its references (the first is shown), and the response of each model by the model's name."""

    prompt: str
    references: Sequence[str]
    answers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainSummary:
    """Hold the data of the summary at the end of training, except its figures.

    outcomes: the models on held-out rows, the initial student first. measured_on: description of the rows and of the
    decoding. sources, source_seconds: steps by source, and their seconds. phi_history: φ at the start and after each
    rise; None without φ. schedule: its kind, None for SFT. row_weight: weight of the data set rows in steps on student
    outputs, 0 without them. suites, prompt: for the suggested next commands. has_sft_stage: the fine-tuned student is in
    ``sft/``. has_teacher: the trained teacher is in ``teacher/``. has_answers: there are rows to score on. gap: how much
    of the distance to the teacher is closed, with baselines. generates: whether the model can respond to a prompt. stage:
    the directory of a stage before the run, and what it has.
    """

    outcomes: tuple[Outcome, ...]
    measured_on: str
    samples: tuple[Sample, ...] = ()
    sources: Mapping[str, int] = field(default_factory=dict)
    source_seconds: Mapping[str, float] = field(default_factory=dict)
    phi_history: tuple[float, ...] | None = None
    schedule: str | None = None
    row_weight: float = 0.0
    suites: tuple[str, ...] = ()
    prompt: str | None = None
    has_sft_stage: bool = False
    has_teacher: bool = False
    has_answers: bool = True
    gap: str | None = None
    generates: bool = True
    stage: tuple[str, str] | None = None


@dataclass(frozen=True)
class TrainResult:
    """Hold the result of ``sft`` and ``distill``. seconds: ``wall_s`` of the command, ``train_s`` of the steps alone.

    report: ``valid_loss`` and scores by model ("student_after", "teacher", …). teacher_cache, teacher_tokens: None
    without a teacher. baselines: of ``--compare``. findings: of the checks before the first step, empty after a resume.
    flops: estimate for the steps. energy_j: of the processors in J, with the stages before; None without counters.
    alarms: ``alarm``, ``step``, ``message`` and ``cure`` of each. pushed: address that ``--push`` uploaded the directory to.
    mixture: the sources of a mixture with their shares of an epoch (``source_shares.source_figures``).
    """

    command: str
    output: Path
    wall_s: float
    steps: int
    tokens: int
    tokens_per_s: float
    train_loss: float | None
    valid_loss: float | None
    phi: float
    rollout_steps: int
    replay_steps: int
    dataset_steps: int
    teacher_steps: int
    sampled_sequences: int
    sampled_tokens: int
    teacher_sampled_sequences: int
    teacher_sampled_tokens: int
    train_s: float
    stopped: str
    best_step: int | None
    report: Mapping[str, Mapping[str, float | None]]
    summary: TrainSummary
    teacher_cache: Mapping[str, Any] | None = None
    teacher_tokens: int | None = None
    baselines: tuple[Baseline, ...] = ()
    findings: tuple[Mapping[str, str], ...] = ()
    flops: float | None = None
    energy_j: float | None = None
    machine: Mapping[str, str] = field(default_factory=dict)
    alarms: tuple[Mapping[str, Any], ...] = ()
    pushed: str | None = None
    mixture: tuple[Mapping[str, Any], ...] = ()

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Return held-out prompts with the response of every model."""
        return self.summary.samples

    def model(self, device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the trained model in its saved precision, and its tokenizer. An adapter is merged. Raises ModelError."""
        import torch

        from distillm_cli.models.loading import load_backbone, load_config, read_config

        path = str(self.output)
        dtype = (load_config(path) if self.summary.generates else read_config(path)).dtype
        if not isinstance(dtype, torch.dtype):
            dtype = torch.float32
        if not self.summary.generates:
            from distillm_cli.models.sentence import load_encoder

            encoder = load_encoder(path, dtype=dtype, device=torch.device(device))
            return encoder.model, encoder.tokenizer
        backbone = load_backbone(path, dtype=dtype, device=torch.device(device))
        return backbone.model, backbone.tokenizer

    def as_json(self) -> dict[str, Any]:
        """Return the object of ``--json``."""
        found: dict[str, Any] = {"command": self.command, "status": "ok", "output": str(self.output)}
        left_out = {"summary", "baselines"}
        left_out |= {"teacher_cache", "teacher_tokens"} if self.teacher_cache is None else set()
        left_out |= {"pushed"} if self.pushed is None else set()
        left_out |= set() if self.mixture else {"mixture"}
        for item in fields(self):
            if item.name not in found and item.name not in left_out:
                found[item.name] = getattr(self, item.name)
        found["measured_on"] = self.summary.measured_on
        if self.baselines:
            found["baselines"] = [asdict(baseline) for baseline in self.baselines]
        return found


@dataclass(frozen=True)
class TeacherCacheResult:
    """Hold the result of ``distill --warm-teacher-cache``."""

    output: Path
    wall_s: float
    teacher_cache: Mapping[str, Any]
    teacher_tokens: int

    def as_json(self) -> dict[str, Any]:
        """Return the object of ``--json``."""
        return {
            "command": "distill",
            "status": "ok",
            "output": str(self.output),
            "wall_s": self.wall_s,
            "teacher_cache": self.teacher_cache,
            "teacher_tokens": self.teacher_tokens,
        }


@dataclass(frozen=True)
class CheckpointScores:
    """Hold the scores of one checkpoint. suites: by name, the suite's object. dtype: of decoding, or SERVER."""

    checkpoint: str
    output: Path
    suites: Mapping[str, Mapping[str, Any]]
    metrics: tuple[str, ...]
    dtype: str


@dataclass(frozen=True)
class EvalResult:
    """Hold the result of ``eval``: the scores of each checkpoint, in the order given.

    comparisons: of each checkpoint with the first, by suite and metric. judge: requests, cost and pairs of a judge.
    """

    checkpoints: tuple[CheckpointScores, ...]
    output: str
    wall_s: float
    comparisons: tuple[Mapping[str, Any], ...] = ()
    judge: Mapping[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the object of ``--json``."""
        found = {
            "command": "eval",
            "status": "ok",
            "output": self.output,
            "wall_s": self.wall_s,
            "suites": self.checkpoints[0].suites,
        }
        if len(self.checkpoints) > 1:
            found["checkpoints"] = {
                scores.checkpoint: {"output": str(scores.output), "suites": scores.suites}
                for scores in self.checkpoints
            }
        if self.comparisons:
            found["comparisons"] = list(self.comparisons)
        if self.judge is not None:
            found["judge"] = self.judge
        return found


@dataclass(frozen=True)
class GenerateResult:
    """Hold the result of ``generate``. rows: number of requested responses. tokens, cut: of those generated by this
    call. output: the file; None: the rows are in ``responses``.
    """

    output: str | None
    wall_s: float
    rows: int
    tokens: int
    tokens_per_s: float
    cut: int
    responses: tuple[Mapping[str, Any], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the object of ``--json``."""
        found = {"command": "generate", "status": "ok"}
        return found | {item.name: getattr(self, item.name) for item in fields(self) if item.name != "responses"}


@dataclass(frozen=True, slots=True)
class GroupScore:
    """Hold a metric of runs that differ in their seed. sd: sample standard deviation over them; None for one run."""

    mean: float
    sd: float | None
    runs: int

    @property
    def text(self) -> str:
        """Return the mean ± the standard deviation, with three decimals below 10 and two above."""
        digits = 2 if abs(self.mean) >= 10 else 3
        return f"{self.mean:.{digits}f}" + ("" if self.sd is None else f" ± {self.sd:.{digits}f}")


def plain_value(value: object) -> str:
    """Return a setting as it is written in a command: lists with commas, booleans in lower case."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(plain_value, value))
    return f"{value:g}" if isinstance(value, float) else printable(str(value))


@dataclass(frozen=True, slots=True)
class RunGroup:
    """Hold runs that differ in their seed alone. settings: those that differ from other groups. seconds, tokens_per_s,
    rollouts (share of steps on student outputs): means over the runs. unfinished: how many runs are.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    seeds: tuple[object, ...]
    settings: Mapping[str, object]
    scores: Mapping[str, GroupScore]
    seconds: float | None
    tokens_per_s: float | None
    rollouts: float | None
    unfinished: int = 0

    @property
    def title(self) -> str:
        """Return the name of the first run, and the number of others."""
        return self.names[0] + (f" + {len(self.names) - 1}" if len(self.names) > 1 else "")

    def setting_text(self, key: str) -> str:
        """Return a setting as it is written in a command."""
        return plain_value(self.settings[key])


@dataclass(frozen=True)
class ReportResult:
    """Hold the result of ``report``. settings: names of those that differ. titles, best: headings and indices of the best
    groups, by metric. outcomes: the models of the run, if there is only one.

    skipped: path and reason of what is not a run. notes: path and note of runs that are incomplete. written: files.
    """

    settings: tuple[str, ...]
    metrics: tuple[str, ...]
    groups: tuple[RunGroup, ...]
    titles: Mapping[str, str]
    best: Mapping[str, frozenset[int]]
    lower_is_better: frozenset[str]
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[tuple[str, str], ...]
    written: tuple[str, ...]
    wall_s: float
    outcomes: tuple[Outcome, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the object of ``--json``."""
        groups = [
            {
                "runs": list(group.paths),
                "seeds": list(group.seeds),
                "settings": dict(group.settings),
                "scores": {name: asdict(score) for name, score in group.scores.items()},
                "best": [name for name in self.metrics if i in self.best[name]],
                "seconds": group.seconds,
                "tokens_per_s": group.tokens_per_s,
                "rollouts": group.rollouts,
                "unfinished": group.unfinished,
            }
            for i, group in enumerate(self.groups)
        ]
        return {
            "command": "report",
            "status": "ok",
            "settings": list(self.settings),
            "metrics": list(self.metrics),
            "groups": groups,
            "skipped": [{"path": path, "reason": why} for path, why in self.skipped],
            "notes": [{"path": path, "note": note} for path, note in self.notes],
            "written": list(self.written),
            "wall_s": self.wall_s,
        }


@dataclass(frozen=True)
class DecodedSequence:
    """Hold a sequence of a batch as text, in pieces: (text, whether it is one supervised token).

    seen: the pieces as the teacher sees them; empty if they are the same.
    """

    pieces: tuple[tuple[str, bool], ...]
    seen: tuple[tuple[str, bool], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the pieces of both sides."""
        return {"student": [list(piece) for piece in self.pieces], "teacher": [list(piece) for piece in self.seen]}


@dataclass(frozen=True)
class PlanResult:
    """Hold the result of ``plan``. figures: the ``--json`` object without command and status. batch: the first sequences,
    decoded; empty if the models' weights are not available."""

    figures: Mapping[str, Any]
    batch: tuple[DecodedSequence, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the object of ``--json``."""
        return {"command": "plan", "status": "ok", **self.figures}


@dataclass(frozen=True)
class PipelinePlan:
    """Hold the result of ``plan`` for a recipe of stages. stages: by name, its figures."""

    pipeline: str
    stages: Mapping[str, Mapping[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """Return the object of ``--json``."""
        return {"command": "plan", "status": "ok", "pipeline": self.pipeline, "stages": self.stages}


@dataclass(frozen=True)
class StageResult:
    """Hold the outcome of a pipeline's stage. status: "done" or "skipped". result: the object of its verb."""

    status: str
    verb: str
    output: str
    result: Mapping[str, Any]


@dataclass(frozen=True)
class PipelineResult:
    """Hold the result of ``run``: each stage that was chosen, by name."""

    output: Path
    wall_s: float
    stages: Mapping[str, StageResult]

    def as_json(self) -> dict[str, Any]:
        """Return the object of ``--json``."""
        stages = {name: vars(stage) for name, stage in self.stages.items()}
        return {
            "command": "run",
            "status": "ok",
            "output": str(self.output),
            "wall_s": self.wall_s,
            "stages": stages,
        }


@dataclass(frozen=True)
class PilotArm:
    """Hold a line of a pilot's table.

    steps, train_s: trained, and of_steps: of its whole run. output_share: of steps on student outputs. figure: the metric
    after ``steps``. difference: by how much it is better than the best arm after the same share of the steps, with the
    limits of the 95 % interval; None for the best arm.
    """

    name: str
    lr: float
    steps: int
    of_steps: int
    train_s: float
    output_share: float
    figure: float
    difference: tuple[float, float, float] | None
    is_best: bool


@dataclass(frozen=True)
class PilotResult:
    """Hold the result of ``pilot``. recipe: the file with the best settings. best: its settings. steps: of that recipe.

    wall_s: seconds that the pilot has used, also before it was interrupted. metric: on ``rows`` held-out rows. answers:
    sentences. notes: what did not fit into the budget.
    """

    output: Path
    wall_s: float
    recipe: str
    best: Mapping[str, Any]
    steps: int
    metric: str
    rows: int
    arms: tuple[PilotArm, ...]
    answers: tuple[str, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the object of ``--json``."""
        found = {"command": "pilot", "status": "ok", **asdict(self), "output": str(self.output)}
        return found | {"best": dict(self.best)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> PilotResult:
        """Return the result of an object of ``as_json``."""
        fields_of_arms = [{**arm, "difference": _as_tuple(arm["difference"])} for arm in found["arms"]]
        return cls(
            **{name: found[name] for name in ("wall_s", "recipe", "best", "steps", "metric", "rows")},
            output=Path(found["output"]),
            arms=tuple(PilotArm(**arm) for arm in fields_of_arms),
            answers=tuple(found["answers"]),
            notes=tuple(found["notes"]),
        )


def _as_tuple(values: Sequence[float] | None) -> tuple[float, float, float] | None:
    return None if values is None else (values[0], values[1], values[2])


@dataclass(frozen=True, slots=True)
class FineTuned(Event):
    """Report that the stage before a run has ended. title: of its table."""

    result: TrainResult
    title: str = "Fine-tuning"


@dataclass(frozen=True, slots=True)
class StageFinished(Event):
    """Report that a stage of a pipeline has ended."""

    name: str
    result: Result


@dataclass(frozen=True, slots=True)
class Generated(Event):
    """Report the next responses of ``generate``, in the order of the prompts, as rows."""

    rows: Sequence[Mapping[str, Any]]
