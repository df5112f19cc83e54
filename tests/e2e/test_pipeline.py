"""Test ``distillm run``: pipelines interrupted in each stage and continued, changed stages, and damaged records."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from distillm_cli.cli.app import main
from tests.command_line import assert_error

WORDS = ["alpha", "beta", "gamma", "delta", "kappa", "sigma", "omega", "theta", "iota", "zeta"]
STAGES = ("teacher", "student", "samples", "distill", "eval")
RECIPE = """
defaults:
  data: {source: rows, template: plain, max_length: 64}
  student: {dtype: fp32}
  teacher: {dtype: fp32}
  rollout: {max_new_tokens: 8}
  train: {seed: 3, threads: 1, device: cpu, batch_size: 8, eval_steps: 10, save_steps: 10}
  eval: {report_rows: 4, max_new_tokens: 8, seeds: [1], batch_size: 1}
stages:
  teacher: {verb: sft, student: {path: "random:2x48", tokenizer: chars}, train: {steps: 20, lr: 5e-3}}
  student: {verb: sft, student: {path: "random:1x32", tokenizer: stage:teacher}, train: {steps: 20, lr: 5e-3}}
  samples: {verb: generate, model: stage:teacher, limit: 48}
  distill:
    verb: distill
    teacher: {path: stage:teacher}
    student: {path: stage:student}
    data: {source: stage:samples, valid: rows}
    schedule: {epsilon: -10, capacity: 16, levels: 2}
    train: {steps: 30, lr: 5e-3}
  eval: {verb: eval, models: [stage:distill, stage:student], eval: {suites: [rows/test.jsonl, rows/valid.jsonl]}}
"""


def rows(n, offset):
    picked = [(WORDS[(i + offset) % 10], WORDS[(i * 3 + offset) % 10]) for i in range(n)]
    return "".join(
        json.dumps({"instruction": "Loud.", "input": f"{a} {b}", "output": f"{a} {b}".upper()}) + "\n"
        for a, b in picked
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Write rows and a pipeline with all commands, and run it in ``full``. Return the directory."""
    workdir, previous = tmp_path_factory.mktemp("home"), Path.cwd()
    (workdir / "rows").mkdir()
    for name, n, offset in (("train", 64, 0), ("valid", 10, 3), ("test", 10, 6)):
        (workdir / "rows" / f"{name}.jsonl").write_text(rows(n, offset), encoding="utf-8")
    (workdir / "all.yaml").write_text(RECIPE, encoding="utf-8")
    os.chdir(workdir)
    try:
        assert main(["run", "all.yaml", "--output", "full", "--quiet"]) == 0
    finally:
        os.chdir(previous)
    return workdir


@pytest.fixture
def cli(workdir, capsys, monkeypatch):
    """Return a function that runs a command line next to the recipe: (exit code, the JSON object, stderr)."""
    monkeypatch.chdir(workdir)

    def call(*argv):
        capsys.readouterr()
        code = main([str(word) for word in (*argv, "--json")])
        out, err = capsys.readouterr()
        return code, json.loads(out), err

    return call


@pytest.fixture
def finished_run(workdir, tmp_path_factory):
    """Copy the finished run, to be changed. Return the copy."""
    directory = workdir / tmp_path_factory.mktemp("copy").name
    shutil.copytree(workdir / "full", directory)
    return directory


def weights(directory):
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


def statuses(result):
    return {name: stage["status"] for name, stage in result["stages"].items()}


def dry_run_states(cli, *argv):
    code, result, err = cli("run", "all.yaml", *argv, "--dry-run")
    assert code == 0, err
    return {name: stage["state"] for name, stage in result["stages"].items()}


def interrupt_when(ready):
    """Send this process SIGINT as soon as ``ready()`` is true. Return an event that stops the thread, and the thread."""
    stop = threading.Event()

    def watch():
        while not stop.is_set():
            if ready():
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.002)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return stop, thread


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def test_continued_pipeline_matches_uninterrupted_run(workdir, cli, capsys):
    out = workdir / "interrupted"
    conditions = {
        "teacher": lambda: '"step": 5,' in read(out / "teacher" / "metrics.jsonl"),
        "student": lambda: '"step": 3,' in read(out / "student" / "metrics.jsonl"),
        "samples": lambda: lines(out / "samples" / "samples.jsonl") >= 8,
        "distill": lambda: '"step": 12,' in read(out / "distill" / "metrics.jsonl"),
        "eval": lambda: any(out.glob("eval/*/*/*/results.json")),
    }
    for name, condition in conditions.items():
        stop, thread = interrupt_when(condition)
        code, result, err = cli("run", "all.yaml", "--output", "interrupted")
        stop.set()
        thread.join()
        assert (code, result["error"]) == (130, "interrupted"), (name, err)
        assert result["message"].startswith(f"stage {name}: "), result
        assert "--resume" not in err, "a pipeline is continued by the same command"
        assert dry_run_states(cli, "--output", "interrupted")[name] == "to resume"
    code, result, err = cli("run", "all.yaml", "--output", "interrupted")
    assert code == 0, err
    assert statuses(result) == dict.fromkeys(STAGES[:4], "skipped") | {"eval": "done"}
    assert "is already scored" in err
    for name in ("teacher", "student", "distill"):
        full, interrupted = weights(workdir / "full" / name), weights(out / name)
        assert all(torch.equal(full[key], interrupted[key]) for key in full), name
    assert read(workdir / "full/samples/samples.jsonl") == read(out / "samples/samples.jsonl")
    assert rouge_scores(workdir / "full") == rouge_scores(out)


@pytest.mark.long
def test_interrupted_pipeline_continues_after_move(workdir, cli, monkeypatch, tmp_path):
    """Check that a stage identifies its inputs by what they were made from, not by their paths."""
    out = workdir / "moving"
    stop, thread = interrupt_when(lambda: '"step": 12,' in read(out / "distill" / "metrics.jsonl"))
    code, _, err = cli("run", "all.yaml", "--output", "moving")
    stop.set()
    thread.join()
    assert code == 130, err
    out.rename(tmp_path / "moved")
    for name in ("rows", "all.yaml"):
        (tmp_path / name).symlink_to(workdir / name)
    monkeypatch.chdir(tmp_path)
    code, result, err = cli("run", "all.yaml", "--output", "moved")
    assert code == 0, err
    assert statuses(result) == dict.fromkeys(STAGES[:3], "skipped") | {"distill": "done", "eval": "done"}
    assert "distill (distill) · resumes" in err
    full, moved = weights(workdir / "full/distill"), weights(tmp_path / "moved/distill")
    assert all(torch.equal(full[key], moved[key]) for key in full)


@pytest.mark.long
def test_interrupted_sft_of_a_distill_stage_continues(workdir, cli):
    """Check an interruption of the fine-tuning before a distillation, which has its own checkpoints."""
    stage = "\n".join(line for line in RECIPE.splitlines() if not line.startswith("  student: {verb"))
    stage = (
        stage[: stage.index("  samples:")]
        + """
  distill:
    verb: distill
    teacher: {path: stage:teacher}
    student: {path: "random:1x32", sft_epochs: 4}
    schedule: {kind: "off"}
    train: {steps: 4}
"""
    )
    (workdir / "tuned.yaml").write_text(stage, encoding="utf-8")
    metrics = workdir / "tuned" / "distill" / "sft" / "metrics.jsonl"
    stop, thread = interrupt_when(lambda: '"step": 12,' in read(metrics))
    code, _, err = cli("run", "tuned.yaml", "--output", "tuned")
    stop.set()
    thread.join()
    assert code == 130, err
    stopped = read(metrics).splitlines()
    code, result, err = cli("run", "tuned.yaml", "--output", "tuned")
    assert code == 0, err
    assert statuses(result) == {"teacher": "skipped", "distill": "done"}
    assert read(metrics).splitlines()[: len(stopped)] == stopped, (
        "the earlier lines are unchanged, including their times"
    )


def read(path):
    return path.read_text(encoding="utf-8") if path.exists() else ""


def rouge_scores(directory):
    """Return ROUGE-L of every scored suite, independent of the names of the model directories."""
    files = sorted(directory.glob("eval/*/*/*/results.json"))
    assert len(files) == 4
    return [(p.parts[-3], json.loads(p.read_text())["rouge_l"]) for p in files]


@pytest.mark.long
def test_killed_pipeline_continues(workdir, cli):
    """Check SIGKILL: the same command continues the stage, or restarts it if there is no checkpoint."""
    process = subprocess.Popen(
        [sys.executable, "-m", "distillm_cli", "run", "all.yaml", "--output", "killed", "--quiet"],
        cwd=workdir, env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not any((workdir / "killed/student/checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    code, result, err = cli("run", "all.yaml", "--output", "killed")
    assert code == 0, err
    assert statuses(result) == dict.fromkeys(STAGES, "done") | {"teacher": "skipped"}
    assert "student (sft) · resumes" in err
    full, killed = weights(workdir / "full/distill"), weights(workdir / "killed/distill")
    assert all(torch.equal(full[key], killed[key]) for key in full)


def test_finished_pipeline_is_skipped(cli, finished_run):
    code, result, err = cli("run", "all.yaml", "--output", finished_run)
    assert code == 0
    assert statuses(result) == dict.fromkeys(STAGES, "skipped")
    assert err.count("already done") == 10, "a line for each stage, and the table"
    assert result["stages"]["distill"]["result"]["steps"] == 30
    assert set(result) == {"command", "status", "output", "wall_s", "stages"}


def test_changed_stage_and_its_readers_run_again(cli, finished_run, workdir):
    changed = ("--output", finished_run, "--set", "stages.student.train.lr=4e-3")
    assert dry_run_states(cli, *changed) == dict.fromkeys(STAGES, "done") | dict.fromkeys(
        ("student", "distill", "eval"), "changed"
    )
    (finished_run / "student" / "notes.txt").write_text("mine")
    code, result, err = cli("run", "all.yaml", *changed)
    assert code == 0, err
    assert statuses(result) == dict.fromkeys(STAGES, "done") | {"teacher": "skipped", "samples": "skipped"}
    assert "student (sft) · changed: train.lr 0.005 → 0.004" in err
    assert (finished_run / "student" / "notes.txt").read_text() == "mine", "only files of the pipeline are replaced"
    old, new = weights(workdir / "full/distill"), weights(finished_run / "distill")
    assert any(not torch.equal(old[key], new[key]) for key in old)
    assert dry_run_states(cli, *changed) == dict.fromkeys(STAGES, "done")


def test_fields_without_effect_do_not_change_stages(cli, finished_run):
    fields = (
        "train.log_steps=5",
        "train.keep=1",
        "teacher.cache_dir=elsewhere",
        "eval.report_rows=2",
        "data.workers=0",
    )
    sets = [word for field in fields for word in ("--set", f"defaults.{field}")]
    assert set(dry_run_states(cli, "--output", finished_run, *sets).values()) == {"done"}
    assert dry_run_states(cli, "--output", finished_run, "--set", "stages.eval.eval.seeds=[2]")["eval"] == "changed"


def test_changed_rows_change_the_stage(cli, finished_run, workdir):
    rows_file = workdir / "rows" / "test.jsonl"
    before = rows_file.read_bytes()
    try:
        rows_file.write_bytes(before.replace(b"IOTA", b"IOTO"))
        states = dry_run_states(cli, "--output", finished_run)
        assert states["eval"] == "changed"
        rows_file.touch()
        rows_file.write_bytes(before)
        assert set(dry_run_states(cli, "--output", finished_run).values()) == {"done"}, (
            "the content counts, not the time"
        )
    finally:
        rows_file.write_bytes(before)


def test_stage_with_missing_output_runs_again(cli, finished_run):
    (finished_run / "samples" / "samples.jsonl").unlink()
    states = dry_run_states(cli, "--output", finished_run)
    assert (states["teacher"], states["samples"], states["distill"]) == ("done", "to resume", "changed")
    (finished_run / "student" / "stage.json").write_text("{")
    outcome = cli("run", "all.yaml", "--output", finished_run)
    assert_error(outcome, "checkpoint.damaged", finished_run / "student")


def test_edited_row_makes_later_stages_run_again(cli, finished_run):
    rows_file = finished_run / "samples" / "samples.jsonl"
    before = rows_file.read_text(encoding="utf-8")
    first = json.loads(before.splitlines()[0])["output"]
    edited = before.replace(json.dumps(first), json.dumps(first.swapcase()), 1)
    assert edited != before
    assert len(edited) == len(before)
    rows_file.write_text(edited, encoding="utf-8")
    assert dry_run_states(cli, "--output", finished_run)["samples"] == "to resume"
    code, result, err = cli("run", "all.yaml", "--output", finished_run)
    assert code == 0, err
    assert statuses(result) == dict.fromkeys(STAGES[:2], "skipped") | dict.fromkeys(STAGES[2:], "done")
    assert rows_file.read_text(encoding="utf-8") == edited, "the edit is not overwritten"
    assert set(dry_run_states(cli, "--output", finished_run).values()) == {"done"}


def test_earlier_responses_are_backed_up(cli, finished_run):
    """Check that responses, which the user may have edited, are backed up before the stage runs again."""
    rows_file = finished_run / "samples" / "samples.jsonl"
    edited = rows_file.read_text(encoding="utf-8").splitlines(keepends=True)[1:]
    rows_file.write_text("".join(edited), encoding="utf-8")
    code, _, err = cli("run", "all.yaml", "--output", finished_run, "--only", "samples")
    assert code == 0, err
    assert f"moved the earlier responses to {rows_file.with_name('samples-before-1.jsonl')}" in err
    assert rows_file.with_name("samples-before-1.jsonl").read_text(encoding="utf-8") == "".join(edited)
    assert len(rows_file.read_text(encoding="utf-8").splitlines()) == 48
    changed = ("--set", "stages.samples.limit=40")
    assert cli("run", "all.yaml", "--output", finished_run, "--only", "samples", *changed)[0] == 0
    assert rows_file.with_name("samples-before-2.jsonl").exists()


@pytest.mark.parametrize(
    ("stage", "missing"),
    [("teacher", "tokenizer.json"), ("distill", "tokenizer_config.json"), ("eval", "predictions-seed1.jsonl")],
)
def test_every_missing_file_is_detected(cli, finished_run, workdir, stage, missing):
    path = next((finished_run / stage).rglob(missing))
    before = path.read_bytes()
    path.unlink()
    assert dry_run_states(cli, "--output", finished_run)[stage] == "to resume"
    code, result, err = cli("run", "all.yaml", "--output", finished_run)
    assert code == 0, err
    assert {name for name, status in statuses(result).items() if status == "done"} == {stage}, (
        "its output is the same, so its readers do not run"
    )
    assert path.read_bytes() == before


@pytest.mark.long
def test_old_scores_are_removed_from_a_moved_pipeline(cli, finished_run, tmp_path):
    finished_run.rename(tmp_path / "moved")
    code, _, err = cli("run", "all.yaml", "--output", tmp_path / "moved", "--set", "stages.distill.train.lr=4e-3")
    assert code == 0, err
    assert len(list((tmp_path / "moved").glob("eval/*/*/*/results.json"))) == 4
    assert {path.name for path in (tmp_path / "moved/eval").iterdir() if path.is_dir()} == {"distill", "student"}


def test_damaged_record_is_an_error(cli, finished_run):
    record = finished_run / "student" / "stage.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"of": {}, "fingerprint": "0"}))
    outcome = cli("run", "all.yaml", "--output", finished_run)
    assert_error(outcome, "checkpoint.damaged", record, finished_run / "student")


def test_pipeline_of_the_user_is_not_overwritten(cli, workdir, tmp_path):
    (tmp_path / "mine").mkdir()
    user_file = tmp_path / "mine" / "pipeline.yaml"
    user_file.write_text(RECIPE, encoding="utf-8")
    outcome = cli("run", user_file, "--output", user_file.parent)
    assert_error(outcome, "usage.output_exists", user_file)
    assert [path.name for path in user_file.parent.iterdir()] == ["pipeline.yaml"]
    assert user_file.read_text(encoding="utf-8") == RECIPE


def test_record_with_sizes_only_is_read(cli, finished_run):
    """Check records of earlier versions, which have file sizes only."""
    for path in finished_run.glob("*/stage.json"):
        record = json.loads(path.read_text())
        record["files"] = {name: (path.parent / name).stat().st_size for name in record["files"]}
        path.write_text(json.dumps(record))
    assert set(dry_run_states(cli, "--output", finished_run).values()) == {"done"}
    rows_file = finished_run / "samples" / "samples.jsonl"
    rows_file.write_text(rows_file.read_text() + "\n")
    assert dry_run_states(cli, "--output", finished_run)["samples"] == "to resume"


def test_only_and_from_select_stages(cli, workdir, finished_run):
    outcome = cli("run", "all.yaml", "--output", "new", "--only", "distill")
    assert_error(outcome, "usage.stage_not_made", "stage distill", "stage teacher", "new/teacher")
    assert not (workdir / "new").exists(), "nothing was written"
    code, result, _ = cli("run", "all.yaml", "--output", "new", "--only", "teacher")
    assert (code, statuses(result)) == (0, {"teacher": "done"})
    code, result, err = cli("run", "all.yaml", "--output", finished_run, "--from", "distill")
    assert statuses(result) == {"distill": "skipped", "eval": "skipped"}
    code, result, err = cli(
        "run", "all.yaml", "--output", finished_run, "--only", "eval", "--set", "stages.distill.train.lr=1e-3"
    )
    assert (code, statuses(result)) == (0, {"eval": "skipped"})
    assert "warning: stage distill is not run again, although it has changed: train.lr 0.005 → 0.001" in err


def test_dry_run_shows_origins_and_is_a_valid_recipe(cli, workdir, capsys, monkeypatch):
    monkeypatch.chdir(workdir)
    argv = ["run", "all.yaml", "--output", "full", "--set", "defaults.train.seed=4", "--dry-run"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "  teacher:  # changed: train.seed 3 → 4\n" in text
    assert "  eval:  # changed: stage distill and stage student are to run first\n" in text
    shown = [" ".join(line.split()) for line in text.splitlines()]
    assert "lr: 0.005 # all.yaml:10" in shown
    assert "warmup: 0.0 # auto: 0 for a model built from scratch" in shown
    assert "seed: 4 # --set (all.yaml:7: 3)" in shown
    (workdir / "written.yaml").write_text(text)
    from distillm_cli.config.pipeline_recipe import load_pipeline
    from distillm_cli.runs.defaults import fitted_pipeline

    reloaded = load_pipeline(Path("written.yaml"))
    first = fitted_pipeline(load_pipeline(Path("all.yaml"), ["defaults.train.seed=4"]))
    assert [(s.config, s.resolved.recipe) for s in reloaded.stages] == [
        (s.config, s.resolved.recipe) for s in first.stages
    ]
    assert list(yaml.safe_load(text)["stages"]) == list(STAGES)


def test_stage_matches_its_command_alone(cli, workdir):
    """Check that the recipe of a stage, run by its own command, gives the same weights."""
    argv = ("distill", "--recipe", workdir / "full/distill/recipe.yaml", "--output", "alone", "--quiet")
    code, _, err = cli(*argv)
    assert code == 0, err
    alone, full = weights(workdir / "alone"), weights(workdir / "full/distill")
    assert all(torch.equal(alone[key], full[key]) for key in alone)


def test_foreign_directory_is_an_error(cli, workdir):
    directory = workdir / "mine" / "distill"
    directory.mkdir(parents=True)
    (directory / "thesis.txt").write_text("mine")
    assert_error(cli("run", "all.yaml", "--output", "mine"), "usage.output_exists", "mine/distill")
    assert [p.name for p in (workdir / "mine").iterdir()] == ["distill"], "the error comes before the first stage"


def test_stage_reading_its_own_output_is_an_error(cli, finished_run):
    before = weights(finished_run / "student")
    sets = (f"path={finished_run.name}/student", "tokenizer=null")
    options = [word for field in sets for word in ("--set", f"stages.student.student.{field}")]
    outcome = cli("run", "all.yaml", "--output", finished_run.name, "--only", "student", "--quiet", *options)
    assert_error(outcome, "usage.output_is_input", f"{finished_run.name}/student", "--model")
    after = weights(finished_run / "student")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_missing_file_is_an_error_before_the_first_stage(cli, workdir):
    outcome = cli("run", "all.yaml", "--output", "gone", "--set", "stages.eval.eval.suites=rows/tset.jsonl")
    assert_error(outcome, "data.not_found", "stage eval", "eval.suites = rows/tset.jsonl")
    assert not (workdir / "gone").exists()
