"""Test conversations from rows to generated responses, on tiny chat models."""

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
from tests.command_line import assert_error
from tests.marks import long

TRAIN = ["--batch-size", "4", "--lr", "3e-3", "--dtype", "fp32", "--device", "cpu", "--json"]
QUIET = [f"--set={field}" for field in ("train.threads=1", "eval.report_rows=0", "train.save_steps=1000")]
QUIET += ["--set=train.eval_steps=1000"]
SAMPLES = [{"role": "user", "content": "go"}]


def lines(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train_on(data) -> list[str]:
    """Return the options to train on these rows, which are also the validation rows."""
    return ["--data", str(data), "--set", f"data.valid={data}", *TRAIN, *QUIET]


def generate(cli, model, *source, new=20) -> tuple[list[dict], str]:
    """Generate greedily. Return the rows and stderr."""
    more = ["--greedy", "--max-new-tokens", new, "--overwrite", "--output", "responses.jsonl", "--json"]
    code, _, err = cli("generate", "--model", model, *source, *more)
    assert code == 0, err
    return read_rows(Path("responses.jsonl")), err


def conversations(*answers: dict) -> list[dict]:
    names = ("one", "two", "six", "ten")
    return [
        {"messages": [{"role": "user", "content": f"{name}?"}, {"role": "assistant", **answer}]}
        for name, answer in zip(names, answers, strict=True)
    ]


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock of the date in chat templates. Return it; its attribute ``now`` may be set."""

    class FixedDate(date):
        now = date(2026, 1, 31)

        @classmethod
        def today(cls):
            return cls.now

    monkeypatch.setattr(prepare, "date", FixedDate)
    return FixedDate


def reversed_words() -> list[dict]:
    return conversations(*({"content": text} for text in ("eno", "owt", "xis", "net")))


@pytest.mark.long
def test_base_student_learns_to_stop_from_chat_teacher(cli, tmp_path):
    """Check a student without a template, whose texts end with <eos>, under a teacher whose turns end with <end>."""
    data = lines(tmp_path / "rows.jsonl", reversed_words())
    shared = train_on(data)
    teacher = chat_models.save(tmp_path / "teacher", eos="<end>")
    student = chat_models.save(tmp_path / "student", template=None, width=48)
    code, _, err = cli("sft", "--model", teacher, *shared, "--steps", 120, "--output", "tuned")
    assert code == 0, err
    pair = ["--teacher", "tuned", "--student", student]
    code, _, err = cli("distill", "--method", "kd", *pair, *shared, "--steps", 150, "--output", "kd")
    assert code == 0, err
    assert "the student's tokenizer has no chat template: the teacher's is used and saved with it" in err

    tokenizer = AutoTokenizer.from_pretrained("kd")
    ends = tokenizer.convert_tokens_to_ids(["<end>", "<eos>"])
    assert GenerationConfig.from_pretrained("kd").eos_token_id == ends
    assert tokenizer.chat_template == CHAT
    generated, err = generate(cli, "kd", "--data", data)
    assert "template: chat" in err
    assert [(row["output"], row["complete"]) for row in generated] == [(w, True) for w in ("eno", "owt", "xis", "net")]
    # With transformers alone, generation from the directory stops at the same token.
    ids = tokenizer.apply_chat_template(
        reversed_words()[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt"
    )
    model = AutoModelForCausalLM.from_pretrained("kd")
    generated = model.generate(ids["input_ids"], max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(generated) == "eno<end>"


def test_teacher_end_token_is_learned_but_not_printed(cli, tmp_path):
    """Check a student with another end-of-sequence token, which stays in the tokenizer of the output."""
    rows = [{"instruction": f"{word}?", "output": word[::-1]} for word in ("one", "two", "six", "ten")]
    data = lines(tmp_path / "rows.jsonl", rows)
    teacher = chat_models.save(tmp_path / "teacher", template=None, eos="<end>")
    student = chat_models.save(tmp_path / "student", template=None, width=48)
    shared = [*train_on(data), "--set", "data.template=plain"]
    code, _, err = cli("sft", "--model", teacher, *shared, "--steps", 120, "--output", "tuned")
    assert code == 0, err
    pair = ["--teacher", "tuned", "--student", student]
    code, _, err = cli("distill", "--method", "kd", *pair, *shared, "--steps", 150, "--output", "kd")
    assert code == 0, err
    generated, _ = generate(cli, "kd", "--data", data)
    assert [(row["output"], row["complete"]) for row in generated] == [(row["output"], True) for row in rows]
    code, result, err = cli("eval", "kd", "--suite", data, "--greedy", "--json")
    assert (code, result["suites"]["rows"]["exact_match"]["mean"]) == (0, 100.0), err


@pytest.mark.parametrize("command", ["sft", "distill"])
def test_student_stops_after_tool_calls(cli, tmp_path, command):
    """Check tool calls that end with <stop>, and other responses with <end>. The model's generation config has neither."""
    end = "{%- if m.tool_calls -%}<stop>{%- else -%}<end>{%- endif -%}{%- endif -%}"
    template = loop(USER + "<bot>{{ m.content or '' }}" + CALLS + end, "<bot>")
    calls = [{"type": "function", "function": {"name": "get", "arguments": {"at": n}}} for n in range(4)]
    data = lines(tmp_path / "rows.jsonl", conversations(*({"content": None, "tool_calls": [call]} for call in calls)))
    model = chat_models.save(tmp_path / "model", template)
    models = ["--model", model] if command == "sft" else ["--teacher", model, "--student", model, "--method", "kd"]
    code, _, err = cli(command, *models, *train_on(data), "--steps", 1, "--output", "a")
    assert code == 0, err
    assert "cut at" not in err
    ends = AutoTokenizer.from_pretrained("a").convert_tokens_to_ids(["<end>", "<eos>", "<stop>"])
    assert GenerationConfig.from_pretrained("a").eos_token_id == ends


@pytest.mark.long
def test_adapter_of_a_base_model_stops_at_turn_end(cli, tmp_path):
    """Check that the directory of an adapter has the end-of-turn token, which the base model's config lacks."""
    data = lines(tmp_path / "rows.jsonl", reversed_words())
    student = chat_models.save(tmp_path / "student", template=None)
    model = AutoModelForCausalLM.from_pretrained(student)
    with torch.no_grad(), torch.random.fork_rng():  # the head is not trained, so its rows must differ enough
        torch.manual_seed(0)
        model.model.embed_tokens.weight.normal_(0, 0.2)
    model.save_pretrained(student)
    (tmp_path / "chat.jinja").write_text(CHAT, encoding="utf-8")
    form = [f"--set=data.chat_template={tmp_path / 'chat.jinja'}", "--set=student.lora_output=adapter"]
    train = [*train_on(data), "--lora", 16, "--lr", "1e-2", "--steps", 300]
    code, _, err = cli("sft", "--model", student, *train, *form, "--output", "a")
    assert code == 0, err
    tokenizer = AutoTokenizer.from_pretrained("a")
    assert tokenizer.chat_template == CHAT
    ends = tokenizer.convert_tokens_to_ids(["<end>", "<eos>"])
    assert GenerationConfig.from_pretrained("a").eos_token_id == ends
    generated, err = generate(cli, "a", "--data", data)
    assert "template: chat" in err
    assert [(row["output"], row["complete"]) for row in generated] == [(w, True) for w in ("eno", "owt", "xis", "net")]
    code, result, err = cli("eval", "a", "--suite", data, "--greedy", "--json")
    assert (code, result["suites"]["rows"]["complete"]) == (0, 1.0), err
    # It stops there as a teacher, and also merged and trained further.
    code, _, err = cli(
        "distill", "--teacher", "a", "--student", student, *train_on(data), "--steps", 1, "--lora", 4, "--output", "b"
    )
    assert code == 0, err
    assert "the teacher's configuration does not stop" not in err
    code, _, err = cli(
        "sft", "--model", "a", *train_on(data), "--steps", 1, "--set=data.template=alpaca", "--output", "c"
    )
    assert code == 0, err
    assert GenerationConfig.from_pretrained("c").eos_token_id == ends


def test_damaged_generation_config_is_an_error(cli, tmp_path):
    model = chat_models.save(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text("{", encoding="utf-8")
    outcome = cli("generate", "--model", model, "--prompt", "one?", "--output", "responses.jsonl", "--json")
    assert_error(outcome, "model.unreadable", "generation config", model)


def test_tool_calls_are_trained_generated_and_scored(cli, tmp_path):
    cities = ("Oslo", "Rome", "Bern", "Kiev")
    calls = [{"type": "function", "function": {"name": "get", "arguments": {"city": city}}} for city in cities]
    rows = conversations(*({"content": None, "tool_calls": [call]} for call in calls))
    data = lines(tmp_path / "rows.jsonl", rows)
    model = chat_models.save(tmp_path / "model")
    code, _, err = cli("sft", "--model", model, *train_on(data), "--steps", 150, "--output", "a")
    assert code == 0, err
    generated, _ = generate(cli, "a", "--data", data, new=40)
    assert [row["output"] for row in generated] == [f'<call>get {{"city": "{city}"}}' for city in cities]
    assert [row["messages"] for row in generated] == [row["messages"][:1] for row in rows]
    code, result, err = cli("eval", "a", "--suite", data, "--greedy", "--json")
    assert (code, result["suites"]["rows"]["exact_match"]["mean"]) == (0, 100.0), err
    # The generated rows are the same conversations, which the model has learned already.
    code, result, err = cli("sft", "--model", "a", *train_on("responses.jsonl"), "--steps", 1, "--output", "b")
    assert code == 0, err
    assert result["train_loss"] < 0.05


def test_resume_uses_the_original_template_date(cli, tmp_path, clock):
    dated = "{{ strftime_now('%d %b %Y') }}" + CHAT
    model, data = chat_models.save(tmp_path / "model", dated), lines(tmp_path / "rows.jsonl", reversed_words())
    run = ["sft", "--model", model, *train_on(data), "--keep", "2", "--set", "train.save_steps=2"]
    for name in ("full", "resumed"):
        code, _, err = cli(*run, "--steps", 4, "--output", name)
        assert code == 0, err
    assert "date: '2026-01-31'" in (tmp_path / "full" / "recipe.yaml").read_text()
    # As if interrupted after step 2.
    newest = sorted((tmp_path / "resumed" / "checkpoints").glob("step-*"))[-1]
    for file in sorted(newest.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    newest.rmdir()
    (tmp_path / "resumed" / "model.safetensors").unlink()
    clock.now = date(2026, 2, 3)
    code, _, err = cli(*run, "--steps", 4, "--output", "resumed", "--resume")
    assert code == 0, err
    resumed, full = (tmp_path / name / "model.safetensors" for name in ("resumed", "full"))
    assert resumed.read_bytes() == full.read_bytes()
    assert "date: '2026-01-31'" in (tmp_path / "resumed" / "recipe.yaml").read_text()
    generated, _ = generate(cli, "full", "--prompt", "one?")
    assert generated[0]["prompt"].startswith("31 Jan 2026"), "the date is that of the training"


def test_teacher_cache_is_used_on_another_day(cli, tmp_path, clock):
    dated = "{{ strftime_now('%d %b %Y') }}" + CHAT
    pair = ["--teacher", chat_models.save(tmp_path / "t", dated), "--student", chat_models.save(tmp_path / "s", dated)]
    cache = ["--teacher-cache", "disk", "--set", f"teacher.cache_dir={tmp_path / 'cache'}"]
    data = lines(tmp_path / "rows.jsonl", reversed_words())
    run = ["distill", "--method", "kd", *pair, *train_on(data), *cache, "--steps", 1]
    hits = []
    for name in ("a", "b"):
        code, result, err = cli(*run, "--output", name)
        assert code == 0, err
        hits.append(result["teacher_cache"]["hit"])
        clock.now = date(2026, 2, 3)
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
def test_generate_uses_the_template_of_training(cli, tmp_path, row, template, end):
    model = chat_models.save(tmp_path / "model", template=None)
    data = lines(tmp_path / "rows.jsonl", [row] * 4)
    code, _, err = cli("sft", "--model", model, *train_on(data), "--steps", 1, "--output", "a")
    assert code == 0, err
    assert f"template {template}: rows are" in err
    (generated,), err = generate(cli, "a", "--prompt", "one?", new=2)
    assert generated["prompt"].endswith(end)
    assert f"template: {template}" in err


def test_chat_model_without_recipe_uses_chat_template(cli, tmp_path):
    (generated,), err = generate(cli, chat_models.save(tmp_path / "model"), "--prompt", "one?", new=2)
    assert "template: chat" in err
    assert generated["prompt"].endswith("<user>one?<end>\n<bot>")


def test_instruction_rows_of_chat_models_use_chat(cli, tmp_path):
    pair = ["--teacher", chat_models.save(tmp_path / "t"), "--student", chat_models.save(tmp_path / "s", width=32)]
    data = lines(tmp_path / "rows.jsonl", [{"instruction": "one?", "output": "eno"}] * 4)
    run = ["distill", *pair, *train_on(data), "--steps", 1]
    code, _, err = cli(*run, "--output", "a")
    assert code == 0, err
    assert "template chat: rows are instructions and the models have chat templates" in err
    assert "--set data.template=alpaca selects the other one" in err
    code, _, err = cli(*run, "--set", "data.template=alpaca", "--output", "b")
    assert code == 0, err
    assert "template: alpaca" in (tmp_path / "b" / "recipe.yaml").read_text()


def test_different_chat_templates_are_reported(cli, tmp_path):
    other = CHAT.replace("<sys>", "").replace("<bos>", "<bos><sys>")
    teacher, student = chat_models.save(tmp_path / "t", other), chat_models.save(tmp_path / "s", width=32)
    pair = ["--teacher", teacher, "--student", student]
    data = lines(tmp_path / "rows.jsonl", reversed_words())
    run = ["distill", *pair, *train_on(data), "--steps", 1]
    code, _, err = cli(*run, "--output", "a")
    assert code == 0, err
    assert "different chat templates: the student's is used; --set data.chat_template=teacher" in " ".join(err.split())
    code, _, err = cli(*run, "--set", "data.chat_template=teacher", "--output", "b")
    assert code == 0, err
    assert AutoTokenizer.from_pretrained("a").chat_template == CHAT
    assert AutoTokenizer.from_pretrained("b").chat_template == other


def test_rows_rejected_by_a_template_can_be_skipped(cli, tmp_path):
    strict = (
        "{%- for m in messages -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{ raise_exception('roles must alternate') }}{%- endif -%}{%- endfor -%}" + CHAT
    )
    two_questions = [
        {"role": "user", "content": "one?"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "x"},
    ]
    data = lines(tmp_path / "rows.jsonl", [*reversed_words(), {"messages": two_questions}])
    model = chat_models.save(tmp_path / "model", strict)
    run = ["sft", "--model", model, *train_on(data), "--steps", 1]
    outcome = cli(*run, "--output", "a")
    assert_error(outcome, "data.chat_template_refuses", "rows.jsonl:5", "roles must alternate")
    code, _, err = cli(*run, "--skip-bad-rows", "--output", "a")
    assert code == 0, err
    assert "skipped rows.jsonl:5: the chat template cannot render this row" in " ".join(err.split())


def test_rows_without_answers_are_an_error(cli, tmp_path):
    rows = conversations(*({"content": "bad", "weight": 0} for _ in range(4)))
    data, model = lines(tmp_path / "rows.jsonl", rows), chat_models.save(tmp_path / "model")
    outcome = cli("sft", "--model", model, "--data", data, *TRAIN, *QUIET, "--steps", 1, "--output", "a")
    assert_error(outcome, "data.no_answer")


CASES = {  # file → exit code of fine-tuning a chat model on it
    "alpaca-system-history": 0, "chinese": 0, "content-parts": 0, "messages-json-string": 0, "multi-turn": 0,
    "one-bad-role": 0, "openorca": 0, "prompt-completion-messages": 0, "reasoning-content": 0, "rows": 0, "sharegpt": 0,
    "template-kwargs": 0, "tool-call-null-content": 0, "tool-call-reply": 0, "tools-column": 0, "weight-zero": 3,
    "parquet-null-args": 0,
}  # fmt: skip


DEFAULT = ("multi-turn", "parquet-null-args", "tools-column", "weight-zero")


@pytest.mark.parametrize("name", [name if name in DEFAULT else long(name) for name in CASES])
def test_rows_of_many_formats(cli, tmp_path, shared_data, name):
    """Check each file with plan, sft, generate and eval."""
    (file,) = (shared_data.parent / "cases").glob(f"{name}.*")
    model = chat_models.save(tmp_path / "model")
    data = ["--data", file, "--set", "data.max_length=500", "--set", "data.max_prompt_length=400"]
    code, _, err = cli("plan", "--method", "sft", "--student", model, *data, "--json")
    assert code == CASES[name], err
    code, result, err = cli("sft", "--model", model, *data, *TRAIN, *QUIET, "--steps", 1, "--output", "a")
    assert code == CASES[name], err
    if code:
        assert_error((code, result, err), "data.no_answer")
        return
    new = ["--max-new-tokens", 3, "--json"]
    code, result, err = cli("generate", "--model", "a", "--data", file, "--output", "responses.jsonl", *new)
    assert (code, result["rows"]) == (0, len(read_rows(tmp_path / "responses.jsonl"))), err
    code, _, err = cli("generate", "--model", "a", "--data", "responses.jsonl", "--output", "second.jsonl", *new)
    assert code == 0, err
    first, again = read_rows(tmp_path / "responses.jsonl"), read_rows(tmp_path / "second.jsonl")
    assert [row["prompt"] for row in again] == [row["prompt"] for row in first], (
        "the prompts of generated rows are unchanged"
    )
    code, _, err = cli("eval", "a", "--suite", file, "--greedy", *new)
    assert code == 0, err
