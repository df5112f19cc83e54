"""Test Pea-KD from the command line: shared layers, pre-training, interrupted and resumed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillm_cli.models.model_paths import BUILTIN_TEACHER
from tests import tiny
from tests.command_line import assert_error
from tests.e2e.test_built_students import SMALL, remove_after, same_weights, weights
from tests.marks import long

RUN = [*SMALL, "--set", "train.save_steps=2", "--set", "train.keep=9", "--set", "train.eval_steps=3", "--steps", "6"]


@pytest.fixture
def teachers(tmp_path):
    """Save a Llama, a GPT-2 and a T5 with the tokenizer of the builtin teacher."""
    tokens = AutoTokenizer.from_pretrained(BUILTIN_TEACHER)
    shapes = {"llama": {"num_key_value_heads": 4}, "gpt2": {}, "gqa": {}, "t5": {}}
    for name, fields in shapes.items():
        family = "llama" if name == "gqa" else name
        tiny.save(tmp_path / name, family, rows=len(tokens), own_tokenizer=tokens, **fields)
    return tmp_path


def peakd(teacher, *more):
    return ["distill", "--method", "peakd", "--teacher", teacher, *RUN, *more]


@pytest.mark.parametrize("teacher", ["llama", long("gpt2")])
def test_resume_anywhere_matches_uninterrupted_run(cli, teachers, teacher):
    argv = peakd(teacher, "--set", "student.ptp=2", "--set", "student.ptp_lr=1e-2")
    code, full, err = cli(*argv, "--output", "full")
    assert code == 0, err
    assert list(full["report"]) == ["student_after", "teacher", "student_before", "student_after_ptp"]
    ptp = teachers / "full" / "ptp"
    lines = [json.loads(line) for line in (ptp / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "ptp_accuracy" in line]
    assert [line["step"] for line in measured] == [0, 6, 12]
    assert measured[-1]["ptp_accuracy"] > measured[0]["ptp_accuracy"]
    assert max(line["lr"] for line in lines if "lr" in line) == pytest.approx(1e-2)
    assert full["report"]["student_before"]["valid_loss"] == pytest.approx(lines[0]["valid_loss"], rel=1e-5)
    # Half of the teacher's two layers, which runs twice.
    saved = weights(teachers / "full")
    names = [name for name in saved if ".1." in name and name.endswith("weight")]
    assert names
    for name in names:
        first = saved[
            name.replace("q_proj", "X").replace("k_proj", "q_proj").replace("X", "k_proj").replace(".1.", ".0.")
        ]
        if "c_attn" in name:
            q, k, v = first.chunk(3, -1)
            first = torch.cat([k, q, v], -1)
        assert torch.equal(saved[name], first), name
    assert "run 2 times" in (teachers / "full/README.md").read_text()

    for name, stage_step, step in (("in-ptp", 6, -1), ("between", 12, -1), ("in-kd", 12, 4)):
        shutil.copytree(teachers / "full", teachers / name)
        remove_after(teachers / name, step)
        remove_after(teachers / name / "ptp", stage_step)
        code, result, err = cli("distill", "--resume", "--output", name, "--json", "--quiet")
        assert code == 0, (name, err)
        assert same_weights("full", name), name
        assert result["report"] == full["report"], name
        last = AutoModelForCausalLM.from_pretrained(teachers / name / "ptp/checkpoints/step-000012").state_dict()
        of_full = AutoModelForCausalLM.from_pretrained(ptp / "checkpoints/step-000012").state_dict()
        assert all(torch.equal(last[key], of_full[key]) for key in of_full)

    # Without pre-training the directory of the stage is removed, and a directory of the user is never used.
    code, _, err = cli(*peakd(teacher, "--set", "student.ptp=0", "--output", "between", "--overwrite"))
    assert code == 0, err
    assert not (teachers / "between" / "ptp").exists()
    (teachers / "between" / "ptp").mkdir()
    (teachers / "between" / "ptp" / "notes.txt").write_text("mine")
    outcome = cli(*argv, "--output", "between", "--overwrite")
    assert_error(outcome, "usage.output_exists", "between/ptp")
    assert (teachers / "between" / "ptp" / "notes.txt").read_text() == "mine"


@pytest.mark.long
def test_micro_batches_and_the_teacher_cache_change_only_rounding(cli, teachers):
    reports = {}
    for name, more in {
        "whole": [],
        "micro": ["--batch-size", "2", "--set", "train.accumulate=4"],
        "uncached": ["--teacher-cache", "off"],
        "disk": ["--teacher-cache", "disk"],
    }.items():
        code, result, err = cli(*peakd("llama", "--output", name, *more))
        assert code == 0, (name, err)
        reports[name] = result["report"]["student_after"]["valid_loss"]
    for name, loss in reports.items():
        assert loss == pytest.approx(reports["whole"], rel=1e-4), name


@pytest.mark.long
def test_stages_run_in_order_and_combine_with_other_methods(cli, teachers):
    more = ["--student", "shared:1x3:swap", "--set", "student.ptp=1", "--set", "student.sft_epochs=1"]
    argv = ["distill", "--method", "distillm", "--teacher", "gpt2", *RUN, *more, "--set", "schedule.phi=0.5"]
    code, result, err = cli(*argv, "--output", "out")
    assert code == 0, err
    assert set(result["report"]) == {
        "student_before",
        "student_after_sft",
        "student_after_ptp",
        "student_after",
        "teacher",
    }
    assert result["rollout_steps"] + result["replay_steps"] > 0
    shutil.copytree(teachers / "out", teachers / "again")
    remove_after(teachers / "again", -1)
    shutil.rmtree(teachers / "again" / "ptp")  # killed after fine-tuning
    code, resumed, err = cli("distill", "--resume", "--output", "again", "--json", "--quiet")
    assert code == 0, err
    assert same_weights("out", "again")
    assert resumed["report"] == result["report"]


def test_encoder_decoder_is_pre_trained(cli, teachers):
    argv = ["distill", "--method", "kd", "--teacher", "t5", "--student", "random:1x32", "--set", "student.ptp=1", *RUN]
    code, _, err = cli(*argv, "--output", "out")
    assert code == 0, err
    assert '"ptp_accuracy"' in (teachers / "out/ptp/metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("teacher", "student", "code"),
    [
        ("gqa", "shared:1x2:swap", "model.cannot_swap"),
        ("t5", "shared:1x2", "model.cannot_take_layers"),
        ("llama", "shared:3x2", "usage.invalid_layers"),
        ("llama", "shared:3", "usage.invalid_student"),
    ],
)
def test_students_that_cannot_be_built_are_errors(cli, teachers, teacher, student, code):
    if code.startswith("model."):  # before weights are read
        (teachers / teacher / "model.safetensors").unlink()
    assert "\n" not in assert_error(cli(*peakd(teacher, "--student", student, "--output", "out")), code, student)


def test_layers_are_shared_without_swap_if_there_are_fewer_keys(cli, teachers):
    code, _, err = cli(*peakd("gqa", "--student", "shared:1x2", "--steps", "1", "--output", "out"))
    assert code == 0, err
    assert AutoModelForCausalLM.from_pretrained(teachers / "out").config.num_hidden_layers == 2
