"""Test the distance between blocks of student and teacher (``objective.hidden``) against transformers' own hidden states."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from distillm_cli.config.extras import HiddenConfig
from distillm_cli.config.objective import ObjectiveConfig
from distillm_cli.extras.hidden_states import HiddenStates, matched_pairs
from distillm_cli.losses import objectives
from distillm_cli.losses.divergences import KL
from distillm_cli.losses.student_loss import StudentLoss, sequence_shares
from distillm_cli.losses.weights import LossWeights
from distillm_cli.models.backbone import Backbone
from distillm_cli.types import collate
from tests import tiny
from tests.codes import raises_code

KD = LossWeights(kd=1.0, ce=0.0, divergence=KL())
LENGTHS = [(5, 3), (2, 4), (3, 1)]


def backbone(family="llama", **fields):
    return Backbone(tiny.model(family, tiny.VOCAB, **fields), tiny.tokenizer(size=tiny.VOCAB))


def frozen(model):
    model.requires_grad_(False)
    return model


def loss_of(student, teacher, *, weight=0.5, reduction="token", **fields):
    extra = HiddenStates(teacher, student, HiddenConfig(**fields), weight=weight, seed=1)
    objective = objectives.build(ObjectiveConfig(divergence="kl", reduction=reduction))
    module = StudentLoss(student, objective, teacher_head=teacher.head(), extras={"hidden": extra})
    module.eval().train()
    student.eval()  # without dropout
    return module, extra


def block_states(model, batch, index):
    """Return the output of a block before the model's final norm, at the supervised positions."""
    if model.is_encoder_decoder:
        from distillm_cli.models import seq2seq

        split = seq2seq.split_batch(batch, model.start)
        found = model.model(
            split.ids_BS,
            attention_mask=split.mask_BS,
            decoder_input_ids=split.decoder_ids_BR,
            output_hidden_states=True,
        )
        return found.decoder_hidden_states[index].flatten(0, 1)[split.positions_N]
    states = model.model(input_ids=batch.ids_BT, output_hidden_states=True).hidden_states
    return states[index].flatten(0, 1)[batch.positions_N]


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_loss_is_the_divergence_and_the_distance(kind, reduction):
    """Check a pair of inner blocks of different widths: transformers' hidden_states[1] is the output of block 1."""
    teacher = frozen(backbone(num_hidden_layers=3, hidden_size=48))
    student = backbone(seed=5)
    module, extra = loss_of(student, teacher, reduction=reduction, layers="1:2", loss=kind)
    batches = [tiny.batch(LENGTHS[:2], tiny.VOCAB), tiny.batch(LENGTHS[2:], tiny.VOCAB, seed=1)]
    count = sum(batch.tokens for batch in batches) if reduction == "token" else 3
    total, _ = module(batches, None, KD, scale=1 / count)
    total.backward()
    found = student.model.model.layers[0].mlp.down_proj.weight.grad.clone()
    found_map = extra.maps[0].weight.grad.clone()
    module.zero_grad()

    expected = torch.zeros(())
    for batch in batches:
        log_q, log_p = (
            m.model(batch.ids_BT).logits.flatten(0, 1)[batch.positions_N].log_softmax(-1) for m in (student, teacher)
        )
        kl_N = (log_p.exp() * (log_p - log_q)).sum(1)
        s, t = extra.maps[0](block_states(student, batch, 1)), block_states(teacher, batch, 2).detach()
        distance_N = (s - t).square().mean(1) if kind == "mse" else 1 - F.cosine_similarity(s, t, dim=1)
        shares_N = sequence_shares(batch) if reduction == "sequence" else torch.ones(batch.tokens)
        expected = expected + ((kl_N + 0.5 * distance_N) * shares_N).sum() / count
    assert_close(total, expected, rtol=1e-4, atol=1e-6)
    expected.backward()
    assert_close(found, student.model.model.layers[0].mlp.down_proj.weight.grad, rtol=1e-3, atol=1e-6)
    assert_close(found_map, extra.maps[0].weight.grad, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("family", ["gpt2", "t5", "bart", "opt-350m"])
def test_inner_blocks_of_each_family_are_compared(family):
    teacher, student = frozen(backbone(family)), backbone(family, seed=5)
    module, extra = loss_of(student, teacher, weight=1.0, layers="1:1")
    batch = tiny.batch(LENGTHS, tiny.VOCAB)
    module.begin_step([], 0)
    total, _ = module([batch], None, KD, scale=1 / batch.tokens)
    total.backward()
    extra.release()
    assert not any(module._forward_hooks for model in (teacher, student) for module in model.model.modules())
    with torch.no_grad():
        s, t = (block_states(model, batch, 1) for model in (student, teacher))
    assert module.figures()["hidden"] == pytest.approx((s - t).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_do_not_depend_on_micro_batches(checkpointing):
    def gradients(parts):
        teacher, student = frozen(backbone(num_hidden_layers=4)), backbone(seed=5)
        if checkpointing and len(parts) == 2:
            student.model.gradient_checkpointing_enable()
        module, _ = loss_of(student, teacher, layers="even")
        student.train()
        for batch in parts:
            module([batch], None, KD, scale=1 / 8)[0].backward()
        return [p.grad for p in student.parameters()]

    sequences = tiny.sequences(LENGTHS, tiny.VOCAB)
    whole = gradients([collate(sequences)])
    for ours, reference in zip(gradients([collate(sequences[:1]), collate(sequences[1:])]), whole, strict=True):
        assert_close(ours, reference, rtol=1e-3, atol=1e-5)


def test_equal_widths_have_no_maps_and_a_copy_no_distance():
    teacher = frozen(backbone())
    student = backbone()
    module, extra = loss_of(student, teacher, layers="even")
    assert not list(extra.maps.parameters())
    batch = tiny.batch(LENGTHS, tiny.VOCAB)
    module.begin_step([], 0)
    module([batch], None, KD, scale=1 / batch.tokens)
    assert module.figures()["hidden"] == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(
    ("layers", "blocks", "expected"),
    [
        ("last", (2, 12), [(2, 12)]),
        ("even", (3, 12), [(1, 4), (2, 8), (3, 12)]),
        ("even", (4, 6), [(1, 2), (2, 3), (3, 5), (4, 6)]),
        ("even", (3, 2), [(1, 1), (2, 2), (3, 2)]),
        ("2:1,1:2", (2, 2), [(2, 1), (1, 2)]),
    ],
)
def test_blocks_are_matched(layers, blocks, expected):
    assert matched_pairs(layers, *blocks) == expected


@pytest.mark.parametrize(
    ("pair", "mention"), [("3:1", "the student has 2 blocks"), ("1:13", "the teacher has 12 blocks")]
)
def test_block_that_does_not_exist_is_an_error(pair, mention):
    with raises_code("usage.invalid_blocks", f"hidden.layers {pair}", mention):
        matched_pairs(pair, 2, 12)


def test_maps_do_not_change_the_random_state():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    teacher, student = frozen(backbone(hidden_size=48)), backbone(seed=5)
    torch.set_rng_state(state)
    loss_of(student, teacher)
    assert torch.equal(torch.get_rng_state(), state)
