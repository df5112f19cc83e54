"""Test models that can be trained but cannot generate here, such as RWKV."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from tests import tiny
from tests.command_line import assert_error

SMALL = [
    "--steps", "2", "--batch-size", "4", "--max-length", "48", "--dtype", "fp32", "--json",
    "--set", "data.template=plain", "--set", "rollout.max_new_tokens=4", "--set", "eval.max_new_tokens=4",
]  # fmt: skip


@pytest.fixture
def workdir(tmp_path):
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


@pytest.mark.parametrize(("teacher", "student", "role"), [("llama", "rwkv", "student"), ("rwkv", "llama", "teacher")])
def test_run_on_rows_reports_losses_only(workdir, cli, teacher, student, role):
    code, result, err = cli(*distill(teacher, student, "--method", "kd"))
    assert code == 0, err
    assert [line for line in err.splitlines() if f"{role}: cannot generate with a rwkv model" in line]
    assert result["report"].keys() == {"student_before", "student_after", "teacher"}
    assert all(figures.keys() == {"valid_loss"} for figures in result["report"].values())
    AutoModelForCausalLM.from_pretrained(workdir / "out")
    assert "valid ce" in (workdir / "out" / "README.md").read_text().lower()


def test_sft_writes_a_model(workdir, cli):
    code, _, err = cli("sft", "--model", "rwkv", "--data", "rows.jsonl", "--output", "out", *SMALL)
    assert code == 0, err
    AutoModelForCausalLM.from_pretrained(workdir / "out")


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
def test_run_that_needs_samples_is_an_error(workdir, cli, teacher, student, more):
    assert cli(*distill("llama", "llama", "--method", "kd"))[0] == 0
    config = workdir / "out" / "config.json"
    before = config.read_text()
    assert_error(cli(*distill(teacher, student, "--overwrite", *more)), "model.cannot_generate", "rwkv")
    assert config.read_text() == before


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "--model", "rwkv", "--prompt", "say a", "--output", "responses.jsonl"],
        ["eval", "rwkv", "--suite", "rows.jsonl", "--output", "scores"],
    ],
    ids=["generate", "eval"],
)
def test_generate_and_eval_are_errors(workdir, cli, argv):
    outcome = cli(*argv, "--template", "plain", "--dtype", "fp32", "--json")
    assert_error(outcome, "model.cannot_generate", "rwkv")
    assert not (workdir / "responses.jsonl").exists()
