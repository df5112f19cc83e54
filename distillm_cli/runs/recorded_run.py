"""Read what a run wrote into its output directory, without a model: settings, result, figures over steps, scores.

A directory may be unfinished, damaged or from another version. Whatever can be read is shown, and ``notes`` say what is
missing. Thousands of runs are read in seconds: sections of recipes that occur in several runs are parsed once.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import distillm_cli
from distillm_cli.config.explain import leaves
from distillm_cli.config.yaml_io import compose, node_value
from distillm_cli.errors import RecipeError
from distillm_cli.runs import output_dir
from distillm_cli.utils.storage import reason

_MAX_BYTES = 32 * 2**20  # of a recipe or a result
_HEADER = re.compile(r"^# Written by distillm (\S+) on (.*), (\d{4}-\d\d-\d\d \d\d:\d\d UTC)$", re.MULTILINE)
_COMMAND = re.compile(r"^# Command: (.*)$", re.MULTILINE)
_SECTION = re.compile(r"^(?=[A-Za-z_])", re.MULTILINE)
_FIELD = re.compile(r"((?:  )*)(\w+):(?: +(\S.*))?")  # one line of a recipe, as runs write it
_BLOCKS = ("{", "|", ">", "&", "*", "!")  # first characters of values that may go on in the next line
_RESULTS = "results.json"
_AFTER = "student_after"  # key of the result's report
_THIS_VERSION = distillm_cli.__version__  # read once: it searches the installed packages
FINISHED, UNFINISHED = "finished", "unfinished"


@dataclass(frozen=True)
class Unreadable:
    """Hold a path that is not shown, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class RecordedScore:
    """Hold a metric of a run: its mean and standard deviation over the seeds of generation. sd: None for one pass."""

    mean: float
    sd: float | None = None
    seeds: int = 1


@dataclass(frozen=True)
class RecordedRun:
    """Hold what a run wrote. sections: settings by section and dotted key. result: empty if the run did not finish.

    scores: by name, ``valid_loss``, ``exact_match`` (held-out rows), ``dolly/t1 rouge_l`` (a suite with its settings).
    version, host, date, command: from the recipe's first lines. last_step: of an unfinished run.
    """

    path: Path
    sections: Mapping[str, Mapping[str, Any]]
    result: Mapping[str, Any]
    scores: Mapping[str, RecordedScore]
    version: str | None = None
    host: str | None = None
    date: str | None = None
    command: str | None = None
    last_step: int | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def status(self) -> str:
        """Return FINISHED or UNFINISHED."""
        return FINISHED if self.result else UNFINISHED

    def setting(self, key: str) -> Any:
        """Return the value of a setting: the default if the recipe does not have it, None if there is no such field."""
        values = self.sections.get(key.partition(".")[0], {})
        if key in values:
            return values[key]
        known = leaves().get(key)
        return None if known is None else known.default

    def number(self, name: str) -> float | None:
        """Return a finite number of the result; None without one."""
        return finite_number(self.result.get(name))


def finite_number(value: object) -> float | None:
    """Return a finite number; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None  # type: ignore[arg-type]


def find_runs(paths: Iterable[Path]) -> Iterator[RecordedRun | Unreadable]:
    """Yield the runs in the given order. For a directory that has no recipe, its subdirectories with one are read."""
    seen: set[Path] = set()
    for path in paths:
        for place in _expanded(path):
            known = Path(os.path.abspath(place))  # noqa: PTH100  # links are different runs, as the user named them
            if known not in seen:
                seen.add(known)
                yield read_run(place)


def _expanded(path: Path) -> list[Path]:
    if (path / output_dir.RECIPE).is_file() or not path.is_dir():
        return [path]
    try:
        inside = [entry for entry in sorted(path.iterdir()) if (entry / output_dir.RECIPE).is_file()]
    except OSError:
        return [path]
    return inside or [path]


def read_run(path: Path) -> RecordedRun | Unreadable:
    """Return what a run wrote into a directory, or why it cannot be shown."""
    try:
        if not path.exists():
            return Unreadable(path, "does not exist")
        if not path.is_dir():
            return Unreadable(path, "is a file, not the output directory of a run")
        if not (path / output_dir.RECIPE).is_file():
            return Unreadable(path, _why_not_a_run(path))
        text = _read(path / output_dir.RECIPE)
        return _read_run(path, text)
    except OSError as error:
        return Unreadable(path, f"cannot be read: {reason(error)}")
    except UnicodeDecodeError:
        return Unreadable(path, f"has a {output_dir.RECIPE} that is not UTF-8")
    except RecipeError as error:
        return Unreadable(path, f"has a damaged {output_dir.RECIPE}: {error.what}")


def _why_not_a_run(path: Path) -> str:
    if not any(path.iterdir()):
        return "is empty"
    if (path / "config.json").is_file():
        return f"is a model without the {output_dir.RECIPE} of a run"
    return f"was not written by a run: it has no {output_dir.RECIPE}"


def _read_run(path: Path, recipe: str) -> RecordedRun | Unreadable:
    sections = _sections(recipe)
    if "train" not in sections or "method" not in sections:
        return Unreadable(path, f"has a {output_dir.RECIPE} of another program or of a pipeline")
    notes: list[str] = []
    result = _read_result(path / output_dir.RESULT, notes)
    last_step = None
    if not result:
        last_step = _last_step(path / output_dir.METRICS)
        notes.append("the run did not start" if last_step is None else f"unfinished, at step {last_step:,}")
    header = _HEADER.search(recipe)
    version = header[1] if header else None
    if version is not None and version != _THIS_VERSION:
        notes.append(f"written by distillm {version}, this is {_THIS_VERSION}")
    command = _COMMAND.search(recipe)
    return RecordedRun(
        path,
        sections,
        result,
        {**_held_out_scores(result), **_suite_scores(path / output_dir.EVAL, notes)},
        version=version,
        host=header[2] if header else None,
        date=header[3] if header else None,
        command=command[1] if command else None,
        last_step=last_step,
        notes=tuple(notes),
    )


def _sections(recipe: str) -> dict[str, Mapping[str, Any]]:
    """Return the flat settings of each section. Raises RecipeError."""
    found: dict[str, Mapping[str, Any]] = {}
    for text in _SECTION.split(recipe):
        found |= _parsed(text)
    return found


@lru_cache(maxsize=4096)
def _parsed(text: str) -> dict[str, Mapping[str, Any]]:
    """Return the settings of a section by its name: line by line as runs write them, otherwise as any YAML."""
    names: list[str] = []
    settings: dict[str, Any] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        found = _FIELD.fullmatch(line)
        if found is None or len(found[1]) > 2 * len(names) or (found[3] or "").startswith(_BLOCKS):
            value = _value(text)
            sections = value.items() if isinstance(value, dict) else ()
            return {name: MappingProxyType(dict(_flat(name, content))) for name, content in sections}
        names = [*names[: len(found[1]) // 2], found[2]]
        if found[3] is not None:
            settings[".".join(names)] = _value(found[3])
    return {names[0]: MappingProxyType(settings)} if names else {}


@lru_cache(maxsize=4096)
def _value(text: str) -> Any:
    return node_value(compose(text, output_dir.RECIPE), output_dir.RECIPE)


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and key not in leaves():
        for name, item in value.items():
            yield from _flat(f"{key}.{name}", item)
    else:
        yield key, value


def _read_result(path: Path, notes: list[str]) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    result = json_object(path)
    if result is None or "steps" not in result:
        notes.append(f"{path.name} is damaged or of another program")
        return {}
    return result


def json_object(path: Path) -> dict[str, Any] | None:
    """Return the object in a file; None if there is none that can be read."""
    try:
        found = json.loads(_read(path))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _read(path: Path) -> str:
    if path.stat().st_size > _MAX_BYTES:
        raise OSError(f"{path.name} is larger than {_MAX_BYTES // 2**20} MiB")
    return path.read_text(encoding="utf-8")


def _held_out_scores(result: Mapping[str, Any]) -> dict[str, RecordedScore]:
    figures = held_out_figures(result).get(_AFTER, {})
    return {name: RecordedScore(value) for name, value in figures.items() if value is not None}


def held_out_figures(result: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return the figures on held-out rows by model (``student_before``) and metric."""
    report = result.get("report")
    if not isinstance(report, dict):
        return {}
    return {
        str(model): {str(name): finite_number(value) for name, value in figures.items()}
        for model, figures in report.items()
        if isinstance(figures, dict)
    }


def _suite_scores(place: Path, notes: list[str]) -> dict[str, RecordedScore]:
    """Return the scores of finished evaluations, by suite, settings and metric."""
    found: dict[str, RecordedScore] = {}
    for file in result_files(place):
        saved = json_object(file)
        if saved is None:
            notes.append(f"{file.relative_to(place.parent)} is damaged")
            continue
        label = f"{file.parents[1].name}/{file.parent.name}"
        for metric, value in saved.items():
            mean = finite_number(value.get("mean")) if isinstance(value, dict) and "seeds" in value else None
            if mean is None:
                continue
            seeds = len(value["seeds"]) if isinstance(value["seeds"], dict) else 1
            found[f"{label} {metric}"] = RecordedScore(
                mean, finite_number(value.get("sd")) if seeds > 1 else None, seeds
            )
    return found


def result_files(place: Path) -> list[Path]:
    """Return the results of evaluations in a run's ``eval/``, sorted."""
    if not place.is_dir():
        return []
    return sorted(path for path in place.glob(f"*/*/{_RESULTS}") if path.is_file())


def _last_step(path: Path) -> int | None:
    """Return the step of the last whole line of ``metrics.jsonl``, without reading the whole file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2**16))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        step = _step_of(_line(line))
        if step is not None:
            return step
    return None


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of ``metrics.jsonl`` that have a step. Damaged lines are left out."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                line = _line(text)
                if _step_of(line) is not None:
                    yield line
    except OSError:
        return


def _line(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _step_of(line: Mapping[str, Any]) -> int | None:
    step = line.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) else None
