"""Write ``metrics.jsonl``: a line per logged step, a line per validation; each whole or absent."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

from distillm_cli.training.events import Event, Stepped, Validated
from distillm_cli.utils.storage import atomic_write, storing

_STEP_KEYS = ("step", "epoch", "source", "loss", "lr", "grad_norm", "phi", "tokens", "seconds")


class MetricsLog:
    """Append events to ``path``, as their listener.

    first_step: of a resume; lines of later steps are dropped. validated: whether the run had been validated by then; if not,
    the validation of step 0 came later, too.
    """

    def __init__(self, path: Path, *, log_steps: int, first_step: int = 0, validated: bool = True):
        self.path = Path(path)
        self.log_steps = log_steps
        kept = _lines_up_to(self.path, first_step, validated) if first_step and self.path.exists() else []
        atomic_write(self.path, "".join(kept))

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stepped) and event.step % self.log_steps == 0:
            line = {key: getattr(event, key) for key in _STEP_KEYS} | event.figures
            self._write({key: _short(value) for key, value in line.items()})
        elif isinstance(event, Validated):
            line = {"step": event.step, "valid_loss": _short(event.valid_loss), "phi": _short(event.phi)}
            self._write(line | {key: _short(value) for key, value in event.scores.items()})

    def _write(self, line: dict) -> None:
        # One write call a line: a process that dies between lines leaves whole ones.
        text = (json.dumps(line) + "\n").encode()
        with storing(
            f"cannot write {self.path}", "free some space, then go on from the newest checkpoint with --resume"
        ):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                if (written := os.write(descriptor, text)) < len(text):  # a disk that is full takes what it can
                    os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)


def _lines_up_to(path: Path, step: int, validated: bool) -> list[str]:
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            entry = json.loads(line)
            if line.endswith("\n") and entry["step"] <= step and (validated or "valid_loss" not in entry):
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # half a line, or none of ours
            continue
    return kept


def _short(value):
    return float(f"{value:.7g}") if isinstance(value, float) else value
