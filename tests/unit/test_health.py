"""Test the figures of a run's health against plain computations in float64."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from distillm_cli.config.schema import ObjectiveConfig, ScheduleConfig
from distillm_cli.losses import objectives
from distillm_cli.losses.fused import AGREEMENT_FIGURES, token_agreement
from distillm_cli.losses.objectives import SourceBatch
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.models.backbone import Backbone, Head
from distillm_cli.rollouts.pool import SequencePool, pack, unpack
from distillm_cli.rollouts.scheduler import Source, build_scheduler
from distillm_cli.training.health import SAMPLE_TOKENS, StepHealth, output_figures
from distillm_cli.training.recovery import MicroBatch
from distillm_cli.training.validation import sample_rows
from distillm_cli.types import Rollout, collate
from tests import tiny

TOKENIZER = tiny.tokenizer()
V = len(TOKENIZER)
ROWS = tiny.sequences([(2 + i % 4, 1 + i % 7) for i in range(90)], vocab=V, seed=3)


def reference(q_NV, p_NV):
    """Return the columns of ``token_agreement`` for two tables of logits, token by token."""
    found = []
    for q, p in zip(q_NV.double().softmax(-1), p_NV.double().softmax(-1), strict=True):
        top = min(16, len(q))
        shared = set(q.argsort(descending=True)[:top].tolist()) & set(p.argsort(descending=True)[:top].tolist())
        entropies = [-(side * side.log()).sum().item() for side in (q, p)]
        tvd = 0.5 * (p - q).abs().sum().item()
        found.append([*entropies, len(shared) / top, p[sorted(shared)].sum().item(), 1 - tvd])
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("vocab", [50, 9])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_agreement_is_that_of_whole_tables(vocab, softcap):
    torch.manual_seed(0)
    student = Head(torch.randn(vocab, 8, dtype=torch.float64), bias_V=torch.randn(vocab).double(), softcap=softcap)
    teacher = Head(torch.randn(vocab, 12, dtype=torch.float64), scale=0.5)
    hidden_ND, teacher_hidden_ND = torch.randn(11, 8).double(), torch.randn(11, 12).double()
    q_NV = hidden_ND @ student.weight_VD.T + student.bias_V
    if softcap:
        q_NV = softcap * torch.tanh(q_NV / softcap)
    expected = reference(q_NV, 0.5 * teacher_hidden_ND @ teacher.weight_VD.T)
    found = token_agreement(hidden_ND, student, teacher_hidden_ND, teacher, chunk=4)
    assert_close(found, expected)


def test_equal_models_agree_fully():
    head = Head(torch.randn(40, 8))
    hidden_ND = torch.randn(5, 8)
    figures = dict(
        zip(AGREEMENT_FIGURES, token_agreement(hidden_ND, head, hidden_ND, head).mean(0).tolist(), strict=True)
    )
    assert figures["top16_overlap"] == 1
    assert figures["acceptance"] == pytest.approx(1)
    assert figures["student_entropy"] == figures["teacher_entropy"]


def measured(rows_each, *, teacher=True):
    """Return the figures of a step on ROWS in micro-batches of so many rows, and the logits of all its tokens."""
    models = [Backbone(tiny.model("llama", V, seed=seed).double(), TOKENIZER) for seed in (1, 2)]
    student_loss = StudentLoss(models[0], objectives.build(ObjectiveConfig()), teacher_head=models[1].head()).train()
    scheduler = build_scheduler(ScheduleConfig(kind="off"), steps=10, seed=0, batches=1)
    health = StepHealth(student_loss, SequencePool(lambda step: ROWS, scheduler), every=5, log_steps=1)
    micros = [MicroBatch(Source.DATASET, [ROWS[i : i + rows_each]]) for i in range(0, len(ROWS), rows_each)]
    tables = [[], []]
    health.begin_attempt(5, micros)
    for micro in micros:
        batch = collate(micro.groups[0])
        hidden = [model.hidden(batch).detach() for model in models]
        health.observe(micro)
        weights = student_loss.criterion.weights(Source.DATASET) if teacher else objectives.CROSS_ENTROPY
        student_loss([batch], hidden[1] if teacher else None, weights)
        for table, states_ND, model in zip(tables, hidden, models, strict=True):
            table.append(states_ND @ model.head().weight_VD.T)
    return health.figures([SourceBatch(Source.DATASET, ROWS)], 2.0), *map(torch.cat, tables)


def test_a_step_is_measured_on_evenly_spaced_tokens():
    figures, q_NV, p_NV = measured(90)
    N = sum(s.supervised for s in ROWS)
    assert N > SAMPLE_TOKENS
    chosen = [i * N // SAMPLE_TOKENS for i in range(SAMPLE_TOKENS)]
    expected = reference(q_NV[chosen], p_NV[chosen]).mean(0).tolist()
    assert {name: figures[name] for name in AGREEMENT_FIGURES} == pytest.approx(
        dict(zip(AGREEMENT_FIGURES, expected, strict=True)), rel=1e-6
    )
    assert figures["train_tokens_per_second"] == N / 2


def test_micro_batches_do_not_change_the_figures():
    whole, *_ = measured(90)
    parts, *_ = measured(7)
    assert parts == pytest.approx(whole, rel=1e-6)


def test_without_a_teacher_only_the_student_is_measured():
    figures, *_ = measured(90, teacher=False)
    with_teacher, *_ = measured(90)
    assert figures["student_entropy"] == pytest.approx(with_teacher["student_entropy"])
    assert not figures.keys() & {"teacher_entropy", "acceptance"}


def outputs(*responses):
    return [Rollout(np.array([3]), np.array(ids, dtype=np.int32)) for ids in responses]


def test_figures_of_student_outputs():
    found = output_figures(outputs([5, 6, 5, 6, 5], [7, 7, 0], [0], [8, 9]), frozenset({0, 1}))
    assert found["rollout_length"] == 11 / 4
    assert found["rollout_length_p90"] == pytest.approx(np.percentile([5, 3, 1, 2], 90))
    assert found["rollout_cut"] == 2 / 4  # the first and the last have no end
    assert found["rollout_distinct2"] == (2 + 2 + 0 + 1) / (4 + 2 + 0 + 1)


def test_the_step_of_a_rollout_is_in_checkpoints():
    rollouts = outputs([5, 0], [6, 7])
    rollouts[0] = Rollout(rollouts[0].prompt, rollouts[0].response, sampled_at=12)
    assert [s.sampled_at for s in unpack(pack(rollouts, "replay"), "replay")] == [12, None]
    older = {name: tensor for name, tensor in pack(rollouts, "replay").items() if not name.endswith("sampled_at")}
    assert [s.sampled_at for s in unpack(older, "replay")] == [None, None]


def test_sample_of_rows_is_large_enough_and_evenly_spaced():
    chosen = sample_rows(ROWS, least_rows=4, least_tokens=60)
    assert sum(s.supervised for s in chosen) >= 60
    assert chosen == [ROWS[i * 90 // len(chosen)] for i in range(len(chosen))]
    assert sample_rows(ROWS[:3], least_rows=4, least_tokens=60) == ROWS[:3]
