"""Define what the training loop needs to know of a student whose weights are distributed over the processes.

Such a student (``models/sharded_student.py``) gathers the weights of a layer when the layer runs, which every process has
to do at the same time. So all processes make the same number of passes: one without work makes an idle one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor

from distillm_cli.training.distributed import world


class Sharding(Protocol):
    """Define the interface of a student's distribution over the processes."""

    @property
    def is_on(self) -> bool:
        """Return whether each process has a part of the student's weights only."""

    def whole(self, *, for_saving: bool = False) -> AbstractContextManager[None]:
        """Give the student all weights inside the block, which all processes enter. The weights must not be changed.

        for_saving: on the CPU, in the first process alone.
        """

    def passes(self) -> AbstractContextManager[None]:
        """Make passes inside the block. An error of one process is not exchanged there, since the others wait in a pass."""

    def end(self) -> None:
        """Give the student all weights again, in every process, after the last step."""


class _NotSharded:
    """Describe a student of which every process has all weights."""

    is_on = False

    def whole(self, *, for_saving: bool = False) -> AbstractContextManager[None]:
        return nullcontext()

    def passes(self) -> AbstractContextManager[None]:
        return nullcontext()

    def end(self) -> None:
        pass


NOT_SHARDED: Sharding = _NotSharded()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that is distributed over the processes, which all of them ask for; others unchanged."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole of a distributed tensor on the CPU, in the first process alone; others unchanged."""
    whole = full_tensor(tensor)
    if whole is tensor:
        return tensor
    return whole.cpu() if world().is_first else whole.new_empty(0)


def like(value: Tensor, tensor: Any) -> Tensor:
    """Return a whole tensor distributed like another one, if that is."""
    if not hasattr(tensor, "full_tensor") or value.ndim == 0:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
