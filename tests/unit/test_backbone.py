"""Test hidden states, heads and decoding for every family in tests/tiny.py."""

from __future__ import annotations

import logging
import weakref
from functools import cache

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM
from transformers.utils.logging import warning_once

from distillm_cli.models.backbone import Backbone, Head, eval_mode
from distillm_cli.models.model_families import context_of
from distillm_cli.types import Sequence as Tokens
from distillm_cli.types import collate
from tests import tiny
from tests.codes import raises_code

VOCAB = 97  # token ids; the models have a few more rows, like models with a padded vocabulary
ROWS = 101
FAMILIES = sorted(tiny.FAMILIES)
LENGTHS = [(3, 4), (7, 9), (5, 2)]


@cache
def tokenizer():
    return tiny.tokenizer(size=VOCAB)


@cache
def shared(family: str) -> Backbone:
    """Return one backbone per family. Tests that modify a backbone build their own."""
    return Backbone(tiny.model(family, ROWS), tokenizer())


def prompts(lengths=(3, 9, 6, 9), seed=1) -> list[np.ndarray]:
    return [s.prompt for s in tiny.sequences([(n, 1) for n in lengths], VOCAB, seed)]


def greedy(backbone: Backbone, batch_prompts: list[np.ndarray], steps: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Return greedy tokens [B, steps] and the logits they were taken from [B, steps, V]."""
    decoding = backbone.decode(batch_prompts)
    tokens, logits = [], [decoding.logits(None)]
    for _ in range(steps - 1):
        tokens.append(logits[-1].argmax(-1))
        logits.append(decoding.logits(tokens[-1]))
    return torch.stack([*tokens, logits[-1].argmax(-1)], 1), torch.stack(logits, 1)


# Hidden states and heads


def test_no_warning_for_padding_token_without_mask(caplog, monkeypatch):
    """Check that transformers' warning about padding without an attention mask is suppressed.

    GPT-2's forward looks for padding tokens. Batches are padded on the right here, and a student may have sampled the token.
    """
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    pad, batch = 1, collate([*tiny.sequences(LENGTHS, VOCAB), Tokens(np.array([1, 1]), np.array([1, 1, 1]))])
    model = tiny.model("gpt2", ROWS, pad_token_id=pad)

    def mask_warnings(call):
        warning_once.cache_clear()  # otherwise only the first test of the session gets the warning
        caplog.clear()
        call()
        return [record.message for record in caplog.records if "attention_mask" in record.message]

    assert mask_warnings(lambda: model(input_ids=torch.tensor([[1, 5]]))), "transformers itself warns"
    backbone = Backbone(model, tokenizer())
    assert not mask_warnings(lambda: (backbone.trunk_states(batch), backbone.logits(batch), backbone.hidden(batch)))
    assert not mask_warnings(lambda: greedy(backbone, [np.array([1, 4, 1]), np.array([1, 7, 1])]))
    assert not mask_warnings(lambda: greedy(backbone.plain(torch.bfloat16), [np.array([1])]))


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch_matches_single_sequences(family):
    """Check hidden states and gradients."""
    backbone = shared(family)
    sequences = tiny.sequences(LENGTHS, VOCAB)
    weights_N = torch.linspace(-1, 1, sum(len(s.response) for s in sequences))

    def states_and_gradients(batches):
        backbone.zero_grad()
        hidden_ND = torch.cat([backbone(batch) for batch in batches])
        (hidden_ND.pow(2).sum(-1) * weights_N).sum().backward()
        return hidden_ND.detach(), {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}

    together, gradients_together = states_and_gradients([collate(sequences)])
    alone, gradients_alone = states_and_gradients([collate([s]) for s in sequences])
    backbone.zero_grad()
    assert together.shape[0] == 15
    assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert gradients_together.keys() == gradients_alone.keys()
    scale = max(g.abs().max() for g in gradients_alone.values())
    for name, gradient in gradients_together.items():
        assert_close(gradient / scale, gradients_alone[name] / scale, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_hidden_states_matches_model_logits(family):
    backbone = shared(family)
    batch = tiny.batch(LENGTHS, VOCAB)
    assert backbone.check_head(batch)
    with torch.no_grad():
        fused, own = backbone.head().logits(backbone.hidden(batch)), backbone.logits(batch)
    assert own.shape == (15, VOCAB)
    assert own.std() > 0.5  # a comparison of zeros would prove nothing
    assert_close(fused, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "scale", "softcap", "bias"),
    [
        ("llama", 1.0, None, False),
        ("gemma2", 1.0, 3.0, False),
        ("cohere", 0.25, None, False),
        ("granite", 0.25, None, False),
        ("falcon_h1", 0.5, None, False),
        ("phi", 1.0, None, True),
        ("gptj", 1.0, None, True),
    ],
)
def test_head_parameters_are_read_from_config(family, scale, softcap, bias):
    head = shared(family).head()
    assert (head.scale, head.softcap, head.bias_V is not None) == (scale, softcap, bias)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi", "granite"])
def test_head_check_tolerates_bf16_rounding(family):
    backbone = Backbone(tiny.model(family, ROWS).to(torch.bfloat16), tokenizer())
    assert backbone.check_head(tiny.batch(LENGTHS, VOCAB))


def test_head_check_ignores_autocast_and_training_mode():
    backbone = Backbone(tiny.model("gpt2", ROWS).train(), tokenizer())  # dropout 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert backbone.check_head(tiny.batch(LENGTHS, VOCAB))
    assert all(module.training for module in backbone.model.modules())


def test_head_check_rejects_nan_but_accepts_infinite_bias():
    backbone = Backbone(tiny.model("phi", ROWS), tokenizer())
    backbone.model.lm_head.bias.data[5] = -torch.inf
    backbone.check_head(tiny.batch(LENGTHS, VOCAB))
    backbone = Backbone(tiny.model("phi", ROWS), tokenizer())
    backbone.model.model.layers[0].mlp.fc1.weight.data[0, 0] = torch.nan
    with raises_code("numbers.not_finite", "phi"):
        backbone.check_head(tiny.batch(LENGTHS, VOCAB))


@pytest.mark.parametrize("family", ["gpt2", "gpt2-untied", "phi"])
def test_swap_state_exchanges_weights_and_restores_them(family):
    """Check that tied weights are swapped once and that no extra copy of the other weights is held."""
    model, other = (Backbone(tiny.model(family, ROWS, seed=seed), tokenizer()) for seed in (1, 2))
    own, others = ({name: t.clone() for name, t in each.state().items()} for each in (model, other))
    held = other.state()
    references = [weakref.ref(tensor) for tensor in held.values()]
    del other
    model.swap_state(held)
    assert all(torch.equal(tensor, others[name]) for name, tensor in model.state().items())
    assert sum(ref() is not None for ref in references) == len(held) - len(
        {t.data_ptr() for t in model.state().values()}
    )
    model.swap_state(held)
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state().items())


def test_padded_head_is_cut_to_vocabulary():
    padded, exact = shared("phi"), Backbone(tiny.model("phi", VOCAB), tokenizer())
    assert padded.head().weight_VD.shape[0] == padded.head().bias_V.shape[0] == VOCAB
    assert exact.head().weight_VD is exact.model.lm_head.weight
    padded.head().logits(padded.hidden(tiny.batch(LENGTHS, VOCAB))).sum().backward()
    assert padded.model.lm_head.weight.grad[:VOCAB].abs().sum() > 0
    assert padded.model.lm_head.weight.grad[VOCAB:].abs().sum() == 0
    padded.zero_grad()


def test_tokenizer_larger_than_model_is_rejected():
    with raises_code("model.tokenizer_mismatch", "97", "90") as caught:
        Backbone(tiny.model("llama", 90), tokenizer())
    assert caught.value.exit_code == 4


def test_backbone_registers_only_the_model():
    backbone = shared("opt")
    assert [*backbone.parameters()] == [*backbone.model.parameters()]
    assert {name.removeprefix("model.") for name in backbone.state_dict()} >= backbone.model.state_dict().keys()
    assert len(backbone.state_dict()) == len(backbone.model.state_dict())


class LlamaWithLogitChange(LlamaForCausalLM):
    """Change the logits of a Llama in a way that no config field describes."""

    change = staticmethod(lambda logits: logits)

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        return output


def llama_with_logit_change(change, seed: int = 0) -> Backbone:
    model = LlamaWithLogitChange(tiny.config("llama", ROWS)).eval()
    model.load_state_dict(tiny.model("llama", ROWS, seed=seed).state_dict())
    model.change = change
    return Backbone(model, tokenizer())


def test_unknown_head_falls_back_to_model_logits():
    backbone = llama_with_logit_change(lambda logits: logits * torch.linspace(0.5, 2, ROWS))
    batch = tiny.batch(LENGTHS, VOCAB)
    assert not backbone.check_head(batch)
    assert backbone.head().weight_VD is None
    with torch.no_grad():
        assert_close(backbone.head().logits(backbone.hidden(batch)), backbone.logits(batch))
    assert not backbone.check_head(batch)  # the decision is permanent

    tokens, _ = greedy(backbone, prompts())
    for row, prompt in enumerate(prompts()):
        ids = torch.tensor(prompt, dtype=torch.int64)[None]
        for token in tokens[row]:
            with torch.no_grad():
                logits = backbone.model(ids, use_cache=False).logits[0, -1, :VOCAB]
            assert token == logits.argmax()
            ids = torch.cat([ids, token.view(1, 1)], 1)


def test_unknown_softcap_is_detected_at_small_logits():
    backbone = llama_with_logit_change(lambda logits: 30 * torch.tanh(logits / 30))
    with torch.no_grad():
        backbone.model.lm_head.weight.mul_(1e-3)
        batch = tiny.batch(LENGTHS, VOCAB)
        assert_close(backbone.head().logits(backbone.hidden(batch)), backbone.logits(batch), rtol=1e-4, atol=1e-6)
    assert not backbone.check_head(batch)


def test_head_applies_scale_softcap_and_bias():
    hidden_ND = torch.tensor([[1.0, 2.0]])
    weight_VD, bias_V = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([0.5, -1.0])
    logits = Head(weight_VD, bias_V, scale=2.0, softcap=4.0).logits(hidden_ND)
    assert_close(logits, 4 * torch.tanh(torch.tensor([[2 * 1.5, 2 * 5.0]]) / 4))
    assert Head(weight_VD).logits(hidden_ND, torch.bfloat16).dtype == torch.float32
    assert Head(None).logits(hidden_ND) is hidden_ND


# Decoding


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_matches_generate_and_single_rows(family):
    backbone = Backbone(tiny.model(family, VOCAB), tokenizer())
    tokens, logits = greedy(backbone, prompts())

    P = max(len(p) for p in prompts())
    ids = torch.tensor(np.stack([np.pad(p, (P - len(p), 0), constant_values=1) for p in prompts()])).long()
    mask = torch.tensor(np.stack([np.pad(np.ones(len(p), int), (P - len(p), 0)) for p in prompts()]))
    expected = backbone.model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=8, pad_token_id=1
    )
    if family != "bart-decoder":  # transformers' generate shifts this family's positions by the padding
        assert torch.equal(tokens, expected[:, P:])

    for row, prompt in enumerate(prompts()):
        tokens_alone, logits_alone = greedy(backbone, [prompt])
        assert torch.equal(tokens_alone[0], tokens[row])
        assert_close(logits_alone[0], logits[row], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_rows_does_not_change_the_others(family):
    backbone = shared(family)
    _, expected = greedy(backbone, prompts())
    decoding = backbone.decode(prompts())
    rows = torch.arange(4)
    logits = decoding.logits(None)
    for step in range(1, 8):
        keep = {3: [0, 1, 3], 6: [2, 0]}.get(step)  # row 2 is dropped; then row 1, and the rest are reordered
        tokens_B = logits.argmax(-1)
        if keep is not None:
            decoding.keep(torch.tensor(keep))
            rows, tokens_B = rows[keep], tokens_B[keep]
        logits = decoding.logits(tokens_B)
        assert_close(logits, expected[rows, step], rtol=1e-3, atol=1e-3)
    assert rows.tolist() == [3, 0]


def test_rows_can_be_dropped_before_the_first_step():
    backbone = shared("gpt2")
    _, expected = greedy(backbone, prompts(), steps=1)
    decoding = backbone.decode(prompts())
    decoding.keep(torch.tensor([2, 0]))
    assert_close(decoding.logits(None), expected[[2, 0], 0], rtol=1e-4, atol=1e-4)


def masks_seen(backbone: Backbone, batch_prompts) -> list[torch.Tensor | None]:
    seen = []
    hook = backbone.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    greedy(backbone, batch_prompts, steps=3)
    hook.remove()
    return seen


def test_no_attention_mask_without_padding():
    backbone = Backbone(tiny.model("mistral", ROWS), tokenizer())  # a sliding window, which uses the plain decoder
    backbone.check_decoding()  # runs its own trial, with padding
    assert masks_seen(backbone, prompts((5, 5))) == [None, None, None]
    assert [mask.shape[1] for mask in masks_seen(backbone, prompts((5, 3)))] == [5, 6, 7]


def test_decoding_in_training_mode_is_deterministic_and_cached():
    """Check that dropout is off and the key-value cache is used, also with gradient checkpointing."""
    eval_backbone = Backbone(tiny.model("gpt2", ROWS), tokenizer())
    expected_tokens, expected = greedy(eval_backbone, prompts())
    backbone = Backbone(tiny.model("gpt2", ROWS).train(), tokenizer())
    enable = getattr(backbone.model, "activation_checkpointing_enable", backbone.model.gradient_checkpointing_enable)
    enable()
    backbone.model.transformer.h[1].eval()  # a module in eval mode must stay in eval mode
    greedy(backbone, prompts(), steps=1)  # the first call chooses how this model decodes
    lengths = []
    hook = backbone.model.transformer.wte.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1]))
    tokens, logits = greedy(backbone, prompts())
    hook.remove()
    assert lengths == [9, 1, 1, 1, 1, 1, 1, 1]
    assert torch.equal(tokens, expected_tokens)
    assert_close(logits, expected)
    assert not logits.requires_grad
    assert backbone.model.training
    assert backbone.model.transformer.h[0].attn.training
    assert not backbone.model.transformer.h[1].training


def test_training_mode_is_restored_after_exception():
    model = tiny.model("llama", ROWS).train()
    with pytest.raises(ValueError, match="input_ids"), eval_mode(model):
        model()
    assert all(module.training for module in model.modules())
    decoding = Backbone(model, tokenizer()).decode(prompts())
    decoding.logits(None)
    with pytest.raises(IndexError):
        decoding.logits(torch.full((4,), 10_000))
    assert all(module.training for module in model.modules())


def test_decoding_rejects_empty_prompts_and_second_prefill():
    backbone = shared("llama")
    with pytest.raises(ValueError, match="prompts"):
        backbone.decode([])
    with pytest.raises(ValueError, match="at least one token"):
        backbone.decode([np.array([3]), np.array([], dtype=np.int32)])
    decoding = backbone.decode(prompts())
    with pytest.raises(ValueError, match="first call"):
        decoding.logits(torch.zeros(4, dtype=torch.int64))
    decoding.logits(None)
    with pytest.raises(ValueError, match="first call"):
        decoding.logits(None)


def test_rwkv_can_be_trained_but_not_decoded():
    config = AutoConfig.for_model(
        "rwkv", vocab_size=ROWS, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2
    )
    backbone = Backbone(AutoModelForCausalLM.from_config(config).eval(), tokenizer())
    assert backbone.check_head(tiny.batch(LENGTHS, VOCAB))
    with raises_code("model.cannot_generate", "rwkv"):
        backbone.decode(prompts())


_HEADS = {f"num_{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
UNSUPPORTED = {
    "prophetnet": {"hidden_size": 32, "pad_token_id": 1, **_HEADS},
    "switch_transformers": {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2, "num_experts": 2},
}


@pytest.mark.parametrize("family", sorted(UNSUPPORTED))
def test_family_with_unusual_inputs_is_rejected(family):
    config = AutoConfig.for_model(family, vocab_size=ROWS, decoder_start_token_id=1, **UNSUPPORTED[family])
    backbone = Backbone(AutoModelForSeq2SeqLM.from_config(config).eval(), tokenizer())
    if family == "switch_transformers":
        backbone.check_decoding()  # its decoder alone would pass the check
        backbone.own_logits = True
    with raises_code("model.cannot_generate", family):
        backbone.decode(prompts())


def test_out_of_memory_in_trial_is_not_remembered():
    backbone = Backbone(tiny.model("gpt2", ROWS), tokenizer())

    def full(*args):
        raise torch.OutOfMemoryError("no room")

    hook = backbone.model.transformer.register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        backbone.decode(prompts())
    hook.remove()
    backbone.decode(prompts())


# Model properties


def test_context_is_read_from_config_or_none():
    contexts = {family: shared(family).context for family in ("gpt2", "opt", "llama", "gpt_neox", "bloom", "mamba")}
    assert contexts.pop("bloom") is contexts.pop("mamba") is None
    assert set(contexts.values()) == {tiny.CONTEXT}


def test_context_is_found_under_other_config_names():
    mpt = AutoConfig.for_model("mpt", d_model=32, n_heads=4, n_layers=1, max_seq_len=24, vocab_size=ROWS)
    backbone = Backbone(AutoModelForCausalLM.from_config(mpt), tokenizer())
    assert backbone.context == 24
    sides = {"max_encoder_position_embeddings": 48, "max_decoder_position_embeddings": 16}
    assert context_of(AutoConfig.for_model("led", **sides)) == 16


def test_stop_ids_come_from_tokenizer_and_generation_config():
    backbone = Backbone(tiny.model("llama", ROWS), tokenizer())
    assert backbone.stop_ids == {tokenizer().eos_token_id}
    backbone.model.generation_config.eos_token_id = [7, 9, ROWS - 1]  # the last is not in the vocabulary
    assert backbone.stop_ids == {tokenizer().eos_token_id, 7, 9}
