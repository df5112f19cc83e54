"""The flags with a name of their own, and the recipe fields they set. Light on purpose: ``--help`` reads it."""

from __future__ import annotations

from typing import Any, NamedTuple


class Flag(NamedTuple):
    """A flag as it was typed: its name (``--alpha``) for messages, and its value."""

    name: str
    value: Any


class Shortcut(NamedTuple):
    """A flag, the dotted keys it sets, and the verbs that have it."""

    flag: str
    keys: tuple[str, ...]
    verbs: tuple[str, ...] = ("sft", "distill", "plan")


_DISTILL = ("distill", "plan")
_EVERY = ("sft", "generate", "distill", "eval", "plan")

# Python parameter name → flag and fields. Whatever is missing here is reached with --set section.key=value.
SHORTCUTS: dict[str, Shortcut] = {
    "teacher": Shortcut("--teacher", ("teacher.path",), _DISTILL),
    "student": Shortcut("--student", ("student.path",), _DISTILL),
    "model": Shortcut("--model", ("student.path",), ("sft",)),
    "lora": Shortcut("--lora", ("student.lora.r",)),
    "tokenizer": Shortcut("--tokenizer", ("student.tokenizer",)),
    "data": Shortcut("--data", ("data.source",)),
    "max_length": Shortcut("--max-length", ("data.max_length",)),
    "skip_bad_rows": Shortcut("--skip-bad-rows", ("data.skip_bad_rows",), _EVERY),
    "method": Shortcut("--method", ("method",), _DISTILL),
    "divergence": Shortcut("--divergence", ("objective.divergence",), _DISTILL),
    "alpha": Shortcut("--alpha", ("objective.alpha",), _DISTILL),
    "schedule": Shortcut("--schedule", ("schedule.kind",), _DISTILL),
    "teacher_cache": Shortcut("--teacher-cache", ("teacher.cache",), _DISTILL),
    "lr": Shortcut("--lr", ("train.lr",)),
    "batch_size": Shortcut("--batch-size", ("train.batch_size",)),
    "epochs": Shortcut("--epochs", ("train.epochs",)),
    "steps": Shortcut("--steps", ("train.steps",)),
    "seed": Shortcut("--seed", ("train.seed",)),
    "dtype": Shortcut("--dtype", ("student.dtype", "teacher.dtype"), _EVERY),
    "device": Shortcut("--device", ("train.device",), _EVERY),
}


def flag_of(key: str, verb: str) -> str | None:
    """The flag of ``verb`` that sets exactly this dotted key, if there is one."""
    for shortcut in SHORTCUTS.values():
        if key in shortcut.keys and verb in shortcut.verbs:
            return shortcut.flag
    return None
