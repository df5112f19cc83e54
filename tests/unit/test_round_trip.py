"""Tokenizers that transformers changes: on saving, or on reading a SentencePiece file."""

from __future__ import annotations

import importlib.util
import io
import json

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distillm_cli.errors import ModelError
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.tokenizer_files import check_reload, load_tokenizer, sentencepiece_difference
from tests import families, tiny, typed


@pytest.fixture(scope="module")
def pieces() -> bytes:
    """A small SentencePiece model of Llama's kind: byte fallback, and a space put before every text."""
    text = iter(["which of these words is a word and which is not", "three lines of twelve words here"] * 20)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text, model_writer=model, vocab_size=300, model_type="bpe", byte_fallback=True, minloglevel=2
    )
    return model.getvalue()


def _llama(place, pieces: bytes) -> str:
    tiny.model("llama", 300).save_pretrained(place)
    (place / "tokenizer.model").write_bytes(pieces)
    return str(place)


def test_a_sentencepiece_file_that_is_read_otherwise_is_noticed(tmp_path, pieces, capsys):
    path = _llama(tmp_path / "model", pieces)
    tokenizer = load_tokenizer(path)
    expected = sentencepiece.SentencePieceProcessor(model_proto=pieces).encode("which words", out_type=str)
    wrong = sentencepiece_difference(path, None, tokenizer)
    assert (wrong is not None) == (tokenizer.tokenize("which words") != expected)
    argv = ("--model", path, "--data", families.rows(tmp_path / "rows.jsonl"), *families.QUICK)
    code, _, err = typed.call(capsys, "sft", *argv, "--output", tmp_path / "out", "--json")
    assert code == 0, err
    assert ("tokenizer.model differently from SentencePiece" in err) == (wrong is not None)


def test_a_tokenizer_json_settles_it(tmp_path, pieces):
    path = _llama(tmp_path / "model", pieces)
    load_tokenizer(path).save_pretrained(path)
    assert sentencepiece_difference(path, None, load_tokenizer(path)) is None


def test_a_tokenizer_that_comes_back_changed_is_refused(tmp_path):
    class Forgetful(PreTrainedTokenizerFast):
        """Forgets on saving how it cuts text."""

        def save_pretrained(self, place, **how):
            whole = json.loads(self.backend_tokenizer.to_str())
            whole["pre_tokenizer"] = None
            kept = Tokenizer.from_str(json.dumps(whole))
            return PreTrainedTokenizerFast(tokenizer_object=kept, eos_token="<eos>").save_pretrained(place, **how)

    words = {"<eos>": 0, "<unk>": 1, **{word: i for i, word in enumerate(["Which", "of", "these", "words"], 2)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    student = Backbone(tiny.model("llama"), Forgetful(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>"))
    with pytest.raises(ModelError, match="different token ids"):
        check_reload(student, is_borrowed=False)
    student.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    check_reload(student, is_borrowed=False)


def test_tekken_names_its_package(tmp_path, capsys):
    if importlib.util.find_spec("mistral_common") is not None:
        pytest.skip("mistral-common is installed")
    place = tmp_path / "model"
    tiny.save(place, "mistral", own_tokenizer=False)
    (place / "tekken.json").write_text('{"vocab": [], "config": {}}', encoding="utf-8")
    argv = ("--model", place, "--data", families.rows(tmp_path / "rows.jsonl"), "--output", tmp_path / "out", "--json")
    code, told, _ = typed.call(capsys, "sft", *argv)
    assert code == 4
    assert "mistral-common" in told["message"]
