"""What the teacher says of a batch: its last hidden states at the response positions, and nothing of its vocabulary.

The head is applied to them chunk by chunk in the fused loss, so the teacher's logits never exist as a whole. The states
may be kept: 2·d bytes a token in bf16 where logits would be 2·V, and exact, because the head is applied again. A data set
row's stay for the whole run; a student output's for as long as it lives in the replay buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from typing import Protocol
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import Tensor

from distillm_cli.losses.fused import HeadLike
from distillm_cli.types import MIN_PASS_OVERHEAD, Batch, Sequence, collate, length_groups, moved


class Model(Protocol):
    """The face of a model that the engine needs."""

    vocab: int

    def hidden(self, batch: Batch, *, for_backward: bool = False) -> Tensor:
        """Last hidden states [N, D] at ``batch.positions_N``.

        for_backward: ``backward()`` follows (not ``autograd.grad``). Who reads a matrix that the head reads too (a tied
        embedding) may hold its gradient back until the head's is there.
        """

    def head(self) -> HeadLike:
        """The way from there to logits."""


class Teacher:
    """A frozen model, asked for hidden states only, and asked once where its answers are kept.

    mode: off, memory or disk; recorded in checkpoints. rows: where the states of data set rows are kept (None: nowhere).
    company: with whom a row is computed that ``rows`` does not hold yet; None when it holds all. remembers: a sampled
    sequence's states are kept for as long as the sequence itself. passing: data set rows that are no samples and kept
    nowhere. awaited: held-out sequences, whose states are kept too.
    leaves: no student output will be asked about, so that the model may leave memory once all of that is known.
    tokens: response positions that the model has computed so far, for the whole run: what a resumed one has to compute again
    counts again.
    """

    def __init__(
        self,
        model: Model,
        *,
        mode: str = "off",
        rows: RowStates | None = None,
        company: FirstEpoch | None = None,
        remembers: bool = False,
        passing: SequenceOf[Sequence] = (),
        leaves: bool = False,
        awaited: SequenceOf[Sequence] = (),
    ):
        self.model, self.mode, self.rows, self.company = model, mode, rows, company
        self.remembers, self.leaves = remembers, leaves
        self.passing, self.awaited = frozenset(passing), frozenset(awaited)
        self.tokens, self.has_left = 0, False
        self._head: HeadLike | None = None
        self._others: WeakKeyDictionary[Sequence, Tensor] = WeakKeyDictionary()
        self._lately: WeakSet[Sequence] = WeakSet()

    @property
    def head(self) -> HeadLike:
        return self._head or self.model.head()

    @torch.no_grad()
    def hidden(self, batch: Batch, sequences: SequenceOf[Sequence]) -> Tensor:
        """Last hidden states [N, D_teacher] of the batch that ``sequences`` were collated to, without a graph.

        A batch of which nothing is known yet is computed as it is, so the first answer is that of a teacher that keeps
        nothing, bit for bit; a kept one differs from it by the rounding of another batch shape at most.
        """
        if not all(self._is_kept(s) for s in sequences):
            return self._ask(batch)
        device = batch.ids_BT.device
        unknown = self._together([s for s in dict.fromkeys(sequences) if not self._knows(s)])
        if unknown == [list(sequences)]:
            hidden_ND = self._ask(batch)
            self._keep(sequences, hidden_ND)
        else:
            self._learn(unknown, device)
            hidden_ND = moved(torch.cat([self._recall(s) for s in sequences]), device)
        if self.leaves and not self.has_left:
            self._leave_if_done(device)
        return hidden_ND

    def state(self) -> dict[str, str | int]:
        """What a checkpoint says of it."""
        return {"teacher_cache": self.mode, "teacher_tokens": self.tokens}

    def load_state(self, state: dict) -> None:
        """Counts on from where ``state`` was taken; an older checkpoint did not count."""
        self.tokens += state.get("teacher_tokens", 0)

    def pack(self, sequences: Iterable[Sequence], prefix: str) -> dict[str, Tensor]:
        """What is kept of these student outputs, for a checkpoint: recomputed in other company it would round otherwise."""
        known = [(i, self._others[s]) for i, s in enumerate(sequences) if s in self._others]
        if not known:
            return {}
        places, states = zip(*known, strict=True)
        return {f"{prefix}.scored": torch.tensor(places), f"{prefix}.states": torch.cat(states)}

    def unpack(self, tensors: dict[str, Tensor], prefix: str, sequences: SequenceOf[Sequence]) -> None:
        """Takes back what ``pack`` gave, for the same sequences in the same order."""
        if f"{prefix}.scored" not in tensors or not self.remembers:
            return
        scored = [sequences[i] for i in tensors[f"{prefix}.scored"].tolist()]
        self._keep(scored, tensors[f"{prefix}.states"])

    def begin_step(self) -> None:
        """What is asked from here on may have to be forgotten."""
        self._lately.clear()

    def forget_step(self) -> None:
        """Forgets the states of the sequences that are no rows and were asked about since ``begin_step``; those of rows do
        not depend on when they were computed."""
        for sequence in list(self._lately):
            del self._others[sequence]
        self._lately.clear()

    def _ask(self, batch: Batch) -> Tensor:
        """In the teacher's own dtype, whatever the student computes in."""
        self.tokens += batch.tokens
        with torch.autocast(batch.ids_BT.device.type, enabled=False):
            return self.model.hidden(batch)

    def _is_kept(self, sequence: Sequence) -> bool:
        is_remembered = self.remembers and sequence not in self.passing
        return is_remembered or sequence in self.awaited or self._is_row(sequence)

    def _is_row(self, sequence: Sequence) -> bool:
        return self.rows is not None and self.rows.is_row(sequence)

    def _knows(self, sequence: Sequence) -> bool:
        return self.rows.holds(sequence) if self._is_row(sequence) else sequence in self._others

    def _together(self, unknown: list[Sequence]) -> list[list[Sequence]]:
        """What has to be computed to know these: rows in the company of their first epoch, others with one another."""
        rows = [s for s in unknown if self._is_row(s)]
        others = [s for s in unknown if not self._is_row(s)]
        return (self.company.groups(rows) if rows else []) + ([others] if others else [])

    def _learn(self, groups: list[list[Sequence]], device: torch.device) -> None:
        for group in groups:
            self._keep(group, self._ask(collate(group).to(device)))

    def _keep(self, sequences: SequenceOf[Sequence], hidden_ND: Tensor) -> None:
        parts = hidden_ND.cpu().split([s.supervised for s in sequences])
        for sequence, part in zip(sequences, parts, strict=True):
            if self._is_row(sequence):
                self.rows.write(sequence, part)
            else:
                self._others[sequence] = part.clone()  # a view would hold the whole batch's states
                self._lately.add(sequence)

    def _recall(self, sequence: Sequence) -> Tensor:
        return self.rows.read(sequence) if self._is_row(sequence) else self._others[sequence]

    def _leave_if_done(self, device: torch.device) -> None:
        """Lets go of everything but the head, once nothing is left to ask."""
        late = [] if self.company is None else self.company.leftovers
        if self.rows.unknown > len(late) or any(s not in self._others for s in self.awaited):
            return
        # Rows that sit the first epoch out would hold the model for an epoch more: they are fewer than one batch.
        self._learn(self._together([s for s in late if not self.rows.holds(s)]), device)
        if self.rows.unknown:
            return
        # On "meta" a model has shapes and no memory. The head keeps its own tensors alive, tied embeddings included.
        self._head = self.model.head()
        self.model.to("meta")
        self.has_left = True
        if device.type == "cuda":
            torch.cuda.empty_cache()


class RowStates:
    """The teacher's hidden states of a data set's rows, one row after the other: [tokens of all responses, D] on the CPU.

    table_ND: all of them, when they are there already; else the table is made at the first ``write``.
    """

    def __init__(self, sequences: SequenceOf[Sequence], table_ND: Tensor | None = None):
        self.sequences, self.table_ND = sequences, table_ND
        ends = np.cumsum([s.supervised for s in sequences])
        self._spans = list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))
        self._is_known = np.full(len(sequences), table_ND is not None)
        self.unknown = 0 if table_ND is not None else len(sequences)

    @property
    def bytes(self) -> int:
        return 0 if self.table_ND is None else self.table_ND.numel() * self.table_ND.element_size()

    def is_row(self, sequence: Sequence) -> bool:
        """Whether it is the very row: a rollout for the row's prompt is another sequence."""
        return 0 <= sequence.row < len(self.sequences) and self.sequences[sequence.row] is sequence

    def holds(self, sequence: Sequence) -> bool:
        return bool(self._is_known[sequence.row])

    def read(self, sequence: Sequence) -> Tensor:
        start, end = self._spans[sequence.row]
        return self.table_ND[start:end]

    def write(self, sequence: Sequence, states_ND: Tensor) -> None:
        if self.table_ND is None:
            self.table_ND = torch.empty(self._spans[-1][1], states_ND.shape[1], dtype=states_ND.dtype)
        self.read(sequence).copy_(states_ND)
        self.unknown -= not self._is_known[sequence.row]
        self._is_known[sequence.row] = True


class FirstEpoch:
    """Which rows are computed together: those that meet in a pass of the first epoch, whether or not that step
    came to train on them.

    So the first pass computes nothing beside its own batches, and what is kept of a row is a function of teacher, rows
    and order alone: a resumed run, which has to compute a row again, does so in the same company and gets the same bits.

    batches: step → rows, of the first epoch; steps: of that epoch; most, pass_overhead: as of ``passes``.
    leftovers: the rows of no batch of it; they keep each other company.
    """

    def __init__(
        self,
        batches: Callable[[int], list[Sequence]],
        *,
        steps: int,
        rows: SequenceOf[Sequence],
        most: int,
        pass_overhead: int = MIN_PASS_OVERHEAD,
    ):
        self._batches, self._steps, self._most, self._pass_cost = batches, steps, most, pass_overhead
        self._step_of_row = np.full(len(rows), steps)
        for step in reversed(range(steps)):
            self._step_of_row[[s.row for s in batches(step)]] = step
        self.leftovers = [s for s in rows if self._step_of_row[s.row] == steps]

    def groups(self, rows: SequenceOf[Sequence]) -> list[list[Sequence]]:
        """The passes in which these rows are, all members included."""
        wanted, groups = set(rows), []
        for step in dict.fromkeys(self._step_of_row[s.row] for s in rows):
            batch = self.leftovers if step == self._steps else self._batches(int(step))
            groups += [
                group for group in length_groups(batch, self._most, self._pass_cost) if not wanted.isdisjoint(group)
            ]
        return groups
