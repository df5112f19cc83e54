"""Test interleaved drafting: its distribution by enumeration, and block drafting against drafting token by token."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from distillm_cli.config.schema import RolloutConfig
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.generation.decoding import PlainDecoding
from distillm_cli.rollouts.interleaved import InterleavedSampler
from distillm_cli.rollouts.next_token import keep_nucleus
from distillm_cli.types import Sequence, collate
from tests import tiny
from tests.codes import raises_code

TOKENIZER = tiny.tokenizer("abc")  # six tokens, 0 ends a response


def backbone(family, seed, spread=2.0):
    return Backbone(tiny.model(family, len(TOKENIZER), seed=seed, spread=spread), TOKENIZER)


def rollouts(student, teacher, **fields):
    drafting = {"temperature": 0.9, "top_p": 0.9, "accept": 2, "max_new_tokens": 3, "draft": 5} | fields
    return InterleavedSampler(
        student, teacher, RolloutConfig(**drafting), RolloutConfig(temperature=0.7, top_p=0.8), max_length=40, seed=3
    )


def prompts(count, *lengths):
    lengths = lengths or (4,)
    made = tiny.sequences([(lengths[i % len(lengths)], 1) for i in range(count)], vocab=3, seed=5)
    return [Sequence(s.prompt + 3, s.response, s.row) for s in made]


def filtered(logits, temperature, top_p):
    p = (logits / temperature).softmax(-1)
    keep_nucleus(p, top_p)
    return (p / p.sum(-1, keepdim=True))[0].double()


def exact_distribution(student, teacher, prompt, accept, max_tokens):
    """Return the probability of each output by enumerating all outputs, without sampler, cache or blocks."""
    found, unfinished = Counter(), {(): 1.0}
    for t in range(max_tokens):
        extended = Counter()
        for tokens, mass in unfinished.items():
            ids = np.concatenate([prompt, np.array(tokens, dtype=np.int32)]).astype(np.int32)
            batch = collate([Sequence(ids, np.zeros(1, dtype=np.int32), 0)])
            with torch.no_grad():
                z_q, z_p = student.logits(batch), teacher.logits(batch)
            q, p = filtered(z_q, 0.9, 0.9), filtered(z_p, 0.7, 0.8)
            best = torch.zeros_like(q).scatter(0, z_p[0].topk(accept).indices, 1.0)
            token_probs = q * best + (q * (1 - best)).sum() * p
            for token in range(len(token_probs)):
                if token_probs[token] > 0:
                    extended[(*tokens, token)] += mass * token_probs[token].item()
        unfinished = {}
        for tokens, mass in extended.items():
            if tokens[-1] == 0 or t == max_tokens - 1:
                found[tokens] += mass
            else:
                unfinished[tokens] = mass
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-6)
    return found


@pytest.mark.parametrize(("accept", "draft"), [(1, 2), (2, 5), (2, 1), (6, 5)])
def test_outputs_follow_the_distribution_of_the_paper(accept, draft):
    """Compare 3,000 outputs of up to three tokens over six token ids with the exact probability of each output."""
    student, teacher = backbone("gpt2", 1, spread=0.7), backbone("llama", 4)
    (prompt,) = prompts(1)
    n = 3000
    source = rollouts(student, teacher, accept=accept, draft=draft)
    rows = [Sequence(prompt.prompt, prompt.response, i) for i in range(n)]
    counts = Counter(tuple(s.response.tolist()) for s in source.sample(rows, step=1))
    expected = exact_distribution(student, teacher, prompt.prompt, accept, 3)
    assert set(counts) <= set(expected)
    likely = [tokens for tokens, mass in expected.items() if mass * n >= 5]
    rest = n - sum(counts[tokens] for tokens in likely)
    rest_mass = 1 - sum(expected[tokens] for tokens in likely)
    observed, expected_counts = [counts[tokens] for tokens in likely], [expected[tokens] * n for tokens in likely]
    if rest_mass * n >= 1:
        observed, expected_counts = [*observed, rest], [*expected_counts, rest_mass * n]
    expected_counts = np.array(expected_counts) * sum(observed) / sum(expected_counts)
    assert len(likely) > 2
    assert stats.chisquare(observed, expected_counts).pvalue > 1e-3


def test_outputs_do_not_depend_on_draft_length_or_batch():
    student, teacher = backbone("gpt2", 1), backbone("llama", 4)
    rows = prompts(24, 3, 9, 5, 1, 7)
    found = {}
    for draft in (1, 2, 5, 8):
        source = rollouts(student, teacher, draft=draft, max_new_tokens=12, top_p=1.0, temperature=1.0)
        found[draft] = [s.response.tolist() for s in source.sample(rows, 2)]
    assert found[1] == found[2] == found[5] == found[8]
    assert len({len(tokens) for tokens in found[1]}) > 3
    alone = rollouts(student, teacher, max_new_tokens=12, top_p=1.0, temperature=1.0).sample(rows[:1], 2)
    assert alone[0].response.tolist() == found[1][0]


def test_accepting_all_tokens_gives_the_students_outputs():
    """Check this and that no output exceeds the context."""
    student, teacher = backbone("gpt2", 1), backbone("llama", 4)
    rows = prompts(6, tiny.CONTEXT - 3, tiny.CONTEXT - 1, 4)
    source = rollouts(student, teacher, accept=6, max_new_tokens=30, temperature=1.0, top_p=1.0)
    source.max_length = 2 * tiny.CONTEXT
    found = source.sample(rows, 0)
    assert [len(s.prompt) + len(s.response) <= tiny.CONTEXT for s in found] == [True] * 6
    from distillm_cli.rollouts.sampler import ModelSampler

    student_outputs = ModelSampler(
        student, RolloutConfig(max_new_tokens=30), max_length=2 * tiny.CONTEXT, seed=3
    ).sample(rows, 0)
    assert [s.response.tolist() for s in found] == [s.response.tolist() for s in student_outputs]


def test_model_without_retraction_drafts_single_tokens():
    mamba, teacher = backbone("mamba", 2), backbone("llama", 4)
    assert mamba.decode_blocks([np.array([3, 4])]) is None
    rows = prompts(5, 4, 6)
    many, one = (rollouts(mamba, teacher, draft=draft).sample(rows, 0) for draft in (5, 1))
    assert [s.response.tolist() for s in many] == [s.response.tolist() for s in one]


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen3", "gemma", "bloom", "gpt_neox"])
def test_block_decoding_with_retraction_matches_model_logits(family):
    """Compare ragged blocks and retractions, with rows dropped on the way, with recomputing the whole text."""
    model, random = backbone(family, 3), np.random.default_rng(0)
    texts = [list(random.integers(0, 6, n)) for n in (7, 2, 4)]
    blocks = model.decode_blocks([np.array(text) for text in texts])
    assert blocks is not None
    assert_close(blocks.logits(None), recomputed_logits(model, texts)[:, 0], rtol=1e-3, atol=1e-4)
    for round_number, counts in enumerate([(2, 0, 1), (0, 0, 0), (1, 3, 2), (2, 2)]):
        if round_number == 3:
            blocks.keep(torch.tensor([2, 0]))
            texts = [texts[2], texts[0]]
        block = random.integers(0, 6, (len(texts), 4))
        longer = [text + row.tolist() for text, row in zip(texts, block, strict=True)]
        assert_close(
            blocks.logits_after(torch.from_numpy(block)), recomputed_logits(model, longer, last=4), rtol=1e-3, atol=1e-4
        )
        blocks.retract(torch.tensor(counts))
        texts = [text[: len(text) - n] for text, n in zip(longer, counts, strict=True)]
        token = torch.arange(len(texts))
        texts = [[*text, int(t)] for text, t in zip(texts, token, strict=True)]
        assert_close(blocks.logits(token), recomputed_logits(model, texts)[:, 0], rtol=1e-3, atol=1e-4)


def recomputed_logits(model, texts, last=1):
    rows = [
        torch.stack([PlainDecoding(model, [np.array(text[: len(text) - k])]).logits(None)[0] for k in reversed(range(last))])
        for text in texts
    ]  # fmt: skip
    return torch.stack(rows)


@pytest.mark.parametrize("draft", [1, 5])
def test_diverged_student_raises_an_error(draft):
    student, teacher = backbone("llama", 0), backbone("gpt2", 1)
    student.model.model.norm.weight.data.fill_(torch.nan)
    with raises_code("numbers.not_finite"):
        rollouts(student, teacher, draft=draft).sample(prompts(3), step=0)
