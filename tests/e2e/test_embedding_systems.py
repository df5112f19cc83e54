"""Test MixKD, KDIGA, hidden states, adversarial fine-tuning and ``eval --attack`` from the command line, with resume."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from distillm_cli.training.trainer import Trainer
from tests import tiny
from tests.command_line import assert_error
from tests.marks import long

SHORT = [
    "--steps", "8", "--batch-size", "4",
    "--set", "data.size=16", "--set", "eval.report_rows=0", "--set", "data.valid_limit=4",
    "--set", "train.log_steps=1", "--set", "train.threads=1", "--json",
]  # fmt: skip
DISTILL = ["distill", "--recipe", "questions", *SHORT, "--set", "student.sft_epochs=0", "--student", "random:1x32"]
MIXKD = [*DISTILL, "--method", "mixkd"]
HIDDEN = [*DISTILL, "--method", "gkd", "--set", "rollout.max_new_tokens=6", "--set", "objective.hidden=0.5"]
KDIGA = [*DISTILL, "--method", "kdiga", "--set", "kdiga.every=2", "--set", "kdiga.candidates=8"]
ROBUST = [
    "sft",
    "--data",
    "builtin",
    *SHORT,
    "--model",
    "random:1x32",
    "--tokenizer",
    "chars",
    "--set",
    "train.adversarial=pgd",
]


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def same_weights(*directories):
    first, second = (load_file(f"{directory}/model.safetensors") for directory in directories)
    return all(torch.equal(value, second[name]) for name, value in first.items())


RUNS = [
    (MIXKD, "llama", ["--teacher-cache", "disk", "--set", "teacher.cache_dir=states"]),
    (MIXKD, "t5", ["--teacher-cache", "memory"]),
    (KDIGA, "llama", ["--teacher-cache", "disk", "--set", "teacher.cache_dir=states"]),
    (KDIGA, "t5", []),
    (HIDDEN, "llama", ["--set", "hidden.layers=even", "--set", "hidden.loss=cosine"]),
    (HIDDEN, "t5", ["--set", "train.accumulate=2", "--student", "random:t5:1x16"]),
    (ROBUST, None, ["--set", "data.mixup=0.4"]),
]
IDS = ["mixkd", "mixkd-t5", "kdiga", "kdiga-t5", "hidden", "hidden-t5", "sft"]


@pytest.mark.parametrize(
    ("argv", "family", "settings"), [case if case[1] != "t5" else long(*case) for case in RUNS], ids=IDS
)
def test_resume_matches_uninterrupted_run(cli, monkeypatch, tmp_path, argv, family, settings):
    argv = [*argv, *settings]
    if family == "t5":
        argv += ["--teacher", tiny.save(tmp_path / "teacher", family)]
    code, full, err = cli(*argv, "--output", "full")
    assert code == 0, err
    if argv[: len(HIDDEN)] == HIDDEN:
        assert all(line["hidden"] > 0 for line in lines(tmp_path / "full") if "loss" in line)
        assert not [name for name in load_file("full/model.safetensors") if "maps" in name]
    if "--teacher-cache" in settings:
        assert not full["teacher_cache"]["model_left"], "the teacher is needed in every step"
    begin_step = Trainer._begin_step

    def interrupt(self, *args):
        if self.state.step == 5:
            signal.raise_signal(signal.SIGINT)
        return begin_step(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_begin_step", interrupt)
        assert cli(*argv, "--output", "resumed")[0] == 130
    code, result, err = cli(*argv, "--output", "resumed", "--resume")
    assert (code, result["steps"]) == (0, 8), err
    assert same_weights("full", "resumed")


def test_weight_of_zero_is_kd_bit_for_bit(cli):
    assert cli(*DISTILL, "--method", "kd", "--output", "kd")[0] == 0
    for name, argv in (("kdiga", [*DISTILL, "--method", "kdiga"]), ("mixkd", MIXKD)):
        off = "objective.input_gradient=0" if name == "kdiga" else "data.mixup=0"
        assert cli(*argv, "--set", off, "--output", name)[0] == 0
        assert same_weights("kd", name)
        assert cli(*argv, "--output", f"{name}-on")[0] == 0
        assert not same_weights("kd", f"{name}-on")


def test_systems_combine_with_student_outputs_and_show_their_figures(cli, tmp_path):
    settings = ["--schedule", "mixed", "--divergence", "jsd", "--set", "data.mixup=0.4", "--lora", "4"]
    settings += ["--set", "rollout.max_new_tokens=6", "--set", "rollout.bulk=2", "--set", "train.adversarial=fgsm"]
    settings += ["--set", "objective.input_gradient=0.1", "--set", "objective.reduction=sequence"]
    code, _, err = cli(*DISTILL, "--method", "gkd", *settings, "--output", "run")
    assert code == 0, err
    steps = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert {line["source"] for line in steps} == {"dataset", "rollout"}
    for line in steps:
        assert 0 <= line["mixup_share"] <= 1
        assert ("input_gradient" in line) == ("adversarial_loss" in line) == (line["source"] == "dataset")


def test_fine_tuning_before_distillation_does_not_mix(cli, tmp_path):
    stage = ["--set", "student.sft_epochs=1"]
    assert cli(*MIXKD, *stage, "--output", "run")[0] == 0
    assert "mixup_share" not in lines(tmp_path / "run" / "sft")[1]
    assert "mixup_share" in next(line for line in lines(tmp_path / "run") if "loss" in line)


ALIGNED = "objective.input_gradient=1"


@pytest.mark.parametrize(("settings", "code", "mention"), [
    ("data.mixup=0.4 objective.divergence=atkd", "recipe.fields_conflict", "mixkd.kd_weight=0"),
    ("data.mixup=1 mixkd.kd_weight=0 mixkd.ce_weight=0", "recipe.fields_conflict", "data.mixup=0"),
    ("data.mixup=-1", "recipe.invalid_value", "≥ 0"),
    ("mixkd.ce_weight=2", "recipe.unused_field", "data.mixup"),
    ("kdiga.space=swap", "recipe.unused_field", "objective.input_gradient"),
    (f"{ALIGNED} kdiga.space=shared kdiga.candidates=4", "recipe.unused_field", "swap"),
    (f"{ALIGNED} teacher.quantize=8bit", "recipe.fields_conflict", "teacher.quantize=none"),
    (f"{ALIGNED} kdiga.space=shared", "model.different_widths", "kdiga.space=swap"),
    ("train.adversarial_radius=0.1", "recipe.unused_field", "train.adversarial"),
    ("hidden.layers=even", "recipe.unused_field", "objective.hidden"),
    ("objective.hidden=1 hidden.layers=1-2", "recipe.invalid_value", "hidden.layers"),
    ("objective.hidden=1 hidden.layers=9:1", "usage.invalid_blocks", "the student has 1 block"),
    ("objective.hidden=1 okd.rank=2", "recipe.fields_conflict", "objective.hidden=0"),
    ("objective.hidden=1 teacher.cache=disk", "recipe.fields_conflict", "--teacher-cache off"),
    ("objective.hidden=1 objective.tokens=entropy:0.5", "recipe.fields_conflict", "objective.tokens=all"),
])  # fmt: skip
def test_settings_that_conflict_are_refused(cli, settings, code, mention):
    sets = [word for setting in settings.split() for word in ("--set", setting)]
    assert_error(cli(*DISTILL, "--method", "kd", *sets, "--output", "run"), code, mention)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_eval_measures_an_attack(cli, tmp_path, family):
    model = tiny.save(tmp_path / "model", family)
    (tmp_path / "words.jsonl").write_text(
        "".join(json.dumps({"prompt": f"say {word}", "response": word}) + "\n" for word in ("abc", "hello", "x"))
    )
    argv = ["eval", model, "--suite", "words.jsonl", "--greedy", "--max-new-tokens", "4", "--json"]
    found = {}
    for name, attack in (
        ("none", []),
        ("still", ["--attack", "fgsm", "--attack-radius", "0"]),
        ("fgsm", ["--attack", "fgsm", "--attack-radius", "0.5"]),
        ("pgd", ["--attack", "pgd", "--attack-radius", "0.5", "--attack-steps", "4"]),
    ):
        code, result, err = cli(*argv, *attack)
        assert code == 0, err
        found[name] = result["suites"]["words"].get("attack")
        assert ("Under attack" in err) == (name != "none")
    assert found["none"] is None
    assert found["still"]["attacked"] == found["still"]["plain"] == found["pgd"]["plain"]
    assert found["pgd"]["attacked"]["loss"] >= found["fgsm"]["attacked"]["loss"] > found["fgsm"]["plain"]["loss"]
    assert (found["pgd"]["kind"], found["pgd"]["radius"], found["pgd"]["steps"], found["pgd"]["rows"]) == (
        "pgd",
        0.5,
        4,
        3,
    )
    assert 0 <= found["pgd"]["plain"]["tokens_right"] <= 100
    (saved,) = (tmp_path / "model" / "eval" / "words").glob("greedy-n4*-pgd4-0.5*/results.json")
    assert json.loads(saved.read_text())["attack"] == found["pgd"]
    (plain,) = (tmp_path / "model" / "eval" / "words").glob("greedy-n4/results.json")
    assert "attack" not in json.loads(plain.read_text())["settings"]


@pytest.mark.parametrize(("flags", "code", "mention"), [
    (["--attack", "bim"], "recipe.invalid_value", "fgsm"),
    (["--attack-radius", "1"], "recipe.unused_field", "--attack fgsm"),
    (["--attack", "fgsm", "--attack-steps", "3"], "recipe.unused_field", "--attack pgd"),
    (["--attack", "pgd", "--attack-radius", "-1"], "recipe.invalid_value", "≥ 0"),
])  # fmt: skip
def test_attacks_that_cannot_be_made_are_refused(cli, flags, code, mention):
    assert_error(cli("eval", "builtin", "--suite", "builtin", "--json", *flags), code, mention)


@pytest.mark.parametrize("row", [{"prompt": "a", "response": "b" * 100}, {"prompt": "a"}])
def test_attack_without_a_response_in_the_context_is_refused(cli, tmp_path, row):
    model = tiny.save(tmp_path / "model")
    (tmp_path / "words.jsonl").write_text(json.dumps(row) + "\n")
    argv = ["eval", model, "--suite", "words.jsonl", "--metric", "length", "--greedy", "--max-new-tokens", "4"]
    assert_error(cli(*argv, "--attack", "fgsm", "--json"), "data.no_rows_to_attack", "context")
