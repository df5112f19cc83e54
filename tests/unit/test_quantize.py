"""Teachers in 8 or 4 bits: refused where they cannot be; and, where bitsandbytes is installed, what they are like."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from distillm_cli.config.schema import AdapterConfig, StudentConfig
from distillm_cli.errors import ModelError
from distillm_cli.models import loading
from distillm_cli.models.devices import check_quantize
from distillm_cli.models.pair import create_student
from distillm_cli.rollouts.next_token import Sampling
from distillm_cli.rollouts.sampler import sample
from tests import tiny

CPU = torch.device("cpu")


def test_without_cuda_it_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=r"teacher.quantize 4bit needs CUDA, but") as caught:
        loading.load_backbone(str(tmp_path / "nowhere"), dtype=torch.float32, device=CPU, quantize="4bit")
    assert caught.value.exit_code == 4
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ModelError, match=r"needs CUDA, but train\.device is cpu"):
        check_quantize("8bit", CPU)
    check_quantize("none", CPU)


def test_without_bitsandbytes_it_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModelError, match=r"needs bitsandbytes, which is not installed; pip install 'distillm\[quant\]'"
    ):
        check_quantize("8bit", torch.device("cuda"))


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapter"])
def test_a_quantised_teacher_is_near_itself_and_its_head_is_exact(bits, adapted, tmp_path, monkeypatch):
    """Where there is bitsandbytes but no CUDA: it computes on a CPU too, slowly, which the check here would not allow."""
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
    few = loading.load_backbone(path, dtype=torch.float32, device=CPU, quantize=bits)
    assert few.is_quantized
    assert type(few.model.get_output_embeddings()) is torch.nn.Linear
    batch = tiny.batch([(3, 4), (5, 9)], tiny.VOCAB)
    with torch.no_grad():
        assert few.check_head(batch)
        truth = plain.logits(batch)
        off = (few.logits(batch) - truth).abs().mean() / truth.std()
    assert 0 < off < (0.1 if bits == "8bit" else 0.6)
    prompts = [s.prompt for s in tiny.sequences([(3, 1), (5, 1)], tiny.VOCAB)]
    with torch.autocast("cpu", dtype=torch.bfloat16):  # such weights are not cast
        outputs = sample(few, prompts, Sampling(temperature=0.0, max_new_tokens=4), [(0, 0), (0, 1)])
    assert all(len(out.tokens) > 0 for out in outputs)
