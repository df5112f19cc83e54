"""Test ``distillm pilot`` from a command line to a recipe, its resume, and the errors that it reports."""

import json
import random
import shutil

import pytest

import distillm_cli as distillm
from distillm_cli.config.load import load_resolved
from distillm_cli.config.pilot_grid import Arm
from distillm_cli.errors import Interrupted
from distillm_cli.runs.pilot_record import ARMS, PILOT
from distillm_cli.training.events import Note
from tests import tiny
from tests.codes import raises_code
from tests.command_line import assert_error

SIZES = {"train": 40, "valid": 12}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Write rows and two models. Return the options of a small pilot, apart from the grid and the output."""
    place = tmp_path_factory.mktemp("pilot")
    draw = random.Random(1)
    for name, count in SIZES.items():
        words = ["".join(draw.choices("abcd", k=4)) for _ in range(count)]
        rows = [{"instruction": word, "output": word[::-1]} for word in words]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = tiny.save(place / "teacher", "llama", seed=3)
    student = tiny.save(place / "student", "gpt2", seed=4)
    return {
        "teacher": teacher,
        "student": student,
        "data": {"source": str(place), "template": "plain", "max_prompt_length": 20},
        "max_length": 40,
        "steps": 16,
        "batch_size": 8,
        "dtype": "fp32",
        "device": "cpu",
        "rollout": {"max_new_tokens": 6, "bulk": 2},
        "eval": {"max_new_tokens": 6, "metrics": ["chrf"], "no_repeat_ngram_size": 0},
        "train": {"lr": 2e-3, "threads": 1, "eval_steps": 4},
    }


GRID = {"divergence": ["kl"], "schedule": ["off", "on"], "temperature": [1, 2], "lr": [2e-3, 4e-3]}


def as_options(pair):
    """Return the fields as options of a command line."""
    flags = ("teacher", "student", "max_length", "steps", "batch_size", "dtype", "device")
    options = [word for name in flags for word in (f"--{name.replace('_', '-')}", pair[name])]
    sets = [f"{section}.{key}={json.dumps(value)}" for section, values in pair.items() if isinstance(values, dict)
            for key, value in values.items()]  # fmt: skip
    return [*options, *(word for text in sets for word in ("--set", text)), "--json"]


@pytest.fixture
def pilot(cli, pair):
    """Return a function that runs a pilot by its command line. It returns the outcome of ``cli``."""

    def run(*more, grid=("divergence=kl", "temperature=1", "schedule=off,auto,on")):
        return cli("pilot", *as_options(pair), *(word for text in grid for word in ("--grid", text)), *more)

    return run


def trials(events):
    """Return the lines of trials among the notes."""
    return [event.text for event in events if isinstance(event, Note) and " · step " in event.text]


def test_pilot_ends_with_a_table_answers_and_a_recipe(cli, pilot, tmp_path):
    code, result, err = pilot("--minutes", 5, "--output", "out")
    assert code == 0, err
    assert (result["command"], result["metric"], result["rows"]) == ("pilot", "chrf", SIZES["valid"])
    complete = [arm for arm in result["arms"] if arm["steps"] == arm["of_steps"]]
    (best,) = [arm for arm in result["arms"] if arm["is_best"]]
    whole = [arm for arm in complete if "×" not in arm["name"]]
    assert best["figure"] == max(arm["figure"] for arm in whole)
    assert {"sft", "kl, off"} <= {arm["name"] for arm in whole}
    for arm in result["arms"]:
        if not arm["is_best"]:
            mean, low, high = arm["difference"]
            assert low <= mean <= high
    text = " ".join(result["answers"])
    assert all(words in text for words in ("Objective: kl", "tudent outputs", "lain SFT", "steps are"))
    assert "kl, on, lr" in err

    recipe = load_resolved(tmp_path / "out/recipe.yaml")
    chosen = Arm(**result["best"])
    assert recipe.train.lr == chosen.lr
    assert recipe.train.steps == result["steps"]
    assert recipe.schedule.kind == chosen.schedule
    assert recipe.train.eval_steps == 4  # of the recipe, not of a trial
    assert not (tmp_path / "out" / ARMS).exists()
    code, student, err = cli("distill", "--recipe", "out/recipe.yaml", "--steps", 2, "--output", "student", "--json")
    assert (code, student["steps"]) == (0, 2), err

    code, again, err = pilot("--minutes", 5, "--output", "out")
    assert (code, again) == (0, result)
    assert "already finished" in err
    assert_error(pilot("--minutes", 6, "--output", "out"), "checkpoint.changed", "minutes")
    assert_error(pilot("--minutes", 5, "--output", "out", grid=["lr=1"]), "checkpoint.changed", "grid")
    assert_error(pilot("--minutes", 5, "--seed", 7, "--output", "out"), "checkpoint.changed", "train.seed")


@pytest.mark.long
def test_interrupted_pilot_continues_to_the_same_result(pair, tmp_path):
    """Interrupt a pilot again and again: no trial is repeated, and those on rows have the scores of an uninterrupted one.

    How many steps those on student outputs have depends on the clock, and with it the last round.
    """
    fields = pair | {"minutes": 30, "grid": GRID}

    def run(output, stop_after=None):
        seen = []

        def listen(event):
            seen.append(event)
            if len(trials(seen)) == stop_after:
                raise KeyboardInterrupt

        if stop_after is None:
            distillm.pilot(output=tmp_path / output, listener=listen, **fields)
        else:
            with pytest.raises(Interrupted, match="same command"):
                distillm.pilot(output=tmp_path / output, listener=listen, **fields)
        return trials(seen)

    run("stopped", 1)
    shutil.copytree(tmp_path / "stopped", tmp_path / "whole")
    expected = run("whole")
    found = [*run("stopped", 2), *run("stopped", 4), *run("stopped", 3), *run("stopped")]
    assert len(set(found)) == len(found) > 10
    assert on_rows(found) == on_rows(expected)


def on_rows(lines):
    return [line for line in lines if line.startswith(("sft, lr", "kl, off, lr", "kl, off, T")) and "×" not in line]


def test_scores_of_trials_are_those_of_plain_runs(pair, tmp_path):
    """Train the settings of a pilot's best whole arm on rows by ``distill``, and compare its held-out score."""
    one = {"divergence": ["kl"], "schedule": ["off"], "temperature": [1], "lr": [2e-3]}
    result = distillm.pilot(minutes=5, grid=one, output=tmp_path / "pilot", **pair)
    (arm,) = [arm for arm in result.arms if arm.name == "kl, off"]
    assert arm.steps == 16
    fields = {name: value for name, value in pair.items() if name != "rollout"}
    fields |= {"train": pair["train"] | {"select": "last"}, "method": "kd"}
    fields["eval"] = pair["eval"] | {"greedy": True, "metrics": ["exact_match", "chrf"], "report_rows": 0}
    run = distillm.distill(output=tmp_path / "run", **fields)
    scored = distillm.evaluate(str(run.output), suite=pair["data"]["source"] + "/valid.jsonl", metric=["chrf"], greedy=True,
                               data={"template": "plain"}, eval={"no_repeat_ngram_size": 0}, max_new_tokens=6)  # fmt: skip
    (predictions,) = scored.checkpoints[0].output.glob("**/predictions-*.jsonl")
    of_rows = [json.loads(line)["chrf"] for line in predictions.read_text().splitlines()]
    assert arm.figure == pytest.approx(sum(of_rows) / len(of_rows))


def test_directories_of_something_else_are_refused(pilot, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    assert_error(pilot("--output", "mine"), "usage.output_exists", "mine")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / PILOT).write_text("{")
    assert_error(pilot("--output", "old"), "checkpoint.damaged", PILOT)
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"


def test_a_recipe_of_stages_is_refused(cli):
    assert_error(cli("pilot", "--recipe", "quickstart-pipeline", "--json"), "recipe.is_pipeline")


def test_bad_values_are_refused_before_anything_is_loaded(pilot, tmp_path):
    assert_error(pilot("--minutes", 0, "--output", "out"), "usage.invalid_value", "--minutes")
    assert_error(pilot("--output", "out", grid=["rate=1"]), "usage.unknown_axis", "rate")
    assert_error(pilot("--set", "method=minillm", "--output", "out"), "usage.no_pilot", "minillm")
    assert not (tmp_path / "out").exists()


def test_a_budget_of_a_second_is_refused(pair, tmp_path):
    one = {name: values[:1] for name, values in GRID.items()}
    fields = pair | {"student": {"path": pair["student"], "sft_epochs": 1}}
    with raises_code("usage.budget_too_small", "minutes"):
        distillm.pilot(minutes=1 / 60, grid=GRID, output=tmp_path / "out", **pair)
    result = distillm.pilot(minutes=5, grid=one, output=tmp_path / "out", **fields)  # in the same directory
    assert (tmp_path / "out/sft/model.safetensors").is_file()
    assert load_resolved(tmp_path / "out/recipe.yaml").student.sft_epochs == 1
    assert [arm.name for arm in result.arms if arm.is_best] in (["kl, off"], ["sft"])
