"""Name, check, lock, fill and clear an output directory, which is a standard Hugging Face directory at the end.

Files of a run are listed in ``manifest.json`` before they are written. ``--overwrite`` removes only listed files.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path, PurePosixPath

import distillm_cli
from distillm_cli.errors import CheckpointError, StorageError, UsageError
from distillm_cli.training.distributed import in_first_process, world
from distillm_cli.utils import manifest
from distillm_cli.utils.storage import (
    PROBE,
    atomic_write,
    check_writable,
    is_broken_link,
    leftovers,
    locked,
    move_into,
    remove,
    staging_directory,
    storage_error,
    storing,
)
from distillm_cli.utils.text import json_value, printable, redact

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
RECIPE = "recipe.yaml"
EVAL = "eval"
_RESULTS = "results.json"  # of an evaluation
TEMPLATES = "additional_chat_templates"  # of tokenizers that have several
CARD = "README.md"
REPORT = "report.html"
RESULT = "result.json"  # of a training: the object of ``--json``
COMPARE = "compare"  # the baselines, each an output directory
TRAINED_TEACHER = "teacher"  # a teacher that the run trained
SFT = "sft"
PTP = "ptp"
MASK = "mask"
DISTILLED = "distilled"  # distillation of embeddings before fine-tuning on pairs
STAGES = (SFT, PTP, MASK, DISTILLED)  # before the run, in their order: output directories within the output directory

MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors",
    "model-*-of-*.safetensors", "preprocessor_config.json", "image_processor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip
SENTENCE_FOLDERS = ("1_Pooling", "2_Dense", "2_Normalize", "3_Normalize")  # of sentence-transformers
# Files that a run would replace. If one of them exists and no manifest lists it, a run does not write to the directory.
_REPLACED = (
    RECIPE, METRICS, CARD, RESULT, REPORT, manifest.MANIFEST, *MODEL_FILES, f"{CHECKPOINTS}/step-*", f"{EVAL}/report/*.json",
    f"{TEMPLATES}/*.jinja", *(f"{name}/*" for name in SENTENCE_FOLDERS),
)  # fmt: skip
_FOLDERS = (CHECKPOINTS, EVAL, TEMPLATES, *SENTENCE_FOLDERS)
_MODEL = "model"  # names the directory in which a model is staged


@in_first_process
def default_name(recipe: str | None, data: str, student: str, method: str, *, resume: bool) -> Path:
    """Return ``runs/dolly-gpt2-distillm``, with a number if that exists; on a resume the newest of that name."""

    name = _short(recipe) if recipe else f"{_short(data)}-{_short(student)}"
    base = Path("runs") / (name if method in name else f"{name}-{method}")
    taken = [base] if base.exists() else []
    while (candidate := base.with_name(f"{base.name}-{len(taken) + 1}")).exists() and taken:
        taken.append(candidate)
    if resume:  # the newest that can be resumed: a later run may have stopped before it saved anything
        return next(filter(may_resume, reversed(taken)), taken[-1] if taken else base)
    return candidate if taken else base


def pilot_name(recipe: str | None, data: str, student: str) -> Path:
    """Return ``runs/dolly-gpt2-pilot``, which the same command continues."""
    return Path("runs") / f"{_short(recipe) if recipe else f'{_short(data)}-{_short(student)}'}-pilot"


def _short(text: str) -> str:
    stem = Path(redact(text).rstrip("/")).name.removesuffix(".jsonl").removesuffix(".json")
    return re.sub(r"[^\w.+-]+", "-", stem).strip("-.") or "run"


def places(output: Path) -> list[Path]:
    """Return the directories that may have checkpoints of a run: its own, and those of its stages."""
    return [output, *(output / name for name in STAGES)]


@in_first_process
def may_resume(output: Path) -> bool:
    """Return whether the directory has checkpoints of a run."""
    return any((place / CHECKPOINTS).is_dir() for place in places(output))


@in_first_process
def check_output(output: Path, *, resume: bool, overwrite: bool) -> bool:
    """Check that the directory may be written, and return whether it was created.

    A non-empty one is refused without ``resume`` or ``overwrite``. Its contents are not changed. Raises UsageError,
    CheckpointError, StorageError.
    """
    if resume and overwrite:
        raise UsageError(
            "usage.exclusive_options", "--resume and --overwrite are mutually exclusive", hint="choose one of them"
        )
    with storing(f"cannot write to {output}", "choose another --output"):
        _check_used(output, resume=resume, overwrite=overwrite)
        is_new = not output.exists()
        output.mkdir(parents=True, exist_ok=True)
        check_writable(output)
        for leftover in output.glob(f"{PROBE}*"):  # of earlier versions
            leftover.unlink(missing_ok=True)
    return is_new


def _check_used(output: Path, *, resume: bool, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UsageError("usage.output_exists", f"--output {output} is a file", hint="choose a directory")
    if is_broken_link(output):
        raise UsageError(
            "usage.output_exists",
            f"--output {output} is a broken symbolic link",
            hint="remove it, or choose a directory",
        )
    if resume and not may_resume(output):
        raise CheckpointError(
            "checkpoint.nothing_to_resume",
            f"nothing to resume: {output / CHECKPOINTS} does not exist",
            hint="start without --resume",
        )
    is_used = output.is_dir() and any(not path.name.startswith(PROBE) for path in output.iterdir())
    if is_used and not (resume or overwrite):
        raise UsageError(
            "usage.output_exists",
            f"output directory {output} is not empty",
            hint="choose another --output, or use --resume to continue or --overwrite to start over",
        )
    if overwrite and (path := foreign(output)) is not None:
        raise UsageError(
            "usage.output_exists", f"{path} was not written by a run", hint="choose another --output, or move it away"
        )


def written(output: Path) -> Iterator[Path]:
    """Yield the files and checkpoints of runs in an output directory, according to its manifest.

    Yields nothing without a manifest, since files with the same names belong to the user. So do edited files with a
    seal. For a folder that is a link, the link is yielded. The manifest itself comes last, so that an interrupted
    removal can be continued.
    """
    listed = manifest.read_manifest(output)
    if listed is None or "written" not in listed:
        return
    for name, sealed in listed["written"].items():
        path = output / name
        link = _link_above(output, name)
        if link is not None:
            yield link
            continue
        yield from leftovers(path.parent, path.name)
        if name in STAGES and path.is_dir() and not path.is_symlink():
            yield from written(path)
        elif os.path.lexists(path) and (sealed is None or manifest.matches_seal(path, sealed)):
            yield path
    for found in sorted(output.glob(f"{EVAL}/*/*/{manifest.MANIFEST}")):
        is_linked = _link_above(output, found.relative_to(output).as_posix()) is not None
        if not is_linked and _RESULTS in manifest.recorded(
            found.parent
        ):  # of an evaluation, and not of a model in this directory
            yield from written(found.parent)
    yield from leftovers(output, _MODEL)
    yield from leftovers(output, manifest.MANIFEST)
    yield output / manifest.MANIFEST


def _link_above(output: Path, name: str) -> Path | None:
    """Return the outermost symbolic link among the folders of a path in the directory; None without one."""
    folders = [output / parent for parent in reversed(PurePosixPath(name).parents) if parent.name]
    return next((folder for folder in folders if folder.is_symlink()), None)


def foreign(output: Path) -> Path | None:
    """Return a file in the directory that a run would replace and that no run wrote; None without one."""
    ours = set(written(output))
    found = [path for pattern in _REPLACED for path in sorted(output.glob(pattern))]
    found += [output / name for name in _FOLDERS if is_broken_link(output / name)]
    return next((path for path in found if ours.isdisjoint([path, *path.parents])), None)


@in_first_process
def foreign_teacher(output: Path) -> Path | None:
    """Return what keeps a run from saving its teacher in ``OUTPUT/teacher``; None if it can.

    That is the directory itself, if no run wrote into it, or a file that the run would replace and that no run wrote.
    """
    place = output / TRAINED_TEACHER
    if not os.path.lexists(place):
        return None
    if place.is_symlink() or not place.is_dir():
        return place
    ours = set(written(output))
    if any(place.iterdir()) and not any(path.is_relative_to(place) for path in ours):
        return place
    found = chain.from_iterable(sorted(place.glob(pattern)) for pattern in MODEL_FILES)
    return next((path for path in found if path not in ours), None)


@in_first_process
def has_stage(output: Path, name: str) -> bool:
    """Return whether ``OUTPUT/NAME`` is a stage of the run in ``output``, not an unrelated directory."""
    return (output / name).is_dir() and name in manifest.recorded(output)


@in_first_process
def clear(output: Path) -> list[Path]:
    """Remove the files of an earlier run from the directory, and folders that become empty.

    Returns the directories that could not be removed completely: their remaining parts have names that no run reads.
    Raises StorageError if one could not be renamed.
    """
    stuck = []
    for path in list(written(output)):
        error = remove(path)
        if error is None:
            continue
        if os.path.lexists(path):
            hint = "choose another --output, or remove it manually"
            raise storage_error(error, f"cannot remove {path}, of an earlier run", hint) from error
        stuck.append(path)
    for name in (*_FOLDERS, *STAGES, TRAINED_TEACHER):
        for folder, _, _ in os.walk(output / name, topdown=False):
            with suppress(OSError):  # it contains files of the user
                Path(folder).rmdir()
    return stuck


def check_shared(output: Path) -> None:
    """Raise StorageError if a process of the run, on another machine, does not see the directory."""
    dist = world()
    if dist.size == 1:
        return
    with ExitStack() as stack:

        def new_probe() -> Path:
            return Path(stack.enter_context(tempfile.NamedTemporaryFile(prefix=PROBE, dir=output)).name).resolve()

        seen = dist.gather(dist.broadcast(new_probe).exists)
    if not all(seen):
        what = f"process {seen.index(False)} does not see the output directory {output}"
        hint = "choose an --output on a file system that all machines share"
        raise StorageError("storage.not_shared", what, hint=hint)


@contextmanager
def claimed(output: Path, *, is_new: bool = False) -> Iterator[None]:
    """Lock the directory against other runs, in the first process. Raises UsageError if another run has locked it.

    The directory itself is locked, without a lock file, and the lock ends with the process. is_new: it was created for
    this run, and is removed if the run fails before it writes anything.
    """

    def busy() -> None:
        raise UsageError(
            "usage.output_in_use", f"another run is active in {output}", hint="wait for it, or choose another --output"
        )

    if not world().is_first:
        yield
        return
    output.mkdir(parents=True, exist_ok=True)  # created by another run, and removed when that failed
    with locked(output, busy):
        try:
            yield
        except BaseException:
            if is_new:
                with suppress(OSError):  # not empty
                    output.rmdir()
            raise


@in_first_process
def write_file(output: Path, name: str, text: str) -> None:
    """Write a file of a run atomically, after listing it in the directory's manifest. Raises OSError.

    name: relative path, with slashes.
    """
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    manifest.record(output, [name])
    atomic_write(output / name, text)


@in_first_process
def write_result(output: Path, result: Mapping[str, object]) -> None:
    """Write the result of a training. Raises StorageError."""
    text = json.dumps(json_value(result), allow_nan=False, indent=1) + "\n"
    with storing(f"cannot write {output / RESULT}", "free disk space; the model is complete"):
        write_file(output, RESULT, text)


@in_first_process
def checkpoint_sizes(output: Path) -> list[int]:
    """Return the size of each checkpoint in the directory and in its stages, in bytes."""
    return [sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in _checkpoints(output)]


@in_first_process
def remove_checkpoints(output: Path) -> list[Path]:
    """Remove the checkpoints in the directory and in its stages. Returns those that could not be removed."""
    stuck = []
    for path in _checkpoints(output):
        if remove(path) is None:
            manifest.record(path.parents[1], [], removed=[f"{CHECKPOINTS}/{path.name}"])
        else:
            stuck.append(path)
    for place in places(output):
        with suppress(OSError):  # not empty
            (place / CHECKPOINTS).rmdir()
    return stuck


def _checkpoints(output: Path) -> list[Path]:
    owned = [output, *(output / name for name in STAGES if has_stage(output, name))]
    return [path for place in owned for path in sorted((place / CHECKPOINTS).glob("step-*")) if path.is_dir()]


def recipe_header() -> str:
    """Return comments for a recipe: version, host, time, and the command, if any."""
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    lines = [f"# Written by distillm {distillm_cli.__version__} on {platform.node() or 'an unnamed host'}, {when}"]
    if Path(sys.argv[0]).name in ("distillm", "distillm.exe", "__main__.py"):
        command = " ".join(shlex.join(["distillm", *sys.argv[1:]]).split())
        lines.append(f"# Command: {redact(printable(command))}")
    return "".join(f"{line}\n" for line in lines)


@in_first_process
def write_recipe(output: Path, text: str, *, stages: Iterable[str] = ()) -> None:
    """Write the recipe at the start of a run. Of the files that an earlier run sealed, only the model stays sealed.

    stages: names of the directories of the stages before the run.
    """
    output.mkdir(parents=True, exist_ok=True)
    manifest.unseal(output, RECIPE)
    manifest.record(output, [METRICS, *stages])
    write_file(output, RECIPE, recipe_header() + text)


@contextmanager
def publishing(output: Path) -> Iterator[Path]:
    """Yield a directory for a model's files, and move them into ``output`` when the block ends, weights last.

    They are sealed together with the recipe. The model card, which users may edit, is listed with its digest: an edited
    card belongs to the user.
    """
    # Not at the top: it imports torch, which callers that only name an output do not need.
    from distillm_cli.training.checkpoint import set_default_modes

    with staging_directory(output / _MODEL) as staged:
        yield staged
        set_default_modes(staged)
        _move_model(staged, output)


def _move_model(staged: Path, output: Path) -> None:
    places = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_dir())  # parents first
    folders = {name: sorted(path for path in (staged / name).iterdir() if path.is_file()) for name in places}
    files = sorted(
        (path for path in staged.iterdir() if path.is_file()), key=lambda path: path.suffix == ".safetensors"
    )
    seals = {CARD: manifest.seal(staged / CARD)} if (staged / CARD).is_file() else {}
    names = [path.relative_to(staged).as_posix() for path in (*chain.from_iterable(folders.values()), *files)]
    manifest.unseal(output)  # files that an earlier run sealed are replaced now
    manifest.record(output, [name for name in names if name not in seals], seals=seals)
    for name, inside in folders.items():
        move_into(output / name, inside)
    move_into(output, files)
    sealed = [output / RECIPE, *(output / path.name for path in files if path.name != CARD)]
    manifest.seal_directory(output, [path for path in sealed if path.is_file()])
