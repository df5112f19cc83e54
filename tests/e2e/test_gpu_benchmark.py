"""Test the script of ``benchmarks/gpu`` as a dry run on a CPU."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

RUN = ROOT / "benchmarks" / "gpu" / "run.sh"


def results(out, *options, **environment):
    command = [str(RUN), "--tiny", "--out", str(out), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable} | environment
    )
    assert done.returncode == 0, done.stderr
    page = (out / "RESULTS.md").read_text(encoding="utf-8")
    return json.loads((out / "results.json").read_text())["parts"], page


@pytest.mark.long
def test_dry_run_measures_every_part(tmp_path):
    names = ("machine", "losses", "steps", "rollouts", "whole_runs", "features")
    parts, page = results(tmp_path, "--parts", *names, "--seconds", "1200")
    assert {name: part["state"] for name, part in parts.items()} == dict.fromkeys(names, "done")
    measured = [row for row in parts["losses"]["rows"] if row.get("loss", "").startswith("ours")]
    assert {row["loss"].split(", ")[1] for row in measured} >= {"skl", "kl", "akl"}
    assert all(row["difference"] == 0 for row in measured)  # eager is the plain loss
    steps = [row for row in parts["steps"]["rows"] if "step" in row]
    same = [row["loss"] for row in steps if row["group"] == steps[0]["group"]]
    assert same == pytest.approx([same[0]] * len(same), rel=0.02)  # the usual step has the same loss
    assert "needs a GPU" in page


def test_parts_without_time_are_named(tmp_path):
    parts, page = results(tmp_path, "--parts", "rollouts", "machine", "--seconds", "9")
    assert {part["state"] for part in parts.values()} == {"skipped: no time left"}
    assert "| machine | skipped: no time left |" in page


def test_part_out_of_time_keeps_its_rows(tmp_path):
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, str(RUN.with_name("run.py")), "--part", "machine", "--rows", str(rows), "--tiny"]
    subprocess.run([*command, "--seconds", "0"], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    first, *_, last = map(json.loads, rows.read_text().splitlines())
    assert first["group"] == "device"
    assert last == {"skipped": "out of time"}


@pytest.mark.long
def test_part_that_fails_is_recorded(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['transformers'] = None\n")
    parts, page = results(tmp_path, "--parts", "rollouts", "machine", PYTHONPATH=str(tmp_path))
    assert parts["rollouts"]["state"].startswith("failed: ")
    assert parts["machine"]["state"] == "done"
    assert "| machine | done |" in page
