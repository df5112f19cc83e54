"""The output directory: named, checked, filled. It ends as an ordinary Hugging Face directory."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distillm_cli.errors import CheckpointError, StorageError, UsageError
from distillm_cli.utils import manifest
from distillm_cli.utils.storage import PROBE, REMOVED, check_writable, leads_nowhere, reason, remove
from distillm_cli.utils.text import redact

try:
    import fcntl
except ImportError:  # Windows: two runs into one directory are then not told apart
    fcntl = None

CHECKPOINTS, METRICS, RECIPE, EVAL = "checkpoints", "metrics.jsonl", "recipe.yaml", "eval"
TEMPLATES = "additional_chat_templates"  # of tokenizers that have several
CARD, MADE_WITH = "README.md", "**made with**: distillm"  # in a card of ours
_MANY = 50  # settings: nobody writes so many by hand, each with a comment
SFT = "sft"  # the stage before distillation, an output directory in the output directory

# What a run writes; `--overwrite` clears these and nothing else, so that a mistyped path loses nobody's files.
MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors",
    "model-*-of-*.safetensors", "preprocessor_config.json", "image_processor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
_FILES = (METRICS, manifest.MANIFEST, *MODEL_FILES, ".staging-*")
_FOLDERS = {
    CHECKPOINTS: ("step-*", ".staging-*", f"{REMOVED}*"),
    EVAL: ("report/*.json", "*/*/results.json", "*/*/predictions-*.jsonl", "**/.staging-*"),
    TEMPLATES: ("*.jinja",),
}


def default_name(recipe: str | None, data: str, student: str, method: str, *, resume: bool) -> Path:
    """``runs/dolly-gpt2-distillm``, with a number where that is taken; on a resume the newest of that name."""

    def short(text: str) -> str:
        stem = Path(redact(text).rstrip("/")).name.removesuffix(".jsonl").removesuffix(".json")
        return re.sub(r"[^\w.+-]+", "-", stem).strip("-.") or "run"

    name = short(recipe) if recipe else f"{short(data)}-{short(student)}"
    base = Path("runs") / (name if method in name else f"{name}-{method}")
    taken = [base] if base.exists() else []
    while (candidate := base.with_name(f"{base.name}-{len(taken) + 1}")).exists() and taken:
        taken.append(candidate)
    if resume:  # of those that saved something, if any did: a run that was stopped at once hides none before it
        return next(filter(_may_resume, reversed(taken)), taken[-1] if taken else base)
    return candidate if taken else base


def _may_resume(output: Path) -> bool:
    return any((place / CHECKPOINTS).is_dir() for place in (output, output / SFT))


def check(output: Path, *, resume: bool, overwrite: bool) -> bool:
    """Makes sure the directory may be written, and returns whether it was made for that.

    A non-empty one is refused without ``resume`` or ``overwrite``. Nothing in it is touched. Raises UsageError,
    CheckpointError, StorageError.
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other", hint="give one of them")
    try:
        _check_used(output, resume=resume, overwrite=overwrite)
        is_new = not output.exists()
        output.mkdir(parents=True, exist_ok=True)
        check_writable(output)
        for leftover in output.glob(f"{PROBE}*"):  # of earlier versions
            leftover.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write to {output}: {error.strerror}", hint="choose another --output") from error
    return is_new


def _check_used(output: Path, *, resume: bool, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file", hint="give a directory")
    if leads_nowhere(output):
        raise UsageError(
            f"--output {output} is a symbolic link that leads nowhere", hint="remove it, or give a directory"
        )
    if resume and not _may_resume(output):
        raise CheckpointError(
            f"nothing to resume: {output / CHECKPOINTS} does not exist", hint="start without --resume"
        )
    is_used = output.is_dir() and any(not path.name.startswith(PROBE) for path in output.iterdir())
    if is_used and not (resume or overwrite):
        raise UsageError(
            f"output directory {output} is not empty",
            hint="choose another --output, or give --resume to go on or --overwrite to start anew",
        )
    if overwrite and (path := foreign(output)) is not None:
        raise UsageError(f"{path} was not written by a run", hint="choose another --output, or move it away")


def written(output: Path) -> Iterator[Path]:
    """What runs have left in an output directory: files, and whole checkpoints. Of a folder that is a link, the link.

    Nothing where no run has been: what has the same name there is somebody's own.
    """
    if not is_resolved(output / RECIPE):
        return
    for pattern in _FILES:
        yield from output.glob(pattern)
    if (card := output / CARD).is_file() and MADE_WITH in card.read_text(encoding="utf-8", errors="replace"):
        yield card
    for name, patterns in _FOLDERS.items():
        folder = output / name
        if folder.is_symlink():
            yield folder
        else:
            for pattern in patterns:
                yield from folder.glob(pattern)
    if has_stage(output):
        stage = output / SFT
        yield from [stage] if stage.is_symlink() else written(stage)
    yield output / RECIPE  # last, so that a clearing that is stopped half way can be gone on with


def foreign(output: Path) -> Path | None:
    """A file in the directory that a run would replace and that no run wrote; None where there is none."""
    ours = set(written(output))
    in_folders = (f"{name}/{pattern}" for name, patterns in _FOLDERS.items() for pattern in patterns)
    named = (path for name in (*_FILES, CARD, RECIPE, *in_folders) for path in sorted(output.glob(name)))
    broken = (output / name for name in _FOLDERS if leads_nowhere(output / name))
    found = (path for path in itertools.chain(named, broken) if path not in ours)
    return next((path for path in found if not any(parent in ours for parent in path.parents)), None)


def has_stage(output: Path) -> bool:
    """Whether ``OUTPUT/sft`` is a stage of the run in ``output``, and no run of its own beside it."""
    if not (output / SFT).is_dir() or not is_resolved(output / RECIPE):
        return False
    epochs = re.search(r"^  sft_epochs: +([\d.]+)", _text(output / RECIPE), re.M)
    return epochs is not None and float(epochs[1]) > 0


def is_resolved(recipe: Path) -> bool:
    """Whether a run wrote this recipe or pipeline: every setting is in it, and says where it came from."""
    lines = _text(recipe).splitlines() if recipe.is_file() else []
    values = [line for line in lines if not line.lstrip().startswith("#") and not line.endswith(":")]
    return len(values) > _MANY and all("  # " in line for line in values)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def clear(output: Path) -> list[Path]:
    """Removes what an earlier run wrote into the directory, and only that; folders go where nothing else is in them.

    Returns the directories of which something could not be removed: only parts are left, under names that no run reads.
    Raises StorageError where one keeps its name.
    """
    stuck = []
    for path in [*written(output)]:
        is_directory = path.is_dir() and not path.is_symlink()
        error = remove(path) if is_directory else _unlink(path)
        if error is not None and os.path.lexists(path):
            what = f"cannot remove {path}, of an earlier run: {reason(error)}"
            raise StorageError(what, hint="choose another --output, or remove it yourself")
        stuck += [path] if error is not None else []
    for name in (*_FOLDERS, SFT):
        for folder, _, _ in os.walk(output / name, topdown=False):
            with suppress(OSError):  # somebody's own files are in it
                Path(folder).rmdir()
    return stuck


def _unlink(path: Path) -> OSError | None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        return error
    return None


@contextmanager
def claimed(output: Path, *, is_new: bool = False) -> Iterator[None]:
    """No other run works in this directory meanwhile. Raises UsageError where one does.

    The directory itself is locked: nothing is left in it, and the lock dies with the process. is_new: it was made for
    this run, and goes again where the run fails before it wrote anything.
    """
    output.mkdir(parents=True, exist_ok=True)  # one that another run made, and took away when it failed
    directory = None if fcntl is None else os.open(output, os.O_RDONLY)
    try:
        if directory is not None and is_taken(directory):
            raise UsageError(f"another run is at work in {output}", hint="wait for it, or choose another --output")
        try:
            yield
        except BaseException:
            if is_new:
                with suppress(OSError):  # something is in it
                    output.rmdir()
            raise
    finally:
        if directory is not None:
            os.close(directory)


def is_taken(descriptor: int) -> bool:
    """Whether somebody else holds this open file or directory; if not, it is held from here on, until it is closed."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks: then there is nobody to be told apart
        return False
    return False


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or none."""
    staged = path.with_name(f".staging-{path.name}")
    try:
        staged.write_text(text, encoding="utf-8")
        staged.replace(path)
    except OSError as error:
        _unlink(staged)
        error.filename = error.filename or str(path)  # a write that fails does not name its file
        raise


def publish(staged: Path, output: Path) -> None:
    """Move a finished model directory's files into ``output``, weights last, remove ``staged``, and write the manifest.

    The manifest lists them and the recipe, but not the card, which people edit.
    """
    # Not at the top: it imports torch, and whoever only names an output can do without.
    from distillm_cli.training.checkpoint import open_as_others

    open_as_others(staged)
    (output / manifest.MANIFEST).unlink(missing_ok=True)  # an earlier one, of what is replaced now
    published = [output / RECIPE]
    if (staged / TEMPLATES).is_dir():
        (output / TEMPLATES).mkdir(exist_ok=True)
        for path in (staged / TEMPLATES).iterdir():
            path.replace(output / TEMPLATES / path.name)
        (staged / TEMPLATES).rmdir()
    for path in sorted(staged.iterdir(), key=lambda p: p.suffix == ".safetensors"):
        path.replace(output / path.name)
        if path.name != CARD:
            published.append(output / path.name)
    staged.rmdir()
    manifest.write(output, [path for path in published if path.is_file()])


def write_recipe(output: Path, text: str) -> None:
    """Write the recipe of a run that begins; the manifest of an earlier one then lists the model alone."""
    listed = manifest.read(output)
    if listed is not None and listed["files"].pop(RECIPE, None) is not None:
        manifest.replace(output, listed)
    write_text(output / RECIPE, text)
