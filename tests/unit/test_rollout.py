"""Test the sampler: exact draws, independence of rows in a batch, and supervised tokens of rollouts."""

import numpy as np
import pytest
import torch
from scipy import stats

from distillm_cli.config.schema import RolloutConfig
from distillm_cli.models.backbone import Backbone
from distillm_cli.rollouts.next_token import Sampling, choose
from distillm_cli.rollouts.sampler import ModelSampler, sample, sample_all, uniforms
from distillm_cli.training.events import Warned
from distillm_cli.types import Sequence, collate
from tests import tiny
from tests.codes import raises_code


def backbone(family="gpt2", seed=0, spread=2.0):
    tokenizer = tiny.tokenizer()
    return Backbone(tiny.model(family, len(tokenizer), seed=seed, spread=spread), tokenizer)


def prompts(*lengths):
    return [s.prompt + 3 for s in tiny.sequences([(n, 1) for n in lengths], vocab=20, seed=5)]


def test_sampling_follows_the_softmax():
    """Test 40,000 draws by inverse cumulative sum with chi-square."""
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 1.5
    n = 40_000
    uniforms = torch.from_numpy(np.random.default_rng(1).random(n))
    counts = torch.bincount(choose(logits.expand(n, -1), Sampling(), uniforms), minlength=50).numpy()
    expected = logits.softmax(-1)[0].double().numpy() * n
    assert stats.chisquare(counts, expected * (counts.sum() / expected.sum())).pvalue > 1e-3


def test_sampling_follows_the_filtered_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -8.0]])
    n = 20_000
    uniforms = torch.from_numpy(np.random.default_rng(2).random(n))
    for sampling, keep in ((Sampling(top_k=2), 2), (Sampling(top_p=0.7), 2), (Sampling(temperature=0.5, top_k=3), 3)):
        expected = (logits / sampling.temperature).softmax(-1)[0].double()
        expected[keep:] = 0
        expected = (expected / expected.sum() * n)[:keep].numpy()
        counts = torch.bincount(choose(logits.expand(n, -1), sampling, uniforms), minlength=5).numpy()
        assert counts[keep:].sum() == 0
        assert stats.chisquare(counts[:keep], expected).pvalue > 1e-3


def test_zero_probability_tokens_are_not_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    tokens = choose(logits, Sampling(), torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64))
    assert set(tokens.tolist()) <= {1, 3}


def test_each_row_has_its_own_philox_stream():
    """Compare with a numpy generator for the same key, also at the ends of the range of keys."""
    seeds = [(10, (7 << 32) + 3), (10, 2**63 + 1), (-1, 0), (10, 0), (2**64 - 1, 5)]
    for (seed, row), found_T in zip(seeds, uniforms(seeds, 9), strict=True):
        key = np.array([seed % 2**64, row % 2**64], dtype=np.uint64)
        assert found_T.tolist() == np.random.Generator(np.random.Philox(key=key)).random(9).tolist()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sample_of_a_row_does_not_depend_on_its_batch(family):
    """Compare rows sampled alone with rows in a batch with left padding and dropped rows."""
    model, ps = backbone(family), prompts(*[3, 9, 5, 1, 7, 4] * 4)
    sampling, seeds = Sampling(max_new_tokens=12), [(7, i) for i in range(24)]
    together = sample(model, ps, sampling, seeds, entropy=True)
    for p, seed, out in zip(ps, seeds, together, strict=True):
        (alone,) = sample(model, [p], sampling, [seed], entropy=True)
        assert alone.tokens.tolist() == out.tokens.tolist()
        assert alone.complete == out.complete
        assert alone.entropy == pytest.approx(out.entropy, rel=1e-4)
    assert {out.complete for out in together} == {True, False}  # some rows finished early


def test_output_ends_with_stop_token_or_is_incomplete():
    model = backbone()
    stop = model.tokenizer.eos_token_id
    for out in sample(model, prompts(*[4] * 40), Sampling(max_new_tokens=10), [(0, i) for i in range(40)]):
        assert (out.tokens[-1] == stop) == out.complete
        assert stop not in out.tokens[:-1]
        assert out.complete or len(out.tokens) == 10


def test_greedy_matches_generate_with_no_repeat_ngrams():
    model = backbone("gpt2", spread=4.0)
    for n in (0, 2, 3):
        (p,) = prompts(6)
        expected = model.model.generate(
            torch.from_numpy(p.astype(np.int64))[None], do_sample=False, max_new_tokens=20, no_repeat_ngram_size=n,
            eos_token_id=0, pad_token_id=0,
        )[0, len(p) :]  # fmt: skip
        (out,) = sample(model, [p], Sampling(temperature=0, max_new_tokens=20, no_repeat_ngram_size=n), [(0, 0)])
        assert out.tokens.tolist() == expected.tolist()


def test_min_new_tokens_suppresses_the_stop_token():
    outs = sample(
        backbone(), prompts(*[3] * 20), Sampling(max_new_tokens=8, min_new_tokens=5), [(1, i) for i in range(20)]
    )
    assert all(len(out.tokens) > 5 or not out.complete for out in outs)


def test_context_limits_the_output_length():
    model = backbone()
    outs = sample(model, prompts(tiny.CONTEXT - 3, 2), Sampling(max_new_tokens=40, min_new_tokens=39), [(0, 0), (0, 1)])
    assert [len(out.tokens) for out in outs] == [3, 40]
    with raises_code("data.row_too_long", f"{tiny.CONTEXT} tokens"):
        sample(model, prompts(tiny.CONTEXT), Sampling(), [(0, 0)])


def test_sample_all_does_not_depend_on_batch_size():
    model, ps = backbone(), prompts(5, 2, 8, 3, 9, 1, 4)
    runs = []
    for batch_size in (1, 3, 16):
        outs = dict(sample_all(model, ps, Sampling(max_new_tokens=6), seed=4, batch_size=batch_size))
        assert sorted(outs) == list(range(7))
        runs.append([outs[i].tokens.tolist() for i in range(7)])
    assert runs[0] == runs[1] == runs[2]


def test_rollouts_supervise_first_and_end_token():
    """Check for two known mistakes (docs/methods.md#mistakes): an unsupervised first token and a missing end token."""
    model = backbone()
    rows = [Sequence(p, np.array([9, 9], dtype=np.int32), row) for row, p in enumerate(prompts(*range(2, 14)))]
    outs = ModelSampler(model, RolloutConfig(max_new_tokens=6), max_length=32, seed=3).sample(rows, step=5)
    assert [o.row for o in outs] == [r.row for r in rows]
    stop, batch = model.tokenizer.eos_token_id, collate(outs)
    for b, out in enumerate(outs):
        of_row = batch.rows_N == b
        assert batch.targets_N[of_row].tolist() == out.response.tolist()
        first = batch.positions_N[of_row][0].item()
        assert first == b * batch.ids_BT.shape[1] + len(out.prompt) - 1
        assert (out.response[-1] == stop) or len(out.response) == 6
    assert any(out.response[-1] == stop for out in outs)
    repeated = ModelSampler(model, RolloutConfig(max_new_tokens=6), max_length=32, seed=3).sample(rows, step=5)
    other = ModelSampler(model, RolloutConfig(max_new_tokens=6), max_length=32, seed=3).sample(rows, step=6)
    assert [o.response.tolist() for o in repeated] == [o.response.tolist() for o in outs]
    assert [o.response.tolist() for o in other] != [o.response.tolist() for o in outs]


@pytest.mark.parametrize(("prefix", "lengths"), [(None, {0: 9, 50: 9, 99: 9}), (4, {0: 4, 99: 4}), (40, {0: 9}),
                                                 ("2->6", {0: 2, 25: 3, 50: 4, 99: 6})])  # fmt: skip
def test_prefix_cuts_rollouts_and_grows_over_the_run(prefix, lengths):
    model = backbone()
    rows = [Sequence(p, np.array([9], dtype=np.int32), row) for row, p in enumerate(prompts(*range(2, 14)))]
    settings = {"max_length": 40, "seed": 3, "steps": 100}
    whole = ModelSampler(model, RolloutConfig(max_new_tokens=9), **settings)
    cut = ModelSampler(model, RolloutConfig(max_new_tokens=9, prefix=prefix), **settings)
    for step, longest in lengths.items():
        expected = [o.response[:longest].tolist() for o in whole.sample(rows, step)]
        assert [o.response.tolist() for o in cut.sample(rows, step)] == expected
        assert max(map(len, expected)) == longest


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_rollouts_carry_the_students_log_probabilities(temperature):
    model = backbone()
    rows = [Sequence(p, np.array([9], dtype=np.int32), row) for row, p in enumerate(prompts(*range(2, 14)))]
    config = RolloutConfig(max_new_tokens=9, temperature=temperature, top_k=5)
    outs = ModelSampler(model, config, max_length=40, seed=3, with_log_probs=True).sample(rows, step=1)
    for out in outs:
        ids = torch.from_numpy(np.concatenate([out.prompt, out.response])).long()
        logits = model.model(ids[None]).logits[0].double().log_softmax(-1)
        expected = logits[len(out.prompt) - 1 : -1].gather(-1, ids[len(out.prompt) :, None])[:, 0]
        assert torch.allclose(out.student_log_probs_N.double(), expected, atol=1e-4)


@pytest.mark.parametrize("error", [RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), None])
def test_out_of_memory_halves_the_decoding_batch(monkeypatch, error):
    """Check an allocator that fails for more than five rows. The samples must not change."""
    rows = [Sequence(p, np.array([9], dtype=np.int32), row) for row, p in enumerate(prompts(*range(2, 14)))]
    model, events = backbone(), []
    expected = ModelSampler(model, RolloutConfig(max_new_tokens=6), max_length=32, seed=3).sample(rows, step=5)
    allocate, requested = torch.zeros, []

    def limited_zeros(size, *args, **kwargs):
        if isinstance(size, tuple) and len(size) == 4:
            requested.append(size[0])
            if size[0] > 5:
                raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return allocate(size, *args, **kwargs)

    monkeypatch.setattr(torch, "zeros", limited_zeros)
    rollouts = ModelSampler(model, RolloutConfig(max_new_tokens=6), max_length=32, seed=3, listener=events.append)
    found = rollouts.sample(rows, step=5)
    assert [o.response.tolist() for o in found] == [o.response.tolist() for o in expected]
    assert [o.row for o in found] == list(range(12))
    assert events == [
        Warned("out of memory while decoding 12 rows in one batch: continuing with 6"),
        Warned("out of memory while decoding 6 rows in one batch: continuing with 3"),
    ]
    requested.clear()
    rollouts.sample(rows, step=6)  # the smaller batch size is remembered
    assert max(requested) == 3
    assert len(events) == 2


def test_other_errors_and_single_row_oom_are_raised(monkeypatch):
    model, ps = backbone(), prompts(3, 4)
    sample(model, ps, Sampling(max_new_tokens=2), [(0, 0), (0, 1)])
    allocate = torch.zeros

    def failing(message):
        def zeros(size, *args, **kwargs):
            if isinstance(size, tuple) and len(size) == 4:
                raise RuntimeError(message)
            return allocate(size, *args, **kwargs)

        return zeros

    for message in ("not enough memory: you tried to allocate 8 bytes", "the size of tensor a must match"):
        monkeypatch.setattr(torch, "zeros", failing(message))
        with pytest.raises(RuntimeError, match=message.split(":")[0]):
            sample(model, ps, Sampling(max_new_tokens=2), [(0, 0), (0, 1)])


def test_entropy_matches_softmax_for_extreme_logits():
    from distillm_cli.rollouts.sampler import _entropy

    logits = torch.randn(3, 5_000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [5.0], [40.0]])
    logits[0, 17] = -torch.inf
    p = logits.double().softmax(-1)
    expected = -torch.where(p > 0, p * p.log(), 0).sum(-1)
    assert _entropy(logits.clone()).tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_sampling_from_diverged_model_raises_an_error(temperature):
    """Check that infinite values in one layer lead to neither NaN samples nor an index error."""
    model = backbone("llama")
    model.model.model.layers[1].mlp.up_proj.weight.data.mul_(1e38)
    with raises_code("numbers.not_finite"):
        sample(model, prompts(3, 5), Sampling(temperature, max_new_tokens=4), [(0, 0), (0, 1)])
