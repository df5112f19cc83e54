"""Conversations from rows to answers, as a person types the commands, on tiny chat models."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from distillm_cli.runs import prepare
from tests import chat_models
from tests.chat_models import CALLS, CHAT, USER, loop

LEARN = ["--batch-size", "4", "--lr", "3e-3", "--dtype", "fp32", "--device", "cpu", "--json"]
QUIET = [f"--set={field}" for field in ("train.threads=1", "eval.report_rows=0", "train.save_steps=1000")]
QUIET += ["--set=train.eval_steps=1000"]
SAMPLES = [{"role": "user", "content": "go"}]


def lines(place, rows) -> str:
    place.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(place)


def written(place) -> list[dict]:
    return [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()]


def on(data) -> list[str]:
    """Train on these rows, which are the held-out ones too."""
    return ["--data", str(data), "--set", f"data.valid={data}", *LEARN, *QUIET]


def asked(typed, model, *source, new=20) -> tuple[list[dict], str]:
    """What a model answers, greedily, and what the command says."""
    more = ["--greedy", "--max-new-tokens", new, "--overwrite", "--output", "said.jsonl", "--json"]
    code, _, err = typed("generate", "--model", model, *source, *more)
    assert code == 0, err
    return written(Path("said.jsonl")), err


def questions(*answers: dict) -> list[dict]:
    names = ("one", "two", "six", "ten")
    return [
        {"messages": [{"role": "user", "content": f"{name}?"}, {"role": "assistant", **answer}]}
        for name, answer in zip(names, answers, strict=True)
    ]


@pytest.fixture
def day(monkeypatch):
    """The clock that a run reads its date from."""

    class Day(date):
        now = date(2026, 1, 31)

        @classmethod
        def today(cls):
            return cls.now

    monkeypatch.setattr(prepare, "date", Day)
    return Day


def spelled() -> list[dict]:
    return questions(*({"content": text} for text in ("eno", "owt", "xis", "net")))


def test_a_base_student_under_an_instruct_teacher_learns_to_stop(typed, tmp_path):
    """The student's tokenizer ends texts with <eos> and has no template; the teacher's turns end with <end>."""
    data = lines(tmp_path / "rows.jsonl", spelled())
    shared = on(data)
    teacher = chat_models.save(tmp_path / "teacher", eos="<end>")
    student = chat_models.save(tmp_path / "student", template=None, width=48)
    code, _, err = typed("sft", "--model", teacher, *shared, "--steps", 120, "--output", "taught")
    assert code == 0, err
    pair = ["--teacher", "taught", "--student", student]
    code, _, err = typed("distill", "--method", "kd", *pair, *shared, "--steps", 150, "--output", "kd")
    assert code == 0, err
    assert "the student's tokenizer has no chat template: the teacher's is used and saved with it" in err

    tokenizer = AutoTokenizer.from_pretrained("kd")
    ends = tokenizer.convert_tokens_to_ids(["<end>", "<eos>"])
    assert GenerationConfig.from_pretrained("kd").eos_token_id == ends
    assert tokenizer.chat_template == CHAT
    said, err = asked(typed, "kd", "--data", data)
    assert "template: chat" in err
    assert [(row["output"], row["complete"]) for row in said] == [(w, True) for w in ("eno", "owt", "xis", "net")]
    # transformers, given the directory and nothing else, stops at the same place.
    ids = tokenizer.apply_chat_template(spelled()[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained("kd")
    said = model.generate(ids["input_ids"], max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(said) == "eno<end>"


def test_without_templates_the_teachers_end_is_learned_and_never_shown(typed, tmp_path):
    """The student's own end-of-sequence token is another, and the output's tokenizer keeps it."""
    rows = [{"instruction": f"{word}?", "output": word[::-1]} for word in ("one", "two", "six", "ten")]
    data = lines(tmp_path / "rows.jsonl", rows)
    teacher = chat_models.save(tmp_path / "teacher", template=None, eos="<end>")
    student = chat_models.save(tmp_path / "student", template=None, width=48)
    shared = [*on(data), "--set", "data.template=plain"]
    code, _, err = typed("sft", "--model", teacher, *shared, "--steps", 120, "--output", "taught")
    assert code == 0, err
    pair = ["--teacher", "taught", "--student", student]
    code, _, err = typed("distill", "--method", "kd", *pair, *shared, "--steps", 150, "--output", "kd")
    assert code == 0, err
    said, _ = asked(typed, "kd", "--data", data)
    assert [(row["output"], row["complete"]) for row in said] == [(row["output"], True) for row in rows]
    code, result, err = typed("eval", "kd", "--suite", data, "--greedy", "--json")
    assert (code, result["suites"]["rows"]["exact_match"]["mean"]) == (0, 100.0), err


@pytest.mark.parametrize("command", ["sft", "distill"])
def test_a_student_stops_where_tool_calls_end(typed, tmp_path, command):
    """Calls end with <stop> and other answers with <end>; the model's own configuration knows neither."""
    end = "{%- if m.tool_calls -%}<stop>{%- else -%}<end>{%- endif -%}{%- endif -%}"
    template = loop(USER + "<bot>{{ m.content or '' }}" + CALLS + end, "<bot>")
    calls = [{"type": "function", "function": {"name": "get", "arguments": {"at": n}}} for n in range(4)]
    data = lines(tmp_path / "rows.jsonl", questions(*({"content": None, "tool_calls": [call]} for call in calls)))
    model = chat_models.save(tmp_path / "model", template)
    models = ["--model", model] if command == "sft" else ["--teacher", model, "--student", model, "--method", "kd"]
    code, _, err = typed(command, *models, *on(data), "--steps", 1, "--output", "a")
    assert code == 0, err
    assert "cut at" not in err
    ends = AutoTokenizer.from_pretrained("a").convert_tokens_to_ids(["<end>", "<eos>", "<stop>"])
    assert GenerationConfig.from_pretrained("a").eos_token_id == ends


def test_an_adapter_of_a_base_model_stops_where_it_was_trained_to(typed, tmp_path):
    """The adapter's directory has the end of turns that the base model's configuration does not know."""
    data = lines(tmp_path / "rows.jsonl", spelled())
    student = chat_models.save(tmp_path / "student", template=None)
    model = AutoModelForCausalLM.from_pretrained(student)
    with torch.no_grad(), torch.random.fork_rng():  # the head does not train: it must tell tokens apart as it is
        torch.manual_seed(0)
        model.model.embed_tokens.weight.normal_(0, 0.2)
    model.save_pretrained(student)
    (tmp_path / "chat.jinja").write_text(CHAT, encoding="utf-8")
    form = [f"--set=data.chat_template={tmp_path / 'chat.jinja'}", "--set=student.lora_output=adapter"]
    learn = [*on(data), "--lora", 16, "--lr", "1e-2", "--steps", 150]
    code, _, err = typed("sft", "--model", student, *learn, *form, "--output", "a")
    assert code == 0, err
    tokenizer = AutoTokenizer.from_pretrained("a")
    assert tokenizer.chat_template == CHAT
    ends = tokenizer.convert_tokens_to_ids(["<end>", "<eos>"])
    assert GenerationConfig.from_pretrained("a").eos_token_id == ends
    said, err = asked(typed, "a", "--data", data)
    assert "template: chat" in err
    assert [(row["output"], row["complete"]) for row in said] == [(w, True) for w in ("eno", "owt", "xis", "net")]
    code, result, err = typed("eval", "a", "--suite", data, "--greedy", "--json")
    assert (code, result["suites"]["rows"]["complete"]) == (0, 1.0), err
    # As a teacher it is known to stop there, and merged and trained further it keeps that.
    code, _, err = typed(
        "distill", "--teacher", "a", "--student", student, *on(data), "--steps", 1, "--lora", 4, "--output", "b"
    )
    assert code == 0, err
    assert "the teacher's configuration does not stop" not in err
    code, _, err = typed("sft", "--model", "a", *on(data), "--steps", 1, "--set=data.template=alpaca", "--output", "c")
    assert code == 0, err
    assert GenerationConfig.from_pretrained("c").eos_token_id == ends


def test_a_damaged_generation_config_is_named(typed, tmp_path):
    model = chat_models.save(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text("{", encoding="utf-8")
    code, result, _ = typed("generate", "--model", model, "--prompt", "one?", "--output", "said.jsonl", "--json")
    assert code == 4
    assert "cannot read the generation config" in result["message"]


def test_a_tool_call_is_learned_generated_scored_and_read_back(typed, tmp_path):
    cities = ("Oslo", "Rome", "Bern", "Kiev")
    calls = [{"type": "function", "function": {"name": "get", "arguments": {"city": city}}} for city in cities]
    rows = questions(*({"content": None, "tool_calls": [call]} for call in calls))
    data = lines(tmp_path / "rows.jsonl", rows)
    model = chat_models.save(tmp_path / "model")
    code, _, err = typed("sft", "--model", model, *on(data), "--steps", 150, "--output", "a")
    assert code == 0, err
    said, _ = asked(typed, "a", "--data", data, new=40)
    assert [row["output"] for row in said] == [f'<call>get {{"city": "{city}"}}' for city in cities]
    assert [row["messages"] for row in said] == [row["messages"][:1] for row in rows]
    code, result, err = typed("eval", "a", "--suite", data, "--greedy", "--json")
    assert (code, result["suites"]["rows"]["exact_match"]["mean"]) == (0, 100.0), err
    # Read back, the rows are the same conversations: the model that wrote them has learned them already.
    code, result, err = typed("sft", "--model", "a", *on("said.jsonl"), "--steps", 1, "--output", "b")
    assert code == 0, err
    assert result["train_loss"] < 0.05


def test_a_dated_template_is_resumed_under_another_date(typed, tmp_path, day):
    dated = "{{ strftime_now('%d %b %Y') }}" + CHAT
    model, data = chat_models.save(tmp_path / "model", dated), lines(tmp_path / "rows.jsonl", spelled())
    run = ["sft", "--model", model, *on(data), "--set", "train.save_steps=2"]
    for name in ("whole", "halves"):
        code, _, err = typed(*run, "--steps", 4, "--output", name)
        assert code == 0, err
    assert "date: '2026-01-31'" in (tmp_path / "whole" / "recipe.yaml").read_text()
    # As after an interruption at step 2.
    newest = sorted((tmp_path / "halves" / "checkpoints").glob("step-*"))[-1]
    for file in sorted(newest.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    newest.rmdir()
    (tmp_path / "halves" / "model.safetensors").unlink()
    day.now = date(2026, 2, 3)
    code, _, err = typed(*run, "--steps", 4, "--output", "halves", "--resume")
    assert code == 0, err
    halves, whole = (tmp_path / name / "model.safetensors" for name in ("halves", "whole"))
    assert halves.read_bytes() == whole.read_bytes()
    assert "date: '2026-01-31'" in (tmp_path / "halves" / "recipe.yaml").read_text()
    said, _ = asked(typed, "whole", "--prompt", "one?")
    assert said[0]["prompt"].startswith("31 Jan 2026"), "asked as it was trained"


def test_a_teacher_cache_is_used_on_another_day(typed, tmp_path, day):
    dated = "{{ strftime_now('%d %b %Y') }}" + CHAT
    pair = ["--teacher", chat_models.save(tmp_path / "t", dated), "--student", chat_models.save(tmp_path / "s", dated)]
    cache = ["--teacher-cache", "disk", "--set", f"teacher.cache_dir={tmp_path / 'cache'}"]
    run = ["distill", "--method", "kd", *pair, *on(lines(tmp_path / "rows.jsonl", spelled())), *cache, "--steps", 1]
    hits = []
    for name in ("a", "b"):
        code, result, err = typed(*run, "--output", name)
        assert code == 0, err
        hits.append(result["teacher_cache"]["hit"])
        day.now = date(2026, 2, 3)
    assert hits == [False, True]
    assert "date: '2026-01-31'" in (tmp_path / "b" / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("row", "template", "end"),
    [
        ({"question": "one?", "answer": "eno"}, "plain", "one?\n"),
        ({"prompt": "one?", "completion": "eno"}, "exact", "one?"),
        ({"instruction": "one?", "output": "eno"}, "alpaca", "### Response:\n"),
    ],
)
def test_a_model_is_asked_in_the_form_it_was_trained_in(typed, tmp_path, row, template, end):
    model = chat_models.save(tmp_path / "model", template=None)
    data = lines(tmp_path / "rows.jsonl", [row] * 4)
    code, _, err = typed("sft", "--model", model, *on(data), "--steps", 1, "--output", "a")
    assert code == 0, err
    assert f"template {template}: rows are" in err
    (said,), err = asked(typed, "a", "--prompt", "one?", new=2)
    assert said["prompt"].endswith(end)
    assert f"template: {template}" in err


def test_a_chat_model_without_a_recipe_is_asked_in_chat(typed, tmp_path):
    (said,), err = asked(typed, chat_models.save(tmp_path / "model"), "--prompt", "one?", new=2)
    assert "template: chat" in err
    assert said["prompt"].endswith("<user>one?<end>\n<bot>")


def test_instructions_are_chat_where_both_have_templates_and_the_other_choice_is_named(typed, tmp_path):
    pair = ["--teacher", chat_models.save(tmp_path / "t"), "--student", chat_models.save(tmp_path / "s", width=32)]
    data = lines(tmp_path / "rows.jsonl", [{"instruction": "one?", "output": "eno"}] * 4)
    run = ["distill", *pair, *on(data), "--steps", 1]
    code, _, err = typed(*run, "--output", "a")
    assert code == 0, err
    assert "template chat: rows are instructions and the models have chat templates" in err
    assert "--set data.template=alpaca selects the other one" in err
    code, _, err = typed(*run, "--set", "data.template=alpaca", "--output", "b")
    assert code == 0, err
    assert "template: alpaca" in (tmp_path / "b" / "recipe.yaml").read_text()


def test_different_templates_of_the_two_sides_are_named(typed, tmp_path):
    other = CHAT.replace("<sys>", "").replace("<bos>", "<bos><sys>")
    pair = [
        "--teacher",
        chat_models.save(tmp_path / "t", other),
        "--student",
        chat_models.save(tmp_path / "s", width=32),
    ]
    data = lines(tmp_path / "rows.jsonl", spelled())
    run = ["distill", *pair, *on(data), "--steps", 1]
    code, _, err = typed(*run, "--output", "a")
    assert code == 0, err
    assert "different chat templates: the student's is used; --set data.chat_template=teacher" in " ".join(err.split())
    code, _, err = typed(*run, "--set", "data.chat_template=teacher", "--output", "b")
    assert code == 0, err
    assert AutoTokenizer.from_pretrained("a").chat_template == CHAT
    assert AutoTokenizer.from_pretrained("b").chat_template == other


def test_rows_that_a_template_refuses_can_be_skipped(typed, tmp_path):
    strict = (
        "{%- for m in messages -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{ raise_exception('roles must alternate') }}{%- endif -%}{%- endfor -%}" + CHAT
    )
    twice = [
        {"role": "user", "content": "one?"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "x"},
    ]
    data = lines(tmp_path / "rows.jsonl", [*spelled(), {"messages": twice}])
    model = chat_models.save(tmp_path / "model", strict)
    run = ["sft", "--model", model, *on(data), "--steps", 1]
    code, result, _ = typed(*run, "--output", "a")
    assert code == 3
    assert "rows.jsonl:5: the chat template cannot render this row: roles must alternate" in result["message"]
    code, _, err = typed(*run, "--skip-bad-rows", "--output", "a")
    assert code == 0, err
    assert "skipped rows.jsonl:5: the chat template cannot render this row" in " ".join(err.split())


def test_rows_without_answers_to_train_on_are_named(typed, tmp_path):
    rows = questions(*({"content": "bad", "weight": 0} for _ in range(4)))
    data, model = lines(tmp_path / "rows.jsonl", rows), chat_models.save(tmp_path / "model")
    code, result, _ = typed("sft", "--model", model, "--data", data, *LEARN, *QUIET, "--steps", 1, "--output", "a")
    assert code == 3
    assert "without a response to train on" in result["message"]


CASES = {  # file → exit code of fine-tuning a chat model on it
    "alpaca-system-history": 0, "chinese": 0, "content-parts": 0, "messages-json-string": 0, "multi-turn": 0,
    "one-bad-role": 0, "openorca": 0, "prompt-completion-messages": 0, "reasoning-content": 0, "rows": 0, "sharegpt": 0,
    "template-kwargs": 0, "tool-call-null-content": 0, "tool-call-reply": 0, "tools-column": 0, "weight-zero": 3,
    "parquet-null-args": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_small_rows_of_many_formats(typed, tmp_path, shared_data, name):
    """Each through plan, sft, generate and eval; what fails is refused with words."""
    (file,) = (shared_data.parent / "cases").glob(f"{name}.*")
    model = chat_models.save(tmp_path / "model")
    data = ["--data", file, "--set", "data.max_length=500", "--set", "data.max_prompt_length=400"]
    code, _, err = typed("plan", "--method", "sft", "--student", model, *data, "--json")
    assert code == CASES[name], err
    code, result, err = typed("sft", "--model", model, *data, *LEARN, *QUIET, "--steps", 1, "--output", "a")
    assert code == CASES[name], err
    if code:
        assert result["message"]
        return
    new = ["--max-new-tokens", 3, "--json"]
    code, result, err = typed("generate", "--model", "a", "--data", file, "--output", "said.jsonl", *new)
    assert (code, result["rows"]) == (0, len(written(tmp_path / "said.jsonl"))), err
    code, _, err = typed("generate", "--model", "a", "--data", "said.jsonl", "--output", "again.jsonl", *new)
    assert code == 0, err
    first, again = written(tmp_path / "said.jsonl"), written(tmp_path / "again.jsonl")
    assert [row["prompt"] for row in again] == [row["prompt"] for row in first], "read back as the same prompts"
    code, _, err = typed("eval", "a", "--suite", file, "--greedy", *new)
    assert code == 0, err
