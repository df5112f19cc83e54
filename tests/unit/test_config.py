"""Test how a recipe, flags and --set become one resolved recipe with origins, and the errors for invalid input."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from distillm_cli.config.explain import choices, condition, leaves, plain_types, takes_list
from distillm_cli.config.field_usage import has_field, is_used
from distillm_cli.config.load import load_resolved, locate, resolve, shipped, to_yaml
from distillm_cli.config.methods import METHODS
from distillm_cli.config.schema import ObjectiveConfig, Recipe, TrainConfig
from distillm_cli.config.shortcuts import FIELD_FLAGS, Flag, flag_of
from distillm_cli.runs.cache_size import uses_rows
from tests import command_line
from tests.codes import raises_code


@pytest.fixture
def write_recipe(tmp_path, monkeypatch):
    """Return a function that writes distill.yaml in an empty directory and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes) -> str:
        Path("distill.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "distill.yaml"

    return write


def check_rejected(code: str, *mentions: str, command: str = "distill", **arguments) -> str:
    """Check that these arguments are rejected with this code and one line that has the mentions; return the line."""
    with raises_code(code, *mentions) as caught:
        resolve(command=command, **arguments)
    assert caught.value.exit_code == 2
    line = str(caught.value)
    assert "\n" not in line
    return line


# --- precedence --------------------------------------------------------------------------------------------------


def test_later_sources_override_earlier_ones(write_recipe):
    path = write_recipe("method: gkd\ntrain:\n  lr: 3e-4\n  clip: 0.5\n  seed: 7\nobjective: {beta: 0.3}\n")
    flags = {"train.lr": Flag("--lr", 2e-4), "train.clip": Flag("--clip", 0.4)}
    resolved = resolve(command="distill", recipe=path, flags=flags, sets=["train.lr=1e-4"])
    r, origin = resolved.recipe, resolved.origin

    assert (r.train.batch_size, origin["train.batch_size"]) == (8, "default")
    assert (r.schedule.kind, origin["schedule.kind"]) == ("mixed", "method gkd")
    assert (r.objective.beta, origin["objective.beta"]) == (0.3, "distill.yaml:6")
    assert (r.train.seed, origin["train.seed"]) == (7, "distill.yaml:5")
    assert (r.train.clip, origin["train.clip"]) == (0.4, "--clip")
    assert (r.train.lr, origin["train.lr"]) == (1e-4, "--set")
    assert set(origin) == {key for key in leaves() if has_field(r, key)}
    assert resolved.overridden["train.lr"] == (2e-4, "--lr")
    assert resolved.overridden["objective.beta"] == (0.1, "method gkd")
    assert resolved.name == "distill"


def test_absent_flags_change_nothing(write_recipe):
    path = write_recipe("train: {lr: 3e-4}")
    resolved = resolve(
        command="distill", recipe=path, flags={"train.lr": None, "objective.alpha": Flag("--alpha", None)}
    )
    assert resolved.recipe.train.lr == 3e-4
    assert resolved.origin["objective.alpha"] == "method distillm"


def test_method_comes_from_the_source_of_highest_precedence(write_recipe):
    path = write_recipe("method: gkd")
    flag = {"method": Flag("--method", "kd")}
    assert resolve(command="distill", recipe=path).recipe.objective.divergence == "jsd"
    assert resolve(command="distill", recipe=path, flags=flag).recipe.objective.divergence == "kl"
    last = resolve(command="distill", recipe=path, flags=flag, sets=["method=imitkd"])
    assert last.recipe.schedule.kind == "annealed"
    assert (last.recipe.method, last.origin["method"]) == ("imitkd", "--set")


def test_method_flag_replaces_settings_of_recipe_method(write_recipe):
    """Check that settings a recipe makes for its own method do not leak into another method."""
    path = write_recipe(
        "method: distillm\nobjective: {divergence: skl}\nschedule: {kind: adaptive}\ntrain: {lr: 3e-3, steps: 40}\n"
    )
    flag = {"method": Flag("--method", "gkd")}
    resolved = resolve(command="distill", recipe=path, flags=flag)
    r = resolved.recipe
    assert (r.objective.divergence, r.schedule.kind, r.train.lr, r.train.steps) == ("jsd", "mixed", 3e-3, 40)
    assert resolved.origin["schedule.kind"] == "method gkd"
    assert resolved.overridden["schedule.kind"] == ("adaptive", "distill.yaml:3")
    explicit = resolve(command="distill", recipe=path, flags=flag, sets=["schedule.kind=on"]).recipe
    assert explicit.schedule.kind == "on"
    same = resolve(command="distill", recipe=path, flags={"method": Flag("--method", "distillm")}).recipe
    assert same == resolve(command="distill", recipe=path).recipe
    without_method = write_recipe("objective: {beta: 0.4}")  # without a method, its settings apply to every method
    assert resolve(command="distill", recipe=without_method, flags=flag).recipe.objective.beta == 0.4


def test_default_method_and_data_of_each_command():
    r = resolve(command="distill").recipe
    assert (r.method, r.data.source, r.objective.divergence, r.schedule.kind) == (
        "distillm",
        "dolly",
        "skl",
        "adaptive",
    )
    r = resolve(command="sft").recipe
    assert (r.method, r.objective.kd_weight, r.train.select) == ("sft", 0.0, "valid_loss")


def test_method_of_another_command_is_rejected(write_recipe):
    path = write_recipe("method: sft")
    check_rejected("usage.unknown_method", "distill.yaml:1", "sft", *list(METHODS)[1:], "`distillm sft`", recipe=path)
    check_rejected("usage.unknown_method", "kd", "`distillm distill`", command="sft", sets=["method=kd"])
    assert resolve(command="plan", recipe=path).recipe.method == "sft"


def test_epochs_flag_replaces_steps_of_recipe(write_recipe):
    path = write_recipe("train: {steps: 100, epochs: 5}")
    assert resolve(command="distill", recipe=path).recipe.train.steps == 100
    resolved = resolve(command="distill", recipe=path, flags={"train.epochs": Flag("--epochs", 2.0)})
    assert (resolved.recipe.train.epochs, resolved.recipe.train.steps) == (2, None)
    assert resolved.origin["train.steps"] == "--epochs"
    assert resolved.overridden["train.steps"] == (100, "distill.yaml:1")
    assert resolve(command="distill", recipe=path, sets=["train.epochs=2"]).recipe.train.steps is None
    assert resolve(command="distill", recipe=path, flags=command_line.flags(steps=9)).recipe.train.steps == 9


@pytest.mark.parametrize(
    ("flags", "sets", "mentions"),
    [
        ({"epochs": 2.0, "steps": 9}, [], ("--epochs", "--steps")),
        ({"steps": 9}, ["train.epochs=2"], ("--set train.epochs", "--steps")),
        ({"epochs": 2.0}, ["train.steps=9"], ("--epochs", "--set train.steps")),
        ({}, ["train.steps=9", "train.epochs=2"], ("--set train.epochs", "--set train.steps")),
    ],
)
def test_epochs_and_steps_exclude_each_other(write_recipe, flags, sets, mentions):
    path = write_recipe("train: {steps: 100}")
    check_rejected("recipe.given_twice", *mentions, recipe=path, flags=command_line.flags(**flags), sets=sets)
    by_epochs = resolve(command="distill", sets=["train.steps=null", "train.epochs=2"]).recipe.train
    assert (by_epochs.steps, by_epochs.epochs) == (None, 2), "null steps do not count as given"


def test_method_flag_applies_its_preset(write_recipe):
    """Check that objective and schedule follow the method, and that training settings stay."""
    path = write_recipe(
        "method: distillm\nobjective: {divergence: srkl, kd_weight: 0.5}\nschedule: {kind: adaptive, fresh: buffer, "
        "capacity: 99}\n"
        "train: {lr: 3e-3, epochs: 2}\n"
    )
    resolved = resolve(command="distill", recipe=path, flags={"method": Flag("--method", "gkd")})
    r = resolved.recipe
    assert (r.objective.divergence, r.objective.beta, r.schedule.kind) == ("jsd", 0.1, "mixed")
    assert (r.objective.kd_weight, r.schedule.capacity, r.train.lr, r.train.epochs) == (0.5, 99, 3e-3, 2)
    assert resolved.origin["objective.divergence"] == "method gkd"
    assert resolved.overridden["objective.divergence"] == ("srkl", "distill.yaml:2")

    explicit = {"method": Flag("--method", "gkd"), "schedule.kind": Flag("--schedule", "on")}
    assert resolve(command="distill", recipe=path, flags=explicit).recipe.schedule.kind == "on"
    same = resolve(command="distill", recipe=path, flags={"method": Flag("--method", "distillm")}).recipe
    assert same.objective.divergence == "srkl", "settings of the recipe's own method stay"


# --- unused fields ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sets", "mentions"),
    [
        (
            {"method": "kd", "alpha": 0.1},
            [],
            (
                "--alpha = 0.1",
                "objective.alpha",
                "skl and srkl (methods distillm, distillm2)",
                "objective.divergence is kl (method kd)",
                "--divergence skl",
            ),
        ),
        (
            {"method": "ab", "alpha": 0.1},
            [],
            ("objective.divergence is ab (method ab)", "objective.ab_alpha, objective.ab_beta"),
        ),
        (
            {},
            ["objective.ab_beta=0.3"],
            (
                "--set objective.ab_beta = 0.3",
                "amid_divergence ab",
                "objective.divergence is skl (method distillm)",
                "objective.alpha",
                "--divergence ab",
            ),
        ),
        (
            {"method": "amid"},
            ["objective.ab_beta=0.3"],
            ("objective.divergence is amid", "objective.amid_divergence is kl (method amid)"),
        ),
        (
            {"method": "kd"},
            ["schedule.mix=0.3"],
            (
                "--set schedule.mix = 0.3",
                "mixed (method gkd)",
                "schedule.kind is off (method kd)",
                "--schedule mixed",
            ),
        ),
        (
            {"schedule": "annealed"},
            ["schedule.anneal_rate=3"],
            ("anneal exponential or sigmoid (method imitkd)", "schedule.anneal is linear"),
        ),
        (
            {"schedule": "off"},
            ["schedule.capacity=5"],
            (
                "schedule.replay decreasing, constant and increasing",
                "adaptive and auto with replay auto (methods distillm, amid)",
                "schedule.fresh buffer (method imitkd)",
                "schedule.replay is auto",
                "schedule.kind is off",
                "schedule.fresh is direct (method distillm)",
                "--schedule adaptive",
            ),
        ),
        (
            {"method": "kd"},
            ["rollout.teacher_mix=0.5"],
            (
                "on, mixed, annealed, adaptive, auto and rounds",
                "pairs with redraw never (methods fdistill, distillm2)",
                "schedule.kind is off (method kd)",
                "--schedule on",
            ),
        ),
        (
            {"method": "distillm2"},
            ["rollout.teacher_mix=0.5"],
            ("schedule.kind is pairs", "schedule.redraw is epoch (method distillm2)"),
        ),
        (
            {"method": "kd"},
            ["objective.ratio_clip=0.1"],
            (
                "objective.policy_gradient true (method minillm)",
                "objective.policy_gradient is false (method kd)",
                "--set objective.policy_gradient=true",
            ),
        ),
        (
            {"data": "mine.jsonl"},
            ["data.size=99"],
            ("data.source builtin", "data.source is mine.jsonl", "--data builtin"),
        ),
        ({}, ["data.tasks=[sum]"], ("data.source is dolly", "data.valid is null")),
        (
            {"method": "seqkd", "divergence": "rkl"},
            [],
            (
                "--divergence = rkl",
                "objective.divergence",
                "objective.kd_weight above 0",
                "objective.policy_gradient true (method minillm)",
                "train.select valid_divergence",
                "objective.kd_weight is 0.0",
            ),
        ),
        ({"method": "seqkd"}, ["objective.kd_warmup=0.1"], ("--set objective.kd_weight=1.0",)),
        ({"method": "seqkd", "alpha": 0.3}, [], ("--divergence skl --set objective.kd_weight=1.0",)),
        (
            {"alpha": 0.3},
            ["objective.kd_weight=0"],
            (
                "--alpha = 0.3",
                "skl and srkl (methods distillm, distillm2)",
                "objective.kd_weight is 0.0 (method distillm)",
                "--set objective.kd_weight=1.0",
            ),
        ),
        (
            {"method": "kd"},
            ["objective.by_source=true"],
            ("schedule.kind is off", "objective.divergence is kl", "objective.curriculum is off (method kd)"),
        ),
        (
            {"method": "akl", "schedule": "on"},
            ["objective.by_source=true"],
            ("schedule.kind is on", "objective.divergence is akl"),
        ),
        (
            {"method": "gkd"},
            ["schedule.capacity=9"],
            (
                "schedule.replay is auto",
                "schedule.kind is mixed",
                "schedule.fresh is direct (method gkd)",
                "--set schedule.replay=decreasing",
            ),
        ),
        ({"method": "skd"}, ["schedule.capacity=9"], ("schedule.kind is interleaved",)),
        ({"method": "imitkd"}, ["schedule.warm_up=none"], ("--set schedule.replay=decreasing",)),
        (
            {},
            ["student.lora.dropout=0.3"],
            ("--set student.lora.dropout = 0.3", "student.lora.r is null", "--lora 16"),
        ),
        (
            {},
            ["train.lr_schedule=constant", "train.min_lr=1e-5"],
            ("train.lr_schedule cosine and linear", "train.lr_schedule is constant"),
        ),
        ({"teacher": "builtin"}, ["teacher.revision=main"], ("teacher.path is builtin", "--teacher NAME")),
        ({"teacher": "."}, ["teacher.revision=main"], ("teacher.path is .;",)),
        ({"teacher": "gone/for/good"}, ["teacher.revision=main"], ("teacher.path is gone/for/good",)),
        ({"method": "kd"}, ["rollout.temperature=0.5"], ("schedule.kind is off (method kd)", "--schedule on")),
        (
            {"method": "kd"},
            ["rollout.bulk=4"],
            ("pairs, interleaved and rounds", "schedule.kind is off (method kd)"),
        ),
        ({"method": "seqkd"}, ["rollout.top_k=4"], ("schedule.kind is teacher (method seqkd)",)),
        ({"student": "layers:2"}, ["student.revision=main"], ("student.path is layers:2",)),
        ({"student": "config.json"}, ["student.revision=main"], ("student.path is config.json",)),
    ],
)
def test_unused_field_is_rejected_with_its_condition(flags, sets, mentions):
    check_rejected("recipe.unused_field", *mentions, flags=command_line.flags(**flags), sets=sets)


def test_unused_field_in_recipe_is_rejected_with_its_line(write_recipe):
    path = write_recipe("method: kd\nobjective:\n  beta: 0.3\nschedule: {mix: 0.2}\n")
    mentions = ("distill.yaml:3", "objective.beta = 0.3", "jsd (methods gkd, fdistill)", "1 more problem")
    check_rejected("recipe.unused_field", *mentions, recipe=path)
    path = write_recipe("method: sft\nobjective: {alpha: 0.3}\n")
    check_rejected("recipe.unused_field", "objective.alpha", "`distillm distill`", command="sft", recipe=path)
    # Fields with the value that the method has anyway are accepted: every resolved recipe has them.
    repeated = write_recipe("method: kd\nobjective: {beta: 0.5, alpha: 0.1}")
    assert resolve(command="distill", recipe=repeated).notes == ()


@pytest.mark.parametrize(
    ("command", "setting", "mentions"),
    [
        ("generate", "train.lr=0.1", ("`distillm sft`", "`distillm distill`")),
        ("generate", "schedule.kind=on", ("`distillm distill`",)),
        ("generate", "rollout.teacher_mix=0.2", ("`distillm distill`",)),
        ("eval", "objective.alpha=0.3", ("`distillm distill`",)),
        ("eval", "rollout.temperature=0", ("eval",)),
        ("sft", "rollout.teacher_mix=0.2", ("`distillm distill`",)),
        ("sft", "rollout.temperature=0.5", ("`distillm distill`", "`distillm generate`")),
        ("sft", "rollout.bulk=2", ("`distillm distill`",)),
        ("sft", "teacher.cache=memory", ("`distillm distill`",)),
        ("sft", "teacher.path=gpt2-xl", ("`distillm distill`", "layers:4", "width:0.5")),
        ("sft", "rollout.draft=3", ("`distillm distill`",)),
    ],
)
def test_field_of_other_commands_is_rejected_on_command_line(command, setting, mentions, write_recipe):
    key, _, value = setting.partition("=")
    check_rejected("recipe.unused_field", f"--set {key}", command, *mentions, command=command, sets=[setting])
    section, name = key.split(".")
    shared = {"rollout.temperature", "rollout.bulk", "teacher.cache", "teacher.path"}  # `distill` reads the same file
    if command != "sft" or key in shared:  # commands that train nothing accept every recipe
        resolve(command=command, recipe=write_recipe(f"{section}: {{{name}: {value}}}\n"))


@pytest.mark.parametrize(
    ("command", "sets"),
    [
        ("generate", ["rollout.top_k=5", "train.seed=3", "train.threads=1"]),
        ("generate", ["eval.batch_size=2", "data.tasks=[sum]", "data.template=plain", "data.columns.prompt=q"]),
        ("eval", ["train.threads=1", "eval.seeds=[1]"]),
        ("eval", ["data.source=mine.jsonl", "data.valid_limit=9"]),  # held-out rows
        ("eval", ["eval.suites=builtin", "eval.top_k=5", "data.tasks=[sum]", "data.skip_bad_rows=true"]),
        ("sft", ["rollout.max_new_tokens=24"]),  # applies to `generate` with the trained model
        ("sft", ["student.path=layers:2", "teacher.path=gpt2-xl", "teacher.dtype=fp32", "teacher.revision=main"]),
        ("distill", ["method=seqkd", "rollout.bulk=2"]),
        ("distill", ["data.valid=builtin", "data.tasks=[sum]"]),
        ("distill", ["method=minillm", "objective.ratio_clip=0.1", "rollout.teacher_mix=0.3"]),
        ("distill", ["method=fdistill", "rollout.teacher_mix=0.3"]),
        ("distill", ["objective.kd_weight=0", "train.select=valid_divergence", "objective.alpha=0.3"]),
        ("distill", ["method=minillm", "objective.kd_weight=0", "objective.divergence=kl", "objective.kd_warmup=0.1"]),
        # the run uses skl instead of srkl
        ("distill", ["method=kd", "objective.divergence=srkl", "objective.by_source=true"]),
        ("distill", ["method=imitkd", "schedule.capacity=9"]),
        ("distill", ["method=skd", "schedule.replay=constant", "schedule.capacity=9", "schedule.warm_up=none"]),
        ("distill", ["student.lora.r=4", "student.lora.dropout=0.3"]),
        (
            "distill",
            ["teacher.path=gpt2-xl", "teacher.revision=main", "student.path=org/gpt2", "student.revision=main"],
        ),
    ],
)
def test_fields_that_a_command_reads_are_accepted(command, sets):
    assert resolve(command=command, sets=sets).notes == ()


@pytest.mark.parametrize(
    ("command", "setting", "instead"),
    [
        ("generate", "data.limit=5", "--limit"),
        ("generate", "data.source=x", "--data"),
        ("generate", "data.max_length=9", "--max-new-tokens"),
        ("generate", "eval.max_new_tokens=4", "--max-new-tokens"),
        ("generate", "eval.seeds=3", "--seed"),
        ("generate", "eval.report_rows=3", None),
        ("generate", "student.path=x", "--model"),
        ("generate", "method=kd", None),
        ("eval", "data.limit=5", "--limit"),
        ("eval", "data.max_length=9", "--max-new-tokens"),
        ("eval", "data.max_prompt_length=9", None),
        ("eval", "eval.report_rows=3", "--limit"),
        ("eval", "student.path=x", "`distillm eval CKPT`"),
        ("eval", "student.tokenizer=x", None),
        ("eval", "student.lora.r=4", None),
        ("eval", "teacher.path=x", None),
        ("eval", "teacher.dtype=bf16", None),
        ("eval", "rollout.max_new_tokens=4", "--max-new-tokens"),
        ("eval", "train.seed=4", "--seeds"),
    ],
)
def test_command_without_training_suggests_its_own_flag(command, setting, instead, write_recipe):
    key, _, value = setting.partition("=")
    line = check_rejected("recipe.unused_field", f"--set {key}", command, command=command, sets=[setting])
    assert line.rpartition("or try ")[2] == instead if instead else "or try" not in line
    section, _, inner = key.partition(".")
    if inner:  # the recipe of the evaluated model may have the field
        text = f"{{{inner}: {value}}}"
        if "." in inner:
            subsection, name = inner.split(".")
            text = f"{{{subsection}: {{{name}: {value}}}}}"
        resolve(command=command, recipe=write_recipe(f"{section}: {text}"))


def test_eval_reads_held_out_rows_only_without_suites(write_recipe):
    path = write_recipe("eval: {suites: [dolly]}")
    for setting in ("data.source=mine.jsonl", "data.valid=mine.jsonl", "data.valid_limit=9"):
        key = setting.partition("=")[0]
        mentions = (f"--set {key}", "eval.suites is [dolly]")
        check_rejected("recipe.unused_field", *mentions, command="eval", recipe=path, sets=[setting])
        assert resolve(command="eval", recipe=path, sets=[setting, "eval.suites=[]"]).recipe.eval.suites == ()


def test_dtype_flag_sets_the_student_without_a_teacher():
    for command in ("sft", "generate", "eval"):
        r = resolve(command=command, flags=command_line.flags(dtype="bf16")).recipe
        assert r.student.dtype == "bf16"


def test_revision_is_dropped_with_a_local_model(write_recipe, tmp_path):
    """Check that a local directory has no revision in the resolved recipe."""
    path = write_recipe("teacher: {path: gpt2-xl, revision: abc}")
    resolved = resolve(command="distill", recipe=path, flags=command_line.flags(teacher=str(tmp_path)))
    assert resolved.recipe.teacher.revision is None
    assert resolved.notes[0].endswith(": teacher.revision")
    path = write_recipe(f"teacher: {{path: {tmp_path}, revision: abc}}")
    mentions = ("distill.yaml:1", "teacher.revision = abc", f"teacher.path is {tmp_path}")
    check_rejected("recipe.unused_field", *mentions, recipe=path)


def test_builtin_fields_are_dropped_with_other_data():
    resolved = resolve(command="distill", recipe="questions", flags=command_line.flags(data="mine.jsonl"))
    assert resolved.notes == (
        "questions.yaml: ignored, since this run (method distillm, objective srkl, schedule adaptive, "
        "data mine.jsonl) does not use them: data.size",
    )
    arguments = {"flags": command_line.flags(data="mine.jsonl"), "sets": ["data.size=5"]}
    check_rejected("recipe.unused_field", "data.source builtin", recipe="questions", **arguments)


def test_settings_of_recipe_method_are_dropped_for_another(write_recipe, tmp_path):
    path = write_recipe("method: distillm\nobjective: {alpha: 0.3}\nschedule: {epsilon: 0.2, capacity: 64}\n")
    resolved = resolve(command="distill", recipe=path, flags={"method": Flag("--method", "kd")})
    assert resolved.notes == (
        "distill.yaml: ignored, since this run (method kd, objective kl, schedule off) does not use them: "
        "objective.alpha, schedule.capacity, schedule.epsilon",
    )
    assert to_yaml(resolved).startswith("# note: distill.yaml: ignored")
    assert not has_field(resolved.recipe, "objective.alpha")
    assert "objective.alpha" not in resolved.origin
    assert resolved.overridden["objective.alpha"] == (0.3, "distill.yaml:2")
    (tmp_path / "recipe.yaml").write_text(to_yaml(resolved), encoding="utf-8")
    assert resolve(command="distill", recipe=tmp_path / "recipe.yaml").recipe == resolved.recipe

    by_divergence = resolve(command="distill", recipe=path, flags={"objective.divergence": Flag("--divergence", "kl")})
    assert [note.rpartition(": ")[2] for note in by_divergence.notes] == ["objective.alpha"]
    with raises_code("recipe.unused_field", "--set objective.alpha"):
        resolve(command="distill", recipe=path, flags={"method": Flag("--method", "kd")}, sets=["objective.alpha=0.2"])


def test_quickstart_resolves_with_every_method_and_schedule():
    for alpha in (0.0, 0.1, 0.3):
        resolved = resolve(command="distill", recipe="quickstart", flags=command_line.flags(alpha=alpha))
        assert (resolved.recipe.objective.alpha, resolved.notes) == (alpha, ())
    for name, method in METHODS.items():
        if method.verb != "distill":
            continue
        for kind in (None, *choices("schedule.kind")):
            if name == "minillm" and kind in ("off", "teacher", "pairs", "interleaved"):
                continue  # a policy gradient needs outputs of the student
            if name == "disco" and kind not in (None, "off"):
                continue  # sentence embeddings have no student outputs
            flags = command_line.flags(method=name, schedule=kind)
            r = resolve(command="distill", recipe="quickstart", flags=flags).recipe
            if name == "distillm":  # quickstart has its own variant of its method
                assert r.schedule.kind == (kind or "auto")
            else:
                assert r.schedule.kind == (kind or method.preset.get("schedule.kind", r.schedule.kind))
                assert r.objective.divergence == method.preset.get("objective.divergence", r.objective.divergence)


def test_commands_without_training_accept_any_recipe(write_recipe):
    path = write_recipe("method: kd\nobjective: {beta: 0.3}")
    for command in ("eval", "generate"):
        assert resolve(command=command, recipe=path).recipe.objective == ObjectiveConfig(divergence="kl")
    assert load_resolved(path).objective == ObjectiveConfig(divergence="kl")


def test_conditions_name_existing_fields_and_values():
    for key in leaves():
        for alternative in condition(key).alternatives if condition(key) else ():
            for deciding_key, words in alternative.items():
                taken = TypeAdapter(leaves()[deciding_key].annotation)
                assert all(taken.validate_python(word, strict=True) == word for word in words), (key, deciding_key)


@pytest.mark.parametrize("name", METHODS)
def test_preset_sets_existing_fields_to_valid_values(name):
    method = METHODS[name]
    resolved = resolve(command=method.verb, sets=[f"method={name}"])
    assert {key for key, origin in resolved.origin.items() if origin == f"method {name}"} == set(method.preset)


# --- reading YAML -----------------------------------------------------------------------------------------------


def test_yaml_numbers_in_every_notation(write_recipe):
    path = write_recipe(
        "train: {lr: 5e-4, min_lr: '1e-8', steps: 1e3, weight_decay: .5, clip: 2, betas: [9e-1, 0.999]}"
    )
    t = resolve(command="distill", recipe=path).recipe.train
    assert (t.lr, t.min_lr, t.steps, t.weight_decay, t.clip, t.betas) == (5e-4, 1e-8, 1000, 0.5, 2.0, (0.9, 0.999))


def test_on_off_and_digit_strings_stay_strings(write_recipe):
    path = write_recipe("schedule: {kind: off}\nteacher: {revision: 0012345}\ndata: {source: 2024-01-01}")
    r = resolve(command="distill", recipe=path).recipe
    assert (r.schedule.kind, r.teacher.revision, r.data.source) == ("off", "0012345", "2024-01-01")
    assert resolve(command="distill", sets=["schedule.kind=on"]).recipe.schedule.kind == "on"


def test_set_parses_lists_and_single_items():
    resolved = resolve(command="distill", sets=["eval.suites=[dolly, vicuna]", "eval.seeds=3", "eval.metrics=rouge_l"])
    assert resolved.recipe.eval.suites == ("dolly", "vicuna")
    assert resolved.recipe.eval.seeds == (3,)
    assert resolved.recipe.eval.metrics == ("rouge_l",)
    assert resolve(command="distill", sets=["data.source=builtin", "data.tasks=null"]).recipe.data.tasks is None
    assert resolve(command="distill", sets=["train.seed=1", "train.seed=2"]).recipe.train.seed == 2
    assert resolve(command="distill", sets=["data.columns.prompt=q"]).recipe.data.columns.prompt == "q"


@pytest.mark.parametrize(
    ("text", "code", "mentions"),
    [
        ("", "recipe.not_a_mapping", ("distill.yaml",)),
        ("- a\n", "recipe.not_a_mapping", ("distill.yaml",)),
        ("train:\n", "recipe.section_not_value", ("distill.yaml:1", "train", "epochs, steps")),
        (
            "teacher: gpt2\n",
            "recipe.section_not_value",
            ("distill.yaml:1", "teacher", "path, dtype, cache, cache_dir, revision"),
        ),
        ("train:\n  lr: 1\n  lr: 2\n", "recipe.given_twice", ("distill.yaml:3", "train.lr", "line 2")),
        ("train: {}\ntrain: {}\n", "recipe.given_twice", ("distill.yaml:2", "train", "line 1")),
        ("a: b\n---\nc: d\n", "recipe.invalid_yaml", ("distill.yaml:2",)),
        ("train:\n\tlr: 1\n", "recipe.invalid_yaml", ("tabs",)),
        ("train: {lr: [1\n", "recipe.invalid_yaml", ("distill.yaml:2",)),
        (b"\xff\xfe", "recipe.unreadable", ("distill.yaml", "byte 0")),
        ("train: {lr: \x00}", "recipe.invalid_yaml", ("distill.yaml:1",)),
        ("? [a]\n: 1\n", "recipe.invalid_yaml", ("distill.yaml:1",)),
        ("teacher: {path: !!python/object/apply:os.system [ls]}", "recipe.invalid_yaml", ("os.system",)),
        ("teacher: {path: !env HOME}", "recipe.invalid_yaml", ("distill.yaml:1", "!env")),
        ("train: {steps: !!int three}", "recipe.invalid_yaml", ("distill.yaml:1", "three")),
        ("train: {steps: " + "9" * 5000 + "}", "recipe.invalid_yaml", ("distill.yaml:1",)),
        ("[" * 600, "recipe.invalid_yaml", ("distill.yaml",)),
        ("#" * 1_000_001, "recipe.unreadable", ("distill.yaml", "1,000,001")),
    ],
)
def test_invalid_yaml_is_rejected(write_recipe, text, code, mentions):
    check_rejected(code, *mentions, recipe=write_recipe(text))


def test_yaml_aliases_are_rejected(write_recipe):
    """Check a file whose aliases would expand to a huge list."""
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )
    check_rejected("recipe.invalid_yaml", "distill.yaml:2", "*name", recipe=write_recipe(bomb))


# --- invalid values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        ("\n\nobjective:\n  alpha: 1.4\n", ("distill.yaml:4", "objective.alpha = 1.4", "--alpha 0.1")),
        (
            "schedule: {kind: adaptve}",
            (
                "distill.yaml:1",
                "schedule.kind = adaptve",
                "off, on, mixed, annealed, adaptive, auto, teacher, pairs, interleaved, rounds",
                "--schedule adaptive",
            ),
        ),
        (
            "eval: {metrics: [rouge, exact_match]}",
            (
                "distill.yaml:1",
                "eval.metrics = [rouge, exact_match]",
                "rouge_l, rouge_1, rouge_2, bleu, chrf, exact_match, error_rate, final_number",
                "--set 'eval.metrics=[rouge_l, exact_match]'",
            ),
        ),
        ("train: {epochs: abc}", ("train.epochs = abc", "--set train.epochs=auto")),
        ("train: {batch_size: 3.5}", ("train.batch_size = 3.5", "≥ 1", "--batch-size 8")),
        ("train: {batch_size: true}", ("train.batch_size = true", "≥ 1")),
        ("train: {lr: true}", ("train.lr = true", "> 0")),
        ("train: {lr: .nan}", ("train.lr = .nan", "> 0")),
        ("train: {lr: }", ("train.lr = null", "> 0")),
        ("train: {steps: 0}", ("train.steps = 0", "≥ 1", "null")),
        ("train: {eval_steps: epoh}", ("≥ 1", "--set train.eval_steps=epoch")),
        ("train: {betas: [0.9]}", ("train.betas = [0.9]", "2", "≥ 0 and < 1")),
        ("train: {gradient_checkpointing: maybe}", ("train.gradient_checkpointing = maybe",)),
        ("eval: {seeds: []}", ("eval.seeds = []",)),
        ("eval: {metrics: []}", ("--set 'eval.metrics=[rouge_l, exact_match]'",)),
        ("eval: {seeds: [true]}", ("eval.seeds = [true]",)),
        ("teacher: {path: ''}", ("teacher.path = (empty)",)),
        ("method: distilm", ("method = distilm", ", ".join(METHODS), "--method distillm")),
        ("method:", ("method = null",)),
        ("teacher: {quantize: 3bit}", ("teacher.quantize = 3bit", "none, 8bit, 4bit")),
    ],
)
def test_invalid_value_is_rejected_with_line_and_hint(write_recipe, text, mentions):
    check_rejected("recipe.invalid_value", *mentions, recipe=write_recipe(text))


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        ("train: {patience: 3}", ("train.patience = 3", "--set train.select=")),
        ("student: {lora: {alpha: 64}}", ("student.lora.alpha = 64", "student.lora.r", "--lora 16")),
        ("train: {lr: 5e-4, min_lr: 1e-2}", ("train.min_lr 0.01", "train.lr 0.0005")),
        ("train: {lr: 1e-9, min_lr: 1e-8}", ("train.min_lr 1e-08", "train.lr 1e-09", "--set train.min_lr=0")),
        (
            "{train: {min_lr: 1e-6}, student: {sft_epochs: 1, sft_lr: 1e-9}}",
            ("train.min_lr 1e-06", "student.sft_lr 1e-09"),
        ),
        ("student: {lora_output: adapter}", ("student.lora_output", "student.lora.r", "--lora 16")),
        (
            'student: {path: "layers:2", lora: {r: 4}, lora_output: adapter}',
            ("layers:2", "--set student.lora_output=merged"),
        ),
        ("student: {sft_lr: 1e-4}", ("student.sft_lr", "--set student.sft_epochs=3")),
        (
            '{teacher: {quantize: 4bit}, student: {path: "layers:2"}}',
            ("teacher.quantize = 4bit", "layers:2"),
        ),
        (
            "{objective: {tokens: 'entropy:0.5'}, data: {mixup: 0.4}}",
            ("objective.tokens", "data.mixup needs all tokens"),
        ),
        ("{objective: {temperature: 2}, ctcd: {enabled: true}}", ("objective.temperature", "ctcd.temperature")),
    ],
)
def test_conflicting_fields_are_rejected(write_recipe, text, mentions):
    check_rejected("recipe.fields_conflict", *mentions, recipe=write_recipe(text))


@pytest.mark.parametrize("text", ["student: {lora: 16}"])
def test_value_for_a_section_is_rejected(write_recipe, text):
    mentions = ("student.lora", "r, alpha, dropout, targets")
    check_rejected("recipe.section_not_value", *mentions, recipe=write_recipe(text))


def test_default_min_lr_does_not_raise_a_lower_lr():
    config = resolve(command="distill", sets=["train.lr=1e-9", "student.sft_epochs=1", "student.sft_lr=1e-8"]).recipe
    assert (config.train.lr, config.student.sft_lr) == (1e-9, 1e-8)


def test_sft_epochs_are_rejected_for_sft():
    mentions = ("student.sft_epochs = 3", "--epochs")
    check_rejected("recipe.fields_conflict", *mentions, command="sft", sets=["student.sft_epochs=3"])


def test_selection_by_divergence_is_rejected_for_sft():
    mentions = ("train.select = valid_divergence", "--set train.select=valid_loss")
    check_rejected("recipe.fields_conflict", *mentions, command="sft", sets=["train.select=valid_divergence"])


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        ("objective: {alpha: 0,1}", "objective.1", "0.1, not 0,1"),
        ("objective: {alhpa: 0.1}", "objective.alhpa", "objective.alpha"),
        ("train: {alpha: 0.1}", "train.alpha", "objective.alpha"),
        ("student: {lora_alpha: 64}", "student.lora_alpha", "student.lora.alpha"),
        ("student: {lora_r: 8}", "student.lora_r", "student.lora.r"),
        ("lr: 1e-4", "lr", "train.lr"),
        ("batch-size: 4", "batch-size", "train.batch_size"),
        ("train: {learning_rate: 0.1}", "train.learning_rate", "train.lr"),
        ("schedule: {lmbda: 0.1}", "schedule.lmbda", "schedule.mix"),
        ("trian: {lr: 1}", "trian", "train"),
        ("data: {columns: {promt: q}}", "data.columns.promt", "data.columns.prompt"),
        ("xyzzy: 1", "xyzzy", "`distillm distill --dry-run`"),
        ("<<: {a: 1}", "<<", "`distillm distill --dry-run`"),
    ],
)
def test_unknown_key_suggests_the_nearest_name(write_recipe, text, key, meant):
    check_rejected("recipe.unknown_field", f"distill.yaml:1: {key}: ", meant, recipe=write_recipe(text))


def test_first_problem_is_reported_and_others_counted(write_recipe):
    path = write_recipe("train:\n  lr: -1\n  epochs: many\nobjective: {alpha: 3}\ncolour: red\n")
    mentions = ("distill.yaml:2: train.lr = -1", "4 more problems")
    check_rejected("recipe.invalid_value", *mentions, recipe=path, flags={"train.seed": Flag("--seed", -1)})


@pytest.mark.parametrize(
    ("text", "code", "mentions"),
    [
        ("a", "usage.invalid_set", ("--set a", "--set train.lr=5e-4")),
        ("=1", "usage.invalid_set", ("--set =1",)),
        ("train={lr: 1}", "recipe.section_not_value", ("--set train",)),
        (
            "eval.metrics=exact_match,error_rate",
            "recipe.invalid_value",
            ("--set 'eval.metrics=[exact_match, error_rate]'",),
        ),
        ("eval.metrics=exact,rouge", "recipe.invalid_value", ("--set 'eval.metrics=[exact_match, rouge_l]'",)),
        ("eval.seeds=1,2", "recipe.invalid_value", ("< 2^63", "--set 'eval.seeds=[1, 2]'")),
        ("train.lr=[", "recipe.invalid_yaml", ("--set train.lr",)),
        ("train.lr=*x", "recipe.invalid_yaml", ("*name",)),
        ("train.lr.x=1", "recipe.unknown_field", ("--set train.lr.x", "train.lr?")),
        ("alpha=.2", "recipe.unknown_field", ("--set alpha", "objective.alpha")),
        ("objective.alpha=1.4", "recipe.invalid_value", ("--set objective.alpha = 1.4", "--alpha 0.1")),
    ],
)
def test_invalid_set_is_rejected(text, code, mentions):
    check_rejected(code, *mentions, sets=[text])


@pytest.mark.parametrize(
    ("key", "name", "value", "shown", "hint"),
    [
        ("eval.metrics", "--metric", ["rougel", "exact"], "--metric = rougel,exact;", "--metric rouge_l,exact_match"),
        ("eval.seeds", "--seeds", ["ten"], "--seeds = ten;", "--seeds 10,20,30,40,50"),
    ],
)
def test_invalid_list_flag_is_shown_without_brackets(key, name, value, shown, hint):
    line = check_rejected("recipe.invalid_value", shown, flags={key: Flag(name, value)})
    assert line.endswith(hint), "the hint has the syntax of the flag, not of --set"


def test_invalid_flag_is_reported_by_its_name_and_once():
    check_rejected(
        "recipe.invalid_value", "--alpha = 1.4", "--alpha 0.1", flags={"objective.alpha": Flag("--alpha", 1.4)}
    )
    wrong = Flag("--dtype", "bf61")
    flags = {"student.dtype": wrong, "teacher.dtype": wrong}
    line = check_rejected("recipe.invalid_value", "--dtype = bf61", "auto, fp32, bf16", "--dtype bf16", flags=flags)
    assert "more problem" not in line
    flags = {"eval.temperature": Flag("--temperature", -1.0)}
    check_rejected("recipe.invalid_value", "≥ 0", "--temperature 1.0", command="eval", flags=flags)
    # sft has no --alpha
    hint = "--set objective.alpha=0.1"
    check_rejected("recipe.invalid_value", hint, command="sft", sets=["objective.alpha=2"])


def test_missing_recipe_is_rejected(write_recipe, tmp_path):
    write_recipe("{}")
    check_rejected("recipe.not_found", "quikstart", ", ".join(shipped()), "--recipe quickstart", recipe="quikstart")
    check_rejected("recipe.not_found", "nowhere/x.yaml", "`distillm recipes ls`", recipe="nowhere/x.yaml")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("train: {seed: 3}")
    check_rejected("recipe.not_found", "--recipe run/recipe.yaml", recipe="run")
    assert load_resolved("run/recipe.yaml").train.seed == 3
    with raises_code("recipe.not_found", "gone.yaml"):
        load_resolved(tmp_path / "gone.yaml")
    assert locate("quickstart") == shipped()["quickstart"]


# --- serialization ----------------------------------------------------------------------------------------------


def test_resolved_recipe_shows_origins_and_overrides(write_recipe):
    path = write_recipe("train:\n  lr: 5e-4\n")
    resolved = resolve(command="distill", recipe=path, sets=["train.lr=1e-4"])
    text = to_yaml(resolved)
    assert re.search(r"^  lr: 0\.0001 +# --set \(distill\.yaml:2: 0\.0005\)$", text, re.MULTILINE)
    assert re.search(r"^  min_lr: 1\.0e-07 +# default$", text, re.MULTILINE)
    assert re.search(r"^  divergence: skl +# method distillm$", text, re.MULTILINE)
    assert re.search(r"^    prompt: null +# default$", text, re.MULTILINE)
    assert len({line.index("  # ") for line in text.splitlines() if "#" in line}) == 1, "the comments are aligned"
    assert "#" not in to_yaml(resolved, with_origin=False)
    assert list(yaml.safe_load(text)) == list(Recipe.model_fields)
    assert yaml.safe_load(text)["train"]["min_lr"] == 1e-7, "other YAML readers parse the same numbers"


def _values(key: str) -> st.SearchStrategy:
    types = plain_types(leaves()[key].annotation)
    words = choices(key)
    if words:
        item = st.sampled_from(words)
    elif key == "rollout.prefix":
        item = st.integers(1, 10**9) | st.sampled_from(["64->256", "9->1"])
    elif str in types:
        item = st.text(min_size=1, max_size=12) | st.sampled_from(
            ["off", "5e-4", "null", "1:30", "#", "a: b", "'", "~"]
        )
    elif dict in types:
        item = st.dictionaries(st.text("ab_", min_size=1), st.booleans() | st.text(max_size=9) | st.integers())
    elif bool in types:
        item = st.booleans()
    elif float in types:
        item = st.floats(0, 1, exclude_min=True, exclude_max=True)
    else:
        item = st.integers(2, 10**9)
    if takes_list(key):
        item = st.lists(item, min_size=2, max_size=2)
    return item | st.none() if None in types else item


# Fields that need or exclude certain values of other fields. They have their own tests.
BOUND = {
    "train.patience",
    "student.sft_epochs",
    "student.sft_lr",
    "student.lora_output",
    "student.quantize",
    "teacher.device_map",
    "teacher.offload",
    "student.ptp",
    "student.ptp_lr",
}
BOUND |= {"student.lora.alpha", "student.lora.targets"}
BOUND |= {"objective.policy_gradient", "objective.row_weight", "objective.by_source", "objective.curriculum"}
BOUND |= {"objective.temperature", "objective.temperature_scale", "objective.tokens"}
BOUND |= {
    "eval.trigger",
    "eval.target",
    "data.mixup",
    "objective.input_gradient",
    "objective.hidden",
    "disco.enabled",
    "train.adversarial",
}
BOUND |= {"disco.enabled", "disco.keep_projection", "disco.pairs_epochs"}
BOUND |= {"teacher.server", "rollout.server", "rollout.server_dir"}
BOUND |= {"train.tokens_per_step"}
BOUND |= {"data.sources", "data.source", "data.size", "data.tasks"}
BOUND |= {"teacher.template", "teacher.chat_template", "student.template", "student.chat_template"}
BOUND |= {"schedule.fresh", "train.lr", "train.min_lr", "data.date"}
EVERY_FIELD = st.fixed_dictionaries({}, optional={key: _values(key) for key in leaves() if key not in BOUND})


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=EVERY_FIELD, with_origin=st.booleans())
def test_written_recipe_reads_back_identical(values, with_origin, tmp_path):
    method = METHODS[values.get("method", "distillm")]
    command = method.verb
    if method.name == "sft" and values.get("train.select") == "valid_divergence":
        values.pop("train.select")  # sft has no teacher
    allowed = (
        ("last", "valid_loss", "spearman")
        if method.name == "disco"
        else tuple(word for word in choices("train.select") if word != "spearman")
    )
    if values.get("train.select", "last") not in allowed:
        values.pop("train.select")  # spearman is of embeddings, other metrics are of responses
    if method.name == "disco":
        values.pop("schedule.kind", None)  # it trains on rows alone
    if method.name == "minillm":
        values.pop("schedule.kind", None)  # minillm needs outputs of the student
    if method.name in ("minillm", "fdistill", "distillm2"):
        values.pop("objective.divergence", None)  # these methods do not support every divergence
    given = {**method.preset, **values}
    changes = [key for key in ("ctcd.enabled", "okd.rank", "robustkd.blocks") if given.get(key)]
    for key in sorted(changes, key=lambda key: key not in method.preset)[1:]:
        values.pop(key)  # the teacher can change in one way only
    for key in ("teacher.cache", "teacher.quantize", "teacher.dtype") if changes else ():
        values.pop(key, None)
    if method.name == "peakd":
        values["student.path"] = (
            values.get("student.path") or "random:2x32"
        )  # its shared layers exclude adapters and a quantized teacher
    settings_ = {"method": method.name, **method.preset, **values}
    values = {
        key: value
        for key, value in values.items()
        if (key in method.preset and value is None) or is_used(key, lambda k: settings_.get(k, leaves()[k].default))
    }  # null may turn off what the method presets
    values = {key: value for key, value in values.items() if key != "train.epochs" or values.get("train.steps") is None}
    resolved = resolve(command=command, flags={k: Flag(k, v) for k, v in values.items()})
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(resolved, with_origin), encoding="utf-8")
    reread = resolve(command=command, recipe=path)
    assert reread.recipe == resolved.recipe
    assert load_resolved(path) == resolved.recipe


def test_flags_override_a_resolved_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(to_yaml(resolve(command="distill", sets=["train.steps=50", "method=gkd"])))
    resolved = resolve(
        command="distill", recipe=tmp_path / "recipe.yaml", flags={"train.epochs": Flag("--epochs", 1.0)}
    )
    assert (resolved.recipe.train.steps, resolved.recipe.train.epochs) == (None, 1)
    assert resolved.recipe.schedule.kind == "mixed"


# --- flags and the schema ---------------------------------------------------------------------------------------


def test_field_flags_name_existing_fields():
    for entry in FIELD_FLAGS:
        assert set(entry.keys) <= set(leaves()), entry.flag
    assert flag_of("student.path", "distill") == "--student"
    assert flag_of("student.path", "sft") == "--model"
    assert flag_of("train.clip", "distill") is None


def test_only_given_flags_become_fields():
    given = {"alpha": 0.3, "lr": None, "dtype": "bf16", "skip_bad_rows": None}
    assert command_line.flags(**given) == {
        "objective.alpha": Flag("--alpha", 0.3),
        "student.dtype": Flag("--dtype", "bf16"),
        "teacher.dtype": Flag("--dtype", "bf16"),
    }
    with pytest.raises(KeyError):
        command_line.flags(colour="red")


def test_every_field_has_a_description():
    for key, field in leaves().items():
        assert field.description, key


def test_schema_rejects_booleans_as_numbers():
    with pytest.raises(ValueError, match="epochs"):
        TrainConfig(epochs=True)
    assert TrainConfig(gradient_checkpointing=True).gradient_checkpointing
    with pytest.raises(ValueError, match="frozen"):
        Recipe().train.lr = 1.0


@pytest.mark.parametrize("name", METHODS)
def test_methods_on_prompts_need_no_responses(name):
    r = resolve(command=METHODS[name].verb, flags={"method": Flag("--method", name)}).recipe
    assert r.needs_responses == (r.method == "sft" or uses_rows(r))
    with_sft = r.model_copy(update={"student": r.student.model_copy(update={"sft_epochs": 1.0})})
    assert with_sft.needs_responses


LARGE = 2**63


@pytest.mark.parametrize("method", ["[a, b]", "[sft]", "{a: 1}", "3", "1.5", "null"])
def test_method_that_is_not_a_name_is_rejected(method, write_recipe):
    for command in ("distill", "sft"):
        path = write_recipe(f"method: {method}")
        check_rejected("recipe.invalid_value", "sft, kd", command=command, recipe=path)
        check_rejected("recipe.invalid_value", "sft, kd", command=command, sets=[f"method={method}"])


@pytest.mark.parametrize("key", [key for key, field in leaves().items() if int in plain_types(field.annotation)])
def test_integers_beyond_64_bits_are_rejected(key):
    for value in (LARGE, 10**30, -LARGE):
        with raises_code("recipe.invalid_value") as caught:
            resolve(command="distill", sets=[f"{key}={value}"])
        assert caught.value.what.startswith(f"--set {key} = ") or "lora" in key or "patience" in key
    with raises_code("recipe.invalid_value", "2^63"):
        resolve(command="distill", sets=[f"{key}={LARGE}"])
