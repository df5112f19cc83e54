"""Test the hand-written forward pass over whole sequences against transformers' forward at every position."""

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
SUPPORTED = ("gpt2", "gpt2-untied", "llama", "llama-tied", "qwen2", "qwen3")
LENGTHS = [(5, 9), (20, 30), (7, 0), (1, 3)]  # ragged, and one row without a response


def backbone(family: str, dtype: torch.dtype = torch.float64, **fields) -> Backbone:
    return Backbone(tiny.model(family, VOCAB + 4, **fields).to(dtype), tiny.tokenizer(size=VOCAB))


def no_dropout(family: str) -> dict[str, float]:
    return {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family.startswith("gpt2") else {}


@pytest.mark.parametrize("lengths", [LENGTHS, [(8, 4)] * 3, [(1, 1)]], ids=["ragged", "equal", "one"])
@pytest.mark.parametrize("family", SUPPORTED)
def test_states_and_gradients_match_the_trunk(family, lengths):
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
    for name, found_grad, expected_grad in zip(parameters, found, expected, strict=True):
        assert_close(found_grad, expected_grad, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("family", ["gpt2", "gpt2-untied", "llama", "llama-tied"])
def test_loss_gradients_are_dense_and_match_the_trunk(family, monkeypatch):
    """Check tied and untied embeddings over two micro-batches.

    A tied matrix has a gradient from the head and a deferred one from the embedding of each pass. A deferred gradient left
    by an aborted backward pass must be discarded.
    """
    found = []
    for uses_trunk in (False, True):
        model = backbone(family, **no_dropout(family)).train()
        if uses_trunk:
            monkeypatch.setattr(Backbone, "hidden", lambda self, batch, for_backward: self.trunk_states(batch))
        objective = StudentLoss(model, KD(schema.ObjectiveConfig()))
        for seed in (0, 1):
            batches = [tiny.batch(LENGTHS, VOCAB, seed), tiny.batch(LENGTHS[:2], VOCAB, seed + 7)]
            if not uses_trunk and model._cpu_forward.embedding_grad is not None:
                model._cpu_forward.embedding_grad._waiting.append(
                    (torch.tensor([3]), torch.ones(1, model.model.config.hidden_size))
                )
            total, tokens = objective(batches, None, CROSS_ENTROPY)
            (total / tokens).backward()
        assert uses_trunk or model._cpu_forward.agrees
        assert all(parameter.grad.layout == torch.strided for parameter in model.parameters())
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in found[0].items():
        assert_close(grad, found[1][name], rtol=1e-9, atol=1e-11, msg=name)


def test_tied_embedding_gets_gradient_without_the_head():
    """Check that the deferred gradient is added at the end of the backward pass, even if the head has none."""
    grads = []
    for for_backward in (True, False):
        model = backbone("gpt2", **no_dropout("gpt2")).train()
        model.hidden(tiny.batch(LENGTHS, VOCAB), for_backward=for_backward).square().sum().backward()
        grads.append(model.model.get_input_embeddings().weight.grad.to_dense())
    assert grads[0].abs().sum() > 0
    assert_close(*grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_hand_written_pass_is_used_for_supported_families(family):
    model = backbone(family, torch.float32)
    if not model.own_logits:
        model.hidden(tiny.batch(LENGTHS, VOCAB))
        assert bool(model._cpu_forward.agrees) == (family in SUPPORTED)
        assert forward.has_forward(model.model.config.model_type) or not model._cpu_forward.agrees


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 weights"])
@pytest.mark.parametrize("family", SUPPORTED)
def test_bf16_error_is_close_to_that_of_the_trunk(family, autocast):
    exact = backbone(family)
    batch = tiny.batch(LENGTHS, VOCAB)
    rounded = backbone(family, torch.float32 if autocast else torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, trunk_states = rounded.hidden(batch).double(), rounded.trunk_states(batch).double()
    assert rounded._cpu_forward.agrees
    reference = exact.trunk_states(batch)
    assert (found - reference).square().mean() < 1.5 * (trunk_states - reference).square().mean()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_frozen_weights_are_packed_again_only_after_a_change(family):
    if not can_pack():
        pytest.skip("no packed bf16 products on this CPU")
    model = backbone(family, torch.bfloat16).eval().requires_grad_(False)
    batch = tiny.batch(LENGTHS, VOCAB)
    with torch.no_grad():
        before = model.hidden(batch)
        products = {key: product for key, (_, _, product) in model._cpu_forward.packed._made.items()}
        assert products
        assert all(product.packed is not None for product in products.values())
        assert_close(before, model.trunk_states(batch), rtol=0.05, atol=0.1)
        model.hidden(batch)
        assert all(model._cpu_forward.packed._made[key][2] is product for key, product in products.items())
        for parameter in model.parameters():
            parameter.mul_(1.2)
        after = model.hidden(batch)
    assert_close(after, model.trunk_states(batch), rtol=0.05, atol=0.1)
    assert (after - before).abs().max() > 0.2
    model.to("meta")
    assert not model._cpu_forward.packed._made


def test_trained_weights_are_not_packed():
    model = backbone("gpt2", torch.bfloat16).train()
    model.hidden(tiny.batch(LENGTHS, VOCAB)).sum().backward()
    with torch.no_grad():
        model.hidden(tiny.batch(LENGTHS, VOCAB))
    assert not model._cpu_forward.packed._made


def test_fused_gelu_matches_separate_gelu():
    if not can_pack():
        pytest.skip("no packed bf16 products on this CPU")
    weight, bias, x = torch.randn(48, 32).bfloat16(), torch.randn(48).bfloat16(), torch.randn(9, 32).bfloat16()
    product = PackedWeights().linear(weight, bias, 0, None, transposed=False)
    reference = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    assert_close(product(x, nn.GELU(approximate="tanh")).double(), reference, rtol=2**-8, atol=2**-7)
    assert_close(product(x, nn.SiLU()), F.silu(product(x)), rtol=0, atol=0)


@pytest.mark.parametrize("times", [1, 127, 128, 300])
@pytest.mark.parametrize("kinds", [1, 2], ids=["all heads", "shared keys"])
def test_blockwise_attention_matches_causal_attention(times, kinds):
    """Compare bf16 values and gradients with float64, for lengths below, at and above a block of queries."""
    generator = torch.Generator().manual_seed(times)
    query = torch.randn((2, 4, times, 16), generator=generator).bfloat16().requires_grad_()
    key, value = (
        torch.randn((2, 4 // kinds, times, 16), generator=generator).bfloat16().requires_grad_() for _ in range(2)
    )
    found = forward.attend_blockwise(query, key, value, 0.25, None)
    exact = [states.detach().double().requires_grad_() for states in (query, key, value)]
    reference = F.scaled_dot_product_attention(*exact, is_causal=True, scale=0.25, enable_gqa=True).transpose(1, 2)
    assert_close(found.double(), reference, rtol=0, atol=0.06)
    weight = torch.randn(reference.shape, generator=generator).bfloat16()
    (found * weight).sum().backward()
    (reference * weight).sum().backward()
    for states, exact_states in zip((query, key, value), exact, strict=True):
        assert (
            states.grad - exact_states.grad
        ).square().mean().sqrt() < 0.01 * exact_states.grad.square().mean().sqrt() + 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blockwise_attention_applies_the_mask(dtype):
    query, key, value = (torch.randn(2, 3, n, 8).to(dtype) for n in (5, 9, 9))
    hidden = torch.rand(2, 1, 5, 9) < 0.5
    hidden[..., 0] = False
    reference = (query.float() @ key.float().transpose(2, 3) * 0.3).masked_fill(hidden, -torch.inf).softmax(
        -1
    ) @ value.float()
    found = forward.attend_blockwise(query, key, value, 0.3, hidden)
    assert_close(found.transpose(1, 2).float(), reference, rtol=0, atol=0.03 if dtype == torch.bfloat16 else 1e-5)


def test_dropout_has_the_same_distribution():
    """Compare mean and standard deviation of each state over 4,000 equal rows. The random draws differ."""
    model = backbone("gpt2", torch.float32, resid_pdrop=0.3, embd_pdrop=0.2, attn_pdrop=0.4).train()
    (row,), rows = tiny.sequences([(6, 4)], VOCAB), 4000
    equal_rows = collate([row] * rows)
    torch.manual_seed(0)
    with torch.no_grad():
        fast_states, trunk_states = (states(equal_rows).view(rows, -1) for states in (model.hidden, model.trunk_states))
        with torch.autocast("cpu", torch.bfloat16):  # attention then does not use torch's kernel
            rounded = model.hidden(equal_rows).float().view(rows, -1)
        assert model._cpu_forward.agrees
        spread = trunk_states.std(0)
        for found in (fast_states, rounded):
            assert ((found.mean(0) - trunk_states.mean(0)).abs() < 6 * spread * (2 / rows) ** 0.5 + 0.01).all()
            assert_close(found.std(0), spread, rtol=0.15, atol=0.01)
        model.eval()
        assert_close(model.hidden(equal_rows), model.trunk_states(equal_rows), rtol=1e-4, atol=1e-4)
        assert (spread > 0.1).any()


def test_modified_model_runs_through_the_trunk():
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
    mlp.forward = lambda x, original=mlp.forward: original(x) * 1.5
    assert_close(changed.hidden(batch), changed.trunk_states(batch), rtol=0, atol=0)

    checkpointing = backbone("gpt2").train()
    checkpointing.model.gradient_checkpointing_enable()
    assert checkpointing._cpu_forward.find_pass(checkpointing) is None


def test_pass_with_different_states_is_not_used(monkeypatch):
    """Check a transformers version that computes something else under the same names."""
    model = backbone("llama")
    attention = type(model.trunk.layers[0].self_attn)
    original = attention.forward

    def changed_forward(self, *args, **kwargs):
        states, weights = original(self, *args, **kwargs)
        return states * 1.5, weights

    monkeypatch.setattr(attention, "forward", changed_forward)
    batch = tiny.batch(LENGTHS, VOCAB)
    assert_close(model.hidden(batch), model.trunk_states(batch), rtol=0, atol=0)
    assert model._cpu_forward.agrees is False
