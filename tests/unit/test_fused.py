"""The fused loss against the plain one it replaces: whole logits, autograd, float64."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from distillm_cli.core.divergences import KL, SkewKL, SkewReverseKL, build
from distillm_cli.core.fused import Terms, fused_loss

N, D, D_TEACHER, V = 11, 6, 9, 17


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


def setting(kind="plain", dtype=torch.float64):
    hidden = rand(N, D, seed=1, dtype=dtype).requires_grad_()
    bias = rand(V, seed=3, dtype=dtype).requires_grad_() if kind == "quirks" else None
    head = Head(rand(V, D, seed=2, dtype=dtype).requires_grad_(), bias)
    if kind == "quirks":
        head.scale, head.softcap = 0.7, 2.5
    teacher_head = Head(rand(V, D_TEACHER, seed=5, dtype=dtype), softcap=3.0 if kind == "quirks" else None)
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(6))
    return hidden, head, rand(N, D_TEACHER, seed=4, dtype=dtype), teacher_head, targets


def plain_loss(hidden, head, teacher_hidden, teacher_head, targets, divergence, terms, weights=None):
    log_q, log_p = head.logits(hidden).log_softmax(-1), teacher_head.logits(teacher_hidden).log_softmax(-1)
    value = torch.zeros(N, dtype=log_q.dtype)
    if terms.kd:
        value = value + terms.kd * divergence.value(log_p, log_q)
    if terms.ce:
        value = value + terms.ce * F.nll_loss(log_q, targets, reduction="none")
    return (value if weights is None else value * weights).sum()


@pytest.mark.parametrize("kind", ["plain", "quirks"])
@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("name", ["kl", "rkl", "skl", "srkl", "jsd", "tvd", "jeffreys"])
def test_values_and_all_gradients_match_autograd_through_whole_logits(name, chunk, kind):
    hidden, head, teacher_hidden, teacher_head, targets = setting(kind)
    divergence = build(name, alpha=0.1, beta=0.3, jeffreys_weight=0.5)
    terms, weights = Terms(kd=0.7, ce=0.3), torch.rand(N, dtype=torch.float64)
    leaves = [hidden, head.weight_VD] + ([head.bias_V] if head.bias_V is not None else [])

    expected = plain_loss(hidden, head, teacher_hidden, teacher_head, targets, divergence, terms, weights)
    expected_grads = torch.autograd.grad(expected, leaves)
    total = fused_loss(
        hidden, head, targets, terms=terms, divergence=divergence, teacher_hidden_ND=teacher_hidden,
        teacher_head=teacher_head, weights_N=weights, chunk=chunk,
    )  # fmt: skip
    assert_close(total, expected)
    for grad, reference in zip(torch.autograd.grad(total, leaves), expected_grads, strict=True):
        assert_close(grad, reference)


@pytest.mark.parametrize("divergence", [KL(), SkewKL(0.1), SkewReverseKL(0.1)])
def test_gradcheck_in_float64(divergence):
    hidden, head, teacher_hidden, teacher_head, targets = setting("quirks")

    def loss(hidden, weight, bias):
        h = Head(weight, bias, head.scale, head.softcap)
        return fused_loss(
            hidden, h, targets, terms=Terms(0.8, 0.2), divergence=divergence, teacher_hidden_ND=teacher_hidden,
            teacher_head=teacher_head, chunk=4,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (hidden, head.weight_VD, head.bias_V))


def test_cross_entropy_alone_needs_no_teacher():
    hidden, head, _, _, targets = setting()
    total = fused_loss(hidden, head, targets, terms=Terms(kd=0.0, ce=1.0), chunk=3)
    assert_close(total, F.cross_entropy(head.logits(hidden), targets, reduction="sum"))


def test_a_head_without_a_weight_takes_the_hidden_states_as_logits():
    """The fallback for heads the fused path does not know: logits in, the same loss out, gradient in the logits."""
    _, _, teacher_hidden, teacher_head, targets = setting()
    logits = rand(N, V, seed=9).requires_grad_()
    terms, divergence = Terms(0.5, 0.5), SkewKL(0.1)
    expected = plain_loss(logits, Head(None), teacher_hidden, teacher_head, targets, divergence, terms)
    total = fused_loss(
        logits, Head(None), targets, terms=terms, divergence=divergence, teacher_hidden_ND=teacher_hidden,
        teacher_head=teacher_head, chunk=2,
    )  # fmt: skip
    assert_close(total, expected)
    assert_close(*(torch.autograd.grad(x, logits)[0] for x in (total, expected)))


def test_a_batch_without_supervised_tokens_gives_zero_with_a_graph():
    _, head, _, teacher_head, _ = setting()
    hidden = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    total = fused_loss(
        hidden, head, torch.zeros(0, dtype=torch.long), terms=Terms(1.0, 0.0), divergence=SkewKL(0.1),
        teacher_hidden_ND=torch.zeros(0, D_TEACHER, dtype=torch.float64), teacher_head=teacher_head,
    )  # fmt: skip
    total.backward()
    assert total.item() == 0
    assert not head.weight_VD.grad.any()


def test_nothing_is_computed_for_what_needs_no_gradient():
    hidden, head, teacher_hidden, teacher_head, targets = setting()
    head.weight_VD = head.weight_VD.detach()
    total = fused_loss(
        hidden, head, targets, terms=Terms(1.0, 0.0), divergence=KL(), teacher_hidden_ND=teacher_hidden,
        teacher_head=teacher_head,
    )  # fmt: skip
    total.backward()
    assert hidden.grad is not None
    assert head.weight_VD.grad is None
    with torch.no_grad():
        value = fused_loss(
            hidden, head, targets, terms=Terms(1.0, 0.0), divergence=KL(), teacher_hidden_ND=teacher_hidden,
            teacher_head=teacher_head,
        )  # fmt: skip
    assert not value.requires_grad
    assert_close(value, total.detach())


def test_bf16_matmuls_stay_close_to_float64():
    """Heads in bf16, softmax in float32: within two per cent of the truth at these sizes, value and gradient."""
    torch.manual_seed(0)
    n, d, v = 64, 128, 1000
    hidden, weight = torch.randn(n, d), torch.randn(v, d) / d**0.5
    teacher_hidden, teacher_weight = torch.randn(n, d), torch.randn(v, d) / d**0.5
    targets = torch.randint(0, v, (n,))

    def run(dtype, matmul):
        h = hidden.to(dtype).requires_grad_()
        total = fused_loss(
            h, Head(weight.to(dtype)), targets, terms=Terms(1.0, 0.0), divergence=SkewKL(0.1),
            teacher_hidden_ND=teacher_hidden.to(matmul), teacher_head=Head(teacher_weight.to(matmul)), matmul_dtype=matmul,
        )  # fmt: skip
        total.backward()
        return total.detach().double(), h.grad.double()

    truth, low = run(torch.float64, torch.float64), run(torch.float32, torch.bfloat16)
    assert abs(low[0] / truth[0] - 1) < 0.01
    assert (low[1] - truth[1]).norm() / truth[1].norm() < 0.02
