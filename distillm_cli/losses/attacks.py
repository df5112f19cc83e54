"""Attack a model on the input embeddings of its prompts: change them within a radius, so that the response's loss rises.

The embedding of each prompt token may move by an L2 distance of at most ``radius`` times the mean norm of the model's token
embeddings. Response tokens, and earlier responses of a conversation, are not changed: an attacker writes the prompt.

    fgsm  one step of the radius along the gradient of the cross-entropy, for each token (Goodfellow et al. 2015, 1412.6572,
          with an L2 step)
    pgd   the same first step, then steps of half the radius, each projected onto the ball (Madry et al. 2018, 1706.06083).
          Each sequence has the point with its largest loss, so that pgd is never weaker than fgsm.

Shape letters: B sequences, T time, N supervised tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distillm_cli.losses.fused import HeadLike, fused_loss
from distillm_cli.losses.plain import token_outcomes
from distillm_cli.losses.weights import CROSS_ENTROPY
from distillm_cli.teachers.local import LanguageModel
from distillm_cli.types import Batch, Embedded


@dataclass(frozen=True)
class Attack:
    """Describe an attack. kind: fgsm or pgd. radius: in units of the mean norm of the embeddings. steps: of pgd."""

    kind: str
    radius: float
    steps: int

    @property
    def gradient_steps(self) -> int:
        """Return the number of gradients that the attack computes."""
        return self.steps if self.kind == "pgd" else 1

    def as_json(self) -> dict[str, Any]:
        """Return the attack's settings, those that it uses."""
        steps = {"steps": self.steps} if self.kind == "pgd" else {}
        return {"kind": self.kind, "radius": self.radius, **steps}


@dataclass(frozen=True)
class _ConstantHead:
    """Hold a head whose gradient is not computed."""

    weight_VD: Tensor | None
    bias_V: Tensor | None
    scale: float
    softcap: float | None

    @staticmethod
    def of(head: HeadLike) -> _ConstantHead:
        weight_VD = None if head.weight_VD is None else head.weight_VD.detach()
        bias_V = None if head.bias_V is None else head.bias_V.detach()
        return _ConstantHead(weight_VD, bias_V, head.scale, head.softcap)


@torch.no_grad()
def mean_norm(model: LanguageModel, device: torch.device) -> float:
    """Return the mean L2 norm of the input embeddings of all tokens."""
    embeddings_VD = model.token_embeddings(torch.arange(model.vocab, device=device))
    return float(embeddings_VD.float().norm(dim=1).mean())


def prompt_positions(batch: Batch, embedded: Embedded) -> Tensor:
    """Return whether each input position belongs to a prompt, [B, T], without padding and earlier responses."""
    inputs_BTD = embedded.inputs_BTD
    B, T = inputs_BTD.shape[:2]
    device = inputs_BTD.device
    if embedded.decoder_BRD is not None:
        mask_BT = embedded.mask_BT
        return torch.ones(B, T, dtype=torch.bool, device=device) if mask_BT is None else mask_BT.bool()
    columns_N = batch.positions_N - batch.rows_N * T
    last_B = torch.full((B,), -1, device=device).scatter_reduce(0, batch.rows_N, columns_N, "amax")
    is_prompt_BT = torch.arange(T, device=device) <= last_B[:, None]
    is_input_N = columns_N < last_B[batch.rows_N]  # the last token is only ever a target
    is_prompt_BT.view(-1)[batch.positions_N[is_input_N] + 1] = False
    return is_prompt_BT


def perturbed(embedded: Embedded, perturbation_BTD: Tensor) -> Embedded:
    """Return embeddings with their prompts perturbed. They keep their graph."""
    first, *others = embedded.tensors
    return embedded.with_tensors([first + perturbation_BTD.to(first.dtype), *others])


def find_perturbation(model: LanguageModel, batch: Batch, embedded: Embedded, attack: Attack) -> Tensor:
    """Return the perturbation [B, T, D], float32 (float64 if the embeddings are), a constant.

    The caller sets evaluation mode.
    """
    first, *others = (x.detach() for x in embedded.tensors)
    exact = torch.float64 if first.dtype == torch.float64 else torch.float32
    radius = attack.radius * mean_norm(model, first.device)
    is_prompt_BT1 = prompt_positions(batch, embedded)[..., None]
    head = _ConstantHead.of(model.head())
    found_BTD = torch.zeros_like(first, dtype=exact)
    best_BTD = found_BTD
    best_B = torch.full((len(first),), -torch.inf, device=first.device)

    def keep_best(hidden_ND: Tensor) -> None:
        nonlocal best_BTD, best_B
        losses_N, _ = token_outcomes(hidden_ND.detach(), head, batch.targets_N)
        losses_B = best_B.new_zeros(batch.size).index_add_(0, batch.rows_N, losses_N.to(best_B.dtype))
        is_better_B = losses_B > best_B
        best_BTD = torch.where(is_better_B[:, None, None], found_BTD, best_BTD)
        best_B = torch.where(is_better_B, losses_B, best_B)

    for k in range(attack.gradient_steps):
        with torch.enable_grad():
            point_BTD = (first + found_BTD.to(first.dtype)).requires_grad_()
            hidden_ND = model.hidden_of(embedded.with_tensors([point_BTD, *others]))
            loss = fused_loss(hidden_ND, head, batch.targets_N, weights=CROSS_ENTROPY)
            (gradient_BTD,) = torch.autograd.grad(loss, [point_BTD])
        if k > 0:
            keep_best(hidden_ND)
        gradient_BTD = gradient_BTD.to(exact) * is_prompt_BT1
        tiny = torch.finfo(exact).tiny
        direction_BTD = gradient_BTD / gradient_BTD.norm(dim=-1, keepdim=True).clamp(min=tiny)
        found_BTD = found_BTD + direction_BTD * (radius if k == 0 else radius / 2)
        found_BTD = found_BTD * (radius / found_BTD.norm(dim=-1, keepdim=True).clamp(min=tiny)).clamp(max=1)
    if attack.gradient_steps == 1:
        return found_BTD
    with torch.no_grad():
        keep_best(model.hidden_of(embedded.with_tensors([first + found_BTD.to(first.dtype), *others])))
    return best_BTD
