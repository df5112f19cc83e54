"""Models and tokenizers that cannot work: exit code 4, with the directory named."""

import base64
import json

import pytest
from transformers import AutoModelForCausalLM

from distillm_cli.cli.app import main
from tests import tiny

ROWS = [{"instruction": "Say", "input": a + b, "output": b + a} for a in "bcdefghk" for b in "lmnop"]


def run(capsys, tmp_path, *argv):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    code = main([str(a) for a in argv])
    return code, capsys.readouterr().err.splitlines()[-1]


def commands(tmp_path, model):
    rows = tmp_path / "rows.jsonl"
    yield "generate", "--model", model, "--prompt", "abc"
    yield "eval", model, "--suite", rows
    yield "sft", "--model", model, "--data", rows, "--steps", "1", "--output", tmp_path / "out", "--quiet"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("context", [1, 2, 8])
def test_a_context_without_room_is_refused(capsys, tmp_path, family, context):
    field = "n_positions" if family == "gpt2" else "max_position_embeddings"
    tiny.config(family, tiny.VOCAB, **{field: context}).save_pretrained(tmp_path / "m")
    tiny.tokenizer(size=tiny.VOCAB).save_pretrained(tmp_path / "m")
    for argv in commands(tmp_path, tmp_path / "m"):
        code, line = run(capsys, tmp_path, *argv)
        assert code == 4, line
        assert f"{tmp_path / 'm'}: a context of {context} token" in line


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_shortest_context_is_enough(capsys, tmp_path, family):
    field = "n_positions" if family == "gpt2" else "max_position_embeddings"
    AutoModelForCausalLM.from_config(tiny.config(family, tiny.VOCAB, **{field: 24})).save_pretrained(tmp_path / "m")
    tiny.tokenizer(size=tiny.VOCAB).save_pretrained(tmp_path / "m")
    code, line = run(
        capsys, tmp_path, "generate", "--model", tmp_path / "m", "--prompt", "abc", "--set", "data.template=plain"
    )
    assert code == 0, line


CHARSMAPS = {"when it is read": b"", "when it is used": b"\0" * 8}


@pytest.mark.parametrize("charsmap", CHARSMAPS)
def test_a_tokenizer_that_panics_is_named(capsys, tmp_path, charsmap):
    """Rust's panic comes as a BaseException that is no Exception."""
    tiny.save(tmp_path / "m", "gpt2")
    file = tmp_path / "m/tokenizer.json"
    told = json.loads(file.read_text())
    told["normalizer"] = {
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode(CHARSMAPS[charsmap]).decode(),
    }
    file.write_text(json.dumps(told))
    for argv in commands(tmp_path, tmp_path / "m"):
        code, line = run(capsys, tmp_path, *argv)
        assert (code, str(tmp_path / "m") in line, line.startswith("error: ")) == (4, True, True), line


def test_a_panic_over_one_text_is_no_unexpected_error(capsys, tmp_path, monkeypatch):
    """One that only some texts meet: no directory is known there, but the kind of fault is."""
    from tokenizers import decoders

    def panics(*args, **kwargs):
        return decoders.Strip("a", 3, 3).decode(["a"])

    monkeypatch.setattr("distillm_cli.runs.generate.generate_responses", panics)
    code, line = run(capsys, tmp_path, "generate", "--model", "builtin", "--prompt", "hi")
    assert code == 4
    assert line.startswith("error: the tokenizer failed; index out of bounds")
