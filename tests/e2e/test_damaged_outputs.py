"""Check that damaged files of an output directory are detected: weights, settings and recipe are in its manifest."""

import json
import shutil

import pytest

from distillm_cli.utils.manifest import MANIFEST
from tests.command_line import assert_error
from tests.e2e.test_main_job import SMALL, rows, write

SHORT = [*SMALL, "--max-length", "400", "--steps", "4", "--set", "train.save_steps=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from distillm_cli.cli.app import main

    directory = tmp_path_factory.mktemp("trained")
    for split in ("train", "valid", "test"):
        write(directory / f"{split}.jsonl", rows(24))
    argv = ["sft", "--model", "random:1x32", "--tokenizer", "bpe:300", "--data", directory, *SHORT]
    assert main([str(a) for a in [*argv, "--output", directory / "run"]]) == 0
    return directory


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained / "run", tmp_path / "run")


def flip_bit(path, position=-5):
    """Change one bit of a file. Its size stays the same."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def score(cli, trained, model, *more):
    argv = ["eval", model, "--suite", trained / "test.jsonl", "--output", "scores", "--json", "--quiet"]
    return cli(*argv, "--device", "cpu", "--max-new-tokens", "4", "--greedy", *more)


def generate(cli, trained, model, *more):
    argv = ["generate", "--model", model, "--data", trained, "--split", "test", "--output", "responses.jsonl"]
    return cli(*argv, "--json", *more)


def test_manifest_lists_files_users_do_not_edit(run):
    listed = json.loads((run / MANIFEST).read_text())
    assert {"model.safetensors", "config.json", "tokenizer.json", "recipe.yaml"} <= listed["files"].keys()
    assert not {"README.md", "metrics.jsonl"} & listed["files"].keys()
    for name, entry in listed["files"].items():
        assert (run / name).stat().st_size == entry["bytes"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_file_is_an_error(cli, trained, run, name):
    """Check one changed bit that libraries do not detect: in the weights, in a number, in a token."""
    content = (run / name).read_bytes()
    positions = {"config.json": content.index(b"e-0") + 3} if name == "config.json" else {"tokenizer.json": -40}
    flip_bit(run / name, positions.get(name, -5))
    for command in (score, generate):
        assert_error(command(cli, trained, run), "model.damaged", run / name, run / MANIFEST)
    argv = ["distill", "--teacher", run, "--student", "random:1x16", "--data", trained, "--output", "student"]
    assert_error(cli(*argv, *SHORT), "model.damaged", run / name)
    (run / MANIFEST).unlink()
    if name != "tokenizer.json":
        assert score(cli, trained, run)[0] == 0, "undetected without a manifest"


def test_missing_file_and_damaged_manifest_are_errors(cli, trained, run):
    (run / "tokenizer.json").unlink()
    assert_error(score(cli, trained, run), "model.damaged", run / "tokenizer.json")
    (run / MANIFEST).write_text('{"format": 1, "fil')
    assert_error(score(cli, trained, run), "checkpoint.damaged", run / MANIFEST)


def test_damaged_checkpoint_is_an_error(cli, trained, run):
    checkpoint = run / "checkpoints/step-000004"
    assert score(cli, trained, checkpoint)[0] == 0
    flip_bit(checkpoint / "model.safetensors")
    assert_error(score(cli, trained, checkpoint), "checkpoint.damaged", checkpoint / "model.safetensors")


def test_edited_generation_config_is_a_warning(cli, trained, run):
    settings = json.loads((run / "generation_config.json").read_text())
    (run / "generation_config.json").write_text(json.dumps(settings | {"temperature": 0.5}))
    (run / "README.md").write_text("# My model")
    (run / "eval/notes.txt").write_text("mine")
    code, result, err = score(cli, trained, run)
    assert code == 0, result
    assert f"{run / 'generation_config.json'} has changed" in err
    assert "README" not in err


DAMAGES = {
    "empty": lambda text: "",
    "truncated": lambda text: text[: len(text) // 2],
    "without its last section": lambda text: text[: text.rindex("\neval:") + 1],
    "changed template": lambda text: text.replace("template: plain", "template: alpaca"),
    "invalid YAML": lambda text: text.replace("\ndata:", "\ndata: ["),
}


@pytest.mark.parametrize("has_manifest", [True, False], ids=["manifest", "no manifest"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_recipe_is_an_error(cli, trained, run, damage, has_manifest):
    recipe = run / "recipe.yaml"
    text = recipe.read_text()
    recipe.write_text(DAMAGES[damage](text))
    assert recipe.read_text() != text
    if not has_manifest:  # as in earlier versions, where only an invalid recipe is detected
        (run / MANIFEST).unlink()
        if damage in ("without its last section", "changed template"):
            return
    for command in (score, generate):
        assert_error(command(cli, trained, run), "recipe.damaged", recipe)
    if damage == "changed template":
        assert score(cli, trained, run, "--recipe", recipe)[0] == 0


def test_missing_recipe_is_a_warning(cli, trained, run):
    (run / "recipe.yaml").unlink()
    for model in (run, run / "checkpoints/step-000004"):
        code, _, err = score(cli, trained, model)
        assert code == 0
        assert f"{run / 'recipe.yaml'} is missing" in err
    for path in (run / MANIFEST, run / "checkpoints"):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    _, _, err = score(cli, trained, run)
    assert "recipe" not in err, "an ordinary model directory has no recipe"


def test_model_stays_readable_during_resume(cli, trained, run):
    """Check a resumed run with a new recipe: the old model stays valid until it is replaced."""
    from distillm_cli.runs import output_dir

    output_dir.write_recipe(run, (run / "recipe.yaml").read_text().replace("log_steps: 10", "log_steps: 11"))
    assert score(cli, trained, run)[0] == 0
    flip_bit(run / "model.safetensors")
    assert_error(score(cli, trained, run), "model.damaged", run / "model.safetensors")
