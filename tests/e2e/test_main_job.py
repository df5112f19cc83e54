"""The four verbs, as typed: text in, a model out that ``from_pretrained`` loads, and every promise to scripts kept."""

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
from tests.typed import call
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillm_cli.cli.app import main
from distillm_cli.config.derived import fixed_values
from distillm_cli.config.schema import Recipe
from distillm_cli.errors import CheckpointError
from distillm_cli.runs.resume import find_checkpoint
from distillm_cli.training.checkpoint import Checkpoints
from distillm_cli.training.state import TrainerState

ROOT = Path(__file__).parents[2]
WORDS = ["alpha", "beta", "gamma", "delta", "kappa", "sigma", "omega", "theta", "iota", "zeta"]


def rows(n, offset=0):
    """Upper-casing, as instructions: a task that needs the prompt."""
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
def place(tmp_path_factory):
    """A data directory and a teacher made by ``distillm sft``."""
    place = tmp_path_factory.mktemp("job")
    (
        write(place / "train.jsonl", rows(64)),
        write(place / "valid.jsonl", rows(10, 3)),
        write(place / "test.jsonl", rows(10, 6)),
    )
    argv = ["sft", "--model", "random:2x48", "--tokenizer", "chars", "--data", place, "--output", place / "teacher"]
    assert main([str(a) for a in [*argv, "--steps", "30", "--lr", "5e-3", *SMALL]]) == 0
    return place


def distill_argv(place, output, *more):
    pair = ["--teacher", place / "teacher", "--student", "random:1x32", "--data", place]
    adaptive = ["--set", "schedule.epsilon=-10", "--set", "schedule.capacity=16", "--set", "schedule.levels=2"]
    return ["distill", *pair, "--output", output, "--steps", "20", "--lr", "5e-3", *adaptive, *SMALL, *more]


def test_sft_leaves_an_ordinary_model_directory(place):
    model = AutoModelForCausalLM.from_pretrained(place / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(place / "teacher")
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    names = {p.name for p in (place / "teacher").iterdir()}
    assert {"recipe.yaml", "metrics.jsonl", "checkpoints", "README.md", "model.safetensors", "config.json"} <= names
    modes = {p.stat().st_mode for p in (place / "teacher").rglob("*") if p.is_file()}
    assert modes == {(place / "train.jsonl").stat().st_mode}, "the umask holds for all, tensors included"
    card = (place / "teacher" / "README.md").read_text()
    assert "Valid CE on 10 held-out rows; scores on the first 6 of them, sampled at T = 1, in fp32." in card
    lines = [json.loads(line) for line in (place / "teacher" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 30
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]


def test_distill_gives_the_promised_object_and_a_model_that_eval_and_generate_take(place, tmp_path, capsys):
    code, result, _ = call(capsys, *distill_argv(place, tmp_path / "student"))
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
        capsys, "eval", tmp_path / "student", "--suite", place, "--seeds", "10,20", "--max-new-tokens", "8", "--json"
    )
    (suite,) = scores["suites"].values()
    assert (code, suite["rows"]) == (0, 10)
    assert set(suite["rouge_l"]["seeds"]) == {"10", "20"}

    written = tmp_path / "said.jsonl"
    code, generated, _ = call(
        capsys, "generate", "--model", tmp_path / "student", "--data", place, "--limit", "7", "--max-new-tokens", "8",
        "--output", written, "--json",
    )  # fmt: skip
    assert (code, generated["rows"]) == (0, 7)
    assert len(written.read_text().splitlines()) == 7

    code, again, _ = call(
        capsys, "distill", "--teacher", place / "teacher", "--student", tmp_path / "student", "--data", written,
        "--steps", "2", "--output", tmp_path / "on-samples", *SMALL,
    )  # fmt: skip
    assert (code, again["steps"]) == (0, 2)


def test_what_to_type_next_scores_rows_that_were_not_trained_on(place, tmp_path, capsys):
    """Test rows where the data has some; of a single file those held out, which need no word."""
    small = [word for word in SMALL if word != "--quiet"]
    alone = write(tmp_path / "rows.jsonl", rows(10))
    for data, suite in ((place, f" --suite {place}"), (alone, "")):
        output = tmp_path / f"{data.name}-out"
        argv = ["sft", "--model", place / "teacher", "--data", data, "--steps", "1", "--output", output]
        code, _, err = call(capsys, *argv, *small)
        assert code == 0, err
        typed = "".join(line.strip() for line in err[err.index("What next") :].splitlines())
        assert f"distillm eval {output}{suite}distillm generate".replace(" ", "") in typed.replace(" ", "")


def test_a_stopped_run_goes_on_to_the_same_weights(place, tmp_path, capsys):
    """Ctrl-C from outside, exit code 130, a usable checkpoint; ``--resume`` ends where the uninterrupted run does."""
    code, _, _ = call(capsys, *distill_argv(place, tmp_path / "whole", "--steps", "60"))
    assert code == 0
    argv = [str(a) for a in distill_argv(place, tmp_path / "cut", "--steps", "60")]
    process = subprocess.Popen([sys.executable, "-m", "distillm_cli", *argv], stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and '"step": 7,' in metrics.read_text():
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.01)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out
    assert json.loads(out)["code"] == 130
    (checkpoint,) = (tmp_path / "cut" / "checkpoints").iterdir()
    AutoModelForCausalLM.from_pretrained(checkpoint)

    code, result, _ = call(capsys, "distill", "--resume", "--output", tmp_path / "cut", "--json", "--quiet")
    assert (code, result["steps"]) == (0, 60)
    whole, cut = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    lines = {name: (tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut")}
    kept = {n: [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in ls] for n, ls in lines.items()}
    assert kept["whole"] == kept["cut"]


def test_what_the_teacher_computed_is_counted_for_the_whole_run(place, tmp_path, capsys):
    argv = distill_argv(place, tmp_path / "run", "--teacher-cache", "off", "--set", "train.save_steps=10")
    code, whole, err = call(capsys, *argv)
    assert code == 0, err
    shutil.rmtree(tmp_path / "run/checkpoints/step-000020")  # as if it had been stopped before that
    code, resumed, err = call(capsys, "distill", "--resume", "--output", tmp_path / "run", "--json", "--quiet")
    assert code == 0, err
    assert resumed["teacher_tokens"] == whole["teacher_tokens"] > 0


def test_each_validation_is_told_once_after_a_resume_from_before_the_first(place, tmp_path, capsys):
    output = tmp_path / "out"
    argv = distill_argv(place, output, "--set", "train.save_steps=4", "--steps", "6")
    whole = call(capsys, *argv)[1]
    shutil.rmtree(output / "checkpoints" / "step-000006")  # as if it had been killed at its end
    again = call(capsys, *argv, "--resume")[1]
    told = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told if "valid_loss" in line] == [0, 5, 6]
    assert again["report"] == whole["report"], "the student before among them"


def test_a_model_that_has_diverged_is_named_before_anything_is_trained_or_scored(place, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(place / "teacher", broken, ignore=shutil.ignore_patterns("checkpoints"))
    model = AutoModelForCausalLM.from_pretrained(broken)
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    model.save_pretrained(broken)
    (broken / "manifest.json").unlink()  # otherwise the change itself is named
    said = f"the model's logits are not finite; {broken}; its weights have diverged or are damaged"
    for argv in (
        distill_argv(place, tmp_path / "out", "--teacher", broken),
        ["eval", broken, "--suite", place / "test.jsonl", "--greedy", "--json", "--quiet"],
        ["generate", "--model", broken, "--prompt", "alpha", "--json", "--quiet", "--output", tmp_path / "said.jsonl"],
    ):
        code, answer, err = call(capsys, *argv)
        assert (code, answer["code"]) == (6, 6), err
        assert answer["message"].startswith(said)


def test_resume_with_a_changed_recipe_is_refused(place, tmp_path, capsys):
    assert call(capsys, *distill_argv(place, tmp_path / "run"))[0] == 0
    code, answer, err = call(capsys, *distill_argv(place, tmp_path / "run", "--resume", "--alpha", "0.3"))
    assert (code, answer["code"]) == (5, 5)
    assert "objective.alpha was 0.1, now 0.3" in err


@pytest.fixture(scope="module")
def stopped(place, tmp_path_factory):
    """A run as it was at step 10 of 20: its home with rows, teacher and student, from which it is typed."""
    home, here = tmp_path_factory.mktemp("stopped"), Path.cwd()
    shutil.copytree(place, home / "data", ignore=shutil.ignore_patterns("teacher"))
    shutil.copytree(place / "teacher", home / "data/teacher")
    os.chdir(home)
    try:
        argv = ["sft", "--model", "random:1x32", "--tokenizer", "data/teacher", "--data", "data", "--output", "student"]
        assert main([*argv, "--steps", "1", *SMALL]) == 0
        assert main(["distill", *STOPPED, "--set", "train.save_steps=10", *SMALL]) == 0
    finally:
        os.chdir(here)
    shutil.rmtree(home / "run/checkpoints/step-000020")
    return home


STOPPED = ["--teacher", "data/teacher", "--student", "student", "--data", "data", "--steps", "20", "--output", "run"]
STOPPED += ["--set", "train.select=exact_match", "--set", "train.eval_steps=10"]
RESUME = ["distill", "--resume", "--output", "run", "--json", "--quiet"]


def reverse_rows(home):
    lines = (home / "data/train.jsonl").read_text().splitlines(keepends=True)
    (home / "data/train.jsonl").write_text("".join(reversed(lines)))


def mend_a_held_out_row(home):
    text = (home / "data/valid.jsonl").read_text()
    (home / "data/valid.jsonl").write_text(text.replace("ALPHA", "ALPHO", 1))


def another_model(home, name):
    model = AutoModelForCausalLM.from_pretrained(home / name)
    model.get_input_embeddings().weight.data.mul_(1.01)
    model.save_pretrained(home / name)
    (home / name / "manifest.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (reverse_rows, "the training rows have changed since the run was started"),
        (mend_a_held_out_row, "the held-out rows have changed since the run was started"),
        (lambda home: another_model(home, "data/teacher"), "the teacher has changed since the run was started"),
        (lambda home: another_model(home, "student"), "the student has changed since the run was started"),
        (["--set", "eval.max_new_tokens=3"], "eval.max_new_tokens was 8, now 3"),
    ],
)
def test_a_run_does_not_go_on_with_something_else_under_the_same_name(
    stopped, tmp_path, capsys, monkeypatch, change, named
):
    shutil.copytree(stopped, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    if callable(change):
        change(tmp_path / "home")
    code, answer, _ = call(capsys, *RESUME, *([] if callable(change) else change))
    assert code == 5
    assert named in answer["message"]


def test_another_spelling_of_the_same_place_is_the_same(stopped, tmp_path, capsys, monkeypatch):
    shutil.copytree(stopped, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    (tmp_path / "link").symlink_to(tmp_path / "home/data")
    code, answer, _ = call(capsys, *RESUME, "--data", tmp_path / "link", "--student", "./student/")
    assert (code, answer.get("steps")) == (0, 20), answer
    monkeypatch.chdir(tmp_path)
    code, answer, _ = call(capsys, *RESUME[:3], "home/run", "--json", "--quiet")
    assert code != 0, "what is not there is not the same"


def test_a_checkpoint_that_says_nothing_of_its_run_is_damaged(tmp_path):
    Checkpoints(tmp_path / "checkpoints", lambda place: None, keep=1).write(3, {}, {})
    with pytest.raises(CheckpointError, match=r"unreadable: its state\.json has no progress"):
        find_checkpoint(tmp_path, Recipe())


def test_a_checkpoint_that_wrote_down_what_its_run_never_read_is_this_recipes_all_the_same(tmp_path):
    """Earlier versions took such values; what the steps depend on is as it was."""
    recipe = Recipe.model_validate({"method": "kd", "data": {"source": "rows.jsonl"}, "schedule": {"kind": "off"}})
    written = fixed_values(recipe) | {"data.size": 8000, "rollout.teacher_mix": 0.5, "of.long.ago": 1}
    checkpoints = Checkpoints(tmp_path / "checkpoints", lambda place: None, keep=1)
    progress = asdict(TrainerState())
    checkpoints.write(3, {"recipe": written | {"train.lr": 1.0}, "progress": progress}, {})
    with pytest.raises(CheckpointError, match=r"of.long.ago was 1, now None \(and 1 more\)"):
        find_checkpoint(tmp_path, recipe)
    del written["of.long.ago"]
    checkpoints.write(4, {"recipe": written, "progress": progress}, {})
    assert find_checkpoint(tmp_path, recipe).path.name == "step-000004"


def test_a_non_empty_output_is_refused_and_overwrite_clears_only_what_a_run_wrote(place, tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    code, _, err = call(capsys, *distill_argv(place, output))
    assert code == 2
    assert "is not empty" in err
    code, _, _ = call(capsys, *distill_argv(place, output, "--overwrite"))
    assert code == 0
    assert (output / "thesis.txt").read_text() == "mine"


def test_parquet_rows_are_read_beside_the_imports_on_one_core(place, tmp_path):
    """Without a core for a process of their own they are read by a thread, while the main one imports transformers."""
    asked = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(asked), tmp_path / "rows.parquet")
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


def test_the_resolved_recipe_reproduces_the_run(place, tmp_path, capsys):
    assert call(capsys, *distill_argv(place, tmp_path / "first"))[0] == 0
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


def test_the_best_weights_are_the_ones_published(place, tmp_path, capsys):
    code, result, _ = call(
        capsys, "sft", "--model", place / "teacher", "--data", place, "--steps", "15", "--lr", "0.5",
        "--output", tmp_path / "ruined", *SMALL,
    )  # fmt: skip
    assert code == 0
    assert result["best_step"] is not None
    lines = [json.loads(x) for x in (tmp_path / "ruined" / "metrics.jsonl").read_text().splitlines()]
    best = min(line["valid_loss"] for line in lines if "valid_loss" in line and line["step"])
    assert result["valid_loss"] == pytest.approx(best, rel=1e-5)


def bad_inputs(place, tmp_path):
    """(name, arguments, exit code, what the one line says)"""
    broken = write(tmp_path / "broken.jsonl", rows(3))
    broken.write_text(broken.read_text() + '{"instruction": "x", "output": \n')
    columns = write(tmp_path / "columns.jsonl", [{"ask": "a", "tell": "b"}])
    unknown = tmp_path / "unknown.yaml"
    unknown.write_text("objective: {alhpa: 0.1}\n")
    long = write(tmp_path / "long.jsonl", [{"instruction": f"{i}" + "x" * 500, "output": "y"} for i in range(40)])
    other = tmp_path / "other"
    shutil.copytree(place / "teacher", other)
    tokens = json.loads((other / "tokenizer.json").read_text())
    text = json.dumps(tokens)
    (other / "tokenizer.json").write_text(text.replace('"a":', '"a_":').replace('"a"', '"a_"'))
    (other / "manifest.json").unlink()
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    pair = ["distill", "--teacher", place / "teacher", "--student", "random:1x32"]
    base = [*pair, "--data", place]
    return [
        ("missing file", [*pair, "--data", "no/such/rows.jsonl"], 3, "no/such/rows.jsonl"),
        ("bad JSON", [*pair, "--data", broken], 3, "broken.jsonl:4: not JSON"),
        ("missing column", [*pair, "--data", columns], 3, "columns.jsonl:1"),
        ("unknown key", [*base, "--recipe", unknown], 2, "objective.alpha"),
        ("alpha", [*base, "--alpha", "1.4"], 2, "1.4"),
        ("vocabularies", ["distill", "--teacher", place / "teacher", "--student", other, "--data", place], 4, "a_"),
        ("output", [*base, "--output", full], 2, "is not empty"),
        (
            "model",
            ["distill", "--teacher", "nobody/nothing", "--student", "gpt2", "--data", place],
            4,
            "nobody/nothing",
        ),
        ("prompt", [*pair, "--data", long, "--set", "data.too_long=error"], 3, "long.jsonl:"),
        ("no rows fit", [*pair, "--data", long], 3, "too long"),
        ("flag", [*base, "--aplha", "0.2"], 2, "--alpha"),
        ("no teacher", ["distill", "--student", "random:1x32"], 2, "--teacher"),
        ("resume", [*base, "--resume", "--output", tmp_path / "nowhere"], 5, "nothing to resume"),
    ]


def test_bad_input_is_one_line_with_its_exit_code_and_nothing_is_lost(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, argv, code, says in bad_inputs(place, tmp_path):
        found, answer, err = call(capsys, *argv, "--json")
        complaint = [line for line in err.splitlines() if line.startswith("error: ")]
        assert found == code, (name, err)
        assert len(complaint) == 1, (name, err)
        assert says in complaint[0], (name, err)
        assert (answer["status"], answer["code"]) == ("error", code), name
        assert "Traceback" not in err, name


def test_module_and_script_are_the_same_program():
    run = subprocess.run(
        [sys.executable, "-m", "distillm_cli", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("distillm ")
    script = Path(sys.executable).with_name("distillm")
    if not script.exists():
        pytest.skip("distillm is not installed in this environment, only importable")
    assert subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout == run.stdout


def test_real_rows_through_a_real_tokenizer(shared_data, tmp_path, capsys, monkeypatch):
    """Dolly by name under $DISTILLM_DATA, GPT-2's tokenizer and config: SFT from scratch, then its suite."""
    monkeypatch.setenv("DISTILLM_DATA", str(shared_data))
    gpt2 = shared_data / "tokenizers" / "gpt2"
    model = ["--model", "random:gpt2:1x32", "--tokenizer", gpt2, "--data", "dolly", "--steps", "2", "--batch-size", "2"]
    small = ["data.limit=40", "data.valid_limit=4", "eval.report_rows=0"]
    sets = [word for field in small for word in ("--set", field)]
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


def test_the_quickstart_runs_in_small_and_its_teacher_is_good(tmp_path, capsys, monkeypatch):
    """The recipe as shipped, for a few steps: rollouts happen, and the built-in teacher answers nine rows in ten."""
    monkeypatch.chdir(tmp_path)
    small = (
        "train.eval_steps=10",
        "data.size=640",
        "eval.report_rows=90",
        "schedule.phi=0.3",
    )  # φ rises late otherwise
    few = ["--steps", "40", *(word for field in small for word in ("--set", field))]
    code, result, _ = call(capsys, "distill", "--recipe", "quickstart", *few, "--json", "--quiet")
    assert (code, result["output"]) == (0, "runs/quickstart-distillm")
    assert result["report"]["teacher"]["exact_match"] >= 90
    assert result["rollout_steps"] > 0
    assert result["report"]["student_after"]["valid_loss"] < result["report"]["student_before"]["valid_loss"]
    once = ["--steps", "1", "--set", "data.size=640", "--set", "eval.report_rows=0"]
    again = call(capsys, "distill", "--recipe", "quickstart", *once, "--json", "--quiet")[1]
    assert again["output"].endswith("distillm-2")


def test_the_built_in_teacher_fits_in_the_wheel_and_the_student_is_five_times_smaller():
    from distillm_cli.config.load import resolve
    from distillm_cli.models.model_paths import BUILTIN_TEACHER
    from distillm_cli.models.pair import load_pair

    assert sum(p.stat().st_size for p in BUILTIN_TEACHER.iterdir()) <= 4_000_000
    pair = load_pair(resolve(command="distill", recipe="quickstart").recipe, device=torch.device("cpu"))
    teacher, student = (sum(p.numel() for p in m.model.parameters()) for m in (pair.teacher, pair.student))
    assert teacher >= 5 * student


def test_ctrl_c_at_a_terminal_stops_the_shells_loop_too(place, tmp_path):
    """A sweep as people type it. The run in hand saves, and the next one is not begun."""
    argv = [str(a) for a in distill_argv(place, "run-$i", "--steps", "4000", "--set", "train.eval_steps=1000")]
    words = " ".join(a if "$" in a else shlex.quote(a) for a in [sys.executable, "-m", "distillm_cli", *argv])
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execvpe("bash", ["bash", "-c", f"for i in 1 2; do {words}; done"], {**os.environ, "PYTHONPATH": str(ROOT)})
    shown, pressed, metrics = b"", False, tmp_path / "run-1/metrics.jsonl"
    with suppress(OSError):  # how Linux says that nobody is at the terminal's other side any more
        while True:
            if select.select([terminal], [], [], 0.05)[0]:
                shown += os.read(terminal, 65536)
            if not pressed and metrics.exists() and '"step": 7,' in metrics.read_text():
                pressed = os.write(terminal, b"\x03") == 1
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) in (-signal.SIGINT, 130), shown.decode()
    assert b"stopped at step" in shown, shown.decode()
    assert list((tmp_path / "run-1/checkpoints").iterdir())
    assert not (tmp_path / "run-2").exists()
