"""Test MiniLLM against the paper's formula in float64, the gradient it estimates, and an uninterrupted run."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from distillm_cli.config import schema
from distillm_cli.losses.fused import fused_loss
from distillm_cli.losses.minillm import ClippedSurrogate, MiniLLM, advantages
from distillm_cli.losses.objectives import SourceBatch
from distillm_cli.losses.weights import LossWeights, TokenWeights
from distillm_cli.rollouts.mixture import MixtureSampler
from distillm_cli.rollouts.pool import RoundBuffer
from distillm_cli.rollouts.scheduler import Source, build_scheduler
from distillm_cli.training.checkpoint import Checkpoints
from distillm_cli.training.events import Stepped
from distillm_cli.types import LOG_DRAWN, LOG_P, LOG_Q, Rollout
from tests.unit import test_trainer as runs
from tests.unit.test_fused import Head, rand

V, D, ALPHA = 7, 5, 0.2
MINILLM = {"divergence": "rkl", "policy_gradient": True, "kd_weight": 0.5, "row_weight": 1.0}


def output(*tokens, row=0, log_probs=None):
    return Rollout(np.array([1], np.int32), np.array(tokens, np.int32), row, log_probs_NK=log_probs)


def states(sequences, head, seed):
    """Return hidden states of every sequence, with gradients."""
    return [rand(len(s.response), D, seed=seed + i).requires_grad_() for i, s in enumerate(sequences)]


def log_probs(hidden, head):
    return head.logits(hidden).log_softmax(-1)


def expected_loss(log_q, log_p, y, sampled_log_probs, clip):
    """Return the loss of one output, token by token: MiniLLM's section 2.2 with PPO's clipping.

    log_q: [T, V] with gradients. sampled_log_probs: those of each token when it was drawn.
    """
    T, total = len(y), 0.0
    for t in range(T):
        later_rewards = [sampled_log_probs[k][LOG_P] - sampled_log_probs[k][LOG_Q] for k in range(t + 1, T)]
        R_norm = sum(later_rewards) / len(later_rewards) if later_rewards else 0.0
        w = math.exp(sampled_log_probs[t][LOG_Q] - sampled_log_probs[t][LOG_DRAWN])
        single_step = sum(log_q[t, v].exp() * (log_q[t, v] - log_p[t, v]) for v in range(V))
        rho = (log_q[t, y[t]] - sampled_log_probs[t][LOG_DRAWN]).exp()
        clipped_ratio = min(max(rho.item(), 1 - clip), 1 + clip)
        unclipped = rho * R_norm
        long_term = unclipped if unclipped.item() <= clipped_ratio * R_norm else clipped_ratio * R_norm
        total = total + w * single_step - long_term
    return total


def build_step(clip=0.2, change=0.3, seed=0, **objective):
    """Return two outputs and two rows, with a student that has changed since the outputs were sampled."""
    outputs = [output(3, 0, 5, 2), output(6, 1, 4)]
    rows = [output(2, 2, 0, row=1), output(5, row=2)]
    head, teacher_head = Head(rand(V, D, seed=1).requires_grad_()), Head(rand(V, D, seed=2))
    criterion = MiniLLM(schema.ObjectiveConfig(**MINILLM | {"ratio_clip": clip} | objective))
    student, teacher = states(outputs + rows, head, 10 + seed), states(outputs + rows, teacher_head, 20 + seed)
    sampled_log_probs = []
    for i, (s, h, g) in enumerate(zip(outputs, student, teacher, strict=False)):
        indices = (torch.arange(len(s.response)), torch.from_numpy(s.response).long())
        student_hidden_before = h.detach() + change * rand(*h.shape, seed=30 + seed)
        log_p, log_q = (
            log_probs(g, teacher_head)[indices].detach(),
            log_probs(student_hidden_before, head)[indices].detach(),
        )
        sampled_log_probs.append(
            torch.stack([log_q, log_p, (ALPHA * log_p.exp() + (1 - ALPHA) * log_q.exp()).log()], -1)
        )
        outputs[i] = replace(s, log_probs_NK=sampled_log_probs[-1])
    return criterion, outputs, rows, head, teacher_head, student, teacher, sampled_log_probs


def fused_total(criterion, outputs, rows, head, teacher_head, student, teacher):
    """Return the loss through the criterion and the fused loss, with one micro-batch per sequence."""
    source_batches = [SourceBatch(Source.ROLLOUT, [s]) for s in outputs] + [
        SourceBatch(Source.DATASET, [s]) for s in rows
    ]
    token_weights = criterion.begin_step(source_batches, [], 1.0)
    total = sum(
        fused_loss(
            h,
            head,
            torch.from_numpy(source_batch.sequences[0].response).long(),
            weights=criterion.weights(source_batch.source),
            teacher_hidden_ND=g,
            teacher_head=teacher_head,
            token_weights=per_token,
            chunk=2,
        )
        for source_batch, per_token, h, g in zip(source_batches, token_weights, student, teacher, strict=True)
    )
    return total / criterion.count(outputs + rows)


@pytest.mark.parametrize(("clip", "change"), [(0.2, 0.0), (0.2, 0.3), (0.05, 1.0)])
@pytest.mark.parametrize("row_weight", [0.0, 1.0, 0.3])
def test_value_and_gradient_match_the_paper(clip, change, row_weight):
    criterion, outputs, rows, head, teacher_head, student, teacher, sampled_log_probs = build_step(
        clip, change, row_weight=row_weight
    )
    if not row_weight:
        rows, student, teacher = [], student[:2], teacher[:2]
    found = fused_total(criterion, outputs, rows, head, teacher_head, student, teacher)

    output_loss = sum(
        expected_loss(log_probs(h, head), log_probs(g, teacher_head), s.response.tolist(), t.tolist(), clip)
        for s, h, g, t in zip(outputs, student, teacher, sampled_log_probs, strict=False)
    )
    expected = output_loss / sum(len(s.response) for s in outputs)
    row_loss = 0.0
    for s, h, g in zip(rows, student[2:], teacher[2:], strict=True):
        log_q, log_p = log_probs(h, head), log_probs(g, teacher_head).detach()
        ce = -sum(log_q[t, token] for t, token in enumerate(s.response.tolist()))
        row_loss = row_loss + 0.5 * ce + 0.5 * (log_p.exp() * (log_p - log_q)).sum()
    if rows:
        expected = expected + row_weight * row_loss / sum(len(s.response) for s in rows)
    # Sampled log-probabilities are float64 here, weights float32.
    assert_close(found, expected, rtol=1e-6, atol=1e-7)
    leaves = [*student, head.weight_VD]
    for found_grad, expected_grad in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        assert_close(found_grad, expected_grad, rtol=1e-5, atol=1e-7)


def test_expected_gradient_is_that_of_reverse_kl():
    """Check that the expectation over all outputs of two tokens is the gradient of KL(q ‖ p) between whole outputs.

    The outputs come from the student, so there is no importance weight and no clipping.
    """
    # Logits of the first token, and of the second token after each first one.
    first, second = rand(V, seed=1).requires_grad_(), rand(V, V, seed=2).requires_grad_()
    p_first, p_then = rand(V, seed=3).log_softmax(-1), rand(V, V, seed=4).log_softmax(-1)

    def log_q(a, b):
        return torch.stack([first.log_softmax(-1)[a], second.log_softmax(-1)[a, b]])

    pairs = list(itertools.product(range(V), repeat=2))
    kl = sum(
        log_q(a, b).sum().exp() * (log_q(a, b).sum() - p_first[a] - p_then[a, b]) for a, b in pairs
    )  # between whole outputs
    criterion = MiniLLM(schema.ObjectiveConfig(**MINILLM | {"row_weight": 0.0, "ratio_clip": 0.9}))
    total = 0.0
    for a, b in pairs:
        drawn = log_q(a, b).detach()
        s = output(a, b, log_probs=torch.stack([drawn, torch.stack([p_first[a], p_then[a, b]]), drawn], -1))
        (token_weights,) = criterion.begin_step([SourceBatch(Source.ROLLOUT, [s])], [], 1.0)
        total = total + drawn.sum().exp() * fused_loss(
            torch.stack([first, second[a]]),
            Head(None),
            torch.tensor([a, b]),
            weights=criterion.weights(Source.ROLLOUT),
            teacher_hidden_ND=torch.stack([p_first, p_then[a]]),
            teacher_head=Head(None),
            token_weights=token_weights,
        )
    for found, expected_grad in zip(
        torch.autograd.grad(total, (first, second)),
        torch.autograd.grad(kl, (first, second)),
        strict=True,
    ):
        assert_close(found, expected_grad, rtol=1e-6, atol=1e-9)


def test_gradcheck_with_surrogate_and_token_weights():
    n = 9
    hidden, head = rand(n, D, seed=1).requires_grad_(), Head(rand(V, D, seed=2).requires_grad_())
    teacher = {"teacher_hidden_ND": rand(n, D, seed=3), "teacher_head": Head(rand(V, D, seed=4))}
    targets = torch.arange(n) % V
    drawn = log_probs(hidden, head)[torch.arange(n), targets].detach() + 0.4 * rand(n, seed=5)
    token_weights = TokenWeights(
        rand(n, seed=6).abs(), None, rand(n, seed=7), ClippedSurrogate(rand(n, seed=8), drawn, 0.2)
    )
    loss_weights = LossWeights(0.7, 0.4, MiniLLM(schema.ObjectiveConfig(**MINILLM)).divergence)

    def loss(hidden, weight):
        return fused_loss(
            hidden, Head(weight), targets, weights=loss_weights, token_weights=token_weights, chunk=4, **teacher
        )

    assert torch.autograd.gradcheck(loss, (hidden, head.weight_VD))
    assert torch.autograd.gradcheck(lambda h: loss(h, head.weight_VD.detach()), (hidden,))


def test_clipped_tokens_have_no_gradient():
    drawn = torch.zeros(4)
    log_q = torch.tensor([0.5, 0.5, -0.5, -0.5]).requires_grad_()  # ratio far outside 1 ± 0.2
    value, slope = ClippedSurrogate(torch.tensor([1.0, -1.0, 1.0, -1.0]), drawn, 0.2)(log_q.detach())
    ratio = log_q.detach().exp()
    assert_close(value, torch.stack([-torch.tensor(1.2), ratio[1], -ratio[2], torch.tensor(0.8)]))
    assert (slope == 0).tolist() == [True, False, False, True]


def test_advantage_is_the_mean_of_later_rewards():
    assert advantages(torch.tensor([5.0, -1.0, 2.0, 6.0])).tolist() == pytest.approx([7 / 3, 4.0, 6.0, 0.0])
    assert advantages(torch.tensor([3.0])).tolist() == [0.0]


def test_equal_models_have_zero_loss_and_gradient():
    logits = rand(3, V, seed=1)
    criterion = MiniLLM(schema.ObjectiveConfig(**MINILLM | {"row_weight": 0.0}))
    token_log_probs = logits.log_softmax(-1)[torch.arange(3), torch.tensor([3, 1, 2])]
    s = output(3, 1, 2, log_probs=torch.stack([token_log_probs, token_log_probs, token_log_probs], -1))
    z = logits.clone().requires_grad_()
    found = fused_total(criterion, [s], [], Head(None), Head(None), [z], [logits])
    assert_close(found, torch.zeros_like(found))
    assert_close(torch.autograd.grad(found, z)[0], torch.zeros_like(z))
    assert criterion.figures() == {"reward": 0.0}


def test_reward_is_reweighted_from_mixture_to_student():
    """Check the reward when half of the tokens come from the teacher. Unweighted it would be too high."""
    p, q = torch.tensor([0.9, 0.1]), torch.tensor([0.2, 0.8])
    drawn = 0.5 * p + 0.5 * q
    tokens = [0] * 55 + [1] * 45  # in the exact proportions of p̃
    s = output(*tokens, log_probs=torch.stack([q.log(), p.log(), drawn.log()], -1)[torch.tensor(tokens)])
    criterion = MiniLLM(schema.ObjectiveConfig(**MINILLM))
    criterion.begin_step([SourceBatch(Source.ROLLOUT, [s])], [], 1.0)
    assert criterion.figures()["reward"] == pytest.approx(float((q * (p / q).log()).sum()), rel=1e-5)


# --- rounds -----------------------------------------------------------------------------------------------------


def test_round_is_sampled_once_and_used_four_times():
    schedule = build_scheduler(schema.ScheduleConfig(kind="rounds", inner_epochs=4), steps=40, seed=1, batches=3)
    drawn = [schedule.draw(build_step, 0) for build_step in range(24)]
    assert drawn == ([Source.ROLLOUT] * 3 + [Source.REPLAY] * 9) * 2
    assert schedule.config.may_replay
    assert schedule.config.uses_student_outputs
    assert not build_scheduler(schema.ScheduleConfig(kind="rounds", inner_epochs=1), steps=9, seed=1).config.may_replay

    buffer = RoundBuffer(6, seed=5, batches=3)
    seen = Counter()
    for step, source in enumerate(drawn):
        if source is Source.ROLLOUT:
            batch = [output(step, 0), output(step, 1)]
            buffer.add(batch)
        else:
            batch = buffer.draw(2, step)
        seen.update(tuple(s.response.tolist()) for s in batch)
        assert all(step // 12 == s.response[0] // 12 for s in batch), "outputs of the current round"
    assert len(seen) == 12
    assert set(seen.values()) == {4}


def build_run(
    tmp_path=None, *, backbone=None, steps=14, batch_size=4, accumulate=1, listener=lambda event: None, **rollout
):
    """Build a small run in rounds of 2 batches, used three times each, with dropout in the student."""
    more = {"batch_size": batch_size, "accumulate": accumulate, "listener": listener, "backbone": backbone}

    def sampler(student, teacher):
        config = schema.RolloutConfig(max_new_tokens=5, **{"teacher_mix": ALPHA} | rollout)
        return MixtureSampler(student, teacher, config, max_length=16, seed=5)

    schedule = {"inner_epochs": 3}
    config = schema.ObjectiveConfig(**MINILLM)
    return runs.build(
        tmp_path,
        method="rounds",
        steps=steps,
        cached=True,
        objective=config,
        schedule=schedule,
        sampler=sampler,
        rounds_of=2,
        **more,
    )


@pytest.mark.parametrize("stop", [1, 4, 7], ids=["half-of-first-round", "replay", "half-of-second-round"])
def test_resume_within_a_round_is_bit_exact(tmp_path, stop):
    torch.manual_seed(5)
    uninterrupted, figures = (
        build_run(listener=lambda e: figures.append(e.figures) if isinstance(e, Stepped) else None),
        [],
    )
    result = uninterrupted.train()
    assert result.sources == {"rollout": 6, "replay": 8}
    assert uninterrupted.pool.counts.student_sequences == 24

    torch.manual_seed(5)
    stopped = build_run(tmp_path, listener=runs._kill_at(stop))
    with pytest.raises(runs.Interrupted):
        stopped.train()
    found = Checkpoints(tmp_path, lambda path: None, keep=1).latest()
    assert bool(found.state["pool"]["waiting"]) == (stop != 4)
    backbone = runs.student()
    saved = type(backbone.model).from_pretrained(found.path, dtype=torch.float32)
    backbone.model.load_state_dict(saved.state_dict())
    resumed_figures = []
    resumed = build_run(
        tmp_path,
        backbone=backbone,
        listener=lambda e: resumed_figures.append(e.figures) if isinstance(e, Stepped) else None,
    )
    torch.manual_seed(999)
    resumed.load(found)
    resumed.train()
    for name, value in runs.weights(uninterrupted).items():
        assert torch.equal(runs.weights(resumed)[name], value), name
    assert resumed_figures == figures[stop:]


def test_accumulation_does_not_change_the_result():
    ends = []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        engine = build_run(backbone=runs.student("llama"), batch_size=batch_size, accumulate=accumulate, steps=4)
        engine.train()
        ends.append(runs.weights(engine))
    for name, value in ends[0].items():
        assert_close(ends[1][name], value, rtol=1e-3, atol=1e-5)


def test_dataset_step_uses_kl_and_cross_entropy():
    criterion = MiniLLM(schema.ObjectiveConfig(**MINILLM))
    assert criterion.begin_step([SourceBatch(Source.DATASET, [output(1, 2)])], [], 1.0) == [None]
    assert criterion.figures() == {}
    row = criterion.weights(Source.DATASET)
    assert (row.kd, row.ce, type(row.divergence).__name__) == (0.5, 0.5, "KL")


def test_kd_warmup_scales_outputs_and_kl():
    criterion, outputs, rows, *_ = build_step(kd_warmup=0.5)
    source_batches = [SourceBatch(Source.ROLLOUT, outputs), SourceBatch(Source.DATASET, rows)]
    early_weights, late_weights = (criterion.begin_step(source_batches, [], progress) for progress in (0.25, 1.0))
    assert_close(early_weights[0].weights_N, late_weights[0].weights_N / 2)
    assert_close(early_weights[1].weights_N, late_weights[1].weights_N)
    assert criterion.weights(Source.DATASET, 0.25).kd == 0.25


def test_reduction_by_sequence_weighs_outputs_equally():
    criterion, outputs, rows, *_ = build_step(reduction="sequence")
    token_weights = criterion.begin_step(
        [SourceBatch(Source.ROLLOUT, outputs), SourceBatch(Source.DATASET, rows)], [], 1.0
    )
    # The criterion weighs a token of n by 1/n, and the trainer divides by four sequences: twice a mean over two.
    assert token_weights[0].weights_N.unique().tolist() == [2.0]
    assert token_weights[1].weights_N.unique().tolist() == [2.0]
    assert replace(token_weights[0], surrogate=None)[:2].kd_weights_N.shape == (2,)
