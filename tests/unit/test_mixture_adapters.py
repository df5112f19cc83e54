"""Test LoRA adapters on mixtures of experts, compared with peft."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from distillm_cli.models.loading import load_backbone
from distillm_cli.models.lora_targets import expert_weights, find_targets
from tests import command_line, families, tiny
from tests.marks import long

ADAPTER = ("--lora", 4, "--set", "student.lora_output=adapter")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return families.rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 14)[None]).logits


@pytest.mark.parametrize(
    "family",
    [name if name == "mixtral" else long(name) for name in families.MIXTURES if name != "deepseek_v4"],
)
def test_experts_are_trained_and_peft_loads_the_adapter(family, tmp_path, data, capsys):
    from peft import PeftModel

    base, out = families.save(tmp_path / "model", family), tmp_path / "adapter"
    run = ("sft", "--model", base, "--data", data, *families.QUICK)
    code, _, err = command_line.call(capsys, *run, *ADAPTER, "--output", out, "--json")
    assert code == 0, err
    lines = [line for line in err.splitlines() if line.startswith("mixture of experts")]
    assert len(lines) == 1
    assert "router.weight" in lines[0] or "gate.weight" in lines[0]

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    before, experts = _logits(plain), {name: weight.clone() for name, weight in expert_weights(plain)}
    peft_logits = _logits(PeftModel.from_pretrained(plain, out).eval())
    loaded = load_backbone(str(out), dtype=torch.float32, device=torch.device("cpu")).model
    torch.testing.assert_close(_logits(loaded), peft_logits, atol=1e-4, rtol=1e-4)
    assert (peft_logits - before).abs().max() > 0.01
    assert all(not weight.equal(experts[name]) for name, weight in expert_weights(loaded))

    merged = tmp_path / "merged"
    assert command_line.call(capsys, *run, "--lora", 4, "--output", merged, "--json")[0] == 0
    torch.testing.assert_close(
        _logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()),
        peft_logits,
        atol=1e-4,
        rtol=1e-4,
    )


def test_training_continues_on_an_expert_adapter(tmp_path, data, capsys):
    base, first, second = families.save(tmp_path / "model", "deepseek_v2"), tmp_path / "first", tmp_path / "second"
    run = ("--data", data, *families.QUICK, *ADAPTER, "--json")
    assert command_line.call(capsys, "sft", "--model", base, *run, "--output", first)[0] == 0
    code, report, err = command_line.call(capsys, "sft", "--model", first, *run, "--output", second)
    assert code == 0, err
    initial_loss = report["report"]["student_before"]["valid_loss"]
    assert initial_loss == pytest.approx(initial_loss_of(capsys, first, data), abs=1e-4)


def initial_loss_of(capsys, model, data) -> float:
    """Return the held-out loss that a run on the model starts from, with the adapter merged."""
    code, report, err = command_line.call(
        capsys, "sft", "--model", model, "--data", data, *families.QUICK, "--output", f"{model}-merged", "--json"
    )
    assert code == 0, err
    return report["report"]["student_before"]["valid_loss"]


def test_find_targets_by_name():
    model = families.model("deepseek_v2")
    found = find_targets(model, ("q_a_proj", "down_proj"))
    assert {name.rpartition(".")[2] for name in found.modules} == {"q_a_proj"}
    assert {tuple(name.split(".")[-2:]) for name in found.parameters} == {
        ("down_proj", "weight"),
        ("experts", "down_proj"),
    }
    default_targets = find_targets(model, None)
    assert sum(name.endswith("gate_up_proj") for name in default_targets.parameters) == 1  # the first layer is dense
    dense = find_targets(tiny.model("llama"), None)
    assert dense.parameters == []
    assert dense.modules == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_plan_counts_adapter_parameters(tmp_path, data, capsys):
    base = families.save(tmp_path / "model", "qwen2_moe")
    code, report, err = command_line.call(
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
    assert report["models"]["student"]["trainable"] == expected
