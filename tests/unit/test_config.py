"""What a person said → one recipe that knows where each value came from; and every way of saying it wrong."""

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
from distillm_cli.errors import RecipeError, UsageError
from distillm_cli.runs.cache_size import uses_rows
from tests import typed


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes distill.yaml in an empty directory and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes) -> str:
        Path("distill.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "distill.yaml"

    return write


def complaint(text: str | bytes | None = None, write=None, **said) -> str:
    """The one line a person reads when a recipe (text) or what they typed is wrong."""
    if text is not None:
        said["recipe"] = write(text)
    with pytest.raises(UsageError) as caught:
        resolve(**{"command": "distill", **said})
    assert caught.value.exit_code == 2
    line = str(caught.value)
    assert "\n" not in line
    return line


# --- who wins ---------------------------------------------------------------------------------------------------


def test_each_layer_overrides_the_one_before_and_says_so(recipe):
    path = recipe("method: gkd\ntrain:\n  lr: 3e-4\n  clip: 0.5\n  seed: 7\nobjective: {beta: 0.3}\n")
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


def test_a_flag_that_was_not_given_decides_nothing(recipe):
    path = recipe("train: {lr: 3e-4}")
    resolved = resolve(
        command="distill", recipe=path, flags={"train.lr": None, "objective.alpha": Flag("--alpha", None)}
    )
    assert resolved.recipe.train.lr == 3e-4
    assert resolved.origin["objective.alpha"] == "method distillm"


def test_the_method_is_chosen_by_the_strongest_voice(recipe):
    path = recipe("method: gkd")
    flag = {"method": Flag("--method", "kd")}
    assert resolve(command="distill", recipe=path).recipe.objective.divergence == "jsd"
    assert resolve(command="distill", recipe=path, flags=flag).recipe.objective.divergence == "kl"
    last = resolve(command="distill", recipe=path, flags=flag, sets=["method=imitkd"])
    assert last.recipe.schedule.kind == "annealed"
    assert (last.recipe.method, last.origin["method"]) == ("imitkd", "--set")


def test_a_method_asked_for_in_place_of_the_recipes_own_brings_its_preset(recipe):
    """What the recipe said of its own method must not turn the other one into a third."""
    path = recipe(
        "method: distillm\nobjective: {divergence: skl}\nschedule: {kind: adaptive}\ntrain: {lr: 3e-3, steps: 40}\n"
    )
    flag = {"method": Flag("--method", "gkd")}
    resolved = resolve(command="distill", recipe=path, flags=flag)
    r = resolved.recipe
    assert (r.objective.divergence, r.schedule.kind, r.train.lr, r.train.steps) == ("jsd", "mixed", 3e-3, 40)
    assert resolved.origin["schedule.kind"] == "method gkd"
    assert resolved.overridden["schedule.kind"] == ("adaptive", "distill.yaml:3")
    by_hand = resolve(command="distill", recipe=path, flags=flag, sets=["schedule.kind=on"]).recipe
    assert by_hand.schedule.kind == "on"
    same = resolve(command="distill", recipe=path, flags={"method": Flag("--method", "distillm")}).recipe
    assert same == resolve(command="distill", recipe=path).recipe
    silent = recipe("objective: {beta: 0.4}")  # a recipe that names no method speaks for any
    assert resolve(command="distill", recipe=silent, flags=flag).recipe.objective.beta == 0.4


def test_without_a_word_distill_is_distillm_on_dolly_and_sft_is_sft():
    r = resolve(command="distill").recipe
    assert (r.method, r.data.source, r.objective.divergence, r.schedule.kind) == (
        "distillm",
        "dolly",
        "skl",
        "adaptive",
    )
    r = resolve(command="sft").recipe
    assert (r.method, r.objective.kd_weight, r.train.select) == ("sft", 0.0, "valid_loss")


def test_a_method_of_the_other_verb_is_refused_by_naming_that_verb(recipe):
    path = recipe("method: sft")
    assert complaint(recipe=path) == (
        f"distill.yaml:1: method = sft; expected a method of `distillm distill` ({', '.join(list(METHODS)[1:])}); "
        "try `distillm sft`"
    )
    assert "try `distillm distill`" in complaint(command="sft", sets=["method=kd"])
    assert resolve(command="plan", recipe=path).recipe.method == "sft"


def test_epochs_on_the_command_line_replace_the_steps_of_the_recipe(recipe):
    path = recipe("train: {steps: 100, epochs: 5}")
    assert resolve(command="distill", recipe=path).recipe.train.steps == 100
    resolved = resolve(command="distill", recipe=path, flags={"train.epochs": Flag("--epochs", 2.0)})
    assert (resolved.recipe.train.epochs, resolved.recipe.train.steps) == (2, None)
    assert resolved.origin["train.steps"] == "--epochs"
    assert resolved.overridden["train.steps"] == (100, "distill.yaml:1")
    assert resolve(command="distill", recipe=path, sets=["train.epochs=2"]).recipe.train.steps is None
    assert resolve(command="distill", recipe=path, flags=typed.flags(steps=9)).recipe.train.steps == 9


@pytest.mark.parametrize(
    ("flags", "sets", "said"),
    [
        ({"epochs": 2.0, "steps": 9}, [], "--epochs and --steps both given; keep one of them"),
        ({"steps": 9}, ["train.epochs=2"], "--set train.epochs and --steps both given; keep one of them"),
        ({"epochs": 2.0}, ["train.steps=9"], "--epochs and --set train.steps both given; keep one of them"),
        (
            {},
            ["train.steps=9", "train.epochs=2"],
            "--set train.epochs and --set train.steps both given; keep one of them",
        ),
    ],
)
def test_epochs_and_steps_exclude_each_other_however_they_are_typed(recipe, flags, sets, said):
    assert complaint("train: {steps: 100}", recipe, flags=typed.flags(**flags), sets=sets) == said
    freed = resolve(command="distill", sets=["train.steps=null", "train.epochs=2"]).recipe.train
    assert (freed.steps, freed.epochs) == (None, 2), "no steps is no wish"


def test_a_method_named_by_hand_brings_its_preset_along(recipe):
    """One word changed over a recipe that spells its own method out: objective and sequences follow, the training stays."""
    path = recipe(
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

    by_hand = {"method": Flag("--method", "gkd"), "schedule.kind": Flag("--schedule", "on")}
    assert resolve(command="distill", recipe=path, flags=by_hand).recipe.schedule.kind == "on"
    same = resolve(command="distill", recipe=path, flags={"method": Flag("--method", "distillm")}).recipe
    assert same.objective.divergence == "srkl", "the recipe's own method, as the recipe has it"


# --- whose a parameter is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sets", "said"),
    [
        (
            {"method": "kd", "alpha": 0.1},
            [],
            "--alpha = 0.1; objective.alpha applies to skl and srkl (methods distillm, distillm2), but "
            "objective.divergence is kl (method kd); remove it, or try --divergence skl",
        ),
        (
            {"method": "ab", "alpha": 0.1},
            [],
            "objective.divergence is ab (method ab); ab uses objective.ab_alpha, objective.ab_beta; remove it, or",
        ),
        (
            {},
            ["objective.ab_beta=0.3"],
            "--set objective.ab_beta = 0.3; it applies to ab, and to amid with amid_divergence ab, but "
            "objective.divergence is skl (method distillm); skl uses objective.alpha; remove it, or try "
            "--divergence ab",
        ),
        (
            {"method": "amid"},
            ["objective.ab_beta=0.3"],
            "but objective.divergence is amid and objective.amid_divergence is kl (method amid)",
        ),
        (
            {"method": "kd"},
            ["schedule.mix=0.3"],
            "--set schedule.mix = 0.3; it applies to mixed (method gkd), but schedule.kind is off (method kd); "
            "remove it, or try --schedule mixed",
        ),
        (
            {"schedule": "annealed"},
            ["schedule.anneal_rate=3"],
            "it applies to annealed with anneal exponential or sigmoid (method imitkd), but schedule.anneal is linear",
        ),
        (
            {"schedule": "off"},
            ["schedule.capacity=5"],
            "it applies to schedule.replay decreasing, constant and increasing, and to adaptive with replay auto "
            "(methods "
            "distillm, amid), and to schedule.fresh buffer (method imitkd), but schedule.replay is auto and schedule."
            "kind is off and schedule.fresh is direct (method distillm); remove it, or try --schedule adaptive",
        ),
        (
            {"method": "kd"},
            ["rollout.teacher_mix=0.5"],
            "it applies to on, mixed, annealed, adaptive and rounds, and to pairs with redraw never (methods fdistill, "
            "distillm2), but schedule.kind is off (method kd); remove it, or try --schedule on",
        ),
        (
            {"method": "distillm2"},
            ["rollout.teacher_mix=0.5"],
            "but schedule.kind is pairs and schedule.redraw is epoch (method distillm2)",
        ),
        (
            {"method": "kd"},
            ["objective.ratio_clip=0.1"],
            "it applies to objective.policy_gradient true (method minillm), but objective.policy_gradient is false "
            "(method kd); remove it, or try --set objective.policy_gradient=true",
        ),
        (
            {"data": "mine.jsonl"},
            ["data.size=99"],
            "it applies to data.source builtin, but data.source is mine.jsonl; remove it, or try --data builtin",
        ),
        ({}, ["data.tasks=[sum]"], "but data.source is dolly and data.valid is null; remove it"),
        (
            {"method": "seqkd", "divergence": "rkl"},
            [],
            "--divergence = rkl; objective.divergence applies to objective.kd_weight above 0, and to objective.policy_"
            "gradient true (method minillm), and to train.select valid_divergence, but objective.kd_weight is "
            "0.0 and",
        ),
        ({"method": "seqkd"}, ["objective.kd_warmup=0.1"], "remove it, or try --set objective.kd_weight=1.0"),
        ({"method": "seqkd", "alpha": 0.3}, [], "or try --divergence skl --set objective.kd_weight=1.0"),
        (
            {"alpha": 0.3},
            ["objective.kd_weight=0"],
            "--alpha = 0.3; objective.alpha applies to skl and srkl (methods distillm, distillm2), but objective.kd_"
            "weight is 0.0 (method distillm); remove it, or try --set objective.kd_weight=1.0",
        ),
        (
            {"method": "kd"},
            ["objective.by_source=true"],
            "but schedule.kind is off and objective.divergence is kl and objective.curriculum is off (method kd)",
        ),
        (
            {"method": "akl", "schedule": "on"},
            ["objective.by_source=true"],
            "but schedule.kind is on and objective.div",
        ),
        (
            {"method": "gkd"},
            ["schedule.capacity=9"],
            "but schedule.replay is auto and schedule.kind is mixed and schedule.fresh is direct (method gkd); "
            "remove it, or try --set schedule.replay=decreasing",
        ),
        ({"method": "skd"}, ["schedule.capacity=9"], "and schedule.kind is interleaved and"),
        ({"method": "imitkd"}, ["schedule.warm_up=none"], "remove it, or try --set schedule.replay=decreasing"),
        (
            {},
            ["student.lora.dropout=0.3"],
            "--set student.lora.dropout = 0.3; it applies to student.lora.r that is given, but student.lora.r is null; "
            "remove it, or try --lora 16",
        ),
        (
            {},
            ["train.lr_schedule=constant", "train.min_lr=1e-5"],
            "it applies to train.lr_schedule cosine and linear, but train.lr_schedule is constant; remove it",
        ),
        (
            {"teacher": "builtin"},
            ["teacher.revision=main"],
            "it applies to teacher.path on the hub, but teacher.path is builtin; remove it, or try --teacher NAME",
        ),
        ({"teacher": "."}, ["teacher.revision=main"], "but teacher.path is .; remove it"),
        ({"teacher": "gone/for/good"}, ["teacher.revision=main"], "but teacher.path is gone/for/good; remove it"),
        (
            {"method": "kd"},
            ["rollout.temperature=0.5"],
            "but schedule.kind is off (method kd); remove it, or try --sch",
        ),
        (
            {"method": "kd"},
            ["rollout.bulk=4"],
            "pairs, interleaved and rounds, but schedule.kind is off (method kd)",
        ),
        ({"method": "seqkd"}, ["rollout.top_k=4"], "but schedule.kind is teacher (method seqkd); remove it"),
        ({"student": "layers:2"}, ["student.revision=main"], "but student.path is layers:2; remove it"),
        ({"student": "config.json"}, ["student.revision=main"], "but student.path is config.json; remove it"),
    ],
)
def test_a_parameter_of_another_method_is_refused_by_naming_whose_it_is(flags, sets, said):
    assert said in complaint(flags=typed.flags(**flags), sets=sets)


def test_a_parameter_of_another_method_in_a_recipe_is_an_error_with_its_line(recipe):
    line = complaint("method: kd\nobjective:\n  beta: 0.3\nschedule: {mix: 0.2}\n", recipe)
    assert line.startswith(
        "distill.yaml:3: objective.beta = 0.3; it applies to jsd (methods gkd, fdistill), but objective.div"
    )
    assert line.endswith("; and 1 more problem")
    line = complaint("method: sft\nobjective: {alpha: 0.3}\n", recipe, command="sft")
    assert "it applies to `distillm distill`; sft uses only cross-entropy; remove it" in line
    repeated = recipe(
        "method: kd\nobjective: {beta: 0.5, alpha: 0.1}"
    )  # what holds anyway: every resolved recipe says it
    assert resolve(command="distill", recipe=repeated).notes == ()


@pytest.mark.parametrize(
    ("command", "said", "whose"),
    [
        ("generate", "train.lr=0.1", "it applies to `distillm sft` and `distillm distill`; generate does not train"),
        ("generate", "schedule.kind=on", "it applies to `distillm distill`; generate does not train; remove it"),
        ("generate", "rollout.teacher_mix=0.2", "`distillm distill`; generate does not train"),
        ("eval", "objective.alpha=0.3", "it applies to `distillm distill`; eval does not train"),
        ("eval", "rollout.temperature=0", "eval does not train"),
        ("sft", "rollout.teacher_mix=0.2", "it applies to `distillm distill`; sft uses only cross-entropy"),
        (
            "sft",
            "rollout.temperature=0.5",
            "it applies to `distillm distill` and `distillm generate`; sft uses only cross",
        ),
        ("sft", "rollout.bulk=2", "it applies to `distillm distill`; sft uses only cross-entropy; remove it"),
        ("sft", "teacher.cache=memory", "it applies to `distillm distill`; sft uses only cross-entropy"),
        (
            "sft",
            "teacher.path=gpt2-xl",
            "it applies to `distillm distill`, and to models built from a teacher (layers:4, width:0.5); sft uses "
            "only cross",
        ),
        ("sft", "rollout.draft=3", "it applies to `distillm distill`; sft uses only cross-entropy; remove it"),
    ],
)
def test_what_a_verb_never_reads_is_refused_where_it_is_typed(command, said, whose, recipe):
    assert whose in complaint(command=command, sets=[said])
    key, _, value = said.partition("=")
    section, name = key.split(".")
    shared = {"rollout.temperature", "rollout.bulk", "teacher.cache", "teacher.path"}  # `distill` reads the same file
    if command != "sft" or said.partition("=")[0] in shared:  # a recipe is of training, and any will do
        resolve(command=command, recipe=recipe(f"{section}: {{{name}: {value}}}\n"))


@pytest.mark.parametrize(
    ("command", "typed"),
    [
        ("generate", ["rollout.top_k=5", "train.seed=3", "train.threads=1"]),
        ("generate", ["eval.batch_size=2", "data.tasks=[sum]", "data.template=plain", "data.columns.prompt=q"]),
        ("eval", ["train.threads=1", "eval.seeds=[1]"]),
        ("eval", ["data.source=mine.jsonl", "data.valid_limit=9"]),  # held-out rows
        ("eval", ["eval.suites=builtin", "eval.top_k=5", "data.tasks=[sum]", "data.skip_bad_rows=true"]),
        ("sft", ["rollout.max_new_tokens=24"]),  # by which `generate` will go, too
        ("sft", ["student.path=layers:2", "teacher.path=gpt2-xl", "teacher.dtype=fp32", "teacher.revision=main"]),
        ("distill", ["method=seqkd", "rollout.bulk=2"]),
        ("distill", ["data.valid=builtin", "data.tasks=[sum]"]),
        ("distill", ["method=minillm", "objective.ratio_clip=0.1", "rollout.teacher_mix=0.3"]),
        ("distill", ["method=fdistill", "rollout.teacher_mix=0.3"]),
        ("distill", ["objective.kd_weight=0", "train.select=valid_divergence", "objective.alpha=0.3"]),
        ("distill", ["method=minillm", "objective.kd_weight=0", "objective.divergence=kl", "objective.kd_warmup=0.1"]),
        ("distill", ["method=kd", "objective.divergence=srkl", "objective.by_source=true"]),  # which makes it skl
        ("distill", ["method=imitkd", "schedule.capacity=9"]),
        ("distill", ["method=skd", "schedule.replay=constant", "schedule.capacity=9", "schedule.warm_up=none"]),
        ("distill", ["student.lora.r=4", "student.lora.dropout=0.3"]),
        (
            "distill",
            ["teacher.path=gpt2-xl", "teacher.revision=main", "student.path=org/gpt2", "student.revision=main"],
        ),
    ],
)
def test_what_is_read_may_be_typed(command, typed):
    assert resolve(command=command, sets=typed).notes == ()


@pytest.mark.parametrize(
    ("command", "said", "instead"),
    [
        ("generate", "data.limit=5", "or try --limit"),
        ("generate", "data.source=x", "or try --data"),
        ("generate", "data.max_length=9", "or try --max-new-tokens"),
        (
            "generate",
            "eval.max_new_tokens=4",
            "it applies to `distillm eval`; generate does not train; remove it, or try --m",
        ),
        ("generate", "eval.seeds=3", "or try --seed"),
        (
            "generate",
            "eval.report_rows=3",
            "it applies to `distillm sft` and `distillm distill`; generate does not train",
        ),
        ("generate", "student.path=x", "or try --model"),
        (
            "generate",
            "method=kd",
            "--set method = kd; it applies to `distillm sft` and `distillm distill`; generate does not train",
        ),
        ("eval", "data.limit=5", "or try --limit"),
        ("eval", "data.max_length=9", "or try --max-new-tokens"),
        ("eval", "data.max_prompt_length=9", "eval does not train; remove it"),
        ("eval", "eval.report_rows=3", "or try --limit"),
        ("eval", "student.path=x", "or try `distillm eval CKPT`"),
        ("eval", "student.tokenizer=x", "eval does not train"),
        ("eval", "student.lora.r=4", "eval does not train"),
        ("eval", "teacher.path=x", "eval does not train"),
        ("eval", "teacher.dtype=bf16", "eval does not train"),
        ("eval", "rollout.max_new_tokens=4", "or try --max-new-tokens"),
        (
            "eval",
            "train.seed=4",
            "`distillm sft`, `distillm distill` and `distillm generate`; eval does not train; remove it",
        ),
    ],
)
def test_a_verb_that_trains_nothing_names_the_flag_that_it_reads_instead(command, said, instead, recipe):
    assert instead in complaint(command=command, sets=[said])
    section, _, rest = said.partition(".")
    if rest:  # of a model's own recipe
        *inner, last = rest.partition("=")[0].split(".")
        name = f"{{{inner[0]}: {{{last}: " if inner else f"{{{last}: "
        resolve(command=command, recipe=recipe(f"{section}: {name}{said.partition('=')[2]}" + "}" * (1 + len(inner))))


def test_held_out_rows_are_scored_on_where_no_suite_is_named(recipe):
    path = recipe("eval: {suites: [dolly]}")
    for said in ("data.source=mine.jsonl", "data.valid=mine.jsonl", "data.valid_limit=9"):
        assert "it applies to held-out rows, but eval.suites is [dolly]; remove it, or try --" in complaint(
            command="eval", recipe=path, sets=[said]
        )
        assert resolve(command="eval", recipe=path, sets=[said, "eval.suites=[]"]).recipe.eval.suites == ()


def test_one_flag_of_two_models_is_read_where_one_of_them_is():
    for command in ("sft", "generate", "eval"):
        r = resolve(command=command, flags=typed.flags(dtype="bf16")).recipe
        assert r.student.dtype == "bf16"


def test_a_revision_goes_with_the_model_of_the_hub_that_it_is_of(recipe, tmp_path):
    """A run's own recipe must not say that a directory was some commit on the hub."""
    path = recipe("teacher: {path: gpt2-xl, revision: abc}")
    resolved = resolve(command="distill", recipe=path, flags=typed.flags(teacher=str(tmp_path)))
    assert resolved.recipe.teacher.revision is None
    assert resolved.notes[0].endswith(": teacher.revision")
    line = complaint(f"teacher: {{path: {tmp_path}, revision: abc}}", recipe)
    assert line.startswith("distill.yaml:1: teacher.revision = abc; it applies to teacher.path on the hub, but")


def test_a_recipe_of_the_built_in_rows_takes_other_rows_and_says_what_it_leaves_out():
    resolved = resolve(command="distill", recipe="quickstart", flags=typed.flags(data="mine.jsonl"))
    assert resolved.notes == (
        "quickstart.yaml: ignored, since this run (method distillm, objective srkl, schedule adaptive, "
        "data mine.jsonl) does not use them: data.size",
    )
    assert "applies to data.source builtin" in complaint(
        recipe="quickstart", flags=typed.flags(data="mine.jsonl"), sets=["data.size=5"]
    )


def test_what_a_recipe_says_for_its_own_method_is_left_out_under_another(recipe, tmp_path):
    path = recipe("method: distillm\nobjective: {alpha: 0.3}\nschedule: {epsilon: 0.2, capacity: 64}\n")
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
    with pytest.raises(RecipeError, match=r"--set objective\.alpha"):
        resolve(command="distill", recipe=path, flags={"method": Flag("--method", "kd")}, sets=["objective.alpha=0.2"])


def test_the_sweep_over_alpha_and_every_method_over_quickstart_resolve():
    for alpha in (0.0, 0.1, 0.3):
        resolved = resolve(command="distill", recipe="quickstart", flags=typed.flags(alpha=alpha))
        assert (resolved.recipe.objective.alpha, resolved.notes) == (alpha, ())
    for name, method in METHODS.items():
        if method.verb != "distill":
            continue
        for kind in (None, *choices("schedule.kind")):
            if name == "minillm" and kind in ("off", "teacher", "pairs", "interleaved"):
                continue  # a policy gradient is of outputs that are the student's own
            flags = typed.flags(method=name, schedule=kind)
            r = resolve(command="distill", recipe="quickstart", flags=flags).recipe
            assert r.schedule.kind == (kind or method.preset.get("schedule.kind", r.schedule.kind))
            if name != "distillm":  # quickstart's own method, of which it has its own variant
                assert r.objective.divergence == method.preset.get("objective.divergence", r.objective.divergence)


def test_commands_that_train_nothing_take_any_recipe(recipe):
    path = recipe("method: kd\nobjective: {beta: 0.3}")
    for command in ("eval", "generate"):
        assert resolve(command=command, recipe=path).recipe.objective == ObjectiveConfig(divergence="kl")
    assert load_resolved(path).objective == ObjectiveConfig(divergence="kl")


def test_a_condition_speaks_of_fields_and_values_that_exist():
    for key in leaves():
        for alternative in condition(key).alternatives if condition(key) else ():
            for deciding_key, words in alternative.items():
                taken = TypeAdapter(leaves()[deciding_key].annotation)
                assert all(taken.validate_python(word, strict=True) == word for word in words), (key, deciding_key)


@pytest.mark.parametrize("name", METHODS)
def test_a_preset_sets_existing_fields_to_valid_values(name):
    method = METHODS[name]
    resolved = resolve(command=method.verb, sets=[f"method={name}"])
    assert {key for key, origin in resolved.origin.items() if origin == f"method {name}"} == set(method.preset)


# --- reading YAML -----------------------------------------------------------------------------------------------


def test_numbers_in_any_notation_are_numbers(recipe):
    path = recipe("train: {lr: 5e-4, min_lr: '1e-8', steps: 1e3, weight_decay: .5, clip: 2, betas: [9e-1, 0.999]}")
    t = resolve(command="distill", recipe=path).recipe.train
    assert (t.lr, t.min_lr, t.steps, t.weight_decay, t.clip, t.betas) == (5e-4, 1e-8, 1000, 0.5, 2.0, (0.9, 0.999))


def test_off_and_on_are_words_and_a_revision_of_digits_stays_text(recipe):
    path = recipe("schedule: {kind: off}\nteacher: {revision: 0012345}\ndata: {source: 2024-01-01}")
    r = resolve(command="distill", recipe=path).recipe
    assert (r.schedule.kind, r.teacher.revision, r.data.source) == ("off", "0012345", "2024-01-01")
    assert resolve(command="distill", sets=["schedule.kind=on"]).recipe.schedule.kind == "on"


def test_set_reads_lists_and_a_single_word_is_a_list_of_one():
    resolved = resolve(command="distill", sets=["eval.suites=[dolly, vicuna]", "eval.seeds=3", "eval.metrics=rouge_l"])
    assert resolved.recipe.eval.suites == ("dolly", "vicuna")
    assert resolved.recipe.eval.seeds == (3,)
    assert resolved.recipe.eval.metrics == ("rouge_l",)
    assert resolve(command="distill", sets=["data.source=builtin", "data.tasks=null"]).recipe.data.tasks is None
    assert resolve(command="distill", sets=["train.seed=1", "train.seed=2"]).recipe.train.seed == 2
    assert resolve(command="distill", sets=["data.columns.prompt=q"]).recipe.data.columns.prompt == "q"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "distill.yaml: holds nothing; expected a mapping of sections; see `distillm recipes show quickstart`"),
        ("- a\n", "distill.yaml: holds a sequence; expected a mapping"),
        ("train:\n", "distill.yaml:1: train: a section, not a value; its keys are epochs, steps"),
        (
            "teacher: gpt2\n",
            "distill.yaml:1: teacher: a section, not a value; its keys are path, dtype, cache, cache_dir, revision",
        ),
        ("train:\n  lr: 1\n  lr: 2\n", "distill.yaml:3: train.lr occurs twice, first in line 2; keep one of them"),
        ("train: {}\ntrain: {}\n", "distill.yaml:2: train occurs twice, first in line 1"),
        ("a: b\n---\nc: d\n", "distill.yaml:2: not a YAML document (expected a single document"),
        ("train:\n\tlr: 1\n", "indent with spaces, not tabs"),
        ("train: {lr: [1\n", "distill.yaml:2: not a YAML document"),
        (b"\xff\xfe", "distill.yaml: not UTF-8 text (byte 0)"),
        ("train: {lr: \x00}", "distill.yaml:1: not a YAML document"),
        ("? [a]\n: 1\n", "distill.yaml:1: a key must be a name"),
        ("teacher: {path: !!python/object/apply:os.system [ls]}", "is not read in recipes; write the value itself"),
        ("teacher: {path: !env HOME}", "distill.yaml:1: tag !env is not read in recipes"),
        ("train: {steps: !!int three}", "distill.yaml:1: three is not a valid integer"),
        ("train: {steps: " + "9" * 5000 + "}", "is not a valid integer"),
        ("[" * 600, "distill.yaml: nested too deeply"),
        ("#" * 1_000_001, "distill.yaml: too large for a recipe"),
    ],
)
def test_a_file_that_is_no_recipe(recipe, text, said):
    assert said in complaint(text, recipe)


def test_aliases_cannot_blow_a_recipe_up(recipe):
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )
    assert "distill.yaml:2: not a YAML document (aliases (*name) are not read in recipes)" in complaint(bomb, recipe)


# --- wrong values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "\n\nobjective:\n  alpha: 1.4\n",
            "distill.yaml:4: objective.alpha = 1.4; expected a number ≥ 0 and < 1; try --alpha 0.1",
        ),
        (
            "schedule: {kind: adaptve}",
            "distill.yaml:1: schedule.kind = adaptve; expected one of off, on, mixed, annealed, adaptive, teacher, pairs, "
            "interleaved, rounds; try --schedule adaptive",
        ),
        (
            "eval: {metrics: [rouge, exact_match]}",
            "distill.yaml:1: eval.metrics = [rouge, exact_match]; expected a non-empty list, each one of "
            "rouge_l, "
            "rouge_1, rouge_2, bleu, chrf, exact_match, error_rate, final_number; "
            "try --set 'eval.metrics=[rouge_l, exact_match]'",
        ),
        ("train: {epochs: abc}", "train.epochs = abc; expected a number > 0, or auto; try --set train.epochs=auto"),
        ("train: {batch_size: 3.5}", "train.batch_size = 3.5; expected an integer ≥ 1; try --batch-size 8"),
        ("train: {batch_size: true}", "train.batch_size = true; expected an integer ≥ 1"),
        ("train: {lr: true}", "train.lr = true; expected a number > 0"),
        ("train: {lr: .nan}", "train.lr = .nan; expected a number > 0"),
        ("train: {lr: }", "train.lr = null; expected a number > 0"),
        ("train: {steps: 0}", "train.steps = 0; expected an integer ≥ 1, or null; it means: number of optimizer steps"),
        ("train: {eval_steps: epoh}", "expected an integer ≥ 1, or epoch; try --set train.eval_steps=epoch"),
        ("train: {betas: [0.9]}", "train.betas = [0.9]; expected a list of 2, each a number ≥ 0 and < 1"),
        ("train: {gradient_checkpointing: maybe}", "expected true or false"),
        ("eval: {seeds: []}", "eval.seeds = []; expected a non-empty list, each an integer"),
        ("eval: {metrics: []}", "try --set 'eval.metrics=[rouge_l, exact_match]'"),
        ("eval: {seeds: [true]}", "eval.seeds = [true]; expected a non-empty list"),
        ("teacher: {path: ''}", "teacher.path = (empty); expected a non-empty string"),
        ("method: distilm", f"method = distilm; expected one of {', '.join(METHODS)}; try --method distillm"),
        ("method:", "method = null; expected one of"),
        (
            "train: {patience: 3}",
            "train.patience = 3; train.patience needs train.select; try --set train.sel",
        ),
        ("student: {lora: {alpha: 64}}", "student.lora.alpha = 64; student.lora.alpha needs an adapter"),
        ("student: {lora: 16}", "student.lora: a section, not a value; its keys are r, alpha, dropout, targets"),
        (
            "train: {lr: 5e-4, min_lr: 1e-2}",
            "train.min_lr = 0.01; train.min_lr 0.01 is above train.lr 0.0005; try",
        ),
        (
            "train: {lr: 1e-9, min_lr: 1e-8}",
            "train.min_lr 1e-08 is above train.lr 1e-09; try --set",
        ),
        (
            "{train: {min_lr: 1e-6}, student: {sft_epochs: 1, sft_lr: 1e-9}}",
            "train.min_lr 1e-06 is above student.sft_lr 1e-09",
        ),
        ("student: {lora_output: adapter}", "needs student.lora.r; try --lora 16"),
        (
            'student: {path: "layers:2", lora: {r: 4}, lora_output: adapter}',
            "the base model layers:2 would not be saved; try --set student.lora_output=merged",
        ),
        ("student: {sft_lr: 1e-4}", "student.sft_lr needs student.sft_epochs; try --set student.sft_epochs=3"),
        ("teacher: {quantize: 3bit}", "teacher.quantize = 3bit; expected one of none, 8bit, 4bit"),
        (
            '{teacher: {quantize: 4bit}, student: {path: "layers:2"}}',
            "teacher.quantize = 4bit; teacher.quantize 4bit: student layers:2 would copy quantized layers",
        ),
    ],
)
def test_a_wrong_value_is_told_with_its_place_and_a_cure(recipe, text, said):
    assert said in complaint(text, recipe)


def test_a_rate_below_the_least_that_nobody_asked_for_stays_as_it_is():
    made = resolve(command="distill", sets=["train.lr=1e-9", "student.sft_epochs=1", "student.sft_lr=1e-8"]).recipe
    assert (made.train.lr, made.student.sft_lr) == (1e-9, 1e-8)


def test_a_stage_before_distillation_is_not_for_sft():
    said = "--set student.sft_epochs = 3; student.sft_epochs adds a stage before distillation; for sft, try --epochs"
    assert complaint(command="sft", sets=["student.sft_epochs=3"]) == said


def test_nothing_tells_how_far_a_fine_tuned_model_is_from_no_teacher():
    said = (
        "--set train.select = valid_divergence; train.select valid_divergence needs a teacher, and sft has none; "
        "try --set train.select=valid_loss"
    )
    assert complaint(command="sft", sets=["train.select=valid_divergence"]) == said


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("objective: {alpha: 0,1}", "objective.1: no such key; inside braces a comma ends a value: write 0.1, not 0,1"),
        ("objective: {alhpa: 0.1}", "objective.alhpa: no such key; did you mean objective.alpha?"),
        ("train: {alpha: 0.1}", "train.alpha: no such key; did you mean objective.alpha?"),
        ("student: {lora_alpha: 64}", "student.lora_alpha: no such key; did you mean student.lora.alpha?"),
        ("student: {lora_r: 8}", "student.lora_r: no such key; did you mean student.lora.r?"),
        ("lr: 1e-4", "lr: no such key; did you mean train.lr?"),
        ("batch-size: 4", "did you mean train.batch_size?"),
        ("train: {learning_rate: 0.1}", "train.learning_rate: no such key; did you mean train.lr?"),
        ("schedule: {lmbda: 0.1}", "did you mean schedule.mix?"),
        ("trian: {lr: 1}", "did you mean train?"),
        ("data: {columns: {promt: q}}", "did you mean data.columns.prompt?"),
        ("xyzzy: 1", "xyzzy: no such key; `distillm distill --dry-run` prints every key"),
        ("<<: {a: 1}", "<<: no such key"),
    ],
)
def test_an_unknown_key_gets_the_nearest_valid_name(recipe, text, meant):
    assert f"distill.yaml:1: {meant}" in complaint(text, recipe) or meant in complaint(text, recipe)


def test_the_first_problem_in_the_file_is_told_and_the_others_are_counted(recipe):
    text = "train:\n  lr: -1\n  epochs: many\nobjective: {alpha: 3}\ncolour: red\n"
    line = complaint(text, recipe, flags={"train.seed": Flag("--seed", -1)})
    assert line.startswith("distill.yaml:2: train.lr = -1; expected a number > 0")
    assert line.endswith("; and 4 more problems")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a", "--set a; expected section.key=value; try --set train.lr=5e-4"),
        ("=1", "--set =1; expected section.key=value"),
        ("train={lr: 1}", "--set train: a section, not a value"),
        (
            "eval.metrics=exact_match,error_rate",
            "error_rate, final_number; try --set 'eval.metrics=[exact_match, error_rate]'",
        ),
        ("eval.metrics=exact,rouge", "try --set 'eval.metrics=[exact_match, rouge_l]'"),
        (
            "eval.seeds=1,2",
            "expected a non-empty list, each an integer < 2^63; try --set 'eval.seeds=[1, 2]'",
        ),
        ("train.lr=[", "--set train.lr: not a YAML document"),
        ("train.lr=*x", "aliases (*name) are not read"),
        ("train.lr.x=1", "--set train.lr.x: no such key; did you mean train.lr?"),
        ("alpha=.2", "--set alpha: no such key; did you mean objective.alpha?"),
        ("objective.alpha=1.4", "--set objective.alpha = 1.4; expected a number ≥ 0 and < 1; try --alpha 0.1"),
    ],
)
def test_a_wrong_set(text, said):
    assert said in complaint(sets=[text])


@pytest.mark.parametrize(
    ("key", "name", "value", "told", "cure"),
    [
        (
            "eval.metrics",
            "--metric",
            ["rougel", "exact"],
            "--metric = rougel,exact;",
            "try --metric rouge_l,exact_match",
        ),
        ("eval.seeds", "--seeds", ["ten"], "--seeds = ten;", "try --seeds 10,20,30,40,50"),
    ],
)
def test_a_list_given_by_a_flag_is_told_and_cured_as_flags_take_it(key, name, value, told, cure):
    line = complaint(flags={key: Flag(name, value)})
    assert line.startswith(told)
    assert line.endswith(cure), "brackets are what --set reads, not --metric"


def test_a_wrong_flag_is_told_by_its_own_name_and_once():
    assert complaint(flags={"objective.alpha": Flag("--alpha", 1.4)}) == (
        "--alpha = 1.4; expected a number ≥ 0 and < 1; try --alpha 0.1"
    )
    wrong = Flag("--dtype", "bf61")
    assert complaint(flags={"student.dtype": wrong, "teacher.dtype": wrong}) == (
        "--dtype = bf61; expected one of auto, fp32, bf16; try --dtype bf16"
    )
    own = {"eval.temperature": Flag("--temperature", -1.0)}
    assert complaint(command="eval", flags=own).endswith("expected a number ≥ 0; try --temperature 1.0")
    assert "try --set objective.alpha=0.1" in complaint(command="sft", sets=["objective.alpha=2"])  # sft has no --alpha


def test_a_recipe_that_is_not_there(recipe, tmp_path):
    recipe("{}")
    assert complaint(recipe="quikstart") == (
        f"no recipe named quikstart; shipped: {', '.join(shipped())}; try --recipe quickstart"
    )
    assert complaint(recipe="nowhere/x.yaml").startswith("no recipe file nowhere/x.yaml; `distillm recipes ls`")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("train: {seed: 3}")
    assert complaint(recipe="run") == "run is a directory; try --recipe run/recipe.yaml"
    assert load_resolved("run/recipe.yaml").train.seed == 3
    with pytest.raises(RecipeError, match=r"no recipe file .*gone\.yaml"):
        load_resolved(tmp_path / "gone.yaml")
    assert locate("quickstart") == shipped()["quickstart"]


# --- writing it back --------------------------------------------------------------------------------------------


def test_the_resolved_recipe_shows_every_field_its_origin_and_what_it_replaced(recipe):
    path = recipe("train:\n  lr: 5e-4\n")
    resolved = resolve(command="distill", recipe=path, sets=["train.lr=1e-4"])
    text = to_yaml(resolved)
    assert re.search(r"^  lr: 0\.0001 +# --set \(distill\.yaml:2: 0\.0005\)$", text, re.MULTILINE)
    assert re.search(r"^  min_lr: 1\.0e-07 +# default$", text, re.MULTILINE)
    assert re.search(r"^  divergence: skl +# method distillm$", text, re.MULTILINE)
    assert re.search(r"^    prompt: null +# default$", text, re.MULTILINE)
    assert len({line.index("  # ") for line in text.splitlines() if "#" in line}) == 1, "the comments are aligned"
    assert "#" not in to_yaml(resolved, with_origin=False)
    assert list(yaml.safe_load(text)) == list(Recipe.model_fields)
    assert yaml.safe_load(text)["train"]["min_lr"] == 1e-7, "other readers see the same numbers"


def _values(key: str) -> st.SearchStrategy:
    types = plain_types(leaves()[key].annotation)
    words = choices(key)
    if words:
        item = st.sampled_from(words)
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


# Fields that need, or exclude, certain values of others; their own tests say what goes together.
BOUND = {"train.patience", "student.sft_epochs", "student.sft_lr", "student.lora_output"}
BOUND |= {"student.lora.alpha", "student.lora.targets"}
BOUND |= {"objective.policy_gradient", "objective.row_weight", "objective.by_source", "objective.curriculum"}
BOUND |= {"schedule.fresh", "train.lr", "train.min_lr", "data.date"}
EVERY_FIELD = st.fixed_dictionaries({}, optional={key: _values(key) for key in leaves() if key not in BOUND})


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=EVERY_FIELD, with_origin=st.booleans())
def test_what_is_written_reads_back_identical(values, with_origin, tmp_path):
    method = METHODS[values.get("method", "distillm")]
    command = method.verb
    if method.name == "sft" and values.get("train.select") == "valid_divergence":
        values.pop("train.select")  # there is no teacher to diverge from
    if method.name == "minillm":
        values.pop("schedule.kind", None)  # it needs outputs of the student's own
    if method.name in ("minillm", "fdistill", "distillm2"):
        values.pop("objective.divergence", None)  # what these make of a divergence not every one of them allows
    said = {"method": method.name, **method.preset, **values}
    values = {key: v for key, v in values.items() if is_used(key, lambda k: said.get(k, leaves()[k].default))}
    values = {key: value for key, value in values.items() if key != "train.epochs" or values.get("train.steps") is None}
    resolved = resolve(command=command, flags={k: Flag(k, v) for k, v in values.items()})
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(resolved, with_origin), encoding="utf-8")
    again = resolve(command=command, recipe=path)
    assert again.recipe == resolved.recipe
    assert load_resolved(path) == resolved.recipe


def test_a_resolved_recipe_may_be_changed_by_flags_like_any_other(tmp_path):
    (tmp_path / "recipe.yaml").write_text(to_yaml(resolve(command="distill", sets=["train.steps=50", "method=gkd"])))
    resolved = resolve(
        command="distill", recipe=tmp_path / "recipe.yaml", flags={"train.epochs": Flag("--epochs", 1.0)}
    )
    assert (resolved.recipe.train.steps, resolved.recipe.train.epochs) == (None, 1)
    assert resolved.recipe.schedule.kind == "mixed"


# --- flags and the schema ---------------------------------------------------------------------------------------


def test_every_shortcut_flag_is_a_field_with_a_name():
    for entry in FIELD_FLAGS:
        assert set(entry.keys) <= set(leaves()), entry.flag
    assert flag_of("student.path", "distill") == "--student"
    assert flag_of("student.path", "sft") == "--model"
    assert flag_of("train.clip", "distill") is None


def test_flags_become_fields_and_absent_ones_do_not():
    given = {"alpha": 0.3, "lr": None, "dtype": "bf16", "skip_bad_rows": None}
    assert typed.flags(**given) == {
        "objective.alpha": Flag("--alpha", 0.3),
        "student.dtype": Flag("--dtype", "bf16"),
        "teacher.dtype": Flag("--dtype", "bf16"),
    }
    with pytest.raises(KeyError):
        typed.flags(colour="red")


def test_every_field_explains_itself():
    for key, field in leaves().items():
        assert field.description, key


def test_the_schema_itself_takes_no_truth_value_for_a_number():
    with pytest.raises(ValueError, match="true and false are not numbers"):
        TrainConfig(epochs=True)
    assert TrainConfig(gradient_checkpointing=True).gradient_checkpointing
    with pytest.raises(ValueError, match="frozen"):
        Recipe().train.lr = 1.0


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_train_on_prompts_alone_need_no_responses(name):
    r = resolve(command=METHODS[name].verb, flags={"method": Flag("--method", name)}).recipe
    assert r.needs_responses == (r.method == "sft" or uses_rows(r))
    tuned = r.model_copy(update={"student": r.student.model_copy(update={"sft_epochs": 1.0})})
    assert tuned.needs_responses


LARGE = 2**63


@pytest.mark.parametrize("method", ["[a, b]", "[sft]", "{a: 1}", "3", "1.5", "null"])
def test_a_method_that_is_no_name_is_refused(method, recipe):
    for command in ("distill", "sft"):
        assert "expected one of sft, kd" in complaint(f"method: {method}", recipe, command=command)
        assert "expected one of sft, kd" in complaint(sets=[f"method={method}"], command=command)


@pytest.mark.parametrize("key", [key for key, field in leaves().items() if int in plain_types(field.annotation)])
def test_whole_numbers_beyond_64_bits_are_refused(key):
    for value in (LARGE, 10**30, -LARGE):
        with pytest.raises(RecipeError) as error:
            resolve(command="distill", sets=[f"{key}={value}"])
        assert error.value.what.startswith(f"--set {key} = ") or "lora" in key or "patience" in key
    with pytest.raises(RecipeError, match=r"2\^63"):
        resolve(command="distill", sets=[f"{key}={LARGE}"])
