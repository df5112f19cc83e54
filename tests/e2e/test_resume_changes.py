"""What a resume may change, and what it makes of a checkpoint that another version wrote."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from distillm_cli.cli.app import main
from distillm_cli.utils import manifest
from tests.e2e.test_main_job import SMALL, rows, write

KD = ["distill", "--method", "kd", "--teacher", "teacher", "--student", "random:1x24", "--data", "data", *SMALL]
SAVING = ["--set", "train.save_steps=2", "--set", "train.eval_steps=2"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for split in ("train", "valid", "test"):
        write(tmp_path / f"data/{split}.jsonl", rows(24))
    argv = ["sft", "--model", "random:1x32", "--tokenizer", "chars", "--data", "data", "--output", "teacher", *SMALL]
    assert main([*argv, "--steps", "2"]) == 0
    return tmp_path


def weights(output):
    return load_file(output / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("length", ["steps", "epochs"])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_run_goes_on_for_longer(typed, home, length, schedule):
    """With a constant rate it is the longer run, bit for bit; with a falling one it is another, and says so."""
    argv = [*KD, *SAVING, "--set", f"train.lr_schedule={schedule}", "--lr", "1e-3"]
    few, many = (["--steps", n] if length == "steps" else ["--epochs", e] for n, e in (("6", "2"), ("9", "3")))
    for output, more in (("whole", many), ("parts", few)):
        code, told, _ = typed(*argv, *more, "--output", output)
        assert code == 0, told
    code, told, err = typed("distill", *many, "--output", "parts", "--resume", "--json", "--quiet")
    assert (code, told["steps"]) == (0, 9), told
    assert "the run is longer than before: 9 steps instead of 6" in err
    assert "learning rate" in err
    assert same(weights(home / "whole"), weights(home / "parts")) == (schedule == "constant")
    code, told, _ = typed("distill", *few, "--output", "parts", "--resume", "--json", "--quiet")
    assert (code, "started with 9 steps, now it has 6" in told["message"]) == (5, True), told


def test_an_adaptive_run_goes_on_for_longer(typed, home):
    adaptive = ["--set", "schedule.epsilon=-10", "--set", "schedule.capacity=16", "--set", "schedule.levels=2"]
    argv = [*KD, *SAVING, *adaptive, "--output", "run", "--steps", "6"]
    argv[argv.index("kd")] = "distillm"
    assert typed(*argv)[0] == 0
    code, told, _ = typed("distill", "--steps", "12", "--output", "run", "--resume", "--json", "--quiet")
    assert (code, told["steps"]) == (0, 12), told
    assert told["rollout_steps"] + told["replay_steps"] > 0


def test_saving_may_change_on_a_resume(typed, home):
    argv = [*KD, "--steps", "6", "--output", "run"]
    assert typed(*argv, *SAVING)[0] == 0
    before = weights(home / "run")
    shutil.rmtree(home / "run/checkpoints/step-000006")
    changes = ["--set", "train.save_steps=5", "--set", "student.save_dtype=bf16"]
    code, told, err = typed("distill", *changes, "--output", "run", "--resume", "--json", "--quiet")
    assert code == 0, told
    assert "longer" not in err
    assert same(weights(home / "run"), {name: weight.bfloat16() for name, weight in before.items()})
    assert (home / "run/checkpoints/step-000005").is_dir()
    code, told, _ = typed("distill", "--lr", "0.5", "--output", "run", "--resume", "--json", "--quiet")
    assert (code, "train.lr" in told["message"]) == (5, True), "what shapes the steps may not"


def seal(path):
    manifest.seal_directory(path, [file for file in path.iterdir() if file.name != manifest.MANIFEST], step=6)


def without(*keys):
    def change(state, tensors):
        place = state
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]

    return change


CHANGES = {
    "a field of progress that is not known": lambda state, tensors: state["progress"].update(of_tomorrow=1),
    "no step": without("progress", "step"),
    "no schedule": without("scheduler"),
    "a schedule of another kind": lambda state, tensors: state.update(scheduler=[1]),
    "no random state": lambda state, tensors: tensors.pop("random.cpu"),
    "no optimizer": lambda state, tensors: [tensors.pop(name) for name in [*tensors] if "random" not in name],
    "an optimizer of another shape": lambda state, tensors: tensors.update(
        {name: torch.zeros(3) for name in tensors if "exp_avg" in name}
    ),
    "steps that are no number": lambda state, tensors: state["recipe"].update({"train.steps": "many"}),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    home = tmp_path_factory.mktemp("finished")
    for split in ("train", "valid", "test"):
        write(home / f"{split}.jsonl", rows(24))
    argv = ["sft", "--model", "random:1x24", "--tokenizer", "chars", "--data", home, "--output", home / "run", *SMALL]
    assert main([str(a) for a in [*argv, *SAVING, "--steps", "6"]]) == 0
    return home


@pytest.mark.parametrize("change", CHANGES)
def test_a_sealed_checkpoint_of_another_version_is_refused(typed, finished, tmp_path, change):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    newest = run / "checkpoints/step-000006"
    state, tensors = json.loads((newest / "state.json").read_text()), load_file(newest / "training.safetensors")
    CHANGES[change](state, tensors)
    (newest / "state.json").write_text(json.dumps(state))
    save_file(tensors, newest / "training.safetensors")
    seal(newest)
    code, told, _ = typed("sft", "--output", run, "--resume", "--json", "--quiet")
    assert (code, str(newest) in told["message"]) == (5, True), told


def test_a_sealed_checkpoint_with_other_weights_is_refused(typed, finished, tmp_path):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    newest = run / "checkpoints/step-000006"
    tensors = load_file(newest / "model.safetensors")
    save_file({name: weight[:1].clone() for name, weight in tensors.items()}, newest / "model.safetensors")
    seal(newest)
    code, told, _ = typed("sft", "--output", run, "--resume", "--json", "--quiet")
    assert (code, str(newest) in told["message"]) == (5, True), told
