"""The two objectives that look further than a token: TAID's target, which moves, and ATKD's split of the whole step."""

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
from tests import reference_divergences as plain
from tests.unit import test_trainer as runs

LOSSES = [3.0, 2.5, 2.6, 2.0, 1.0, 4.0, 0.9, 0.8, 0.7, 0.7]
TAID, ATKD = schema.ObjectiveConfig(divergence="taid"), schema.ObjectiveConfig(divergence="atkd")


def logits(seed, n=13, v=7):
    return 2 * torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_at(z, targets):
    return z.log_softmax(-1)[torch.arange(len(z)), targets]


# --- TAID -------------------------------------------------------------------------------------------------------


def course(losses, steps, start, rate, momentum):
    """t before each step, as the paper has it, with numbers only."""
    t, m, before, seen = start, 0.0, None, []
    for step, loss in enumerate(losses, start=1):
        seen.append(t)
        if before is not None:
            m = momentum * m + (1 - momentum) * (before - loss) / before
            linear = start + (1 - start) * step / steps
            t = min(1.0, max(linear, t + rate / (1 + math.exp(-m)) * (1 - t)))
        before = loss
    return [*seen, t]


@pytest.mark.parametrize(("steps", "start", "rate", "momentum"), [(10, 0.4, 5e-4, 0.99), (1000, 0.2, 0.3, 0.5)])
def test_t_takes_the_papers_course_and_ends_at_the_teacher(steps, start, rate, momentum):
    """Ten steps that are the whole run (where the straight line leads), and the first ten of many (where the loss does)."""
    config = schema.ObjectiveConfig(divergence="taid", taid_start=start, taid_rate=rate, taid_momentum=momentum)
    moving, seen = objectives.build(config), []
    for step, loss in enumerate(LOSSES, start=1):
        seen.append(moving.weights(Source.DATASET, step / steps).divergence.t)
        moving.observe(loss, step / steps)
    assert [*seen, moving.t] == pytest.approx(course(LOSSES, steps, start, rate, momentum), abs=1e-15)
    assert all(a <= b for a, b in itertools.pairwise(seen))
    if steps == len(LOSSES):
        assert moving.t == 1.0
    else:
        straight = [start + (1 - start) * step / steps for step in range(10)]
        assert seen[-1] > straight[-1] + 0.1, "the loss, not the line, has moved it"


def test_taids_step_is_kl_to_the_target_between_with_the_student_in_it_as_a_number():
    moving = objectives.build(TAID)
    for step, loss in enumerate(LOSSES[:4], start=1):
        moving.observe(loss, step / 10)
    t = course(LOSSES[:4], 10, 0.4, 5e-4, 0.99)[-1]
    z, zt = logits(1).requires_grad_(), logits(2)
    target = ((1 - t) * z.detach() + t * zt).softmax(-1)
    expected = (target * (target.log() - z.log_softmax(-1))).sum()
    terms = moving.weights(Source.ROLLOUT, 0.5)
    total = step_loss(z, zt, torch.zeros(13, dtype=torch.long), terms)
    assert_close(total, expected)
    assert_close(torch.autograd.grad(total, z), torch.autograd.grad(expected, z))
    assert moving.held_out.divergence == KL(), "held-out figures of a run can be compared"


# --- ATKD -------------------------------------------------------------------------------------------------------


def step_loss(z, zt, targets, terms, per_token=None):
    """The fused loss, summed, of logits that are given."""
    more = {"teacher_hidden_ND": zt, "teacher_head": Head(None)}
    return fused_loss(z, Head(None), targets, weights=terms, token_weights=per_token or NO_WEIGHTS, **more)


def whole_step(z, zt, targets, alpha):
    """ATKD's loss of a step, as the paper has it: two means, of what each half is taught."""
    tkd, dkd = plain.decoupled(zt.softmax(-1), z.softmax(-1), targets)
    unc = 1 - zt.softmax(-1)[torch.arange(len(zt)), targets]
    hard = unc >= unc.sort().values[(len(unc) - 1) // 2]
    return alpha * dkd[~hard].mean() + (1 - alpha) * (tkd + dkd)[hard].mean()


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("cuts", [[13], [5, 8], [1, 1, 11], [4, 4, 4, 1]])
def test_atkds_step_is_the_papers_however_it_is_cut(cuts, alpha):
    """Value and gradient against float64, the step in one micro-batch or several: the median is the whole step's."""
    z, zt = logits(3).requires_grad_(), logits(4)
    targets = torch.randint(0, 7, (13,), generator=torch.Generator().manual_seed(5))
    expected = whole_step(z, zt, targets, alpha)

    looking = objectives.build(schema.ObjectiveConfig(divergence="atkd", atkd_easy=alpha))
    assert looking.needs_log_probs_of == ("teacher",)
    readings = [TokenLogProbs(log_p_N=part) for part in log_at(zt, targets).split(cuts)]
    own = looking.begin_step([SourceBatch(Source.DATASET, [])] * len(cuts), readings, 0.5)
    terms = looking.weights(Source.DATASET, 0.5)
    parts = zip(z.split(cuts), zt.split(cuts), targets.split(cuts), own, strict=True)
    total = sum(step_loss(*part[:3], terms, part[3]) for part in parts) / 13
    assert_close(total, expected)
    assert_close(torch.autograd.grad(total, z), torch.autograd.grad(expected, z))


def test_atkd_where_all_tokens_are_alike_and_where_there_is_none():
    looking = objectives.build(ATKD)
    (alike,) = looking.begin_step([SourceBatch(Source.DATASET, [])], [TokenLogProbs(torch.full((4,), -0.5))], 0.5)
    assert_close(alike.divergence_args_N, torch.full((4, 2), 0.8))
    assert looking.begin_step([SourceBatch(Source.DATASET, [])], [TokenLogProbs(torch.zeros(0))], 0.5) == [None]


def test_the_cut_of_a_step_does_not_change_where_atkd_goes():
    """The same through the engine: 1 × 4 rows or 2 × 2 rows a step, the same weights in the end."""
    ended = []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        engine = runs.build(
            method="off", steps=5, backbone=runs.student("llama"), objective=ATKD, batch_size=batch_size,
            accumulate=accumulate,
        )  # fmt: skip
        done = engine.train()
        assert engine.teacher.tokens == done.tokens, "asked once for every token, though it is looked at twice"
        ended.append(runs.weights(engine))
    for name, value in ended[0].items():
        assert_close(ended[1][name], value, rtol=1e-4, atol=1e-6)


# --- resume -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "method"), [(TAID, "off"), (TAID, "adaptive"), (ATKD, "adaptive")])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, objective, method):
    torch.manual_seed(5)
    whole = runs.build(method=method, objective=objective)
    done = whole.train()
    torch.manual_seed(5)
    stopped = runs.build(tmp_path, method=method, objective=objective, listener=runs._kill_at(5))
    with pytest.raises(Interrupted):
        stopped.train()
    resumed = runs.resume(tmp_path, method, objective=objective)
    assert resumed.objective.state_dict() == stopped.objective.state_dict()
    again = resumed.train()
    for name, value in runs.weights(whole).items():
        assert torch.equal(runs.weights(resumed)[name], value), name
    assert resumed.objective.state_dict() == whole.objective.state_dict()
    assert again.sources == done.sources
    if objective is TAID:
        assert whole.objective.t == 1.0
