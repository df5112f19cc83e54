"""Test tokenizers that transformers changes when it saves them or reads a SentencePiece file."""

from __future__ import annotations

import importlib.util
import io
import json

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distillm_cli.models.backbone import Backbone
from distillm_cli.models.tokenizer_files import check_reload, load_tokenizer, sentencepiece_difference
from tests import command_line, families, tiny
from tests.codes import raises_code


@pytest.fixture(scope="module")
def pieces() -> bytes:
    """Return a small SentencePiece model like Llama's, with byte fallback and a leading space."""
    text = iter(["which of these words is a word and which is not", "three lines of twelve words here"] * 20)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text, model_writer=model, vocab_size=300, model_type="bpe", byte_fallback=True, minloglevel=2
    )
    return model.getvalue()


def _llama(directory, pieces: bytes) -> str:
    tiny.model("llama", 300).save_pretrained(directory)
    (directory / "tokenizer.model").write_bytes(pieces)
    return str(directory)


def test_differently_read_sentencepiece_file_is_reported(tmp_path, pieces, capsys):
    path = _llama(tmp_path / "model", pieces)
    tokenizer = load_tokenizer(path)
    expected = sentencepiece.SentencePieceProcessor(model_proto=pieces).encode("which words", out_type=str)
    difference = sentencepiece_difference(path, None, tokenizer)
    assert (difference is not None) == (tokenizer.tokenize("which words") != expected)
    argv = ("--model", path, "--data", families.rows(tmp_path / "rows.jsonl"), *families.QUICK)
    code, _, err = command_line.call(capsys, "sft", *argv, "--output", tmp_path / "out", "--json")
    assert code == 0, err
    assert ("tokenizer.model differently from SentencePiece" in err) == (difference is not None)


def test_tokenizer_json_takes_precedence(tmp_path, pieces):
    path = _llama(tmp_path / "model", pieces)
    load_tokenizer(path).save_pretrained(path)
    assert sentencepiece_difference(path, None, load_tokenizer(path)) is None


def test_tokenizer_changed_by_saving_is_rejected(tmp_path):
    class LossyTokenizer(PreTrainedTokenizerFast):
        """Save the tokenizer without its pre-tokenizer."""

        def save_pretrained(self, directory, **options):
            content = json.loads(self.backend_tokenizer.to_str())
            content["pre_tokenizer"] = None
            saved = Tokenizer.from_str(json.dumps(content))
            return PreTrainedTokenizerFast(tokenizer_object=saved, eos_token="<eos>").save_pretrained(
                directory, **options
            )

    words = {"<eos>": 0, "<unk>": 1, **{word: i for i, word in enumerate(["Which", "of", "these", "words"], 2)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    student = Backbone(
        tiny.model("llama"), LossyTokenizer(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    )
    with raises_code("model.tokenizer_not_kept"):
        check_reload(student, is_borrowed=False)
    student.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    check_reload(student, is_borrowed=False)


def test_tekken_error_names_the_missing_package(tmp_path, capsys):
    if importlib.util.find_spec("mistral_common") is not None:
        pytest.skip("mistral-common is installed")
    directory = tmp_path / "model"
    tiny.save(directory, "mistral", own_tokenizer=False)
    (directory / "tekken.json").write_text('{"vocab": [], "config": {}}', encoding="utf-8")
    argv = (
        "--model",
        directory,
        "--data",
        families.rows(tmp_path / "rows.jsonl"),
        "--output",
        tmp_path / "out",
        "--json",
    )
    code, report, _ = command_line.call(capsys, "sft", *argv)
    assert code == 4
    assert "mistral-common" in report["message"]
