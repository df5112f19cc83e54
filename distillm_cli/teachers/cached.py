"""Cache a teacher's hidden states, so that they are computed once for each sequence.

In bf16 the states take 2·d bytes per token where logits take 2·V, and the loss is exact because the head is applied again.
Data set rows and validation rows have a table for the whole run. A rollout carries its own states while it is in the pool.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import cast

import numpy as np
import torch
from torch import Tensor

from distillm_cli.losses.fused import HeadLike
from distillm_cli.teachers.local import LanguageModel, LocalTeacher
from distillm_cli.teachers.shared_memory import shared_parts, shared_table
from distillm_cli.training.distributed import world
from distillm_cli.types import MIN_PASS_OVERHEAD, Batch, Rollout, Sequence, collate, length_groups, moved, supervised_of


class CachedTeacher(LocalTeacher):
    """Compute a model's hidden states once and cache them.

    mode: memory or disk. rows: table of data set rows; None caches none of them. composition: batches in which missing rows
    are computed; None if ``rows`` has all. caches_rollouts: whether sampled sequences are cached. validation: table of
    validation rows, None for none. releases_model: no other sequences will be requested, so the model is released from
    memory once the states of every row are cached.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        mode: str,
        rows: HiddenStateTable | None = None,
        composition: BatchComposition | None = None,
        caches_rollouts: bool = False,
        validation: HiddenStateTable | None = None,
        releases_model: bool = False,
    ):
        super().__init__(model)
        self.mode = mode
        self.rows = rows
        self.composition = composition
        self.caches_rollouts = caches_rollouts
        self.validation = validation
        self.releases_model = releases_model
        self.has_released_model = False
        self._head: HeadLike | None = None
        self._new_rollouts: list[Rollout] = []  # cached since ``begin_step``
        self._has_all_rows = False  # in the processes of all machines

    @property
    def head(self) -> HeadLike:
        return self._head or self.model.head()

    @torch.no_grad()
    def hidden(self, batch: Batch, sequences: SequenceOf[Sequence]) -> Tensor:
        """Return the last hidden states [N, D_teacher] of the batch that ``sequences`` were collated to, without a graph.

        A batch without cached rows is computed unchanged, so its states equal those of ``LocalTeacher`` bit for bit. Cached
        states differ from them at most by the rounding of another batch shape. A rollout that equals the response of its
        row has the states of the row: a student that fits its rows samples them often.
        """
        sequences = [self._as_row(s) for s in sequences]
        if not any(self._is_cacheable(s) for s in sequences):
            return self.compute(self.seen(batch, sequences))
        device = batch.ids_BT.device
        missing = self._batches_of([s for s in dict.fromkeys(sequences) if self._cached(s) is None])
        if missing == [list(sequences)]:
            hidden_ND = self.compute(self.seen(batch, sequences))
            self._store(sequences, hidden_ND)
        else:
            computed = self._compute_all(missing, device)
            parts = [computed[s] if s in computed else self._computed(s) for s in sequences]
            hidden_ND = moved(torch.cat(parts), device)
        if self.releases_model and not self.has_released_model and world().size == 1:
            self._release_when_complete(device)
        return hidden_ND

    def begin_step(self) -> None:
        self._new_rollouts.clear()

    def roll_back(self) -> None:
        """Drop the states of rollouts cached since ``begin_step``.

        If some of a batch stayed cached, the others would be computed in another batch composition. States of rows do not
        depend on when they were computed.
        """
        for rollout in self._new_rollouts:
            rollout.cache_teacher_hidden(None)
        self._new_rollouts.clear()

    @torch.no_grad()
    def exchange(self, sequences: SequenceOf[Sequence], device: torch.device) -> None:
        """Give the states computed since the last call to the other processes of this machine, and get theirs.

        Each row and rollout is then computed in one process of a machine.
        """
        if world().size == 1:
            return
        if not self._has_all_rows:
            self._exchange_rows()
        if self.caches_rollouts:
            self._exchange_rollouts(sequences)
        if self.releases_model and not self.has_released_model:
            self._release_together(device)

    def _exchange_rows(self) -> None:
        tables = [table for table in (self.rows, self.validation) if table is not None]
        written = world().gather(lambda: [(table.written, table.missing) for table in tables])
        self._has_all_rows = not any(missing for of_rank in written for _, missing in of_rank)
        for rank in world().machine:
            for table, (rows, _) in zip(tables, written[rank], strict=True):
                table.mark_known(rows)
        for table in tables:
            table.written = []

    def _exchange_rollouts(self, sequences: SequenceOf[Sequence]) -> None:
        """Exchange the states of the step's rollouts, through memory that the processes of a machine share."""
        place = {s: i for i, s in enumerate(sequences)}
        new = [s for s in self._new_rollouts if s in place]
        found = world().gather(lambda: [place[s] for s in new])
        if not any(found):
            return
        own_ND = torch.cat([self._computed(s) for s in new]) if new else None
        for rank, states_ND in shared_parts(own_ND).items():
            rollouts = [cast(Rollout, sequences[i]) for i in found[rank]]
            for rollout, part in zip(rollouts, states_ND.split([s.supervised for s in rollouts]), strict=True):
                rollout.cache_teacher_hidden(part)
            if rank != world().rank:
                self._new_rollouts += rollouts

    def _as_row(self, sequence: Sequence) -> Sequence:
        """Return the data set row that a rollout equals, otherwise the sequence itself."""
        if not isinstance(sequence, Rollout) or self.rows is None:
            return sequence
        return self.rows.row_equal_to(sequence) or sequence

    def _is_cacheable(self, sequence: Sequence) -> bool:
        if isinstance(sequence, Rollout):
            return self.caches_rollouts
        return self._table_of(sequence) is not None

    def _table_of(self, sequence: Sequence) -> HiddenStateTable | None:
        tables = (table for table in (self.rows, self.validation) if table is not None)
        return next((table for table in tables if table.contains(sequence)), None)

    def _cached(self, sequence: Sequence) -> Tensor | None:
        if isinstance(sequence, Rollout):
            return sequence.teacher_hidden_ND
        table = self._table_of(sequence)
        return None if table is None else table.read(sequence)

    def _computed(self, sequence: Sequence) -> Tensor:
        """Return the states of a sequence that were just computed or were cached before."""
        states_ND = self._cached(sequence)
        assert states_ND is not None
        return states_ND

    def _batches_of(self, missing: list[Sequence]) -> list[list[Sequence]]:
        """Return the batches to compute for these sequences: rows as in the first epoch, the others in one batch."""
        rows = [s for s in missing if self.rows is not None and self.rows.contains(s)]
        others = [s for s in missing if self.rows is None or not self.rows.contains(s)]
        batches: list[list[Sequence]] = []
        if rows:
            assert self.composition is not None
            batches = self.composition.batches_with(rows)
        return [*batches, others] if others else batches

    def _compute_all(self, batches: list[list[Sequence]], device: torch.device) -> dict[Sequence, Tensor]:
        """Compute the states of batches, cache them where they may be, and return them by sequence, on the CPU."""
        computed: dict[Sequence, Tensor] = {}
        for sequences in batches:
            parts = self._store(sequences, self.compute(collate([s.for_teacher for s in sequences]).to(device)))
            computed |= zip(sequences, parts, strict=True)
        return computed

    def _store(self, sequences: SequenceOf[Sequence], hidden_ND: Tensor) -> SequenceOf[Tensor]:
        """Cache the states of a batch where they may be; return them by sequence, on the CPU."""
        parts = hidden_ND.cpu().split([s.supervised for s in sequences])
        for sequence, part in zip(sequences, parts, strict=True):
            if isinstance(sequence, Rollout) and self.caches_rollouts:
                sequence.cache_teacher_hidden(part.clone())  # a view would keep the whole batch's states in memory
                self._new_rollouts.append(sequence)
            elif (table := self._table_of(sequence)) is not None:
                table.write(sequence, part)
        return parts

    def _release_when_complete(self, device: torch.device) -> None:
        """Release everything but the head, once every row's states are cached."""
        if not self._has_only_leftovers():
            return
        self._compute_leftovers(device)
        self._release(device)

    def _release_together(self, device: torch.device) -> None:
        """Release everything but the head in all processes, once every machine has every row's states."""
        dist = world()
        if not all(dist.gather(self._has_only_leftovers)):
            return
        dist.gather(lambda: self._compute_leftovers(device) if dist.is_first_on_machine else None)
        self._exchange_rows()
        self._release(device)

    def _has_only_leftovers(self) -> bool:
        """Return whether the only rows without states, fewer than a batch, are in no batch of the first epoch."""
        most = 0 if self.composition is None else self.composition.most_leftovers
        if self.rows is None or self.rows.missing > most:
            return False
        return self.validation is None or not self.validation.missing

    def _compute_leftovers(self, device: torch.device) -> None:
        """Compute the rows in no batch of the first epoch. Fewer than a batch, they would keep the model for another one."""
        leftovers = [] if self.composition is None else self.composition.leftovers
        self._compute_all(self._batches_of([s for s in leftovers if self._cached(s) is None]), device)

    def _release(self, device: torch.device) -> None:
        if self.rows is None or self.rows.missing:
            return
        # On "meta" a model has no memory. The head references its own tensors, tied embeddings included.
        self._head = self.model.head()
        self.model.to("meta")
        self.has_released_model = True
        if device.type == "cuda":
            torch.cuda.empty_cache()


class HiddenStateTable:
    """Hold the teacher's hidden states of a list of rows, concatenated: [tokens of all responses, D] on the CPU.

    table_ND: the states, if all exist; otherwise the table is allocated at the first ``write``. missing: number of rows
    without states. written: rows whose states were set here and not exchanged yet, in one of several processes.
    """

    def __init__(self, sequences: SequenceOf[Sequence], table_ND: Tensor | None = None):
        self.sequences = sequences
        self.table_ND = table_ND
        self._supervised = supervised_of(sequences)
        self._ends = np.cumsum(self._supervised)
        self._is_known = np.full(len(sequences), table_ND is not None)
        self.missing = 0 if table_ND is not None else len(sequences)
        self.written: list[int] = []

    @classmethod
    def shared(cls, sequences: SequenceOf[Sequence], like: Callable[[], Tensor]) -> HiddenStateTable:
        """Return an empty table, in memory that the processes of a machine share. Every process calls it.

        like: returns states of the same width and dtype.
        """
        table = cls(sequences)
        if world().size > 1:
            like_ND = like()
            table.table_ND = shared_table(int(table._ends[-1]), like_ND.shape[1], like_ND.dtype)
        return table

    @property
    def bytes(self) -> int:
        return 0 if self.table_ND is None else self.table_ND.numel() * self.table_ND.element_size()

    def contains(self, sequence: Sequence) -> bool:
        """Return whether the sequence is a row of this table. A rollout for a row's prompt is not."""
        return 0 <= sequence.row < len(self.sequences) and self.sequences[sequence.row] == sequence

    def row_equal_to(self, rollout: Rollout) -> Sequence | None:
        """Return the row that a rollout was sampled for, if it has the same tokens, supervised in the response alone."""
        if not 0 <= rollout.row < len(self.sequences):
            return None
        row = self.sequences[rollout.row]
        pairs = [(row.prompt, rollout.prompt), (row.for_teacher.prompt, rollout.for_teacher.prompt)]
        is_equal = np.array_equal(row.response, rollout.response) and all(np.array_equal(*pair) for pair in pairs)
        return row if is_equal and row.turns is None and rollout.turns is None else None

    def read(self, sequence: Sequence) -> Tensor | None:
        """Return the row's states [tokens, D]; None if they are missing."""
        return self._slice(sequence) if self._is_known[sequence.row] else None

    def write(self, sequence: Sequence, states_ND: Tensor) -> None:
        """Set the row's states."""
        if self.table_ND is None:
            self.table_ND = torch.empty(int(self._ends[-1]), states_ND.shape[1], dtype=states_ND.dtype)
        self._slice(sequence).copy_(states_ND)
        self.mark_known([sequence.row])
        if world().size > 1:
            self.written.append(sequence.row)

    def mark_known(self, rows: SequenceOf[int]) -> None:
        """Record that these rows have states."""
        for row in rows:
            self.missing -= not self._is_known[row]
            self._is_known[row] = True

    def _slice(self, sequence: Sequence) -> Tensor:
        assert self.table_ND is not None
        end = int(self._ends[sequence.row])
        return self.table_ND[end - int(self._supervised[sequence.row]) : end]


class BatchComposition:
    """Define the rows that are computed together: those in one group of the first epoch, trained on or not.

    The first epoch then computes no other batches than its own, and a row's cached states depend only on teacher, rows and
    order: a resumed run computes them in the same batches and gets the same bits.

    batches: step → indices of its rows, in the first epoch. steps: number of steps of that epoch. max_rows, max_tokens,
    pass_overhead: those of the micro-batches, which are smaller in several processes. leftovers: the rows in no batch of
    that epoch, fewer than a batch, or many if the epoch does not have all rows of a mixture. They are cut into batches as
    large as a step's.
    """

    def __init__(
        self,
        batches: Callable[[int], list[int]],
        *,
        steps: int,
        rows: SequenceOf[Sequence],
        max_rows: int,
        max_tokens: int | None = None,
        pass_overhead: int = MIN_PASS_OVERHEAD,
    ):
        self._max_tokens = max_tokens
        self._batches = batches
        self._rows = rows
        self._steps = steps
        self._max_rows = max_rows
        self._pass_overhead = pass_overhead
        self._step_of_row = np.full(len(rows), steps)
        self._step_rows = len(batches(0))
        for step in reversed(range(steps)):
            self._step_of_row[batches(step)] = step
        left = np.flatnonzero(self._step_of_row == steps)
        self._step_of_row[left] += np.arange(len(left)) // self._step_rows
        self._left = left

    @property
    def most_leftovers(self) -> int:
        """Return the number of leftovers, at most a batch."""
        return min(len(self._left), self._step_rows)

    @property
    def leftovers(self) -> list[Sequence]:
        """Return the rows in no batch of the first epoch."""
        return [self._rows[int(i)] for i in self._left]

    def batches_with(self, rows: SequenceOf[Sequence]) -> list[list[Sequence]]:
        """Return the groups that contain these rows, with all their members."""
        requested = set(rows)
        found = []
        for step in dict.fromkeys(self._step_of_row[s.row] for s in rows):
            batch = [self._rows[int(i)] for i in self._batch(int(step))]
            each = world().rows_each(len(batch))
            most = each if self._max_tokens is not None else min(self._max_rows, each)
            groups = length_groups(batch, most, self._pass_overhead, self._max_tokens)
            found += [group for group in groups if not requested.isdisjoint(group)]
        return found

    def _batch(self, step: int) -> SequenceOf[int] | np.ndarray:
        """Return the rows of a batch: of a step of the first epoch, then of the leftovers."""
        if step < self._steps:
            return self._batches(step)
        start = (step - self._steps) * self._step_rows
        return self._left[start : start + self._step_rows]
