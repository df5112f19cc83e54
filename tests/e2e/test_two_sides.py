"""Test runs in which teacher and student see real rows by different templates."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from distillm_cli.config.schema import DataConfig
from distillm_cli.data.sources import load_rows
from tests import chat_models
from tests.chat_models import CHAT
from tests.e2e.test_mixture_runs import assert_same_run, interrupt_at
from tests.marks import long

WORDS = [
    "--teacher", "builtin:pronounce", "--batch-size", "4", "--student", "random:1x32",
    "--set", "data.limit=60", "--set", "data.valid_limit=8", "--set", "rollout.max_new_tokens=6",
    "--set", "eval.max_new_tokens=12", "--set", "train.threads=1", "--set", "train.log_steps=1", "--lr", "2e-3", "--json",
]  # fmt: skip
SIDES = ["--set", "teacher.template=plain", "--set", "student.template=exact", "--set", "schedule.phi=0.6"]


def test_teacher_is_as_good_as_with_its_own_template(cli, tmp_path):
    """Check that the shipped teacher has the same figures whatever the student sees.

    It was trained on plain prompts, which for these rows are the exact ones: their inputs end with a newline.
    """
    for split in ("train", "valid"):
        found = load_rows(DataConfig(source="pronounce"), split)[:40]
        records = [{"instruction": r.instruction, "input": f"{r.input}\n", "output": r.references[0]} for r in found]
        text = "".join(f"{json.dumps(record)}\n" for record in records)
        (tmp_path / f"{split}.jsonl").write_text(text, encoding="utf-8")
    run = ["distill", *WORDS, "--data", tmp_path, "--steps", "2", "--set", "eval.report_rows=6", "--method", "kd"]
    code, both, err = cli(*run, "--set", "data.template=exact", "--output", "both")
    assert code == 0, err
    code, sides, err = cli(
        *run, "--set", "teacher.template=exact", "--set", "student.template=plain", "--output", "sides"
    )
    assert code == 0, err
    assert "other tokens" not in err
    assert sides["report"]["teacher"] == both["report"]["teacher"]
    assert sides["report"]["student_before"] != both["report"]["student_before"]
    checks = [next(f["what"] for f in run["findings"] if f["code"] == "teacher.loss") for run in (both, sides)]
    assert checks[0].split(" nats")[0] == checks[1].split(" nats")[0]
    code, _, err = cli("eval", "sides", "--suite", "pronounce", "--set", "eval.limit=4", "--greedy", "--json")
    assert code == 0, err
    assert "template: plain" in err, "the student's"


@pytest.mark.parametrize("method", ["distillm", long("skd")])
def test_resumed_run_with_two_sides_is_the_uninterrupted_one(cli, monkeypatch, method):
    argv = [
        "distill",
        *WORDS,
        "--data",
        "pronounce",
        *SIDES[:4],
        "--steps",
        "6",
        "--method",
        method,
        "--set",
        "eval.report_rows=0",
    ]
    if method == "distillm":
        argv += [*SIDES[4:], "--set", "schedule.warm_up=none", "--set", "rollout.bulk=2"]
    code, _, err = cli(*argv, "--output", "full")
    assert code == 0, err
    assert "the teacher sees its own prompts: template plain instead of exact" in err
    assert "the response has other tokens after the teacher's prompt" in " ".join(err.split()), "without a newline"
    with monkeypatch.context() as patched:
        interrupt_at(3, patched)
        assert cli(*argv, "--output", "resumed")[0] == 143
    code, _, err = cli(*argv, "--output", "resumed", "--resume")
    assert code == 0, err
    assert_same_run("full", "resumed")


def test_each_chat_model_sees_its_own_template(cli, tmp_path):
    own = CHAT.replace("<bos>", "<bos><sys>")
    teacher = chat_models.save(tmp_path / "teacher", own)
    student = chat_models.save(tmp_path / "student", CHAT, width=32)
    rows = [{"instruction": f"say {i}", "output": "one two"[: 3 + i % 4]} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    run = ["--teacher", teacher, "--student", student, "--data", tmp_path / "rows.jsonl", "--set", "train.threads=1"]
    run += ["--set", "teacher.chat_template=teacher", "--steps", "2", "--set", "eval.report_rows=2", "--json"]
    code, plan, err = cli("plan", *run)
    assert code == 0, err
    assert "different chat templates" not in err
    codes = {finding["code"] for finding in plan["findings"]}
    assert "template.sides" in codes
    assert "template.different" not in codes
    first = plan["sides"][0]
    texts = {side: "".join(text for text, _ in pieces) for side, pieces in first.items()}
    assert texts["teacher"].startswith("<bos><sys><user>say")
    assert texts["student"].startswith("<bos><user>say")
    marked = {side: [text for text, is_supervised in pieces if is_supervised] for side, pieces in first.items()}
    assert marked["teacher"] == marked["student"]
    assert marked["student"][-1] == "<end>"
    for cache in ("disk", "memory"):
        code, _, err = cli(
            "distill", *run, "--method", "kd", "--teacher-cache", cache, "--output", cache, "--dtype", "fp32"
        )
        assert code == 0, err
    weights = [load_file(f"{cache}/model.safetensors") for cache in ("disk", "memory")]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-5)
