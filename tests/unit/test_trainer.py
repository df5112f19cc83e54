"""Test training: one step against plain PyTorch, and resumed runs against uninterrupted ones."""

import copy
import json
import math
import os
import signal
from collections import Counter
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from distillm_cli.config import schema
from distillm_cli.errors import Interrupted, OutOfMemoryError
from distillm_cli.losses import objectives
from distillm_cli.losses.objectives import SourceBatch
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.losses.weights import CROSS_ENTROPY
from distillm_cli.models.backbone import Backbone
from distillm_cli.rollouts.pool import SequencePool
from distillm_cli.rollouts.sampler import ModelSampler
from distillm_cli.rollouts.scheduler import Source, build_scheduler
from distillm_cli.teachers.cached import BatchComposition, CachedTeacher, HiddenStateTable
from distillm_cli.teachers.local import LocalTeacher
from distillm_cli.training.announce import phi_advice
from distillm_cli.training.checkpoint import Checkpoints, read_checkpoint
from distillm_cli.training.events import Note, Saved, Stepped, Validated, Warned
from distillm_cli.training.metrics_log import MetricsLog
from distillm_cli.training.state import RunInfo, TrainerState
from distillm_cli.training.trainer import Trainer
from distillm_cli.training.validation import Validator
from distillm_cli.utils.memory import retry_halved
from distillm_cli.utils.modules import eval_mode
from tests import tiny
from tests.codes import raises_code
from tests.marks import long
from tests.resource_limits import LimitedBatch, file_size

TOKENIZER = tiny.tokenizer()
ROWS = tiny.sequences([(3 + i % 5, 2 + i % 4) for i in range(24)], vocab=len(TOKENIZER), seed=2)
HELD_OUT = [tiny.sequences([(4, 3), (5, 4), (3, 2)], vocab=len(TOKENIZER), seed=9)]


def student(family="gpt2", **fields):
    return Backbone(tiny.model(family, len(TOKENIZER), seed=1, spread=1.0, **fields), TOKENIZER)


def build(
    tmp_path=None,
    *,
    method="adaptive",
    listener=lambda event: None,
    steps=12,
    backbone=None,
    cached=False,
    objective=None,
    device="cpu",
    schedule=None,
    sampler=None,
    responses=None,
    rounds_of=1,
    **train,
):
    """Build a small run with GPT-2's dropout of 0.1, so that the random state matters.

    cached: cache the teacher's states. schedule: fields of its section. sampler: (student, teacher model) → sampler.
    responses: (student, teacher model, rows, steps per epoch) → tables. rounds_of: batches in a round. device: the device
    of ``backbone``.
    """
    train = schema.TrainConfig(
        **{"batch_size": 4, "lr": 1e-3, "warmup": 0, "eval_steps": 3, "save_steps": 1000, "seed": 5} | train
    )
    step_rows = train.batch_size * train.accumulate
    sft = method == "sft"
    fields = {"kind": "off" if sft else method}
    if method in ("on", "mixed", "annealed", "adaptive"):
        fields["capacity"] = 8
    if method == "adaptive":  # With epsilon −10, φ rises at every validation, so a short run has rollouts and replay.
        fields |= {"epsilon": -10.0, "levels": 3}
    section = schema.ScheduleConfig(**fields | (schedule or {}))
    scheduler = build_scheduler(section, steps=steps, seed=train.seed, batches=rounds_of)
    backbone = backbone or student()

    def indices(step):
        return [(step * step_rows + i * 7) % len(ROWS) for i in range(step_rows)]

    def rows(step):
        return [ROWS[i] for i in indices(step)]

    model = None if sft else Backbone(tiny.model("llama", len(TOKENIZER), seed=4), TOKENIZER).to(device)
    teacher = None if sft else LocalTeacher(model)
    if cached:
        teacher = CachedTeacher(
            model,
            mode="memory",
            rows=HiddenStateTable(ROWS),
            composition=BatchComposition(indices, steps=len(ROWS) // step_rows, rows=ROWS, max_rows=train.batch_size),
            caches_rollouts=True,
            releases_model=not (section.uses_student_outputs or section.uses_teacher_samples),
            validation=HiddenStateTable(HELD_OUT[0]) if train.select == "valid_divergence" else None,
        )
    student_loss = StudentLoss(
        backbone,
        objectives.build(None if sft else objective or schema.ObjectiveConfig(), steps / (len(ROWS) // step_rows)),
        teacher_head=None if sft else teacher.head,
    )
    checkpoints = None
    if tmp_path is not None:
        checkpoints = Checkpoints(tmp_path, backbone.model.save_pretrained, keep=train.keep)
    run = RunInfo(steps=steps, steps_per_epoch=len(ROWS) // step_rows, device=torch.device(device))
    if sampler is None:
        student_sampler = ModelSampler(backbone, schema.RolloutConfig(max_new_tokens=5), max_length=16, seed=train.seed)
    else:
        student_sampler = sampler(backbone, model)
    pool = SequencePool(
        rows,
        scheduler,
        student=student_sampler,
        responses=responses(backbone, model, rows, run.steps_per_epoch) if responses else None,
        bulk=2,
        rows_beside=student_loss.criterion.rows_beside,
        sampling=lambda: eval_mode(student_loss),
    )
    return Trainer(
        student_loss,
        pool,
        teacher,
        validator=Validator(HELD_OUT, run, select=train.select, teacher=teacher, listener=listener),
        checkpoints=checkpoints,
        config=train,
        run=run,
        listener=listener,
    )


def weights(engine):
    return {name: p.detach().clone() for name, p in engine.student_loss.named_parameters()}


def step_on(trainer, batches):
    """Run one optimizer step on these sequences and return its loss and learning rate."""
    trainer.pool.draw = lambda source, step: batches
    trainer.train_step()
    return trainer.state.train_loss, trainer.optimizer.param_groups[0]["lr"]


def cached_rollouts(trainer):
    """Return the rollouts in the pool that have cached teacher states."""
    pool_rollouts = [*trainer.pool.replay.rollouts, *(s for batch in trainer.pool.waiting.values() for s in batch)]
    return {s for s in pool_rollouts if s.teacher_hidden_ND is not None}


def resume(tmp_path, method, **settings):
    found = Checkpoints(tmp_path, lambda path: None, keep=1).latest()
    loaded = type(student().model).from_pretrained(found.path, dtype=torch.float32)
    backbone = student()
    backbone.model.load_state_dict(loaded.state_dict())
    engine = build(tmp_path, method=method, backbone=backbone, **settings)
    torch.manual_seed(999)  # the random state must come from the checkpoint
    engine.load(found)
    return engine


@pytest.mark.parametrize("is_resumed", [False, True])
def test_paused_run_matches_an_uninterrupted_one(tmp_path, is_resumed):
    """Pause in the middle of a bulk of rollouts; continue in memory, or from a checkpoint in another trainer."""
    torch.manual_seed(5)
    whole = build()
    whole.train()
    torch.manual_seed(5)
    paused = build(tmp_path)
    paused.train(until=7)
    assert paused.state.step == 7
    if is_resumed:
        paused.save()
        paused = resume(tmp_path, "adaptive")
    paused.train(until=100)
    assert paused.state.step == whole.state.step == 12
    assert (paused.state.phis, paused.state.sources) == (whole.state.phis, whole.state.sources)
    assert_close(weights(paused), weights(whole), rtol=0, atol=0)


def test_deferred_initial_validation_gives_the_same_results(tmp_path):
    """Check that validating the initial student at the first validation changes neither φ nor weights nor losses."""

    def run(is_deferred):
        torch.manual_seed(5)
        events = []
        engine = build(method="adaptive", listener=events.append)
        start = {name: tensor.clone() for name, tensor in engine.student_loss.state_dict().items()}

        @contextmanager
        def as_at_start():
            current = {name: tensor.clone() for name, tensor in engine.student_loss.state_dict().items()}
            engine.student_loss.load_state_dict(start)
            yield
            engine.student_loss.load_state_dict(current)

        if is_deferred:
            engine.validator.at_start = as_at_start
        return engine, engine.train(), [event for event in events if isinstance(event, Stepped | Validated)]

    first, first_state, first_events = run(is_deferred=False)
    deferred, deferred_state, deferred_events = run(is_deferred=True)
    assert (first_state.first_valid_loss, first_state.valid_loss) == (
        deferred_state.first_valid_loss,
        deferred_state.valid_loss,
    )
    assert (first_state.phis, first_state.sources) == (deferred_state.phis, deferred_state.sources)
    assert_close(weights(first), weights(deferred), rtol=0, atol=0)
    assert [event.step for event in first_events if isinstance(event, Validated)][:2] == [0, 3]
    assert [event.step for event in deferred_events if isinstance(event, Validated)][:2] == [0, 3]
    assert isinstance(first_events[0], Validated)
    assert isinstance(deferred_events[0], Stepped)


@pytest.mark.parametrize("accumulate", [long(1), 2])
@pytest.mark.parametrize("method", ["sft", "off", "adaptive", "mixed", "annealed"])
def test_resume_matches_uninterrupted_run(tmp_path, method, accumulate):
    """Check that a run stopped by a signal within an epoch, resumed in a new trainer, has bit-identical weights."""
    torch.manual_seed(5)
    uninterrupted = build(method=method, accumulate=accumulate)
    result = uninterrupted.train()

    torch.manual_seed(5)
    stopped = build(tmp_path, method=method, accumulate=accumulate, listener=_kill_at(5))
    with pytest.raises(Interrupted) as stop:
        stopped.train()
    assert stop.value.exit_code == 128 + signal.SIGINT
    assert stopped.state.step == 5

    resumed = resume(tmp_path, method, accumulate=accumulate)
    resumed_result = resumed.train()
    for name, value in weights(uninterrupted).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert resumed_result.sources == result.sources
    assert resumed_result.valid_loss == result.valid_loss
    if method == "adaptive":
        assert result.sources["rollout"] > 0
        assert result.sources["replay"] > 0


def test_resume_restores_seconds_by_source(tmp_path):
    stopped = build(tmp_path, method="mixed", listener=_kill_at(5))
    with pytest.raises(Interrupted):
        stopped.train()
    saved = stopped.state.source_seconds
    assert saved.keys() == stopped.state.sources.keys()
    assert 0 < sum(saved.values()) < stopped.state.seconds
    resumed = resume(tmp_path, "mixed")
    assert resumed.state.source_seconds == saved
    result = resumed.train()
    assert result.source_seconds.keys() == result.sources.keys() == {"dataset", "rollout"}
    assert sum(saved.values()) < sum(result.source_seconds.values()) < result.seconds


def test_seconds_by_source_of_an_older_checkpoint_are_shared_by_steps():
    state = TrainerState.from_json({"step": 10, "seconds": 5.0, "sources": {"dataset": 8, "rollout": 2}})
    assert state.source_seconds == {"dataset": 4.0, "rollout": 1.0}


@pytest.mark.parametrize(
    ("method", "fresh", "select"),
    [
        ("adaptive", "direct", "last"),
        ("adaptive", "buffer", "last"),
        ("off", "direct", "last"),
        ("off", "direct", "valid_divergence"),
    ],
)
def test_resume_with_cached_teacher_states_is_bit_exact(tmp_path, method, fresh, select):
    """Check a stop after the first epoch, with half of the buffer scored.

    The states of rows are computed again, those of rollouts come from the checkpoint.
    """
    settings = {"method": method, "cached": True, "steps": 24, "batch_size": 3, "accumulate": 2, "select": select}
    if method == "adaptive":
        settings["schedule"] = {"fresh": fresh}
    torch.manual_seed(5)
    uninterrupted = build(**settings)
    stopped = build(tmp_path, listener=_kill_at(11), **settings)
    uninterrupted.train()
    torch.manual_seed(5)
    with pytest.raises(Interrupted):
        stopped.train()

    resumed = resume(tmp_path, **settings)
    restored_rollouts = cached_rollouts(resumed)
    resumed.train()
    for name, value in weights(uninterrupted).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert resumed.state.valid_loss == uninterrupted.state.valid_loss
    assert resumed.state.scores == uninterrupted.state.scores
    assert uninterrupted.teacher.has_released_model == resumed.teacher.has_released_model == (method == "off")
    if method == "adaptive":
        assert 0 < len(restored_rollouts) <= 8
        assert uninterrupted.state.sources["replay"] > 2


def test_cached_teacher_states_match_live_ones():
    live, caching = (
        build(method="adaptive", steps=24, cached=cached, backbone=student("llama")) for cached in (False, True)
    )
    live.train(), caching.train()
    for name, value in weights(live).items():
        assert_close(weights(caching)[name], value, rtol=1e-3, atol=1e-5)
    assert caching.state.sources == live.state.sources
    assert caching.state.sources["replay"] > 0
    assert caching.teacher.tokens < 0.7 * live.teacher.tokens


def test_first_epoch_with_cached_states_is_bit_exact():
    live, caching = (build(method="off", steps=6, cached=cached) for cached in (False, True))
    for engine in (live, caching):
        torch.manual_seed(5)
        engine.train()
    assert all(torch.equal(weights(live)[name], value) for name, value in weights(caching).items())


def _kill_at(step):
    def listener(event):
        if isinstance(event, Stepped) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return listener


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (4, 2), (2, 4), (3, 3)])
def test_accumulation_gives_the_gradient_of_the_whole_batch(batch_size, accumulate):
    """Check that the loss is divided once by the step's tokens, so ragged micro-batches weigh by their tokens."""
    rows = ROWS[:8]
    engine = build(method="off", steps=1, batch_size=batch_size, clip=0.0, lr=1.0, backbone=student("llama").double())
    engine.teacher.model.double()
    parameters = list(engine.student_loss.parameters())
    engine.optimizer = torch.optim.SGD([{"params": parameters, "lr_ratio": 1.0}], lr=1.0)
    before = weights(engine)
    engine.student_loss.train()
    step_on(engine, [SourceBatch(Source.DATASET, rows)])
    updates = {name: before[name] - value for name, value in weights(engine).items()}

    reference = build(method="off", steps=1, backbone=student("llama").double())
    reference.teacher.model.double()
    log_p, log_q, tokens = [], [], 0
    for s in rows:
        batch = tiny.collate([s])
        log_p.append(own_logits(reference.teacher.model, batch).detach().log_softmax(-1))
        log_q.append(own_logits(reference.student_loss.student, batch).log_softmax(-1))
        tokens += len(s.response)
    p, q = torch.cat(log_p).exp(), torch.cat(log_q).exp()
    loss = (p * (p / (0.1 * p + 0.9 * q)).log()).sum() / tokens
    loss.backward()
    for name, parameter in reference.student_loss.named_parameters():
        assert_close(updates[name], parameter.grad, rtol=1e-6, atol=1e-9)


def own_logits(backbone, batch):
    return backbone.model(batch.ids_BT).logits.flatten(0, 1)[batch.positions_N]


def test_gradient_checkpointing_does_not_change_results():
    plain, checkpointing = (build(method="adaptive", steps=6, backbone=student("llama")) for _ in range(2))
    checkpointing.student_loss.student.model.gradient_checkpointing_enable()
    plain.train(), checkpointing.train()
    for name, value in weights(plain).items():
        assert_close(weights(checkpointing)[name], value, rtol=1e-4, atol=1e-6)


def test_bulk_rollouts_are_each_used_once():
    events = []
    single, bulk = build(method="on", steps=10), build(method="on", steps=10, listener=events.append)
    single.pool.bulk = 1
    bulk.pool.bulk = 4
    assert [t.train() and t.pool.counts.student_sequences for t in (single, bulk)] == [40, 40]
    assert Counter(e.source for e in events if isinstance(e, Stepped)) == {"rollout": 10}
    assert not bulk.pool.waiting


@pytest.mark.parametrize("kind", ["mixed", "annealed", "adaptive"])
def test_bulk_rollouts_use_the_rows_of_their_steps(kind):
    """Check that sampling ahead between data set steps neither repeats nor skips rows."""

    fixed = {"phi": 0.5, "epsilon": 100.0, "capacity": 8} if kind == "adaptive" else {}

    def trained_on(bulk):
        engine, seen = build(method=kind, steps=24, schedule=fixed), []
        engine.pool.bulk = bulk
        draw = engine.pool.draw

        def recording_draw(source, step):
            batches = draw(source, step)
            if source is not Source.REPLAY:
                seen.append((step, source.value, [s.row for s in batches[0].sequences]))
            return batches

        engine.pool.draw = recording_draw
        engine.train()
        return seen, engine.pool.counts.student_sequences

    (single, single_count), (bulk, bulk_count) = trained_on(1), trained_on(8)
    assert bulk == single
    assert {source for _, source, _ in bulk} == {"dataset", "rollout"}
    assert [rows for step, _, rows in bulk] == [
        [row.row for row in build(steps=24).pool.rows(step)] for step, _, _ in bulk
    ]
    assert bulk_count == single_count == sum(len(rows) for _, source, rows in bulk if source == "rollout")


def test_rising_phi_leaves_no_rollout_unused(tmp_path):
    """Check a run with more rollout steps than predicted, and with predicted ones that become replay."""
    engine = build(method="adaptive", steps=30)
    engine.pool.bulk = 6
    used_steps, fresh = [], engine.pool._fresh

    def recording_fresh(step):
        batch = fresh(step)
        used_steps.append(engine.pool._served[0])
        return batch

    engine.pool._fresh = recording_fresh
    result = engine.train()
    assert len(result.phis) > 2
    assert result.sources["rollout"] == len(used_steps) == len(set(used_steps))
    assert engine.pool.counts.student_sequences == 4 * (len(used_steps) + len(engine.pool.waiting))
    assert all(step >= result.step - 6 for step in engine.pool.waiting)


def test_freshness_weighs_replayed_outputs():
    """Check a replay step against the loss of plain PyTorch with the weights of the definition."""
    engine = build(
        method="on",
        schedule={"replay": "constant", "freshness": True, "capacity": 4},
        backbone=student(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0),
    )
    engine.pool.student.with_log_probs = True
    rollouts = engine.pool.draw(Source.ROLLOUT, 0)[0].sequences
    with torch.no_grad():  # another student than the one that sampled
        for p in engine.student_loss.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    student_model, teacher_model = engine.student_loss.student.model, engine.teacher.model.model
    total, tokens, factors = 0.0, 0, []
    for s in rollouts:
        ids = torch.tensor([*s.prompt.tolist(), *s.response.tolist()])
        P = len(s.prompt)
        log_q, log_p = (
            m(ids[None]).logits[0, P - 1 : -1].double().log_softmax(-1) for m in (student_model, teacher_model)
        )
        now = log_q.gather(-1, ids[P:, None])[:, 0]
        factor = (now - s.student_log_probs_N).mean().exp().clamp_max(1).item()

        total += (
            factor
            * (log_p.exp() * (log_p - torch.logaddexp(log_p + math.log(0.1), log_q + math.log(0.9)))).sum().item()
        )
        tokens += len(s.response)
        factors.append(factor)
    assert min(factors) < 0.9
    loss, _ = step_on(engine, [SourceBatch(Source.REPLAY, rollouts)])
    assert loss == pytest.approx(total / tokens, rel=1e-4)


def test_waiting_rollouts_are_saved_and_restored():
    """Check rollouts sampled ahead, with their steps, log-probabilities and teacher states."""
    pool = build(method="on", steps=12).pool
    pool.bulk = 4
    pool.draw(Source.ROLLOUT, 2)
    for i, rollout in enumerate(s for batch in pool.waiting.values() for s in batch):
        object.__setattr__(rollout, "log_probs_NK", torch.rand(len(rollout.response), 3))
        if i % 2:
            rollout.cache_teacher_hidden(torch.rand(len(rollout.response), 5))
    state, tensors = pool.state_dict()
    restored = build(method="on", steps=12).pool
    restored.load_state_dict(json.loads(json.dumps(state)), {k: v.clone() for k, v in tensors.items()})
    assert list(restored.waiting) == list(pool.waiting) == [3, 4, 5]
    assert vars(restored.counts) == vars(pool.counts)
    for before, after in zip(pool.waiting.values(), restored.waiting.values(), strict=True):
        for original, restored_rollout in zip(before, after, strict=True):
            assert (original.row, original.prompt.tolist(), original.response.tolist()) == (
                restored_rollout.row,
                restored_rollout.prompt.tolist(),
                restored_rollout.response.tolist(),
            )
            assert_close(restored_rollout.log_probs_NK, original.log_probs_NK, rtol=0, atol=0)
            assert (restored_rollout.teacher_hidden_ND is None) == (original.teacher_hidden_ND is None)
            if original.teacher_hidden_ND is not None:
                assert_close(restored_rollout.teacher_hidden_ND, original.teacher_hidden_ND, rtol=0, atol=0)


def test_fresh_buffer_trains_on_buffered_rollouts():
    engine = build(method="on", steps=4, schedule={"fresh": "buffer"})
    engine.train()
    assert len(engine.pool) == 8
    assert engine.state.sources == {"rollout": 4}


def test_training_lowers_the_loss():
    events = []
    engine = build(method="off", steps=60, lr=5e-3, listener=events.append, backbone=student("llama"))
    engine.train()
    losses = [e.loss for e in events if isinstance(e, Stepped)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert engine.student_loss.training


def test_best_checkpoint_is_retained(tmp_path):
    """Check a high learning rate, with which an early validation is the best one."""
    events = []
    engine = build(
        tmp_path, method="sft", steps=12, lr=0.3, select="valid_loss", save_steps=1, keep=2, listener=events.append
    )
    state = engine.train()
    validations = {e.step: e.valid_loss for e in events if isinstance(e, Validated) and e.step}
    assert state.best_step == min(validations, key=validations.get)
    assert engine.checkpoints.steps() == sorted({state.best_step, 11, 12})


def test_last_of_equal_scores_is_selected(tmp_path):
    settings = {"method": "sft", "steps": 12, "select": "rouge_l", "eval_steps": 2}
    scores = iter([0.0, 3.0, 3.0, 1.0, 3.0, 2.0, 2.0])  # the first is that of the initial student
    engine = build(tmp_path / "a", **settings)
    engine.validator.score = lambda: {"rouge_l": next(scores)}
    state = engine.train()
    assert (state.best, state.best_step, state.stale) == (3.0, 8, 5)
    engine = build(tmp_path / "b", **settings, patience=3)
    engine.validator.score = lambda: {"rouge_l": 0.0}
    state = engine.train()
    assert (state.reason, state.step, state.best_step) == ("early stop", 8, 8)


def test_early_stop_after_patience_runs_out(tmp_path):
    engine = build(tmp_path, method="sft", steps=60, lr=0.3, select="valid_loss", patience=2, eval_steps=2)
    state = engine.train()
    assert state.reason == "early stop"
    assert state.step < 60
    assert state.step == state.best_step + 2 * 2


@pytest.mark.parametrize("method", ["sft", "adaptive"])
def test_resumed_run_stays_stopped_early(tmp_path, method):
    """Check a run that is killed after its last step, such as during the report."""
    settings = {"method": method, "steps": 60, "lr": 0.3, "select": "valid_loss", "patience": 2, "eval_steps": 2}
    stopped = build(tmp_path, **settings)
    stopped.train()
    events = []
    resumed = resume(tmp_path, **settings, listener=events.append)
    state = resumed.train()
    assert (state.step, state.best_step, state.reason) == (
        stopped.state.step,
        stopped.state.best_step,
        "early stop",
    )
    assert not any(isinstance(event, Stepped) for event in events)
    assert all(
        map(
            torch.equal,
            resumed.student_loss.state_dict().values(),
            stopped.student_loss.state_dict().values(),
        )
    )


def test_selection_by_divergence_uses_held_out_rows(tmp_path):
    events = []
    build(tmp_path, method="off", select="valid_divergence", listener=events.append).train()
    scores = [e.scores["valid_divergence"] for e in events if isinstance(e, Validated)]
    assert len(scores) == 5
    assert all(0 < f < 2.31 for f in scores)  # skew KL at α = 0.1 is at most log 10


def test_non_finite_loss_stops_the_run_before_the_update(tmp_path):
    engine = build(tmp_path, method="sft", steps=6)

    def set_infinite_weight(event):
        if isinstance(event, Stepped) and event.step == 2:
            engine.student_loss.student.model.transformer.ln_f.weight.data[0] = float("inf")

    engine.emit = set_infinite_weight
    with raises_code("numbers.not_finite", "step 3"):
        engine.train()
    assert engine.state.step == 2
    assert all(torch.isfinite(s["exp_avg"]).all() for s in engine.optimizer.state.values())
    assert read_checkpoint(engine.checkpoints.path(2)).state["progress"]["step"] == 2


def test_damaged_checkpoint_is_rejected(tmp_path):
    engine = build(tmp_path, method="sft", steps=2)
    engine.train()
    path = engine.checkpoints.path(2)
    target = path / "training.safetensors"
    target.write_bytes(target.read_bytes()[:-1] + b"\x7f")
    with raises_code("checkpoint.damaged", "training.safetensors") as error:
        read_checkpoint(path)
    assert error.value.exit_code == 5
    target.unlink()
    with raises_code("checkpoint.damaged", "training.safetensors"):
        read_checkpoint(path)


def test_incomplete_checkpoint_is_ignored_and_removed(tmp_path):
    engine = build(tmp_path, method="sft", steps=2)
    (tmp_path / ".staging-step-000009").mkdir()
    assert engine.checkpoints.latest() is None
    engine.train()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


def test_full_disk_loses_no_checkpoint(tmp_path):
    """Check with a file size limit, which acts like a full disk or a quota."""

    def save_model(directory):
        (directory / "weights").write_bytes(b"w" * 5000)

    checkpoints, tensors = Checkpoints(tmp_path, save_model, keep=1), {"x": torch.ones(9)}
    with file_size(1000), raises_code("storage.failed", "step-000003", "File too large") as error:
        checkpoints.write(3, {}, tensors)
    assert error.value.exit_code == 8
    checkpoints.write(6, {"step": 6}, tensors)
    with file_size(1000), raises_code("storage.failed", "step-000009", "step-000006", "--resume"):
        checkpoints.write(9, {"step": 9}, tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000006"]
    assert checkpoints.latest().state == {"step": 6}


def test_checkpoint_has_no_pickle_files(tmp_path):
    engine = build(tmp_path, method="adaptive")
    engine.train()
    suffixes = {p.suffix for p in engine.checkpoints.path(12).iterdir()}
    assert suffixes == {".json", ".safetensors"}


def test_resume_removes_later_metrics_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, log_steps=2)
    build(method="adaptive", steps=6, listener=log).train()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]
    figures = {"step", "epoch", "source", "loss", "lr", "grad_norm", "phi", "tokens", "seconds"}
    assert set(lines[1]) == figures | {"train_tokens_per_second"}
    assert [line["step"] for line in lines if "valid_loss" in line] == [0, 3, 6]

    path.write_bytes(path.read_bytes() + b'[1]\n5\n"\xff"\n{"step": 7, "lo')  # with invalid lines
    MetricsLog(path, log_steps=2, first_step=4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 2, 3, 4]


def test_full_disk_leaves_complete_metrics_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, log_steps=1)
    steps = [Stepped(step, 0.1, "dataset", 1.0, 1e-3, 1.0, 0.0, 8, 0.1, {}) for step in range(1, 30)]
    with file_size(1000), raises_code("storage.failed", str(path)):
        [*map(log, steps)]
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) > 5


def test_resume_before_first_validation_drops_step_zero(tmp_path):
    """Check that the line of step 0, written at the first validation, is removed, as it will be written again."""
    path, log = tmp_path / "metrics.jsonl", None
    log = MetricsLog(path, log_steps=4)
    for step in range(1, 7):
        log(Stepped(step, 0.1, "dataset", 1.0, 1e-3, 1.0, 0.0, 8, 0.1, {}))
    for step in (0, 6):
        log(Validated(step, 2.0, 0.0, False, False, {}))

    def remaining_lines(**resumed):
        MetricsLog(path, log_steps=4, **resumed)
        return [(line["step"], "loss" in line) for line in map(json.loads, path.read_text().splitlines())]

    assert remaining_lines(first_step=6) == [(4, True), (0, False), (6, False)]
    assert remaining_lines(first_step=5, validated=False) == [(4, True)]


def test_teacher_is_neither_trained_nor_saved():
    engine = build(method="off")
    before = copy.deepcopy(engine.teacher.model.model.state_dict())
    engine.train()
    assert all(torch.equal(before[k], v) for k, v in engine.teacher.model.model.state_dict().items())
    trained = {id(p) for p in engine.student_loss.parameters()}
    assert trained == {id(p) for p in engine.student_loss.student.model.parameters()}


def test_saved_checkpoints_are_reported(tmp_path):
    events = []
    build(tmp_path, method="sft", steps=4, save_steps=2, listener=events.append).train()
    assert [e.step for e in events if isinstance(e, Saved)] == [2, 4]


def test_diverged_student_stops_the_run_while_sampling(tmp_path):
    """Check a student whose weights are finite after step 2 and whose logits are not."""
    engine = build(tmp_path, method="on", steps=6)

    def enlarge_weights(event):
        if isinstance(event, Stepped) and event.step == 2:
            for block in engine.student_loss.student.model.transformer.h:
                block.mlp.c_fc.weight.data.fill_(1e38)

    engine.emit = enlarge_weights
    with raises_code("numbers.not_finite", "step 3", "rollout", "--lr") as error:
        engine.train()
    assert error.value.exit_code == 6
    assert engine.state.step == 2
    with raises_code("numbers.not_finite", "step 3"):
        resume(tmp_path, "on", steps=6).train()


@pytest.mark.parametrize(
    ("method", "objective"),
    [
        ("sft", None),
        ("off", schema.ObjectiveConfig(divergence="atkd")),  # uses the log-probabilities of the whole step
        ("adaptive", None),
    ],
)
def test_out_of_memory_halves_the_micro_batch(method, objective):
    """Check memory for three of four sequences: one warning, and the gradients of the whole batch."""

    def trained(rows):
        events = []
        engine = build(method=method, objective=objective, backbone=student("llama"), steps=6, listener=events.append)
        memory = LimitedBatch(engine.student_loss, rows)
        engine.train()
        assert memory.refused == (rows < 4)
        return engine, [e.text for e in events if isinstance(e, Warned) and "decoding" not in e.text]

    (unlimited, no_warnings), (halved, warnings) = trained(rows=4), trained(rows=3)
    assert no_warnings == []
    assert warnings == ["out of memory with micro-batches of 4 sequences: continuing with 2, same batches"]
    for name, expected in weights(unlimited).items():
        assert_close(weights(halved)[name], expected, atol=2e-5, rtol=1e-4, msg=name)
    assert halved.state.valid_loss == pytest.approx(unlimited.state.valid_loss, abs=1e-4)
    assert halved.state.sources == unlimited.state.sources


def test_retry_empties_the_gpu_memory_cache(monkeypatch):
    """Check this because smaller batches alone free no memory for cuBLAS, which allocates its own."""
    freed = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))

    def attempt():
        if not freed:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return "done"

    assert retry_halved(attempt, halve=lambda: bool(freed)) == "done"


def test_out_of_memory_halves_the_validation_batch():
    warnings, backbone = [], student("llama")
    rows = tiny.sequences([(4, 3), (5, 4), (3, 2), (6, 1), (2, 5), (3, 3), (4, 4)], vocab=len(TOKENIZER), seed=9)
    held_out = Validator([rows[:5], rows[5:]], RunInfo(steps=1, steps_per_epoch=1), listener=warnings.append)
    objective = StudentLoss(backbone, objectives.build(None))
    with torch.no_grad():
        expected = held_out.mean(CROSS_ENTROPY, objective)
        memory = LimitedBatch(objective, 3)
        assert held_out.mean(CROSS_ENTROPY, objective) == pytest.approx(expected, rel=1e-5)
        assert held_out.mean(CROSS_ENTROPY, objective) == pytest.approx(expected, rel=1e-5)
        memory.rows = 0
        with pytest.raises(torch.OutOfMemoryError):
            held_out.mean(CROSS_ENTROPY, objective)
    counts = [5, 2, 1]
    assert warnings == [
        Warned(f"out of memory with {rows} held-out rows per batch: continuing with {fewer}, same loss")
        for rows, fewer in pairwise(counts)
    ]


@pytest.mark.parametrize("method", ["sft", "off", "on", "adaptive"])
def test_out_of_memory_step_loses_no_earlier_step(tmp_path, method):
    """Check a run in which no sequence fits at step 6, resumed with more memory.

    It must end like an uninterrupted run, with dropout, replay, and the outputs that the failed step had already drawn.
    """
    torch.manual_seed(5)
    uninterrupted = build(method=method)
    uninterrupted.train()

    torch.manual_seed(5)
    engine = build(tmp_path, method=method)
    memory = LimitedBatch(engine.student_loss, 4)

    def shrink(event):
        if isinstance(event, Stepped) and event.step == 5:
            memory.rows = 0

    engine.emit = shrink
    with raises_code("memory.exhausted", "step 6", "--resume") as error:
        engine.train()
    assert error.value.exit_code == 7
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]

    resumed = resume(tmp_path, method)
    resumed.train()
    assert_close(weights(resumed), weights(uninterrupted), rtol=0, atol=0)
    assert (resumed.state.sources, resumed.pool.counts) == (uninterrupted.state.sources, uninterrupted.pool.counts)
    assert resumed.state.valid_loss == uninterrupted.state.valid_loss


def test_retried_step_has_identical_teacher_states(tmp_path):
    """Check that a retried batch has the same composition for the teacher.

    The batch has rollouts from the buffer. If some of its states stayed cached after the failure, the batch shape would
    differ, and with it the rounding.
    """
    settings = {"method": "adaptive", "cached": True, "steps": 24, "schedule": {"fresh": "buffer"}}

    def failing(step):
        torch.manual_seed(5)
        engine = build(tmp_path / str(step), **settings)
        memory = LimitedBatch(engine.student_loss, 4)

        def shrink(event):
            if isinstance(event, Stepped) and event.step == step:
                memory.rows, failing.cached = 0, cached_rollouts(engine)

        engine.emit = shrink
        with pytest.raises(OutOfMemoryError):
            engine.train()
        return engine

    torch.manual_seed(5)
    uninterrupted = build(**settings)
    uninterrupted.train()
    for step in (10, 11, 13, 14):
        assert cached_rollouts(failing(step)) == failing.cached
        resumed = resume(tmp_path / str(step), **settings)
        resumed.train()
        assert_close(weights(resumed), weights(uninterrupted), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------ notes of a run


@pytest.mark.parametrize(
    ("objective", "name", "held_out"),
    [
        (None, "CE", "CE"),
        ({}, "skl", "skl"),
        ({"divergence": "jsd"}, "jsd", "jsd"),
        ({"divergence": "kl", "kd_weight": 0.5}, "CE + kl", "kl"),
        ({"divergence": "srkl", "kd_warmup": 0.5}, "CE + srkl", "srkl"),
        ({"kd_weight": 0.0}, "CE", "skl"),
        ({"divergence": "taid"}, "taid", "kl"),
        ({"divergence": "atkd"}, "atkd", "kl"),
        ({"divergence": "skl", "by_source": True}, "skl + srkl", "skl"),
        ({"divergence": "rkl", "by_source": True}, "kl + rkl", "rkl"),
        ({"divergence": "jsd", "by_source": True}, "jsd", "jsd"),
        ({"divergence": "rkl", "policy_gradient": True}, "PG + rkl", "rkl"),
    ],
)
def test_losses_are_named_by_their_terms(objective, name, held_out):
    criterion = objectives.build(None if objective is None else schema.ObjectiveConfig(**objective))
    assert (criterion.name, criterion.held_out_name) == (name, held_out)


def run_with_constant_phi(epsilon=100.0, steps=8, validation=True, **more):
    """Return the events of a run whose φ never rises, and its notes at half of the steps with their positions."""
    events = []
    engine = build(steps=steps, listener=events.append, **{"eval_steps": 2} | more)
    engine.scheduler.config = engine.scheduler.config.model_copy(update={"epsilon": epsilon})
    if not validation:
        engine.validator.batches = []
    engine.train()
    notes = [(i, e.text) for i, e in enumerate(events) if isinstance(e, Note) and e.text.startswith("half of the")]
    return events, notes


def test_note_at_half_the_steps_explains_phi():
    events, [(index, text)] = run_with_constant_phi()
    assert sum(isinstance(e, Stepped) for e in events[:index]) == 4
    first, *_, current = [e for e in events[:index] if isinstance(e, Validated)]
    assert first.trigger == first.valid_loss + 100
    assert (
        f"φ is 0; it rises by 0.33 at a valid CE of {first.trigger:.3f} or more (now {current.valid_loss:.3f}; " in text
    )
    assert f"{first.valid_loss:.3f} at first, schedule.epsilon 100); 2 validations left; to use" in text
    assert "--set schedule.phi=0.2" in text


@pytest.mark.parametrize(
    ("epsilon", "change"),
    [(100.0, "risen by 100 or more"), (-0.5, "fallen by 0.5 or less"), (0.0, "fallen by 0 or less")],
)
def test_phi_advice_before_the_first_validation(epsilon, change):
    engine = build(steps=8, listener=lambda _: None, eval_steps=100)
    engine.scheduler.config = engine.scheduler.config.model_copy(update={"epsilon": epsilon})
    engine.state.step = 4
    text = phi_advice(engine)
    assert f"at a validation where valid CE has {change} since before training, with no validation so far (1 " in text


def test_phi_advice_without_held_out_rows():
    _, [(_, text)] = run_with_constant_phi(validation=False)
    assert "it cannot rise without held-out rows; set some with --set data.valid=PATH" in text


@pytest.mark.parametrize("more", [{"epsilon": -10.0}, {"method": "off"}, {"method": "on"}, {"steps": 1}])
def test_no_note_where_phi_rises_or_is_unused(more):
    assert run_with_constant_phi(**more)[1] == []


def test_run_started_event_has_phi_and_epsilon():
    events, _ = run_with_constant_phi(epsilon=0.1)
    assert (events[0].phi, events[0].epsilon, events[0].trigger, events[0].loss) == (0.0, 0.1, None, "skl")
