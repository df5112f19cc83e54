"""Test sft, distill, eval and generate from text to models that ``from_pretrained`` loads, and their JSON results."""

import json
import os
import pty
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillm_cli.cli.app import main
from distillm_cli.config.derived import fixed_values
from distillm_cli.config.schema import Recipe
from distillm_cli.runs.resume import find_checkpoint
from distillm_cli.training.checkpoint import Checkpoints
from distillm_cli.training.state import TrainerState
from tests.codes import raises_code
from tests.command_line import assert_error, call, untimed

ROOT = Path(__file__).parents[2]
WORDS = ["alpha", "beta", "gamma", "delta", "kappa", "sigma", "omega", "theta", "iota", "zeta"]


def rows(n, offset=0):
    """Return instruction rows of an upper-casing task."""
    picked = [(WORDS[(i + offset) % 10], WORDS[(i * 3 + offset) % 10]) for i in range(n)]
    return [{"instruction": "Say it loud.", "input": f"{a} {b}", "output": f"{a} {b}".upper()} for a, b in picked]


def write(path, content):
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


SMALL = [
    "--max-length", "96", "--dtype", "fp32", "--device", "cpu", "--json", "--batch-size", "8", "--quiet",
    "--set", "data.template=plain", "--set", "eval.report_rows=6", "--set", "eval.max_new_tokens=8",
    "--set", "rollout.max_new_tokens=8", "--set", "train.eval_steps=5", "--set", "train.threads=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Write a data directory and train a teacher with ``distillm sft``. Return the directory."""
    workdir = tmp_path_factory.mktemp("job")
    write(workdir / "train.jsonl", rows(64))
    write(workdir / "valid.jsonl", rows(10, 3))
    write(workdir / "test.jsonl", rows(10, 6))
    argv = ["sft", "--model", "random:2x48", "--tokenizer", "chars", "--data", workdir, "--output", workdir / "teacher"]
    assert main([str(a) for a in [*argv, "--steps", "30", "--lr", "5e-3", *SMALL]]) == 0
    return workdir


def distill_argv(workdir, output, *more):
    pair = ["--teacher", workdir / "teacher", "--student", "random:1x32", "--data", workdir]
    adaptive = ["--set", "schedule.epsilon=-10", "--set", "schedule.capacity=16", "--set", "schedule.levels=2"]
    return ["distill", *pair, "--output", output, "--steps", "20", "--lr", "5e-3", *adaptive, *SMALL, *more]


def test_sft_writes_a_model_directory(workdir):
    model = AutoModelForCausalLM.from_pretrained(workdir / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(workdir / "teacher")
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    names = {p.name for p in (workdir / "teacher").iterdir()}
    assert {"recipe.yaml", "metrics.jsonl", "checkpoints", "README.md", "model.safetensors", "config.json"} <= names
    modes = {p.stat().st_mode for p in (workdir / "teacher").rglob("*") if p.is_file()}
    assert modes == {(workdir / "train.jsonl").stat().st_mode}, "all files have the permissions of the umask"
    card = (workdir / "teacher" / "README.md").read_text()
    assert "Valid CE on 10 held-out rows; scores on the first 6 of them, sampled at T = 1, in fp32." in card
    lines = [json.loads(line) for line in (workdir / "teacher" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 30
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]


def test_distill_result_works_with_eval_and_generate(workdir, tmp_path, capsys):
    code, result, _ = call(capsys, *distill_argv(workdir, tmp_path / "student"))
    assert code == 0
    promised = {"command", "status", "output", "wall_s", "steps", "tokens", "tokens_per_s", "train_loss", "valid_loss",
                "phi", "rollout_steps", "replay_steps"}  # fmt: skip
    assert promised <= set(result)
    assert (result["command"], result["status"], result["steps"]) == ("distill", "ok", 20)
    assert result["rollout_steps"] > 0
    assert result["replay_steps"] > 0
    assert result["phi"] == 1.0
    assert set(result["report"]) == {"student_before", "student_after", "teacher"}

    code, scores, _ = call(
        capsys, "eval", tmp_path / "student", "--suite", workdir, "--seeds", "10,20", "--max-new-tokens", "8", "--json"
    )
    (suite,) = scores["suites"].values()
    assert (code, suite["rows"]) == (0, 10)
    assert set(suite["rouge_l"]["seeds"]) == {"10", "20"}

    responses = tmp_path / "responses.jsonl"
    code, generated, _ = call(
        capsys, "generate", "--model", tmp_path / "student", "--data", workdir, "--limit", "7", "--max-new-tokens", "8",
        "--output", responses, "--json",
    )  # fmt: skip
    assert (code, generated["rows"]) == (0, 7)
    assert len(responses.read_text().splitlines()) == 7

    code, again, _ = call(
        capsys, "distill", "--teacher", workdir / "teacher", "--student", tmp_path / "student", "--data", responses,
        "--steps", "2", "--output", tmp_path / "on-samples", *SMALL,
    )  # fmt: skip
    assert (code, again["steps"]) == (0, 2)


def test_suggested_eval_uses_unseen_rows(workdir, tmp_path, capsys):
    """Check that the test split is suggested if there is one, and otherwise the held-out rows, which need no option."""
    options = [word for word in SMALL if word != "--quiet"]
    alone = write(tmp_path / "rows.jsonl", rows(10))
    for data, suite in ((workdir, f" --suite {workdir}"), (alone, "")):
        output = tmp_path / f"{data.name}-out"
        argv = ["sft", "--model", workdir / "teacher", "--data", data, "--steps", "1", "--output", output]
        code, _, err = call(capsys, *argv, *options)
        assert code == 0, err
        shown = "".join(line.strip() for line in err[err.index("What next") :].splitlines())
        assert f"distillm eval {output}{suite}distillm generate".replace(" ", "") in shown.replace(" ", "")


def test_resume_matches_uninterrupted_run(workdir, tmp_path, capsys):
    """Check that Ctrl-C exits with 130 and a usable checkpoint, and that ``--resume`` gives the weights of a full run."""
    code, _, _ = call(capsys, *distill_argv(workdir, tmp_path / "full", "--steps", "60"))
    assert code == 0
    argv = [str(a) for a in distill_argv(workdir, tmp_path / "resumed", "--steps", "60")]
    process = subprocess.Popen([sys.executable, "-m", "distillm_cli", *argv], stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "resumed" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and '"step": 7,' in metrics.read_text():
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.01)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out
    assert json.loads(out)["code"] == 130
    (checkpoint,) = (tmp_path / "resumed" / "checkpoints").iterdir()
    AutoModelForCausalLM.from_pretrained(checkpoint)

    code, result, _ = call(capsys, "distill", "--resume", "--output", tmp_path / "resumed", "--json", "--quiet")
    assert (code, result["steps"]) == (0, 60)
    full, resumed = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("full", "resumed"))
    assert all(torch.equal(full[name], resumed[name]) for name in full)
    lines = {name: (tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("full", "resumed")}
    records = {n: [untimed(json.loads(x)) for x in ls] for n, ls in lines.items()}
    assert records["full"] == records["resumed"]


def test_resume_counts_teacher_tokens_of_the_full_run(workdir, tmp_path, capsys):
    argv = distill_argv(
        workdir, tmp_path / "run", "--teacher-cache", "off", "--keep", "2", "--set", "train.save_steps=10"
    )
    code, full, err = call(capsys, *argv)
    assert code == 0, err
    shutil.rmtree(tmp_path / "run/checkpoints/step-000020")  # as if interrupted before that step
    code, resumed, err = call(capsys, "distill", "--resume", "--output", tmp_path / "run", "--json", "--quiet")
    assert code == 0, err
    assert resumed["teacher_tokens"] == full["teacher_tokens"] > 0


def test_resume_logs_each_validation_once(workdir, tmp_path, capsys):
    output = tmp_path / "out"
    argv = distill_argv(workdir, output, "--keep", "2", "--set", "train.save_steps=4", "--steps", "6")
    full = call(capsys, *argv)[1]
    shutil.rmtree(output / "checkpoints" / "step-000006")  # as if killed at the end
    again = call(capsys, *argv, "--resume")[1]
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in records if "valid_loss" in line] == [0, 5, 6]
    assert again["report"] == full["report"], "including the student before training"


def test_diverged_model_is_an_error(workdir, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(workdir / "teacher", broken, ignore=shutil.ignore_patterns("checkpoints"))
    model = AutoModelForCausalLM.from_pretrained(broken)
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    model.save_pretrained(broken)
    (broken / "manifest.json").unlink()  # otherwise the changed file is reported
    for argv in (
        distill_argv(workdir, tmp_path / "out", "--teacher", broken),
        ["eval", broken, "--suite", workdir / "test.jsonl", "--greedy", "--json", "--quiet"],
        ["generate", "--model", broken, "--prompt", "alpha", "--json", "--output", tmp_path / "responses.jsonl"],
    ):
        assert_error(call(capsys, *argv), "numbers.not_finite", broken)


def test_resume_with_changed_recipe_is_an_error(workdir, tmp_path, capsys):
    assert call(capsys, *distill_argv(workdir, tmp_path / "run"))[0] == 0
    outcome = call(capsys, *distill_argv(workdir, tmp_path / "run", "--resume", "--alpha", "0.3"))
    assert_error(outcome, "checkpoint.changed", "objective.alpha", "0.1", "0.3")


@pytest.fixture(scope="module")
def interrupted_run(workdir, tmp_path_factory):
    """Make a run interrupted at step 10 of 20, with its rows, teacher and student. Return the parent directory."""
    directory, previous = tmp_path_factory.mktemp("interrupted"), Path.cwd()
    shutil.copytree(workdir, directory / "data", ignore=shutil.ignore_patterns("teacher"))
    shutil.copytree(workdir / "teacher", directory / "data/teacher")
    os.chdir(directory)
    try:
        argv = ["sft", "--model", "random:1x32", "--tokenizer", "data/teacher", "--data", "data", "--output", "student"]
        assert main([*argv, "--steps", "1", *SMALL]) == 0
        assert main(["distill", *INTERRUPTED, "--keep", "2", "--set", "train.save_steps=10", *SMALL]) == 0
    finally:
        os.chdir(previous)
    shutil.rmtree(directory / "run/checkpoints/step-000020")
    return directory


INTERRUPTED = ["--teacher", "data/teacher", "--student", "student", "--data", "data", "--output", "run"]
INTERRUPTED += ["--steps", "20", "--set", "train.select=exact_match", "--set", "train.eval_steps=10"]
RESUME = ["distill", "--resume", "--output", "run", "--json", "--quiet"]


def reverse_rows(directory):
    lines = (directory / "data/train.jsonl").read_text().splitlines(keepends=True)
    (directory / "data/train.jsonl").write_text("".join(reversed(lines)))


def change_validation_row(directory):
    text = (directory / "data/valid.jsonl").read_text()
    (directory / "data/valid.jsonl").write_text(text.replace("ALPHA", "ALPHO", 1))


def change_model(directory, name):
    model = AutoModelForCausalLM.from_pretrained(directory / name)
    model.get_input_embeddings().weight.data.mul_(1.01)
    model.save_pretrained(directory / name)
    (directory / name / "manifest.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("change", "mention"),
    [
        (reverse_rows, "training rows"),
        (change_validation_row, "held-out rows"),
        (lambda directory: change_model(directory, "data/teacher"), "teacher"),
        (lambda directory: change_model(directory, "student"), "student"),
        (["--set", "eval.max_new_tokens=3"], "eval.max_new_tokens"),
    ],
)
def test_resume_with_changed_inputs_is_an_error(interrupted_run, tmp_path, capsys, monkeypatch, change, mention):
    shutil.copytree(interrupted_run, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    if callable(change):
        change(tmp_path / "home")
    outcome = call(capsys, *RESUME, *([] if callable(change) else change))
    assert_error(outcome, "checkpoint.changed", mention)


def test_resume_accepts_another_path_to_the_same_inputs(interrupted_run, tmp_path, capsys, monkeypatch):
    shutil.copytree(interrupted_run, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    (tmp_path / "link").symlink_to(tmp_path / "home/data")
    code, answer, _ = call(capsys, *RESUME, "--data", tmp_path / "link", "--student", "./student/")
    assert (code, answer.get("steps")) == (0, 20), answer
    monkeypatch.chdir(tmp_path)
    code, answer, _ = call(capsys, *RESUME[:3], "home/run", "--json", "--quiet")
    assert code != 0, "a missing directory is not the same"


def test_checkpoint_without_progress_is_damaged(tmp_path):
    Checkpoints(tmp_path / "checkpoints", lambda directory: None, keep=1).write(3, {}, {})
    with raises_code("checkpoint.damaged", "state.json"):
        find_checkpoint(tmp_path, Recipe())


def test_checkpoint_may_record_unused_fields(tmp_path):
    """Check that values of unused fields, which earlier versions recorded, do not prevent a resume."""
    recipe = Recipe.model_validate({"method": "kd", "data": {"source": "rows.jsonl"}, "schedule": {"kind": "off"}})
    recorded = fixed_values(recipe) | {"data.size": 8000, "rollout.teacher_mix": 0.5, "removed.field": 1}
    checkpoints = Checkpoints(tmp_path / "checkpoints", lambda directory: None, keep=1)
    progress = asdict(TrainerState())
    checkpoints.write(3, {"recipe": recorded | {"train.lr": 1.0}, "progress": progress}, {})
    with raises_code("checkpoint.changed", "removed.field"):
        find_checkpoint(tmp_path, recipe)
    del recorded["removed.field"]
    checkpoints.write(4, {"recipe": recorded, "progress": progress}, {})
    assert find_checkpoint(tmp_path, recipe).path.name == "step-000004"


def test_overwrite_deletes_only_files_of_a_run(workdir, tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    assert_error(call(capsys, *distill_argv(workdir, output)), "usage.output_exists", output)
    code, _, _ = call(capsys, *distill_argv(workdir, output, "--overwrite"))
    assert code == 0
    assert (output / "thesis.txt").read_text() == "mine"


@pytest.mark.long
def test_parquet_rows_are_read_during_imports_on_one_core(workdir, tmp_path):
    """Check that a thread reads the rows, while the main thread imports transformers, if there is only one core."""
    examples = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(examples), tmp_path / "rows.parquet")
    argv = [
        "sft",
        "--model",
        "random:1x32",
        "--tokenizer",
        "chars",
        "--data",
        tmp_path / "rows.parquet",
        "--steps",
        "1",
    ]
    argv = [str(a) for a in [*argv, "--output", tmp_path / "out", *SMALL]]
    script = f"""
import os, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from distillm_cli.__main__ import main
sys.argv[1:] = {argv!r}
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 1


def test_resolved_recipe_reproduces_the_run(workdir, tmp_path, capsys):
    assert call(capsys, *distill_argv(workdir, tmp_path / "first"))[0] == 0
    code, _, _ = call(
        capsys,
        "distill",
        "--recipe",
        tmp_path / "first" / "recipe.yaml",
        "--output",
        tmp_path / "second",
        "--json",
        "--quiet",
    )
    assert code == 0
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_best_weights_are_saved(workdir, tmp_path, capsys):
    code, result, _ = call(
        capsys, "sft", "--model", workdir / "teacher", "--data", workdir, "--steps", "15", "--lr", "0.5",
        "--output", tmp_path / "ruined", *SMALL,
    )  # fmt: skip
    assert code == 0
    assert result["best_step"] is not None
    lines = [json.loads(x) for x in (tmp_path / "ruined" / "metrics.jsonl").read_text().splitlines()]
    best = min(line["valid_loss"] for line in lines if "valid_loss" in line and line["step"])
    assert result["valid_loss"] == pytest.approx(best, rel=1e-5)


def bad_inputs(workdir, tmp_path):
    """Return tuples of (name, arguments, error code, text in the message)."""
    broken = write(tmp_path / "broken.jsonl", rows(3))
    broken.write_text(broken.read_text() + '{"instruction": "x", "output": \n')
    columns = write(tmp_path / "columns.jsonl", [{"ask": "a", "tell": "b"}])
    unknown = tmp_path / "unknown.yaml"
    unknown.write_text("objective: {alhpa: 0.1}\n")
    long = write(tmp_path / "long.jsonl", [{"instruction": f"{i}" + "x" * 500, "output": "y"} for i in range(40)])
    other = tmp_path / "other"
    shutil.copytree(workdir / "teacher", other)
    tokens = json.loads((other / "tokenizer.json").read_text())
    text = json.dumps(tokens)
    (other / "tokenizer.json").write_text(text.replace('"a":', '"a_":').replace('"a"', '"a_"'))
    (other / "manifest.json").unlink()
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    pair = ["distill", "--teacher", workdir / "teacher", "--student", "random:1x32"]
    base = [*pair, "--data", workdir]
    return [
        ("missing file", [*pair, "--data", "no/such/rows.jsonl"], "data.not_found", "no/such/rows.jsonl"),
        ("bad JSON", [*pair, "--data", broken], "data.invalid_json", "broken.jsonl:4"),
        ("missing column", [*pair, "--data", columns], "data.invalid_row", "columns.jsonl:1"),
        ("unknown key", [*base, "--recipe", unknown], "recipe.unknown_field", "objective.alpha"),
        ("alpha", [*base, "--alpha", "1.4"], "recipe.invalid_value", "1.4"),
        (
            "vocabularies",
            ["distill", "--teacher", workdir / "teacher", "--student", other, "--data", workdir],
            "model.different_vocabularies",
            "a_",
        ),
        ("output", [*base, "--output", full], "usage.output_exists", "full"),
        (
            "model",
            ["distill", "--teacher", "missing/model", "--student", "gpt2", "--data", workdir],
            "model.not_found",
            "missing/model",
        ),
        ("prompt", [*pair, "--data", long, "--set", "data.too_long=error"], "data.row_too_long", "long.jsonl:"),
        ("no rows fit", [*pair, "--data", long], "data.row_too_long", "long"),
        ("flag", [*base, "--aplha", "0.2"], "usage.unknown_option", "--alpha"),
        ("no teacher", ["distill", "--student", "random:1x32"], "usage.no_teacher", "--teacher"),
        ("resume", [*base, "--resume", "--output", tmp_path / "nowhere"], "checkpoint.nothing_to_resume", "nowhere"),
    ]


def test_bad_input_is_one_error_line(workdir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, argv, code, mention in bad_inputs(workdir, tmp_path):
        outcome = call(capsys, *argv, "--json")
        assert_error(outcome, code, mention)
        assert "Traceback" not in outcome[2], name


def test_module_and_script_are_the_same_program():
    run = subprocess.run(
        [sys.executable, "-m", "distillm_cli", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("distillm ")
    script = Path(sys.executable).with_name("distillm")
    if not script.exists():
        pytest.skip("distillm is not installed in this environment, only importable")
    assert subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout == run.stdout


def test_real_rows_with_a_real_tokenizer(shared_data, tmp_path, capsys, monkeypatch):
    """Train on Dolly from $DISTILLM_DATA with GPT-2's tokenizer and config, then evaluate."""
    monkeypatch.setenv("DISTILLM_DATA", str(shared_data))
    gpt2 = shared_data / "tokenizers" / "gpt2"
    model = ["--model", "random:gpt2:1x32", "--tokenizer", gpt2, "--data", "dolly", "--steps", "2", "--batch-size", "2"]
    options = ["data.limit=40", "data.valid_limit=4", "eval.report_rows=0"]
    sets = [word for field in options for word in ("--set", field)]
    code, result, _ = call(
        capsys, "sft", *model, "--dtype", "fp32", "--output", tmp_path / "m", "--json", "--quiet", *sets
    )
    assert (code, result["steps"]) == (0, 2)
    code, scores, _ = call(
        capsys,
        "eval",
        tmp_path / "m",
        "--suite",
        "dolly",
        "--seeds",
        "10",
        "--limit",
        "3",
        "--max-new-tokens",
        "4",
        "--json",
    )
    assert (code, scores["suites"]["dolly"]["rows"]) == (0, 3)
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.long
def test_quickstart_runs_and_its_teacher_is_good(tmp_path, capsys, monkeypatch):
    """Check a few steps of the shipped recipe: it uses rollouts, and its teacher pronounces most words."""
    monkeypatch.chdir(tmp_path)
    # Student outputs cost nothing, because few steps do not fit the rows.
    options = ("train.eval_steps=5", "data.limit=64", "eval.report_rows=90", "schedule.rollout_cost=0.01")
    few = ["--steps", "20", *(word for field in options for word in ("--set", field))]
    code, result, _ = call(capsys, "distill", "--recipe", "quickstart", *few, "--json", "--quiet")
    assert (code, result["output"]) == (0, "runs/quickstart-distillm")
    assert result["report"]["teacher"]["exact_match"] >= 55
    assert result["rollout_steps"] > 0
    assert result["report"]["student_after"]["valid_loss"] < result["report"]["student_before"]["valid_loss"]
    single_step = ["--steps", "1", "--set", "data.limit=64", "--set", "eval.report_rows=0"]
    again = call(capsys, "distill", "--recipe", "quickstart", *single_step, "--json", "--quiet")[1]
    assert again["output"].endswith("distillm-2")


@pytest.mark.long
def test_teacher_of_the_questions_is_good(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ["--steps", "2", "--set", "data.size=640", "--set", "eval.report_rows=90"]
    code, result, _ = call(capsys, "distill", "--recipe", "questions", *few, "--json", "--quiet")
    assert code == 0
    assert result["report"]["teacher"]["exact_match"] >= 90


@pytest.mark.parametrize("recipe", ["quickstart", "questions"])
def test_builtin_teacher_and_student_sizes(recipe):
    from distillm_cli.config.load import resolve
    from distillm_cli.models.model_paths import locate_model
    from distillm_cli.models.pair import load_pair

    resolved = resolve(command="distill", recipe=recipe).recipe
    assert sum(p.stat().st_size for p in Path(locate_model(resolved.teacher.path)[0]).iterdir()) <= 4_000_000
    pair = load_pair(resolved, device=torch.device("cpu"))
    teacher, student = (sum(p.numel() for p in m.model.parameters()) for m in (pair.teacher, pair.student))
    assert teacher >= 5 * student


@pytest.mark.long
def test_ctrl_c_stops_a_shell_loop(workdir, tmp_path):
    """Check Ctrl-C in a shell loop: the current run saves a checkpoint, and the next one does not start."""
    argv = [str(a) for a in distill_argv(workdir, "run-$i", "--steps", "4000", "--set", "train.eval_steps=1000")]
    command = " ".join(a if "$" in a else shlex.quote(a) for a in [sys.executable, "-m", "distillm_cli", *argv])
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execvpe("bash", ["bash", "-c", f"for i in 1 2; do {command}; done"], {**os.environ, "PYTHONPATH": str(ROOT)})
    shown, interrupted, metrics = b"", False, tmp_path / "run-1/metrics.jsonl"
    with suppress(OSError):  # on Linux, the other end of the terminal is closed
        while True:
            if select.select([terminal], [], [], 0.05)[0]:
                shown += os.read(terminal, 65536)
            if not interrupted and metrics.exists() and '"step": 7,' in metrics.read_text():
                interrupted = os.write(terminal, b"\x03") == 1
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) in (-signal.SIGINT, 130), shown.decode()
    assert b"stopped at step" in shown, shown.decode()
    assert list((tmp_path / "run-1/checkpoints").iterdir())
    assert not (tmp_path / "run-2").exists()
