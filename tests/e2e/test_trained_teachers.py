"""Test OKD and CTCD from the command line: against kd and sft, interrupted and resumed, and what they write."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillm_cli.cli.app import main
from distillm_cli.training.trainer import Trainer
from tests.command_line import assert_error, untimed
from tests.marks import long

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SETS = (
    "data.template=plain", "data.valid_limit=4", "eval.report_rows=2", "eval.max_new_tokens=4", "eval.greedy=true",
    "rollout.max_new_tokens=4", "train.threads=1", "train.eval_steps=2", "train.save_steps=2", "train.min_lr=0",
)  # fmt: skip
SMALL = [
    *("--max-length", 64, "--dtype", "fp32", "--device", "cpu", "--batch-size", 4, "--lr", 5e-3, "--steps", 6),
    *(word for field in SETS for word in ("--set", field)),
]
QUIET = ("--json", "--quiet")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Write rows, and train a T5 and a Llama teacher for two steps. Return their directory."""
    workdir = tmp_path_factory.mktemp("trained_teachers")
    rows = [
        {"instruction": "Spell.", "input": str(n), "output": " ".join(WORDS[int(d)] for d in str(n))} for n in range(40)
    ]
    (workdir / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in ("t5", "llama"):
        model = ["--model", f"random:{kind}:2x32", "--tokenizer", "chars", "--data", workdir / "rows.jsonl"]
        assert main([str(a) for a in ["sft", *model, *SMALL, "--steps", 2, "--output", workdir / kind, *QUIET]]) == 0
    return workdir


@pytest.fixture
def distill(workdir, cli):
    """Return a function that distills from one of the teachers into a directory and returns the object of ``--json``."""

    def run(output, *more, teacher="llama", student="random:1x32"):
        argv = command(workdir, output, *more, teacher=teacher, student=student)
        code, result, err = cli(*argv, *QUIET)
        assert code == 0, err
        return result

    return run


def command(workdir, output, *more, teacher="llama", student="random:1x32"):
    teacher = teacher if ":" in teacher else workdir / teacher
    pair = ["--teacher", teacher, "--student", student, "--data", workdir / "rows.jsonl"]
    return ["distill", *pair, *SMALL, "--output", output, *more]


def sets(*fields):
    return [word for field in fields for word in ("--set", field)]


def tensors(directory):
    """Return all tensors of a directory of a model or of a checkpoint, also those of its teacher, by file and name."""
    files = [
        path for path in directory.rglob("*.safetensors") if "checkpoints" not in path.relative_to(directory).parts
    ]
    assert files
    return {(str(f.relative_to(directory)), name): t for f in files for name, t in load_file(f).items()}


def assert_same(one, two):
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def metrics(output, *left_out):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in untimed(line).items() if k not in left_out} for line in lines]


def test_okd_that_learns_nothing_equals_kd(distill, tmp_path, monkeypatch):
    """Check this with transformers' own forward pass, since the fast one of a CPU is not for layers with an adapter."""
    monkeypatch.setenv("DISTILLM_CPU_FAST", "0")
    dropout = sets("student.dropout=0.1")
    kd = distill(tmp_path / "kd", "--method", "kd", "--teacher-cache", "off", *dropout)
    okd = distill(tmp_path / "okd", "--method", "okd", *sets("okd.weight=0", "okd.lr_ratio=0"), *dropout)
    assert_same(tensors(tmp_path / "kd"), tensors(tmp_path / "okd"))
    assert metrics(tmp_path / "kd") == metrics(tmp_path / "okd", "teacher_loss", "teacher_drift")
    assert okd["report"]["student_after"] == kd["report"]["student_after"]
    before = okd["report"]["teacher_before"]
    assert before == kd["report"]["teacher"]
    assert okd["report"]["teacher_after"] == before | {"drift": 0.0}


def test_okd_reports_what_became_of_the_teacher(distill, tmp_path):
    result = distill(tmp_path / "run", "--method", "okd", *sets("okd.rank=4", "okd.lr_ratio=1"))
    before, after = (result["report"][name] for name in ("teacher_before", "teacher_after"))
    first, *_, last = [line for line in metrics(tmp_path / "run") if "valid_loss" in line]
    assert (first["step"], first["teacher_drift"]) == (0, 0.0)
    assert first["teacher_loss"] == pytest.approx(before["valid_loss"], abs=1e-5)
    assert last["teacher_loss"] == pytest.approx(after["valid_loss"], abs=1e-5)
    assert last["teacher_drift"] == pytest.approx(after["drift"], rel=1e-4)
    assert after["drift"] > 0
    assert after["valid_loss"] < before["valid_loss"], "the adapter learns the data"
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| teacher before |" in card
    assert f"{after['drift']:.3f}" in card
    assert "adapter of rank 4" in card
    assert not (tmp_path / "run" / "teacher").exists()


RESUMED = [
    ("llama", ["--method", "okd"]),
    ("t5", ["--method", "okd", "--schedule", "mixed", "--divergence", "atkd", "--set", "rollout.bulk=2"]),
    ("llama", ["--method", "ctcd", "--set", "student.dropout=0.1"]),
    ("t5", ["--method", "ctcd", "--schedule", "pairs", "--divergence", "skl", "--set", "objective.reduction=sequence"]),
]


@pytest.mark.parametrize(("family", "settings"), [*RESUMED[:1], *(long(*case) for case in RESUMED[1:])])
def test_resume_matches_uninterrupted_run(family, settings, workdir, distill, cli, tmp_path, monkeypatch):
    distill(tmp_path / "full", *settings, teacher=family)
    begin_step = Trainer._begin_step

    def interrupted(self, *args):
        if self.state.step == 5:
            raise KeyboardInterrupt
        return begin_step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_begin_step", interrupted)
        assert cli(*command(workdir, tmp_path / "resumed", *settings, teacher=family), *QUIET)[0] == 130
    code, result, err = cli("distill", "--resume", "--output", tmp_path / "resumed", *QUIET)
    assert (code, result["steps"]) == (0, 6), err
    last = "checkpoints/step-000006"
    full = tensors(tmp_path / "full" / last)
    assert any(file.startswith("teacher/") for file, _ in full)
    assert any(name.startswith("optimizer.") for _, name in full)
    assert_same(full, tensors(tmp_path / "resumed" / last))
    assert metrics(tmp_path / "full") == metrics(tmp_path / "resumed")


def test_ctcd_without_soft_losses_equals_two_fine_tunings(distill, workdir, cli, tmp_path):
    weights = ("ctcd.soft_teacher=0", "ctcd.soft_student=0", "ctcd.lr_ratio=0.5", "ctcd.hard_teacher=1")
    result = distill(tmp_path / "both", "--method", "ctcd", *sets(*weights))
    data = ["--data", workdir / "rows.jsonl", *SMALL, *sets("train.select=last"), *QUIET]
    alone = ["sft", "--model", "random:1x32", "--set", f"teacher.path={workdir / 'llama'}", *data]
    code, student, err = cli(*alone, "--output", tmp_path / "student")
    assert code == 0, err
    code, teacher, err = cli(
        "sft", "--model", workdir / "llama", *data, "--lr", 2.5e-3, "--output", tmp_path / "teacher"
    )
    assert code == 0, err
    both = tensors(tmp_path / "both")
    assert_same({key: t for key, t in both.items() if key[0] == "model.safetensors"}, tensors(tmp_path / "student"))
    assert_same(tensors(tmp_path / "both" / "teacher"), tensors(tmp_path / "teacher"))
    for name, other in (("student_after", student), ("teacher_after", teacher)):
        assert result["report"][name] == other["report"]["student_after"]
    losses = [line["teacher_loss"] for line in metrics(tmp_path / "both") if "valid_loss" in line]
    assert losses == pytest.approx([x["valid_loss"] for x in metrics(tmp_path / "teacher") if "valid_loss" in x])


@pytest.mark.long
def test_ctcd_soft_losses_change_both_models(distill, tmp_path):
    for name, field in (("none", "student"), ("teacher", "student"), ("student", "teacher")):
        off = ["ctcd.soft_teacher=0", "ctcd.soft_student=0"] if name == "none" else [f"ctcd.soft_{field}=0"]
        distill(tmp_path / name, "--method", "ctcd", *sets(*off))
    none, teacher, student = (tensors(tmp_path / name) for name in ("none", "teacher", "student"))
    changed = {n: {f for f, key in none if not torch.equal(none[f, key], run[f, key])} for n, run in
               (("teacher", teacher), ("student", student))}  # fmt: skip
    assert changed == {"teacher": {"teacher/model.safetensors"}, "student": {"model.safetensors"}}


def test_ctcd_saves_the_teacher_of_the_best_step(workdir, distill, tmp_path):
    """Check that the teacher is the one that trained with the selected student, and that it can be used as any model."""
    rising = ["--lr", 0.1, *sets("train.select=valid_loss", "train.clip=0", "train.warmup=5")]
    result = distill(tmp_path / "run", "--method", "ctcd", *rising, student=workdir / "llama")
    best = result["best_step"]
    assert best < 6, "the test needs a best step before the last"
    output = tmp_path / "run"
    checkpoints = {step: tensors(output / f"checkpoints/step-{step:06d}" / "teacher") for step in (best, 6)}
    saved = tensors(output / "teacher")
    assert_same(saved, checkpoints[best])
    assert any(not torch.equal(saved[key], checkpoints[6][key]) for key in saved)

    loaded = AutoModelForCausalLM.from_pretrained(output / "teacher").state_dict()
    assert all(torch.equal(t, loaded[name]) for (_, name), t in saved.items())
    tokenizer = AutoTokenizer.from_pretrained(output / "teacher")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(output).get_vocab()
    again = distill(tmp_path / "again", "--method", "kd", "--steps", 1, teacher=str(output / "teacher"))
    assert again["report"]["teacher"]["valid_loss"] == pytest.approx(result["report"]["teacher_after"]["valid_loss"])


@pytest.mark.long
def test_output_teacher_is_removed_or_left_to_the_user(workdir, distill, cli, tmp_path):
    output = tmp_path / "run"
    distill(output, "--method", "ctcd", "--steps", 1)
    assert (output / "teacher" / "model.safetensors").is_file()
    (output / "teacher" / "eval").mkdir()
    (output / "teacher" / "eval" / "results.json").write_text("{}")  # of an evaluation
    distill(output, "--method", "ctcd", "--steps", 1, "--overwrite")
    shutil.rmtree(output / "teacher" / "eval")
    distill(output, "--method", "kd", "--steps", 1, "--overwrite")
    assert not (output / "teacher").exists()

    (output / "teacher").mkdir()
    notes = output / "teacher" / "config.json"
    notes.write_text("mine")
    distill(output, "--method", "kd", "--steps", 1, "--overwrite")
    argv = command(workdir, output, "--method", "ctcd", "--steps", 1, "--overwrite")
    assert_error(cli(*argv, *QUIET), "usage.output_exists", notes.parent)
    assert notes.read_text() == "mine"
    shutil.rmtree(output / "teacher")
    distill(output, "--method", "ctcd", "--steps", 1, "--overwrite")


@pytest.mark.parametrize(
    ("teacher", "student"), [("random:2x48", "random:1x32"), long("random:t5:2x32", "random:1x32")]
)
def test_ctcd_starts_from_random_weights(teacher, student, workdir, cli, capsys, tmp_path):
    more = ["--method", "ctcd", "--tokenizer", "chars"]
    argv = command(workdir, tmp_path / "run", *more, teacher=teacher, student=student)
    code, result, err = cli(*argv, "--json")
    assert code == 0, err
    sizes = {name: sum(t.numel() for t in tensors(tmp_path / "run" / place).values()) for name, place in
             (("teacher", "teacher"), ("all", "."))}  # fmt: skip
    assert sizes["all"] > sizes["teacher"] > sizes["all"] - sizes["teacher"]
    assert " of the teacher" in err
    first = next(line for line in metrics(tmp_path / "run") if "valid_loss" in line)
    report = result["report"]
    assert first["teacher_loss"] == pytest.approx(report["teacher_before"]["valid_loss"], abs=1e-5)
    assert first["valid_loss"] == pytest.approx(report["student_before"]["valid_loss"], abs=1e-5)
    for name in ("teacher", "student"):
        assert report[f"{name}_after"]["valid_loss"] < report[f"{name}_before"]["valid_loss"]
    planned = cli("plan", *argv[1 : argv.index("--output")], *more, "--json")[1]
    assert planned["models"]["teacher"]["trainable"] == planned["models"]["teacher"]["parameters"]
    assert planned["memory"]["teacher_optimizer"] == 8 * planned["models"]["teacher"]["parameters"]


@pytest.mark.long
def test_random_teacher_has_the_family_of_a_loaded_student(workdir, distill, tmp_path):
    distill(tmp_path / "run", "--method", "ctcd", "--steps", 1, teacher="random:3x32", student=workdir / "t5")
    config = json.loads((tmp_path / "run" / "teacher" / "config.json").read_text())
    assert (config["model_type"], config["num_layers"]) == ("t5", 3)


@pytest.mark.parametrize("method", ["okd", long("ctcd")])
def test_student_may_copy_layers_of_the_teacher(method, distill, tmp_path):
    """Check that the layers are those of the teacher from before training, also when the first loss is measured."""
    kd = distill(tmp_path / "kd", "--method", "kd", student="layers:1")
    run = distill(tmp_path / "run", "--method", method, student="layers:1")
    before = [result["report"]["student_before"]["valid_loss"] for result in (kd, run)]
    assert before[0] == pytest.approx(before[1])


def test_plan_counts_the_adapter(workdir, cli):
    argv = command(workdir, "unused", "--method", "okd", "--set", "okd.rank=2")
    planned = cli("plan", *argv[1 : argv.index("--output")], *argv[argv.index("--output") + 2 :], "--json")[1]
    trainable = planned["models"]["teacher"]["trainable"]
    assert 0 < trainable < planned["models"]["teacher"]["parameters"]
    assert planned["memory"]["teacher_gradients"] == 4 * trainable
    assert planned["teacher_cache"]["mode"] == "off"
    assert "okd.rank" in planned["teacher_cache"]["why"]


CONFLICTS = [
    (["--method", "okd", "--teacher-cache", "memory"], "recipe.fields_conflict", "okd.rank"),
    (["--method", "ctcd", "--teacher-cache", "disk"], "recipe.fields_conflict", "ctcd.enabled"),
    (["--method", "okd", "--set", "teacher.quantize=4bit"], "recipe.fields_conflict", "teacher.quantize"),
    (["--method", "ctcd", "--set", "teacher.quantize=8bit"], "recipe.fields_conflict", "teacher.quantize"),
    (["--method", "ctcd", "--set", "teacher.dtype=bf16"], "recipe.fields_conflict", "teacher.dtype"),
    (["--method", "ctcd", "--set", "okd.rank=4"], "recipe.fields_conflict", "okd.rank"),
    (["--method", "kd", "--set", "okd.weight=0.1"], "recipe.unused_field", "okd.rank"),
    (["--method", "kd", "--set", "ctcd.temperature=3"], "recipe.unused_field", "ctcd.enabled"),
    (["--method", "okd", "--rebuild-teacher-cache"], "usage.no_teacher_cache", "okd.rank"),
]


@pytest.mark.parametrize(("settings", "error", "mention"), CONFLICTS)
def test_conflicting_settings_are_refused(settings, error, mention, workdir, cli, tmp_path):
    assert_error(cli(*command(workdir, tmp_path / "run", *settings), *QUIET), error, mention)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


RANDOM = [
    (["--method", "ctcd"], "layers:1", "recipe.fields_conflict", "layers:1"),
    (["--method", "ctcd"], "random:1x32", "model.no_tokenizer", "--tokenizer"),
    (["--method", "ctcd", "--tokenizer", "chars", "--compare"], "random:1x32", "usage.exclusive_options", "--compare"),
    (["--method", "kd", "--tokenizer", "chars"], "random:1x32", "model.not_found", "random:2x32"),
]


@pytest.mark.parametrize(("settings", "student", "error", "mention"), RANDOM)
def test_random_teacher_is_refused_where_it_cannot_work(settings, student, error, mention, workdir, cli, tmp_path):
    argv = command(workdir, tmp_path / "run", *settings, teacher="random:2x32", student=student)
    assert_error(cli(*argv, *QUIET), error, mention)


def test_teacher_that_changes_cannot_be_cached_in_advance(workdir, cli):
    pair = ["--teacher", workdir / "llama", "--student", "random:1x32", "--data", workdir / "rows.jsonl"]
    argv = ["distill", *pair, "--method", "okd", "--warm-teacher-cache", *QUIET]
    assert_error(cli(*argv), "usage.no_teacher_cache", "okd.rank")


@pytest.mark.parametrize("method", [long("okd"), "ctcd"])
def test_compare_works_with_a_trained_teacher(method, distill, tmp_path):
    result = distill(tmp_path / "run", "--method", method, "--compare", "--steps", 2)
    assert [baseline["name"] for baseline in result["baselines"]] == ["sft"]
