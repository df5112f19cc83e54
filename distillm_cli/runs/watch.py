"""Read the state of a run from its output directory while it runs, or afterwards: ``distillm watch``.

Nothing is written. The files that are read: ``recipe.yaml``, ``metrics.jsonl``, ``checkpoints/``, ``manifest.json`` and
``result.json``. Whether the process of the run is alive is known from its lock on the directory.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distillm_cli.config.schedule import SCHEDULE
from distillm_cli.errors import UsageError
from distillm_cli.runs import output_dir
from distillm_cli.runs.recorded_run import finite_number, json_object
from distillm_cli.runs.stage_record import RECORD
from distillm_cli.training.events import Alarmed, Event, RunStarted, Stepped, Validated
from distillm_cli.utils import manifest
from distillm_cli.utils.storage import is_locked

# States of a run.
STARTING = "starting"  # the process is alive, and no step was logged
RUNNING = "running"
FINISHED = "finished"
INTERRUPTED = "interrupted"  # by a signal, after a checkpoint
ENDED = "ended without a result"  # killed, or stopped by an error

_STEP = ("step", "epoch", "source", "loss", "lr", "grad_norm", "phi", "tokens", "seconds")
_VALIDATION = ("step", "valid_loss", "phi")
_SILENT_SECONDS = 120.0  # age of the last line after which a run counts as ended if the file system has no locks


@dataclass(frozen=True)
class SavedStep:
    """Hold a checkpoint: its directory, its step, and when it was written, in seconds since the epoch."""

    path: Path
    step: int
    written: float


@dataclass(frozen=True)
class RunView:
    """Hold what is known of a run at one moment.

    directory: the one to watch. stage: name of the directory within it that has the newest figures; empty for the run
    itself. started: the run as its recipe describes it; sizes and devices that no file has are empty. events: of all
    logged steps and validations, in the order of the file. log_steps: steps between logged steps. reading: a number that
    changes when the file was replaced, so that ``events`` does not continue the previous ones. updated: time of the last
    change of ``metrics.jsonl``, in seconds since the epoch; None without one. result: the content of ``result.json`` of
    a finished run.
    """

    directory: Path
    state: str
    started: RunStarted
    stage: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    log_steps: int = 1
    reading: int = 0
    alarms: list[Alarmed] = field(default_factory=list)
    checkpoints: list[SavedStep] = field(default_factory=list)
    updated: float | None = None
    result: Mapping[str, Any] | None = None

    @property
    def is_alive(self) -> bool:
        """Return whether the process of the run is alive."""
        return self.state in (STARTING, RUNNING)

    @property
    def step(self) -> int:
        """Return the last logged step."""
        return max((event.step for event in self.events if isinstance(event, Stepped | Validated)), default=0)

    def as_json(self) -> dict[str, object]:
        """Return the object of ``distillm watch --json``."""
        losses = [event.loss for event in self.events if isinstance(event, Stepped)]
        valid = [event.valid_loss for event in self.events if isinstance(event, Validated)]
        return {
            "command": "watch",
            "status": "ok",
            "output": str(self.directory),
            "state": self.state,
            "stage": self.stage or None,
            "step": self.step,
            "steps": self.started.steps or None,
            "loss": losses[-1] if losses else None,
            "valid_loss": valid[-1] if valid else None,
            "phi": next((e.phi for e in reversed(self.events) if isinstance(e, Stepped | Validated)), None),
            "checkpoints": [saved.step for saved in self.checkpoints],
            "alarms": [
                {"name": alarm.name, "step": alarm.step, "message": alarm.message, "cure": alarm.cure}
                for alarm in self.alarms
            ],
        }


class RunWatcher:
    """Read a run again and again. Of ``metrics.jsonl`` only new lines are read.

    Raises UsageError if no run has written to the directory, and StorageError if it cannot be read.
    """

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time):
        self.directory = directory
        self.clock = clock
        self._log = _MetricsReader()
        self._recipes: dict[tuple[Path, int], Mapping[str, Any]] = {}
        if not directory.is_dir():
            what = f"{directory} is a file" if directory.exists() else f"no directory {directory}"
            raise UsageError("usage.no_run", what, hint="give the output directory of a run")
        if not self._has_run():
            newest = max(directory.glob(f"*/{output_dir.METRICS}"), key=lambda log: log.stat().st_mtime, default=None)
            hint = "give the output directory of a run" if newest is None else f"did you mean {newest.parent}?"
            raise UsageError("usage.no_run", f"no run has written to {directory}", hint=hint)

    def look(self) -> RunView:
        """Return the current state."""
        alive = is_locked(self.directory)
        place = self._newest_place()
        if place != self.directory:
            alive = alive or is_locked(place)
        # Read after the locks: a run writes its result before it releases its lock.
        result = _current_result(self.directory)
        if result is not None and not alive:
            place = self.directory
        if result is None and place != self.directory and self._stages_are_done():
            result = _current_result(place)
        self._log.read(place / output_dir.METRICS)
        if alive is None:  # no locks on this file system
            alive = result is None and self.clock() - (self._log.updated or 0.0) < _SILENT_SECONDS
        recipe = self._recipe(place)
        return RunView(
            directory=self.directory,
            state=self._state(bool(alive), result, place),
            started=_started(recipe, self._log.events),
            stage="" if place == self.directory else place.name,
            recipe=recipe,
            events=self._log.events,
            log_steps=_section(recipe, "train").get("log_steps") or 1,
            reading=self._log.reading,
            alarms=self._log.alarms,
            checkpoints=_checkpoints(place),
            updated=self._log.updated,
            result=None if alive else result,
        )

    def _has_run(self) -> bool:
        written = manifest.recorded(self.directory)
        is_listed = any(name in written for name in (output_dir.RECIPE, output_dir.METRICS))
        is_pipeline = any(self.directory.glob(f"*/{RECORD}"))
        return is_listed or is_pipeline or is_locked(self.directory) is True

    def _stage_logs(self) -> list[Path]:
        """Return the logs of stages: of those before a distillation, and of a pipeline."""
        logs = self.directory.glob(f"*/{output_dir.METRICS}")
        return [log for log in logs if log.parent.name in output_dir.STAGES or (log.parent / RECORD).is_file()]

    def _stages_are_done(self) -> bool:
        """Return whether no stage of a pipeline was left unfinished."""
        records = [json_object(path) or {} for path in self.directory.glob(f"*/{RECORD}")]
        return all(record.get("status") == "done" for record in records)

    def _newest_place(self) -> Path:
        """Return the directory whose log changed last: of the run, of a stage before it, or of a pipeline's stage."""
        found = [(_changed(log), log.parent) for log in (self.directory / output_dir.METRICS, *self._stage_logs())]
        dated = [(changed, place) for changed, place in found if changed is not None]
        return max(dated, key=lambda pair: pair[0])[1] if dated else self.directory

    def _recipe(self, place: Path) -> Mapping[str, Any]:
        """Return the values of a run's recipe; empty if it cannot be read. A file is parsed once per change."""
        path = place / output_dir.RECIPE
        with suppress(OSError, ValueError, yaml.YAMLError):
            key = (path, path.stat().st_mtime_ns)
            if key not in self._recipes:
                found = yaml.safe_load(path.read_text(encoding="utf-8"))
                self._recipes = {key: found if isinstance(found, dict) else {}}
            return self._recipes[key]
        return {}

    def _state(self, alive: bool, result: Mapping[str, Any] | None, place: Path) -> str:
        if alive:
            return RUNNING if self._log.events else STARTING
        if result is not None:
            return FINISHED
        reason = _newest_progress(place).get("reason")
        return INTERRUPTED if reason == "interrupted" else ENDED


class _MetricsReader:
    """Read the complete lines of a ``metrics.jsonl``, each once. A file that was replaced is read from its start."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.alarms: list[Alarmed] = []
        self.reading = 0
        self.updated: float | None = None
        self._file: tuple[Path, int] | None = None  # path and inode
        self._offset = 0

    def read(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if (path, stat.st_ino) != self._file or stat.st_size < self._offset:
                    self._file = (path, stat.st_ino)
                    self._start_over()
                self.updated = stat.st_mtime
                file.seek(self._offset)
                new = file.read()
        except OSError:
            self._file = None
            self._start_over()
            return
        end = new.rfind(b"\n") + 1  # the rest is a line that is being written, or that a killed process left
        self._offset += end
        for line in new[:end].splitlines():
            self._add(line)

    def _start_over(self) -> None:
        self.events = []
        self.alarms = []
        self.updated = None
        self.reading += 1
        self._offset = 0

    def _add(self, line: bytes) -> None:
        with suppress(ValueError, TypeError, KeyError, AttributeError):  # not a line of this log
            entry = json.loads(line)
            if "alarm" in entry:
                texts = [str(entry.get(key, "")) for key in ("message", "cure")]
                self.alarms.append(Alarmed(int(entry["step"]), str(entry["alarm"]), *texts))
            elif "valid_loss" in entry:
                self.events.append(_validated(entry))
            elif "loss" in entry:
                self.events.append(_stepped(entry))


def _stepped(entry: Mapping[str, Any]) -> Stepped:
    return Stepped(
        step=int(entry["step"]),
        epoch=float(entry["epoch"]),
        source=str(entry["source"]),
        loss=_or_nan(entry["loss"]),
        lr=_or_nan(entry["lr"]),
        grad_norm=_or_nan(entry["grad_norm"]),
        phi=_or_nan(entry["phi"]),
        tokens=int(entry["tokens"]),
        seconds=float(entry["seconds"]),
        figures={
            name: number
            for name, value in entry.items()
            if name not in _STEP and (number := finite_number(value)) is not None
        },
    )


def _validated(entry: Mapping[str, Any]) -> Validated:
    numbers = {name: finite_number(value) for name, value in entry.items() if name not in _VALIDATION}
    scores = {name: number for name, number in numbers.items() if number is not None or entry[name] is None}
    return Validated(int(entry["step"]), _or_nan(entry["valid_loss"]), _or_nan(entry.get("phi")), scores=scores)


def _or_nan(value: object) -> float:
    number = finite_number(value)
    return math.nan if number is None else number


def _started(recipe: Mapping[str, Any], events: list[Event]) -> RunStarted:
    """Return the start of a run: what its recipe has, and the steps of an epoch from a logged step."""
    method = str(recipe.get("method") or "run")
    steps_per_epoch = 0
    last = next((e for e in reversed(events) if isinstance(e, Stepped) and e.epoch > 0), None)
    if last is not None:
        steps_per_epoch = round(last.step / last.epoch)
    train = _section(recipe, "train")
    steps = train.get("steps")
    epochs = finite_number(train.get("epochs"))
    if not steps and steps_per_epoch and epochs is not None:
        steps = max(1, math.ceil(epochs * steps_per_epoch))
    kind = SCHEDULE.members.get(str(_section(recipe, "schedule").get("kind")))
    divergence = _section(recipe, "objective").get("divergence")
    is_sft = method == "sft"
    return RunStarted(
        steps=int(steps or 0),
        first_step=0,
        steps_per_epoch=steps_per_epoch,
        method=method,
        parameters=0,
        device="",
        dtype="",
        has_phi=not is_sft and kind is not None and kind.has_phi,
        loss="CE" if is_sft else str(divergence or "loss"),
    )


def _section(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = recipe.get(name)
    return found if isinstance(found, dict) else {}


def _changed(path: Path) -> float | None:
    with suppress(OSError):
        return path.stat().st_mtime
    return None


def _current_result(place: Path) -> Mapping[str, Any] | None:
    """Return ``result.json``; None without one, or if a later run has started in the directory."""
    path = place / output_dir.RESULT
    written = _changed(path)
    if written is None or written < (_changed(place / output_dir.RECIPE) or 0.0):
        return None
    return json_object(path) or None


def _checkpoints(place: Path) -> list[SavedStep]:
    found = []
    for path in (place / output_dir.CHECKPOINTS).glob("step-*"):
        number = path.name.removeprefix("step-")
        changed = _changed(path)
        if number.isdecimal() and changed is not None:
            found.append(SavedStep(path, int(number), changed))
    return sorted(found, key=lambda saved: saved.step)


def _newest_progress(place: Path) -> Mapping[str, Any]:
    """Return the progress in the newest checkpoint; empty without one."""
    saved = _checkpoints(place)
    progress = (json_object(saved[-1].path / "state.json") or {}).get("progress") if saved else None
    return progress if isinstance(progress, dict) else {}
