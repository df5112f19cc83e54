"""Test sampling from a mixture of teacher and student, and the log-probabilities of its tokens."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from distillm_cli.config.schema import RolloutConfig
from distillm_cli.losses.fused import target_log_probs
from distillm_cli.rollouts.mixture import Mixture, MixtureSampler
from distillm_cli.rollouts.next_token import Sampling, distribution
from distillm_cli.rollouts.sampler import ModelSampler, sample
from distillm_cli.types import LOG_DRAWN, LOG_P, LOG_Q, Sequence, collate
from tests.unit.test_rollout import backbone, prompts

V = 6


class BigramModel:
    """Predict the next token from the last one only, by a table of logits [V, V]."""

    context, stop_ids, forced_first = None, frozenset({0}), None

    def __init__(self, seed):
        self.logits_VV = torch.randn(V, V, generator=torch.Generator().manual_seed(seed)) * 1.5

    def decode(self, prompts):
        last = torch.tensor([int(p[-1]) for p in prompts])
        table = self.logits_VV

        class Decoding:
            def __init__(self):
                self.last = last

            def logits(self, tokens_B):
                self.last = self.last if tokens_B is None else tokens_B
                return table[self.last].clone()

            def keep(self, rows_B):
                self.last = self.last[rows_B]

        return Decoding()


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7])
@pytest.mark.parametrize("shape", [Sampling(), Sampling(temperature=0.5), Sampling(top_k=2), Sampling(top_p=0.6)])
def test_tokens_follow_the_mixture_distribution(alpha, shape):
    """Test α·p + (1 − α)·q by chi-square for the first token and for the second after each first token."""
    student, teacher, n = BigramModel(1), BigramModel(2), 6_000
    mixture = Mixture(student, teacher, alpha, shape)
    draws = sample(mixture, [np.array([3])] * n, Sampling(max_new_tokens=2), [(4, i) for i in range(n)])
    expected = alpha * distribution(teacher.logits_VV, shape) + (1 - alpha) * distribution(student.logits_VV, shape)
    groups = {3: [d.tokens[0] for d in draws]}
    for first in range(1, V):
        groups[first] = groups.get(first, []) + [d.tokens[1] for d in draws if d.tokens[0] == first]
    tested = 0
    for last, tokens in groups.items():
        counts, p = np.bincount(tokens, minlength=V), expected[last].double().numpy()
        assert counts[p == 0].sum() == 0
        if len(tokens) > 50 and (p > 0).sum() > 1:
            tested += 1
            assert stats.chisquare(counts[p > 0], p[p > 0] / p.sum() * len(tokens)).pvalue > 1e-4
    assert tested >= 2


def test_mixture_of_greedy_models():
    """Check that the teacher's token has probability α when both models are greedy."""
    student, teacher = BigramModel(1), BigramModel(2)
    student.logits_VV[3], teacher.logits_VV[3] = torch.eye(V)[1], torch.eye(V)[2]
    mixture = Mixture(student, teacher, 0.2, Sampling(temperature=0))
    draws = sample(mixture, [np.array([3])] * 4_000, Sampling(max_new_tokens=1), [(4, i) for i in range(4_000)])
    counts = np.bincount([d.tokens[0] for d in draws], minlength=V)
    assert set(np.flatnonzero(counts)) == {1, 2}
    assert stats.binomtest(int(counts[2]), 4_000, 0.2).pvalue > 1e-4


def sampled(alpha, rows, seed=7, **more):
    sampler = MixtureSampler(
        backbone("gpt2", seed=1),
        backbone("llama", seed=2),
        RolloutConfig(max_new_tokens=8, teacher_mix=alpha, **more),
        max_length=30,
        seed=seed,
    )
    return sampler.sample(rows, 3)


def rows():
    return [Sequence(p, np.zeros(0, np.int32), i) for i, p in enumerate(prompts(*[3, 9, 5, 1, 7, 4] * 3))]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_match_a_pass_over_the_whole_output(temperature):
    """Check outputs of different lengths, sampled with caches and dropped rows."""
    outputs = sampled(0.2, rows(), temperature=temperature)
    assert len({len(s.response) for s in outputs}) > 2
    student, teacher = backbone("gpt2", seed=1), backbone("llama", seed=2)
    for s in outputs:
        batch = collate([s])
        with torch.no_grad():
            log_q, log_p = (target_log_probs(m.hidden(batch), m.head(), batch.targets_N) for m in (student, teacher))
            shaped = [
                (m.head().logits(m.hidden(batch)) / temperature).softmax(-1).gather(-1, batch.targets_N[:, None])[:, 0]
                for m in (student, teacher)
            ]
        assert s.log_probs_NK.shape == (len(s.response), 3)
        assert_close(s.log_probs_NK[:, LOG_P], log_p, rtol=1e-4, atol=1e-4)
        assert_close(s.log_probs_NK[:, LOG_Q], log_q, rtol=1e-4, atol=1e-4)
        assert_close(s.log_probs_NK[:, LOG_DRAWN], (0.8 * shaped[0] + 0.2 * shaped[1]).log(), rtol=1e-4, atol=1e-4)


def test_samples_do_not_depend_on_the_batch():
    together = sampled(0.2, rows())
    half = sampled(0.2, rows()[:9])
    for a, b in zip(together, half, strict=False):
        assert a.response.tolist() == b.response.tolist()
        assert_close(a.log_probs_NK, b.log_probs_NK, rtol=1e-4, atol=1e-5)
    assert sampled(0.2, rows(), seed=8)[0].response.tolist() != together[0].response.tolist()


def test_mixture_without_teacher_matches_student_sampler():
    mixed = sampled(0.0, rows())
    plain = ModelSampler(backbone("gpt2", seed=1), RolloutConfig(max_new_tokens=8), max_length=30, seed=7)
    for a, b in zip(mixed, plain.sample(rows(), 3), strict=True):
        assert a.response.tolist() == b.response.tolist()
        assert (a.prompt.tolist(), a.row) == (b.prompt.tolist(), b.row)
        assert_close(a.log_probs_NK[:, LOG_DRAWN], a.log_probs_NK[:, LOG_Q], rtol=1e-5, atol=1e-5)


def test_importance_weight_is_bounded():
    outputs = sampled(0.2, rows())
    w = torch.cat([(s.log_probs_NK[:, LOG_Q] - s.log_probs_NK[:, LOG_DRAWN]).exp() for s in outputs])
    assert w.max() <= 1 / 0.8 + 1e-4
    assert w.min() < 0.9


def test_mixture_context_is_the_shorter_one():
    student, teacher = BigramModel(1), BigramModel(2)
    student.context, teacher.context = 20, 9
    assert Mixture(student, teacher, 0.2, Sampling()).context == 9
    teacher.context = None
    assert Mixture(student, teacher, 0.2, Sampling()).context == 20
