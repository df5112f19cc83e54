"""Compare the fused loss, forward and backward, with its bare matrix products and with the losses of other libraries.

Hidden states and heads are random. The student's head is float32 and trained, the teacher's is bf16. Every loss returns the
gradients of the student's hidden states and head. ``× GEMMs`` is the time over that of the four products alone (goal: at
most 1.5). Each variant of ours is first checked against the plain loss on whole float32 logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measure import error_line, measured
from torch import Tensor

from distillm_cli import plugins
from distillm_cli.losses import kernels
from distillm_cli.losses.fused import Kernel, fused_loss
from distillm_cli.losses.weights import LossWeights
from distillm_cli.models.backbone import Head

GOAL = 1.5
CHECKED_TOKENS = 64
IN_TRITON = ("kl", "rkl", "skl", "srkl", "jsd", "tvd", "jeffreys")


@dataclass(frozen=True)
class Shape:
    """Hold the sizes of a pair. D, D_teacher: widths. N: numbers of tokens."""

    name: str
    V: int
    D: int
    D_teacher: int
    N: tuple[int, ...]


SHAPES = (
    Shape("GPT-2 XL → GPT-2", 50257, 768, 1600, (8 * 256, 32 * 256)),
    Shape("8B → 1B, V = 128k", 128256, 2048, 4096, (8 * 256, 32 * 256)),
    Shape("8B → 1B, V = 152k", 151936, 2048, 4096, (8 * 256,)),
)
TINY = (Shape("tiny", 1031, 16, 24, (64,)),)


class Inputs:
    """Hold random hidden states, heads and targets of N tokens."""

    def __init__(self, shape: Shape, N: int, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        self.hidden_ND = random(N, shape.D).bfloat16().requires_grad_()
        self.weight_VD = (random(shape.V, shape.D) / math.sqrt(shape.D)).requires_grad_()
        self.teacher_ND = random(N, shape.D_teacher).bfloat16()
        self.teacher_VD = (random(shape.V, shape.D_teacher) / math.sqrt(shape.D_teacher)).bfloat16()
        self.targets_N = torch.randint(shape.V, (N,), generator=generator, device=device)

    def backward(self, loss: Callable[[Inputs], Tensor]) -> Tensor:
        """Run a loss with its backward pass; return its value. The gradients are then those of hidden states and head."""
        self.hidden_ND.grad = self.weight_VD.grad = None
        value = loss(self)
        value.backward()
        return value.detach()

    def first(self, N: int) -> Inputs:
        """Return the first tokens, with the same heads and no gradients."""
        part = object.__new__(Inputs)
        part.hidden_ND = self.hidden_ND.detach()[:N].clone().requires_grad_()
        part.weight_VD = self.weight_VD
        part.teacher_ND, part.teacher_VD = self.teacher_ND[:N], self.teacher_VD
        part.targets_N = self.targets_N[:N]
        return part


def gemms(inputs: Inputs) -> Callable[[], object]:
    """Return the four products that every loss needs, on whole logits, in bf16."""
    weight_VD = inputs.weight_VD.detach().bfloat16()
    hidden_ND = inputs.hidden_ND.detach()

    def run() -> None:
        z_NV = hidden_ND @ weight_VD.T
        inputs.teacher_ND @ inputs.teacher_VD.T
        z_NV @ weight_VD
        z_NV.T @ hidden_ND

    return run


def ours(name: str, kernel: Kernel | None = None, chunk: int | None = None) -> Callable[[Inputs], Tensor]:
    """Return the fused loss with a divergence's default parameters."""
    weights = LossWeights(1.0, 0.0, plugins.divergences[name].default())

    def loss(inputs: Inputs) -> Tensor:
        return fused_loss(
            inputs.hidden_ND, Head(inputs.weight_VD), inputs.targets_N, weights=weights,
            teacher_hidden_ND=inputs.teacher_ND, teacher_head=Head(inputs.teacher_VD), matmul_dtype=torch.bfloat16,
            chunk=chunk, kernel=kernel,
        )  # fmt: skip

    return loss


def whole_logits(inputs: Inputs) -> Tensor:
    """Compute the skew KL divergence as it is usually written, with autograd."""
    z_NV = inputs.hidden_ND @ inputs.weight_VD.bfloat16().T
    p_NV = F.softmax(inputs.teacher_ND @ inputs.teacher_VD.T, -1, dtype=torch.float32)
    q_NV = F.softmax(z_NV, -1, dtype=torch.float32)
    return (p_NV * (p_NV.clamp_min(1e-30) / (0.1 * p_NV + 0.9 * q_NV)).log()).sum()


def trl_loss(beta: float) -> Callable[[Inputs], Tensor]:
    """Return TRL's chunked divergence, which uses its Triton kernels on a GPU. beta: 0 is the forward KL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(inputs: Inputs) -> Tensor:
        with torch.autocast(inputs.hidden_ND.device.type, torch.bfloat16):
            value_N, _ = ChunkedDivergenceFunction.apply(
                inputs.hidden_ND, inputs.weight_VD, None, inputs.teacher_ND, inputs.teacher_VD, None, beta
            )
        return value_N.sum()

    return loss


def liger_jsd() -> Callable[[Inputs], Tensor]:
    """Return Liger's fused linear JSD with β = ½."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    fused = LigerFusedLinearJSD(jsd_beta=0.5)
    return lambda inputs: fused(
        inputs.hidden_ND, inputs.weight_VD.bfloat16(), inputs.teacher_ND, inputs.teacher_VD, inputs.targets_N
    )


def liger_kl() -> Callable[[Inputs], Tensor]:
    """Return Liger's KL divergence on whole logits."""
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    divergence = LigerKLDIVLoss(reduction="sum")

    def loss(inputs: Inputs) -> Tensor:
        log_q_NV = F.log_softmax(inputs.hidden_ND @ inputs.weight_VD.bfloat16().T, -1, dtype=torch.float32)
        p_NV = F.softmax(inputs.teacher_ND @ inputs.teacher_VD.T, -1, dtype=torch.float32)
        return divergence(log_q_NV, p_NV)

    return loss


PEERS = {
    "TRL, JSD": lambda: trl_loss(0.5),
    "TRL, forward KL": lambda: trl_loss(0.0),
    "Liger fused linear JSD": liger_jsd,
    "Liger KLDiv on whole logits": liger_kl,
}


def largest_difference(name: str, kernel: Kernel | None, inputs: Inputs) -> float:
    """Return the largest relative difference of value and gradients between a kernel and the plain loss."""
    part = inputs.first(CHECKED_TOKENS)
    results = []
    for candidate in (None, kernel):
        value = part.backward(ours(name, candidate))
        assert part.hidden_ND.grad is not None
        assert part.weight_VD.grad is not None
        results.append((value, part.hidden_ND.grad.float(), part.weight_VD.grad.clone()))
    gaps = [
        float((own - plain).abs().max() / plain.abs().max().clamp_min(1e-12))
        for plain, own in zip(*results, strict=True)
    ]
    part.weight_VD.grad = None
    return max(gaps)


def rows(context: Any) -> Iterator[dict[str, Any]]:
    device = context.device
    shapes = TINY if context.tiny else SHAPES
    rounds = 2 if context.tiny else 5
    kernel_of: dict[str, Kernel | None] = {"eager": None}
    for name, build in {"triton": kernels.triton, "compiled": kernels.compiled}.items():
        if device.type != "cuda":
            yield {"skipped": f"{name}: needs a GPU"}
            continue
        try:
            kernel_of[name] = build()
        except ImportError as error:
            yield {"skipped": f"{name}: {error_line(error)}"}
    for shape in shapes:
        for N in shape.N:
            group = f"{shape.name}, {N:,} tokens"
            inputs = Inputs(shape, N, device)
            base = measured(gemms(inputs), device, rounds)
            yield {"group": group, "loss": "bare GEMMs", **base}
            yield from _own_rows(context, group, inputs, kernel_of, base["ms"], rounds)
            peers = {"whole logits, skl": lambda: whole_logits} | PEERS
            for name, build in peers.items():
                if context.remaining < 5:
                    yield {"group": group, "skipped": f"{name}: out of time"}
                    continue
                try:
                    loss = build()
                    found = measured(partial(inputs.backward, loss), device, rounds)
                    yield {"group": group, "loss": name, **found, "× GEMMs": found["ms"] / base["ms"]}
                except Exception as error:  # a library that is absent or fails must not stop the others
                    yield {"group": group, "skipped": f"{name}: {error_line(error)}"}


def _own_rows(
    context: Any, group: str, inputs: Inputs, kernel_of: dict[str, Kernel | None], gemm_ms: float, rounds: int
) -> Iterator[dict[str, Any]]:
    """Measure skl with each kernel and chunk, then every divergence with the fastest of them."""
    N = len(inputs.targets_N)
    best: tuple[float, str, int | None] = (math.inf, "eager", None)
    for name, kernel in kernel_of.items():
        for chunk in dict.fromkeys((None, min(N, 1024), min(N, 4096))):
            if context.remaining < 5:
                yield {"group": group, "skipped": f"skl, {name}, chunk {chunk}: out of time"}
                continue
            try:
                gap = 0.0 if kernel is None else largest_difference("skl", kernel, inputs)
                found = measured(partial(inputs.backward, ours("skl", kernel, chunk)), context.device, rounds)
            except Exception as error:
                yield {"group": group, "skipped": f"skl, {name}, chunk {chunk}: {error_line(error)}"}
                continue
            ratio = found["ms"] / gemm_ms
            label = f"ours, skl, {name}, chunk {chunk or 'default'}"
            yield {"group": group, "loss": label, **found, "× GEMMs": ratio, "difference": gap, "goal": ratio <= GOAL}
            if gap < 0.02:  # of bf16 products, summed in another order
                best = min(best, (found["ms"], name, chunk), key=lambda entry: entry[0])
    _, fastest, chunk = best
    for divergence in ("kl", "akl") if context.tiny else sorted(plugins.divergences.keys() - {"skl"}):
        name = fastest if fastest != "triton" or divergence in IN_TRITON else "compiled"
        if context.remaining < 5:
            yield {"group": group, "skipped": f"{divergence}, {name}: out of time"}
            continue
        try:
            gap = 0.0 if name == "eager" else largest_difference(divergence, kernel_of[name], inputs)
            loss = ours(divergence, kernel_of[name], chunk)
            found = measured(partial(inputs.backward, loss), context.device, rounds)
        except Exception as error:
            yield {"group": group, "skipped": f"{divergence}, {name}: {error_line(error)}"}
            continue
        ratio = found["ms"] / gemm_ms
        label = f"ours, {divergence}, {name}, chunk {chunk or 'default'}"
        yield {"group": group, "loss": label, **found, "× GEMMs": ratio, "difference": gap, "goal": ratio <= GOAL}
