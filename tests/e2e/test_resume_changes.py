"""Test settings that may change on a resume, and checkpoints of another version."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from distillm_cli.cli.app import main
from distillm_cli.utils import manifest
from tests.command_line import assert_error
from tests.e2e.test_main_job import SMALL, rows, write
from tests.marks import long

KD = ["distill", "--method", "kd", "--teacher", "teacher", "--student", "random:1x24", "--data", "data", *SMALL]
SAVING = ["--keep", "2", "--set", "train.save_steps=2", "--set", "train.eval_steps=2"]


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for split in ("train", "valid", "test"):
        write(tmp_path / f"data/{split}.jsonl", rows(24))
    argv = ["sft", "--model", "random:1x32", "--tokenizer", "chars", "--data", "data", "--output", "teacher", *SMALL]
    assert main([*argv, "--steps", "2"]) == 0
    return tmp_path


def weights(output):
    return load_file(output / "model.safetensors")


def equal_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("schedule", "length"),
    [long("constant", "steps"), long("constant", "epochs"), long("cosine", "steps"), ("cosine", "epochs")],
)
def test_resume_with_more_steps(cli, workdir, length, schedule):
    """Check that a run resumed with more steps matches a long run if the learning rate is constant."""
    argv = [*KD, *SAVING, "--set", f"train.lr_schedule={schedule}", "--lr", "1e-3"]
    short, long = (["--steps", n] if length == "steps" else ["--epochs", e] for n, e in (("6", "2"), ("9", "3")))
    for output, more in (("full", long), ("parts", short)):
        code, result, _ = cli(*argv, *more, "--output", output)
        assert code == 0, result
    code, result, err = cli("distill", *long, "--output", "parts", "--resume", "--json", "--quiet")
    assert (code, result["steps"]) == (0, 9), result
    assert "the run is longer than before: 9 steps instead of 6" in err
    assert "learning rate" in err
    assert equal_weights(weights(workdir / "full"), weights(workdir / "parts")) == (schedule == "constant")
    outcome = cli("distill", *short, "--output", "parts", "--resume", "--json", "--quiet")
    assert_error(outcome, "checkpoint.changed", "9 steps", "6")


def test_adaptive_run_resumes_with_more_steps(cli, workdir):
    adaptive = ["--set", "schedule.epsilon=-10", "--set", "schedule.capacity=16", "--set", "schedule.levels=2"]
    argv = [*KD, *SAVING, *adaptive, "--output", "run", "--steps", "6"]
    argv[argv.index("kd")] = "distillm"
    assert cli(*argv)[0] == 0
    code, result, _ = cli("distill", "--steps", "12", "--output", "run", "--resume", "--json", "--quiet")
    assert (code, result["steps"]) == (0, 12), result
    assert result["rollout_steps"] + result["replay_steps"] > 0


def test_save_settings_may_change_on_resume(cli, workdir):
    argv = [*KD, "--steps", "6", "--output", "run"]
    assert cli(*argv, *SAVING)[0] == 0
    before = weights(workdir / "run")
    shutil.rmtree(workdir / "run/checkpoints/step-000006")
    changes = ["--set", "train.save_steps=5", "--set", "student.save_dtype=bf16"]
    code, result, err = cli("distill", *changes, "--output", "run", "--resume", "--json", "--quiet")
    assert code == 0, result
    assert "longer" not in err
    assert equal_weights(weights(workdir / "run"), {name: weight.bfloat16() for name, weight in before.items()})
    assert (workdir / "run/checkpoints/step-000005").is_dir()
    outcome = cli("distill", "--lr", "0.5", "--output", "run", "--resume", "--json", "--quiet")
    assert_error(outcome, "checkpoint.changed", "train.lr")


def write_manifest(path):
    manifest.seal_directory(path, [file for file in path.iterdir() if file.name != manifest.MANIFEST], step=6)


def without(*keys):
    def change(state, tensors):
        section = state
        for key in keys[:-1]:
            section = section[key]
        del section[keys[-1]]

    return change


CHANGES = {
    "unknown progress field": lambda state, tensors: state["progress"].update(future_field=1),
    "no step": without("progress", "step"),
    "no schedule": without("scheduler"),
    "another kind of schedule": lambda state, tensors: state.update(scheduler=[1]),
    "no random state": lambda state, tensors: tensors.pop("random.cpu"),
    "no optimizer": lambda state, tensors: [tensors.pop(name) for name in [*tensors] if "random" not in name],
    "optimizer of another shape": lambda state, tensors: tensors.update(
        {name: torch.zeros(3) for name in tensors if "exp_avg" in name}
    ),
    "steps not a number": lambda state, tensors: state["recipe"].update({"train.steps": "many"}),
}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    for split in ("train", "valid", "test"):
        write(workdir / f"{split}.jsonl", rows(24))
    argv = ["sft", "--model", "random:1x24", "--tokenizer", "chars", "--data", workdir, *SMALL, *SAVING, "--steps", "6"]
    assert main([str(a) for a in [*argv, "--output", workdir / "run"]]) == 0
    return workdir


@pytest.mark.parametrize("change", CHANGES)
def test_checkpoint_of_another_version_is_an_error(cli, finished_run, tmp_path, change):
    run = shutil.copytree(finished_run / "run", tmp_path / "run")
    newest = run / "checkpoints/step-000006"
    state, tensors = json.loads((newest / "state.json").read_text()), load_file(newest / "training.safetensors")
    CHANGES[change](state, tensors)
    (newest / "state.json").write_text(json.dumps(state))
    save_file(tensors, newest / "training.safetensors")
    write_manifest(newest)
    assert_error(cli("sft", "--output", run, "--resume", "--json", "--quiet"), "checkpoint.other_version", newest)


def test_checkpoint_with_other_weights_is_an_error(cli, finished_run, tmp_path):
    run = shutil.copytree(finished_run / "run", tmp_path / "run")
    newest = run / "checkpoints/step-000006"
    tensors = load_file(newest / "model.safetensors")
    save_file({name: weight[:1].clone() for name, weight in tensors.items()}, newest / "model.safetensors")
    write_manifest(newest)
    assert_error(cli("sft", "--output", run, "--resume", "--json", "--quiet"), "checkpoint.other_version", newest)


@pytest.mark.parametrize(
    "fields",
    [
        # With φ = 0.5 there are rollouts and replay from the start; validations change it.
        ("schedule.trigger=gap", "schedule.phi=0.5"),
        long(("schedule.trigger=gain", "schedule.phi=0.5")),
        long(("schedule.kind=auto", "schedule.rollout_cost=0.1")),  # the rows of a short run are not fitted
        ("schedule.kind=mixed", "schedule.replay=constant", "schedule.freshness=true", "rollout.prefix=2->6"),
    ],
)
def test_resume_of_a_schedule_with_phi_matches_uninterrupted_run(cli, workdir, fields):
    fields += ("schedule.capacity=8", "schedule.warm_up=none")
    schedule = [f"--set={field}" for field in fields]
    argv = [*KD, *SAVING, *schedule, "--keep", "9", "--set", "train.eval_steps=5", "--steps", "12", "--output", "whole"]
    argv[argv.index("kd")] = "distillm"
    code, whole, err = cli(*argv)
    assert code == 0, err
    assert whole["rollout_steps"] + whole["replay_steps"] > 0
    before = weights(workdir / "whole")
    for step in (8, 10, 12):  # as if interrupted after step 7
        shutil.rmtree(workdir / f"whole/checkpoints/step-{step:06d}")
    code, resumed, err = cli(*argv, "--resume")
    assert (code, resumed["phi"], resumed["rollout_steps"]) == (0, whole["phi"], whole["rollout_steps"]), err
    assert equal_weights(before, weights(workdir / "whole"))
