"""Test recipes of stages: shared defaults, references between stages, and errors."""

from pathlib import Path

import pytest

from distillm_cli.config.load import resolve
from distillm_cli.config.pipeline_recipe import is_pipeline, load_pipeline, with_stage_paths
from tests.codes import raises_code

TEXT = """\
defaults:
  teacher: {path: stage:teacher}
  data: {source: builtin}
  train: {lr: 1e-3, steps: 9}
stages:
  teacher:
    verb: sft
    student: {path: "random:2x32", tokenizer: chars}
  samples: {verb: generate, model: stage:teacher}
  distill:
    verb: distill
    recipe: questions
    student: {path: stage:teacher}
    data: {source: stage:samples}
    train: {epochs: 2}
  eval: {verb: eval, models: stage:distill}
"""


@pytest.fixture
def write_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text=TEXT, name="p.yaml"):
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write


def test_stage_overrides_defaults_and_recipe(write_recipe):
    p = load_pipeline(
        write_recipe(), ["defaults.train.seed=4", "stages.distill.train.lr=5e-4", "defaults.train.lr=2e-3"]
    )
    teacher, distill = p["teacher"].resolved, p["distill"].resolved
    assert (teacher.recipe.method, distill.recipe.method) == ("sft", "distillm")
    assert (teacher.recipe.train.lr, teacher.origin["train.lr"]) == (2e-3, "--set")
    assert (distill.recipe.train.lr, distill.overridden["train.lr"]) == (5e-4, (2e-3, "--set"))
    assert distill.origin["train.betas"].startswith("questions.yaml:"), (
        "the origin is the recipe that the stage starts from"
    )
    assert distill.recipe.data.template == "plain"
    assert teacher.recipe.data.template == "auto"
    assert {s.resolved.recipe.train.seed for s in p.stages} == {4}
    assert (distill.recipe.train.steps, distill.recipe.train.epochs) == (None, 2), (
        "epochs of the stage replace shared steps"
    )
    assert teacher.recipe.train.steps == 9
    own = load_pipeline(write_recipe(), ["defaults.train.epochs=3", "stages.teacher.train.steps=4"])[
        "teacher"
    ].resolved.recipe
    assert own.train.steps == 4, "steps of the stage replace shared epochs"
    for settings in (["defaults.train.steps=4", "defaults.train.epochs=3"], ["stages.distill.train.steps=4"] * 2):
        settings[1] = settings[1].replace("steps=4", "epochs=3")
        with raises_code("recipe.given_twice", "train.epochs", "train.steps"):
            load_pipeline(write_recipe(), settings)


def test_generate_stage_reads_data_source_and_limit(write_recipe):
    """Check this although the command has --data and --limit instead."""
    sets = ["stages.samples.data.limit=4", "stages.samples.data.source=builtin"]
    data = load_pipeline(write_recipe(), sets)["samples"].resolved.recipe.data
    assert (data.limit, data.source) == (4, "builtin")
    with raises_code("recipe.unused_field", "stages.eval.data.limit = 4"):
        load_pipeline(write_recipe(), ["stages.eval.data.limit=4"])


def test_stage_references_are_replaced_by_their_outputs(write_recipe):
    p = load_pipeline(write_recipe())
    assert [s.depends_on for s in p.stages] == [(), ("teacher",), ("teacher", "samples"), ("distill",)]
    assert p["teacher"].resolved.recipe.teacher.path is None, "the teacher stage does not read its own output"
    own, resolved = with_stage_paths(p["distill"], {"teacher": "out/teacher", "samples": "out/samples/samples.jsonl"})
    assert (resolved.recipe.teacher.path, resolved.recipe.data.source) == ("out/teacher", "out/samples/samples.jsonl")
    assert own.verb == "distill"
    assert p["eval"].config.models == ("stage:distill",)


def test_recipes_and_pipelines_are_distinguished(write_recipe):
    assert is_pipeline(Path(write_recipe()))
    assert not is_pipeline("quickstart")
    with raises_code("recipe.is_pipeline", "p.yaml", "`distillm run p.yaml`"):
        resolve(command="distill", recipe=Path("p.yaml"))
    with raises_code("recipe.no_stages", "`distillm distill --recipe quickstart`"):
        load_pipeline("quickstart")


@pytest.mark.parametrize(
    ("old", "new", "code", "mentions"),
    [
        (
            "train: {epochs: 2}",
            "train: {lr: fast}",
            "recipe.invalid_value",
            ("p.yaml:15: stages.distill.train.lr = fast", "--set stages.distill.train.lr=auto"),
        ),
        (
            "train: {lr: 1e-3, steps: 9}",
            "train: {lr: -1}",
            "recipe.invalid_value",
            ("p.yaml:4: defaults.train.lr = -1", "--set defaults.train.lr=auto"),
        ),
        (
            "train: {epochs: 2}",
            "trian: {epochs: 2}",
            "recipe.unknown_field",
            ("p.yaml:15: stages.distill.trian", "train?"),
        ),
        (
            "verb: sft",
            "verb: stf",
            "recipe.invalid_value",
            ("p.yaml:7: stages.teacher.verb = stf", "sft, generate, distill, eval"),
        ),
        (
            "    verb: sft\n",
            "",
            "recipe.missing_field",
            ("p.yaml:6: stages.teacher", "verb", "sft, generate, distill, eval"),
        ),
        ("model: stage:teacher", "limit: 3", "recipe.missing_field", ("p.yaml:9: stages.samples", "model")),
        (
            "recipe: questions",
            "recipe: questons",
            "recipe.invalid_stage",
            ("p.yaml:12: stages.distill.recipe = questons",),
        ),
        ("recipe: questions", "models: [x]", "recipe.unknown_field", ("p.yaml:12: stages.distill.models", "eval")),
        (
            "model: stage:teacher",
            "model: stage:teachr",
            "recipe.invalid_stage_input",
            ("stages.samples.model = stage:teachr", "stage:teacher?"),
        ),
        (
            "model: stage:teacher",
            "model: stage:distill",
            "recipe.invalid_stage_input",
            ("stages.samples.model = stage:distill",),
        ),
        (
            "model: stage:teacher",
            "model: stage:samples",
            "recipe.invalid_stage_input",
            ("stages.samples.model = stage:samples",),
        ),
        (
            "source: stage:samples",
            "source: stage:teacher",
            "recipe.invalid_stage_input",
            ("stages.distill.data.source = stage:teacher", "model", "rows"),
        ),
        (
            "data: {source: stage:samples}",
            "data: {teacher_samples: stage:samples}",
            "recipe.unused_field",
            (
                "p.yaml:14: stages.distill.data.teacher_samples = 'stage:samples'",
                "teacher and pairs (methods seqkd, fdistill, distillm2)",
                "schedule.kind is adaptive",
            ),
        ),
        (
            "student: {path: stage:teacher}",
            "student: {path: stage:samples}",
            "recipe.invalid_stage_input",
            ("stages.distill.student.path = stage:samples", "rows", "model"),
        ),
        (
            "  teacher: {path: stage:teacher}\n",
            "  method: kd\n",
            "recipe.invalid_stage",
            ("p.yaml:2: defaults.method",),
        ),
        (
            'student: {path: "random:2x32", tokenizer: chars}',
            "data: {source: builtin}",
            "recipe.invalid_stage",
            ("p.yaml:6: stages.teacher", "student.path", "stage:NAME"),
        ),
        ("defaults:", "shared:", "recipe.unknown_field", ("p.yaml:1: shared", "defaults", "stages")),
        (
            "defaults:",
            "train: {lr: 1}\ndefaults:",
            "recipe.unknown_field",
            ("p.yaml:1: train", "defaults.train?"),
        ),
        ("  eval: {verb", "  teacher: {verb", "recipe.given_twice", ("p.yaml:16: stages.teacher", "line 6")),
        (
            "    verb: distill\n",
            "    verb: distill\n    method: sft\n",
            "usage.unknown_method",
            ("stages.distill.method = sft", "`distillm distill`"),
        ),
    ],
)
def test_invalid_pipeline_is_rejected_with_its_line(write_recipe, old, new, code, mentions):
    assert TEXT.count(old) == 1
    with raises_code(code, *mentions) as caught:
        load_pipeline(write_recipe(TEXT.replace(old, new)))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "code", "mentions"),
    [
        (
            "train.lr=1",
            "usage.invalid_set",
            ("--set train.lr=1", "defaults.section.key=value", "stages.NAME.section.key=value", "defaults.train.lr?"),
        ),
        (
            "stages.techer.train.lr=1",
            "usage.unknown_stage",
            ("--set stages.techer.train.lr", "stages.teacher?"),
        ),
        ("stages.teacher.train.lr", "usage.invalid_set", ("--set stages.teacher.train.lr",)),
        ("stages.samples.n=0", "recipe.invalid_value", ("--set stages.samples.n = 0", "≥ 1")),
        ("stages.teacher.verb=[", "recipe.invalid_yaml", ("--set stages.teacher.verb",)),
    ],
)
def test_invalid_set_for_a_stage_is_rejected(write_recipe, text, code, mentions):
    with raises_code(code, *mentions):
        load_pipeline(write_recipe(), [text])
