"""What the teacher says of a batch: its last hidden states at the response positions, and nothing of its vocabulary.

The head is applied to them chunk by chunk in the fused loss, so the teacher's logits never exist as a whole. The states of
data set rows may be kept: 2·d bytes a token in bf16 where logits would be 2·V, and exact, because the head is applied again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from distillm_cli.core.events import Listener, Note, Progress, silent
from distillm_cli.core.fused import HeadLike
from distillm_cli.errors import CheckpointError, StorageError
from distillm_cli.sequences import Batch, Sequence, collate

_FILL = 4096  # token positions computed at once when the states of a data set are collected


class Model(Protocol):
    """The face of a model that the engine needs."""

    vocab: int

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [N, D] at ``batch.positions_N``."""

    def head(self) -> HeadLike:
        """The way from there to logits."""


class Teacher:
    """A frozen model, asked for hidden states only. states: those of data set rows, where they were collected."""

    def __init__(self, model: Model, states: States | None = None):
        self.model, self.states = model, states

    @property
    def head(self) -> HeadLike:
        return self.model.head()

    @torch.no_grad()
    def hidden(self, batch: Batch, sequences: SequenceOf[Sequence]) -> Tensor:
        """Last hidden states [N, D_teacher] of the batch that ``sequences`` were collated to, without a graph."""
        if self.states is not None and all(self.states.knows(s) for s in sequences):
            return self.states.of(sequences).to(batch.ids_BT.device, non_blocking=True)
        return self.model.hidden(batch)


class States:
    """The teacher's hidden states for every row of a data set, computed in a fixed order: a row's states are a function
    of teacher and data set alone, not of the batch that asked first, so that a resumed run sees the same bits.
    """

    def __init__(self, sequences: SequenceOf[Sequence], table_ND: Tensor):
        self.sequences, self.table_ND = sequences, table_ND
        lengths = torch.tensor([len(s.response) for s in sequences])
        self.starts = (lengths.cumsum(0) - lengths).tolist()

    def knows(self, sequence: Sequence) -> bool:
        """Whether it is the very row: a rollout for the row's prompt is another sequence."""
        return 0 <= sequence.row < len(self.sequences) and self.sequences[sequence.row] is sequence

    def of(self, sequences: SequenceOf[Sequence]) -> Tensor:
        starts = [self.starts[s.row] for s in sequences]
        return torch.cat([self.table_ND[a : a + len(s.response)] for a, s in zip(starts, sequences, strict=True)])


def collect(model: Model, sequences: SequenceOf[Sequence], device: torch.device, listener: Listener = silent) -> States:
    """Computes the states of all rows, on the CPU's memory."""
    return States(sequences, _computed(model, sequences, device, listener, None))


def collect_on_disk(
    model: nn.Module, sequences: SequenceOf[Sequence], device: torch.device, root: Path, listener: Listener = silent
) -> States:
    """The states of all rows as a memory-mapped file under ``root``, computed unless they are there.

    The directory's name is the SHA-256 of the teacher's weights and of every token of every row: a cache of another
    teacher, tokenizer, template or data set has another name and cannot be mistaken. Raises CheckpointError for a
    damaged one, StorageError where the disk is too small or refuses.
    """
    place = root / _fingerprint(model, sequences)[:32]
    if place.is_dir():
        listener(Note(f"teacher states: reading {place}"))
    else:
        _write(model, sequences, device, place, listener)
    try:
        facts = json.loads((place / "states.json").read_text(encoding="utf-8"))
        rows, width, dtype = facts["tokens"], facts["width"], getattr(torch, facts["dtype"])
        size = rows * width * dtype.itemsize
        if (place / "states.bin").stat().st_size != size:
            raise ValueError(f"states.bin is not {size:,} bytes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"teacher cache damaged: {place} ({error})", hint="delete it; it is made again"
        ) from error
    table = torch.from_file(str(place / "states.bin"), shared=False, size=rows * width, dtype=dtype)
    return States(sequences, table.view(rows, width))


def _write(model: nn.Module, sequences, device: torch.device, place: Path, listener: Listener) -> None:
    staged = place.with_name(f".staging-{place.name}-{os.getpid()}")
    try:
        staged.mkdir(parents=True)
        table = _computed(model, sequences, device, listener, staged)
        facts = {"tokens": table.shape[0], "width": table.shape[1], "dtype": str(table.dtype).removeprefix("torch.")}
        (staged / "states.json").write_text(json.dumps(facts), encoding="utf-8")
        with (staged / "states.bin").open("rb+") as file:
            os.fsync(file.fileno())
        if not place.exists():  # another run of a sweep may have been as quick
            staged.rename(place)
    except OSError as error:
        hint = "free some space, choose another teacher.cache_dir, or --set teacher.cache=off"
        raise StorageError(f"cannot write teacher cache {place}: {error.strerror}", hint=hint) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@torch.no_grad()
def _computed(model: Model, sequences, device: torch.device, listener: Listener, directory: Path | None) -> Tensor:
    """[tokens, D], rows in order; in a file of ``directory`` where one is given."""
    lengths = [len(s.response) for s in sequences]
    starts = torch.tensor(lengths).cumsum(0).sub(torch.tensor(lengths)).tolist()
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
    table, at = None, 0
    while at < len(order):
        picks = order[at : at + max(1, _FILL // len(sequences[order[at]]))]
        hidden = model.hidden(collate([sequences[i] for i in picks]).to(device)).cpu()
        if table is None:
            table = _allocate(sum(lengths), hidden, directory)
        for part, i in zip(hidden.split([lengths[i] for i in picks]), picks, strict=True):
            table[starts[i] : starts[i] + lengths[i]] = part
        at += len(picks)
        listener(Progress("teacher states", at, len(order), "rows"))
    return table


def _allocate(tokens: int, like: Tensor, directory: Path | None) -> Tensor:
    if directory is None:
        return torch.empty(tokens, like.shape[1], dtype=like.dtype)
    size, free = tokens * like.shape[1] * like.dtype.itemsize, shutil.disk_usage(directory).free
    if size > 0.95 * free:
        raise StorageError(
            f"the teacher cache needs {size / 1e9:.1f} GB and {directory.parent} has {free / 1e9:.1f} GB free",
            hint="choose another teacher.cache_dir, or --set teacher.cache=off",
        )
    path = str(directory / "states.bin")
    return torch.from_file(path, shared=True, size=tokens * like.shape[1], dtype=like.dtype).view(tokens, -1)


def _fingerprint(model: nn.Module, sequences: SequenceOf[Sequence]) -> str:
    digest = hashlib.sha256(b"teacher states 1")
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    for s in sequences:
        digest.update(f"{len(s.prompt)} {len(s.response)} ".encode())
        digest.update(s.prompt.tobytes() + s.response.tobytes())
    return digest.hexdigest()
