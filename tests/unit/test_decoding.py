"""Test the fast decoders against recomputing everything for every token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from distillm_cli.models.backbone import Backbone
from distillm_cli.models.generation.decoding import FastDecoding, LengthGroupedDecoding, PlainDecoding
from distillm_cli.models.generation.working_copy import working_copy
from distillm_cli.rollouts.next_token import Sampling
from distillm_cli.rollouts.sampler import sample
from tests import tiny

VOCAB = 97
STEPS = 40  # more than one increment of the cache size
LENGTHS = (3, 19, 6, 18, 17, 1)
WITH_STEP = {"gpt2", "gpt2-untied", "llama", "llama-tied", "qwen2", "qwen3"}
WITH_FAST_CACHE = WITH_STEP | {
    "opt",
    "opt-350m",
    "gemma",
    "phi",
    "gptj",
    "gpt_neox",
    "xglm",
    "cohere",
    "granite",
    "mpt",
}


def backbone(family: str, **fields) -> Backbone:
    return Backbone(tiny.model(family, VOCAB + 4, **fields), tiny.tokenizer(size=VOCAB))


def prompts(lengths=LENGTHS) -> list[np.ndarray]:
    return [s.prompt for s in tiny.sequences([(n, 1) for n in lengths], VOCAB, seed=3)]


def forced(decoding, tokens_BT: torch.Tensor, kept_rows: dict[int, list[int]]) -> dict[tuple[int, int], torch.Tensor]:
    """Return logits by (row, step) when the given tokens are decoded.

    kept_rows: step → indices of the rows that stay from that step on.
    """
    rows, found = torch.arange(len(tokens_BT)), {}
    for step in range(tokens_BT.shape[1] + 1):
        if step in kept_rows:
            decoding.keep(torch.tensor(kept_rows[step]))
            rows = rows[kept_rows[step]]
        logits = decoding.logits(tokens_BT[rows, step - 1] if step else None)
        found |= {(int(row), step): logits[b] for b, row in enumerate(rows)}
    return found


@torch.no_grad()
def recomputed(model: nn.Module, prompt: np.ndarray, tokens_T: torch.Tensor) -> torch.Tensor:
    ids = torch.cat([torch.from_numpy(prompt.astype(np.int64)), tokens_T])[None]
    return model(ids, use_cache=False).logits[0, len(prompt) - 1 :, :VOCAB].float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_decoding_matches_recomputing_everything(family, dtype):
    """Check ragged prompts, a growing cache, and rows that are dropped and reordered."""
    model, ps = backbone(family), prompts()
    tokens = torch.randint(VOCAB, (len(ps), STEPS), generator=torch.Generator().manual_seed(5))
    kept_rows = {7: [5, 0, 1, 3], 20: [3, 1], 35: [1]}  # rows 5 0 1 3, then 3 0, then 0
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = forced(model.decode(ps), tokens, kept_rows)
    assert len(found) == 6 * 7 + 4 * 13 + 2 * 15 + 6
    exact = model.model if dtype == torch.float32 else working_copy(model.model, dtype)
    expected = [recomputed(exact, p, tokens[row]) for row, p in enumerate(ps)]
    gap = torch.stack([found[row, step] - expected[row][step] for row, step in found])
    if dtype == torch.float32:
        assert gap.abs().max() < 2e-3
    else:  # rounding differs with the shape: the gap is at most that between bf16 and float32
        precise = [recomputed(model.model, p, tokens[row]) for row, p in enumerate(ps)]
        rounding = torch.stack([expected[row][step] - precise[row][step] for row, step in found])
        assert gap.square().mean() < 2 * rounding.square().mean()
        assert gap.abs().max() < 2 * rounding.abs().max()


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_prompts_of_equal_length_are_decoded_correctly(family):
    """Check the case where one mask serves all rows, except for XGLM, which needs one per row."""
    model, ps = backbone(family), prompts((6, 6, 6))
    tokens = torch.randint(VOCAB, (len(ps), 4), generator=torch.Generator().manual_seed(5))
    found = forced(model.decode(ps), tokens, {2: [2, 0]})
    expected = [recomputed(model.model, p, tokens[row]) for row, p in enumerate(ps)]
    for (row, step), logits in found.items():
        assert_close(logits, expected[row][step], rtol=0, atol=2e-3)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_each_family_uses_its_fastest_decoder(family):
    model = backbone(family)
    decoding = model.decode(prompts())
    if family == "bart-decoder":  # its learned positions count padding
        assert isinstance(decoding, LengthGroupedDecoding)
        return
    assert isinstance(decoding, FastDecoding if family in WITH_FAST_CACHE else PlainDecoding)
    assert model._fast_paths == (family in WITH_FAST_CACHE, family in WITH_STEP)


@pytest.mark.parametrize("family", ["mpt", "gpt_neo", "opt", "llama", "bart-decoder"])
def test_short_prompt_continues_after_a_row_fills_the_context(family):
    """Check that position tables of the context's length cover the tokens of a row without its padding."""
    model, sampling = backbone(family), Sampling(max_new_tokens=40, min_new_tokens=40)
    batch_prompts = prompts((tiny.CONTEXT - 4, 3, tiny.CONTEXT - 8, 30))
    together = sample(model, batch_prompts, sampling, [(1, i) for i in range(4)])
    assert len(together[1].tokens) == 40
    for i, prompt in enumerate(batch_prompts):
        (alone,) = sample(model, [prompt], sampling, [(1, i)])
        assert alone.tokens.tolist() == together[i].tokens.tolist()


class DoubledLinear(nn.Linear):
    """Double the output of a Linear, in place of an adapter or a quantized layer."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_model_with_other_layers_has_no_hand_written_step():
    model = backbone("llama")
    assert model.decode(prompts())._step is not None
    original_layer = model.model.model.layers[1].self_attn.q_proj
    other = DoubledLinear(original_layer.in_features, original_layer.out_features, bias=False)
    other.load_state_dict(original_layer.state_dict())
    model.model.model.layers[1].self_attn.q_proj = other
    decoding, tokens = model.decode(prompts()), torch.randint(VOCAB, (6, 4))
    assert decoding._step is None
    found = forced(decoding, tokens, {})
    expected = [recomputed(model.model, p, tokens[row]) for row, p in enumerate(prompts())]
    for (row, step), logits in found.items():
        assert_close(logits, expected[row][step], rtol=1e-3, atol=1e-3)


def test_hook_is_called_for_every_token():
    model, calls = backbone("gpt2"), []
    model.decode(prompts())
    hook = model.model.transformer.h[0].register_forward_hook(lambda *args: calls.append(1))
    forced(model.decode(prompts((4, 4))), torch.zeros((2, 5), dtype=torch.int64), {})
    hook.remove()
    assert len(calls) == 6


def test_step_with_different_logits_is_not_used(monkeypatch):
    """Check a transformers version that computes something else under the same names."""
    model = backbone("llama")
    mlp = type(model.model.model.layers[0].mlp)
    original = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: original(self, x) * 1.5)
    model.decode(prompts())
    assert model._fast_paths == (True, False)


def test_layer_with_replaced_forward_has_no_hand_written_step():
    model = backbone("llama")
    mlp = model.model.model.layers[0].mlp
    mlp.forward = lambda x, original=mlp.forward: original(x) * 1.5
    decoding = model.decode(prompts())
    assert isinstance(decoding, FastDecoding)
    assert decoding._step is None


def test_working_copy_has_current_weights():
    model = backbone("gpt2").train()
    model.model.gradient_checkpointing_enable()
    copied = working_copy(model.model, torch.bfloat16)
    assert copied.lm_head.weight is copied.transformer.wte.weight  # tied weights stay tied
    assert {p.dtype for p in copied.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not copied.training
    assert model.model.transformer.h[0].training
    with torch.autocast("cpu", torch.bfloat16):
        before = model.decode(prompts()).logits(None)
        with torch.no_grad():
            model.model.transformer.ln_f.bias.add_(1.0)
        after = model.decode(prompts()).logits(None)
    assert (before - after).abs().max() > 0.5
    assert after.dtype == torch.float32


def test_rotary_frequencies_stay_float32_in_working_copy():
    model = backbone("llama").model
    assert working_copy(model, torch.bfloat16).model.rotary_emb.inv_freq is model.model.rotary_emb.inv_freq


@pytest.mark.parametrize("family", ["m2m_100", "xglm", "gemma2", "llama"])
def test_working_copy_has_the_dtypes_of_from_pretrained(family, tmp_path):
    """Check all buffers, such as sinusoidal tables and rotary frequencies, which stay float32."""
    if family == "m2m_100":
        config = tiny.config("bart", VOCAB).to_dict() | {"model_type": family, "scale_embedding": True}
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**config)).eval()
    else:
        model = tiny.model(family, VOCAB)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    copied = working_copy(model, torch.bfloat16)
    assert {n: b.dtype for n, b in copied.named_buffers()} == {n: b.dtype for n, b in loaded.named_buffers()}
    ids = torch.arange(3, 15).reshape(2, 6)
    more = {"decoder_input_ids": ids} if loaded.config.is_encoder_decoder else {}
    with torch.no_grad():
        gap = (copied(ids, **more).logits - loaded(ids, **more).logits).float().abs().max()
    assert gap <= 2**-6 * loaded(ids, **more).logits.abs().max(), "only the implementation of the activation differs"
    assert {b.dtype for b in model.buffers()} == {torch.float32}


def test_attention_setting_is_restored_after_exception():
    model = backbone("opt")
    decoding = model.decode(prompts())
    decoding.logits(None)
    with pytest.raises(IndexError):
        decoding.logits(torch.full((6,), 10_000))
    assert model.model.config._attn_implementation == "sdpa"
