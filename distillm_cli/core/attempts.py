"""A step that fails: taken once more, or as if it had not begun."""

from __future__ import annotations

from copy import deepcopy

import torch

from distillm_cli.core.bulk import Bulk
from distillm_cli.core.checkpoint import random_states, restore_random_states
from distillm_cli.core.criterion import Criterion
from distillm_cli.core.replay import ReplayBuffer
from distillm_cli.core.teacher import Teacher


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
