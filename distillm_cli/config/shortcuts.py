"""List the flags that set fields of a recipe, in the order of the help.

The command line builds its options from this table, and messages name flags by it. Type, choices and default of an option
come from the field, and the help is the first sentence of the field's description. Fields without a flag are set with
``--set section.key=value``. Imports nothing heavy, because ``--help`` needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

TRAINING_VERBS = ("sft", "distill", "plan", "pilot")
DISTILLATION_VERBS = ("distill", "plan")
PAIR_VERBS = (*DISTILLATION_VERBS, "pilot")
RATE_VERBS = ("sft", "distill", "plan")  # a pilot has a grid of rates
SAMPLING_VERBS = ("generate", "eval")
ANSWERING_VERBS = (*SAMPLING_VERBS, "chat")
ALL_VERBS = (*TRAINING_VERBS, *SAMPLING_VERBS)

# Panels of a command's help.
MODELS_PANEL = "Models and data"
METHOD_PANEL = "Method"
TRAINING_PANEL = "Training"
SAMPLING_PANEL = "Sampling"


class Flag(NamedTuple):
    """Hold a flag of a command line: its name (``--alpha``) for messages, and its value."""

    name: str
    value: Any


@dataclass(frozen=True)
class FieldFlag:
    """Describe a flag that sets fields of a recipe.

    keys: the dotted keys. verbs: the commands that have it. metavar: placeholder of the value in the help, empty for a
    switch. off: for a switch, the flag that sets false.
    """

    flag: str
    keys: tuple[str, ...]
    verbs: tuple[str, ...]
    panel: str
    metavar: str = ""
    off: str | None = None

    @property
    def name(self) -> str:
        """Return the name of the command's parameter."""
        return self.flag.lstrip("-").replace("-", "_")


FIELD_FLAGS = (
    FieldFlag("--teacher", ("teacher.path",), PAIR_VERBS, MODELS_PANEL, "PATH|NAME"),
    FieldFlag("--student", ("student.path",), PAIR_VERBS, MODELS_PANEL, "PATH|NAME|SPEC"),
    FieldFlag("--model", ("student.path",), ("sft",), MODELS_PANEL, "PATH|NAME|SPEC"),
    FieldFlag("--lora", ("student.lora.r",), TRAINING_VERBS, MODELS_PANEL, "R"),
    FieldFlag("--data", ("data.source",), TRAINING_VERBS, MODELS_PANEL, "PATH|NAME"),
    FieldFlag("--suite", ("eval.suites",), ("eval",), MODELS_PANEL, "NAME|FILE"),
    FieldFlag("--metric", ("eval.metrics",), ("eval",), MODELS_PANEL, "NAME"),
    FieldFlag("--limit", ("eval.limit",), ("eval",), MODELS_PANEL, "N"),
    FieldFlag("--trigger", ("eval.trigger",), ("eval",), MODELS_PANEL, "TEXT"),
    FieldFlag("--target", ("eval.target",), ("eval",), MODELS_PANEL, "TEXT"),
    FieldFlag("--template", ("data.template",), ANSWERING_VERBS, MODELS_PANEL, "NAME"),
    FieldFlag("--tokenizer", ("student.tokenizer",), TRAINING_VERBS, MODELS_PANEL, "PATH|NAME|SPEC"),
    FieldFlag("--max-length", ("data.max_length",), TRAINING_VERBS, MODELS_PANEL, "N"),
    FieldFlag("--skip-bad-rows", ("data.skip_bad_rows",), ALL_VERBS, MODELS_PANEL),
    FieldFlag("--method", ("method",), DISTILLATION_VERBS, METHOD_PANEL, "NAME"),
    FieldFlag("--divergence", ("objective.divergence",), DISTILLATION_VERBS, METHOD_PANEL, "NAME"),
    FieldFlag("--alpha", ("objective.alpha",), DISTILLATION_VERBS, METHOD_PANEL, "A"),
    FieldFlag("--schedule", ("schedule.kind",), DISTILLATION_VERBS, METHOD_PANEL, "KIND"),
    FieldFlag("--teacher-cache", ("teacher.cache",), PAIR_VERBS, METHOD_PANEL, "WHERE"),
    FieldFlag("--teacher-server", ("teacher.server",), DISTILLATION_VERBS, METHOD_PANEL, "URL"),
    FieldFlag("--rollout-server", ("rollout.server",), DISTILLATION_VERBS, METHOD_PANEL, "URL"),
    FieldFlag("--lr", ("train.lr",), RATE_VERBS, TRAINING_PANEL, "X"),
    FieldFlag("--batch-size", ("train.batch_size",), TRAINING_VERBS, TRAINING_PANEL, "N"),
    FieldFlag("--epochs", ("train.epochs",), TRAINING_VERBS, TRAINING_PANEL, "X"),
    FieldFlag("--steps", ("train.steps",), TRAINING_VERBS, TRAINING_PANEL, "N"),
    FieldFlag("--seed", ("train.seed",), TRAINING_VERBS, TRAINING_PANEL, "N"),
    FieldFlag("--on-alarm", ("train.on_alarm",), ("sft", "distill"), TRAINING_PANEL, "ACTION"),
    FieldFlag("--keep", ("train.keep",), ("sft", "distill"), TRAINING_PANEL, "N"),
    FieldFlag("--dtype", ("student.dtype", "teacher.dtype"), TRAINING_VERBS, TRAINING_PANEL, "TYPE"),
    FieldFlag("--device", ("train.device",), TRAINING_VERBS, TRAINING_PANEL, "NAME"),
    FieldFlag("--seeds", ("eval.seeds",), ("eval",), SAMPLING_PANEL, "N,N,…"),
    FieldFlag("--greedy", ("eval.greedy",), ("eval",), SAMPLING_PANEL, off="--sampled"),
    FieldFlag("--temperature", ("eval.temperature",), ("eval",), SAMPLING_PANEL, "T"),
    FieldFlag("--temperature", ("rollout.temperature",), ("generate", "chat"), SAMPLING_PANEL, "T"),
    FieldFlag("--top-p", ("eval.top_p",), ("eval",), SAMPLING_PANEL, "P"),
    FieldFlag("--top-p", ("rollout.top_p",), ("generate", "chat"), SAMPLING_PANEL, "P"),
    FieldFlag("--top-k", ("rollout.top_k",), ("generate", "chat"), SAMPLING_PANEL, "K"),
    FieldFlag("--max-new-tokens", ("eval.max_new_tokens",), ("eval",), SAMPLING_PANEL, "N"),
    FieldFlag("--max-new-tokens", ("rollout.max_new_tokens",), ("generate", "chat"), SAMPLING_PANEL, "N"),
    FieldFlag("--seed", ("train.seed",), ("generate", "chat"), SAMPLING_PANEL, "N"),
    FieldFlag("--attack", ("eval.attack",), ("eval",), SAMPLING_PANEL, "NAME"),
    FieldFlag("--attack-radius", ("eval.attack_radius",), ("eval",), SAMPLING_PANEL, "R"),
    FieldFlag("--attack-steps", ("eval.attack_steps",), ("eval",), SAMPLING_PANEL, "N"),
    FieldFlag("--batch-size", ("eval.batch_size",), SAMPLING_VERBS, SAMPLING_PANEL, "N"),
    FieldFlag("--dtype", ("student.dtype", "teacher.dtype"), ANSWERING_VERBS, SAMPLING_PANEL, "TYPE"),
    FieldFlag("--device", ("train.device",), ANSWERING_VERBS, SAMPLING_PANEL, "NAME"),
)


def field_flags(verb: str) -> list[FieldFlag]:
    """Return the flags of a command that set fields, in the order of its help."""
    return [entry for entry in FIELD_FLAGS if verb in entry.verbs]


def flag_of(key: str, verb: str) -> str | None:
    """Return the flag of a command that sets this dotted key, None if there is none."""
    return next((entry.flag for entry in field_flags(verb) if key in entry.keys), None)
