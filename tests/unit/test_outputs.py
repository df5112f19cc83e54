"""Test the output directory: which files are cleared, and the lock for one run at a time."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from distillm_cli.config.load import resolve, to_yaml
from distillm_cli.errors import StorageError
from distillm_cli.models.composite import PROCESSOR_FILES
from distillm_cli.runs import output_dir
from distillm_cli.utils import manifest, storage
from tests.codes import raises_code
from tests.resource_limits import file_size


def put(directory: Path, *names: str) -> None:
    """Write files with their names as content."""
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name, encoding="utf-8")


def put_run(directory: Path, *names: str) -> None:
    """Write files as a run with an SFT stage and an evaluation does, with manifests."""
    put(directory, *names)
    for folder in ("", "sft/", "eval/dolly/t1/"):
        inside = [name.removeprefix(folder) for name in names if name.startswith(folder)]
        entries = {_entry(name) for name in inside if not name.startswith(("sft/", "eval/dolly/"))}
        if inside:
            stage = {"sft"} if folder == "" and any(name.startswith("sft/") for name in names) else set()
            manifest.record(directory / folder, sorted(entries | stage))


def _entry(name: str) -> str:
    """Return the entry under which a run lists a file. A checkpoint is one entry."""
    name = name.replace(".staging-", "")
    return "/".join(name.split("/")[:2]) if name.startswith("checkpoints/") else name


def resolved(*sets: str) -> str:
    """Return a recipe as a run saves it."""
    return to_yaml(resolve(command="distill", recipe=None, flags={}, sets=list(sets)))


def files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}


RUN_FILES = (
    "model-00001-of-00002.safetensors", "config.json", "recipe.yaml", "preprocessor_config.json",
    "additional_chat_templates/tool_use.jinja", "checkpoints/step-000200/state.json",
    "checkpoints/.staging-step-000300/config.json", "eval/report/student-after.json", "eval/dolly/t1/results.json",
    "eval/dolly/t1/predictions-seed10.jsonl", "eval/dolly/t1/.staging-results.json", "sft/model.safetensors",
    "sft/checkpoints/step-000010/state.json", "sft/eval/report/student-before.json", "sft/recipe.yaml",
)  # fmt: skip
USER_FILES = (
    "notes.txt",
    "rows/train.jsonl",
    "eval/mynotes.txt",
    "eval/dolly/figure.png",
    "checkpoints/why",
    "sft/log",
)


def test_clear_removes_only_files_of_runs(tmp_path):
    put_run(tmp_path, *RUN_FILES)
    put(tmp_path, *USER_FILES)
    output_dir.clear(tmp_path)
    assert files(tmp_path) == set(USER_FILES)


def test_clear_removes_empty_directories(tmp_path):
    put_run(tmp_path, *RUN_FILES)
    output_dir.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_clear_leaves_another_model_among_the_results(tmp_path):
    """Check a model with its own manifest that this run did not write."""
    put_run(tmp_path, *RUN_FILES)
    put_run(tmp_path / "eval/other/model", "model.safetensors", "recipe.yaml")
    output_dir.clear(tmp_path)
    names = ("manifest.json", "model.safetensors", "recipe.yaml")
    assert files(tmp_path) == {f"eval/other/model/{name}" for name in names}


def test_clear_removes_unfinished_files_of_a_killed_run(tmp_path):
    """Check staging files: a file is listed before it is written next to its final path."""
    output_dir.write_recipe(tmp_path, resolved(), stages=["sft"])
    manifest.record(tmp_path, ["checkpoints/step-000001", "model.safetensors"])
    put(tmp_path, "checkpoints/.staging-step-000001-123/model.safetensors", ".staging-model-123/config.json")
    put(tmp_path, ".staging-metrics.jsonl", "checkpoints/.old-step-000000/user", ".old-notes.txt")
    output_dir.clear(tmp_path)
    assert files(tmp_path) == {"checkpoints/.old-step-000000/user", ".old-notes.txt"}, "unlisted files"


def test_clear_removes_links_but_not_their_targets(tmp_path):
    """Check links to checkpoints of another run or on another disk."""
    put_run(tmp_path / "other", *RUN_FILES)
    before = files(tmp_path / "other")
    (tmp_path / "run").mkdir()
    for name in ("checkpoints", "eval", "sft"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "other" / name)
    put(tmp_path / "run", "recipe.yaml")
    filenames = ["recipe.yaml", "checkpoints/step-000200", "eval/report/student-after.json", "sft"]
    manifest.record(tmp_path / "run", filenames)
    output_dir.clear(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    assert files(tmp_path / "other") == before


@pytest.mark.parametrize("recipe", [None, "method: distillm  # as in the paper\ntrain:\n  lr: 0.001\n"])
@pytest.mark.parametrize("name", ["README.md", "config.json", *PROCESSOR_FILES, "checkpoints/step-000001/weights"])
def test_overwrite_rejects_files_not_written_by_a_run(tmp_path, name, recipe):
    """Check that --overwrite neither clears nor replaces a downloaded model or a checkout."""
    put(tmp_path, name, "notes.txt")
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    before = files(tmp_path)
    assert list(output_dir.written(tmp_path)) == []
    with raises_code("usage.output_exists", str(tmp_path)):
        output_dir.check_output(tmp_path, resume=False, overwrite=True)
    output_dir.clear(tmp_path)
    assert files(tmp_path) == before


def test_model_with_several_chat_templates_is_published_twice(tmp_path):
    output = tmp_path / "run"
    for _ in range(2):  # the second time over the first, like after --resume
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


def test_user_edited_model_card_is_not_replaced(tmp_path):
    put_run(tmp_path, *RUN_FILES)
    put(tmp_path, "README.md")
    with raises_code("usage.output_exists", "README.md"):
        output_dir.check_output(tmp_path, resume=False, overwrite=True)
    card = tmp_path / "README.md"
    manifest.record(tmp_path, [], seals={"README.md": manifest.seal(card)})  # as if a run had written it
    card.write_text("text of the run, edited by the user", encoding="utf-8")
    with raises_code("usage.output_exists", "README.md"):
        output_dir.check_output(tmp_path, resume=False, overwrite=True)
    put(tmp_path, "README.md")
    output_dir.check_output(tmp_path, resume=False, overwrite=True)
    output_dir.clear(tmp_path)
    assert files(tmp_path) == set()


@pytest.mark.parametrize("epochs", [None, "0.0", "2.0"])
def test_sft_directory_is_a_stage_only_with_sft_epochs(tmp_path, epochs):
    put(tmp_path, "sft/recipe.yaml", "sft/model.safetensors")
    if epochs is not None:
        recipe = resolved(f"student.sft_epochs={epochs}")
        output_dir.write_recipe(tmp_path, recipe, stages=[] if epochs == "0.0" else ["sft"])
    if epochs == "2.0":
        manifest.record(tmp_path / "sft", ["recipe.yaml", "model.safetensors"])
    assert output_dir.has_stage(tmp_path, "sft") == (epochs == "2.0")
    output_dir.check_output(tmp_path, resume=False, overwrite=True)
    output_dir.clear(tmp_path)
    assert files(tmp_path) == (set() if epochs == "2.0" else {"sft/recipe.yaml", "sft/model.safetensors"})


def test_manifest_is_cleared_last(tmp_path):
    """Check the order, so that an interrupted clearing can be repeated."""
    put_run(tmp_path, *RUN_FILES)
    assert next(reversed(list(output_dir.written(tmp_path)))) == tmp_path / manifest.MANIFEST


def test_leftover_write_probe_does_not_count_as_content(tmp_path):
    put(tmp_path, ".writable-123")
    output_dir.check_output(tmp_path, resume=False, overwrite=False)


def test_failed_atomic_write_leaves_no_file(tmp_path):
    with file_size(100), pytest.raises(OSError, match="File too large"):
        storage.atomic_write(tmp_path / "recipe.yaml", "x" * 5000)
    assert list(tmp_path.iterdir()) == []


def test_output_lock_also_applies_through_a_link(tmp_path):
    directory, link = tmp_path / "run", tmp_path / "link"
    directory.mkdir()
    link.symlink_to(directory)
    with output_dir.claimed(directory):
        with raises_code("usage.output_in_use", "link"), output_dir.claimed(link):
            pass
        assert list(directory.iterdir()) == [], "the lock leaves no files"
    with output_dir.claimed(link):
        pass


def run_failing_in(directory: Path, *filenames: str) -> None:
    """Run with an error after these files are written."""

    def run() -> None:
        put(directory, *filenames)
        raise StorageError("storage.failed", "a disk is full")

    is_new = output_dir.check_output(directory, resume=False, overwrite=False)
    with pytest.raises(StorageError), output_dir.claimed(directory, is_new=is_new):
        run()


def test_failed_run_without_files_leaves_no_directory(tmp_path):
    run_failing_in(tmp_path / "runs" / "new")
    assert not (tmp_path / "runs" / "new").exists()
    run_failing_in(tmp_path / "runs" / "started", "recipe.yaml")
    assert (tmp_path / "runs" / "started" / "recipe.yaml").is_file()
    (tmp_path / "existing").mkdir()
    run_failing_in(tmp_path / "existing")
    assert (tmp_path / "existing").is_dir(), "the directory existed before"


def test_resume_without_output_uses_newest_checkpointed_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = ("quickstart", "builtin", "student", "distillm")
    put(Path("runs"), "quickstart-distillm/checkpoints/step-000002/state", "quickstart-distillm-2/recipe.yaml")
    assert output_dir.default_name(*name, resume=False) == Path("runs/quickstart-distillm-3")
    assert output_dir.default_name(*name, resume=True) == Path("runs/quickstart-distillm"), (
        "the second run has no checkpoint"
    )
    put(Path("runs"), "quickstart-distillm-2/sft/checkpoints/step-000002/state")
    assert output_dir.default_name(*name, resume=True) == Path("runs/quickstart-distillm-2")


def test_lock_of_a_killed_run_is_released(tmp_path):
    script = "import sys; from pathlib import Path; from distillm_cli.runs.output_dir import claimed\n"
    script += "with claimed(Path(sys.argv[1])): print('claimed', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert run.stdout.readline() == b"claimed\n"
        with raises_code("usage.output_in_use"), output_dir.claimed(tmp_path):
            pass
        run.kill()
        run.wait()
        with output_dir.claimed(tmp_path):
            pass


def test_runs_work_without_file_locks(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(storage.fcntl, "flock", no_locks)
    with output_dir.claimed(tmp_path), output_dir.claimed(tmp_path):
        pass
    monkeypatch.setattr(storage, "fcntl", None)  # Windows
    with output_dir.claimed(tmp_path), output_dir.claimed(tmp_path):
        pass


def test_too_long_output_name_is_a_storage_error(tmp_path):
    with raises_code("storage.failed", "--output"):
        output_dir.check_output(tmp_path / ("x" * 300), resume=False, overwrite=False)
