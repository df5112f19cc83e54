"""Write and read manifests: the files that a run wrote into a directory, and checksums that show changes.

    {"format": 1,
     "files": {"model.safetensors": {"bytes": …, "sha256": …}, …},      sealed: changes count as damage
     "written": {"metrics.jsonl": null, "README.md": {"bytes": …, "sha256": …}, …}}

``files`` are sealed when they are complete. ``written`` lists every file and directory of the run before it is written,
so that ``--overwrite`` removes exactly these, also after a killed run. An entry with a seal belongs to the run only
while the file has this content. Output directories, results of an evaluation and pipelines have a manifest with
``written``; a checkpoint has one with ``files``, and is one entry in the manifest of its run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from distillm_cli.errors import CheckpointError, DistillmError, ModelError
from distillm_cli.utils.storage import atomic_write, file_sha256, flush, known_sha256

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
# Files of a model directory that users may edit after a run. Edited files are used with a warning.
EDITABLE = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja")
# Files that are not read to load a model.
_NON_MODEL_FILES = ("training.safetensors", "state.json", "recipe.yaml", "frozen.txt")

Seal = dict[str, Any]  # size and SHA-256 of a file


def seal_directory(directory: Path, files: Iterable[Path], **facts: Any) -> None:
    """Write the manifest that seals these files of a directory, which are flushed to the disk first.

    facts: further keys of the manifest. An earlier manifest is replaced, except for its ``written``.
    """
    sealed = {}
    for path in sorted(files):
        flush(path)
        sealed[path.relative_to(directory).as_posix()] = seal(path)
    previous = read_manifest(directory) or {}
    written = {"written": previous["written"]} if "written" in previous else {}
    _write(directory, {"format": MANIFEST_FORMAT, **facts, "files": sealed, **written})


def unseal(directory: Path, name: str | None = None) -> None:
    """Remove one file, or all, from the sealed files of a directory. Does nothing without a manifest."""
    manifest = read_manifest(directory)
    if manifest is None or (name is not None and name not in manifest["files"]):
        return
    sealed = {} if name is None else {key: value for key, value in manifest["files"].items() if key != name}
    _write(directory, manifest | {"files": sealed})


def record(
    directory: Path, names: Iterable[str], *, removed: Iterable[str] = (), seals: Mapping[str, Seal] | None = None
) -> None:
    """List files and directories as written by a run, before they are written. Creates a manifest if there is none.

    names: relative paths, with slashes. removed: names to remove from the list. seals: of files that users may edit.
    """
    manifest = read_manifest(directory) or {"format": MANIFEST_FORMAT, "files": {}}
    recorded_before = manifest.get("written", {})
    removed_names = set(removed)
    entries = {name: entry for name, entry in recorded_before.items() if name not in removed_names}
    for name in names:
        entries.setdefault(name, None)
    entries |= seals or {}
    if entries != recorded_before or "written" not in manifest:
        _write(directory, manifest | {"written": entries})


def recorded(directory: Path) -> dict[str, Seal | None]:
    """Return the files that runs wrote into a directory: relative path → seal or None. Empty without a manifest."""
    return (read_manifest(directory) or {}).get("written", {})


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest of a directory; None if it has none that this program wrote.

    Raises CheckpointError for one that cannot be read or that another version wrote.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if not path.parent.is_dir() or isinstance(error, FileNotFoundError):
            return None
        hint = f"copy or download it again, or delete it to use {directory} unchecked"
        raise CheckpointError("checkpoint.damaged", f"cannot read {path}: {error}", hint=hint) from error
    if not (isinstance(manifest, dict) and {"format", "files"} <= manifest.keys()):
        return None  # from another program
    is_whole = isinstance(manifest["files"], dict) and isinstance(manifest.get("written", {}), dict)
    if manifest["format"] != MANIFEST_FORMAT or not is_whole:
        message = f"{path} has format {manifest['format']}, this version reads {MANIFEST_FORMAT}"
        raise CheckpointError(
            "checkpoint.other_version", message, hint=f"update distillm, or delete it to use {directory} unchecked"
        )
    return manifest


def _write(directory: Path, manifest: Mapping[str, Any]) -> None:
    atomic_write(directory / MANIFEST, json.dumps(manifest, indent=1))
    flush(directory)


def check_files(directory: Path, *, weights: bool) -> None:
    """Compare a model's files with the manifest next to them, if there is one: its weights, or all others.

    A file is hashed once per process while it does not change. Raises ModelError, or CheckpointError for a checkpoint.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        return
    for name in manifest["files"]:
        if name in (*_NON_MODEL_FILES, *EDITABLE) or fnmatch(name, "*.safetensors") != weights:
            continue
        if (message := difference(directory, manifest, name)) is not None:
            raise _damage_error(directory, manifest, message)


def edited_files(directory: Path) -> Iterator[str]:
    """Yield the paths of settings that differ from the manifest next to them."""
    manifest = read_manifest(directory)
    if manifest is None:
        return
    for name in EDITABLE:
        if name in manifest["files"] and difference(directory, manifest, name) is not None:
            yield str(directory / name)


def difference(directory: Path, manifest: Mapping[str, Any], name: str) -> str | None:
    """Return the problem with a sealed file; None if it is unchanged."""
    path = directory / name
    if not path.is_file():
        return f"{path} is missing"
    if not matches_seal(path, manifest["files"][name]):
        return f"{path} is damaged or changed: it differs from {directory / MANIFEST}"
    return None


def matches_seal(path: Path, sealed: Seal) -> bool:
    """Return whether a file has the size and SHA-256 of its seal."""
    return path.stat().st_size == sealed.get("bytes") and known_sha256(path) == sealed.get("sha256")


def _damage_error(directory: Path, manifest: Mapping[str, Any], message: str) -> DistillmError:
    if "step" in manifest:
        return CheckpointError("checkpoint.damaged", message, hint="copy it again, or use another checkpoint")
    hint = f"copy or download it again, or, if you changed it, delete {directory / MANIFEST}"
    return ModelError("model.damaged", message, hint=hint)


def seal(path: Path) -> Seal:
    """Return the entry of a file: ``bytes`` and ``sha256``, read from the disk."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
