"""Hidden states, heads and decoding, for every family in tests/tiny.py."""

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

from distillm_cli.errors import ModelError, NonFiniteError
from distillm_cli.models.backbone import Backbone, Head, eval_mode
from distillm_cli.models.model_families import context_of
from distillm_cli.types import Sequence as Tokens
from distillm_cli.types import collate
from tests import tiny

VOCAB = 97  # token ids; the models have a few rows more, as padded vocabularies do
ROWS = 101
FAMILIES = sorted(tiny.FAMILIES)
LENGTHS = [(3, 4), (7, 9), (5, 2)]


@cache
def tokenizer():
    return tiny.tokenizer(size=VOCAB)


@cache
def shared(family: str) -> Backbone:
    """One backbone per family; tests that change something build their own."""
    return Backbone(tiny.model(family, ROWS), tokenizer())


def prompts(lengths=(3, 9, 6, 9), seed=1) -> list[np.ndarray]:
    return [s.prompt for s in tiny.sequences([(n, 1) for n in lengths], VOCAB, seed)]


def greedy(backbone: Backbone, given: list[np.ndarray], steps: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, steps] and the logits they were taken from [B, steps, V]."""
    decoding = backbone.decode(given)
    tokens, logits = [], [decoding.logits(None)]
    for _ in range(steps - 1):
        tokens.append(logits[-1].argmax(-1))
        logits.append(decoding.logits(tokens[-1]))
    return torch.stack([*tokens, logits[-1].argmax(-1)], 1), torch.stack(logits, 1)


# Hidden states and heads


def test_a_padding_token_that_is_read_without_a_mask_is_no_reason_to_warn(caplog, monkeypatch):
    """GPT-2's own forward looks for it; a batch here is padded on the right, and a student may have sampled that token."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    pad, batch = 1, collate([*tiny.sequences(LENGTHS, VOCAB), Tokens(np.array([1, 1]), np.array([1, 1, 1]))])
    model = tiny.model("gpt2", ROWS, pad_token_id=pad)

    def warned(what):
        warning_once.cache_clear()  # else only the first test of the session would see it
        caplog.clear()
        what()
        return [record.message for record in caplog.records if "attention_mask" in record.message]

    assert warned(lambda: model(input_ids=torch.tensor([[1, 5]]))), "as transformers' own users see it"
    backbone = Backbone(model, tokenizer())
    assert not warned(lambda: (backbone.trunk_states(batch), backbone.logits(batch), backbone.hidden(batch)))
    assert not warned(lambda: greedy(backbone, [np.array([1, 4, 1]), np.array([1, 7, 1])]))
    assert not warned(lambda: greedy(backbone.plain(torch.bfloat16), [np.array([1])]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_is_its_sequences_one_by_one_in_values_and_gradients(family):
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
def test_head_on_hidden_states_is_the_models_own_logits(family):
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
def test_head_quirks_are_read_from_the_config(family, scale, softcap, bias):
    head = shared(family).head()
    assert (head.scale, head.softcap, head.bias_V is not None) == (scale, softcap, bias)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi", "granite"])
def test_head_check_allows_for_the_rounding_of_bf16(family):
    backbone = Backbone(tiny.model(family, ROWS).to(torch.bfloat16), tokenizer())
    assert backbone.check_head(tiny.batch(LENGTHS, VOCAB))


def test_head_check_is_not_confused_by_autocast_or_training_mode():
    backbone = Backbone(tiny.model("gpt2", ROWS).train(), tokenizer())  # dropout 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert backbone.check_head(tiny.batch(LENGTHS, VOCAB))
    assert all(module.training for module in backbone.model.modules())


def test_head_check_names_a_model_that_has_diverged_and_leaves_one_that_rules_a_token_out_alone():
    backbone = Backbone(tiny.model("phi", ROWS), tokenizer())
    backbone.model.lm_head.bias.data[5] = -torch.inf
    backbone.check_head(tiny.batch(LENGTHS, VOCAB))
    backbone = Backbone(tiny.model("phi", ROWS), tokenizer())
    backbone.model.model.layers[0].mlp.fc1.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="logits are not finite; phi; its weights have diverged"):
        backbone.check_head(tiny.batch(LENGTHS, VOCAB))


@pytest.mark.parametrize("family", ["gpt2", "gpt2-untied", "phi"])
def test_weights_change_places_with_others_one_by_one_and_back_again(family):
    """Tied ones once; of the others nothing is held beside what was there."""
    model, other = (Backbone(tiny.model(family, ROWS, seed=seed), tokenizer()) for seed in (1, 2))
    mine, others = ({name: t.clone() for name, t in each.state().items()} for each in (model, other))
    held = other.state()
    left = [weakref.ref(tensor) for tensor in held.values()]
    del other
    model.swap_state(held)
    assert all(torch.equal(tensor, others[name]) for name, tensor in model.state().items())
    assert sum(ref() is not None for ref in left) == len(held) - len({t.data_ptr() for t in model.state().values()})
    model.swap_state(held)
    assert all(torch.equal(tensor, mine[name]) for name, tensor in model.state().items())


def test_a_padded_head_is_cut_to_the_vocabulary_and_an_exact_one_is_left_alone():
    padded, exact = shared("phi"), Backbone(tiny.model("phi", VOCAB), tokenizer())
    assert padded.head().weight_VD.shape[0] == padded.head().bias_V.shape[0] == VOCAB
    assert exact.head().weight_VD is exact.model.lm_head.weight
    padded.head().logits(padded.hidden(tiny.batch(LENGTHS, VOCAB))).sum().backward()
    assert padded.model.lm_head.weight.grad[:VOCAB].abs().sum() > 0
    assert padded.model.lm_head.weight.grad[VOCAB:].abs().sum() == 0
    padded.zero_grad()


def test_a_tokenizer_larger_than_the_model_is_refused_with_both_numbers():
    with pytest.raises(ModelError, match=r"97 token ids.*90") as caught:
        Backbone(tiny.model("llama", 90), tokenizer())
    assert caught.value.exit_code == 4


def test_the_model_is_the_only_thing_registered():
    backbone = shared("opt")
    assert [*backbone.parameters()] == [*backbone.model.parameters()]
    assert {name.removeprefix("model.") for name in backbone.state_dict()} >= backbone.model.state_dict().keys()
    assert len(backbone.state_dict()) == len(backbone.model.state_dict())


class OddLlama(LlamaForCausalLM):
    """Does to its logits what no config field says."""

    quirk = staticmethod(lambda logits: logits)

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.quirk(output.logits)
        return output


def odd_llama(quirk, seed: int = 0) -> Backbone:
    model = OddLlama(tiny.config("llama", ROWS)).eval()
    model.load_state_dict(tiny.model("llama", ROWS, seed=seed).state_dict())
    model.quirk = quirk
    return Backbone(model, tokenizer())


def test_an_unknown_head_switches_to_the_models_own_logits():
    backbone = odd_llama(lambda logits: logits * torch.linspace(0.5, 2, ROWS))
    batch = tiny.batch(LENGTHS, VOCAB)
    assert not backbone.check_head(batch)
    assert backbone.head().weight_VD is None
    with torch.no_grad():
        assert_close(backbone.head().logits(backbone.hidden(batch)), backbone.logits(batch))
    assert not backbone.check_head(batch)  # and stays there

    tokens, _ = greedy(backbone, prompts())
    for row, prompt in enumerate(prompts()):
        ids = torch.tensor(prompt, dtype=torch.int64)[None]
        for token in tokens[row]:
            with torch.no_grad():
                logits = backbone.model(ids, use_cache=False).logits[0, -1, :VOCAB]
            assert token == logits.argmax()
            ids = torch.cat([ids, token.view(1, 1)], 1)


def test_an_unknown_soft_cap_is_found_while_the_logits_are_still_small():
    backbone = odd_llama(lambda logits: 30 * torch.tanh(logits / 30))
    with torch.no_grad():
        backbone.model.lm_head.weight.mul_(1e-3)
        batch = tiny.batch(LENGTHS, VOCAB)
        assert_close(backbone.head().logits(backbone.hidden(batch)), backbone.logits(batch), rtol=1e-4, atol=1e-6)
    assert not backbone.check_head(batch)


def test_head_arithmetic_in_plain_numbers():
    hidden_ND = torch.tensor([[1.0, 2.0]])
    weight_VD, bias_V = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([0.5, -1.0])
    logits = Head(weight_VD, bias_V, scale=2.0, softcap=4.0).logits(hidden_ND)
    assert_close(logits, 4 * torch.tanh(torch.tensor([[2 * 1.5, 2 * 5.0]]) / 4))
    assert Head(weight_VD).logits(hidden_ND, torch.bfloat16).dtype == torch.float32
    assert Head(None).logits(hidden_ND) is hidden_ND


# Decoding


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_equals_generate_and_each_row_alone(family):
    backbone = Backbone(tiny.model(family, VOCAB), tokenizer())
    tokens, logits = greedy(backbone, prompts())

    P = max(len(p) for p in prompts())
    ids = torch.tensor(np.stack([np.pad(p, (P - len(p), 0), constant_values=1) for p in prompts()])).long()
    mask = torch.tensor(np.stack([np.pad(np.ones(len(p), int), (P - len(p), 0)) for p in prompts()]))
    expected = backbone.model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=8, pad_token_id=1
    )
    if family != "bart-decoder":  # whose positions transformers' own generate shifts by the padding
        assert torch.equal(tokens, expected[:, P:])

    for row, prompt in enumerate(prompts()):
        tokens_alone, logits_alone = greedy(backbone, [prompt])
        assert torch.equal(tokens_alone[0], tokens[row])
        assert_close(logits_alone[0], logits[row], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_rows_on_the_way_changes_nothing_for_the_others(family):
    backbone = shared(family)
    _, expected = greedy(backbone, prompts())
    decoding = backbone.decode(prompts())
    rows = torch.arange(4)
    logits = decoding.logits(None)
    for step in range(1, 8):
        keep = {3: [0, 1, 3], 6: [2, 0]}.get(step)  # row 2 leaves; then row 1, and the rest change places
        tokens_B = logits.argmax(-1)
        if keep is not None:
            decoding.keep(torch.tensor(keep))
            rows, tokens_B = rows[keep], tokens_B[keep]
        logits = decoding.logits(tokens_B)
        assert_close(logits, expected[rows, step], rtol=1e-3, atol=1e-3)
    assert rows.tolist() == [3, 0]


def test_rows_can_be_dropped_before_the_prompts_are_read():
    backbone = shared("gpt2")
    _, expected = greedy(backbone, prompts(), steps=1)
    decoding = backbone.decode(prompts())
    decoding.keep(torch.tensor([2, 0]))
    assert_close(decoding.logits(None), expected[[2, 0], 0], rtol=1e-4, atol=1e-4)


def masks_seen(backbone: Backbone, given) -> list[torch.Tensor | None]:
    seen = []
    hook = backbone.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    greedy(backbone, given, steps=3)
    hook.remove()
    return seen


def test_no_attention_mask_is_passed_where_nothing_is_padded():
    backbone = Backbone(tiny.model("mistral", ROWS), tokenizer())  # a sliding window: the plain way
    backbone.check_decoding()  # a trial of its own, with padding
    assert masks_seen(backbone, prompts((5, 5))) == [None, None, None]
    assert [mask.shape[1] for mask in masks_seen(backbone, prompts((5, 3)))] == [5, 6, 7]


def test_decoding_is_deterministic_and_uses_the_cache_in_training_mode_with_gradient_checkpointing():
    quiet_backbone = Backbone(tiny.model("gpt2", ROWS), tokenizer())
    expected_tokens, expected = greedy(quiet_backbone, prompts())
    backbone = Backbone(tiny.model("gpt2", ROWS).train(), tokenizer())
    enable = getattr(backbone.model, "activation_checkpointing_enable", backbone.model.gradient_checkpointing_enable)
    enable()
    backbone.model.transformer.h[1].eval()  # a module with a mode of its own keeps it
    greedy(backbone, prompts(), steps=1)  # how this model decodes is found out the first time
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


def test_modes_come_back_after_an_exception():
    model = tiny.model("llama", ROWS).train()
    with pytest.raises(ValueError, match="input_ids"), eval_mode(model):
        model()
    assert all(module.training for module in model.modules())
    decoding = Backbone(model, tokenizer()).decode(prompts())
    decoding.logits(None)
    with pytest.raises(IndexError):
        decoding.logits(torch.full((4,), 10_000))
    assert all(module.training for module in model.modules())


def test_decoding_refuses_to_start_from_nothing_or_to_read_the_prompts_twice():
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


def test_a_family_whose_layers_hold_the_state_is_trained_but_not_decoded():
    config = AutoConfig.for_model(
        "rwkv", vocab_size=ROWS, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2
    )
    backbone = Backbone(AutoModelForCausalLM.from_config(config).eval(), tokenizer())
    assert backbone.check_head(tiny.batch(LENGTHS, VOCAB))
    with pytest.raises(ModelError, match="cannot generate with a rwkv model"):
        backbone.decode(prompts())


_HEADS = {f"num_{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
STUMBLING = {
    "prophetnet": {"hidden_size": 32, "pad_token_id": 1, **_HEADS},
    "switch_transformers": {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2, "num_experts": 2},
}


@pytest.mark.parametrize("family", sorted(STUMBLING))
def test_a_family_that_stumbles_over_the_usual_inputs_is_refused_in_words(family):
    config = AutoConfig.for_model(family, vocab_size=ROWS, decoder_start_token_id=1, **STUMBLING[family])
    backbone = Backbone(AutoModelForSeq2SeqLM.from_config(config).eval(), tokenizer())
    if family == "switch_transformers":
        backbone.check_decoding()  # by its decoder alone it would go
        backbone.own_logits = True
    with pytest.raises(ModelError, match=f"cannot generate with a {family} model: .+"):
        backbone.decode(prompts())


def test_memory_that_runs_out_in_the_trial_is_no_fault_of_the_model():
    backbone = Backbone(tiny.model("gpt2", ROWS), tokenizer())

    def full(*args):
        raise torch.OutOfMemoryError("no room")

    hook = backbone.model.transformer.register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        backbone.decode(prompts())
    hook.remove()
    backbone.decode(prompts())


# Facts about the model


def test_context_is_the_configs_and_absent_where_there_is_none():
    contexts = {family: shared(family).context for family in ("gpt2", "opt", "llama", "gpt_neox", "bloom", "mamba")}
    assert contexts.pop("bloom") is contexts.pop("mamba") is None
    assert set(contexts.values()) == {tiny.CONTEXT}


def test_context_is_found_under_the_names_that_some_families_have_for_it():
    mpt = AutoConfig.for_model("mpt", d_model=32, n_heads=4, n_layers=1, max_seq_len=24, vocab_size=ROWS)
    backbone = Backbone(AutoModelForCausalLM.from_config(mpt), tokenizer())
    assert backbone.context == 24
    sides = {"max_encoder_position_embeddings": 48, "max_decoder_position_embeddings": 16}
    assert context_of(AutoConfig.for_model("led", **sides)) == 16


def test_stop_ids_are_the_tokenizers_and_the_generation_configs():
    backbone = Backbone(tiny.model("llama", ROWS), tokenizer())
    assert backbone.stop_ids == {tokenizer().eos_token_id}
    backbone.model.generation_config.eos_token_id = [7, 9, ROWS - 1]  # the last is no token of the vocabulary
    assert backbone.stop_ids == {tokenizer().eos_token_id, 7, 9}
