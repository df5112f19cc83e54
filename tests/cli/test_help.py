"""Check the help, the one-line errors and the exit codes of the program, and that they do not import torch."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from distillm_cli import __version__
from distillm_cli.cli import app as program
from distillm_cli.cli import options
from distillm_cli.config.explain import leaves
from distillm_cli.config.load import shipped
from distillm_cli.config.shortcuts import METHOD_PANEL, MODELS_PANEL, TRAINING_PANEL, field_flags
from distillm_cli.errors import CheckpointError, DataError
from tests.command_line import assert_error_line, exit_code
from tests.marks import long

ROOT = Path(__file__).resolve().parents[2]
VERBS = ("sft", "generate", "distill", "eval", "run", "plan", "pilot", "watch", "chat", "methods", "recipes", "schema")
GROUPS = ("methods", "recipes")


@pytest.fixture
def run(capfd, monkeypatch):
    """Run a command line in this process. Return (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "100")

    def call(*argv: str) -> tuple[int, str, str]:
        code = program.main(list(argv))
        sys.stdout.flush()
        out, err = capfd.readouterr()
        return code, out, err

    return call


def python(script: str, *argv: str, **kwargs) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    command = [sys.executable, "-c", textwrap.dedent(script), *argv]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, **kwargs)


# --- help -------------------------------------------------------------------------------------------------------


def test_help_loads_no_torch():
    script = """
        import contextlib, io, sys
        from distillm_cli.cli.app import main
        for argv in (["--help"], ["--version"], *([verb, "--help"] for verb in sys.argv[1:])):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert main(argv) == 0, argv
            assert out.getvalue(), argv
        heavy = {"torch", "transformers", "datasets", "accelerate", "tokenizers", "numpy"}
        heavy |= {"rouge_score", "sacrebleu", "rapidfuzz"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        assert main(["recipes", "validate", "quickstart"]) == 0
        assert main(["methods"]) == main(["methods", "show", "ab"]) == 0
        assert main(["distill", "--alpha", "1.4"]) == 2
        assert "torch" not in sys.modules
    """
    process = python(script, *VERBS, "explain", "env")
    assert process.returncode == 0, process.stderr


def test_help_lists_commands_and_examples(run):
    code, out, _ = run("--help")
    assert code == 0
    for verb in VERBS:
        assert f"│ {verb} " in out
    assert "│ report " in out
    text = " ".join(out.split())
    assert "distillm distill --teacher gpt2-xl --student gpt2 --alpha 0.1" in text
    assert "distillm eval ckpt/ --suite dolly" in text
    sweep = "for a in 0.0 0.1 0.3; do distillm distill --recipe quickstart --alpha $a --output runs/a$a --json; done"
    assert sweep in text


@pytest.mark.parametrize("verb", VERBS)
def test_command_help_is_short_and_ends_with_examples(run, verb):
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert len(out.splitlines()) <= 92
    assert "Examples" in out.split("╰")[-1]
    assert f"distillm {verb}" in out.split("Examples")[-1]


def test_distill_help_shows_panels_flags_and_set(run):
    _, out, _ = run("distill", "--help")
    for panel in (MODELS_PANEL, METHOD_PANEL, TRAINING_PANEL, options.RECIPE_PANEL, options.OUTPUT_PANEL):
        assert f"─ {panel} ─" in out
    flags = (
        "--teacher --student --data --output --recipe --method --alpha --divergence --lr --batch-size --epochs --steps "
        "--max-length --seed --dtype --device --resume --overwrite --json --quiet --debug --set --dry-run --tokenizer "
        "--skip-bad-rows"
    )
    for flag in flags.split():
        assert f"│ {flag} " in out
    assert "--set section.key=value" in out
    assert "distillm recipes ls" in out


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in (*GROUPS, "run", "watch", "schema")])
def test_flags_match_the_field_table(verb):
    context = typer.Context(get_command(program.app))
    command = context.command.get_command(context, verb)
    offered = {opt for param in command.params for opt in param.opts}
    documented = {entry.flag for entry in field_flags(verb)}
    assert documented <= offered
    defaults = {param.opts[0]: param.default for param in command.params if param.opts[0] in documented}
    assert set(defaults.values()) == {None}, "flags have no default of their own"


def test_version(run):
    assert run("--version") == (0, f"distillm {__version__}\n", "")


def test_python_m_runs_the_program():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "distillm_cli", "recipes", "nothing"]
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "error: distillm recipes has no command nothing; it has ls, show, cp, validate\n"


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.long
@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(), reason="needs huge pages set to madvise"
)
@pytest.mark.parametrize("enabled", ["1", "0"])
def test_huge_pages_hold_large_tensors_unless_disabled(enabled):
    script = """
        import contextlib, io, os, re, sys
        from distillm_cli.cli.app import main
        if sys.argv[1] == "0":
            os.environ["THP_MEM_ALLOC_ENABLE"] = "0"
        with contextlib.redirect_stdout(io.StringIO()):
            main(["--version"])
        import torch
        table = torch.ones(32 << 20)
        print(re.search(r"AnonHugePages: *([0-9]+) kB", open("/proc/self/smaps_rollup").read())[1])
    """
    process = python(script, enabled)
    assert process.returncode == 0, process.stderr
    assert (int(process.stdout) >= 100 << 10) == (enabled == "1")


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("distil", "distillm has no command distil; did you mean distill?"),
        ("--quiet", "distillm has no flag --quiet; see `distillm --help`"),
        ("distill --alhpa 1", "distillm distill has no flag --alhpa; did you mean --alpha?"),
        ("distill --model gpt2", "distillm distill has no flag --model; did you mean --student?"),
        ("sft --student gpt2", "distillm sft has no flag --student; did you mean --model?"),
        ("distill --clip 1", "distillm distill has no flag --clip; try --set train.clip=VALUE"),
        ("distill --eval-steps 9", "distillm distill has no flag --eval-steps; try --set train.eval_steps=VALUE"),
        ("distill -x", "distillm distill has no flag -x; see `distillm distill --help`"),
        ("distill --alpha", "--alpha without a value; expected a number ≥ 0 and < 1; try --alpha 0.1"),
        ("distill --output", "--output without a value; see `distillm distill --help`"),
        ("distill --alpha abc", "--alpha = abc; expected a number ≥ 0 and < 1; try --alpha 0.1"),
        ("distill --alpha=1.4", "--alpha = 1.4; expected a number ≥ 0 and < 1; try --alpha 0.1"),
        ("distill --batch-size 3.5", "--batch-size = 3.5; expected an integer ≥ 1; try --batch-size 8"),
        (
            "distill --method kd --alpha 0.1",
            "--alpha = 0.1; objective.alpha applies to skl and srkl (methods distillm, distillm2), but",
        ),
        ("distill --ab-beta 0.3", "distillm distill has no flag --ab-beta; try --set objective.ab_beta=VALUE"),
        ("distill --set lr", "--set lr; expected section.key=value; try --set train.lr=5e-4"),
        ("distill --recipe quikstart", f"no recipe named quikstart; shipped: {', '.join(shipped())}; try --recipe "),
        (
            "distill --seed 9223372036854775808",
            "--seed = 9223372036854775808; expected an integer ≥ 0 and < 2^63; try",
        ),
        (
            "plan --seed 99999999999999999999",
            "--seed = 99999999999999999999; expected an integer ≥ 0 and < 2^63; try",
        ),
        *(
            (f"{argv} --output=", "--output = (empty); expected a name; drop it, or check the variable")
            for argv in ("sft", "distill", "eval model", "run quickstart-pipeline", "generate")
        ),
        *(
            (f"{argv}=", f"{argv.split()[-1]} = (empty); expected a name; drop it, or check the variable")
            for argv in ("eval model --suite", "eval model --metric", "generate --model", "generate --input")
        ),
        ("eval model --suite ,", "--suite = (empty); expected a name"),
        ("eval model --metric ,", "--metric = (empty); expected a name"),
        ("help", "distillm has no command help; try `distillm --help`"),
        ("quickstart", "distillm has no command quickstart; quickstart is a recipe: try `distillm distill --recipe"),
        ("distill quickstart", "distillm distill takes no argument quickstart; quickstart is a recipe: try `distillm "),
        ("sft my.yaml", "distillm sft takes no argument my.yaml; try --recipe my.yaml"),
        ("generate gpt2", "distillm generate takes no argument gpt2; try --model gpt2"),
        ("distill --learning-rate 3", "distillm distill has no flag --learning-rate; did you mean --lr?"),
        (
            "sft --gradient-accumulation-steps 2",
            "distillm sft has no flag --gradient-accumulation-steps; try --set",
        ),
        (
            "sft --report-to wandb",
            "distillm sft has no flag --report-to; did you mean --track?",
        ),
        ("distill -o runs/a", "distillm distill has no flag -o; did you mean --output?"),
        ("-V", "distillm has no flag -V; did you mean --version?"),
        ("distill --config my.yaml", "distillm distill has no flag --config; did you mean --recipe?"),
        ("distill --steps -4", "--steps = -4; expected an integer ≥ 1; it means: number of optimizer steps"),
        ("distill --resume", "--resume without a run; give --output DIR"),
        ("explain trian.lr", "no field trian.lr; did you mean train.lr?"),
        ("explain train", "train is a section, not a field; its fields: epochs"),
        ("recipes show", "missing argument 'NAME|FILE'; see `distillm recipes show --help`"),
    ],
)
def test_usage_error_is_one_line(run, argv, line):
    code, out, err = run(*argv.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("output", "where"), [("gone", "no such directory"), ("empty", "no recipe.yaml in it")])
def test_resume_without_a_run_is_a_checkpoint_error(run, tmp_path, monkeypatch, output, where):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    outcome = run("distill", "--resume", "--output", output, "--debug")
    assert_error_line(outcome, "checkpoint.nothing_to_resume", output, where)


def test_env_prints_versions(run):
    code, out, _ = run("env", "--json")
    versions = json.loads(out)
    assert (code, versions["distillm"], versions["torch"]) == (0, __version__, version("torch"))
    assert f"torch         {version('torch')}\n" in run("env")[1]


def test_explain_describes_a_field(run):
    code, out, _ = run("explain", "train.lr")
    assert code == 0
    assert "Peak learning rate" in out
    assert re.search("default +auto", out)
    assert re.search(r"flags +--lr \(sft, distill, plan\)", out)
    assert run("explain", "lr")[1] == out
    assert re.search("only with +ab; amid with amid_divergence ab", run("explain", "objective.ab_beta")[1])


def test_every_field_can_be_explained(run):
    for key in leaves():
        code, out, _ = run("explain", key, "--json")
        assert (code, json.loads(out)["key"]) == (0, key)


def test_usage_errors_of_generate_and_eval_load_no_torch(tmp_path):
    script = """
        import sys
        from distillm_cli.cli.app import main
        for argv in (
            ["generate", "--prompt", "x"],
            ["generate", "--model", "builtin"],
            ["generate", "--model", "builtin", "--prompt", "x", "--output", "out.txt"],
            ["generate", "--model", "./gone", "--prompt", "x"],
            ["generate", "--model", "builtin", "--data", "gone.jsonl"],
            ["generate", "--model", "builtin", "--prompt", "x", "--recipe", "gone"],
            ["generate", "--model", "builtin", "--prompt", "x", "--top-p", "7"],
            ["eval", "./gone", "--suite", "dolly"],
            ["eval", "builtin", "--suite", "gone.jsonl"],
            ["eval", "builtin", "--metric", "gone"],
            ["eval", "builtin", "--greedy", "--seeds", "3"],
        ):
            assert main(argv) in (2, 3, 4), argv
            assert "torch" not in sys.modules, argv
    """
    process = python(script, cwd=tmp_path)
    assert process.returncode == 0, process.stderr


def test_no_command_shows_the_help_and_exits_with_2(run):
    code, out, err = run()
    assert (code, err) == (2, "")
    assert "distillm distill --recipe quickstart" in out


def test_json_error_is_one_object_on_stdout(run):
    unknown, invalid = ["distill", "--alhpa", "1", "--json"], ["distill", "--json", "--alpha", "7"]
    for argv, error in ((unknown, "usage.unknown_option"), (invalid, "recipe.invalid_value")):
        code, out, err = run(*argv)
        result = json.loads(out)
        message = err.removeprefix("error: ").rstrip("\n")
        assert result == {"status": "error", "code": code, "error": error, "message": message}
        assert code == 2


@pytest.fixture
def failing(run, monkeypatch):
    """Run a command that fails with the given exception."""

    def call(error: BaseException, *argv: str) -> tuple[int, str, str]:
        broken = typer.Typer()

        @broken.command()
        def fail(as_json: options.Json = False, debug: options.Debug = False) -> None:
            raise error

        monkeypatch.setattr(program, "app", broken)
        return run(*argv)

    return call


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            DataError("data.invalid_json", "train.jsonl:318: not JSON", hint="correct it"),
            3,
            "train.jsonl:318: not JSON; correct it",
        ),
        (CheckpointError("checkpoint.damaged", "damaged"), 5, "damaged"),
        (MemoryError(), 7, "out of memory; lower --batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 7, "out of memory; "),
        (
            RuntimeError("unable to mmap 13 bytes from file <m>: Cannot allocate memory (12)"),
            7,
            "out of memory; unable",
        ),
        (RuntimeError("can't start new thread"), 7, "out of memory; can't start new thread"),
        (RuntimeError("could not create a primitive"), 7, "out of memory; could not create a primitive"),
        (RuntimeError("could not create a primitive descriptor for a matmul"), 1, "unexpected RuntimeError; "),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 7, "out of memory; Cannot allocate memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/d/x"), 8, "No space left on device: /d/x; free disk space"),
        (OSError(errno.EROFS, "Read-only file system", "/d"), 8, "Read-only file system: /d"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 8, "cannot read or write: Disk quota exceeded; free"),
        (OSError(errno.EFBIG, "File too large", "/d/x"), 8, "File too large: /d/x; free disk space"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/d/m"), 8, "Is a directory: /d/m; choose another path"),
        (ImportError("lib.so: failed to map segment from shared object"), 7, "out of memory; lib.so: failed to map"),
        (PermissionError(errno.EACCES, "Permission denied", "/d/x"), 8, "Permission denied: /d/x; choose another path"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "xxx"), 8, "File name too long: xxx; choose another path"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 8, "I/O error: No space left"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyError("a\nb"), 1, "unexpected KeyError; 'a\\nb'; run again with --debug for a traceback"),
        (RuntimeError("one\ntwo"), 1, "unexpected RuntimeError; one; run again with --debug"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "unexpected BrokenPipeError"),  # not the pipe of stdout
    ],
)
def test_exception_maps_to_exit_code_and_one_line(failing, error, code, message):
    got, out, err = failing(error, "--json")
    assert got == code
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1, "no traceback"
    result = json.loads(out)
    error_code = result.pop("error")
    assert code == (130 if error_code == "interrupted" else exit_code(error_code))
    assert result == {"status": "error", "code": code, "message": err.removeprefix("error: ").rstrip("\n")}


def test_torch_out_of_memory_error_is_out_of_memory(failing):
    torch = pytest.importorskip("torch")
    code, _, err = failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"))
    assert code == 7
    assert err.startswith("error: out of memory; CUDA out of memory. Tried to allocate 2 GiB; lower --batch-size")


def test_cublas_allocation_failure_is_out_of_memory(failing):
    message = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    code, _, err = failing(RuntimeError(message))
    assert code == 7
    assert err.startswith(f"error: out of memory; {message}; lower --batch-size")


@pytest.mark.parametrize(
    "argv",
    [
        ["sft", "--model", "builtin", "--data", "builtin"],
        ["distill", "--recipe", "quickstart"],
        ["run", "quickstart-pipeline"],
        ["generate", "--model", "builtin", "--prompt", "a"],
        ["eval", "builtin", "--suite", "builtin"],
    ],
    ids=lambda argv: argv[0],
)
def test_deepspeed_launcher_is_an_error(argv, run, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.chdir(tmp_path)
    assert_error_line(run(*argv, "--debug"), "usage.deepspeed", "accelerate config")
    assert not list(tmp_path.iterdir())


def test_debug_prints_the_traceback(failing):
    code, out, err = failing(KeyError("lost"), "--debug")
    assert (code, out) == (1, "")
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error [unexpected]: unexpected KeyError; 'lost'")


def test_closed_stdout_pipe_exits_quietly():
    script = """
        import sys
        from distillm_cli.cli.app import main
        sys.stdin.readline()  # the reader has closed the pipe by then
        sys.exit(main(["recipes", "ls"]))
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], env=env, **pipes) as child:
        child.stdout.close()
        child.stdin.write(b"\n")
        child.stdin.close()
        child.wait(timeout=60)
        assert (child.returncode, child.stderr.read()) == (141, b"")


@pytest.mark.parametrize("number", [signal.SIGINT, long(signal.SIGTERM)])
@pytest.mark.parametrize(
    ("module", "check_seconds"),
    [
        ("typer", 0.001),
        ("distillm_cli.config.load", 0.001),
        ("distillm_cli.config.load", 60),
    ],  # 60: the command ends before
)
def test_signal_during_imports_is_one_error_line(module, check_seconds, number, tmp_path):
    hook = f"""
        import os, sys
        class Hook:
            def find_spec(self, name, *_):
                if name == "{module}":
                    sys.meta_path.remove(self)
                    sys.modules["distillm_cli.utils.signals"]._CHECK_SECONDS = {check_seconds}
                    # In exec, as imports of data classes do: python -m then ends by the signal of a KeyboardInterrupt.
                    exec("os.kill(os.getpid(), {int(number)}); [0 for _ in range(1000)]")
        sys.meta_path.insert(0, Hook())
    """
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(hook), encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "distillm_cli", "recipes", "ls", "--json"]
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stderr) == (128 + number, "error: interrupted\n")
    expected = {"status": "error", "code": 128 + number, "error": "interrupted", "message": "interrupted"}
    assert json.loads(process.stdout) == expected


def test_second_ctrl_c_during_exit_kills_the_process():
    """Check that no traceback follows the error line, as it would with Python's own signal handler."""
    script = """
        import atexit, os, signal, sys, time
        from distillm_cli.__main__ import main
        from distillm_cli.config import load
        def press():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        load.shipped = press
        sys.argv[1:] = ["recipes", "ls"]
        code = main()
        atexit.register(press)
        sys.exit(code)
    """
    terminal, end = os.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=env, stderr=end, timeout=30)
    assert (process.returncode, os.read(terminal, 4096)) == (-signal.SIGINT, b"error: interrupted\r\n")
    os.close(terminal)
    os.close(end)


def test_earlier_signal_does_not_affect_another_thread(run, monkeypatch):
    from distillm_cli.config import load

    def press():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    with monkeypatch.context() as changed:
        changed.setattr(load, "shipped", press)
        assert run("recipes", "ls")[0] == 130
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run("recipes", "show", "nothing")[0]))
    thread.start()
    thread.join()
    assert codes == [2]


@pytest.mark.parametrize("number", [signal.SIGINT, long(signal.SIGTERM)])
@pytest.mark.parametrize(
    "does",
    [
        "try: press()\nexcept BaseException: raise SystemExit('imported twice')",  # as modules with optional parts do
        "press(); press(); time.sleep(60)",
        "press(); raise ImportError('a part is missing')",
    ],
    ids=["waits", "twice", "fails"],
)
def test_signal_during_an_import_is_not_lost(does, number, tmp_path):
    module = f"""
        import os, time
        def press():
            os.kill(os.getpid(), {int(number)})
            [0 for _ in range(1000)]
    """
    (tmp_path / "slow.py").write_text(textwrap.dedent(module) + does + "\n", encoding="utf-8")
    script = """
        import sys, time
        from distillm_cli.cli import app
        from distillm_cli.config import load
        def shipped():
            import slow
            time.sleep(10)
            print("not stopped")
        load.shipped = shipped
        sys.exit(app.main(["recipes", "ls"]))
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    assert (process.returncode, process.stdout, process.stderr) == (128 + number, "", "error: interrupted\n")


@pytest.mark.parametrize(
    "argv", ["recipes ls", "recipes ls --json", "recipes show g2p", "methods", "--help", "nothing"]
)
@pytest.mark.parametrize("closed", ["1", long("012")])
def test_closed_streams_are_not_an_error(argv, closed):
    redirections = " ".join(f"{stream}>&-" for stream in closed)
    command = ["bash", "-c", f'exec "$@" {redirections}', "bash", sys.executable, "-m", "distillm_cli", *argv.split()]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stdout) == (2 if argv == "nothing" else 0, "")
    assert len(process.stderr.splitlines()) == (argv == "nothing" and closed == "1")


@pytest.mark.parametrize("words", ["methods", "methods show minillm", "distill --help"])
@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["latin-1", "C"],
)
def test_unencodable_characters_are_escaped(words, environment):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    env |= {"PYTHONPATH": str(ROOT), **environment}
    argv = [sys.executable, "-m", "distillm_cli", *words.split()]
    process = subprocess.run(argv, env=env, capture_output=True, encoding="latin-1", timeout=60)
    assert (process.returncode, process.stderr) == (0, "")
    assert "\\u03b" in process.stdout or "\\u226" in process.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_full_disk_on_stdout_is_a_storage_error():
    with Path("/dev/full").open("w") as full:
        script = "import sys; from distillm_cli.cli.app import main; sys.exit(main(['recipes', 'ls']))"
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.run(
            [sys.executable, "-c", script], env=env, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert process.returncode == 8
    assert process.stderr.startswith("error: cannot write the result to standard output: No space left on device; ")


# --- recipes ----------------------------------------------------------------------------------------------------


def test_recipes_ls_prints_a_table_or_json(run):
    code, out, _ = run("recipes", "ls")
    rows = [line.split("\t") for line in out.splitlines()]
    assert code == 0
    assert [row[0] for row in rows] == list(shipped())
    assert all(row[2].startswith("distillm ") for row in rows)
    _, out, _ = run("recipes", "ls", "--json")
    result = json.loads(out)
    assert (result["command"], result["status"]) == ("recipes ls", "ok")
    assert [row["name"] for row in result["recipes"]] == list(shipped())


def test_recipes_show_prints_the_file(run):
    assert run("recipes", "show", "quickstart") == (0, shipped()["quickstart"].read_text(encoding="utf-8"), "")


def test_recipes_cp_copies_and_never_overwrites(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = shipped()["g2p"].read_bytes()
    assert run("recipes", "cp", "g2p") == (0, "g2p.yaml\n", "")
    assert run("recipes", "cp", "g2p", "my.yaml") == (0, "my.yaml\n", "")
    (tmp_path / "sub").mkdir()
    assert run("recipes", "cp", "g2p", "sub")[0] == 0
    for copy in ("g2p.yaml", "my.yaml", "sub/g2p.yaml"):
        assert (tmp_path / copy).read_bytes() == text

    (tmp_path / "my.yaml").write_text("mine")
    outcome = run("recipes", "cp", "g2p", "my.yaml", "--debug")
    assert outcome[1] == ""
    assert_error_line(outcome, "usage.output_exists", "my.yaml")
    assert (tmp_path / "my.yaml").read_text() == "mine"
    assert_error_line(run("recipes", "cp", "g2p", "x" * 300, "--debug"), "storage.failed", "x" * 300)
    assert_error_line(run("recipes", "cp", "g2p", "gone/", "--debug"), "usage.no_directory", "gone")


def test_recipes_validate_reports_every_invalid_recipe(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("train: {lr: fast}\n")
    (tmp_path / "b.yaml").write_text("trian: {}\n")
    (tmp_path / "c.yaml").write_text("train:\n  lr: fast\n  warmup: -1\ndata:\n  sorce: x\n")
    code, out, _ = run("recipes", "validate")
    assert (code, out.splitlines()) == (0, [f"{name}\tok" for name in shipped()]), "all of them by default"

    code, out, err = run("recipes", "validate", "a.yaml", "quickstart", "b.yaml")
    assert (code, out) == (2, "quickstart\tok\n")
    assert err.splitlines() == [
        "error: a.yaml:1: train.lr = fast; expected a number > 0, or auto; try --set train.lr=auto",
        "error: b.yaml:1: trian: no such key; did you mean train?",
    ]
    code, out, _ = run("recipes", "validate", "a.yaml", "quickstart", "--json")
    result = json.loads(out)
    assert (code, result["status"], result["code"]) == (2, "error", 2)
    assert [row["status"] for row in result["recipes"]] == ["error", "ok"]
    err = run("recipes", "validate", "c.yaml")[2]
    assert [" ".join(line.split()[1:3]) for line in err.splitlines()] == [
        "c.yaml:2: train.lr",
        "c.yaml:3: train.warmup",
        "c.yaml:5: data.sorce:",
    ]
