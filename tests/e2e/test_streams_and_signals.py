"""A run whose terminal, log or parent goes away: it ends as it would have ended, or saves and says so by its exit code."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-m", "distillm_cli"]
ENV = {**{k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}, "PYTHONPATH": str(ROOT)}
full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
hangs_up = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP on this system")


def argv(output: Path, *, steps: int, log_every_step: bool = False) -> list[str]:
    rows = output.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": f"it is {i}"}) + "\n" for i in range(30)))
    return [
        *PROGRAM, "sft", "--model", "random:1x32", "--tokenizer", "chars", "--data", str(rows), "--steps", str(steps),
        "--dtype", "fp32", "--device", "cpu", "--output", str(output), "--set", "data.template=plain",
        "--set", "eval.report_rows=0", "--set", "train.threads=1", "--set", "train.eval_steps=100000",
        "--set", "train.save_steps=100000",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The weights of a run of 5 steps."""
    place = tmp_path_factory.mktemp("undisturbed") / "run"
    subprocess.run(argv(place, steps=5), env=ENV, check=True, capture_output=True, timeout=120)
    return load_file(place / "model.safetensors")


def assert_whole(place: Path, undisturbed) -> None:
    found = load_file(place / "model.safetensors")
    assert found.keys() == undisturbed.keys()
    assert all(found[name].equal(weight) for name, weight in undisturbed.items())


@full
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_under_the_log_does_not_end_a_run(tmp_path, undisturbed, unbuffered):
    with Path("/dev/full").open("w") as log:
        env = {**ENV, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(argv(tmp_path / "run", steps=5), env=env, stderr=log, timeout=120)
    assert done.returncode == 0
    assert_whole(tmp_path / "run", undisturbed)


def test_a_tee_that_died_does_not_end_a_run(tmp_path, undisturbed):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(argv(tmp_path / "run", steps=5), env=ENV, stderr=writer, timeout=120)
    os.close(writer)
    assert done.returncode == 0
    assert_whole(tmp_path / "run", undisturbed)


def test_a_log_that_takes_nothing_for_now_does_not_end_a_run(tmp_path, undisturbed):
    """A pipe that is full and does not block: what a terminal shared with some programs is."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(65536))
    done = subprocess.run(argv(tmp_path / "run", steps=5), env=ENV, stderr=writer, timeout=120)
    os.close(writer)
    os.close(reader)
    assert done.returncode == 0
    assert_whole(tmp_path / "run", undisturbed)


def at_a_terminal(command: list[str], output: Path, *, ignoring: tuple[int, ...] = ()) -> int:
    """The exit code of a command whose terminal is closed once it trains."""
    child, terminal = pty.fork()
    if child == 0:
        for number in ignoring:
            signal.signal(number, signal.SIG_IGN)
        os.execve(command[0], command, ENV)
    metrics = output / "metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_size):
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 65536)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@hangs_up
def test_a_closed_terminal_stops_a_run_which_saves(tmp_path):
    output = tmp_path / "run"
    assert at_a_terminal(argv(output, steps=100_000), output) == 128 + signal.SIGHUP
    (saved,) = (output / "checkpoints").iterdir()
    assert saved.name.startswith("step-")


@hangs_up
def test_under_nohup_a_closed_terminal_changes_nothing(tmp_path):
    output = tmp_path / "run"
    assert at_a_terminal(argv(output, steps=200), output, ignoring=(signal.SIGHUP,)) == 0
    assert (output / "model.safetensors").is_file()
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-000200"]


def started(command: list[str], output: Path, *, ignoring: tuple[int, ...] = ()) -> subprocess.Popen:
    """A run that trains."""

    def ignore() -> None:
        for number in ignoring:
            signal.signal(number, signal.SIG_IGN)

    run = subprocess.Popen(
        command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=ignore
    )
    metrics = output / "metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_size) and run.poll() is None:
        select.select([], [], [], 0.05)
    return run


@hangs_up
def test_two_hang_ups_save_like_one(tmp_path):
    """The kernel sends one as the terminal goes, and the shell another."""
    output = tmp_path / "run"
    run = started([*argv(output, steps=100_000), "--json", "--quiet"], output)
    run.send_signal(signal.SIGHUP)
    run.send_signal(signal.SIGHUP)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGHUP
    assert json.loads(out)["code"] == 128 + signal.SIGHUP
    assert err.startswith("error: stopped at step ")
    assert len(list((output / "checkpoints").iterdir())) == 1


@hangs_up
@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT])
def test_signals_that_are_ignored_at_start_stay_ignored(tmp_path, ignored):
    """SIGHUP under nohup, SIGINT in a background job of a script."""
    output = tmp_path / "run"
    run = started([*argv(output, steps=300), "--quiet"], output, ignoring=(ignored,))
    for _ in range(3):
        run.send_signal(ignored)
    _, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (0, "")
    assert (output / "model.safetensors").is_file()


@full
def test_a_result_that_stdout_cannot_take_is_a_storage_error_of_a_run_that_is_complete(tmp_path, undisturbed):
    with Path("/dev/full").open("w") as stdout:
        command = [*argv(tmp_path / "run", steps=5), "--json", "--quiet"]
        done = subprocess.run(command, env=ENV, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 8
    assert done.stderr.startswith("error: cannot write the result to standard output: No space left on device; ")
    assert done.stderr.count("\n") == 1
    assert_whole(tmp_path / "run", undisturbed)


@full
@pytest.mark.parametrize(
    ("words", "code"),
    [("--help", 8), ("--version", 8), ("recipes ls --json", 8), ("recipes show g2p", 8), ("nothing --json", 2)],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_stdout_is_one_line_and_never_hides_another_error(words, code, unbuffered):
    with Path("/dev/full").open("w") as stdout:
        command, env = [*PROGRAM, *words.split()], {**ENV, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == code
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@full
def test_an_error_that_can_be_printed_nowhere_keeps_its_exit_code():
    with Path("/dev/full").open("w") as nowhere:
        command = [*PROGRAM, "recipes", "show", "nothing", "--json"]
        done = subprocess.run(command, env=ENV, stdout=nowhere, stderr=nowhere, timeout=60)
    assert done.returncode == 2
