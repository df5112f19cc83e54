"""Test logits of −inf: 0 · log 0 = 0 in every divergence, and +inf where the value is infinite.

The expected values are those of the plain float64 definition with probabilities so small that they stand for 0.
"""

import math

import pytest
import torch
from torch.testing import assert_close

from distillm_cli import plugins
from distillm_cli.config.schema import ObjectiveConfig
from distillm_cli.losses.divergences import TokenDistributions, build_divergence, logit_grad
from distillm_cli.losses.fused import fused_loss
from distillm_cli.losses.weights import LossWeights
from tests import reference_divergences
from tests.unit.test_divergences import SETTINGS, UNBOUNDED
from tests.unit.test_fused import Head, rand

N, V = 7, 13
TARGET, OTHER = 1, 5  # columns: the target of some rows, and a target of no row
SUPPRESSED = {
    "teacher": ((TARGET, OTHER), ()),
    "student": ((), (TARGET, OTHER)),
    "both": ((TARGET, OTHER), (TARGET, OTHER)),
    "teacher's target": ((TARGET,), (OTHER,)),
    "teacher's other": ((OTHER,), (TARGET,)),
}


def with_zeros(z, columns, eps=None):
    """Return logits with −inf, and probabilities with eps, in these columns."""
    unsuppressed = [c for c in range(V) if c not in columns]
    suppressed = torch.full_like(z, -math.inf).index_copy(-1, torch.tensor(unsuppressed), z[:, unsuppressed])
    prob = torch.full_like(z, eps or 0.0).index_copy(-1, torch.tensor(unsuppressed), z[:, unsuppressed].softmax(-1))
    return suppressed, prob


def limit_of(name, settings, zt, z, columns):
    """Return the values, +inf where they grow as the stand-in for 0 shrinks, and the gradient of the logits."""
    found = []
    for eps in (1e-100, 1e-102):
        p, q = (with_zeros(logits, c, eps)[1] for logits, c in zip((zt, z), columns, strict=True))
        found.append(reference_divergences.divergence(name, p, q, **settings))
    (grad,) = torch.autograd.grad(found[0].sum(), z)
    grows = (found[0] - found[1]).abs().nan_to_num(math.inf) > 1e-8 * (1 + found[0].abs())
    return found[0].detach().masked_fill(grows, math.inf), grad


def has_limit(settings, sides):
    """Return False for negative powers of the stand-in on both sides, where the definition loses all digits."""
    return sides != "both" or settings.get("ab_alpha", 1) + settings.get("ab_beta", 1) >= 0


CASES = [(*pair, sides) for pair in SETTINGS + UNBOUNDED for sides in SUPPRESSED if has_limit(pair[1], sides)]


@pytest.mark.parametrize(("name", "settings", "sides"), CASES)
def test_suppressed_tokens_have_the_value_of_the_limit(name, settings, sides):
    z, zt, columns = rand(N, V, seed=1).mul(2).requires_grad_(), 2 * rand(N, V, seed=2), SUPPRESSED[sides]
    expected, expected_grad = limit_of(name, settings, zt, z, columns)

    p, q = TokenDistributions(with_zeros(zt, columns[0])[0]), TokenDistributions(with_zeros(z.detach(), columns[1])[0])
    divergence = build_divergence(ObjectiveConfig(divergence=name, **settings)).for_tokens(
        reference_divergences.some_targets(zt), None
    )
    value, h = divergence.between(p, q)
    assert_close(value, expected, rtol=1e-9, atol=1e-11)
    finite = expected.isfinite()
    assert_close(logit_grad(h, q.prob_NV)[finite], expected_grad[finite], rtol=1e-8, atol=1e-11)
    assert torch.equal(divergence.between(p, q, with_grad=False)[0], value)


@pytest.mark.parametrize(("name", "settings"), [pair for pair in SETTINGS + UNBOUNDED if pair[0] != "atkd"])
def test_token_suppressed_on_both_sides_has_no_effect(name, settings):
    z, zt = rand(N, V, seed=3), rand(N, V, seed=4)
    suppressed_column = torch.full((N, 1), -math.inf, dtype=torch.float64)
    divergence = build_divergence(ObjectiveConfig(divergence=name, **settings))
    value, h = divergence.between(TokenDistributions(zt), TokenDistributions(z))
    longer, longer_h = divergence.between(
        TokenDistributions(torch.cat([zt, suppressed_column], -1)),
        TokenDistributions(torch.cat([z, suppressed_column], -1)),
    )
    assert_close(longer, value)
    assert_close(
        logit_grad(longer_h, torch.cat([z, suppressed_column], -1).softmax(-1))[:, :V], logit_grad(h, z.softmax(-1))
    )
    assert not longer_h[:, V:].any()


@pytest.mark.parametrize(("name", "settings"), SETTINGS + UNBOUNDED)
def test_has_zeros_does_not_change_finite_results(name, settings):
    tables = [(4 * rand(50, 101, seed=seed)).float() for seed in (5, 6)]
    divergence = build_divergence(ObjectiveConfig(divergence=name, **settings)).for_tokens(
        reference_divergences.some_targets(tables[0]), None
    )
    without_check, with_check = (
        divergence.between(*(TokenDistributions(z, has_zeros=zeros) for z in tables)) for zeros in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(without_check, with_check, strict=True))


@pytest.mark.parametrize("form", ["logits", "bias"])
@pytest.mark.parametrize("sides", SUPPRESSED)
@pytest.mark.parametrize("name", list(plugins.divergences))
def test_fused_loss_handles_suppressed_tokens(name, sides, form):
    """Check models that return logits, and heads whose bias suppresses tokens."""
    hidden, weight, teacher_hidden, teacher_weight = (
        rand(*shape, seed=seed) for seed, shape in enumerate([(N, 6), (V, 6), (N, 9), (V, 9)], 10)
    )
    z, zt = hidden @ weight.T, teacher_hidden @ teacher_weight.T
    expected, expected_grad = limit_of(
        name, {"taid_start": ObjectiveConfig(divergence="taid").taid_start}, zt, z.requires_grad_(), SUPPRESSED[sides]
    )
    teacher_columns, columns = SUPPRESSED[sides]
    if form == "logits":
        student_input = with_zeros(z.detach(), columns)[0].requires_grad_()
        student, teacher_given = Head(None), with_zeros(zt, teacher_columns)[0]
        teacher = Head(None)
    else:
        student_input, teacher_given = hidden.requires_grad_(), teacher_hidden
        student, teacher = (
            Head(w, with_zeros(torch.zeros(1, V, dtype=torch.float64), c)[0][0])
            for w, c in ((weight, columns), (teacher_weight, teacher_columns))
        )
        expected_grad = expected_grad @ weight
    total = fused_loss(
        student_input,
        student,
        reference_divergences.some_targets(z),
        weights=LossWeights(1.0, 0.0, build_divergence(ObjectiveConfig(divergence=name))),
        teacher_hidden_ND=teacher_given,
        teacher_head=teacher,
        chunk=3,
    )
    assert_close(total, expected.sum())
    if expected.isfinite().all():
        assert_close(torch.autograd.grad(total, student_input)[0], expected_grad)


def test_cross_entropy_of_a_suppressed_target_is_infinite():
    z = with_zeros(rand(N, V, seed=7), (OTHER,))[0].requires_grad_()
    loss = {
        target: fused_loss(z, Head(None), torch.full((N,), target), weights=LossWeights(0.0, 1.0))
        for target in (0, OTHER)
    }
    assert_close(loss[0], torch.nn.functional.cross_entropy(z, torch.zeros(N, dtype=torch.long), reduction="sum"))
    assert loss[OTHER].item() == math.inf
    assert torch.autograd.grad(loss[0], z)[0].isfinite().all()
