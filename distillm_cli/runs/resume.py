"""Resume a run: find its newest checkpoint, check that it belongs to the recipe, restore the student's weights."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from distillm_cli.config.derived import fixed_values
from distillm_cli.config.explain import leaves
from distillm_cli.config.field_usage import ValueOf, is_used, value_of
from distillm_cli.config.load import Resolved, load_resolved, with_resolved_values
from distillm_cli.config.schema import Recipe, TrainConfig
from distillm_cli.errors import START_OVER, CheckpointError, RecipeError, out_of_memory
from distillm_cli.models.tokenizer_files import quiet
from distillm_cli.runs import output_dir
from distillm_cli.runs.prepare import FROZEN, frozen_digest, total_steps
from distillm_cli.training.checkpoint import Checkpoint, latest, read_checkpoint
from distillm_cli.training.events import Listener, Warned
from distillm_cli.training.state import TrainerState

if TYPE_CHECKING:
    from distillm_cli.models.backbone import Backbone


# Fields with a value that the run chooses at its start and a resume reuses, with their values when not set.
_CHOSEN_AT_START = {"data.template": "auto", "data.date": None}


def with_recorded_values(resolved: Resolved, output: Path) -> Resolved:
    """Return the recipe with the values that the run in ``output`` chose when it started."""
    try:
        recorded = load_resolved(output / output_dir.RECIPE)
    except RecipeError:  # damaged or missing: differences are found by the checkpoint's own copy
        return resolved
    chosen = {}
    for key, open_value in _CHOSEN_AT_START.items():
        value = value_of(recorded, key)
        if value_of(resolved.recipe, key) == open_value and value != open_value:
            chosen[key] = (value, "the run that is resumed")
    return with_resolved_values(resolved, chosen)


# Settings that a resume may change, apart from those that no step depends on: how often it saves, what it exports, and
# its number of steps, which ``check_total_steps`` checks.
_MAY_CHANGE = ("train.save_steps", "student.save_dtype", "train.steps", "train.epochs", "train.shard")


def find_checkpoint(
    output: Path, recipe: Recipe, *, is_required: bool = True, moved_inputs: Collection[str] = ()
) -> Checkpoint | None:
    """Return the newest checkpoint of a run; None without one, if none is required.

    moved_inputs: dotted keys of inputs that are unchanged but whose paths may differ. Raises CheckpointError
    for a checkpoint of another recipe or an unreadable one.
    """
    checkpoint = latest(output / output_dir.CHECKPOINTS)
    if checkpoint is None and not is_required:
        return None
    if checkpoint is None:
        raise _no_checkpoint(output)
    _check_readable(checkpoint)
    changed = _changed_settings(checkpoint, recipe, moved_inputs)
    if changed:
        key, then, now = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise CheckpointError(
            "checkpoint.changed",
            f"the checkpoint has another recipe: {key} was {then!r}, now {now!r}{more}",
            where=str(checkpoint.path),
            hint="resume with the original settings, or choose another --output",
        )
    return checkpoint


def _check_readable(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a part of the checkpoint's state is missing, or another version wrote it."""
    if absent := [part for part in ("progress", "recipe") if not isinstance(checkpoint.state.get(part), dict)]:
        what = f"checkpoint unreadable: its state.json has no {absent[0]}"
        raise CheckpointError("checkpoint.damaged", what, where=str(checkpoint.path), hint=START_OVER)
    with as_checkpoint_error(checkpoint):
        TrainerState(**checkpoint.state["progress"])
        int(checkpoint.state["progress"]["step"])


def _changed_settings(
    checkpoint: Checkpoint, recipe: Recipe, moved_inputs: Collection[str]
) -> list[tuple[str, object, object]]:
    """Return the settings that shape steps and differ from the checkpoint's: key, value then, value now."""
    now = json.loads(json.dumps(fixed_values(recipe)))  # in the form of the checkpoint's values
    recorded = checkpoint.state["recipe"]
    defaults = {key: json.loads(json.dumps(leaf.default, default=str)) for key, leaf in leaves().items()}
    then = {key: defaults.get(key) for key in now} | recorded  # a field that was added later had its default
    return [
        (key, then.get(key), now.get(key))
        for key in sorted(then.keys() | now.keys())
        if key not in (*_MAY_CHANGE, *moved_inputs)
        and not _is_same_value(then.get(key), now.get(key))
        and _affects_steps(key, now.get)
    ]


def check_same_inputs(checkpoint: Checkpoint, inputs: Mapping[str, str]) -> None:
    """Raise CheckpointError if models or rows differ from those at the start of the run.

    inputs: fingerprints by name; the student's is of its initial weights, before the checkpoint's are loaded.
    """
    check_unchanged(checkpoint.state.get("inputs", {}), inputs, checkpoint.path)


def check_unchanged(before: Mapping[str, str], inputs: Mapping[str, str], where: Path) -> None:
    """Raise CheckpointError if a fingerprint differs from the one before. where: of the run, for the message."""
    for name, known in before.items():
        if name in inputs and inputs[name] != known:
            raise CheckpointError(
                "checkpoint.changed",
                f"the {name} {'have' if name.endswith('s') else 'has'} changed since the run was started",
                where=str(where),
                hint="restore the original, or choose another --output",
            )


@contextmanager
def as_checkpoint_error(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn every failure to read a complete checkpoint, which another version wrote, into CheckpointError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OSError) as error:
        if out_of_memory(error):
            raise
        message = " ".join(str(error).split())[:200]
        raise CheckpointError(
            "checkpoint.other_version",
            f"the checkpoint is complete, but from an incompatible version ({type(error).__name__}: {message})",
            where=str(checkpoint.path),
            hint=f"resume with the version that wrote it, or {START_OVER}",
        ) from error


def check_total_steps(checkpoint: Checkpoint, steps: int, steps_per_epoch: int, listener: Listener) -> None:
    """Warn of a resume that runs for more steps than before. steps: of the run now. Raises CheckpointError for fewer."""
    with as_checkpoint_error(checkpoint):
        recorded = checkpoint.state["recipe"]
        step = checkpoint.state["progress"]["step"]
        length = {key: recorded[f"train.{key}"] for key in ("steps", "epochs") if f"train.{key}" in recorded}
        earlier_steps = total_steps(TrainConfig.model_validate(length), steps_per_epoch)
    if steps < earlier_steps:
        raise CheckpointError(
            "checkpoint.changed",
            f"the run was started with {earlier_steps:,} steps, now it has {steps:,}",
            where=str(checkpoint.path),
            hint="resume with at least as many steps, or choose another --output",
        )
    if steps > earlier_steps:
        listener(
            Warned(
                f"the run is longer than before: {steps:,} steps instead of {earlier_steps:,}. The learning rate and "
                f"other values that depend on progress follow the longer run from step {step + 1:,} on, so the "
                "result differs from that of an uninterrupted run"
            )
        )


def _is_same_value(then: object, now: object) -> bool:
    """Return whether two values are equal, or refer to the same path."""
    if then == now or not (isinstance(then, str) and isinstance(now, str)):
        return then == now
    left, right = (Path(text).expanduser() for text in (then, now))
    return left.exists() and right.exists() and left.samefile(right)


def _affects_steps(key: str, now: ValueOf) -> bool:
    """Return whether the steps depend on a field: checkpoints also contain fields that the run does not read."""
    return key not in leaves() or is_used(key, now)


def _no_checkpoint(output: Path) -> CheckpointError:
    return CheckpointError(
        "checkpoint.nothing_to_resume", f"no checkpoint in {output / output_dir.CHECKPOINTS}", hint=START_OVER
    )


def best_checkpoint(output: Path) -> Checkpoint:
    """Return the checkpoint whose weights a finished run published."""
    last = latest(output / output_dir.CHECKPOINTS)
    if last is None:
        raise _no_checkpoint(output)
    best = last.state["progress"].get("best_step")
    return last if best is None else read_checkpoint(last.path.with_name(f"step-{best:06d}"))


def restore_student(student: Backbone, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's weights into the student. Raises CheckpointError if an adapter's base model has changed."""
    with as_checkpoint_error(checkpoint):
        student.load_state(checkpoint_weights(student, checkpoint))


def checkpoint_weights(student: Backbone, checkpoint: Checkpoint) -> Mapping[str, torch.Tensor]:
    """Return the student's trained weights in a checkpoint. Raises CheckpointError."""
    if student.adapter is None:
        with quiet():
            saved = type(student.model).from_pretrained(checkpoint.path, dtype=torch.float32, local_files_only=True)
        return saved.state_dict()
    frozen = checkpoint.path / FROZEN
    if not frozen.is_file() or frozen.read_text(encoding="utf-8") != frozen_digest(student.adapter):
        raise CheckpointError(
            "checkpoint.changed",
            "the base model of the adapter has changed since the run started",
            where=str(checkpoint.path),
            hint=f"restore the weights of {student.adapter.config.base_model_name_or_path}, or start over",
        )
    return student.adapter.read(checkpoint.path)
