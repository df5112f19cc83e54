"""Test students built from the teacher, with adapters, and fine-tuned first, interrupted and resumed."""

import json
import shutil
import signal
import string
import subprocess
import sys
import time

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillm_cli.models.model_paths import BUILTIN_TEACHER
from tests import tiny
from tests.command_line import assert_error
from tests.conftest import ROOT

SMALL = [
    "--data", "builtin", "--max-length", "64", "--dtype", "fp32", "--device", "cpu", "--batch-size", "8", "--json",
    "--set", "data.template=plain", "--set", "data.size=48", "--set", "data.valid_limit=12", "--set", "eval.report_rows=3",
    "--set", "train.threads=1",
    "--set", "eval.max_new_tokens=6", "--set", "rollout.max_new_tokens=6", "--quiet", "--lr", "3e-3",
]  # fmt: skip
ADAPTIVE = ["--set", "schedule.phi=0.5", "--set", "schedule.capacity=16", "--set", "train.eval_steps=4"]
STEPS = ["--steps", "8", "--set", "train.save_steps=4", "--set", "train.keep=9"]


def distill(*more, teacher="builtin", adaptive=ADAPTIVE):
    return ["distill", "--teacher", teacher, *SMALL, *adaptive, *STEPS, *more]


def weights(output):
    return AutoModelForCausalLM.from_pretrained(output).state_dict()


def same_weights(one, two):
    one, two = weights(one), weights(two)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def remove_after(output, step):
    """Remove everything written after the checkpoint of ``step``, as if the run had been killed then."""
    for path in [*(output / "checkpoints").glob("step-*"), *output.glob("*.safetensors"), output / "README.md"]:
        if path.is_dir() and int(path.name[5:]) > step:
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


@pytest.mark.parametrize("spec", ["layers:2:first", "width:0.5"])
def test_students_built_from_teacher_train_and_load(cli, tmp_path, spec):
    code, result, err = cli(*distill("--student", spec, "--steps", "2", "--output", "out"))
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    teacher = AutoModelForCausalLM.from_pretrained(BUILTIN_TEACHER)
    assert type(model) is type(teacher)
    assert model.config.num_hidden_layers == (teacher.config.num_hidden_layers if spec == "width:0.5" else 2)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) > 0
    assert result["steps"] == 2


@pytest.mark.long
def test_student_layers_are_copied_before_teacher_is_freed(cli):
    off = ["--set", "schedule.kind=off", "--set", "train.eval_steps=epoch", "--steps", "12"]
    code, result, err = cli(*distill("--student", "layers:2", *off, "--output", "out", adaptive=()))
    assert code == 0, err
    assert result["teacher_cache"]["model_left"]
    code, uncached, err = cli(
        *distill("--student", "layers:2", *off, "--teacher-cache", "off", "--output", "uncached", adaptive=())
    )
    assert code == 0, err
    assert result["report"]["student_before"] == uncached["report"]["student_before"]


def test_pair_of_two_families_with_one_tokenizer(cli, tmp_path):
    """Check a GPT-2 teacher with a Llama student, including rollouts and replay."""
    tokens = AutoTokenizer.from_pretrained(BUILTIN_TEACHER)
    for name, family in (("teacher", "gpt2"), ("student", "llama")):
        tiny.save(tmp_path / name, family, rows=len(tokens) + 3, own_tokenizer=tokens)
    code, result, err = cli(*distill("--student", "student", "--output", "out", teacher="teacher"))
    assert code == 0, err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "llama"
    assert result["rollout_steps"] > 0


def test_chat_rows_train_students_with_teacher_tokenizer(cli, tmp_path):
    """Check students that take over the tokenizer, which has the chat template that the rows need."""
    tokens = tiny.tokenizer(string.printable)
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    tokens.chat_template = template + "{% if add_generation_prompt %}[assistant] {% endif %}"
    tokens.save_pretrained(tmp_path / "tokens")
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "and?"), ("assistant", "bye")]
    messages = [{"role": role, "content": text} for role, text in turns]
    lines = [json.dumps({"messages": [*messages[:2], {"role": "user", "content": c}, messages[3]]}) for c in "abcd"]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    few = ["--set", "eval.report_rows=0", "--set", "rollout.max_new_tokens=4", "--device", "cpu", "--json", "--quiet"]
    rows = ["--data", "chat.jsonl", "--steps", "1", "--dtype", "fp32", "--max-length", "64", *few]
    code, _, err = cli("sft", "--model", "random:gpt2:2x16", "--tokenizer", "tokens", *rows, "--output", "big")
    assert code == 0, err
    for student in ("random:1x16", "layers:1"):
        code, _, err = cli("distill", "--teacher", "big", "--student", student, *rows, "--output", student)
        assert code == 0, err
        assert AutoTokenizer.from_pretrained(tmp_path / student).chat_template == tokens.chat_template
    outcome = cli("sft", "--model", "random:1x16", "--tokenizer", "chars", *rows, "--output", "none")
    assert_error(outcome, "model.no_chat_template", "chat.jsonl:")


@pytest.mark.long
def test_adapter_output_works_with_every_command(cli, tmp_path):
    run = ["--student", "base", "--lora", "4", "--set", "student.lora_output=adapter"]
    tokens = AutoTokenizer.from_pretrained(BUILTIN_TEACHER)
    tiny.save(tmp_path / "base", "llama", rows=len(tokens), own_tokenizer=tokens)
    code, result, err = cli(*distill(*run, "--output", "out"))
    assert code == 0, err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not {"model.safetensors", "config.json"} & names
    assert "library_name: peft\npipeline_tag: text-generation\ntags:" in (tmp_path / "out/README.md").read_text()
    checkpoint = tmp_path / "out" / "checkpoints" / "step-000008"
    assert not (checkpoint / "model.safetensors").exists(), "frozen weights are not in a checkpoint"
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")

    # the same student, merged
    code, merged, err = cli(*distill(*run[:-2], "--output", "merged"))
    assert (code, merged["valid_loss"]) == (0, result["valid_loss"]), err
    assert "adapter_config.json" not in {path.name for path in (tmp_path / "merged").iterdir()}
    all_scores = []
    for directory in ("out", "merged", str(checkpoint)):
        greedy = ["--greedy", "--limit", "5", "--max-new-tokens", "6", "--dtype", "fp32", "--json", "--quiet"]
        code, scores, err = cli("eval", directory, "--suite", "builtin", *greedy)
        assert code == 0, err
        all_scores.append(scores["suites"]["builtin"])
    for scores in all_scores[1:]:
        assert scores["rouge_l"] == all_scores[0]["rouge_l"]
        assert scores["entropy"] == pytest.approx(all_scores[0]["entropy"], rel=1e-5)

    argv = ["generate", "--model", "out", "--prompt", "hello", "--max-new-tokens", "4", "--output", "responses.jsonl"]
    code, generated, err = cli(*argv, "--json")
    assert (code, generated["rows"]) == (0, 1), err

    code, distilled, err = cli(
        *distill("--student", "random:1x32", "--steps", "2", "--output", "distilled", teacher="out")
    )
    assert code == 0, err
    assert distilled["report"]["teacher"]["valid_loss"] == pytest.approx(result["valid_loss"], rel=1e-4)

    run[1] = "out"
    code, further, err = cli(*distill(*run, "--steps", "2", "--output", "further"))
    assert code == 0, err
    assert further["report"]["student_before"]["valid_loss"] == pytest.approx(result["valid_loss"], rel=1e-6)
    adapter_config = json.loads((tmp_path / "further" / "adapter_config.json").read_text())
    assert adapter_config["base_model_name_or_path"] == str(tmp_path / "base")

    (tmp_path / "base").rename(tmp_path / "moved")
    outcome = cli("eval", "out", "--suite", "builtin", "--limit", "2", "--json")
    assert_error(outcome, "model.no_adapter_base", "out", tmp_path / "base")
    assert "Traceback" not in outcome[2]


def test_teacher_cache_depends_on_the_adapter(cli, tmp_path):
    tokens = AutoTokenizer.from_pretrained(BUILTIN_TEACHER)
    tiny.save(tmp_path / "base", "llama", rows=len(tokens), own_tokenizer=tokens)
    adapter = ["sft", "--model", "base", "--lora", "4", "--set", "student.lora_output=adapter", *SMALL, "--steps", "3"]
    assert cli(*adapter, "--output", "tuned")[0] == 0
    directories = set()
    for teacher in ("base", "tuned"):
        code, result, err = cli(*distill("--student", "random:1x32", "--warm-teacher-cache", teacher=teacher))
        assert (code, result["teacher_cache"]["hit"]) == (0, False), err
        directories.add(result["teacher_cache"]["place"])
    assert len(directories) == 2


@pytest.mark.long
@pytest.mark.parametrize("student", [["layers:2", "--lora", "4"], ["random:1x32"]], ids=["lora", "full"])
def test_resume_in_either_stage_matches_uninterrupted_run(cli, tmp_path, student):
    argv = distill("--student", *student, "--set", "student.sft_epochs=2", "--set", "student.sft_lr=2e-3")
    code, full, err = cli(*argv, "--output", "full")
    assert code == 0, err
    sft = tmp_path / "full" / "sft"
    steps = sorted(int(path.name[5:]) for path in (sft / "checkpoints").iterdir())
    assert len(steps) == 2, "validated and saved after each epoch"
    report = full["report"]
    assert set(report) == {"student_before", "student_after_sft", "student_after", "teacher"}
    assert report["student_after_sft"]["valid_loss"] < report["student_before"]["valid_loss"]
    for directory, first in ((sft, "student_before"), (tmp_path / "full", "student_after_sft")):
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        at_start = next(line["valid_loss"] for line in lines if line["step"] == 0)
        assert at_start == pytest.approx(report[first]["valid_loss"], rel=1e-5)
    lines = [json.loads(line) for line in (sft / "metrics.jsonl").read_text().splitlines()]
    assert max(line["lr"] for line in lines if "lr" in line) == pytest.approx(2e-3)
    assert "train.lr" not in (sft / "recipe.yaml").read_text()

    shutil.copytree(tmp_path / "full", tmp_path / "in-sft")
    remove_after(tmp_path / "in-sft", -1)
    remove_after(tmp_path / "in-sft" / "sft", steps[0])
    shutil.copytree(tmp_path / "full", tmp_path / "between")
    remove_after(tmp_path / "between", -1)
    shutil.copytree(tmp_path / "full", tmp_path / "in-distill")
    remove_after(tmp_path / "in-distill", 4)
    for name in ("in-sft", "between", "in-distill"):
        code, result, err = cli("distill", "--resume", "--output", name, "--json", "--quiet")
        assert code == 0, (name, err)
        assert same_weights("full", name), name
        assert same_weights("full/sft", f"{name}/sft"), name
        assert result["report"] == report, name

    outcome = cli(*argv, "--set", "student.sft_epochs=3", "--output", "in-distill", "--resume")
    assert_error(outcome, "checkpoint.changed", "student.sft_epochs", "2.0", "3.0")
    outcome = cli(*argv, "--steps", "2", "--set", "student.sft_epochs=0", "--output", "in-distill", "--overwrite")
    assert_error(outcome, "recipe.fields_conflict", "student.sft_lr")
    code, _, err = cli(
        *distill("--student", *student, "--steps", "2", "--output", "in-distill", "--overwrite"),
    )
    assert code == 0, err
    assert not (tmp_path / "in-distill" / "sft").exists(), "the stage of the earlier run was removed"


@pytest.mark.long
def test_resume_after_ctrl_c_in_sft_stage(cli, tmp_path):
    argv = distill("--student", "random:1x32", "--set", "student.sft_epochs=6", "--set", "eval.report_rows=0")
    metrics = tmp_path / "resumed" / "sft" / "metrics.jsonl"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "distillm_cli", *argv, "--output", str(tmp_path / "resumed")]
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        while process.poll() is None and not (metrics.exists() and '"step": 2,' in metrics.read_text()):
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, json.loads(out)["code"]) == (130, 130), err
    assert not (tmp_path / "resumed" / "checkpoints").exists()
    code, _, err = cli("distill", "--resume", "--output", "resumed", "--json", "--quiet")
    assert code == 0, err
    code, _, err = cli(*argv, "--output", "full")
    assert code == 0, err
    assert same_weights("full", "resumed")


def test_sft_stage_recipe_gives_same_weights(cli, tmp_path):
    argv = distill("--student", "layers:2", "--set", "student.sft_epochs=1", "--steps", "1", "--output", "out")
    assert cli(*argv)[0] == 0
    code, _, err = cli("sft", "--recipe", "out/sft/recipe.yaml", "--output", "again", "--json", "--quiet")
    assert code == 0, err
    assert same_weights("out/sft", "again")


def test_resume_with_changed_base_model_is_an_error(cli, tmp_path):
    tokens = AutoTokenizer.from_pretrained(BUILTIN_TEACHER)
    tiny.save(tmp_path / "base", "llama", rows=len(tokens), own_tokenizer=tokens)
    argv = distill("--student", "base", "--lora", "4", "--output", "out")
    assert cli(*argv)[0] == 0
    remove_after(tmp_path / "out", 4)
    shutil.rmtree(tmp_path / "base")
    tiny.save(tmp_path / "base", "llama", rows=len(tokens), own_tokenizer=tokens, seed=1)
    outcome = cli("distill", "--resume", "--output", "out", "--json", "--quiet")
    assert_error(outcome, "checkpoint.changed", "student")


def test_quantized_teacher_without_cuda_is_an_error(cli, monkeypatch):
    argv = distill("--student", "random:1x32", "--set", "teacher.quantize=8bit", "--output", "out")
    message = assert_error(cli(*argv), "model.cannot_quantize", "teacher.quantize 8bit")
    assert "\n" not in message
