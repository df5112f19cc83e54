"""Test experiment trackers, by the files that they write, and the upload to the hub as far as it needs no network."""

from dataclasses import replace
from importlib.util import find_spec

import pytest

from distillm_cli.config.load import resolve
from distillm_cli.runs.push import check_push, push_output
from distillm_cli.runs.run_results import Sample, TrainResult, TrainSummary
from distillm_cli.runs.start import TrainOptions, start_training
from distillm_cli.runs.trackers import TRACKERS, RunTrackers, check_trackers
from distillm_cli.training.events import Alarmed, Note, Stepped, Validated, Warned
from tests.codes import raises_code

RESOLVED = resolve(command="distill", recipe="quickstart", sets=["train.log_steps=2"])
SAMPLE = Sample("2 | 3?", ("5",), {"student after": "five"})
COUNTS = dict.fromkeys(
    ["tokens", "rollout_steps", "replay_steps", "dataset_steps", "teacher_steps", "sampled_sequences", "sampled_tokens",
     "teacher_sampled_sequences", "teacher_sampled_tokens"], 0
)  # fmt: skip


def result(output):
    return TrainResult(
        command="distill", output=output, wall_s=1.0, steps=6, tokens_per_s=1.0, train_loss=1.0, valid_loss=2.0, phi=0.0,
        train_s=1.0, stopped="done", best_step=None, report={}, summary=TrainSummary((), "", samples=(SAMPLE,)), **COUNTS,
    )  # fmt: skip


def steps(first, last):
    return [
        Stepped(i, 0.1, "dataset", 1.0 / i, 1e-3, 1.0, 0.0, 8, 0.1, {}, {"acceptance": 0.5}) for i in range(first, last)
    ]


def logged(output, events, *, resume=False):
    """Log events and the result with TensorBoard; return what the trackers passed on, and what TensorBoard reads."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    passed_on = []
    with RunTrackers(("tensorboard",), output, RESOLVED, passed_on.append, resume).running() as trackers:
        for event in events:
            trackers(event)
        trackers.finish(result(output))
    return passed_on, EventAccumulator(str(output / "tensorboard")).Reload()


def test_tensorboard_has_figures_recipe_samples_and_files(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "recipe.yaml").write_text("method: distillm\n")
    start = [Validated(0, 3.0, 0.0), Validated(4, 2.0, 0.0, scores={"kl_teacher_student": 0.5, "spearman": None})]
    events = [*steps(1, 5), *start, Alarmed(4, "outputs_cut", "most are cut", "raise it"), *steps(5, 7)]
    passed_on, found = logged(tmp_path, events)
    assert passed_on == [Note("Logging to tensorboard"), *events]

    def scalars(name):
        return [(point.step, pytest.approx(point.value)) for point in found.Scalars(name)]

    assert scalars("train/loss") == [(2, 1 / 2), (4, 1 / 4), (6, 1 / 6)], "every second step is logged"
    assert scalars("train/acceptance") == [(2, 0.5), (4, 0.5), (6, 0.5)]
    assert scalars("before training/loss") == [(4, 3.0)]
    assert scalars("valid/kl_teacher_student") == [(4, 0.5)]
    assert scalars("alarm/outputs_cut") == [(4, 1)]
    texts = {
        name: found.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0]
        for name in ("samples", "files/recipe.yaml")
    }
    assert rb"| 2 \| 3? | 5 | five |" in texts["samples"]
    assert b"method: distillm" in texts["files/recipe.yaml"]
    settings = "".join(path.read_text() for path in tmp_path.glob("tensorboard/*/hparams.yml"))
    assert "objective.alpha: 0.1" in settings


def test_resumed_run_continues_the_run_of_the_tracker(tmp_path):
    pytest.importorskip("tensorboard")
    logged(tmp_path, steps(1, 5))
    before = (tmp_path / "trackers.json").read_text()
    _, found = logged(tmp_path, steps(5, 7), resume=True)
    assert [point.step for point in found.Scalars("train/loss")] == [2, 4, 6]
    assert (tmp_path / "trackers.json").read_text() == before
    logged(tmp_path, steps(1, 3))
    assert (tmp_path / "trackers.json").read_text() != before


def test_a_tracker_that_fails_is_dropped(tmp_path):
    pytest.importorskip("tensorboard")
    passed_on = []
    with RunTrackers(("tensorboard",), tmp_path, RESOLVED, passed_on.append).running() as trackers:
        trackers.trackers["tensorboard"].writer = None  # as if it had been lost
        for event in steps(1, 5):
            trackers(event)
    (warning,) = [event for event in passed_on if isinstance(event, Warned)]
    assert warning.text.startswith("tensorboard failed, and the run continues without it")


def test_without_trackers_nothing_is_written(tmp_path):
    with RunTrackers((), tmp_path, RESOLVED, [].append).running() as trackers:
        trackers(steps(1, 2)[0])
    assert list(tmp_path.iterdir()) == []


def test_unknown_tracker_is_reported(tmp_path):
    with raises_code("usage.invalid_value", "comet", "tensorboard"):
        check_trackers(["comet"])


@pytest.mark.parametrize("name", [name for name in TRACKERS if find_spec(name) is None])
def test_missing_package_names_its_extra_before_rows_are_read(name, tmp_path):
    options = TrainOptions(track=(name,))
    with raises_code("usage.missing_package", f"distillm[{name}]"):
        start_training("distill", RESOLVED, tmp_path / "run", [].append, options)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def output(tmp_path):
    """Return an output directory with files that are uploaded and others."""
    for name in ("model.safetensors", "README.md", "eval/report/teacher.json", "checkpoints/step-000001/state.json",
                 "sft/model.safetensors", "manifest.json", "tensorboard/events", ".staging-x"):  # fmt: skip
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return tmp_path / "run"


def test_dry_run_lists_the_files_to_upload(output):
    events = []
    assert push_output(output, "me/run", events.append, dry_run=True) is None
    (note,) = events
    assert isinstance(note, Note)
    assert note.text.endswith("to me/run: README.md, eval/report/teacher.json, model.safetensors")


def test_failed_upload_names_the_command_and_no_token(output, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    events = []
    assert push_output(output, "me/run", events.append, dry_run=False) is None
    (warning,) = events
    assert isinstance(warning, Warned)
    assert f"hf upload me/run {output} . --private --exclude manifest.json" in warning.text
    assert "hf_secret" not in warning.text


def test_push_is_checked_before_the_run(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent")
    check_push(None, dry_run=False)
    check_push("me/run", dry_run=True)
    with raises_code("usage.unused_option", "--push"):
        check_push(None, dry_run=True)
    with raises_code("usage.invalid_value", "a/b/c"):
        check_push("a/b/c", dry_run=True)
    with raises_code("usage.cannot_push", "me/run"):
        check_push("me/run", dry_run=False)


def test_result_has_the_address_only_after_an_upload(tmp_path):
    plain = result(tmp_path)
    assert "pushed" not in plain.as_json()
    assert replace(plain, pushed="https://hub/me/run").as_json()["pushed"] == "https://hub/me/run"
