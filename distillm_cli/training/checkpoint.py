"""Write and read checkpoints: directories that appear atomically, with a manifest that shows whether they are complete.

    checkpoints/step-000200/
      config.json model.safetensors tokenizer.json …   the student, loadable with from_pretrained
      training.safetensors                             optimizer, random states, replay buffer
      state.json                                       every scalar: position, schedule, best value, recipe
      manifest.json                                    size and SHA-256 of each of the above, written last

A checkpoint is written to a staging directory, flushed to disk and renamed. A checkpoint to be removed is renamed
first. Therefore a directory with a step's name is always complete, even after the process is killed. Pickle is not
used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distillm_cli.errors import START_OVER, CheckpointError
from distillm_cli.training.distributed import world
from distillm_cli.training.events import Listener, Warned, silent
from distillm_cli.utils import manifest
from distillm_cli.utils.storage import atomic_directory, reason, remove, storing, sweep

STATE = "state.json"
TENSORS = "training.safetensors"
_NOTHING_SAVED = "nothing was saved yet: start again"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Hold a verified checkpoint. The student's weights are not read into memory; they are at ``path``.

    tensors: of the optimizer, the random states and the replay buffer. Empty after ``drop_training_state``.
    """

    path: Path
    state: dict[str, Any]
    tensors: dict[str, Tensor]


class Checkpoints:
    """Manage the checkpoints of one run, under ``root``.

    save_model: writes the student and its tokenizer into a directory. keep: number of newest checkpoints to keep, at
    least one during the run. An older one that is protected (the best, and that of the first alarm) is not removed.
    listener: receives one warning for each old checkpoint that cannot be removed.
    """

    def __init__(self, root: Path, save_model: Callable[[Path], None], *, keep: int, listener: Listener = silent):
        self.root = Path(root)
        self.save_model = save_model
        self.keep = keep
        self.listener = listener
        self._stuck: set[Path] = set()  # old checkpoints that could not be removed

    def path(self, step: int) -> Path:
        return self.root / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Return the steps with a visible checkpoint, ascending."""
        return [int(path.name[5:]) for path in visible(self.root)]

    def write(
        self,
        step: int,
        state: Mapping[str, Any],
        tensors: dict[str, Tensor],
        *,
        protect: Mapping[int, bool] | None = None,
    ) -> Path:
        """Write the checkpoint of ``step``, then remove all but the newest ``keep`` and the protected ones.

        protect: whether an older checkpoint is kept whole, by its step, and not its weights alone. Raises StorageError if
        writing fails; earlier checkpoints are then unchanged.
        """
        final = self.path(step)
        visible_before = visible(self.root)
        hint = "free disk space or choose another --output; "
        hint += f"{visible_before[-1]} is complete: continue with --resume" if visible_before else _NOTHING_SAVED
        with storing(f"cannot write checkpoint {final}", hint):
            self.root.mkdir(parents=True, exist_ok=True)
            sweep(self.root)
            self._record([final])
            with atomic_directory(final) as staged:
                self.save_model(staged)
                save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, staged / TENSORS)
                (staged / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
                set_default_modes(staged)
                files = [path for path in staged.rglob("*") if path.is_file()]
                manifest.seal_directory(staged, files, step=step)
        old = self.steps()[: -max(self.keep, 1)]
        protect = protect or {}
        for number in (number for number, is_whole in protect.items() if number in old and not is_whole):
            with storing(f"cannot write to {self.path(number)}", hint):
                drop_training_state(self.path(number))
        dropped = [self.path(number) for number in old if number not in protect and self._drop(self.path(number))]
        if dropped:
            with storing(f"cannot write to {self.root.parent}", hint):
                self._record([], removed=dropped)
        return final

    def _record(self, added: list[Path], removed: Sequence[Path] = ()) -> None:
        """List checkpoints in the manifest of the run's directory, if it has one."""
        output = self.root.parent
        if manifest.read_manifest(output) is not None:
            folder = self.root.name
            names = [f"{folder}/{path.name}" for path in added]
            manifest.record(output, names, removed=[f"{folder}/{path.name}" for path in removed])

    def _drop(self, old: Path) -> bool:
        """Remove an old checkpoint; return whether it was removed completely."""
        error = remove(old)
        if error is not None and old not in self._stuck:
            self._stuck.add(old)
            self.listener(Warned(f"cannot remove the old checkpoint {old}: {reason(error)}; it uses disk space"))
        return error is None

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint, verified; None if there is none."""
        return latest(self.root)


def set_default_modes(directory: Path) -> None:
    """Set the mode of a directory's tensor files to that of new files: safetensors makes them readable by the owner only."""
    probe = directory / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in directory.rglob("*.safetensors"):
        path.chmod(mode)


def visible(root: Path) -> list[Path]:
    """Return the checkpoints under ``root``, oldest first."""
    found = (p for p in Path(root).glob("step-*") if p.is_dir() and p.name[5:].isdigit())
    return sorted(found, key=lambda p: int(p.name[5:]))


def latest(root: Path) -> Checkpoint | None:
    """Return the newest checkpoint under ``root``, verified; None if there is none. Raises CheckpointError."""
    paths = visible(root)
    return read_checkpoint(paths[-1]) if paths else None


def read_checkpoint(path: Path) -> Checkpoint:
    """Return a checkpoint, after every file was compared with the manifest.

    Raises CheckpointError naming the damaged file.
    """
    path = Path(path)
    hint = START_OVER
    if any((other / TENSORS).exists() for other in visible(path.parent) if other.name < path.name):
        hint = f"delete {path} to resume from the checkpoint before it, or {START_OVER}"
    try:
        listed = json.loads((path / manifest.MANIFEST).read_text(encoding="utf-8"))
        if listed["format"] != manifest.MANIFEST_FORMAT:
            what = f"checkpoint format {listed['format']}, this version reads {manifest.MANIFEST_FORMAT}"
            raise CheckpointError("checkpoint.other_version", what, where=str(path), hint=hint)
        for name, sealed in listed["files"].items():
            if not (path / name).is_file():
                raise CheckpointError("checkpoint.damaged", f"checkpoint file missing: {path / name}", hint=hint)
            if manifest.seal(path / name) != sealed:
                raise CheckpointError(
                    "checkpoint.damaged", f"checkpoint file damaged: {path / name} differs from its manifest", hint=hint
                )
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        return Checkpoint(path, state, load_file(path / TENSORS) if TENSORS in listed["files"] else {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError("checkpoint.damaged", f"checkpoint unreadable: {path} ({error})", hint=hint) from error


def drop_training_state(path: Path) -> None:
    """Remove the optimizer, random states and replay buffer of a checkpoint. Its weights remain. Raises OSError."""
    if (path / TENSORS).exists():
        manifest.unseal(path, TENSORS)  # first, so that the checkpoint is whole at any time
        (path / TENSORS).unlink()


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return torch's random states of the CPU and, for a GPU, of ``device``, as tensors of a checkpoint."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states


def all_random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the random states of all processes, those of process N > 0 as ``random.N.cpu``."""
    states, *others = world().gather(lambda: random_states(device))
    for rank, found in enumerate(others, start=1):
        states |= {name.replace("random.", f"random.{rank}.", 1): state for name, state in found.items()}
    return states


def restore_random_states(tensors: dict[str, Tensor], device: torch.device, rank: int = 0) -> None:
    """Restore what ``random_states`` returned in process ``rank``. A process that did not exist keeps its own state."""
    prefix = f"random.{rank}" if rank else "random"
    if rank and f"{prefix}.cpu" not in tensors:
        return
    torch.set_rng_state(tensors[f"{prefix}.cpu"])
    if f"{prefix}.cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors[f"{prefix}.cuda"], device)
