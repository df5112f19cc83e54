"""Talk to models: prompts, memory, commands, and answers equal to those of ``generate``."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
import torch

from distillm_cli.cli.app import main
from distillm_cli.data.rows import Row
from distillm_cli.models.loading import load_backbone
from distillm_cli.rollouts.sampler import Sampling, sample, stream
from distillm_cli.runs.chat_session import open_session, run_command
from distillm_cli.runs.inference import Settings
from distillm_cli.training.events import silent
from tests import chat_models, tiny
from tests.codes import raises_code
from tests.command_line import assert_error_line, flags

TEACHER = "builtin:pronounce"
WORDS = ("process", "orangutan")
INSTRUCTION = "Pronounce the word."


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> str:
    return chat_models.save(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def talk(capsys, monkeypatch):
    """Return a function: lines of stdin and a command line → (exit code, stdout, stderr)."""

    def call(text: str | bytes, *argv: str) -> tuple[int, str, str]:
        raw = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        capsys.readouterr()
        code = main(["chat", *argv, "--debug"])
        return code, *capsys.readouterr()

    return call


def session(model: str, teacher: str | None = None, system: str | None = None, **given):
    return open_session(model, teacher, Settings(flags=flags("chat", **given)), silent, system)


@pytest.mark.parametrize("family", ["llama", "mistral", "t5", "bart"])
def test_streamed_tokens_are_those_of_sample(family, tmp_path):
    fields = {"forced_bos_token_id": 3} if family == "bart" else {}
    path = tiny.save(tmp_path / "model", family, **fields)
    model = load_backbone(path, dtype=torch.float32, device=torch.device("cpu"))
    prompt = np.arange(1, 9, dtype=np.int32)
    for sampling in (
        Sampling(temperature=0.9, top_p=0.9, max_new_tokens=12),
        Sampling(temperature=0.0, max_new_tokens=12),
    ):
        *_, last = stream(model, prompt, sampling, (7, 3))
        (expected,) = sample(model, [prompt], sampling, [(7, 3)])
        assert last.tolist() == expected.tokens.tolist()


def test_answers_side_by_side_equal_those_of_generate(talk, capsys):
    rows = "".join(json.dumps({"instruction": INSTRUCTION, "input": word}) + "\n" for word in WORDS)
    argv = ("--template", "plain", "--temperature", "0", "--max-new-tokens", "24")
    code, out, _ = talk(
        "".join(f"{word}\n\n" for word in WORDS), TEACHER, "--teacher", TEACHER, "--system", INSTRUCTION, *argv
    )
    assert code == 0
    lines = out.splitlines()
    sys.stdin = io.TextIOWrapper(io.BytesIO(rows.encode()))
    assert main(["generate", "--model", TEACHER, "--input", "-", *argv]) == 0
    expected = [json.loads(line)["output"].strip() for line in capsys.readouterr().out.splitlines()]
    assert [line.removeprefix("student: ").strip() for line in lines[::2]] == expected
    assert [line.removeprefix("teacher: ").strip() for line in lines[1::2]] == expected


def test_chat_template_reads_the_conversation(chat_model):
    found = session(chat_model, chat_model, system="Be brief.", max_new_tokens=6)
    student, teacher = found.participants
    *_, first = found.answer("one?")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one?"}]
    messages += [{"role": "assistant", "content": first["student"]}, {"role": "user", "content": "two?"}]
    expected = student.encoder.prompt_ids(Row(messages=messages))
    assert student.prompt("two?", found.system).tolist() == expected.tolist()
    assert teacher.messages[1]["content"] == first["teacher"] == first["student"]  # the same model and random numbers
    assert run_command(found, "/reset") == "the conversation starts again"
    fresh = student.encoder.prompt_ids(Row(messages=[messages[0], messages[-1]]))
    assert student.prompt("two?", found.system).tolist() == fresh.tolist()


def test_stopped_answer_stays_in_the_conversation(chat_model):
    found = session(chat_model, max_new_tokens=50, seed=3)
    answers = found.answer("one?")
    for so_far in answers:
        if so_far["model"]:
            break
    answers.close()  # as Ctrl-C does
    assert found.participants[0].messages[1] == {"role": "assistant", "content": so_far["model"]}


def test_commands_change_the_settings(chat_model):
    found = session(chat_model)
    run_command(found, "/temperature 0.3")
    run_command(found, "/max-tokens 5")
    run_command(found, "/system You are a parrot.")
    assert (found.sampling.temperature, found.sampling.max_new_tokens, found.system) == (0.3, 5, "You are a parrot.")
    run_command(found, "/system")
    assert found.system is None
    assert "/temperature T" in run_command(found, "/help")
    assert run_command(found, "/exit") is None
    for line, code in (("/bogus", "usage.unknown_command"), ("/temperature -1", "usage.invalid_value")):
        with raises_code(code, line.split()[0]):
            run_command(found, line)
    with raises_code("usage.invalid_value", "/max-tokens alone"):
        run_command(found, "/max-tokens")


def test_conversation_goes_on_after_an_error(talk, chat_model):
    text = f"/temperature x\n{'long ' * 600}\nhello\n/exit\nnot read\n"
    code, out, err = talk(text, chat_model, "--max-new-tokens", "4", "--temperature", "0")
    assert code == 0
    assert len(out.splitlines()) >= 1
    errors = [line for line in err.splitlines() if line.startswith("error")]
    assert len(errors) == 2
    assert "/temperature = x" in errors[0]
    assert "room" in errors[1] or "context" in errors[1]


def test_encoder_decoder_answers(talk, tmp_path):
    model = tiny.save(tmp_path / "t5", "t5")
    code, out, _ = talk("abc\nbcd\n", model, "--template", "plain", "--max-new-tokens", "4")
    assert code == 0
    assert len(out.splitlines()) == 2


def test_models_that_cannot_answer_are_one_line(talk, tmp_path):
    encoder = tiny.save_encoder(tmp_path / "encoder")
    assert_error_line(talk("a\n", encoder), "model.not_causal", "encoder")
    assert_error_line(talk("a\n", str(tmp_path / "absent")), "model.not_found", "absent")
    assert_error_line(talk("a\n", TEACHER, "--top-p", "0"), "recipe.invalid_value", "--top-p")
    assert_error_line(talk(b"\xff\n", TEACHER, "--template", "plain"), "data.not_utf8", "line 1")
