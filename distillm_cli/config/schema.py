"""What a run is, before anything runs: typed, frozen sections. Every default lives here or in ``objective``, once.

A field's description is its help text, its unit and its source. Section and field names are the public ones of recipes,
``--set section.key=value`` and the resolved ``recipe.yaml``.
"""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distillm_cli.config import student_spec
from distillm_cli.config.fields import (
    Beta,
    Condition,
    Count,
    Dtype,
    MetricName,
    Name,
    Positive,
    Probability,
    Section,
    Seed,
    UsedWhen,
    under,
)
from distillm_cli.config.objective import DRAWING, ObjectiveConfig, ScheduleConfig

_SAMPLED = under("teacher", "pairs", "interleaved")
_MIXED = UsedWhen(  # what is drawn for a whole epoch of pairs is the student's own
    {"schedule.kind": ("on", "mixed", "annealed", "adaptive", "rounds")},
    {"schedule.kind": ("pairs",), "schedule.redraw": ("never",)},
)
_DRAWN = (*DRAWING, "pairs", "rounds")  # schedules with outputs of the student
_OF_STUDENT = UsedWhen({"schedule.kind": _DRAWN}, of_method=False)
_OF_EITHER = UsedWhen({"schedule.kind": (*_DRAWN, "teacher")}, of_method=False)
_FALLING = UsedWhen({"train.lr_schedule": ("cosine", "linear")}, of_method=False)
_BUILTIN = {"data.source": ("builtin",)}
_RANK = Condition("that is given", 16, lambda rank: rank is not None)

AUTO = "auto"  # of a number: it is chosen to fit the models before the run (runs/defaults.py)
Auto = Literal["auto"]


def _may_have_revision(model: Any) -> bool:
    return not isinstance(model, str) or student_spec.may_have_revision(model)


_ON_HUB = Condition("on the hub", "NAME", _may_have_revision)


class TeacherConfig(Section):
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
    revision: Annotated[Name | None, UsedWhen({"teacher.path": _ON_HUB}, of_method=False)] = Field(
        None, description="branch, tag or commit on the hub"
    )
    quantize: Literal["none", "8bit", "4bit"] = Field(
        "none", description="its linear layers in 8 bits (LLM.int8) or 4 (NF4), by bitsandbytes; needs CUDA"
    )


class AdapterConfig(Section):
    """A low-rank adapter on a frozen model (Hu et al. 2021, arXiv 2106.09685), by peft."""

    r: Positive | None = Field(None, description="rank; unset: no adapter, every weight trains")
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="the adapter counts alpha / r times; unset: 4·r, the paper's 64 for 16"
    )
    dropout: Annotated[float, Field(ge=0, lt=1), UsedWhen({"student.lora.r": _RANK}, of_method=False)] = Field(
        0.1, description="on the adapter's input"
    )
    targets: tuple[Name, ...] | None = Field(
        None, min_length=1, description="names of the layers that get one; unset: every linear layer but the head"
    )

    @model_validator(mode="after")
    def _belongs_to_a_rank(self) -> AdapterConfig:
        for name in ("alpha", "targets"):
            if self.r is None and getattr(self, name) is not None:
                raise ValueError(
                    f"student.lora.{name} belongs to an adapter, and student.lora.r is unset; try --lora 16"
                )
        return self


class StudentConfig(Section):
    """The model that is trained (by `sft` too)."""

    path: Name | None = Field(
        None,
        description="hub name, local directory (of a model or of a LoRA adapter), or one that is built: from a "
        "config.json or random:[FAMILY:]LAYERSxWIDTH (random; family llama or gpt2, with a teacher: the teacher's), "
        "layers:N[:first|last] or layers:I,J,… (copies of the teacher's layers, embeddings and head; evenly spaced "
        "unless told, counted from 0), width:SIZE or width:0.5 (random, as deep as the teacher)",
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
    revision: Annotated[Name | None, UsedWhen({"student.path": _ON_HUB}, of_method=False)] = Field(
        None, description="branch, tag or commit on the hub"
    )
    lora: AdapterConfig = AdapterConfig()
    lora_output: Literal["merged", "adapter"] = Field(
        "merged", description="the output directory is a whole model, the adapter merged in, or the adapter alone"
    )
    sft_epochs: Annotated[float, Field(ge=0)] = Field(
        0, description="of distill: epochs of fine-tuning before it, a stage of its own under sft/; the paper's is 3"
    )
    sft_lr: Annotated[float, Field(gt=0)] | None = Field(
        None, description="the highest learning rate of that stage; unset: train.lr"
    )

    @property
    def is_built(self) -> bool:
        """Return whether the run builds the model instead of loading trained weights."""
        return student_spec.is_built(self.path)

    @model_validator(mode="after")
    def _an_adapter_needs_a_rank_and_a_base(self) -> StudentConfig:
        if self.lora_output == "adapter" and self.lora.r is None:
            raise ValueError("student.lora_output adapter without an adapter, student.lora.r; try --lora 16")
        if self.lora_output == "adapter" and self.is_built:
            raise ValueError(
                f"student.lora_output adapter: the adapter of {self.path} would have no model to be loaded on; "
                "try --set student.lora_output=merged"
            )
        if self.sft_lr is not None and not self.sft_epochs:
            raise ValueError("student.sft_lr without student.sft_epochs; try --set student.sft_epochs=3")
        return self


class ColumnsConfig(Section):
    """Which columns of the source are the prompt and the response, when their names are not known ones."""

    prompt: Name | None = Field(None, description="the whole prompt, or the instruction")
    input: Name | None = Field(None, description="goes with the instruction")
    response: Name | None = Field(None, description="a text, or a list of references")


class DataConfig(Section):
    """Rows in, examples out."""

    source: Name = Field(
        "dolly",
        description="a name under $DISTILLM_DATA or a known data set, a hub name, a file (jsonl json csv parquet; .gz, "
        ".zst), a directory of them or of save_to_disk, or `builtin`",
    )
    valid: Name | None = Field(
        None, description="held-out rows: a file or source; unset: the source's own, else a slice"
    )
    template: Literal["auto", "alpaca", "chat", "plain", "exact"] = Field(
        "auto",
        description="how rows are written. auto: chat for conversations, and for instructions where teacher and student "
        "have chat templates; else alpaca for instructions, plain for questions, exact for whole prompts",
    )
    chat_template: Name = Field(
        "auto",
        description="auto: the student's own chat template, else the teacher's; or student, teacher, or a Jinja file",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="arguments of the chat template for every row, such as {enable_thinking: false}"
    )
    tools: Name | None = Field(None, description="JSON file with the list of tools of rows that have no `tools` column")
    documents: Name | None = Field(
        None, description="JSON file with the list of documents of rows that have no `documents` column"
    )
    turns: Literal["all", "last"] = Field("all", description="answers of a conversation that are supervised")
    date: Name | None = Field(
        None, description="date that chat templates see, YYYY-MM-DD; unset: the day on which the run starts"
    )
    special_tokens_in_text: Literal["encode", "text", "refuse"] = Field(
        "encode",
        description="special tokens written in a row's text: encode them as special tokens (as transformers does), as "
        "text, or refuse the row",
    )
    source_language: Name | None = Field(
        None, description="language code of prompts, for tokenizers with such codes (NLLB: eng_Latn)"
    )
    target_language: Name | None = Field(None, description="language code of responses, so too")
    columns: ColumnsConfig = ColumnsConfig()  # sections are frozen, so that a shared default is safe
    max_length: Annotated[int, Field(ge=2)] | Auto = Field(
        AUTO,
        description="prompt + response, tokens; auto: 512 for GPT-2, OPT and Llama bases, else 2048, within the context",
    )
    max_prompt_length: Positive | Auto = Field(
        AUTO, description="tokens; auto: 256 less than max_length, and always 256"
    )
    too_long: Literal["drop", "truncate", "error"] = Field(
        "drop", description="a row over max_length; truncate cuts the response's end. A prompt is never cut"
    )
    limit: Positive | None = Field(None, description="use the first rows only")
    teacher_samples: Annotated[Name | None, under("teacher", "pairs")] = Field(
        None,
        description="responses that the teacher gave before (a file that `generate` wrote), matched to the rows by their "
        "prompts; unset: drawn during the run",
    )
    valid_limit: Positive = Field(1000, description="held-out rows for validation, at most (METHODS B: 1000)")
    size: Annotated[Positive, UsedWhen(_BUILTIN)] = Field(20_000, description="rows of the builtin set")
    tasks: Annotated[tuple[str, ...] | None, UsedWhen(_BUILTIN, {"data.valid": ("builtin",)})] = Field(
        None, description="kinds of task of the builtin set; unset: all"
    )
    seed: int = Field(1, description="of the builtin rows, and of the held-out slice")
    skip_bad_rows: bool = Field(False, description="skip, count and list broken rows instead of stopping at the first")
    bucket: Positive = Field(
        1,
        description="1: random batches, each cut into passes of about one length, which saves padding and changes no "
        "gradient. k: batches of about one length, from k batches sorted together: fewer passes, but where length goes "
        "with the kind of row each step sees one kind only, and learning suffers",
    )
    workers: Count = Field(0, description="processes that tokenize; cannot change a run")

    @model_validator(mode="after")
    def _the_date_is_one(self) -> DataConfig:
        try:
            date.fromisoformat(self.date or "2000-01-01")
        except ValueError:
            raise ValueError("data.date must be a date, YYYY-MM-DD; try --set data.date=2026-01-31") from None
        return self


class RolloutConfig(Section):
    """Sampling from the student during training; from any model in `generate`."""

    temperature: Annotated[float, Field(ge=0), _OF_STUDENT] = Field(1.0, description="0 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1), _OF_STUDENT] = Field(
        1.0, description="sample from the likeliest tokens of this mass"
    )
    top_k: Annotated[Count, _OF_STUDENT] = Field(0, description="sample from so many likeliest tokens; 0 is off")
    max_new_tokens: Positive = Field(256, description="end-of-sequence included")
    teacher_temperature: Annotated[float, Field(ge=0), _SAMPLED] = Field(
        1.0, description="of what the teacher samples in training"
    )
    teacher_top_p: Annotated[float, Field(gt=0, le=1), _SAMPLED] = Field(
        1.0, description="of what the teacher samples in training"
    )
    draft: Annotated[Positive, under("interleaved")] = Field(
        5,
        description="γ of interleaved: tokens the student drafts before the teacher reads them; changes cost, not law",
    )
    accept: Annotated[Positive, under("interleaved")] = Field(
        25, description="K of interleaved: a drafted token stays where it is among so many likeliest of the teacher's"
    )
    bulk: Annotated[Positive, _OF_EITHER] = Field(
        8,
        description="rollout batches sampled at once, those of the next steps that will ask for one; how many are sampled, "
        "and for which rows, stays. Fast, and samples up to so many rollout steps old. Under rounds: the batches of a round",
    )
    teacher_mix: Annotated[float, Field(ge=0, lt=1), _MIXED] = Field(
        0.0,
        description="α: each token of a rollout from α·teacher + (1 − α)·student (MiniLLM: 0.2); 0: the student's own",
    )


class TrainConfig(Section):
    """Configure the loop. The defaults are the paper's (METHODS D), or fit the models where they are `auto`."""

    epochs: Annotated[float, Field(gt=0)] | Auto = Field(
        AUTO,
        description="passes over the rows; ignored when steps is given; auto: 10 or 20 for the paper's models, else 3",
    )
    steps: Positive | None = Field(None, description="optimizer steps; overrides epochs")
    batch_size: Positive = Field(8, description="sequences per micro-batch (and per process)")
    accumulate: Positive = Field(1, description="micro-batches per step; the mean is over the whole step's tokens")
    lr: Annotated[float, Field(gt=0)] | Auto = Field(
        AUTO,
        description="the highest learning rate of the run; auto: by family and size, 5e-4 for the paper's GPT-2, 1e-5 for "
        "a chat model",
    )
    lr_schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="how it falls after the warm-up")
    min_lr: Annotated[float, Field(ge=0), _FALLING] = Field(1e-7, description="where cosine and linear end")
    warmup: Annotated[float, Field(ge=0)] | Auto = Field(
        AUTO, description="steps; below 1: a fraction of all steps; auto: 0 for the paper's models, else 0.1"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(1e-2, description="matrices only; not biases and norms")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="of AdamW")
    clip: Annotated[float, Field(ge=0)] = Field(1.0, description="gradient norm; 0 is off")
    seed: Seed = Field(10, description="of the order, the rollouts, dropout and new weights")
    device: Name = Field("auto", description="auto, cpu, cuda, cuda:N, mps")
    threads: Positive | None = Field(None, description="CPU threads, at most one for each core; unset: torch's choice")
    gradient_checkpointing: bool = Field(False, description="less memory, one more forward pass")
    log_steps: Positive = Field(1, description="a metrics line every so many steps")
    eval_steps: Positive | Literal["epoch"] = Field("epoch", description="validate every so many steps")
    save_steps: Positive | Literal["epoch"] = Field("epoch", description="checkpoint every so many steps")
    keep: Positive = Field(2, description="checkpoints kept, beside the best")
    select: Literal["last", "valid_loss", "valid_divergence", MetricName] = Field(
        "last",
        description="whose weights the output directory ends with: the last, or the best by this held-out figure",
    )
    patience: Positive | None = Field(None, description="stop after so many validations without a better `select`")

    @model_validator(mode="after")
    def _patience_needs_a_figure(self) -> TrainConfig:
        if self.patience is not None and self.select == "last":
            raise ValueError("train.patience needs a train.select to watch; try --set train.select=valid_loss")
        return self


class EvalConfig(Section):
    """Scoring by generation (METHODS D)."""

    suites: tuple[Name, ...] = Field(
        (),
        description="dolly self-inst vicuna sni unni, samsum xsum wmt14-de-en wmt14-en-de iwslt gsm8k, or data files; "
        "unset: the held-out rows",
    )
    metrics: tuple[MetricName, ...] = Field(
        ("rouge_l", "exact_match"),
        min_length=1,
        description="rouge_l rouge_1 rouge_2, bleu and chrf (of a whole set), exact_match, error_rate, final_number (GSM8K)",
    )
    rouge_tokenizer: Literal["words", "characters"] = Field(
        "words",
        description="tokens of rouge_*: words (runs of a-z and 0-9, stemmed; the paper's) or characters (for Chinese)",
    )
    seeds: tuple[Annotated[int, Field(lt=2**63)], ...] = Field(
        (10, 20, 30, 40, 50), min_length=1, description="one sampled pass each"
    )
    greedy: bool = Field(False, description="one deterministic pass instead")
    temperature: Annotated[float, Field(ge=0)] = Field(1.0, description="0 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="sample from the likeliest tokens of this mass")
    top_k: Count = Field(0, description="sample from so many likeliest tokens; 0 is off")
    max_new_tokens: Positive = Field(256, description="end-of-sequence included")
    no_repeat_ngram_size: Count = Field(6, description="0 is off")
    strip_reasoning: bool = Field(
        True, description="score responses and references without their reasoning (<think> blocks, analysis channels)"
    )
    batch_size: Positive = Field(32, description="sequences decoded side by side")
    limit: Positive | None = Field(None, description="the first rows of each suite only")
    report_rows: Count = Field(
        100, description="held-out rows that student and teacher answer for the table at the end of a run; 0: no table"
    )


class Recipe(Section):
    """Everything that decides what a run computes."""

    method: str = Field("distillm", description="a named preset over the fields below")
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    rollout: RolloutConfig = RolloutConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def needs_responses(self) -> bool:
        """Return whether training reads the responses of the data set, and not its prompts alone."""
        fine_tunes = self.method == "sft" or self.student.sft_epochs > 0
        draws_rows = self.schedule.kind in ("off", "mixed", "annealed", "adaptive")
        return fine_tunes or draws_rows or self.objective.row_weight > 0

    @property
    def decodes_beside_the_teacher(self) -> bool:
        """Whether the teacher decodes with the student: drafts that it accepts or mends, or a mixture of both."""
        return self.schedule.kind == "interleaved" or self.mixes_in_the_teacher

    @property
    def mixes_in_the_teacher(self) -> bool:
        """Whether student outputs are drawn from a mixture with the teacher; a policy gradient needs to be told of it even
        where the teacher's share is 0."""
        return self.objective.policy_gradient or self.rollout.teacher_mix > 0

    @model_validator(mode="after")
    def _the_student_can_be_made(self) -> Recipe:
        if self.method == "sft" and self.student.sft_epochs:
            raise ValueError("student.sft_epochs is a stage before distill; try --epochs, which is sft's own")
        if self.method == "sft" and self.train.select == "valid_divergence":
            raise ValueError(
                "train.select valid_divergence is to a teacher, and sft has none; try --set train.select=valid_loss"
            )
        if student_spec.copies_layers(self.student.path) and self.teacher.quantize != "none":
            raise ValueError(
                f"teacher.quantize {self.teacher.quantize}: student {self.student.path} copies the teacher's layers, and "
                "they would be quantised ones; try --set teacher.quantize=none"
            )
        return self

    @model_validator(mode="after")
    def _the_rate_falls(self) -> Recipe:
        least, anyway = self.train.min_lr, TrainConfig.model_fields["min_lr"].default
        if self.train.lr_schedule == "constant" or least == anyway:  # below which a rate just stays as it is
            return self
        for key, highest in (("train.lr", self.train.lr), ("student.sft_lr", self.student.sft_lr)):
            if isinstance(highest, float | int) and least > highest:
                raise ValueError(
                    f"train.min_lr {least:g} is above {key} {highest:g}, and a rate falls; try --set train.min_lr=0"
                )
        return self

    @model_validator(mode="after")
    def _a_policy_needs_outputs(self) -> Recipe:
        kind = self.schedule.kind
        if self.objective.policy_gradient and kind in ("off", "teacher", "pairs", "interleaved"):
            raise ValueError(
                f"objective.policy_gradient needs outputs of the student's own, and schedule.kind is {kind}; "
                "try --set schedule.kind=rounds"
            )
        return self
