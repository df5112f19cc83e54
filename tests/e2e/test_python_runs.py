"""Test runs called from Python: they return what the command line prints, and print nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distillm_cli.config.load import resolve
from distillm_cli.runs.eval import evaluate_checkpoints
from distillm_cli.runs.generate import generate_responses
from distillm_cli.runs.inference import Settings
from distillm_cli.runs.prompt_source import PromptSource
from distillm_cli.runs.run_results import FineTuned, Generated
from distillm_cli.runs.start import TrainOptions, start_training
from distillm_cli.training.events import Note, Progress, RunEnded, RunStarted, Saved, Stepped, Validated
from tests.codes import raises_code
from tests.command_line import call

SETS = [
    "teacher.path=builtin", "student.path=random:1x32", "data.source=builtin", "data.size=120", "data.valid_limit=12",
    "data.template=plain", "data.max_length=64", "data.max_prompt_length=40", "train.steps=6", "train.batch_size=4",
    "train.lr=3e-3", "train.eval_steps=3", "train.save_steps=3", "train.threads=1", "train.device=cpu",
    "student.dtype=fp32", "schedule.phi=0.5", "rollout.max_new_tokens=12", "eval.report_rows=6", "eval.max_new_tokens=8",
]  # fmt: skip
EVAL_SETS = ["eval.limit=6", "eval.seeds=[1,2]", "eval.max_new_tokens=8", "train.threads=1", "train.device=cpu"]
TIMES = {"wall_s", "train_s", "tokens_per_s", "seconds"}


def flags(sets):
    return [word for text in sets for word in ("--set", text)]


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return value


def as_json(result):
    return without_times(json.loads(json.dumps(result.as_json())))


def distill(output, listener, *more, **options):
    resolved = resolve(command="distill", sets=[*SETS, *more])
    return start_training("distill", resolved, Path(output), listener, TrainOptions(**options))


@pytest.fixture
def trained(tmp_path, monkeypatch, capfd):
    """Distill into ``a`` from Python. Return the result and the events."""
    monkeypatch.chdir(tmp_path)
    events = []
    result = distill("a", events.append)
    assert capfd.readouterr() == ("", "")
    return result, events


def test_distillation_result_matches_command_line(trained, capfd):
    result, events = trained
    code, printed, _ = call(capfd, "distill", *flags(SETS), "--output", "b", "--json", "--quiet")
    assert code == 0
    assert as_json(result) | {"output": "b"} == without_times(printed)
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()
    assert result.steps == 6
    assert result.rollout_steps > 0
    assert [event.step for event in events if isinstance(event, Stepped)] == [1, 2, 3, 4, 5, 6]
    assert [event.path for event in events if isinstance(event, Saved)][-1] == "a/checkpoints/step-000006"
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    assert (started.steps, started.method) == (6, "distillm")
    assert {Validated, RunEnded, Note, Progress} <= {type(event) for event in events}
    losses = {outcome.name: outcome.valid_loss for outcome in result.summary.outcomes}
    assert losses["student after, step 6"] == result.valid_loss == result.report["student_after"]["valid_loss"]
    assert len(result.summary.samples) == 3
    assert sum(result.summary.sources.values()) == 6


def test_used_output_is_an_error_and_resume_works(trained, capfd):
    result, _ = trained
    with raises_code("usage.output_exists"):
        distill("a", lambda event: None)
    resumed = distill("a", lambda event: None, resume=True)
    assert resumed.valid_loss == result.valid_loss
    assert resumed.report == result.report
    assert capfd.readouterr() == ("", "")


def test_sft_stage_result_is_an_event(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    events = []
    result = distill("a", events.append, "student.sft_epochs=0.1")
    (stage,) = [event.result for event in events if isinstance(event, FineTuned)]
    assert (stage.command, str(stage.output), stage.steps) == ("sft", "a/sft", 3)
    assert stage.report["student_after"] == result.report["student_after_sft"]
    assert result.summary.has_sft_stage
    assert capfd.readouterr() == ("", "")


def test_eval_result_matches_command_line(trained, capfd):
    settings = Settings(sets=EVAL_SETS)
    result = evaluate_checkpoints(["a"], settings, lambda event: None, output="scores")
    assert capfd.readouterr() == ("", "")
    code, printed, _ = call(capfd, "eval", "a", *flags(EVAL_SETS), "--output", "scores", "--json", "--quiet")
    assert code == 0
    assert as_json(result) == without_times(printed)
    (scores,) = result.checkpoints
    assert scores.suites["held-out"]["rows"] == 6
    assert Path(scores.output).is_dir()


def test_generate_returns_rows_events_and_a_file(trained, capfd):
    sets = ["rollout.max_new_tokens=8", "train.threads=1", "train.device=cpu"]
    settings = Settings(sets=sets)
    prompts = PromptSource(prompts=["Spell cat", "Sort: dbca"], samples=2)
    events = []
    result = generate_responses("a", prompts, settings, events.append)
    rows = [row for event in events if isinstance(event, Generated) for row in event.rows]
    assert list(result.responses) == rows
    assert [row["instruction"] for row in rows] == ["Spell cat"] * 2 + ["Sort: dbca"] * 2
    in_file = generate_responses("a", prompts, settings, lambda event: None, output="rows.jsonl")
    assert [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()] == rows
    assert capfd.readouterr() == ("", "")
    options = ["--prompt", "Spell cat", "--prompt", "Sort: dbca", "--n", "2", *flags(sets)]
    code, printed, _ = call(capfd, "generate", "--model", "a", *options, "--output", "again.jsonl", "--json", "--quiet")
    assert code == 0
    assert as_json(in_file) | {"output": "again.jsonl"} == without_times(printed)
    assert Path("again.jsonl").read_bytes() == Path("rows.jsonl").read_bytes()
