"""Test that output directories are read, grouped and compared, whatever state they are in."""

import json
import statistics
from pathlib import Path

import pytest

from distillm_cli.runs.recorded_run import RecordedRun, Unreadable, find_runs, read_run
from distillm_cli.runs.report_page import chosen_settings
from distillm_cli.runs.report_runs import ReportOptions, report_runs
from distillm_cli.runs.run_groups import differing_settings
from distillm_cli.training.events import Warned, silent
from distillm_cli.ui.report_tables import report_csv, report_markdown
from tests.codes import raises_code
from tests.recorded_runs import write_evaluation, write_run


@pytest.fixture
def sweep(tmp_path):
    """Write runs with two values of α and two seeds each. Return their directory."""
    for alpha, scores in ((0.1, (10.0, 14.0)), (0.3, (20.0, 30.0))):
        for seed, score in enumerate(scores):
            sets = (f"objective.alpha={alpha}", f"train.seed={seed}")
            write_run(
                tmp_path / f"runs/a{alpha}-s{seed}", *sets, seconds=10 + alpha, exact_match=score, error_rate=score
            )
    return tmp_path / "runs"


def report(*paths, **options):
    return report_runs([Path(path) for path in paths], ReportOptions(**options), silent)


def test_runs_that_differ_in_seed_are_one_group(sweep):
    result = report(sweep)
    assert result.settings == ("objective.alpha",)
    assert [group.settings["objective.alpha"] for group in result.groups] == [0.1, 0.3]
    assert [group.seeds for group in result.groups] == [(0, 1), (0, 1)]
    score = result.groups[1].scores["exact_match"]
    assert (score.mean, score.sd, score.runs) == (25.0, statistics.stdev([20.0, 30.0]), 2)
    assert result.groups[0].rollouts == 30 / 40
    assert result.best["exact_match"] == {1}
    assert result.best["error_rate"] == {0}  # lower is better
    assert result.best["valid_loss"] == {0, 1}


@pytest.mark.parametrize(
    ("column", "first"), [("exact_match", 0.3), ("error_rate", 0.1), ("seconds", 0.1), ("tokens_per_s", 0.1)]
)
def test_sort_puts_the_best_first(sweep, column, first):
    assert report(sweep, sort=column).groups[0].settings["objective.alpha"] == first


def test_sort_by_setting_is_numeric(tmp_path):
    for lr in (9e-4, 1e-3, 1e-2):
        write_run(tmp_path / f"runs/{lr}", f"train.lr={lr}")
    groups = report(*sorted((tmp_path / "runs").iterdir(), reverse=True), sort="train.lr").groups
    assert [group.settings["train.lr"] for group in groups] == [9e-4, 1e-3, 1e-2]


def test_unknown_column_names_the_columns(sweep):
    with raises_code("usage.unknown_column", "exact", "error_rate"):
        report(sweep, sort="exact")


def test_scores_of_suites_have_their_settings_and_seeds(tmp_path):
    run = write_run(tmp_path / "run")
    write_evaluation(run, "dolly", "t1", "rouge_l", 20.0, 24.0)
    (run / "eval/dolly/greedy").mkdir()
    (run / "eval/dolly/greedy/results.json").write_text("{")
    found = read_run(run)
    assert found.scores["dolly/t1 rouge_l"].mean == 22.0
    assert found.scores["dolly/t1 rouge_l"].seeds == 2
    assert found.notes == ("eval/dolly/greedy/results.json is damaged",)


def test_setting_of_another_version_equals_the_default(tmp_path):
    old, new = write_run(tmp_path / "old"), write_run(tmp_path / "new")
    text = (old / "recipe.yaml").read_text()
    assert "  bulk:" in text
    shortened = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("  bulk:"))
    (old / "recipe.yaml").write_text(shortened.replace("# Written by distillm ", "# Written by distillm 0.0.1+", 1))
    runs = [read_run(old), read_run(new)]
    assert differing_settings(runs) == []
    assert "0.0.1+" in runs[0].notes[0]
    assert runs[0].setting("rollout.bulk") == runs[1].setting("rollout.bulk")


def test_edited_recipe_is_read_as_yaml(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "recipe.yaml").write_text('method: distillm\ntrain: {seed: 3,\n   lr: 5e-4}\nteacher:\n    path: "a: b"\n')
    found = read_run(run)
    assert (found.setting("train.seed"), found.setting("train.lr"), found.setting("teacher.path")) == (3, 5e-4, "a: b")


def bad_directories(place: Path) -> dict[str, str]:
    """Make directories that are not runs; return a part of the reason by name."""
    for name in ("empty", "foreign", "pipeline", "damaged", "latin1", "model"):
        (place / name).mkdir(parents=True)
    (place / "foreign/notes.txt").write_text("x")
    (place / "pipeline/recipe.yaml").write_text("stages: {}\n")
    (place / "damaged/recipe.yaml").write_text("train: [\n")
    (place / "latin1/recipe.yaml").write_bytes(b"method: \xff\n")
    (place / "model/config.json").write_text("{}")
    (place / "file").write_text("x")
    return {
        "empty": "is empty",
        "foreign": "no recipe.yaml",
        "pipeline": "pipeline",
        "damaged": "damaged recipe.yaml",
        "latin1": "not UTF-8",
        "model": "is a model without",
        "file": "is a file",
        "absent": "does not exist",
    }


def test_what_is_not_a_run_is_named_and_the_rest_shown(tmp_path):
    reasons = bad_directories(tmp_path / "bad")
    run = write_run(tmp_path / "good", exact_match=5.0)
    unfinished = write_run(tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    with (unfinished / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    half = write_run(tmp_path / "half")
    (half / "result.json").write_text('{"steps": 3')
    said: list[str] = []
    paths = [run, unfinished, half, *(tmp_path / "bad" / name for name in reasons)]
    result = report_runs(
        paths, ReportOptions(), lambda event: said.append(event.text) if isinstance(event, Warned) else None
    )
    assert sum(len(group.names) for group in result.groups) == 3
    skipped = {Path(path).name: why for path, why in result.skipped}
    assert skipped.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in skipped[name]
        assert any(name in text and reason in text for text in said)
    notes = dict(result.notes)
    assert notes[str(unfinished)] == "unfinished, at step 40"
    assert sum(group.unfinished for group in result.groups) == 2


def test_no_run_at_all_is_an_error(tmp_path):
    bad_directories(tmp_path / "bad")
    with raises_code("usage.no_runs", "is empty", "1 other path"):
        report(tmp_path / "bad/empty", tmp_path / "absent")


def test_warnings_about_many_paths_are_few(tmp_path):
    write_run(tmp_path / "run")
    said: list[str] = []
    paths = [tmp_path / "run", *(tmp_path / f"absent{i}" for i in range(500))]
    result = report_runs(paths, ReportOptions(), lambda event: said.append(event.text))
    assert len(result.skipped) == 500
    assert len(said) == 11
    assert "490 more" in said[-1]


def test_runs_are_found_once_and_in_order(sweep):
    found = list(find_runs([sweep / "a0.3-s0", sweep, sweep / "a0.3-s0"]))
    assert [run.path.name for run in found] == ["a0.3-s0", "a0.1-s0", "a0.1-s1", "a0.3-s1"]
    assert all(isinstance(run, RecordedRun) for run in found)
    assert isinstance(next(find_runs([sweep / "nothing"])), Unreadable)


def test_csv_and_markdown_cannot_be_broken_by_values(tmp_path):
    for name, template in (("=1+1", "plain"), ("b", "alpaca")):
        write_run(
            tmp_path / f"runs/{name}",
            f"data.template={template}",
            'teacher.path=a|b"c' if name == "b" else "method=gkd",
        )
    result = report(tmp_path / "runs")
    rows = report_csv(result).splitlines()
    assert rows[1].startswith("'=1+1,")
    assert all(
        line.replace("\\|", "").count("|") == report_markdown(result).splitlines()[0].count("|")
        for line in report_markdown(result).splitlines()
    )


def test_chosen_settings_have_their_origin(tmp_path):
    run = write_run(tmp_path / "run", "objective.alpha=0.25")
    chosen = {key: (value, origin) for key, value, origin in chosen_settings((run / "recipe.yaml").read_text())}
    value, origin = chosen["objective.alpha"]
    assert value == "0.25"
    assert origin.startswith("--set")
    assert chosen["student.path"] == ("'random:2x96'", "quickstart.yaml:8")
    assert "teacher.cache" not in chosen


def test_json_object_is_complete(sweep):
    found = json.loads(json.dumps(report(sweep).as_json()))
    assert [group["best"] for group in found["groups"]] == [["valid_loss", "error_rate"], ["valid_loss", "exact_match"]]
    assert found["groups"][0]["runs"] == [str(sweep / "a0.1-s0"), str(sweep / "a0.1-s1")]
