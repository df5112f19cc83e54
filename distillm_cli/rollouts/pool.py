"""Provide a step's sequences: data set rows, fresh rollouts, the replay buffer, and responses stored by row.

``SequencePool.draw`` is the only access to them, for every schedule. Everything in the pool is part of a checkpoint.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillm_cli.losses.objectives import SourceBatch
from distillm_cli.rollouts.sampler import Sampler, sample_together
from distillm_cli.rollouts.scheduler import Scheduler, Source
from distillm_cli.training.events import Listener, Progress, silent
from distillm_cli.types import LOG_DRAWN, LOG_P, LOG_Q, Rollout, Sequence, TeacherPrompt

# Names of the columns of ``Rollout.log_probs_NK`` in checkpoints.
_LOG_PROBS = {LOG_Q: "log_probs.student", LOG_P: "log_probs.teacher", LOG_DRAWN: "log_probs.drawn"}

_UNKNOWN = -1  # step of a rollout in checkpoints, if it is not known


@dataclass
class SampleCounts:
    """Count the sequences and tokens sampled in the whole run."""

    student_sequences: int = 0
    student_tokens: int = 0
    teacher_sequences: int = 0
    teacher_tokens: int = 0


class SequencePool:
    """Draw each step's sequences.

    rows: step (from 0) → that step's data set rows; a pure function, so that a resume needs one integer. student:
    samples the student's outputs; None if the schedule needs none. responses: responses stored by row, by source (the
    teacher's, and the student's if they are sampled for a whole epoch). bulk: number of rollout batches sampled at
    once, for the next steps that need one; a large batch costs little more to decode than a small one. rows_beside:
    also train on the step's rows in each step on student outputs. sampling: a context for sampling from the student
    (evaluation mode, autocast). teacher_sampling: the same for the teacher.
    """

    def __init__(
        self,
        rows: Callable[[int], list[Sequence]],
        scheduler: Scheduler,
        *,
        student: Sampler | None = None,
        responses: Mapping[Source, ResponseTable] | None = None,
        bulk: int = 1,
        rows_beside: bool = False,
        sampling: Callable[[], AbstractContextManager[None]] = nullcontext,
        teacher_sampling: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self.rows = rows
        self.scheduler = scheduler
        self.student = student
        self.responses = responses or {}
        self.bulk = bulk
        self.rows_beside = rows_beside
        self.sampling = sampling
        self.teacher_sampling = teacher_sampling
        self.replay = new_buffer(scheduler, step_rows=len(rows(0)))
        self.counts = SampleCounts()
        self.sampled_tokens = 0  # since this process started, the teacher's included
        self.sampling_seconds = 0.0
        self.waiting: dict[int, list[Rollout]] = {}  # batches sampled ahead, by the step they were sampled for
        self._served: tuple[int, list[Rollout]] | None = None  # since ``begin_step``
        self._replay_before: list[Rollout] = []

    def __len__(self) -> int:
        """Return the number of sequences in the replay buffer."""
        return len(self.replay)

    def draw(self, source: Source, step: int) -> list[SourceBatch]:
        """Return the sequences that a step trains on, by source.

        Step s uses the rows of data set batch s as sequences or as prompts. A replay step does not use them.
        """
        if source is Source.PAIR:
            student_outputs = (
                self._row_responses(Source.ROLLOUT, step) if Source.ROLLOUT in self.responses else self._fresh(step)
            )
            return [
                SourceBatch(Source.TEACHER, self._row_responses(Source.TEACHER, step)),
                SourceBatch(Source.ROLLOUT, student_outputs),
            ]
        match source:
            case Source.DATASET:
                return [SourceBatch(source, self.rows(step))]
            case Source.TEACHER:
                drawn = self._row_responses(source, step)
            case Source.ROLLOUT:
                drawn = self._fresh(step)
                self.replay.add(drawn)
                if self.scheduler.config.trains_from_buffer:
                    drawn = self.replay.draw(len(drawn), step)
            case Source.REPLAY:
                drawn = self.replay.draw(len(self.rows(step)), step)
        beside = [SourceBatch(Source.DATASET, self.rows(step))] if self.rows_beside else []
        return [SourceBatch(source, drawn), *beside]

    def _row_responses(self, source: Source, step: int) -> list[Rollout]:
        """Return the stored responses to the step's rows. Sample those that are missing."""
        table = self.responses[source]
        is_teachers = source is Source.TEACHER
        with self.teacher_sampling() if is_teachers else self.sampling():  # the teacher samples in its own dtype
            started = time.perf_counter()
            self._count(table.sample(step), is_teachers=is_teachers)
            self.sampling_seconds += time.perf_counter() - started
        return table.batch(step)

    def _fresh(self, step: int) -> list[Rollout]:
        """Return a batch of student outputs, sampled together with those of the next steps that will need one.

        Each batch has the rows of its own step as prompts; bulk only changes the age of the student that sampled it. A
        batch whose step trained on another source is used for the next step that needs one.
        """
        if not any(sampled_for <= step for sampled_for in self.waiting):
            adds = len(self.rows(step))
            steps = self.scheduler.rollout_steps(step, len(self), adds=adds, count=self.bulk)
            batches = {future_step: self.rows(future_step) for future_step in steps if future_step not in self.waiting}
            assert self.student is not None
            started = time.perf_counter()
            with self.sampling():
                sampled = sample_together(self.student, [row for batch in batches.values() for row in batch], step)
            self.sampling_seconds += time.perf_counter() - started
            self._count(sampled, is_teachers=False)
            remaining = iter([replace(rollout, sampled_at=step) for rollout in sampled])
            for future_step, batch in batches.items():
                self.waiting[future_step] = [next(remaining) for _ in batch]
        oldest = min(self.waiting)
        self._served = (oldest, self.waiting.pop(oldest))
        self.replay.share_teacher_hidden(self._served[1])
        return self._served[1]

    def repeats(self) -> float | None:
        """Return the share of the step's fresh student outputs that equal their row's response; None without any."""
        if self._served is None:
            return None
        step, outputs = self._served
        pairs = zip(outputs, self.rows(step), strict=True)
        return sum(np.array_equal(output.response, row.response) for output, row in pairs) / len(outputs)

    def _count(self, sampled: SequenceOf[Sequence], *, is_teachers: bool) -> None:
        tokens = sum(s.supervised for s in sampled)
        self.sampled_tokens += tokens
        if is_teachers:
            self.counts.teacher_sequences += len(sampled)
            self.counts.teacher_tokens += tokens
        else:
            self.counts.student_sequences += len(sampled)
            self.counts.student_tokens += tokens

    def begin_step(self) -> None:
        """Mark the state that ``roll_back`` returns to."""
        self._served = None
        self._replay_before = list(self.replay.rollouts)

    def roll_back(self) -> None:
        """Revert the draws since ``begin_step``. Sampled batches are stored for the retry."""
        self.replay.rollouts.clear()
        self.replay.add(self._replay_before)
        if self._served is not None:
            step, batch = self._served
            self.waiting[step] = batch
            self._served = None

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the pool's state for a checkpoint, as JSON and as tensors."""
        state = {"counts": vars(self.counts), "waiting": {step: len(batch) for step, batch in self.waiting.items()}}
        tensors = pack(self.replay.rollouts, "replay") | pack(chain(*self.waiting.values()), "waiting")
        epochs = {}
        for source, table in self.responses.items():
            epochs[source.value] = table.epoch
            tensors |= pack(table.sampled.values(), f"responses.{source}")
            tensors |= pack_teacher_hidden(table.given_rollouts, f"given.{source}")
        return state | {"epochs": epochs}, tensors

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Restore what ``state_dict`` returned."""
        self.counts = SampleCounts(**state["counts"])
        self.replay.add(unpack(tensors, "replay"))
        remaining = iter(unpack(tensors, "waiting"))
        self.waiting = {int(step): [next(remaining) for _ in range(size)] for step, size in state["waiting"].items()}
        for source, table in self.responses.items():
            table.epoch = state["epochs"][source.value]
            table.sampled = {s.row: s for s in unpack(tensors, f"responses.{source}")}
            unpack_teacher_hidden(tensors, table.given_rollouts, f"given.{source}")


class ReplayBuffer:
    """Hold earlier rollouts, at most ``capacity``, and draw them uniformly. The oldest are removed first.

    A draw is a pure function of (seed, step) and the content.
    """

    def __init__(self, capacity: int, *, seed: int):
        self.seed = seed
        self.rollouts: deque[Rollout] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self.rollouts)

    def add(self, rollouts: Iterable[Rollout]) -> None:
        self.rollouts.extend(rollouts)

    def share_teacher_hidden(self, fresh: Iterable[Rollout]) -> None:
        """Give fresh rollouts the teacher's states of equal ones in the buffer, which has sampled some rows before."""
        known = {
            (s.row, s.response.tobytes()): s.teacher_hidden_ND for s in self.rollouts if s.teacher_hidden_ND is not None
        }
        for rollout in fresh if known else ():
            if rollout.teacher_hidden_ND is None:
                rollout.cache_teacher_hidden(known.get((rollout.row, rollout.response.tobytes())))

    def draw(self, count: int, step: int) -> list[Rollout]:
        """Return ``count`` rollouts, without repetition if the buffer has that many."""
        random = np.random.default_rng([self.seed, step, 0x5265706C])
        picks = random.choice(len(self), size=count, replace=len(self) < count)
        return [self.rollouts[i] for i in picks]


class RoundBuffer(ReplayBuffer):
    """Hold the rollouts of a round of ``batches`` batches, replayed batch by batch in a new order each time.

    The rollouts of the next round replace them.
    """

    def __init__(self, capacity: int, *, seed: int, batches: int):
        super().__init__(capacity, seed=seed)
        self.batches = batches

    def draw(self, count: int, step: int) -> list[Rollout]:
        """Return the batch of a step (from 0) of the run."""
        epoch, index = divmod(step, self.batches)
        order = np.random.default_rng([self.seed, epoch, 0x526F756E]).permutation(len(self))
        return [self.rollouts[i] for i in order[index * count : (index + 1) * count]]


def new_buffer(scheduler: Scheduler, step_rows: int) -> ReplayBuffer:
    """Return the empty replay buffer of a schedule. step_rows: sequences of a step."""
    capacity = scheduler.capacity(step_rows)
    if scheduler.in_rounds:
        return RoundBuffer(capacity, seed=scheduler.seed, batches=scheduler.batches)
    return ReplayBuffer(capacity, seed=scheduler.seed)


def freshness(rollouts: SequenceOf[Sequence], log_q_N: Tensor) -> Tensor:
    """Return for each token [N] the weight of its rollout, min(1, exp(mean(log q_now − log q_then))).

    log_q_N: log-probabilities of the rollouts' tokens under the student of this step, nats, in order. See
    ``schedule.freshness``.
    """
    weights = []
    for rollout, now_N in zip(rollouts, log_q_N.split([s.supervised for s in rollouts]), strict=True):
        assert isinstance(rollout, Rollout)
        assert rollout.student_log_probs_N is not None
        drift = (now_N - rollout.student_log_probs_N).mean()
        weights.append(drift.exp().clamp_max(1.0).expand(rollout.supervised))
    return torch.cat(weights)


class ResponseTable:
    """Hold a model's responses to the rows of the data set, one for each row. They are sampled when first needed.

    The teacher's are for sequence-level distillation (``schedule.kind`` teacher, pairs). The student's, sampled for a whole
    epoch at its beginning, are the other half of DistiLLM-2's pairs. A row's randomness is fixed by (seed, epoch, row), so
    a sample depends neither on the number drawn at once nor on where a run was stopped.

    sampler: gets the epoch as its step. rows: step → that step's rows. steps: number of steps of the run. bulk: number of
    steps whose rows are decoded together. redraw: sample again in every epoch. whole_epochs: sample all responses of an
    epoch at its first step. given: row → its existing responses; with ``redraw`` the epochs alternate between them. name:
    of the task, for the progress display.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        rows: Callable[[int], list[Sequence]],
        steps: int,
        steps_per_epoch: int,
        bulk: int = 1,
        redraw: bool = False,
        whole_epochs: bool = False,
        given: Mapping[int, SequenceOf[Rollout]] | None = None,
        name: str = "sampling",
        listener: Listener = silent,
    ):
        self.sampler = sampler
        self.rows = rows
        self.steps = steps
        self.steps_per_epoch = steps_per_epoch
        self.bulk = bulk
        self.redraw = redraw
        self.whole_epochs = whole_epochs
        self.given = given
        self.name = name
        self.emit = listener
        self.sampled: dict[int, Rollout] = {}
        self.epoch = 0

    @property
    def given_rollouts(self) -> list[Rollout]:
        """Return the responses that existed before the run, in an order that a resumed run reproduces."""
        return [] if self.given is None else list(chain(*self.given.values()))

    def sample(self, step: int) -> list[Rollout]:
        """Sample the missing responses of this step and of the next ones; return the new responses."""
        epoch = step // self.steps_per_epoch
        if self.redraw and epoch != self.epoch:
            self.sampled = {}
        self.epoch = epoch
        if self.given is not None or all(row.row in self.sampled for row in self.rows(step)):
            return []
        end = min(self.steps, (epoch + 1) * self.steps_per_epoch if self.redraw else self.steps)
        last = end if self.whole_epochs else min(step + self.bulk, end)
        missing = {s.row: s for t in range(step, last) for s in self.rows(t) if s.row not in self.sampled}
        rows = list(missing.values())
        batch_size = self.bulk * len(self.rows(step))
        fresh: list[Rollout] = []
        for start in range(0, len(rows), batch_size):
            if len(rows) > batch_size:
                self.emit(Progress(self.name, start, len(rows), "responses"))
            fresh += sample_together(self.sampler, rows[start : start + batch_size], epoch)
        self.sampled |= {s.row: s for s in fresh}
        if len(rows) > batch_size:
            self.emit(Progress(self.name, len(rows), len(rows), "responses"))
        return fresh

    def batch(self, step: int) -> list[Rollout]:
        """Return the responses to a step's rows, once ``sample`` was called for it."""
        if self.given is None:
            return [self.sampled[row.row] for row in self.rows(step)]
        index = self.epoch if self.redraw else 0
        return [self.given[row.row][index % len(self.given[row.row])] for row in self.rows(step)]


def pack(rollouts: Iterable[Rollout], prefix: str) -> dict[str, Tensor]:
    """Return rollouts with their log-probabilities and teacher states as flat tensors, for a checkpoint."""
    rollouts = list(rollouts)

    def flat(name: str) -> Tensor:
        if not rollouts:
            return torch.zeros(0, dtype=torch.int32)
        return torch.from_numpy(np.concatenate([getattr(s, name) for s in rollouts]).astype(np.int32))

    lengths = [(len(s.prompt), len(s.response), s.row) for s in rollouts]
    tensors = {
        f"{prefix}.lengths": torch.tensor(lengths, dtype=torch.int64).reshape(-1, 3),
        f"{prefix}.prompts": flat("prompt"),
        f"{prefix}.responses": flat("response"),
    }
    if any(s.sampled_at is not None for s in rollouts):
        steps = [_UNKNOWN if s.sampled_at is None else s.sampled_at for s in rollouts]
        tensors[f"{prefix}.sampled_at"] = torch.tensor(steps, dtype=torch.int64)
    seen = [s.teacher_prompt.ids for s in rollouts if s.teacher_prompt is not None]
    if seen:
        tensors[f"{prefix}.teacher_lengths"] = torch.tensor([len(ids) for ids in seen])
        tensors[f"{prefix}.teacher_prompts"] = torch.from_numpy(np.concatenate(seen).astype(np.int32))
    log_probs = [s.log_probs_NK for s in rollouts if s.log_probs_NK is not None]
    if log_probs:
        for column, log_probs_N in enumerate(torch.cat(log_probs).unbind(-1)):
            tensors[f"{prefix}.{_LOG_PROBS[column]}"] = log_probs_N.contiguous()
    return tensors | pack_teacher_hidden(rollouts, prefix)


def unpack(tensors: dict[str, Tensor], prefix: str) -> list[Rollout]:
    """Return the rollouts that were passed to ``pack``."""
    prompts = tensors[f"{prefix}.prompts"].numpy()
    responses = tensors[f"{prefix}.responses"].numpy()
    names = [f"{prefix}.{_LOG_PROBS[column]}" for column in sorted(_LOG_PROBS)]
    columns = [tensors[name] for name in names if name in tensors]
    log_probs_NK = torch.stack(columns, -1) if columns else None
    seen = []
    if f"{prefix}.teacher_prompts" in tensors:
        seen = list(tensors[f"{prefix}.teacher_prompts"].split(tensors[f"{prefix}.teacher_lengths"].tolist()))
    rollouts = []
    lengths = tensors[f"{prefix}.lengths"].tolist()
    steps = tensors.get(f"{prefix}.sampled_at", torch.full((len(lengths),), _UNKNOWN)).tolist()  # an older checkpoint
    p = r = 0
    for i, ((P, R, row), step) in enumerate(zip(lengths, steps, strict=True)):
        rollouts.append(
            Rollout(
                prompts[p : p + P].copy(),
                responses[r : r + R].copy(),
                row,
                teacher_prompt=TeacherPrompt(seen[i].numpy().copy()) if seen else None,
                log_probs_NK=None if log_probs_NK is None else log_probs_NK[r : r + R],
                sampled_at=None if step == _UNKNOWN else step,
            )
        )
        p += P
        r += R
    unpack_teacher_hidden(tensors, rollouts, prefix)
    return rollouts


def pack_teacher_hidden(rollouts: SequenceOf[Rollout], prefix: str) -> dict[str, Tensor]:
    """Return the cached teacher states of rollouts. Computed again in another batch, they would round differently."""
    cached = {i: s.teacher_hidden_ND for i, s in enumerate(rollouts) if s.teacher_hidden_ND is not None}
    if not cached:
        return {}
    states = torch.cat(list(cached.values()))
    return {f"{prefix}.cached": torch.tensor(list(cached)), f"{prefix}.teacher_hidden": states}


def unpack_teacher_hidden(tensors: dict[str, Tensor], rollouts: SequenceOf[Rollout], prefix: str) -> None:
    """Restore what ``pack_teacher_hidden`` returned, for the same rollouts in the same order."""
    if f"{prefix}.cached" not in tensors:
        return
    cached = [rollouts[i] for i in tensors[f"{prefix}.cached"].tolist()]
    parts = tensors[f"{prefix}.teacher_hidden"].split([s.supervised for s in cached])
    for rollout, part in zip(cached, parts, strict=True):
        rollout.cache_teacher_hidden(part.clone())
