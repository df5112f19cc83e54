"""What a person said → one recipe that knows where each value came from; and every way of saying it wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distillm_cli.cli import options
from distillm_cli.config.explain import choices, kinds, leaves, takes_list
from distillm_cli.config.load import load_resolved, locate, resolve, shipped, to_yaml
from distillm_cli.config.methods import METHODS
from distillm_cli.config.schema import Recipe, Train
from distillm_cli.config.shortcuts import SHORTCUTS, Flag, flag_of
from distillm_cli.errors import RecipeError, UsageError


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
    assert set(origin) == set(leaves())
    assert resolved.former["train.lr"] == (2e-4, "--lr")
    assert resolved.former["objective.beta"] == (0.1, "method gkd")
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
    assert resolved.former["schedule.kind"] == ("adaptive", "distill.yaml:3")
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
    assert (r.method, r.objective.kd_weight, r.train.epochs, r.train.lr) == ("sft", 0.0, 3, 5e-5)


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
    assert resolved.former["train.steps"] == (100, "distill.yaml:1")
    both = {"train.epochs": Flag("--epochs", 2.0), "train.steps": Flag("--steps", 9)}
    assert "--epochs and --steps" in complaint(flags=both)


def test_a_flag_without_effect_is_pointed_out():
    flags = {"objective.alpha": Flag("--alpha", 0.3), "method": Flag("--method", "gkd")}
    resolved = resolve(command="distill", flags=flags)
    assert resolved.notes == ("--alpha (objective.alpha) has no effect on jsd; it belongs to skl and srkl",)
    assert to_yaml(resolved).startswith("# note: --alpha")
    assert resolve(command="distill", flags={"objective.alpha": Flag("--alpha", 0.3)}).notes == ()


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
    assert resolve(command="distill", sets=["data.tasks=null"]).recipe.data.tasks is None
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
        ("train: {steps: !!int three}", "distill.yaml:1: three is no whole number"),
        ("train: {steps: " + "9" * 5000 + "}", "is no whole number that can be read"),
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
            "distill.yaml:1: schedule.kind = adaptve; expected one of off, on, mixed, annealed, adaptive, rounds; "
            "try --set schedule.kind=adaptive",
        ),
        (
            "eval: {metrics: [rouge, exact_match]}",
            "distill.yaml:1: eval.metrics = [rouge, exact_match]; expected a list, each one of rouge_l, exact_match, "
            "error_rate; try --set 'eval.metrics=[rouge_l, exact_match]'",
        ),
        ("train: {epochs: abc}", "train.epochs = abc; expected a number > 0; try --epochs 20"),
        ("train: {batch_size: 3.5}", "train.batch_size = 3.5; expected a whole number ≥ 1; try --batch-size 8"),
        ("train: {batch_size: true}", "train.batch_size = true; expected a whole number ≥ 1"),
        ("train: {lr: true}", "train.lr = true; expected a number > 0"),
        ("train: {lr: .nan}", "train.lr = .nan; expected a number > 0"),
        ("train: {lr: }", "train.lr = null; expected a number > 0"),
        ("train: {steps: 0}", "train.steps = 0; expected a whole number ≥ 1, or null; it means: optimizer steps"),
        ("train: {eval_steps: epoh}", "expected a whole number ≥ 1, or epoch; try --set train.eval_steps=epoch"),
        ("train: {betas: [0.9]}", "train.betas = [0.9]; expected a list of 2, each a number ≥ 0 and < 1"),
        ("train: {gradient_checkpointing: maybe}", "expected true or false"),
        ("eval: {seeds: []}", "eval.seeds = []; expected a list that is not empty, each a whole number"),
        ("eval: {seeds: [true]}", "eval.seeds = [true]; expected a list"),
        ("teacher: {path: ''}", "teacher.path = (empty); expected a text that is not empty"),
        ("method: distilm", f"method = distilm; expected one of {', '.join(METHODS)}; try --method distillm"),
        ("method:", "method = null; expected one of"),
        (
            "train: {patience: 3}",
            "train.patience = 3; train.patience needs a train.select to watch; try --set train.sel",
        ),
    ],
)
def test_a_wrong_value_is_told_with_its_place_and_a_cure(recipe, text, said):
    assert said in complaint(text, recipe)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("objective: {alhpa: 0.1}", "objective.alhpa: no such key; did you mean objective.alpha?"),
        ("train: {alpha: 0.1}", "train.alpha: no such key; did you mean objective.alpha?"),
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
        ("train.lr=[", "--set train.lr: not a YAML document"),
        ("train.lr=*x", "aliases (*name) are not read"),
        ("train.lr.x=1", "--set train.lr.x: no such key; did you mean train.lr?"),
        ("alpha=.2", "--set alpha: no such key; did you mean objective.alpha?"),
        ("objective.alpha=1.4", "--set objective.alpha = 1.4; expected a number ≥ 0 and < 1; try --alpha 0.1"),
    ],
)
def test_a_wrong_set(text, said):
    assert said in complaint(sets=[text])


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
    types = kinds(leaves()[key].annotation)
    words = choices(key)
    if words:
        item = st.sampled_from(words)
    elif str in types:
        item = st.text(min_size=1, max_size=12) | st.sampled_from(
            ["off", "5e-4", "null", "1:30", "#", "a: b", "'", "~"]
        )
    elif bool in types:
        item = st.booleans()
    elif float in types:
        item = st.floats(0, 1, exclude_min=True, exclude_max=True)
    else:
        item = st.integers(2, 10**9)
    if takes_list(key):
        item = st.lists(item, min_size=2, max_size=2)
    return item | st.none() if None in types else item


# Fields that a rule ties to another one's value; their own tests say what goes together.
TIED = {"train.patience", "objective.policy_gradient", "objective.row_weight", "schedule.fresh"}
EVERY_FIELD = st.fixed_dictionaries({}, optional={key: _values(key) for key in leaves() if key not in TIED})


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=EVERY_FIELD, with_origin=st.booleans())
def test_what_is_written_reads_back_identical(values, with_origin, tmp_path):
    command = METHODS[values.get("method", "distillm")].verb
    values = {key: value for key, value in values.items() if key != "train.epochs" or values.get("train.steps") is None}
    if values.get("method") in ("minillm", "imitkd"):
        values.pop("schedule.kind", None)  # one needs student outputs, the other's buffer is not that of rounds
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
    for shortcut in SHORTCUTS.values():
        assert set(shortcut.keys) <= set(leaves()), shortcut.flag
    assert flag_of("student.path", "distill") == "--student"
    assert flag_of("student.path", "sft") == "--model"
    assert flag_of("train.clip", "distill") is None


def test_flags_become_fields_and_absent_ones_do_not():
    assert options.flags(alpha=0.3, lr=None, dtype="bf16", skip_bad_rows=None) == {
        "objective.alpha": Flag("--alpha", 0.3),
        "student.dtype": Flag("--dtype", "bf16"),
        "teacher.dtype": Flag("--dtype", "bf16"),
    }
    with pytest.raises(KeyError):
        options.flags(colour="red")


def test_every_field_explains_itself():
    for key, field in leaves().items():
        assert field.description, key


def test_the_schema_itself_takes_no_truth_value_for_a_number():
    with pytest.raises(ValueError, match="true and false are no numbers"):
        Train(epochs=True)
    assert Train(gradient_checkpointing=True).gradient_checkpointing
    with pytest.raises(ValueError, match="frozen"):
        Recipe().train.lr = 1.0
