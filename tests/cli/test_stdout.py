"""Check that results go to stdout, also with ``--quiet``, and logs to stderr."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distillm_cli.cli.app import main

BORDERS = "─│╭╮╰╯├┤\x1b"
SMALL = ("--device", "cpu", "--dtype", "fp32")


@pytest.fixture
def cli(tmp_path, capfd, monkeypatch):
    """Run a command line in a directory with rows. Return (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Mix up {word}", "output": word[::-1]} for word in ("abc", "toe", "vyq")]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*argv):
        capfd.readouterr()
        code = main([str(word) for word in argv])
        out, err = capfd.readouterr()
        return code, out, err

    return run


def test_plan_prints_plain_tables_on_stdout(cli):
    code, out, err = cli("plan", "--recipe", "quickstart", *SMALL)
    assert code == 0
    assert "peak" in out
    assert "peak" not in err
    assert not set(BORDERS) & set(out.partition("One batch")[0])
    assert all(line == line.rstrip() for line in out.splitlines())


def test_plan_prints_tables_on_stderr_with_json(cli):
    code, out, err = cli("plan", "--recipe", "quickstart", *SMALL, "--json")
    assert code == 0
    assert json.loads(out)["command"] == "plan"
    assert "peak" in err


def test_quiet_eval_prints_only_scores(cli):
    suite = ("--suite", "rows.jsonl", "--max-new-tokens", 4, "--greedy", "--metric", "exact_match")
    suite = (*suite, "--set", "data.template=exact")
    code, out, err = cli("eval", "builtin", *suite, "--output", "scores", *SMALL, "--quiet")
    assert (code, err) == (0, "")
    path = next(Path("scores").rglob("results.json"))
    score = json.loads(path.read_text())["exact_match"]["mean"]
    title, _heading, row = (line.split() for line in out.splitlines())
    assert title == ["Scores"]
    assert row[1:3] == ["3", f"{score:.2f}"]
