"""Share tensors between the processes of one machine, which map the same memory.

The memory is a file in /dev/shm, or in a temporary directory where that is too small. The file is removed as soon as all
processes have mapped it, so that nothing remains when they end.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Sequence as SequenceOf
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distillm_cli.errors import StorageError
from distillm_cli.training.distributed import world
from distillm_cli.utils.storage import reserve_space

_PLACES = ("/dev/shm", tempfile.gettempdir())
_SPARE_BYTES = 2**26  # that remain free in a place


def shared_table(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor [rows, width] that the processes of each machine share. Every process calls it."""
    dist = world()
    files = dist.gather(lambda: _File.new((rows, width), dtype) if dist.is_first_on_machine else None)
    return _mapped(files)[dist.machine[0]]


def shared_parts(own: Tensor | None) -> dict[int, Tensor]:
    """Return the tensors of the processes of this machine by rank, without those that are None. Every process calls it."""
    return _mapped(world().gather(lambda: None if own is None else _File.with_content(own)))


@dataclass(frozen=True)
class _File:
    """Name a file of shared memory, and the tensor in it."""

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def new(cls, shape: tuple[int, ...], dtype: torch.dtype) -> _File:
        return cls(_new_file(math.prod(shape) * dtype.itemsize), shape, dtype)

    @classmethod
    def with_content(cls, tensor: Tensor) -> _File:
        file = cls.new(tuple(tensor.shape), tensor.dtype)
        file.map().copy_(tensor)
        return file

    def map(self) -> Tensor:
        size = math.prod(self.shape)
        if not size:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.from_file(self.path, shared=True, size=size, dtype=self.dtype).view(self.shape)


def _mapped(files: SequenceOf[_File | None]) -> dict[int, Tensor]:
    """Map the files of this machine, by the rank of the process that created them, and remove them."""
    dist = world()
    found: dict[int, Tensor] = {}
    own = files[dist.rank]
    try:
        dist.gather(lambda: found.update({r: f.map() for r in dist.machine if (f := files[r]) is not None}))
    finally:
        if own is not None:
            Path(own.path).unlink(missing_ok=True)
    return found


def _new_file(size: int) -> str:
    """Return a new file of ``size`` bytes whose memory is reserved. Raises StorageError."""
    for place in _PLACES:
        with suppress(OSError):
            if shutil.disk_usage(place).free < size + _SPARE_BYTES:
                continue
            descriptor, path = tempfile.mkstemp(prefix="distillm-", dir=place)
            try:
                reserve_space(descriptor, size)
                return path
            except OSError:
                Path(path).unlink()
            finally:
                os.close(descriptor)
    raise StorageError(
        "storage.no_shared_memory",
        f"no space for {size / 1e6:,.1f} MB of teacher states that the processes of this machine share",
        where=" and ".join(_PLACES),
        hint="enlarge /dev/shm, set TMPDIR to a larger file system, or try --teacher-cache disk or off",
    )
