"""Choose the next token: filter its distribution and invert the cumulative sum.

The computation is exact. It needs no random number per vocabulary entry, no sort of the vocabulary and no float64 sum over
all of it.

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

_BLOCK = 256  # tokens of a block in the two-level cumulative sum
_TWO_LEVELS = 4096  # size of the vocabulary from which two levels are cheaper than one

# Number of most likely tokens that are searched for the nucleus first. It grows eightfold if they are too few.
_FIRST_TOP_K = 64

# Temperatures are clamped to this range, so that neither T nor 1/T overflows float32. The distribution stays the same.
_MIN_TEMPERATURE = 1e-30
_MAX_TEMPERATURE = 1e30
_LOW_TEMPERATURE = 1e-6  # below it the maximum is subtracted from the logits, which could overflow when divided by T

_NO_TOKEN = -1  # returned if there is no valid token


@dataclass(frozen=True, slots=True)
class Sampling:
    """Configure the choice of a next token. temperature 0 is greedy; top_k 0, no_repeat_ngram_size 0 and top_p 1 are off.

    no_repeat_ngram_size: no n-gram of prompt and output occurs twice (for encoder-decoders, of the output alone).
    min_new_tokens: smallest number of tokens before a stop token.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0


def choose(logits_BV: Tensor, sampling: Sampling, uniforms_B: Tensor) -> Tensor:
    """Choose the next token of each row [B]: argmax at temperature 0, else by inverse transform sampling.

    uniforms_B: uniforms in [0, 1), float64, on any device. A row whose logits have no finite maximum gets −1. An error
    here would need a device synchronization at every token, so the caller calls ``check_chosen`` on the result.
    """
    if sampling.temperature == 0:
        max_B, likeliest_B = logits_BV.max(-1)  # the maximum is NaN if any logit is
        return likeliest_B.where(max_B.isfinite(), _NO_TOKEN)
    device, logits_BV = logits_BV.device, on_float64_device(logits_BV)
    uniforms_B = uniforms_B.to(logits_BV.device, torch.float64)
    return inverse_cdf(distribution(logits_BV, sampling), uniforms_B).to(device)


def check_chosen(tokens: np.ndarray) -> None:
    """Raise NonFiniteError if ``choose`` returned −1 for any row."""
    if (tokens < 0).any():
        raise NonFiniteError(
            "numbers.not_finite",
            "logits are not finite during sampling",
            hint="its weights have diverged or are damaged: use an earlier checkpoint; in fp16 try fp32",
        )


def distribution(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Return probabilities [B, V] after temperature, top-k and top-p; one-hot at temperature 0."""
    if sampling.temperature == 0:
        return torch.zeros_like(logits_BV).scatter_(-1, logits_BV.argmax(-1, keepdim=True), 1.0)
    if sampling.temperature != 1:
        if sampling.temperature < _LOW_TEMPERATURE:
            logits_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
        logits_BV = logits_BV / min(max(sampling.temperature, _MIN_TEMPERATURE), _MAX_TEMPERATURE)
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        threshold_B1 = logits_BV.topk(sampling.top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        logits_BV = logits_BV.masked_fill(logits_BV < threshold_B1, -torch.inf)
    probabilities_BV = F.softmax(logits_BV, -1)
    if sampling.top_p < 1:
        keep_nucleus(probabilities_BV, sampling.top_p)
    return probabilities_BV


def keep_nucleus(probabilities_BV: Tensor, top_p: float) -> None:
    """Set to 0, in place, all but the fewest most likely tokens whose mass reaches top_p.

    If not all of equally likely tokens are needed, those with the lowest ids remain.
    """
    V = probabilities_BV.shape[-1]
    threshold_B = probabilities_BV.new_empty(len(probabilities_BV))
    kept_ties_B = torch.zeros(len(probabilities_BV), dtype=torch.int64, device=probabilities_BV.device)
    pending, k = torch.arange(len(probabilities_BV), device=probabilities_BV.device), _FIRST_TOP_K
    while len(pending):
        pending_probabilities = probabilities_BV if len(pending) == len(probabilities_BV) else probabilities_BV[pending]
        top = pending_probabilities.topk(min(k, V), dim=-1).values
        mass = top.cumsum(-1, dtype=torch.float64)
        needed = (mass - top < top_p).sum(-1, keepdim=True).clamp_min_(1)  # 0 for a NaN row
        enough = (mass[:, -1] >= top_p) | (k >= V)
        threshold = top.gather(-1, needed - 1)
        threshold_B[pending[enough]] = threshold[enough, 0]
        kept_ties_B[pending[enough]] = (needed - (top > threshold).sum(-1, keepdim=True))[enough, 0]
        pending, k = pending[~enough], k * 8
    tied_BV = probabilities_BV == threshold_B[:, None]
    dropped_BV = probabilities_BV < threshold_B[:, None]
    if (tied_BV.sum(-1) > kept_ties_B).any():
        dropped_BV |= tied_BV & (tied_BV.cumsum(-1) > kept_ties_B[:, None])
    probabilities_BV.masked_fill_(dropped_BV, 0.0)


def inverse_cdf(weights_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Return the token of each row at a uniform (float64, in [0, 1)) of the row's mass; −1 in a row with NaN weights.

    It never returns a token of weight 0. The sum is float64, since fifty thousand float32 additions distort the tail. A
    large vocabulary is searched by blocks, whose masses are short float32 sums, and then within one block.
    """
    V = weights_BV.shape[-1]
    if V < _TWO_LEVELS:
        cumulative_BV = weights_BV.cumsum(-1, dtype=torch.float64)
        token_B, _ = _search(cumulative_BV, uniforms_B * cumulative_BV[:, -1])
        return token_B.where(cumulative_BV[:, -1].isfinite(), _NO_TOKEN)
    aligned = V // _BLOCK * _BLOCK
    masses_BN = weights_BV[:, :aligned].unflatten(-1, (-1, _BLOCK)).sum(-1)
    if aligned < V:
        masses_BN = torch.cat([masses_BN, weights_BV[:, aligned:].sum(-1, keepdim=True)], -1)
    cumulative_BN = masses_BN.cumsum(-1, dtype=torch.float64)
    block_B, points_B = _search(cumulative_BN, uniforms_B * cumulative_BN[:, -1])
    block_B1 = block_B[:, None].clamp_max(masses_BN.shape[1] - 1)  # out of range if all weights are NaN
    before_B1 = cumulative_BN.gather(-1, block_B1) - masses_BN.gather(-1, block_B1)
    ids = block_B1 * _BLOCK + torch.arange(_BLOCK, device=weights_BV.device)
    inside = weights_BV.gather(-1, ids.clamp_max(V - 1)).masked_fill_(ids >= V, 0.0)
    offset_B, _ = _search(inside.cumsum(-1, dtype=torch.float64), points_B - before_B1[:, 0])
    return (block_B * _BLOCK + offset_B).where(cumulative_BN[:, -1].isfinite(), _NO_TOKEN)


def _search(cumulative: Tensor, points_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index at which each row's sum exceeds its point, and the point.

    Points are moved below the total: rounding may make them equal, and right=True would then skip the last token.
    """
    total_B = cumulative[:, -1]
    points_B = torch.minimum(points_B, torch.nextafter(total_B, torch.zeros_like(total_B))).clamp_min_(0.0)
    return torch.searchsorted(cumulative, points_B[:, None], right=True)[:, 0], points_B
