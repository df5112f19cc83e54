"""Test every divergence against its definition in float64, autograd, and its mathematical properties."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from distillm_cli.config.schema import ObjectiveConfig
from distillm_cli.losses.divergences import (
    JSD,
    KL,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TokenDistributions,
    build_divergence,
    logit_grad,
)
from distillm_cli.losses.families import AdaptiveKL, AlphaBeta, AlphaMixture, Decoupled, Interpolated
from tests import reference_divergences

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
    ("akl", {}),
    ("akl", {"akl_mu": 0.9}),
    ("ab", {}),
    ("ab", {"ab_alpha": 0.0, "ab_beta": 0.7}),
    ("ab", {"ab_alpha": 0.6, "ab_beta": 0.0}),
    ("ab", {"ab_alpha": 1.0, "ab_beta": 1.0}),
    ("amid", {}),
    ("amid", {"amid_a": -1.0}),
    ("amid", {"amid_a": 1.0, "amid_lambda": 0.4}),
    ("amid", {"amid_a": -5.0, "amid_from": "student"}),
    ("amid", {"amid_a": 3.0, "amid_divergence": "rkl"}),
    ("amid", {"amid_a": 0.0, "amid_divergence": "rkl", "amid_from": "student"}),
    ("amid", {"amid_divergence": "ab"}),
    ("amid", {"amid_divergence": "ab", "amid_from": "student", "ab_alpha": 0.5, "ab_beta": 0.3}),
    ("taid", {}),
    ("atkd", {}),
]
# Powers that grow without bound, correct as long as they are finite.
UNBOUNDED = [
    ("ab", {"ab_alpha": 0.0, "ab_beta": 0.0}),
    ("ab", {"ab_alpha": 0.5, "ab_beta": -0.5}),
    ("ab", {"ab_alpha": 2.0, "ab_beta": -1.0}),
    ("ab", {"ab_alpha": -0.3, "ab_beta": 1.0}),
    ("ab", {"ab_alpha": -0.7, "ab_beta": -0.2}),
    ("ab", {"ab_alpha": -2.0, "ab_beta": 0.5}),
]


class WithTargets:
    """Supply targets to a divergence that needs them."""

    def __init__(self, name, settings):
        self.built = build_divergence(ObjectiveConfig(divergence=name, **settings))

    def value(self, log_p, log_q):
        return self.built.for_tokens(reference_divergences.some_targets(log_p), None).value(log_p, log_q)

    def grad(self, log_p, log_q):
        return self.built.for_tokens(reference_divergences.some_targets(log_p), None).grad(log_p, log_q)

    def evaluate(self, log_p, log_q):
        return self.built.for_tokens(reference_divergences.some_targets(log_p), None).evaluate(log_p, log_q)

    def between(self, p, q):
        return self.built.for_tokens(reference_divergences.some_targets(p.z_NV), None).between(p, q)


def make(name, settings):
    return WithTargets(name, settings)


def logits(seed, n=7, v=13, scale=3.0, dtype=torch.float64):
    return scale * torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("name", "settings"), SETTINGS + UNBOUNDED)
def test_value_and_logit_gradient_match_the_definition(name, settings):
    z, zt = logits(0).requires_grad_(), logits(1)
    expected = reference_divergences.divergence(name, zt.softmax(-1), z.softmax(-1), **settings)
    (expected_grad,) = torch.autograd.grad(expected.sum(), z)

    log_q, log_p = z.detach().log_softmax(-1), zt.log_softmax(-1)
    divergence = make(name, settings)
    assert_close(divergence.value(log_p, log_q), expected.detach(), rtol=1e-10, atol=1e-12)
    assert_close(logit_grad(divergence.grad(log_p, log_q), log_q.exp()), expected_grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "settings"), SETTINGS + UNBOUNDED)
def test_h_is_the_derivative_by_log_q(name, settings):
    """Check each entry of h, as docs/methods.md#divergences defines it, not only its projection on the simplex."""
    log_p, log_q = logits(3).log_softmax(-1), logits(4).log_softmax(-1).requires_grad_()
    value = reference_divergences.divergence(name, log_p.exp(), log_q.exp(), **settings)
    (h,) = torch.autograd.grad(value.sum(), log_q)
    assert_close(make(name, settings).grad(log_p, log_q.detach()), h, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "settings"), SETTINGS + UNBOUNDED)
def test_zero_at_equality_and_never_negative(name, settings):
    divergence = make(name, settings)
    log_p = logits(5, n=200, scale=6.0).log_softmax(-1)
    assert_close(divergence.value(log_p, log_p.clone()), torch.zeros(200, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (divergence.value(log_p, logits(6, n=200, scale=6.0).log_softmax(-1)) >= -1e-12).all()


@pytest.mark.parametrize(("name", "settings"), SETTINGS + UNBOUNDED)
def test_value_is_invariant_to_shifted_logits(name, settings):
    divergence, z, zt = make(name, settings), logits(7), logits(8)
    shifted = (z + 123.0).log_softmax(-1), (zt - 55.0).log_softmax(-1)
    assert_close(divergence.value(shifted[1], shifted[0]), divergence.value(zt.log_softmax(-1), z.log_softmax(-1)))


@pytest.mark.parametrize(("name", "settings"), SETTINGS + UNBOUNDED)
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
def test_jsd_is_a_mixture_of_skewed_divergences(beta):
    """Check the identity β·SKL_β + (1−β)·SRKL_{1−β} of docs/methods.md#divergences."""
    log_p, log_q = logits(11).log_softmax(-1), logits(12).log_softmax(-1)
    mixture = beta * SkewKL(beta).value(log_p, log_q) + (1 - beta) * SkewReverseKL(1 - beta).value(log_p, log_q)
    assert_close(JSD(beta).value(log_p, log_q), mixture)


def test_skewed_divergences_converge_to_kl():
    log_p, log_q = logits(13, scale=1.0).log_softmax(-1), logits(14, scale=1.0).log_softmax(-1)
    for skewed, unskewed in ((SkewKL, KL()), (SkewReverseKL, ReverseKL())):
        gaps = [(skewed(a).value(log_p, log_q) - unskewed.value(log_p, log_q)).abs().max() for a in (1e-2, 1e-4, 1e-6)]
        assert gaps[0] > gaps[1] > gaps[2]
        assert gaps[2] < 1e-4


def test_gradient_coefficient_of_skew_kl_is_bounded():
    """Check |g| ≤ (1−α)/α with g = h/q, 9 at α = 0.1, while that of KL is unbounded (docs/methods.md#divergences)."""
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
def test_float32_matches_float64_up_to_rounding(name, settings, scale):
    """Check mixtures of probabilities in float32, also where most probabilities underflow.

    Tolerances: the normalizer of small logits is exact to 1e-6, logits of size s to 6e-8·s, and unbounded values grow with
    them. The relative error of a power of a probability is that of its logarithm. A quarter of the rows are equal, a quarter
    opposite, and at the largest scale nearly all probabilities underflow.
    """
    z, zt = (logits(seed, n=64, v=501, scale=scale, dtype=torch.float32) for seed in (21, 22))
    zt[:16], zt[16:32] = z[:16], -z[16:32]
    divergence = make(name, settings)
    value, h = divergence.between(TokenDistributions(zt), TokenDistributions(z))
    exact_q = TokenDistributions(z.double())
    expected, expected_h = divergence.between(TokenDistributions(zt.double()), exact_q)
    relative = 1e-7 * scale if name == "ab" and scale == 30 else 1e-6
    assert_close(value.double(), expected, rtol=relative, atol=2e-6 * max(scale, 1.0))
    grad, expected_grad = logit_grad(h, TokenDistributions(z).prob_NV).double(), logit_grad(expected_h, exact_q.prob_NV)
    assert_close(grad, expected_grad, rtol=1e-6, atol=2e-6 * scale)


def test_input_tables_are_not_modified():
    for name, settings in SETTINGS + UNBOUNDED:
        p, q = TokenDistributions(logits(23)), TokenDistributions(logits(24))
        before = [table.clone() for rows in (p, q) for table in (rows.z_NV, rows.prob_NV, rows.log_NV)]
        _, h = make(name, settings).between(p, q)
        h.fill_(7.0)
        after = [table for rows in (p, q) for table in (rows.z_NV, rows.prob_NV, rows.log_NV)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_normalizer_is_logsumexp():
    z = torch.cat([logits(25, n=20), logits(26, n=20, scale=1e3)])
    rows = TokenDistributions(z)
    assert_close(rows.log_NV, z.log_softmax(-1))
    ids = torch.arange(40) % 13
    assert_close(rows.log_at(ids), z.log_softmax(-1)[torch.arange(40), ids])


# --- families ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_entries_without_mass_do_not_change_the_loss(name, settings):
    """Check the value and the gradient of the real entries for a padded vocabulary."""
    z, zt = logits(31), logits(32)
    divergence, padding = make(name, settings), torch.full((7, 3), -1e4, dtype=torch.float64)
    value, h = divergence.evaluate(zt.log_softmax(-1), z.log_softmax(-1))
    padded_q = torch.cat([z, padding], -1).log_softmax(-1)
    padded_value, padded_h = divergence.evaluate(
        torch.cat([zt, padding + logits(33, v=3)], -1).log_softmax(-1), padded_q
    )
    assert_close(padded_value, value)
    assert_close(logit_grad(padded_h, padded_q.exp())[:, :13], logit_grad(h, z.softmax(-1)))


def gradient(divergence, log_p, log_q):
    return logit_grad(divergence.grad(log_p, log_q), log_q.exp())


@pytest.mark.parametrize(("exponents", "limit_case"), [((1.0, 0.0), KL()), ((0.0, 1.0), ReverseKL())])
def test_alpha_beta_equals_kl_and_reverse_kl_at_the_ends(exponents, limit_case):
    log_p, log_q = logits(34).log_softmax(-1), logits(35).log_softmax(-1)
    assert_close(AlphaBeta(*exponents).value(log_p, log_q), limit_case.value(log_p, log_q))
    assert_close(gradient(AlphaBeta(*exponents), log_p, log_q), gradient(limit_case, log_p, log_q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "exponents", [(1.0, 0.0), (0.0, 1.0), (0.0, 0.7), (0.6, 0.0), (0.0, 0.0), (0.5, -0.5), (-0.4, 0.4)]
)
def test_alpha_beta_is_continuous_at_zero_denominators(exponents, dtype):
    """Check all sides, down to where the printed formula loses all digits in float32."""
    p, q = TokenDistributions(logits(36, dtype=dtype)), TokenDistributions(logits(37, dtype=dtype))
    limit, limit_h = AlphaBeta(*exponents).between(p, q)
    for epsilon in (1e-2, 1e-4, 1e-6):
        for a, b in ((epsilon, 0), (-epsilon, 0), (0, epsilon), (0, -epsilon), (epsilon, -epsilon), (epsilon, epsilon)):
            value, h = AlphaBeta(exponents[0] + a, exponents[1] + b).between(p, q)
            bound = 100 * epsilon + (1e-5 if dtype == torch.float32 else 0)  # powers of probabilities down to e^−15
            assert_close(value, limit, rtol=bound, atol=bound)
            assert_close(h, limit_h, rtol=bound, atol=bound)


def test_mirrored_alpha_beta_swaps_its_exponents():
    log_p, log_q = logits(38).log_softmax(-1), logits(39).log_softmax(-1)
    for _, settings in UNBOUNDED:
        divergence = AlphaBeta(settings["ab_alpha"], settings["ab_beta"])
        assert_close(divergence.mirror().value(log_q, log_p), divergence.value(log_p, log_q))


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
def test_arithmetic_assistant_with_kl_is_skew_kl(lam):
    """Check AMiD at a = −1: ``skl`` with α = λ from the teacher, ``srkl`` with α = 1 − λ from the student."""
    log_p, log_q = logits(40).log_softmax(-1), logits(41).log_softmax(-1)
    for mixture, skewed in (
        (AlphaMixture(-1.0, lam, KL()), SkewKL(lam)),
        (AlphaMixture(-1.0, lam, KL(), from_student=True), SkewReverseKL(1 - lam)),
    ):
        assert_close(mixture.value(log_p, log_q), skewed.value(log_p, log_q))
        assert_close(gradient(mixture, log_p, log_q), gradient(skewed, log_p, log_q))


def test_geometric_assistant_is_the_limit_at_one():
    log_p, log_q = logits(42).log_softmax(-1), logits(43).log_softmax(-1)
    limit = AlphaMixture(1.0, 0.3, KL())
    for epsilon in (1e-2, 1e-4, 1e-8):
        for a in (1 - epsilon, 1 + epsilon):
            assert_close(
                AlphaMixture(a, 0.3, KL()).value(log_p, log_q), limit.value(log_p, log_q), rtol=10 * epsilon, atol=0
            )
            assert_close(
                gradient(AlphaMixture(a, 0.3, KL()), log_p, log_q),
                gradient(limit, log_p, log_q),
                rtol=0,
                atol=10 * epsilon,
            )


def test_larger_a_moves_assistant_to_smaller_probability():
    p, q = TokenDistributions(logits(44)), TokenDistributions(logits(45))
    assistants = [AlphaMixture(a, 0.5, KL())._assistant(p.log_NV, q.log_NV)[0] for a in (-50.0, -1.0, 1.0, 3.0, 50.0)]
    largest, smallest = torch.maximum(p.prob_NV, q.prob_NV), torch.minimum(p.prob_NV, q.prob_NV)
    assert_close(assistants[0].prob_NV, largest / largest.sum(-1, keepdim=True), rtol=0, atol=0.05)
    assert_close(assistants[-1].prob_NV, smallest / smallest.sum(-1, keepdim=True), rtol=0, atol=0.05)


@pytest.mark.parametrize("mu", [0.01, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("scale", [0.05, 4.0])
def test_akl_finds_the_head_of_any_size(scale, mu):
    """Check heads of one token, of more tokens than the first search covers, and of all 401 entries."""
    p, q = (logits(seed, n=5, v=401, scale=scale).softmax(-1) for seed in (46, 47))
    assert_close(AdaptiveKL(mu).value(p.log(), q.log()), reference_divergences.adaptive_kl(p, q, mu))


def test_taid_target_moves_from_student_to_teacher():
    log_p, log_q = logits(48).log_softmax(-1), logits(49).log_softmax(-1)
    values = [Interpolated(t).value(log_p, log_q) for t in (0.0, 0.4, 0.8, 1.0)]
    assert_close(values[0], torch.zeros(7, dtype=torch.float64))
    assert all((a < b).all() for a, b in itertools.pairwise(values))
    assert_close(values[-1], KL().value(log_p, log_q))
    assert_close(Interpolated(1.0).grad(log_p, log_q), KL().grad(log_p, log_q))


@pytest.mark.parametrize("scale", [3.0, 30.0])
def test_decoupled_terms_with_kl_weights_equal_kl(scale):
    """Check KL = TKD + (1 − p(target))·DKD. ATKD changes these weights."""
    log_p, log_q = logits(50, scale=scale).log_softmax(-1), logits(51, scale=scale).log_softmax(-1)
    targets = reference_divergences.some_targets(log_p)
    rest = 1 - log_p.exp()[torch.arange(7), targets]
    divergence = Decoupled().for_tokens(targets, torch.stack([torch.ones(7, dtype=torch.float64), rest], -1))
    assert_close(divergence.value(log_p, log_q), KL().value(log_p, log_q))
    assert_close(gradient(divergence, log_p, log_q), gradient(KL(), log_p, log_q))


def test_decoupled_terms_with_token_weights():
    z, zt = logits(52).requires_grad_(), logits(53)
    targets, weights = torch.tensor([0, 4, 12, 3, 3, 0, 7]), torch.rand(7, 2, dtype=torch.float64)
    tkd, dkd = reference_divergences.decoupled(zt.softmax(-1), z.softmax(-1), targets)
    expected = weights[:, 0] * tkd + weights[:, 1] * dkd
    (expected_grad,) = torch.autograd.grad(expected.sum(), z)
    log_p, log_q = zt.log_softmax(-1), z.detach().log_softmax(-1)
    divergence = Decoupled().for_tokens(targets, weights)
    assert_close(divergence.value(log_p, log_q), expected.detach())
    assert_close(gradient(divergence, log_p, log_q), expected_grad)
    with pytest.raises(ValueError, match="targets"):
        Decoupled().value(log_p, log_q)


def test_akl_with_mu_one_equals_kl_in_float32():
    """Check the case where the cumulative mass rounds to 1 before the last entry."""
    p, q = (6 * logits(seed, n=20, v=401, scale=1.0, dtype=torch.float32) for seed in (48, 49))
    assert bool((p.softmax(-1).sort(descending=True).values.cumsum(-1)[:, -2] >= 1).any()), (
        "the test needs a mass that rounds to 1"
    )
    akl, kl = (each.value(p.log_softmax(-1), q.log_softmax(-1)) for each in (AdaptiveKL(1.0), KL()))
    assert_close(akl, kl)
    value_at_equality = AdaptiveKL(1.0).value(p.log_softmax(-1), p.log_softmax(-1))
    assert_close(value_at_equality, torch.zeros_like(value_at_equality))
