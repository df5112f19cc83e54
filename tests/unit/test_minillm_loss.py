"""MiniLLM: against the paper's formula in slow float64, the gradient it estimates, and the uninterrupted run."""

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
from distillm_cli.types import Rollout
from tests.unit import test_trainer as runs
from tests.unit.test_fused import Head, rand

V, D, ALPHA = 7, 5, 0.2
MINILLM = {"divergence": "rkl", "policy_gradient": True, "kd_weight": 0.5, "row_weight": 1.0}


def output(*tokens, row=0, log_probs=None):
    return Rollout(np.array([1], np.int32), np.array(tokens, np.int32), row, log_probs_N3=log_probs)


def states(sequences, head, seed):
    """Hidden states of every token, student's with a graph."""
    return [rand(len(s.response), D, seed=seed + i).requires_grad_() for i, s in enumerate(sequences)]


def log_probs(hidden, head):
    return head.logits(hidden).log_softmax(-1)


def papers_loss(log_q, log_p, y, told, clip):
    """One output, token by token: MiniLLM's section 2.2 with PPO's clipping, in loops. log_q: [T, V] with a graph; told:
    log p, log q and log of the sampler's probability, of its tokens when they were drawn."""
    T, total = len(y), 0.0
    for t in range(T):
        later = [told[k][0] - told[k][1] for k in range(t + 1, T)]
        R_norm = sum(later) / len(later) if later else 0.0
        w = math.exp(told[t][1] - told[t][2])
        single = sum(log_q[t, v].exp() * (log_q[t, v] - log_p[t, v]) for v in range(V))
        rho = (log_q[t, y[t]] - told[t][2]).exp()
        held = min(max(rho.item(), 1 - clip), 1 + clip)
        unclipped = rho * R_norm
        long = unclipped if unclipped.item() <= held * R_norm else held * R_norm
        total = total + w * single - long
    return total


def step(clip=0.2, moved=0.3, seed=0, **objective):
    """Two outputs and two rows; the student has moved since the outputs were sampled."""
    outputs = [output(3, 0, 5, 2), output(6, 1, 4)]
    rows = [output(2, 2, 0, row=1), output(5, row=2)]
    head, teacher_head = Head(rand(V, D, seed=1).requires_grad_()), Head(rand(V, D, seed=2))
    criterion = MiniLLM(schema.ObjectiveConfig(**MINILLM | {"ratio_clip": clip} | objective))
    student, teacher = states(outputs + rows, head, 10 + seed), states(outputs + rows, teacher_head, 20 + seed)
    told = []
    for i, (s, h, g) in enumerate(zip(outputs, student, teacher, strict=False)):
        at = (torch.arange(len(s.response)), torch.from_numpy(s.response).long())
        then = h.detach() + moved * rand(*h.shape, seed=30 + seed)
        log_p, log_q = log_probs(g, teacher_head)[at].detach(), log_probs(then, head)[at].detach()
        told.append(torch.stack([log_p, log_q, (ALPHA * log_p.exp() + (1 - ALPHA) * log_q.exp()).log()], -1))
        outputs[i] = replace(s, log_probs_N3=told[-1])
    return criterion, outputs, rows, head, teacher_head, student, teacher, told


def ours(criterion, outputs, rows, head, teacher_head, student, teacher):
    """Through the criterion and the fused loss, each sequence a micro-batch, and the engine's one division."""
    pieces = [SourceBatch(Source.ROLLOUT, [s]) for s in outputs] + [SourceBatch(Source.DATASET, [s]) for s in rows]
    own = criterion.begin_step(pieces, [], 1.0)
    total = sum(
        fused_loss(
            h,
            head,
            torch.from_numpy(piece.sequences[0].response).long(),
            weights=criterion.weights(piece.source),
            teacher_hidden_ND=g,
            teacher_head=teacher_head,
            token_weights=per_token,
            chunk=2,
        )
        for piece, per_token, h, g in zip(pieces, own, student, teacher, strict=True)
    )
    return total / criterion.count(outputs + rows)


@pytest.mark.parametrize(("clip", "moved"), [(0.2, 0.0), (0.2, 0.3), (0.05, 1.0)])
@pytest.mark.parametrize("row_weight", [0.0, 1.0, 0.3])
def test_value_and_gradient_are_those_of_the_papers_formula(clip, moved, row_weight):
    criterion, outputs, rows, head, teacher_head, student, teacher, told = step(clip, moved, row_weight=row_weight)
    if not row_weight:
        rows, student, teacher = [], student[:2], teacher[:2]
    found = ours(criterion, outputs, rows, head, teacher_head, student, teacher)

    of_outputs = sum(
        papers_loss(log_probs(h, head), log_probs(g, teacher_head), s.response.tolist(), t.tolist(), clip)
        for s, h, g, t in zip(outputs, student, teacher, told, strict=False)
    )
    expected = of_outputs / sum(len(s.response) for s in outputs)
    of_rows = 0.0
    for s, h, g in zip(rows, student[2:], teacher[2:], strict=True):
        log_q, log_p = log_probs(h, head), log_probs(g, teacher_head).detach()
        ce = -sum(log_q[t, token] for t, token in enumerate(s.response.tolist()))
        of_rows = of_rows + 0.5 * ce + 0.5 * (log_p.exp() * (log_p - log_q)).sum()
    if rows:
        expected = expected + row_weight * of_rows / sum(len(s.response) for s in rows)
    assert_close(
        found, expected, rtol=1e-6, atol=1e-7
    )  # what the sampler said is kept in float64 here, weights in float32
    leaves = [*student, head.weight_VD]
    for ours_, true in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert_close(ours_, true, rtol=1e-5, atol=1e-7)


def test_over_all_outputs_the_two_parts_are_the_gradient_of_the_reverse_kl_between_outputs():
    """Two tokens from the student itself: no weight, no clipping, the mean of one reward. The expectation over every output,
    each by its probability, is then d KL(q ‖ p) / d student: nothing is lost at the last token or counted twice."""
    first, then = (
        rand(V, seed=1).requires_grad_(),
        rand(V, V, seed=2).requires_grad_(),
    )  # logits; after each first token
    p_first, p_then = rand(V, seed=3).log_softmax(-1), rand(V, V, seed=4).log_softmax(-1)

    def log_q(a, b):
        return torch.stack([first.log_softmax(-1)[a], then.log_softmax(-1)[a, b]])

    pairs = list(itertools.product(range(V), repeat=2))
    kl = sum(
        log_q(a, b).sum().exp() * (log_q(a, b).sum() - p_first[a] - p_then[a, b]) for a, b in pairs
    )  # between whole outputs
    criterion = MiniLLM(schema.ObjectiveConfig(**MINILLM | {"row_weight": 0.0, "ratio_clip": 0.9}))
    total = 0.0
    for a, b in pairs:
        drawn = log_q(a, b).detach()
        s = output(a, b, log_probs=torch.stack([torch.stack([p_first[a], p_then[a, b]]), drawn, drawn], -1))
        (own,) = criterion.begin_step([SourceBatch(Source.ROLLOUT, [s])], [], 1.0)
        total = total + drawn.sum().exp() * fused_loss(
            torch.stack([first, then[a]]),
            Head(None),
            torch.tensor([a, b]),
            weights=criterion.weights(Source.ROLLOUT),
            teacher_hidden_ND=torch.stack([p_first, p_then[a]]),
            teacher_head=Head(None),
            token_weights=own,
        )
    for found, true in zip(
        torch.autograd.grad(total, (first, then)), torch.autograd.grad(kl, (first, then)), strict=True
    ):
        assert_close(found, true, rtol=1e-6, atol=1e-9)


def test_gradcheck_with_a_surrogate_and_weights_of_the_divergence():
    n = 9
    hidden, head = rand(n, D, seed=1).requires_grad_(), Head(rand(V, D, seed=2).requires_grad_())
    teacher = {"teacher_hidden_ND": rand(n, D, seed=3), "teacher_head": Head(rand(V, D, seed=4))}
    targets = torch.arange(n) % V
    drawn = log_probs(hidden, head)[torch.arange(n), targets].detach() + 0.4 * rand(n, seed=5)
    own = TokenWeights(rand(n, seed=6).abs(), None, rand(n, seed=7), ClippedSurrogate(rand(n, seed=8), drawn, 0.2))
    terms = LossWeights(0.7, 0.4, MiniLLM(schema.ObjectiveConfig(**MINILLM)).divergence)

    def loss(hidden, weight):
        return fused_loss(hidden, Head(weight), targets, weights=terms, token_weights=own, chunk=4, **teacher)

    assert torch.autograd.gradcheck(loss, (hidden, head.weight_VD))
    assert torch.autograd.gradcheck(lambda h: loss(h, head.weight_VD.detach()), (hidden,))


def test_where_clipping_holds_no_gradient_is_left():
    drawn = torch.zeros(4)
    log_q = torch.tensor([0.5, 0.5, -0.5, -0.5]).requires_grad_()  # ρ well outside 1 ± 0.2
    value, slope = ClippedSurrogate(torch.tensor([1.0, -1.0, 1.0, -1.0]), drawn, 0.2)(log_q.detach())
    ratio = log_q.detach().exp()
    assert_close(value, torch.stack([-torch.tensor(1.2), ratio[1], -ratio[2], torch.tensor(0.8)]))
    assert (slope == 0).tolist() == [True, False, False, True]


def test_rewards_to_go_are_means_of_what_follows():
    assert advantages(torch.tensor([5.0, -1.0, 2.0, 6.0])).tolist() == pytest.approx([7 / 3, 4.0, 6.0, 0.0])
    assert advantages(torch.tensor([3.0])).tolist() == [0.0]


def test_agreeing_models_cost_nothing_and_have_nothing_to_learn():
    logits = rand(3, V, seed=1)
    criterion = MiniLLM(schema.ObjectiveConfig(**MINILLM | {"row_weight": 0.0}))
    said = logits.log_softmax(-1)[torch.arange(3), torch.tensor([3, 1, 2])]
    s = output(3, 1, 2, log_probs=torch.stack([said, said, said], -1))
    z = logits.clone().requires_grad_()
    found = ours(criterion, [s], [], Head(None), Head(None), [z], [logits])
    assert_close(found, torch.zeros_like(found))
    assert_close(torch.autograd.grad(found, z)[0], torch.zeros_like(z))
    assert criterion.figures() == {"reward": 0.0}


def test_the_reward_is_weighed_back_from_the_mixture_to_the_student():
    """Half of the draws are the teacher's: as they are, they would flatter the student."""
    p, q = torch.tensor([0.9, 0.1]), torch.tensor([0.2, 0.8])
    drawn = 0.5 * p + 0.5 * q
    tokens = [0] * 55 + [1] * 45  # by p̃, exactly
    s = output(*tokens, log_probs=torch.stack([p.log(), q.log(), drawn.log()], -1)[torch.tensor(tokens)])
    criterion = MiniLLM(schema.ObjectiveConfig(**MINILLM))
    criterion.begin_step([SourceBatch(Source.ROLLOUT, [s])], [], 1.0)
    assert criterion.figures()["reward"] == pytest.approx(float((q * (p / q).log()).sum()), rel=1e-5)


# --- rounds -----------------------------------------------------------------------------------------------------


def test_a_round_is_sampled_once_and_gone_through_four_times():
    schedule = build_scheduler(schema.ScheduleConfig(kind="rounds", inner_epochs=4), steps=40, seed=1, batches=3)
    drawn = [schedule.draw(step, 0) for step in range(24)]
    assert drawn == ([Source.ROLLOUT] * 3 + [Source.REPLAY] * 9) * 2
    assert schedule.config.may_replay
    assert schedule.config.uses_student_outputs
    assert not build_scheduler(schema.ScheduleConfig(kind="rounds", inner_epochs=1), steps=9, seed=1).config.may_replay

    buffer = RoundBuffer(6, seed=5, batches=3)
    seen = Counter()
    for at, source in enumerate(drawn):
        if source is Source.ROLLOUT:
            batch = [output(at, 0), output(at, 1)]
            buffer.add(batch)
        else:
            batch = buffer.draw(2, at)
        seen.update(tuple(s.response.tolist()) for s in batch)
        assert all(at // 12 == s.response[0] // 12 for s in batch), "of this round, not of the one before"
    assert len(seen) == 12
    assert set(seen.values()) == {4}


def built(
    tmp_path=None, *, backbone=None, steps=14, batch_size=4, accumulate=1, listener=lambda event: None, **rollout
):
    """A small run in rounds of 2 batches, three times each, with dropout in the student's family."""
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


@pytest.mark.parametrize("at", [1, 4, 7], ids=["half-a-round-waits", "replay", "a-second-round-waits"])
def test_a_run_stopped_inside_a_round_goes_on_bit_for_bit(tmp_path, at):
    torch.manual_seed(5)
    whole, figures = built(listener=lambda e: figures.append(e.figures) if isinstance(e, Stepped) else None), []
    done = whole.train()
    assert done.sources == {"rollout": 6, "replay": 8}
    assert whole.pool.counts.student_sequences == 24

    torch.manual_seed(5)
    stopped = built(tmp_path, listener=runs._kill_at(at))
    with pytest.raises(runs.Interrupted):
        stopped.train()
    found = Checkpoints(tmp_path, lambda path: None, keep=1).latest()
    assert bool(found.state["pool"]["waiting"]) == (at != 4)
    backbone = runs.student()
    saved = type(backbone.model).from_pretrained(found.path, dtype=torch.float32)
    backbone.model.load_state_dict(saved.state_dict())
    later = []
    again = built(
        tmp_path, backbone=backbone, listener=lambda e: later.append(e.figures) if isinstance(e, Stepped) else None
    )
    torch.manual_seed(999)
    again.load(found)
    again.train()
    for name, value in runs.weights(whole).items():
        assert torch.equal(runs.weights(again)[name], value), name
    assert later == figures[at:]


def test_how_a_step_is_cut_changes_nothing():
    ends = []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        engine = built(backbone=runs.student("llama"), batch_size=batch_size, accumulate=accumulate, steps=4)
        engine.train()
        ends.append(runs.weights(engine))
    for name, value in ends[0].items():
        assert_close(ends[1][name], value, rtol=1e-3, atol=1e-5)


def test_a_data_set_step_between_is_an_ordinary_one():
    criterion = MiniLLM(schema.ObjectiveConfig(**MINILLM))
    assert criterion.begin_step([SourceBatch(Source.DATASET, [output(1, 2)])], [], 1.0) == [None]
    assert criterion.figures() == {}
    row = criterion.weights(Source.DATASET)
    assert (row.kd, row.ce, type(row.divergence).__name__) == (0.5, 0.5, "KL")


def test_warming_up_takes_both_parts_with_it():
    criterion, outputs, rows, *_ = step(kd_warmup=0.5)
    pieces = [SourceBatch(Source.ROLLOUT, outputs), SourceBatch(Source.DATASET, rows)]
    early, late = (criterion.begin_step(pieces, [], progress) for progress in (0.25, 1.0))
    assert_close(early[0].weights_N, late[0].weights_N / 2)
    assert_close(early[1].weights_N, late[1].weights_N)
    assert criterion.weights(Source.DATASET, 0.25).kd == 0.25


def test_per_sequence_each_output_weighs_the_same():
    criterion, outputs, rows, *_ = step(reduction="sequence")
    own = criterion.begin_step([SourceBatch(Source.ROLLOUT, outputs), SourceBatch(Source.DATASET, rows)], [], 1.0)
    # The objective makes a token of n weigh 1/n, the engine divides by four sequences: a mean over two, and over two.
    assert own[0].weights_N.unique().tolist() == [2.0]
    assert own[1].weights_N.unique().tolist() == [2.0]
    assert replace(own[0], surrogate=None)[:2].kd_weights_N.shape == (2,)
