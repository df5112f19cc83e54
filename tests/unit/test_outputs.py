"""The output directory: whose files are cleared, and that one run at a time has it."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from distillm_cli.config.load import resolve, to_yaml
from distillm_cli.errors import StorageError, UsageError
from distillm_cli.models.composite import PROCESSOR_FILES
from distillm_cli.runs import output_dir
from distillm_cli.utils import manifest, storage
from tests.limits import file_size


def put(place: Path, *names: str) -> None:
    """Files that hold their names."""
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(name, encoding="utf-8")


def put_run(place: Path, *names: str) -> None:
    """Files that hold their names, as a run with a stage before it, and an evaluation of it, have written them."""
    put(place, *names)
    for folder in ("", "sft/", "eval/dolly/t1/"):
        inside = [name.removeprefix(folder) for name in names if name.startswith(folder)]
        entries = {_entry(name) for name in inside if not name.startswith(("sft/", "eval/dolly/"))}
        if inside:
            stage = {"sft"} if folder == "" and any(name.startswith("sft/") for name in names) else set()
            manifest.record(place / folder, sorted(entries | stage))


def _entry(name: str) -> str:
    """Return what a run lists before it writes this: a checkpoint is one entry, with all its files."""
    name = name.replace(".staging-", "")
    return "/".join(name.split("/")[:2]) if name.startswith("checkpoints/") else name


def resolved(*sets: str) -> str:
    """A recipe as a run writes it down."""
    return to_yaml(resolve(command="distill", recipe=None, flags={}, sets=list(sets)))


def files(place: Path) -> set[str]:
    return {path.relative_to(place).as_posix() for path in place.rglob("*") if not path.is_dir()}


OF_RUNS = (
    "model-00001-of-00002.safetensors", "config.json", "recipe.yaml", "preprocessor_config.json",
    "additional_chat_templates/tool_use.jinja", "checkpoints/step-000200/state.json",
    "checkpoints/.staging-step-000300/config.json", "eval/report/student-after.json", "eval/dolly/t1/results.json",
    "eval/dolly/t1/predictions-seed10.jsonl", "eval/dolly/t1/.staging-results.json", "sft/model.safetensors",
    "sft/checkpoints/step-000010/state.json", "sft/eval/report/student-before.json", "sft/recipe.yaml",
)  # fmt: skip
OF_SOMEBODY = (
    "notes.txt",
    "rows/train.jsonl",
    "eval/mynotes.txt",
    "eval/dolly/figure.png",
    "checkpoints/why",
    "sft/log",
)


def test_starting_anew_clears_what_runs_wrote_and_nobody_elses_files(tmp_path):
    put_run(tmp_path, *OF_RUNS)
    put(tmp_path, *OF_SOMEBODY)
    output_dir.clear(tmp_path)
    assert files(tmp_path) == set(OF_SOMEBODY)


def test_of_what_runs_wrote_not_even_an_empty_folder_stays(tmp_path):
    put_run(tmp_path, *OF_RUNS)
    output_dir.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_somebody_put_among_the_results_stays(tmp_path):
    """It has a manifest of its own, as every run's model does, but the run here did not write it."""
    put_run(tmp_path, *OF_RUNS)
    put_run(tmp_path / "eval/other/model", "model.safetensors", "recipe.yaml")
    output_dir.clear(tmp_path)
    names = ("manifest.json", "model.safetensors", "recipe.yaml")
    assert files(tmp_path) == {f"eval/other/model/{name}" for name in names}


def test_a_killed_runs_leftovers_are_known(tmp_path):
    """A file is listed before it is written, and what is half written lies beside its place."""
    output_dir.write_recipe(tmp_path, resolved(), has_stage=True)
    manifest.record(tmp_path, ["checkpoints/step-000001", "model.safetensors"])
    put(tmp_path, "checkpoints/.staging-step-000001-123/model.safetensors", ".staging-model-123/config.json")
    put(tmp_path, ".staging-metrics.jsonl", "checkpoints/.old-step-000000/mine", ".old-notes.txt")
    output_dir.clear(tmp_path)
    assert files(tmp_path) == {"checkpoints/.old-step-000000/mine", ".old-notes.txt"}, "on no list: the user's own"


def test_of_a_folder_that_is_a_link_only_the_link_goes(tmp_path):
    """Checkpoints of another run, or on a larger disk."""
    put_run(tmp_path / "other", *OF_RUNS)
    before = files(tmp_path / "other")
    (tmp_path / "run").mkdir()
    for name in ("checkpoints", "eval", "sft"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "other" / name)
    put(tmp_path / "run", "recipe.yaml")
    written = ["recipe.yaml", "checkpoints/step-000200", "eval/report/student-after.json", "sft"]
    manifest.record(tmp_path / "run", written)
    output_dir.clear(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    assert files(tmp_path / "other") == before


@pytest.mark.parametrize("recipe", [None, "method: distillm  # as in the paper\ntrain:\n  lr: 0.001\n"])
@pytest.mark.parametrize("name", ["README.md", "config.json", *PROCESSOR_FILES, "checkpoints/step-000001/weights"])
def test_where_no_run_has_been_what_bears_a_runs_names_is_somebodys_own(tmp_path, name, recipe):
    """A checkout, a downloaded model: --overwrite neither clears nor replaces it, whoever wrote a recipe beside it."""
    put(tmp_path, name, "notes.txt")
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    before = files(tmp_path)
    assert list(output_dir.written(tmp_path)) == []
    with pytest.raises(UsageError, match="was not written by a run; choose another --output, or move it away"):
        output_dir.check_output(tmp_path, resume=False, overwrite=True)
    output_dir.clear(tmp_path)
    assert files(tmp_path) == before


def test_a_model_with_several_chat_templates_is_published_again(tmp_path):
    output = tmp_path / "run"
    for _ in range(2):  # the second time over the first, as after --resume
        output.mkdir(exist_ok=True)
        output_dir.write_recipe(output, resolved())
        with output_dir.publishing(output) as staged:
            put(staged, "config.json", "additional_chat_templates/tool_use.jinja")
        assert files(output) == {
            "config.json",
            "recipe.yaml",
            "manifest.json",
            "additional_chat_templates/tool_use.jinja",
        }
    output_dir.clear(output)
    assert files(output) == set()


def test_a_card_of_ones_own_in_a_runs_directory_is_not_replaced(tmp_path):
    put_run(tmp_path, *OF_RUNS)
    put(tmp_path, "README.md")
    with pytest.raises(UsageError, match=r"README\.md was not written by a run"):
        output_dir.check_output(tmp_path, resume=False, overwrite=True)
    card = tmp_path / "README.md"
    manifest.record(tmp_path, [], seals={"README.md": manifest.seal(card)})  # as when a run has written it
    card.write_text("what the run wrote, and more", encoding="utf-8")
    with pytest.raises(UsageError, match=r"README\.md was not written by a run"):
        output_dir.check_output(tmp_path, resume=False, overwrite=True)
    put(tmp_path, "README.md")
    output_dir.check_output(tmp_path, resume=False, overwrite=True)
    output_dir.clear(tmp_path)
    assert files(tmp_path) == set()


@pytest.mark.parametrize("epochs", [None, "0.0", "2.0"])
def test_a_run_that_is_called_sft_is_a_stage_only_of_a_run_that_has_one(tmp_path, epochs):
    put(tmp_path, "sft/recipe.yaml", "sft/model.safetensors")
    if epochs is not None:
        recipe = resolved(f"student.sft_epochs={epochs}")
        output_dir.write_recipe(tmp_path, recipe, has_stage=epochs != "0.0")
    if epochs == "2.0":
        manifest.record(tmp_path / "sft", ["recipe.yaml", "model.safetensors"])
    assert output_dir.has_stage(tmp_path) == (epochs == "2.0")
    output_dir.check_output(tmp_path, resume=False, overwrite=True)
    output_dir.clear(tmp_path)
    assert files(tmp_path) == (set() if epochs == "2.0" else {"sft/recipe.yaml", "sft/model.safetensors"})


def test_a_clearing_that_is_stopped_half_way_can_be_gone_on_with(tmp_path):
    put_run(tmp_path, *OF_RUNS)
    assert next(reversed(list(output_dir.written(tmp_path)))) == tmp_path / manifest.MANIFEST


def test_a_probe_that_was_left_behind_does_not_fill_a_directory(tmp_path):
    put(tmp_path, ".writable-123")
    output_dir.check_output(tmp_path, resume=False, overwrite=False)


def test_a_text_that_does_not_fit_leaves_nothing(tmp_path):
    with file_size(100), pytest.raises(OSError, match="File too large"):
        storage.atomic_write(tmp_path / "recipe.yaml", "x" * 5000)
    assert list(tmp_path.iterdir()) == []


def test_one_run_at_a_time_has_the_directory_by_whatever_name(tmp_path):
    place, link = tmp_path / "run", tmp_path / "link"
    place.mkdir()
    link.symlink_to(place)
    with output_dir.claimed(place):
        with pytest.raises(UsageError, match=r"another run is active in .*link"), output_dir.claimed(link):
            pass
        assert list(place.iterdir()) == [], "nothing is left in it"
    with output_dir.claimed(link):
        pass


def fails_in(place: Path, *written: str) -> None:
    """A run that ends with an error, after it wrote these files."""

    def run() -> None:
        put(place, *written)
        raise StorageError("storage.failed", "a disk is full")

    is_new = output_dir.check_output(place, resume=False, overwrite=False)
    with pytest.raises(StorageError), output_dir.claimed(place, is_new=is_new):
        run()


def test_a_run_that_fails_before_it_wrote_anything_leaves_no_directory(tmp_path):
    fails_in(tmp_path / "runs" / "new")
    assert not (tmp_path / "runs" / "new").exists()
    fails_in(tmp_path / "runs" / "begun", "recipe.yaml")
    assert (tmp_path / "runs" / "begun" / "recipe.yaml").is_file()
    (tmp_path / "mine").mkdir()
    fails_in(tmp_path / "mine")
    assert (tmp_path / "mine").is_dir(), "it was there before"


def test_a_resume_without_a_name_takes_the_newest_run_that_saved_something(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = ("quickstart", "builtin", "student", "distillm")
    put(Path("runs"), "quickstart-distillm/checkpoints/step-000002/state", "quickstart-distillm-2/recipe.yaml")
    assert output_dir.default_name(*name, resume=False) == Path("runs/quickstart-distillm-3")
    assert output_dir.default_name(*name, resume=True) == Path("runs/quickstart-distillm"), "the second saved nothing"
    put(Path("runs"), "quickstart-distillm-2/sft/checkpoints/step-000002/state")
    assert output_dir.default_name(*name, resume=True) == Path("runs/quickstart-distillm-2")


def test_a_directory_whose_run_was_killed_is_free_again(tmp_path):
    script = "import sys; from pathlib import Path; from distillm_cli.runs.output_dir import claimed\n"
    script += "with claimed(Path(sys.argv[1])): print('claimed', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert run.stdout.readline() == b"claimed\n"
        with pytest.raises(UsageError, match="another run is active"), output_dir.claimed(tmp_path):
            pass
        run.kill()
        run.wait()
        with output_dir.claimed(tmp_path):
            pass


def test_where_the_file_system_has_no_locks_runs_go_on(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(storage.fcntl, "flock", no_locks)
    with output_dir.claimed(tmp_path), output_dir.claimed(tmp_path):
        pass
    monkeypatch.setattr(storage, "fcntl", None)  # Windows
    with output_dir.claimed(tmp_path), output_dir.claimed(tmp_path):
        pass


def test_a_name_that_no_file_system_takes_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="File name too long; choose another --output"):
        output_dir.check_output(tmp_path / ("x" * 300), resume=False, overwrite=False)
