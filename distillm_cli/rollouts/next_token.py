"""Which token comes next: filters on a next-token distribution, and the inverse of its cumulative sum.

Exact and without what exactness does not need: no random number per vocabulary entry, no sort of the vocabulary, no
float64 sum over all of it.

Shape letters: B rows, V vocabulary, N blocks of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distillm_cli.errors import NonFiniteError
from distillm_cli.utils.exact import on_float64_device

# Tokens of a block in the two-level cumulative sum, and the vocabulary from which two levels are cheaper than one.
_BLOCK, _TWO_LEVELS = 256, 4096

# Of the likeliest tokens so many are looked at first for the nucleus, and eight times as many as long as they are too few.
_FEW = 64

# Temperatures beyond these are taken for these: the same distribution, and neither T nor 1/T leaves float32. Below _COLD
# logits are measured from their maximum, or divided by T they might.
_COLDEST, _COLD, _HOTTEST = 1e-30, 1e-6, 1e30

_NONE = -1  # in place of a token


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a next token is chosen. temperature 0 is greedy; top_k 0, no_repeat_ngram_size 0 and top_p 1 are off.

    no_repeat_ngram_size: an n-gram of prompt and output together never occurs twice (of the output, for encoder-decoders).
    min_new_tokens: no stop before.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0


def choose(logits_BV: Tensor, sampling: Sampling, uniforms_B: Tensor) -> Tensor:
    """The next token of each row [B]: argmax at temperature 0, else the inverse of the filtered distribution's
    cumulative sum at ``uniforms_B`` (each in [0, 1), float64 of any device).

    −1 where the logits have no finite maximum: to raise here would be to wait for a device at every token. Whoever reads
    the tokens asks ``check_chosen``.
    """
    if sampling.temperature == 0:
        most_B, likeliest_B = logits_BV.max(-1)  # NaN, where there is one
        return likeliest_B.where(most_B.isfinite(), _NONE)
    device, logits_BV = logits_BV.device, on_float64_device(logits_BV)
    uniforms_B = uniforms_B.to(logits_BV.device, torch.float64)
    return inverse_cdf(distribution(logits_BV, sampling), uniforms_B).to(device)


def check_chosen(tokens: np.ndarray) -> None:
    """Raises NonFiniteError where ``choose`` found nothing to choose among these."""
    if (tokens < 0).any():
        raise NonFiniteError(
            "logits that are not finite while sampling",
            hint="its weights have diverged or are damaged: take an earlier checkpoint; in fp16 try fp32",
        )


def distribution(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [B, V] after temperature, top-k and top-p; at temperature 0 all of it on the likeliest token."""
    if sampling.temperature == 0:
        return torch.zeros_like(logits_BV).scatter_(-1, logits_BV.argmax(-1, keepdim=True), 1.0)
    if sampling.temperature != 1:
        if sampling.temperature < _COLD:
            logits_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
        logits_BV = logits_BV / min(max(sampling.temperature, _COLDEST), _HOTTEST)
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(sampling.top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    probabilities_BV = F.softmax(logits_BV, -1)
    if sampling.top_p < 1:
        keep_nucleus(probabilities_BV, sampling.top_p)
    return probabilities_BV


def keep_nucleus(probabilities_BV: Tensor, top_p: float) -> None:
    """Keeps, in place, the fewest most likely tokens whose mass reaches top_p; the others become 0.

    Of tokens equally likely, where not all are needed, those with the lowest ids stay.
    """
    V = probabilities_BV.shape[-1]
    least_B = probabilities_BV.new_empty(len(probabilities_BV))
    spare_B = torch.zeros(len(probabilities_BV), dtype=torch.int64, device=probabilities_BV.device)
    rows, few = torch.arange(len(probabilities_BV), device=probabilities_BV.device), _FEW
    while len(rows):
        found = probabilities_BV if len(rows) == len(probabilities_BV) else probabilities_BV[rows]
        top = found.topk(min(few, V), dim=-1).values
        mass = top.cumsum(-1, dtype=torch.float64)
        needed = (mass - top < top_p).sum(-1, keepdim=True).clamp_min_(1)  # none of a row that is NaN
        enough = (mass[:, -1] >= top_p) | (few >= V)
        least = top.gather(-1, needed - 1)
        least_B[rows[enough]] = least[enough, 0]
        spare_B[rows[enough]] = (needed - (top > least).sum(-1, keepdim=True))[enough, 0]
        rows, few = rows[~enough], few * 8
    tied_BV = probabilities_BV == least_B[:, None]
    dropped_BV = probabilities_BV < least_B[:, None]
    if (tied_BV.sum(-1) > spare_B).any():
        dropped_BV |= tied_BV & (tied_BV.cumsum(-1) > spare_B[:, None])
    probabilities_BV.masked_fill_(dropped_BV, 0.0)


def inverse_cdf(weights_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The token in whose share of the row's mass the uniform (float64, in [0, 1)) falls; never one of weight 0, and −1 in
    a row whose weights are NaN.

    In float64, as fifty thousand float32 additions would bend the tail; over a large vocabulary first by blocks, whose
    own masses are short float32 sums, and then inside one block.
    """
    V = weights_BV.shape[-1]
    if V < _TWO_LEVELS:
        cumulative_BV = weights_BV.cumsum(-1, dtype=torch.float64)
        token_B, _ = _search(cumulative_BV, uniforms_B * cumulative_BV[:, -1])
        return token_B.where(cumulative_BV[:, -1].isfinite(), _NONE)
    whole = V // _BLOCK * _BLOCK
    masses_BN = weights_BV[:, :whole].unflatten(-1, (-1, _BLOCK)).sum(-1)
    if whole < V:
        masses_BN = torch.cat([masses_BN, weights_BV[:, whole:].sum(-1, keepdim=True)], -1)
    cumulative_BN = masses_BN.cumsum(-1, dtype=torch.float64)
    block_B, points_B = _search(cumulative_BN, uniforms_B * cumulative_BN[:, -1])
    block_B1 = block_B[:, None].clamp_max(masses_BN.shape[1] - 1)  # beyond it where all is NaN
    before_B1 = cumulative_BN.gather(-1, block_B1) - masses_BN.gather(-1, block_B1)
    ids = block_B1 * _BLOCK + torch.arange(_BLOCK, device=weights_BV.device)
    inside = weights_BV.gather(-1, ids.clamp_max(V - 1)).masked_fill_(ids >= V, 0.0)
    place_B, _ = _search(inside.cumsum(-1, dtype=torch.float64), points_B - before_B1[:, 0])
    return (block_B * _BLOCK + place_B).where(cumulative_BN[:, -1].isfinite(), _NONE)


def _search(cumulative: Tensor, points_B: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row's sum goes beyond its point, and that point, which is never the very end: rounding may carry it there,
    where right=True would leave the last token that has any weight."""
    total_B = cumulative[:, -1]
    points_B = torch.minimum(points_B, torch.nextafter(total_B, torch.zeros_like(total_B))).clamp_min_(0.0)
    return torch.searchsorted(cumulative, points_B[:, None], right=True)[:, 0], points_B
