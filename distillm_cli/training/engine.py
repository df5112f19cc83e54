"""The one training loop: draw, forward, backward, step, validate, save, say.

The engine is handed everything it uses (batches, models inside an objective, a schedule, a place for checkpoints) and
knows none of their insides. One step, ``_learn`` and ``_apply``, can be followed without leaving this file.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain

import torch
from torch import Tensor, nn

from distillm_cli.config.schema import TrainConfig
from distillm_cli.errors import Interrupted, NonFiniteError, OutOfMemoryError, out_of_memory
from distillm_cli.losses.criterion import CROSS_ENTROPY, SourceBatch
from distillm_cli.losses.student_loss import StudentLoss, joined
from distillm_cli.losses.terms import TokenWeights
from distillm_cli.rollouts.bulk import Bulk
from distillm_cli.rollouts.replay import ReplayBuffer, pack, unpack
from distillm_cli.rollouts.rollout import Rollouts
from distillm_cli.rollouts.samples import Samples
from distillm_cli.rollouts.scheduler import Scheduler, Source
from distillm_cli.teachers.teacher import Teacher
from distillm_cli.training.announce import half_time, opening
from distillm_cli.training.attempts import Before, InfiniteLoss, check_finite
from distillm_cli.training.checkpoint import Checkpoint, Checkpoints, random_states, restore_random_states
from distillm_cli.training.events import Listener, Note, RunEnded, Saved, Stepped, Validated, Warned, silent
from distillm_cli.training.held_out import HeldOut
from distillm_cli.training.optimizer import build_optimizer, learning_rate, load_optimizer_tensors, optimizer_tensors
from distillm_cli.training.progress import TrainerState
from distillm_cli.training.stopping import stop_on_signal
from distillm_cli.types import MIN_PASS_OVERHEAD, Batch, LengthGroups, Sequence, collate, micro_batches
from distillm_cli.utils.memory import release, retry_halved
from distillm_cli.utils.text import counted

LOWER_IS_BETTER = frozenset({"valid_loss", "valid_divergence", "error_rate"})


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; what was before after it, also on an exception."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


class Engine:
    """Trains the objective's student for ``steps`` optimizer steps.

    batches: step (from 0) → that step's data set rows; a pure function, so that a resume needs one integer.
    teacher: None for SFT. rollouts, bulk, fresh: where student outputs come from, how many batches at once, and whether a
    fresh one is trained on directly or goes through the buffer. samples: by source, responses that are kept by row: the
    teacher's, and the student's where those of a pair are not fresh at every step. validation: held-out sequences, batched.
    score: further held-out figures by name, computed at each validation (student in evaluation mode). as_at_start: a
    context in which the student has the weights it began with: the loss before training is then taken at the first
    validation, and nobody waits for it before the first step. checkpoints: None keeps nothing. recipe, inputs: what a resume
    must find unchanged, kept with them. dtype: of autocast; float32 switches it off.
    """

    def __init__(
        self,
        *,
        objective: StudentLoss,
        train: TrainConfig,
        steps: int,
        steps_per_epoch: int,
        batches: Callable[[int], list[Sequence]],
        scheduler: Scheduler,
        replay: ReplayBuffer,
        rollouts: Rollouts | None = None,
        bulk: int = 1,
        fresh: str = "direct",
        samples: Mapping[Source, Samples] | None = None,
        teacher: Teacher | None = None,
        validation: SequenceOf[list[Sequence]] = (),
        score: Callable[[], dict[str, float]] | None = None,
        as_at_start: Callable[[], AbstractContextManager[None]] | None = None,
        checkpoints: Checkpoints | None = None,
        recipe: dict | None = None,
        inputs: Callable[[], dict[str, str]] = dict,
        method: str = "",
        pass_overhead: int = MIN_PASS_OVERHEAD,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        listener: Listener = silent,
    ):
        self.objective, self.train, self.steps, self.steps_per_epoch = objective, train, steps, steps_per_epoch
        self.batches, self.scheduler, self.replay = batches, scheduler, replay
        self.bulk, self.fresh, self.samples, self.teacher = bulk, fresh, samples or {}, teacher
        self.score, self.checkpoints, self.recipe = score, checkpoints, recipe or {}
        self.as_at_start, self.pass_overhead, self.inputs = as_at_start, pass_overhead, inputs
        self.method, self.device, self.dtype, self.say = method, torch.device(device), dtype, listener
        self.ahead = Bulk(rollouts)
        self.at, self.saved_step, objective.say = TrainerState(), None, listener
        self.held_out = HeldOut(
            validation, objective.student, teacher, device=self.device, autocast=self._autocast, listener=listener
        )
        self.most_rows = train.batch_size  # of a micro-batch; fewer once memory has run out
        self.optimizer = build_optimizer(objective, train)

    def run(self) -> TrainerState:
        """Trains to the end, to an early stop, or to a signal; the last raises Interrupted after saving."""
        started, began_at = time.perf_counter(), self.at.seconds
        self.objective.train()
        self.say(opening(self))
        if self.at.valid_loss is None and self.as_at_start is None:
            self._validate()
        self._give_up_when_stale()  # of a run that had stopped early, what comes after the last step is all that is left
        with stop_on_signal() as stop:
            while self.at.step < self.steps and self.at.reason == "done":
                clock = time.perf_counter()
                source = self.scheduler.draw(self.at.step, len(self.replay))
                parts, loss, grad_norm = self._learn(source)
                lr = self._apply(loss)
                self._count(source, parts, loss, grad_norm, lr, time.perf_counter() - clock)
                if self._due(self.train.eval_steps):
                    self._validate()
                self.at.seconds = began_at + time.perf_counter() - started
                if (waits := half_time(self)) is not None:
                    self.say(Note(waits))
                self._give_up_when_stale()
                if self._due(self.train.save_steps) or stop.signal or self.at.reason != "done":
                    self._save()
                if stop.signal and self.at.step < self.steps:
                    self.say(RunEnded(self.at.step, "interrupted", self.at.seconds))
                    raise Interrupted(
                        f"stopped at step {self.at.step} of {self.steps}",
                        signal_number=stop.signal,
                        hint="the checkpoint is whole; go on with --resume" if self.checkpoints else None,
                    )
        self.say(RunEnded(self.at.step, self.at.reason, self.at.seconds))
        return self.at

    def _draw_parts(self, source: Source) -> list[SourceBatch]:
        """What the step trains on, source by source."""
        if source is Source.PAIR:
            own = self._samples_of(Source.ROLLOUT) if Source.ROLLOUT in self.samples else self._fresh_batch()
            return [SourceBatch(Source.TEACHER, self._samples_of(Source.TEACHER)), SourceBatch(Source.ROLLOUT, own)]
        parts = [SourceBatch(source, self._draw_sequences(source))]
        if source is not Source.DATASET and self.objective.criterion.rows_beside:
            parts.append(SourceBatch(Source.DATASET, self.batches(self.at.step)))
        return parts

    def _draw_sequences(self, source: Source) -> list[Sequence]:
        """The step's sequences of a source. Step s looks at data set batch s whatever that is, as prompts or not at all."""
        rows = self.batches(self.at.step)
        if source is Source.DATASET:
            return rows
        if source is Source.TEACHER:
            return self._samples_of(source)
        if source is Source.ROLLOUT:
            fresh = self._fresh_batch()
            self.replay.add(fresh)
            if self.fresh == "direct":
                return fresh
        return self.replay.draw(len(rows), self.at.step)

    def _samples_of(self, source: Source) -> list[Sequence]:
        """What this model answers to the step's rows. The teacher samples in its own dtype, the student in autocast's."""
        samples, is_teachers = self.samples[source], source is Source.TEACHER
        with eval_mode(self.objective), nullcontext() if is_teachers else self._autocast():
            drawn = samples.draw(self.at.step)
        self.at.count(drawn, by_teacher=is_teachers)
        return samples.batch(self.at.step)

    def _fresh_batch(self) -> list[Sequence]:
        """A batch of student outputs, drawn with those of the next steps that will ask for one (``bulk``)."""
        if not self.ahead.serves(self.at.step):
            adds = len(self.batches(self.at.step))
            steps = self.scheduler.rollout_steps(self.at.step, len(self.replay), adds=adds, count=self.bulk)
            due = {step: self.batches(step) for step in steps if step not in self.ahead.waiting}
            with eval_mode(self.objective), self._autocast():
                self.at.count(self.ahead.draw(due, self.at.step))
        return self.ahead.batch()

    def _learn(self, source: Source) -> tuple[list[SourceBatch], float, float]:
        """What the step trains on, its loss per token, and the norm of the gradient, which the parameters then have.

        Raises NonFiniteError or OutOfMemoryError after saving: all is then as if the step had not begun.
        """
        before = Before(self.objective.criterion, self.replay, self.ahead, self.teacher, self.device)
        where = f"at step {self.at.step + 1} ({source} batch); nothing was applied"
        try:
            parts = self._draw_parts(source)
            return parts, *self._gradients(parts, before)
        except NonFiniteError as error:
            cause, lr = error, learning_rate(self.train, self.at.step, self.steps)
            hint = error.hint if isinstance(error, InfiniteLoss) else f"lower --lr (now {lr:g}), or --dtype fp32"
            failed = NonFiniteError(f"{error.what} {where}", hint=hint)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            release(error)
            cause, is_saved = error, self.at.step and self.checkpoints
            hint = "go on with --resume where more is free" if is_saved else "lower --max-length"
            failed = OutOfMemoryError(f"out of memory {where}", hint=hint)
        self.optimizer.zero_grad(set_to_none=True)
        before.undo()
        if self.at.step:
            self._save()
        raise failed from cause

    def _gradients(self, parts: list[SourceBatch], before: Before) -> tuple[float, float]:
        """As ``_learn`` says, clipped. Where memory runs out, micro-batches are halved from then on."""
        largest = max(len(part.sequences) for part in parts)

        def halve() -> bool:
            rows = min(self.most_rows, largest)
            if rows == 1:
                return False
            self.optimizer.zero_grad(set_to_none=True)
            before.again()
            self.most_rows = rows // 2
            self.say(Warned(f"out of memory with {rows} rows at once: going on with {self.most_rows}, same batches"))
            return True

        total = retry_halved(lambda: self._backward(parts), halve)
        norm = nn.utils.get_total_norm([p.grad for p in self.objective.parameters() if p.grad is not None])
        loss, grad_norm = torch.stack((total, norm)).tolist()  # the one time a step waits for a device
        check_finite(loss, grad_norm)
        if self.train.clip and grad_norm > self.train.clip:
            nn.utils.clip_grads_with_norm_(self.objective.parameters(), self.train.clip, norm)
        return loss, grad_norm

    def _backward(self, parts: list[SourceBatch]) -> Tensor:
        """One attempt at the gradients, in micro-batches; the step's loss."""
        criterion = self.objective.criterion
        micro = [
            (part.source, cuts)
            for part in parts
            for cuts in micro_batches(part.sequences, self.most_rows, self.pass_overhead)
        ]
        own, told = self._look_ahead(micro)
        count = criterion.count([s for part in parts for s in part.sequences])
        loss = torch.zeros((), device=self.device)
        for (source, cuts), per_token, told_ND in zip(micro, own, told, strict=True):
            terms = criterion.terms(source, self._progress)
            batches = self._collated(cuts)
            if told_ND is None and terms.kd:
                told_ND = self._ask(batches, cuts)
            with self._autocast():
                part, _ = self.objective(batches, told_ND, terms, per_token, scale=1 / count)  # of the whole step
            part.backward()
            loss += part.detach()
        return loss

    def _apply(self, loss: float) -> float:
        """The optimizer's step, after one of this loss; its learning rate."""
        lr, progress = learning_rate(self.train, self.at.step, self.steps), self._progress
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.criterion.observe(loss, progress)
        return lr

    @property
    def _progress(self) -> float:
        """Of the run once the step in hand is done, 0 to 1."""
        return (self.at.step + 1) / self.steps

    def _collated(self, cuts: LengthGroups) -> list[Batch]:
        return [collate(sequences).to(self.device) for sequences in cuts]

    def _ask(self, batches: list[Batch], cuts: LengthGroups) -> Tensor:
        """The teacher's states for all of a micro-batch, pass by pass. Outside autocast, which to bfloat16 does not even put
        float16 states side by side."""
        return joined([self.teacher.hidden(batch, cut) for batch, cut in zip(batches, cuts, strict=True)])

    def _look_ahead(
        self, micro: list[tuple[Source, LengthGroups]]
    ) -> tuple[list[TokenWeights | None], list[Tensor | None]]:
        """Shows the criterion the whole step, where it wants to see it: what its tokens get of their own, and what the
        teacher, if it was asked, has said of them, so that it need not be asked again."""
        criterion = self.objective.criterion
        pieces = [SourceBatch(source, list(chain.from_iterable(cuts))) for source, cuts in micro]
        readings, told = [], [None] * len(micro)
        for i, (_, cuts) in enumerate(micro if criterion.looks_at else ()):
            batches = self._collated(cuts)
            if "teacher" in criterion.looks_at:
                told[i] = self._ask(batches, cuts)
            with self._autocast():
                readings.append(self.objective.read(batches, told[i]))
        own = criterion.look_ahead(pieces, readings, self._progress)
        return [None if per_token is None else per_token.to(self.device) for per_token in own], told

    def _count(self, source, parts, loss, grad_norm, lr, seconds) -> None:
        at = self.at
        tokens = sum(s.supervised for part in parts for s in part.sequences)
        at.step, at.tokens, at.train_loss = at.step + 1, at.tokens + tokens, loss
        at.sources[source.value] += 1
        epoch, figures = at.step / self.steps_per_epoch, self.objective.criterion.figures()
        self.say(
            Stepped(at.step, epoch, source.value, loss, lr, grad_norm, self.scheduler.phi, tokens, seconds, figures)
        )

    def _validate(self) -> None:
        """The student on the held-out rows; the first time, also as it was before training."""
        if not self.held_out.batches:
            return
        if self.at.first_valid_loss is None and self.at.step > 0:
            with self.as_at_start():
                self._measure(0)
        self._measure(self.at.step)

    def _measure(self, step: int) -> None:
        """Held-out cross-entropy, and a divergence or metric where one selects checkpoints; then φ may move."""
        at, select = self.at, self.train.select
        with eval_mode(self.objective), torch.no_grad():
            at.valid_loss = self.held_out.mean(CROSS_ENTROPY, self.objective)
            at.scores = self.score() if self.score else {}
            if select == "valid_divergence":
                terms = self.objective.criterion.held_out
                at.scores["valid_divergence"] = self.held_out.mean(terms, self.objective)
        if at.first_valid_loss is None:
            at.first_valid_loss = at.valid_loss
        rose = self.scheduler.observe(at.valid_loss)
        if rose or not at.phis:
            at.phis.append((step, self.scheduler.phi))
        value = None if select == "last" or step == 0 else ({"valid_loss": at.valid_loss} | at.scores)[select]
        tied = value is not None and value == at.best  # the later weights are kept, and patience counts on
        better = tied or (value is not None and self._is_better(value))
        trigger = self.scheduler.trigger
        self.say(Validated(step, at.valid_loss, self.scheduler.phi, rose, better, dict(at.scores), trigger))
        if better:
            at.best_step, at.stale = step, at.stale + 1 if tied else 0
            self._save()
        elif step > 0:
            at.stale += 1

    def _is_better(self, value: float) -> bool:
        sign = -1 if self.train.select in LOWER_IS_BETTER else 1
        if self.at.best is not None and sign * value <= sign * self.at.best:
            return False
        self.at.best = value
        return True

    def _give_up_when_stale(self) -> None:
        if self.train.patience is not None and self.at.stale >= self.train.patience and self.at.step < self.steps:
            self.at.reason = "early stop"
            self.say(Note(f"no better {self.train.select} in {counted(self.at.stale, 'validation')}: stopping early"))

    def _due(self, every: int | str) -> bool:
        every = self.steps_per_epoch if every == "epoch" else every
        return self.at.step % every == 0 or self.at.step == self.steps

    def _autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def _save(self) -> None:
        """Everything that shapes the next step, in one checkpoint."""
        if self.checkpoints is None or self.saved_step == self.at.step:
            return
        state = {"progress": dict(vars(self.at)), "scheduler": self.scheduler.state_dict(), "recipe": self.recipe}
        state |= {"inputs": self.inputs(), "criterion": self.objective.criterion.state_dict()}
        state |= self.ahead.state()
        tensors = optimizer_tensors(self.optimizer) | random_states(self.device)
        criterion, held = self.objective.criterion, list(self.replay.sequences)
        tensors |= pack(held, "replay") | criterion.pack(held, "replay") | self.ahead.pack(criterion)
        if self.teacher is not None:
            state |= self.teacher.state()
            tensors |= self.teacher.pack(self.replay.sequences, "replay")
        for source, samples in self.samples.items():
            tensors |= samples.pack(f"samples.{source}") | self.teacher.pack(samples.sequences, f"samples.{source}")
        path = self.checkpoints.write(self.at.step, state, tensors, protect=self.at.best_step)
        self.saved_step = self.at.step
        self.say(Saved(self.at.step, str(path)))

    def load(self, checkpoint: Checkpoint) -> None:
        """Goes back to where a checkpoint was written. The student's weights are loaded by whoever holds the model."""
        progress = checkpoint.state["progress"] | {"sources": Counter(checkpoint.state["progress"]["sources"])}
        progress["phis"] = [tuple(pair) for pair in progress["phis"]]
        self.at = TrainerState(**progress | {"reason": "done"})
        self.saved_step = self.at.step
        self.scheduler.load_state_dict(checkpoint.state["scheduler"])
        self.objective.criterion.load_state_dict(checkpoint.state.get("criterion", {}))
        load_optimizer_tensors(self.optimizer, checkpoint.tensors)
        self.replay.add(unpack(checkpoint.tensors, "replay"))
        self.objective.criterion.unpack(checkpoint.tensors, "replay", self.replay.sequences)
        if self.teacher is not None:
            self.teacher.load_state(checkpoint.state)
            self.teacher.unpack(checkpoint.tensors, "replay", self.replay.sequences)
        for source, samples in self.samples.items():
            samples.unpack(checkpoint.tensors, f"samples.{source}", self.at.step)
            self.teacher.unpack(checkpoint.tensors, f"samples.{source}", samples.sequences)
        self.ahead.unpack(checkpoint.state, checkpoint.tensors, self.objective.criterion, self.at.step)
        restore_random_states(checkpoint.tensors, self.device)
