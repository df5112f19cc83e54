"""Test runs whose terminal, log or stdout is closed or full: they finish, or save a checkpoint and exit with an error."""

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

from distillm_cli.errors import CtrlC
from distillm_cli.utils import signals
from distillm_cli.utils.stdout import write_json, write_rows
from tests.command_line import assert_error_line
from tests.marks import long

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-m", "distillm_cli"]
ENV = {**{k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}, "PYTHONPATH": str(ROOT)}
needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
needs_sighup = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP on this system")


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
def expected_weights(tmp_path_factory):
    """Return the weights of a run of 5 steps."""
    directory = tmp_path_factory.mktemp("reference") / "run"
    subprocess.run(argv(directory, steps=5), env=ENV, check=True, capture_output=True, timeout=120)
    return load_file(directory / "model.safetensors")


def assert_weights(directory: Path, expected_weights) -> None:
    weights = load_file(directory / "model.safetensors")
    assert weights.keys() == expected_weights.keys()
    assert all(weights[name].equal(weight) for name, weight in expected_weights.items())


@pytest.mark.long
@needs_dev_full
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_full_disk_of_the_log_does_not_stop_a_run(tmp_path, expected_weights, unbuffered):
    with Path("/dev/full").open("w") as log:
        env = {**ENV, "PYTHONUNBUFFERED": unbuffered}
        process = subprocess.run(argv(tmp_path / "run", steps=5), env=env, stderr=log, timeout=120)
    assert process.returncode == 0
    assert_weights(tmp_path / "run", expected_weights)


@pytest.mark.long
def test_closed_stderr_pipe_does_not_stop_a_run(tmp_path, expected_weights):
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(argv(tmp_path / "run", steps=5), env=ENV, stderr=writer, timeout=120)
    os.close(writer)
    assert process.returncode == 0
    assert_weights(tmp_path / "run", expected_weights)


@pytest.mark.long
def test_full_stderr_pipe_does_not_stop_a_run(tmp_path, expected_weights):
    """Check a full, non-blocking pipe, as a terminal shared with some programs may be."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(65536))
    process = subprocess.run(argv(tmp_path / "run", steps=5), env=ENV, stderr=writer, timeout=120)
    os.close(writer)
    os.close(reader)
    assert process.returncode == 0
    assert_weights(tmp_path / "run", expected_weights)


def run_and_close_terminal(command: list[str], output: Path, *, ignoring: tuple[int, ...] = ()) -> int:
    """Run a command, close its terminal once it trains, and return its exit code."""
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


@pytest.mark.long
@needs_sighup
def test_closed_terminal_stops_a_run_with_a_checkpoint(tmp_path):
    output = tmp_path / "run"
    assert run_and_close_terminal(argv(output, steps=100_000), output) == 128 + signal.SIGHUP
    (checkpoint,) = (output / "checkpoints").iterdir()
    assert checkpoint.name.startswith("step-")


@pytest.mark.long
@needs_sighup
def test_closed_terminal_does_not_stop_a_run_under_nohup(tmp_path):
    output = tmp_path / "run"
    assert run_and_close_terminal(argv(output, steps=200), output, ignoring=(signal.SIGHUP,)) == 0
    assert (output / "model.safetensors").is_file()
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-000200"]


def start_training(command: list[str], output: Path, *, ignoring: tuple[int, ...] = ()) -> subprocess.Popen:
    """Start a run. Return its process once it trains."""

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


@pytest.mark.long
@needs_sighup
def test_two_hangups_save_one_checkpoint(tmp_path):
    """Check two SIGHUPs, as sent by the kernel and the shell when a terminal is closed."""
    output = tmp_path / "run"
    run = start_training([*argv(output, steps=100_000), "--json", "--quiet"], output)
    run.send_signal(signal.SIGHUP)
    run.send_signal(signal.SIGHUP)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGHUP
    answer = json.loads(out)
    assert (answer["code"], answer["error"]) == (128 + signal.SIGHUP, "interrupted")
    assert err.startswith("error: ")
    assert len(list((output / "checkpoints").iterdir())) == 1


@pytest.mark.long
@needs_sighup
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_signals_ignored_at_start_stay_ignored(tmp_path, number):
    """Check SIGHUP, ignored under nohup, and SIGINT, ignored in background jobs of a script."""
    output = tmp_path / "run"
    run = start_training([*argv(output, steps=300), "--quiet"], output, ignoring=(number,))
    for _ in range(3):
        run.send_signal(number)
    _, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (0, "")
    assert (output / "model.safetensors").is_file()


@pytest.mark.long
@needs_dev_full
def test_full_stdout_is_a_storage_error_after_the_run(tmp_path, expected_weights):
    with Path("/dev/full").open("w") as stdout:
        command = [*argv(tmp_path / "run", steps=5), "--json", "--quiet", "--debug"]
        process = subprocess.run(command, env=ENV, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120)
    outcome = (process.returncode, "", process.stderr)
    assert_error_line(outcome, "storage.failed", "standard output", "No space left on device")
    assert_weights(tmp_path / "run", expected_weights)


@needs_dev_full
@pytest.mark.parametrize(
    ("words", "code"),
    [("--help", 8), ("--version", 8), ("recipes ls --json", 8), ("recipes show g2p", 8), ("nothing --json", 2)],
)
@pytest.mark.parametrize("unbuffered", ["", long("1")])
def test_full_stdout_gives_one_error_line(words, code, unbuffered):
    with Path("/dev/full").open("w") as stdout:
        command, env = [*PROGRAM, *words.split()], {**ENV, "PYTHONUNBUFFERED": unbuffered}
        process = subprocess.run(command, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)
    assert process.returncode == code
    assert process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1


@needs_dev_full
def test_unprintable_error_exits_with_its_code():
    with Path("/dev/full").open("w") as full:
        command = [*PROGRAM, "recipes", "show", "nothing", "--json"]
        process = subprocess.run(command, env=ENV, stdout=full, stderr=full, timeout=60)
    assert process.returncode == 2


# Commands whose results are JSON, text, and JSON of a resolved recipe.
PRINTING = ("methods --json", "explain train.lr", "distill --recipe quickstart --dry-run --json")


def run_printing(words: str, stdout: int) -> tuple[int, str]:
    """Run a command with this stdout, which is closed afterwards; return the exit code and stderr."""
    done = subprocess.run([*PROGRAM, *words.split()], env=ENV, stdout=stdout, stderr=subprocess.PIPE, timeout=60)
    os.close(stdout)
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize("words", PRINTING)
def test_results_end_quietly_at_a_closed_pipe(words):
    reader, writer = os.pipe()
    os.close(reader)
    assert run_printing(words, writer) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("words", PRINTING)
def test_closed_terminal_of_stdout_is_no_error(words):
    terminal, stdout = pty.openpty()
    os.close(terminal)
    assert run_printing(words, stdout) == (0, "")


@needs_dev_full
@pytest.mark.parametrize("words", PRINTING)
def test_results_on_a_full_disk_are_the_same_error(words):
    code, err = run_printing(f"{words} --debug", os.open("/dev/full", os.O_WRONLY))
    assert_error_line((code, "", err), "storage.failed", "standard output", "No space left on device")


@pytest.mark.parametrize("write", [write_json, lambda value: write_rows([value])])
def test_delayed_interrupt_replaces_a_result(write, capsys, monkeypatch):
    monkeypatch.setattr(signals, "_delayed", [CtrlC])  # as if it had arrived during an import
    with pytest.raises(CtrlC):
        write({"status": "ok"})
    assert capsys.readouterr().out == ""
    write({"status": "ok"})
    assert json.loads(capsys.readouterr().out) == {"status": "ok"}
