"""Simulate a full disk and a small GPU."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def file_size(size: int) -> Iterator[None]:
    """Limit the files of this process to ``size`` bytes inside the context, as a full disk or a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class LimitedBatch:
    """Replace the forward pass of an objective by one that runs out of memory for more than ``rows`` sequences.

    The error is raised at the end of the pass, as on a small GPU. refused: the number of these errors.
    """

    def __init__(self, objective: torch.nn.Module, rows: int):
        self.rows = rows
        self.refused = 0
        self._forward = objective.forward
        objective.forward = self

    def __call__(self, batches, *args, **kwargs):
        losses = self._forward(batches, *args, **kwargs)
        if sum(batch.size for batch in batches) > self.rows:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return losses
