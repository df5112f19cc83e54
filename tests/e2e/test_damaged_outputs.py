"""A model is only read as the run wrote it: weights, settings and recipe are compared with the manifest beside them."""

import json
import shutil

import pytest

from distillm_cli.utils.manifest import MANIFEST
from tests.e2e.test_main_job import SMALL, rows, write

SHORT = [*SMALL, "--max-length", "400", "--steps", "4", "--set", "train.save_steps=2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    from distillm_cli.cli.app import main

    home = tmp_path_factory.mktemp("made")
    for split in ("train", "valid", "test"):
        write(home / f"{split}.jsonl", rows(24))
    argv = ["sft", "--model", "random:1x32", "--tokenizer", "bpe:300", "--data", home, "--output", home / "run", *SHORT]
    assert main([str(a) for a in argv]) == 0
    return home


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made / "run", tmp_path / "run")


def flip(path, at=-5):
    """Change one bit of a file, which stays as long as it was."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def score(typed, made, model, *more):
    argv = ["eval", model, "--suite", made / "test.jsonl", "--output", "scores", "--json", "--quiet", "--device", "cpu"]
    return typed(*argv, "--max-new-tokens", "4", "--greedy", *more)


def ask(typed, made, model, *more):
    return typed(
        "generate", "--model", model, "--data", made, "--split", "test", "--output", "said.jsonl", "--json", *more
    )


def test_the_manifest_lists_what_the_run_wrote_and_people_do_not_edit(run):
    listed = json.loads((run / MANIFEST).read_text())
    assert {"model.safetensors", "config.json", "tokenizer.json", "recipe.yaml"} <= listed["files"].keys()
    assert not {"README.md", "metrics.jsonl"} & listed["files"].keys()
    for name, sealed in listed["files"].items():
        assert (run / name).stat().st_size == sealed["bytes"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_file_is_refused_by_name(typed, made, run, name):
    """One bit, where every library would read on: in the weights, in a number, in a token."""
    content = (run / name).read_bytes()
    flip(run / name, content.index(b"e-0") + 3 if name == "config.json" else -40 if name == "tokenizer.json" else -5)
    for command in (score, ask):
        code, told, _ = command(typed, made, run)
        assert (code, str(run / name) in told["message"]) == (4, True), told
        assert f"delete {run / MANIFEST}" in told["message"]
    argv = ["distill", "--teacher", run, "--student", "random:1x16", "--data", made, "--output", "student"]
    code, told, _ = typed(*argv, *SHORT)
    assert (code, str(run / name) in told["message"]) == (4, True), told
    (run / MANIFEST).unlink()
    if name != "tokenizer.json":
        assert score(typed, made, run)[0] == 0, "without a manifest nobody can tell"


def test_a_missing_file_and_a_damaged_manifest_are_named(typed, made, run):
    (run / "tokenizer.json").unlink()
    code, told, _ = score(typed, made, run)
    assert (code, f"{run / 'tokenizer.json'} is missing" in told["message"]) == (4, True)
    (run / MANIFEST).write_text('{"format": 1, "fil')
    code, told, _ = score(typed, made, run)
    assert (code, str(run / MANIFEST) in told["message"]) == (5, True)


def test_a_damaged_checkpoint_is_not_scored(typed, made, run):
    checkpoint = run / "checkpoints/step-000004"
    assert score(typed, made, checkpoint)[0] == 0
    flip(checkpoint / "model.safetensors")
    code, told, _ = score(typed, made, checkpoint)
    assert (code, str(checkpoint / "model.safetensors") in told["message"]) == (5, True)


def test_settings_that_people_edit_are_used_with_a_warning(typed, made, run):
    settings = json.loads((run / "generation_config.json").read_text())
    (run / "generation_config.json").write_text(json.dumps(settings | {"temperature": 0.5}))
    (run / "README.md").write_text("# My model")
    (run / "eval/notes.txt").write_text("mine")
    code, told, err = score(typed, made, run)
    assert code == 0, told
    assert f"{run / 'generation_config.json'} has changed" in err
    assert "README" not in err


DAMAGES = {
    "empty": lambda text: "",
    "half": lambda text: text[: len(text) // 2],
    "without its last section": lambda text: text[: text.rindex("\neval:") + 1],
    "another template": lambda text: text.replace("template: plain", "template: alpaca"),
    "no YAML": lambda text: text.replace("\ndata:", "\ndata: ["),
}


@pytest.mark.parametrize("sealed", [True, False], ids=["manifest", "no manifest"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_recipe_is_refused_by_name(typed, made, run, damage, sealed):
    recipe = run / "recipe.yaml"
    text = recipe.read_text()
    recipe.write_text(DAMAGES[damage](text))
    assert recipe.read_text() != text
    if not sealed:  # as earlier versions left it: what still reads as a whole recipe cannot be told from one
        (run / MANIFEST).unlink()
        if damage in ("without its last section", "another template"):
            return
    for command in (score, ask):
        code, told, _ = command(typed, made, run)
        assert (code, f"{recipe} is damaged or changed" in told["message"]) == (2, True), told
    if damage == "another template":
        assert score(typed, made, run, "--recipe", recipe)[0] == 0


def test_a_missing_recipe_is_said_where_a_run_wrote_the_model(typed, made, run):
    (run / "recipe.yaml").unlink()
    for model in (run, run / "checkpoints/step-000004"):
        code, _, err = score(typed, made, model)
        assert code == 0
        assert f"{run / 'recipe.yaml'} is missing" in err
    for path in (run / MANIFEST, run / "checkpoints"):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    _, _, err = score(typed, made, run)
    assert "recipe" not in err, "an ordinary model directory has none"


def test_a_run_that_goes_on_leaves_the_model_readable_meanwhile(typed, made, run):
    """The recipe of a resume is another one, and the model still the first one's."""
    from distillm_cli.runs import output_dir

    output_dir.write_recipe(run, (run / "recipe.yaml").read_text().replace("log_steps: 10", "log_steps: 11"))
    assert score(typed, made, run)[0] == 0
    flip(run / "model.safetensors")
    assert score(typed, made, run)[0] == 4
