"""Test rows and token ids that are stored on disk: the same examples, and stores that cannot be used."""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distillm_cli.config.schema import DataConfig
from distillm_cli.data import row_store, sources
from distillm_cli.data.batching import Order, tokenize
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.rows import Row
from distillm_cli.data.sources import load_rows, overlap
from distillm_cli.data.store import STORE_FILE, fingerprint, key_of, open_or_make
from distillm_cli.data.token_store import open_tokens
from distillm_cli.training.events import Note, Progress, Warned
from distillm_cli.types import Rollout, lengths_of, rows_digest, supervised_of
from tests import tiny
from tests.codes import raises_code

RECORDS = {
    "prompts": [{"prompt": f"p {i % 90} ", "completion": "r " * (1 + i % 7)} for i in range(120)],
    "instructions": [
        {"instruction": f"do {i}", "input": "x" * (i % 3), "output": [f"ab {i}", "other"]} for i in range(70)
    ],
    "conversations": [
        {"messages": [{"role": "user", "content": f"q{i} \u00e9"}, {"role": "assistant", "content": "a"}], "n": i}
        for i in range(30)
    ],
}


def write(path: Path, records) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def data_of(path: Path, **fields) -> DataConfig:
    lengths = {"max_length": 64, "max_prompt_length": 48}
    return DataConfig(
        **{"source": str(path), "store": "on", "store_dir": str(path.parent / "store")} | lengths | fields
    )


def load(data, split="train", events=None):
    return load_rows(data, split, listener=(lambda event: None) if events is None else events.append, stored=True)


def texts_of(events):
    return [event for event in events if not isinstance(event, Progress)]


@pytest.mark.parametrize("name", RECORDS)
def test_stored_rows_equal_rows_in_memory(name, tmp_path):
    data = data_of(write(tmp_path / "rows.jsonl", RECORDS[name]))
    plain_events: list = []
    plain = {split: load(data.model_copy(update={"store": "off"}), split, plain_events) for split in ("train", "valid")}
    for made in (True, False):
        events: list = []
        found = {split: load(data, split, events) for split in ("train", "valid")}
        stored = [event for event in events if isinstance(event, Note) and event.text.startswith("stored the rows")]
        assert len(stored) == made
        assert texts_of(events) == [*stored, *texts_of(plain_events)]
        for split, rows in found.items():
            assert rows.are_stored
            assert list(rows) == list(plain[split])
            assert rows[-1] == plain[split][-1]
            assert rows[3:5] == plain[split][3:5]
            assert replace(rows, rows=[]) == replace(plain[split], rows=[]) or rows.name == plain[split].name
            assert rows.format_summary == plain[split].format_summary
            assert {row_store._kind_of(row) for row in rows.kinds} == {row_store._kind_of(row) for row in rows}
        assert overlap(found["valid"], found["train"]) == overlap(plain["valid"], plain["train"])


def test_same_examples_and_notes_from_the_token_store(tmp_path):
    records = [{"prompt": f"{'abc ' * (1 + i % 9)}{i}", "completion": "xy " * (i % 11)} for i in range(1_300)]
    data = data_of(write(tmp_path / "rows.jsonl", records), max_length=32, max_prompt_length=24)
    encoder = Encoder(tiny.tokenizer(), data)
    plain_rows = load(data.model_copy(update={"store": "off"}))
    expected_events: list = []
    expected = tokenize(plain_rows, encoder, data, expected_events.append, 30)
    assert 0 < expected.dropped < len(plain_rows)
    for _ in range(2):
        events: list = []
        found = open_tokens(load(data), encoder, events.append, 30)
        assert texts_of(events)[-len(texts_of(expected_events)) :] == texts_of(expected_events)
        assert list(found.rows) == list(expected.rows)
        assert len(found) == len(expected)
        for one, other in zip(found.sequences, expected.sequences, strict=True):
            assert one.row == other.row
            np.testing.assert_array_equal(one.prompt, other.prompt)
            np.testing.assert_array_equal(one.response, other.response)
        assert found.sequences.digest == rows_digest(expected.sequences) == rows_digest(list(found.sequences))
        np.testing.assert_array_equal(found.lengths, lengths_of(list(expected.sequences)))
        assert found.tokens == supervised_of(list(expected.sequences)).sum()
        assert (found.dropped, found.truncated, found.end_ids) == (
            expected.dropped,
            expected.truncated,
            expected.end_ids,
        )
        orders = [Order(examples.lengths, 8, seed=3, bucket=4) for examples in (found, expected)]
        assert [orders[0].batch(step) for step in range(200)] == [orders[1].batch(step) for step in range(200)]
    assert not any(isinstance(event, Progress) for event in events), "the second time, nothing is tokenized"


def test_rows_of_a_table_are_compared_by_table_and_row(tmp_path):
    data = data_of(write(tmp_path / "rows.jsonl", RECORDS["prompts"]), store="off")
    rows = load_rows(data, "train")
    encoder = Encoder(tiny.tokenizer(), data)
    one, other = (tokenize(rows, encoder, data).sequences for _ in range(2))
    assert one[3] == one[3]
    assert one[3] is not one[3]
    assert {one[3]: "a"}[one[3]] == "a"
    assert one[3] != other[3]
    assert one[3] != one[4]
    rollout = Rollout(one[3].prompt, one[3].response, 3)
    assert rollout != one[3]
    assert rollout != Rollout(one[3].prompt, one[3].response, 3)
    assert [s.row for s in one[-2:]] == [len(one) - 2, len(one) - 1]
    with pytest.raises(IndexError):
        one[len(one)]


def test_turns_are_stored(tmp_path):
    records = [
        {"messages": [{"role": role, "content": f"{n} {i}"} for i in range(turns) for role in ("user", "assistant")]}
        for n, turns in enumerate((3, 1, 2, 1, 3, 1, 2, 1))
    ]
    lengths = {"max_length": 400, "max_prompt_length": 300}
    data = data_of(write(tmp_path / "rows.jsonl", records), template="chat", **lengths)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}"
    encoder = Encoder(tokenizer, data)
    rows = load(data)
    found = open_tokens(rows, encoder, lambda event: None, None)
    expected = tokenize(list(rows), encoder, data)
    assert sum(sequence.turns is not None for sequence in expected.sequences) > 0
    assert sum(sequence.turns is None for sequence in expected.sequences) > 0
    for one, other in zip(found.sequences, expected.sequences, strict=True):
        assert (one.turns is None) == (other.turns is None)
        assert one.turns is None or one.turns.tolist() == other.turns.tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 30},
        {"template": "alpaca"},
        {"special_tokens_in_text": "text"},
        {"skip_bad_rows": True},
    ],
)
def test_other_settings_have_another_store(change, tmp_path):
    data = data_of(write(tmp_path / "rows.jsonl", RECORDS["prompts"]), max_length=40, max_prompt_length=20)
    for settings in (data, data.model_copy(update=change)):
        open_tokens(load(settings), Encoder(tiny.tokenizer(), settings), lambda event: None, None)
    assert len(list((tmp_path / "store").glob("tokens-*"))) == 2
    other = data.model_copy(update={"workers": 1, "bucket": 3, "seed": 4, "valid_limit": 2})
    open_tokens(load(data), Encoder(tiny.tokenizer(), other), lambda event: None, None)
    open_tokens(load(data), Encoder(tiny.tokenizer(size=60), data), lambda event: None, None)
    assert len(list((tmp_path / "store").glob("tokens-*"))) == 3, "of another tokenizer, not of another order"


def test_changed_file_has_another_store_also_with_the_same_size_and_time(tmp_path):
    path = write(tmp_path / "rows.jsonl", RECORDS["prompts"])
    data = data_of(path)
    first = load(data)
    times = path.stat()
    write(path, [{**record, "prompt": record["prompt"].replace("p", "q")} for record in RECORDS["prompts"]])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert path.stat().st_size == times.st_size
    second = load(data)
    assert first[0].prompt.startswith("p")
    assert second[0].prompt.startswith("q")
    assert len(list((tmp_path / "store").glob("rows-*"))) == 2


def damage_truncate(store: Path) -> None:
    file = max(store.glob("*.bin"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])


def damage_edit(store: Path) -> None:
    file = store / ("text.bin" if (store / "text.bin").exists() else "ids.bin")
    content = bytearray(file.read_bytes())
    content[2] ^= 1
    file.write_bytes(content)


def damage_metadata(store: Path) -> None:
    (store / STORE_FILE).write_text("[]")


def damage_foreign(store: Path) -> None:
    metadata = json.loads((store / STORE_FILE).read_text())
    (store / STORE_FILE).write_text(json.dumps(metadata | {"key": "0" * 64}))


def damage_missing(store: Path) -> None:
    (store / STORE_FILE).unlink()


@pytest.mark.parametrize("damage", [damage_truncate, damage_edit, damage_metadata, damage_foreign, damage_missing])
@pytest.mark.parametrize("kind", ["rows", "tokens"])
def test_damaged_store_is_made_again_with_a_warning(damage, kind, tmp_path):
    data = data_of(write(tmp_path / "rows.jsonl", RECORDS["prompts"]))
    encoder = Encoder(tiny.tokenizer(), data)
    before = list(open_tokens(load(data), encoder, lambda event: None, None).sequences)
    digest = rows_digest(before)
    damage(next((tmp_path / "store").glob(f"{kind}-*")))
    events: list = []
    found = open_tokens(load(data, events=events), encoder, events.append, None)
    warnings = [event.text for event in events if isinstance(event, Warned)]
    assert len(warnings) == 1
    assert "cannot be used" in warnings[0]
    assert found.sequences.digest == digest == rows_digest(list(found.sequences))
    again: list = []
    open_tokens(load(data, events=again), encoder, again.append, None)
    assert not any(isinstance(event, Warned) for event in again)


def test_other_files_in_the_place_of_a_store_are_not_removed(tmp_path):
    data = data_of(write(tmp_path / "rows.jsonl", RECORDS["prompts"]))
    load(data)
    store = next((tmp_path / "store").glob("rows-*"))
    (store / STORE_FILE).unlink()
    (store / "thesis.txt").write_text("important")
    with raises_code("storage.not_a_cache", "thesis.txt"):
        load(data)
    assert (store / "thesis.txt").read_text() == "important"
    events: list = []
    automatic = load(data.model_copy(update={"store": "auto"}), events=events)
    assert not automatic.are_stored


def test_auto_stores_large_files_and_falls_back_to_memory(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", RECORDS["prompts"])
    data = data_of(path, store="auto")
    assert not load(data).are_stored
    assert not (tmp_path / "store").exists()
    monkeypatch.setattr(sources, "STORED_BYTES", path.stat().st_size)
    assert load(data).are_stored
    assert not load(data.model_copy(update={"limit": 10})).are_stored
    (tmp_path / "file").write_text("")
    unwritable = data.model_copy(update={"store_dir": str(tmp_path / "file" / "store")})
    events: list = []
    found = load(unwritable, events=events)
    assert not found.are_stored
    assert len(found) == len(load(data))
    (warning,) = [event.text for event in events if isinstance(event, Warned)]
    assert "reading the rows into memory" in warning
    with raises_code("storage.failed", "stored rows"):
        load(unwritable.model_copy(update={"store": "on"}))


def test_auto_tokenizes_into_memory_if_token_ids_cannot_be_stored(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", RECORDS["prompts"])
    monkeypatch.setattr(sources, "STORED_BYTES", 1)
    data = data_of(path, store="auto")
    rows = load(data)
    full = data.model_copy(update={"store_dir": str(path / "store")})
    events: list = []
    found = open_tokens(rows, Encoder(tiny.tokenizer(), full), events.append, None)
    expected = tokenize(list(rows), Encoder(tiny.tokenizer(), data), data)
    assert rows_digest(found.sequences) == rows_digest(expected.sequences)
    assert list(found.rows) == list(expected.rows)
    assert any(isinstance(event, Warned) and "tokenizing into memory" in event.text for event in events)
    with raises_code("storage.failed"):
        on = full.model_copy(update={"store": "on"})
        open_tokens(rows, Encoder(tiny.tokenizer(), on), lambda event: None, None)


def test_only_local_files_are_stored(tmp_path):
    with raises_code("data.cannot_store", "data.store on"):
        load(DataConfig(source="pronounce", store="on", store_dir=str(tmp_path)))
    with raises_code("data.cannot_store", "data.store on"):
        load(DataConfig(source="builtin", store="on", store_dir=str(tmp_path)))


def test_values_that_json_changes_are_refused(tmp_path):
    row = Row(messages=[{"role": "user", "content": "q", "n": (1, 2)}], where="a row 1")
    with raises_code("data.cannot_store", "a row 1"):
        row_store.store_rows([row], tmp_path, lambda event: None, "a")
    with raises_code("data.cannot_store", "a row 1"):
        row_store.store_rows([replace(row, messages=[{"n": b"x"}])], tmp_path, lambda event: None, "a")


def test_errors_of_rows_leave_no_store(tmp_path):
    data = data_of(write(tmp_path / "rows.jsonl", [*RECORDS["prompts"], {"prompt": ""}]))
    with raises_code("data.invalid_row", "rows.jsonl:121"):
        load(data)
    assert not list((tmp_path / "store").glob("rows-*"))
    skipping = load(data.model_copy(update={"skip_bad_rows": True}))
    assert len(skipping.skipped) == 1
    assert load(data.model_copy(update={"skip_bad_rows": True})).skipped == skipping.skipped


def test_concurrent_makers_make_one_store(tmp_path):
    made: list[Path] = []
    events: list = []
    start = threading.Barrier(3)

    def make(directory: Path) -> dict[str, int]:
        made.append(directory)
        (directory / "numbers.bin").write_bytes(np.arange(1000).tobytes())
        return {"n": 1000}

    def run() -> None:
        start.wait()
        open_or_make(tmp_path, "rows", key_of("x"), make, events.append, what="rows")

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == [f"rows-{key_of('x')[:32]}"]


def test_failed_maker_leaves_nothing(tmp_path):
    def make(directory: Path) -> dict[str, int]:
        (directory / "numbers.bin").write_bytes(b"1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_or_make(tmp_path, "rows", key_of("x"), make, lambda event: None, what="rows")
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]


def test_saved_data_sets_and_directories_are_stored(tmp_path):
    from datasets import Dataset, DatasetDict

    records = RECORDS["instructions"]
    DatasetDict({"train": Dataset.from_list(records), "test": Dataset.from_list(records[:3])}).save_to_disk(
        tmp_path / "saved"
    )
    (tmp_path / "split").mkdir()
    write(tmp_path / "split" / "train.jsonl", records)
    write(tmp_path / "split" / "valid.jsonl", records[:5])
    for name in ("saved", "split"):
        data = DataConfig(source=str(tmp_path / name), store="on", store_dir=str(tmp_path / "store"))
        found = load(data)
        assert found.are_stored
        assert list(found) == list(load(data.model_copy(update={"store": "off"})))
        assert not load(data.model_copy(update={"valid": str(tmp_path / "split")}), "valid").are_stored
    shutil.rmtree(tmp_path / "saved")


def test_fingerprint_follows_the_content(tmp_path):
    path = tmp_path / "a"
    path.write_text("one")
    first = fingerprint([path])
    path.write_text("two, longer")
    assert fingerprint([path]) != first
