"""Test the alignment of input gradients."""

import copy

import pytest
import torch
from torch.autograd.function import once_differentiable
from torch.testing import assert_close

from distillm_cli.config.extras import KDIGAConfig
from distillm_cli.extras.kdiga import KDIGA, check_second_derivative, input_gradients
from distillm_cli.losses.extra import MicroRows, StudentPass
from distillm_cli.losses.weights import CROSS_ENTROPY
from distillm_cli.models.backbone import Backbone
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.types import collate, micro_batches
from tests import tiny
from tests.codes import raises_code

VOCAB = 41
ROWS = tiny.sequences([(5, 3), (2, 6), (7, 2)], VOCAB, seed=3)
FAMILIES = ["llama", "gpt2", "gemma2", "t5-v1.1", "bart"]  # ReLUs, as in T5 1.0, have no second derivative to compare


def model(family, seed, dtype=torch.float64, **fields):
    return Backbone(tiny.model(family, VOCAB, seed=seed, **fields).to(dtype), tiny.tokenizer(size=VOCAB))


def extra(teacher, space="swap", weight=1.0, **config):
    vocab = None if space == "shared" else VOCAB
    return KDIGA(teacher, KDIGAConfig(candidates=8, **config), weight=weight, seed=7, vocab=vocab)


def term(kdiga, student, rows=ROWS, *, step=0, most=8, source=Source.DATASET):
    micro = [MicroRows(source, groups) for groups in micro_batches(rows, most)]
    total = None
    for part, drawn in zip(micro, kdiga.begin_step(micro, step), strict=True):
        loss = kdiga.loss(
            StudentPass(
                student=student,
                source=source,
                batches=[collate(group) for group in part.groups],
                hidden_ND=torch.zeros(1),
                targets_N=torch.zeros(0, dtype=torch.int64),
                teacher_hidden_ND=None,
                weights=CROSS_ENTROPY,
                scale=1.0,
                drawn=drawn,
            )
        )
        if loss is not None:
            total = loss if total is None else total + loss
    return total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("space", ["shared", "swap"])
def test_student_equal_to_teacher_has_no_distance(family, space):
    teacher = model(family, 1)
    student = copy.deepcopy(teacher)
    loss = term(extra(teacher.requires_grad_(False), space), student)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())
    assert term(extra(teacher, space), model(family, 2)).item() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("space", ["shared", "swap"])
def test_gradient_matches_finite_differences(family, space):
    teacher, student = model(family, 1).requires_grad_(False), model(family, 2)
    student.train()  # the term is computed without dropout
    kdiga = extra(teacher, space)
    parameters = list(student.parameters())
    grads = torch.autograd.grad(term(kdiga, student), parameters, allow_unused=True)
    assert student.training
    assert student.model.training
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    if family == "bart":
        directions[0][1] = 0  # the table's row of the padding token has no gradient as an input
    # Some families compute norms in float32, whose rounding needs larger steps.
    h, tolerance = (1e-6, 1e-5) if family in ("gpt2", "bart") else (3e-5, 2e-3)
    expected = sum((g * d).sum() for g, d in zip(grads, directions, strict=True) if g is not None)
    values = []
    for step in (h, -2 * h):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(step * d)
        values.append(term(kdiga, student).item())
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(expected.item(), rel=tolerance)


def test_distance_follows_its_formula():
    teacher, student = model("llama", 1), model("llama", 2)
    distances = []
    for row in ROWS:
        sides = []
        for side in (student, teacher):
            table = side.model.get_input_embeddings().weight
            ids = torch.tensor([*row.prompt, *row.response[:-1]])
            x = table[ids].detach().requires_grad_()
            logits = side.model(inputs_embeds=x[None], use_cache=False).logits[0, len(row.prompt) - 1 :]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.response).long())
            sides.append((x, torch.autograd.grad(loss, x)[0], table))
        distances.append((sides[0][1] - sides[1][1]).norm())
    expected = 0.5 * torch.stack(distances).mean()
    assert_close(term(extra(teacher, "shared", weight=0.5), student), expected.detach().clone(), check_dtype=False)


def test_swap_score_is_the_first_order_change_of_the_loss():
    student = model("gpt2", 2)
    batch = collate(ROWS[:1])
    embedded, (gradient_BTD,) = input_gradients(student, batch, with_graph=False)
    table = student.model.get_input_embeddings().weight.detach()
    x = embedded.inputs_BTD.detach()
    step = 1e-6 * (table[5] - x[0, 2])
    losses = []
    for sign in (1, -1):
        moved = x.clone()
        moved[0, 2] += sign * step
        logits = student.model(inputs_embeds=moved, use_cache=False).logits[0, len(ROWS[0].prompt) - 1 :]
        losses.append(torch.nn.functional.cross_entropy(logits, batch.targets_N).item())
    score = (table[5] - x[0, 2]) @ gradient_BTD[0, 2]
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(score.item(), rel=1e-5)


def test_widths_may_differ_for_swap_scores():
    teacher = model("llama", 1)
    student = model("llama", 2, hidden_size=16, head_dim=4)
    assert term(extra(teacher), student).item() > 0


@pytest.mark.parametrize("space", ["shared", "swap"])
def test_term_does_not_depend_on_the_micro_batches(space):
    teacher, student = model("llama", 1), model("llama", 2)
    whole, split = (term(extra(teacher, space), student, most=most) for most in (3, 1))
    assert_close(whole, split)


def test_term_is_computed_in_every_kth_step_and_on_labels_only():
    teacher, student = model("llama", 1), model("llama", 2)
    kdiga = extra(teacher, every=3)
    found = [term(kdiga, student, step=step) for step in range(4)]
    assert [value is not None for value in found] == [True, False, False, True]
    assert found[0].item() != found[3].item(), "each step draws other candidates"
    assert kdiga.figures() == {"input_gradient": pytest.approx(found[3].item())}
    assert term(kdiga, student, source=Source.ROLLOUT) is None
    assert kdiga.figures() == {}


def test_frozen_embeddings_still_have_an_input_gradient():
    teacher, student = model("llama", 1), model("llama", 2)
    student.model.get_input_embeddings().requires_grad_(False)
    term(extra(teacher), student).backward()
    assert student.model.get_output_embeddings().weight.grad.abs().max() > 0


class _OnlyOneDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad


def test_model_without_second_derivative_is_refused():
    student = model("llama", 1)
    check_second_derivative(student)
    layer = student.trunk.layers[0]
    layer.register_forward_pre_hook(lambda module, inputs: (_OnlyOneDerivative.apply(inputs[0]), *inputs[1:]))
    with raises_code("model.no_second_derivative", "llama", "eager"):
        check_second_derivative(student)
