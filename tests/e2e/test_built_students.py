"""Students as typed: cut from the teacher, under an adapter, fine-tuned first; stopped anywhere and gone on with."""

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

from distillm_cli.cli.app import main
from distillm_cli.models.model_paths import BUILTIN_TEACHER
from tests import tiny
from tests.conftest import ROOT

SMALL = [
    "--data", "builtin", "--max-length", "64", "--dtype", "fp32", "--device", "cpu", "--batch-size", "8", "--json",
    "--set", "data.template=plain", "--set", "data.size=48", "--set", "data.valid_limit=12", "--set", "eval.report_rows=3",
    "--set", "train.threads=1",
    "--set", "eval.max_new_tokens=6", "--set", "rollout.max_new_tokens=6", "--quiet", "--lr", "3e-3",
]  # fmt: skip
ADAPTIVE = ["--set", "schedule.phi=0.5", "--set", "schedule.capacity=16", "--set", "train.eval_steps=4"]
STEPS = ["--steps", "8", "--set", "train.save_steps=4", "--set", "train.keep=9"]


@pytest.fixture
def typed(capsys, tmp_path, monkeypatch):
    """Types a command line in an empty directory; (exit code, the JSON object, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        capsys.readouterr()
        code = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return code, json.loads(out), err

    return call


def distill(*more, teacher="builtin", adaptive=ADAPTIVE):
    return ["distill", "--teacher", teacher, *SMALL, *adaptive, *STEPS, *more]


def weights(output):
    return AutoModelForCausalLM.from_pretrained(output).state_dict()


def same(one, two):
    one, two = weights(one), weights(two)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def drop_after(output, step):
    """As if the run had been killed after the checkpoint of ``step``: nothing that came later is there."""
    for path in [*(output / "checkpoints").glob("step-*"), *output.glob("*.safetensors"), output / "README.md"]:
        if path.is_dir() and int(path.name[5:]) > step:
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


@pytest.mark.parametrize("spec", ["layers:2:first", "width:0.5"])
def test_students_of_the_teacher_train_and_load(typed, tmp_path, spec):
    code, result, err = typed(*distill("--student", spec, "--steps", "2", "--output", "out"))
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    teacher = AutoModelForCausalLM.from_pretrained(BUILTIN_TEACHER)
    assert type(model) is type(teacher)
    assert model.config.num_hidden_layers == (teacher.config.num_hidden_layers if spec == "width:0.5" else 2)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) > 0
    assert result["steps"] == 2


def test_layers_are_there_for_the_first_loss_when_the_teacher_has_left_already(typed):
    off = ["--set", "schedule.kind=off", "--set", "train.eval_steps=epoch", "--steps", "12"]
    code, result, err = typed(*distill("--student", "layers:2", *off, "--output", "out", adaptive=()))
    assert code == 0, err
    assert result["teacher_cache"]["model_left"]
    code, kept, err = typed(
        *distill("--student", "layers:2", *off, "--teacher-cache", "off", "--output", "kept", adaptive=())
    )
    assert code == 0, err
    assert result["report"]["student_before"] == kept["report"]["student_before"]


def test_a_pair_of_two_families_with_one_tokenizer(typed, tmp_path):
    """A GPT-2 teacher and a Llama student, rollouts and replay included."""
    tokens = AutoTokenizer.from_pretrained(BUILTIN_TEACHER)
    for name, family in (("teacher", "gpt2"), ("student", "llama")):
        tiny.save(tmp_path / name, family, rows=len(tokens) + 3, own_tokenizer=tokens)
    code, result, err = typed(*distill("--student", "student", "--output", "out", teacher="teacher"))
    assert code == 0, err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "llama"
    assert result["rollout_steps"] > 0


def test_rows_of_chat_train_a_model_from_scratch_and_students_of_it(typed, tmp_path):
    """Only the tokenizer that such a model takes over can write them: it alone has the chat template."""
    tokens = tiny.tokenizer(string.printable)
    turns = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    tokens.chat_template = turns + "{% if add_generation_prompt %}[assistant] {% endif %}"
    tokens.save_pretrained(tmp_path / "tokens")
    said = [("user", "hi"), ("assistant", "yo"), ("user", "and?"), ("assistant", "bye")]
    messages = [{"role": role, "content": text} for role, text in said]
    lines = [json.dumps({"messages": [*messages[:2], {"role": "user", "content": c}, messages[3]]}) for c in "abcd"]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    few = ["--set", "eval.report_rows=0", "--set", "rollout.max_new_tokens=4", "--device", "cpu", "--json", "--quiet"]
    rows = ["--data", "chat.jsonl", "--steps", "1", "--dtype", "fp32", "--max-length", "64", *few]
    code, _, err = typed("sft", "--model", "random:gpt2:2x16", "--tokenizer", "tokens", *rows, "--output", "big")
    assert code == 0, err
    for student in ("random:1x16", "layers:1"):
        code, _, err = typed("distill", "--teacher", "big", "--student", student, *rows, "--output", student)
        assert code == 0, err
        assert AutoTokenizer.from_pretrained(tmp_path / student).chat_template == tokens.chat_template
    code, told, _ = typed("sft", "--model", "random:1x16", "--tokenizer", "chars", *rows, "--output", "none")
    assert (code, "no chat template; chat.jsonl:" in told["message"]) == (4, True), "one trained on the rows has none"


def test_an_adapter_is_output_evaluated_asked_taught_by_and_gone_on_with(typed, tmp_path):
    run = ["--student", "base", "--lora", "4", "--set", "student.lora_output=adapter"]
    tokens = AutoTokenizer.from_pretrained(BUILTIN_TEACHER)
    tiny.save(tmp_path / "base", "llama", rows=len(tokens), own_tokenizer=tokens)
    code, result, err = typed(*distill(*run, "--output", "out"))
    assert code == 0, err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not {"model.safetensors", "config.json"} & names
    assert "library_name: peft\npipeline_tag: text-generation\ntags:" in (tmp_path / "out/README.md").read_text()
    checkpoint = tmp_path / "out" / "checkpoints" / "step-000008"
    assert not (checkpoint / "model.safetensors").exists(), "what does not train is not stored again"
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")

    # the same in the merged form
    code, merged, err = typed(*distill(*run[:-2], "--output", "merged"))
    assert (code, merged["valid_loss"]) == (0, result["valid_loss"]), err
    assert "adapter_config.json" not in {path.name for path in (tmp_path / "merged").iterdir()}
    scored = []
    for place in ("out", "merged", str(checkpoint)):
        greedy = ["--greedy", "--limit", "5", "--max-new-tokens", "6", "--dtype", "fp32", "--json", "--quiet"]
        code, scores, err = typed("eval", place, "--suite", "builtin", *greedy)
        assert code == 0, err
        scored.append(scores["suites"]["builtin"])
    for scores in scored[1:]:
        assert scores["rouge_l"] == scored[0]["rouge_l"]
        assert scores["entropy"] == pytest.approx(scored[0]["entropy"], rel=1e-5)

    code, said, err = typed(
        "generate", "--model", "out", "--prompt", "hello", "--max-new-tokens", "4", "--output", "said.jsonl", "--json"
    )
    assert (code, said["rows"]) == (0, 1), err

    code, taught, err = typed(*distill("--student", "random:1x32", "--steps", "2", "--output", "taught", teacher="out"))
    assert code == 0, err
    assert taught["report"]["teacher"]["valid_loss"] == pytest.approx(result["valid_loss"], rel=1e-4)

    run[1] = "out"
    code, further, err = typed(*distill(*run, "--steps", "2", "--output", "further"))
    assert code == 0, err
    assert further["report"]["student_before"]["valid_loss"] == pytest.approx(result["valid_loss"], rel=1e-6)
    told = json.loads((tmp_path / "further" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(tmp_path / "base")

    (tmp_path / "base").rename(tmp_path / "elsewhere")
    code, answer, err = typed("eval", "out", "--suite", "builtin", "--limit", "2", "--json")
    assert (code, answer["code"]) == (4, 4)
    assert f"out is an adapter of {tmp_path / 'base'}, which does not load" in err
    assert "Traceback" not in err


def test_a_cached_teacher_is_told_from_itself_under_an_adapter(typed, tmp_path):
    tokens = AutoTokenizer.from_pretrained(BUILTIN_TEACHER)
    tiny.save(tmp_path / "base", "llama", rows=len(tokens), own_tokenizer=tokens)
    adapter = ["sft", "--model", "base", "--lora", "4", "--set", "student.lora_output=adapter", *SMALL, "--steps", "3"]
    assert typed(*adapter, "--output", "taught")[0] == 0
    places = set()
    for teacher in ("base", "taught"):
        code, made, err = typed(*distill("--student", "random:1x32", "--warm-teacher-cache", teacher=teacher))
        assert (code, made["teacher_cache"]["hit"]) == (0, False), err
        places.add(made["teacher_cache"]["place"])
    assert len(places) == 2


@pytest.mark.parametrize("student", [["layers:2", "--lora", "4"], ["random:1x32"]], ids=["lora", "whole"])
def test_a_run_killed_in_either_stage_ends_as_if_it_had_not_been(typed, tmp_path, student):
    argv = distill("--student", *student, "--set", "student.sft_epochs=2", "--set", "student.sft_lr=2e-3")
    code, whole, err = typed(*argv, "--output", "whole")
    assert code == 0, err
    sft = tmp_path / "whole" / "sft"
    steps = sorted(int(path.name[5:]) for path in (sft / "checkpoints").iterdir())
    assert len(steps) == 2, "validated and saved after each epoch"
    report = whole["report"]
    assert set(report) == {"student_before", "student_after_sft", "student_after", "teacher"}
    assert report["student_after_sft"]["valid_loss"] < report["student_before"]["valid_loss"]
    for place, first in ((sft, "student_before"), (tmp_path / "whole", "student_after_sft")):
        lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        at_start = next(line["valid_loss"] for line in lines if line["step"] == 0)
        assert at_start == pytest.approx(report[first]["valid_loss"], rel=1e-5)
    lines = [json.loads(line) for line in (sft / "metrics.jsonl").read_text().splitlines()]
    assert max(line["lr"] for line in lines if "lr" in line) == pytest.approx(2e-3)
    assert "train.lr" not in (sft / "recipe.yaml").read_text()

    shutil.copytree(tmp_path / "whole", tmp_path / "in-sft")
    drop_after(tmp_path / "in-sft", -1)
    drop_after(tmp_path / "in-sft" / "sft", steps[0])
    shutil.copytree(tmp_path / "whole", tmp_path / "between")
    drop_after(tmp_path / "between", -1)
    shutil.copytree(tmp_path / "whole", tmp_path / "in-distill")
    drop_after(tmp_path / "in-distill", 4)
    for name in ("in-sft", "between", "in-distill"):
        code, result, err = typed("distill", "--resume", "--output", name, "--json", "--quiet")
        assert code == 0, (name, err)
        assert same("whole", name), name
        assert same("whole/sft", f"{name}/sft"), name
        assert result["report"] == report, name

    code, answer, err = typed(*argv, "--set", "student.sft_epochs=3", "--output", "in-distill", "--resume")
    assert (code, answer["code"]) == (5, 5)
    assert "student.sft_epochs was 2.0, now 3.0" in err
    code, _, err = typed(
        *argv, "--steps", "2", "--set", "student.sft_epochs=0", "--output", "in-distill", "--overwrite"
    )
    assert code == 2, "sft_lr belongs to the stage"
    code, _, err = typed(
        *distill("--student", *student, "--steps", "2", "--output", "in-distill", "--overwrite"),
    )
    assert code == 0, err
    assert not (tmp_path / "in-distill" / "sft").exists(), "the stage of an earlier run is gone"


def test_a_signal_in_the_stage_before_stops_there_and_resume_goes_on(typed, tmp_path):
    argv = distill("--student", "random:1x32", "--set", "student.sft_epochs=6", "--set", "eval.report_rows=0")
    metrics = tmp_path / "cut" / "sft" / "metrics.jsonl"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "distillm_cli", *argv, "--output", str(tmp_path / "cut")]
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        while process.poll() is None and not (metrics.exists() and '"step": 2,' in metrics.read_text()):
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, json.loads(out)["code"]) == (130, 130), err
    assert not (tmp_path / "cut" / "checkpoints").exists()
    code, _, err = typed("distill", "--resume", "--output", "cut", "--json", "--quiet")
    assert code == 0, err
    code, _, err = typed(*argv, "--output", "whole")
    assert code == 0, err
    assert same("whole", "cut")


def test_the_stage_is_a_recipe_that_sft_itself_runs(typed, tmp_path):
    argv = distill("--student", "layers:2", "--set", "student.sft_epochs=1", "--steps", "1", "--output", "out")
    assert typed(*argv)[0] == 0
    code, _, err = typed("sft", "--recipe", "out/sft/recipe.yaml", "--output", "again", "--json", "--quiet")
    assert code == 0, err
    assert same("out/sft", "again")


def test_a_resumed_adapter_refuses_another_model_below_it(typed, tmp_path):
    tokens = AutoTokenizer.from_pretrained(BUILTIN_TEACHER)
    tiny.save(tmp_path / "base", "llama", rows=len(tokens), own_tokenizer=tokens)
    argv = distill("--student", "base", "--lora", "4", "--output", "out")
    assert typed(*argv)[0] == 0
    drop_after(tmp_path / "out", 4)
    shutil.rmtree(tmp_path / "base")
    tiny.save(tmp_path / "base", "llama", rows=len(tokens), own_tokenizer=tokens, seed=1)
    code, answer, err = typed("distill", "--resume", "--output", "out", "--json", "--quiet")
    assert (code, answer["code"]) == (5, 5)
    assert "the student has changed since the run was started" in err


def test_a_quantised_teacher_is_refused_where_it_cannot_be(typed, monkeypatch):
    argv = distill("--student", "random:1x32", "--set", "teacher.quantize=8bit", "--output", "out")
    code, answer, _ = typed(*argv)
    assert (code, answer["code"]) == (4, 4)
    assert answer["message"].startswith("teacher.quantize 8bit needs CUDA, but ")
    assert "\n" not in answer["message"]
