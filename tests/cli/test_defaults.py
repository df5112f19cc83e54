"""Numbers that are chosen to fit the models, and the data set that is taken where none is named."""

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
from distillm_cli.errors import RecipeError
from distillm_cli.models.model_info import ModelInfo, read_model_info
from distillm_cli.runs.defaults import KEYS, fitted, fitted_line, fitted_pipeline, number, rates
from tests import tiny
from tests.typed import call

QWEN = {
    "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}  # fmt: skip
PAPER = {"train.lr": 5e-4, "train.epochs": 20, "train.warmup": 0, "data.max_length": 512, "data.max_prompt_length": 256}


def chat_directory(place, **fields) -> str:
    AutoConfig.for_model("qwen3", **QWEN | fields).save_pretrained(place)
    (place / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return str(place)


def numbers(*sets: str, command: str = "distill", recipe=None, **flags: str) -> dict[str, float]:
    """What the fields come to, for this teacher and student and these settings."""
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
def test_the_papers_models_get_the_papers_numbers(pair, differs):
    assert numbers(teacher=pair[0], student=pair[1]) == PAPER | differs


def test_open_llama_with_lora_gets_the_papers_numbers():
    pair = {"teacher": "openlm-research/open_llama_7b_v2", "student": "openlm-research/open_llama_3b_v2"}
    assert numbers("student.lora.r=16", **pair) == PAPER | {"train.epochs": 10}
    assert numbers(**pair)["train.lr"] == 2e-5, "the paper trains no Llama in full"


@pytest.mark.parametrize(
    ("sets", "lr", "who"), [([], 1e-5, "a 596 M chat model"), (["student.lora.r=8"], 1e-4, "a 596 M chat model, LoRA")]
)
@pytest.mark.parametrize("command", ["distill", "sft"])
def test_a_chat_model_is_not_trained_as_the_papers(tmp_path, command, sets, lr, who):
    path = chat_directory(tmp_path)
    flags = {"student.path": path} | ({"teacher.path": path} if command == "distill" else {})
    found = fitted(resolve(command=command, flags=flags, sets=sets))
    train, data = found.recipe.train, found.recipe.data
    assert (train.lr, train.epochs, train.warmup) == (lr, 3, 0.1)
    assert (data.max_length, data.max_prompt_length) == (2048, 1792)
    assert found.origin["train.lr"] == f"auto: {number(lr)} for {who}"
    assert (
        fitted_line(found) == f"auto: lr {number(lr)}, epochs 3, warmup 0.1 for {who}; max_length 2048 for a chat model"
    )
    assert fitted(found) == found, "numbers stay"


def test_lengths_stay_within_the_context(tmp_path):
    path = chat_directory(tmp_path, max_position_embeddings=1024)
    found = numbers(teacher=path, student=path)
    assert (found["data.max_length"], found["data.max_prompt_length"]) == (1024, 768)


@pytest.mark.parametrize(("given", "prompt"), [(64, 256), (512, 256), (1024, 768)])
def test_the_prompt_goes_along_with_a_given_length(given, prompt):
    assert numbers(f"data.max_length={given}", teacher="gpt2-xl", student="gpt2")["data.max_prompt_length"] == prompt


@pytest.mark.parametrize(
    ("facts", "lora", "lr"),
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
def test_the_rate_goes_by_family_size_template_and_adapter(facts, lora, lr):
    assert rates(facts, sft=False, lora=lora).lr == pytest.approx(lr)


def test_what_is_given_stays_and_what_contradicts_it_is_refused(tmp_path):
    path = chat_directory(tmp_path)
    found = fitted(resolve(command="sft", flags={"student.path": path}, sets=["train.lr=3e-3", "train.epochs=7"]))
    assert (found.recipe.train.lr, found.recipe.train.epochs, found.origin["train.lr"]) == (3e-3, 7, "--set")
    with pytest.raises(RecipeError, match=r"train\.min_lr 0\.001 is above train\.lr 1e-05"):
        fitted(resolve(command="sft", flags={"student.path": path}, sets=["train.min_lr=1e-3"]))


def test_a_model_whose_config_is_not_at_hand_leaves_auto(capsys):
    assert main(["sft", "--model", "Qwen/not-cached", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^  lr: auto +# auto: no config of Qwen/not-cached available$", out, re.MULTILINE)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma3", "t5"])
def test_parameters_are_counted_with_and_without_weights(tmp_path, family):
    expected = tiny.model(family).num_parameters()
    tiny.save(tmp_path / "whole", family, rows=101)
    assert read_model_info(str(tmp_path / "whole")).parameters == expected
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text((tmp_path / "whole/config.json").read_text())
    assert read_model_info(str(tmp_path / "bare")).parameters == expected


def test_an_adapter_may_bring_the_chat_template_that_its_model_lacks(tmp_path):
    tiny.save(tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    named = {"base_model_name_or_path": str(tmp_path / "model")}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(named))
    assert not read_model_info(str(tmp_path / "adapter")).has_template
    (tmp_path / "adapter/chat_template.jinja").write_text("{{ messages }}")
    assert read_model_info(str(tmp_path / "adapter")).has_template


# ------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISTILLM_DATA", raising=False)
    rows = [{"instruction": f"{n:06b}".translate({48: "a", 49: "b"}), "output": "cab"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny.save(tmp_path / "qwen", "qwen3")
    tiny.save(tmp_path / "gpt2", "gpt2")
    return tmp_path


def test_numbers_are_shown_recorded_and_resumed(place, capsys):
    """The recipe of the output directory holds numbers; a resume, and a run of that recipe, read them."""
    small = ["--data", "rows.jsonl", "--steps", 4, "--set", "data.template=plain", "--set", "eval.report_rows=0"]
    argv = ["distill", "--teacher", "qwen", "--student", "qwen", *small, "--json"]
    code, _, err = call(capsys, *argv, "--output", "out")
    assert code == 0, err
    assert err.splitlines()[0].startswith("auto: lr 1e-4, warmup 0.1 for an 18.2 k base model; ")
    recorded = yaml.safe_load((place / "out/recipe.yaml").read_text())
    assert (recorded["train"]["lr"], recorded["train"]["epochs"], recorded["train"]["warmup"]) == (1e-4, 3.0, 0.1)
    assert recorded["data"]["max_length"] == tiny.CONTEXT
    assert "# auto: 1e-4 for an 18.2 k base model" in (place / "out/recipe.yaml").read_text()
    assert call(capsys, "distill", "--resume", "--output", "out", "--json")[0] == 0
    assert call(capsys, *argv, "--output", "out", "--resume")[0] == 0
    (place / "again.yaml").write_text((place / "out/recipe.yaml").read_text())
    code, _, err = call(capsys, "distill", "--recipe", "again.yaml", "--output", "again", "--json")
    assert code == 0, err
    assert "auto:" not in err
    losses = [
        [line["loss"] for line in map(json.loads, (place / name / "metrics.jsonl").open()) if "loss" in line]
        for name in ("out", "again")
    ]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]


def test_the_fine_tuning_before_distillation_has_numbers_too(place, capsys):
    argv = ["distill", "--teacher", "qwen", "--student", "qwen", "--data", "rows.jsonl", "--steps", 1, "--json"]
    argv += ["--set", "data.template=plain", "--set", "student.sft_epochs=0.2", "--set", "eval.report_rows=0"]
    code, _, err = call(capsys, *argv, "--output", "out")
    assert code == 0, err
    stage = yaml.safe_load((place / "out/sft/recipe.yaml").read_text())["train"]
    assert (stage["lr"], stage["epochs"], stage["warmup"]) == (1e-4, 0.2, 0.1)


def test_stages_are_fitted_with_what_earlier_stages_make(place):
    (place / "p.yaml").write_text("""
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


def test_each_stage_of_a_pipeline_shows_its_numbers(place, capsys):
    (place / "p.yaml").write_text("""
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


def test_fine_tuning_needs_data(place, capsys):
    code, answer, _ = call(capsys, "sft", "--model", "gpt2", "--json")
    assert code == 2
    assert "no data to train on; --data is not given" in answer["message"]


@pytest.mark.parametrize("pair", [("qwen", "qwen"), ("gpt2", "qwen"), ("Qwen/x", "gpt2"), ("builtin", "random:2x16")])
def test_distillation_of_other_models_needs_data(place, capsys, pair):
    code, answer, _ = call(capsys, "distill", "--teacher", pair[0], "--student", pair[1], "--json")
    assert code == 2
    assert "--data is not given, and Dolly is the default only for" in answer["message"]


@pytest.mark.parametrize("pair", [("gpt2", "gpt2"), ("gpt2", "layers:1"), ("openai-community/gpt2-xl", "gpt2")])
def test_the_cards_sentence_says_that_it_takes_dolly(place, capsys, pair):
    code, _, err = call(capsys, "distill", "--teacher", pair[0], "--student", pair[1], "--alpha", "0.1", "--json")
    assert err.splitlines()[0] == "no --data: training on Dolly (data.source dolly), the paper's data set"
    assert code == 3, "which is not here, and that is said after it"


def test_a_chat_template_is_not_of_the_paper(place, capsys):
    (place / "gpt2/chat_template.jinja").write_text("{{ messages }}")
    assert call(capsys, "distill", "--teacher", "gpt2", "--student", "gpt2", "--json")[0] == 2


def test_a_stage_that_trains_names_its_data(place, capsys):
    (place / "p.yaml").write_text("stages: {a: {verb: sft, student: {path: qwen}}}")
    code, answer, _ = call(capsys, "run", "p.yaml", "--json")
    assert code == 2
    assert "stage a has no data.source; set stages.a.data.source" in answer["message"]
