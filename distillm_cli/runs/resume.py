"""Going on with a run: its newest checkpoint, if it is this recipe's, and the student's weights in it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from distillm_cli.config.explain import leaves
from distillm_cli.config.load import Resolved, load_resolved, settled
from distillm_cli.config.ownership import ValueOf, is_read, value_of
from distillm_cli.config.schema import Recipe, TrainConfig
from distillm_cli.config.shaping import shaping
from distillm_cli.errors import START_OVER, CheckpointError, RecipeError, out_of_memory
from distillm_cli.models.tokenizer_files import quiet
from distillm_cli.runs import output_dir
from distillm_cli.runs.prepare import FROZEN, frozen_digest, total_steps
from distillm_cli.training.checkpoint import Checkpoint, latest, read_checkpoint
from distillm_cli.training.events import Listener, Warned
from distillm_cli.training.progress import TrainerState

if TYPE_CHECKING:
    from distillm_cli.models.backbone import Backbone


# Values that a run settles when it starts, and that its resume takes over where they are open again.
SETTLED = {"data.template": "auto", "data.date": None}


def as_recorded(resolved: Resolved, output: Path) -> Resolved:
    """Return the recipe with the values that the run in ``output`` settled when it started."""
    try:
        before = load_resolved(output / output_dir.RECIPE)
    except RecipeError:  # a damaged or missing one: whatever differs shows in the checkpoint's own
        return resolved
    found = {}
    for key, is_open in SETTLED.items():
        if value_of(resolved.recipe, key) == is_open and (value := value_of(before, key)) != is_open:
            found[key] = (value, "the run that is resumed")
    return settled(resolved, found)


# Settings that a resume may change, beside those that shape no step: how often it saves, what it exports, and how long it
# runs, which ``check_length`` looks at.
_FREE = ("train.save_steps", "student.save_dtype", "train.steps", "train.epochs")


def checkpoint_of(output: Path, recipe, *, started: bool = True, movable: Collection[str] = ()) -> Checkpoint | None:
    """The newest checkpoint, if it is this recipe's. started: there must be one.

    movable: dotted keys of inputs that are known to be the same ones, wherever they are now.
    """
    checkpoint = latest(output / output_dir.CHECKPOINTS)
    if checkpoint is None and not started:
        return None
    if checkpoint is None:
        raise _no_checkpoint(output)
    if absent := [part for part in ("progress", "recipe") if not isinstance(checkpoint.state.get(part), dict)]:
        what = f"checkpoint unreadable: its state.json says no {absent[0]}"
        raise CheckpointError(what, where=str(checkpoint.path), hint=START_OVER)
    with as_checkpoint_error(checkpoint):
        TrainerState(**checkpoint.state["progress"])
        int(checkpoint.state["progress"]["step"])
    # A field that came later had its default then.
    then, now = (
        json.loads(json.dumps(fields)) for fields in (shaping(Recipe()) | checkpoint.state["recipe"], shaping(recipe))
    )
    changed = [
        key
        for key in sorted(then.keys() | now.keys())
        if not _same(then.get(key), now.get(key)) and key not in (*_FREE, *movable) and _counts(key, then, now.get)
    ]
    if changed:
        key, more = changed[0], f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise CheckpointError(
            f"the checkpoint is of another recipe: {key} was {then.get(key)!r}, now {now.get(key)!r}{more}",
            where=str(checkpoint.path),
            hint="resume with the settings it was started with, or choose another --output",
        )
    return checkpoint


def check_inputs(checkpoint: Checkpoint, inputs: Mapping[str, str]) -> None:
    """Raises CheckpointError where what lies under the recipe's names is not what the run was begun with.

    inputs: by name, what tells it from others; the student's as it was loaded, before the checkpoint's weights.
    """
    for name, known in checkpoint.state.get("inputs", {}).items():
        if name in inputs and inputs[name] != known:
            raise CheckpointError(
                f"the {name} {'have' if name.endswith('s') else 'has'} changed since the run was started",
                where=str(checkpoint.path),
                hint="put back what it was started with, or choose another --output",
            )


@contextmanager
def as_checkpoint_error(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn every failure to read a whole checkpoint into CheckpointError: another version wrote it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OSError) as error:
        if out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"the checkpoint is whole, but not as this version writes them ({type(error).__name__}: {said})",
            where=str(checkpoint.path),
            hint=f"resume with the version that wrote it, or {START_OVER}",
        ) from error


def check_length(checkpoint: Checkpoint, steps: int, steps_per_epoch: int, listener: Listener) -> None:
    """Warn of a resume that runs for more steps than before. steps: of the run now. Raises CheckpointError for fewer."""
    with as_checkpoint_error(checkpoint):
        then, reached = checkpoint.state["recipe"], checkpoint.state["progress"]["step"]
        known = {key: then[f"train.{key}"] for key in ("steps", "epochs") if f"train.{key}" in then}
        before = total_steps(TrainConfig.model_validate(known), steps_per_epoch)
    if steps < before:
        raise CheckpointError(
            f"the run was started with {before:,} steps, now it has {steps:,}",
            where=str(checkpoint.path),
            hint="resume with as many or more, or choose another --output",
        )
    if steps > before:
        listener(
            Warned(
                f"the run is longer than it was: {steps:,} steps instead of {before:,}. The learning rate, and "
                "what else depends on the share of the run that is done, follows the longer run from step "
                f"{reached + 1:,} on, so the result differs from that of an uninterrupted run"
            )
        )


def _same(then: object, now: object) -> bool:
    """Equal, or two spellings of one place."""
    if then == now or not (isinstance(then, str) and isinstance(now, str)):
        return then == now
    left, right = (Path(text).expanduser() for text in (then, now))
    return left.exists() and right.exists() and left.samefile(right)


def _counts(key: str, then: Mapping[str, object], now: ValueOf) -> bool:
    """Whether the steps depend on the field: one that this run never reads may have been written down all the same, and
    earlier versions did not write down how answers were scored."""
    if key.startswith("eval."):
        return key in then
    return key not in leaves() or is_read(key, now)


def _no_checkpoint(output: Path) -> CheckpointError:
    return CheckpointError(f"no checkpoint in {output / output_dir.CHECKPOINTS}", hint=START_OVER)


def best_of(output: Path) -> Checkpoint:
    """The checkpoint whose weights a finished run kept."""
    last = latest(output / output_dir.CHECKPOINTS)
    if last is None:
        raise _no_checkpoint(output)
    best = last.state["progress"].get("best_step")
    return last if best is None else read_checkpoint(last.path.with_name(f"step-{best:06d}"))


def load_student(student: Backbone, checkpoint: Checkpoint) -> None:
    """The weights as they were. Raises CheckpointError where the model under an adapter has changed since."""
    with as_checkpoint_error(checkpoint):
        student.load_state(weights_in(student, checkpoint))


def weights_in(student: Backbone, checkpoint: Checkpoint) -> Mapping[str, torch.Tensor]:
    """What training changes of the student, as it was when the checkpoint was written. Raises CheckpointError."""
    if student.adapter is None:
        with quiet():
            saved = type(student.model).from_pretrained(checkpoint.path, dtype=torch.float32, local_files_only=True)
        return saved.state_dict()
    frozen = checkpoint.path / FROZEN
    if not frozen.is_file() or frozen.read_text(encoding="utf-8") != frozen_digest(student):
        raise CheckpointError(
            "the model under the adapter is not the one that this run started with",
            where=str(checkpoint.path),
            hint=f"put back the weights of {student.adapter.config.base_model_name_or_path}, or start anew",
        )
    return student.adapter.read(checkpoint.path)
