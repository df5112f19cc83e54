"""What a system may refuse."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def file_size(most: int) -> Iterator[None]:
    """Inside, no file of this process grows beyond so many bytes, as on a full disk or under a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Narrow:
    """Memory for a forward pass over so many sequences and no more, as on a small GPU: it runs out at the pass's end.

    refused: how often it did.
    """

    def __init__(self, objective: torch.nn.Module, rows: int):
        self.rows, self.refused, self._forward = rows, 0, objective.forward
        objective.forward = self

    def __call__(self, batches, *args, **kwargs):
        made = self._forward(batches, *args, **kwargs)
        if sum(batch.size for batch in batches) > self.rows:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return made
