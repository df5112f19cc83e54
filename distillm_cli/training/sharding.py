"""Define what the training loop needs to know of a student whose weights are distributed over the processes.

Such a student (``models/sharded_student.py``) gathers the weights of a layer when the layer runs, which every process has
to do at the same time. So all processes make the same number of passes: one without work makes an idle one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from distillm_cli.training.distributed import world
from distillm_cli.utils.distributed_tensors import full_tensor, is_distributed
from distillm_cli.utils.host_space import HostSpace


class Sharding(Protocol):
    """Define the interface of a student's distribution over the processes."""

    @property
    def is_on(self) -> bool:
        """Return whether each process has a part of the student's weights only."""

    def whole(
        self, *, to_save: HostSpace | None = None, dtype: torch.dtype = torch.float32
    ) -> AbstractContextManager[None]:
        """Give the student all weights inside the block, which all processes enter. The weights must not be changed.

        to_save: the space for them on the CPU, in the first process alone. dtype: of the weights there.
        """

    def passes(self) -> AbstractContextManager[None]:
        """Make passes inside the block. An error of one process is not exchanged there, since the others wait in a pass."""

    def end(self) -> None:
        """Restore the student's model from before, without weights: the caller loads them (``Backbone.load_state``)."""


class _NotSharded:
    """Describe a student of which every process has all weights."""

    is_on = False

    def whole(
        self, *, to_save: HostSpace | None = None, dtype: torch.dtype = torch.float32
    ) -> AbstractContextManager[None]:
        return nullcontext()

    def passes(self) -> AbstractContextManager[None]:
        return nullcontext()

    def end(self) -> None:
        pass


NOT_SHARDED: Sharding = _NotSharded()


def gathered(tensors: dict[str, Tensor], space: HostSpace) -> dict[str, Tensor]:
    """Return tensors with the whole of each distributed one in ``space``, in the first process alone. Others unchanged."""
    distributed = {name: tensor for name, tensor in tensors.items() if is_distributed(tensor)}
    if distributed:
        world().broadcast(partial(space.reserve, distributed.values()))
    found = dict(tensors)
    for name, tensor in distributed.items():
        whole = full_tensor(tensor)
        found[name] = space.copy(whole) if world().is_first else whole.new_empty(0)
    return found
