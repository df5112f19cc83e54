"""The loop, against the truth: plain PyTorch for one step, the uninterrupted run for a resumed one."""

import copy
import json
import os
import signal
from collections import Counter
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from distillm_cli.config import schema
from distillm_cli.errors import CheckpointError, Interrupted, NonFiniteError, OutOfMemoryError, StorageError
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
from distillm_cli.training.state import RunInfo
from distillm_cli.training.trainer import Trainer
from distillm_cli.training.validation import Validator
from distillm_cli.utils.memory import retry_halved
from distillm_cli.utils.modules import eval_mode
from tests import tiny
from tests.limits import Narrow, file_size

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
    """A whole small run: dropout on (GPT-2's own 0.1), so that the random state matters. cached: the teacher's states.

    schedule: fields of its section. sampler: (student, teacher model) → sampler. responses: (student, teacher model,
    rows, steps per epoch) → tables. rounds_of: batches in a round. device: where ``backbone`` is already.
    """
    train = schema.TrainConfig(
        **{"batch_size": 4, "lr": 1e-3, "warmup": 0, "eval_steps": 3, "save_steps": 1000, "seed": 5} | train
    )
    step_rows = train.batch_size * train.accumulate
    sft = method == "sft"
    fields = {"kind": "off" if sft else method}
    if method in ("on", "mixed", "annealed", "adaptive"):
        fields["capacity"] = 8
    if method == "adaptive":  # epsilon −10: φ rises at every validation, so that a short run has rollouts and replay
        fields |= {"epsilon": -10.0, "levels": 3}
    section = schema.ScheduleConfig(**fields | (schedule or {}))
    scheduler = build_scheduler(section, steps=steps, seed=train.seed, batches=rounds_of)
    backbone = backbone or student()

    def rows(step):
        return [ROWS[(step * step_rows + i * 7) % len(ROWS)] for i in range(step_rows)]

    model = None if sft else Backbone(tiny.model("llama", len(TOKENIZER), seed=4), TOKENIZER).to(device)
    teacher = None if sft else LocalTeacher(model)
    if cached:
        teacher = CachedTeacher(
            model,
            mode="memory",
            rows=HiddenStateTable(ROWS),
            composition=BatchComposition(rows, steps=len(ROWS) // step_rows, rows=ROWS, max_rows=train.batch_size),
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
        own = ModelSampler(backbone, schema.RolloutConfig(max_new_tokens=5), max_length=16, seed=train.seed)
    else:
        own = sampler(backbone, model)
    pool = SequencePool(
        rows,
        scheduler,
        student=own,
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
    """One optimizer step on these sequences; its loss and learning rate."""
    trainer.pool.draw = lambda source, step: batches
    trainer.train_step()
    return trainer.state.train_loss, trainer.optimizer.param_groups[0]["lr"]


def cached_rollouts(trainer):
    """The rollouts in the pool that carry the teacher's states."""
    held = [*trainer.pool.replay.rollouts, *(s for batch in trainer.pool.waiting.values() for s in batch)]
    return {s for s in held if s.teacher_hidden_ND is not None}


def resume(tmp_path, method, **settings):
    found = Checkpoints(tmp_path, lambda path: None, keep=1).latest()
    loaded = type(student().model).from_pretrained(found.path, dtype=torch.float32)
    backbone = student()
    backbone.model.load_state_dict(loaded.state_dict())
    engine = build(tmp_path, method=method, backbone=backbone, **settings)
    torch.manual_seed(999)  # whatever the random state was, the checkpoint's is what counts
    engine.load(found)
    return engine


def test_the_loss_before_training_may_be_taken_later_and_is_the_same(tmp_path):
    """Nobody waits for it before the first step; φ, the weights and every figure are those of a run that took it first."""

    def run(late):
        torch.manual_seed(5)
        events = []
        engine = build(method="adaptive", listener=events.append)
        start = {name: tensor.clone() for name, tensor in engine.student_loss.state_dict().items()}

        @contextmanager
        def as_at_start():
            now = {name: tensor.clone() for name, tensor in engine.student_loss.state_dict().items()}
            engine.student_loss.load_state_dict(start)
            yield
            engine.student_loss.load_state_dict(now)

        if late:
            engine.validator.at_start = as_at_start
        return engine, engine.train(), [event for event in events if isinstance(event, Stepped | Validated)]

    (first, reached, order), (late, later, late_order) = run(late=False), run(late=True)
    assert (reached.first_valid_loss, reached.valid_loss) == (later.first_valid_loss, later.valid_loss)
    assert (reached.phis, reached.sources) == (later.phis, later.sources)
    assert_close(weights(first), weights(late), rtol=0, atol=0)
    assert [event.step for event in order if isinstance(event, Validated)][:2] == [0, 3]
    assert [event.step for event in late_order if isinstance(event, Validated)][:2] == [0, 3]
    assert isinstance(order[0], Validated)
    assert isinstance(late_order[0], Stepped)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", ["sft", "off", "adaptive", "mixed", "annealed"])
def test_resume_matches_an_uninterrupted_run_bit_for_bit(tmp_path, method, accumulate):
    """Stopped by a signal in mid-epoch, gone on in a fresh engine: the same weights, to the last bit."""
    torch.manual_seed(5)
    whole = build(method=method, accumulate=accumulate)
    done = whole.train()

    torch.manual_seed(5)
    stopped = build(tmp_path, method=method, accumulate=accumulate, listener=_kill_at(5))
    with pytest.raises(Interrupted) as stop:
        stopped.train()
    assert stop.value.exit_code == 128 + signal.SIGINT
    assert stopped.state.step == 5

    resumed = resume(tmp_path, method, accumulate=accumulate)
    again = resumed.train()
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert again.sources == done.sources
    assert again.valid_loss == done.valid_loss
    if method == "adaptive":
        assert done.sources["rollout"] > 0
        assert done.sources["replay"] > 0


@pytest.mark.parametrize(
    ("method", "fresh", "select"),
    [
        ("adaptive", "direct", "last"),
        ("adaptive", "buffer", "last"),
        ("off", "direct", "last"),
        ("off", "direct", "valid_divergence"),
    ],
)
def test_a_resume_sees_the_teachers_kept_states_as_they_were_bit_for_bit(tmp_path, method, fresh, select):
    """Past the first epoch, with half of the buffer scored: rows are computed again, rollouts come from the checkpoint."""
    settings = {"method": method, "cached": True, "steps": 24, "batch_size": 3, "accumulate": 2, "select": select}
    if method == "adaptive":
        settings["schedule"] = {"fresh": fresh}
    torch.manual_seed(5)
    whole = build(**settings)
    stopped = build(tmp_path, listener=_kill_at(11), **settings)
    whole.train()
    torch.manual_seed(5)
    with pytest.raises(Interrupted):
        stopped.train()

    resumed = resume(tmp_path, **settings)
    carried = cached_rollouts(resumed)
    resumed.train()
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert resumed.state.valid_loss == whole.state.valid_loss
    assert resumed.state.scores == whole.state.scores
    assert whole.teacher.has_released_model == resumed.teacher.has_released_model == (method == "off")
    if method == "adaptive":
        assert 0 < len(carried) <= 8
        assert whole.state.sources["replay"] > 2


def test_keeping_the_teachers_states_changes_nothing_but_rounding_and_asks_once():
    live, keeping = (
        build(method="adaptive", steps=24, cached=cached, backbone=student("llama")) for cached in (False, True)
    )
    live.train(), keeping.train()
    for name, value in weights(live).items():
        assert_close(weights(keeping)[name], value, rtol=1e-3, atol=1e-5)
    assert keeping.state.sources == live.state.sources
    assert keeping.state.sources["replay"] > 0
    assert keeping.teacher.tokens < 0.7 * live.teacher.tokens


def test_with_kept_states_the_first_epoch_is_the_uncached_run_to_the_last_bit():
    live, keeping = (build(method="off", steps=6, cached=cached) for cached in (False, True))
    for engine in (live, keeping):
        torch.manual_seed(5)
        engine.train()
    assert all(torch.equal(weights(live)[name], value) for name, value in weights(keeping).items())


def _kill_at(step):
    def listener(event):
        if isinstance(event, Stepped) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return listener


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (4, 2), (2, 4), (3, 3)])
def test_accumulation_gives_the_gradient_of_the_whole_batch(batch_size, accumulate):
    """One division by the step's token count: ragged micro-batches weigh as much as their tokens."""
    rows = ROWS[:8]
    engine = build(method="off", steps=1, batch_size=batch_size, clip=0.0, lr=1.0, backbone=student("llama").double())
    engine.teacher.model.double()
    engine.optimizer = torch.optim.SGD(engine.student_loss.parameters(), lr=1.0)
    before = weights(engine)
    engine.student_loss.train()
    step_on(engine, [SourceBatch(Source.DATASET, rows)])
    ours = {name: before[name] - value for name, value in weights(engine).items()}

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
        assert_close(ours[name], parameter.grad, rtol=1e-6, atol=1e-9)


def own_logits(backbone, batch):
    return backbone.model(batch.ids_BT).logits.flatten(0, 1)[batch.positions_N]


def test_gradient_checkpointing_changes_memory_and_nothing_else():
    plain, saving = (build(method="adaptive", steps=6, backbone=student("llama")) for _ in range(2))
    saving.student_loss.student.model.gradient_checkpointing_enable()
    plain.train(), saving.train()
    for name, value in weights(plain).items():
        assert_close(weights(saving)[name], value, rtol=1e-4, atol=1e-6)


def test_bulk_rollouts_are_as_many_as_single_ones_and_each_is_used_once():
    events = []
    single, bulk = build(method="on", steps=10), build(method="on", steps=10, listener=events.append)
    single.pool.bulk = 1
    bulk.pool.bulk = 4
    assert [t.train() and t.pool.counts.student_sequences for t in (single, bulk)] == [40, 40]
    assert Counter(e.source for e in events if isinstance(e, Stepped)) == {"rollout": 10}
    assert not bulk.pool.waiting


@pytest.mark.parametrize("kind", ["mixed", "annealed", "adaptive"])
def test_a_bulk_answers_the_rows_that_single_draws_would_have_answered_each_at_its_own_step(kind):
    """Data set steps go on over the other rows: drawing ahead must not show some rows twice and others not at all."""

    fixed = {"phi": 0.5, "epsilon": 100.0, "capacity": 8} if kind == "adaptive" else {}

    def trained_on(bulk):
        engine, seen = build(method=kind, steps=24, schedule=fixed), []
        engine.pool.bulk = bulk
        draw = engine.pool.draw

        def watched(source, step):
            batches = draw(source, step)
            if source is not Source.REPLAY:
                seen.append((step, source.value, [s.row for s in batches[0].sequences]))
            return batches

        engine.pool.draw = watched
        engine.train()
        return seen, engine.pool.counts.student_sequences

    (single, one), (bulk, eight) = trained_on(1), trained_on(8)
    assert bulk == single
    assert {source for _, source, _ in bulk} == {"dataset", "rollout"}
    assert [rows for step, _, rows in bulk] == [
        [row.row for row in build(steps=24).pool.rows(step)] for step, _, _ in bulk
    ]
    assert eight == one == sum(len(rows) for _, source, rows in bulk if source == "rollout")


def test_a_phi_that_rises_leaves_no_rollout_unserved(tmp_path):
    """More steps ask than were foreseen, and a buffer that fills sooner turns some that were into replay."""
    engine = build(method="adaptive", steps=30)
    engine.pool.bulk = 6
    served, fresh = [], engine.pool._fresh

    def watched(step):
        batch = fresh(step)
        served.append(engine.pool._served[0])
        return batch

    engine.pool._fresh = watched
    done = engine.train()
    assert len(done.phis) > 2
    assert done.sources["rollout"] == len(served) == len(set(served))
    assert engine.pool.counts.student_sequences == 4 * (len(served) + len(engine.pool.waiting))
    assert all(step >= done.step - 6 for step in engine.pool.waiting)


def test_what_waits_in_the_pool_goes_through_a_checkpoint():
    """Rollouts sampled ahead, with their steps, log-probabilities and teacher states."""
    pool = build(method="on", steps=12).pool
    pool.bulk = 4
    pool.draw(Source.ROLLOUT, 2)
    for i, rollout in enumerate(s for batch in pool.waiting.values() for s in batch):
        object.__setattr__(rollout, "log_probs_N3", torch.rand(len(rollout.response), 3))
        if i % 2:
            rollout.cache_teacher_hidden(torch.rand(len(rollout.response), 5))
    state, tensors = pool.state_dict()
    restored = build(method="on", steps=12).pool
    restored.load_state_dict(json.loads(json.dumps(state)), {k: v.clone() for k, v in tensors.items()})
    assert list(restored.waiting) == list(pool.waiting) == [3, 4, 5]
    assert vars(restored.counts) == vars(pool.counts)
    for before, after in zip(pool.waiting.values(), restored.waiting.values(), strict=True):
        for ours, theirs in zip(before, after, strict=True):
            assert (ours.row, ours.prompt.tolist(), ours.response.tolist()) == (
                theirs.row,
                theirs.prompt.tolist(),
                theirs.response.tolist(),
            )
            assert_close(theirs.log_probs_N3, ours.log_probs_N3, rtol=0, atol=0)
            assert (theirs.teacher_hidden_ND is None) == (ours.teacher_hidden_ND is None)
            if ours.teacher_hidden_ND is not None:
                assert_close(theirs.teacher_hidden_ND, ours.teacher_hidden_ND, rtol=0, atol=0)


def test_the_papers_fresh_through_the_buffer_trains_on_what_the_buffer_holds():
    engine = build(method="on", steps=4, schedule={"fresh": "buffer"})
    engine.train()
    assert len(engine.pool) == 8
    assert engine.state.sources == {"rollout": 4}


def test_training_lowers_the_loss_and_leaves_train_mode_as_it_was():
    events = []
    engine = build(method="off", steps=60, lr=5e-3, listener=events.append, backbone=student("llama"))
    engine.train()
    losses = [e.loss for e in events if isinstance(e, Stepped)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert engine.student_loss.training


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    """A learning rate that soon ruins the student: the best validation is an early one, and outlives the pruning."""
    events = []
    engine = build(
        tmp_path, method="sft", steps=12, lr=0.3, select="valid_loss", save_steps=1, keep=2, listener=events.append
    )
    at = engine.train()
    validations = {e.step: e.valid_loss for e in events if isinstance(e, Validated) and e.step}
    assert at.best_step == min(validations, key=validations.get)
    assert engine.checkpoints.steps() == sorted({at.best_step, 11, 12})


def test_of_equal_figures_the_last_is_kept_and_patience_counts(tmp_path):
    how = {"method": "sft", "steps": 12, "select": "rouge_l", "eval_steps": 2}
    figures = iter([0.0, 3.0, 3.0, 1.0, 3.0, 2.0, 2.0])  # the first is of the student before training
    engine = build(tmp_path / "a", **how)
    engine.validator.score = lambda: {"rouge_l": next(figures)}
    at = engine.train()
    assert (at.best, at.best_step, at.stale) == (3.0, 8, 5)
    engine = build(tmp_path / "b", **how, patience=3)
    engine.validator.score = lambda: {"rouge_l": 0.0}
    at = engine.train()
    assert (at.reason, at.step, at.best_step) == ("early stop", 8, 8)


def test_early_stop_after_patience_runs_out(tmp_path):
    engine = build(tmp_path, method="sft", steps=60, lr=0.3, select="valid_loss", patience=2, eval_steps=2)
    at = engine.train()
    assert at.reason == "early stop"
    assert at.step < 60
    assert at.step == at.best_step + 2 * 2


@pytest.mark.parametrize("method", ["sft", "adaptive"])
def test_a_run_that_has_stopped_early_stays_so_when_it_is_resumed(tmp_path, method):
    """Killed after its last step, while the report is made say: what is left to do is not training."""
    how = {"method": method, "steps": 60, "lr": 0.3, "select": "valid_loss", "patience": 2, "eval_steps": 2}
    whole = build(tmp_path, **how)
    whole.train()
    events = []
    again = resume(tmp_path, **how, listener=events.append)
    at = again.train()
    assert (at.step, at.best_step, at.reason) == (whole.state.step, whole.state.best_step, "early stop")
    assert not any(isinstance(event, Stepped) for event in events)
    assert all(map(torch.equal, again.student_loss.state_dict().values(), whole.student_loss.state_dict().values()))


def test_selection_by_divergence_measures_it_on_held_out_rows(tmp_path):
    events = []
    build(tmp_path, method="off", select="valid_divergence", listener=events.append).train()
    figures = [e.scores["valid_divergence"] for e in events if isinstance(e, Validated)]
    assert len(figures) == 5
    assert all(0 < f < 2.31 for f in figures)  # skew KL at α = .1 never exceeds log 10


def test_non_finite_numbers_stop_the_run_before_they_reach_the_weights(tmp_path):
    engine = build(tmp_path, method="sft", steps=6)

    def poison(event):
        if isinstance(event, Stepped) and event.step == 2:
            engine.student_loss.student.model.transformer.ln_f.weight.data[0] = float("inf")

    engine.emit = poison
    with pytest.raises(NonFiniteError, match="step 3"):
        engine.train()
    assert engine.state.step == 2
    assert all(torch.isfinite(s["exp_avg"]).all() for s in engine.optimizer.state.values())
    assert read_checkpoint(engine.checkpoints.path(2)).state["progress"]["step"] == 2


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
    engine = build(tmp_path, method="sft", steps=2)
    engine.train()
    path = engine.checkpoints.path(2)
    target = path / "training.safetensors"
    target.write_bytes(target.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match=r"training\.safetensors differs from its manifest") as error:
        read_checkpoint(path)
    assert error.value.exit_code == 5
    target.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        read_checkpoint(path)


def test_a_half_written_checkpoint_is_invisible_and_cleared_away(tmp_path):
    engine = build(tmp_path, method="sft", steps=2)
    (tmp_path / ".staging-step-000009").mkdir()
    assert engine.checkpoints.latest() is None
    engine.train()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


def test_a_disk_that_is_full_costs_no_checkpoint_and_names_what_is_left(tmp_path):
    """The system lets no file grow beyond a few bytes, as a full disk or a quota does."""

    def save_model(place):
        (place / "weights").write_bytes(b"w" * 5000)

    checkpoints, tensors = Checkpoints(tmp_path, save_model, keep=1), {"x": torch.ones(9)}
    with (
        file_size(1000),
        pytest.raises(StorageError, match=r"step-000003: File too large; .*nothing was saved yet") as error,
    ):
        checkpoints.write(3, {}, tensors)
    assert error.value.exit_code == 8
    checkpoints.write(6, {"step": 6}, tensors)
    with (
        file_size(1000),
        pytest.raises(StorageError, match=r"step-000009: .*step-000006 is complete: continue with --resume"),
    ):
        checkpoints.write(9, {"step": 9}, tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000006"]
    assert checkpoints.latest().state == {"step": 6}


def test_no_pickle_in_a_checkpoint(tmp_path):
    engine = build(tmp_path, method="adaptive")
    engine.train()
    suffixes = {p.suffix for p in engine.checkpoints.path(12).iterdir()}
    assert suffixes == {".json", ".safetensors"}


def test_metrics_lines_are_whole_and_a_resume_drops_the_ones_after_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, log_steps=2)
    build(method="adaptive", steps=6, listener=log).train()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]
    assert set(lines[1]) == {"step", "epoch", "source", "loss", "lr", "grad_norm", "phi", "tokens", "seconds"}
    assert [line["step"] for line in lines if "valid_loss" in line] == [0, 3, 6]

    path.write_bytes(path.read_bytes() + b'[1]\n5\n"\xff"\n{"step": 7, "lo')  # and what somebody wrote into it
    MetricsLog(path, log_steps=2, first_step=4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 2, 3, 4]


def test_a_disk_that_is_full_in_the_middle_of_a_line_leaves_whole_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, log_steps=1)
    steps = [Stepped(step, 0.1, "dataset", 1.0, 1e-3, 1.0, 0.0, 8, 0.1, {}) for step in range(1, 30)]
    with file_size(1000), pytest.raises(StorageError, match=f"cannot write {path}: .*continue"):
        [*map(log, steps)]
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) > 5


def test_a_resume_from_before_the_first_validation_does_not_keep_what_that_said_of_step_0(tmp_path):
    """It was written at the first validation, after the checkpoint, and will be written again."""
    path, log = tmp_path / "metrics.jsonl", None
    log = MetricsLog(path, log_steps=4)
    for step in range(1, 7):
        log(Stepped(step, 0.1, "dataset", 1.0, 1e-3, 1.0, 0.0, 8, 0.1, {}))
    for step in (0, 6):
        log(Validated(step, 2.0, 0.0, False, False, {}))

    def kept(**resumed):
        MetricsLog(path, log_steps=4, **resumed)
        return [(line["step"], "loss" in line) for line in map(json.loads, path.read_text().splitlines())]

    assert kept(first_step=6) == [(4, True), (0, False), (6, False)]
    assert kept(first_step=5, validated=False) == [(4, True)]


def test_the_teacher_is_neither_trained_nor_saved_with_the_student():
    engine = build(method="off")
    before = copy.deepcopy(engine.teacher.model.model.state_dict())
    engine.train()
    assert all(torch.equal(before[k], v) for k, v in engine.teacher.model.model.state_dict().items())
    mine = {id(p) for p in engine.student_loss.parameters()}
    assert mine == {id(p) for p in engine.student_loss.student.model.parameters()}


def test_checkpoints_are_announced(tmp_path):
    events = []
    build(tmp_path, method="sft", steps=4, save_steps=2, listener=events.append).train()
    assert [e.step for e in events if isinstance(e, Saved)] == [2, 4]


def test_a_student_that_diverges_while_it_samples_stops_the_run_as_a_loss_that_does(tmp_path):
    """Its weights after step 2 are numbers still, its logits no more; the error says what a lower rate would have mended."""
    engine = build(tmp_path, method="on", steps=6)

    def explode(event):
        if isinstance(event, Stepped) and event.step == 2:
            for block in engine.student_loss.student.model.transformer.h:
                block.mlp.c_fc.weight.data.fill_(1e38)

    engine.emit = explode
    with pytest.raises(NonFiniteError, match=r"at step 3 \(rollout batch\); nothing was applied; lower --lr") as error:
        engine.train()
    assert error.value.exit_code == 6
    assert engine.state.step == 2
    with pytest.raises(NonFiniteError, match="at step 3"):
        resume(tmp_path, "on", steps=6).train()


@pytest.mark.parametrize(
    ("method", "objective"),
    [
        ("sft", None),
        ("off", schema.ObjectiveConfig(divergence="atkd")),  # looks at the whole step first
        ("adaptive", None),
    ],
)
def test_where_memory_runs_out_micro_batches_are_halved_and_the_weights_are_the_same(method, objective):
    """Memory for three sequences of the four: said once, and the gradients are those of the whole batch."""

    def trained(rows):
        events = []
        engine = build(method=method, objective=objective, backbone=student("llama"), steps=6, listener=events.append)
        memory = Narrow(engine.student_loss, rows)
        engine.train()
        assert memory.refused == (rows < 4)
        return engine, [e.text for e in events if isinstance(e, Warned) and "decoding" not in e.text]

    (whole, silence), (halved, said) = trained(rows=4), trained(rows=3)
    assert silence == []
    assert said == ["out of memory with micro-batches of 4 sequences: continuing with 2, same batches"]
    for name, expected in weights(whole).items():
        assert_close(weights(halved)[name], expected, atol=2e-5, rtol=1e-4, msg=name)
    assert halved.state.valid_loss == pytest.approx(whole.state.valid_loss, abs=1e-4)
    assert halved.state.sources == whole.state.sources


def test_another_attempt_begins_with_what_torch_kept_of_a_gpus_memory_given_back(monkeypatch):
    """Smaller pieces alone free nothing for a library that takes memory of its own, as cuBLAS does."""
    freed = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))

    def attempt():
        if not freed:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return "done"

    assert retry_halved(attempt, halve=lambda: bool(freed)) == "done"


def test_where_memory_runs_out_held_out_rows_are_taken_in_smaller_batches():
    said, backbone = [], student("llama")
    rows = tiny.sequences([(4, 3), (5, 4), (3, 2), (6, 1), (2, 5), (3, 3), (4, 4)], vocab=len(TOKENIZER), seed=9)
    held_out = Validator([rows[:5], rows[5:]], RunInfo(steps=1, steps_per_epoch=1), listener=said.append)
    objective = StudentLoss(backbone, objectives.build(None))
    with torch.no_grad():
        expected = held_out.mean(CROSS_ENTROPY, objective)
        memory = Narrow(objective, 3)
        assert held_out.mean(CROSS_ENTROPY, objective) == pytest.approx(expected, rel=1e-5)
        assert held_out.mean(CROSS_ENTROPY, objective) == pytest.approx(expected, rel=1e-5)
        memory.rows = 0
        with pytest.raises(torch.OutOfMemoryError):
            held_out.mean(CROSS_ENTROPY, objective)
    counts = [5, 2, 1]
    assert said == [
        Warned(f"out of memory with {rows} held-out rows per batch: continuing with {fewer}, same loss")
        for rows, fewer in pairwise(counts)
    ]


@pytest.mark.parametrize("method", ["sft", "off", "on", "adaptive"])
def test_a_step_that_memory_does_not_suffice_for_costs_no_step_before_it(tmp_path, method):
    """Not one sequence fits at step 6. With more memory the run goes on to the weights of one that never lacked any:
    dropout, replay, and the outputs that the failed step had already drawn."""
    torch.manual_seed(5)
    whole = build(method=method)
    whole.train()

    torch.manual_seed(5)
    engine = build(tmp_path, method=method)
    memory = Narrow(engine.student_loss, 4)

    def shrink(event):
        if isinstance(event, Stepped) and event.step == 5:
            memory.rows = 0

    engine.emit = shrink
    with pytest.raises(OutOfMemoryError, match=r"at step 6 .*nothing was applied; continue with --resume") as error:
        engine.train()
    assert error.value.exit_code == 7
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]

    resumed = resume(tmp_path, method)
    resumed.train()
    assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    assert (resumed.state.sources, resumed.pool.counts) == (whole.state.sources, whole.pool.counts)
    assert resumed.state.valid_loss == whole.state.valid_loss


def test_what_the_teacher_said_in_a_step_that_failed_is_asked_again_in_the_same_company(tmp_path):
    """A batch from the buffer, in part of outputs that wait again after the failure: with the rest of it known already the
    teacher would see another batch shape, and its answer would round otherwise."""
    settings = {"method": "adaptive", "cached": True, "steps": 24, "schedule": {"fresh": "buffer"}}

    def failing(at):
        torch.manual_seed(5)
        engine = build(tmp_path / str(at), **settings)
        memory = Narrow(engine.student_loss, 4)

        def shrink(event):
            if isinstance(event, Stepped) and event.step == at:
                memory.rows, failing.cached = 0, cached_rollouts(engine)

        engine.emit = shrink
        with pytest.raises(OutOfMemoryError):
            engine.train()
        return engine

    torch.manual_seed(5)
    whole = build(**settings)
    whole.train()
    for at in (10, 11, 13, 14):
        assert cached_rollouts(failing(at)) == failing.cached
        resumed = resume(tmp_path / str(at), **settings)
        resumed.train()
        assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------- what a run says of itself


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
def test_losses_are_named_after_what_they_are(objective, name, held_out):
    criterion = objectives.build(None if objective is None else schema.ObjectiveConfig(**objective))
    assert (criterion.name, criterion.held_out_name) == (name, held_out)


def told_of_phi(epsilon=100.0, steps=8, validation=True, **more):
    """Events of a run whose φ never rises, and what it says at half time."""
    events = []
    engine = build(steps=steps, listener=events.append, **{"eval_steps": 2} | more)
    engine.scheduler.config = engine.scheduler.config.model_copy(update={"epsilon": epsilon})
    if not validation:
        engine.validator.batches = []
    engine.train()
    waits = [(i, e.text) for i, e in enumerate(events) if isinstance(e, Note) and e.text.startswith("half of the")]
    return events, waits


def test_at_half_time_a_run_says_what_phi_waits_for():
    events, [(at, text)] = told_of_phi()
    assert sum(isinstance(e, Stepped) for e in events[:at]) == 4
    first, *_, now = [e for e in events[:at] if isinstance(e, Validated)]
    assert first.trigger == first.valid_loss + 100
    assert f"φ is 0; it rises by 0.33 at a valid CE of {first.trigger:.3f} or more (now {now.valid_loss:.3f}; " in text
    assert f"{first.valid_loss:.3f} at first, schedule.epsilon 100); 2 validations left; to use" in text
    assert "--set schedule.phi=0.2" in text


@pytest.mark.parametrize(
    ("epsilon", "moved"),
    [(100.0, "risen by 100 or more"), (-0.5, "fallen by 0.5 or less"), (0.0, "fallen by 0 or less")],
)
def test_half_time_before_the_first_validation_says_what_raises_phi(epsilon, moved):
    engine = build(steps=8, listener=lambda _: None, eval_steps=100)
    engine.scheduler.config = engine.scheduler.config.model_copy(update={"epsilon": epsilon})
    engine.state.step = 4
    text = phi_advice(engine)
    assert f"at a validation where valid CE has {moved} since before training, with no validation so far (1 " in text


def test_half_time_without_a_validation_or_held_out_rows():
    _, [(_, text)] = told_of_phi(validation=False)
    assert "it cannot rise without held-out rows; set some with --set data.valid=PATH" in text


@pytest.mark.parametrize("more", [{"epsilon": -10.0}, {"method": "off"}, {"method": "on"}, {"steps": 1}])
def test_half_time_is_silent_where_there_is_nothing_to_wait_for(more):
    assert told_of_phi(**more)[1] == []


def test_a_run_opens_with_its_phi_and_what_raises_it():
    events, _ = told_of_phi(epsilon=0.1)
    assert (events[0].phi, events[0].epsilon, events[0].trigger, events[0].loss) == (0.0, 0.1, None, "skl")
