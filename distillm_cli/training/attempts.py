"""A step that fails: taken once more, or as if it had not begun."""

from __future__ import annotations

import math
from copy import deepcopy

import torch

from distillm_cli.errors import NonFiniteError
from distillm_cli.losses.objectives import Objective
from distillm_cli.rollouts.bulk import Bulk
from distillm_cli.rollouts.replay import ReplayBuffer
from distillm_cli.teachers.teacher import Teacher
from distillm_cli.training.checkpoint import random_states, restore_random_states


class InfiniteLoss(NonFiniteError):
    """Report a loss of +inf: a token without any probability, which no learning rate cures."""


def check_finite(loss: float, grad_norm: float) -> None:
    """Raise NonFiniteError unless both are finite, naming the cause where the numbers show it."""
    if loss == math.inf:
        raise InfiniteLoss(
            "the loss is infinite: a token has probability 0 (a logit of −inf) in one model but not in the other, "
            "or is in a row,",
            hint="suppress the same tokens in both models, drop the rows that contain them, or choose a divergence "
            "that is bounded (skl, srkl, jsd, tvd)",
        )
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NonFiniteError(f"loss {loss}, gradient norm {grad_norm}")


class Before:
    """What a step changes before the optimizer is asked, as it was when the step began."""

    def __init__(
        self, criterion: Objective, replay: ReplayBuffer, ahead: Bulk, teacher: Teacher | None, device: torch.device
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
