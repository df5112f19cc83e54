"""Rows read and tokenized in a thread: the same rows, ids and errors as without, and no thread that outlives its context."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distillm_cli.config.schema import DataConfig, Recipe
from distillm_cli.data import prefetch as prefetch_module
from distillm_cli.data.batching import tokenize
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.prefetch import Prefetcher
from distillm_cli.data.rows import Row
from distillm_cli.data.sources import load_rows
from distillm_cli.data.templates import Renderer
from distillm_cli.data.token_ids import CHUNK, Affixes
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


def prefetching(data: DataConfig, file: Path | None) -> Prefetcher:
    return Prefetcher(data, lambda: file)


def by_file(prefetcher: Prefetcher, tokenizer) -> dict:
    """The chunks that are made by the tokenizer's file, where they are what the tokenizer makes."""
    return prefetcher._chunks_by_file(tokenizer)


@pytest.mark.parametrize("part", ["gpt2", "tiny"])
def test_what_was_made_early_is_what_the_tokenizer_makes(part, shared_data, tmp_path, tokenizer_file):
    if part == "gpt2":
        source, place = str(shared_data / "dolly"), shared_data / "tokenizers" / "gpt2"
    else:
        source, place = str(lines(tmp_path / "rows.jsonl", pairs(3 * CHUNK))), tokenizer_file.parent
    data = DataConfig(source=source, limit=1_300)
    tokenizer = AutoTokenizer.from_pretrained(place)
    with prefetching(data, place / "tokenizer.json") as prefetcher:
        train, valid = prefetcher.rows("train", print), prefetcher.rows("valid", print)
        made = by_file(prefetcher, tokenizer)
        assert len(made) == -(-len(train) // CHUNK) + -(-len(valid) // CHUNK)
        prefetcher.expect(tokenizer, {"train": train, "valid": valid})
        assert prefetcher._chunks is made, "nothing is made twice"
        encoder = Encoder(tokenizer, data, affixes=prefetcher.affixes(tokenizer))
        ready = tokenize(train, encoder, data, prefetched=partial(prefetcher.take, "train", tokenizer))
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
    with prefetching(data, tokenizer_file) as prefetcher:
        train = prefetcher.rows("train", print)
        assert by_file(prefetcher, tokenizer) == {}
        prefetcher.expect(tokenizer, {"train": train})
        taken = prefetcher.take("train", tokenizer, 0)
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
    with prefetching(data, other) as prefetcher:
        train = prefetcher.rows("train", print)
        (made,) = (made.result() for (name, _), made in by_file(prefetcher, tokenizer).items() if name == "train")
    assert [ids.prompt.tolist() for ids in made] == [tokenizer(row.prompt)["input_ids"] for row in train]


def test_conversations_wait_for_the_chat_template(tmp_path, tokenizer_file):
    said = [({"role": "user", "content": "t5"}, {"role": "assistant", "content": f"t{6 + i}"}) for i in range(30)]
    talk = [{"messages": list(messages)} for messages in said]
    data = DataConfig(source=str(lines(tmp_path / "rows.jsonl", pairs(CHUNK) + talk)))
    with prefetching(data, tokenizer_file) as prefetcher:
        assert prefetcher.rows("train", print)
        assert by_file(prefetcher, AutoTokenizer.from_pretrained(tokenizer_file.parent)) == {}


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
        with prefetching(data, tokenizer_file) as prefetcher:
            found = told(prefetcher.rows, data)
        assert found == told(lambda split, listener, data=data: load_rows(data, split, listener=listener), data)
    with prefetching(skipping, tokenizer_file) as prefetcher:
        said = told(prefetcher.rows, skipping)[1]
    assert [type(event) for event in said] == [Warned, Note, Note]
    assert "rows.jsonl:42" in said[0].text


def test_it_may_be_left_at_any_time(tmp_path, tokenizer_file):
    data = DataConfig(source=str(lines(tmp_path / "rows.jsonl", pairs(40 * CHUNK))))

    def stopped():
        with prefetching(data, tokenizer_file) as prefetcher, prefetcher:
            assert working()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not working()


def test_a_source_on_the_hub_is_not_begun_before_it_is_asked_for():
    with prefetching(DataConfig(source="somebody/something"), None) as prefetcher:
        assert not working()
        with pytest.raises(DataError, match="somebody/something"):
            prefetcher.rows("train", print)


def test_it_needs_neither_torch_nor_transformers(tmp_path, tokenizer_file):
    source = lines(tmp_path / "rows.jsonl", pairs(CHUNK + 100))
    script = f"""
import sys
from distillm_cli.runs.start import prefetch_rows
from distillm_cli.config.schema import Recipe
recipe = Recipe.model_validate({{
    "data": {{"source": {str(source)!r}}}, "student": {{"path": {str(tokenizer_file.parent)!r}}},
}})
with prefetch_rows(recipe) as prefetcher:
    rows = prefetcher.rows("train", print)
    rules, made = prefetcher._started.result()
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
    with prefetch_rows(recipe) as prefetcher:
        begun = prepare(recipe, print, prefetcher)
    whole = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": 1})})  # nothing is made ahead
    plain = prepare(whole, print)
    assert len(begun.train) == len(plain.train) == 190
    told = [
        [(s.prompt.tolist(), s.response.tolist()) for examples in (run.train, run.valid) for s in examples.sequences]
        for run in (begun, plain)
    ]
    assert told[0] == told[1]


def test_real_rows_and_their_events_are_those_of_reading_them(shared_data):
    """Same rows, same events, same ids: real rows by GPT-2's rules."""
    place = shared_data / "tokenizers" / "gpt2"
    source = {"source": str(shared_data / "dolly" / "train.jsonl"), "limit": 1_200}
    recipe = Recipe.model_validate({"data": source, "student": {"path": str(place)}})
    tokenizer = AutoTokenizer.from_pretrained(place)
    events, plain_events = [], []
    with prefetch_rows(recipe) as prefetcher:
        found = [prefetcher.rows(split, events.append) for split in ("train", "valid")]
        made = by_file(prefetcher, tokenizer)
        ids = [ids_of(made, name, rows) for name, rows in zip(("train", "valid"), found, strict=True)]
    plain = [load_rows(recipe.data, split, listener=plain_events.append) for split in ("train", "valid")]
    assert [list(rows) for rows in found] == [list(rows) for rows in plain]
    assert (found[0].name, found[0].path, str(found[1])) == (plain[0].name, plain[0].path, str(plain[1]))
    assert events == plain_events
    for mine, rows in zip(ids, plain, strict=True):
        texts = [Renderer(recipe.data).text(row).text for row in rows]
        whole = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        assert [prompt + response for prompt, response in zip(*mine, strict=True)] == whole


def ids_of(made: dict, name: str, rows) -> list[list[list[int]]]:
    """Prompts and responses of all chunks of some rows, in order."""
    chunks = [made[name, start].result() for start in range(0, len(rows), CHUNK)]
    return [[getattr(ids, part).tolist() for chunk in chunks for ids in chunk] for part in ("prompt", "response")]


def test_the_tokenizers_setting_is_as_before_when_the_thread_ends(tmp_path, tokenizer_file, monkeypatch):
    """The thread keeps the library to one core on small machines, and only while it tokenizes."""
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    monkeypatch.setattr(prefetch_module, "cores", lambda: 2)
    data = DataConfig(source=str(lines(tmp_path / "rows.jsonl", pairs(2 * CHUNK))))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_file.parent)
    with prefetching(data, tokenizer_file) as prefetcher:
        train = prefetcher.rows("train", print)
        assert len(ids_of(by_file(prefetcher, tokenizer), "train", train)[0]) == len(train) > CHUNK
    assert "TOKENIZERS_PARALLELISM" not in os.environ


# --- tokenized as transformers' tokenizer does ------------------------------------------------------------------------


@contextmanager
def expecting(data: DataConfig, tokenizer, **sources) -> Iterator[Prefetcher]:
    """Rows that were read elsewhere, tokenized as a tokenizer does."""
    prefetcher = Prefetcher(data)
    try:
        prefetcher.expect(tokenizer, sources)
        yield prefetcher
    finally:
        prefetcher.close()


def letters(refuses: str | None = None) -> PreTrainedTokenizerFast:
    """Single characters between <s> and </s>. refuses: a text that it cannot be given."""

    class Letters(PreTrainedTokenizerFast):
        def __call__(self, text=None, **kwargs):
            if any(refuses in one for one in text or ()):
                raise ValueError(f"not {refuses}")
            return super().__call__(text, **kwargs)

    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "p": 2, "r": 3, "?": 4}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    kind = PreTrainedTokenizerFast if refuses is None else Letters
    return kind(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="?")


def rows(n: int) -> list[Row]:
    return [
        Row(prompt="p" * (1 + i % 9), references=("r" * (i % 5),), where=f"a.jsonl:{i + 1}", truncated=i % 7 == 0)
        for i in range(n)
    ]


DATA = DataConfig(max_length=12, max_prompt_length=8)


def told(rows, encoder, data=DATA, prefetched=None, context=None):
    """Return the result of tokenizing, with everything in it, and the events on the way."""
    said = []
    examples = tokenize(rows, encoder, data, said.append, context, prefetched)
    pairs = [
        (s.row, s.prompt.tolist(), s.response.tolist(), s.prompt.dtype, s.response.dtype) for s in examples.sequences
    ]
    return pairs, examples.rows, examples.dropped, examples.dropped_prompts, examples.truncated, said


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_what_is_made_ahead_is_what_is_made_in_turn(too_long, is_encoder_decoder):
    train, valid, tokenizer = rows(2 * CHUNK + 7), rows(11), letters()
    data = DATA.model_copy(update={"too_long": too_long})
    alone = Encoder(tokenizer, data, is_encoder_decoder=is_encoder_decoder)
    plain = [told(part, alone, data, context=10) for part in (train, valid)]
    with expecting(data, tokenizer, train=train, valid=valid) as prefetcher:
        assert prefetcher.affixes(tokenizer) == Affixes((0,), (1,), (0,), (1,))
        encoder = Encoder(tokenizer, data, is_encoder_decoder=is_encoder_decoder, affixes=prefetcher.affixes(tokenizer))
        made = [
            told(part, encoder, data, partial(prefetcher.take, name, tokenizer), context=10)
            for name, part in (("train", train), ("valid", valid))
        ]
        assert made == plain
    assert plain[0][0]
    assert plain[0][4 if too_long == "truncate" else 2]


def test_real_rows_and_a_real_tokenizer(shared_data):
    data = DataConfig(source=str(shared_data / "dolly"), limit=1_200)
    found, tokenizer = load_rows(data, "train"), AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "gpt2")
    encoder = Encoder(tokenizer, data)
    with expecting(data, tokenizer, train=found) as prefetcher:
        made = told(found, encoder, data, partial(prefetcher.take, "train", tokenizer))
    assert made == told(found, encoder, data)
    first = tokenizer(found[0].prompt, add_special_tokens=False)["input_ids"]
    np.testing.assert_array_equal(made[0][0][1], first)


def test_the_chunks_are_really_made_ahead():
    part, tokenizer = rows(CHUNK + 1), letters()
    with expecting(DATA, tokenizer, train=part) as prefetcher:
        first, second = (prefetcher.take("train", tokenizer, start) for start in (0, CHUNK))
        assert (len(first), len(second)) == (CHUNK, 1)
        assert second[0].prompt.tolist() == [2] * len(part[-1].prompt)
        assert prefetcher.take("train", tokenizer, 0) is None  # once: whoever took them holds them


def test_another_tokenizer_takes_nothing_and_makes_its_own():
    part, expected, taken = rows(3 * CHUNK), letters(), letters()
    encoder = Encoder(taken, DATA)
    with expecting(DATA, expected, train=part) as prefetcher:
        assert prefetcher.affixes(taken) is None
        assert told(part, encoder, prefetched=partial(prefetcher.take, "train", taken)) == told(part, encoder)
        assert not working()


def test_without_a_tokenizer_nothing_is_begun():
    part, tokenizer = rows(3), letters()
    with expecting(DATA, None, train=part) as prefetcher:
        assert not working()
        assert (prefetcher.affixes(tokenizer), prefetcher.take("train", tokenizer, 0)) == (None, None)
        assert (
            len(told(part, Encoder(tokenizer, DATA), prefetched=partial(prefetcher.take, "train", tokenizer))[0]) == 3
        )


def test_a_row_that_does_not_fit_is_complained_of_as_ever():
    part = rows(CHUNK + 3)
    talk = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}, {"role": "user", "content": "p"}]
    part[CHUNK + 1] = Row(messages=talk, references=("r",), where="a.jsonl:502")
    tokenizer, data = letters(), DATA.model_copy(update={"template": "alpaca", "max_length": 500})
    complaints = []
    for begun in (None, tokenizer):
        with expecting(data, begun, train=part) as prefetcher:
            prefetched = partial(prefetcher.take, "train", tokenizer)
            with pytest.raises(DataError) as caught:
                tokenize(part, Encoder(tokenizer, data), data, max_context=400, prefetched=prefetched)
        complaints.append((str(caught.value), caught.value.exit_code))
    assert complaints[0] == complaints[1]
    assert complaints[0][0].startswith("a.jsonl:502: a conversation (user, assistant, user)")


def test_a_tokenizer_that_fails_fails_where_it_always_did():
    part = rows(4 * CHUNK)
    part[CHUNK + 2] = Row(prompt="ppp", references=("never",), where="a.jsonl:503")
    tokenizer, said = letters(refuses="never"), []
    with expecting(DATA, tokenizer, train=part) as prefetcher:
        prefetched = partial(prefetcher.take, "train", tokenizer)
        with pytest.raises(ValueError, match="not never"):
            tokenize(part, Encoder(tokenizer, DATA), DATA, said.append, prefetched=prefetched)
    assert [event.done for event in said] == [CHUNK]
    assert not working()


@pytest.mark.parametrize("stop", [DataError("data.not_found", "no such thing"), KeyboardInterrupt()])
def test_whatever_ends_the_context_ends_the_work(stop):
    part, tokenizer = rows(40 * CHUNK), letters()
    running = []

    def stopped():
        with expecting(DATA, tokenizer, train=part) as prefetcher:
            running.append(prefetcher)
            assert working()
            raise stop

    with pytest.raises(type(stop)):
        stopped()
    assert not working()
    assert running[0].take("train", tokenizer, 39 * CHUNK) is None
