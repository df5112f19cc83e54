"""Test the kernels of the loss: each gives the losses and gradients of the plain one, or is not used."""

import importlib.util
import os
import shutil
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from distillm_cli import plugins
from distillm_cli.losses import kernels
from distillm_cli.losses.divergences import SkewKL
from distillm_cli.losses.fused import fused_loss, part_losses
from distillm_cli.losses.weights import LossWeights, TokenWeights
from tests.codes import raises_code
from tests.marks import long

IN_TRITON = ("kl", "rkl", "skl", "srkl", "jsd", "tvd", "jeffreys")
V = 4099  # more than one block of the Triton kernel
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@dataclass
class Head:
    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch):
    monkeypatch.setattr(kernels, "_PROBE_TOKENS", 5)


def probe(name="skl", dtype=torch.float32, v=V, **head):
    weight_VD = torch.zeros(v, 2, device=DEVICE)
    divergence = plugins.divergences[name].default()
    return kernels.probe(Head(weight_VD, **head), Head(weight_VD, **head), divergence, dtype)


@needs_triton
@pytest.mark.parametrize("name", IN_TRITON)
def test_triton_kernel_equals_plain_losses(name):
    for dtype in (torch.float32, torch.bfloat16):
        for head in ({}, {"scale": 0.7, "softcap": 5.0}):
            assert kernels.kernel_difference(kernels.triton(), probe(name, dtype, **head)) is None


@needs_triton
def test_triton_kernel_uses_token_weights():
    part = probe()
    weights = TokenWeights(weights_N=torch.rand(5, device=DEVICE), kd_weights_N=torch.rand(5, device=DEVICE))
    part = replace(part, token_weights=weights)
    plain_R, plain_dz_RV = part_losses(part)
    value_R, dz_RV = kernels.triton()(replace(part, student_RV=part.student_RV.clone()))
    assert_close(value_R, plain_R)
    assert_close(dz_RV, plain_dz_RV)


@needs_triton
@pytest.mark.parametrize("name", ["akl", "ab", "amid", "taid", "atkd"])
def test_triton_kernel_leaves_other_divergences(name):
    assert kernels.triton()(probe(name)) is None


@needs_triton
def test_triton_kernel_leaves_heads_with_bias():
    assert kernels.triton()(probe(bias_V=torch.zeros(V, device=DEVICE))) is None


@pytest.mark.skipif(shutil.which("g++") is None and DEVICE == "cpu", reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["skl", *(long(name) for name in sorted(plugins.divergences) if name != "skl")])
def test_compiled_loss_equals_plain_losses(name):
    assert kernels.kernel_difference(kernels.compiled(), probe(name, v=257, softcap=5.0)) is None


def wrong(part):
    value_R, dz_RV = part_losses(part)
    return value_R * 1.01, dz_RV


def in_place(part):
    value_R, dz_RV = part_losses(part)
    part.student_RV.copy_(dz_RV)
    return value_R, part.student_RV


@pytest.mark.parametrize("kernel", [in_place, part_losses, lambda part: None])
def test_kernel_computes_whole_chunks(kernel):
    calls = []

    def counted(part):
        calls.append(len(part.targets_R))
        return kernel(part)

    def loss_and_grads(**options):
        generator = torch.Generator().manual_seed(0)
        hidden_ND = torch.randn(10, 4, generator=generator).requires_grad_()
        weight_VD = torch.randn(17, 4, generator=generator).requires_grad_()
        teacher_ND, teacher_VD = (torch.randn(n, 6, generator=generator) for n in (10, 17))
        loss = fused_loss(
            hidden_ND, Head(weight_VD), torch.arange(10), weights=LossWeights(0.7, 0.3, SkewKL(0.1)),
            teacher_hidden_ND=teacher_ND, teacher_head=Head(teacher_VD), chunk=4, **options,
        )  # fmt: skip
        loss.backward()
        return loss, hidden_ND.grad, weight_VD.grad

    assert_close(loss_and_grads(kernel=counted), loss_and_grads())
    assert calls == [4, 4, 2]


def test_auto_does_not_use_a_kernel_with_other_results(monkeypatch):
    monkeypatch.setattr(kernels, "KERNELS", {"compiled": lambda: wrong, "triton": lambda: in_place})
    monkeypatch.setattr(kernels, "_seconds", lambda kernel, part: 1.0 if kernel is part_losses else 0.5)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    head = Head(torch.zeros(50, 2))
    name, found = kernels.choose_kernel("auto", head, head, SkewKL(0.1), torch.float32)
    assert name == "triton"
    assert "compiled is not used (losses differ" in found


def test_named_kernel_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(kernels, "KERNELS", {"compiled": lambda: wrong})
    head = Head(torch.zeros(50, 2))
    with raises_code("usage.loss_kernel", "train.loss_kernel compiled", "losses differ"):
        kernels.choose_kernel("compiled", head, head, SkewKL(0.1), torch.float32)


def test_divergence_less_runs_have_no_kernel():
    assert kernels.choose_kernel("auto", Head(torch.zeros(50, 2)), None, None, torch.float32) == ("eager", "")
