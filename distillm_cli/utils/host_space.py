"""Hold tensors that are gathered to save them: in memory or, if they do not fit there, in files without names."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from distillm_cli.utils.memory import available_memory
from distillm_cli.utils.storage import reserve_space, storing

_SPARE_BYTES = 8 * 2**30  # of memory that the tensors leave to everything else
_ALIGNMENT = 64  # bytes


class HostSpace:
    """Hold tensors in host memory or in a file, whose pages the system writes to disk when it needs the memory.

    directory: of the files, which disappear with their tensors.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._file: mmap.mmap | None = None
        self._used = 0

    def reserve(self, tensors: Iterable[Tensor]) -> None:
        """Provide space for copies of tensors. Raises StorageError if neither memory nor disk suffices."""
        size = sum(map(_aligned_bytes, tensors))
        self._file = None
        self._used = 0
        free = available_memory()
        if not size or free is None or size + _SPARE_BYTES <= free:
            return
        what = f"cannot gather {size:,} bytes of the student and its optimizer in {self.directory}"
        with storing(what, "free disk space or memory"):
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory) as file:
                reserve_space(file.fileno(), size)
                self._file = mmap.mmap(file.fileno(), size)

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor, on the CPU, in the reserved space."""
        if self._file is None or not tensor.numel():
            return tensor.cpu()
        flat = torch.frombuffer(self._file, dtype=tensor.dtype, count=tensor.numel(), offset=self._used)
        self._used += _aligned_bytes(tensor)
        return flat.view(tensor.shape).copy_(tensor)


def _aligned_bytes(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
