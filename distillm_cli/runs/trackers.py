"""Log a run with experiment trackers (``--track``), through those of accelerate.

A tracker gets the resolved recipe, the figures of metrics.jsonl, a table of samples, and the small files of the finished
run. Only the first process logs. A resumed run continues the run of the tracker, whose id is in ``trackers.json``. A tracker
that fails during the run is dropped with a warning, and the run continues.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from distillm_cli.errors import UsageError
from distillm_cli.runs import output_dir
from distillm_cli.training.distributed import world
from distillm_cli.training.events import STEP_KEYS, Alarmed, Event, Listener, Note, Stepped, Validated, Warned
from distillm_cli.utils import manifest
from distillm_cli.utils.storage import atomic_write
from distillm_cli.utils.text import redact

if TYPE_CHECKING:
    from distillm_cli.config.load import Resolved
    from distillm_cli.runs.run_results import Sample, TrainResult

TRACKERS = ("wandb", "trackio", "tensorboard", "mlflow")  # each is a package, and an extra of this one
_PROJECT = "distillm"
_IDS = "trackers.json"
_FILES = (output_dir.RECIPE, output_dir.METRICS, output_dir.RESULT, output_dir.CARD)  # of a finished run


def check_trackers(names: Iterable[str]) -> None:
    """Raise UsageError for a tracker that does not exist or is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UsageError(
                "usage.invalid_value", f"--track {name}: no such tracker", where=f"there are {', '.join(TRACKERS)}"
            )
        if find_spec(name) is None:
            raise UsageError(
                "usage.missing_package",
                f"--track {name}: {name} is not installed",
                hint=f"pip install 'distillm[{name}]'",
            )


@dataclass
class RunTrackers:
    """Log the events of a run, and pass them on to ``listener``.

    names: of the trackers. output: directory of the run. resolved: its recipe. resume: continue the trackers' runs.
    """

    names: tuple[str, ...]
    output: Path
    resolved: Resolved
    listener: Listener
    resume: bool = False
    trackers: dict[str, Any] = field(default_factory=dict)
    _last_step: int = 0

    @contextmanager
    def running(self) -> Iterator[RunTrackers]:
        """Start the trackers, in the first process, and end their runs with the block.

        Raises UsageError if one cannot be started.
        """
        try:
            if self.names:
                world().broadcast(self._start)
            yield self
        finally:
            for name, tracker in list(self.trackers.items()):
                self._attempt(name, partial(_end, name, tracker))

    def __call__(self, event: Event) -> None:
        self.listener(event)
        if not self.trackers:
            return
        if isinstance(event, Stepped):
            self._last_step = event.step
            if event.step % self.resolved.recipe.train.log_steps == 0:
                numbers = {key: getattr(event, key) for key in STEP_KEYS if key not in ("step", "source")}
                self._log("train", numbers | event.figures | event.health, event.step)
        elif isinstance(event, Validated):
            # That of the initial student may come after later steps, and trackers keep the order of steps.
            group = "before training" if event.step < self._last_step else "valid"
            figures = {"loss": event.valid_loss, "phi": event.phi, **event.scores}
            self._log(group, figures, max(event.step, self._last_step))
        elif isinstance(event, Alarmed):
            self._log("alarm", {event.name: 1}, event.step)

    def finish(self, result: TrainResult) -> None:
        """Log the samples and the files of a finished run."""
        files = [path for name in _FILES if (path := self.output / name).is_file()]
        for name, tracker in list(self.trackers.items()):
            if result.samples:
                self._attempt(name, partial(_SAMPLES[name], tracker, *_table(result.samples), result.steps))
            self._attempt(name, partial(_ARTIFACTS[name], tracker, files, self.output.resolve().name))

    def _start(self) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self._claim()
        ids = self._ids()
        for name in self.names:
            run_id = ids.setdefault(name, uuid4().hex) if name != "mlflow" else ids.get(name)
            tracker = LOGGER_TYPE_TO_CLASS[name](**self._arguments(name, run_id))
            try:
                with redirect_stdout(io.StringIO()):  # stdout is for results
                    tracker.start()
                    tracker.store_init_configuration(self._settings())
            except Exception as error:
                what = f"--track {name}: {type(error).__name__}: {_first_line(error)}"
                hint = f"check the settings of {name} (docs/training.md), or drop --track"
                raise UsageError("usage.tracker_failed", what, hint=hint) from error
            if name == "mlflow":
                ids[name] = tracker.tracker.info.run_id
            self.trackers[name] = tracker
        atomic_write(self.output / _IDS, json.dumps(ids) + "\n")
        self.listener(Note(f"Logging to {', '.join(self.names)}"))

    def _claim(self) -> None:
        """List what the trackers write into the output directory, so that ``--overwrite`` removes it."""
        folders = [name for name in self.names if name in ("tensorboard", "wandb")]
        manifest.record(self.output, [_IDS, *folders])

    def _ids(self) -> dict[str, str]:
        """Return the ids of the run that is resumed, by tracker."""
        path = self.output / _IDS
        return json.loads(path.read_text(encoding="utf-8")) if self.resume and path.is_file() else {}

    def _arguments(self, name: str, run_id: str | None) -> dict[str, Any]:
        title = self.output.resolve().name
        if name == "tensorboard":
            return {"run_name": name, "logging_dir": str(self.output)}
        if name == "wandb":
            return {"run_name": _PROJECT, "name": title, "id": run_id, "resume": "allow", "dir": str(self.output)}
        if name == "trackio":
            project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
            assert run_id is not None
            return {"run_name": project, "name": f"{title}-{run_id[:6]}", "resume": "allow", "embed": False}
        return {"experiment_name": _PROJECT, "run_name": title, "run_id": run_id}

    def _settings(self) -> dict[str, Any]:
        """Return the resolved recipe by dotted key, in types that every tracker takes."""

        def flatten(section: Mapping[str, Any], prefix: str) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for key, value in section.items():
                if isinstance(value, dict):
                    found |= flatten(value, f"{prefix}{key}.")
                else:
                    found[f"{prefix}{key}"] = value if isinstance(value, bool | int | float) else redact(str(value))
            return found

        return flatten(self.resolved.recipe.model_dump(mode="json"), "")

    def _log(self, group: str, figures: Mapping[str, float | None], step: int) -> None:
        values = {f"{group}/{name}": value for name, value in figures.items() if value is not None}
        for name, tracker in list(self.trackers.items()):
            self._attempt(name, partial(tracker.log, values, step=step))

    def _attempt(self, name: str, log: Callable[[], object]) -> None:
        try:
            with redirect_stdout(io.StringIO()):
                log()
        except Exception as error:
            del self.trackers[name]
            what = f"{name} failed, and the run continues without it: {type(error).__name__}: {_first_line(error)}"
            self.listener(Warned(what))


def _end(name: str, tracker: Any) -> None:
    if name == "trackio":  # the tracker's own method ends the run again, and prints, when the program exits
        import trackio

        trackio.finish()
    else:
        tracker.finish()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _table(samples: Iterable[Sample]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of a table of samples."""
    samples = list(samples)
    models = list(dict.fromkeys(name for sample in samples for name in sample.answers))
    rows = [
        [sample.prompt, next(iter(sample.references), ""), *(sample.answers.get(name, "") for name in models)]
        for sample in samples
    ]
    return ["prompt", "reference", *models], rows


def _wandb_samples(tracker: Any, columns: list[str], rows: list[list[str]], step: int) -> None:
    tracker.log_table("samples", columns=columns, data=rows, step=step)


def _trackio_samples(tracker: Any, columns: list[str], rows: list[list[str]], step: int) -> None:
    import pandas
    import trackio

    tracker.log({"samples": trackio.Table(dataframe=pandas.DataFrame(rows, columns=columns))}, step=step)


def _tensorboard_samples(tracker: Any, columns: list[str], rows: list[list[str]], step: int) -> None:
    lines = [columns, ["---"] * len(columns), *rows]
    cells = (" | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) for line in lines)
    tracker.log({"samples": "\n".join(f"| {line} |" for line in cells)}, step=step)


def _mlflow_samples(tracker: Any, columns: list[str], rows: list[list[str]], step: int) -> None:
    import mlflow

    mlflow.log_dict({"columns": columns, "data": rows}, "samples.json")


def _wandb_files(tracker: Any, files: list[Path], name: str) -> None:
    import wandb

    artifact = wandb.Artifact(f"{name}-files", type="run")
    for path in files:
        artifact.add_file(str(path))
    tracker.tracker.log_artifact(artifact)


def _trackio_files(tracker: Any, files: list[Path], name: str) -> None:
    import trackio

    for path in files:
        trackio.save(str(path))


def _tensorboard_files(tracker: Any, files: list[Path], name: str) -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in files if path.name != output_dir.METRICS}
    for file, text in texts.items():
        indented = "".join(f"    {line}\n" for line in text.splitlines())  # a code block
        tracker.log({f"files/{file}": text if file.endswith(".md") else indented})


def _mlflow_files(tracker: Any, files: list[Path], name: str) -> None:
    for path in files:
        tracker.log_artifact(str(path))


_SAMPLES = {
    "wandb": _wandb_samples,
    "trackio": _trackio_samples,
    "tensorboard": _tensorboard_samples,
    "mlflow": _mlflow_samples,
}
_ARTIFACTS = {
    "wandb": _wandb_files,
    "trackio": _trackio_files,
    "tensorboard": _tensorboard_files,
    "mlflow": _mlflow_files,
}
