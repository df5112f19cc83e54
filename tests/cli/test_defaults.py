"""Check the defaults that depend on the models: training values and the data set."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from transformers import AutoConfig

from distillm_cli.cli.app import main
from distillm_cli.config.field_usage import value_of
from distillm_cli.config.load import resolve
from distillm_cli.config.pipeline_recipe import load_pipeline
from distillm_cli.models.model_info import ModelInfo, read_model_info
from distillm_cli.runs.defaults import KEYS, fitted, fitted_line, fitted_pipeline, number, rates
from tests import tiny
from tests.codes import raises_code
from tests.command_line import assert_error, call

QWEN = {
    "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}  # fmt: skip
PAPER = {"train.lr": 5e-4, "train.epochs": 20, "train.warmup": 0, "data.max_length": 512, "data.max_prompt_length": 256}


def save_chat_config(directory, **fields) -> str:
    AutoConfig.for_model("qwen3", **QWEN | fields).save_pretrained(directory)
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return str(directory)


def fitted_values(*sets: str, command: str = "distill", recipe=None, **flags: str) -> dict[str, float]:
    """Return the values of the fitted fields for this teacher, student and settings."""
    given = {f"{name}.path": path for name, path in flags.items()}
    found = fitted(resolve(command=command, recipe=recipe, flags=given, sets=sets))
    assert all(found.origin[key] for key in KEYS)
    return {key: value_of(found.recipe, key) for key in KEYS}


@pytest.mark.parametrize(
    ("pair", "differs"),
    [
        (("gpt2-xl", "gpt2"), {}),
        (("openai-community/gpt2-xl", "gpt2-medium"), {}),
        (("gpt2-xl", "gpt2-large"), {"train.lr": 1e-4, "train.epochs": 10}),
        (("facebook/opt-2.7b", "facebook/opt-350m"), {"train.lr": 5e-5}),
        (("facebook/opt-2.7b", "facebook/opt-1.3b"), {"train.lr": 5e-5, "train.epochs": 10}),
        (("gpt2-xl", "layers:6"), {}),
        (("builtin", "random:2x64"), {}),
    ],
)
def test_models_of_the_paper_get_its_hyperparameters(pair, differs):
    assert fitted_values(teacher=pair[0], student=pair[1]) == PAPER | differs


def test_open_llama_with_lora_gets_paper_hyperparameters():
    pair = {"teacher": "openlm-research/open_llama_7b_v2", "student": "openlm-research/open_llama_3b_v2"}
    assert fitted_values("student.lora.r=16", **pair) == PAPER | {"train.epochs": 10}
    assert fitted_values(**pair)["train.lr"] == 2e-5, "the paper trains Llama with LoRA only"


@pytest.mark.parametrize(
    ("sets", "lr", "subject"),
    [([], 1e-5, "a 596 M chat model"), (["student.lora.r=8"], 1e-4, "a 596 M chat model, LoRA")],
)
@pytest.mark.parametrize("command", ["distill", "sft"])
def test_chat_model_gets_other_hyperparameters(tmp_path, command, sets, lr, subject):
    path = save_chat_config(tmp_path)
    flags = {"student.path": path} | ({"teacher.path": path} if command == "distill" else {})
    found = fitted(resolve(command=command, flags=flags, sets=sets))
    train, data = found.recipe.train, found.recipe.data
    assert (train.lr, train.epochs, train.warmup) == (lr, 3, 0.1)
    assert (data.max_length, data.max_prompt_length) == (2048, 1792)
    assert found.origin["train.lr"] == f"auto: {number(lr)} for {subject}"
    assert (
        fitted_line(found)
        == f"auto: lr {number(lr)}, epochs 3, warmup 0.1 for {subject}; max_length 2048 for a chat model"
    )
    assert fitted(found) == found, "fitting again changes nothing"


def test_lengths_stay_within_the_context(tmp_path):
    path = save_chat_config(tmp_path, max_position_embeddings=1024)
    found = fitted_values(teacher=path, student=path)
    assert (found["data.max_length"], found["data.max_prompt_length"]) == (1024, 768)


@pytest.mark.parametrize(("given", "prompt"), [(64, 256), (512, 256), (1024, 768)])
def test_max_prompt_length_follows_max_length(given, prompt):
    assert (
        fitted_values(f"data.max_length={given}", teacher="gpt2-xl", student="gpt2")["data.max_prompt_length"] == prompt
    )


@pytest.mark.parametrize(
    ("info", "lora", "lr"),
    [
        (ModelInfo("qwen3", count=lambda: int(0.1e9)), False, 1e-4),
        (ModelInfo("qwen3", has_template=True, count=lambda: int(0.1e9)), False, 5e-5),
        (ModelInfo("qwen3", count=lambda: int(8e9)), False, 2e-5),
        (ModelInfo("qwen3", count=lambda: int(8e9)), True, 2e-4),
        (ModelInfo("llama", has_template=True, count=lambda: int(8e9)), False, 1e-5),
        (ModelInfo("llama", count=lambda: int(0.1e9)), False, 5e-4),
        (ModelInfo("t5", is_encoder_decoder=True, count=lambda: int(0.06e9)), False, 1e-4),
    ],
)
def test_lr_depends_on_family_size_template_and_lora(info, lora, lr):
    assert rates(info, sft=False, lora=lora).lr == pytest.approx(lr)


def test_given_values_win_and_conflicts_are_errors(tmp_path):
    path = save_chat_config(tmp_path)
    found = fitted(resolve(command="sft", flags={"student.path": path}, sets=["train.lr=3e-3", "train.epochs=7"]))
    assert (found.recipe.train.lr, found.recipe.train.epochs, found.origin["train.lr"]) == (3e-3, 7, "--set")
    with raises_code("recipe.fields_conflict", "train.min_lr 0.001", "train.lr 1e-05"):
        fitted(resolve(command="sft", flags={"student.path": path}, sets=["train.min_lr=1e-3"]))


def test_missing_model_config_leaves_auto(capsys):
    assert main(["sft", "--model", "Qwen/not-cached", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^  lr: auto +# auto: no config of Qwen/not-cached available$", out, re.MULTILINE)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma3", "t5"])
def test_parameters_are_counted_without_weights(tmp_path, family):
    expected = tiny.model(family).num_parameters()
    tiny.save(tmp_path / "model", family, rows=101)
    assert read_model_info(str(tmp_path / "model")).parameters == expected
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text((tmp_path / "model/config.json").read_text())
    assert read_model_info(str(tmp_path / "bare")).parameters == expected


def test_chat_template_of_an_adapter_is_found(tmp_path):
    tiny.save(tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    config = {"base_model_name_or_path": str(tmp_path / "model")}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    assert not read_model_info(str(tmp_path / "adapter")).has_template
    (tmp_path / "adapter/chat_template.jinja").write_text("{{ messages }}")
    assert read_model_info(str(tmp_path / "adapter")).has_template


# ------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISTILLM_DATA", raising=False)
    rows = [{"instruction": f"{n:06b}".translate({48: "a", 49: "b"}), "output": "cab"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny.save(tmp_path / "qwen", "qwen3")
    tiny.save(tmp_path / "gpt2", "gpt2")
    return tmp_path


def test_fitted_values_are_printed_saved_and_resumed(workdir, capsys):
    """Check that recipe.yaml has the numbers, and that a resumed run and a run of that recipe use them."""
    small = ["--data", "rows.jsonl", "--steps", 4, "--set", "data.template=plain", "--set", "eval.report_rows=0"]
    argv = ["distill", "--teacher", "qwen", "--student", "qwen", *small, "--json"]
    code, _, err = call(capsys, *argv, "--output", "out")
    assert code == 0, err
    assert err.splitlines()[0].startswith("auto: lr 1e-4, warmup 0.1 for an 18.2 k base model; ")
    recorded = yaml.safe_load((workdir / "out/recipe.yaml").read_text())
    assert (recorded["train"]["lr"], recorded["train"]["epochs"], recorded["train"]["warmup"]) == (1e-4, 3.0, 0.1)
    assert recorded["data"]["max_length"] == tiny.CONTEXT
    assert "# auto: 1e-4 for an 18.2 k base model" in (workdir / "out/recipe.yaml").read_text()
    assert call(capsys, "distill", "--resume", "--output", "out", "--json")[0] == 0
    assert call(capsys, *argv, "--output", "out", "--resume")[0] == 0
    (workdir / "again.yaml").write_text((workdir / "out/recipe.yaml").read_text())
    code, _, err = call(capsys, "distill", "--recipe", "again.yaml", "--output", "again", "--json")
    assert code == 0, err
    assert "auto:" not in err
    losses = [
        [line["loss"] for line in map(json.loads, (workdir / name / "metrics.jsonl").open()) if "loss" in line]
        for name in ("out", "again")
    ]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]


def test_sft_stage_before_distillation_gets_fitted_values(workdir, capsys):
    argv = ["distill", "--teacher", "qwen", "--student", "qwen", "--data", "rows.jsonl", "--steps", 1, "--json"]
    argv += ["--set", "data.template=plain", "--set", "student.sft_epochs=0.2", "--set", "eval.report_rows=0"]
    code, _, err = call(capsys, *argv, "--output", "out")
    assert code == 0, err
    stage = yaml.safe_load((workdir / "out/sft/recipe.yaml").read_text())["train"]
    assert (stage["lr"], stage["epochs"], stage["warmup"]) == (1e-4, 0.2, 0.1)


def test_stages_are_fitted_to_models_of_earlier_stages(workdir):
    (workdir / "p.yaml").write_text("""
        defaults: {data: {source: rows.jsonl}}
        stages:
          teacher: {verb: sft, student: {path: qwen}}
          small: {verb: sft, student: {path: "random:2x16", tokenizer: stage:teacher}}
          distill: {verb: distill, teacher: {path: stage:teacher}, student: {path: stage:small}}
          own: {verb: distill, teacher: {path: stage:teacher}, student: {path: stage:teacher}}
          eval: {verb: eval, models: [stage:own]}
    """)
    stages = fitted_pipeline(load_pipeline("p.yaml")).stages
    found = {stage.name: [value_of(stage.resolved.recipe, key) for key in KEYS] for stage in stages}
    assert found == {
        "teacher": [1e-4, 3, 0.1, 64, 256],
        "small": [5e-5, 3, 0, 512, 256],
        "distill": [5e-4, 20, 0, 64, 256],
        "own": [1e-4, 3, 0.1, 64, 256],
        "eval": [1e-4, 3, 0.1, 64, 256],
    }


def test_pipeline_prints_fitted_values_of_each_stage(workdir, capsys):
    (workdir / "p.yaml").write_text("""
        defaults: {data: {source: rows.jsonl, template: plain}, train: {steps: 1}, eval: {report_rows: 0}}
        stages:
          teacher: {verb: sft, student: {path: qwen}}
          small: {verb: sft, student: {path: "random:2x16", tokenizer: stage:teacher}}
    """)
    code, _, err = call(capsys, "run", "p.yaml", "--output", "out", "--json")
    assert code == 0, err
    shown = [line for line in err.splitlines() if line.startswith("auto: ")]
    assert [line.partition(";")[0] for line in shown] == [
        "auto: lr 1e-4, warmup 0.1 for an 18.2 k base model",
        "auto: lr 5e-5, warmup 0 for a model built from scratch",
    ]


# ------------------------------------------------------------------------------------------------------------- data


def test_sft_without_data_is_an_error(workdir, capsys):
    assert_error(call(capsys, "sft", "--model", "gpt2", "--json"), "usage.no_data", "--data")


@pytest.mark.parametrize("pair", [("qwen", "qwen"), ("gpt2", "qwen"), ("Qwen/x", "gpt2"), ("builtin", "random:2x16")])
def test_distilling_other_models_without_data_is_an_error(workdir, capsys, pair):
    outcome = call(capsys, "distill", "--teacher", pair[0], "--student", pair[1], "--json")
    assert_error(outcome, "usage.no_data", "--data", "Dolly")


@pytest.mark.parametrize("pair", [("gpt2", "gpt2"), ("gpt2", "layers:1"), ("openai-community/gpt2-xl", "gpt2")])
def test_paper_models_train_on_dolly_by_default(workdir, capsys, pair):
    outcome = call(capsys, "distill", "--teacher", pair[0], "--student", pair[1], "--alpha", "0.1", "--json")
    assert outcome[2].splitlines()[0] == "no --data: training on Dolly (data.source dolly), the paper's data set"
    assert_error(outcome, "data.not_found", "dolly")


def test_chat_template_disables_default_data(workdir, capsys):
    (workdir / "gpt2/chat_template.jinja").write_text("{{ messages }}")
    assert_error(call(capsys, "distill", "--teacher", "gpt2", "--student", "gpt2", "--json"), "usage.no_data")


def test_stage_without_data_is_an_error(workdir, capsys):
    (workdir / "p.yaml").write_text("stages: {a: {verb: sft, student: {path: qwen}}}")
    assert_error(call(capsys, "run", "p.yaml", "--json"), "recipe.no_data", "stages.a.data.source")
