"""Rows read and tokenized before torch is there: the same rows, ids and complaints as without, or nothing at all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distillm_cli.config.schema import DataConfig, Recipe
from distillm_cli.data import early as early_module
from distillm_cli.data import helper
from distillm_cli.data.ahead import Ahead
from distillm_cli.data.batching import tokenize
from distillm_cli.data.early import Early
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.sources import load_rows
from distillm_cli.data.templates import Renderer
from distillm_cli.data.token_ids import CHUNK
from distillm_cli.errors import DataError
from distillm_cli.runs.start import prefetch_rows
from distillm_cli.training.events import Note, Warned
from tests import tiny

DataConfig = partial(DataConfig, max_length=512, max_prompt_length=256)  # as of a run whose models are known


def working() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("tokenizing")]


def lines(place: Path, rows: list[dict]) -> Path:
    place.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return place


def pairs(n: int) -> list[dict]:
    return [{"prompt": f"t{3 + i % 40} t{4 + i % 30}", "output": f"t{5 + i % 20}"} for i in range(n)]


@pytest.fixture
def tokenizer_file(tmp_path) -> Path:
    tiny.tokenizer(size=tiny.VOCAB).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer" / "tokenizer.json"


def known(data: DataConfig, file: Path | None) -> Early:
    return Early(data, lambda: file)


@pytest.mark.parametrize("part", ["gpt2", "tiny"])
def test_what_was_made_early_is_what_the_tokenizer_makes(part, shared_data, tmp_path, tokenizer_file):
    if part == "gpt2":
        source, place = str(shared_data / "dolly"), shared_data / "tokenizers" / "gpt2"
    else:
        source, place = str(lines(tmp_path / "rows.jsonl", pairs(3 * CHUNK))), tokenizer_file.parent
    data = DataConfig(source=source, limit=1_300)
    tokenizer = AutoTokenizer.from_pretrained(place)
    with known(data, place / "tokenizer.json") as early:
        train, valid = early.rows("train", print), early.rows("valid", print)
        made = early.made(tokenizer)
        assert len(made) == -(-len(train) // CHUNK) + -(-len(valid) // CHUNK)
        with Ahead((train, valid), data, tokenizer, early) as ahead:
            encoder = Encoder(tokenizer, data, affixes=ahead.affixes(tokenizer))
            ready = tokenize(train, encoder, data, ahead=ahead)
    assert not working()
    assert list(train) == list(load_rows(data, "train"))
    alone = tokenize(train, Encoder(tokenizer, data), data)
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
    data = DataConfig(source=str(lines(tmp_path / "rows.jsonl", pairs(2 * CHUNK))), seed=4)
    tokenizer = change(tokenizer_file)
    with known(data, tokenizer_file) as early:
        train = early.rows("train", print)
        assert early.made(tokenizer) == {}
        with Ahead((train,), data, tokenizer, early) as ahead:
            taken = ahead.take(train, 0, tokenizer)
    expected = [tokenizer(row.prompt, add_special_tokens=False)["input_ids"] for row in train[:CHUNK]]
    assert [ids.prompt.tolist() for ids in taken] == expected
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
    data = DataConfig(
        source=str(lines(tmp_path / "rows.jsonl", [{"prompt": "t5 t6 t7 t8 t9", "output": "t4"}] * 30 + pairs(30)))
    )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_file.parent)
    with known(data, other) as early:
        train = early.rows("train", print)
        (made,) = (made.result() for (rows, _), made in early.made(tokenizer).items() if rows == id(train))
    assert [ids.prompt.tolist() for ids in made] == [tokenizer(row.prompt)["input_ids"] for row in train]


def test_conversations_wait_for_the_chat_template(tmp_path, tokenizer_file):
    said = [({"role": "user", "content": "t5"}, {"role": "assistant", "content": f"t{6 + i}"}) for i in range(30)]
    talk = [{"messages": list(messages)} for messages in said]
    data = DataConfig(source=str(lines(tmp_path / "rows.jsonl", pairs(CHUNK) + talk)))
    with known(data, tokenizer_file) as early:
        assert early.rows("train", print)
        assert early.made(AutoTokenizer.from_pretrained(tokenizer_file.parent)) == {}


def test_complaints_about_rows_are_those_of_reading_them(tmp_path, tokenizer_file):
    rows = pairs(80)
    rows[41] = {"prompt": "t5"}
    file = lines(tmp_path / "rows.jsonl", rows)

    def told(read, data: DataConfig) -> tuple:
        said = []
        try:
            found = [list(read(split, said.append)) for split in ("train", "valid")]
        except DataError as error:
            found = (str(error), error.exit_code)
        return found, said

    skipping = DataConfig(source=str(file), skip_bad_rows=True)
    for data in (DataConfig(source=str(file)), skipping, DataConfig(source=str(tmp_path / "no.jsonl"))):
        with known(data, tokenizer_file) as early:
            found = told(early.rows, data)
        assert found == told(lambda split, listener, data=data: load_rows(data, split, listener=listener), data)
    with known(skipping, tokenizer_file) as early:
        said = told(early.rows, skipping)[1]
    assert [type(event) for event in said] == [Warned, Note, Note]
    assert "rows.jsonl:42" in said[0].text


def test_it_may_be_left_at_any_time(tmp_path, tokenizer_file):
    data = DataConfig(source=str(lines(tmp_path / "rows.jsonl", pairs(40 * CHUNK))))

    def stopped():
        with known(data, tokenizer_file) as early, early:
            assert working()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not working()


def test_a_source_on_the_hub_is_not_begun_before_it_is_asked_for():
    with known(DataConfig(source="somebody/something"), None) as early:
        assert not working()
        with pytest.raises(DataError, match="somebody/something"):
            early.rows("train", print)


def test_it_needs_neither_torch_nor_transformers(tmp_path, tokenizer_file):
    source = lines(tmp_path / "rows.jsonl", pairs(CHUNK + 100))
    script = f"""
import sys
from distillm_cli.runs.start import prefetch_rows
from distillm_cli.config.schema import Recipe
recipe = Recipe.model_validate({{
    "data": {{"source": {str(source)!r}}}, "student": {{"path": {str(tokenizer_file.parent)!r}}},
}})
with prefetch_rows(recipe) as early:
    rows = early.rows("train", print)
    rules, made = early._planned.result()
    print(len(rows), sum(len(chunk.result()) for chunk in made.values()))
print(sorted({{"torch", "transformers", "datasets"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = load_rows(DataConfig(source=str(source)), "train")
    assert done.stdout.splitlines()[-2:] == [f"{len(rows)} {CHUNK + 100}", "[]"]


def test_a_run_that_began_early_is_the_run_that_did_not(tmp_path):
    from distillm_cli.config.load import resolve
    from distillm_cli.runs.defaults import fitted
    from distillm_cli.runs.prepare import prepare

    teacher = tiny.save(tmp_path / "teacher", own_tokenizer=tiny.tokenizer(size=tiny.VOCAB))
    student = tiny.save(tmp_path / "student", own_tokenizer=tiny.tokenizer(size=tiny.VOCAB))
    source = lines(tmp_path / "rows.jsonl", pairs(200))
    flags = {"teacher.path": str(teacher), "student.path": str(student), "data.source": str(source)}
    recipe = fitted(resolve(command="distill", recipe=None, flags=flags, sets=[])).recipe
    with prefetch_rows(recipe) as early:
        begun = prepare(recipe, print, early)
    whole = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": 1})})  # nothing is made ahead
    plain = prepare(whole, print)
    assert len(begun.train) == len(plain.train) == 190
    told = [
        [(s.prompt.tolist(), s.response.tolist()) for examples in (run.train, run.valid) for s in examples.sequences]
        for run in (begun, plain)
    ]
    assert told[0] == told[1]


# ------------------------------------------------------------------------------------------ a process that does it


@pytest.fixture
def before_torch(monkeypatch):
    """As it is at the start of a command: torch not imported, and a core to spare. The processes started in it."""
    started = []

    class Watched(helper.Helper):
        def __init__(self, *args):
            super().__init__(*args)
            started.append(self._process)

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(early_module, "cores", lambda: 2)
    monkeypatch.setattr(early_module, "Helper", Watched)
    return started


def ids_of(made: dict, rows) -> list[list[list[int]]]:
    """Prompts and responses of all chunks of some rows, in order."""
    chunks = [made[id(rows), at].result() for at in range(0, len(rows), CHUNK)]
    return [[getattr(ids, part).tolist() for chunk in chunks for ids in chunk] for part in ("prompt", "response")]


@pytest.mark.parametrize("named", ["dolly", "builtin"])
def test_a_process_makes_what_the_thread_makes(named, shared_data, before_torch):
    """Same rows, same words said, same ids: real rows by GPT-2's rules, and the built-in ones."""
    place = shared_data / "tokenizers" / "gpt2"
    source = str(shared_data / "dolly" / "train.jsonl") if named == "dolly" else named
    recipe = Recipe.model_validate(
        {"data": {"source": source, "limit": 1_200, "size": 1_200}, "student": {"path": str(place)}}
    )
    tokenizer = AutoTokenizer.from_pretrained(place)
    said, plainly_said = [], []
    with prefetch_rows(recipe) as early:
        train, valid = early.rows("train", said.append), early.rows("valid", said.append)
        made = early.made(tokenizer)
        ids = [ids_of(made, rows) for rows in (train, valid)]
    (process,) = before_torch
    assert process.returncode is not None
    plain = [load_rows(recipe.data, split, listener=plainly_said.append) for split in ("train", "valid")]
    assert [list(train), list(valid)] == [list(rows) for rows in plain]
    assert (train.name, train.path, str(valid)) == (plain[0].name, plain[0].path, str(plain[1]))
    assert said == plainly_said
    for mine, rows in zip(ids, plain, strict=True):
        texts = [Renderer(recipe.data).text(row).text for row in rows]
        whole = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        assert [prompt + response for prompt, response in zip(*mine, strict=True)] == whole


def test_what_goes_wrong_in_the_process_is_told_here(tmp_path, tokenizer_file, before_torch):
    rows = pairs(80)
    rows[41] = {"prompt": "t5"}
    data = DataConfig(source=str(lines(tmp_path / "rows.jsonl", rows)))
    with Early(data, partial(Path, tokenizer_file)) as early, pytest.raises(DataError, match=r"rows\.jsonl:42"):
        early.rows("train", print)
    assert len(before_torch) == 1


@pytest.mark.parametrize("when", ["at once", "between the rows and their ids"])
def test_a_process_that_dies_costs_nothing(when, tmp_path, tokenizer_file, before_torch):
    """Killed (the system was out of memory, say): the rows are read here, the ids are made later."""
    data = DataConfig(source=str(lines(tmp_path / "rows.jsonl", pairs(20 * CHUNK))))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_file.parent)
    with Early(data, partial(Path, tokenizer_file)) as early:
        if when == "at once":
            before_torch[0].kill()
        train = early.rows("train", print)
        valid = early.rows("valid", print)
        before_torch[0].kill()
        with Ahead((train, valid), data, tokenizer, early) as ahead:
            encoder = Encoder(tokenizer, data, affixes=ahead.affixes(tokenizer))
            ready = tokenize(train, encoder, data, ahead=ahead)
    assert list(train) == list(load_rows(data, "train"))
    alone = tokenize(train, Encoder(tokenizer, data), data)
    assert [s.response.tolist() for s in ready.sequences] == [s.response.tolist() for s in alone.sequences]


def test_leaving_ends_the_process(tmp_path, tokenizer_file, before_torch):
    data = DataConfig(source=str(lines(tmp_path / "rows.jsonl", pairs(200 * CHUNK))))
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt), Early(data, partial(Path, tokenizer_file)):
        raise KeyboardInterrupt
    assert before_torch[0].returncode == -signal.SIGKILL
    assert not working()
    assert time.perf_counter() - began < 5  # nobody reads the 100,000 rows here instead


@pytest.mark.parametrize("why", ["one core", "many rows", "no more processes"])
def test_without_a_process_a_thread_does_it(why, tmp_path, tokenizer_file, before_torch, monkeypatch):
    def refused(*_):
        raise OSError("Resource temporarily unavailable")

    change = {"one core": ("cores", lambda: 1), "many rows": ("_MOST", 100), "no more processes": ("Helper", refused)}
    monkeypatch.setattr(early_module, *change[why])
    data = DataConfig(source=str(lines(tmp_path / "rows.jsonl", pairs(2 * CHUNK))))
    with Early(data, partial(Path, tokenizer_file)) as early:
        train = early.rows("train", print)
        made = early.made(AutoTokenizer.from_pretrained(tokenizer_file.parent))
        assert len(ids_of(made, train)[0]) == len(train) > CHUNK
    assert not before_torch
