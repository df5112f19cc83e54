"""Cache the teacher's states of a data set on disk: computed once, read by every run with the same teacher and rows.

    TEACHER-ROWS/      prefixes of two SHA-256: of the teacher, and of every token of every row
      states.bin       hidden states, rows in order, in the teacher's own dtype
      states.json      both digests, shape, size and SHA-256 of states.bin, names of the teacher and the data

It is written to a temporary directory, flushed and renamed, so it is complete or absent. All rows are computed before
training, in an order that depends on the rows alone: runs with other seeds or batch sizes read the same bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from io import RawIOBase
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from distillm_cli.errors import CheckpointError, StorageError
from distillm_cli.teachers.cached import HiddenStateTable
from distillm_cli.teachers.local import LanguageModel, LocalTeacher
from distillm_cli.training.distributed import in_first_process, world
from distillm_cli.training.events import Listener, Note, Progress, silent
from distillm_cli.types import Sequence, collate
from distillm_cli.utils.storage import atomic_directory, locked, storing, sweep

CACHE_FORMAT = 2
STATES = "states.bin"
METADATA = "states.json"
_FIELD_TYPES = {"teacher": str, "rows": str, "tokens": int, "width": int, "dtype": str, "sha256": str, "of": dict}
REBUILD = "rebuild it with --rebuild-teacher-cache"
_ALTERNATIVES = "choose another --set teacher.cache_dir=DIR, or --teacher-cache memory or off"
_BATCH_TOKENS = 4096  # token positions in one batch
_CHECKSUM_BYTES = 1 << 26  # bytes between two progress events


@dataclass(frozen=True, slots=True)
class CacheKey:
    """Identify the states by the SHA-256 of the teacher and of the rows, each in hex."""

    teacher: str
    rows: str

    @property
    def name(self) -> str:
        """Return the name of the cache's directory."""
        return f"{self.teacher[:16]}-{self.rows[:16]}"


def rows_digest(sequences: SequenceOf[Sequence]) -> str:
    """Return the SHA-256 of every token of every row. It depends on tokenizer, template, rows, order and lengths."""
    digest = hashlib.sha256(b"rows")
    for s in sequences:
        digest.update(f"{len(s.prompt)} {len(s.response)} ".encode())
        digest.update(s.prompt.tobytes() + s.response.tobytes())
        if s.turns is not None:
            digest.update(b"turns" + s.turns.tobytes())
    return digest.hexdigest()


class StatefulModel(LanguageModel, Protocol):
    """Define a model whose tensors can be listed."""

    def state_dict(self) -> Mapping[str, Tensor]: ...


def teacher_digest(model: StatefulModel, config: str) -> str:
    """Return the SHA-256 of the teacher: weights, their dtypes, the size of the vocabulary and the config.

    config: settings that are not in the weights, such as a rotary base.
    """
    digest = hashlib.sha256(f"teacher {CACHE_FORMAT} {model.vocab} {model.head().weight_VD is None} {config}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_raw(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()


def cache_root(cache_dir: str | None) -> Path:
    """Return the directory of all caches: ``teacher.cache_dir``, else the user's."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("DISTILLM_CACHE") or Path.home() / ".cache" / "distillm").expanduser() / "teacher"


@in_first_process
def cached_date(root: Path, teacher: str, data: str) -> str | None:
    """Return the date in the prompts of the newest cache of a teacher and a data set; None if there is no cache.

    A run whose chat template writes the current date uses this one instead, so that the cache is valid on later days.
    """
    found = []
    for metadata in [*root.glob(f"*/{METADATA}"), root / METADATA]:
        try:
            of = json.loads(metadata.read_text(encoding="utf-8"))["of"]
            if of["teacher"] == teacher and of["data"] == data and "date" in of:
                found.append((metadata.stat().st_mtime, str(of["date"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return max(found)[1] if found else None


def cache_directory(root: Path, key: CacheKey) -> Path:
    """Return the cache's directory, which may not exist: a subdirectory of ``root``, or ``root`` itself if it is a cache."""
    return root if (root / METADATA).exists() else root / key.name


def check_space(directory: Path, size: int) -> None:
    """Raise StorageError if ``size`` more bytes do not fit next to ``directory``, or if it cannot be written."""
    with _storing(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory.parent).free
    if size > 0.95 * free:
        raise StorageError(
            "storage.no_space",
            f"the teacher cache needs {size / 1e6:,.1f} MB, but {directory.parent} has {free / 1e6:,.1f} MB free",
            hint=f"free disk space, {_ALTERNATIVES}",
        )


def write_cache(
    directory: Path,
    key: CacheKey,
    teacher: LocalTeacher,
    sequences: SequenceOf[Sequence],
    device: torch.device,
    listener: Listener = silent,
    *,
    of: Mapping[str, str],
    size: int = 0,
    rebuild: bool = False,
) -> bool:
    """Compute the states of all rows into ``directory``. Return False if another run did so while this one waited.

    The processes of a run compute and write a share of the rows each.

    of: readable names of the teacher and the data. size: number of bytes needed. rebuild: replace an existing cache. Raise
    StorageError if the disk cannot be written or has less free space; an existing cache is then unchanged.
    """

    def busy() -> None:
        listener(Note(f"another run is computing the teacher's hidden states in {directory}: waiting"))

    def begin() -> Path | None:
        """Lock the cache and return a directory to write to, which becomes the cache at the end; None if it exists."""
        directory.parent.mkdir(parents=True, exist_ok=True)
        # One writer at a time: the other runs of a sweep wait and then find the finished cache.
        is_alone = writing.enter_context(locked(directory.with_name(f".{directory.name}.lock"), busy))
        if directory.exists() and not rebuild:
            return None
        _check_nothing_else(directory)
        if is_alone:
            sweep(directory.parent, directory.name)
        check_space(directory, size)  # after the sweep has freed the space of killed writers
        staged = writing.enter_context(atomic_directory(directory))
        (staged / STATES).touch()
        return staged

    with _storing(directory), ExitStack() as writing:
        staged = world().broadcast(begin)
        if staged is None:
            return False
        width, dtype = _compute(staged / STATES, teacher, sequences, device, listener)
        world().broadcast(lambda: _write_metadata(staged, key, sequences, width, dtype, of))
    return True


def read_cache(
    directory: Path, key: CacheKey, sequences: SequenceOf[Sequence], listener: Listener = silent
) -> HiddenStateTable:
    """Return the states, memory-mapped, so that several processes share one copy. The SHA-256 is checked first.

    Raises CheckpointError for a cache that is damaged, incomplete, or of another teacher or other rows.
    """
    try:
        metadata = world().broadcast(partial(_read_metadata, directory))  # there, once the first process has renamed it
        if (owner := _mismatch(metadata, key)) is not None:
            hint = f"choose another --set teacher.cache_dir=DIR, or {REBUILD}"
            raise CheckpointError("checkpoint.changed", f"the teacher cache {directory} belongs to {owner}", hint=hint)
        tokens, width, dtype = metadata["tokens"], metadata["width"], getattr(torch, metadata["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{METADATA}: dtype is {metadata['dtype']!r}")
        size = tokens * width * dtype.itemsize
        if (found := (directory / STATES).stat().st_size) != size:
            raise ValueError(f"{STATES} has {found:,} bytes instead of {size:,}")
        if tokens != sum(s.supervised for s in sequences):
            raise ValueError(f"{tokens:,} tokens do not match the rows")
        if world().broadcast(partial(_sha256_of, directory / STATES, listener)) != metadata["sha256"]:
            raise ValueError(f"{STATES} differs from its SHA-256")
        table = torch.from_file(str(directory / STATES), shared=False, size=tokens * width, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = f"{Path(error.filename or directory).name}: {error.strerror}" if isinstance(error, OSError) else error
        raise CheckpointError(
            "checkpoint.damaged", f"the teacher cache {directory} is damaged: {reason}", hint=REBUILD
        ) from error
    return HiddenStateTable(sequences, table.view(tokens, width))


def _read_metadata(directory: Path) -> dict[str, Any]:
    """Return the content of states.json. Raises ValueError with a description if it is not valid for this version."""
    try:
        metadata = json.loads((directory / METADATA).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{METADATA} is not JSON ({error})") from error
    if not isinstance(metadata, dict) or "format" not in metadata:
        raise ValueError(f"{METADATA} has no format")
    for name, kind in _FIELD_TYPES.items() if metadata["format"] == CACHE_FORMAT else ():
        if not isinstance(metadata.get(name), kind):
            raise ValueError(
                f"{METADATA}: {name} is {metadata[name]!r}" if name in metadata else f"{METADATA} has no {name}"
            )
    return metadata


def _mismatch(metadata: Mapping[str, Any], key: CacheKey) -> str | None:
    """Describe the cache if it is not the expected one; else return None."""
    if metadata["format"] != CACHE_FORMAT:
        return f"another version of distillm (format {metadata['format']}, this one reads {CACHE_FORMAT})"
    if metadata["teacher"] != key.teacher:
        return f"another teacher ({metadata['of'].get('teacher')}) or another dtype of it"
    if metadata["rows"] != key.rows:
        return f"other rows, or another template or tokenizer ({metadata['of'].get('data')})"
    return None


def _write_metadata(
    staged: Path,
    key: CacheKey,
    sequences: SequenceOf[Sequence],
    width: int,
    dtype: torch.dtype,
    of: Mapping[str, str],
) -> None:
    """Write states.json, once states.bin is complete."""
    metadata = {
        "format": CACHE_FORMAT,
        "teacher": key.teacher,
        "rows": key.rows,
        "tokens": sum(s.supervised for s in sequences),
        "width": width,
        "dtype": str(dtype).removeprefix("torch."),
        "sha256": _sha256_of(staged / STATES),
        "of": dict(of),
    }
    with (staged / METADATA).open("w", encoding="utf-8") as file:
        json.dump(metadata, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _compute(
    path: Path,
    teacher: LocalTeacher,
    sequences: SequenceOf[Sequence],
    device: torch.device,
    listener: Listener,
) -> tuple[int, torch.dtype]:
    """Write the states of all rows to a file, computing the longest first in large batches; return width and dtype.

    Each process computes a share of the batches. A full disk is reported, which a memory map would not do.
    """
    ends = torch.tensor([s.supervised for s in sequences]).cumsum(0).tolist()
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
    batches = []
    position = 0
    while position < len(order):
        batches.append(order[position : position + max(1, _BATCH_TOKENS // len(sequences[order[position]]))])
        position += len(batches[-1])
    dist = world()

    def write_share() -> tuple[int, torch.dtype] | None:
        shape = None
        done = 0
        with path.open("r+b", buffering=0) as file:
            for index in dist.share([len(picks) * len(sequences[picks[0]]) for picks in batches]):
                picks = batches[index]
                group = [sequences[i] for i in picks]
                hidden_ND = teacher.hidden(collate(group).to(device), group).cpu()
                for part, i in zip(hidden_ND.split([s.supervised for s in group]), picks, strict=True):
                    offset = (ends[i] - part.shape[0]) * part.shape[1] * part.element_size()
                    _write_at(file, offset, _raw(part.contiguous()))
                shape = (hidden_ND.shape[1], hidden_ND.dtype)
                done += len(picks)
                # Its own rows show the progress of all, which work at about the same speed.
                listener(Progress("teacher states", min(done * dist.size, len(order)), len(order), "rows"))
            os.fsync(file.fileno())
        return shape

    shapes = [shape for shape in dist.gather(write_share) if shape is not None]
    return shapes[0]


def _write_at(file: RawIOBase, offset: int, data: memoryview) -> None:
    file.seek(offset)
    while data:
        data = data[file.write(data) :]


def _raw(tensor: Tensor) -> memoryview:
    """Return a contiguous tensor's bytes without a copy."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _sha256_of(path: Path, listener: Listener = silent) -> str:
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while block := file.read(_CHECKSUM_BYTES):
            digest.update(block)
            done += len(block)
            listener(Progress("checking teacher states", done >> 20, total >> 20, "MiB"))
    return digest.hexdigest()


def _check_nothing_else(directory: Path) -> None:
    """Raise StorageError if the directory to be replaced has files that are not part of a cache."""
    others = (
        sorted(p.name for p in directory.iterdir() if p.name not in (STATES, METADATA)) if directory.is_dir() else []
    )
    if others:
        problem = f"{directory} contains other files than a teacher cache ({others[0]}) and is not replaced"
        raise StorageError(
            "storage.not_a_cache",
            problem,
            hint="choose another --set teacher.cache_dir=DIR, or move the other files",
        )


def _storing(directory: Path) -> AbstractContextManager[None]:
    return storing(
        f"cannot write the teacher cache {directory}", _ALTERNATIVES, hint_if_full=f"free disk space, {_ALTERNATIVES}"
    )
