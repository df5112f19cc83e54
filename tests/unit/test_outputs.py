"""The output directory: whose files are cleared, and that one run at a time has it."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from distillm_cli.cli import outputs
from distillm_cli.errors import StorageError, UsageError


def put(place: Path, *names: str) -> None:
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(name, encoding="utf-8")


def files(place: Path) -> set[str]:
    return {path.relative_to(place).as_posix() for path in place.rglob("*") if not path.is_dir()}


OF_RUNS = (
    "model-00001-of-00002.safetensors", "config.json", "recipe.yaml", "checkpoints/step-000200/state.json",
    "checkpoints/.staging-step-000300/config.json", "eval/report/student-after.json", "eval/dolly/t1/results.json",
    "eval/dolly/t1/predictions-seed10.jsonl", "eval/dolly/t1/.staging-results.json", "sft/model.safetensors",
    "sft/checkpoints/step-000010/state.json", "sft/eval/report/student-before.json",
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
    put(tmp_path, *OF_RUNS, *OF_SOMEBODY)
    outputs.clear(tmp_path)
    assert files(tmp_path) == set(OF_SOMEBODY)


def test_of_what_runs_wrote_not_even_an_empty_folder_stays(tmp_path):
    put(tmp_path, *OF_RUNS)
    outputs.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_of_a_folder_that_is_a_link_only_the_link_goes(tmp_path):
    """Checkpoints of another run, or on a larger disk."""
    put(tmp_path / "other", *OF_RUNS)
    (tmp_path / "run").mkdir()
    for name in ("checkpoints", "eval", "sft"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "other" / name)
    outputs.clear(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    assert files(tmp_path / "other") == set(OF_RUNS)


def test_one_run_at_a_time_has_the_directory_by_whatever_name(tmp_path):
    place, link = tmp_path / "run", tmp_path / "link"
    place.mkdir()
    link.symlink_to(place)
    with outputs.claimed(place):
        with pytest.raises(UsageError, match=r"another run is at work in .*link"), outputs.claimed(link):
            pass
        assert list(place.iterdir()) == [], "nothing is left in it"
    with outputs.claimed(link):
        pass


def test_a_directory_whose_run_was_killed_is_free_again(tmp_path):
    script = "import sys; from pathlib import Path; from distillm_cli.cli.outputs import claimed\n"
    script += "with claimed(Path(sys.argv[1])): print('claimed', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert run.stdout.readline() == b"claimed\n"
        with pytest.raises(UsageError, match="another run is at work"), outputs.claimed(tmp_path):
            pass
        run.kill()
        run.wait()
        with outputs.claimed(tmp_path):
            pass


def test_where_the_file_system_has_no_locks_runs_go_on(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(outputs.fcntl, "flock", no_locks)
    with outputs.claimed(tmp_path), outputs.claimed(tmp_path):
        pass
    monkeypatch.setattr(outputs, "fcntl", None)  # Windows
    with outputs.claimed(tmp_path), outputs.claimed(tmp_path):
        pass


def test_a_name_that_no_file_system_takes_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="File name too long; choose another --output"):
        outputs.check(tmp_path / ("x" * 300), resume=False, overwrite=False)
