"""Test the losses of OKD and CTCD against plain PyTorch in float64, and the weights of a teacher that is trained."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from distillm_cli.config.extras import CTCDConfig, OKDConfig
from distillm_cli.config.schema import ObjectiveConfig
from distillm_cli.extras.ctcd import CTCD
from distillm_cli.extras.okd import OKD
from distillm_cli.losses import objectives
from distillm_cli.losses.divergences import JSD, KL, TokenDistributions, logit_grad
from distillm_cli.losses.families import Tempered
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.seq2seq import own_logits
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.training.state import RunInfo
from distillm_cli.training.validation import Validator
from tests import tiny

TOKENIZER = tiny.tokenizer()
V = len(TOKENIZER)
LENGTHS = [[(3, 4), (5, 2)], [(4, 1), (2, 6)]]
BATCHES = [tiny.batch(lengths, V, seed) for seed, lengths in enumerate(LENGTHS)]
FAMILIES = ("llama-tied", "gpt2", "t5")


def backbone(family, seed):
    """Return a model in float64, without dropout."""
    fields = {"t5": {"dropout_rate": 0.0}, "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}}
    return Backbone(tiny.model(family, V, seed=seed, **fields.get(family, {})).double(), TOKENIZER)


def okd(teacher, **fields):
    """Return OKD with an adapter that is not 0."""
    extra = OKD(teacher, OKDConfig(rank=2, **fields), seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in extra.named_parameters():
            if weight.requires_grad:
                weight.data = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.1
                assert ".lora_" in name
    return extra


def ctcd(teacher, **fields):
    rebuild = partial(backbone, teacher.model.config.model_type, 5)
    return CTCD(teacher, CTCDConfig(enabled=True, **fields), tokenizer=TOKENIZER, rebuild=rebuild, matmul_dtype=None)


def step(student, extra, *, source=Source.DATASET, reduction="token", scale=0.25):
    """Run forward and backward of one micro-batch; return the loss."""
    objective = objectives.build(ObjectiveConfig(divergence="kl", reduction=reduction), 1.0)
    loss = StudentLoss(student, objective, teacher_head=extra.teacher.head(), extras={"extra": extra})
    loss.train()
    weights = objective.weights(source)
    total, tokens = loss(BATCHES, None, weights, scale=scale, source=source)
    assert tokens == sum(batch.tokens for batch in BATCHES)
    total.backward()
    return total


def plain_terms(model, other, T=1.0):
    """Return CE and T² KL(other ‖ model), other as a constant, of each token, from full logits of transformers' code."""
    ce, kl = [], []
    for batch in BATCHES:
        log_N = model.logits64(batch)
        other_N = other.logits64(batch).detach()
        targets = batch.targets_N
        ce.append(nn.functional.cross_entropy(log_N, targets, reduction="none"))
        p = (other_N / T).softmax(-1)
        kl.append((p * (p.log() - (log_N / T).log_softmax(-1))).sum(-1) * T**2)
    return torch.cat(ce), torch.cat(kl)


class Plain:
    """Compute a model's logits by its own forward pass, in float64."""

    def __init__(self, model):
        self.model = model

    def logits64(self, batch):
        model = self.model.model
        if model.config.is_encoder_decoder:
            return own_logits(model, batch, self.model.start)
        logits_BTV = model(input_ids=batch.ids_BT, use_cache=False).logits
        return logits_BTV.flatten(0, 1)[batch.positions_N]


def gradients(parameters):
    return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def trained(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def shares():
    """Return 1/n for every token of a response of n tokens."""
    return torch.cat([1 / torch.bincount(batch.rows_N)[batch.rows_N] for batch in BATCHES]).double()


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("family", FAMILIES)
def test_okd_gradients_are_those_of_the_plain_loss(family, reduction):
    student, teacher = backbone(family, 1), backbone(family, 2)
    extra = okd(teacher, weight=0.3, ce=0.7)
    total = step(student, extra, reduction=reduction)
    sides = {"student": trained(student), "adapter": trained(teacher)}
    fused = {name: gradients(parameters) for name, parameters in sides.items()}
    assert fused["adapter"].keys() == sides["adapter"].keys()

    for parameters in sides.values():
        for p in parameters.values():
            p.grad = None
    weights = shares() if reduction == "sequence" else 1.0
    ce, kl = plain_terms(Plain(student), Plain(teacher))
    student_loss = 0.25 * (weights * (kl + 0.7 * ce)).sum()
    ce, kl = plain_terms(Plain(teacher), Plain(student))
    (student_loss + 0.25 * (weights * (ce + 0.3 * kl)).sum()).backward()
    assert_close(total, student_loss, rtol=1e-9, atol=0)
    for name, parameters in sides.items():
        assert_close(fused[name], gradients(parameters), rtol=1e-7, atol=1e-9, msg=lambda text: f"{family}: {text}")


@pytest.mark.parametrize("family", FAMILIES)
def test_ctcd_gradients_are_those_of_the_plain_loss(family):
    student, teacher = backbone(family, 1), backbone(family, 2)
    fields = {"hard_teacher": 0.5, "soft_teacher": 0.25, "hard_student": 2.0, "soft_student": 0.75, "temperature": 3.0}
    extra = ctcd(teacher, **fields)
    total = step(student, extra)
    sides = {"student": trained(student), "teacher": trained(teacher)}
    fused = {name: gradients(parameters) for name, parameters in sides.items()}
    assert fused["teacher"].keys() == sides["teacher"].keys()

    for parameters in sides.values():
        for p in parameters.values():
            p.grad = None
    ce, kl = plain_terms(Plain(student), Plain(teacher), T=3.0)
    student_loss = 0.25 * (2.0 * ce + 0.75 * kl).sum()
    ce, kl = plain_terms(Plain(teacher), Plain(student), T=3.0)
    (student_loss + 0.25 * (0.5 * ce + 0.25 * kl).sum()).backward()
    assert_close(total, student_loss, rtol=1e-9, atol=0)
    for name, parameters in sides.items():
        assert_close(fused[name], gradients(parameters), rtol=1e-7, atol=1e-9, msg=lambda text: f"{family}: {text}")


def test_student_outputs_have_no_cross_entropy():
    student, teacher = backbone("llama", 1), backbone("llama", 2)
    extra = okd(teacher, weight=0.0, ce=5.0)
    total = step(student, extra, source=Source.ROLLOUT)
    _, kl = plain_terms(Plain(student), Plain(teacher))
    assert_close(total, 0.25 * kl.sum(), rtol=1e-9, atol=0)
    assert not gradients(trained(teacher)), "with λ = 0 nothing trains the adapter on student outputs"


@pytest.mark.parametrize("inner", [KL(), JSD(0.3)])
def test_tempered_gradient_is_exact(inner):
    generator = torch.Generator().manual_seed(0)
    teacher_z, z = (torch.randn(4, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    T = 2.5
    tempered = Tempered(inner, T)

    def softened(z):
        log_p, log_q = (teacher_z / T).log_softmax(-1), (z / T).log_softmax(-1)
        if isinstance(inner, KL):
            return T**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
        p, q = log_p.exp(), log_q.exp()
        m = inner.beta * p + (1 - inner.beta) * q
        parts = inner.beta * p * (log_p - m.log()) + (1 - inner.beta) * q * (log_q - m.log())
        return T**2 * parts.sum(-1)

    z.requires_grad_()
    assert torch.autograd.gradcheck(softened, z)
    plain = softened(z)
    (expected,) = torch.autograd.grad(plain.sum(), z)
    q = TokenDistributions(z.detach())
    value, h = tempered.between(TokenDistributions(teacher_z), q)
    assert_close(value, plain.detach())
    assert_close(logit_grad(h, q.prob_NV), expected)
    assert tempered.between(TokenDistributions(teacher_z), q, with_grad=False)[1] is None


def test_start_weights_are_those_from_before_training():
    """Check that the block gives the initial model, and that the trained weights return after it."""
    for family in ("llama", "t5"):
        teacher = backbone(family, 5)
        with torch.no_grad():
            before = Plain(teacher).logits64(BATCHES[0])
            extra = okd(teacher)
            changed = Plain(teacher).logits64(BATCHES[0])
            assert not torch.allclose(before, changed)
            with extra.with_start_weights():
                assert_close(Plain(teacher).logits64(BATCHES[0]), before)
            assert torch.equal(Plain(teacher).logits64(BATCHES[0]), changed)


def test_drift_is_the_divergence_from_the_model_without_adapter():
    teacher = backbone("llama", 5)
    with torch.no_grad():
        before = Plain(teacher).logits64(BATCHES[0]).log_softmax(-1)
        extra = okd(teacher)
        after = Plain(teacher).logits64(BATCHES[0]).log_softmax(-1)
        extra.eval()
        found = extra.measure([tiny.sequences(LENGTHS[0], V, 0)], RunInfo(steps=1, steps_per_epoch=1))
    tokens = BATCHES[0].tokens
    assert found["teacher_drift"] == pytest.approx((before.exp() * (before - after)).sum().item() / tokens)


@pytest.mark.parametrize("new", [okd, ctcd])
def test_cross_entropy_is_the_trained_teachers(new):
    teacher = backbone("llama", 5)
    extra = new(teacher)
    loss = StudentLoss(backbone("llama", 3), objectives.CrossEntropy(), extras={"extra": extra})
    run = RunInfo(steps=1, steps_per_epoch=1)
    validator = Validator([tiny.sequences(LENGTHS[0], V, 0)], run, listener=lambda event: None)
    loss.eval()
    with torch.no_grad():
        after = Plain(teacher).logits64(BATCHES[0]).log_softmax(-1)
    ce = -after.gather(-1, BATCHES[0].targets_N[:, None]).mean().item()
    assert validator.measure(loss, 0)[1]["teacher_loss"] == pytest.approx(ce)


@pytest.mark.parametrize("new", [okd, ctcd])
def test_saved_weights_load(new, tmp_path):
    teacher = Backbone(tiny.model("llama-tied", V, seed=2), TOKENIZER)
    extra = new(teacher)
    extra.save_weights(tmp_path)
    saved = {name: weight.clone() for name, weight in teacher.state().items()}
    with torch.no_grad():
        for weight in teacher.state().values():
            weight.add_(1.0)
    extra.load_weights(tmp_path)
    for name, weight in teacher.state().items():
        assert torch.equal(weight.float(), saved[name].float()), name
