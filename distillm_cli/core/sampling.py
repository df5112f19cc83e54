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

# Tokens of a block in the two-level cumulative sum, and the vocabulary from which two levels are cheaper than one.
_BLOCK, _TWO_LEVELS = 256, 4096

# Of the likeliest tokens so many are looked at first for the nucleus, and eight times as many as long as they are too few.
_FEW = 64

# Temperatures beyond these are taken for these: the same distribution, and neither T nor 1/T leaves float32.
_COLDEST, _HOTTEST = 1e-30, 1e30

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
    cumulative sum at ``uniforms_B`` (each in [0, 1)).

    −1 where the logits have no finite maximum: to raise here would be to wait for a device at every token. Whoever reads
    the tokens asks ``check_chosen``.
    """
    if sampling.temperature == 0:
        likeliest_B = logits_BV.argmax(-1)  # of NaN, where there is one
        is_one_B = logits_BV.gather(-1, likeliest_B[:, None])[:, 0].isfinite()
        return likeliest_B.where(is_one_B, _NONE)
    return inverse_cdf(distribution(logits_BV, sampling), uniforms_B.to(torch.float64))


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
        # From the maximum, or a small temperature would leave float32.
        shifted_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
        logits_BV = shifted_BV.div_(min(max(sampling.temperature, _COLDEST), _HOTTEST))
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
    if weights_BV.shape[-1] < _TWO_LEVELS:
        token_B, rest_B = _search(weights_BV, None, uniforms_B)
        return token_B.where(rest_B.isfinite(), _NONE)
    V = weights_BV.shape[-1]
    whole = V // _BLOCK * _BLOCK
    masses_BN = weights_BV[:, :whole].unflatten(-1, (-1, _BLOCK)).sum(-1)
    if whole < V:
        masses_BN = torch.cat([masses_BN, weights_BV[:, whole:].sum(-1, keepdim=True)], -1)
    block_B, rest_B = _search(masses_BN, None, uniforms_B)
    ids = block_B[:, None] * _BLOCK + torch.arange(_BLOCK, device=weights_BV.device)
    inside = weights_BV.gather(-1, ids.clamp_max(V - 1)).masked_fill_(ids >= V, 0.0)
    return (block_B * _BLOCK + _search(inside, rest_B, None)[0]).where(rest_B.isfinite(), _NONE)


def _search(weights: Tensor, points_B: Tensor | None, uniforms_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """(index, how far into its weight) of a point on the rows' cumulative sums, given as it is or as a share of all."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total_B = cumulative[:, -1]
    points_B = uniforms_B * total_B if points_B is None else points_B
    # Rounding may carry a point to the very end, where right=True would leave the last token that has any weight.
    points_B = torch.minimum(points_B, torch.nextafter(total_B, torch.zeros_like(total_B))).clamp_min_(0.0)
    index_B1 = torch.searchsorted(cumulative, points_B[:, None], right=True).clamp_max_(weights.shape[-1] - 1)  # of NaN
    before_B = (cumulative.gather(-1, index_B1) - weights.gather(-1, index_B1)).squeeze(-1)
    return index_B1.squeeze(-1), points_B - before_B
