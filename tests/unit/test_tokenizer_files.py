"""Test the tokenizer cache: one object for identical files, separate ones otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from distillm_cli.models.tokenizer_files import TokenizerCache, load_tokenizer
from tests import tiny
from tests.codes import raises_code


def save_model(path: Path, **fields) -> str:
    return str(tiny.save(path, own_tokenizer=tiny.tokenizer(size=tiny.VOCAB), **fields))


def test_identical_files_share_one_tokenizer(tmp_path):
    teacher, student = save_model(tmp_path / "teacher"), str(tmp_path / "student")
    shutil.copytree(teacher, student)
    weights = next(Path(student).glob("*.safetensors"))
    weights.write_bytes(b"other weights")
    (Path(student) / "README.md").write_text("another model card")
    cache = TokenizerCache()
    assert cache.load(teacher) is cache.load(student) is cache.load(teacher)
    assert cache.load(teacher) is not TokenizerCache().load(teacher)
    assert cache.load(teacher).get_vocab() == load_tokenizer(student).get_vocab()


def other_token(path: Path) -> None:
    content = (path / "tokenizer.json").read_text(encoding="utf-8")
    assert '"t40"' in content
    (path / "tokenizer.json").write_text(content.replace('"t40"', '"u40"'), encoding="utf-8")


def other_family(path: Path) -> None:
    content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps(content | {"tokenizer_class": "PreTrainedTokenizerFast"}))


def additional_file(path: Path) -> None:
    (path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")


@pytest.mark.parametrize("change", [other_token, other_family, additional_file])
def test_different_files_have_separate_tokenizers(change, tmp_path):
    teacher, student = save_model(tmp_path / "teacher"), str(tmp_path / "student")
    shutil.copytree(teacher, student)
    change(Path(student))
    cache = TokenizerCache()
    assert cache.load(teacher) is not cache.load(student)
    assert cache.load(student).chat_template == load_tokenizer(student).chat_template
    assert cache.load(student).get_vocab() == load_tokenizer(student).get_vocab()


def test_unreadable_tokenizer_is_rejected_each_time(tmp_path):
    path = Path(save_model(tmp_path / "m"))
    (path / "tokenizer.json").write_text("{")
    with raises_code("model.unreadable", str(path)) as plain:
        load_tokenizer(str(path))
    cache = TokenizerCache()
    for _ in range(2):
        with raises_code("model.unreadable") as caught:
            cache.load(str(path))
        assert str(caught.value) == str(plain.value)
