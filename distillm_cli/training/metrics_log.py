"""Write ``metrics.jsonl``: one line per logged step, per validation and per alarm, and no incomplete lines."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distillm_cli.config.schema import TrainConfig
from distillm_cli.training.distributed import world
from distillm_cli.training.events import STEP_KEYS, Alarmed, Event, Listener, Stepped, Validated, silent
from distillm_cli.utils.storage import atomic_write, storing


class MetricsLog:
    """Listen to events and append them to ``path``.

    first_step: of a resume; lines of later steps are dropped. validated: whether the checkpoint had a validation; if
    not, the validation line of step 0 is dropped as well.
    """

    def __init__(self, path: Path, *, log_steps: int, first_step: int = 0, validated: bool = True):
        self.path = Path(path)
        self.log_steps = log_steps
        lines = _lines_up_to(self.path, first_step, validated) if first_step and self.path.exists() else []
        atomic_write(self.path, "".join(lines))

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stepped) and event.step % self.log_steps == 0:
            line = {key: getattr(event, key) for key in STEP_KEYS} | event.figures | event.health
            self._write({key: _short(value) for key, value in line.items()})
        elif isinstance(event, Validated):
            line = {"step": event.step, "valid_loss": _short(event.valid_loss), "phi": _short(event.phi)}
            self._write(line | {key: _short(value) for key, value in event.scores.items()})
        elif isinstance(event, Alarmed):
            self._write(event.as_json())

    def _write(self, line: Mapping[str, object]) -> None:
        # One write call per line, so that a killed process leaves no incomplete line.
        text = (json.dumps(line) + "\n").encode()
        with storing(f"cannot write {self.path}", "free disk space, then continue with --resume"):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                if (written := os.write(descriptor, text)) < len(text):  # a full disk may store a part of the line
                    os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)


def new_metrics_log(path: Path, config: TrainConfig, progress: Mapping[str, Any]) -> Listener:
    """Return the log of a run that continues from the ``progress`` of a checkpoint. Only the first process writes it."""
    if not world().is_first:
        return silent
    validated = progress.get("valid_loss") is not None
    return MetricsLog(path, log_steps=config.log_steps, first_step=progress["step"], validated=validated)


def _lines_up_to(path: Path, step: int, validated: bool) -> list[str]:
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            entry = json.loads(line)
            if line.endswith("\n") and entry["step"] <= step and (validated or "valid_loss" not in entry):
                lines.append(line)
        except (ValueError, KeyError, TypeError):  # a part of a line, or not a line of this log
            continue
    return lines


def _short(value: object) -> object:
    return float(f"{value:.7g}") if isinstance(value, float) else value
