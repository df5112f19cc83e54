"""Write and read manifests: what a run wrote into a directory, and whether it is still as it was written.

    {"format": 1,
     "files": {"model.safetensors": {"bytes": …, "sha256": …}, …},      sealed: another content is damage
     "written": {"metrics.jsonl": null, "README.md": {"bytes": …, "sha256": …}, …}}

``files`` are sealed once they are whole. ``written`` lists every file and directory of the run, each before it is written,
so that the leftovers of a killed run are known: ``--overwrite`` removes these and nothing else. One with a seal is the
run's only as long as it has this content. Output directories, results of an evaluation and pipelines have a manifest
with ``written``; a checkpoint has one with ``files``, and is one entry of its run's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from distillm_cli.errors import CheckpointError, DistillmError, ModelError
from distillm_cli.utils.storage import atomic_write, flush

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
# Files of a model directory that people edit after a run, and that are used as they are then, with a warning.
EDITABLE = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja")
# Files that no model is read from.
_ASIDE = ("training.safetensors", "state.json", "recipe.yaml", "frozen.txt")

_digests: dict[tuple, str] = {}  # of files that were hashed by this process, as they were then


def seal_directory(directory: Path, files: Iterable[Path], **facts: Any) -> None:
    """Write the manifest that seals these files of a directory, which are flushed to the disk first.

    facts: more keys of it. An earlier manifest is replaced, except for its ``written``.
    """
    sealed = {}
    for path in sorted(files):
        flush(path)
        sealed[path.relative_to(directory).as_posix()] = seal(path)
    earlier = read_manifest(directory) or {}
    written = {"written": earlier["written"]} if "written" in earlier else {}
    _write(directory, {"format": MANIFEST_FORMAT, **facts, "files": sealed, **written})


def unseal(directory: Path, name: str | None = None) -> None:
    """Remove one file, or all, from the sealed ones of a directory; nothing where there is no manifest."""
    manifest = read_manifest(directory)
    if manifest is None or (name is not None and name not in manifest["files"]):
        return
    sealed = {} if name is None else {key: value for key, value in manifest["files"].items() if key != name}
    _write(directory, manifest | {"files": sealed})


def record(
    directory: Path, names: Iterable[str], *, removed: Iterable[str] = (), seals: dict[str, dict] | None = None
) -> None:
    """List files and directories as written by a run, before they are; a manifest is made where there is none.

    names: relative paths, with slashes. removed: those to take off the list. seals: of files that people edit.
    """
    manifest = read_manifest(directory) or {"format": MANIFEST_FORMAT, "files": {}}
    before = manifest.get("written", {})
    gone = set(removed)
    now = {name: entry for name, entry in before.items() if name not in gone}
    for name in names:
        now.setdefault(name, None)
    now |= seals or {}
    if now != before or "written" not in manifest:
        _write(directory, manifest | {"written": now})


def recorded(directory: Path) -> dict[str, dict | None]:
    """Return what runs have written into a directory: relative path → its seal, if it has one. Empty without a manifest."""
    return (read_manifest(directory) or {}).get("written", {})


def read_manifest(directory: Path) -> dict | None:
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
    is_whole = isinstance(manifest["files"], dict) and isinstance(manifest.get("written", {}), dict)
    if manifest["format"] != MANIFEST_FORMAT or not is_whole:
        what = f"{path} has format {manifest['format']}, this version reads {MANIFEST_FORMAT}"
        raise CheckpointError(what, hint=f"update distillm, or delete it to use {directory} unchecked")
    return manifest


def _write(directory: Path, manifest: dict) -> None:
    atomic_write(directory / MANIFEST, json.dumps(manifest, indent=1))
    flush(directory)


def check_files(directory: Path, *, weights: bool) -> None:
    """Compare a model's files with the manifest beside them, if there is one: its weights, or all the others.

    A file is hashed once per process while it stays the same. Raises ModelError, or CheckpointError for a checkpoint.
    """
    manifest = read_manifest(directory)
    for name in () if manifest is None else manifest["files"]:
        if name in (*_ASIDE, *EDITABLE) or fnmatch(name, "*.safetensors") != weights:
            continue
        if (what := difference(directory, manifest, name)) is not None:
            raise _damaged(directory, manifest, what)


def edited(directory: Path) -> Iterator[str]:
    """Yield the paths of settings that differ from the manifest beside them."""
    manifest = read_manifest(directory)
    for name in () if manifest is None else EDITABLE:
        if name in manifest["files"] and difference(directory, manifest, name) is not None:
            yield str(directory / name)


def difference(directory: Path, manifest: dict, name: str) -> str | None:
    """Return what is wrong with a sealed file; None where it is as it was written."""
    path = directory / name
    if not path.is_file():
        return f"{path} is missing"
    if not matches_seal(path, manifest["files"][name]):
        return f"{path} is damaged or changed: it differs from {directory / MANIFEST}"
    return None


def matches_seal(path: Path, sealed: dict) -> bool:
    """Return whether a file has the size and SHA-256 of its seal."""
    return path.stat().st_size == sealed.get("bytes") and _digest(path) == sealed.get("sha256")


def _damaged(directory: Path, manifest: dict, what: str) -> DistillmError:
    if "step" in manifest:
        return CheckpointError(what, hint="copy it again, or take another checkpoint")
    hint = f"copy or download it again; if the change is yours, delete {directory / MANIFEST}"
    return ModelError(what, hint=hint)


def seal(path: Path) -> dict:
    """Return the entry of a file: ``bytes`` and ``sha256``, read from the disk."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(path: Path) -> str:
    """Return a file's SHA-256, without reading it again while it stays the same."""
    stat = path.stat()
    key = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key not in _digests:
        _digests[key] = seal(path)["sha256"]
    return _digests[key]
