"""Test attacks on input embeddings, and training against them."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from distillm_cli.extras.adversarial import Adversarial
from distillm_cli.losses.attacks import Attack, find_perturbation, mean_norm, perturbed, prompt_positions
from distillm_cli.losses.extra import StudentPass
from distillm_cli.losses.plain import token_losses, token_outcomes
from distillm_cli.losses.weights import CROSS_ENTROPY
from distillm_cli.models.backbone import Backbone
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.types import Sequence, collate
from distillm_cli.utils.modules import eval_mode
from tests import tiny

VOCAB = 41
ROWS = tiny.sequences([(5, 3), (2, 6), (7, 2)], VOCAB, seed=3)
FAMILIES = ["llama", "gpt2", "t5", "bart"]


def model(family, seed=1, **fields):
    return Backbone(tiny.model(family, VOCAB, seed=seed, **fields).double(), tiny.tokenizer(size=VOCAB))


def losses_under(attack, backbone, batch):
    """Return the loss of each sequence, and the perturbation."""
    with torch.no_grad():
        embedded = backbone.embed(batch)
    perturbation_BTD = find_perturbation(backbone, batch, embedded, attack)
    losses_N, _ = token_outcomes(
        backbone.hidden_of(perturbed(embedded, perturbation_BTD)), backbone.head(), batch.targets_N
    )
    return torch.zeros(batch.size, dtype=losses_N.dtype).index_add_(0, batch.rows_N, losses_N), perturbation_BTD


def test_prompt_positions_leave_out_responses_and_padding():
    conversation = Sequence(np.arange(8, dtype=np.int32), np.arange(2, dtype=np.int32), turns=np.array([3, 4]))
    batch = collate([conversation, *ROWS[:2]])
    found = prompt_positions(batch, model("llama").embed(batch))
    assert [row.nonzero().flatten().tolist() for row in found] == [[0, 1, 2, 5, 6, 7], [0, 1, 2, 3, 4], [0, 1]]


def test_prompt_positions_of_an_encoder_decoder_are_its_encoder_input():
    batch = collate(ROWS)
    found = prompt_positions(batch, model("t5").embed(batch))
    assert found.sum(1).tolist() == [5, 2, 7]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
def test_perturbation_keeps_to_its_radius_and_to_prompts(family, kind):
    backbone, batch = model(family), collate(ROWS)
    clean, none = losses_under(Attack(kind, 0.0, 5), backbone, batch)
    moved, perturbation_BTD = losses_under(Attack(kind, 0.1, 5), backbone, batch)
    assert not none.any(), "radius 0 changes nothing"
    assert moved.sum() > clean.sum()
    is_prompt_BT = prompt_positions(batch, backbone.embed(batch))
    norms_BT = perturbation_BTD.norm(dim=-1)
    radius = 0.1 * mean_norm(backbone, batch.ids_BT.device)
    assert norms_BT.max() <= radius * (1 + 1e-9)
    assert norms_BT[~is_prompt_BT].max() == 0
    if kind == "fgsm":
        assert_close(norms_BT[is_prompt_BT], torch.full_like(norms_BT[is_prompt_BT], radius))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("radius", [0.02, 0.3])
def test_pgd_is_never_weaker_than_fgsm(family, radius):
    backbone, batch = model(family), collate(ROWS)
    weak, _ = losses_under(Attack("fgsm", radius, 1), backbone, batch)
    one, _ = losses_under(Attack("pgd", radius, 1), backbone, batch)
    strong, _ = losses_under(Attack("pgd", radius, 6), backbone, batch)
    assert_close(one, weak)
    assert (strong >= weak - 1e-9).all()
    assert strong.sum() > weak.sum()


def test_fgsm_follows_the_gradient():
    backbone, batch = model("gpt2"), collate(ROWS[:1])
    embedded = backbone.embed(batch)
    x = embedded.inputs_BTD.detach().requires_grad_()
    loss = token_losses(backbone.hidden_of(embedded.with_tensors([x])), backbone.head(), batch.targets_N).sum()
    (gradient_BTD,) = torch.autograd.grad(loss, [x])
    found = find_perturbation(backbone, batch, embedded, Attack("fgsm", 0.5, 1))
    cosines = torch.cosine_similarity(found[0, :5], gradient_BTD[0, :5], dim=-1)
    assert_close(cosines, torch.ones_like(cosines))


def done(student, sequences, source=Source.DATASET):
    batch = collate(sequences)
    return StudentPass(
        student=student,
        source=source,
        batches=[batch],
        hidden_ND=torch.zeros(1),
        targets_N=batch.targets_N,
        teacher_hidden_ND=None,
        weights=CROSS_ENTROPY,
        scale=1 / batch.tokens,
        drawn=None,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_radius_of_zero_adds_the_plain_cross_entropy(family):
    student = model(family)
    batch = collate(ROWS)
    extra = Adversarial(Attack("pgd", 0.0, 2))
    extra.begin_step([], 0)
    loss = extra.loss(done(student, ROWS))
    plain = token_losses(student.hidden(batch), student.head(), batch.targets_N).mean()
    assert_close(loss, plain)
    assert extra.figures() == {"adversarial_loss": pytest.approx(plain.item())}
    assert_close(*(torch.autograd.grad(x, list(student.parameters()), allow_unused=True) for x in (loss, plain)))
    assert extra.loss(done(student, ROWS, Source.ROLLOUT)) is None


def test_search_has_no_dropout_and_leaves_no_gradients():
    student = model("gpt2")
    student.train()
    batch = collate(ROWS)
    attack = Attack("pgd", 0.2, 2)
    expected, _ = losses_under(attack, model("gpt2"), batch)
    state = torch.random.get_rng_state()
    with eval_mode(student):
        found, _ = losses_under(attack, student, batch)
    assert_close(found, expected)
    assert torch.equal(torch.random.get_rng_state(), state)
    Adversarial(attack).loss(done(student, ROWS))
    assert student.model.training
    assert all(p.grad is None for p in student.parameters())


def test_adversarial_training_makes_a_model_robust():
    rows = tiny.sequences([(4, 1)] * 32, VOCAB, seed=5)
    batch = collate(rows)
    attack = Attack("pgd", 0.3, 4)
    losses = {}
    for name, attacks in (("plain", False), ("robust", True)):
        student = Backbone(tiny.model("llama", VOCAB, seed=1, spread=1.0), tiny.tokenizer(size=VOCAB))
        extra = Adversarial(Attack("pgd", 0.3, 2))
        optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
        for step in range(60):
            extra.begin_step([], step)
            loss = token_losses(student.hidden(batch), student.head(), batch.targets_N).mean()
            if attacks:
                loss = loss + extra.loss(done(student, rows))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[name] = losses_under(attack, student, batch)[0].mean().item()
        weak = losses_under(Attack("fgsm", 0.3, 1), student, batch)[0].mean().item()
        assert losses[name] >= weak, "on a trained model too"
    assert losses["robust"] < 0.7 * losses["plain"]
