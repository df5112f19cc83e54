"""Test numbers and memory on a CUDA device. Skipped without a GPU."""

import os

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from distillm_cli import plugins
from distillm_cli.losses import kernels
from distillm_cli.losses.fused import fused_loss
from distillm_cli.losses.weights import LossWeights
from distillm_cli.models.backbone import Head
from tests import tiny
from tests.command_line import call

# DISTILLM_TEST_DEVICE=cpu runs this file without a GPU.
DEVICE = os.environ.get("DISTILLM_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="needs CUDA's figures of memory")


def loss_and_grads(name, dtype, N=300, V=5003, D=32, D_teacher=48, kernel=None, matmul_dtype=None):
    """Return loss and gradients on the device, from the same random numbers for every dtype."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND, weight_VD, teacher_ND, teacher_VD = (
        torch.randn(*size, generator=generator).to(DEVICE, dtype)
        for size in ((N, D), (V, D), (N, D_teacher), (V, D_teacher))
    )
    hidden_ND.requires_grad_()
    weight_VD.mul_(0.4).requires_grad_()
    targets_N = torch.randint(V, (N,), generator=generator).to(DEVICE)
    loss = fused_loss(
        hidden_ND, Head(weight_VD), targets_N, weights=LossWeights(0.7, 0.3, plugins.divergences[name].default()),
        teacher_hidden_ND=teacher_ND, teacher_head=Head(teacher_VD.mul_(0.3)), matmul_dtype=matmul_dtype, kernel=kernel,
    )  # fmt: skip
    loss.backward()
    return [tensor.detach().double() for tensor in (loss, hidden_ND.grad, weight_VD.grad)]


@pytest.mark.parametrize("name", sorted(plugins.divergences))
def test_fused_loss_on_device_equals_float64(name):
    exact = loss_and_grads(name, torch.float64)
    for own, reference in zip(loss_and_grads(name, torch.float32), exact, strict=True):
        assert_close(own, reference, rtol=1e-3, atol=1e-4 * float(reference.abs().max()))


@needs_cuda
@pytest.mark.parametrize("kind", ["compiled", "triton"])
@pytest.mark.parametrize("name", ["kl", "skl", "jsd", "tvd"])
def test_loss_kernels_on_device_equal_float64(kind, name):
    exact = loss_and_grads(name, torch.float64)
    kernel = {"compiled": kernels.compiled, "triton": kernels.triton}[kind]()
    for own, reference in zip(loss_and_grads(name, torch.float32, kernel=kernel), exact, strict=True):
        assert_close(own, reference, rtol=1e-3, atol=1e-4 * float(reference.abs().max()))


@needs_cuda
def test_memory_of_the_loss_does_not_grow_with_tokens():
    def added(N):
        loss_and_grads("skl", torch.float32, N=256, V=50257)  # memory that libraries allocate at their first call
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_and_grads("skl", torch.float32, N=N, V=50257)
        inputs = 4 * N * (2 * 32 + 48)  # hidden states and their gradient
        return torch.cuda.max_memory_allocated() - before - inputs

    assert added(4096) < 1.1 * added(1024)


def run(capsys, directory, output, *more, **fields):
    """Run three steps of a method with models in ``directory``; return the result."""
    fields = {
        "data.size": 60, "data.template": "plain", "data.valid_limit": 4, "eval.report_rows": 0, "train.batch_size": 4,
        "train.save_steps": 2, "rollout.max_new_tokens": 4,
    } | {name.replace("__", "."): value for name, value in fields.items()}  # fmt: skip
    sets = [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]
    pair = ("--teacher", directory / "teacher", "--student", directory / "student", "--data", "builtin")
    code, result, err = call(capsys, "distill", *pair, "--device", DEVICE, *sets, "--output", output, "--json", *more)
    assert code == 0, err
    return result


def save_pair(directory, family):
    letters = tiny.tokenizer("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;?!'\"-/()\n")
    for seed, name in enumerate(("teacher", "student")):
        tiny.save(directory / name, family, rows=128, own_tokenizer=letters, seed=seed, **LONG[family])


LONG = {  # fields for a context of 256 tokens, which the built-in rows need
    "gpt2": {"n_positions": 256}, "opt": {"max_position_embeddings": 256}, "llama-tied": {"max_position_embeddings": 256},
    "qwen3": {"max_position_embeddings": 256}, "gemma2": {"max_position_embeddings": 256},
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(LONG))
def test_short_run_in_bf16(family, capsys, tmp_path):
    save_pair(tmp_path, family)
    kinds = {"student__dtype": "bf16", "teacher__dtype": "bf16"}
    low = run(capsys, tmp_path, tmp_path / "low", "--steps", "3", **kinds)
    high = run(capsys, tmp_path, tmp_path / "high", "--steps", "3", student__dtype="fp32", teacher__dtype="fp32")
    assert low["train_loss"] == pytest.approx(high["train_loss"], rel=0.05)


def test_resume_in_bf16_gives_the_same_bits(capsys, tmp_path):
    save_pair(tmp_path, "llama-tied")
    kinds = {"student__dtype": "bf16", "teacher__dtype": "bf16", "train__lr_schedule": "constant"}
    run(capsys, tmp_path, tmp_path / "whole", "--steps", "4", **kinds)
    run(capsys, tmp_path, tmp_path / "parts", "--steps", "2", **kinds)
    run(capsys, tmp_path, tmp_path / "parts", "--steps", "4", "--resume", **kinds)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    for name, weight in whole.items():
        assert torch.equal(parts[name], weight), name
