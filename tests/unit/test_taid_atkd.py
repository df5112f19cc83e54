"""Test the two objectives that depend on more than one token: TAID's moving target and ATKD's split of the step."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from distillm_cli.config import schema
from distillm_cli.errors import Interrupted
from distillm_cli.losses import objectives
from distillm_cli.losses.divergences import KL
from distillm_cli.losses.fused import fused_loss
from distillm_cli.losses.objectives import SourceBatch, TokenLogProbs
from distillm_cli.losses.weights import NO_WEIGHTS
from distillm_cli.models.backbone import Head
from distillm_cli.rollouts.scheduler import Source
from tests import reference_divergences
from tests.unit import test_trainer as runs

LOSSES = [3.0, 2.5, 2.6, 2.0, 1.0, 4.0, 0.9, 0.8, 0.7, 0.7]
TAID, ATKD = schema.ObjectiveConfig(divergence="taid"), schema.ObjectiveConfig(divergence="atkd")


def logits(seed, n=13, v=7):
    return 2 * torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_at(z, targets):
    return z.log_softmax(-1)[torch.arange(len(z)), targets]


# --- TAID -------------------------------------------------------------------------------------------------------


def expected_t(losses, steps, start, rate, momentum):
    """Return t before each step and after the last, by the formula of the paper."""
    t, m, previous_loss, values = start, 0.0, None, []
    for step, loss in enumerate(losses, start=1):
        values.append(t)
        if previous_loss is not None:
            m = momentum * m + (1 - momentum) * (previous_loss - loss) / previous_loss
            linear = start + (1 - start) * step / steps
            t = min(1.0, max(linear, t + rate / (1 + math.exp(-m)) * (1 - t)))
        previous_loss = loss
    return [*values, t]


@pytest.mark.parametrize(("steps", "start", "rate", "momentum"), [(10, 0.4, 5e-4, 0.99), (1000, 0.2, 0.3, 0.5)])
def test_taid_t_follows_the_papers_formula(steps, start, rate, momentum):
    """Check a run of ten steps, where t follows the schedule, and the start of a long one, where it follows the loss."""
    config = schema.ObjectiveConfig(divergence="taid", taid_start=start, taid_rate=rate, taid_momentum=momentum)
    taid, values = objectives.build(config), []
    for step, loss in enumerate(LOSSES, start=1):
        values.append(taid.weights(Source.DATASET, step / steps).divergence.t)
        taid.observe(loss, step / steps)
    assert [*values, taid.t] == pytest.approx(expected_t(LOSSES, steps, start, rate, momentum), abs=1e-15)
    assert all(a <= b for a, b in itertools.pairwise(values))
    if steps == len(LOSSES):
        assert taid.t == 1.0
    else:
        straight = [start + (1 - start) * step / steps for step in range(10)]
        assert values[-1] > straight[-1] + 0.1, "t follows the loss, not the linear schedule"


def test_taid_loss_is_kl_to_the_interpolated_target():
    """Check this with the student detached in the target."""
    taid = objectives.build(TAID)
    for step, loss in enumerate(LOSSES[:4], start=1):
        taid.observe(loss, step / 10)
    t = expected_t(LOSSES[:4], 10, 0.4, 5e-4, 0.99)[-1]
    z, zt = logits(1).requires_grad_(), logits(2)
    target = ((1 - t) * z.detach() + t * zt).softmax(-1)
    expected = (target * (target.log() - z.log_softmax(-1))).sum()
    loss_weights = taid.weights(Source.ROLLOUT, 0.5)
    total = step_loss(z, zt, torch.zeros(13, dtype=torch.long), loss_weights)
    assert_close(total, expected)
    assert_close(torch.autograd.grad(total, z), torch.autograd.grad(expected, z))
    assert taid.held_out.divergence == KL(), "validation uses a fixed divergence"


# --- ATKD -------------------------------------------------------------------------------------------------------


def step_loss(z, zt, targets, loss_weights, per_token=None):
    """Return the summed fused loss of the given logits."""
    more = {"teacher_hidden_ND": zt, "teacher_head": Head(None)}
    return fused_loss(z, Head(None), targets, weights=loss_weights, token_weights=per_token or NO_WEIGHTS, **more)


def expected_step_loss(z, zt, targets, alpha):
    """Return ATKD's loss of a step by the formula of the paper, with one mean per half."""
    tkd, dkd = reference_divergences.decoupled(zt.softmax(-1), z.softmax(-1), targets)
    unc = 1 - zt.softmax(-1)[torch.arange(len(zt)), targets]
    hard = unc >= unc.sort().values[(len(unc) - 1) // 2]
    return alpha * dkd[~hard].mean() + (1 - alpha) * (tkd + dkd)[hard].mean()


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("sizes", [[13], [5, 8], [1, 1, 11], [4, 4, 4, 1]])
def test_atkd_loss_matches_the_paper_for_any_micro_batches(sizes, alpha):
    """Compare value and gradient with float64. The median is that of the whole step."""
    z, zt = logits(3).requires_grad_(), logits(4)
    targets = torch.randint(0, 7, (13,), generator=torch.Generator().manual_seed(5))
    expected = expected_step_loss(z, zt, targets, alpha)

    atkd = objectives.build(schema.ObjectiveConfig(divergence="atkd", atkd_easy=alpha))
    assert atkd.needs_log_probs_of == ("teacher",)
    readings = [TokenLogProbs(log_p_N=part) for part in log_at(zt, targets).split(sizes)]
    token_weights = atkd.begin_step([SourceBatch(Source.DATASET, [])] * len(sizes), readings, 0.5)
    loss_weights = atkd.weights(Source.DATASET, 0.5)
    parts = zip(z.split(sizes), zt.split(sizes), targets.split(sizes), token_weights, strict=True)
    total = sum(step_loss(*part[:3], loss_weights, part[3]) for part in parts) / 13
    assert_close(total, expected)
    assert_close(torch.autograd.grad(total, z), torch.autograd.grad(expected, z))


def test_atkd_with_equal_tokens_and_without_tokens():
    atkd = objectives.build(ATKD)
    (weights,) = atkd.begin_step([SourceBatch(Source.DATASET, [])], [TokenLogProbs(torch.full((4,), -0.5))], 0.5)
    assert_close(weights.divergence_args_N, torch.full((4, 2), 0.8))
    assert atkd.begin_step([SourceBatch(Source.DATASET, [])], [TokenLogProbs(torch.zeros(0))], 0.5) == [None]


def test_accumulation_does_not_change_atkd():
    """Compare the final weights of runs with 1 × 4 and 2 × 2 rows per step."""
    final_weights = []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        engine = runs.build(
            method="off", steps=5, backbone=runs.student("llama"), objective=ATKD, batch_size=batch_size,
            accumulate=accumulate,
        )  # fmt: skip
        result = engine.train()
        assert engine.teacher.tokens == result.tokens, "the teacher computes every token once"
        final_weights.append(runs.weights(engine))
    for name, value in final_weights[0].items():
        assert_close(final_weights[1][name], value, rtol=1e-4, atol=1e-6)


# --- resume -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "method"), [(TAID, "off"), (TAID, "adaptive"), (ATKD, "adaptive")])
def test_resume_is_bit_exact(tmp_path, objective, method):
    torch.manual_seed(5)
    uninterrupted = runs.build(method=method, objective=objective)
    result = uninterrupted.train()
    torch.manual_seed(5)
    stopped = runs.build(tmp_path, method=method, objective=objective, listener=runs._kill_at(5))
    with pytest.raises(Interrupted):
        stopped.train()
    resumed = runs.resume(tmp_path, method, objective=objective)
    assert resumed.objective.state_dict() == stopped.objective.state_dict()
    resumed_result = resumed.train()
    for name, value in runs.weights(uninterrupted).items():
        assert torch.equal(runs.weights(resumed)[name], value), name
    assert resumed.objective.state_dict() == uninterrupted.objective.state_dict()
    assert resumed_result.sources == result.sources
    if objective is TAID:
        assert uninterrupted.objective.t == 1.0
