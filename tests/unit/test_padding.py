"""Test that decoding gives the same result alone and in a padded batch, for every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distillm_cli.models.backbone import Backbone
from distillm_cli.models.generation.decoding import LengthGroupedDecoding, PlainDecoding
from tests import families, tiny

MODELS = [*tiny.FAMILIES, *families.MIXTURES, *families.COMPOSITE]


def _backbone(family: str) -> Backbone:
    model = tiny.model(family, families.VOCAB) if family in tiny.FAMILIES else families.model(family)
    return Backbone(model, tiny.tokenizer(size=families.VOCAB))


def _last_row_logits(backbone: Backbone, prompts: list[np.ndarray]) -> torch.Tensor:
    """Return the logits [4, V] of the last prompt and of three tokens after it, decoded in one batch."""
    decoding, rows, tokens_B = backbone.decode(prompts), [], None
    for _ in range(4):
        logits_BV = decoding.logits(tokens_B)
        rows.append(logits_BV[-1])
        tokens_B = logits_BV.argmax(-1)
    return torch.stack(rows)


@pytest.mark.parametrize("family", MODELS)
def test_logits_are_the_same_alone_and_in_a_batch(family):
    backbone = _backbone(family)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(2, 36, size) for size in (20, 11, 6)]
    alone = _last_row_logits(backbone, prompts[-1:])
    torch.testing.assert_close(_last_row_logits(backbone, prompts), alone, atol=2e-4, rtol=1e-3)


def test_model_sensitive_to_padding_is_not_padded():
    backbone = _backbone("deepseek_v4")
    assert not backbone.check_decoding()
    prompts = [np.arange(2, 22), np.arange(5, 11)]
    assert isinstance(backbone.decode(prompts), LengthGroupedDecoding)
    padded, alone = PlainDecoding(backbone, prompts), PlainDecoding(backbone, prompts[1:])
    assert (padded.logits(None)[1] - alone.logits(None)[0]).abs().max() > 0.01


def test_padding_check_fits_a_short_context():
    model = tiny.model("gpt2", families.VOCAB, n_positions=8)
    assert Backbone(model, tiny.tokenizer(size=families.VOCAB)).check_decoding()
