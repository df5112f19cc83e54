"""What a run is, before anything runs: typed, frozen sections. Every default lives here, once.

A field's description is its help text, its unit and its source. Section and field names are the public ones of recipes,
``--set section.key=value`` and the resolved ``recipe.yaml``.
"""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]
DivergenceName = Literal["kl", "rkl", "skl", "srkl", "jsd", "tvd", "jeffreys"]
MetricName = Literal["rouge_l", "exact_match", "error_rate"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_truth_value_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes True for 1 and True for 1.0; nobody who wrote ``epochs: true`` meant one epoch."""
        items = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, bool) for item in items):
            annotation = cls.model_fields[info.field_name].annotation
            union = get_origin(annotation) in (Union, UnionType)
            if bool not in (get_args(annotation) if union else (annotation,)):
                raise ValueError("true and false are no numbers")
        return value


class Teacher(Section):
    """The model that is imitated. Never trained."""

    path: Name | None = Field(
        None, description="hub name or local directory of the teacher; `builtin` is the one shipped"
    )
    dtype: Dtype = Field("auto", description="of its weights; auto: bf16 where the machine is fast at it, else fp32")
    cache: Literal["auto", "memory", "disk", "off"] = Field(
        "auto",
        description="keep its last hidden states: of rows in memory (filled in the first epoch) or on disk (computed "
        "beforehand, shared by runs), of student outputs while they are replayed. auto: the disk's where they are there "
        "already, else memory where something is seen twice and a quarter of the free memory holds them, else off",
    )
    cache_dir: Name | None = Field(
        None, description="of cache: disk; unset: teacher/ in $DISTILLM_CACHE, else in ~/.cache/distillm"
    )
    revision: Name | None = Field(None, description="branch, tag or commit on the hub")


class Student(Section):
    """The model that is trained (by `sft` too)."""

    path: Name | None = Field(
        None,
        description="hub name, local directory, a config.json (from scratch), or random:[FAMILY:]LAYERSxWIDTH "
        "(from scratch; family llama or gpt2, with a teacher: the teacher's)",
    )
    tokenizer: Name | None = Field(
        None,
        description="directory or hub name of a tokenizer, or one trained on the data: bpe:SIZE, chars, words; "
        "unset: the student's own, else the teacher's",
    )
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="compute type (autocast); parameters stay fp32. auto: bf16 where fast"
    )
    dropout: Probability | None = Field(
        None, description="sets every dropout of the student; unset: as its config says"
    )
    save_dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of the weights in the output directory; checkpoints stay fp32"
    )
    revision: Name | None = Field(None, description="branch, tag or commit on the hub")


class Columns(Section):
    """Which columns of the source are the prompt and the response, when their names are not known ones."""

    prompt: Name | None = Field(None, description="the whole prompt, or the instruction")
    input: Name | None = Field(None, description="goes with the instruction")
    response: Name | None = Field(None, description="a text, or a list of references")


class Data(Section):
    """Rows in, examples out."""

    source: Name = Field(
        "dolly",
        description="a name under $DISTILLM_DATA or a known data set, a hub name, a file (jsonl json csv parquet), a "
        "directory of them, or `builtin`",
    )
    valid: Name | None = Field(
        None, description="held-out rows: a file or source; unset: the source's own, else a slice"
    )
    template: Literal["auto", "alpaca", "chat", "plain"] = Field(
        "auto",
        description="auto: a row's own `prompt`, chat for `messages` rows, alpaca for instruction rows, else plain",
    )
    columns: Columns = Columns()  # sections are frozen, so that a shared default is safe
    max_length: Annotated[int, Field(ge=2)] = Field(512, description="prompt + response, tokens")
    max_prompt_length: Positive = Field(256, description="tokens")
    too_long: Literal["drop", "truncate", "error"] = Field(
        "drop", description="a row over max_length; truncate cuts the response's end. A prompt is never cut"
    )
    limit: Positive | None = Field(None, description="use the first rows only")
    valid_limit: Positive = Field(1000, description="held-out rows for validation, at most (METHODS B: 1000)")
    size: Positive = Field(20_000, description="rows of the builtin set")
    tasks: tuple[str, ...] | None = Field(None, description="kinds of task of the builtin set; unset: all")
    seed: int = Field(1, description="of the builtin rows, and of the held-out slice")
    skip_bad_rows: bool = Field(False, description="skip, count and list broken rows instead of stopping at the first")
    bucket: Positive = Field(
        16,
        description="so many batches are sorted by length together, and then shuffled: saves padding. 1: random batches, "
        "for rows whose length goes with their kind, where each step would otherwise see one kind only",
    )
    workers: Count = Field(0, description="processes that tokenise; cannot change a run")


class Objective(Section):
    """The divergence between next-token distributions, per supervised token (METHODS A)."""

    divergence: DivergenceName = Field("skl", description="p teacher, q student")
    alpha: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="skew of skl and srkl: the share of the other distribution mixed in. 0 is kl, rkl"
    )
    beta: Probability = Field(0.5, description="of jsd: m = βp + (1−β)q")
    jeffreys_weight: Probability = Field(0.5, description="λ of jeffreys: 2λ KL(p‖q) + 2(1−λ) KL(q‖p)")
    kd_weight: Probability = Field(1.0, description="(1 − kd_weight)·CE + kd_weight·D; CE on data set rows only")
    kd_warmup: Probability = Field(
        0.0, description="share of the steps over which D's weight climbs from 0 to kd_weight: cross-entropy first"
    )
    reduction: Literal["token", "sequence"] = Field(
        "token", description="mean over the step's response tokens, or per sequence first"
    )
    policy_gradient: bool = Field(
        False,
        description="MiniLLM: on student outputs D, weighted back to the student's own sampling, and beside it the policy "
        "gradient of what follows a token; kd_weight is then of the rows beside them (row_weight), D of the rows is kl",
    )
    ratio_clip: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="ε of policy_gradient: the ratio of student to sampler counts within 1 ± ε (PPO)"
    )
    row_weight: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="of policy_gradient: weight of the step's data set rows beside the student outputs, "
        "(1 − kd_weight)·CE + kd_weight·KL(p‖q) per token (MiniLLM's term on plain text); 0: none",
    )

    @model_validator(mode="after")
    def _rows_stand_beside_the_policy_gradient(self) -> Objective:
        if self.row_weight and not self.policy_gradient:
            raise ValueError(
                "objective.row_weight belongs to objective.policy_gradient; try --set objective.policy_gradient=true"
            )
        return self


class Schedule(Section):
    """Which sequences a step trains on (METHODS B)."""

    kind: Literal["off", "on", "mixed", "annealed", "adaptive", "rounds"] = Field(
        "adaptive",
        description="off: data set rows; on: rollouts; mixed: GKD; annealed: ImitKD; adaptive: DistiLLM; rounds: "
        "rollout.bulk batches of rollouts, trained on inner_epochs times, then the next (MiniLLM)",
    )
    replay: Literal["auto", "none", "decreasing", "constant", "increasing"] = Field(
        "auto",
        description="ρ(t), the share of student draws that are fresh: 1−t/T, ½, t/T; none: always fresh. "
        "auto: decreasing for adaptive, else none",
    )
    inner_epochs: Positive = Field(4, description="of rounds: how often a round's rollouts are trained on")
    capacity: Positive = Field(
        1000, description="replay buffer, sequences; the oldest leave first. rounds: holds one round"
    )
    epsilon: float = Field(
        0.1, description="φ rises when the validation loss reaches its reference + ε, nats per token"
    )
    levels: Positive = Field(10, description="N: φ rises by 1/N")
    phi: Probability = Field(0.0, description="φ at the start")
    reference: Literal["last_rise", "previous"] = Field(
        "last_rise",
        description="the loss ε is added to: at the last rise of φ (official code), or the previous one (paper)",
    )
    warm_up: Literal["fill", "none"] = Field(
        "fill",
        description="fill: until the buffer is full every student draw is fresh (official code); none: the paper",
    )
    fresh: Literal["direct", "buffer"] = Field(
        "direct",
        description="after a rollout train on it (official code), or on a draw from the buffer it went into (paper)",
    )
    mix: Probability = Field(0.5, description="λ of mixed: the probability of a rollout")
    anneal: Literal["linear", "exponential", "sigmoid"] = Field("linear", description="how the data set's share falls")
    anneal_rate: Annotated[float, Field(gt=0)] = Field(
        5.0, description="exponential: e^(−r·t/T); sigmoid: steepness around the middle"
    )

    @model_validator(mode="after")
    def _a_round_is_trained_on_in_its_order(self) -> Schedule:
        if self.kind == "rounds" and self.fresh == "buffer":
            raise ValueError(
                "schedule.fresh: buffer has no meaning under schedule.kind: rounds; try --set schedule.fresh=direct"
            )
        return self


class Rollout(Section):
    """Sampling from the student during training; from any model in `generate`."""

    temperature: Annotated[float, Field(ge=0)] = Field(1.0, description="0 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="sample from the likeliest tokens of this mass")
    top_k: Count = Field(0, description="sample from so many likeliest tokens; 0 is off")
    max_new_tokens: Positive = Field(256, description="end-of-sequence included")
    bulk: Positive = Field(
        8,
        description="rollout batches sampled at once and served one by one; the number sampled stays. "
        "1 is the paper's letter. Under rounds: the batches of a round",
    )
    teacher_mix: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="α: each token of a rollout from α·teacher + (1 − α)·student (MiniLLM: 0.2); 0: the student's own",
    )


class Train(Section):
    """The loop. Defaults are the paper's (METHODS D)."""

    epochs: Annotated[float, Field(gt=0)] = Field(20, description="passes over the rows; ignored when steps is given")
    steps: Positive | None = Field(None, description="optimizer steps; overrides epochs")
    batch_size: Positive = Field(8, description="sequences per micro-batch (and per process)")
    accumulate: Positive = Field(1, description="micro-batches per step; the mean is over the whole step's tokens")
    lr: Annotated[float, Field(gt=0)] = Field(5e-4, description="the highest learning rate of the run")
    lr_schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="how it falls after the warm-up")
    min_lr: Annotated[float, Field(ge=0)] = Field(1e-7, description="where cosine and linear end")
    warmup: Annotated[float, Field(ge=0)] = Field(0, description="steps; below 1: a fraction of all steps")
    weight_decay: Annotated[float, Field(ge=0)] = Field(1e-2, description="matrices only; not biases and norms")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="of AdamW")
    clip: Annotated[float, Field(ge=0)] = Field(1.0, description="gradient norm; 0 is off")
    seed: Count = Field(10, description="of the order, the rollouts, dropout and new weights")
    device: Name = Field("auto", description="auto, cpu, cuda, cuda:N, mps")
    threads: Positive | None = Field(None, description="CPU threads; unset: torch's choice")
    gradient_checkpointing: bool = Field(False, description="less memory, one more forward pass")
    log_steps: Positive = Field(1, description="a metrics line every so many steps")
    eval_steps: Positive | Literal["epoch"] = Field("epoch", description="validate every so many steps")
    save_steps: Positive | Literal["epoch"] = Field("epoch", description="checkpoint every so many steps")
    keep: Positive = Field(2, description="checkpoints kept, beside the best")
    select: Literal["last", "valid_loss", "valid_divergence", "rouge_l", "exact_match", "error_rate"] = Field(
        "last",
        description="whose weights the output directory ends with: the last, or the best by this held-out figure",
    )
    patience: Positive | None = Field(None, description="stop after so many validations without a better `select`")

    @model_validator(mode="after")
    def _patience_needs_a_figure(self) -> Train:
        if self.patience is not None and self.select == "last":
            raise ValueError("train.patience needs a train.select to watch; try --set train.select=valid_loss")
        return self


class Eval(Section):
    """Scoring by generation (METHODS D)."""

    suites: tuple[Name, ...] = Field(
        (), description="dolly self-inst vicuna sni unni, or data files; unset: the held-out rows"
    )
    metrics: tuple[MetricName, ...] = Field(("rouge_l", "exact_match"), description="rouge_l, exact_match, error_rate")
    seeds: tuple[int, ...] = Field((10, 20, 30, 40, 50), min_length=1, description="one sampled pass each")
    greedy: bool = Field(False, description="one deterministic pass instead")
    temperature: Annotated[float, Field(ge=0)] = Field(1.0, description="0 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="sample from the likeliest tokens of this mass")
    top_k: Count = Field(0, description="sample from so many likeliest tokens; 0 is off")
    max_new_tokens: Positive = Field(256, description="end-of-sequence included")
    no_repeat_ngram_size: Count = Field(6, description="0 is off")
    batch_size: Positive = Field(32, description="sequences decoded side by side")
    limit: Positive | None = Field(None, description="the first rows of each suite only")
    report_rows: Count = Field(
        100, description="held-out rows that student and teacher answer for the table at the end of a run; 0: no table"
    )


class Recipe(Section):
    """Everything that decides what a run computes."""

    method: str = Field("distillm", description="a named preset over the fields below")
    teacher: Teacher = Teacher()
    student: Student = Student()
    data: Data = Data()
    objective: Objective = Objective()
    schedule: Schedule = Schedule()
    rollout: Rollout = Rollout()
    train: Train = Train()
    eval: Eval = Eval()

    @model_validator(mode="after")
    def _a_policy_needs_outputs(self) -> Recipe:
        if self.objective.policy_gradient and self.schedule.kind == "off":
            raise ValueError(
                "objective.policy_gradient needs student outputs, and schedule.kind is off; "
                "try --set schedule.kind=rounds"
            )
        return self
