"""Runs on a device that is not the CPU (a pretended one, ``tests.far``): nothing stays behind, and the numbers agree."""

import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from distillm_cli.config.methods import METHODS
from tests import far

pytestmark = pytest.mark.skipif(not far.there, reason="this torch has no backends written in Python")

ROOT = Path(__file__).parents[2]
FEW = (
    "data.size=60", "data.valid_limit=4", "eval.report_rows=0", "train.threads=1", "train.eval_steps=2",
    "train.save_steps=2", "train.log_steps=1", "train.batch_size=4", "rollout.max_new_tokens=4", "eval.max_new_tokens=4",
    "student.dtype=fp32",
)  # fmt: skip
TAUGHT = (*FEW, "teacher.dtype=fp32")
ADAPTIVE = ("rollout.bulk=2", "schedule.phi=0.7", "schedule.warm_up=none")


def words(*fields):
    return [word for field in fields for word in ("--set", field)]


@contextmanager
def started(*words):
    command = [sys.executable, "-m", "tests.far", *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def machine():
    """Another machine, which has the device."""
    with started() as process:
        yield process


@pytest.fixture(scope="module")
def strict_machine():
    """One whose device can do no more than Apple's MPS."""
    with started("strict") as process:
        yield process


@pytest.fixture
def on(typed, machine, tmp_path):
    """Types a command line here (device "cpu") or there; the JSON object."""
    return typist(typed, machine, tmp_path)


@pytest.fixture
def on_strict(typed, strict_machine, tmp_path):
    """The same, there being the strict machine."""
    return typist(typed, strict_machine, tmp_path)


def typist(typed, machine, tmp_path):
    def type_it(device, *argv):
        argv = [*argv, "--json", "--quiet"]
        if device == "cpu":
            code, result, err = typed(*argv)
        else:
            machine.stdin.write(json.dumps({"argv": argv, "cwd": str(tmp_path)}) + "\n")
            machine.stdin.flush()
            told = json.loads(machine.stdout.readline())
            code, result, err = told["code"], json.loads(told["out"]), told["err"]
        assert code == 0, err
        return result

    return type_it


def steps_of(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        [line.get(key) for key in ("step", "source", "loss", "grad_norm", "valid_loss", "reward")] for line in lines
    ]


def same(near, other):
    assert len(near) == len(other) > 0
    for mine, its in zip(near, other, strict=True):
        assert mine[:2] == its[:2]
        for a, b in zip(mine[2:], its[2:], strict=True):
            assert (a is None) == (b is None)
            assert a is None or a == pytest.approx(b, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.verb == "distill"])
def test_a_method_computes_there_what_it_computes_here(name, on, tmp_path):
    kind = METHODS[name].preset["schedule.kind"]
    more = {"adaptive": ADAPTIVE, "off": ()}.get(kind, ("rollout.bulk=2",))
    argv = ["distill", "--recipe", "quickstart", "--method", name, "--steps", "3", *words(*TAUGHT, *more)]
    results = [on(device, *argv, "--output", device) for device in ("cpu", far.NAME)]
    same(*(steps_of(tmp_path / device) for device in ("cpu", far.NAME)))
    for key in ("sampled_tokens", "teacher_sampled_tokens", "rollout_steps", "replay_steps"):
        assert results[0][key] == results[1][key]


@pytest.mark.parametrize(
    "fields",
    [
        ["--lora", "4", "--student", "layers:2"],
        ["--teacher-cache", "disk", *words("teacher.cache_dir=states")],
        ["--teacher-cache", "off", *words("train.accumulate=2", "train.gradient_checkpointing=true")],
        ["--student", "random:t5:1x32", "--teacher", "t5", *words("data.template=plain")],
        words("student.sft_epochs=0.1"),
    ],
    ids=["lora", "disk", "accumulate", "t5", "sft before"],
)
def test_so_do_the_other_ways_to_train(fields, on, tmp_path):
    if "t5" in fields:
        on("cpu", "sft", "--model", "random:t5:1x48", "--tokenizer", "chars", "--data", "builtin", "--steps", "2",
           "--output", "t5", *words(*FEW, "data.template=plain"))  # fmt: skip
    argv = ["distill", "--recipe", "quickstart", "--steps", "3", *words(*TAUGHT, *ADAPTIVE), *fields]
    for device in ("cpu", far.NAME):
        on(device, *argv, "--output", device)
    same(*(steps_of(tmp_path / device) for device in ("cpu", far.NAME)))


def test_a_stopped_run_goes_on_there_bit_for_bit(on, tmp_path):
    argv = ["distill", "--recipe", "quickstart", *words(*TAUGHT, *ADAPTIVE, "train.keep=9")]
    whole = on(far.NAME, *argv, "--steps", "6", "--output", "whole")
    for late in ("step-000004", "step-000006"):
        shutil.rmtree(tmp_path / "whole" / "checkpoints" / late)
    resumed = on(far.NAME, "distill", "--resume", "--output", "whole")
    assert resumed["train_loss"] == whole["train_loss"]
    assert resumed["valid_loss"] == whole["valid_loss"]


@pytest.mark.parametrize("name", ["distillm", "distillm2", "minillm", "skd", "ab"])
def test_a_device_without_float64_whose_copies_may_lag_computes_the_same(name, on_strict, tmp_path):
    more = {
        "distillm": (*ADAPTIVE, "rollout.top_p=0.9"),
        "minillm": ("rollout.bulk=2",),
        "ab": ("objective.ab_alpha=0.01", "objective.ab_beta=0.01"),  # told apart in float64
    }.get(name, ())
    argv = ["distill", "--recipe", "quickstart", "--method", name, "--steps", "3", *words(*TAUGHT, *more)]
    for device in ("cpu", far.NAME):
        on_strict(device, *argv, "--output", device)
    same(*(steps_of(tmp_path / device) for device in ("cpu", far.NAME)))


def test_responses_and_scores_are_those_made_here(on, tmp_path):
    on("cpu", "distill", "--recipe", "quickstart", "--steps", "2", *words(*TAUGHT), "--output", "student")
    for device in ("cpu", far.NAME):
        on(device, "generate", "--model", "student", "--data", "builtin", "--output", f"{device}.jsonl", "--dtype", "fp32",
           *words("data.size=12", "rollout.max_new_tokens=4"))  # fmt: skip
    rows = [(tmp_path / f"{device}.jsonl").read_text() for device in ("cpu", far.NAME)]
    assert rows[0] == rows[1] != ""
    scored = ["eval", "student", "--suite", "builtin", "--dtype", "fp32"]
    scored += words("eval.limit=8", "eval.max_new_tokens=4")
    found = [on(device, *scored, "--output", f"scores-{device}")["suites"]["builtin"] for device in ("cpu", far.NAME)]
    assert found[0]["exact_match"] == found[1]["exact_match"]
    assert found[0]["tokens"] == found[1]["tokens"] > 0


def in_a_process(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_step_waits_for_the_device_once():
    """For its loss and norm, which are told together; not in the models' passes either."""
    script = """
from distillm_cli.training.events import Stepped
from tests import far
from tests.unit import test_trainer
for method, family in (("sft", "gpt2"), ("off", "gemma2"), ("off", "mistral")):
    with far.using() as waits:
        def step(event):
            if isinstance(event, Stepped):
                print(dict(waits))
                waits.clear()
        student = test_trainer.student(family).to(far.NAME)
        test_trainer.build(method=method, backbone=student, listener=step, device=far.NAME, eval_steps=1000).train()
"""
    told = in_a_process(script).splitlines()
    assert len(told) == 36
    waited = {line for at, line in enumerate(told) if at % 12}  # without the first, which held the validation before it
    assert waited == {"{'tolist': 1}"}


def test_what_the_pretended_device_refuses():
    """The check can fail: what stops a program on a GPU stops it there."""
    script = """
import torch
from tests import far
with far.using():
    x, y = torch.ones(3).to(far.NAME), torch.ones(3)
    for wrong in (lambda: x + y, lambda: torch.mm(x[None], y[:, None]), lambda: torch.where(x > 0, x, y), lambda: x.numpy()):
        try:
            print("done", wrong())
        except (RuntimeError, TypeError) as error:
            print("refused:", str(error)[:21])
    print((x * 2 + 1).cpu().tolist(), (x + 1).device)
"""
    assert in_a_process(script).splitlines() == [
        *["refused: tensors of two device"] * 3,
        "refused: a tensor of a device ",
        "[3.0, 3.0, 3.0] far:0",
    ]
