"""Encoder-decoders behind the face of causal models: states, heads, decoding and the engine, each against the plain way."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from distillm_cli.core.rollout import Sampling, sample
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.seq2seq import halves
from distillm_cli.sequences import Sequence, collate
from tests import tiny

VOCAB, ROWS = 97, 101
FAMILIES = sorted(tiny.SEQ2SEQ)
LENGTHS = [(3, 4), (7, 9), (5, 2), (1, 1)]
START, PAD, EOS = 1, 1, 0


@cache
def tokenizer():
    return tiny.tokenizer(size=VOCAB)


def backbone(family: str, **fields) -> Backbone:
    return Backbone(tiny.model(family, ROWS, **fields), tokenizer())


@cache
def shared(family: str) -> Backbone:
    """One backbone per family; tests that change something build their own."""
    return backbone(family)


def prompts(lengths=(3, 19, 6, 18, 17, 1)) -> list[np.ndarray]:
    return [s.prompt for s in tiny.sequences([(n, 1) for n in lengths], VOCAB, seed=3)]


def plainly(model, sequence: Sequence) -> torch.Tensor:
    """Logits [R, V] of one response, as anybody would write it: prompt in, response shifted by the start token."""
    prompt = torch.from_numpy(sequence.prompt.astype(np.int64))[None]
    response = torch.from_numpy(sequence.response.astype(np.int64))
    decoder = torch.cat([torch.tensor([START]), response[:-1]])[None]
    return model(input_ids=prompt, decoder_input_ids=decoder, use_cache=False).logits[0, :, :VOCAB]


# Batches and heads


def test_a_batch_is_taken_apart_into_what_it_was_made_of():
    sequences = tiny.sequences(LENGTHS, VOCAB)
    parts = halves(collate(sequences), START)
    assert parts.ids_BS.shape == parts.mask_BS.shape == (4, 7)
    for b, s in enumerate(sequences):
        assert parts.mask_BS[b].sum() == len(s.prompt)
        assert parts.ids_BS[b, : len(s.prompt)].tolist() == s.prompt.tolist()
        assert parts.decoder_ids_BR[b, : len(s.response)].tolist() == [START, *s.response[:-1].tolist()]
    assert parts.positions_N.tolist() == [b * 9 + t for b, s in enumerate(sequences) for t in range(len(s.response))]
    assert halves(collate(tiny.sequences([(3, 4), (3, 2)], VOCAB)), START).mask_BS is None, "nothing is padded"


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_head_give_the_models_own_logits_in_values_and_gradients(family):
    model = shared(family)
    sequences = tiny.sequences(LENGTHS, VOCAB)
    weights_NV = torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(1))

    def gradients(logits_NV):
        model.zero_grad()
        (logits_NV.log_softmax(-1) * weights_NV).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    batch = collate(sequences)
    assert model.check_head(batch)
    ours, plain = (
        model.head().logits(model(batch)),
        torch.cat([plainly(model.model, s) for s in sequences]),
    )
    assert plain.std() > 0.5, "a comparison of zeros would prove nothing"
    assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    assert_close(model.logits(batch), plain, rtol=1e-4, atol=1e-4)
    ours, plain = gradients(ours), gradients(plain)
    model.zero_grad()
    assert ours.keys() == plain.keys()
    scale = max(g.abs().max() for g in plain.values())
    for name, gradient in ours.items():
        assert_close(gradient / scale, plain[name] / scale, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("family", "scale"), [("t5", 32**-0.5), ("t5-v1.1", 1.0), ("mt5", 1.0), ("umt5", 32**-0.5), ("bart", 1.0)]
)
def test_a_tied_t5_scales_its_head_by_the_width(family, scale):
    assert shared(family).head().scale == pytest.approx(scale)
    assert shared(family).head().weight_VD.shape == (VOCAB, 32)


def test_a_head_that_is_scaled_otherwise_than_its_config_says_is_found_out():
    model = backbone("t5")
    model._scale = 1.0
    assert not model.check_head(tiny.batch(LENGTHS, VOCAB))
    assert model.own_logits
    sequences = tiny.sequences(LENGTHS, VOCAB)
    plain = torch.cat([plainly(model.model, s) for s in sequences])
    assert_close(model.head().logits(model(collate(sequences))), plain, rtol=1e-4, atol=1e-4)
    assert_close(forced(model, 8), forced(shared("t5"), 8), rtol=1e-3, atol=1e-3)


# Decoding


def forced(model: Backbone, steps: int) -> torch.Tensor:
    """Logits [B, steps + 1, V] when each row goes on with tokens given beforehand; rows leave and change places."""
    given = prompts()
    tokens = torch.randint(VOCAB, (len(given), steps), generator=torch.Generator().manual_seed(5))
    decoding, rows = model.decode(given), torch.arange(len(given))
    found = torch.full((len(given), steps + 1, VOCAB), float("nan"))
    for step in range(steps + 1):
        if keep := {3: [5, 0, 1, 3], 6: [3, 1]}.get(step):
            decoding.keep(torch.tensor(keep))
            rows = rows[keep]
        found[rows, step] = decoding.logits(tokens[rows, step - 1] if step else None)
    return found.nan_to_num(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_is_the_same_as_recomputing_everything(family):
    model, steps = backbone(family).train(), 40
    tokens = torch.randint(VOCAB, (6, steps), generator=torch.Generator().manual_seed(5))
    found = forced(model, steps)
    assert model.training
    assert all(module.training for module in model.model.modules()), "modes come back"
    model.eval()
    for row, prompt in enumerate(prompts()):
        logits = plainly(model.model, Sequence(prompt, np.append(tokens[row].numpy(), 0), row))
        told = found[row].abs().sum(-1) > 0
        assert told.sum() == {0: 41, 3: 41, 1: 6, 5: 6}.get(row, 3)
        assert_close(found[row][told], logits[told], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_decodes_in_a_copy_as_far_from_float32_as_bf16_is(family):
    model = backbone(family)
    with torch.autocast("cpu", torch.bfloat16):
        found = forced(model, 8)
    exact = forced(model, 8)
    assert found.dtype == torch.float32
    assert (found - exact).square().mean().sqrt() < 0.1 * exact.std()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_samples_equal_transformers_generate(family):
    # transformers' own cache counts the encoder's layers, and fails where the decoder has more.
    model = backbone(family, num_decoder_layers=2) if family == "t5-v1.1" else shared(family)
    given = prompts()
    outputs = sample(model, given, Sampling(temperature=0, max_new_tokens=12), [(0, i) for i in range(len(given))])
    for prompt, out in zip(given, outputs, strict=True):
        expected = model.model.generate(
            torch.from_numpy(prompt.astype(np.int64))[None], do_sample=False, max_new_tokens=12, num_beams=1
        )[0, 1:]
        stop = [i for i, token in enumerate(expected.tolist()) if token == EOS]
        assert out.tokens.tolist() == expected.tolist()[: stop[0] + 1 if stop else None]


def test_a_row_is_sampled_the_same_whatever_else_is_in_the_batch():
    model, given, sampling = shared("t5"), prompts(), Sampling(max_new_tokens=12)
    together = sample(model, given, sampling, [(7, i) for i in range(6)], entropy=True)
    for i, prompt in enumerate(given):
        (alone,) = sample(model, [prompt], sampling, [(7, i)], entropy=True)
        assert alone.tokens.tolist() == together[i].tokens.tolist()
        assert alone.entropy == pytest.approx(together[i].entropy, rel=1e-3)


class Says:
    """A decoder that wants to say the same two tokens for ever."""

    context, stop_ids = None, frozenset({EOS})

    def __init__(self, is_encoder_decoder: bool):
        self.is_encoder_decoder, self.step = is_encoder_decoder, -1

    def decode(self, prompts):
        return self

    def logits(self, tokens_B):
        self.step += 1
        return torch.tensor([[3.0 if token == 5 + self.step % 2 else 1.0 - token / 9 for token in range(9)]])


def test_an_n_gram_of_the_prompt_may_be_said_by_an_encoder_decoder():
    """A summary may quote: as in transformers only the response counts, while a causal model's prompt does."""
    sampling, prompt = Sampling(temperature=0, max_new_tokens=2, no_repeat_ngram_size=2), np.array([5, 6])
    said = {kind: sample(Says(kind), [prompt], sampling, [(0, 0)])[0].tokens.tolist() for kind in (True, False)}
    assert said == {True: [5, 6], False: [5, 0]}

    model = shared("t5")
    for prompt in prompts((6, 9)):
        source = torch.from_numpy(prompt.astype(np.int64))[None]
        expected = model.model.generate(source, do_sample=False, max_new_tokens=20, no_repeat_ngram_size=2)[0, 1:]
        sampling = Sampling(temperature=0, max_new_tokens=20, no_repeat_ngram_size=2)
        assert sample(model, [prompt], sampling, [(0, 0)])[0].tokens.tolist() == expected.tolist()
