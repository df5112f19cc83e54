"""Compute logits and losses of tokens with ordinary operations, for uses that the fused loss does not serve.

Shape letters: N supervised tokens, C tokens of a chunk, V vocabulary, D width of the last hidden state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distillm_cli.losses.fused import HeadLike

_CHUNK_TOKENS = 256


def head_logits(hidden_ND: Tensor, head: HeadLike) -> Tensor:
    """Return logits [N, V] in float32 (float64 if the hidden states are), with a graph that can be differentiated twice."""
    logits_NV = hidden_ND
    if head.weight_VD is not None:
        bias_V = None if head.bias_V is None else head.bias_V.to(hidden_ND.dtype)
        logits_NV = F.linear(hidden_ND, head.weight_VD.to(hidden_ND.dtype), bias_V)
    logits_NV = logits_NV.to(torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32) * head.scale
    return logits_NV if head.softcap is None else head.softcap * torch.tanh(logits_NV / head.softcap)


def token_losses(hidden_ND: Tensor, head: HeadLike, targets_N: Tensor) -> Tensor:
    """Return the cross-entropy of each token [N], nats, with a graph that can be differentiated twice."""
    return F.cross_entropy(head_logits(hidden_ND, head), targets_N, reduction="none")


@torch.no_grad()
def token_outcomes(hidden_ND: Tensor, head: HeadLike, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each token [N], nats, and whether it is the most likely one [N], by chunks of tokens."""
    losses = [hidden_ND.new_zeros(0, dtype=torch.float32)]
    right = [torch.zeros(0, dtype=torch.bool, device=hidden_ND.device)]
    for hidden_CD, targets_C in zip(hidden_ND.split(_CHUNK_TOKENS), targets_N.split(_CHUNK_TOKENS), strict=True):
        logits_CV = head_logits(hidden_CD, head)
        losses.append(F.cross_entropy(logits_CV, targets_C, reduction="none"))
        right.append(logits_CV.argmax(-1) == targets_C)
    return torch.cat(losses), torch.cat(right)


@torch.no_grad()
def top_tokens(hidden_ND: Tensor, head: HeadLike) -> Tensor:
    """Return the most likely token [N] of each position, by chunks of tokens."""
    tops = [head_logits(hidden_CD, head).argmax(-1) for hidden_CD in hidden_ND.split(_CHUNK_TOKENS)]
    return torch.cat(tops)
