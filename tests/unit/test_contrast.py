"""Divergences by halves: f-distill's JSD and DistiLLM-2's pair, against their papers' formulas in float64."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from distillm_cli.config import schema
from distillm_cli.losses import objectives
from distillm_cli.losses.objectives import (
    FORWARD,
    KD,
    REVERSE,
    DistiLLM2,
    FDistill,
    SourceBatch,
    TokenLogProbs,
)
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.types import Sequence
from tests.resource_limits import LimitedBatch as Narrow
from tests.unit import test_trainer as runs

DISTILLM2 = {"divergence": "skl", "by_source": True, "curriculum": "on", "reduction": "sequence"}


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def skl(p, q, a):
    return kl(p, a * p + (1 - a) * q)


def srkl(p, q, a):
    return kl(q, (1 - a) * p + a * q)


def tables(engine, sequences):
    """Teacher's and student's next-token distributions of each sequence, by the models' own forward pass, float64."""
    for s in sequences:
        batch = runs.tiny.collate([s])
        p = runs.own_logits(engine.teacher.model, batch).detach().softmax(-1)
        yield p, runs.own_logits(engine.student_loss.student, batch).softmax(-1)


def pair_of_parts():
    """The two samples of three prompts; the student's are much longer, so that a mean over all tokens would show."""
    written = runs.tiny.sequences([(4, 2), (3, 3), (5, 2)], vocab=20, seed=1)
    said = [
        Sequence(s.prompt, longer.response, s.row)
        for s, longer in zip(written, runs.tiny.sequences([(4, 9), (3, 7), (5, 8)], vocab=20, seed=2), strict=True)
    ]
    return [SourceBatch(Source.TEACHER, written), SourceBatch(Source.ROLLOUT, said)]


def by_hand(engine, parts, forward, reverse, w, per_sequence):
    """(1−w)·mean of the forward half over the teacher's part + w·mean of the reverse half over the student's."""
    total = 0
    for part, half, weight in zip(parts, (forward, reverse), (1 - w, w), strict=True):
        values = [half(p, q) for p, q in tables(engine, part.sequences)]
        mean = torch.stack([v.mean() for v in values]).mean() if per_sequence else torch.cat(values).mean()
        total = total + weight * mean
    return total


CASES = {
    "f-distill, JS": (
        {"divergence": "jsd", "beta": 0.5, "by_source": True},
        lambda p, q: skl(p, q, 0.5),
        lambda p, q: srkl(p, q, 0.5),
    ),
    "f-distill, TVD": ({"divergence": "tvd", "by_source": True}, *[lambda p, q: 0.5 * (p - q).abs().sum(-1)] * 2),
    "f-distill, JS with β = .85": (
        {"divergence": "jsd", "beta": 0.85, "by_source": True},
        lambda p, q: 1.7 * kl(p, 0.85 * p + 0.15 * q),
        lambda p, q: 0.3 * kl(q, 0.85 * p + 0.15 * q),
    ),
    "DistiLLM-2 as released": (
        {"divergence": "skl", "by_source": True, "reduction": "sequence"},
        lambda p, q: skl(p, q, 0.1),
        lambda p, q: srkl(p, q, 0.1),
    ),
    "kl on one side, rkl on the other": (
        {"divergence": "kl", "by_source": True},
        kl,
        lambda p, q: kl(q, p),
    ),
}  # fmt: skip


def engine_of(config, **settings):
    settings = {
        "method": "off",
        "steps": 1,
        "clip": 0.0,
        "lr": 1.0,
        "backbone": runs.student("llama").double(),
    } | settings
    engine = runs.build(**settings)
    engine.teacher.model.double()
    engine.student_loss.criterion = objectives.build(config)
    engine.optimizer = torch.optim.SGD(engine.student_loss.parameters(), lr=1.0)
    return engine


@pytest.mark.parametrize("batch_size", [8, 2])
@pytest.mark.parametrize("name", CASES)
def test_a_steps_loss_and_gradient_are_the_papers(name, batch_size):
    fields, forward, reverse = CASES[name]
    engine, parts = engine_of(schema.ObjectiveConfig(**fields), batch_size=batch_size), pair_of_parts()
    before = runs.weights(engine)
    loss, _ = runs.step_on(engine, parts)
    ours = {name: before[name] - value for name, value in runs.weights(engine).items()}

    reference = engine_of(schema.ObjectiveConfig(**fields))
    expected = by_hand(reference, parts, forward, reverse, 0.5, fields.get("reduction") == "sequence")
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in reference.student_loss.named_parameters():
        assert_close(ours[name], parameter.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("rows", [100, 2])
def test_the_curriculum_is_distillm2s_over_three_epochs_by_hand(rows):
    """Value, gradient, α and the growing weight of a run of six steps, two an epoch, with the gaps measured by hand.

    rows: what there is memory for once the gaps are known. With too little the step is taken anew, and they count once.
    """
    config = schema.ObjectiveConfig(**DISTILLM2)
    engine = engine_of(config, steps=6, lr=0.3)
    engine.student_loss.criterion = criterion = objectives.build(config, epochs=3.0)
    begin_step, memory = criterion.begin_step, Narrow(engine.student_loss, 100)

    def begin_step_and_shrink(*args):
        told = begin_step(*args)
        memory.rows = rows
        return told

    criterion.begin_step = begin_step_and_shrink
    gaps, seen = {FORWARD: [], REVERSE: []}, []
    for step in range(6):
        parts = pair_of_parts()
        means = []
        for part, sign in zip(parts, (1, -1), strict=True):
            found = []
            for s, (p, q) in zip(part.sequences, tables(engine, part.sequences), strict=True):
                at = torch.from_numpy(s.response.astype(np.int64))[:, None]
                geometric = [x.gather(-1, at).log().mean().exp().item() for x in (p, q)]
                found.append(sign * (geometric[0] - geometric[1]))
            means.append(found)
        alphas = []
        for half, found in zip((FORWARD, REVERSE), means, strict=True):
            earlier = [g for e, g in gaps[half] if e == step // 2 - 1]
            m, gap = (sum(earlier) / len(earlier) if earlier else 0.0), sum(found) / len(found)
            alpha = 0.1 if m <= 0 else 0.01 if gap <= 0 else min(max(1 - 0.9 * m / gap, 0.01), 0.1)
            alphas.append(alpha)
            gaps[half] += [(step // 2, g) for g in found]
        w = 0.5 + 0.5 * (step + 1) / 6
        expected = by_hand(
            engine, parts, lambda p, q, a=alphas[0]: skl(p, q, a), lambda p, q, a=alphas[1]: srkl(p, q, a), w, True
        )
        gradients = torch.autograd.grad(expected, list(engine.student_loss.parameters()))
        before = runs.weights(engine)
        engine.state.step = step
        engine.recovery.max_rows, memory.rows = engine.config.batch_size, 100
        loss, lr = runs.step_on(engine, parts)
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        assert [criterion.alphas[FORWARD], criterion.alphas[REVERSE]] == pytest.approx(alphas, rel=1e-6)
        for (name, value), gradient in zip(runs.weights(engine).items(), gradients, strict=True):
            assert_close(before[name] - value, lr * gradient, rtol=1e-5, atol=1e-8)
        seen += alphas
    assert seen[:4] == [0.1] * 4  # the first epoch's are fixed
    assert len({round(a, 6) for a in seen}) > 2
    assert memory.refused == (0 if rows == 100 else 6)


def test_easy_batches_get_less_skew_within_the_bounds():
    criterion = DistiLLM2(schema.ObjectiveConfig(**DISTILLM2), epochs=2.0)
    criterion.previous_gaps = {FORWARD: 0.2, REVERSE: -0.1}
    assert criterion._alpha(FORWARD, 0.2) == pytest.approx(0.1)  # as hard as usual
    assert criterion._alpha(FORWARD, 0.19) == pytest.approx(1 - 0.9 * 0.2 / 0.19)
    assert criterion._alpha(FORWARD, 0.5) == 0.1
    assert criterion._alpha(FORWARD, 0.05) == criterion._alpha(FORWARD, -0.3) == 0.01
    assert criterion._alpha(REVERSE, 0.3) == 0.1  # the student had caught up: nothing to compare with


def test_the_curriculum_survives_in_a_checkpoint_and_knows_its_epoch_from_the_progress():
    first, config = DistiLLM2(schema.ObjectiveConfig(**DISTILLM2), epochs=3.0), schema.ObjectiveConfig(**DISTILLM2)
    parts = pair_of_parts()
    torch.manual_seed(0)
    readings = [
        TokenLogProbs(*(torch.rand(sum(len(s.response) for s in part.sequences)).log() for _ in "pq")) for part in parts
    ]
    for step in range(9):  # three steps an epoch
        first.begin_step(parts, readings, (step + 1) / 9)
        assert first.epoch == step // 3
        second = DistiLLM2(config, epochs=3.0)
        second.load_state_dict(first.state_dict())
        for criterion in (first, second):
            criterion.begin_step(parts, readings, (step + 1) / 9)
        assert first.state_dict() == second.state_dict()
    weights = [first.student_weight(progress) for progress in (0, 0.5, 1)]
    assert weights == [0.5, 0.75, 1.0]


def test_by_source_under_other_schedules_gives_each_source_its_half():
    criterion = FDistill(schema.ObjectiveConfig(divergence="jsd", beta=0.3, by_source=True, kd_weight=0.8))
    criterion.begin_step([SourceBatch(Source.REPLAY, pair_of_parts()[1].sequences)], [], 0.5)
    row, replayed = criterion.weights(Source.DATASET), criterion.weights(Source.REPLAY)
    assert (row.kd, row.ce) == pytest.approx((0.8 * 0.6, 0.2))
    assert (replayed.kd, replayed.ce) == pytest.approx((0.8 * 1.4, 0.0))
    assert type(objectives.build(schema.ObjectiveConfig())) is KD


def test_cross_entropy_is_for_teacher_samples_as_for_rows():
    terms = KD(schema.ObjectiveConfig(kd_weight=0.0)).weights(Source.TEACHER)
    assert (terms.kd, terms.ce) == (0.0, 1.0)
    assert math.isclose(KD(schema.ObjectiveConfig(kd_weight=0.3)).weights(Source.ROLLOUT).ce, 0.0)


def test_a_curriculum_without_skewed_halves_is_refused():
    for fields in ({"divergence": "jsd"}, {"by_source": False}, {"alpha": 0.0}):
        with pytest.raises(ValidationError, match="curriculum"):
            schema.ObjectiveConfig(**DISTILLM2 | fields)
