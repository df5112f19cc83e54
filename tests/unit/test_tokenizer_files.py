"""Tokenizers that models bring along: one object for the same files, two for anything else, and refusals as they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from distillm_cli.errors import ModelError
from distillm_cli.models.tokenizer_files import TokenizerCache, load_tokenizer
from tests import tiny


def directory(place: Path, **fields) -> str:
    return str(tiny.save(place, own_tokenizer=tiny.tokenizer(size=tiny.VOCAB), **fields))


def test_a_teacher_and_a_student_of_the_same_files_share_one_tokenizer(tmp_path):
    teacher, student = directory(tmp_path / "teacher"), str(tmp_path / "student")
    shutil.copytree(teacher, student)
    weights = next(Path(student).glob("*.safetensors"))
    weights.write_bytes(b"other weights")
    (Path(student) / "README.md").write_text("a card of its own")
    read = TokenizerCache()
    assert read.load(teacher) is read.load(student) is read.load(teacher)
    assert read.load(teacher) is not TokenizerCache().load(teacher)
    assert read.load(teacher).get_vocab() == load_tokenizer(student).get_vocab()


def other_token(place: Path) -> None:
    told = (place / "tokenizer.json").read_text(encoding="utf-8")
    assert '"t40"' in told
    (place / "tokenizer.json").write_text(told.replace('"t40"', '"u40"'), encoding="utf-8")


def other_family(place: Path) -> None:
    told = json.loads((place / "config.json").read_text(encoding="utf-8"))
    (place / "config.json").write_text(json.dumps(told | {"tokenizer_class": "PreTrainedTokenizerFast"}))


def one_more_file(place: Path) -> None:
    (place / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")


@pytest.mark.parametrize("change", [other_token, other_family, one_more_file])
def test_whatever_may_make_a_difference_makes_two(change, tmp_path):
    teacher, student = directory(tmp_path / "teacher"), str(tmp_path / "student")
    shutil.copytree(teacher, student)
    change(Path(student))
    read = TokenizerCache()
    assert read.load(teacher) is not read.load(student)
    assert read.load(student).chat_template == load_tokenizer(student).chat_template
    assert read.load(student).get_vocab() == load_tokenizer(student).get_vocab()


def test_what_cannot_be_read_is_refused_each_time(tmp_path):
    place = Path(directory(tmp_path / "m"))
    (place / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError) as plain:
        load_tokenizer(str(place))
    read = TokenizerCache()
    for _ in range(2):
        with pytest.raises(ModelError) as caught:
            read.load(str(place))
        assert str(caught.value) == str(plain.value)
