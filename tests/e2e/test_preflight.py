"""Test the checks before the first step, each on rows or models that have the fault, by ``plan`` and by a run."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from tests import chat_models, tiny
from tests.chat_models import CHAT
from tests.command_line import assert_error

WORDS = ["one", "two", "six", "ten", "red", "blue", "green", "gray"]
PLAIN = ["--set", "data.template=plain", "--set", "train.threads=1", "--device", "cpu", "--dtype", "fp32"]


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows(count=40, **fields):
    return [{"instruction": f"{WORDS[i % 8]} {i}", "output": f"{WORDS[-1 - i % 8]}", **fields} for i in range(count)]


@pytest.fixture
def pair(tmp_path):
    return ["--teacher", tiny.save(tmp_path / "t", "llama", seed=1), "--student", tiny.save(tmp_path / "s", "llama")]


@pytest.fixture
def found(cli, tmp_path, pair):
    """Return a function that plans a run and returns its findings by code."""

    def plan(data, *more, models=pair, valid=None):
        source = data if isinstance(data, str) else write(tmp_path / "rows.jsonl", data)
        held_out = valid or write(tmp_path / "valid.jsonl", [{"instruction": "held out", "output": "gray"}] * 4)
        sets = ["--set", f"data.valid={held_out}"]
        code, result, err = cli("plan", *models, "--data", source, *sets, *PLAIN, "--json", *more)
        assert code == 0, err
        return {finding["code"]: finding for finding in result["findings"]} | {"answers": result["answers"]}

    return plan


def test_sound_run_has_no_warning(found):
    findings = found(rows())
    answers = findings.pop("answers")
    assert {f["code"] for f in findings.values() if f["severity"] == "warning"} <= {"teacher.loss"}  # of random models
    assert len(answers) == 4
    assert set(answers[0]["answers"]) == {"teacher", "student"} == set(answers[0]["ended"])
    assert answers[0]["prompt"].startswith("h e l d")


def test_teacher_that_is_no_better_is_a_warning(found, tmp_path):
    models = ["--teacher", tiny.save(tmp_path / "t"), "--student", tiny.save(tmp_path / "s")]
    finding = found(rows(), models=models)["teacher.loss"]
    assert finding["severity"] == "warning", "the models are equal"
    first, second = finding["what"].split("it has ")[1].split(" nats per token, the student before training ")
    assert first == second
    assert "distillm sft" in finding["cure"]


@pytest.mark.parametrize(
    ("data", "more", "code", "mention"),
    [
        (rows(20) * 2, (), "data.duplicates", "20 of 40 rows repeat another one, one of them 2 times"),
        ([*rows(20), *rows(20, output=" ")], (), "data.empty_responses", "20 responses of 40 rows are empty"),
        ([*rows(20), *rows(20, input="schÃ¶n")], (), "data.odd_characters", "20 rows of 40"),
        (rows(output="a" * 40), ("--set", "rollout.max_new_tokens=8"), "data.long_responses", "100% of the rows'"),
        (
            rows(output="a" * 40), ("--max-length", "24", "--set", "data.too_long=truncate"), "end.cut",
            "no response reaches the token that ends it",
        ),
        ([*rows(20), *rows(20, output="a" * 40)], ("--max-length", "32"), "data.dropped", "20 of 40 rows are left out"),
    ],
)  # fmt: skip
def test_rows_that_teach_the_wrong_thing_are_a_warning(found, data, more, code, mention):
    if code == "end.cut":
        more = (*more, "--set", "data.max_prompt_length=12")
    finding = found(data, *more)[code]
    assert finding["severity"] == "warning"
    assert mention in finding["what"]


def test_overlap_with_held_out_rows_is_a_warning(found, tmp_path):
    data = rows()
    finding = found(data, valid=write(tmp_path / "same.jsonl", data[:10]))["data.overlap"]
    assert (finding["severity"], finding["what"][:2]) == ("warning", "10")


def test_few_faulty_rows_are_a_note(found):
    assert found([*rows(40), rows(1)[0]])["data.duplicates"]["severity"] == "note"


def test_teacher_that_stops_elsewhere_is_a_warning_with_a_cure(found, tmp_path, pair):
    assert "end.teacher" not in found(rows())
    chosen = found(rows(), "--set", "data.eos=z")["end.teacher"]
    assert chosen["severity"] == "warning"
    assert "responses end with z, and the teacher stops at <eos>" in chosen["what"]
    assert "data.eos='<eos>'" in chosen["cure"]


def test_further_stop_tokens_are_saved_with_the_student(cli, tmp_path, pair):
    data = write(tmp_path / "rows.jsonl", rows())
    run = ["distill", *pair, "--data", data, *PLAIN, "--steps", "1", "--set", "eval.report_rows=0", "--json"]
    code, _, err = cli(*run, "--set", "student.stop_tokens=z", "--output", "out")
    assert code == 0, err
    stops = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    names = AutoTokenizer.from_pretrained("out").convert_ids_to_tokens(stops)
    assert set(names) == {"<eos>", "z"}
    outcome = cli(*run, "--set", "student.stop_tokens=none-such", "--output", "other")
    assert_error(outcome, "usage.unknown_token", "student.stop_tokens = 'none-such'")


def chat_pair(tmp_path, teacher=CHAT, student=CHAT):
    paths = [chat_models.save(tmp_path / "ct", teacher), chat_models.save(tmp_path / "cs", student, width=32)]
    return ["--teacher", paths[0], "--student", paths[1]]


def test_chat_models_with_plain_prompts_are_a_warning(found, tmp_path):
    finding = found(rows(8), models=chat_pair(tmp_path))["template.not_chat"]
    assert finding["severity"] == "warning"
    assert "data.template=chat" in finding["cure"]


def test_templates_that_write_different_prompts_are_a_warning(found, tmp_path):
    other = CHAT.replace("<sys>", "").replace("<bos>", "<bos><sys>")
    chat = ("--set", "data.template=chat")
    finding = found(rows(8), *chat, models=chat_pair(tmp_path, other))["template.different"]
    assert "rows.jsonl:1" in finding["what"]
    assert "template.different" not in found(rows(8), *chat, models=chat_pair(tmp_path, CHAT + " "), valid=None)


def test_template_without_a_generation_prompt_is_a_warning(found, tmp_path):
    silent = CHAT.replace("{%- if add_generation_prompt", "{%- if false and add_generation_prompt")
    assert silent != CHAT
    finding = found(rows(8), "--set", "data.template=chat", models=chat_pair(tmp_path, silent, silent))
    assert finding["template.no_generation_prompt"]["severity"] == "warning"


def test_doubled_beginning_of_sequence_is_a_warning(found, tmp_path):
    data = [{"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "one"}]}] * 8
    doubled = CHAT.replace("<bos>", "<bos><bos>")
    finding = found(data, "--set", "data.template=chat", models=chat_pair(tmp_path, doubled, doubled))
    assert "start with two <bos>" in finding["template.double_bos"]["what"]


def test_run_reports_warnings_and_strict_stops_it(cli, tmp_path, pair):
    data = write(tmp_path / "rows.jsonl", rows(20) * 2)
    held_out = write(tmp_path / "valid.jsonl", [{"instruction": "held out", "output": "gray"}] * 4)
    run = ["distill", *pair, "--data", data, "--set", f"data.valid={held_out}", *PLAIN, "--steps", "1", "--json"]
    run += ["--set", "eval.report_rows=0"]
    code, result, err = cli(*run, "--output", "out")
    assert code == 0, err
    assert "20 of 40 rows repeat another one" in " ".join(err.split())
    assert "data.duplicates" in {finding["code"] for finding in result["findings"]}
    outcome = cli(*run, "--strict", "--output", "strict")
    assert_error(outcome, "usage.strict", "or drop --strict")
    assert not (tmp_path / "strict").exists()
    assert_error(cli("plan", *pair, "--data", data, *PLAIN, "--strict", "--json"), "usage.strict")
    code, result, err = cli(*run[:-2], "--output", "out", "--resume", "--steps", "2", "--set", "eval.report_rows=0")
    assert (code, result["findings"]) == (0, []), err


def test_checks_change_no_bit_of_a_run(cli, tmp_path, pair, monkeypatch):
    from safetensors.torch import load_file

    from distillm_cli.runs import train

    data = write(tmp_path / "rows.jsonl", rows())
    run = ["distill", *pair, "--data", data, *PLAIN, "--steps", "3", "--set", "eval.report_rows=0", "--json"]
    assert cli(*run, "--output", "with")[0] == 0
    monkeypatch.setattr(train, "preflight", lambda *_: [])
    assert cli(*run, "--output", "without")[0] == 0
    first, second = (load_file(f"{name}/model.safetensors") for name in ("with", "without"))
    assert all(first[name].equal(second[name]) for name in first)
