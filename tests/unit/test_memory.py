"""When the program looks for garbage: not while it imports, and as ever once it holds weights."""

import gc
import json
import subprocess
import sys
import textwrap

import pytest

from distillm_cli.cli.app import main
from distillm_cli.utils import memory
from tests import tiny

# What holds weights is told by the collector itself: a cycle that nothing else knows of is gone after the next search.
SCRIPT = """
    import gc, sys, weakref
    from distillm_cli.__main__ import main
    from distillm_cli.utils import memory

    seen = []
    inner = memory.resume_garbage_collection

    def resume():
        before = gc.isenabled()
        inner()

        class Knot:
            pass

        knot = Knot()
        knot.itself, gone = knot, weakref.ref(knot)
        del knot
        gc.collect()
        seen.append((before, gc.isenabled(), gc.get_freeze_count() > 100_000, gone() is None))

    memory.resume_garbage_collection = resume
    sys.argv[1:] = {argv!r}
    print("exit", main(), seen)
"""


def started(*argv):
    """Return what ``distillm ARGV`` printed last: its exit code, and the collector before and after it is resumed."""
    script = textwrap.dedent(SCRIPT).replace("{argv!r}", repr([str(a) for a in argv]))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    return done.stdout.splitlines()[-1] if done.stdout else done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model and a few rows."""
    place = tmp_path_factory.mktemp("garbage")
    tiny.save(place / "model")
    rows = [{"prompt": f"{a} {b}", "output": f"{b} {a}"} for a in "abcde" for b in "fghij"]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.mark.parametrize("verb", ["distill", "eval", "plan"])
def test_nothing_is_searched_until_everything_is_imported_and_then_it_is(place, tmp_path, verb):
    model, rows = place / "model", place / "rows.jsonl"
    argv = {
        "distill": ["--teacher", model, "--student", model, "--data", rows, "--steps", 1, "--output", tmp_path / "out"],
        "eval": [model, "--suite", rows, "--output", tmp_path / "out"],
        "plan": ["--teacher", model, "--student", model, "--data", rows],
    }[verb]
    said = started(verb, *argv)
    assert said.startswith("exit 0 [(False, True, True, True)"), said


def test_whoever_calls_the_program_from_python_keeps_his_collector():
    frozen = gc.get_freeze_count()
    assert main(["methods", "--json"]) == 0
    memory.resume_garbage_collection()
    assert gc.isenabled()
    assert gc.get_freeze_count() <= frozen  # some of what was set aside before may have gone


def test_a_collector_that_is_switched_off_stays_so():
    gc.disable()
    try:
        memory.pause_garbage_collection()
        memory.resume_garbage_collection()
        assert not gc.isenabled()
    finally:
        gc.enable()
