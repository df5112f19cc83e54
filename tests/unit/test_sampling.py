"""Test token selection: fast filters and the two-level inverse CDF against slow definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from distillm_cli.rollouts.next_token import Sampling, check_chosen, choose, inverse_cdf, keep_nucleus
from tests.codes import raises_code

LARGE = 50_257


def rows(count: int, vocab: int, seed: int, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def slow_nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return the nucleus by a stable sort, one row at a time, in float64."""
    nucleus = torch.zeros_like(probabilities)
    for row, p_V in enumerate(probabilities):
        mass = 0.0
        for token in p_V.sort(descending=True, stable=True).indices.tolist():
            if mass >= top_p:
                break
            nucleus[row, token] = p_V[token]
            mass += float(p_V[token])
    return nucleus


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), vocab=st.integers(2, 700), spread=st.floats(0, 6), top_p=st.floats(0.01, 0.999))
def test_nucleus_matches_a_full_sort(seed, vocab, spread, top_p):
    probabilities = rows(4, vocab, seed, spread).softmax(-1)
    expected = slow_nucleus(probabilities, top_p)
    keep_nucleus(probabilities, top_p)
    assert torch.equal(probabilities, expected)


def test_nucleus_prefers_the_first_of_equal_tokens():
    probabilities = torch.tensor([[0.1, 0.3, 0.3, 0.3], [0.25, 0.25, 0.25, 0.25]])
    keep_nucleus(probabilities, 0.5)
    assert probabilities.gt(0).tolist() == [[False, True, True, False], [True, True, False, False]]


def test_nucleus_of_a_row_does_not_depend_on_other_rows():
    peaked, flat = rows(1, 5_000, seed=1, spread=4).softmax(-1), torch.full((1, 5_000), 1 / 5_000)
    together, alone = torch.cat([peaked, flat]), peaked.clone()
    keep_nucleus(together, 0.9)
    keep_nucleus(alone, 0.9)
    assert torch.equal(together[:1], alone)
    assert together[1].gt(0).sum() == pytest.approx(4_500, abs=2)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), vocab=st.integers(2, 400), top_k=st.integers(1, 400))
def test_top_k_draws_exactly_the_k_likeliest_tokens(seed, vocab, top_k):
    logits = rows(1, vocab, seed, spread=0.5)
    uniforms = torch.linspace(0, 1, 4_000, dtype=torch.float64)[:-1]
    drawn = set(choose(logits.expand(len(uniforms), -1), Sampling(top_k=top_k), uniforms).tolist())
    assert drawn == set(logits[0].topk(min(top_k, vocab)).indices.tolist())


@pytest.mark.parametrize("vocab", [60, 4_095, 4_096, 4_099, LARGE])
def test_inverse_cdf_matches_a_float64_cumulative_sum(vocab):
    """Check this except where a uniform is closer to a boundary than the rounding error of float32."""
    weights = rows(64, vocab, seed=2).softmax(-1)
    uniforms = torch.from_numpy(np.random.default_rng(0).random(64))
    cumulative = weights.double().cumsum(-1)
    points = uniforms * cumulative[:, -1]
    picks = inverse_cdf(weights, uniforms)
    chosen = picks[:, None]
    below = (cumulative.gather(-1, chosen) - weights.double().gather(-1, chosen)).squeeze(-1)
    assert (points >= below - 1e-6).all()
    assert (points <= cumulative.gather(-1, chosen).squeeze(-1) + 1e-6).all()
    assert (picks == torch.searchsorted(cumulative, points[:, None], right=True).squeeze(-1)).float().mean() > 0.95


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    uniform=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2**-53, 0.5])),
)
def test_inverse_cdf_skips_zero_weights(seed, uniform):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(2, LARGE)
    weights[0, torch.randint(LARGE, (3,), generator=generator)] = torch.rand(3, generator=generator) + 1e-8
    weights[1, torch.randint(LARGE, (1,), generator=generator)] = 1e-30
    picks = inverse_cdf(weights, torch.full((2,), uniform, dtype=torch.float64))
    assert (weights.gather(-1, picks[:, None]) > 0).all()


def test_inverse_cdf_follows_a_large_softmax():
    """Test 50,257 tokens by chi-square, with the rare tokens in bins."""
    weights, n = rows(1, LARGE, seed=4, spread=3.0).softmax(-1), 10_000
    uniforms = torch.from_numpy(np.random.default_rng(3).random(n))
    picks = torch.cat([inverse_cdf(weights.expand(100, -1), part) for part in uniforms.split(100)])
    p = weights[0].double()
    bins = torch.empty(LARGE, dtype=torch.int64)
    order = p.argsort(descending=True)
    bins[order] = torch.where(torch.arange(LARGE) < 100, torch.arange(LARGE), 100 + torch.arange(LARGE) % 100)
    counts = torch.bincount(bins[picks], minlength=200).numpy()
    expected = torch.zeros(200, dtype=torch.float64).index_add_(0, bins, p).numpy() * n
    assert stats.chisquare(counts, expected * (counts.sum() / expected.sum())).pvalue > 1e-3


@pytest.mark.parametrize("vocab", [60, LARGE])
def test_extreme_temperatures_do_not_overflow(vocab):
    """Check that very low temperatures give the argmax, and very high ones a uniform choice of the allowed tokens."""
    logits, uniforms = rows(32, vocab, seed=5, spread=1e4), torch.linspace(0, 1, 33, dtype=torch.float64)[:-1]
    for cold in (1e-12, 1e-38, 1e-45, 1e-320):
        assert torch.equal(choose(logits, Sampling(temperature=cold), uniforms), logits.argmax(-1)), cold
    logits[:, ::2] = -torch.inf
    for hot in (1e38, 1e300):
        expected_tokens = (uniforms * (vocab // 2)).long() * 2 + 1
        assert (choose(logits, Sampling(temperature=hot), uniforms) - expected_tokens).abs().max() <= 2, hot


@pytest.mark.parametrize("vocab", [60, LARGE])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.0), Sampling(temperature=0.5), Sampling(top_k=5), Sampling(top_p=0.9)],
    ids=["plain", "greedy", "cold", "top-k", "top-p"],
)
def test_row_without_finite_maximum_gives_no_token(sampling, vocab):
    logits, uniforms = rows(5, vocab, seed=6), torch.full((5,), 0.5, dtype=torch.float64)
    expected = choose(logits[[0, 4]], sampling, uniforms[:2])
    logits[1], logits[2, vocab - 2], logits[3, 7] = torch.nan, torch.inf, torch.nan
    found = choose(logits, sampling, uniforms)
    assert found.tolist() == [expected[0], -1, -1, -1, expected[1]]
    check_chosen(expected.numpy())
    with raises_code("numbers.not_finite") as error:
        check_chosen(found.numpy())
    assert error.value.exit_code == 6
