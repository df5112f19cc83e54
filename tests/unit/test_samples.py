"""Which sequences a step trains on: the teacher's samples, pairs, interleaved drafts; kept by row, and exactly resumed."""

import json

import numpy as np
import pytest
import torch

from distillm_cli.config import schema
from distillm_cli.errors import Interrupted, OutOfMemoryError
from distillm_cli.models.backbone import Backbone
from distillm_cli.rollouts.interleaved import InterleavedSampler
from distillm_cli.rollouts.pool import ResponseTable
from distillm_cli.rollouts.sampler import ModelSampler
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.training.checkpoint import Checkpoints
from distillm_cli.training.events import Progress, Stepped
from distillm_cli.types import Rollout
from tests import tiny
from tests.resource_limits import LimitedBatch as Narrow
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
STEPS = 16  # two epochs and two thirds


def build(method, tmp_path=None, backbone=None, **settings):
    """A small run of this method, dropout on. Its teacher's states are cached where samples come back."""
    objective, schedule = METHODS[method]
    schedule = dict(schedule)

    def sampler(student, teacher):
        accept = ROLLOUT.model_copy(update={"accept": 5})
        return InterleavedSampler(student, teacher, accept, ROLLOUT, max_length=16, seed=5)

    def responses(student, teacher, rows, steps_per_epoch):
        redraw = schedule.get("redraw") == "epoch"
        common = {"rows": rows, "steps": STEPS, "steps_per_epoch": steps_per_epoch, "bulk": 2, "redraw": redraw}
        of_teacher = ModelSampler(teacher, ROLLOUT, max_length=16, seed=105, by_row=True)
        found = {Source.TEACHER: ResponseTable(of_teacher, **common)}
        if redraw:
            of_student = ModelSampler(student, ROLLOUT, max_length=16, seed=5, by_row=True)
            found[Source.ROLLOUT] = ResponseTable(of_student, whole_epochs=True, **common)
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
    engine.teacher.rows = None  # the cache holds samples alone
    return engine


def check_resumed(method, tmp_path, whole):
    """Gone on with from its newest checkpoint, the run ends as ``whole`` did, which nothing stopped: to the last bit."""
    found = Checkpoints(tmp_path, lambda path: None, keep=1).latest()
    backbone = runs.student()
    loaded = type(backbone.model).from_pretrained(found.path, dtype=torch.float32)
    backbone.model.load_state_dict(loaded.state_dict())
    resumed = build(method, backbone=backbone)
    torch.manual_seed(999)  # whatever the random state was, the checkpoint's is what counts
    resumed.load(found)
    resumed.train()
    for name, value in runs.weights(whole).items():
        assert torch.equal(runs.weights(resumed)[name], value), name
    assert resumed.state.sources == whole.state.sources
    assert resumed.pool.counts == whole.pool.counts
    assert resumed.objective.state_dict() == whole.objective.state_dict()


@pytest.mark.parametrize("stop", [7, 12])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_stopped_anywhere_in_an_epoch_goes_on_to_the_same_bits(tmp_path, method, stop):
    torch.manual_seed(5)
    whole = build(method)
    whole.train()

    torch.manual_seed(5)
    with pytest.raises(Interrupted):
        build(method, tmp_path, listener=runs._kill_at(stop)).train()
    check_resumed(method, tmp_path, whole)


@pytest.mark.parametrize("fits", [6, 8])
@pytest.mark.parametrize("method", METHODS)
def test_what_a_step_drew_before_memory_ran_out_is_neither_drawn_nor_counted_again(tmp_path, method, fits):
    """After six steps an epoch begins, and with it samples anew."""
    torch.manual_seed(5)
    whole = build(method)
    whole.train()

    torch.manual_seed(5)
    engine = build(method, tmp_path, eval_steps=1000)
    memory = Narrow(engine.student_loss, 4)

    def shrink(event):
        if isinstance(event, Stepped) and event.step == fits:
            memory.rows = 0

    engine.emit = shrink
    with pytest.raises(OutOfMemoryError, match=f"at step {fits + 1} "):
        engine.train()
    check_resumed(method, tmp_path, whole)


def test_every_step_is_counted_for_what_it_trained_on():
    expected = {  # steps with (rollout, replay, dataset, teacher), sampled by the student and by the teacher
        "seqkd": (0, 0, 0, 16, 0, 24),
        "fdistill": (16, 0, 0, 16, 64, 24),
        "distillm2": (16, 0, 0, 16, 64, 64),
        "skd": (16, 0, 0, 0, 64, 0),
    }
    for method, counts in expected.items():
        events = []
        engine = build(method, listener=events.append)
        at = engine.train()
        sampled = engine.pool.counts
        steps = [at.steps_with(s) for s in (Source.ROLLOUT, Source.REPLAY, Source.DATASET, Source.TEACHER)]
        assert (*steps, sampled.student_sequences, sampled.teacher_sequences) == counts, method
        names = {e.source for e in events if isinstance(e, Stepped)}
        assert names == {"teacher+rollout" if counts[0] and counts[3] else "teacher" if counts[3] else "rollout"}, (
            method
        )


def test_the_teacher_is_asked_once_about_a_sample_that_comes_back():
    engine = build("seqkd, kl")
    engine.train()
    kept = engine.pool.responses[Source.TEACHER].sampled.values()
    assert len(kept) == 24
    assert engine.teacher.tokens == engine.pool.counts.teacher_tokens == sum(len(s.response) for s in kept)


class Counting:
    """The prompts' rows come back as responses, with the turn; what was asked for is remembered."""

    def __init__(self):
        self.asked = []

    def sample(self, prompts, step):
        self.asked.append((step, [s.row for s in prompts]))
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


def test_samples_are_drawn_ahead_in_bulk_once_or_anew_in_each_epoch():
    once = ResponseTable(Counting(), rows=batches, steps=7, steps_per_epoch=3, bulk=2)
    assert [drawn for drawn, _ in answers(once, range(7))] == [8, 0, 4, 0, 0, 0, 0]
    assert [len(rows) for _, rows in once.sampler.asked] == [8, 4]

    redrawn = ResponseTable(Counting(), rows=batches, steps=7, steps_per_epoch=3, bulk=2, redraw=True)
    found = answers(redrawn, range(7))
    assert [drawn for drawn, _ in found] == [8, 0, 4, 8, 0, 4, 4]
    assert [{turn for turn, _ in tokens} for _, tokens in found] == [{0}] * 3 + [{1}] * 3 + [{2}]

    events = []
    ahead = ResponseTable(
        Counting(), rows=batches, steps=7, steps_per_epoch=3, bulk=2, redraw=True, whole_epochs=True,
        listener=events.append,
    )  # fmt: skip
    assert [drawn for drawn, _ in answers(ahead, range(7))] == [12, 0, 0, 12, 0, 0, 4]
    assert [e.done for e in events if isinstance(e, Progress)] == [0, 8, 12] * 2


def test_what_is_drawn_does_not_depend_on_how_much_is_drawn_at_once():
    tokenizer = tiny.tokenizer()
    model = Backbone(tiny.model("llama", len(tokenizer), seed=4), tokenizer)
    found = []
    for bulk in (1, 3):
        sampler = ModelSampler(model, ROLLOUT, max_length=16, seed=1, by_row=True)
        samples = ResponseTable(sampler, rows=batches, steps=6, steps_per_epoch=3, bulk=bulk, redraw=True)
        found.append([tokens for _, tokens in answers(samples, range(6))])
    assert found[0] == found[1]
    assert found[0][0] != found[0][3], "another epoch, other samples"


def test_samples_made_beforehand_are_served_in_turns_where_epochs_redraw():
    rows = tiny.sequences([(3, 1)] * 12, vocab=9, seed=0)
    given = {s.row: [Rollout(s.prompt, np.array([k, s.row], dtype=np.int32), s.row) for k in range(2)] for s in rows}
    for redraw, turns in ((False, [0, 0, 0]), (True, [0, 1, 0])):
        samples = ResponseTable(Counting(), rows=batches, steps=9, steps_per_epoch=3, redraw=redraw, given=given)
        found = answers(samples, range(9))
        assert [drawn for drawn, _ in found] == [0] * 9
        assert [tokens[0][0] for _, tokens in found[::3]] == turns
        assert len(samples.given_rollouts) == 24
        assert not samples.sampler.asked


def test_a_checkpoint_holds_samples_in_plain_tensors(tmp_path):
    build("distillm2", tmp_path).train()
    found = Checkpoints(tmp_path, lambda path: None, keep=1).latest()
    names = {name.rsplit(".", 1)[0] for name in found.tensors}
    assert {"responses.teacher", "responses.rollout"} <= names
    assert set(found.state["objective"]) == {"epoch", "alphas", "before", "sums"}
    json.dumps(found.state)
