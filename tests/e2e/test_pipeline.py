"""``distillm run``, as typed: killed in each stage and continued, it ends where the uninterrupted run does."""

import json
import os
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
def home(tmp_path_factory):
    """A directory with rows, a recipe of all verbs, and one uninterrupted run of it in ``whole``."""
    home, here = tmp_path_factory.mktemp("home"), Path.cwd()
    (home / "rows").mkdir()
    for name, n, offset in (("train", 64, 0), ("valid", 10, 3), ("test", 10, 6)):
        (home / "rows" / f"{name}.jsonl").write_text(rows(n, offset), encoding="utf-8")
    (home / "all.yaml").write_text(RECIPE, encoding="utf-8")
    os.chdir(home)
    try:
        assert main(["run", "all.yaml", "--output", "whole", "--quiet"]) == 0
    finally:
        os.chdir(here)
    return home


@pytest.fixture
def typed(home, capsys, monkeypatch):
    """Types a command line beside the recipe: (exit code, the JSON object, stderr)."""
    monkeypatch.chdir(home)

    def call(*argv):
        capsys.readouterr()
        code = main([str(word) for word in (*argv, "--json")])
        out, err = capsys.readouterr()
        return code, json.loads(out), err

    return call


@pytest.fixture
def copied(home, tmp_path_factory):
    """The finished run under another name, to be changed."""
    import shutil

    place = home / tmp_path_factory.mktemp("copy").name
    shutil.copytree(home / "whole", place)
    return place


def weights(place):
    return AutoModelForCausalLM.from_pretrained(place).state_dict()


def states(result):
    return {name: stage["status"] for name, stage in result["stages"].items()}


def dry(typed, *argv):
    code, told, err = typed("run", "all.yaml", *argv, "--dry-run")
    assert code == 0, err
    return {name: stage["state"] for name, stage in told["stages"].items()}


def interrupt_when(ready):
    """Sends this process a real SIGINT as soon as ``ready()`` is true."""
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


def test_killed_in_each_stage_and_continued_it_ends_where_the_whole_run_does(home, typed, capsys):
    out = home / "cut"
    moments = {
        "teacher": lambda: '"step": 5,' in read(out / "teacher" / "metrics.jsonl"),
        "student": lambda: '"step": 3,' in read(out / "student" / "metrics.jsonl"),
        "samples": lambda: lines(out / "samples" / "samples.jsonl") >= 8,
        "distill": lambda: '"step": 12,' in read(out / "distill" / "metrics.jsonl"),
        "eval": lambda: any(out.glob("eval/*/*/*/results.json")),
    }
    for name, moment in moments.items():
        stop, thread = interrupt_when(moment)
        code, told, err = typed("run", "all.yaml", "--output", "cut")
        stop.set()
        thread.join()
        assert code == 130, (name, err)
        assert told["message"].startswith(f"stage {name}: "), told
        assert told["message"].endswith("run the same command again to resume")
        assert "--resume" not in err
        assert dry(typed, "--output", "cut")[name] == "to resume"
    code, told, err = typed("run", "all.yaml", "--output", "cut")
    assert code == 0, err
    assert states(told) == dict.fromkeys(STAGES[:4], "skipped") | {"eval": "done"}
    assert "is already scored" in err
    for name in ("teacher", "student", "distill"):
        whole, cut = weights(home / "whole" / name), weights(out / name)
        assert all(torch.equal(whole[key], cut[key]) for key in whole), name
    assert read(home / "whole/samples/samples.jsonl") == read(out / "samples/samples.jsonl")
    assert figures(home / "whole") == figures(out)


def test_stopped_and_moved_it_goes_on_from_another_directory(home, typed, monkeypatch, tmp_path):
    """What a stage reads of others is known by their making, not by where they lie or how that is spelt from here."""
    out = home / "moving"
    stop, thread = interrupt_when(lambda: '"step": 12,' in read(out / "distill" / "metrics.jsonl"))
    code, _, err = typed("run", "all.yaml", "--output", "moving")
    stop.set()
    thread.join()
    assert code == 130, err
    out.rename(tmp_path / "moved")
    for name in ("rows", "all.yaml"):
        (tmp_path / name).symlink_to(home / name)
    monkeypatch.chdir(tmp_path)
    code, told, err = typed("run", "all.yaml", "--output", "moved")
    assert code == 0, err
    assert states(told) == dict.fromkeys(STAGES[:3], "skipped") | {"distill": "done", "eval": "done"}
    assert "distill (distill) · resumes" in err
    whole, moved = weights(home / "whole/distill"), weights(tmp_path / "moved/distill")
    assert all(torch.equal(whole[key], moved[key]) for key in whole)


def test_killed_while_its_student_is_fine_tuned_a_stage_goes_on_there(home, typed):
    """The fine-tuning before a distillation has checkpoints of its own."""
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
    (home / "tuned.yaml").write_text(stage, encoding="utf-8")
    metrics = home / "tuned" / "distill" / "sft" / "metrics.jsonl"
    stop, thread = interrupt_when(lambda: '"step": 12,' in read(metrics))
    code, _, err = typed("run", "tuned.yaml", "--output", "tuned")
    stop.set()
    thread.join()
    assert code == 130, err
    stopped = read(metrics).splitlines()
    code, told, err = typed("run", "tuned.yaml", "--output", "tuned")
    assert code == 0, err
    assert states(told) == {"teacher": "skipped", "distill": "done"}
    assert read(metrics).splitlines()[: len(stopped)] == stopped, "with the seconds that those steps took"


def read(path):
    return path.read_text(encoding="utf-8") if path.exists() else ""


def figures(place):
    """ROUGE-L of every scored suite, whatever the directory is called."""
    found = sorted(place.glob("eval/*/*/*/results.json"))
    assert len(found) == 4
    return [(p.parts[-3], json.loads(p.read_text())["rouge_l"]) for p in found]


def test_the_power_goes_in_a_stage(home, typed):
    """SIGKILL: nothing is tidied up; the same command goes on, or begins that stage anew where no checkpoint was left."""
    process = subprocess.Popen(
        [sys.executable, "-m", "distillm_cli", "run", "all.yaml", "--output", "cold", "--quiet"],
        cwd=home, env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not any((home / "cold/student/checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    code, told, err = typed("run", "all.yaml", "--output", "cold")
    assert code == 0, err
    assert states(told) == dict.fromkeys(STAGES, "done") | {"teacher": "skipped"}
    assert "student (sft) · resumes" in err
    whole, cold = weights(home / "whole/distill"), weights(home / "cold/distill")
    assert all(torch.equal(whole[key], cold[key]) for key in whole)


def test_a_run_that_is_done_does_nothing_again(typed, copied):
    code, told, err = typed("run", "all.yaml", "--output", copied)
    assert code == 0
    assert states(told) == dict.fromkeys(STAGES, "skipped")
    assert err.count("already done") == 10, "a line for each stage, and the table"
    assert told["stages"]["distill"]["result"]["steps"] == 30
    assert set(told) == {"command", "status", "output", "wall_s", "stages"}


def test_a_changed_stage_runs_again_with_those_that_read_it(typed, copied, home):
    changed = ("--output", copied, "--set", "stages.student.train.lr=4e-3")
    assert dry(typed, *changed) == dict.fromkeys(STAGES, "done") | dict.fromkeys(
        ("student", "distill", "eval"), "changed"
    )
    (copied / "student" / "notes.txt").write_text("mine")
    code, told, err = typed("run", "all.yaml", *changed)
    assert code == 0, err
    assert states(told) == dict.fromkeys(STAGES, "done") | {"teacher": "skipped", "samples": "skipped"}
    assert "student (sft) · changed: train.lr 0.005 → 0.004" in err
    assert (copied / "student" / "notes.txt").read_text() == "mine", "only what the pipeline made is replaced"
    old, new = weights(home / "whole/distill"), weights(copied / "distill")
    assert any(not torch.equal(old[key], new[key]) for key in old)
    assert dry(typed, *changed) == dict.fromkeys(STAGES, "done")


def test_what_shapes_no_result_changes_no_stage(typed, copied):
    free = ("train.log_steps=5", "train.keep=1", "teacher.cache_dir=elsewhere", "eval.report_rows=2", "data.workers=0")
    sets = [word for field in free for word in ("--set", f"defaults.{field}")]
    assert set(dry(typed, "--output", copied, *sets).values()) == {"done"}
    assert dry(typed, "--output", copied, "--set", "stages.eval.eval.seeds=[2]")["eval"] == "changed"


def test_changed_rows_are_noticed(typed, copied, home):
    rows_file = home / "rows" / "test.jsonl"
    before = rows_file.read_bytes()
    try:
        rows_file.write_bytes(before.replace(b"IOTA", b"IOTO"))
        found = dry(typed, "--output", copied)
        assert found["eval"] == "changed"
        rows_file.touch()
        rows_file.write_bytes(before)
        assert set(dry(typed, "--output", copied).values()) == {"done"}, "the same bytes, whenever they were written"
    finally:
        rows_file.write_bytes(before)


def test_a_stage_whose_output_was_lost_is_made_again(typed, copied):
    (copied / "samples" / "samples.jsonl").unlink()
    found = dry(typed, "--output", copied)
    assert (found["teacher"], found["samples"], found["distill"]) == ("done", "to resume", "changed")
    (copied / "student" / "stage.json").write_text("{")
    code, told, err = typed("run", "all.yaml", "--output", copied)
    assert (code, told["code"]) == (5, 5)
    assert f"remove {copied / 'student'} to start that stage over" in err


def test_a_row_that_is_mended_is_noticed_though_its_file_is_as_long_and_whoever_read_it_runs_again(typed, copied):
    rows_file = copied / "samples" / "samples.jsonl"
    before = rows_file.read_text(encoding="utf-8")
    first = json.loads(before.splitlines()[0])["output"]
    mended = before.replace(json.dumps(first), json.dumps(first.swapcase()), 1)
    assert mended != before
    assert len(mended) == len(before)
    rows_file.write_text(mended, encoding="utf-8")
    assert dry(typed, "--output", copied)["samples"] == "to resume"
    code, told, err = typed("run", "all.yaml", "--output", copied)
    assert code == 0, err
    assert states(told) == dict.fromkeys(STAGES[:2], "skipped") | dict.fromkeys(STAGES[2:], "done")
    assert rows_file.read_text(encoding="utf-8") == mended, "nobody's work is lost"
    assert set(dry(typed, "--output", copied).values()) == {"done"}


def test_what_a_changed_stage_had_answered_is_kept(typed, copied):
    """Somebody may have mended it, or taken rows out."""
    rows_file = copied / "samples" / "samples.jsonl"
    mended = rows_file.read_text(encoding="utf-8").splitlines(keepends=True)[1:]
    rows_file.write_text("".join(mended), encoding="utf-8")
    code, _, err = typed("run", "all.yaml", "--output", copied, "--only", "samples")
    assert code == 0, err
    assert f"moved the earlier responses to {rows_file.with_name('samples-before-1.jsonl')}" in err
    assert rows_file.with_name("samples-before-1.jsonl").read_text(encoding="utf-8") == "".join(mended)
    assert len(rows_file.read_text(encoding="utf-8").splitlines()) == 48
    assert typed("run", "all.yaml", "--output", copied, "--only", "samples", "--set", "stages.samples.limit=40")[0] == 0
    assert rows_file.with_name("samples-before-2.jsonl").exists()


@pytest.mark.parametrize(
    ("stage", "lost"),
    [("teacher", "tokenizer.json"), ("distill", "tokenizer_config.json"), ("eval", "predictions-seed1.jsonl")],
)
def test_every_file_of_a_stage_is_missed(typed, copied, home, stage, lost):
    path = next((copied / stage).rglob(lost))
    before = path.read_bytes()
    path.unlink()
    assert dry(typed, "--output", copied)[stage] == "to resume"
    code, told, err = typed("run", "all.yaml", "--output", copied)
    assert code == 0, err
    assert {name for name, status in states(told).items() if status == "done"} == {stage}, "as it was, for its readers"
    assert path.read_bytes() == before


def test_moved_and_changed_the_scores_of_before_stand_nowhere_as_the_new_ones(typed, copied, tmp_path):
    copied.rename(tmp_path / "moved")
    code, _, err = typed("run", "all.yaml", "--output", tmp_path / "moved", "--set", "stages.distill.train.lr=4e-3")
    assert code == 0, err
    assert len(list((tmp_path / "moved").glob("eval/*/*/*/results.json"))) == 4
    assert {path.name for path in (tmp_path / "moved/eval").iterdir() if path.is_dir()} == {"distill", "student"}


def test_a_damaged_record_is_named(typed, copied):
    record = copied / "student" / "stage.json"
    told = json.loads(record.read_text())
    record.write_text(json.dumps(told | {"of": {}, "fingerprint": "0"}))
    code, _, err = typed("run", "all.yaml", "--output", copied)
    assert code == 5
    assert f"{record} cannot be read (it has no inputs of the stage); remove {copied / 'student'}" in err


def test_a_pipeline_of_ones_own_is_not_replaced_by_what_it_resolves_to(typed, home, tmp_path):
    (tmp_path / "mine").mkdir()
    own = tmp_path / "mine" / "pipeline.yaml"
    own.write_text(RECIPE, encoding="utf-8")
    code, _, err = typed("run", own, "--output", own.parent)
    assert code == 2
    assert f"{own} was not written by `distillm run`, which would replace it; choose another --output" in err
    assert [path.name for path in own.parent.iterdir()] == ["pipeline.yaml"]
    assert own.read_text(encoding="utf-8") == RECIPE


def test_a_record_of_sizes_alone_is_still_read(typed, copied):
    """As earlier versions wrote it."""
    for path in copied.glob("*/stage.json"):
        record = json.loads(path.read_text())
        record["files"] = {name: (path.parent / name).stat().st_size for name in record["files"]}
        path.write_text(json.dumps(record))
    assert set(dry(typed, "--output", copied).values()) == {"done"}
    rows_file = copied / "samples" / "samples.jsonl"
    rows_file.write_text(rows_file.read_text() + "\n")
    assert dry(typed, "--output", copied)["samples"] == "to resume"


def test_only_and_from_leave_stages_out_and_name_the_one_that_is_missing(typed, home, copied):
    code, told, err = typed("run", "all.yaml", "--output", "new", "--only", "distill")
    assert (code, told["code"]) == (2, 2)
    assert err == (
        "error: stage distill needs the output of stage teacher, but new/teacher does not exist; "
        "run stage teacher first, with --only teacher or --from teacher\n"
    )
    assert not (home / "new").exists(), "nothing was written"
    code, told, _ = typed("run", "all.yaml", "--output", "new", "--only", "teacher")
    assert (code, states(told)) == (0, {"teacher": "done"})
    code, told, err = typed("run", "all.yaml", "--output", copied, "--from", "distill")
    assert states(told) == {"distill": "skipped", "eval": "skipped"}
    code, told, err = typed(
        "run", "all.yaml", "--output", copied, "--only", "eval", "--set", "stages.distill.train.lr=1e-3"
    )
    assert (code, states(told)) == (0, {"eval": "skipped"})
    assert "warning: stage distill is not run again, although it has changed: train.lr 0.005 → 0.001" in err


def test_the_dry_run_reads_back_and_says_where_values_come_from(typed, home, capsys, monkeypatch):
    monkeypatch.chdir(home)
    argv = ["run", "all.yaml", "--output", "whole", "--set", "defaults.train.seed=4", "--dry-run"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "  teacher:  # changed: train.seed 3 → 4\n" in text
    assert "  eval:  # changed: stage distill and stage student are to run first\n" in text
    said = [" ".join(line.split()) for line in text.splitlines()]
    assert "lr: 0.005 # all.yaml:10" in said
    assert "warmup: 0.0 # auto: 0 for a model built from scratch" in said
    assert "seed: 4 # --set (all.yaml:7: 3)" in said
    (home / "written.yaml").write_text(text)
    from distillm_cli.config.pipeline_recipe import load_pipeline
    from distillm_cli.runs.defaults import fitted_pipeline

    again = load_pipeline(Path("written.yaml"))
    first = fitted_pipeline(load_pipeline(Path("all.yaml"), ["defaults.train.seed=4"]))
    assert [(s.config, s.resolved.recipe) for s in again.stages] == [
        (s.config, s.resolved.recipe) for s in first.stages
    ]
    assert list(yaml.safe_load(text)["stages"]) == list(STAGES)


def test_each_stage_is_what_its_verb_makes_alone(typed, home):
    """No second loop: the recipe that a stage leaves behind, given to its verb, ends with the same weights."""
    argv = ("distill", "--recipe", home / "whole/distill/recipe.yaml", "--output", "alone", "--quiet")
    code, _, err = typed(*argv)
    assert code == 0, err
    alone, whole = weights(home / "alone"), weights(home / "whole/distill")
    assert all(torch.equal(alone[key], whole[key]) for key in alone)


def test_a_directory_that_is_not_the_pipelines_is_never_touched(typed, home):
    place = home / "mine" / "distill"
    place.mkdir(parents=True)
    (place / "thesis.txt").write_text("mine")
    code, _, err = typed("run", "all.yaml", "--output", "mine")
    assert code == 2
    assert "mine/distill exists and was not created by `distillm run`" in err
    assert [p.name for p in (home / "mine").iterdir()] == ["distill"], "found out before the first stage"


def test_a_stage_that_would_train_from_its_own_output_is_refused(typed, copied):
    before = weights(copied / "student")
    sets = (f"path={copied.name}/student", "tokenizer=null")
    code, told, err = typed(
        "run", "all.yaml", "--output", copied.name, "--only", "student", "--quiet",
        *(word for field in sets for word in ("--set", f"stages.student.student.{field}")),
    )  # fmt: skip
    assert (code, told["code"]) == (2, 2)
    assert "starting over in" in err
    assert f"{copied.name}/student would remove an input of the run; --model" in err
    after = weights(copied / "student")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_missing_file_is_found_before_the_first_stage(typed, home):
    code, told, err = typed("run", "all.yaml", "--output", "gone", "--set", "stages.eval.eval.suites=rows/tset.jsonl")
    assert (code, told["code"]) == (3, 3)
    assert err == "error: stage eval: eval.suites = rows/tset.jsonl: no such file or directory; check the path\n"
    assert not (home / "gone").exists()
