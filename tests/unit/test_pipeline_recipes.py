"""Recipes of stages: what they share, what stands for what, and one line for everything that can be wrong with them."""

from pathlib import Path

import pytest

from distillm_cli.config.load import resolve
from distillm_cli.config.pipeline_recipe import is_pipeline, load_pipeline, with_stage_paths
from distillm_cli.errors import DistillmError, RecipeError

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
    recipe: quickstart
    student: {path: stage:teacher}
    data: {source: stage:samples}
    train: {epochs: 2}
  eval: {verb: eval, models: stage:distill}
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text=TEXT, name="p.yaml"):
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write


def test_layers_lie_over_each_other(written):
    p = load_pipeline(written(), ["defaults.train.seed=4", "stages.distill.train.lr=5e-4", "defaults.train.lr=2e-3"])
    teacher, distill = p["teacher"].resolved, p["distill"].resolved
    assert (teacher.recipe.method, distill.recipe.method) == ("sft", "distillm")
    assert (teacher.recipe.train.lr, teacher.origin["train.lr"]) == (2e-3, "--set")
    assert (distill.recipe.train.lr, distill.overridden["train.lr"]) == (5e-4, (2e-3, "--set"))
    assert distill.origin["train.betas"].startswith("quickstart.yaml:"), "from the single recipe it starts from"
    assert distill.recipe.data.template == "plain"
    assert teacher.recipe.data.template == "auto"
    assert {s.resolved.recipe.train.seed for s in p.stages} == {4}
    assert (distill.recipe.train.steps, distill.recipe.train.epochs) == (None, 2), "its own epochs, over shared steps"
    assert teacher.recipe.train.steps == 9
    own = load_pipeline(written(), ["defaults.train.epochs=3", "stages.teacher.train.steps=4"])[
        "teacher"
    ].resolved.recipe
    assert own.train.steps == 4, "a stage's own is meant over a shared one"
    for both in (["defaults.train.steps=4", "defaults.train.epochs=3"], ["stages.distill.train.steps=4"] * 2):
        both[1] = both[1].replace("steps=4", "epochs=3")
        with pytest.raises(RecipeError, match=r"train\.epochs and --set .*train\.steps both given; keep one of them"):
            load_pipeline(written(), both)


def test_a_stage_that_generates_reads_its_own_rows_and_how_many(written):
    """Where the verb has --data and --limit, and refuses these."""
    sets = ["stages.samples.data.limit=4", "stages.samples.data.source=builtin"]
    data = load_pipeline(written(), sets)["samples"].resolved.recipe.data
    assert (data.limit, data.source) == (4, "builtin")
    with pytest.raises(RecipeError, match=r"stages\.eval\.data\.limit = 4; .*; eval does not train; remove it$"):
        load_pipeline(written(), ["stages.eval.data.limit=4"])


def test_stages_stand_for_what_they_make(written):
    p = load_pipeline(written())
    assert [s.depends_on for s in p.stages] == [(), ("teacher",), ("teacher", "samples"), ("distill",)]
    assert p["teacher"].resolved.recipe.teacher.path is None, "a shared teacher is not its own"
    own, resolved = with_stage_paths(p["distill"], {"teacher": "out/teacher", "samples": "out/samples/samples.jsonl"})
    assert (resolved.recipe.teacher.path, resolved.recipe.data.source) == ("out/teacher", "out/samples/samples.jsonl")
    assert own.verb == "distill"
    assert p["eval"].config.models == ("stage:distill",)


def test_single_recipes_and_pipelines_know_each_other(written):
    assert is_pipeline(Path(written()))
    assert not is_pipeline("quickstart")
    with pytest.raises(RecipeError, match=r"p\.yaml: a pipeline of stages, not one recipe; try `distillm run p\.yaml`"):
        resolve(command="distill", recipe=Path("p.yaml"))
    with pytest.raises(RecipeError, match=r"has no stages; try `distillm distill --recipe quickstart`"):
        load_pipeline("quickstart")


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("train: {epochs: 2}", "train: {lr: fast}", "p.yaml:15: stages.distill.train.lr = fast; "
         "expected a number > 0, or auto; try --set stages.distill.train.lr=auto"),
        ("train: {lr: 1e-3, steps: 9}", "train: {lr: -1}", "p.yaml:4: defaults.train.lr = -1; "
         "expected a number > 0, or auto; try --set defaults.train.lr=auto"),
        ("train: {epochs: 2}", "trian: {epochs: 2}", "p.yaml:15: stages.distill.trian: no such key; did you mean train?"),
        ("verb: sft", "verb: stf", "p.yaml:7: stages.teacher.verb = stf; expected one of sft, generate, distill, eval; try"),
        ("    verb: sft\n", "", "p.yaml:6: stages.teacher: no verb; expected verb: sft, generate, distill, eval"),
        ("model: stage:teacher", "limit: 3", "p.yaml:9: stages.samples: no model; set model: stage:NAME, a path or a hub"),
        ("recipe: quickstart", "recipe: quickstrat", "p.yaml:12: stages.distill.recipe = quickstrat; no recipe named"),
        ("recipe: quickstart", "models: [x]", "p.yaml:12: stages.distill.models: not a key of distill; it is a key of eval"),
        ("model: stage:teacher", "model: stage:teachr", "stages.samples.model = stage:teachr; there is no stage teachr; "
         "did you mean stage:teacher?"),
        ("model: stage:teacher", "model: stage:distill", "stages.samples.model = stage:distill; stage distill comes after "
         "samples"),
        ("model: stage:teacher", "model: stage:samples", "a stage cannot read its own output"),
        ("source: stage:samples", "source: stage:teacher", "stage teacher (sft) produces a model, not rows"),
        ("data: {source: stage:samples}", "data: {teacher_samples: stage:samples}", "p.yaml:14: stages.distill.data."
         "teacher_samples = 'stage:samples'; it applies to teacher and pairs (methods seqkd, fdistill, distillm2), "
         "but "
         "schedule.kind is adaptive"),
        ("student: {path: stage:teacher}", "student: {path: stage:samples}", "produces rows, not a model"),
        ("  teacher: {path: stage:teacher}\n", "  method: kd\n", "p.yaml:2: defaults.method: defaults cannot set a "
                                                                 "method; set"),
        ("student: {path: \"random:2x32\", tokenizer: chars}", "data: {source: builtin}",
         "p.yaml:6: stages.teacher: no model to train; set student.path there, to a path, a hub name or stage:NAME"),
        ("defaults:", "shared:", "p.yaml:1: shared: no such key; a pipeline has defaults and stages"),
        ("defaults:", "train: {lr: 1}\ndefaults:", "p.yaml:1: train: no such key; a pipeline has defaults and stages; did "
         "you mean defaults.train?"),
        ("  eval: {verb", "  teacher: {verb", "p.yaml:16: stages.teacher occurs twice, first in line 6; keep one of them"),
        ("    verb: distill\n", "    verb: distill\n    method: sft\n", "expected a method of `distillm distill`"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line(written, old, new, line):
    assert TEXT.count(old) == 1
    with pytest.raises(DistillmError) as caught:
        load_pipeline(written(TEXT.replace(old, new)))
    assert line in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train.lr=1", "--set train.lr=1; expected defaults.section.key=value or stages.NAME.section.key=value; did you "
         "mean defaults.train.lr?"),
        ("stages.techer.train.lr=1", "--set stages.techer.train.lr: no stage techer; did you mean stages.teacher?"),
        ("stages.teacher.train.lr", "--set stages.teacher.train.lr; expected"),
        ("stages.samples.n=0", "--set stages.samples.n = 0; expected an integer ≥ 1"),
        ("stages.teacher.verb=[", "--set stages.teacher.verb: not a YAML document"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_set_is_said(written, text, line):
    with pytest.raises(DistillmError) as caught:
        load_pipeline(written(), [text])
    assert line in str(caught.value)
