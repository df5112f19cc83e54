"""Test runs on a simulated device: all tensors are moved to it, and the numbers match those of the CPU."""

import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from distillm_cli.config.methods import METHODS
from tests import simulated_device
from tests.command_line import fields_of
from tests.marks import long

pytestmark = pytest.mark.skipif(
    not simulated_device.supported, reason="this torch does not support backends written in Python"
)

ROOT = Path(__file__).parents[2]
DEVICES = ("cpu", simulated_device.NAME)
FEW = (
    "data.size=60", "data.valid_limit=4", "eval.report_rows=0", "train.threads=1", "train.eval_steps=2",
    "train.save_steps=2", "train.log_steps=1", "train.batch_size=4", "rollout.max_new_tokens=4", "eval.max_new_tokens=4",
    "student.dtype=fp32",
)  # fmt: skip
DISTILL = (*FEW, "teacher.dtype=fp32")
ADAPTIVE = ("rollout.bulk=2", "schedule.phi=0.7", "schedule.warm_up=none")


def set_options(*fields):
    return [word for field in fields for word in ("--set", field)]


@contextmanager
def start_worker(*argv):
    command = [sys.executable, "-m", "tests.simulated_device", *argv]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def worker():
    """Start a process that runs command lines on the device."""
    with start_worker() as process:
        yield process


@pytest.fixture(scope="module")
def strict_worker():
    """Start a process whose device has the limits of Apple's MPS."""
    with start_worker("strict") as process:
        yield process


@pytest.fixture
def run_on(cli, worker, tmp_path):
    """Return a function: device, command line → the JSON object."""
    return make_runner(cli, worker, tmp_path)


@pytest.fixture
def run_on_strict(cli, strict_worker, tmp_path):
    """Return the same function for the device with the limits of MPS."""
    return make_runner(cli, strict_worker, tmp_path)


def make_runner(cli, worker, tmp_path):
    def run(device, *argv):
        argv = [*argv, "--json", "--quiet"]
        if device == "cpu":
            code, result, err = cli(*argv)
        else:
            worker.stdin.write(json.dumps({"argv": argv, "cwd": str(tmp_path)}) + "\n")
            worker.stdin.flush()
            outcome = json.loads(worker.stdout.readline())
            code, result, err = outcome["code"], json.loads(outcome["out"]), outcome["err"]
        assert code == 0, err
        return result

    return run


def steps_of(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        [line.get(key) for key in ("step", "source", "loss", "grad_norm", "valid_loss", "reward")] for line in lines
    ]


def assert_same_steps(expected, actual):
    assert len(expected) == len(actual) > 0
    for one, two in zip(expected, actual, strict=True):
        assert one[:2] == two[:2]
        for a, b in zip(one[2:], two[2:], strict=True):
            assert (a is None) == (b is None)
            assert a is None or a == pytest.approx(b, rel=1e-3, abs=1e-5)


DEFAULT = ("kd",)  # rows alone; the tests below sample student outputs


@pytest.mark.parametrize(
    "name",
    [name if name in DEFAULT else long(name) for name, method in METHODS.items() if method.verb == "distill"],
)
def test_method_matches_cpu(name, run_on, tmp_path):
    kind = METHODS[name].preset["schedule.kind"]
    more = {"adaptive": ADAPTIVE, "off": ()}.get(kind, ("rollout.bulk=2",))
    fields = set_options(*fields_of(name, (*DISTILL, *more)))
    argv = ["distill", "--recipe", "questions", "--method", name, "--steps", "3", *fields]
    results = [run_on(device, *argv, "--output", device) for device in DEVICES]
    assert_same_steps(*(steps_of(tmp_path / device) for device in DEVICES))
    for key in ("sampled_tokens", "teacher_sampled_tokens", "rollout_steps", "replay_steps"):
        assert results[0][key] == results[1][key]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(["--teacher-cache", "off", *set_options("teacher.offload=true")], id="offload"),
        long(
            ["--teacher-cache", "disk", *set_options("teacher.cache_dir=states", "teacher.offload=true")],
            id="offload disk cache",
        ),
        long(["--teacher-cache", "memory", *set_options("teacher.device_map=cpu")], id="cpu"),
        long(set_options("train.gradient_checkpointing=true", "train.offload_activations=true"), id="activations"),
    ],
)
def test_memory_option_changes_no_figure(fields, run_on, tmp_path):
    argv = ["distill", "--recipe", "questions", "--steps", "3", *set_options(*DISTILL, *ADAPTIVE)]
    run_on("cpu", *argv, "--output", "cpu")
    run_on(simulated_device.NAME, *argv, "--output", simulated_device.NAME, *fields)
    assert_same_steps(*(steps_of(tmp_path / device) for device in DEVICES))


@pytest.mark.parametrize(
    "fields",
    [
        long(set_options("train.optimizer=adafactor"), id="adafactor"),
        pytest.param(["--lora", "4", "--student", "layers:2"], id="lora"),
        long(["--teacher-cache", "disk", *set_options("teacher.cache_dir=states")], id="disk cache"),
        long(
            ["--teacher-cache", "off", *set_options("train.accumulate=2", "train.gradient_checkpointing=true")],
            id="accumulate",
        ),
        long(["--student", "random:t5:1x32", "--teacher", "t5", *set_options("data.template=plain")], id="t5"),
        long(set_options("student.sft_epochs=0.1"), id="sft stage"),
    ],
)
def test_training_option_matches_cpu(fields, run_on, tmp_path):
    if "t5" in fields:
        argv = ["sft", "--model", "random:t5:1x48", "--tokenizer", "chars", "--data", "builtin", "--steps", "2"]
        run_on("cpu", *argv, "--output", "t5", *set_options(*FEW, "data.template=plain"))
    argv = ["distill", "--recipe", "questions", "--steps", "3", *set_options(*DISTILL, *ADAPTIVE), *fields]
    for device in DEVICES:
        run_on(device, *argv, "--output", device)
    assert_same_steps(*(steps_of(tmp_path / device) for device in DEVICES))


@pytest.mark.long
def test_resume_matches_uninterrupted_run(run_on, tmp_path):
    argv = ["distill", "--recipe", "questions", *set_options(*DISTILL, *ADAPTIVE, "train.keep=9")]
    full = run_on(simulated_device.NAME, *argv, "--steps", "6", "--output", "full")
    for step in ("step-000004", "step-000006"):
        shutil.rmtree(tmp_path / "full" / "checkpoints" / step)
    resumed = run_on(simulated_device.NAME, "distill", "--resume", "--output", "full")
    assert resumed["train_loss"] == full["train_loss"]
    assert resumed["valid_loss"] == full["valid_loss"]


@pytest.mark.long
@pytest.mark.parametrize("name", ["distillm", "distillm2", "minillm", "skd", "ab"])
def test_device_with_mps_limits_matches_cpu(name, run_on_strict, tmp_path):
    more = {
        "distillm": (*ADAPTIVE, "rollout.top_p=0.9"),
        "minillm": ("rollout.bulk=2",),
        "ab": ("objective.ab_alpha=0.01", "objective.ab_beta=0.01"),  # computed in float64 on other devices
    }.get(name, ())
    argv = ["distill", "--recipe", "questions", "--method", name, "--steps", "3", *set_options(*DISTILL, *more)]
    for device in DEVICES:
        run_on_strict(device, *argv, "--output", device)
    assert_same_steps(*(steps_of(tmp_path / device) for device in DEVICES))


def test_responses_and_scores_match_cpu(run_on, tmp_path):
    run_on("cpu", "distill", "--recipe", "questions", "--steps", "2", *set_options(*DISTILL), "--output", "student")
    for device in DEVICES:
        argv = ["generate", "--model", "student", "--data", "builtin", "--dtype", "fp32"]
        argv += set_options("data.size=12", "rollout.max_new_tokens=4")
        run_on(device, *argv, "--output", f"{device}.jsonl")
    rows = [(tmp_path / f"{device}.jsonl").read_text() for device in DEVICES]
    assert rows[0] == rows[1] != ""
    argv = ["eval", "student", "--suite", "builtin", "--dtype", "fp32"]
    argv += set_options("eval.limit=8", "eval.max_new_tokens=4")
    scores = [run_on(device, *argv, "--output", f"scores-{device}")["suites"]["builtin"] for device in DEVICES]
    assert scores[0]["exact_match"] == scores[1]["exact_match"]
    assert scores[0]["tokens"] == scores[1]["tokens"] > 0


def run_script(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_step_waits_for_the_device_once():
    """Check that a training step waits once, for its loss and gradient norm, and not in the forward passes."""
    script = """
from distillm_cli.training.events import Stepped
from tests import simulated_device
from tests.unit import test_trainer
for method, family in (("sft", "gpt2"), ("off", "gemma2"), ("off", "mistral")):
    with simulated_device.using() as waits:
        def step(event):
            if isinstance(event, Stepped):
                print(dict(waits))
                waits.clear()
        student = test_trainer.student(family).to(simulated_device.NAME)
        placement = {"backbone": student, "device": simulated_device.NAME}
        test_trainer.build(method=method, listener=step, eval_steps=1000, **placement).train()
"""
    lines = run_script(script).splitlines()
    assert len(lines) == 36
    # Without the first step, which includes the validation before it.
    waits = {line for i, line in enumerate(lines) if i % 12}
    assert waits == {"{'tolist': 1}"}


@pytest.mark.long
def test_simulated_device_raises_errors_like_a_gpu():
    """Check that operations that fail on a GPU fail on the simulated device."""
    script = """
import torch
from tests import simulated_device
with simulated_device.using():
    x, y = torch.ones(3).to(simulated_device.NAME), torch.ones(3)
    add, multiply = lambda: x + y, lambda: torch.mm(x[None], y[:, None])
    for operation in (add, multiply, lambda: torch.where(x > 0, x, y), lambda: x.numpy()):
        try:
            print("done", operation())
        except (RuntimeError, TypeError) as error:
            print("error:", str(error)[:20])
    print((x * 2 + 1).cpu().tolist(), (x + 1).device)
"""
    assert run_script(script).splitlines() == [
        *["error: tensors on two devic"] * 3,
        "error: a device tensor is n",
        "[3.0, 3.0, 3.0] simulated:0",
    ]
