"""Check that a run is the same run in one, two and three processes."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from distillm_cli.cli.app import main
from distillm_cli.config.methods import METHODS
from distillm_cli.training.checkpoint import read_checkpoint, visible
from tests import tiny
from tests.command_line import CLOCK, assert_error, fields_of
from tests.marks import long
from tests.processes import PATIENCE, ROOT, Processes, signal_arrives
from tests.same_runs import FEW, assert_same_run, distill, metrics, run_alone, run_together

DETERMINED = {"step", "epoch", "source", "lr", "phi", "tokens"}  # by rows, schedule and samples


@pytest.fixture(scope="module")
def pair():
    with Processes(2) as pair:
        yield pair


@pytest.fixture(scope="module")
def trio():
    with Processes(3) as trio:
        yield trio


def assert_same_metrics(one, two, tolerance=1e-5):
    """Check that the runs of two output directories are the same but for the rounding of sums."""
    lines = list(zip(metrics(one), metrics(two), strict=True))
    for left, right in lines:
        assert left.keys() == right.keys()
        for key in left.keys() - set(CLOCK) - {"grad_norm"}:
            if key in DETERMINED or left[key] is None:
                assert left[key] == right[key], (key, left, right)
            else:
                assert right[key] == pytest.approx(left[key], rel=tolerance, abs=tolerance), (key, left, right)
    return lines


def assert_same_counts(one, two):
    """Check that two results have the same steps, samples and teacher tokens."""
    keys = {
        key
        for key in one
        if key.endswith(("_steps", "_sequences", "_tokens")) or key in ("steps", "tokens", "best_step")
    }
    assert {key: one[key] for key in keys} == {key: two[key] for key in keys}


WORDS = ("one", "two", "six", "ten", "red", "sun", "dog", "cat", "oak", "elm", "fir")
ROWS = "".join(json.dumps({"instruction": f"Say {word}.", "output": word}) + "\n" for word in WORDS)
STAGES = ("teacher", "answers", "student", "scores")
PIPELINE = """
defaults:
  data: {source: builtin, size: 30, valid_limit: 4}
  train: {steps: 2, batch_size: 4, threads: 1}
  eval: {report_rows: 2, max_new_tokens: 4}
  rollout: {max_new_tokens: 4}
stages:
  teacher: {verb: sft, student: {path: "random:2x32", tokenizer: chars}}
  answers: {verb: generate, model: "stage:teacher", limit: 8, split: train}
  student: {verb: distill, teacher: {path: "stage:teacher"}, student: {path: "random:1x16"}}
  scores: {verb: eval, models: ["stage:student"], eval: {suites: [builtin], limit: 4}}
"""
PRESETS = [(name, ()) for name, method in METHODS.items() if method.verb == "distill"]
VARIANTS = [
    ("distillm", ("schedule.phi=0.6", "schedule.warm_up=none", "schedule.capacity=16", "rollout.bulk=2")),
    ("distillm", ("schedule.phi=1", "schedule.warm_up=none", "schedule.freshness=on", "train.accumulate=2")),
    ("kd", ("teacher.cache=disk", "teacher.cache_dir=cache", "objective.reduction=sequence")),
    (
        "kd",
        (
            "teacher.cache=off",
            "student.path=builtin",
            "student.lora.r=4",
            "student.lora.dropout=0",
            "train.gradient_checkpointing=true",
        ),
    ),
    ("kd", ("train.adversarial=fgsm", "objective.kd_weight=0.5")),
    ("skd", ("teacher.template=plain", "student.template=exact")),
    (
        "distillm",
        ("train.tokens_per_batch=60", "train.tokens_per_step=150", "schedule.phi=0.6", "schedule.warm_up=none"),
    ),
    ("distillm", ("teacher.template=plain", "student.template=exact", "schedule.phi=0.6", "schedule.warm_up=none")),
    (
        "distillm",
        (
            "data.sources=[{source: builtin, weight: 2, template: exact}, {source: builtin, weight: 1}]",
            "schedule.phi=0.5",
            "schedule.warm_up=none",
        ),
    ),
]
CASES = [*PRESETS, *VARIANTS]
# Rows alone, student outputs, a teacher that is trained, embeddings, and an adaptive schedule with replay.
DEFAULT = [("kd", ()), ("distillm2", ()), ("okd", ()), ("disco", ()), VARIANTS[0]]
ROLLOUTS = ("schedule.phi=0.6", "schedule.warm_up=none", "schedule.capacity=16")


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        pytest.param(name, fields, id=f"{i}-{name}", marks=[pytest.mark.long] * ((name, fields) not in DEFAULT))
        for i, (name, fields) in enumerate(CASES)
    ],
)
def test_run_in_two_processes_is_the_same_run(method, fields, pair, tmp_path, capsys, monkeypatch):
    few = fields_of(method, FEW)
    alone = run_alone(distill("one", *fields, method=method, few=few), tmp_path, capsys, monkeypatch)
    if "teacher.cache=disk" in fields:
        shutil.rmtree(tmp_path / "cache")
    together = run_together(pair, distill("two", *fields, method=method, few=few), tmp_path)
    assert_same_metrics(tmp_path / "one", tmp_path / "two")
    assert_same_counts(alone, together)


def test_run_with_a_sharded_student_is_the_same_run(pair, tmp_path, capsys, monkeypatch):
    """Check one case of test_sharded_runs, which is long."""
    run_alone(distill("one", *ROLLOUTS), tmp_path, capsys, monkeypatch)
    run_together(pair, distill("two", *ROLLOUTS, "train.shard=full"), tmp_path)
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.long
def test_fine_tuning_on_scored_pairs(pair, tmp_path, capsys, monkeypatch):
    tiny.save_encoder(tmp_path / "teacher")
    pairs = [{"sentence1": f"say {a}", "sentence2": f"tell {b}", "score": (i * j) % 5 + 1}
             for i, a in enumerate(WORDS[:5]) for j, b in enumerate(WORDS[:4])]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    argv = ["distill", "--method", "disco", "--teacher", "teacher", "--student", "layers:2", "--data", "pairs.jsonl",
            "--set", "disco.pairs_epochs=1", "--steps", 3, "--batch-size", 4, "--set", "train.log_steps=1", "--json",
            "--set", "student.dropout=0", "--dtype", "fp32"]  # fmt: skip
    run_alone([*argv, "--output", "one"], tmp_path, capsys, monkeypatch)
    run_together(pair, [*argv, "--output", "two"], tmp_path)
    assert_same_metrics(tmp_path / "one" / "distilled", tmp_path / "two" / "distilled")
    assert_same_metrics(tmp_path / "one", tmp_path / "two")


@pytest.mark.long
def test_more_processes_than_rows_of_a_step(trio, tmp_path, capsys, monkeypatch):
    for method, *fields in (("kd", "train.batch_size=2"), ("minillm", "train.batch_size=1"), ("distillm", *ROLLOUTS)):
        alone = run_alone(distill(f"{method}-1", *fields, method=method), tmp_path, capsys, monkeypatch)
        together = run_together(trio, distill(f"{method}-3", *fields, method=method), tmp_path)
        assert_same_metrics(tmp_path / f"{method}-1", tmp_path / f"{method}-3")
        assert_same_counts(alone, together)


@pytest.mark.long
def test_machines_without_common_memory(pair, tmp_path, capsys, monkeypatch):
    """Check that states are computed on both machines where rows and rollouts come back, and that nothing else changes."""
    few = tuple(field for field in FEW if not field.startswith("data.size"))
    fields = (*ROLLOUTS, "data.size=12", "schedule.phi=0.5")
    alone = run_alone(distill("one", *fields, few=few, steps=9), tmp_path, capsys, monkeypatch)
    run = distill("two", *fields, few=few, steps=9)
    together = run_together(pair, run, tmp_path, faults={1: ["is_on_machine", "another"]})
    assert_same_metrics(tmp_path / "one", tmp_path / "two")
    assert alone["teacher_tokens"] < together["teacher_tokens"] < 2 * alone["teacher_tokens"]


@pytest.mark.long
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        ["accelerate.commands.launch", "--cpu", "--num_processes", "1"],  # it starts no more on a CPU without MPI
    ],
    ids=["torchrun", "accelerate"],
)
def test_launcher(launcher, tmp_path):
    run = ["-m", "distillm_cli", "generate", "--model", "builtin", "--template", "plain", "--max-new-tokens", "3"]
    prompts = ["--prompt", "Say one.", "--prompt", "Say two.", "--set", "eval.batch_size=1"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *run, *prompts],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr.count("template: plain") == 1


# --- faults of one process


@pytest.fixture
def saved(tmp_path):
    """Return a function: fields → the command line of a run that saves often, into the directory "run"."""
    return lambda *fields, **options: distill(
        "run", "train.save_steps=1", "train.keep=9", *ROLLOUTS, *fields, steps=5, **options
    )


def steps_saved(directory):
    """Return the steps of the checkpoints, each of which is complete."""
    paths = visible(directory / "run" / "checkpoints")
    return [read_checkpoint(path).state["progress"]["step"] for path in paths]


def assert_stopped(outcomes, code, *mentions):
    """Check that all processes ended with this error code, and that the first one alone reported it."""
    first, *others = outcomes
    assert_error((first.code, json.loads(first.out), first.err), code, *mentions)
    assert [(o.code, o.out, o.err) for o in others] == [(first.code, "", "")] * len(others)


def test_memory_that_runs_out_once_in_one_process(pair, saved, tmp_path, capsys, monkeypatch):
    run_alone(distill("alone", *ROLLOUTS, steps=5), tmp_path, capsys, monkeypatch)
    first, second = pair.run(saved(), directory=tmp_path, faults={1: ["memory_runs_out", 3, True]})
    assert (first.code, second.code) == (0, 0), first.err
    assert first.err.count("out of memory with micro-batches of 2 sequences: continuing with 1") == 1
    assert_same_metrics(tmp_path / "alone", tmp_path / "run")


@pytest.mark.parametrize(
    ("fault", "code", "last"),
    [
        (["memory_runs_out", 3, False], "memory.exhausted", 2),
        (["loss_is_nan", 3], "numbers.not_finite", 2),
        (["logits_are_nan"], "numbers.not_finite", None),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_error_of_one_process_stops_all_at_one_step(fault, code, last, pair, saved, tmp_path):
    outcomes = pair.run(saved(), directory=tmp_path, faults={1: fault})
    assert_stopped(outcomes, code, "nothing was applied")
    steps = steps_saved(tmp_path)
    assert last is None or steps[-1] == last
    message = json.loads(outcomes[0].out)["message"]
    assert f"at step {(steps or [0])[-1] + 1} " in message


def test_full_disk_of_the_first_process(pair, saved, tmp_path):
    outcomes = pair.run(saved(), directory=tmp_path, faults={0: ["disk_is_full", 3]})
    assert_stopped(outcomes, "storage.failed", "No space left", "step-000002 is complete")
    assert steps_saved(tmp_path) == [1, 2]


def test_signal_to_one_process_and_resume_alone(pair, saved, tmp_path, capsys, monkeypatch):
    first, second = pair.run(saved(), directory=tmp_path, faults={1: ["signal_arrives", 3, signal.SIGTERM]})
    assert (first.code, second.code, second.err) == (143, 143, ""), first.err
    assert 1 <= steps_saved(tmp_path)[-1] < 5
    states = read_checkpoint(visible(tmp_path / "run/checkpoints")[-1]).tensors
    assert {"random.cpu", "random.1.cpu"} <= states.keys()
    assert not torch.equal(states["random.cpu"], states["random.1.cpu"]), "dropout differs between processes"

    whole = run_alone(distill("whole", *ROLLOUTS, steps=5), tmp_path, capsys, monkeypatch)
    code = main([str(a) for a in [*saved(), "--resume"] if a != "--quiet"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "the run had 2 processes and continues in 1" in err
    assert_same_metrics(tmp_path / "whole", tmp_path / "run")
    assert_same_counts({**whole, "teacher_tokens": 0}, {**json.loads(out), "teacher_tokens": 0})


@pytest.mark.long
def test_resume_of_a_single_process_in_two(pair, saved, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with signal_arrives(3, signal.SIGTERM):
        assert main([str(a) for a in saved()]) == 143
    assert 1 <= steps_saved(tmp_path)[-1] < 5
    capsys.readouterr()
    run_alone(distill("whole", *ROLLOUTS, steps=5), tmp_path, capsys, monkeypatch)
    run_together(pair, [*saved(), "--resume"], tmp_path)
    assert_same_metrics(tmp_path / "whole", tmp_path / "run")


@pytest.mark.long
def test_resume_in_two_processes_gives_the_same_bits(pair, saved, tmp_path):
    dropout = ("student.dropout=0.1",)
    run_together(pair, [*saved(*dropout), "--output", "whole"], tmp_path)
    outcomes = pair.run(saved(*dropout), directory=tmp_path, faults={0: ["signal_arrives", 3, signal.SIGTERM]})
    assert outcomes[0].code == 143
    run_together(pair, [*saved(*dropout), "--resume"], tmp_path)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# --- selection, generate, eval, run


@pytest.mark.parametrize("select", ["rouge_l", long("valid_divergence")])
def test_same_checkpoint_is_selected(select, pair, tmp_path, capsys, monkeypatch):
    fields = (f"train.select={select}", "eval.report_rows=5", "eval.max_new_tokens=5", "eval.metrics=rouge_l")
    few = tuple(field for field in FEW if not field.startswith("eval.report_rows"))
    alone = run_alone(distill("one", *fields, steps=6, few=few), tmp_path, capsys, monkeypatch)
    together = run_together(pair, distill("two", *fields, steps=6, few=few), tmp_path)
    assert_same_counts(alone, together)
    assert_same_metrics(tmp_path / "one", tmp_path / "two")
    assert alone["report"].keys() == together["report"].keys()
    reports = sorted((tmp_path / "one/eval/report").iterdir())
    assert reports
    for report in reports:
        one, two = (json.loads((tmp_path / n / "eval/report" / report.name).read_text()) for n in ("one", "two"))
        assert one["answers"] == two["answers"]


@pytest.mark.long
def test_generate_writes_the_same_bytes(pair, tmp_path, capsys, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(ROWS)
    make = ["generate", "--model", "builtin", "--data", "rows.jsonl", "--template", "plain", "--n", 2, "--max-new-tokens", 6,
            "--set", "eval.batch_size=3"]  # fmt: skip
    run_alone([*make, "--output", "one.jsonl", "--json"], tmp_path, capsys, monkeypatch)
    run_together(pair, [*make, "--output", "two.jsonl", "--json"], tmp_path)
    one, two = ((tmp_path / name).read_bytes() for name in ("one.jsonl", "two.jsonl"))
    assert one == two
    assert len(one.splitlines()) == 22
    (tmp_path / "three.jsonl").write_bytes(b"".join(two.splitlines(keepends=True)[:6]))
    shutil.copy(tmp_path / ".two.jsonl.generate.json", tmp_path / ".three.jsonl.generate.json")
    run_together(pair, [*make, "--output", "three.jsonl", "--resume", "--json"], tmp_path)
    assert (tmp_path / "three.jsonl").read_bytes() == one
    printed = pair.run([*make, "--quiet"], directory=tmp_path)
    assert printed[0].out.encode() == one
    assert printed[1].out == ""


def test_eval_writes_the_same_predictions(pair, tmp_path, capsys, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(ROWS)
    score = ["eval", "builtin", "--suite", "rows.jsonl", "--template", "plain", "--seeds", "1,2", "--max-new-tokens", 6,
             "--set", "eval.batch_size=2", "--json"]  # fmt: skip
    run_alone([*score, "--output", "one"], tmp_path, capsys, monkeypatch)
    run_together(pair, [*score, "--output", "two"], tmp_path)
    names = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.jsonl"))
    assert names == sorted(path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*.jsonl"))
    assert names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    (one,), (two,) = ([json.loads(p.read_text()) for p in (tmp_path / n).rglob("results.json")] for n in ("one", "two"))
    for timed in ("seconds", "tokens_per_s"):
        assert one.pop(timed, None) is not None
        assert two.pop(timed, None) is not None
    assert one == two


@pytest.mark.long
def test_pipeline_runs_in_two_processes(pair, tmp_path):
    (tmp_path / "small.yaml").write_text(PIPELINE)
    result = run_together(pair, ["run", "small.yaml", "--output", "out", "--json"], tmp_path)
    assert {name: stage["status"] for name, stage in result["stages"].items()} == dict.fromkeys(STAGES, "done")
    assert len((tmp_path / "out/answers/samples.jsonl").read_text().splitlines()) == 8
    again = run_together(pair, ["run", "small.yaml", "--output", "out", "--json"], tmp_path)
    assert {name: stage["status"] for name, stage in again["stages"].items()} == dict.fromkeys(STAGES, "skipped")


# --- errors before the first step


def test_processes_that_differ(pair, tmp_path):
    argvs = {1: distill("run", method="kd", few=(*FEW, "train.lr=1e-3"))}
    assert_stopped(
        pair.run(distill("run", method="kd"), directory=tmp_path, argvs=argvs), "process.different", "command"
    )
    outcomes = pair.run(distill("run"), directory=tmp_path, faults={1: ["version_is", "0.0"]})
    assert_stopped(outcomes, "process.different", "version of distillm", "0.0")
    rows = [json.dumps({"instruction": f"Say {i}.", "output": str(i)}) for i in range(8)]
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "rows.jsonl").write_text("\n".join(rows[rank:]))
    argv = distill(tmp_path / "run", "data.source=rows.jsonl", method="kd", few=FEW[1:])
    outcomes = pair.run(argv, directory=tmp_path, directories={rank: tmp_path / str(rank) for rank in range(2)})
    assert_stopped(outcomes, "process.different", "training rows")
    assert not (tmp_path / "run").exists()


def test_processes_at_different_places(pair, tmp_path):
    outcomes = pair.run(distill("run"), directory=tmp_path, faults={1: ["is_elsewhere"]})
    assert_stopped(outcomes, "process.out_of_step", "0: app.py", "1: elsewhere.py:1")


def test_fewer_gpus_than_processes(pair, tmp_path):
    outcomes = pair.run(distill("run"), directory=tmp_path, faults={0: ["has_gpus", 1], 1: ["has_gpus", 1]})
    assert_stopped(outcomes, "usage.no_device", "2 processes on a machine with 1 GPU")


def test_output_directory_that_is_not_shared(pair, tmp_path):
    outcomes = pair.run(distill("run"), directory=tmp_path, faults={1: ["sees_another_disk", "run"]})
    assert_stopped(outcomes, "storage.not_shared", "process 1 does not see the output directory run")


def test_pairs_without_scores_need_one_process(pair, tmp_path):
    rows = [{"anchor": f"row {i}", "positive": f"a row {i}"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["distill", "--method", "disco", "--teacher", "builtin", "--student", "layers:1", "--data", "pairs.jsonl",
            "--output", "run", "--set", "disco.pairs_epochs=1", "--json"]  # fmt: skip
    assert_stopped(pair.run(argv, directory=tmp_path), "usage.one_process", "disco.pairs_epochs")


def test_process_that_is_killed(pair, saved, tmp_path, capsys, monkeypatch):
    """Check that the other one ends with a message. It is the last test of the file, since it ends both processes."""
    first, _ = pair.run(saved(), directory=tmp_path, faults={1: ["signal_arrives", 3, signal.SIGKILL]})
    assert_error((first.code, json.loads(first.out), first.err), "process.lost", "continue with --resume")
    assert steps_saved(tmp_path)
    run_alone([*saved(), "--resume"], tmp_path, capsys, monkeypatch)
