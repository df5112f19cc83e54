"""Rollout batches drawn several at once, each for the step that will train on it.

One large batch costs little more to decode than a small one. Which steps will ask for a rollout is known beforehand (the
schedule's draws are a pure function of seed and step), so a bulk answers the very prompts that single draws would have
answered, each batch at its own step; what differs is that the student was some steps younger when it did.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, count
from typing import Any

from torch import Tensor

from distillm_cli.losses.objectives import Objective
from distillm_cli.rollouts.replay import pack, unpack
from distillm_cli.rollouts.rollout import Rollouts
from distillm_cli.types import Sequence


class Bulk:
    """Student outputs for steps to come, until each has been served. rollouts: where they come from."""

    def __init__(self, rollouts: Rollouts | None):
        self.rollouts = rollouts
        self.waiting: dict[int, list[Sequence]] = {}  # by the step they were drawn for
        self.served: tuple[int, list[Sequence]] | None = None

    def serves(self, step: int) -> bool:
        """Whether a batch is there for this step, or from an earlier one that trained on something else after all."""
        return any(waiting <= step for waiting in self.waiting)

    def draw(self, batches: Mapping[int, list[Sequence]], step: int) -> list[Sequence]:
        """Samples an answer to every row of these batches, step → rows, by the student as it is at ``step``; all of them."""
        drawn = self.rollouts.sample([row for batch in batches.values() for row in batch], step)
        served = iter(drawn)
        self.waiting |= {later: [next(served) for _ in batch] for later, batch in batches.items()}
        return drawn

    def batch(self) -> list[Sequence]:
        """The batch that has waited longest."""
        drawn_for = min(self.waiting)
        self.served = drawn_for, self.waiting.pop(drawn_for)
        return self.served[1]

    def put_back(self) -> None:
        """What was served last waits again, unless ``served`` has been cleared since."""
        if self.served is not None:
            drawn_for, batch = self.served
            self.waiting[drawn_for], self.served = batch, None

    def state(self) -> dict[str, Any]:
        """What is waiting, for a checkpoint; the sequences themselves are in ``pack``."""
        return {"waiting": [len(batch) for batch in self.waiting.values()], "waiting_for": list(self.waiting)}

    def pack(self, criterion: Objective) -> dict[str, Tensor]:
        held = list(chain(*self.waiting.values()))
        return pack(held, "waiting") | criterion.pack(held, "waiting")

    def unpack(self, state: dict[str, Any], tensors: dict[str, Tensor], criterion: Objective, step: int) -> None:
        """Takes back what ``state`` and ``pack`` gave before ``step``."""
        held = unpack(tensors, "waiting")
        criterion.unpack(tensors, "waiting", held)
        served, steps = iter(held), state.get("waiting_for", count(step))  # none: of a version that served in turn
        self.waiting = {
            at: [next(served) for _ in range(size)] for at, size in zip(steps, state["waiting"], strict=False)
        }
