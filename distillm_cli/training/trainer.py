"""Run the training loop. ``Trainer.train`` and ``Trainer.train_step`` read top to bottom, with no branch by method."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distillm_cli.config.schema import TrainConfig
from distillm_cli.errors import AlarmError, Interrupted, ServerError
from distillm_cli.losses.objectives import Objective, SourceBatch, TokenLogProbs
from distillm_cli.losses.student_loss import StudentLoss, concatenate
from distillm_cli.losses.weights import CROSS_ENTROPY, NO_WEIGHTS, LossWeights, TokenWeights
from distillm_cli.rollouts.pool import SequencePool, freshness
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.teachers.local import LocalTeacher
from distillm_cli.training.alarms import AlarmWatch, History
from distillm_cli.training.announce import phi_advice, resume_advice, run_started
from distillm_cli.training.checkpoint import Checkpoint, Checkpoints, all_random_states, restore_random_states
from distillm_cli.training.distributed import world
from distillm_cli.training.events import Alarmed, Listener, Note, RunEnded, Saved, Stepped, Validated, silent
from distillm_cli.training.health import StepHealth
from distillm_cli.training.optimizer import build_optimizer, learning_rate, load_optimizer_tensors, optimizer_tensors
from distillm_cli.training.recovery import MicroBatch, Recovery, check_finite
from distillm_cli.training.state import RunInfo, TrainerState
from distillm_cli.training.validation import Validator
from distillm_cli.types import Batch, collate
from distillm_cli.utils.distributed_tensors import full_tensor
from distillm_cli.utils.host_space import HostSpace
from distillm_cli.utils.modules import eval_mode
from distillm_cli.utils.signals import stop_on_signal
from distillm_cli.utils.text import counted


class Trainer:
    """Train a student for ``run.steps`` optimizer steps.

    student_loss: the student inside its objective. pool: source of sequences. teacher: None for SFT. validator:
    measures validation rows. checkpoints: None saves nothing. config: the recipe's ``train`` section. health: measures the
    steps; None: their speed alone.
    """

    def __init__(
        self,
        student_loss: StudentLoss,
        pool: SequencePool,
        teacher: LocalTeacher | None,
        *,
        validator: Validator,
        checkpoints: Checkpoints | None,
        config: TrainConfig,
        run: RunInfo,
        health: StepHealth | None = None,
        listener: Listener = silent,
    ):
        self.student_loss = student_loss
        self.pool = pool
        self.scheduler = pool.scheduler
        self.teacher = teacher
        self.validator = validator
        self.checkpoints = checkpoints
        self.config = config
        self.run = run
        self.health = health or StepHealth(student_loss, pool)
        self.alarms = AlarmWatch(History(run.steps, config.select != "last", run.cuts_outputs))
        self.dist = world()
        self.emit = listener
        self.state = TrainerState()
        self.saved_step: int | None = None
        self.optimizer = build_optimizer(student_loss, config, student_loss.extras.values())
        self.recovery = Recovery(
            student_loss,
            pool,
            teacher,
            self.optimizer,
            run,
            max_rows=config.batch_size,
            max_tokens=config.tokens_per_batch,
            save=self._save_before_failing,
            listener=listener,
        )
        student_loss.emit = listener
        if not self.dist.is_first:  # each process has its own dropout, the first one that of a single process
            torch.manual_seed(torch.initial_seed() + self.dist.rank)

    @property
    def objective(self) -> Objective:
        """Return the objective."""
        return self.student_loss.criterion

    def train(self, until: int | None = None) -> TrainerState:
        """Train to the end, to an early stop, or until a signal, which raises Interrupted after saving.

        until: pause after this step, without saving; another call continues.
        """
        last = self.run.steps if until is None else min(until, self.run.steps)
        started = time.perf_counter()
        seconds_before = self.state.seconds
        self.student_loss.train()
        self.emit(run_started(self))
        if self.state.valid_loss is None and self.validator.at_start is None:
            self.validate()
        self._stop_when_stale()  # for the resume of a run that stopped early
        with stop_on_signal() as stop:
            self._validate_if_due()  # for the resume of a run whose validation failed
            while self.state.step < last and self.state.reason == "done":
                self.train_step()
                self.state.validation_due = self._is_due(self.config.eval_steps)
                self._validate_if_due()
                self.state.seconds = seconds_before + time.perf_counter() - started
                if (advice := phi_advice(self)) is not None:
                    self.emit(Note(advice))
                self._stop_when_stale()
                found = self.dist.gather(lambda: (stop.signal or 0, self.alarms.take()))
                signal = max(number for number, _ in found)  # one process's stops all
                self._report_alarms(found[0][1])
                if self._is_due(self.config.save_steps) or signal or self.state.reason != "done":
                    self.save()
                if signal and self.state.step < self.run.steps:
                    self._raise_interrupted(signal)
        self.emit(RunEnded(self.state.step, self.state.reason, self.state.seconds))
        return self.state

    def train_step(self) -> None:
        """Run one optimizer step: draw sequences, teacher states, forward, backward, clip, update."""
        started = time.perf_counter()
        step = self.state.step
        progress = (step + 1) / self.run.steps
        lr = learning_rate(self.config, step, self.run.steps)
        source = self.scheduler.draw(step, len(self.pool))
        for attempt in self.recovery.attempts(step, source, lr):  # one, unless memory runs out
            with attempt:
                drawn = self.pool.draw(source, step)
                sequences = [s for batch in drawn for s in batch.sequences]
                micro_batches = attempt.split(drawn)
                self.health.begin_attempt(step + 1, micro_batches)
                token_weights = self._begin_step(micro_batches, progress)
                drawn_by_extras = self.student_loss.begin_step([micro.rows for micro in micro_batches], step)
                count = self.objective.count(sequences)
                total = torch.zeros((), device=self.run.device)
                for micro, per_token, extra in zip(micro_batches, token_weights, drawn_by_extras, strict=True):
                    if not micro.is_own:
                        continue
                    weights = self.objective.weights(micro.source, progress)
                    batches = self._collate(micro)
                    hidden_ND = micro.teacher_hidden_ND
                    if weights.kd and hidden_ND is None and self.student_loss.teacher_pass is None:
                        hidden_ND = self._teacher_hidden(micro, batches)
                    self.health.observe(micro)
                    total += self._forward_backward(
                        batches, hidden_ND, weights, per_token, 1 / count, micro.source, extra
                    )
                self._make_idle_passes(micro_batches)
                if self.teacher is not None:
                    self.teacher.exchange(sequences, self.run.device)
                loss, grad_norm = self._clip(total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.student_loss.end_step()
        self.objective.observe(loss, progress)
        self.scheduler.record(source, loss, self.pool.repeats())

        tokens = sum(s.supervised for s in sequences)
        seconds = time.perf_counter() - started
        self.state.add_step(source, loss, tokens, seconds)
        self._report_figures(
            Stepped(
                step=step + 1,
                epoch=(step + 1) / self.run.steps_per_epoch,
                source=source.value,
                loss=loss,
                lr=lr,
                grad_norm=grad_norm,
                phi=self.scheduler.phi,
                tokens=tokens,
                seconds=seconds,
                figures=self.student_loss.figures(),
                health=self.health.figures(drawn, seconds),
            )
        )

    def _collate(self, micro: MicroBatch) -> list[Batch]:
        return [collate(group).to(self.run.device) for group in micro.groups]

    def _teacher_hidden(self, micro: MicroBatch, batches: list[Batch]) -> Tensor:
        """Return the teacher's hidden states of a micro-batch, outside autocast, which would promote float16 states."""
        assert self.teacher is not None
        return concatenate(
            [self.teacher.hidden(batch, group) for batch, group in zip(batches, micro.groups, strict=True)]
        )

    def _begin_step(self, micro_batches: list[MicroBatch], progress: float) -> list[TokenWeights | None]:
        """Pass the whole step to the objective; return the weights of its tokens, by micro-batch.

        Log-probabilities are computed first if the objective needs them; the teacher's states are reused in the step.
        """
        source_batches = [SourceBatch(micro.source, list(chain.from_iterable(micro.groups))) for micro in micro_batches]
        log_probs = []
        if self.objective.needs_log_probs_of:
            idle = self._idle_passes(micro_batches)
            log_probs = self.dist.map(
                partial(self._log_probs, idle=idle),
                micro_batches,
                [micro.cost for micro in micro_batches],
                always=self.student_loss.sharding.is_on,
            )
        per_token = self.objective.begin_step(source_batches, log_probs, progress)
        if self.scheduler.config.weights_replay:
            for i, micro in enumerate(micro_batches):
                if micro.is_own and micro.source is Source.REPLAY:
                    per_token[i] = self._with_freshness(per_token[i], micro)
        return [None if weights is None else weights.to(self.run.device) for weights in per_token]

    def _log_probs(self, micro_batches: list[MicroBatch], idle: list[Batch]) -> list[TokenLogProbs]:
        """Return the log-probabilities that the objective needs, for these micro-batches. idle: see ``_idle_passes``."""
        with self.student_loss.sharding.passes():
            return self._log_probs_of_share(micro_batches, idle)

    def _log_probs_of_share(self, micro_batches: list[MicroBatch], idle: list[Batch]) -> list[TokenLogProbs]:
        models = self.objective.needs_log_probs_of
        log_probs = []
        for micro in micro_batches:
            batches = self._collate(micro)
            if "teacher" in models:
                micro.teacher_hidden_ND = self._teacher_hidden(micro, batches)
            with self.run.autocast():
                found = self.student_loss.log_probs(batches, micro.teacher_hidden_ND, models)
            log_probs.append(found if self.dist.size == 1 else found.cpu())  # for the other processes
        for batch in idle if "student" in models else ():
            with self.run.autocast():
                self.student_loss.log_probs([batch], None, ("student",))
        return log_probs

    def _idle_passes(self, micro_batches: list[MicroBatch]) -> list[Batch]:
        """Return a batch for each pass of a sharded student that other processes make and this one has no work for."""
        if not self.student_loss.sharding.is_on:
            return []
        shortest = min((s for micro in micro_batches for group in micro.groups for s in group), key=len)
        return [collate([shortest]).to(self.run.device)] * self.dist.idle_turns(len(micro_batches))

    def _make_idle_passes(self, micro_batches: list[MicroBatch]) -> None:
        """Make the training passes of ``_idle_passes``, whose gradients are 0."""
        for batch in self._idle_passes(micro_batches):
            self._forward_backward([batch], None, CROSS_ENTROPY, None, 0.0, Source.DATASET, {})

    def _with_freshness(self, weights: TokenWeights | None, micro: MicroBatch) -> TokenWeights:
        """Return the weights of a micro-batch of replayed outputs, with those of ``schedule.freshness``."""
        with eval_mode(self.student_loss), self.run.autocast():
            now = self.student_loss.log_probs(self._collate(micro), None, ("student",))
        assert now.log_q_N is not None
        weights = weights or NO_WEIGHTS
        fresh_N = freshness([s for group in micro.groups for s in group], now.log_q_N.cpu())
        return replace(weights, weights_N=fresh_N if weights.weights_N is None else weights.weights_N * fresh_N)

    def _forward_backward(
        self,
        batches: list[Batch],
        teacher_hidden_ND: Tensor | None,
        weights: LossWeights,
        per_token: TokenWeights | None,
        scale: float,
        source: Source,
        drawn_by_extras: Mapping[str, Any],
    ) -> Tensor:
        """Add a micro-batch's gradients; return its share of the step's loss. The graph is freed on return."""
        if self.teacher is not None and self.student_loss.teacher_pass is not None:  # it computes in the next line
            self.teacher.tokens += sum(batch.tokens for batch in batches)
        with self.run.autocast():
            loss, _ = self.student_loss(batches, teacher_hidden_ND, weights, per_token, scale, source, drawn_by_extras)
        loss.backward()
        return loss.detach()

    def _clip(self, total: Tensor) -> tuple[float, float]:
        """Sum gradients and loss over all processes, and clip; return the loss and the norm of the student's gradient.

        The norm is that before clipping. Raises NonFiniteError.

        The norm of the teacher's side, if it is trained, is another one, so that neither side limits the other.
        """
        parts = self.student_loss.trained_parts()
        is_summed = self.student_loss.sharding.is_on  # gradients of shards, in the backward pass
        self.dist.sum_gradients(() if is_summed else chain.from_iterable(parts), total)
        norms = [full_tensor(nn.utils.get_total_norm([p.grad for p in part if p.grad is not None])) for part in parts]
        loss, *sizes = torch.stack((total, *norms)).tolist()  # the only synchronization with the device in a step
        for size in sizes:
            check_finite(loss, size)
        for part, norm, size in zip(parts, norms, sizes, strict=True):
            if self.config.clip and size > self.config.clip:
                nn.utils.clip_grads_with_norm_(part, self.config.clip, norm)
        return loss, sizes[0]

    def _validate_if_due(self) -> None:
        """Validate after a step that asks for it. If a server fails, the step is saved before the error is raised."""
        if not self.state.validation_due:
            return
        try:
            self.validate()
        except ServerError as error:
            raise self.recovery.saved(error, f"in the validation after step {self.state.step}") from error
        self.state.validation_due = False

    def validate(self) -> None:
        """Measure the student on the validation rows; the first time, also with its weights from before training."""
        if not self.validator.batches:
            return
        at_start = self.validator.at_start
        if at_start is not None and self.state.first_valid_loss is None and self.state.step > 0:
            with at_start():
                self._measure(0)
        self._measure(self.state.step)

    def _measure(self, step: int) -> None:
        """Record the figures of a validation: φ may rise, and the best weights so far are saved."""
        state = self.state
        state.valid_loss, state.scores = self.validator.measure(self.student_loss, step)
        if step == state.step:
            state.validation_due = False
        if state.first_valid_loss is None:
            state.first_valid_loss = state.valid_loss
        previous_phi = self.scheduler.phi
        self.scheduler.observe(state.valid_loss, state.scores)
        phi = self.scheduler.phi
        if phi != previous_phi or not state.phis:
            state.phis.append((step, phi))
        value = None
        if self.config.select != "last" and step > 0:
            value = {**state.scores, "valid_loss": state.valid_loss}[self.config.select]
        is_tie = (
            value is not None and value == state.best
        )  # the later weights become the best ones, and stale still rises
        is_better = value is not None and not is_tie and self.validator.is_better(value, state.best)
        if is_better:
            state.best = value
        scores = dict(state.scores)
        rose = phi > previous_phi
        trigger = self.scheduler.trigger
        self._report_figures(Validated(step, state.valid_loss, phi, rose, is_better or is_tie, scores, trigger))
        if is_better or is_tie:
            state.best_step = step
            state.stale = state.stale + 1 if is_tie else 0
            self.save()
        elif step > 0:
            state.stale += 1

    def _stop_when_stale(self) -> None:
        state = self.state
        if self.config.patience is not None and state.stale >= self.config.patience and state.step < self.run.steps:
            state.reason = "early stop"
            validations = counted(state.stale, "validation")
            self.emit(Note(f"no improvement of {self.config.select} in {validations}: stopping early"))

    def _is_due(self, every: int | Literal["epoch"]) -> bool:
        steps = every if isinstance(every, int) else self.run.steps_per_epoch
        return self.state.step % steps == 0 or self.state.step == self.run.steps

    def _report_figures(self, event: Stepped | Validated) -> None:
        self.emit(event)
        self.alarms.observe(event)

    def _report_alarms(self, alarms: list[Alarmed]) -> None:
        """Report the alarms of a step. A checkpoint of the first one is kept. Raises AlarmError if they stop the run."""
        for alarm in alarms:
            self.emit(alarm)
        if not alarms:
            return
        if self.state.alarm_step is None:
            self.state.alarm_step = self.state.step
            self.save()
        if self.config.on_alarm == "stop" and self.state.step < self.run.steps:
            self.save()
            self.emit(RunEnded(self.state.step, "stopped by an alarm", self.state.seconds))
            raise AlarmError(
                "alarm.stopped",
                f"the alarm {alarms[0].name} stopped the run at step {self.state.step} of {self.run.steps}",
                where=alarms[0].message,
                hint=f"{alarms[0].cure}; or continue with --resume --on-alarm warn",
            )

    def _raise_interrupted(self, signal_number: int) -> None:
        self.emit(RunEnded(self.state.step, "interrupted", self.state.seconds))
        raise Interrupted(
            f"stopped at step {self.state.step} of {self.run.steps}",
            signal_number=signal_number,
            hint="continue with --resume" if self.checkpoints else None,
        )

    def _save_before_failing(self) -> bool:
        """Save the state before a step that failed; return whether a checkpoint has it."""
        if self.state.step:
            self.save()
        return bool(self.state.step and self.checkpoints)

    def save(self) -> None:
        """Save everything that the next step depends on in one checkpoint."""
        if self.checkpoints is None or self.saved_step == self.state.step:
            return
        pool, pool_tensors = self.pool.state_dict()
        state = {
            "progress": dict(vars(self.state)),
            "scheduler": self.scheduler.state_dict(),
            "objective": self.objective.state_dict(),
            "alarms": self.alarms.state_dict(),
            "pool": pool,
            **({} if self.teacher is None else self.teacher.state_dict()),
            **({} if self.dist.size == 1 else {"processes": self.dist.size}),
            **self.run.identity(),
        }
        place = self.checkpoints.root
        tensors = (
            optimizer_tensors(self.optimizer, HostSpace(place)) | all_random_states(self.run.device) | pool_tensors
        )
        tensors |= self.student_loss.extra_tensors()
        write = partial(self.checkpoints.write, self.state.step, state, tensors, protect=self._protected())
        with self.student_loss.sharding.whole(to_save=HostSpace(place)):
            path = self.dist.broadcast(write)
        self.saved_step = self.state.step
        self.emit(Saved(self.state.step, str(path)))

    def _protected(self) -> dict[int, bool]:
        """Return the steps whose checkpoints are kept, and whether to keep them whole, and not their weights alone."""
        best, alarm = self.state.best_step, self.state.alarm_step
        return ({} if best is None else {best: False}) | ({} if alarm is None else {alarm: True})

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore the state of a checkpoint. The caller loads the student's weights."""
        state, tensors = checkpoint.state, checkpoint.tensors
        self.state = TrainerState.from_json(state["progress"])
        self.saved_step = self.state.step
        self.scheduler.load_state_dict(state["scheduler"])
        self.objective.load_state_dict(state["objective"])
        if "alarms" in state:  # not in an older checkpoint
            self.alarms.load_state_dict(state["alarms"])
        self.pool.load_state_dict(state["pool"], tensors)
        self.student_loss.load_extra_tensors(tensors)
        self.student_loss.load_extra_weights(checkpoint.path)
        if self.teacher is not None:
            self.teacher.load_state_dict(state)
        load_optimizer_tensors(self.optimizer, tensors)
        restore_random_states(tensors, self.run.device, self.dist.rank)
        if (note := resume_advice(state.get("processes", 1), self.dist.size)) is not None:
            self.emit(Note(note))
