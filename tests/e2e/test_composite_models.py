"""Test composite models on the command line: the text model is trained, the other parts stay unchanged."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from distillm_cli.models.loading import load_backbone
from tests import families, tiny
from tests.command_line import assert_error, call


def _is_text(name: str) -> bool:
    return ".vision" not in name and ".visual" not in name and "multi_modal" not in name and "connector" not in name


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return families.rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.mark.parametrize("family", families.COMPOSITE)
def test_only_the_text_model_is_trained(family, tmp_path, data, capsys):
    base, out = families.save(tmp_path / "model", family), tmp_path / "out"
    code, _, err = call(capsys, "sft", "--model", base, "--data", data, "--output", out, *families.QUICK, "--json")
    assert code == 0, err
    assert "the text model is trained" in err
    before, after = (AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32) for path in (base, out))
    changed = {name for name, weight in before.named_parameters() if not weight.equal(after.get_parameter(name))}
    assert changed
    assert all(_is_text(name) for name in changed)
    assert (out / "preprocessor_config.json").read_bytes() == (tmp_path / "model/preprocessor_config.json").read_bytes()

    backbone = load_backbone(str(out), dtype=torch.float32, device=torch.device("cpu"))
    batch = tiny.batch([(5, 3), (2, 6)], vocab=30)  # token ids below those of images
    with torch.no_grad():
        expected_BTV = after.eval()(input_ids=batch.ids_BT, use_cache=False).logits
        logits_NV = backbone.head().logits(backbone.hidden(batch))
    torch.testing.assert_close(logits_NV, expected_BTV.flatten(0, 1)[batch.positions_N], atol=1e-4, rtol=1e-4)
    prompts = [np.array([5, 9, 12, 7]), np.array([8, 3])]
    decoding = backbone.decode(prompts)
    tokens_B = decoding.logits(None).argmax(-1)
    second_B = decoding.logits(tokens_B).argmax(-1)
    for prompt, first, second in zip(prompts, tokens_B, second_B, strict=True):
        ids = torch.cat([torch.from_numpy(prompt), first[None]])[None]
        with torch.no_grad():
            expected_TV = after(input_ids=ids, use_cache=False).logits[0, -2:]
        assert expected_TV.argmax(-1).tolist() == [first, second]


def test_gemma3_output_loads_as_causal_model(tmp_path, data, capsys):
    base, out = families.save(tmp_path / "model", "gemma3"), tmp_path / "out"
    assert call(capsys, "sft", "--model", base, "--data", data, "--output", out, *families.QUICK, "--json")[0] == 0
    loaded, missing = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not missing["missing_keys"]
    assert any("vision_tower" in name for name, _ in loaded.named_parameters())


def test_chat_template_of_the_processor_is_used(tmp_path, capsys):
    """Check a chat template like SmolVLM's, which is only in chat_template.json and only accepts content in parts."""
    from transformers import AutoTokenizer

    base, out = tmp_path / "model", tmp_path / "out"
    families.save(base, "smolvlm")
    parts = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    (base / "chat_template.json").write_text(json.dumps({"chat_template": parts}), encoding="utf-8")
    conversations = tmp_path / "rows.jsonl"
    turns = ({"role": "user", "content": "abc"}, {"role": "assistant", "content": [{"type": "text", "text": "cba"}]})
    conversations.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    code, _, err = call(
        *(capsys, "sft", "--model", base, "--data", conversations, "--set", f"data.valid={conversations}"),
        *(*families.QUICK, "--output", out, "--json"),
    )
    assert code == 0, err
    assert AutoTokenizer.from_pretrained(out).chat_template == parts
    # transformers would prefer this older file to the template of the training.
    assert not (out / "chat_template.json").exists()
    argv = ("generate", "--model", out, "--data", conversations, "--output", tmp_path / "responses.jsonl", "--json")
    code, _, err = call(capsys, *argv)
    assert code == 0, err
    assert "template: chat" in err
    assert json.loads((tmp_path / "responses.jsonl").read_text())["prompt"] == "abc"


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("mistral3", "mistral3"),
        ("qwen3_vl", "text"),
        ("text", "smolvlm"),
        ("gemma3", "layers:1"),
        ("mistral3", "width:0.5"),
    ],
)
def test_teacher_or_student_may_be_composite(teacher, student, tmp_path, data, capsys):
    def model_path(name: str) -> str:
        if ":" in name:
            return name
        path = tmp_path / name
        return families.save(path, "mixtral" if name == "text" else name) if not path.exists() else str(path)

    argv = ("distill", "--teacher", model_path(teacher), "--student", model_path(student), "--data", data)
    code, _, err = call(
        capsys, *argv, *families.QUICK, "--set", "schedule.kind=mixed", "--output", tmp_path / "out", "--json"
    )
    assert code == 0, err
    if ":" in student:
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type in ("gemma3_text", "mistral")


def test_layers_need_a_causal_text_model(tmp_path, data, capsys):
    base = families.save(tmp_path / "model", "qwen3_vl")
    argv = ("distill", "--teacher", base, "--student", "layers:1", "--data", data, "--output", tmp_path / "out")
    assert_error(call(capsys, *argv, "--json"), "model.not_causal", "qwen3_vl_text", "random:llama")


@pytest.mark.parametrize("family", ["gemma3", "mistral3"])
def test_adapter_is_on_the_text_model_only(family, tmp_path, data, capsys):
    from peft import PeftModel

    base, out = families.save(tmp_path / "model", family), tmp_path / "out"
    argv = ("sft", "--model", base, "--data", data, "--lora", 4, "--set", "student.lora_output=adapter")
    code, _, err = call(capsys, *argv, *families.QUICK, "--output", out, "--json")
    assert code == 0, err
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    adapted = {name for name, _ in PeftModel.from_pretrained(model, out).named_parameters() if "lora_" in name}
    assert adapted
    assert all(_is_text(name) for name in adapted)


def test_plan_counts_the_text_model(tmp_path, data, capsys):
    base = families.save(tmp_path / "model", "gemma3")
    model = families.model("gemma3")
    text = sum(weight.numel() for weight in model.model.language_model.parameters())
    total = sum(weight.numel() for weight in model.parameters())
    code, plan, err = call(capsys, "plan", "--teacher", base, "--student", base, "--data", data, "--json")
    assert code == 0, err
    student = plan["models"]["student"]
    assert (student["layers"], student["width"]) == (2, 32)
    assert student["parameters"] == total
    assert student["trainable"] == text
    assert student["parts"]["outside"] == total - text
