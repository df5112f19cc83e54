"""Check that errors of broken models and tokenizers mention the directory."""

import base64
import json

import pytest
from transformers import AutoModelForCausalLM

from distillm_cli.cli.app import main
from tests import tiny
from tests.command_line import assert_error_line

ROWS = [{"instruction": "Say", "input": a + b, "output": b + a} for a in "bcdefghk" for b in "lmnop"]


def run(capsys, *argv):
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


def commands(tmp_path, model):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    yield "generate", "--model", model, "--prompt", "abc"
    yield "eval", model, "--suite", rows
    yield "sft", "--model", model, "--data", rows, "--steps", "1", "--output", tmp_path / "out", "--quiet"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("context", [1, 2, 8])
def test_too_short_context_is_an_error(capsys, tmp_path, family, context):
    field = "n_positions" if family == "gpt2" else "max_position_embeddings"
    tiny.config(family, tiny.VOCAB, **{field: context}).save_pretrained(tmp_path / "m")
    tiny.tokenizer(size=tiny.VOCAB).save_pretrained(tmp_path / "m")
    for argv in commands(tmp_path, tmp_path / "m"):
        outcome = run(capsys, *argv, "--debug")
        assert_error_line(outcome, "model.context_too_short", tmp_path / "m", f"context of {context} token")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_shortest_context_generates(capsys, tmp_path, family):
    field = "n_positions" if family == "gpt2" else "max_position_embeddings"
    AutoModelForCausalLM.from_config(tiny.config(family, tiny.VOCAB, **{field: 24})).save_pretrained(tmp_path / "m")
    tiny.tokenizer(size=tiny.VOCAB).save_pretrained(tmp_path / "m")
    argv = ("generate", "--model", tmp_path / "m", "--prompt", "abc", "--set", "data.template=plain")
    code, _, err = run(capsys, *argv)
    assert code == 0, err


# The moment at which the tokenizer library panics → the character map that makes it panic.
CHARSMAPS = {"loading": b"", "tokenizing": b"\0" * 8}


@pytest.mark.parametrize("charsmap", CHARSMAPS)
def test_panicking_tokenizer_error_names_directory(capsys, tmp_path, charsmap):
    """Check the error of a panic in Rust code, which is a BaseException but not an Exception."""
    tiny.save(tmp_path / "m", "gpt2")
    file = tmp_path / "m/tokenizer.json"
    settings = json.loads(file.read_text())
    settings["normalizer"] = {
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode(CHARSMAPS[charsmap]).decode(),
    }
    file.write_text(json.dumps(settings))
    for argv in commands(tmp_path, tmp_path / "m"):
        assert_error_line(run(capsys, *argv, "--debug"), "model.unreadable", tmp_path / "m")


def test_panic_on_a_text_is_a_tokenizer_error(capsys, tmp_path, monkeypatch):
    """Check the error of a panic that depends on the text, where the model directory is not known."""
    from tokenizers import decoders

    def panic(*args, **kwargs):
        return decoders.Strip("a", 3, 3).decode(["a"])

    monkeypatch.setattr("distillm_cli.runs.generate.generate_responses", panic)
    outcome = run(capsys, "generate", "--model", "builtin", "--prompt", "hi", "--debug")
    assert_error_line(outcome, "model.tokenizer_failed", "index out of bounds")
