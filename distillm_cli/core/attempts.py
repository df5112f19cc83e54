"""A step that memory does not suffice for: once more in smaller pieces, or as if it had not begun."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from copy import deepcopy
from typing import TypeVar

import torch

from distillm_cli.core.bulk import Bulk
from distillm_cli.core.checkpoint import random_states, restore_random_states
from distillm_cli.core.criterion import Criterion
from distillm_cli.core.replay import ReplayBuffer
from distillm_cli.core.teacher import Teacher
from distillm_cli.errors import out_of_memory

T = TypeVar("T")


def in_halves(attempt: Callable[[], T], halve: Callable[[], bool]) -> T:
    """What ``attempt`` gives, at first or after as many calls of ``halve`` as it takes.

    halve: makes the next attempt's pieces smaller; False where they cannot be, and the error is the caller's.
    """
    while True:
        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            release(error)
            if not halve():
                raise


def release(error: BaseException) -> None:
    """Lets go of what filled the memory: the frames that the error came through hold it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    gc.collect()
    torch.cuda.empty_cache()  # what torch keeps for itself, cuBLAS and cuDNN cannot have; without CUDA in use, nothing


class Before:
    """What a step changes before the optimizer is asked, as it was when the step began."""

    def __init__(
        self, criterion: Criterion, replay: ReplayBuffer, ahead: Bulk, teacher: Teacher | None, device: torch.device
    ):
        self.criterion, self.replay, self.ahead, self.teacher, self.device = criterion, replay, ahead, teacher, device
        self._random, self._state = random_states(device), deepcopy(criterion.state_dict())
        self._held = list(replay.sequences)
        ahead.served = None
        if teacher is not None:
            teacher.begin_step()

    def again(self) -> None:
        """For another attempt at what the step has drawn."""
        restore_random_states(self._random, self.device)
        self.criterion.load_state_dict(self._state)

    def undo(self) -> None:
        """As if the step had not begun, but that its student outputs wait for it: they need not be sampled again."""
        self.again()
        self.replay.sequences.clear()
        self.replay.add(self._held)
        self.ahead.put_back()
        if self.teacher is not None:  # known in part, a batch would be computed in other company, and round otherwise
            self.teacher.forget_step()
