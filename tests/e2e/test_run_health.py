"""Test runs whose health is measured, and runs that an alarm stops, by command line."""

import json

import pytest

from distillm_cli.training.checkpoint import read_checkpoint, visible
from tests import tiny
from tests.command_line import assert_error

WORDS = ["one", "two", "six", "ten", "red", "blue", "green", "gray"]


@pytest.fixture
def distill(cli, tmp_path):
    """Return a function that distills one tiny model into another, on the student's outputs."""
    rows = [{"instruction": f"{WORDS[i % 8]} {i}", "output": WORDS[-1 - i % 8] * 2} for i in range(32)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    models = ["--teacher", tiny.save(tmp_path / "t", "llama", seed=1), "--student", tiny.save(tmp_path / "s", "llama")]

    def run(output, *words, **fields):
        fields = {
            "data.template": "plain", "train.threads": 1, "eval.report_rows": 0, "train.eval_steps": 20,
            "train.batch_size": 4, "data.valid_limit": 4, **fields,
        }  # fmt: skip
        sets = [word for key, value in fields.items() for word in ("--set", f"{key}={value}")]
        device = ["--device", "cpu", "--dtype", "fp32"]
        data = ["--data", tmp_path / "rows.jsonl"]
        return cli("distill", *models, *data, *device, "--output", output, "--json", *sets, *words)

    return run


def lines(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_alarm_stops_a_run_that_can_be_resumed(distill, tmp_path):
    run = tmp_path / "run"
    cut = {"rollout.max_new_tokens": 2, "schedule.kind": "on", "train.save_steps": 1000}
    assert_error(distill(run, "--steps", 40, "--on-alarm", "stop", **cut), "alarm.stopped", "outputs_cut", "--resume")
    *_, last = lines(run)
    assert (last["alarm"], last["message"], bool(last["cure"])) == (
        "outputs_cut", "most student outputs are cut before they end: 100%", True
    )  # fmt: skip
    assert [path.name for path in visible(run / "checkpoints")] == [f"step-{last['step']:06d}"]

    code, result, err = distill(run, "--steps", 40, "--resume", "--on-alarm", "stop", **cut)
    assert code == 0, err
    assert result["steps"] == 40
    assert [alarm["alarm"] for alarm in result["alarms"]] == ["outputs_cut"], "it is not raised again"
    assert [line["alarm"] for line in lines(run) if "alarm" in line] == ["outputs_cut"]
    kept = visible(run / "checkpoints")
    assert [path.name for path in kept] == [f"step-{last['step']:06d}", "step-000040"]
    assert read_checkpoint(kept[0]).tensors, "the checkpoint of the alarm is whole"


def test_measuring_changes_no_step(distill, tmp_path):
    runs = {}
    schedule = {"schedule.kind": "mixed", "schedule.replay": "constant", "schedule.capacity": 8}
    for every in (0, 1):
        output = tmp_path / f"every-{every}"
        code, result, err = distill(
            output, "--steps", 12, **{"train.health_every": every, "train.eval_steps": 6, **schedule}
        )
        assert code == 0, err
        runs[every] = lines(output), (output / "model.safetensors").read_bytes(), result["teacher_tokens"]
    plain, measured = runs[0], runs[1]
    assert measured[1:] == plain[1:]
    figures = ("step", "source", "loss", "grad_norm", "valid_loss")
    assert [[line.get(key) for key in figures] for line in measured[0]] == [
        [line.get(key) for key in figures] for line in plain[0]
    ]
    steps = [line for line in measured[0] if "loss" in line]
    assert all(0 < line["acceptance"] <= 1 for line in steps)
    assert all("acceptance" not in line for line in plain[0])
    validations = [line for line in measured[0] if "valid_loss" in line]
    assert all(line["kl_teacher_student"] > 0 for line in validations)
    assert {line["source"] for line in steps} == {"dataset", "rollout", "replay"}
    assert all(("rollout_length" in line) == (line["source"] != "dataset") for line in steps)
    ages = {line["step"]: line.get("replay_age") for line in steps if line["source"] == "replay"}
    assert all(1 <= age < step for step, age in ages.items())
