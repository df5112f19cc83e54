"""Test the functions of ``distillm_cli`` with objects and keywords, and compare them with the command line."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distillm_cli as distillm
from distillm_cli import api
from distillm_cli.cli.app import main
from distillm_cli.config.explain import section_keys
from distillm_cli.config.shortcuts import field_flags
from distillm_cli.training.events import RunEnded, Stepped
from tests import tiny
from tests.codes import raises_code
from tests.command_line import call
from tests.conftest import ROOT

WORDS = ("abc", "bcd", "cde", "def", "efg", "fgh", "ghi", "hij", "ijk", "jkl", "klm", "lmn")
ROWS = [{"instruction": word, "output": word[::-1]} for word in WORDS]
SETTINGS = {
    "method": "gkd",
    "steps": 4,
    "batch_size": 2,
    "lr": 3e-3,
    "dtype": "fp32",
    "device": "cpu",
    "max_length": 40,
    "train": {"eval_steps": 2, "save_steps": 2, "threads": 1, "warmup": 0},
    "rollout": {"max_new_tokens": 4},
    "eval": {"report_rows": 4, "max_new_tokens": 4},
}
FLAGS = """--method gkd --steps 4 --batch-size 2 --lr 3e-3 --dtype fp32 --device cpu --max-length 40
    --set train.eval_steps=2 --set train.save_steps=2 --set train.threads=1 --set train.warmup=0
    --set rollout.max_new_tokens=4 --set eval.report_rows=4 --set eval.max_new_tokens=4
    --set data.template=plain --set data.max_prompt_length=20"""


def data(source):
    return {"source": source, "template": "plain", "max_prompt_length": 20}


@pytest.fixture
def tokenizer():
    return tiny.tokenizer(size=tiny.VOCAB)


@pytest.fixture
def teacher(tokenizer):
    return tiny.model("llama", tiny.VOCAB, seed=1), tokenizer


@pytest.fixture
def student(tokenizer):
    return tiny.model("gpt2", tiny.VOCAB, seed=2), tokenizer


@pytest.fixture(autouse=True)
def _in_temporary_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def weights_of(directory):
    return (Path(directory) / "model.safetensors").read_bytes()


def test_distill_matches_the_command_line(teacher, student, capfd, caplog):
    before = {name: tensor.clone() for name, tensor in student[0].state_dict().items()}
    caplog.set_level(logging.INFO, logger="distillm_cli")
    result = distillm.distill(teacher=teacher, student=student, data=data(ROWS), output="lib", **SETTINGS)
    assert capfd.readouterr() == ("", "")
    assert any("rows" in record.getMessage() for record in caplog.records)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student[0].state_dict().items())

    for name, (model, tokenizer) in {"teacher": teacher, "student": student}.items():
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["--teacher", "teacher", "--student", "student", "--data", "rows.jsonl", "--output", "cli", "--quiet"]
    code, printed, _ = call(capfd, "distill", *words, *FLAGS.split(), "--json")
    assert code == 0
    assert weights_of("lib") == weights_of("cli")
    assert result.report == printed["report"]
    assert result.as_json()["train_loss"] == printed["train_loss"]
    assert (result.output, result.steps, result.command) == (Path("lib"), 4, "distill")
    assert result.rollout_steps > 0

    trained, own_tokenizer = result.model()
    ids = own_tokenizer("abc", return_tensors="pt").input_ids
    saved = type(student[0]).from_pretrained("cli").eval()
    assert torch.equal(trained(ids).logits, saved(ids).logits)
    assert not torch.equal(trained(ids).logits, student[0](ids).logits)
    assert {"student before", "student after", "teacher"} <= {name for s in result.samples for name in s.answers}


def test_run_with_objects_can_be_resumed(teacher, student):
    arguments = {"teacher": teacher, "student": student, "data": data(ROWS)} | SETTINGS
    uninterrupted = distillm.distill(**arguments, output="runs/whole")
    short = distillm.distill(**arguments | {"steps": 2}, output="runs/a")
    assert short.steps == 2
    resumed = distillm.distill(**arguments, output="runs/a", resume=True)
    assert resumed.steps == 4
    assert resumed.output == Path("runs/a")
    assert uninterrupted.steps == 4
    names = sorted(path.name.rpartition("-")[0] for path in Path("runs/inputs").iterdir())
    assert names == ["gpt2", "llama", "rows"]
    with raises_code("usage.output_exists", "runs/a", "resume", "overwrite"):
        distillm.distill(**arguments, output="runs/a")
    assert distillm.distill(**arguments, output="runs/a", overwrite=True).steps == 4
    assert weights_of("runs/a") == weights_of("runs/whole")
    with torch.no_grad():
        student[0].get_input_embeddings().weight[7, 3] += 1  # a single changed number makes another model
    distillm.distill(**arguments, output="runs/b")
    assert len(list(Path("runs/inputs").glob("gpt2-*"))) == 2


def test_evaluate_and_generate_match_the_command_line(teacher, student, tokenizer, capfd):
    sizes = {key: value for key, value in SETTINGS.items() if key != "method"}
    tuned = distillm.sft(model=student[0], tokenizer=tokenizer, data=data(ROWS), output="sft", **sizes)
    scores = distillm.evaluate(tuned, suite=ROWS[:5], limit=3, greedy=True, device="cpu")
    ((name, suite),) = scores.checkpoints[0].suites.items()
    assert name.startswith("rows-")
    assert suite["rows"] == 3
    assert scores.checkpoints[0].output == Path("sft/eval")
    assert capfd.readouterr() == ("", "")
    assert (
        main(["eval", "sft", "--suite", "words.jsonl", "--limit", "3", "--greedy", "--device", "cpu", "--quiet"]) == 3
    )
    Path("words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:5]))
    words = ["eval", "sft", "--suite", "words.jsonl", "--limit", 3, "--greedy", "--device", "cpu", "--json", "--quiet"]
    _, printed, _ = call(capfd, *words)
    (expected,) = printed["suites"].values()
    timed = ("seconds", "tokens_per_s")
    assert all(suite[key] == expected[key] for key in expected if key not in timed)
    assert {"rouge_l", "exact_match"} <= set(suite)

    sampled = distillm.generate(tuned, ["abc", "bcd"], n=2, max_new_tokens=4, seed=3, device="cpu")
    assert [row["sample"] for row in sampled.responses] == [0, 1, 0, 1]
    words = "generate --model sft --prompt abc --prompt bcd --n 2 --max-new-tokens 4 --seed 3 --device cpu --quiet"
    capfd.readouterr()
    assert main(words.split()) == 0
    printed = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [row["output"] for row in sampled.responses] == [row["output"] for row in printed]
    by_rows = distillm.generate(
        teacher, data=ROWS, limit=2, greedy=True, template="plain", max_new_tokens=4, output="t.jsonl"
    )
    assert (by_rows.rows, by_rows.output, by_rows.responses) == (2, "t.jsonl", ())
    assert len(Path("t.jsonl").read_text().splitlines()) == 2

    sampling = {"max_new_tokens": 4, "greedy": True, "template": "plain"}
    both = distillm.evaluate([teacher, tuned], suite=ROWS[:2], output="scores", **sampling)
    assert len(both.checkpoints) == 2
    assert distillm.distill(teacher=tuned, student="random:1x16", data=data(ROWS), **SETTINGS, output="d").steps == 4


def test_rows_from_datasets_match_rows_from_lists(student, teacher):
    from datasets import Dataset, DatasetDict

    from_list = distillm.distill(teacher=teacher, student=student, data=data(ROWS), output="a", **SETTINGS)
    from_dataset = distillm.distill(
        teacher=teacher, student=student, data=data(Dataset.from_list(ROWS)), output="b", **SETTINGS
    )
    assert weights_of("a") == weights_of("b")
    assert from_list.report == from_dataset.report
    assert len(list(Path("inputs").glob("rows-*"))) == 1
    splits = DatasetDict(train=Dataset.from_list(ROWS[:8]), validation=Dataset.from_list(ROWS[8:]))
    planned = distillm.plan(
        teacher=teacher, student=student, data=data(splits), max_length=40, train={"batch_size": 2}, device="cpu"
    )
    assert planned.figures["data"]["rows"] == 8
    assert planned.figures["data"]["valid_rows"] == 4


def test_load_recipe_applies_overrides():
    recipe = distillm.load_recipe("quickstart", alpha=0.3, train={"steps": 12})
    assert recipe.recipe.objective.alpha == 0.3
    assert recipe.recipe.train.steps == 12
    assert recipe.origin["objective.alpha"] == "--alpha"
    assert recipe.origin["teacher.path"].startswith("quickstart.yaml:")
    changed = distillm.load_recipe(recipe, steps=7)
    assert changed.recipe.train.steps == 7
    assert changed.origin["train.steps"] == "--steps"
    assert changed.recipe.objective == recipe.recipe.objective
    assert {k: v for k, v in changed.origin.items() if k != "train.steps"} == {
        k: v for k, v in recipe.origin.items() if k != "train.steps"
    }
    by_epochs = distillm.load_recipe(recipe, epochs=2)
    assert (by_epochs.recipe.train.epochs, by_epochs.recipe.train.steps) == (2, None)
    assert distillm.load_recipe(recipe, train={"steps": None}).recipe.train.steps is None
    assert distillm.load_recipe("quickstart").recipe == distillm.load_recipe(distillm.load_recipe("quickstart")).recipe
    other = distillm.load_recipe(recipe, method="kd")
    assert other.recipe == distillm.load_recipe("quickstart", method="kd", train={"steps": 12}).recipe


def test_loaded_recipe_trains_like_its_name(capfd):
    settings = {"steps": 3, "device": "cpu", "data": {"size": 120, "valid_limit": 8}, "train": {"threads": 1}}
    settings["eval"] = {"report_rows": 0}
    events = []
    named = distillm.distill(recipe="questions", output="a", listener=events.append, **settings)
    recipe = distillm.load_recipe("questions", **settings)
    loaded = distillm.distill(recipe=recipe)
    assert loaded.output == Path("runs/questions-distillm")
    assert weights_of("a") == weights_of(loaded.output)
    assert named.report == loaded.report
    assert [event.step for event in events if isinstance(event, Stepped)] == [1, 2, 3]
    assert any(isinstance(event, RunEnded) for event in events)
    assert capfd.readouterr() == ("", "")


def test_display_true_shows_the_display(teacher, student, capfd):
    arguments = {"teacher": teacher, "student": student, "data": data(ROWS)} | SETTINGS
    distillm.distill(**arguments, output="a", display=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "student after" in err


@pytest.mark.parametrize(
    ("keywords", "code", "mentions"),
    [
        ({"alhpa": 0.1}, "usage.unknown_field", ("alhpa", "alpha?")),
        ({"learning_rate": 0.1}, "usage.unknown_field", ("learning_rate", "lr?")),
        ({"clip": 0.1}, "usage.unknown_field", ("clip", 'train={"clip": …}')),
        ({"train": {"lrr": 0.1}}, "usage.unknown_field", ("train.lrr", "train.lr?")),
        ({"train": 3}, "usage.section_not_value", ("train",)),
        ({"train": {"batch_size": 0}}, "recipe.invalid_value", ("train.batch_size = 0", "≥ 1")),
        ({"batch_size": 0}, "recipe.invalid_value", ("batch_size = 0", "≥ 1")),
        ({"alpha": 1.5}, "recipe.invalid_value", ("alpha = 1.5",)),
        ({"method": "kd", "alpha": 0.1}, "recipe.unused_field", ("alpha",)),
        ({"steps": 3, "epochs": 2}, "recipe.given_twice", ("epochs", "steps")),
        ({"lr": 0.1, "train": {"lr": 0.1}}, "usage.given_twice", ("lr", "train.lr")),
        ({"teacher": 3}, "usage.not_a_model", ("int",)),
    ],
)
def test_invalid_keyword_is_named(keywords, code, mentions):
    with raises_code(code, *mentions) as caught:
        distillm.distill(recipe="quickstart", **keywords)
    assert caught.value.exit_code == 2
    assert "--" not in str(caught.value)
    assert not Path("runs").exists()


def test_errors_have_the_codes_of_the_command_line(teacher, capfd):
    for call_function, code, mentions in (
        (lambda: distillm.distill(), "usage.no_model", ("student PATH",)),
        (lambda: distillm.distill(recipe="quikstart"), "recipe.not_found", ("recipe quickstart",)),
        (lambda: distillm.distill(teacher=teacher[0], student="random:1x8", data=ROWS), "usage.no_tokenizer", ()),
        (lambda: distillm.distill(resume=True), "usage.no_output", ("output DIR",)),
        (lambda: distillm.load_recipe("quickstart", data=ROWS), "usage.object_in_recipe", ("data.source",)),
        (lambda: distillm.evaluate("gpt2", greedy=True, seeds=[1]), "usage.exclusive_options", ("greedy", "seeds")),
        (
            lambda: distillm.generate("builtin", ["x"], greedy=True, temperature=0.5),
            "usage.exclusive_options",
            ("greedy", "temperature 0.5"),
        ),
        (lambda: distillm.generate("builtin"), "usage.no_prompts", ("data SOURCE", "prompts TEXT")),
        (lambda: distillm.run("quickstart"), "recipe.no_stages", ("quickstart",)),
        (lambda: distillm.run("quickstart-pipeline", only="nothing"), "usage.unknown_stage", ("only nothing",)),
        (lambda: distillm.sft(model="builtin", method="kd"), "usage.unknown_method", ("`distillm sft`",)),
    ):
        with raises_code(code, *mentions) as caught:
            call_function()
        assert caught.value.exit_code == 2
    assert capfd.readouterr() == ("", "")


def test_missing_files_are_named(tmp_path):
    with raises_code("recipe.not_found", "absent.yaml"):
        distillm.load_recipe(tmp_path / "absent.yaml")
    with raises_code("checkpoint.nothing_to_resume", "nowhere"):
        distillm.distill(resume=True, output="nowhere")


def test_plan_of_pipeline_applies_keywords_to_stages(capfd):
    stages = {"distill": {"objective": {"alpha": 0.35}}}
    planned = distillm.plan(
        recipe="quickstart-pipeline", stages=stages, defaults={"train": {"batch_size": 5}, "data": {"size": 400}}
    )
    assert set(planned.as_json()["stages"]) == set(planned.stages)
    with raises_code("usage.unknown_stage", "nothing"):
        distillm.plan(recipe="quickstart-pipeline", stages={"nothing": {"train": {"lr": 1}}})
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("verb", "fields", "options"),
    [
        ("sft", api.SftFields, set()),
        ("distill", api.DistillFields, set()),
        ("plan", api.PlanFields, set()),
        ("pilot", api.PilotFields, set()),
        ("generate", api.GenerateFields, {"split", "limit", "n", "greedy", "resume", "overwrite", "tokenizer"}),
        ("eval", api.EvalFields, {"tokenizer"}),
    ],
)
def test_typed_keywords_match_flags_and_sections(verb, fields, options):
    flags = {entry.name for entry in field_flags(verb)}
    assert set(fields.__annotations__) == flags | set(section_keys()[""]) | options


def test_importing_the_package_loads_no_torch():
    code = "import sys, distillm_cli as d; d.distill, d.__version__; print('torch' in sys.modules, 'distill' in dir(d))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"
    assert (Path(distillm.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        getattr(distillm, "distil")  # noqa: B009


NOTEBOOK = """
ROWS = [{"instruction": word, "output": word[::-1]} for word in ("ab", "bc", "cd", "de", "ef", "fg", "gh", "hi")]
import distillm_cli as distillm
from tests import tiny

tokenizer = tiny.tokenizer(size=tiny.VOCAB)
result = distillm.distill(
    teacher=(tiny.model("llama", tiny.VOCAB, seed=1), tokenizer),
    student=(tiny.model("gpt2", tiny.VOCAB, seed=2), tokenizer),
    data={"source": ROWS, "template": "plain", "max_prompt_length": 20},
    max_length=40, steps=2, batch_size=2, lr=1e-3, device="cpu", eval={"report_rows": 0}, output=OUTPUT, display=True,
)
result.as_json()
"""


@pytest.mark.long
def test_display_in_a_notebook_is_html(tmp_path):
    """Check that the display is HTML in the cell's output, without the control sequences of a live display."""
    import nbclient
    import nbformat

    source = NOTEBOOK.replace("OUTPUT", repr(str(tmp_path / "out")))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = notebook.cells[0].outputs
    drawn = [output["data"] for output in outputs if output["output_type"] == "display_data"]
    assert any("student after" in data["text/html"] for data in drawn)
    assert not any(re.search(r"\x1b\[[0-9;?]*[^0-9;?m]", data["text/plain"]) for data in drawn)
    assert outputs[-1]["output_type"] == "execute_result"
    assert "'status': 'ok'" in outputs[-1]["data"]["text/plain"]
