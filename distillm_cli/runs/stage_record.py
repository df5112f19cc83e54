"""Record the inputs and outputs of a pipeline's stages, in ``OUTPUT/STAGE/stage.json``.

A stage's fingerprint is the SHA-256 of everything that its result depends on: its verb and settings (not the directory
of a cache, for instance), the version of each stage that it reads, and the identity of its local inputs. The identity
of data files, configs and tokenizers is the SHA-256 of their bytes. That of weights is their size and 64 blocks of 64
KiB spread over the file: training changes every tensor, while a copy or a `touch` changes none, and a large model need
not be read completely at every start. Hub models and data sets are identified by name and revision.

The files of a finished stage are identified in the same way: rows and configs by their bytes, weights by size and blocks.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from distillm_cli.config.derived import fixed_values
from distillm_cli.config.field_usage import SAMPLING
from distillm_cli.config.pipeline_recipe import PREFIX, Stage, inputs, values
from distillm_cli.data.files import COMPRESSIONS, FORMATS
from distillm_cli.data.sources import is_path, local_path
from distillm_cli.data.tables import saved_splits
from distillm_cli.errors import CheckpointError, DataError, UsageError
from distillm_cli.runs import output_dir
from distillm_cli.runs.inputs import local_input, names_rows
from distillm_cli.training.distributed import in_first_process, world
from distillm_cli.utils.storage import atomic_write, locked, storing

RECORD = "stage.json"
SAMPLES = "samples.jsonl"
RECORD_FORMAT = 1
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_OTHER_MODEL_FILES = (".json", ".jinja", ".txt", ".model", ".arrow", *FORMATS, *COMPRESSIONS)
_RUN_FILES = {"stage.json", "metrics.jsonl", "manifest.json"}
_BLOCKS = 64
_BLOCK_BYTES = 1 << 16

_SHAPING = {"generate": (*SAMPLING, "student.dtype"), "eval": ("student.dtype",)}
_NOT_SHAPING = ("data.workers", "eval.report_rows", "eval.report_page", "eval.batch_size")


@dataclass(frozen=True)
class StageRecord:
    """Hold the content of ``stage.json``.

    status: "starting" (files of an earlier version may still exist), "started" or "done". of: the inputs of the
    fingerprint. made: the name of this version of the stage. files: for a finished stage, the identities of its main
    files by relative path. result: the object of its verb.
    """

    stage: str
    verb: str
    status: str
    fingerprint: str
    made: str
    of: Mapping[str, Any]
    files: Mapping[str, str | int] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    format: int = RECORD_FORMAT


@in_first_process
def read_record(place: Path) -> StageRecord | None:
    """Return the record in a stage's directory; None without one.

    Raises CheckpointError, and UsageError if the directory has files but no record: a pipeline does not change it.
    """
    path = place / RECORD
    if not path.exists():
        if place.is_file() or (place.is_dir() and any(place.iterdir())):
            raise UsageError(
                "usage.output_exists",
                f"{place} exists and was not created by `distillm run`",
                hint="choose another --output, or move it away",
            )
        return None
    hint = f"remove {place} to start that stage over"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != RECORD_FORMAT:
            raise CheckpointError(
                "checkpoint.other_version",
                f"{path}: format {content['format']}, this version reads {RECORD_FORMAT}",
                hint=hint,
            )
        record = StageRecord(**content)
        if not all(isinstance(record.of.get(part), dict) for part in ("settings", "reads", "files")):
            raise ValueError("it has no inputs of the stage")
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("checkpoint.damaged", f"{path} cannot be read ({error})", hint=hint) from error


@in_first_process
def write_record(place: Path, record: StageRecord) -> None:
    """Write the record atomically. Raises StorageError."""
    with storing(f"cannot write to {place}", "choose another --output"):
        place.mkdir(parents=True, exist_ok=True)
        atomic_write(place / RECORD, json.dumps(asdict(record), indent=1, ensure_ascii=False) + "\n")


@in_first_process
def start_record(stage: Stage, of: Mapping[str, Any], before: StageRecord | None) -> StageRecord:
    """Return the record of a stage that is about to run.

    If ``before`` has the same fingerprint, the stage is resumed with its version name and files.
    """
    fingerprint = stage_fingerprint(of)
    if before is not None and before.fingerprint == fingerprint:
        status = "starting" if before.status == "starting" else "started"
        return StageRecord(stage.name, stage.verb, status, fingerprint, before.made, of, before.files)
    return StageRecord(stage.name, stage.verb, "starting", fingerprint, _new_version(), of)


@in_first_process
def finished_record(record: StageRecord, stage: Stage, place: Path, result: Mapping[str, Any]) -> StageRecord:
    """Return the record of a stage that is done.

    If its files were finished before and have changed (rows that a user corrected), it gets a new version name, so that
    the stages that read it run again.
    """
    made = _new_version() if record.files and not is_intact(record, place) else record.made
    return replace(record, status="done", made=made, files=main_files(stage, place), result=result)


def _new_version() -> str:
    return secrets.token_hex(8)


def stage_fingerprint(of: Mapping[str, Any]) -> str:
    """Return the SHA-256 of everything that a stage's result depends on."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()


def stage_output(stage: Stage, place: Path) -> Path:
    """Return the path of a stage's output: a model directory, or a file of rows."""
    return place / SAMPLES if stage.verb == "generate" else place


def main_files(stage: Stage, place: Path) -> dict[str, str]:
    """Return the files that a finished stage must have, with their identities."""
    verb_patterns = {"generate": (SAMPLES,), "eval": ("**/results.json", "**/predictions-*.jsonl")}
    patterns = verb_patterns.get(stage.verb, output_dir.MODEL_FILES)
    paths = sorted(path for pattern in patterns for path in place.glob(pattern))
    return {path.relative_to(place).as_posix(): _identity(path) for path in paths}


@in_first_process
def is_intact(record: StageRecord, place: Path) -> bool:
    """Return whether a finished stage's main files exist unchanged."""
    return bool(record.files) and all(_is_unchanged(known, place / name) for name, known in record.files.items())


def _is_unchanged(known: str | int, path: Path) -> bool:
    if not path.is_file():
        return False
    # Earlier versions recorded only the size.
    return path.stat().st_size == known if isinstance(known, int) else _identity(path) == known


@in_first_process
def fingerprint_inputs(stage: Stage, made: Mapping[str, str]) -> dict[str, Any]:
    """Return everything that a stage's result depends on. made: version names of the other stages, by stage name."""
    recipe = stage.resolved.recipe
    if stage.verb in ("sft", "distill"):
        settings = fixed_values(recipe)
    else:
        sections = ("data.", "eval.") if stage.verb == "eval" else ("data.",)
        settings = {
            key: value
            for key, value in values(recipe).items()
            if key not in _NOT_SHAPING and (key.startswith(sections) or key in _SHAPING[stage.verb])
        }
    stage_settings = stage.config.model_dump(mode="json", exclude={"recipe", "server"})
    if getattr(stage.config, "server", None) is not None:
        stage_settings["server"] = True  # its address may change
    files = {}
    for key, text in inputs(stage.config, recipe):
        identity = _input_identity(key, text)
        if identity is not None:
            files[text] = identity
    return {
        "settings": {**stage_settings, **settings},
        "reads": {name: made[name] for name in stage.depends_on},
        "files": files,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the changes of a stage as clauses: "train.lr 0.001 → 0.002", "rows.jsonl", "stage teacher"."""
    changes = []
    for key in sorted(before["settings"].keys() | now["settings"].keys()):
        old = before["settings"].get(key)
        new = now["settings"].get(key)
        if old != new:
            changes.append(f"{key} {old} → {new}")
    for part, words in (("files", "{}"), ("reads", "stage {}")):
        old = before[part]
        new = now[part]
        changes += [words.format(name) for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return changes


@in_first_process
def check_data_files(stage: Stage) -> None:
    """Raise DataError for a missing data file, before any earlier stage runs."""
    for key, text in inputs(stage.config, stage.resolved.recipe):
        if names_rows(key) and not text.startswith(PREFIX) and is_path(text) and local_path(text) is None:
            raise DataError(
                "data.not_found",
                f"stage {stage.name}: {key} = {text}: no such file or directory",
                hint="check the path",
            )


def _input_identity(key: str, text: str) -> str | None:
    if text.startswith(PREFIX):
        return None
    place = local_input(key, text)
    if place is None:
        return None
    if place.is_file():
        return _identity(place)
    digest = hashlib.sha256()
    for folder in (place, place / "data", *(saved_splits(place) or {}).values()):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            is_of_model = path.suffix in (*_WEIGHTS, *_OTHER_MODEL_FILES) and path.name not in _RUN_FILES
            if is_of_model and path.is_file() and not path.name.startswith("."):
                digest.update(f"{path.name} {_identity(path)}\n".encode())
    return digest.hexdigest()


def _identity(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if path.suffix not in _WEIGHTS or size <= _BLOCKS * _BLOCK_BYTES:
                return hashlib.file_digest(file, "sha256").hexdigest()
            digest = hashlib.sha256(str(size).encode())
            for i in range(_BLOCKS):
                file.seek(i * (size - _BLOCK_BYTES) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
            return digest.hexdigest()
    except OSError as error:
        raise DataError("data.unreadable", f"{path}: {error.strerror or error}", hint="check the path") from error


@contextmanager
def lock_pipeline(output: Path) -> Iterator[None]:
    """Lock the directory against other pipelines, in the first process.

    Raises UsageError if one is running in it, StorageError.
    """

    def busy() -> None:
        what = f"another `distillm run` is active in {output}"
        raise UsageError("usage.output_in_use", what, hint="wait for it, or choose another --output")

    if not world().is_first:
        yield
        return
    if output.is_file():
        raise UsageError("usage.output_exists", f"--output {output} is a file", hint="choose a directory")
    with storing(f"cannot write to {output}", "choose another --output"):
        output.mkdir(parents=True, exist_ok=True)
    with locked(output, busy):
        yield
