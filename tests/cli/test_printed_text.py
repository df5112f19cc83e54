"""Check that text from users and files reaches the terminal without control characters and in lines of limited length."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import sys
from pathlib import Path

import pytest

from distillm_cli.cli import app
from distillm_cli.cli.streams import LONGEST_ERROR, report, shortened
from distillm_cli.errors import DataError
from distillm_cli.runs.run_results import Outcome, Sample
from distillm_cli.training.events import Note, Progress, RunStarted, Warned
from distillm_cli.ui.console import Terminal, console
from distillm_cli.ui.summary import facts, next_steps, outcome_table, samples_table, table
from distillm_cli.utils.text import escaped, printable
from tests import tiny
from tests.command_line import assert_error, call

ROOT = Path(__file__).resolve().parents[2]
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\r"
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def test_printable_leaves_text_unchanged():
    assert printable("a\tb\nφ 日本 👩‍🚀 é") == "a\tb\nφ 日本 👩‍🚀 é"
    assert printable(EVIL) == "�]0;owned��[2J�31m��"


def test_escaped_json_is_the_same_row():
    line = json.dumps({"output": EVIL + "φ\u2028"}, ensure_ascii=False) + "\n"
    assert not CONTROL_CHARACTERS.search(escaped(line))
    assert json.loads(escaped(line)) == json.loads(line)
    assert escaped(line).endswith('φ\\u2028"}\n')


@pytest.mark.parametrize("is_terminal", [True, False])
def test_console_prints_no_control_characters(is_terminal):
    out = io.StringIO()
    terminal = Terminal(file=out, force_terminal=is_terminal, width=90, height=40, _environ={})
    with console(stderr=terminal) as ui:
        for event in (Note(EVIL), Warned(EVIL), Progress(EVIL, 0, 10, EVIL), RunStarted(5, 0, 5, EVIL, 1, EVIL, EVIL)):
            ui(event)
        terminal.print(ui.frame())
        ui.show(EVIL, table(EVIL, [EVIL], [[EVIL]]), facts(EVIL, [(EVIL, EVIL)]))
        ui.show(outcome_table([Outcome(EVIL, 1.0, {EVIL: 1.0})], title=EVIL, caption=EVIL))
        ui.show(samples_table([Sample(EVIL, [EVIL], {EVIL: EVIL})]), next_steps(EVIL, prompt=EVIL))
    output = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", out.getvalue())  # the control sequences that Rich itself writes
    assert not CONTROL_CHARACTERS.search(output)
    assert "owned" in output
    assert "\x1b[2J" not in out.getvalue()
    assert "\x1b]0;" not in out.getvalue()


def test_column_width_fits_printed_text():
    out = io.StringIO()
    Terminal(file=out, width=60, _environ={}).print(table("", ["a", "b"], [["x\x1b\x1b\x1by", "end"]]))
    assert "│ x���y │ end │" in out.getvalue()


@pytest.mark.parametrize("length", [10, 11, 1000])
def test_shortened_text_has_start_and_end(length):
    text = "".join(str(i % 10) for i in range(5000))
    short = shortened(text, length)
    assert len(short) == length
    start, end = short.split(" … ")
    assert text.startswith(start)
    assert text.endswith(end)
    assert shortened(text, 5000) == text


def test_error_line_is_limited_but_json_is_complete(capsys):
    error = DataError("data.invalid_row", "x" * 100_000 + EVIL, hint="correct it")
    assert report(error, ["--json"]) == 3
    out, err = capsys.readouterr()
    assert len(err) <= LONGEST_ERROR + len("error: \n")
    assert err.endswith("; correct it\n")
    assert not CONTROL_CHARACTERS.search(err)
    assert json.loads(out) == {"status": "error", "code": 3, "error": error.code, "message": str(error)}
    assert "\x1b]0;owned\x07" in json.loads(out)["message"]


def test_names_and_rows_with_control_characters(tmp_path, capsys, monkeypatch):
    """Check control characters in a row, a column, a recipe, a model config and a path."""
    monkeypatch.chdir(tmp_path)
    evil = EVIL.replace("\r", "")
    tiny.save(tmp_path / "model")
    shutil.copytree("model", f"m{evil}")
    config = json.loads(Path("model/config.json").read_text())
    (tmp_path / f"m{evil}" / "config.json").write_text(json.dumps(config | {"model_type": evil}))
    Path(f"{evil}.jsonl").write_text(json.dumps({evil: "x"}) + "\n")
    Path("r.yaml").write_text(f"train: {{lr: {json.dumps(evil)}}}\n")
    for code, argv in [
        (3, ["sft", "--model", "model", "--data", f"{evil}.jsonl"]),
        (4, ["generate", "--model", f"m{evil}", "--prompt", "a", "--output", "o.jsonl"]),
        (4, ["generate", "--model", f"./none{evil}", "--prompt", "a", "--output", "o.jsonl", "--debug"]),
        (2, ["sft", "--recipe", "r.yaml"]),
        (2, ["sft", "--set", f"{evil}=1"]),
    ]:
        got, result, err = call(capsys, *argv, "--json")
        assert (got, result["code"]) == (code, code), err
        assert not CONTROL_CHARACTERS.search(err)


def test_recipe_on_a_terminal_has_no_control_characters(tmp_path):
    (tmp_path / "evil.yaml").write_text(f"# {EVIL}\ntrain:\n  lr: 0.1\n", encoding="utf-8")
    child, terminal = pty.fork()
    if child == 0:
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "distillm_cli", "recipes", "show", str(tmp_path / "evil.yaml")])
    output = b""
    try:
        while chunk := os.read(terminal, 4096):
            output += chunk
    except OSError:  # the other end of the terminal is closed
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert "# �]0;owned��[2J�31m��\r\ntrain:\r\n" in output.decode()


@pytest.mark.parametrize("words", ["sft --output", "sft --data", "eval", "generate --model m --prompt"])
def test_non_utf8_argument_is_an_error(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = call(capsys, *words.split(), "runs/\udcff", "--json")
    assert_error(outcome, "usage.not_utf8", "runs/\\udcff")
    assert not list(tmp_path.iterdir())
    assert app.main(["methods", "show", "φ"]) == 2, "non-ASCII letters are valid arguments"
