"""Test perplexity, KL and agreement on references against sums in float64."""

from __future__ import annotations

import math

import pytest
import torch

from distillm_cli.config.schema import DataConfig
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.sources import Row
from distillm_cli.evaluation.likelihood import (
    ComparedTeacher,
    load_references,
    measure_references,
    read_references,
    save_references,
)
from distillm_cli.evaluation.suites import Suite
from distillm_cli.models.backbone import Backbone
from distillm_cli.training.events import Warned
from tests import chat_models, tiny
from tests.codes import raises_code

CPU = torch.device("cpu")
PAIRS = [("abc", "hello"), ("x", "a b"), ("student", "teacher of it"), ("u", "v")]


@pytest.fixture(scope="module")
def models() -> tuple[Backbone, Backbone, Encoder]:
    tokenizer = tiny.tokenizer()
    student = Backbone(tiny.model("gpt2", len(tokenizer), spread=2.0), tokenizer)
    teacher = Backbone(tiny.model("llama", len(tokenizer), spread=3.0), tokenizer)
    for model in (student, teacher):
        model.model.double().eval()
    return student, teacher, Encoder(tokenizer, DataConfig(template="plain"))


def suite(*extra: Row) -> Suite:
    rows = [Row(prompt=prompt, references=(text,), where=f"t:{i}") for i, (prompt, text) in enumerate(PAIRS)]
    return Suite("words", [*rows, *extra], "t")


def measure(student, encoder, rows, teacher=None, **options):
    options = {"context": student.context, "device": CPU, "batch_size": 3, **options}
    return measure_references(student, encoder, rows, teacher=teacher, **options)


def expected_figures(student, teacher, prompts) -> dict[str, float]:
    """Compute the figures of all pairs in float64. prompts: returns the texts that student and teacher see of a prompt."""
    tokenizer = student.tokenizer
    sums = dict.fromkeys(("loss", "teacher_loss", "forward", "reverse", "agree", "tokens"), 0.0)
    for prompt, text in PAIRS:
        answer = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        logs = []
        for model, seen in zip((student, teacher), prompts(prompt), strict=True):
            ids = torch.tensor([tokenizer(seen)["input_ids"] + answer])
            with torch.no_grad():
                logs.append(model.model(ids).logits[0, -len(answer) - 1 : -1].double().log_softmax(-1))
        log_q, log_p = logs
        targets = torch.tensor(answer)[:, None]
        sums["loss"] -= log_q.gather(1, targets).sum().item()
        sums["teacher_loss"] -= log_p.gather(1, targets).sum().item()
        sums["forward"] += (log_p.exp() * (log_p - log_q)).sum().item()
        sums["reverse"] += (log_q.exp() * (log_q - log_p)).sum().item()
        sums["agree"] += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
        sums["tokens"] += len(answer)
    return sums


def assert_figures(found, sums) -> None:
    tokens = sums["tokens"]
    assert (found["rows"], found["tokens"]) == (4, tokens)
    assert found["loss"] == pytest.approx(sums["loss"] / tokens, rel=1e-9)
    assert found["perplexity"] == pytest.approx(math.exp(sums["loss"] / tokens), rel=1e-9)
    assert found["teacher_perplexity"] == pytest.approx(math.exp(sums["teacher_loss"] / tokens), rel=1e-9)
    assert found["kl_teacher_student"] == pytest.approx(sums["forward"] / tokens, rel=1e-9)
    assert found["kl_student_teacher"] == pytest.approx(sums["reverse"] / tokens, rel=1e-9)
    assert found["agreement"] == pytest.approx(100 * sums["agree"] / tokens)


def test_figures_match_float64(models):
    student, teacher, encoder = models
    found = measure(student, encoder, suite(), ComparedTeacher(teacher)).as_json()
    assert_figures(found, expected_figures(student, teacher, lambda prompt: (prompt, prompt)))
    assert 0 < found["agreement"] < 100


def test_teacher_sees_its_own_prompts(models):
    student, teacher, encoder = models
    rows = Suite("words", [Row(instruction=p, references=(text,), where=p) for p, text in PAIRS], "t")
    compared = ComparedTeacher(teacher, encoder.with_settings(template="exact"))
    found = measure(student, encoder, rows, compared).as_json()
    assert_figures(found, expected_figures(student, teacher, lambda prompt: (f"{prompt}\n", prompt)))


def test_conversations_with_other_answers_for_the_teacher_are_left_out():
    tokenizer = chat_models.tokenizer(chat_models.CHAT)
    model = Backbone(tiny.model("llama", len(tokenizer)), tokenizer)
    model.model.eval()
    encoder = Encoder(tokenizer, DataConfig(template="chat"))
    first = [{"role": "user", "content": "one"}]
    talk = [*first, {"role": "assistant", "content": "two"}, {"role": "user", "content": "six"}]
    rows = [Row(messages=messages, references=("ten",), where="t") for messages in (first, talk)]
    marked = chat_models.CHAT.replace(
        "{{ m.content or '' }}", "{% if loop.index0 < last %}!{% endif %}{{ m.content or '' }}"
    )
    other = encoder.with_chat_template(marked)  # writes a mark before earlier answers
    events = []
    for seen, expected in ((encoder, 2), (other, 1)):
        compared = ComparedTeacher(model, seen)
        found = measure(model, encoder, Suite("words", rows, "t"), compared, context=64, listener=events.append)
        assert found.as_json()["rows"] == expected
    (warning,) = (event.text for event in events if isinstance(event, Warned))
    assert "1 row left out" in warning


def test_model_agrees_with_itself(models):
    student, _, encoder = models
    found = measure(student, encoder, suite(), ComparedTeacher(student)).as_json()
    assert found["kl_teacher_student"] == pytest.approx(0, abs=1e-12)
    assert found["agreement"] == 100


def test_batch_size_has_no_effect(models):
    student, teacher, encoder = models
    one = list(measure(student, encoder, suite(), ComparedTeacher(teacher), batch_size=1).lines())
    two = list(measure(student, encoder, suite(), ComparedTeacher(teacher), batch_size=4).lines())
    assert [line["where"] for line in one] == ["t:0", "t:1", "t:2", "t:3"]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b)


def test_long_rows_and_rows_without_reference_are_left_out(models):
    student, _, encoder = models
    events = []
    rows = suite(Row(prompt="x" * 70, references=("y",), where="t:4"), Row(prompt="a", where="t:5"))
    result = measure(student, encoder, rows, listener=events.append)
    assert result.as_json()["rows"] == 4
    assert any(isinstance(event, Warned) and "2 rows left out" in event.text for event in events)
    with raises_code("data.no_references", "words"):
        measure(student, encoder, Suite("words", [Row(prompt="a", where="t:5")], "t"))


def test_saved_figures_are_read_for_the_same_inputs(models, tmp_path):
    student, teacher, encoder = models
    result = measure(student, encoder, suite(), ComparedTeacher(teacher))
    save_references(result, tmp_path, {"weights": "1"})
    assert load_references(suite(), tmp_path, {"weights": "1"}) == result.as_json()
    assert load_references(suite(), tmp_path, {"weights": "2"}) is None
    assert read_references(tmp_path / "words") == list(result.lines())
