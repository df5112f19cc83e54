"""Methods that differ in which sequences they train on, as a person types them, with the shipped teacher and rows."""

import json

import pytest

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


COUNTS = {  # steps on the teacher's samples, on rollouts; drawn by the teacher, by the student; how the end says it
    "seqkd": (8, 0, 48, 0, "Every step used teacher samples (8 steps)."),
    "fdistill": (8, 8, 48, 64, "Every step used pairs of a teacher sample and a rollout (8 steps)."),
    "distillm2": (8, 8, 64, 64, "Every step used pairs of a teacher sample and a rollout (8 steps)."),
    "skd": (0, 8, 0, 64, "Every step used fresh rollouts (8 steps)."),
}


@pytest.mark.parametrize("method", COUNTS)
def test_each_method_trains_on_its_sequences_and_says_so(typed, tmp_path, method):
    code, result, err = typed(*distill(method, "--steps", 8, "--output", "run"))
    assert code == 0, err
    teacher, rollout, by_teacher, by_student, sentence = COUNTS[method]
    assert (result["teacher_steps"], result["rollout_steps"]) == (teacher, rollout)
    assert (result["dataset_steps"], result["replay_steps"]) == (0, 0)
    assert (result["teacher_sampled_sequences"], result["sampled_sequences"]) == (by_teacher, by_student)
    assert sentence in " ".join(err.split())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    source = "+".join(name for name, count in (("teacher", teacher), ("rollout", rollout)) if count)
    assert {line["source"] for line in lines if "loss" in line} == {source}
    assert result["teacher_cache"]["model_left"] is False, "it had samples to draw"
    if method == "seqkd":
        assert result["teacher_tokens"] == 0, "its samples are all that is asked of it"


@pytest.mark.parametrize("chosen", [("--set", "schedule.kind=on"), ("--method", "seqkd"), ("--method", "skd")])
def test_prompts_alone_train_as_the_same_rows_with_responses(typed, tmp_path, chosen):
    losses = {}
    for name in ("prompts", "pairs"):
        rows = [{"instruction": f"Say {i}."} | ({"output": f"{i}"} if name == "pairs" else {}) for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        method = "kd" if chosen[0] == "--set" else chosen[1]
        more = chosen if chosen[0] == "--set" else ()
        command = distill(method, *more, "--data", tmp_path / f"{name}.jsonl", "--steps", 4, "--output", name)
        code, result, err = typed(*command, "--set", "eval.report_rows=2")
        assert code == 0, err
        assert (result["valid_loss"] is None) == (name == "prompts")
        assert ("no held-out row has a response: no validation" in err) == (name == "prompts")
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["loss"] for line in lines if "loss" in line]
    assert len(losses["pairs"]) == 4
    assert losses["prompts"] == pytest.approx(losses["pairs"], rel=1e-5)


def test_prompts_alone_are_refused_where_responses_are_read(typed, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(40)))
    refused = {
        ("--method", "distillm"): "a.jsonl:1: no response column",
        ("--method", "minillm"): "a.jsonl:1: no response column",
        ("--set", "schedule.kind=on", "--set", "student.sft_epochs=1"): "a.jsonl:1: no response column",
        ("--set", "schedule.kind=on", "--set", "train.select=valid_loss"): "train.select = valid_loss needs them",
    }
    for more, what in refused.items():
        code, _, err = typed(*distill("kd", *more, "--data", tmp_path / "a.jsonl", "--steps", 1, "--output", "run"))
        assert (code, what in err) == (3, True), err


def test_samples_made_with_generate_are_trained_on_and_bad_files_are_named_before_models_are_loaded(typed, tmp_path):
    rows = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "six", "ten", "red", "sun")]
    source = tmp_path / "train.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "valid.jsonl").write_text(json.dumps(rows[0]) + "\n")
    make = ["generate", "--model", "builtin", "--data", tmp_path, "--split", "train", "--max-new-tokens", 9, "--n", 2]
    code, made, err = typed(*make, "--template", "plain", "--output", "said.jsonl", "--json")
    assert (code, made["rows"]) == (0, 12), err

    own = ["--data", tmp_path, "--set", "data.teacher_samples=said.jsonl"]
    for method in ("seqkd", "distillm2"):
        code, result, err = typed(*distill(method, *own, "--steps", 4, "--output", method))
        assert code == 0, err
        assert (result["teacher_steps"], result["teacher_sampled_sequences"]) == (4, 0)
        assert "teacher samples: 12 from said.jsonl" in err

    (tmp_path / "few.jsonl").write_text("".join((tmp_path / "said.jsonl").read_text().splitlines(keepends=True)[:8]))
    (tmp_path / "wrong.jsonl").write_text('{"ask": "Say one.", "tell": "one"}\n')
    bad = [
        (["data.teacher_samples=gone.jsonl"], 3, "gone.jsonl: no such file (data.teacher_samples)"),
        (
            ["data.teacher_samples=few.jsonl"],
            3,
            "train.jsonl:5: no teacher sample has this prompt (2 of 6 rows have none)",
        ),
        (["data.teacher_samples=wrong.jsonl"], 3, "wrong.jsonl:1: no prompt column"),
        (["data.teacher_samples=said.jsonl", "schedule.kind=off"], 2, "it applies to teacher and pairs (methods seqkd"),
    ]
    for fields, expected, says in bad:
        sets = [word for field in fields for word in ("--set", field)]
        code, answer, err = typed(*distill("seqkd", "--data", tmp_path, *sets, "--steps", 4, "--output", "bad"))
        assert (code, answer["code"]) == (expected, expected), err
        assert says in answer["message"], answer["message"]
        assert "loading builtin" not in err
    assert not (tmp_path / "bad").exists(), "refused before anything was written"


def test_plan_counts_both_models_caches_and_a_cache_of_rows_is_refused_where_no_row_is_trained_on(typed):
    sets = [word for field in SMALL for word in ("--set", field)]
    words = ["plan", "--method", "fdistill", *PAIR, *sets, "--steps", 20]
    code, plan, err = typed(*words)
    assert code == 0, err
    assert plan["memory"]["rollout_cache"] > 0
    assert plan["memory"]["teacher_rollout_cache"] > plan["memory"]["rollout_cache"]
    assert plan["teacher_cache"]["sample_bytes"] == plan["memory"]["teacher_sample_states"] > 0
    assert "for teacher samples" in plan["teacher_cache"]["why"]
    code, answer, _ = typed(*distill("seqkd", "--teacher-cache", "disk", "--steps", 4, "--output", "x"))
    assert code == 2
    assert "schedule.kind teacher does not train on them" in answer["message"]
