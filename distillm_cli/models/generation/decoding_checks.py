"""Test how a model can decode: whether prompts may be padded, and which fast paths match its own logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from distillm_cli.errors import DistillmError, out_of_memory
from distillm_cli.models.cpu.decode_step import decode_step_of
from distillm_cli.models.generation.cache import has_plain_cache
from distillm_cli.models.generation.decoding import (
    CLOSE_LENGTH,
    BlockDecoding,
    FastDecoding,
    PlainDecoding,
    cannot_generate,
)
from distillm_cli.models.model_families import token_compression

if TYPE_CHECKING:
    from distillm_cli.models.backbone import Backbone

# For the padding test: tokens of the short prompt and of the padding before it. No family compresses by a multiple of 7.
_SHORT, _PADDING = 4, 7


def check_decoding(backbone: Backbone, decode: Callable[[Backbone, Sequence[np.ndarray]], Any]) -> bool:
    """Test on a few tokens whether prompts of different lengths can be decoded in one batch.

    decode: plain decoding of the model. A short prompt is decoded in a batch with a prompt of the same length, and with
    a longer one, where it is padded. Families differ in the treatment of padding, including those with position inputs:
    some count it, or compress tokens in blocks that padding shifts. Raises ModelError for a model that cannot decode.
    """
    room = backbone.context or math.inf
    short = max(1, min(_SHORT + token_compression(backbone.model.config), room - 2))
    padding = max(1, min(_PADDING, room - short - 1))
    ids = np.arange(1, short + padding + 2) * 7 % backbone.vocab
    prompt, token, other = ids[:short], int(ids[short]), (ids[:short] + 1) % backbone.vocab

    def decoded(first: np.ndarray) -> torch.Tensor:
        decoding = decode(backbone, [first, prompt])
        logits_BV = decoding.logits(None)
        tokens_B = torch.full((1,), token, device=logits_BV.device)
        decoding.keep(torch.tensor([1], device=logits_BV.device))
        return torch.cat([logits_BV[1:], decoding.logits(tokens_B)])

    try:
        unpadded = decoded(prompt)
    except DistillmError:
        raise
    except Exception as error:  # the code of the family may raise any type
        if out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise cannot_generate(backbone, reason[:200]) from error
    try:
        padded = decoded(ids[: short + padding])
        if logits_match(padded, unpadded, backbone.model.dtype):
            return True
        # In quantized models a router may choose other experts in another batch, which is not an effect of padding.
        rounding = (decoded(other) - unpadded).abs().max()
        return bool((padded - unpadded).abs().max() <= 2 * rounding)
    except Exception as error:
        if out_of_memory(error):
            raise
        return False


class FastPaths(NamedTuple):
    """Hold the fast paths that match a model's own logits. cache: the contiguous cache. step: the hand-written step."""

    cache: bool
    step: bool


def find_fast_paths(backbone: Backbone) -> FastPaths:
    """Test the fast paths of a model on short prompts and a few tokens, in the dtype of the weights."""
    has_cache = has_plain_cache(backbone.model.config) and _agrees(backbone, step=False)
    has_step = has_cache and not backbone.own_logits and decode_step_of(backbone.trunk) is not None
    return FastPaths(has_cache, has_step and _agrees(backbone, step=True))


@torch.no_grad()
def _agrees(backbone: Backbone, *, step: bool) -> bool:
    ids = np.arange(4 * CLOSE_LENGTH) * 7 % backbone.vocab
    prompts = [ids[: 2 * CLOSE_LENGTH], ids[:3], ids[3 : 3 + 2 * CLOSE_LENGTH]]
    fast, plain = FastDecoding(backbone, prompts, step=step), PlainDecoding(backbone, prompts)
    tokens_B = None
    for position in range(4):
        expected_BV = plain.logits(tokens_B)
        try:
            found_BV = fast.logits(tokens_B)
        except Exception:  # a family with its own masks or caches; it uses plain decoding
            return False
        if not logits_match(found_BV, expected_BV, backbone.model.dtype):
            return False
        tokens_B = expected_BV.argmax(-1)
        if position == 1:
            rows_B = torch.tensor([2, 1], device=tokens_B.device)
            tokens_B = tokens_B[rows_B]
            fast.keep(rows_B)
            plain.keep(rows_B)
    return True


def logits_match(ours_NV: torch.Tensor, own_NV: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether logits are the same up to 1e-3 of their spread and the rounding of the model's dtype.

    Entries that are −inf in one must be −inf in the other.
    """
    suppressed_NV = torch.isneginf(own_NV)
    if suppressed_NV.any():
        if not torch.equal(suppressed_NV, torch.isneginf(ours_NV)):
            return False
        ours_NV, own_NV = ours_NV[~suppressed_NV], own_NV[~suppressed_NV]
    tolerance = 1e-3 * own_NV.std() + 4 * torch.finfo(dtype).eps * own_NV.abs().max()
    return bool((ours_NV - own_NV).abs().max() <= tolerance)


def can_retract(backbone: Backbone) -> bool:
    """Return whether decoding in blocks of tokens matches the model's own logits, also after some tokens were removed.

    Tested on short prompts, against decoding without removal.
    """
    if backbone.model.config.is_encoder_decoder or not has_plain_cache(backbone.model.config):
        return False
    ids = np.arange(16) * 7 % backbone.vocab
    prompts = [ids[:9], ids[:3]]
    block_BG = torch.tensor([[1, 2, 3], [3, 1, 2]]) % backbone.vocab
    try:
        blocks = BlockDecoding(backbone, prompts)
        blocks.logits(None)
        blocks.logits_after(block_BG)
        blocks.retract(torch.tensor([2, 1]))
        found_BV = blocks.logits(block_BG[:, 0])
    except Exception:  # a family with its own masks or caches; it drafts one token at a time
        return False
    expected_BV = torch.cat(
        [
            PlainDecoding(backbone, [np.concatenate([prompts[b], block_BG[b, :n], block_BG[b, :1]])]).logits(None)
            for b, n in enumerate((1, 2))
        ]
    )
    return logits_match(found_BV, expected_BV, backbone.model.dtype)
