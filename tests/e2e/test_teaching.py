"""The teacher's cache as typed: a sweep pays for the teacher once, and what is wrong with a cache is said in one line."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from distillm_cli.cli.app import main
from distillm_cli.runs import cache_planning

SMALL = [
    "distill", "--teacher", "builtin", "--student", "random:1x32", "--data", "builtin", "--max-length", "64",
    "--dtype", "fp32", "--device", "cpu", "--batch-size", "8", "--steps", "12", "--json",
    "--set", "data.template=plain", "--set", "data.size=48", "--set", "eval.report_rows=0", "--set", "train.threads=1",
    "--set", "schedule.kind=off", "--set", "train.eval_steps=6",
]  # fmt: skip


@pytest.fixture
def typed(capsys, tmp_path, monkeypatch):
    """Types a command line in an empty directory; (exit code, the JSON object, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILLM_CACHE", str(tmp_path / "cache"))

    def call(*more):
        capsys.readouterr()
        code = main([str(word) for word in (*SMALL, *more)])
        out, err = capsys.readouterr()
        return code, json.loads(out), err

    return call


def weights(output):
    return AutoModelForCausalLM.from_pretrained(output).state_dict()


def test_a_sweep_over_alpha_pays_for_the_teacher_once(typed):
    ran = []
    for alpha in (0.1, 0.3):
        code, result, err = typed("--teacher-cache", "disk", "--alpha", alpha, "--output", f"a{alpha}")
        assert code == 0, err
        ran.append(result)
    first, second = (result["teacher_cache"] for result in ran)
    assert (first["mode"], first["hit"], second["hit"]) == ("disk", False, True)
    assert first["rows"] == second["rows"] > 0
    assert first["place"] == second["place"]
    assert ran[0]["teacher_tokens"] > 0
    assert ran[1]["teacher_tokens"] == 0, "the second run reads, and asks the teacher nothing"
    assert ran[1]["report"]["teacher"]["valid_loss"] is not None, "the report came before the teacher left"


def test_a_cache_warmed_beforehand_is_read_by_auto_and_refused_when_damaged(typed, tmp_path):
    code, warmed, err = typed("--warm-teacher-cache")
    made = warmed["teacher_cache"]
    assert (code, warmed["status"], made["hit"]) == (0, "ok", False), err
    states = Path(made["place"]) / "states.bin"
    assert made["bytes"] == states.stat().st_size
    assert not (tmp_path / "runs").exists(), "nothing is trained"
    assert typed("--warm-teacher-cache")[1]["teacher_cache"]["hit"]

    code, result, err = typed("--output", "auto")
    assert (code, result["teacher_cache"]["mode"], result["teacher_tokens"]) == (0, "disk", 0), err

    content = bytearray(states.read_bytes())
    content[100] ^= 1
    states.write_bytes(content)
    code, answer, err = typed("--output", "damaged")
    assert (code, answer["code"]) == (5, 5)
    assert made["place"] in answer["message"]
    assert answer["message"].endswith("rebuild it with --rebuild-teacher-cache")
    assert not (tmp_path / "damaged").exists(), "refused before anything was written"
    code, result, err = typed("--output", "damaged", "--rebuild-teacher-cache")
    assert (code, result["teacher_cache"]["mode"], result["teacher_cache"]["hit"]) == (0, "disk", False), err

    # the cache itself named as the place, with other rows
    elsewhere = ["--set", f"teacher.cache_dir={made['place']}", "--set", "data.size=40", "--teacher-cache", "disk"]
    code, answer, _ = typed("--output", "stale", *elsewhere)
    assert code == 5
    assert "belongs to other rows" in answer["message"]


def test_auto_keeps_rows_that_come_back_and_the_resumed_run_ends_with_the_same_weights(typed, tmp_path):
    adaptive = [
        *("--set", "schedule.kind=adaptive", "--set", "schedule.phi=0.5", "--set", "schedule.capacity=16"),
        *("--set", "rollout.max_new_tokens=6", "--set", "train.save_steps=7", "--set", "train.keep=9"),
    ]
    code, whole, err = typed("--output", "whole", *adaptive)
    assert code == 0, err
    assert whole["teacher_cache"]["mode"] == "memory"
    assert whole["replay_steps"] > 0
    assert 0 < whole["teacher_tokens"] < whole["tokens"], "some rows and rollouts came twice"
    (tmp_path / "whole" / "checkpoints" / "step-000012").rename(tmp_path / "gone")
    before = weights(tmp_path / "whole")
    code, again, err = typed("--output", "whole", "--resume", *adaptive)
    assert (code, again["steps"]) == (0, 12), err
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path / "whole").items())

    code, once, err = typed("--output", "once", "--steps", "2")
    assert (once["teacher_cache"]["mode"], once["teacher_cache"]["rows"]) == ("off", 0)
    assert "this run trains on every row once" in err


def test_auto_keeps_nothing_where_memory_is_short_and_a_resume_elsewhere_keeps_to_that(typed, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_planning, "available_memory", lambda: 10_000)
    code, result, err = typed("--output", "out", "--set", "train.save_steps=7", "--set", "train.keep=9")
    assert (code, result["teacher_cache"]["mode"]) == (0, "off"), err
    assert "is more than a quarter of the 10.0 kB of free memory (--teacher-cache disk would store them in " in err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "checkpoints" / "step-000012").rename(tmp_path / "gone")
    before = weights(tmp_path / "out")
    code, again, err = typed("--output", "out", "--resume", "--set", "train.save_steps=7", "--set", "train.keep=9")
    assert (code, again["teacher_cache"]["mode"]) == (0, "off"), err
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path / "out").items())


def test_a_place_that_cannot_hold_the_cache_ends_the_run_before_it_begins(typed, tmp_path):
    (tmp_path / "file").write_text("no directory")
    place = ["--teacher-cache", "disk", "--set", f"teacher.cache_dir={tmp_path / 'file'}"]
    code, answer, err = typed("--output", "out", *place)
    assert (code, answer["code"]) == (8, 8)
    assert err.splitlines()[-1].startswith(f"error: cannot write the teacher cache {tmp_path / 'file'}")
    assert not (tmp_path / "out").exists()
    code, answer, _ = typed("--teacher-cache", "memory", "--rebuild-teacher-cache", "--output", "out")
    assert (code, answer["message"]) == (
        2,
        "--rebuild-teacher-cache with --teacher-cache memory; use --teacher-cache disk",
    )


def test_plan_predicts_the_size_that_the_cache_then_has(typed, capsys):
    planned = {}
    for mode in ("memory", "disk", "off"):
        capsys.readouterr()
        assert main(["plan", *SMALL[1:], "--teacher-cache", mode]) == 0
        planned[mode] = json.loads(capsys.readouterr().out)
    memory, disk = planned["memory"], planned["disk"]
    assert memory["memory"]["teacher_states"] == memory["teacher_cache"]["bytes"] > 0
    assert memory["memory"]["total"] == planned["off"]["memory"]["total"] + memory["teacher_cache"]["bytes"]
    assert "teacher_states" not in disk["memory"]
    assert disk["teacher_cache"]["disk_free"] > disk["teacher_cache"]["bytes"]
    made = typed("--warm-teacher-cache")[1]["teacher_cache"]
    assert made["bytes"] == memory["teacher_cache"]["bytes"] == disk["teacher_cache"]["bytes"]
    assert made["place"] == disk["teacher_cache"]["place"]


def stopped(argv, number, until):
    """The program in a process of its own, sent a signal as soon as ``until()``: (exit code, its JSON object, stderr)."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-m", "distillm_cli", *map(str, argv)], **pipes) as process:
        while process.poll() is None and not until():
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
    return process.returncode, json.loads(out), err


def test_a_signal_before_the_first_step_says_that_nothing_is_written(tmp_path):
    """While the teacher fills a cache on disk, which takes a while for so many rows."""
    output, cache = tmp_path / "out", tmp_path / "cache"
    many = ["--set", "data.size=20000", "--teacher-cache", "disk", "--set", f"teacher.cache_dir={cache}"]
    code, answer, err = stopped(
        [*SMALL, *many, "--output", output], signal.SIGINT, lambda: cache.exists() and any(cache.iterdir())
    )
    assert (code, answer["code"]) == (130, 130)
    assert answer["message"] == "interrupted before the first step: nothing was written; start again"
    assert not list(output.glob("*"))
    assert "Traceback" not in err


def test_a_signal_while_a_cache_is_made_says_where_and_what_to_try(tmp_path):
    cache = tmp_path / "cache"
    many = ["--set", "data.size=20000", "--warm-teacher-cache", "--set", f"teacher.cache_dir={cache}"]
    code, answer, _ = stopped([*SMALL, *many], signal.SIGTERM, lambda: cache.exists() and any(cache.glob(".staging*")))
    assert (code, answer["code"]) == (143, 143)
    assert answer["message"].startswith(f"interrupted while computing the teacher cache; {cache}/")
    assert answer["message"].endswith("no incomplete cache was written; start again")
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]


def test_sigterm_ends_generate_with_one_json_object(tmp_path):
    output = tmp_path / "said.jsonl"
    argv = [
        "generate",
        "--model",
        "builtin",
        "--data",
        "builtin",
        "--template",
        "plain",
        "--batch-size",
        "2",
        "--output",
        output,
        "--json",
    ]
    code, answer, err = stopped(argv, signal.SIGTERM, lambda: output.exists() and output.stat().st_size)
    assert (code, answer["status"], answer["code"]) == (143, "error", 143)
    assert answer["message"].endswith("continue with --resume")
    assert "Traceback" not in err
