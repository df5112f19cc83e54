"""Cache the teacher's states of a data set on disk: computed once, read by every run with the same teacher and rows.

    TEACHER-ROWS/      the beginnings of two SHA-256: of the teacher, and of every token of every row
      states.bin       hidden states, rows in order, the teacher's own dtype
      states.json      both sums in full, shape, size and SHA-256 of states.bin, and whose states they are

It is written beside its place, flushed and renamed, so it is whole or absent. All rows are computed beforehand, in an order
that depends on nothing else: runs with other seeds or batch sizes read the same bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path

import torch
from torch import Tensor, nn

from distillm_cli.errors import CheckpointError, StorageError
from distillm_cli.teachers.cached import HiddenStateTable
from distillm_cli.teachers.local import LocalTeacher
from distillm_cli.training.events import Listener, Note, Progress, silent
from distillm_cli.types import Sequence, collate
from distillm_cli.utils.storage import atomic_directory, locked, storing, sweep

CACHE_FORMAT = 2
STATES = "states.bin"
FACTS = "states.json"
_KINDS = {"teacher": str, "rows": str, "tokens": int, "width": int, "dtype": str, "sha256": str, "of": dict}
REBUILD = "rebuild it with --rebuild-teacher-cache"
_ELSEWHERE = "give another --set teacher.cache_dir=DIR, or --teacher-cache memory or off"
_AT_ONCE = 4096  # token positions in one batch
_BLOCK = 1 << 26  # bytes checked between two signs of progress


@dataclass(frozen=True, slots=True)
class Key:
    """Name the states: SHA-256 of the teacher and of the rows, each in hex."""

    teacher: str
    rows: str

    @property
    def name(self) -> str:
        """Return the name of the cache's directory."""
        return f"{self.teacher[:16]}-{self.rows[:16]}"


def rows_digest(sequences: SequenceOf[Sequence]) -> str:
    """Return the SHA-256 of every token of every row: tokenizer, template, rows, their order and lengths shape it."""
    digest = hashlib.sha256(b"rows")
    for s in sequences:
        digest.update(f"{len(s.prompt)} {len(s.response)} ".encode())
        digest.update(s.prompt.tobytes() + s.response.tobytes())
        if s.turns is not None:
            digest.update(b"turns" + s.turns.tobytes())
    return digest.hexdigest()


def teacher_digest(model: nn.Module, config: str) -> str:
    """Return the SHA-256 of all that shapes the states beside the rows: weights, their types, the vocabulary's cut.

    config: settings that the weights do not hold, such as a rotary base.
    """
    digest = hashlib.sha256(f"teacher {CACHE_FORMAT} {model.vocab} {model.head().weight_VD is None} {config}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_raw(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()


def root_of(cache_dir: str | None) -> Path:
    """Return the directory of all caches: ``teacher.cache_dir``, else the user's."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("DISTILLM_CACHE") or Path.home() / ".cache" / "distillm").expanduser() / "teacher"


def date_of(root: Path, teacher: str, data: str) -> str | None:
    """Return the date in the prompts of the newest cache of a teacher and a data set; None where there is none.

    A run whose chat template writes the current date takes this one, so that the cache is used on later days too.
    """
    found = []
    for facts in [*root.glob(f"*/{FACTS}"), root / FACTS]:
        try:
            of = json.loads(facts.read_text(encoding="utf-8"))["of"]
            if of["teacher"] == teacher and of["data"] == data and "date" in of:
                found.append((facts.stat().st_mtime, str(of["date"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return max(found)[1] if found else None


def place_of(root: Path, key: Key) -> Path:
    """Return the cache's directory, which need not exist: one in ``root``, or ``root`` itself where it is a cache."""
    return root if (root / FACTS).exists() else root / key.name


def check_space(place: Path, size: int) -> None:
    """Raise StorageError where ``size`` more bytes would not fit beside ``place``, or nothing can be written there."""
    with _storing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(place.parent).free
    if size > 0.95 * free:
        raise StorageError(
            f"the teacher cache needs {size / 1e6:,.1f} MB and {place.parent} has {free / 1e6:,.1f} MB free",
            hint=f"free some space, {_ELSEWHERE}",
        )


def write_cache(
    place: Path,
    key: Key,
    teacher: LocalTeacher,
    sequences: SequenceOf[Sequence],
    device: torch.device,
    listener: Listener = silent,
    *,
    of: Mapping[str, str],
    size: int = 0,
    rebuild: bool = False,
) -> bool:
    """Compute the states of all rows into ``place``; return False where another process did so while this one waited.

    of: names for people: the teacher's, the data's. size: bytes that they will take. rebuild: replaces what is there. Raises
    StorageError when the disk refuses, or has less room than that; nothing is visible then, and what was there before is
    untouched.
    """

    def busy() -> None:
        listener(Note(f"another run is computing the teacher states in {place}: waiting for it"))

    with _storing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        # One writer at a time: the others of a sweep wait, and find the cache made.
        with locked(place.with_name(f".{place.name}.lock"), busy) as is_alone:
            if place.exists() and not rebuild:
                return False
            _check_nothing_else(place)
            if is_alone:
                sweep(place.parent, place.name)
            check_space(place, size)  # only here: what a writer that was killed had filled is free again
            with atomic_directory(place) as staged:
                _fill(staged, key, teacher, sequences, device, listener, of)
    return True


def read_cache(place: Path, key: Key, sequences: SequenceOf[Sequence], listener: Listener = silent) -> HiddenStateTable:
    """Return the states, memory-mapped: several processes share one copy. Every byte is compared with its sum first.

    Raises CheckpointError for a cache that is damaged, incomplete, or of another teacher or other rows.
    """
    try:
        facts = _facts(place)
        if (whose := _other_owner(facts, key)) is not None:
            hint = f"give another --set teacher.cache_dir=DIR, or {REBUILD}"
            raise CheckpointError(f"the teacher cache {place} is of {whose}", hint=hint)
        tokens, width, dtype = facts["tokens"], facts["width"], getattr(torch, facts["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{FACTS}: dtype is {facts['dtype']!r}")
        size = tokens * width * dtype.itemsize
        if (found := (place / STATES).stat().st_size) != size:
            raise ValueError(f"{STATES} has {found:,} bytes in place of {size:,}")
        if tokens != sum(s.supervised for s in sequences):
            raise ValueError(f"{tokens:,} tokens are not the rows'")
        if _sum_of(place / STATES, listener) != facts["sha256"]:
            raise ValueError(f"{STATES} differs from its SHA-256")
        table = torch.from_file(str(place / STATES), shared=False, size=tokens * width, dtype=dtype)
    except (OSError, ValueError) as error:
        why = f"{Path(error.filename or place).name}: {error.strerror}" if isinstance(error, OSError) else error
        raise CheckpointError(f"the teacher cache {place} is damaged: {why}", hint=REBUILD) from error
    return HiddenStateTable(sequences, table.view(tokens, width))


def _facts(place: Path) -> dict:
    """Return the content of states.json. Raises ValueError, in words, where this version does not write such a file."""
    try:
        facts = json.loads((place / FACTS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{FACTS} is not JSON ({error})") from error
    if not isinstance(facts, dict) or "format" not in facts:
        raise ValueError(f"{FACTS} does not say which format it has")
    for name, kind in _KINDS.items() if facts["format"] == CACHE_FORMAT else ():
        if not isinstance(facts.get(name), kind):
            raise ValueError(f"{FACTS}: {name} is {facts[name]!r}" if name in facts else f"{FACTS} says no {name}")
    return facts


def _other_owner(facts: dict, key: Key) -> str | None:
    """Return whose cache it is, where it is not the expected one; else None."""
    if facts["format"] != CACHE_FORMAT:
        return f"another version of distillm (format {facts['format']}, this one reads {CACHE_FORMAT})"
    if facts["teacher"] != key.teacher:
        return f"another teacher ({facts['of'].get('teacher')}) or another dtype of it"
    if facts["rows"] != key.rows:
        return f"other rows, or another template or tokenizer ({facts['of'].get('data')})"
    return None


def _fill(staged: Path, key: Key, teacher: LocalTeacher, sequences, device, listener: Listener, of) -> None:
    """Write states.bin and states.json, with calls that can report a full disk; a memory map would be killed."""
    with (staged / STATES).open("wb", buffering=0) as file:
        width, dtype = _compute(file, teacher, sequences, device, listener)
        os.fsync(file.fileno())
    facts = {
        "format": CACHE_FORMAT,
        "teacher": key.teacher,
        "rows": key.rows,
        "tokens": sum(s.supervised for s in sequences),
        "width": width,
        "dtype": str(dtype).removeprefix("torch."),
        "sha256": _sum_of(staged / STATES),
        "of": dict(of),
    }
    with (staged / FACTS).open("w", encoding="utf-8") as file:
        json.dump(facts, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _compute(file: RawIOBase, teacher: LocalTeacher, sequences, device, listener: Listener) -> tuple[int, torch.dtype]:
    """Write all rows' states to their places in ``file``, the longest first, in large batches; return width and dtype."""
    ends = torch.tensor([s.supervised for s in sequences]).cumsum(0).tolist()
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
    at, hidden_ND = 0, None
    while at < len(order):
        picks = order[at : at + max(1, _AT_ONCE // len(sequences[order[at]]))]
        group = [sequences[i] for i in picks]
        hidden_ND = teacher.hidden(collate(group).to(device), group).cpu()
        for part, i in zip(hidden_ND.split([s.supervised for s in group]), picks, strict=True):
            offset = (ends[i] - part.shape[0]) * part.shape[1] * part.element_size()
            _write_at(file, offset, _raw(part.contiguous()))
        at += len(picks)
        listener(Progress("teacher states", at, len(order), "rows"))
    return hidden_ND.shape[1], hidden_ND.dtype


def _write_at(file: RawIOBase, offset: int, data: memoryview) -> None:
    file.seek(offset)
    while data:
        data = data[file.write(data) :]


def _raw(tensor: Tensor) -> memoryview:
    """Return a contiguous tensor's bytes, not copied."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def _sum_of(path: Path, listener: Listener = silent) -> str:
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            done += len(block)
            listener(Progress("checking teacher states", done >> 20, total >> 20, "MiB"))
    return digest.hexdigest()


def _check_nothing_else(place: Path) -> None:
    """Raise StorageError where the directory to be replaced holds more than a cache: the user's own files are in it."""
    others = sorted(p.name for p in place.iterdir() if p.name not in (STATES, FACTS)) if place.is_dir() else []
    if others:
        what = f"{place} holds more than a teacher cache ({others[0]}), and is not replaced"
        raise StorageError(what, hint="give another --set teacher.cache_dir=DIR, or move what is not the cache's")


def _storing(place: Path) -> AbstractContextManager[None]:
    return storing(f"cannot write the teacher cache {place}", _ELSEWHERE, hint_if_full=f"free some space, {_ELSEWHERE}")
