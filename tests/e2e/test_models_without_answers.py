"""Models that train and cannot be asked: RWKV holds the state of decoding in a way of its own."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from tests import tiny

SMALL = [
    "--steps", "2", "--batch-size", "4", "--max-length", "48", "--dtype", "fp32", "--json",
    "--set", "data.template=plain", "--set", "rollout.max_new_tokens=4", "--set", "eval.max_new_tokens=4",
]  # fmt: skip


@pytest.fixture
def place(tmp_path):
    tiny.save(tmp_path / "llama")
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}
    config = AutoConfig.for_model("rwkv", vocab_size=tiny.VOCAB, bos_token_id=0, eos_token_id=0, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "rwkv")
    tiny.tokenizer(size=tiny.VOCAB).save_pretrained(tmp_path / "rwkv")
    rows = [{"prompt": f"say {c}", "completion": c * 3} for c in "abcdefghij"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def distill(teacher, student, *more):
    pair = ["--teacher", teacher, "--student", student, "--data", "rows.jsonl", "--output", "out"]
    return ["distill", *pair, *SMALL, *more]


@pytest.mark.parametrize(("teacher", "student", "mute"), [("llama", "rwkv", "student"), ("rwkv", "llama", "teacher")])
def test_a_run_on_rows_ends_with_a_model_and_without_answers(place, typed, teacher, student, mute):
    code, result, err = typed(*distill(teacher, student, "--method", "kd"))
    assert code == 0, err
    assert [line for line in err.splitlines() if f"the {mute} has none (cannot generate with a rwkv model" in line]
    assert result["report"].keys() == {"student_before", "student_after", "teacher"}
    assert all(figures.keys() == {"valid_loss"} for figures in result["report"].values())
    AutoModelForCausalLM.from_pretrained(place / "out")
    assert "valid ce" in (place / "out" / "README.md").read_text().lower()


def test_a_fine_tuned_model_without_answers_is_published_too(place, typed):
    code, _, err = typed("sft", "--model", "rwkv", "--data", "rows.jsonl", "--output", "out", *SMALL)
    assert code == 0, err
    AutoModelForCausalLM.from_pretrained(place / "out")


@pytest.mark.parametrize(
    ("teacher", "student", "more"),
    [
        ("llama", "rwkv", ["--method", "gkd"]),
        ("rwkv", "llama", ["--method", "seqkd"]),
        ("rwkv", "llama", ["--method", "skd"]),
        ("llama", "rwkv", ["--method", "kd", "--set", "train.select=rouge_l"]),
    ],
    ids=["rollouts", "teacher samples", "drafts", "selection"],
)
def test_a_run_that_needs_its_samples_is_refused_before_anything_is_lost(place, typed, teacher, student, more):
    assert typed(*distill("llama", "llama", "--method", "kd"))[0] == 0
    earlier = place / "out" / "config.json"
    before = earlier.read_text()
    code, told, _ = typed(*distill(teacher, student, "--overwrite", *more))
    assert code == 4
    assert "cannot generate with a rwkv model" in told["message"]
    assert earlier.read_text() == before


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "--model", "rwkv", "--prompt", "say a", "--output", "said.jsonl"],
        ["eval", "rwkv", "--suite", "rows.jsonl", "--output", "scores"],
    ],
    ids=["generate", "eval"],
)
def test_neither_generate_nor_eval_begins(place, typed, argv):
    code, told, _ = typed(*argv, "--template", "plain", "--dtype", "fp32", "--json")
    assert code == 4
    assert "cannot generate with a rwkv model" in told["message"]
    assert not (place / "said.jsonl").exists()
