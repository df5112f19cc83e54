"""Test storage errors, and removals interrupted by a kill."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distillm_cli.cli.app import main
from distillm_cli.config.schema import Recipe
from distillm_cli.data.sources import load_rows
from distillm_cli.errors import StorageError
from distillm_cli.models.model_paths import locate_model
from distillm_cli.runs import output_dir, train
from distillm_cli.runs.inputs import check_overwrite
from distillm_cli.training.checkpoint import Checkpoints, latest, read_checkpoint, visible
from distillm_cli.training.events import Warned
from distillm_cli.utils import manifest, storage
from tests import tiny
from tests.codes import raises_code
from tests.command_line import call
from tests.resource_limits import file_size
from tests.unit.test_outputs import RUN_FILES, put_run, resolved

ROOT = Path(__file__).resolve().parents[2]
STATE = {"progress": {}, "recipe": {}}


def weights(directory: Path) -> None:
    for name in ("a", "b", "c"):
        (directory / f"{name}.json").write_text(name)


def checkpoints(root: Path, **more) -> Checkpoints:
    return Checkpoints(root, more.pop("save_model", weights), **{"keep": 1, **more})


def write(store: Checkpoints, *steps: int) -> None:
    for step in steps:
        store.write(step, STATE, {"t": torch.ones(2)})


# --- removal ------------------------------------------------------------------------------------------------------

KILLED = """
    import json, os, signal, sys
    from pathlib import Path
    import torch
    from distillm_cli.runs import output_dir
    from distillm_cli.training.checkpoint import Checkpoints

    def remove(what, place, last):
        removed = 0

        def count(event, args):
            nonlocal removed
            if event in ("os.remove", "os.rmdir"):
                removed += 1
                if removed > last:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        if what == "clear":
            output_dir.clear(place)
        else:
            made = Checkpoints(place / "checkpoints", lambda d: (d / "new.json").write_text("new"), keep=1)
            made.write(3, {"progress": {}, "recipe": {}}, {"t": torch.ones(2)})

    for what, place, last in json.loads(sys.argv[1]):
        child = os.fork()
        if child == 0:
            remove(what, Path(place), last)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
KILLED_CASES = [(what, last) for last in (0, 1, 3, 5, 8) for what in ("prune", "clear")]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Start to remove directories in processes that are killed after a number of files. Return them by case.

    The processes are forks of one, which imports torch once.
    """
    places = {case: tmp_path_factory.mktemp("killed") for case in KILLED_CASES}
    for place in places.values():
        output_dir.write_recipe(place, resolved())
        write(checkpoints(place / "checkpoints", keep=9), 1, 2)
    cases = json.dumps([(what, str(place), last) for (what, last), place in places.items()])
    command = [sys.executable, "-c", textwrap.dedent(KILLED), cases]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(places)
    return places


@pytest.mark.parametrize(("what", "last"), KILLED_CASES)
def test_killed_removal_leaves_only_complete_checkpoints(killed, what, last):
    place = killed[what, last]
    root = place / "checkpoints"
    for path in visible(root):
        assert read_checkpoint(path).path == path, "every file of the manifest exists"
    assert what == "clear" or latest(root).path.name in ("step-000002", "step-000003")
    if what == "prune":  # the next write removes the rest
        write(checkpoints(root), 4)
        assert [path.name for path in root.iterdir()] == ["step-000004"]
    else:  # clearing can be repeated
        assert output_dir.clear(place) == []
        assert list(place.iterdir()) == []


def test_each_unremovable_checkpoint_is_one_warning(tmp_path, monkeypatch):
    events = []
    store = checkpoints(tmp_path, listener=events.append)
    write(store, 1)

    def fail(path, *_, **options):
        if not options.get("ignore_errors"):
            raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(shutil, "rmtree", fail)
    write(store, 2, 3)
    assert [path.name for path in visible(tmp_path)] == ["step-000003"]
    assert [event.text.split(";")[0] for event in events] == [
        f"cannot remove the old checkpoint {tmp_path / f'step-00000{n}'}: Input/output error" for n in (1, 2)
    ]
    monkeypatch.undo()
    write(store, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000004"]


def test_checkpoint_that_cannot_be_renamed_is_one_warning(tmp_path, monkeypatch):
    events = []
    store = checkpoints(tmp_path, listener=events.append)
    write(store, 1)
    rename = Path.rename

    def fail(path, target):
        if path.name == "step-000001":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    write(store, 2, 3)
    assert [path.name for path in visible(tmp_path)] == ["step-000001", "step-000003"]
    (warning,) = events
    assert isinstance(warning, Warned)
    assert latest(tmp_path).path.name == "step-000003"


def test_clear_stops_if_a_checkpoint_cannot_be_removed(tmp_path, monkeypatch):
    put_run(tmp_path, *RUN_FILES)

    def fail(path, target):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "rename", fail)
    with raises_code("storage.failed", "step-000200", "Permission denied"):
        output_dir.clear(tmp_path)


def test_atomic_directory_is_replaced_or_unchanged(tmp_path):
    final = tmp_path / "final"
    final.mkdir()
    (final / "old").touch()

    def fail() -> None:
        with storage.atomic_directory(final) as staged:
            (staged / "new").touch()
            raise StorageError("storage.failed", "a disk is full")

    with pytest.raises(StorageError):
        fail()
    assert [path.name for path in final.iterdir()] == ["old"]
    with storage.atomic_directory(final) as staged:
        (staged / "new").touch()
        assert [path.name for path in final.iterdir()] == ["old"]
    assert [path.name for path in final.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [final], "no staging directory is left"


def test_failed_rename_leaves_the_old_directory(tmp_path, monkeypatch):
    final = tmp_path / "final"
    final.mkdir()
    (final / "old").touch()
    rename = Path.rename

    def fail(path, target):
        if path.name.startswith(storage.STAGING):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return rename(path, target)

    def replace_it() -> None:
        with storage.atomic_directory(final) as staged:
            (staged / "new").touch()

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(PermissionError):
        replace_it()
    assert [path.name for path in final.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [final]


# --- errors of the system -------------------------------------------------------------------------------------------


def file_system_errors() -> list[int]:
    names = (
        "EIO EROFS EDQUOT ENOSPC EFBIG EACCES EPERM ENAMETOOLONG EISDIR ENOTDIR ELOOP ESTALE EBUSY EMFILE ENFILE ENXIO"
    )
    names += " ENODEV EINVAL EEXIST ENOTEMPTY ETXTBSY EREMOTEIO EUCLEAN EMLINK EXDEV ENOTSUP ENOLCK ENOENT ETIMEDOUT"
    return [getattr(errno, name) for name in names.split() if hasattr(errno, name)]


@pytest.mark.parametrize("number", file_system_errors(), ids=errno.errorcode.get)
def test_every_file_system_error_is_a_storage_error(number, monkeypatch, capsys):
    def fail(*_):
        raise OSError(number, os.strerror(number), "/d/x")

    monkeypatch.setattr("distillm_cli.config.load.shipped", fail)
    code, result, err = call(capsys, "recipes", "ls", "--json")
    assert (code, result["code"]) == (8, 8)
    assert err.startswith(f"error: {os.strerror(number)}: /d/x; ")


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ECONNREFUSED, errno.ECHILD])
def test_other_os_errors_are_not_storage_errors(number):
    assert storage.os_error_number(OSError(number, "x")) is None
    assert storage.os_error_number(ValueError("os error in the text")) is None
    assert storage.os_error_number(OSError("no number")) is None


def test_full_disk_is_recognized_in_library_errors(tmp_path):
    with file_size(2000):
        with pytest.raises(Exception) as tokenizers_error:  # noqa: PT011
            tiny.tokenizer(size=500).save_pretrained(tmp_path)
        with pytest.raises(Exception) as safetensors_error:  # noqa: PT011
            save_file({"t": torch.ones(5000)}, tmp_path / "t.safetensors")
    for found in (tokenizers_error.value, safetensors_error.value):
        assert storage.os_error_number(found) == errno.EFBIG, repr(found)
        assert storage.reason(found)


def test_full_disk_while_saving_loses_no_checkpoint(tmp_path):
    store = checkpoints(tmp_path)
    write(store, 1)
    tokenizer = tiny.tokenizer(size=500)
    with file_size(4000), raises_code("storage.failed", "File too large", "step-000001", "--resume"):
        write(checkpoints(tmp_path, save_model=tokenizer.save_pretrained), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_full_disk_while_publishing_leaves_no_files(tmp_path, capsys, monkeypatch):
    """Check a finished run that is resumed only to publish its adapter and a large tokenizer."""
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "model", rows=2000, own_tokenizer=tiny.tokenizer(size=2000))
    Path("rows.jsonl").write_text("".join(f'{{"prompt": "a {c}", "completion": "b"}}\n' for c in "abcdefghijklmnop"))
    argv = [
        "sft", "--model", "model", "--lora", "1", "--data", "rows.jsonl", "--steps", "1", "--output", "run", "--quiet",
        "--dtype", "fp32", "--device", "cpu", "--set", "data.template=plain", "--set", "eval.report_rows=0", "--json",
        "--set", "student.lora_output=adapter",
    ]  # fmt: skip
    assert call(capsys, *argv)[0] == 0
    published = {path.name for path in Path("run").iterdir()}
    for path in [*Path("run").glob("*.json"), *Path("run").glob("adapter*"), Path("run/README.md")]:
        path.unlink(missing_ok=True)
    before = {path.name for path in Path("run").iterdir()}
    publish = train.publish_model

    def on_a_full_disk(*arguments):
        with file_size(20_000):
            publish(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(train, "publish_model", on_a_full_disk)
        code, _, err = call(capsys, *argv, "--resume")
    assert code == 8
    assert "File too large" in err
    assert {path.name for path in Path("run").iterdir()} == before | {manifest.MANIFEST}
    assert call(capsys, *argv, "--resume")[0] == 0
    assert {path.name for path in Path("run").iterdir()} == published


# --- probes ---------------------------------------------------------------------------------------------------------


def test_killed_write_probe_leaves_no_file(tmp_path):
    script = """
        import os, signal, sys
        from pathlib import Path
        from distillm_cli.utils import manifest, storage

        def kill(event, args):  # as soon as a file is created
            if event in ("os.remove", "tempfile.mkstemp"):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        storage.check_writable(Path(sys.argv[1]))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_check_writable_detects_unwritable_directories(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        storage.check_writable(tmp_path / "absent")
    if Path("/proc/self").is_dir():
        with pytest.raises(OSError, match=r"(?i)permission|read-only|no such|not supported|not permitted"):
            storage.check_writable(Path("/proc/self"))


def test_write_probes_of_earlier_versions_are_removed(tmp_path):
    (tmp_path / ".writable-123").touch()
    output_dir.check_output(tmp_path, resume=False, overwrite=False)
    assert list(tmp_path.iterdir()) == []


# --- broken links ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["loop", "absent"])
def test_broken_link_is_rejected_as_output_model_and_data(tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to(target)
    Path("loop.jsonl").symlink_to("loop.jsonl")
    with raises_code("usage.output_exists", "--output loop"):
        output_dir.check_output(Path("loop"), resume=False, overwrite=False)
    with raises_code("model.not_found", "loop"):
        locate_model("loop")
    for named in ("loop", "./loop", "loop.jsonl"):
        data = Recipe.model_validate({"data": {"source": named}}).data
        with raises_code("data.not_found", named):
            load_rows(data, "train")


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        ("sft --model random:1x32 --tokenizer chars --data rows.jsonl --output loop", 2),
        ("sft --model random:1x32 --tokenizer chars --data rows.jsonl --output loop/a", 8),
        ("sft --model random:1x32 --tokenizer chars --data loop.jsonl --output out", 3),
        ("sft --model loop --data rows.jsonl --output out", 4),
        ("sft --model random:1x32 --tokenizer loop --data rows.jsonl --output out", 4),
        ("distill --teacher loop --student random:1x32 --data rows.jsonl --output out", 4),
        ("sft --recipe loop.yaml --output out", 2),
        ("generate --model loop --prompt a --output o.jsonl", 4),
        ("generate --model loop --prompt a --output loop.jsonl", 4),
        ("eval loop --suite rows.jsonl", 4),
        ("run loop.yaml", 2),
    ],
)
def test_symlink_loop_has_its_exit_code_in_every_option(tmp_path, capsys, monkeypatch, argv, code):
    monkeypatch.chdir(tmp_path)
    for name in ("loop", "loop.jsonl", "loop.yaml"):
        Path(name).symlink_to(name)
    Path("rows.jsonl").write_text("".join(f'{{"prompt": "a {c}", "completion": "b"}}\n' for c in "abcdefghijklmnop"))
    exit_code, _, err = call(capsys, *argv.split(), "--json")
    assert exit_code == code, err


def test_symlink_loop_is_cleared_only_in_a_run_directory(tmp_path):
    (tmp_path / "checkpoints").symlink_to("checkpoints")
    with raises_code("usage.output_exists", "checkpoints"):
        output_dir.check_output(tmp_path, resume=False, overwrite=True)
    output_dir.write_recipe(tmp_path, resolved())
    manifest.record(tmp_path, ["checkpoints/step-000001"])
    output_dir.check_output(tmp_path, resume=False, overwrite=True)
    check_overwrite("sft", Recipe(), tmp_path)
    assert output_dir.clear(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_symlink_loop_error_of_python_is_a_storage_error(tmp_path, monkeypatch, capsys):
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setattr("distillm_cli.config.load.shipped", lambda: (tmp_path / "loop").resolve(strict=True))
    assert main(["recipes", "ls"]) == 8
    assert capsys.readouterr().err.count("\n") == 1
