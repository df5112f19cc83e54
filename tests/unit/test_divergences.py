"""Every divergence earns its name: against five lines of float64, against autograd, and against its own theorems."""

import math

import pytest
import torch
from torch.testing import assert_close

from distillm_cli.config.schema import Objective
from distillm_cli.core.divergences import JSD, KL, ReverseKL, Rows, SkewKL, SkewReverseKL, build, logit_grad
from tests import plain

SETTINGS = [
    ("kl", {}),
    ("rkl", {}),
    ("skl", {"alpha": 0.1}),
    ("skl", {"alpha": 0.0}),
    ("srkl", {"alpha": 0.1}),
    ("srkl", {"alpha": 0.0}),
    ("jsd", {"beta": 0.1}),
    ("jsd", {"beta": 0.5}),
    ("tvd", {}),
    ("jeffreys", {}),
    ("jeffreys", {"jeffreys_weight": 0.2}),
]


def make(name, settings):
    return build(Objective(divergence=name, **({"alpha": 0.1, "beta": 0.5, "jeffreys_weight": 0.5} | settings)))


def logits(seed, n=7, v=13, scale=3.0, dtype=torch.float64):
    return scale * torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_value_and_logit_gradient_match_the_plain_definition(name, settings):
    z, zt = logits(0).requires_grad_(), logits(1)
    expected = plain.divergence(name, zt.softmax(-1), z.softmax(-1), **settings)
    (expected_grad,) = torch.autograd.grad(expected.sum(), z)

    log_q, log_p = z.detach().log_softmax(-1), zt.log_softmax(-1)
    divergence = make(name, settings)
    assert_close(divergence.value(log_p, log_q), expected.detach(), rtol=1e-10, atol=1e-12)
    assert_close(logit_grad(divergence.grad(log_p, log_q), log_q.exp()), expected_grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_h_is_the_derivative_in_log_q_with_the_others_fixed(name, settings):
    """h itself, not only its projection on the simplex: METHODS A defines it entry by entry."""
    log_p, log_q = logits(3).log_softmax(-1), logits(4).log_softmax(-1).requires_grad_()
    value = plain.divergence(name, log_p.exp(), log_q.exp(), **settings)
    (h,) = torch.autograd.grad(value.sum(), log_q)
    assert_close(make(name, settings).grad(log_p, log_q.detach()), h, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_zero_at_equality_and_never_negative(name, settings):
    divergence = make(name, settings)
    log_p = logits(5, n=200, scale=6.0).log_softmax(-1)
    assert_close(divergence.value(log_p, log_p.clone()), torch.zeros(200, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (divergence.value(log_p, logits(6, n=200, scale=6.0).log_softmax(-1)) >= -1e-12).all()


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_a_constant_added_to_a_row_of_logits_changes_nothing(name, settings):
    divergence, z, zt = make(name, settings), logits(7), logits(8)
    moved = (z + 123.0).log_softmax(-1), (zt - 55.0).log_softmax(-1)
    assert_close(divergence.value(moved[1], moved[0]), divergence.value(zt.log_softmax(-1), z.log_softmax(-1)))


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_finite_at_logits_of_ten_thousand(name, settings):
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [1e4, 1e4, -1e4]])
    log_q, log_p = z.log_softmax(-1), z.flip(0).log_softmax(-1)
    value, h = make(name, settings).evaluate(log_p, log_q)
    assert torch.isfinite(value).all()
    assert torch.isfinite(logit_grad(h, log_q.exp())).all()


def test_jsd_is_symmetric_at_one_half_and_zero_at_the_ends():
    log_p, log_q = logits(9).log_softmax(-1), logits(10).log_softmax(-1)
    assert_close(JSD(0.5).value(log_p, log_q), JSD(0.5).value(log_q, log_p))
    for beta in (0.0, 1.0):
        value, h = JSD(beta).evaluate(log_p, log_q)
        assert not value.any()
        assert not h.any()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_the_mixture_of_the_two_skewed_divergences(beta):
    """METHODS A: β·SKL_β + (1−β)·SRKL_{1−β}, an identity that ties three implementations together."""
    log_p, log_q = logits(11).log_softmax(-1), logits(12).log_softmax(-1)
    mixture = beta * SkewKL(beta).value(log_p, log_q) + (1 - beta) * SkewReverseKL(1 - beta).value(log_p, log_q)
    assert_close(JSD(beta).value(log_p, log_q), mixture)


def test_skew_goes_to_kl_as_alpha_vanishes():
    log_p, log_q = logits(13, scale=1.0).log_softmax(-1), logits(14, scale=1.0).log_softmax(-1)
    for skewed, plain_one in ((SkewKL, KL()), (SkewReverseKL, ReverseKL())):
        gaps = [(skewed(a).value(log_p, log_q) - plain_one.value(log_p, log_q)).abs().max() for a in (1e-2, 1e-4, 1e-6)]
        assert gaps[0] > gaps[1] > gaps[2]
        assert gaps[2] < 1e-4


def test_the_skewed_gradient_coefficient_is_bounded_where_kl_explodes():
    """|g| ≤ (1−α)/α, with g = h/q: 9 at α = .1. The bound is the reason for skew (METHODS A)."""
    log_p = torch.tensor([[0.0, -50.0]], dtype=torch.float64).log_softmax(-1)
    log_q = torch.tensor([[-50.0, 0.0]], dtype=torch.float64).log_softmax(-1)
    g_skl = SkewKL(0.1).grad(log_p, log_q) / log_q.exp()
    g_kl = KL().grad(log_p, log_q) / log_q.exp()
    assert g_skl.abs().max() <= 9 + 1e-9
    assert g_skl.abs().max() > 8.9
    assert g_kl.abs().max() > 1e20


def test_skew_kl_is_bounded_by_log_one_over_alpha():
    log_p, log_q = logits(15, n=500, scale=40.0).log_softmax(-1), logits(16, n=500, scale=40.0).log_softmax(-1)
    assert SkewKL(0.1).value(log_p, log_q).max() <= math.log(10) + 1e-9


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 1e4])
@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_float32_from_logits_is_float64_up_to_rounding(name, settings, scale):
    """Mixtures of probabilities instead of logarithms: as good, also where most probabilities underflow.

    Rounding: the normaliser of small logits is known to 1e-6, logits of size s to 6e-8·s, and what is unbounded grows with
    them. A quarter of the rows are equal, a quarter opposite, and the largest scale has next to nothing but underflows.
    """
    z, zt = (logits(seed, n=64, v=501, scale=scale, dtype=torch.float32) for seed in (21, 22))
    zt[:16], zt[16:32] = z[:16], -z[16:32]
    divergence = make(name, settings)
    value, h = divergence.between(Rows(zt), Rows(z))
    exact_q = Rows(z.double())
    expected, expected_h = divergence.between(Rows(zt.double()), exact_q)
    assert_close(value.double(), expected, rtol=1e-6, atol=2e-6 * max(scale, 1.0))
    grad, expected_grad = logit_grad(h, Rows(z).prob_NV).double(), logit_grad(expected_h, exact_q.prob_NV)
    assert_close(grad, expected_grad, rtol=1e-6, atol=2e-6 * scale)


def test_the_tables_handed_in_are_left_as_they_were():
    for name, settings in SETTINGS:
        p, q = Rows(logits(23)), Rows(logits(24))
        before = [table.clone() for rows in (p, q) for table in (rows.z_NV, rows.prob_NV, rows.log_NV)]
        _, h = make(name, settings).between(p, q)
        h.fill_(7.0)
        after = [table for rows in (p, q) for table in (rows.z_NV, rows.prob_NV, rows.log_NV)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_normaliser_is_logsumexp():
    z = torch.cat([logits(25, n=20), logits(26, n=20, scale=1e3)])
    rows = Rows(z)
    assert_close(rows.log_NV, z.log_softmax(-1))
    ids = torch.arange(40) % 13
    assert_close(rows.log_at(ids), z.log_softmax(-1)[torch.arange(40), ids])
