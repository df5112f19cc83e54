"""Test DISTILLM_CPU_FAST=0: transformers' own code runs everywhere, with equal numbers up to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from distillm_cli.models import cpu
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.cpu.decode_step import decode_step_of
from distillm_cli.models.cpu.forward import has_forward, has_layouts
from distillm_cli.models.cpu.packed import PackedLinear
from distillm_cli.models.generation import decoding
from tests import tiny

VOCAB = 97
LENGTHS = [(5, 9), (20, 30), (7, 0), (1, 3)]
PROMPTS = [np.arange(2, 9), np.arange(20, 23)]


def backbone(family: str) -> Backbone:
    return Backbone(tiny.model(family, VOCAB).eval(), tiny.tokenizer(size=VOCAB))


def decoded(model: Backbone) -> torch.Tensor:
    run = model.decode(PROMPTS)
    logits_BV = run.logits(None)
    return torch.stack([logits_BV, run.logits(torch.tensor([3, 4])), run.logits(torch.tensor([5, 6]))])


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_results_agree_with_and_without_fast_code(family, monkeypatch):
    batch = tiny.batch(LENGTHS, VOCAB)
    fast = backbone(family)
    hidden_ND, logits_SBV = fast.hidden(batch), decoded(fast)
    assert fast._cpu_forward.agrees
    assert fast._fast_paths == (True, True)

    monkeypatch.setenv(cpu.SWITCH, "0")
    plain = backbone(family)
    plain.model.load_state_dict(fast.model.state_dict())
    assert torch.equal(plain.hidden(batch), plain.trunk_states(batch)), "computed by transformers"
    assert plain._cpu_forward.agrees is None, "not tried at all"
    assert decode_step_of(plain.trunk) is None
    assert_close(plain.hidden(batch), hidden_ND, rtol=1e-4, atol=1e-5)
    assert_close(decoded(plain), logits_SBV, rtol=1e-4, atol=1e-5)
    assert not plain._fast_paths.step


def test_no_hand_written_code_runs_when_disabled(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("hand-written code ran")

    monkeypatch.setenv(cpu.SWITCH, "0")
    monkeypatch.setattr(decoding, "one_token_attention_in", fail)
    monkeypatch.setattr("distillm_cli.models.cpu.forward.trunk_pass", fail)
    monkeypatch.setattr("distillm_cli.models.cpu.decode_step.Gpt2Step", fail)
    model = backbone("gpt2")
    model.hidden(tiny.batch(LENGTHS, VOCAB), for_backward=True)
    decoded(model)
    weight = torch.randn(8, 8, dtype=torch.bfloat16)
    assert PackedLinear(weight, None).packed is None
    assert not has_forward("gpt2")
    assert not has_layouts("gpt2", 1000)
