"""Recover from a step that fails: retry it with smaller micro-batches, or roll it back.

    for attempt in recovery.attempts(step, source, lr):
        with attempt:
            ...  # draw, forward, backward

When memory runs out inside the block, the changes of the step are rolled back and the loop retries it with
micro-batches of half the size. If that is not possible, a number is not finite, or a server or a disk fails, the state
before the step is saved and the error reports it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distillm_cli.errors import (
    DistillmError,
    NonFiniteError,
    OutOfMemoryError,
    ServerError,
    StorageError,
    out_of_memory,
)
from distillm_cli.losses.extra import MicroRows
from distillm_cli.losses.objectives import SourceBatch
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.rollouts.pool import SequencePool
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.teachers.local import LocalTeacher
from distillm_cli.training.checkpoint import random_states, restore_random_states
from distillm_cli.training.distributed import is_exchanged, lone_error, world
from distillm_cli.training.events import Listener, Warned
from distillm_cli.training.state import RunInfo
from distillm_cli.types import LengthGroups, micro_batches
from distillm_cli.utils.memory import release


class InfiniteLoss(NonFiniteError):
    """Report a loss of +inf: a token has probability 0, which a lower learning rate does not fix."""


@dataclass(eq=False)
class MicroBatch:
    """Hold the sequences of one backward pass, all of one source, in groups of similar length.

    cost: by which micro-batches are shared among the processes. is_own: whether this process works on it.
    teacher_hidden_ND: of all groups, if the objective needed them before the first forward pass.
    """

    source: Source
    groups: LengthGroups
    cost: int = 0
    is_own: bool = True
    teacher_hidden_ND: Tensor | None = None

    @property
    def rows(self) -> MicroRows:
        """Return its sequences, for the extras."""
        return MicroRows(self.source, self.groups)


@dataclass(frozen=True)
class _Snapshot:
    """Hold the state before a step that can change before the optimizer runs, except that of the pool and the teacher."""

    random: dict[str, Tensor]
    objective: dict[str, Any]


class Recovery:
    """Run the attempts at a step.

    max_rows: initial number of sequences of a micro-batch. max_tokens: initial number of its padded positions, in place of
    ``max_rows``; None for no limit. optimizer: its gradients are cleared after a failed attempt.
    save: saves a checkpoint of the state before the step, and returns whether one exists.
    """

    def __init__(
        self,
        student_loss: StudentLoss,
        pool: SequencePool,
        teacher: LocalTeacher | None,
        optimizer: torch.optim.Optimizer,
        run: RunInfo,
        *,
        max_rows: int,
        max_tokens: int | None = None,
        save: Callable[[], bool],
        listener: Listener,
    ):
        self.student_loss = student_loss
        self.pool = pool
        self.teacher = teacher
        self.optimizer = optimizer
        self.run = run
        self.max_rows = max_rows  # halved for the rest of the run when memory runs out, …
        self.max_tokens = max_tokens  # … or this one if it is set
        self.save = save
        self.emit = listener

    def attempts(self, step: int, source: Source, lr: float) -> Iterator[Attempt]:
        """Yield attempts at step ``step`` (from 0) until one succeeds; each is a context manager.

        Raises NonFiniteError, OutOfMemoryError, ServerError or StorageError, after the state before the step was saved.
        """
        snapshot = _Snapshot(random_states(self.run.device), deepcopy(self.student_loss.criterion.state_dict()))
        where = f"at step {step + 1} ({source} batch); nothing was applied"
        succeeded = False
        while not succeeded:
            self.pool.begin_step()
            if self.teacher is not None:
                self.teacher.begin_step()
            attempt = Attempt(self, snapshot, where, lr)
            yield attempt
            succeeded = attempt.succeeded

    def saved(self, error: ServerError | StorageError, where: str) -> DistillmError:
        """Save the current state; return the error with its place in the run and the advice to resume."""
        hint = error.hint
        if self.save():
            hint = f"{hint}, and continue with --resume" if hint else "continue with --resume"
        return type(error)(error.code, f"{error.what} {where}", where=error.where, hint=hint)

    def halve(self, rows: int) -> tuple[str, int]:
        """Halve the limit of micro-batches; return the previous one and the new one. rows: of the largest micro-batch."""
        if self.max_tokens is not None:
            before = self.max_tokens
            self.max_tokens = before // 2
            return f"{before:,} tokens", self.max_tokens
        self.max_rows = rows // 2
        return f"{rows} sequences", self.max_rows

    def roll_back(self, snapshot: _Snapshot) -> None:
        """Restore the state before the step. The pool stores the sampled sequences for the retry."""
        self.optimizer.zero_grad(set_to_none=True)
        restore_random_states(snapshot.random, self.run.device)
        self.student_loss.criterion.load_state_dict(snapshot.objective)
        self.pool.roll_back()
        if self.teacher is not None:
            self.teacher.roll_back()


class Attempt:
    """Enclose one attempt at a step.

    On an error, of this process or another one, it rolls back. It suppresses an out-of-memory error if a retry is possible.
    """

    def __init__(self, recovery: Recovery, snapshot: _Snapshot, where: str, lr: float):
        self.recovery = recovery
        self.snapshot = snapshot
        self.where = where
        self.lr = lr
        self.succeeded = False
        self._rows = 1  # of the largest micro-batch, after the split
        self._is_sharded = recovery.student_loss.sharding.is_on

    def split(self, batches: list[SourceBatch]) -> list[MicroBatch]:
        """Split a step's sequences into micro-batches of at most ``max_rows``, and share them among the processes.

        Every process gets all of them, in the same order.
        """
        recovery = self.recovery
        overhead = recovery.run.pass_overhead
        dist = world()
        tokens = recovery.max_tokens
        rows = {batch.source: dist.rows_each(len(batch.sequences)) for batch in batches}
        if tokens is None:
            rows = {source: min(recovery.max_rows, each) for source, each in rows.items()}
        found = [
            MicroBatch(batch.source, groups, _cost(groups, overhead))
            for batch in batches
            for groups in micro_batches(batch.sequences, rows[batch.source], overhead, tokens)
        ]
        self._rows = max(rows.values())
        if tokens is not None:
            self._rows = max(sum(map(len, micro.groups)) for micro in found)
        if self._is_sharded:  # all processes make each pass together, so passes cost the same
            found = [MicroBatch(micro.source, [group], cost=1) for micro in found for group in micro.groups]
        for micro, owner in zip(found, dist.owners([micro.cost for micro in found]), strict=True):
            micro.is_own = owner == dist.rank
        return found

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type | None, own_error: BaseException | None, traceback: Any) -> bool:
        is_everywhere = own_error is None or is_exchanged(own_error) or isinstance(own_error, NonFiniteError)
        if self._is_sharded and not is_everywhere:
            assert own_error is not None
            raise lone_error(own_error) from own_error  # the others wait in a pass
        error = world().agree(own_error)
        if error is None:
            self.succeeded = True
            return False
        is_out_of_memory = isinstance(error, RuntimeError | MemoryError) and out_of_memory(error)
        if not (is_out_of_memory or isinstance(error, NonFiniteError | ServerError | StorageError)):
            if error is own_error:
                return False
            raise error
        if is_out_of_memory:
            release(error)
        self.recovery.roll_back(self.snapshot)
        if is_out_of_memory and self._rows > 1:
            size, half = self.recovery.halve(self._rows)
            self.recovery.emit(
                Warned(f"out of memory with micro-batches of {size}: continuing with {half}, same batches")
            )
            return True
        if isinstance(error, ServerError | StorageError):
            raise self.recovery.saved(error, self.where) from error
        is_saved = self.recovery.save()
        raise self._explained(error, is_saved) from error

    def _explained(self, error: BaseException, is_saved: bool) -> DistillmError:
        if isinstance(error, NonFiniteError):
            hint = error.hint if isinstance(error, InfiniteLoss) else f"lower --lr (now {self.lr:g}), or --dtype fp32"
            return NonFiniteError(error.code, f"{error.what} {self.where}", hint=hint)
        hint = "continue with --resume on a machine with more memory" if is_saved else "lower --max-length"
        return OutOfMemoryError("memory.exhausted", f"out of memory {self.where}", hint=hint)


def _cost(groups: LengthGroups, pass_overhead: int) -> int:
    """Return the positions that passes through these groups compute, padding and overhead included."""
    return sum(len(group) * max(map(len, group)) + pass_overhead for group in groups)


def check_finite(loss: float, grad_norm: float) -> None:
    """Raise NonFiniteError unless both are finite, with the cause if the numbers show it."""
    if loss == math.inf:
        raise InfiniteLoss(
            "numbers.infinite_loss",
            "the loss is infinite: a token has probability 0 (a logit of −inf) in one model but not in the other, or "
            "occurs in a row,",
            hint="suppress the same tokens in both models, drop the rows that contain them, or choose a bounded "
            "divergence (skl, srkl, jsd, tvd)",
        )
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NonFiniteError("numbers.not_finite", f"loss {loss}, gradient norm {grad_norm}")
