"""Test garbage collection: paused during imports, enabled with objects frozen once models are loaded."""

import gc
import json
import subprocess
import sys
import textwrap

import pytest

from distillm_cli.cli.app import main
from distillm_cli.utils import memory
from tests import tiny

# The script checks collection with an unreachable cycle, which the next collection must free.
SCRIPT = """
    import gc, sys, weakref
    from distillm_cli.__main__ import main
    from distillm_cli.utils import memory

    seen = []
    inner = memory.resume_garbage_collection

    def resume():
        before = gc.isenabled()
        inner()

        class Cycle:
            pass

        cycle = Cycle()
        cycle.itself, reference = cycle, weakref.ref(cycle)
        del cycle
        gc.collect()
        seen.append((before, gc.isenabled(), gc.get_freeze_count() > 100_000, reference() is None))

    memory.resume_garbage_collection = resume
    sys.argv[1:] = {argv!r}
    print("exit", main(), seen)
"""


def last_line_of(*argv):
    """Return the last line that ``distillm ARGV`` printed: exit code, and collector state around its resumption."""
    script = textwrap.dedent(SCRIPT).replace("{argv!r}", repr([str(a) for a in argv]))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    return done.stdout.splitlines()[-1] if done.stdout else done.stderr


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Return a directory with a model and a few rows."""
    directory = tmp_path_factory.mktemp("garbage")
    tiny.save(directory / "model")
    rows = [{"prompt": f"{a} {b}", "output": f"{b} {a}"} for a in "abcde" for b in "fghij"]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.mark.long
@pytest.mark.parametrize("verb", ["distill", "eval", "plan"])
def test_garbage_collection_resumes_after_imports(directory, tmp_path, verb):
    model, rows = directory / "model", directory / "rows.jsonl"
    argv = {
        "distill": ["--teacher", model, "--student", model, "--data", rows, "--steps", 1, "--output", tmp_path / "out"],
        "eval": [model, "--suite", rows, "--output", tmp_path / "out"],
        "plan": ["--teacher", model, "--student", model, "--data", rows],
    }[verb]
    line = last_line_of(verb, *argv)
    assert line.startswith("exit 0 [(False, True, True, True)"), line


def test_main_from_python_does_not_change_the_collector():
    frozen = gc.get_freeze_count()
    assert main(["methods", "--json"]) == 0
    memory.resume_garbage_collection()
    assert gc.isenabled()
    assert gc.get_freeze_count() <= frozen  # some frozen objects may have been freed meanwhile


def test_disabled_collector_stays_disabled():
    gc.disable()
    try:
        memory.pause_garbage_collection()
        memory.resume_garbage_collection()
        assert not gc.isenabled()
    finally:
        gc.enable()
