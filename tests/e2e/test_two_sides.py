"""Test runs in which teacher and student see real rows by different templates."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from distillm_cli.config.schema import DataConfig, TeacherConfig
from distillm_cli.data.sources import load_rows
from distillm_cli.runs.chat_session import open_session
from distillm_cli.runs.inference import Settings, load_model, resolve_settings, teacher_encoder
from distillm_cli.training.events import silent
from tests import chat_models
from tests.chat_models import CHAT
from tests.codes import raises_code
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


ANSWERS = {"one": "two", "say": "it", "three": "four words"}
SIDES_OF_EVAL = {
    # Settings of the run; what student and teacher see of a word; the token that ends the student's responses.
    "chat templates": (
        ["--set", "teacher.chat_template=teacher"],
        ("<bos><user>{}<end>\n<bot>", "<bos><sys><user>{}<end>\n<bot>", "<end>"),
    ),
    "student's template": (
        ["--set", "data.chat_template=teacher", "--set", "student.template=plain", "--set", "data.template=exact"],
        ("{}\n", "{}", "<eos>"),
    ),
    "student's chat template": (
        ["--set", "data.chat_template=teacher", "--set", "student.chat_template=student"],
        ("<bos><user>{}<end>\n<bot>", "<bos><sys><user>{}<end>\n<bot>", "<end>"),
    ),
}


def mean_divergence(models, prompts: tuple[str, str, str]) -> float:
    """Compute KL(teacher ‖ student) per token in float64. models: directories of student and teacher."""
    *templates, end = prompts
    total, count = 0.0, 0
    tokenizer = chat_models.tokenizer(None)
    loaded = [LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).double() for model in models]
    for word, text in ANSWERS.items():
        answer = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.convert_tokens_to_ids(end)]
        logs = []
        for model, template in zip(loaded, templates, strict=True):
            ids = tokenizer(template.format(word), add_special_tokens=False)["input_ids"] + answer
            with torch.no_grad():
                logs.append(model(torch.tensor([ids])).logits[0, -len(answer) - 1 : -1].log_softmax(-1))
        log_q, log_p = logs
        total += (log_p.exp() * (log_p - log_q)).sum().item()
        count += len(answer)
    return total / count


@pytest.mark.parametrize("case", SIDES_OF_EVAL)
def test_eval_shows_the_teacher_its_side_of_the_run(cli, tmp_path, case):
    settings, prompts = SIDES_OF_EVAL[case]
    teacher = chat_models.save(tmp_path / "teacher", CHAT.replace("<bos>", "<bos><sys>"))
    student = chat_models.save(tmp_path / "student", CHAT, width=32)
    records = [{"instruction": word, "output": answer} for word, answer in ANSWERS.items()]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records), encoding="utf-8")
    run = ["--teacher", teacher, "--student", student, "--data", "rows.jsonl", "--set", "data.valid=rows.jsonl"]
    run += ["--batch-size", "1", "--method", "kd", "--steps", "1", "--dtype", "fp32", "--set", "train.threads=1"]
    code, _, err = cli("distill", *run, *settings, "--set", "eval.report_rows=0", "--output", "run", "--json")
    assert code == 0, err
    options = ["--suite", "rows.jsonl", "--teacher", teacher, "--greedy", "--max-new-tokens", "1", "--dtype", "fp32"]
    code, found, err = cli("eval", "run", *options, "--json")
    assert code == 0, err
    assert "rows: the teacher sees its own prompts: " in err
    references = found["suites"]["rows"]["references"]
    expected = mean_divergence(["run", teacher], prompts)
    assert references["kl_teacher_student"] == pytest.approx(expected, rel=1e-4)
    same = mean_divergence(["run", teacher], (prompts[0], prompts[0], prompts[2]))
    assert abs(expected - same) > 2e-3 * same


def test_models_of_a_recipe_see_the_prompts_of_their_sides(tmp_path):
    """Check ``chat`` with a teacher, and ``generate`` and ``eval`` with the teacher of a recipe as their model."""
    teacher, student = (chat_models.save(tmp_path / name) for name in ("teacher", "student"))
    recipe = tmp_path / "recipe.yaml"
    sections = {
        "teacher": {"path": teacher, "template": "exact"},
        "student": {"path": student},
        "data": {"template": "plain"},
    }
    recipe.write_text(json.dumps(sections), encoding="utf-8")
    settings = Settings(str(recipe))
    texts = {
        one.name: one.encoder.tokenizer.decode(one.prompt("word", None))
        for one in open_session(student, teacher, settings, silent).participants
    }
    assert texts == {"student": "word\n", "teacher": "word"}
    resolved = resolve_settings("generate", teacher, settings, silent)[0].recipe
    loaded = {model: load_model(model, resolved, silent) for model in (student, teacher)}
    templates = {model: encoder.template for model, (_, encoder) in loaded.items()}
    assert templates == {student: "plain", teacher: "exact"}
    lost = resolved.model_copy(update={"teacher": TeacherConfig(chat_template="student")})
    lost = lost.model_copy(update={"data": DataConfig(chat_template="teacher")})
    encoder = loaded[student][1].with_settings(chat_template="teacher")
    with raises_code("usage.no_chat_template", "teacher.chat_template = student"):
        teacher_encoder(encoder, loaded[teacher][0], lost, "chat")
