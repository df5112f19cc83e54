"""Write and check manifests: the files of a directory with size and SHA-256. A file that differs from it is damaged.

It is written last, at once. A checkpoint has one, and so has the output directory, for what the run wrote there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from distillm_cli.errors import CheckpointError, DistillmError, ModelError

MANIFEST = "manifest.json"
FORMAT = 1
# Files of a model directory that people edit after a run, and that are used as they are then, with a warning.
EDITABLE = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja")
# Files that no model is read from.
_ASIDE = ("training.safetensors", "state.json", "recipe.yaml", "frozen.txt")

_digests: dict[tuple, str] = {}  # of files that were hashed by this process, as they were then


def write(directory: Path, files: Iterable[Path], **facts: Any) -> None:
    """Write the manifest of these files of a directory, which are flushed to the disk first. facts: more keys of it."""
    sealed = {}
    for path in sorted(files):
        flush(path)
        sealed[path.relative_to(directory).as_posix()] = seal(path)
    replace(directory, {"format": FORMAT, **facts, "files": sealed})


def replace(directory: Path, manifest: dict) -> None:
    """Write a manifest at once."""
    staged = directory / f".staging-{MANIFEST}"
    try:
        staged.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        flush(staged)
        staged.replace(directory / MANIFEST)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(directory / MANIFEST)) from error
    flush(directory)


def read(directory: Path) -> dict | None:
    """Return the manifest of a directory; None where it has none of ours.

    Raises CheckpointError for one that cannot be read or that another version wrote.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if not path.parent.is_dir() or isinstance(error, FileNotFoundError):
            return None
        hint = f"copy or download it again, or delete it to use {directory} unchecked"
        raise CheckpointError(f"cannot read {path}: {error}", hint=hint) from error
    if not (isinstance(manifest, dict) and {"format", "files"} <= manifest.keys()):
        return None  # another program's
    if manifest["format"] != FORMAT or not isinstance(manifest["files"], dict):
        what = f"{path} has format {manifest['format']}, this version reads {FORMAT}"
        raise CheckpointError(what, hint=f"update distillm, or delete it to use {directory} unchecked")
    return manifest


def check(directory: Path, *, weights: bool) -> None:
    """Compare a model's files with the manifest beside them, if there is one: its weights, or all the others.

    A file is hashed once per process while it stays the same. Raises ModelError, or CheckpointError for a checkpoint.
    """
    manifest = read(directory)
    for name in () if manifest is None else manifest["files"]:
        if name in (*_ASIDE, *EDITABLE) or fnmatch(name, "*.safetensors") != weights:
            continue
        if (what := difference(directory, manifest, name)) is not None:
            raise _damaged(directory, manifest, what)


def edited(directory: Path) -> Iterator[str]:
    """Yield the paths of settings that differ from the manifest beside them."""
    manifest = read(directory)
    for name in () if manifest is None else EDITABLE:
        if name in manifest["files"] and difference(directory, manifest, name) is not None:
            yield str(directory / name)


def difference(directory: Path, manifest: dict, name: str) -> str | None:
    """Return what is wrong with a listed file; None where it is as it was written."""
    path, sealed = directory / name, manifest["files"][name]
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != sealed.get("bytes") or digest(path) != sealed.get("sha256"):
        return f"{path} is damaged or changed: it differs from {directory / MANIFEST}"
    return None


def _damaged(directory: Path, manifest: dict, what: str) -> DistillmError:
    if "step" in manifest:
        return CheckpointError(what, hint="copy it again, or take another checkpoint")
    hint = f"copy or download it again; if the change is yours, delete {directory / MANIFEST}"
    return ModelError(what, hint=hint)


def seal(path: Path) -> dict:
    """Return the entry of a file: ``bytes`` and ``sha256``, read from the disk."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def digest(path: Path) -> str:
    """Return a file's SHA-256, without reading it again while it stays the same."""
    stat = path.stat()
    key = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key not in _digests:
        _digests[key] = seal(path)["sha256"]
    return _digests[key]


def flush(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
