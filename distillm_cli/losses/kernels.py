"""Choose how the losses of a part are computed: tensor operations, the same compiled, or a Triton kernel.

A kernel is used only after it gave the losses and gradients of ``part_losses`` on the device in use. ``auto`` also measures
the kernels at the start of a run, and chooses the fastest.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from distillm_cli.errors import UsageError
from distillm_cli.losses.divergences import Divergence, TokenDistributions
from distillm_cli.losses.fused import ChunkPart, HeadInputs, HeadLike, Kernel, PartLosses, part_losses
from distillm_cli.losses.weights import NO_WEIGHTS, LossWeights

_PROBE_TOKENS = 256
_ROUNDS = 5


class _FilledDistributions(TokenDistributions):
    """Compute all tables at once: torch.compile removes those that are not used, and cannot trace the lock of
    ``cached_property`` in Python 3.11."""

    def __init__(self, z_NV: Tensor, *, has_zeros: bool = True):
        super().__init__(z_NV, has_zeros=has_zeros)
        self.prob_NV = z_NV.softmax(-1)
        self.log_norm_N1 = z_NV.logsumexp(-1, keepdim=True)
        self.log_NV = z_NV - self.log_norm_N1


def _traced(part: ChunkPart) -> PartLosses:
    return part_losses(part, _FilledDistributions)


def compiled() -> Kernel:
    """Return ``part_losses`` as compiled by torch, for every divergence. It is compiled again for new kinds of parts."""
    run = torch.compile(_traced, dynamic=None)
    return lambda part: None if part.token_weights.surrogate is not None else run(part)


def triton() -> Kernel:
    """Return the Triton kernel, which leaves parts that it does not support to ``part_losses``."""
    from distillm_cli.losses.triton_kernel import part_losses_triton

    return part_losses_triton


KERNELS: dict[str, Callable[[], Kernel]] = {"compiled": compiled, "triton": triton}  # "eager" is ``part_losses``


def choose_kernel(
    name: str, student: HeadLike, teacher: HeadLike | None, divergence: Divergence | None, dtype: torch.dtype
) -> tuple[str, str]:
    """Return the name of the kernel to use, and a sentence about it.

    name: ``train.loss_kernel``. student, teacher: heads, on the device of the run. divergence: of the run. dtype: of the
    student's products. ``auto`` does not use a kernel that fails or whose results differ, and the sentence names the
    reason. Raises UsageError for one that was requested by name.
    """
    if name == "eager" or divergence is None or teacher is None or student.weight_VD is None:
        return "eager", ""
    part = probe(student, teacher, divergence, dtype)
    names = [name] if name != "auto" else [k for k in KERNELS if k != "triton" or importlib.util.find_spec("triton")]
    seconds = {"eager": _seconds(part_losses, part)}
    rejected = []
    for candidate in names:
        try:
            kernel = KERNELS[candidate]()
            reason = kernel_difference(kernel, part)
            if reason is None:
                seconds[candidate] = _seconds(kernel, part)
        except Exception as error:  # of a compiler or a driver, of many kinds; the plain losses need neither
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error) else ''}"
        if reason is not None and name != "auto":
            raise UsageError(
                "usage.loss_kernel", f"train.loss_kernel {name} cannot be used: {reason}", hint="try auto or eager"
            )
        if reason is not None:
            rejected.append(f"{candidate} is not used ({reason})")
    chosen = min(seconds, key=seconds.__getitem__) if name == "auto" else name
    measured = [f"{k} {1e3 * s:.2f} ms" for k, s in seconds.items()]
    return chosen, f"loss kernel: {', '.join([chosen, *measured, *rejected])}"


def probe(student: HeadLike, teacher: HeadLike, divergence: Divergence, dtype: torch.dtype) -> ChunkPart:
    """Return a part with random products at the shape of the run's vocabulary."""
    assert student.weight_VD is not None
    V, device = student.weight_VD.shape[0], student.weight_VD.device
    generator = torch.Generator(device).manual_seed(0)

    def side(head: HeadLike, product_dtype: torch.dtype) -> tuple[HeadInputs, Tensor]:
        product_RV = torch.randn(_PROBE_TOKENS, V, generator=generator, device=device).mul_(3).to(product_dtype)
        bias_V = head.bias_V
        has_zeros = head.softcap is None and bias_V is not None and bool(torch.isneginf(bias_V).any())
        return HeadInputs(product_RV, product_RV, bias_V, head.scale, head.softcap, has_zeros), product_RV

    student_side, student_RV = side(student, dtype)
    teacher_side, teacher_RV = side(teacher, dtype if teacher.weight_VD is None else teacher.weight_VD.dtype)
    return ChunkPart(
        student=student_side,
        student_RV=student_RV,
        teacher=teacher_side,
        teacher_RV=teacher_RV,
        targets_R=torch.randint(V, (_PROBE_TOKENS,), generator=generator, device=device),
        weights=LossWeights(0.7, 0.3, divergence),
        token_weights=NO_WEIGHTS,
        exact=torch.float32,
        needs_grad=True,
    )


def kernel_difference(kernel: Kernel, part: ChunkPart) -> str | None:
    """Return how the kernel's results differ from those of ``part_losses``; None if they agree up to rounding."""
    value_R, dz_RV = part_losses(part)
    assert dz_RV is not None
    done = kernel(replace(part, student_RV=part.student_RV.clone()))
    if done is None:
        return "the divergence or head is not supported"
    own_R, own_dz_RV = done
    assert own_dz_RV is not None
    tolerance = 4 * torch.finfo(part.student_RV.dtype).eps
    pairs = (("losses", own_R, value_R, 1e-4), ("gradients", own_dz_RV.to(dz_RV.dtype), dz_RV, max(tolerance, 1e-5)))
    for name, own, plain, allowed in pairs:
        gap = float((own - plain).abs().max() / plain.abs().max().clamp_min(1e-12))
        if not gap <= allowed:
            return f"{name} differ by {gap:.1e}, relative to the largest"
    return None


def _seconds(kernel: Kernel, part: ChunkPart) -> float:
    """Return the best seconds of a few calls, each on a new copy of the products."""
    best = float("inf")
    for _ in range(_ROUNDS):
        copy = replace(part, student_RV=part.student_RV.clone())
        _synchronize(part.student_RV)
        start = time.perf_counter()
        kernel(copy)
        _synchronize(part.student_RV)
        best = min(best, time.perf_counter() - start)
    return best


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
