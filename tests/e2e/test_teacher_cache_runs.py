"""Test the teacher cache: its reuse in a sweep, its choice, its errors, and signals while it is made."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from distillm_cli.cli.app import main
from distillm_cli.models.model_paths import BUILTIN_TEACHER
from distillm_cli.runs import cache_planning
from distillm_cli.teachers import teacher_cache
from tests.command_line import assert_error

SMALL = [
    "distill", "--teacher", "builtin", "--student", "random:1x32", "--data", "builtin", "--max-length", "64",
    "--dtype", "fp32", "--device", "cpu", "--batch-size", "8", "--steps", "12", "--json",
    "--set", "data.template=plain", "--set", "data.size=48", "--set", "eval.report_rows=0", "--set", "train.threads=1",
    "--set", "schedule.kind=off", "--set", "train.eval_steps=6", "--set", "data.valid_limit=8",
]  # fmt: skip


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    """Change to an empty directory. Return a function that distills: more options → (exit code, JSON object, stderr)."""
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


def test_second_run_of_a_sweep_reads_the_cache(cli, monkeypatch):
    digests = []
    digest = teacher_cache.teacher_digest

    def counted_digest(*arguments):
        digests.append(digest(*arguments))
        return digests[-1]

    monkeypatch.setattr(teacher_cache, "teacher_digest", counted_digest)
    results = []
    for alpha in (0.1, 0.3):
        code, result, err = cli("--teacher-cache", "disk", "--alpha", alpha, "--output", f"a{alpha}")
        assert code == 0, err
        results.append(result)
    first, second = (result["teacher_cache"] for result in results)
    assert (first["mode"], first["hit"], second["hit"]) == ("disk", False, True)
    assert first["rows"] == second["rows"] > 0
    assert first["place"] == second["place"]
    assert len(digests) == 1, "the teacher's weights are hashed once, by the first run"
    assert results[0]["teacher_tokens"] > 0
    assert results[1]["teacher_tokens"] == 0, "the second run reads the cache only"
    assert results[1]["report"]["teacher"]["valid_loss"] is not None, "the teacher is scored before it is freed"


def test_warm_cache_needs_only_the_head(cli, tmp_path):
    note = "loaded only the teacher's head"
    disk = ["--teacher-cache", "disk"]
    code, first, err = cli("--output", "first", *disk)
    assert code == 0, err
    assert note not in err
    code, second, err = cli("--output", "second", *disk, "--set", "eval.report_teacher=false")
    assert (code, second["teacher_tokens"]) == (0, 0), err
    assert note in err
    assert "teacher" not in second["report"]
    assert second["report"] == {name: found for name, found in first["report"].items() if name != "teacher"}
    one, two = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.equal(one[name], value) for name, value in two.items())

    # other rows: the rest of the teacher is loaded for their states
    code, other, err = cli("--output", "other", *disk, "--set", "data.size=40")
    assert (code, other["teacher_cache"]["hit"]) == (0, False), err
    assert other["teacher_tokens"] > 0
    assert note not in err
    code, checked, err = cli("--output", "memory", "--teacher-cache", "memory", "--set", "data.size=40")
    assert (code, checked["train_loss"]) == (0, pytest.approx(other["train_loss"], rel=1e-5)), err


def test_changed_teacher_is_loaded(cli, tmp_path):
    shutil.copytree(BUILTIN_TEACHER, tmp_path / "teacher")
    run = ["--teacher", "teacher", "--teacher-cache", "disk", "--set", "eval.report_teacher=false"]
    for output, expected in (("first", False), ("second", True)):
        code, _, err = cli("--output", output, *run)
        assert (code, "loaded only the teacher's head" in err) == (0, expected), err
    file = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).mul_(1.01)
    save_file(tensors, file, metadata={"format": "pt"})
    code, result, err = cli("--output", "third", *run)
    assert (code, result["teacher_cache"]["hit"], "only the teacher's head" in err) == (0, False, False), err


def test_warmed_cache_is_used_and_checked(cli, tmp_path):
    code, warmed, err = cli("--warm-teacher-cache")
    cache = warmed["teacher_cache"]
    assert (code, warmed["status"], cache["hit"]) == (0, "ok", False), err
    states = Path(cache["place"]) / "states.bin"
    assert cache["bytes"] == states.stat().st_size
    assert not (tmp_path / "runs").exists(), "nothing is trained"
    assert cli("--warm-teacher-cache")[1]["teacher_cache"]["hit"]

    code, result, err = cli("--output", "auto")
    assert (code, result["teacher_cache"]["mode"], result["teacher_tokens"]) == (0, "disk", 0), err

    content = bytearray(states.read_bytes())
    content[100] ^= 1
    states.write_bytes(content)
    outcome = cli("--output", "damaged")
    assert_error(outcome, "checkpoint.damaged", cache["place"], "--rebuild-teacher-cache")
    assert not (tmp_path / "damaged").exists(), "the error comes before anything is written"
    code, result, err = cli("--output", "damaged", "--rebuild-teacher-cache")
    assert (code, result["teacher_cache"]["mode"], result["teacher_cache"]["hit"]) == (0, "disk", False), err

    # the directory of this cache, with other rows
    other_rows = ["--teacher-cache", "disk", "--set", f"teacher.cache_dir={cache['place']}", "--set", "data.size=40"]
    assert_error(cli("--output", "stale", *other_rows), "checkpoint.changed", cache["place"], "rows")


def test_auto_caches_in_memory_and_resumes(cli, tmp_path):
    adaptive = [
        *("--set", "schedule.kind=adaptive", "--set", "schedule.phi=0.5", "--set", "schedule.capacity=16"),
        *("--set", "rollout.max_new_tokens=6", "--set", "train.save_steps=7", "--set", "train.keep=9"),
    ]
    code, full, err = cli("--output", "full", *adaptive)
    assert code == 0, err
    assert full["teacher_cache"]["mode"] == "memory"
    assert full["replay_steps"] > 0
    assert 0 < full["teacher_tokens"] < full["tokens"], "some rows and rollouts are trained on twice"
    (tmp_path / "full" / "checkpoints" / "step-000012").rename(tmp_path / "gone")
    before = weights(tmp_path / "full")
    code, resumed, err = cli("--output", "full", "--resume", *adaptive)
    assert (code, resumed["steps"]) == (0, 12), err
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path / "full").items())

    code, single_epoch, err = cli("--output", "once", "--steps", "2")
    assert (single_epoch["teacher_cache"]["mode"], single_epoch["teacher_cache"]["rows"]) == ("off", 0)
    assert "this run trains on every row once" in err


def test_auto_is_off_with_little_memory_also_on_resume(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_planning, "available_memory", lambda: 10_000)
    code, result, err = cli("--output", "out", "--set", "train.save_steps=7", "--set", "train.keep=9")
    assert (code, result["teacher_cache"]["mode"]) == (0, "off"), err
    assert "is more than a quarter of the 10.0 kB of free memory (--teacher-cache disk would store them in " in err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "checkpoints" / "step-000012").rename(tmp_path / "gone")
    before = weights(tmp_path / "out")
    code, resumed, err = cli("--output", "out", "--resume", "--set", "train.save_steps=7", "--set", "train.keep=9")
    assert (code, resumed["teacher_cache"]["mode"]) == (0, "off"), err
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path / "out").items())


def test_invalid_cache_directory_is_an_error(cli, tmp_path):
    (tmp_path / "file").write_text("no directory")
    directory_options = ["--teacher-cache", "disk", "--set", f"teacher.cache_dir={tmp_path / 'file'}"]
    assert_error(cli("--output", "out", *directory_options), "storage.failed", tmp_path / "file")
    assert not (tmp_path / "out").exists()
    outcome = cli("--teacher-cache", "memory", "--rebuild-teacher-cache", "--output", "out")
    assert_error(outcome, "usage.exclusive_options", "--rebuild-teacher-cache", "--teacher-cache memory")


def test_plan_predicts_the_cache_size(cli, capsys):
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
    cache = cli("--warm-teacher-cache")[1]["teacher_cache"]
    assert cache["bytes"] == memory["teacher_cache"]["bytes"] == disk["teacher_cache"]["bytes"]
    assert cache["place"] == disk["teacher_cache"]["place"]


def signal_when(argv, number, condition):
    """Run a command in a process and send it a signal when ``condition()`` is true.

    Return (exit code, the JSON object, stderr).
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-m", "distillm_cli", *map(str, argv)], **pipes) as process:
        while process.poll() is None and not condition():
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
    return process.returncode, json.loads(out), err


@pytest.mark.long
def test_sigint_before_the_first_step_writes_nothing(tmp_path):
    """Check SIGINT while the teacher fills a cache on disk."""
    output, cache = tmp_path / "out", tmp_path / "cache"
    options = ["--set", "data.size=20000", "--teacher-cache", "disk", "--set", f"teacher.cache_dir={cache}"]
    code, answer, err = signal_when(
        [*SMALL, *options, "--output", output], signal.SIGINT, lambda: cache.exists() and any(cache.iterdir())
    )
    assert (code, answer["code"], answer["error"]) == (130, 130, "interrupted")
    assert not list(output.glob("*"))
    assert "Traceback" not in err


@pytest.mark.long
def test_sigterm_while_warming_leaves_no_partial_cache(tmp_path):
    cache = tmp_path / "cache"
    options = ["--set", "data.size=20000", "--warm-teacher-cache", "--set", f"teacher.cache_dir={cache}"]
    code, answer, _ = signal_when(
        [*SMALL, *options], signal.SIGTERM, lambda: cache.exists() and any(cache.glob(".staging*"))
    )
    assert (code, answer["code"], answer["error"]) == (143, 143, "interrupted")
    assert f"{cache}/" in answer["message"]
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]


@pytest.mark.long
def test_sigterm_during_generate_prints_one_json_object(tmp_path):
    output = tmp_path / "responses.jsonl"
    argv = ["generate", "--model", "builtin", "--data", "builtin", "--template", "plain", "--batch-size", "2"]
    argv += ["--output", output, "--json"]
    code, answer, err = signal_when(argv, signal.SIGTERM, lambda: output.exists() and output.stat().st_size)
    assert (code, answer["status"], answer["code"], answer["error"]) == (143, "error", 143, "interrupted")
    assert "--resume" in answer["message"]
    assert "Traceback" not in err
