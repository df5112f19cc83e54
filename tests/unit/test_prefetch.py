"""Test rows that are read and tokenized in a thread: the same results and errors, and no leftover thread."""

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
from tests.codes import raises_code

DataConfig = partial(DataConfig, max_length=512, max_prompt_length=256)  # as in a run whose models are known


def tokenizing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("tokenizing")]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(n: int) -> list[dict]:
    return [{"prompt": f"t{3 + i % 40} t{4 + i % 30}", "output": f"t{5 + i % 20}"} for i in range(n)]


@pytest.fixture
def tokenizer_file(tmp_path) -> Path:
    tiny.tokenizer(size=tiny.VOCAB).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer" / "tokenizer.json"


def make_prefetcher(data: DataConfig, file: Path | None) -> Prefetcher:
    return Prefetcher(data, lambda: file)


def chunks_by_file(prefetcher: Prefetcher, tokenizer) -> dict:
    """Return the chunks that were tokenized with the tokenizer file, if its rules are those of the tokenizer."""
    return prefetcher._chunks_by_file(tokenizer)


@pytest.mark.parametrize("part", ["gpt2", "tiny"])
def test_prefetched_ids_match_the_tokenizer(part, shared_data, tmp_path, tokenizer_file):
    if part == "gpt2":
        source, path = str(shared_data / "dolly"), shared_data / "tokenizers" / "gpt2"
    else:
        source, path = str(write_rows(tmp_path / "rows.jsonl", pairs(3 * CHUNK))), tokenizer_file.parent
    data = DataConfig(source=source, limit=1_300)
    tokenizer = AutoTokenizer.from_pretrained(path)
    with make_prefetcher(data, path / "tokenizer.json") as prefetcher:
        train, valid = prefetcher.rows("train", print), prefetcher.rows("valid", print)
        chunks = chunks_by_file(prefetcher, tokenizer)
        assert len(chunks) == -(-len(train) // CHUNK) + -(-len(valid) // CHUNK)
        prefetcher.expect(tokenizer, {"train": train, "valid": valid})
        assert prefetcher._chunks is chunks, "nothing is tokenized twice"
        encoder = Encoder(tokenizer, data, affixes=prefetcher.affixes(tokenizer))
        ready = tokenize(train, encoder, data, prefetched=partial(prefetcher.take, "train", tokenizer))
    assert not tokenizing_threads()
    assert list(train) == list(load_rows(data, "train"))
    expected = tokenize(train, Encoder(tokenizer, data), data)
    assert len(ready) == len(expected) > CHUNK
    for ready_sequence, plain_sequence in zip(ready.sequences, expected.sequences, strict=True):
        assert (ready_sequence.row, ready_sequence.prompt.tolist(), ready_sequence.response.tolist()) == (
            plain_sequence.row,
            plain_sequence.prompt.tolist(),
            plain_sequence.response.tolist(),
        )


class UppercaseTokenizer(PreTrainedTokenizerFast):
    """Convert the text to upper case before the rules of the file apply."""

    def __call__(self, text, **kwargs):
        return super().__call__([item.upper() for item in text] if isinstance(text, list) else text.upper(), **kwargs)


def other_class(file: Path):
    return UppercaseTokenizer.from_pretrained(file.parent)


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
def test_differing_tokenizer_rules_are_not_used(change, tmp_path, tokenizer_file):
    data = DataConfig(source=str(write_rows(tmp_path / "rows.jsonl", pairs(2 * CHUNK))), seed=4)
    tokenizer = change(tokenizer_file)
    with make_prefetcher(data, tokenizer_file) as prefetcher:
        train = prefetcher.rows("train", print)
        assert chunks_by_file(prefetcher, tokenizer) == {}
        prefetcher.expect(tokenizer, {"train": train})
        taken = prefetcher.take("train", tokenizer, 0)
    expected = [tokenizer(row.prompt, add_special_tokens=False)["input_ids"] for row in train[:CHUNK]]
    assert [ids.prompt.tolist() for ids in taken] == expected
    assert not tokenizing_threads()


def test_truncation_and_special_tokens_of_the_file_are_ignored(tmp_path, tokenizer_file):
    """Check a file with its own start token and length limit, which do not affect ids without special tokens."""
    content = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    template = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "t3", "type_id": 0}}]
    special = {"t3": {"id": "t3", "ids": [3], "tokens": ["t3"]}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": template,
        "pair": template,
        "special_tokens": special,
    }
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content), encoding="utf-8")
    data = DataConfig(
        source=str(write_rows(tmp_path / "rows.jsonl", [{"prompt": "t5 t6 t7 t8 t9", "output": "t4"}] * 30 + pairs(30)))
    )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_file.parent)
    with make_prefetcher(data, other) as prefetcher:
        train = prefetcher.rows("train", print)
        (future,) = (chunk for (name, _), chunk in chunks_by_file(prefetcher, tokenizer).items() if name == "train")
        chunk = future.result()
    assert [ids.prompt.tolist() for ids in chunk] == [tokenizer(row.prompt)["input_ids"] for row in train]


def test_conversations_are_not_tokenized_without_template(tmp_path, tokenizer_file):
    message_pairs = [
        ({"role": "user", "content": "t5"}, {"role": "assistant", "content": f"t{6 + i}"}) for i in range(30)
    ]
    conversations = [{"messages": list(messages)} for messages in message_pairs]
    data = DataConfig(source=str(write_rows(tmp_path / "rows.jsonl", pairs(CHUNK) + conversations)))
    with make_prefetcher(data, tokenizer_file) as prefetcher:
        assert prefetcher.rows("train", print)
        assert chunks_by_file(prefetcher, AutoTokenizer.from_pretrained(tokenizer_file.parent)) == {}


def test_prefetched_rows_have_the_same_errors_and_events(tmp_path, tokenizer_file):
    rows = pairs(80)
    rows[41] = {"prompt": "t5"}
    file = write_rows(tmp_path / "rows.jsonl", rows)

    def load_splits(read, data: DataConfig) -> tuple:
        events = []
        try:
            found = [list(read(split, events.append)) for split in ("train", "valid")]
        except DataError as error:
            found = (str(error), error.exit_code)
        return found, events

    skipping = DataConfig(source=str(file), skip_bad_rows=True)
    for data in (DataConfig(source=str(file)), skipping, DataConfig(source=str(tmp_path / "no.jsonl"))):
        with make_prefetcher(data, tokenizer_file) as prefetcher:
            found = load_splits(prefetcher.rows, data)
        assert found == load_splits(lambda split, listener, data=data: load_rows(data, split, listener=listener), data)
    with make_prefetcher(skipping, tokenizer_file) as prefetcher:
        events = load_splits(prefetcher.rows, skipping)[1]
    assert [type(event) for event in events] == [Warned, Note, Note]
    assert "rows.jsonl:42" in events[0].text


def test_prefetcher_stops_on_keyboard_interrupt(tmp_path, tokenizer_file):
    data = DataConfig(source=str(write_rows(tmp_path / "rows.jsonl", pairs(40 * CHUNK))))

    def stopped():
        with make_prefetcher(data, tokenizer_file) as prefetcher, prefetcher:
            assert tokenizing_threads()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not tokenizing_threads()


def test_hub_source_is_not_prefetched():
    with make_prefetcher(DataConfig(source="somebody/something"), None) as prefetcher:
        assert not tokenizing_threads()
        with raises_code("data.not_found", "somebody/something"):
            prefetcher.rows("train", print)


def test_prefetching_imports_no_torch_or_transformers(tmp_path, tokenizer_file):
    source = write_rows(tmp_path / "rows.jsonl", pairs(CHUNK + 100))
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


def test_run_with_prefetching_has_the_same_examples(tmp_path):
    from distillm_cli.config.load import resolve
    from distillm_cli.runs.defaults import fitted
    from distillm_cli.runs.prepare import prepare

    teacher = tiny.save(tmp_path / "teacher", own_tokenizer=tiny.tokenizer(size=tiny.VOCAB))
    student = tiny.save(tmp_path / "student", own_tokenizer=tiny.tokenizer(size=tiny.VOCAB))
    source = write_rows(tmp_path / "rows.jsonl", pairs(200))
    flags = {"teacher.path": str(teacher), "student.path": str(student), "data.source": str(source)}
    recipe = fitted(resolve(command="distill", recipe=None, flags=flags, sets=[])).recipe
    with prefetch_rows(recipe) as prefetcher:
        prefetched_run = prepare(recipe, print, prefetcher)
    plain_recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": 1})})
    plain_run = prepare(plain_recipe, print)
    assert len(prefetched_run.train) == len(plain_run.train) == 190
    ids = [
        [(s.prompt.tolist(), s.response.tolist()) for examples in (run.train, run.valid) for s in examples.sequences]
        for run in (prefetched_run, plain_run)
    ]
    assert ids[0] == ids[1]


def test_prefetched_dolly_matches_sequential_loading(shared_data):
    """Check that rows, events and GPT-2 token ids are the same as without prefetching."""
    path = shared_data / "tokenizers" / "gpt2"
    source = {"source": str(shared_data / "dolly" / "train.jsonl"), "limit": 1_200}
    recipe = Recipe.model_validate({"data": source, "student": {"path": str(path)}})
    tokenizer = AutoTokenizer.from_pretrained(path)
    events, plain_events = [], []
    with prefetch_rows(recipe) as prefetcher:
        found = [prefetcher.rows(split, events.append) for split in ("train", "valid")]
        chunks = chunks_by_file(prefetcher, tokenizer)
        ids = [ids_of(chunks, name, rows) for name, rows in zip(("train", "valid"), found, strict=True)]
    plain_rows = [load_rows(recipe.data, split, listener=plain_events.append) for split in ("train", "valid")]
    assert [list(rows) for rows in found] == [list(rows) for rows in plain_rows]
    assert (found[0].name, found[0].path, str(found[1])) == (
        plain_rows[0].name,
        plain_rows[0].path,
        str(plain_rows[1]),
    )
    assert events == plain_events
    for prefetched_ids, rows in zip(ids, plain_rows, strict=True):
        texts = [Renderer(recipe.data).text(row).text for row in rows]
        expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        assert [prompt + response for prompt, response in zip(*prefetched_ids, strict=True)] == expected


def ids_of(chunks_by_start: dict, name: str, rows) -> list[list[list[int]]]:
    """Return prompts and responses of all chunks of some rows, in order."""
    chunks = [chunks_by_start[name, start].result() for start in range(0, len(rows), CHUNK)]
    return [[getattr(ids, part).tolist() for chunk in chunks for ids in chunk] for part in ("prompt", "response")]


def test_tokenizers_parallelism_is_restored(tmp_path, tokenizer_file, monkeypatch):
    """Check this on a machine with two cores, where the thread limits the library to one core while it tokenizes."""
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    monkeypatch.setattr(prefetch_module, "cores", lambda: 2)
    data = DataConfig(source=str(write_rows(tmp_path / "rows.jsonl", pairs(2 * CHUNK))))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_file.parent)
    with make_prefetcher(data, tokenizer_file) as prefetcher:
        train = prefetcher.rows("train", print)
        assert len(ids_of(chunks_by_file(prefetcher, tokenizer), "train", train)[0]) == len(train) > CHUNK
    assert "TOKENIZERS_PARALLELISM" not in os.environ


# --- tokenized with the transformers tokenizer ----------------------------------------------------------------------


@contextmanager
def prefetcher_for(data: DataConfig, tokenizer, **sources) -> Iterator[Prefetcher]:
    """Provide a prefetcher of rows that were read elsewhere, with a transformers tokenizer."""
    prefetcher = Prefetcher(data)
    try:
        prefetcher.expect(tokenizer, sources)
        yield prefetcher
    finally:
        prefetcher.close()


def letters(rejects: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters between <s> and </s>.

    rejects: a text for which it raises a ValueError.
    """

    class Letters(PreTrainedTokenizerFast):
        def __call__(self, text=None, **kwargs):
            if any(rejects in item for item in text or ()):
                raise ValueError(f"not {rejects}")
            return super().__call__(text, **kwargs)

    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "p": 2, "r": 3, "?": 4}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer_class = PreTrainedTokenizerFast if rejects is None else Letters
    return tokenizer_class(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="?")


def rows(n: int) -> list[Row]:
    return [
        Row(prompt="p" * (1 + i % 9), references=("r" * (i % 5),), where=f"a.jsonl:{i + 1}", truncated=i % 7 == 0)
        for i in range(n)
    ]


DATA = DataConfig(max_length=12, max_prompt_length=8)


def tokenize_with_events(rows, encoder, data=DATA, prefetched=None, context=None):
    """Return the result of tokenizing, with everything in it, and the events on the way."""
    events = []
    examples = tokenize(rows, encoder, data, events.append, context, prefetched)
    pairs = [
        (s.row, s.prompt.tolist(), s.response.tolist(), s.prompt.dtype, s.response.dtype) for s in examples.sequences
    ]
    return pairs, examples.rows, examples.dropped, examples.dropped_prompts, examples.truncated, events


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_prefetched_examples_match_sequential_ones(too_long, is_encoder_decoder):
    train, valid, tokenizer = rows(2 * CHUNK + 7), rows(11), letters()
    data = DATA.model_copy(update={"too_long": too_long})
    plain_encoder = Encoder(tokenizer, data, is_encoder_decoder=is_encoder_decoder)
    expected = [tokenize_with_events(part, plain_encoder, data, context=10) for part in (train, valid)]
    with prefetcher_for(data, tokenizer, train=train, valid=valid) as prefetcher:
        assert prefetcher.affixes(tokenizer) == Affixes((0,), (1,), (0,), (1,))
        encoder = Encoder(tokenizer, data, is_encoder_decoder=is_encoder_decoder, affixes=prefetcher.affixes(tokenizer))
        prefetched = [
            tokenize_with_events(part, encoder, data, partial(prefetcher.take, name, tokenizer), context=10)
            for name, part in (("train", train), ("valid", valid))
        ]
        assert prefetched == expected
    assert expected[0][0]
    assert expected[0][4 if too_long == "truncate" else 2]


def test_prefetched_dolly_examples_match_sequential_ones(shared_data):
    data = DataConfig(source=str(shared_data / "dolly"), limit=1_200)
    found, tokenizer = load_rows(data, "train"), AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "gpt2")
    encoder = Encoder(tokenizer, data)
    with prefetcher_for(data, tokenizer, train=found) as prefetcher:
        prefetched = tokenize_with_events(found, encoder, data, partial(prefetcher.take, "train", tokenizer))
    assert prefetched == tokenize_with_events(found, encoder, data)
    first = tokenizer(found[0].prompt, add_special_tokens=False)["input_ids"]
    np.testing.assert_array_equal(prefetched[0][0][1], first)


def test_chunks_are_prefetched_and_taken_once():
    part, tokenizer = rows(CHUNK + 1), letters()
    with prefetcher_for(DATA, tokenizer, train=part) as prefetcher:
        first, second = (prefetcher.take("train", tokenizer, start) for start in (0, CHUNK))
        assert (len(first), len(second)) == (CHUNK, 1)
        assert second[0].prompt.tolist() == [2] * len(part[-1].prompt)
        assert prefetcher.take("train", tokenizer, 0) is None  # a chunk can be taken once


def test_other_tokenizer_gets_no_prefetched_chunks():
    part, expected, taken = rows(3 * CHUNK), letters(), letters()
    encoder = Encoder(taken, DATA)
    with prefetcher_for(DATA, expected, train=part) as prefetcher:
        assert prefetcher.affixes(taken) is None
        assert tokenize_with_events(
            part, encoder, prefetched=partial(prefetcher.take, "train", taken)
        ) == tokenize_with_events(part, encoder)
        assert not tokenizing_threads()


def test_nothing_is_prefetched_without_a_tokenizer():
    part, tokenizer = rows(3), letters()
    with prefetcher_for(DATA, None, train=part) as prefetcher:
        assert not tokenizing_threads()
        assert (prefetcher.affixes(tokenizer), prefetcher.take("train", tokenizer, 0)) == (None, None)
        assert (
            len(
                tokenize_with_events(
                    part, Encoder(tokenizer, DATA), prefetched=partial(prefetcher.take, "train", tokenizer)
                )[0]
            )
            == 3
        )


def test_invalid_row_has_the_same_error_with_prefetching():
    part = rows(CHUNK + 3)
    messages = [
        {"role": "user", "content": "p"},
        {"role": "assistant", "content": "r"},
        {"role": "user", "content": "p"},
    ]
    part[CHUNK + 1] = Row(messages=messages, references=("r",), where="a.jsonl:502")
    tokenizer, data = letters(), DATA.model_copy(update={"template": "alpaca", "max_length": 500})
    errors = []
    for expected_tokenizer in (None, tokenizer):
        with prefetcher_for(data, expected_tokenizer, train=part) as prefetcher:
            prefetched = partial(prefetcher.take, "train", tokenizer)
            with pytest.raises(DataError) as caught:
                tokenize(part, Encoder(tokenizer, data), data, max_context=400, prefetched=prefetched)
        errors.append((caught.value.code, str(caught.value), caught.value.exit_code))
    assert errors[0] == errors[1]
    assert errors[0][0] == "data.template_mismatch"
    assert "a.jsonl:502" in errors[0][1]


def test_tokenizer_error_is_raised_at_its_chunk():
    part = rows(4 * CHUNK)
    part[CHUNK + 2] = Row(prompt="ppp", references=("never",), where="a.jsonl:503")
    tokenizer, events = letters(rejects="never"), []
    with prefetcher_for(DATA, tokenizer, train=part) as prefetcher:
        prefetched = partial(prefetcher.take, "train", tokenizer)
        with pytest.raises(ValueError, match="not never"):
            tokenize(part, Encoder(tokenizer, DATA), DATA, events.append, prefetched=prefetched)
    assert [event.done for event in events] == [CHUNK]
    assert not tokenizing_threads()


@pytest.mark.parametrize("stop", [DataError("data.not_found", "no such file"), KeyboardInterrupt()])
def test_exception_stops_the_prefetching_thread(stop):
    part, tokenizer = rows(40 * CHUNK), letters()
    running = []

    def stopped():
        with prefetcher_for(DATA, tokenizer, train=part) as prefetcher:
            running.append(prefetcher)
            assert tokenizing_threads()
            raise stop

    with pytest.raises(type(stop)):
        stopped()
    assert not tokenizing_threads()
    assert running[0].take("train", tokenizer, 39 * CHUNK) is None
