"""Test methods that train on teacher samples, pairs and interleaved drafts: caching by row and exact resumption."""

import json
from functools import cache

import numpy as np
import pytest
import torch

from distillm_cli.config import schema
from distillm_cli.errors import Interrupted
from distillm_cli.models.backbone import Backbone
from distillm_cli.rollouts.interleaved import InterleavedSampler
from distillm_cli.rollouts.pool import ResponseTable, SequencePool
from distillm_cli.rollouts.sampler import ModelSampler
from distillm_cli.rollouts.scheduler import Source, build_scheduler
from distillm_cli.training.checkpoint import Checkpoints
from distillm_cli.training.events import Progress, Stepped
from distillm_cli.types import Rollout, Sequence
from tests import tiny
from tests.codes import raises_code
from tests.marks import long
from tests.resource_limits import LimitedBatch
from tests.unit import test_trainer as runs

ROLLOUT = schema.RolloutConfig(max_new_tokens=5)
METHODS = {
    "seqkd": ({"kd_weight": 0.0}, {"kind": "teacher"}),
    "seqkd, kl": ({"divergence": "kl"}, {"kind": "teacher"}),
    "fdistill": ({"divergence": "jsd", "by_source": True}, {"kind": "pairs"}),
    "distillm2": (
        {"divergence": "skl", "by_source": True, "curriculum": "on", "reduction": "sequence"},
        {"kind": "pairs", "redraw": "epoch"},
    ),
    "skd": ({"divergence": "kl"}, {"kind": "interleaved"}),
}
STEPS = 16  # two and two thirds epochs


def build(method, tmp_path=None, backbone=None, **settings):
    """Build a small run of this method with dropout.

    The teacher's states are cached for methods that use samples repeatedly.
    """
    objective, schedule = METHODS[method]
    schedule = dict(schedule)

    def sampler(student, teacher):
        accept = ROLLOUT.model_copy(update={"accept": 5})
        return InterleavedSampler(student, teacher, accept, ROLLOUT, max_length=16, seed=5)

    def responses(student, teacher, rows, steps_per_epoch):
        redraw = schedule.get("redraw") == "epoch"
        common = {"rows": rows, "steps": STEPS, "steps_per_epoch": steps_per_epoch, "bulk": 2, "redraw": redraw}
        teacher_sampler = ModelSampler(teacher, ROLLOUT, max_length=16, seed=105, by_row=True)
        found = {Source.TEACHER: ResponseTable(teacher_sampler, **common)}
        if redraw:
            student_sampler = ModelSampler(student, ROLLOUT, max_length=16, seed=5, by_row=True)
            found[Source.ROLLOUT] = ResponseTable(student_sampler, whole_epochs=True, **common)
        return found

    is_interleaved = schedule["kind"] == "interleaved"
    engine = runs.build(
        tmp_path,
        method=schedule["kind"],
        steps=STEPS,
        backbone=backbone,
        objective=schema.ObjectiveConfig(**objective),
        schedule=schedule,
        sampler=sampler if is_interleaved else None,
        responses=None if is_interleaved else responses,
        cached=True,
        **settings,
    )
    engine.teacher.rows = None  # the cache holds only samples
    return engine


@cache
def trained(method):
    """Return the trainer of an uninterrupted run, which several tests compare with."""
    torch.manual_seed(5)
    uninterrupted = build(method)
    uninterrupted.train()
    return uninterrupted


def check_resumed(method, tmp_path):
    """Check that the run resumed from its newest checkpoint ends exactly like the uninterrupted one."""
    uninterrupted = trained(method)
    found = Checkpoints(tmp_path, lambda path: None, keep=1).latest()
    backbone = runs.student()
    loaded = type(backbone.model).from_pretrained(found.path, dtype=torch.float32)
    backbone.model.load_state_dict(loaded.state_dict())
    resumed = build(method, backbone=backbone)
    torch.manual_seed(999)  # the random state must come from the checkpoint
    resumed.load(found)
    resumed.train()
    for name, value in runs.weights(uninterrupted).items():
        assert torch.equal(runs.weights(resumed)[name], value), name
    assert resumed.state.sources == uninterrupted.state.sources
    assert resumed.pool.counts == uninterrupted.pool.counts
    assert resumed.objective.state_dict() == uninterrupted.objective.state_dict()


@pytest.mark.parametrize("stop", [7, long(12)])
@pytest.mark.parametrize("method", METHODS)
def test_resume_is_bit_exact_for_every_method(tmp_path, method, stop):
    torch.manual_seed(5)
    with pytest.raises(Interrupted):
        build(method, tmp_path, listener=runs._kill_at(stop)).train()
    check_resumed(method, tmp_path)


@pytest.mark.parametrize("completed", [6, long(8)])
@pytest.mark.parametrize("method", METHODS)
def test_out_of_memory_step_is_not_drawn_or_counted_twice(tmp_path, method, completed):
    """Check also the step after the sixth, which begins an epoch and samples new responses."""
    torch.manual_seed(5)
    engine = build(method, tmp_path, eval_steps=1000)
    memory = LimitedBatch(engine.student_loss, 4)

    def shrink(event):
        if isinstance(event, Stepped) and event.step == completed:
            memory.rows = 0

    engine.emit = shrink
    with raises_code("memory.exhausted", f"step {completed + 1} "):
        engine.train()
    check_resumed(method, tmp_path)


def test_steps_and_sampled_sequences_are_counted():
    expected = {  # steps with (rollout, replay, dataset, teacher), sampled by the student and by the teacher
        "seqkd": (0, 0, 0, 16, 0, 24),
        "fdistill": (16, 0, 0, 16, 64, 24),
        "distillm2": (16, 0, 0, 16, 64, 64),
        "skd": (16, 0, 0, 0, 64, 0),
    }
    for method, counts in expected.items():
        events = []
        engine = build(method, listener=events.append)
        state = engine.train()
        sampled = engine.pool.counts
        steps = [state.steps_with(s) for s in (Source.ROLLOUT, Source.REPLAY, Source.DATASET, Source.TEACHER)]
        assert (*steps, sampled.student_sequences, sampled.teacher_sequences) == counts, method
        names = {e.source for e in events if isinstance(e, Stepped)}
        assert names == {"teacher+rollout" if counts[0] and counts[3] else "teacher" if counts[3] else "rollout"}, (
            method
        )


def test_teacher_states_of_a_repeated_sample_are_cached():
    engine = build("seqkd, kl")
    engine.train()
    sampled = engine.pool.responses[Source.TEACHER].sampled.values()
    assert len(sampled) == 24
    assert engine.teacher.tokens == engine.pool.counts.teacher_tokens == sum(len(s.response) for s in sampled)


class RecordingSampler:
    """Return responses (step, row) and record the calls."""

    def __init__(self):
        self.calls = []

    def sample(self, prompts, step):
        self.calls.append((step, [s.row for s in prompts]))
        return [Rollout(s.prompt, np.array([step, s.row], dtype=np.int32), s.row) for s in prompts]


def batches(step):
    rows = tiny.sequences([(3, 1)] * 12, vocab=9, seed=0)
    return [rows[(step * 4 + i) % 12] for i in range(4)]


def answers(samples, steps):
    found = []
    for step in steps:
        drawn = len(samples.sample(step))
        found.append((drawn, [tuple(s.response.tolist()) for s in samples.batch(step)]))
    return found


def test_bulk_sampling_once_or_in_each_epoch():
    once = ResponseTable(RecordingSampler(), rows=batches, steps=7, steps_per_epoch=3, bulk=2)
    assert [drawn for drawn, _ in answers(once, range(7))] == [8, 0, 4, 0, 0, 0, 0]
    assert [len(rows) for _, rows in once.sampler.calls] == [8, 4]

    redrawn = ResponseTable(RecordingSampler(), rows=batches, steps=7, steps_per_epoch=3, bulk=2, redraw=True)
    found = answers(redrawn, range(7))
    assert [drawn for drawn, _ in found] == [8, 0, 4, 8, 0, 4, 4]
    assert [{epoch for epoch, _ in tokens} for _, tokens in found] == [{0}] * 3 + [{1}] * 3 + [{2}]

    events = []
    whole_epochs = ResponseTable(
        RecordingSampler(), rows=batches, steps=7, steps_per_epoch=3, bulk=2, redraw=True, whole_epochs=True,
        listener=events.append,
    )  # fmt: skip
    assert [drawn for drawn, _ in answers(whole_epochs, range(7))] == [12, 0, 0, 12, 0, 0, 4]
    assert [e.done for e in events if isinstance(e, Progress)] == [0, 8, 12] * 2


def test_samples_do_not_depend_on_bulk_size():
    tokenizer = tiny.tokenizer()
    model = Backbone(tiny.model("llama", len(tokenizer), seed=4), tokenizer)
    found = []
    for bulk in (1, 3):
        sampler = ModelSampler(model, ROLLOUT, max_length=16, seed=1, by_row=True)
        samples = ResponseTable(sampler, rows=batches, steps=6, steps_per_epoch=3, bulk=bulk, redraw=True)
        found.append([tokens for _, tokens in answers(samples, range(6))])
    assert found[0] == found[1]
    assert found[0][0] != found[0][3], "another epoch has other samples"


def test_given_samples_alternate_between_epochs():
    rows = tiny.sequences([(3, 1)] * 12, vocab=9, seed=0)
    given = {s.row: [Rollout(s.prompt, np.array([k, s.row], dtype=np.int32), s.row) for k in range(2)] for s in rows}
    for redraw, expected in ((False, [0, 0, 0]), (True, [0, 1, 0])):
        samples = ResponseTable(
            RecordingSampler(), rows=batches, steps=9, steps_per_epoch=3, redraw=redraw, given=given
        )
        found = answers(samples, range(9))
        assert [drawn for drawn, _ in found] == [0] * 9
        assert [tokens[0][0] for _, tokens in found[::3]] == expected
        assert len(samples.given_rollouts) == 24
        assert not samples.sampler.calls


def test_checkpoint_stores_samples_as_tensors(tmp_path):
    build("distillm2", tmp_path).train()
    found = Checkpoints(tmp_path, lambda path: None, keep=1).latest()
    names = {name.rsplit(".", 1)[0] for name in found.tensors}
    assert {"responses.teacher", "responses.rollout"} <= names
    assert set(found.state["objective"]) == {"epoch", "alphas", "before", "sums"}
    json.dumps(found.state)


class HalfRepeatingSampler:
    """Return the row's own response for even rows, and another one for odd rows."""

    def sample(self, prompts, step):
        changed = [s.response if s.row % 2 == 0 else s.response + 1 for s in prompts]
        return [Rollout(s.prompt, response, s.row) for s, response in zip(prompts, changed, strict=True)]


def test_pool_tells_which_share_of_outputs_repeats_the_rows():
    rows = [[Sequence(s.prompt, s.response, 4 * step + i) for i, s in enumerate(batches(0)[:3])] for step in range(3)]
    scheduler = build_scheduler(schema.ScheduleConfig(kind="mixed", mix=0.5), steps=3, seed=1)
    pool = SequencePool(lambda step: rows[step], scheduler, student=HalfRepeatingSampler(), bulk=1)
    shares = []
    for step, source in enumerate((Source.ROLLOUT, Source.DATASET, Source.ROLLOUT)):
        pool.begin_step()
        pool.draw(source, step)
        shares.append(pool.repeats())
    assert shares == [pytest.approx(2 / 3), None, pytest.approx(2 / 3)]
