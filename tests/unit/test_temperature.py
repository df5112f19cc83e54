"""Test the temperature of the divergence in training against its definition in float64."""

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from distillm_cli.config.schema import ObjectiveConfig
from distillm_cli.losses import objectives
from distillm_cli.losses.divergences import KL, SkewKL, TokenDistributions, build_divergence, logit_grad
from distillm_cli.losses.families import Interpolated, Tempered
from distillm_cli.rollouts.scheduler import Source
from tests.unit.test_divergences import SETTINGS

T = 2.5
N, V = 5, 11


def logits(seed):
    return torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


@pytest.mark.parametrize(("scale", "factor"), [("squared", T**2), ("none", 1.0)])
@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_divergence_is_that_of_softened_distributions(name, settings, scale, factor):
    config = ObjectiveConfig(divergence=name, temperature=T, temperature_scale=scale, **settings)
    objective = objectives.build(config)
    args_N2 = torch.rand(N, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    targets_N = torch.arange(N)
    divergence = objective.weights(Source.DATASET).divergence.for_tokens(targets_N, args_N2)
    plain = build_divergence(config) if name != "taid" else Interpolated(config.taid_start)
    plain = plain.for_tokens(targets_N, args_N2)
    p_z, q_z = logits(0), logits(1)

    soft_p, soft_q = TokenDistributions(p_z / T), TokenDistributions(q_z / T)
    value_N, h_NV = plain.between(soft_p, soft_q)
    q = TokenDistributions(q_z)
    found_N, found_h_NV = divergence.between(TokenDistributions(p_z), q)
    assert_close(found_N, factor * value_N)
    # The chain rule: a change of z changes z / T by 1/T of it.
    assert_close(logit_grad(found_h_NV, q.prob_NV), factor / T * logit_grad(h_NV, soft_q.prob_NV))


def test_softened_gradient_is_that_of_finite_differences():
    divergence = Tempered(SkewKL(0.1), T, squared=False)
    p, z_NV = TokenDistributions(logits(0)), logits(1)
    q = TokenDistributions(z_NV)
    _, h_NV = divergence.between(p, q)
    step = 1e-6
    moved = torch.eye(V, dtype=torch.float64)[:, None, :] * step
    values = [
        divergence.between(p, TokenDistributions(z_NV + sign * dz), with_grad=False)[0]
        for dz in moved
        for sign in (1, -1)
    ]
    differences_NV = torch.stack(values).reshape(V, 2, N).diff(dim=1)[:, 0].T / (-2 * step)
    assert_close(logit_grad(h_NV, q.prob_NV), differences_NV, rtol=1e-6, atol=1e-8)


def test_validation_has_no_temperature():
    objective = objectives.build(ObjectiveConfig(divergence="kl", temperature=4.0))
    assert objective.held_out.divergence == KL()
    assert objective.name == "kl (T = 4)"
    assert objectives.build(ObjectiveConfig(divergence="kl")).weights(Source.DATASET).divergence == KL()


def test_halves_of_a_divergence_have_the_temperature():
    objective = objectives.build(ObjectiveConfig(divergence="skl", by_source=True, temperature=T))
    halves = [objective.weights(source).divergence for source in (Source.DATASET, Source.ROLLOUT)]
    assert halves == [Tempered(SkewKL(0.1), T), Tempered(SkewKL(0.1).mirror(), T)]


def test_policy_gradient_has_no_temperature():
    with pytest.raises(ValidationError, match=r"objective\.temperature does not apply"):
        ObjectiveConfig(divergence="rkl", policy_gradient=True, temperature=2.0)
