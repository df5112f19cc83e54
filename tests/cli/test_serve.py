"""Test ``distillm serve``: the vLLM command of a recipe's student and teacher, and its start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from distillm_cli.cli.app import main
from tests import tiny
from tests.command_line import assert_error, call


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DISTILLM_VLLM", raising=False)
    return tmp_path / "cache"


def served(capsys, *words):
    code, answer, err = call(capsys, "serve", *words, "--json")
    assert code == 0, err
    return answer


def options(answer):
    words = answer["arguments"][3:]
    return dict(zip(words[::2], words[1::2], strict=True))


def test_teacher_is_served_by_a_pooling_server(capsys, tmp_path, cache):
    model = tiny.save(tmp_path / "teacher")
    answer = served(capsys, "teacher", "--model", model, "--set", "teacher.dtype=bf16")
    assert answer["arguments"][:3] == ["vllm", "serve", model]
    found = options(answer)
    assert (found["--dtype"], found["--runner"], found["--convert"]) == ("bfloat16", "pooling", "embed")
    assert json.loads(found["--pooler-config"]) == {
        "task": "token_embed", "tok_pooling_type": "ALL", "use_activation": False
    }  # fmt: skip
    assert (found["--host"], found["--port"], answer["url"]) == ("127.0.0.1", "8001", "http://127.0.0.1:8001")
    assert answer["environment"] == {}


def test_student_is_served_with_the_length_and_dtype_of_the_run(capsys, tmp_path, cache):
    student = tiny.save(tmp_path / "student")
    answer = served(
        capsys, "rollouts", "--model", student, "--set", "student.dtype=fp32", "--set", "data.max_length=48",
        "--set", "rollout.server=http://127.0.0.1:9001",
    )  # fmt: skip
    found = options(answer)
    assert answer["arguments"][2] == student
    assert (found["--dtype"], found["--max-model-len"], found["--port"]) == ("float32", "48", "9001")
    assert answer["environment"] == {"VLLM_SERVER_DEV_MODE": "1"}
    assert answer["line"].startswith("VLLM_SERVER_DEV_MODE=1 vllm serve ")


def test_student_that_the_run_builds_is_saved_for_the_server(capsys, cache):
    answer = served(capsys, "rollouts", "--recipe", "quickstart")
    place = Path(answer["arguments"][2])
    assert place.parent == cache / "students"
    model = AutoModelForCausalLM.from_pretrained(place)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (2, 96)
    assert served(capsys, "rollouts", "--recipe", "quickstart") == answer, "the same student has the same directory"


def test_student_with_copied_layers_has_the_teachers_weights(capsys, tmp_path, cache):
    teacher = tiny.save(tmp_path / "teacher")
    answer = served(
        capsys, "rollouts", "--model", "layers:1", "--set", f"teacher.path={teacher}", "--set", "data.source=builtin"
    )
    saved = AutoModelForCausalLM.from_pretrained(answer["arguments"][2]).state_dict()
    own = AutoModelForCausalLM.from_pretrained(teacher).state_dict()
    assert (saved["lm_head.weight"].float() - own["lm_head.weight"]).abs().max() < 0.05


def test_line_is_printed_alone_on_stdout(capsys, tmp_path, cache):
    model = tiny.save(tmp_path / "teacher")
    capsys.readouterr()
    assert main(["serve", "teacher", "--model", model, "--", "--tensor-parallel-size", "4"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert out.endswith("--tensor-parallel-size 4\n")
    assert "vLLM" in err


def test_server_beyond_this_machine_is_warned_of(capsys, tmp_path, cache):
    student = tiny.save(tmp_path / "student")
    words = ["rollouts", "--model", student, "--set", "rollout.server=http://node7:8000"]
    _, answer, err = call(capsys, "serve", *words, "--json")
    assert options(answer)["--host"] == "node7"
    assert "VLLM_SERVER_DEV_MODE" in err


@pytest.mark.long
def test_start_replaces_the_process_by_the_server(tmp_path):
    program = tmp_path / "vllm"
    program.write_text('#!/bin/sh\necho "$VLLM_SERVER_DEV_MODE $*"\n')
    program.chmod(0o755)
    student = tiny.save(tmp_path / "student")
    command = [sys.executable, "-m", "distillm_cli", "serve", "rollouts", "--model", student, "--start", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DISTILLM_VLLM": str(program)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"1 serve {student} --dtype ")


def test_missing_program_is_an_error(capsys, tmp_path, monkeypatch, cache):
    monkeypatch.setenv("DISTILLM_VLLM", str(tmp_path / "none"))
    model = tiny.save(tmp_path / "teacher")
    capsys.readouterr()
    code = main(["serve", "teacher", "--model", model, "--start", "--debug"])
    assert code == 2
    assert "usage.no_vllm" in capsys.readouterr().err


def test_unknown_role_and_missing_model_are_errors(capsys, cache):
    assert_error(call(capsys, "serve", "student", "--json"), "usage.invalid_value", "rollouts or teacher")
    assert_error(call(capsys, "serve", "teacher", "--json"), "usage.no_model", "--model")


def test_encoder_decoder_is_not_served(capsys, tmp_path, cache):
    student = tiny.save(tmp_path / "t5", "t5")
    outcome = call(capsys, "serve", "rollouts", "--model", student, "--json")
    assert_error(outcome, "model.not_served", "encoder-decoder")
