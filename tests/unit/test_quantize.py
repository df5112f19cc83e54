"""Test teachers in 8 or 4 bits: the requirements, and the results where bitsandbytes is installed."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from distillm_cli.config.schema import AdapterConfig, StudentConfig
from distillm_cli.models import loading
from distillm_cli.models.devices import check_quantize
from distillm_cli.models.pair import create_student
from distillm_cli.rollouts.next_token import Sampling
from distillm_cli.rollouts.sampler import sample
from tests import tiny
from tests.codes import raises_code

CPU = torch.device("cpu")


def test_quantization_without_cuda_is_rejected_before_loading(tmp_path, monkeypatch):
    with raises_code("model.cannot_quantize", "teacher.quantize 4bit", "CUDA") as caught:
        loading.load_backbone(str(tmp_path / "nowhere"), dtype=torch.float32, device=CPU, quantize="4bit")
    assert caught.value.exit_code == 4
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with raises_code("model.cannot_quantize", "CUDA", "train.device is cpu"):
        check_quantize("8bit", CPU)
    check_quantize("none", CPU)


def test_quantization_without_bitsandbytes_is_rejected(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with raises_code("model.cannot_quantize", "pip install 'distillm[quant]'"):
        check_quantize("8bit", torch.device("cuda"))


def test_quantized_student_needs_an_adapter(tmp_path):
    adapter = {"lora": {"r": 4}, "lora_output": "adapter"}
    for fields, problem in (
        ({"path": "m", "quantize": "4bit"}, "try --lora 16"),
        ({"path": "layers:2", "quantize": "4bit", "lora": {"r": 4}}, "layers:2 is built"),
        ({"path": "m", "quantize": "8bit", "lora": {"r": 4}}, "student.lora_output=adapter"),
    ):
        with pytest.raises(ValueError, match=f"student.quantize .*{problem}"):
            StudentConfig.model_validate(fields)
    student = StudentConfig.model_validate({"path": tiny.save(tmp_path / "m"), "quantize": "4bit", **adapter})
    with raises_code("model.cannot_quantize", "student.quantize 4bit", "CUDA"):
        create_student(student, seed=0, device=CPU, max_length=32)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantized_student_trains_its_adapter(bits, tmp_path, monkeypatch):
    """Train on a CPU, where bitsandbytes is slow and which the program itself does not allow."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(loading, "check_quantize", lambda *args: None)
    path = tiny.save(tmp_path / "m", hidden_size=128, intermediate_size=256, head_dim=32)
    config = StudentConfig(path=path, quantize=bits, lora=AdapterConfig(r=4), lora_output="adapter")
    student = create_student(config, seed=0, device=CPU, max_length=32)
    assert student.is_quantized
    assert all(".lora_" in name for name, weight in student.named_parameters() if weight.requires_grad)
    batch = tiny.batch([(3, 4), (5, 9)], tiny.VOCAB)
    student.head().logits(student.hidden(batch)).square().mean().backward()
    assert any(weight.grad is not None and weight.grad.any() for weight in student.parameters())
    prompts = [s.prompt for s in tiny.sequences([(3, 1), (5, 1)], tiny.VOCAB)]
    outputs = sample(student, prompts, Sampling(temperature=0.0, max_new_tokens=4), [(0, 0), (0, 1)])
    assert all(len(out.tokens) > 0 for out in outputs)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapter"])
def test_quantized_teacher_is_close_and_its_head_exact(bits, adapted, tmp_path, monkeypatch):
    """Compare logits on a CPU, where bitsandbytes is slow and which the program itself does not allow."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(loading, "check_quantize", lambda *args: None)
    path = tiny.save(tmp_path / "m", hidden_size=128, intermediate_size=256, head_dim=32)
    if adapted:
        student = create_student(StudentConfig(path=path, lora=AdapterConfig(r=4)), seed=0, device=CPU, max_length=32)
        (tmp_path / "a").mkdir()
        student.adapter.save(tmp_path / "a")
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "m")
        path = str(tmp_path / "a")
    plain = loading.load_backbone(path, dtype=torch.float32, device=CPU)
    quantized = loading.load_backbone(path, dtype=torch.float32, device=CPU, quantize=bits)
    assert quantized.is_quantized
    assert type(quantized.model.get_output_embeddings()) is torch.nn.Linear
    batch = tiny.batch([(3, 4), (5, 9)], tiny.VOCAB)
    with torch.no_grad():
        assert quantized.check_head(batch)
        expected = plain.logits(batch)
        error = (quantized.logits(batch) - expected).abs().mean() / expected.std()
    assert 0 < error < (0.1 if bits == "8bit" else 0.6)
    prompts = [s.prompt for s in tiny.sequences([(3, 1), (5, 1)], tiny.VOCAB)]
    with torch.autocast("cpu", dtype=torch.bfloat16):  # quantized weights are not cast
        outputs = sample(quantized, prompts, Sampling(temperature=0.0, max_new_tokens=4), [(0, 0), (0, 1)])
    assert all(len(out.tokens) > 0 for out in outputs)
