"""Watch runs: alive, finished, killed, interrupted, in a stage, and while lines are being written."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distillm_cli.cli.app import main
from distillm_cli.runs.output_dir import claimed
from distillm_cli.runs.watch import RunWatcher
from tests.codes import raises_code
from tests.command_line import assert_error, call

SETTINGS = ("train.save_steps=4", "train.eval_steps=3", "train.log_steps=2", "eval.report_rows=2")
HEALTH = {"rollout_length": 23.4, "rollout_cut": 0.25, "top16_overlap": 0.5, "student_entropy": 1.25}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Train a tiny student for six steps. Return the output directory."""
    output = tmp_path_factory.mktemp("watch") / "run"
    sets = [f"--set={field}" for field in SETTINGS]
    argv = ["distill", "--teacher", "builtin", "--student", "random:1x16", "--data", "builtin", "--steps", "6"]
    assert (
        main(
            [
                *argv,
                "--schedule",
                "off",
                "--set=data.template=plain",
                "--set=data.size=64",
                "--set=data.valid_limit=8",
                *sets,
                "--output",
                str(output),
                "--quiet",
            ]
        )
        == 0
    )
    return output


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """Return a copy of the finished run."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def killed(run) -> Path:
    """Return the run as a killed process leaves it: no result, no model, and a part of a line."""
    for name in ("result.json", "model.safetensors", "README.md"):
        (run / name).unlink()
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 8, "epoch": 0.5, "so')
    return run


def add(run: Path, **line) -> None:
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def picture(capsys, run: Path) -> str:
    """Return what ``distillm watch RUN`` prints into a pipe, with single spaces."""
    capsys.readouterr()
    assert main(["watch", str(run)]) == 0
    return re.sub(r" +", " ", capsys.readouterr().out)


def test_finished_run_shows_steps_and_scores(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, found, _ = call(capsys, "watch", run, "--json")
    assert code == 0
    assert (found["state"], found["step"], found["steps"], found["checkpoints"]) == ("finished", 6, 6, [6])
    result = json.loads((run / "result.json").read_text())
    assert found["valid_loss"] == pytest.approx(result["valid_loss"], rel=1e-6)
    text = picture(capsys, run)
    assert "finished · step 6 of 6" in text
    assert "builtin → random:1x16" in text
    assert "student after" in text
    assert "teacher" in text


def test_killed_run_is_recognized_and_half_a_line_ignored(killed, capsys):
    code, found, _ = call(capsys, "watch", killed, "--json")
    assert code == 0
    assert (found["state"], found["step"]) == ("ended without a result", 6)
    assert f"distillm distill --resume --output {killed}" in picture(capsys, killed)


def test_interrupted_run_names_the_command_that_resumes(killed, capsys):
    (state,) = (killed / "checkpoints").glob("*/state.json")
    content = json.loads(state.read_text())
    content["progress"]["reason"] = "interrupted"
    state.write_text(json.dumps(content))
    assert "interrupted · step 6" in picture(capsys, killed)


def test_result_of_an_earlier_run_is_not_shown(run):
    later = time.time() + 60
    os.utime(run / "recipe.yaml", (later, later))  # as a resume writes it
    assert RunWatcher(run).look().state == "ended without a result"


def test_locked_directory_is_a_running_run(killed):
    watcher = RunWatcher(killed)
    with claimed(killed):
        assert watcher.look().state == "running"
        (killed / "metrics.jsonl").write_text("")
        assert watcher.look().state == "starting"
    assert watcher.look().state == "ended without a result"


def test_watcher_reads_new_lines_and_replaced_files(killed):
    watcher = RunWatcher(killed)
    first = watcher.look()
    assert first.step == 6
    file = killed / "metrics.jsonl"
    whole = file.read_text().splitlines(keepends=True)[:-1]
    file.write_text("".join(whole))
    step = {"source": "rollout", "loss": 1.5, "lr": 1e-3, "grad_norm": 1.0, "phi": 0.5, "tokens": 10, "seconds": 0.1}
    add(killed, step=8, epoch=1.0, **step)
    second = watcher.look()
    assert second.step == 8
    assert second.as_json()["phi"] == 0.5
    replacement = killed / "new"
    replacement.write_text("".join(whole[:1]))
    replacement.rename(file)  # a resume from an earlier checkpoint
    third = watcher.look()
    assert third.step == json.loads(whole[0])["step"]
    assert third.reading != second.reading


def test_health_and_alarms_are_shown(run, capsys):
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    add(run, **line | {"step": 6} | HEALTH)
    add(run, alarm="lengths", step=6, message="most rollouts are cut", cure="raise rollout.max_new_tokens")
    text = picture(capsys, run)
    assert "rollouts length 23 · cut 25%" in text
    assert "agreement top-16 overlap 50%" in text
    assert "entropy student 1.25" in text
    assert "alarm at step 6: most rollouts are cut; raise rollout.max_new_tokens" in text
    assert call(capsys, "watch", run, "--json")[1]["alarms"][0]["name"] == "lengths"


def test_stage_before_the_run_is_shown(killed, capsys):
    stage = killed / "sft"
    stage.mkdir()
    for name in ("metrics.jsonl", "recipe.yaml"):
        (killed / name).rename(stage / name)
    assert "stage sft · step 6 of 6" in picture(capsys, killed)


@pytest.mark.parametrize(("status", "state"), [("done", "finished"), ("started", "ended without a result")])
def test_pipeline_shows_its_newest_stage(status, state, run, tmp_path, capsys):
    stage = tmp_path / "pipeline" / "distill"
    shutil.copytree(run, stage)
    (stage / "stage.json").write_text(json.dumps({"status": "done"}))
    (stage.parent / "eval").mkdir()
    (stage.parent / "eval" / "stage.json").write_text(json.dumps({"status": status}))
    text = picture(capsys, stage.parent)
    assert f"{state} · stage distill · step 6 of 6" in text
    assert ("Run the command of the pipeline again" in text) == (status == "started")


def test_broken_recipe_leaves_the_figures(run):
    (run / "recipe.yaml").write_text("train: [")
    view = RunWatcher(run).look()
    assert (view.step, view.started.steps) == (6, 0)


@pytest.mark.parametrize("content", ["absent", "empty", "file", "runs"])
def test_directory_without_a_run_is_one_line(content, tmp_path, finished, capsys):
    place = tmp_path / "place"
    mentions = [str(place)]
    if content == "empty":
        place.mkdir()
    elif content == "file":
        place.write_text("")
    elif content == "runs":
        place = finished.parent
        mentions = [f"did you mean {finished}?"]
    assert_error(call(capsys, "watch", place, "--json"), "usage.no_run", *mentions)


def test_unreadable_manifest_is_one_line(run):
    (run / "manifest.json").write_text("{")
    with raises_code("checkpoint.damaged", "manifest.json"):
        RunWatcher(run)


def test_live_display_ends_with_the_run(killed):
    """Watch a run in a terminal, and end the run."""
    result = {"report": {"student_after": {"valid_loss": 1.5}}}
    shown = b""
    with claimed(killed):
        leader, follower = pty.openpty()
        env = {**os.environ, "COLUMNS": "100", "TERM": "xterm"}
        command = [sys.executable, "-m", "distillm_cli", "watch", str(killed)]
        process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=env)
        os.close(follower)
        deadline = time.monotonic() + 60
        while b"running" not in shown and time.monotonic() < deadline:
            if select.select([leader], [], [], 0.1)[0]:
                shown += os.read(leader, 65536)
        assert b"running" in shown
        assert process.poll() is None
        (killed / "result.json").write_text(json.dumps(result))
    while time.monotonic() < deadline:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the terminal was closed
            break
        if not part:
            break
        shown += part
    os.close(leader)
    assert process.wait(timeout=30) == 0, signal.strsignal(-process.returncode)
    assert b"finished" in shown
