"""LoRA adapters on mixtures of experts, against peft's own reading of the directory."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from distillm_cli.models.loading import load_backbone
from distillm_cli.models.lora_targets import expert_weights, find_targets
from tests import command_line as typed
from tests import families, tiny

ADAPTER = ("--lora", 4, "--set", "student.lora_output=adapter")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return families.rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 14)[None]).logits


@pytest.mark.parametrize("family", [name for name in families.MIXTURES if name != "deepseek_v4"])
def test_experts_train_and_peft_reads_the_adapter(family, tmp_path, data, capsys):
    from peft import PeftModel

    base, out = families.save(tmp_path / "model", family), tmp_path / "adapter"
    run = ("sft", "--model", base, "--data", data, *families.QUICK)
    code, _, err = typed.call(capsys, *run, *ADAPTER, "--output", out, "--json")
    assert code == 0, err
    lines = [line for line in err.splitlines() if line.startswith("mixture of experts")]
    assert len(lines) == 1
    assert "router.weight" in lines[0] or "gate.weight" in lines[0]

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    before, experts = _logits(plain), {name: weight.clone() for name, weight in expert_weights(plain)}
    theirs = _logits(PeftModel.from_pretrained(plain, out).eval())
    ours = load_backbone(str(out), dtype=torch.float32, device=torch.device("cpu")).model
    torch.testing.assert_close(_logits(ours), theirs, atol=1e-4, rtol=1e-4)
    assert (theirs - before).abs().max() > 0.01
    assert all(not weight.equal(experts[name]) for name, weight in expert_weights(ours))

    merged = tmp_path / "merged"
    assert typed.call(capsys, *run, "--lora", 4, "--output", merged, "--json")[0] == 0
    torch.testing.assert_close(
        _logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()), theirs, atol=1e-4, rtol=1e-4
    )


def test_an_adapter_on_experts_goes_on_training(tmp_path, data, capsys):
    base, first, second = families.save(tmp_path / "model", "deepseek_v2"), tmp_path / "first", tmp_path / "second"
    run = ("--data", data, *families.QUICK, *ADAPTER, "--json")
    assert typed.call(capsys, "sft", "--model", base, *run, "--output", first)[0] == 0
    code, told, err = typed.call(capsys, "sft", "--model", first, *run, "--output", second)
    assert code == 0, err
    start = told["report"]["student_before"]["valid_loss"]
    assert start == pytest.approx(typed_loss(capsys, first, data), abs=1e-4)


def typed_loss(capsys, model, data) -> float:
    """Return the held-out loss that a run on the model starts from, with the adapter merged."""
    code, told, err = typed.call(
        capsys, "sft", "--model", model, "--data", data, *families.QUICK, "--output", f"{model}-merged", "--json"
    )
    assert code == 0, err
    return told["report"]["student_before"]["valid_loss"]


def test_targets_by_name():
    model = families.model("deepseek_v2")
    found = find_targets(model, ("q_a_proj", "down_proj"))
    assert {name.rpartition(".")[2] for name in found.modules} == {"q_a_proj"}
    assert {tuple(name.split(".")[-2:]) for name in found.parameters} == {
        ("down_proj", "weight"),
        ("experts", "down_proj"),
    }
    every = find_targets(model, None)
    assert sum(name.endswith("gate_up_proj") for name in every.parameters) == 1  # the first layer is dense
    dense = find_targets(tiny.model("llama"), None)
    assert dense.parameters == []
    assert dense.modules == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_plan_counts_the_adapter(tmp_path, data, capsys):
    base = families.save(tmp_path / "model", "qwen2_moe")
    code, told, err = typed.call(
        capsys, "plan", "--teacher", base, "--student", base, "--data", data, "--lora", 4, "--json"
    )
    assert code == 0, err
    adapted = load_backbone(base, dtype=torch.float32, device=torch.device("cpu")).model
    found = find_targets(adapted, None)
    experts = dict(expert_weights(adapted))
    shapes = [tuple(adapted.get_parameter(name).shape) for name in found.parameters if name not in experts]
    shapes += [tuple(m.weight.shape) for n, m in adapted.named_modules() if n.rpartition(".")[2] in found.modules]
    expected = sum(4 * (rows + columns) for rows, columns in shapes)
    expected += sum(len(w) * 4 * (w.shape[1] + w.shape[2]) for w in experts.values())
    assert told["models"]["student"]["trainable"] == expected
