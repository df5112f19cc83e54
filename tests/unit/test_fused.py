"""Test the fused loss against the loss on whole logits: the papers' definitions, autograd, float64."""

import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distillm_cli import plugins
from distillm_cli.config import schema
from distillm_cli.losses import fused
from distillm_cli.losses.divergences import KL, SkewKL, build_divergence
from distillm_cli.losses.fused import fused_loss, target_log_probs
from distillm_cli.losses.objectives import KD
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.losses.weights import LossWeights, TokenWeights
from distillm_cli.models.backbone import Backbone
from distillm_cli.training.events import Note
from distillm_cli.types import collate
from tests import reference_divergences, tiny

N, D, D_TEACHER, V = 11, 6, 9, 17
NAMES = list(plugins.divergences)
WITH_DETACHED_PARTS = {"akl", "taid"}  # parts of them are detached, so finite differences do not match
# Options of a head: (bias, scale, softcap).
HEADS = {
    "plain": (False, 1.0, None),
    "bias": (True, 1.0, None),
    "scale": (False, 0.7, None),
    "softcap": (False, 1.0, 2.5),
    "all": (True, 0.7, 2.5),
}
WEIGHTS = {"kd": LossWeights(1.0, 0.0), "ce": LossWeights(0.0, 1.0), "both": LossWeights(0.7, 0.3)}


@dataclass
class Head:
    weight_VD: Tensor | None
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_ND):
        z = hidden_ND if self.weight_VD is None else hidden_ND @ self.weight_VD.T
        z = z if self.bias_V is None else z + self.bias_V
        z = z * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap


def rand(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def setting(kind="plain", n=N, v=V):
    """Return student hidden states and head, teacher hidden states and head, and targets, in float64."""
    bias, scale, softcap = HEADS[kind]
    bias_V = rand(v, seed=3).requires_grad_() if bias else None
    head = Head(rand(v, D, seed=2).requires_grad_(), bias_V, scale, softcap)
    teacher_head = Head(rand(v, D_TEACHER, seed=5), None if bias_V is None else rand(v, seed=7), scale, softcap)
    targets = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(6))
    return rand(n, D, seed=1).requires_grad_(), head, rand(n, D_TEACHER, seed=4), teacher_head, targets


def plain_loss(
    name, hidden, head, teacher_hidden, teacher_head, targets, loss_weights, weights=None, dtype=torch.float64
):
    """Return the loss by its definition: whole logits, softmax, divergence, autograd."""
    z, zt = head.logits(hidden).to(dtype), teacher_head.logits(teacher_hidden).to(dtype)
    value = loss_weights.kd * reference_divergences.divergence(name, zt.softmax(-1), z.softmax(-1), targets=targets)
    if loss_weights.ce:
        value = value + loss_weights.ce * F.cross_entropy(z, targets, reduction="none")
    return (value if weights is None else value * weights).sum()


def make(name):
    return build_divergence(schema.ObjectiveConfig(divergence=name))


def fused_loss_of(name, hidden, head, teacher_hidden, teacher_head, targets, loss_weights=WEIGHTS["kd"], **more):
    teacher = {"teacher_hidden_ND": teacher_hidden, "teacher_head": teacher_head} if loss_weights.kd else {}
    loss_weights = replace(loss_weights, divergence=make(name) if loss_weights.kd else None)
    return fused_loss(hidden, head, targets, weights=loss_weights, **teacher, **more)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("loss_weights", WEIGHTS)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients_match_the_definition(name, loss_weights, kind, monkeypatch):
    """Check every divergence and head, with and without cross-entropy and token weights, for several chunk sizes."""
    inputs, loss_weights = setting(kind), WEIGHTS[loss_weights]
    leaves = [inputs[0], inputs[1].weight_VD] + ([inputs[1].bias_V] if inputs[1].bias_V is not None else [])
    for weights in (None, torch.rand(N, dtype=torch.float64)):
        expected = plain_loss(name, *inputs, loss_weights, weights)
        expected_grads = torch.autograd.grad(expected, leaves)
        for chunk, table_rows, vocab_slice in ((1, 1, 5), (4, 3, 5), (100, 2, 100), (100, 100, 4)):
            monkeypatch.setitem(fused._TABLE_BYTES, "cpu", 8 * V * table_rows)
            monkeypatch.setattr(fused, "_VOCAB_SLICE", vocab_slice)
            total = fused_loss_of(
                name, *inputs, loss_weights, token_weights=TokenWeights(weights_N=weights), chunk=chunk
            )
            assert_close(total, expected)
            for grad, reference in zip(torch.autograd.grad(total, leaves), expected_grads, strict=True):
                assert_close(grad, reference)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITH_DETACHED_PARTS])
def test_gradcheck_in_float64(name):
    hidden, head, teacher_hidden, teacher_head, targets = setting("all")

    def loss(hidden, weight, bias):
        h = Head(weight, bias, head.scale, head.softcap)
        return fused_loss_of(name, hidden, h, teacher_hidden, teacher_head, targets, LossWeights(0.8, 0.2), chunk=4)

    assert torch.autograd.gradcheck(loss, (hidden, head.weight_VD, head.bias_V))


def test_second_backward_doubles_the_gradient():
    """Check that gradient tables, released by the first backward pass, are computed again with retain_graph."""
    hidden, head, *rest = setting()
    total = fused_loss_of("skl", hidden, head, *rest)
    (3 * total).backward(retain_graph=True)
    once = hidden.grad.clone(), head.weight_VD.grad.clone()
    (3 * total).backward()
    assert_close(hidden.grad, 2 * once[0])
    assert_close(head.weight_VD.grad, 2 * once[1])


@pytest.mark.parametrize("factor", [1.0, 3.0], ids=["1", "3"])
@pytest.mark.parametrize("kind", HEADS)
def test_scale_multiplies_loss_and_gradients(kind, factor):
    """Check a scale that is applied chunk by chunk to the head's gradient against one that is applied to the loss."""
    hidden, head, *rest = setting(kind)
    inputs = [hidden, head.weight_VD, *([] if head.bias_V is None else [head.bias_V])]
    scaled = fused_loss_of("skl", hidden, head, *rest, loss_weights=WEIGHTS["both"], chunk=3, scale=0.125)
    unscaled = fused_loss_of("skl", hidden, head, *rest, loss_weights=WEIGHTS["both"], chunk=3)
    assert scaled.item() == pytest.approx(0.125 * unscaled.item(), rel=1e-12)
    scaled_grads, unscaled_grads = (
        torch.autograd.grad(scaled * factor, inputs),
        torch.autograd.grad(unscaled * 0.125 * factor, inputs),
    )
    for found, expected in zip(scaled_grads, unscaled_grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    logits = rand(7, V, seed=9).requires_grad_()
    scaled_logits_loss = fused_loss_of(
        "kl", logits, Head(None), rand(7, V, seed=10), Head(None), rest[2][:7].repeat(2)[:7], scale=0.125
    )
    unscaled_logits_loss = fused_loss_of(
        "kl", logits, Head(None), rand(7, V, seed=10), Head(None), rest[2][:7].repeat(2)[:7]
    )
    torch.testing.assert_close(
        *(torch.autograd.grad(x, logits)[0] for x in (scaled_logits_loss, unscaled_logits_loss * 0.125)),
        rtol=1e-12,
        atol=1e-14,
    )


@pytest.mark.parametrize("kind", HEADS)
def test_target_log_probs_match_log_softmax(kind):
    hidden, head, _, _, targets = setting(kind)
    found = target_log_probs(hidden, head, targets, chunk=3)
    assert_close(found, head.logits(hidden).log_softmax(-1)[torch.arange(N), targets].detach())
    assert not found.requires_grad


@pytest.mark.parametrize("loss_weights", WEIGHTS)
def test_head_without_weight_uses_logits(loss_weights):
    """Check the fallback for unknown heads: logits instead of hidden states, the same loss, gradients of the logits."""
    _, _, teacher_hidden, teacher_head, targets = setting()
    logits = rand(N, V, seed=9).requires_grad_()
    before = logits.detach().clone()
    expected = plain_loss("skl", logits, Head(None), teacher_hidden, teacher_head, targets, WEIGHTS[loss_weights])
    total = fused_loss_of(
        "skl", logits, Head(None), teacher_hidden, teacher_head, targets, WEIGHTS[loss_weights], chunk=2
    )
    assert_close(total, expected)
    assert_close(*(torch.autograd.grad(x, logits)[0] for x in (total, expected)))
    assert torch.equal(logits, before)


def test_teacher_head_without_weight_uses_logits():
    hidden, head, _, _, targets = setting()
    logits = rand(N, V, seed=9)
    assert_close(
        fused_loss_of("srkl", hidden, head, logits, Head(None), targets, chunk=3),
        plain_loss("srkl", hidden, head, logits, Head(None), targets, WEIGHTS["kd"]),
    )


def test_batch_without_targets_has_zero_loss_and_gradient():
    _, head, _, teacher_head, _ = setting("bias")
    hidden = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    nothing = torch.zeros(0, D_TEACHER, dtype=torch.float64)
    total = fused_loss_of("skl", hidden, head, nothing, teacher_head, torch.zeros(0, dtype=torch.long))
    total.backward()
    assert total.item() == 0
    assert not head.weight_VD.grad.any()
    assert not head.bias_V.grad.any()


class RecordedOperations(TorchDispatchMode):
    """Record operations by name, and raise ``error`` at each one for which ``full(count, size)`` is true."""

    def __init__(self, full=lambda count, size: False, error=MemoryError):
        super().__init__()
        self.full, self.error, self.names = full, error, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        made = func(*args, **(kwargs or {}))
        size = sum(t.numel() * t.itemsize for t in tree_leaves(made) if isinstance(t, Tensor))
        if self.full(len(self.names), size):
            raise self.error
        return made

    @property
    def products(self):
        return sum("mm" in name for name in self.names)


def test_unneeded_gradients_are_not_computed():
    """Count matrix products per chunk: two for logits, one for hidden-state gradients, one for the head's gradient."""
    hidden, head, teacher_hidden, teacher_head, targets = setting("bias")

    def products(hidden_grad, weight_grad):
        states, frozen = hidden.detach().clone(), Head(head.weight_VD.detach().clone(), head.bias_V.detach())
        states.requires_grad_(hidden_grad), frozen.weight_VD.requires_grad_(weight_grad)
        with RecordedOperations() as seen:
            total = fused_loss_of("skl", states, frozen, teacher_hidden, teacher_head, targets)
        if total.requires_grad:
            total.backward()
        assert (states.grad is not None, frozen.weight_VD.grad is not None) == (hidden_grad, weight_grad)
        return seen.products

    assert products(True, True) == 4
    assert products(True, False) == products(False, True) == 3
    assert products(False, False) == 2
    with torch.no_grad():
        assert products(False, False) == 2


def test_no_grad_computes_only_the_value():
    inputs = setting("bias")
    with torch.no_grad(), RecordedOperations() as seen:
        value = fused_loss_of("skl", *inputs, LossWeights(0.5, 0.5))
    assert seen.products == 2
    assert not value.requires_grad
    assert_close(value, fused_loss_of("skl", *inputs, LossWeights(0.5, 0.5)).detach())


@pytest.mark.parametrize("name", NAMES)
def test_bf16_error_is_that_of_whole_logits(name):
    """Compare errors against float64, with heads in bf16 and softmax in float32.

    The value is within 0.03%, gradients within 1.4% of their norm (5.4% for tvd, whose gradient jumps where p = q). This is
    the rounding of the logits: whole logits under autocast have the same error to three digits.
    """
    n, d, v = 96, 128, 3000
    tables = [rand(n, d, seed=1), 2 * rand(v, d, seed=2) / d**0.5, rand(n, d, seed=3), 2 * rand(v, d, seed=4) / d**0.5]
    targets, bound = torch.randint(0, v, (n,)), 0.06 if name == "tvd" else 0.015

    def run(low):
        dtype = torch.float64 if low is None else torch.float32
        hidden, weight = (t.to(dtype, copy=True).requires_grad_() for t in tables[:2])
        teacher_hidden, teacher_weight = (t.to(dtype if low is None else torch.bfloat16) for t in tables[2:])
        inputs = (hidden, Head(weight), teacher_hidden, Head(teacher_weight), targets)
        if low == "whole logits":
            with torch.autocast("cpu", torch.bfloat16):
                total = plain_loss(name, *inputs, WEIGHTS["kd"], dtype=torch.float32)
        else:
            total = fused_loss_of(name, *inputs, matmul_dtype=None if low is None else torch.bfloat16, chunk=40)
        total.backward()
        return [t.detach().double() for t in (total, hidden.grad, weight.grad)]

    exact, fast, whole_logits = run(None), run("fused"), run("whole logits")
    errors, whole_logits_errors = (
        [((a - b).norm() / b.norm()).item() for a, b in zip(x, exact, strict=True)] for x in (fast, whole_logits)
    )
    assert errors[0] < 0.001
    assert max(errors[1:]) < bound
    assert all(e < 1.02 * t for e, t in zip(errors[1:], whole_logits_errors[1:], strict=True))


def test_gradients_have_the_dtype_of_their_tensor():
    hidden, head, teacher_hidden, teacher_head, targets = setting("bias")
    leaves = [t.detach().bfloat16().requires_grad_() for t in (hidden, head.weight_VD, head.bias_V)]
    teacher_hidden, teacher_weight = teacher_hidden.bfloat16(), teacher_head.weight_VD.bfloat16()
    total = fused_loss_of("kl", leaves[0], Head(*leaves[1:]), teacher_hidden, Head(teacher_weight), targets)
    total.backward()
    assert total.dtype == torch.float32
    assert [leaf.grad.dtype for leaf in leaves] == [torch.bfloat16] * 3


def test_chunk_size_follows_the_memory_budget(monkeypatch):
    """Check that chunks have equal sizes of at least one token, for any vocabulary."""
    chunks = []
    monkeypatch.setattr(
        fused._Computation, "run", lambda computation, chunk, *_: chunks.append(chunk) or torch.zeros(())
    )
    inputs = setting(n=1000)
    for budget, part_rows in ((2**30, 1), (90 * 2 * 8 * V, 1), (1, 1), (2**30, 600)):
        monkeypatch.setattr(fused, "CHUNK_BYTES", budget)
        monkeypatch.setitem(fused._TABLE_BYTES, "cpu", part_rows * 8 * V)
        with torch.no_grad():
            fused_loss_of("kl", *inputs)
    assert chunks == [250, 84, 1, 500]


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to allocate"
    ),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["python", "cuda", "linux", "windows"])
def test_out_of_memory_halves_the_chunk_until_it_fits(error):
    """Check that chunks of 64, 32 and 16 tokens fail, and that the loss with 8 tokens is unchanged."""
    inputs, halved = setting(n=64, v=64), []
    leaves = (inputs[0], inputs[1].weight_VD)
    expected = fused_loss_of("skl", *inputs)
    expected_grads = torch.autograd.grad(expected, leaves)
    with RecordedOperations(
        full=lambda _, size: size > 5000, error=error
    ) as seen:  # 8 tokens × 64 entries × 8 bytes = 4096
        total = fused_loss_of("skl", *inputs, on_halved=halved.append)
    assert halved == [8]
    assert seen.names
    assert_close(total, expected)
    for grad, reference in zip(torch.autograd.grad(total, leaves), expected_grads, strict=True):
        assert_close(grad, reference)


def test_retry_after_out_of_memory_counts_nothing_twice():
    """Check one failure at each operation of the loss in turn."""
    inputs = setting("bias", n=7)
    leaves = (inputs[0], inputs[1].weight_VD, inputs[1].bias_V)
    expected = fused_loss_of("srkl", *inputs, WEIGHTS["both"])
    expected_grads = torch.autograd.grad(expected, leaves)
    with RecordedOperations() as seen:
        fused_loss_of("srkl", *inputs, WEIGHTS["both"], chunk=4)
    first = next(i for i, name in enumerate(seen.names) if "empty" in name)
    retried = 0
    for position in range(first + 1, len(seen.names)):
        halved = []
        with RecordedOperations(full=lambda count, _, position=position: count == position, error=OUT_OF_MEMORY[2]):
            total = fused_loss_of("srkl", *inputs, WEIGHTS["both"], chunk=4, on_halved=halved.append)
        assert halved in ([2], [])
        retried += bool(halved)
        assert_close(total, expected)
        for grad, reference in zip(torch.autograd.grad(total, leaves), expected_grads, strict=True):
            assert_close(grad, reference)
    assert retried > 50


def test_out_of_memory_at_one_token_and_other_errors_are_raised():
    inputs = setting()
    with (
        RecordedOperations(full=lambda _, size: size >= V * 8, error=OUT_OF_MEMORY[2]),
        pytest.raises(RuntimeError, match="allocate"),
    ):
        fused_loss_of("kl", *inputs)
    with (
        RecordedOperations(full=lambda count, _: count == 5, error=RuntimeError("shapes")),
        pytest.raises(RuntimeError, match="shapes"),
    ):
        fused_loss_of("kl", *inputs)


def test_smaller_chunk_is_reported_once_and_reused():
    tokenizer = tiny.tokenizer()
    student, teacher = (
        Backbone(tiny.model(f, len(tokenizer), seed=s), tokenizer) for f, s in (("gpt2", 1), ("llama", 4))
    )
    batch = collate(tiny.sequences([(3, 8), (4, 8)], vocab=len(tokenizer), seed=2))
    events, teacher_hidden_ND = [], teacher.hidden(batch).detach()
    objective = StudentLoss(student, KD(schema.ObjectiveConfig()), teacher_head=teacher.head()).eval()
    objective.emit = events.append
    expected, _ = objective([batch], teacher_hidden_ND, objective.criterion.held_out)
    refuse = iter([True])
    with RecordedOperations(
        full=lambda _, size: size == 16 * len(tokenizer) * 4 and next(refuse, False), error=OUT_OF_MEMORY[2]
    ):
        total, _ = objective([batch], teacher_hidden_ND, objective.criterion.held_out)
    repeated, _ = objective([batch], teacher_hidden_ND, objective.criterion.held_out)
    assert objective.chunk == 8
    assert [type(event) for event in events] == [Note]
    assert "8 tokens" in events[0].text
    assert_close(total, expected)
    assert_close(repeated, expected)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space")
def test_limited_address_space_halves_the_chunk():
    """Check a process that may grow by 35 MB, where a chunk of 256 tokens needs 41 MB for its logits."""
    script = """
        import resource
        import torch
        from distillm_cli.losses.divergences import SkewKL
        from distillm_cli.losses.fused import fused_loss
        from distillm_cli.losses.weights import LossWeights
        from distillm_cli.models.backbone import Head

        torch.set_num_threads(1)
        hidden, weight = torch.randn(512, 8, requires_grad=True), torch.randn(20_000, 8, requires_grad=True)
        def loss(**more):
            return fused_loss(hidden, Head(weight), torch.zeros(512, dtype=torch.long),
                              weights=LossWeights(1.0, 0.0, SkewKL(0.1)), teacher_hidden_ND=hidden.detach() + 1,
                              teacher_head=Head(weight.detach()), **more)
        expected = loss(chunk=16).item()
        pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (pages + 35_000_000, resource.RLIM_INFINITY))
        halved = []
        total = loss(on_halved=halved.append)
        total.backward()
        assert halved and halved[0] < 256, halved
        assert abs(total.item() / expected - 1) < 1e-5
        assert weight.grad.isfinite().all()
        print("finished with chunk", halved[0])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("finished with chunk")


def test_missing_teacher_is_rejected():
    hidden, head, _, _, targets = setting()
    with pytest.raises(ValueError, match="teacher"):
        fused_loss(hidden, head, targets, weights=LossWeights(1.0, 0.0, KL()))
    with pytest.raises(ValueError, match="teacher"):
        fused_loss(hidden, head, targets, weights=LossWeights(0.5, 0.5, SkewKL(0.1)))
