"""Test methods that train on samples of the teacher or on pairs of samples, with the built-in teacher and rows."""

import json

import pytest

from tests.command_line import assert_error

PAIR = [
    "--teacher", "builtin", "--student", "random:1x32", "--data", "builtin", "--max-length", "64", "--batch-size", "8",
    "--dtype", "fp32", "--device", "cpu", "--json", "--lr", "3e-3",
]  # fmt: skip
SMALL = [
    "data.template=plain", "data.limit=48", "data.valid_limit=12", "rollout.max_new_tokens=12", "train.threads=1",
    "train.eval_steps=100", "train.log_steps=1", "eval.report_rows=0",
]  # fmt: skip


def distill(method, *more):
    return ["distill", "--method", method, *PAIR, *(w for field in SMALL for w in ("--set", field)), *more]


COUNTS = {  # steps on teacher samples, on rollouts; sequences sampled by the teacher, by the student; summary line
    "seqkd": (8, 0, 48, 0, "Every step used teacher samples (8 steps)."),
    "fdistill": (8, 8, 48, 64, "Every step used pairs of a teacher sample and a rollout (8 steps)."),
    "distillm2": (8, 8, 64, 64, "Every step used pairs of a teacher sample and a rollout (8 steps)."),
    "skd": (0, 8, 0, 64, "Every step used fresh rollouts (8 steps)."),
}


@pytest.mark.parametrize("method", COUNTS)
def test_method_trains_on_its_sequences(cli, tmp_path, method):
    code, result, err = cli(*distill(method, "--steps", 8, "--output", "run"))
    assert code == 0, err
    teacher, rollout, by_teacher, by_student, sentence = COUNTS[method]
    assert (result["teacher_steps"], result["rollout_steps"]) == (teacher, rollout)
    assert (result["dataset_steps"], result["replay_steps"]) == (0, 0)
    assert (result["teacher_sampled_sequences"], result["sampled_sequences"]) == (by_teacher, by_student)
    assert sentence in " ".join(err.split())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    source = "+".join(name for name, count in (("teacher", teacher), ("rollout", rollout)) if count)
    assert {line["source"] for line in lines if "loss" in line} == {source}
    assert result["teacher_cache"]["model_left"] is False, "the teacher is needed for sampling"
    if method == "seqkd":
        assert result["teacher_tokens"] == 0, "only its samples are used"


@pytest.mark.parametrize("options", [("--set", "schedule.kind=on"), ("--method", "seqkd"), ("--method", "skd")])
def test_prompts_train_like_rows_with_responses(cli, tmp_path, options):
    losses = {}
    for name in ("prompts", "pairs"):
        rows = [{"instruction": f"Say {i}."} | ({"output": f"{i}"} if name == "pairs" else {}) for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        method = "kd" if options[0] == "--set" else options[1]
        more = options if options[0] == "--set" else ()
        command = distill(method, *more, "--data", tmp_path / f"{name}.jsonl", "--steps", 4, "--output", name)
        code, result, err = cli(*command, "--set", "eval.report_rows=2")
        assert code == 0, err
        assert (result["valid_loss"] is None) == (name == "prompts")
        assert ("no held-out row has a response: no validation" in err) == (name == "prompts")
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["loss"] for line in lines if "loss" in line]
    assert len(losses["pairs"]) == 4
    assert losses["prompts"] == pytest.approx(losses["pairs"], rel=1e-5)


def test_missing_responses_are_an_error(cli, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(40)))
    invalid = {
        ("--method", "distillm"): ("data.invalid_row", "a.jsonl:1"),
        ("--method", "minillm"): ("data.invalid_row", "a.jsonl:1"),
        ("--set", "schedule.kind=on", "--set", "student.sft_epochs=1"): ("data.invalid_row", "a.jsonl:1"),
        ("--set", "schedule.kind=on", "--set", "train.select=valid_loss"): ("data.no_held_out_rows", "train.select"),
    }
    for options, (code, mention) in invalid.items():
        argv = distill("kd", *options, "--data", tmp_path / "a.jsonl", "--steps", 1, "--output", "run")
        assert_error(cli(*argv), code, mention)


def test_teacher_samples_from_a_file(cli, tmp_path):
    rows = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "six", "ten", "red", "sun")]
    source = tmp_path / "train.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "valid.jsonl").write_text(json.dumps(rows[0]) + "\n")
    make = ["generate", "--model", "builtin", "--data", tmp_path, "--split", "train", "--max-new-tokens", 9, "--n", 2]
    code, result, err = cli(*make, "--template", "plain", "--output", "responses.jsonl", "--json")
    assert (code, result["rows"]) == (0, 12), err

    data = ["--data", tmp_path, "--set", "data.teacher_samples=responses.jsonl"]
    for method in ("seqkd", "distillm2"):
        code, result, err = cli(*distill(method, *data, "--steps", 4, "--output", method))
        assert code == 0, err
        assert (result["teacher_steps"], result["teacher_sampled_sequences"]) == (4, 0)
        assert "teacher samples: 12 from responses.jsonl" in err

    responses = (tmp_path / "responses.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(responses[:8]))
    (tmp_path / "wrong.jsonl").write_text('{"ask": "Say one.", "tell": "one"}\n')
    invalid = [
        (["data.teacher_samples=gone.jsonl"], "data.not_found", "gone.jsonl"),
        (["data.teacher_samples=few.jsonl"], "data.no_teacher_sample", "train.jsonl:5"),
        (["data.teacher_samples=wrong.jsonl"], "data.invalid_row", "wrong.jsonl:1"),
        (["data.teacher_samples=responses.jsonl", "schedule.kind=off"], "recipe.unused_field", "data.teacher_samples"),
    ]
    for fields, code, mention in invalid:
        sets = [word for field in fields for word in ("--set", field)]
        outcome = cli(*distill("seqkd", "--data", tmp_path, *sets, "--steps", 4, "--output", "bad"))
        assert_error(outcome, code, mention)
        assert "loading builtin" not in outcome[2]
    assert not (tmp_path / "bad").exists(), "the error comes before anything is written"


def test_plan_counts_caches_of_both_models(cli):
    sets = [word for field in SMALL for word in ("--set", field)]
    words = ["plan", "--method", "fdistill", *PAIR, *sets, "--steps", 20]
    code, plan, err = cli(*words)
    assert code == 0, err
    assert plan["memory"]["rollout_cache"] > 0
    assert plan["memory"]["teacher_rollout_cache"] > plan["memory"]["rollout_cache"]
    assert plan["teacher_cache"]["sample_bytes"] == plan["memory"]["teacher_sample_states"] > 0
    assert "for teacher samples" in plan["teacher_cache"]["why"]
    outcome = cli(*distill("seqkd", "--teacher-cache", "disk", "--steps", 4, "--output", "x"))
    assert_error(outcome, "usage.no_teacher_cache", "schedule.kind teacher")
