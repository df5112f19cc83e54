"""Test the losses with one divergence per source, f-distill and DistiLLM-2, against the papers' formulas in float64."""

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
from tests.resource_limits import LimitedBatch
from tests.unit import test_trainer as runs

DISTILLM2 = {"divergence": "skl", "by_source": True, "curriculum": "on", "reduction": "sequence"}


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def skl(p, q, a):
    return kl(p, a * p + (1 - a) * q)


def srkl(p, q, a):
    return kl(q, (1 - a) * p + a * q)


def tables(engine, sequences):
    """Yield the teacher's and student's next-token distributions of each sequence, in float64."""
    for s in sequences:
        batch = runs.tiny.collate([s])
        p = runs.own_logits(engine.teacher.model, batch).detach().softmax(-1)
        yield p, runs.own_logits(engine.student_loss.student, batch).softmax(-1)


def teacher_and_student_batches():
    """Return teacher and student samples of three prompts.

    The student's are much longer, so that a mean over all tokens differs from a mean over sequences.
    """
    written = runs.tiny.sequences([(4, 2), (3, 3), (5, 2)], vocab=20, seed=1)
    generated = [
        Sequence(s.prompt, longer.response, s.row)
        for s, longer in zip(written, runs.tiny.sequences([(4, 9), (3, 7), (5, 8)], vocab=20, seed=2), strict=True)
    ]
    return [SourceBatch(Source.TEACHER, written), SourceBatch(Source.ROLLOUT, generated)]


def expected_loss(engine, parts, forward, reverse, w, per_sequence):
    """Return (1−w)·mean of the forward divergence on teacher samples + w·mean of the reverse one on student samples."""
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
    "DistiLLM-2 reference code": (
        {"divergence": "skl", "by_source": True, "reduction": "sequence"},
        lambda p, q: skl(p, q, 0.1),
        lambda p, q: srkl(p, q, 0.1),
    ),
    "kl forward, rkl reverse": (
        {"divergence": "kl", "by_source": True},
        kl,
        lambda p, q: kl(q, p),
    ),
}  # fmt: skip


def trainer_with(config, **settings):
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
    parameters = list(engine.student_loss.parameters())
    engine.optimizer = torch.optim.SGD([{"params": parameters, "lr_ratio": 1.0}], lr=1.0)
    return engine


@pytest.mark.parametrize("batch_size", [8, 2])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_of_step_match_the_paper(name, batch_size):
    fields, forward, reverse = CASES[name]
    engine, parts = trainer_with(schema.ObjectiveConfig(**fields), batch_size=batch_size), teacher_and_student_batches()
    before = runs.weights(engine)
    loss, _ = runs.step_on(engine, parts)
    updates = {name: before[name] - value for name, value in runs.weights(engine).items()}

    reference = trainer_with(schema.ObjectiveConfig(**fields))
    expected = expected_loss(reference, parts, forward, reverse, 0.5, fields.get("reduction") == "sequence")
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in reference.student_loss.named_parameters():
        assert_close(updates[name], parameter.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("rows", [100, 2])
def test_curriculum_matches_distillm2_formula(rows):
    """Check loss, gradient, α and the weight of each half over six steps, two per epoch.

    rows: the number of rows for which there is memory once the gaps are measured. With too little memory the step is
    retried, and the gaps must count once.
    """
    config = schema.ObjectiveConfig(**DISTILLM2)
    engine = trainer_with(config, steps=6, lr=0.3)
    engine.student_loss.criterion = criterion = objectives.build(config, epochs=3.0)
    begin_step, memory = criterion.begin_step, LimitedBatch(engine.student_loss, 100)

    def begin_step_and_shrink(*args):
        token_weights = begin_step(*args)
        memory.rows = rows
        return token_weights

    criterion.begin_step = begin_step_and_shrink
    gaps, all_alphas = {FORWARD: [], REVERSE: []}, []
    for step in range(6):
        parts = teacher_and_student_batches()
        means = []
        for part, sign in zip(parts, (1, -1), strict=True):
            found = []
            for s, (p, q) in zip(part.sequences, tables(engine, part.sequences), strict=True):
                target_ids = torch.from_numpy(s.response.astype(np.int64))[:, None]
                geometric = [x.gather(-1, target_ids).log().mean().exp().item() for x in (p, q)]
                found.append(sign * (geometric[0] - geometric[1]))
            means.append(found)
        alphas = []
        for half, found in zip((FORWARD, REVERSE), means, strict=True):
            previous_gaps = [g for e, g in gaps[half] if e == step // 2 - 1]
            m, gap = (sum(previous_gaps) / len(previous_gaps) if previous_gaps else 0.0), sum(found) / len(found)
            alpha = 0.1 if m <= 0 else 0.01 if gap <= 0 else min(max(1 - 0.9 * m / gap, 0.01), 0.1)
            alphas.append(alpha)
            gaps[half] += [(step // 2, g) for g in found]
        w = 0.5 + 0.5 * (step + 1) / 6
        expected = expected_loss(
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
        all_alphas += alphas
    assert all_alphas[:4] == [0.1] * 4  # α is fixed in the first epoch
    assert len({round(a, 6) for a in all_alphas}) > 2
    assert memory.refused == (0 if rows == 100 else 6)


def test_alpha_is_smaller_for_easy_batches_and_bounded():
    criterion = DistiLLM2(schema.ObjectiveConfig(**DISTILLM2), epochs=2.0)
    criterion.previous_gaps = {FORWARD: 0.2, REVERSE: -0.1}
    assert criterion._alpha(FORWARD, 0.2) == pytest.approx(0.1)  # as hard as the average of the previous epoch
    assert criterion._alpha(FORWARD, 0.19) == pytest.approx(1 - 0.9 * 0.2 / 0.19)
    assert criterion._alpha(FORWARD, 0.5) == 0.1
    assert criterion._alpha(FORWARD, 0.05) == criterion._alpha(FORWARD, -0.3) == 0.01
    assert criterion._alpha(REVERSE, 0.3) == 0.1  # the student was better on average: there is nothing to compare with


def test_curriculum_state_is_restored_from_checkpoint():
    first, config = DistiLLM2(schema.ObjectiveConfig(**DISTILLM2), epochs=3.0), schema.ObjectiveConfig(**DISTILLM2)
    parts = teacher_and_student_batches()
    torch.manual_seed(0)
    readings = [
        TokenLogProbs(*(torch.rand(sum(len(s.response) for s in part.sequences)).log() for _ in "pq")) for part in parts
    ]
    for step in range(9):  # three steps per epoch
        first.begin_step(parts, readings, (step + 1) / 9)
        assert first.epoch == step // 3
        second = DistiLLM2(config, epochs=3.0)
        second.load_state_dict(first.state_dict())
        for criterion in (first, second):
            criterion.begin_step(parts, readings, (step + 1) / 9)
        assert first.state_dict() == second.state_dict()
    weights = [first.student_weight(progress) for progress in (0, 0.5, 1)]
    assert weights == [0.5, 0.75, 1.0]


def test_by_source_scales_the_weights_of_each_source():
    criterion = FDistill(schema.ObjectiveConfig(divergence="jsd", beta=0.3, by_source=True, kd_weight=0.8))
    criterion.begin_step([SourceBatch(Source.REPLAY, teacher_and_student_batches()[1].sequences)], [], 0.5)
    row, replayed = criterion.weights(Source.DATASET), criterion.weights(Source.REPLAY)
    assert (row.kd, row.ce) == pytest.approx((0.8 * 0.6, 0.2))
    assert (replayed.kd, replayed.ce) == pytest.approx((0.8 * 1.4, 0.0))
    assert type(objectives.build(schema.ObjectiveConfig())) is KD


def test_cross_entropy_applies_to_teacher_samples():
    loss_weights = KD(schema.ObjectiveConfig(kd_weight=0.0)).weights(Source.TEACHER)
    assert (loss_weights.kd, loss_weights.ce) == (0.0, 1.0)
    assert math.isclose(KD(schema.ObjectiveConfig(kd_weight=0.3)).weights(Source.ROLLOUT).ce, 0.0)


def test_curriculum_requires_skewed_divergence_by_source():
    for fields in ({"divergence": "jsd"}, {"by_source": False}, {"alpha": 0.0}):
        with pytest.raises(ValidationError, match="curriculum"):
            schema.ObjectiveConfig(**DISTILLM2 | fields)
