"""Test ``distillm report`` on the command line."""

import csv
import io
import json

import pytest

from distillm_cli.cli.app import main
from tests.command_line import assert_error, call
from tests.recorded_runs import write_run


@pytest.fixture
def runs(tmp_path):
    for alpha in (0.1, 0.3):
        write_run(tmp_path / f"runs/a{alpha}", f"objective.alpha={alpha}", exact_match=100 * alpha)
    return tmp_path / "runs"


def printed(capsys, *argv):
    assert main([str(a) for a in argv]) == 0
    return capsys.readouterr().out


def test_report_prints_a_table_with_the_best_marked(runs, capsys):
    out = printed(capsys, "report", runs, "--sort", "exact_match")
    head, first, second = out.splitlines()[1:4]
    assert head.split()[:2] == ["run", "objective.alpha"]
    assert first.startswith("a0.3")
    assert "* 30.00" in first
    assert "* 10.00" not in second


def test_report_of_one_run_compares_before_and_after(runs, capsys):
    out = printed(capsys, "report", runs / "a0.1")
    assert "student before" in out
    assert "student after" in out


def test_formats_have_the_same_figures(runs, capsys):
    rows = list(csv.DictReader(io.StringIO(printed(capsys, "report", runs, "--csv"))))
    found = json.loads(printed(capsys, "report", runs, "--json"))
    lines = printed(capsys, "report", runs, "--md").splitlines()
    for row, group, line in zip(rows, found["groups"], lines[2:], strict=True):
        assert float(row["exact_match"]) == group["scores"]["exact_match"]["mean"]
        assert f"{float(row['exact_match']):.2f}" in line
    assert found["settings"] == ["objective.alpha"]


def test_one_format_at_a_time(runs, capsys):
    assert_error(call(capsys, "report", runs, "--csv", "--json"), "usage.exclusive_options", "--csv")


def test_number_of_rows_is_checked(runs, capsys):
    assert_error(call(capsys, "report", runs, "--rows", "-1", "--json"), "usage.invalid_value", "--rows")


def test_nothing_to_report_is_an_error(tmp_path, capsys):
    assert_error(call(capsys, "report", tmp_path, "--json"), "usage.no_runs", tmp_path)


def test_plots_without_their_library_name_the_extra(runs, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    assert_error(call(capsys, "report", runs, "--plots", "--json"), "usage.missing_package", "distillm[report]")
