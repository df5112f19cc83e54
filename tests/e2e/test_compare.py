"""Test ``distill --compare``: the baselines are the runs that a user would type."""

import json
import shutil

import pytest

from distillm_cli.cli.app import main
from distillm_cli.runs.compare import gap
from tests.e2e.test_main_job import SMALL
from tests.e2e.test_resume_changes import equal_weights, weights, workdir  # noqa: F401  a fixture

PAIR = ["--teacher", "teacher", "--student", "random:1x24", "--data", "data", *SMALL]
RUN = [
    "distill",
    *PAIR,
    "--alpha",
    "0.2",
    "--schedule",
    "mixed",
    "--set",
    "train.eval_steps=3",
]


@pytest.fixture
def compared(cli, workdir):  # noqa: F811
    code, result, err = cli(*RUN, "--steps", "8", "--output", "run", "--compare")
    assert code == 0, err
    return result, err


def test_baselines_equal_runs_typed_by_hand(cli, workdir, compared):  # noqa: F811
    result, _ = compared
    sft, off_policy = result["baselines"]
    progress = json.loads((workdir / "run/checkpoints/step-000008/state.json").read_text())["progress"]
    mean = progress["source_seconds"]["dataset"] / result["dataset_steps"]
    steps = round(result["train_s"] / mean)
    assert sft["steps"] == off_policy["steps"] == steps > 8
    every = ["--set", f"train.eval_steps={max(round(3 * steps / 8), 1)}"]
    same = ["--steps", str(steps), "--schedule", "off", *every]
    for output, more in (
        ("off-policy", ["--alpha", "0.2"]),
        ("sft", ["--set", "objective.kd_weight=0", "--set", "train.select=valid_loss"]),
    ):
        select = result["baselines"][output != "sft"]
        code, typed, err = cli("distill", *PAIR, *same, *more, "--output", output)
        assert code == 0, err
        assert equal_weights(weights(workdir / output), weights(workdir / "run/compare" / output))
        assert select["figures"] == typed["report"]["student_after"]
    assert json.loads((workdir / "run/result.json").read_text())["baselines"] == result["baselines"]


@pytest.mark.long
def test_comparison_resumes(cli, workdir, compared):  # noqa: F811
    """Check a run that was interrupted after the first baseline."""
    result, _ = compared
    before = weights(workdir / "run/compare/off-policy")
    shutil.rmtree(workdir / "run/compare/off-policy")
    code, resumed, err = cli("distill", "--output", "run", "--resume", "--compare", "--json", "--quiet")
    assert code == 0, err
    assert equal_weights(before, weights(workdir / "run/compare/off-policy"))
    assert [b["figures"] for b in resumed["baselines"]] == [b["figures"] for b in result["baselines"]]


@pytest.mark.long
def test_overwrite_replaces_the_baselines(cli, workdir, compared):  # noqa: F811
    (workdir / "run/compare/sft/mine.txt").write_text("mine")
    code, result, err = cli(*RUN, "--steps", "6", "--output", "run", "--compare", "--overwrite")
    assert (code, len(result["baselines"])) == (0, 2), err
    assert (workdir / "run/compare/sft/mine.txt").read_text() == "mine"


def test_table_has_the_baselines_before_the_student(capsys, workdir):  # noqa: F811
    argv = [word for word in RUN if word not in ("--json", "--quiet")]
    assert main([*argv, "--steps", "6", "--output", "run", "--compare"]) == 0
    lines = [line.split(",")[0].strip() for line in capsys.readouterr().out.splitlines()]
    start = lines.index("student before")
    assert lines[start : start + 4] == ["student before", "sft", "off-policy", "student after"]


@pytest.mark.long
def test_baselines_of_a_run_with_fine_tuning(cli, workdir):  # noqa: F811
    """Check that off-policy starts after the fine-tuning, and that SFT has its steps in addition."""
    code, result, err = cli(*RUN, "--set", "student.sft_epochs=1", "--steps", "4", "--output", "run", "--compare")
    assert code == 0, err
    sft, off_policy = result["baselines"]
    stage = json.loads((workdir / "run/sft/result.json").read_text())
    assert sft["steps"] == off_policy["steps"] + stage["steps"]
    start = json.loads((workdir / "run/compare/off-policy/result.json").read_text())["report"]["student_before"]
    assert start["valid_loss"] == pytest.approx(stage["report"]["student_after"]["valid_loss"], rel=1e-5)


def test_run_on_rows_has_one_baseline(cli, workdir):  # noqa: F811
    code, result, err = cli("distill", "--method", "kd", *PAIR, "--steps", "4", "--output", "run", "--compare")
    assert code == 0, err
    assert [baseline["name"] for baseline in result["baselines"]] == ["sft"]


@pytest.mark.parametrize(
    ("metric", "teacher", "expected"),
    [
        (
            "exact_match",
            80.0,
            "Of the gap in exact match between sft and the teacher, closed: off-policy 25%, this run 75%.",
        ),
        ("exact_match", 40.0, None),
        (
            "error_rate",
            0.0,
            "Of the gap in error rate between sft and the teacher, closed: off-policy -25%, this run -75%.",
        ),
    ],
)
def test_share_of_the_gap(metric, teacher, expected):
    sft, off_policy, after = ({"valid_loss": 1.0, metric: value} for value in (40.0, 50.0, 70.0))
    baselines = {"sft": sft, "off-policy": off_policy}
    assert gap(baselines, after, {"valid_loss": 0.5, metric: teacher}) == expected
