"""A model's responses to the rows of the data set, one for each: drawn when they are first needed, and kept.

The teacher's serve sequence-level distillation (``schedule.kind`` teacher, pairs); the student's, drawn for a whole epoch as
it is at the epoch's beginning, are the other half of DistiLLM-2's pairs. A row's randomness is fixed by (seed, epoch, row),
so what is drawn does not depend on how many are drawn at once, nor on where a run was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from distillm_cli.rollouts.replay import pack, unpack
from distillm_cli.rollouts.rollout import Rollouts
from distillm_cli.training.events import Listener, Progress, silent
from distillm_cli.types import Sequence


class Samples:
    """Responses by the row they answer.

    rollouts: where they come from; asked with the epoch as the step. batches: step → that step's rows. steps: of the run.
    bulk: steps whose rows are decoded side by side. redraw: every epoch begins with nothing. whole_epochs: an epoch's are
    all drawn at its first step, by the model as it is then. given: row → its samples, where they were made beforehand;
    under ``redraw`` the epochs take turns with them. name: of the work, for people.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        *,
        batches: Callable[[int], list[Sequence]],
        steps: int,
        steps_per_epoch: int,
        bulk: int = 1,
        redraw: bool = False,
        whole_epochs: bool = False,
        given: Mapping[int, SequenceOf[Sequence]] | None = None,
        name: str = "sampling",
        listener: Listener = silent,
    ):
        self.rollouts, self.batches, self.steps, self.steps_per_epoch = rollouts, batches, steps, steps_per_epoch
        self.bulk, self.redraw, self.whole_epochs = bulk, redraw, whole_epochs
        self.given, self.name, self.say = given, name, listener
        self.kept: dict[int, Sequence] = {}
        self.epoch = 0

    @property
    def sequences(self) -> list[Sequence]:
        """All there are, in an order that a resumed run finds again."""
        return [s for samples in (self.given or {}).values() for s in samples] + list(self.kept.values())

    def draw(self, step: int) -> list[Sequence]:
        """Draws what this step needs and is not there yet, with what the next ones need; what was drawn now."""
        epoch = step // self.steps_per_epoch
        if self.redraw and epoch != self.epoch:
            self.kept = {}
        self.epoch = epoch
        if self.given is not None or all(row.row in self.kept for row in self.batches(step)):
            return []
        end = min(self.steps, (epoch + 1) * self.steps_per_epoch if self.redraw else self.steps)
        last = end if self.whole_epochs else min(step + self.bulk, end)
        missing = {s.row: s for t in range(step, last) for s in self.batches(t) if s.row not in self.kept}
        rows, at_once, fresh = list(missing.values()), self.bulk * len(self.batches(step)), []
        for at in range(0, len(rows), at_once):
            if len(rows) > at_once:
                self.say(Progress(self.name, at, len(rows), "responses"))
            fresh += self.rollouts.sample(rows[at : at + at_once], epoch)
        self.kept |= {s.row: s for s in fresh}
        if len(rows) > at_once:
            self.say(Progress(self.name, len(rows), len(rows), "responses"))
        return fresh

    def batch(self, step: int) -> list[Sequence]:
        """The samples for a step's rows, once ``draw`` was called for it."""
        if self.given is None:
            return [self.kept[row.row] for row in self.batches(step)]
        turn = self.epoch if self.redraw else 0
        return [self.given[row.row][turn % len(self.given[row.row])] for row in self.batches(step)]

    def pack(self, prefix: str) -> dict[str, Tensor]:
        """What was drawn, and for which epoch, for a checkpoint: a step that failed may have begun one."""
        return pack(self.kept.values(), prefix) | {f"{prefix}.epoch": torch.tensor(self.epoch)}

    def unpack(self, tensors: dict[str, Tensor], prefix: str, step: int) -> None:
        """Takes back what ``pack`` gave before step ``step`` (from 0)."""
        self.kept = {s.row: s for s in unpack(tensors, prefix)}
        of_last_step = max(step - 1, 0) // self.steps_per_epoch  # of a version that told no epoch
        self.epoch = int(tensors.get(f"{prefix}.epoch", of_last_step))
