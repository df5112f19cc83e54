"""Write the output file of ``generate`` as complete lines in order, so that it can be resumed.

The settings of a file are in a hidden file next to it, ``.NAME.generate.json``, so that the rows stay plain data and a
resume can check that the settings are unchanged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from distillm_cli.errors import START_OVER, CheckpointError, UsageError
from distillm_cli.training.distributed import in_first_process
from distillm_cli.utils.storage import atomic_write, locked, storing

Line = dict[str, Any]


class ResponseFile:
    """Write an output file. count: number of complete rows in it."""

    def __init__(self, path: Path, *, resume: bool, overwrite: bool):
        """Raise UsageError for a path that cannot be used. Nothing is written yet."""
        if path.suffix != ".jsonl":
            raise UsageError(
                "usage.invalid_value",
                f"--output {path}",
                where="rows are JSON lines",
                hint=f"try --output {path}.jsonl",
            )
        if resume and overwrite:
            raise UsageError(
                "usage.exclusive_options", "--resume and --overwrite are mutually exclusive", hint="choose one of them"
            )
        if path.is_dir():
            raise UsageError("usage.output_exists", f"--output {path} is a directory", hint="choose a file")
        self.path = path
        self.resume = resume
        self.overwrite = overwrite
        self.count = 0
        self._check_free()
        self.record = path.with_name(f".{path.name}.generate.json")
        self._lock = ExitStack()  # holds the file's lock

    @in_first_process
    def _check_free(self) -> None:
        if self.path.exists() and not (self.resume or self.overwrite):
            hint = "choose another, or use --resume to continue or --overwrite to start over"
            raise UsageError("usage.output_exists", f"--output {self.path} exists", hint=hint)

    def begin(self, settings: Mapping[str, Any], expected: SequenceOf[Mapping[str, Any]]) -> None:
        """Create or empty the file; on a resume of one that exists, check it and count its rows.

        settings: everything that affects the rows. expected: fields that each row must have, in order. Raises
        CheckpointError if the file has other settings or was changed, StorageError if it cannot be written,
        UsageError if another process is writing it.
        """
        self.count = self._begin(settings, expected)

    @in_first_process
    def _begin(self, settings: Mapping[str, Any], expected: SequenceOf[Mapping[str, Any]]) -> int:
        """Prepare the file in the first process; return the number of its rows."""
        is_new = not self.path.exists()
        with _writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("ab").close()  # it must be writable even if the system has no locks
            self._lock.enter_context(locked(self.path, self._refuse))
        if not is_new:
            self._check_free()  # checked again: another run may have written it while the model was loaded
        if self.resume and not is_new:
            self._compare(settings)
            return self._verify(expected)
        with _writing(self.path):
            try:
                os.truncate(self.path, 0)
                atomic_write(self.record, json.dumps(settings, indent=1) + "\n")
            except OSError:
                if is_new:
                    self.path.unlink()
                raise
        return 0

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def _refuse(self) -> None:
        raise UsageError(
            "usage.output_in_use", f"another run is writing {self.path}", hint="wait for it, or choose another --output"
        )

    def add(self, lines: SequenceOf[Line]) -> None:
        """Append rows; they are on the disk when this returns."""
        self._append(lines)
        self.count += len(lines)

    @in_first_process
    def _append(self, lines: SequenceOf[Line]) -> None:
        with _writing(self.path), self.path.open("ab") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())

    def _compare(self, settings: Mapping[str, Any]) -> None:
        hint = f"resume with the settings it was started with, or {START_OVER}"
        try:
            recorded = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise CheckpointError(
                "checkpoint.damaged", f"the settings of {self.path} are not known: no {self.record.name}", hint=hint
            ) from None
        changed = [key for key, value in settings.items() if recorded.get(key) != value]
        if changed:
            key = changed[0]
            values = (recorded.get(key), settings[key])
            are_short = all(len(str(value)) < 30 for value in values)
            difference = f"was {values[0]}, now {values[1]}" if are_short else "differ"
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise CheckpointError(
                "checkpoint.changed", f"{self.path} has other settings: {key} {difference}{more}", hint=hint
            )

    def _verify(self, expected: SequenceOf[Mapping[str, Any]]) -> int:
        """Return the number of complete rows; an incomplete line at the end, from an interrupted write, is removed."""
        raw = self.path.read_bytes()
        complete = raw[: raw.rfind(b"\n") + 1]
        lines = complete.split(b"\n")[:-1]
        if len(lines) > len(expected):
            raise CheckpointError(
                "checkpoint.damaged",
                f"{self.path} has {len(lines)} rows, expected {len(expected)}",
                hint=START_OVER,
            )
        for number, (line, fields) in enumerate(zip(lines, expected, strict=False), start=1):
            try:
                row = json.loads(line)
                is_same = all(row[key] == value for key, value in fields.items())
            except (ValueError, KeyError, TypeError):
                is_same = False
            if not is_same:
                raise CheckpointError(
                    "checkpoint.changed", f"{self.path}:{number} is not the expected row", hint=START_OVER
                )
        if len(complete) < len(raw):
            with _writing(self.path):
                os.truncate(self.path, len(complete))
        return len(lines)


def _writing(path: Path) -> AbstractContextManager[None]:
    return storing(f"cannot write {path}", "free disk space, or choose another --output")
