"""Define the recipe: typed, frozen sections. Every default is here, in ``objective`` or in ``schedule``.

A field's description is its help text, its unit and its source. Section and field names are the public ones of recipes,
``--set section.key=value`` and the resolved ``recipe.yaml``.
"""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

from pydantic import Field, model_validator

from distillm_cli import plugins
from distillm_cli.config import student_spec
from distillm_cli.config.extras import (
    CTCDConfig,
    DisCoConfig,
    HiddenConfig,
    KDIGAConfig,
    MixKDConfig,
    OKDConfig,
    RobustKDConfig,
)
from distillm_cli.config.fields import (
    Beta,
    Condition,
    Count,
    Dtype,
    HeldOutMetric,
    Name,
    Positive,
    Probability,
    Section,
    Seed,
    ServerUrl,
    UsedWhen,
)
from distillm_cli.config.objective import OBJECTIVE, ObjectiveConfig
from distillm_cli.config.schedule import OWN_BUFFERED_KINDS, SCHEDULE, ScheduleConfig, kinds_with, trains_on_own_outputs

_DRAFTS = UsedWhen({"schedule.kind": kinds_with(lambda kind: kind.drafts)})
_TEACHER_SAMPLES = UsedWhen({"schedule.kind": kinds_with(lambda kind: kind.uses_teacher_samples)})
_TEACHER_DECODES = UsedWhen({"schedule.kind": kinds_with(lambda kind: kind.uses_teacher_samples or kind.drafts)})
_MAY_MIX = UsedWhen(  # the samples of a whole epoch of pairs come from the student alone
    {"schedule.kind": kinds_with(trains_on_own_outputs)},
    {
        "schedule.kind": kinds_with(lambda kind: kind.uses_student_outputs and kind.uses_teacher_samples),
        "schedule.redraw": ("never",),
    },
)
_OWN_OUTPUTS = UsedWhen({"schedule.kind": OWN_BUFFERED_KINDS}, of_method=False)
_STUDENT_DECODES = UsedWhen({"schedule.kind": kinds_with(lambda kind: kind.uses_student_outputs)}, of_method=False)
_GENERATES = UsedWhen(
    {"schedule.kind": kinds_with(lambda kind: kind.uses_student_outputs or kind.uses_teacher_samples)}, of_method=False
)
_FALLING = UsedWhen({"train.lr_schedule": ("cosine", "linear")}, of_method=False)
_DISPATCHED = UsedWhen({"teacher.device_map": ("auto", "sequential")}, of_method=False)
_CHECKPOINTED = UsedWhen({"train.gradient_checkpointing": (True,)}, of_method=False)
_ADAMW = UsedWhen({"train.optimizer": ("adamw", "adamw_8bit", "paged_adamw_8bit")}, of_method=False)
_ADVERSARIAL = UsedWhen({"train.adversarial": ("fgsm", "pgd")}, of_method=False)
_ADVERSARIAL_STEPS = UsedWhen({"train.adversarial": ("pgd",)}, of_method=False)
_OF_TOKENS = UsedWhen({"disco.enabled": (False,)}, of_method=False)
_ATTACK = UsedWhen({"eval.attack": ("fgsm", "pgd")}, of_method=False)
_ATTACK_STEPS = UsedWhen({"eval.attack": ("pgd",)}, of_method=False)
_BUILTIN = {"data.source": ("builtin",)}
_SERVER = Condition("that is given", "http://127.0.0.1:8000", lambda url: url is not None)
_RANK = Condition("that is given", 16, lambda rank: rank is not None)
_ALONE = UsedWhen({"data.sources": Condition("that is empty", (), lambda found: not found)}, of_method=False)

plugins.metrics.close("the schema of recipes")
if TYPE_CHECKING:  # the real types depend on what is registered
    MetricName = str
    Selection = str
    AnyObjective = ObjectiveConfig
    AnySchedule = ScheduleConfig
else:
    MetricName = Literal[tuple(plugins.metrics)]
    Selection = Literal["last", HeldOutMetric, "spearman", MetricName]
    AnyObjective = OBJECTIVE.annotation()
    AnySchedule = SCHEDULE.annotation()

AUTO: Final = "auto"  # for a number: it is chosen to fit the models before the run (runs/defaults.py)
Auto = Literal["auto"]
AttackName = Literal["none", "fgsm", "pgd"]
ModelSide = Literal["teacher", "student"]
Template = Literal["auto", "alpaca", "chat", "plain", "exact"]
PrefixRange = Annotated[str, Field(pattern=r"^[1-9][0-9]*->[1-9][0-9]*$", examples=["64->256"])]
_Number = TypeVar("_Number", int, float)


def chosen(value: _Number | Auto) -> _Number:
    """Return a number that may be ``auto`` in a recipe, once ``runs.defaults`` has chosen it."""
    if isinstance(value, str):
        raise ValueError("this recipe has numbers that are auto; fit it to its models first")
    return value


def _may_have_revision(model: Any) -> bool:
    return not isinstance(model, str) or student_spec.may_have_revision(model)


_ON_HUB = Condition("on the hub", "NAME", _may_have_revision)


class TeacherConfig(Section):
    """Configure the teacher, the model that is imitated. It is trained only by okd and ctcd."""

    path: Name | None = Field(
        None,
        description="Teacher: a hub name, a local directory, or a model shipped with this package: builtin (questions), "
        "builtin:pronounce (words to phonemes). With ctcd also random:[FAMILY:]LAYERSxWIDTH.",
    )
    dtype: Dtype = Field(
        "auto", description="Data type of the weights. auto: bf16 on hardware with fast bf16, else fp32."
    )
    cache: Literal["auto", "memory", "disk", "off"] = Field(
        "auto",
        description="Cache of the teacher's hidden states. memory: filled in the first epoch. disk: computed before "
        "training and shared by runs. Student outputs are cached while they may be replayed. auto: disk "
        "if that cache exists, else memory if sequences repeat and their states fit into a quarter of "
        "the free memory, else off.",
    )
    cache_dir: Name | None = Field(
        None,
        description="Directory of the cache on disk. Unset: teacher/ in $DISTILLM_CACHE, else in ~/.cache/distillm.",
    )
    revision: Annotated[Name | None, UsedWhen({"teacher.path": _ON_HUB}, of_method=False)] = Field(
        None, description="Branch, tag or commit on the hub."
    )
    quantize: Literal["none", "8bit", "4bit"] = Field(
        "none", description="Quantization of the linear layers by bitsandbytes. 8bit: LLM.int8. 4bit: NF4. Needs CUDA."
    )
    device_map: Literal["none", "auto", "cpu", "sequential"] = Field(
        "none",
        description="Place of the weights of a teacher that is larger than the device. auto, sequential: layers on GPUs, in "
        "host memory and on disk, by accelerate. cpu: the teacher computes on the CPU.",
    )
    max_memory: Annotated[Annotated[float, Field(gt=0)] | None, _DISPATCHED] = Field(
        None,
        description="Memory for the teacher on each GPU or, in a run on the CPU, in host memory, in GB. Unset: what is "
        "free, which leaves no memory for the student.",
    )
    offload: bool = Field(
        False, description="Keep the weights in host memory, and move them to the device for each use. Needs a GPU."
    )
    server: ServerUrl | None = Field(
        None,
        description="Address of a vLLM pooling server that computes the teacher's hidden states. teacher.path has the "
        "config, the tokenizer and the head, which is all that is loaded. Unset: the teacher runs in this process.",
    )
    template: Template | None = Field(
        None,
        description="Prompt format that the teacher sees, if it is another one than the student's. Unset: data.template.",
    )
    chat_template: Name | None = Field(
        None,
        description="Chat template that the teacher sees: teacher for its own, student, or a Jinja file. Unset: "
        "data.chat_template.",
    )


class AdapterConfig(Section):
    """Configure a low-rank adapter on a frozen model (Hu et al. 2021, arXiv 2106.09685), by peft."""

    r: Positive | None = Field(None, description="Train a LoRA adapter of this rank. Unset: every weight is trained.")
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Numerator of the adapter's scale, alpha / r. Unset: 4·r, the paper's 64 for 16."
    )
    dropout: Annotated[float, Field(ge=0, lt=1), UsedWhen({"student.lora.r": _RANK}, of_method=False)] = Field(
        0.1, description="Dropout on the adapter's input."
    )
    targets: tuple[Name, ...] | None = Field(
        None,
        min_length=1,
        description="Names of the layers with an adapter. Unset: every linear layer except the head.",
    )

    @model_validator(mode="after")
    def _check_rank(self) -> AdapterConfig:
        for name in ("alpha", "targets"):
            if self.r is None and getattr(self, name) is not None:
                raise ValueError(f"student.lora.{name} needs an adapter, and student.lora.r is unset; try --lora 16")
        return self


class StudentConfig(Section):
    """Configure the student, the model that is trained (by `sft` too)."""

    path: Name | None = Field(
        None,
        description="Model to train: a hub name, a directory, or one to build (layers:6, width:0.5, random:4x256). A "
        "directory holds a model or a LoRA adapter. Built models: random:[FAMILY:]LAYERSxWIDTH or a config.json (random "
        "weights; FAMILY is llama or gpt2, by default the teacher's), layers:N[:first|last] or layers:I,J,… (copies of the "
        "teacher's layers, embeddings and head; evenly spaced by default, counted from 0), shared:NxP[:swap] (copies of the "
        "teacher's first N layers that run P times with the same weights; swap: queries and keys swap theirs in every "
        "second pass; shared:0.5x2 for half of the layers), width:SIZE or width:0.5 "
        "(random weights, as deep as the teacher).",
    )
    tokenizer: Name | None = Field(
        None,
        description="Tokenizer: a directory, a hub name, or one trained on the data (bpe:1000, chars, words). Unset: the "
        "student's own, else the teacher's.",
    )
    stop_tokens: tuple[Name, ...] = Field(
        (),
        description="Further tokens at which the student stops, as the tokenizer writes them. They are saved with it.",
    )
    template: Template | None = Field(
        None, description="Prompt format that the student sees, if the teacher sees another one. Unset: data.template."
    )
    chat_template: Name | None = Field(
        None, description="Chat template that the student sees, as data.chat_template. Unset: data.chat_template."
    )
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Compute dtype. Parameters stay fp32 (autocast). auto: bf16 on hardware with fast bf16."
    )
    dropout: Probability | None = Field(
        None,
        description="Probability of every dropout of the student, and with ctcd of the teacher. Unset: the values of "
        "their configs.",
    )
    save_dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Data type of the weights in the output directory. Checkpoints stay fp32."
    )
    revision: Annotated[Name | None, UsedWhen({"student.path": _ON_HUB}, of_method=False)] = Field(
        None, description="Branch, tag or commit on the hub."
    )
    quantize: Literal["none", "8bit", "4bit"] = Field(
        "none",
        description="Quantization of the frozen linear layers below an adapter, by bitsandbytes. 4bit: QLoRA (Dettmers et "
        "al. 2023, arXiv 2305.14314). Needs student.lora.r, student.lora_output adapter and CUDA.",
    )
    lora: AdapterConfig = AdapterConfig()
    lora_output: Literal["merged", "adapter"] = Field(
        "merged",
        description="Content of the output directory: a whole model with the adapter merged in, or the adapter alone.",
    )
    sft_epochs: Annotated[float, Field(ge=0)] = Field(
        0,
        description="Epochs of fine-tuning before distillation, as a separate stage under sft/. The paper uses 3.",
    )
    sft_lr: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Peak learning rate of fine-tuning before distillation. Unset: train.lr."
    )

    ptp: Annotated[float, Field(ge=0)] = Field(
        0,
        description="Epochs of pre-training on the teacher's four classes of confidence before distillation, after any "
        "fine-tuning, as a separate stage under ptp/ (in the style of Pea-KD).",
    )
    ptp_lr: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Peak learning rate of the pre-training. Unset: train.lr."
    )

    @property
    def required_path(self) -> str:
        """Return ``path``, which the recipe of a run has."""
        if self.path is None:
            raise ValueError("student.path is unset")
        return self.path

    @property
    def is_built(self) -> bool:
        """Return whether the run builds the model instead of loading trained weights."""
        return student_spec.is_built(self.path)

    @model_validator(mode="after")
    def _check_adapter_and_sft(self) -> StudentConfig:
        if self.lora_output == "adapter" and self.lora.r is None:
            raise ValueError("student.lora_output adapter needs student.lora.r; try --lora 16")
        if self.lora_output == "adapter" and self.is_built:
            raise ValueError(
                f"student.lora_output adapter: the base model {self.path} would not be saved; "
                "try --set student.lora_output=merged"
            )
        if self.lora.r is not None and student_spec.shares_layers(self.path):
            raise ValueError(
                f"student.lora.r: the layers of {self.path} are shared, and an adapter has one part for each layer; try "
                "layers:N, or train all weights"
            )
        if self.quantize != "none":
            if self.lora.r is None:
                raise ValueError(f"student.quantize {self.quantize}: quantized weights are not trained; try --lora 16")
            if self.is_built:
                raise ValueError(
                    f"student.quantize {self.quantize}: {self.path} is built in this run, and only trained weights are "
                    "quantized; try --set student.quantize=none"
                )
            if self.lora_output == "merged":
                raise ValueError(
                    f"student.quantize {self.quantize}: an adapter is not merged into quantized weights; try "
                    "--set student.lora_output=adapter"
                )
        if self.sft_lr is not None and not self.sft_epochs:
            raise ValueError("student.sft_lr needs student.sft_epochs; try --set student.sft_epochs=3")
        if self.ptp_lr is not None and not self.ptp:
            raise ValueError("student.ptp_lr needs student.ptp; try --set student.ptp=1")
        return self


class ColumnsConfig(Section):
    """Name the columns of the prompt and the response, for a source with other column names than the known ones."""

    prompt: Name | None = Field(None, description="Column of the whole prompt, or of the instruction.")
    input: Name | None = Field(None, description="Column of the input text of the instruction.")
    response: Name | None = Field(None, description="Column of the response: text, or a list of references.")


class SourceConfig(Section):
    """Configure a source of a mixture (``data.sources``). A text in place of a mapping is its name."""

    source: Name = Field(description="Data set, as in data.source.")
    weight: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Weight of the source: its share of the rows of an epoch, relative to the other weights."
    )
    rows: Positive | None = Field(
        None, description="Number of rows of the source in an epoch, in place of weights. Unset: all of its rows."
    )
    template: Template | None = Field(None, description="Prompt format of its rows. Unset: data.template.")
    limit: Positive | None = Field(None, description="Use only its first N rows. Unset: data.limit.")

    @model_validator(mode="before")
    @classmethod
    def _read_name(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


def _has_builtin(sources: Any) -> bool:
    """Return whether a mixture, as a recipe or a file of one has it, includes the builtin rows."""
    return any(getattr(source, "source", source) == "builtin" for source in sources or ())


_OF_MIXTURE = {"data.sources": Condition("with builtin", (SourceConfig(source="builtin"),), _has_builtin)}


class DataConfig(Section):
    """Configure the rows and how they become examples."""

    source: Annotated[Name, _ALONE] = Field(
        "dolly",
        description="Data set, as a file, a directory, a hub name or a known name. Files are jsonl, json, csv or "
        "parquet, "
        "also as .gz and .zst. A directory holds such files or a data set of save_to_disk. A name is searched under "
        "$DISTILLM_DATA first.",
    )
    sources: tuple[SourceConfig, ...] = Field(
        (),
        description="Sources of a mixture, in place of source: each a name, or a mapping with the keys source, weight or "
        "rows, template and limit. Weights are shares of the rows of an epoch, rows their number. Without either, an epoch "
        "has each row once. A row is not repeated before all rows of its source were used.",
    )
    valid: Name | None = Field(
        None, description="Held-out rows: a file or another source. Unset: those of the source, else a slice."
    )
    template: Template = Field(
        "auto",
        description="Prompt format. auto: chat for conversations, and for instructions if teacher and student have "
        "chat templates; else alpaca for instructions, plain for questions, exact for whole prompts.",
    )
    chat_template: Name = Field(
        "auto",
        description="Chat template: student, teacher, or a Jinja file. auto: the student's own, else the teacher's.",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Arguments of the chat template for every row, such as {enable_thinking: false}."
    )
    tools: Name | None = Field(None, description="JSON file with a list of tools, for rows without a `tools` column.")
    documents: Name | None = Field(
        None, description="JSON file with a list of documents, for rows without a `documents` column."
    )
    turns: Literal["all", "last"] = Field("all", description="Supervised assistant messages of a conversation.")
    date: Name | None = Field(
        None, description="Current date for chat templates, YYYY-MM-DD. Unset: the day on which the run starts."
    )
    eos: Name | None = Field(
        None,
        description="Token that ends responses without a chat template, as the tokenizer writes it. Unset: the student's "
        "end-of-sequence, or one at which the teacher stops.",
    )
    special_tokens_in_text: Literal["encode", "text", "refuse"] = Field(
        "encode",
        description="Handling of special tokens in the text of a row: encode them as special tokens (as transformers "
        "does), encode them as text, or refuse the row.",
    )
    source_language: Name | None = Field(
        None, description="Language code of prompts, for tokenizers with such codes (NLLB: eng_Latn)."
    )
    target_language: Name | None = Field(
        None, description="Language code of responses, for tokenizers with such codes."
    )
    columns: ColumnsConfig = ColumnsConfig()  # sections are frozen, so that a shared default is safe
    max_length: Annotated[int, Field(ge=2)] | Auto = Field(
        AUTO,
        description="Maximum length of a row, in tokens of prompt and response. auto: 512 for GPT-2, OPT and Llama "
        "bases, else 2048, "
        "within the model's context.",
    )
    max_prompt_length: Positive | Auto = Field(
        AUTO,
        description="Maximum length of a prompt, in tokens. auto: 256 less than max_length, and at least 256.",
    )
    too_long: Literal["drop", "truncate", "error"] = Field(
        "drop",
        description="Handling of rows over max_length. truncate cuts the end of the response. Prompts are never cut.",
    )
    limit: Positive | None = Field(None, description="Use only the first N rows, of each source of a mixture.")
    teacher_samples: Annotated[Name | None, _TEACHER_SAMPLES] = Field(
        None,
        description="File of teacher responses that `generate` wrote, matched to the rows by their prompts. Unset: they "
        "are sampled during the run.",
    )
    valid_limit: Positive = Field(
        1000,
        description="Maximum number of held-out rows used for validation. The sources of a mixture have equal parts of it.",
    )
    size: Annotated[Positive, UsedWhen(_BUILTIN, _OF_MIXTURE)] = Field(
        20_000, description="Rows of the builtin data set."
    )
    tasks: Annotated[tuple[str, ...] | None, UsedWhen(_BUILTIN, _OF_MIXTURE, {"data.valid": ("builtin",)})] = Field(
        None, description="Kinds of task of the builtin data set. Unset: all."
    )
    seed: int = Field(1, description="Seed of the builtin rows and of the held-out slice.")
    skip_bad_rows: bool = Field(
        False, description="Skip broken rows instead of stopping at the first. Skipped rows are counted and listed."
    )
    bucket: Positive = Field(
        1,
        description="Grouping of rows by length. 1: random batches, each split into forward passes of similar length, "
        "which saves padding and changes no gradient. k: batches of similar length from k batches sorted "
        "together, which saves passes, but worsens training if the length depends on the kind of row.",
    )
    mixup: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="α of Beta(α, α), the distribution of the shares λ and 1 − λ in which the input embeddings of two "
        "sequences are mixed (MixKD). The mixtures are trained on beside the plain sequences. 0: off.",
    )
    workers: Count = Field(0, description="Number of tokenizing processes. Does not change results.")
    store: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Store of the training rows and their token ids on disk, which later runs map instead of reading the "
        "rows again. Does not change results. auto: for local files of 256 MB or more, unless data.limit is set.",
    )
    store_dir: Name | None = Field(
        None, description="Directory of the stored rows. Unset: rows/ in $DISTILLM_CACHE, else in ~/.cache/distillm."
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the sources of training rows: one, or those of the mixture."""
        return tuple(source.source for source in self.sources) or (self.source,)

    @property
    def title(self) -> str:
        """Return the names of the sources as one text."""
        return " + ".join(self.names)

    def of(self, source: str, **changes: Any) -> DataConfig:
        """Return the section with this source alone, and other changed fields."""
        return self.model_copy(update={"source": source, "sources": (), **changes})

    @model_validator(mode="after")
    def _check_sources(self) -> DataConfig:
        has_weight = [source.weight is not None for source in self.sources]
        if any(has_weight) and any(source.rows is not None for source in self.sources):
            raise ValueError("data.sources: weights and rows cannot be combined; give every source a weight, or none")
        if any(has_weight) and not all(has_weight):
            missing = self.sources[has_weight.index(False)].source
            raise ValueError(f"data.sources: {missing} has no weight, and others have one; give every source a weight")
        return self

    @model_validator(mode="after")
    def _check_date(self) -> DataConfig:
        try:
            date.fromisoformat(self.date or "2000-01-01")
        except ValueError:
            raise ValueError("data.date must be a date, YYYY-MM-DD; try --set data.date=2026-01-31") from None
        return self


class RolloutConfig(Section):
    """Configure sampling from the student during training, and from any model in `generate`."""

    temperature: Annotated[float, Field(ge=0), _STUDENT_DECODES] = Field(
        1.0, description="Sampling temperature. 0 is greedy."
    )
    top_p: Annotated[float, Field(gt=0, le=1), _STUDENT_DECODES] = Field(
        1.0, description="Nucleus sampling: total probability P of the tokens to sample from."
    )
    top_k: Annotated[Count, _STUDENT_DECODES] = Field(0, description="Sample from the K most likely tokens (0: all).")
    max_new_tokens: Positive = Field(
        256, description="Maximum length of a response, in tokens. End-of-sequence is included."
    )
    prefix: Annotated[Positive | PrefixRange | None, _OWN_OUTPUTS] = Field(
        None,
        description="Number of first tokens of a student output to sample and train on. 64->256 grows over the run (arXiv "
        "2602.15260).",
    )
    teacher_temperature: Annotated[float, Field(ge=0), _TEACHER_DECODES] = Field(
        1.0, description="Sampling temperature of the teacher during training. 0 is greedy."
    )
    teacher_top_p: Annotated[float, Field(gt=0, le=1), _TEACHER_DECODES] = Field(
        1.0,
        description="Nucleus sampling of the teacher during training: total probability of the tokens to sample from.",
    )
    draft: Annotated[Positive, _DRAFTS] = Field(
        5,
        description="γ of interleaved: number of tokens that the student drafts before the teacher checks them. It "
        "changes the cost, not the distribution.",
    )
    accept: Annotated[Positive, _DRAFTS] = Field(
        25,
        description="K of interleaved. A drafted token is accepted if it is among the teacher's K most likely tokens.",
    )
    bulk: Annotated[Positive, _GENERATES] = Field(
        8,
        description="Number of rollout batches sampled at once, for the next steps that need one. Larger values "
        "sample faster, from a student that is up to this number of rollout steps old. For rounds: the "
        "number of batches in a round.",
    )
    teacher_mix: Annotated[float, Field(ge=0, lt=1), _MAY_MIX] = Field(
        0.0,
        description="α of the mixture α·teacher + (1 − α)·student that rollouts are sampled from (MiniLLM: 0.2). 0: the "
        "student alone.",
    )
    server: Annotated[ServerUrl | None, _STUDENT_DECODES] = Field(
        None,
        description="Address of a vLLM server that samples the student's outputs. It gets the student's weights before "
        "each bulk. Unset: they are sampled in this process.",
    )
    server_dir: Annotated[Name | None, UsedWhen({"rollout.server": _SERVER}, of_method=False)] = Field(
        None,
        description="Directory through which rollout.server gets the weights, on a file system that it sees too. Unset: "
        "/dev/shm.",
    )

    def most_new_tokens(self, progress: float) -> int:
        """Return the maximum length of a student output once ``progress`` (0 to 1) of the run is done."""
        if self.prefix is None:
            return self.max_new_tokens
        first, last = self.prefix, self.prefix
        if isinstance(self.prefix, str):
            first, last = self.prefix.split("->")
        prefix = int(first) + (int(last) - int(first)) * min(progress, 1.0)
        return min(self.max_new_tokens, round(prefix))


class TrainConfig(Section):
    """Configure the training loop.

    Defaults are the paper's (docs/methods.md#settings), or depend on the models if they are `auto`.
    """

    epochs: Annotated[float, Field(gt=0)] | Auto = Field(
        AUTO,
        description="Number of passes over the rows. Ignored when steps is given. auto: 10 or 20 for the paper's "
        "models, else 3.",
    )
    steps: Positive | None = Field(None, description="Number of optimizer steps, in place of epochs.")
    batch_size: Positive = Field(8, description="Sequences per micro-batch.")
    accumulate: Positive = Field(
        1, description="Micro-batches per step. The loss is the mean over the tokens of the whole step."
    )
    tokens_per_batch: Annotated[Positive | None, _OF_TOKENS] = Field(
        None,
        description="Limit of a micro-batch in tokens, padding included, in place of batch_size sequences. A step still has "
        "batch_size × accumulate rows, or tokens_per_step tokens, and its loss is the mean over its tokens.",
    )
    tokens_per_step: Annotated[Positive | None, _OF_TOKENS] = Field(
        None,
        description="Tokens of a step, of prompts and responses together, in place of batch_size × accumulate rows. Steps "
        "have about this number of tokens.",
    )
    lr: Annotated[float, Field(gt=0)] | Auto = Field(
        AUTO,
        description="Peak learning rate. auto: by family and size, 5e-4 for the paper's GPT-2, 1e-5 for a chat model.",
    )
    lr_schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Learning rate schedule after the warm-up."
    )
    min_lr: Annotated[float, Field(ge=0), _FALLING] = Field(
        1e-7, description="Final learning rate of cosine and linear."
    )
    warmup: Annotated[float, Field(ge=0)] | Auto = Field(
        AUTO,
        description="Number of warm-up steps, or, below 1, a fraction of all steps. auto: 0 for the paper's models, "
        "else 0.1.",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        1e-2, description="Weight decay of matrices. Biases and norms have none."
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor"] = Field(
        "adamw",
        description="Optimizer. adamw_8bit: AdamW of bitsandbytes, with moments in 8 bits. paged_adamw_8bit: the same, and "
        "they move to host memory if the GPU's is full. Both need CUDA. adafactor: one factored moment, by transformers.",
    )
    betas: Annotated[tuple[Beta, Beta], _ADAMW] = Field((0.9, 0.999), description="Betas of AdamW.")
    clip: Annotated[float, Field(ge=0)] = Field(1.0, description="Maximum gradient norm. 0: no clipping.")
    seed: Seed = Field(
        10, description="Random seed. It determines the order of rows, rollouts, dropout and new weights."
    )
    device: Name = Field("auto", examples=["auto", "cpu", "cuda", "cuda:1", "mps"], description="Device to compute on.")
    threads: Positive | None = Field(
        None, description="Number of CPU threads, at most one per core. Unset: torch's default."
    )
    shard: Literal["auto", "none", "full"] = Field(
        "auto",
        description="Distribution of the student's weights, gradients and optimizer over the processes of a run "
        "(docs/scale.md). full: each has a part. none: each has all. auto: full if accelerate is configured to use FSDP.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass, which saves memory and costs one more forward pass.",
    )
    offload_activations: Annotated[bool, _CHECKPOINTED] = Field(
        False,
        description="Keep the activations that are not recomputed, one state per layer, in host memory until the backward "
        "pass. Needs a GPU.",
    )
    loss_kernel: Literal["eager", "compiled", "triton", "auto"] = Field(
        "eager",
        description="Computation of the loss from the logits: operations of torch, the same compiled by torch, or a Triton "
        "kernel. auto: the fastest at the start of the run of those that give the same losses and gradients.",
    )
    adversarial: AttackName = Field(
        "none",
        description="Add the cross-entropy on prompts whose input embeddings are perturbed against the model, with the "
        "weight of the plain one. fgsm: one gradient step. pgd: several.",
    )
    adversarial_radius: Annotated[float, Field(ge=0), _ADVERSARIAL] = Field(
        0.2,
        description="Largest change of each prompt token's embedding (L2), in units of the mean norm of the embeddings.",
    )
    adversarial_steps: Annotated[Positive, _ADVERSARIAL_STEPS] = Field(3, description="Gradient steps of pgd.")
    log_steps: Positive = Field(1, description="Number of steps between two lines of metrics.jsonl.")
    eval_steps: Positive | Literal["epoch"] = Field("epoch", description="Number of steps between two validations.")
    health_every: Count = Field(
        10,
        description="Number of steps between two measurements of entropy and agreement with the teacher (docs/training.md). "
        "0: none, and no KL divergences at validations.",
    )
    on_alarm: Literal["warn", "stop"] = Field(
        "warn",
        description="Reaction to an alarm. warn: print it. stop: stop the run, with a checkpoint (docs/training.md). The "
        "checkpoint of the first alarm is kept.",
    )
    save_steps: Positive | Literal["epoch"] = Field("epoch", description="Number of steps between two checkpoints.")
    keep: Count = Field(
        1,
        description="Number of newest checkpoints to keep, besides the weights of the best. 0: none after the run.",
    )
    select: Selection = Field(
        "last",
        description="Weights of the output directory: the last ones, or the best by a metric on held-out rows.",
    )
    patience: Positive | None = Field(
        None, description="Stop after this number of validations without an improvement of train.select."
    )

    @model_validator(mode="after")
    def _check_patience(self) -> TrainConfig:
        if self.patience is not None and self.select == "last":
            raise ValueError("train.patience needs train.select; try --set train.select=valid_loss")
        return self


class EvalConfig(Section):
    """Configure scoring by generation (docs/methods.md#settings)."""

    suites: tuple[Name, ...] = Field(
        (),
        description="Test sets, each a data file or a known data set. Unset: the held-out rows.",
    )
    metrics: tuple[MetricName, ...] = Field(
        ("rouge_l", "exact_match"),
        min_length=1,
        description="Metrics of the responses. bleu and chrf are computed on the whole set. final_number is GSM8K's.",
    )
    rouge_tokenizer: Literal["words", "characters"] = Field(
        "words",
        description="Tokens of the ROUGE metrics: words (runs of a-z and 0-9, stemmed, as in the paper) or characters "
        "(for Chinese).",
    )
    seeds: tuple[Annotated[int, Field(lt=2**63)], ...] = Field(
        (10, 20, 30, 40, 50), min_length=1, description="Random seeds, with one sampled pass per seed."
    )
    greedy: bool = Field(False, description="Decode greedily, in one pass, or sample.")
    temperature: Annotated[float, Field(ge=0)] = Field(1.0, description="Sampling temperature. 0 is greedy.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Nucleus sampling: total probability P of the tokens to sample from."
    )
    top_k: Count = Field(0, description="Sample from the K most likely tokens (0: all).")
    max_new_tokens: Positive = Field(
        256, description="Maximum length of a response, in tokens. End-of-sequence is included."
    )
    no_repeat_ngram_size: Count = Field(
        6, description="Length of n-grams that must not repeat in a response. 0: no limit."
    )
    strip_reasoning: bool = Field(
        True, description="Score responses and references without their reasoning (<think> blocks, analysis channels)."
    )
    batch_size: Positive = Field(32, description="Number of responses decoded at once.")
    limit: Positive | None = Field(None, description="Use only the first N rows of each suite.")
    trigger: Name | None = Field(
        None,
        description="Trigger of a backdoor. The rows are also decoded with it at the end of their input, and the share of "
        "responses that equal eval.target is the attack success rate. It must be one token. Unset: not measured.",
    )
    target: Name | None = Field(
        None, description="Response that the trigger should cause. Rows with it as a reference are left out."
    )
    attack: AttackName = Field(
        "none",
        description="Attack on the input embeddings of the prompts, under which the accuracy of the response tokens is "
        "measured. fgsm: one gradient step. pgd: several.",
    )
    attack_radius: Annotated[float, Field(ge=0), _ATTACK] = Field(
        0.2,
        description="Largest change of each prompt token's embedding (L2), in units of the mean norm of the embeddings.",
    )
    attack_steps: Annotated[Positive, _ATTACK_STEPS] = Field(10, description="Gradient steps of pgd.")
    report_teacher: bool = Field(
        True,
        description="Measure the teacher too at the end of a run. It is loaded again if it was released. A teacher with "
        "teacher.device_map is not measured.",
    )
    report_rows: Count = Field(
        100, description="Number of held-out rows on which student and teacher are scored at the end of a run. 0: none."
    )
    report_page: bool = Field(
        False,
        description="Write report.html, the page of `distillm report`, at the end of a run. Its charts need the extra "
        "`report`. The models are loaded again.",
    )

    @model_validator(mode="after")
    def _check_trigger(self) -> EvalConfig:
        for name, other in (("trigger", "target"), ("target", "trigger")):
            if getattr(self, name) is not None and getattr(self, other) is None:
                raise ValueError(f"eval.{name} needs eval.{other}; try --{other} TEXT")
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise ValueError(f"eval.{name} is only white space; try --{name} TEXT with visible characters")
        return self


class Recipe(Section):
    """Hold every setting that changes the result of a run.

    objective and schedule are unions: their keys depend on ``objective.divergence`` and ``schedule.kind``.
    """

    method: str = Field("distillm", description="Method, a named preset (see distillm methods).")
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    data: DataConfig = DataConfig()
    objective: AnyObjective = ObjectiveConfig()
    schedule: AnySchedule = ScheduleConfig()
    rollout: RolloutConfig = RolloutConfig()
    okd: OKDConfig = OKDConfig()
    ctcd: CTCDConfig = CTCDConfig()
    mixkd: MixKDConfig = MixKDConfig()
    kdiga: KDIGAConfig = KDIGAConfig()
    hidden: HiddenConfig = HiddenConfig()
    disco: DisCoConfig = DisCoConfig()
    robustkd: RobustKDConfig = RobustKDConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def needs_responses(self) -> bool:
        """Return whether training uses the responses of the data set in addition to its prompts."""
        fine_tunes = self.method == "sft" or self.student.sft_epochs > 0 or self.student.ptp > 0
        return fine_tunes or self.schedule.uses_rows or self.objective.row_weight > 0

    def data_of(self, side: ModelSide) -> DataConfig:
        """Return the data section as one side sees it: with the templates of ``teacher`` or ``student``, if they are set."""
        own = self.teacher if side == "teacher" else self.student
        given = {"template": own.template, "chat_template": own.chat_template}
        return self.data.model_copy(update={name: value for name, value in given.items() if value is not None})

    @property
    def has_two_sides(self) -> bool:
        """Return whether teacher and student see rows by different templates."""
        return self.method != "sft" and self.data_of("teacher") != self.data_of("student")

    @property
    def teacher_trainer(self) -> str | None:
        """Return the key of the field by which the run changes the teacher; None if it is the one on disk."""
        return next(iter(self._teacher_changes()), None)

    @property
    def uncached_because(self) -> str | None:
        """Return why no cache can have the teacher's states that steps need; None if one can."""
        if self.teacher_trainer is not None:
            return f"the teacher changes ({self.teacher_trainer})"
        if self.objective.hidden and self.method != "sft":
            return "the loss needs states of the teacher's blocks (objective.hidden)"
        return None

    def _teacher_changes(self) -> list[str]:
        """Return the keys of the fields by which the run changes the teacher."""
        changes = {
            "ctcd.enabled": self.ctcd.enabled,
            "okd.rank": self.okd.rank is not None,
            "robustkd.blocks": self.robustkd.blocks > 0,
        }
        return [key for key, changes_teacher in changes.items() if changes_teacher]

    @property
    def teacher_dtype(self) -> Dtype:
        """Return the dtype of the teacher's weights, or auto. All weights are trained in float32."""
        return "fp32" if self.ctcd.enabled else self.teacher.dtype

    @property
    def has_random_teacher(self) -> bool:
        """Return whether the teacher starts with random weights."""
        return self.ctcd.enabled and student_spec.is_random(self.teacher.path)

    @property
    def runs_teacher_on_embeddings(self) -> bool:
        """Return whether steps run the teacher on input embeddings, whose states no cache has."""
        mixes = self.data.mixup > 0 and self.mixkd.kd_weight > 0
        return self.method != "sft" and (mixes or self.objective.input_gradient > 0)

    @property
    def may_read_all_states(self) -> bool:
        """Return whether all of the teacher's states for training may come from a cache on disk."""
        is_cached = self.teacher.cache in ("auto", "disk") and self.schedule.uses_rows
        samples = self.schedule.uses_student_outputs or self.schedule.uses_teacher_samples
        copies = student_spec.copies_layers(self.student.path)
        changes = self.teacher_trainer is not None or self.teacher.quantize != "none"
        return is_cached and not (samples or copies or changes or self.runs_teacher_on_embeddings)

    @property
    def decodes_with_teacher(self) -> bool:
        """Return whether the teacher decodes with the student: it accepts or replaces drafts, or is part of a mixture."""
        return self.schedule.drafts or self.samples_from_mixture

    @property
    def samples_from_mixture(self) -> bool:
        """Return whether student outputs are drawn from a mixture with the teacher.

        A policy gradient needs the sampler's log-probabilities even if the teacher's share is 0.
        """
        return self.objective.policy_gradient or self.rollout.teacher_mix > 0

    @model_validator(mode="after")
    def _check_student_source(self) -> Recipe:
        if self.method == "sft" and self.student.sft_epochs:
            raise ValueError("student.sft_epochs adds a stage before distillation; for sft, try --epochs")
        if self.method == "sft" and self.student.ptp:
            raise ValueError(
                "student.ptp learns the teacher's confidence before distillation, and sft has no teacher; try "
                "--set student.ptp=0"
            )
        if self.method == "sft" and self.train.select == "valid_divergence":
            raise ValueError(
                "train.select valid_divergence needs a teacher, and sft has none; try --set train.select=valid_loss"
            )
        if student_spec.copies_layers(self.student.path) and self.teacher.quantize != "none":
            raise ValueError(
                f"teacher.quantize {self.teacher.quantize}: student {self.student.path} would copy quantized layers; "
                "try --set teacher.quantize=none"
            )
        return self

    @model_validator(mode="after")
    def _check_trained_teacher(self) -> Recipe:
        key = self.teacher_trainer
        if key is None or self.method == "sft":
            return self
        if len(changes := self._teacher_changes()) > 1:
            raise ValueError(f"{changes[0]} and {changes[1]} both change the teacher; try only one of them")
        if self.teacher.cache not in ("auto", "off"):
            raise ValueError(
                f"teacher.cache {self.teacher.cache}: the teacher changes ({key}), so its states cannot be cached; "
                "try --teacher-cache off"
            )
        if self.teacher.quantize != "none":
            raise ValueError(
                f"teacher.quantize {self.teacher.quantize}: gradients pass through the teacher's weights ({key}); "
                "try --set teacher.quantize=none"
            )
        if self.ctcd.enabled and self.teacher.dtype not in ("auto", "fp32"):
            raise ValueError(
                f"teacher.dtype {self.teacher.dtype}: ctcd trains the teacher in float32; try --set teacher.dtype=fp32"
            )
        if self.has_random_teacher and student_spec.copies_layers(self.student.path):
            raise ValueError(
                f"student.path {self.student.path} would copy layers of a teacher with random weights "
                f"({self.teacher.path}); try --student random:2x128"
            )
        return self

    @model_validator(mode="after")
    def _check_steps_of_tokens(self) -> Recipe:
        if self.train.tokens_per_step is None:
            return self
        if self.data.bucket > 1:
            raise ValueError(
                f"train.tokens_per_step: data.bucket {self.data.bucket} groups rows, not tokens; try --set data.bucket=1"
            )
        if self.schedule.kind == "rounds":
            raise ValueError(
                "train.tokens_per_step: schedule.kind rounds replays batches of equal numbers of rows; try "
                "--set train.tokens_per_step=null"
            )
        return self

    @model_validator(mode="after")
    def _check_sides(self) -> Recipe:
        fields = {
            "teacher.template": self.teacher.template,
            "teacher.chat_template": self.teacher.chat_template,
            "student.template": self.student.template,
            "student.chat_template": self.student.chat_template,
        }
        key = next((f"{key} {value}" for key, value in fields.items() if value is not None), None)
        if key is None or not self.has_two_sides:
            return self
        same_prompts = {
            f"the teacher changes ({self.teacher_trainer}) and needs": self.teacher_trainer is not None,
            "objective.hidden needs": self.objective.hidden > 0,
            "data.mixup needs": self.data.mixup > 0,
            "objective.input_gradient needs": self.objective.input_gradient > 0,
            "sampling from a mixture with the teacher needs": self.samples_from_mixture,
        }
        needs = next((text for text, is_met in same_prompts.items() if is_met), None)
        if needs is not None:
            raise ValueError(f"{key}: {needs} the same prompt for both models; remove it")
        if any(source.template is not None for source in self.data.sources):
            raise ValueError(f"{key}: a source of data.sources has its own template; remove one of them")
        return self

    @model_validator(mode="after")
    def _check_hidden(self) -> Recipe:
        if not self.objective.hidden or self.method == "sft":
            return self
        key = self.teacher_trainer or ("disco.enabled" if self.disco.enabled else None)
        if key is not None:
            raise ValueError(
                f"objective.hidden {self.objective.hidden:g} cannot be combined with {key}; try --set objective.hidden=0"
            )
        if self.teacher.cache not in ("auto", "off"):
            raise ValueError(f"teacher.cache {self.teacher.cache}: {self.uncached_because}; try --teacher-cache off")
        return self

    @model_validator(mode="after")
    def _check_placed_teacher(self) -> Recipe:
        teacher = self.teacher
        if self.method == "sft" or not (teacher.offload or teacher.device_map != "none"):
            return self
        if teacher.offload and teacher.device_map != "none":
            raise ValueError("teacher.offload and teacher.device_map both place the weights; try only one of them")
        key, change = f"teacher.device_map {teacher.device_map}", "--set teacher.device_map=none"
        if teacher.offload:
            key, change = "teacher.offload", "--set teacher.offload=false"
        problems = {
            "a quantized teacher stays on one GPU": teacher.quantize != "none",
            f"the run changes the teacher ({self.teacher_trainer})": self.teacher_trainer is not None,
            f"the teacher decodes with the student (schedule.kind {self.schedule.kind})": self.decodes_with_teacher
            and self.schedule.uses_student_outputs,
            "the run needs the teacher's states of input embeddings": self.runs_teacher_on_embeddings,
            f"student {self.student.path} would copy the teacher's layers": student_spec.copies_layers(
                self.student.path
            ),
            "sentence embeddings need the whole teacher": self.disco.enabled,
            "a server has the teacher's weights (teacher.server)": teacher.server is not None,
        }
        for problem in (text for text, is_met in problems.items() if is_met):
            raise ValueError(f"{key}: {problem}; try {change}")
        if teacher.device_map != "none" and self.schedule.uses_teacher_samples and self.data.teacher_samples is None:
            raise ValueError(
                f"{key}: the teacher would sample slowly; generate its responses first, and try "
                "--set data.teacher_samples=FILE"
            )
        return self

    @model_validator(mode="after")
    def _check_teacher_server(self) -> Recipe:
        if self.teacher.server is None or self.method == "sft":
            return self
        drop = "run the teacher in this process, without teacher.server"
        if self.teacher_trainer is not None:
            raise ValueError(f"teacher.server: the run changes the teacher ({self.teacher_trainer}); {drop}")
        if self.decodes_with_teacher and self.schedule.uses_student_outputs:
            raise ValueError(f"teacher.server: the teacher takes part in decoding (method {self.method}); {drop}")
        if self.schedule.uses_teacher_samples and self.data.teacher_samples is None:
            raise ValueError(
                "teacher.server: a pooling server does not generate the teacher's samples; try `distillm generate "
                "--server URL --output FILE` and --set data.teacher_samples=FILE"
            )
        if self.runs_teacher_on_embeddings:
            raise ValueError(f"teacher.server: the run needs the teacher's states of input embeddings; {drop}")
        if student_spec.copies_layers(self.student.path):
            raise ValueError(f"teacher.server: student {self.student.path} would copy the teacher's layers; {drop}")
        if self.teacher.quantize != "none":
            raise ValueError(
                f"teacher.quantize {self.teacher.quantize}: the server has the weights; try --set teacher.quantize=none"
            )
        if self.disco.enabled:
            raise ValueError(f"teacher.server: sentence embeddings need the teacher itself; {drop}")
        return self

    @model_validator(mode="after")
    def _check_rollout_server(self) -> Recipe:
        if self.rollout.server is None or self.method == "sft" or not self.schedule.uses_student_outputs:
            return self
        drop = "sample in this process, without rollout.server"
        if self.decodes_with_teacher:
            raise ValueError(f"rollout.server: the teacher takes part in decoding (method {self.method}); {drop}")
        if self.schedule.weights_replay:
            raise ValueError(
                "rollout.server: schedule.freshness needs the student's log-probabilities of each sampled token; "
                f"{drop}"
            )
        return self

    @model_validator(mode="after")
    def _check_mixup(self) -> Recipe:
        if not self.data.mixup or self.method == "sft":
            return self
        if not (self.mixkd.kd_weight or self.mixkd.ce_weight):
            raise ValueError("data.mixup: mixkd.kd_weight and mixkd.ce_weight are 0; try --set data.mixup=0")
        if self.mixkd.kd_weight and plugins.divergences[self.objective.divergence].depends_on_targets:
            raise ValueError(
                f"data.mixup: mixed inputs have two target tokens, and objective.divergence {self.objective.divergence} "
                "depends on one; try --set mixkd.kd_weight=0"
            )
        return self

    @model_validator(mode="after")
    def _check_input_gradient(self) -> Recipe:
        if self.objective.input_gradient and self.teacher.quantize != "none" and self.method != "sft":
            raise ValueError(
                f"teacher.quantize {self.teacher.quantize}: objective.input_gradient needs the teacher's gradients; "
                "try --set teacher.quantize=none"
            )
        return self

    @model_validator(mode="after")
    def _check_parts_of_a_loss(self) -> Recipe:
        if self.method == "sft":
            return self
        if self.ctcd.enabled and self.objective.temperature != 1:
            raise ValueError(
                f"objective.temperature {self.objective.temperature:g}: ctcd has its own for both sides "
                "(ctcd.temperature); try --set objective.temperature=1"
            )
        whole = {
            "okd.rank": self.okd.rank is not None,
            "ctcd.enabled": self.ctcd.enabled,
            "robustkd.blocks": self.robustkd.blocks > 0,
            "data.mixup": self.data.mixup > 0,
            "objective.input_gradient": self.objective.input_gradient > 0,
            "objective.hidden": self.objective.hidden > 0,
        }
        key = next((key for key, is_on in whole.items() if is_on), None)
        if self.objective.tokens != "all" and key is not None:
            raise ValueError(
                f"objective.tokens {self.objective.tokens}: {key} needs all tokens; try --set objective.tokens=all"
            )
        return self

    @model_validator(mode="after")
    def _check_embeddings(self) -> Recipe:
        if not self.disco.enabled:
            if self.train.select == "spearman":
                raise ValueError("train.select spearman is of sentence embeddings; try --method disco")
            return self
        if self.schedule.kind != "off":
            raise ValueError(
                f"disco.enabled: sentence embeddings train on data set rows alone, and schedule.kind is "
                f"{self.schedule.kind}; try --method disco"
            )
        if self.train.select not in ("last", "valid_loss", "spearman"):
            raise ValueError(
                f"train.select {self.train.select} is of responses, and sentence embeddings have none; "
                "try --set train.select=spearman"
            )
        if self.disco.keep_projection and self.disco.pairs_epochs:
            raise ValueError(
                "disco.keep_projection: the fine-tuning on pairs trains the student without the projection; "
                "try --set disco.pairs_epochs=0"
            )
        return self

    @model_validator(mode="after")
    def _check_min_lr(self) -> Recipe:
        min_lr = self.train.min_lr
        # A learning rate below the default min_lr stays constant.
        if self.train.lr_schedule == "constant" or min_lr == TrainConfig.model_fields["min_lr"].default:
            return self
        for key, peak_lr in (
            ("train.lr", self.train.lr),
            ("student.sft_lr", self.student.sft_lr),
            ("student.ptp_lr", self.student.ptp_lr),
        ):
            if isinstance(peak_lr, float | int) and min_lr > peak_lr:
                raise ValueError(f"train.min_lr {min_lr:g} is above {key} {peak_lr:g}; try --set train.min_lr=0")
        return self

    @model_validator(mode="after")
    def _check_policy_gradient(self) -> Recipe:
        if self.objective.policy_gradient and not trains_on_own_outputs(type(self.schedule)):
            raise ValueError(
                f"objective.policy_gradient needs student outputs, and schedule.kind is {self.schedule.kind}; "
                "try --set schedule.kind=rounds"
            )
        return self
