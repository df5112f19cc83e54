"""The written-out pass over whole sequences, against transformers' own forward at every position."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from distillm_cli.config import schema
from distillm_cli.losses.objectives import KD
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.losses.weights import CROSS_ENTROPY
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.cpu import forward
from distillm_cli.models.cpu.packed import PackedWeights, can_pack
from distillm_cli.types import collate
from tests import tiny

VOCAB = 97
WRITTEN = ("gpt2", "gpt2-untied", "llama", "llama-tied", "qwen2", "qwen3")
LENGTHS = [(5, 9), (20, 30), (7, 0), (1, 3)]  # ragged, and one row with nothing to predict


def backbone(family: str, dtype: torch.dtype = torch.float64, **fields) -> Backbone:
    return Backbone(tiny.model(family, VOCAB + 4, **fields).to(dtype), tiny.tokenizer(size=VOCAB))


def no_dropout(family: str) -> dict[str, float]:
    return {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family.startswith("gpt2") else {}


@pytest.mark.parametrize("lengths", [LENGTHS, [(8, 4)] * 3, [(1, 1)]], ids=["ragged", "alike", "one"])
@pytest.mark.parametrize("family", WRITTEN)
def test_states_and_gradients_are_the_trunks_own(family, lengths):
    model = backbone(family, **no_dropout(family)).train()
    batch = tiny.batch(lengths, VOCAB)
    states_ND = model.hidden(batch)
    assert model._cpu_forward.agrees
    expected_ND = model.trunk_states(batch)
    assert_close(states_ND, expected_ND, rtol=1e-12, atol=1e-12)
    weight_ND = torch.randn_like(states_ND)
    parameters = dict(model.trunk.named_parameters())
    found, expected = (
        torch.autograd.grad((weight_ND * states).sum(), parameters.values(), allow_unused=True)
        for states in (states_ND, expected_ND)
    )
    for name, mine, own in zip(parameters, found, expected, strict=True):
        assert_close(mine, own, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("family", ["gpt2", "gpt2-untied", "llama", "llama-tied"])
def test_gradients_through_the_loss_are_dense_and_the_trunks_own_tied_or_not(family, monkeypatch):
    """The tied matrix gets one from the head and one, late, from each pass's embedding; two micro-batches add up. A backward
    pass that broke off leaves nothing behind."""
    found = []
    for own in (False, True):
        model = backbone(family, **no_dropout(family)).train()
        if own:
            monkeypatch.setattr(Backbone, "hidden", lambda self, batch, for_backward: self.trunk_states(batch))
        objective = StudentLoss(model, KD(schema.ObjectiveConfig()))
        for seed in (0, 1):
            batches = [tiny.batch(LENGTHS, VOCAB, seed), tiny.batch(LENGTHS[:2], VOCAB, seed + 7)]
            if not own and model._cpu_forward.embedding_grad is not None:
                model._cpu_forward.embedding_grad._waiting.append(
                    (torch.tensor([3]), torch.ones(1, model.model.config.hidden_size))
                )
            total, tokens = objective(batches, None, CROSS_ENTROPY)
            (total / tokens).backward()
        assert own or model._cpu_forward.agrees
        assert all(parameter.grad.layout == torch.strided for parameter in model.parameters())
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in found[0].items():
        assert_close(grad, found[1][name], rtol=1e-9, atol=1e-11, msg=name)


def test_a_tied_embedding_learns_from_a_loss_that_does_not_meet_the_head():
    """Its gradient waits for the end of the backward pass, not for the head's."""
    grads = []
    for for_backward in (True, False):
        model = backbone("gpt2", **no_dropout("gpt2")).train()
        model.hidden(tiny.batch(LENGTHS, VOCAB), for_backward=for_backward).square().sum().backward()
        grads.append(model.model.get_input_embeddings().weight.grad.to_dense())
    assert grads[0].abs().sum() > 0
    assert_close(*grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_it_is_used_for_the_families_it_was_written_after(family):
    model = backbone(family, torch.float32)
    if not model.own_logits:
        model.hidden(tiny.batch(LENGTHS, VOCAB))
        assert bool(model._cpu_forward.agrees) == (family in WRITTEN)
        assert forward.has_forward(model.model.config.model_type) or not model._cpu_forward.agrees


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 weights"])
@pytest.mark.parametrize("family", WRITTEN)
def test_in_bfloat16_it_is_as_near_to_the_truth_as_the_trunk_itself(family, autocast):
    exact = backbone(family)
    batch = tiny.batch(LENGTHS, VOCAB)
    rounded = backbone(family, torch.float32 if autocast else torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mine, own = rounded.hidden(batch).double(), rounded.trunk_states(batch).double()
    assert rounded._cpu_forward.agrees
    truth = exact.trunk_states(batch)
    assert (mine - truth).square().mean() < 1.5 * (own - truth).square().mean()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_frozen_weights_are_laid_out_once_and_anew_when_they_change(family):
    if not can_pack():
        pytest.skip("no bf16 products to lay weights out for")
    model = backbone(family, torch.bfloat16).eval().requires_grad_(False)
    batch = tiny.batch(LENGTHS, VOCAB)
    with torch.no_grad():
        before = model.hidden(batch)
        made = {key: product for key, (_, _, product) in model._cpu_forward.packed._made.items()}
        assert made
        assert all(product.packed is not None for product in made.values())
        assert_close(before, model.trunk_states(batch), rtol=0.05, atol=0.1)
        model.hidden(batch)
        assert all(model._cpu_forward.packed._made[key][2] is product for key, product in made.items())
        for parameter in model.parameters():
            parameter.mul_(1.2)
        after = model.hidden(batch)
    assert_close(after, model.trunk_states(batch), rtol=0.05, atol=0.1)
    assert (after - before).abs().max() > 0.2
    model.to("meta")
    assert not model._cpu_forward.packed._made


def test_weights_that_train_are_never_laid_out():
    model = backbone("gpt2", torch.bfloat16).train()
    model.hidden(tiny.batch(LENGTHS, VOCAB)).sum().backward()
    with torch.no_grad():
        model.hidden(tiny.batch(LENGTHS, VOCAB))
    assert not model._cpu_forward.packed._made


def test_gelu_inside_a_product_is_gelu_behind_it():
    if not can_pack():
        pytest.skip("no bf16 products to lay weights out for")
    weight, bias, x = torch.randn(48, 32).bfloat16(), torch.randn(48).bfloat16(), torch.randn(9, 32).bfloat16()
    product = PackedWeights().linear(weight, bias, 0, None, transposed=False)
    truth = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    assert_close(product(x, nn.GELU(approximate="tanh")).double(), truth, rtol=2**-8, atol=2**-7)
    assert_close(product(x, nn.SiLU()), F.silu(product(x)), rtol=0, atol=0)


@pytest.mark.parametrize("times", [1, 127, 128, 300])
@pytest.mark.parametrize("kinds", [1, 2], ids=["all heads", "shared keys"])
def test_attention_in_blocks_of_queries_is_causal_attention(times, kinds):
    """bf16 against float64, gradients too, over lengths below, at and beyond a block of queries."""
    generator = torch.Generator().manual_seed(times)
    query = torch.randn((2, 4, times, 16), generator=generator).bfloat16().requires_grad_()
    key, value = (
        torch.randn((2, 4 // kinds, times, 16), generator=generator).bfloat16().requires_grad_() for _ in range(2)
    )
    found = forward.attend_blockwise(query, key, value, 0.25, None)
    exact = [states.detach().double().requires_grad_() for states in (query, key, value)]
    truth = F.scaled_dot_product_attention(*exact, is_causal=True, scale=0.25, enable_gqa=True).transpose(1, 2)
    assert_close(found.double(), truth, rtol=0, atol=0.06)
    weight = torch.randn(truth.shape, generator=generator).bfloat16()
    (found * weight).sum().backward()
    (truth * weight).sum().backward()
    for mine, own in zip((query, key, value), exact, strict=True):
        assert (mine.grad - own.grad).square().mean().sqrt() < 0.01 * own.grad.square().mean().sqrt() + 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_query_sees_what_is_not_hidden_from_it(dtype):
    query, key, value = (torch.randn(2, 3, n, 8).to(dtype) for n in (5, 9, 9))
    hidden = torch.rand(2, 1, 5, 9) < 0.5
    hidden[..., 0] = False
    truth = (query.float() @ key.float().transpose(2, 3) * 0.3).masked_fill(hidden, -torch.inf).softmax(
        -1
    ) @ value.float()
    found = forward.attend_blockwise(query, key, value, 0.3, hidden)
    assert_close(found.transpose(1, 2).float(), truth, rtol=0, atol=0.03 if dtype == torch.bfloat16 else 1e-5)


def test_dropout_in_training_has_the_same_law():
    """Mean and spread of each state over 4,000 rows alike; the draws themselves are others."""
    model = backbone("gpt2", torch.float32, resid_pdrop=0.3, embd_pdrop=0.2, attn_pdrop=0.4).train()
    (row,), rows = tiny.sequences([(6, 4)], VOCAB), 4000
    alike = collate([row] * rows)
    torch.manual_seed(0)
    with torch.no_grad():
        mine, own = (states(alike).view(rows, -1) for states in (model.hidden, model.trunk_states))
        with torch.autocast("cpu", torch.bfloat16):  # where attention is not torch's kernel
            rounded = model.hidden(alike).float().view(rows, -1)
        assert model._cpu_forward.agrees
        spread = own.std(0)
        for found in (mine, rounded):
            assert ((found.mean(0) - own.mean(0)).abs() < 6 * spread * (2 / rows) ** 0.5 + 0.01).all()
            assert_close(found.std(0), spread, rtol=0.15, atol=0.01)
        model.eval()
        assert_close(model.hidden(alike), model.trunk_states(alike), rtol=1e-4, atol=1e-4)
        assert (spread > 0.1).any()


def test_what_is_not_transformers_own_goes_through_the_trunk():
    batch = tiny.batch(LENGTHS, VOCAB)
    hooked, calls = backbone("gpt2"), []
    hook = hooked.trunk.h[0].register_forward_hook(lambda *args: calls.append(1))
    hooked.hidden(batch)
    assert calls
    hook.remove()
    hooked.hidden(batch)
    assert len(calls) == 1
    assert hooked._cpu_forward.agrees

    changed = backbone("llama")
    changed.hidden(batch)
    mlp = changed.trunk.layers[1].mlp
    mlp.forward = lambda x, own=mlp.forward: own(x) * 1.5
    assert_close(changed.hidden(batch), changed.trunk_states(batch), rtol=0, atol=0)

    saving = backbone("gpt2").train()
    saving.model.gradient_checkpointing_enable()
    assert saving._cpu_forward.find_pass(saving) is None


def test_a_pass_that_does_not_give_the_trunks_states_is_not_used(monkeypatch):
    """As when another version of transformers computes something else under the same names."""
    model = backbone("llama")
    attention = type(model.trunk.layers[0].self_attn)
    own = attention.forward

    def other(self, *args, **kwargs):
        states, weights = own(self, *args, **kwargs)
        return states * 1.5, weights

    monkeypatch.setattr(attention, "forward", other)
    batch = tiny.batch(LENGTHS, VOCAB)
    assert_close(model.hidden(batch), model.trunk_states(batch), rtol=0, atol=0)
    assert model._cpu_forward.agrees is False
