"""Rows read and tokenised before torch is there: the same rows, ids and complaints as without, or nothing at all."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distillm_cli.config.schema import Data
from distillm_cli.core.events import Note, Warned
from distillm_cli.data.ahead import Ahead
from distillm_cli.data.bare_ids import bare_ids
from distillm_cli.data.batching import tokenise
from distillm_cli.data.early import CHUNK, Early
from distillm_cli.data.prompts import Encoder
from distillm_cli.data.sources import load_rows
from distillm_cli.errors import DataError
from tests import tiny


def working() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("tokenising")]


def lines(place: Path, rows: list[dict]) -> Path:
    place.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return place


def pairs(n: int) -> list[dict]:
    return [{"prompt": f"t{3 + i % 40} t{4 + i % 30}", "output": f"t{5 + i % 20}"} for i in range(n)]


@pytest.fixture
def tokenizer_file(tmp_path) -> Path:
    tiny.tokenizer(size=tiny.VOCAB).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer" / "tokenizer.json"


def known(data: Data, file: Path | None) -> Early:
    return Early(data, lambda: file)


@pytest.mark.parametrize("part", ["gpt2", "tiny"])
def test_what_was_made_early_is_what_the_tokenizer_makes(part, shared_data, tmp_path, tokenizer_file):
    if part == "gpt2":
        source, place = str(shared_data / "dolly"), shared_data / "tokenizers" / "gpt2"
    else:
        source, place = str(lines(tmp_path / "rows.jsonl", pairs(3 * CHUNK))), tokenizer_file.parent
    data = Data(source=source, limit=1_300)
    tokenizer = AutoTokenizer.from_pretrained(place)
    with known(data, place / "tokenizer.json") as early:
        train, valid = early.rows("train", print), early.rows("valid", print)
        made = early.made(tokenizer)
        assert len(made) == -(-len(train) // CHUNK) + -(-len(valid) // CHUNK)
        with Ahead((train, valid), data.template, tokenizer, early) as ahead:
            encoder = Encoder(tokenizer, data, ends=ahead.ends(tokenizer))
            ready = tokenise(train, encoder, data, ahead=ahead)
    assert not working()
    assert list(train) == list(load_rows(data, "train"))
    alone = tokenise(train, Encoder(tokenizer, data), data)
    assert len(ready) == len(alone) > CHUNK
    for mine, plain in zip(ready.sequences, alone.sequences, strict=True):
        assert (mine.row, mine.prompt.tolist(), mine.response.tolist()) == (
            plain.row,
            plain.prompt.tolist(),
            plain.response.tolist(),
        )


class Shouting(PreTrainedTokenizerFast):
    """The rules of its file, and a way of its own before them."""

    def __call__(self, text, **kwargs):
        return super().__call__([one.upper() for one in text] if isinstance(text, list) else text.upper(), **kwargs)


def other_class(file: Path):
    return Shouting.from_pretrained(file.parent)


def other_token(file: Path):
    tokenizer = AutoTokenizer.from_pretrained(file.parent)
    file.write_text(file.read_text(encoding="utf-8").replace('"t40"', '"u40"'), encoding="utf-8")
    return tokenizer


def another_special_token(file: Path):
    tokenizer = AutoTokenizer.from_pretrained(file.parent)
    tokenizer.add_special_tokens({"additional_special_tokens": ["t3 t4"]})
    return tokenizer


def splits_special_tokens(file: Path):
    return AutoTokenizer.from_pretrained(file.parent, split_special_tokens=True)


def damaged(file: Path):
    tokenizer = AutoTokenizer.from_pretrained(file.parent)
    file.write_text("{")
    return tokenizer


@pytest.mark.parametrize("change", [other_class, other_token, another_special_token, splits_special_tokens, damaged])
def test_rules_that_are_not_the_tokenizers_are_not_used(change, tmp_path, tokenizer_file):
    data = Data(source=str(lines(tmp_path / "rows.jsonl", pairs(2 * CHUNK))), seed=4)
    tokenizer = change(tokenizer_file)
    with known(data, tokenizer_file) as early:
        train = early.rows("train", print)
        assert early.made(tokenizer) == {}
        with Ahead((train,), data.template, tokenizer, early) as ahead:
            taken = ahead.take(train, 0, tokenizer)
    expected = bare_ids(train[:CHUNK], data.template, tokenizer)
    assert [ids.tolist() for ids in taken.prompts] == [ids.tolist() for ids in expected.prompts]
    assert not working()


def test_what_only_stands_around_a_text_does_not_matter(tmp_path, tokenizer_file):
    """A file with its own beginning of sequence and its own limit: bare ids have neither."""
    told = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    told["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    template = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "t3", "type_id": 0}}]
    special = {"t3": {"id": "t3", "ids": [3], "tokens": ["t3"]}}
    told["post_processor"] = {
        "type": "TemplateProcessing",
        "single": template,
        "pair": template,
        "special_tokens": special,
    }
    other = tmp_path / "other.json"
    other.write_text(json.dumps(told), encoding="utf-8")
    data = Data(
        source=str(lines(tmp_path / "rows.jsonl", [{"prompt": "t5 t6 t7 t8 t9", "output": "t4"}] * 30 + pairs(30)))
    )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_file.parent)
    with known(data, other) as early:
        train = early.rows("train", print)
        (made,) = (made.result() for (rows, _), made in early.made(tokenizer).items() if rows == id(train))
    assert [ids.tolist() for ids in made.prompts] == [tokenizer(row.prompt)["input_ids"] for row in train]


def test_conversations_wait_for_the_chat_template(tmp_path, tokenizer_file):
    said = [({"role": "user", "content": "t5"}, {"role": "assistant", "content": f"t{6 + i}"}) for i in range(30)]
    talk = [{"messages": list(messages)} for messages in said]
    data = Data(source=str(lines(tmp_path / "rows.jsonl", pairs(CHUNK) + talk)))
    with known(data, tokenizer_file) as early:
        assert early.rows("train", print)
        assert early.made(AutoTokenizer.from_pretrained(tokenizer_file.parent)) == {}


def test_complaints_about_rows_are_those_of_reading_them(tmp_path, tokenizer_file):
    rows = pairs(80)
    rows[41] = {"prompt": "t5"}
    file = lines(tmp_path / "rows.jsonl", rows)

    def told(read, data: Data) -> tuple:
        said = []
        try:
            found = [list(read(split, said.append)) for split in ("train", "valid")]
        except DataError as error:
            found = (str(error), error.exit_code)
        return found, said

    skipping = Data(source=str(file), skip_bad_rows=True)
    for data in (Data(source=str(file)), skipping, Data(source=str(tmp_path / "no.jsonl"))):
        with known(data, tokenizer_file) as early:
            found = told(early.rows, data)
        assert found == told(lambda split, listener, data=data: load_rows(data, split, listener=listener), data)
    with known(skipping, tokenizer_file) as early:
        said = told(early.rows, skipping)[1]
    assert [type(event) for event in said] == [Warned, Note]
    assert "rows.jsonl:42" in said[0].text


def test_it_may_be_left_at_any_time(tmp_path, tokenizer_file):
    data = Data(source=str(lines(tmp_path / "rows.jsonl", pairs(40 * CHUNK))))

    def stopped():
        with known(data, tokenizer_file) as early, early:
            assert working()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not working()


def test_a_source_on_the_hub_is_not_begun_before_it_is_asked_for():
    with known(Data(source="somebody/something"), None) as early:
        assert not working()
        with pytest.raises(DataError, match="somebody/something"):
            early.rows("train", print)


def test_it_needs_neither_torch_nor_transformers(tmp_path, tokenizer_file):
    source = lines(tmp_path / "rows.jsonl", pairs(CHUNK + 100))
    script = f"""
import sys
from distillm_cli.cli.reading import reading
from distillm_cli.config.schema import Recipe
recipe = Recipe.model_validate({{
    "data": {{"source": {str(source)!r}}}, "student": {{"path": {str(tokenizer_file.parent)!r}}},
}})
with reading(recipe) as early:
    rows = early.rows("train", print)
    rules, made = early._planned.result()
    print(len(rows), sum(len(chunk.result().prompts) for chunk in made.values()))
print(sorted({{"torch", "transformers", "datasets"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = load_rows(Data(source=str(source)), "train")
    assert done.stdout.splitlines()[-2:] == [f"{len(rows)} {CHUNK + 100}", "[]"]


def test_a_run_that_began_early_is_the_run_that_did_not(tmp_path):
    from distillm_cli.cli.assembly import prepare
    from distillm_cli.cli.reading import reading
    from distillm_cli.config.load import resolve

    teacher = tiny.save(tmp_path / "teacher", own_tokenizer=tiny.tokenizer(size=tiny.VOCAB))
    student = tiny.save(tmp_path / "student", own_tokenizer=tiny.tokenizer(size=tiny.VOCAB))
    source = lines(tmp_path / "rows.jsonl", pairs(200))
    flags = {"teacher.path": str(teacher), "student.path": str(student), "data.source": str(source)}
    recipe = resolve(command="distill", recipe=None, flags=flags, sets=[]).recipe
    with reading(recipe) as early:
        begun = prepare(recipe, print, early)
    whole = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": 1})})  # nothing is made ahead
    plain = prepare(whole, print)
    assert len(begun.train) == len(plain.train) == 190
    told = [
        [(s.prompt.tolist(), s.response.tolist()) for examples in (run.train, run.valid) for s in examples.sequences]
        for run in (begun, plain)
    ]
    assert told[0] == told[1]
