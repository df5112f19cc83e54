"""Test rows from every kind of file and source, and the errors for invalid ones."""

from __future__ import annotations

import csv
import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from distillm_cli.config.schema import ColumnsConfig, DataConfig
from distillm_cli.data.rows import Row
from distillm_cli.data.sources import load_rows, overlap
from distillm_cli.training.events import Note, Warned
from distillm_cli.utils.text import counted
from tests.codes import raises_code

PAIR = {"instruction": "Add.", "input": "1 + 1", "output": "2"}


def jsonl(path: Path, *records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def load_all(path: Path, **fields):
    """Load all rows of one file."""
    require_output = fields.pop("require_output", True)
    return load_rows(DataConfig(source=str(path), **fields), "test", require_output=require_output)


def numbered(n: int) -> list[dict]:
    return [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(n)]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Fail the test on any network access."""

    def fail(*args, **kwargs):
        raise AssertionError(f"unexpected network access: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(socket.socket, "connect", fail)
    monkeypatch.delenv("DISTILLM_DATA", raising=False)


def test_paper_datasets_load_by_name(shared_data, monkeypatch):
    monkeypatch.setenv("DISTILLM_DATA", str(shared_data))
    # The original dolly repository names its test split valid.jsonl, next to a dev.jsonl.
    sizes = {"dolly train": 11_435, "dolly valid": 1_000, "dolly test": 500, "sinst test": 1_694, "sni test": 1_694}
    sizes |= {"self-inst test": 242, "vicuna test": 80, "g2p train": 30_000, "g2p valid": 1_000, "g2p test": 2_000}
    for name_and_split, size in sizes.items():
        rows = load_rows(DataConfig(source=name_and_split.split()[0]), name_and_split.split()[1])
        assert (len(rows), str(rows), rows.skipped) == (size, name_and_split, [])
    dolly = load_rows(DataConfig(source="dolly", limit=3), "train")
    assert dolly[0].instruction == "Give me three different ways to reuse a paper grocery bag."
    assert dolly[0].prompt.endswith("### Response:\n")
    assert [row.where for row in dolly] == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3"]


def test_every_reference_of_a_row_is_loaded(shared_data):
    rows = load_rows(DataConfig(source=str(shared_data / "g2p")), "valid")
    assert rows[0] == Row(
        "Pronounce the word.",
        "process",
        references=("P R AA S EH S", "P R AO S EH S"),
        where="valid.jsonl:1",
        format="instruction",
    )


def test_gsm8k_rows_with_held_out_slice(shared_data):
    events = []
    data = DataConfig(source=str(shared_data / "gsm8k"))
    train, valid = (load_rows(data, split, listener=events.append) for split in ("train", "valid"))
    assert (len(train), len(valid), len(load_rows(data, "test"))) == (7_473 - 373, 373, 1_319)
    assert not {row.where for row in train} & {row.where for row in valid}
    assert train[0].is_question
    assert train[0].references[0].endswith("#### 72")
    assert events == [
        Note("gsm8k train: 7,473 rows, question-answer (question, answer)"),
        Note("gsm8k has no held-out rows: 373 of its 7,473 are held out for validation"),
    ]


def test_overlap_of_dolly_splits_is_counted(shared_data):
    data = DataConfig(source=str(shared_data / "dolly"))
    train = load_rows(data, "train")
    assert [overlap(load_rows(data, split), train) for split in ("valid", "test")] == [25, 8]


@pytest.mark.parametrize(
    ("record", "columns", "expected"),
    [
        (PAIR, {}, Row("Add.", "1 + 1", references=("2",))),
        (PAIR | {"input": None, "output": ["2", "two"]}, {}, Row("Add.", "", references=("2", "two"))),
        (PAIR | {"prompt": "Add 1 + 1:"}, {}, Row("Add.", "1 + 1", "Add 1 + 1:", references=("2",))),
        (PAIR | {"task": "sums"}, {}, Row("Add.", "1 + 1", references=("2",), task="sums")),
        ({"instruction": "a", "context": "b", "response": "c"}, {}, Row("a", "b", references=("c",))),
        ({"prompt": "a", "completion": "b"}, {}, Row(prompt="a", references=("b",))),
        ({"prompt": "a", "response": "b"}, {}, Row(prompt="a", references=("b",))),
        ({"prompt": "a", "output": ""}, {}, Row(prompt="a", references=("",))),
        ({"question": "a", "answer": "b"}, {}, Row("a", references=("b",), is_question=True)),
        (
            {"q": "a", "x": "b", "gold": "c"},
            {"prompt": "q", "response": "gold"},
            Row("a", references=("c",), is_question=True),
        ),
        (
            {"q": "a", "x": "b", "gold": "c"},
            {"prompt": "q", "input": "x", "response": "gold"},
            Row("a", "b", references=("c",), is_question=True),
        ),
        ({"prompt": "a", "chosen": "c"}, {"response": "chosen"}, Row(prompt="a", references=("c",))),
        (PAIR | {"prompt": "exact"}, {"prompt": "instruction"}, Row("Add.", "1 + 1", references=("2",))),
    ],
)
def test_columns_are_mapped_to_row_fields(tmp_path, record, columns, expected):
    (row,) = load_all(jsonl(tmp_path / "a.jsonl", record), columns=ColumnsConfig(**columns))
    assert row == replace(expected, where="a.jsonl:1", format=row.format)


def test_last_assistant_message_is_the_response(tmp_path):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "bye"},
    ]
    records = [{"messages": messages}, {"messages": messages + messages[1:2]}, {"messages": messages[:2]}]
    path = jsonl(tmp_path / "chat.jsonl", *records)
    first, second, third = load_all(path, require_output=False)
    assert (first.messages, first.answer, first.references) == (messages[:4], messages[4], ("bye",))
    assert (second.messages, second.references) == (messages + messages[1:2], ())  # ends with a question
    assert (third.messages, third.references) == (messages[:2], ())
    with raises_code("data.invalid_row", "chat.jsonl:2", "user"):
        load_all(path)
    elsewhere = jsonl(tmp_path / "both.jsonl", {"messages": messages[:4], "output": "bye"})
    (row,) = load_all(elsewhere)
    assert (row.messages, row.references) == (messages[:4], ("bye",))


def test_response_is_required_only_if_used(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "a"}, {"instruction": "b", "output": []})
    assert [row.references for row in load_all(path, require_output=False)] == [(), ()]
    with raises_code("data.invalid_row", "a.jsonl:1", "`prompt`"):
        load_all(path)


def test_every_file_format_gives_the_same_rows(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    rows = [PAIR, {"instruction": "Say “é”,\nthen stop.", "input": "", "output": "NA"}]
    jsonl(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.json").write_text(json.dumps({"version": [1, 2], "data": rows}, indent=1))
    jsonl(tmp_path / "lines.json", *rows)
    with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(PAIR))
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e[1].parquet")
    found = {path.name: load_all(path) for path in sorted(tmp_path.iterdir())}
    assert len(found) == 6
    for rows_found in found.values():
        assert [(r.instruction, r.input, r.references[0]) for r in rows_found] == [tuple(row.values()) for row in rows]
    where = {name: [row.where for row in rows_found] for name, rows_found in found.items()}
    assert where["b.json"] == ["b.json:2", "b.json:7"]  # the line on which each row starts
    assert where["c.json"] == ["c.json:7", "c.json:12"]
    assert where["d.csv"] == ["d.csv:2", "d.csv:3"]
    assert where["e[1].parquet"] == ["e[1].parquet row 1", "e[1].parquet row 2"]


def test_byte_order_mark_crlf_and_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps(PAIR | {"output": "two\u2028lines"}, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    assert [(row.where, row.references[0]) for row in load_all(path)] == [
        ("a.jsonl:1", "two\u2028lines"),
        ("a.jsonl:4", "two\u2028lines"),
    ]


# line → what the message must mention
BROKEN: dict[str, tuple[str, ...]] = {
    '{"instruction": "a" "output": "b"}': ("','", "column 21"),
    '{"instruction": "a", "output": "b"': ("','", "column 35"),
    "[1, 2]": ("list",),
    "[" * 100_000: ("JSON",),
    '{"body": "a", "label": 1}': ("data.columns.prompt", "`body`, `label`"),
    '{"instruction": "a"}': ("data.columns.response", "`instruction`"),
    '{"instruction": "a", "output": 42}': ("`output`", "(42)"),
    '{"instruction": "a", "output": ["b", null]}': ("`output`", "2", "null"),
    '{"instruction": "a", "output": []}': ("`output`",),
    '{"instruction": true, "output": "b"}': ("`instruction`", "true"),
    '{"instruction": "a", "input": {}, "output": "b"}': ("`input`", "object"),
    '{"instruction": " ", "input": "", "output": "b"}': ("`instruction`",),
    '{"prompt": "", "completion": "b"}': ("`prompt`",),
    r'{"prompt": "\ud83d", "completion": "b"}': ("`prompt`", "surrogate"),
    '{"messages": "hi"}': ("`messages`", "text"),
    '{"messages": [{"role": "user"}]}': ("message 1", "`content`", "null"),
    '{"messages": [{"role": "assistant", "content": "b"}]}': ("`messages`",),
}


@pytest.mark.parametrize("line", BROKEN, ids=lambda line: line[:40])
def test_invalid_row_is_rejected_with_its_line(tmp_path, line):
    path = jsonl(tmp_path / "train.jsonl", PAIR, "", line, PAIR)
    is_json = not line.startswith(('{"instruction": "a" "', '{"instruction": "a", "output": "b"', "[["))
    with raises_code("data.invalid_row" if is_json else "data.invalid_json", *BROKEN[line]) as caught:
        load_all(path)
    assert caught.value.exit_code == 3
    assert caught.value.what.startswith("train.jsonl:3: ")
    assert caught.value.where == str(path)
    assert "--skip-bad-rows" in caught.value.hint


def test_skipped_rows_are_counted_and_listed(tmp_path):
    events = []
    path = jsonl(tmp_path / "train.jsonl", PAIR, *BROKEN, PAIR, *["{"] * 30)
    path.write_bytes(path.read_bytes() + b'{"prompt": "\xff"}\n')
    rows = load_rows(DataConfig(source=str(path), skip_bad_rows=True), "test", listener=events.append)
    assert [row.where for row in rows] == ["train.jsonl:1", f"train.jsonl:{len(BROKEN) + 2}"]
    assert len(rows.skipped) == len(BROKEN) + 31
    for line, (skipped, mentions) in enumerate(zip(rows.skipped, BROKEN.values(), strict=False), start=2):
        assert skipped.startswith(f"train.jsonl:{line}: ")
        assert all(mention in skipped for mention in mentions)
    assert "byte 0xff at byte 13" in rows.skipped[-1]
    assert events[0] == Warned(f"skipped {rows.skipped[0]}")
    assert isinstance(events[20], Warned)
    assert f"{len(BROKEN) + 31}" in events[20].text
    assert events[21:] == [Note("train.jsonl: 2 rows, instruction (instruction, input, output)")]


def test_columns_of_the_recipe_must_exist(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"q": "a", "gold": "b"})
    for field in ("prompt", "input", "response"):
        columns = ColumnsConfig(**({"prompt": "q", "response": "gold"} | {field: "x"}))
        with raises_code("data.invalid_row", "a.jsonl:1", "`x`", f"data.columns.{field}", "`q`, `gold`"):
            load_all(path, columns=columns)


@pytest.mark.parametrize(
    ("name", "content", "code", "mentions"),
    [
        ("a.json", b'[{"prompt": "a",\n "output" 1}]', "data.invalid_json", ("a.json:2", "':'", "column 11")),
        ("a.json", b'["\xff"]', "data.not_utf8", ("a.json:1", "0xff")),
        ("a.json", b'{"rows": []}', "data.invalid_row", ("a.json:1",)),
        ("a.json", b"[]", "data.no_rows", ("a.json",)),
        ("a.json", b"", "data.no_rows", ("a.json",)),
        ("a.jsonl", b"\n\n", "data.no_rows", ("a.jsonl",)),
        ("a.csv", b"", "data.no_rows", ("a.csv",)),
        ("a.csv", b"prompt,prompt\na,b\n", "data.invalid_csv", ("a.csv:1", "`prompt`")),
        ("a.csv", b'prompt,output\n"a\nb",c\nd\n', "data.invalid_row", ("a.csv:4", "1", "2")),
        ("a.csv", b'prompt,output\n"a,b\n', "data.invalid_row", ("a.csv:2",)),
        ("a.csv", b"prompt,output\n\xff,b\n", "data.invalid_row", ("a.csv:2", "`prompt`", "UTF-8")),
        ("a.csv", b"text,output\na,b\n", "data.invalid_row", ("a.csv:2",)),
        ("a.parquet", b"hello", "data.unreadable", ("a.parquet",)),
        ("a.txt", b"hello", "data.unknown_format", ("a.txt",)),
    ],
)
def test_invalid_file_is_rejected_in_one_line(tmp_path, name, content, code, mentions):
    path = tmp_path / name
    path.write_bytes(content)
    with raises_code(code, *mentions) as caught:
        load_all(path)
    assert "\n" not in str(caught.value)


def test_file_of_invalid_rows_has_no_rows(tmp_path):
    with raises_code("data.no_rows", "2", "a.jsonl:1"):
        load_all(jsonl(tmp_path / "a.jsonl", "{", "{"), skip_bad_rows=True)


# -------------------------------------------------------------------------------------------- locations of sources


def test_missing_path_is_rejected_without_network(tmp_path):
    for name in ("./nowhere", "../nowhere/x", str(tmp_path / "nowhere"), "~/no/where", "train.jsonl", "prompts.txt"):
        with raises_code("data.not_found"):
            load_rows(DataConfig(source=name), "train")


def test_unknown_dataset_error_names_searched_places(tmp_path, monkeypatch):
    with raises_code("data.not_found", "`unni`", "$DISTILLM_DATA", "MiniLLM/uinst"):
        load_rows(DataConfig(source="unni"), "test")
    monkeypatch.setenv("DISTILLM_DATA", str(tmp_path))
    with raises_code("data.not_found", f"$DISTILLM_DATA ({tmp_path})", "someone/set"):
        load_rows(DataConfig(source="someone/set"), "test")


@pytest.mark.parametrize(
    ("typed", "meant"), [("doly", "dolly"), ("Dolli", "dolly"), ("uni", "unni"), ("buildin", "builtin")]
)
def test_misspelled_dataset_name_gets_a_suggestion(typed, meant, tmp_path, monkeypatch):
    with raises_code("data.not_found", f"`{typed}`", f"{meant}?"):
        load_rows(DataConfig(source=typed), "train")
    monkeypatch.setenv("DISTILLM_DATA", str(tmp_path))
    (tmp_path / "letters").mkdir()
    with raises_code("data.not_found", "letters?"):
        load_rows(DataConfig(source="leters"), "test")


def test_plain_name_is_searched_in_distillm_data_first(tmp_path, monkeypatch):
    jsonl(tmp_path / "named" / "unni" / "valid.jsonl", {"prompt": "named", "output": "x"})
    jsonl(tmp_path / "here" / "unni" / "valid.jsonl", {"prompt": "here", "output": "x"})
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("DISTILLM_DATA", str(tmp_path / "named"))
    prompt = {
        name: load_rows(DataConfig(source=name), "test")[0].prompt for name in ("unni", "uinst", "./unni", "unni/")
    }
    assert prompt == {"unni": "named", "uinst": "named", "./unni": "here", "unni/": "here"}
    monkeypatch.delenv("DISTILLM_DATA")
    assert load_rows(DataConfig(source="unni"), "test")[0].prompt == "here"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ("train dev valid", {"train": "train", "valid": "dev", "test": "valid"}),
        ("train dev test", {"train": "train", "valid": "dev", "test": "test"}),
        ("train valid test", {"train": "train", "valid": "valid", "test": "test"}),
        ("train validation test", {"train": "train", "valid": "validation", "test": "test"}),
        ("train valid", {"train": "train", "valid": "valid", "test": "valid"}),
        ("valid", {"valid": "valid", "test": "valid"}),
        ("test", {"test": "test"}),
    ],
)
def test_files_of_a_directory_are_mapped_to_splits(tmp_path, files, expected):
    for name in files.split():
        jsonl(tmp_path / f"{name}.jsonl", {"prompt": name, "output": "x"})
    for split in ("train", "valid", "test"):
        if split in expected:
            rows = load_rows(DataConfig(source=str(tmp_path)), split)
            assert [row.prompt for row in rows] == [expected[split]]
        else:
            with raises_code("data.no_split", split):
                load_rows(DataConfig(source=str(tmp_path)), split)


def test_stand_in_rows_are_rejected_for_an_explicit_split(tmp_path):
    alone = jsonl(tmp_path / "a.jsonl", *numbered(40))
    (tmp_path / "train only").mkdir()
    jsonl(tmp_path / "train only/train.jsonl", *numbered(40))
    for source, count in ((alone, 40), (tmp_path / "train only", 2)):
        data = DataConfig(source=str(source))
        rows = load_rows(data, "test")
        assert (len(rows), rows.splits) == (count, ("train",))
        with raises_code("data.no_split", "test", "train", "valid"):
            load_rows(data, "test", stand_in=False)
        assert len(load_rows(data, "valid", stand_in=False)) == 2
    jsonl(tmp_path / "train only/test.jsonl", *numbered(7))
    assert len(load_rows(data, "test", stand_in=False)) == 7


def test_directories_with_shards_single_and_ambiguous_files(tmp_path):
    for shard in (1, 0):  # as in a clone of a hub repository
        jsonl(tmp_path / "clone" / "data" / f"train-0000{shard}-of-00002.jsonl", {"prompt": f"{shard}", "output": "x"})
    assert [row.prompt for row in load_rows(DataConfig(source=str(tmp_path / "clone"), valid="builtin"), "train")] == [
        "0",
        "1",
    ]
    jsonl(tmp_path / "one" / "rows.jsonl", {"prompt": "a", "output": "x"})
    assert len(load_all(tmp_path / "one")) == 1
    for name in ("train.json", "train.jsonl"):
        jsonl(tmp_path / "twice" / name, {"prompt": "a", "output": "x"})
    with raises_code("data.ambiguous_split", "train.json, train.jsonl"):
        load_all(tmp_path / "twice")
    (tmp_path / "empty").mkdir()
    with raises_code("data.not_found", "empty"):
        load_all(tmp_path / "empty")


# ---------------------------------------------------------------------------------------------------- held-out rows


def test_held_out_slice_is_seeded_and_disjoint(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *numbered(200))
    slices = {}
    for seed in (1, 2):
        data = DataConfig(source=str(path), seed=seed)
        train, valid = load_rows(data, "train"), load_rows(data, "valid")
        assert (len(train), len(valid)) == (190, 10)
        assert {row.where for row in train} | {row.where for row in valid} == {row.where for row in load_all(path)}
        assert load_rows(data, "valid").rows == valid.rows
        slices[seed] = [row.where for row in valid]
    assert slices[1] != slices[2]
    assert len(load_rows(DataConfig(source=str(path), valid_limit=3), "valid")) == 3
    assert len(load_rows(DataConfig(source=str(path), valid_limit=3), "train")) == 197


def test_rows_with_equal_prompts_stay_in_one_split(tmp_path):
    rows = [{"question": f"word {i // 4}", "answer": f"{i}"} for i in range(400)]
    data = DataConfig(source=str(jsonl(tmp_path / "a.jsonl", *rows)))
    train, valid = load_rows(data, "train"), load_rows(data, "valid")
    assert (len(train), len(valid), overlap(valid, train)) == (380, 20, 0)


def test_validation_file_leaves_training_rows_unchanged(tmp_path):
    train, valid = jsonl(tmp_path / "a.jsonl", *numbered(40)), jsonl(tmp_path / "b.jsonl", *numbered(7))
    data = DataConfig(source=str(train), valid=str(valid))
    assert [len(load_rows(data, split)) for split in ("train", "valid", "test")] == [40, 7, 40]


def test_single_row_cannot_be_held_out(tmp_path):
    data = DataConfig(source=str(jsonl(tmp_path / "a.jsonl", PAIR)))
    assert len(load_rows(data, "train")) == 1
    with raises_code("data.no_held_out_rows", "data.valid=FILE"):
        load_rows(data, "valid")


def test_too_few_distinct_prompts_cannot_be_held_out(tmp_path):
    same, few = [PAIR] * 20, [{"question": f"word {i % 4}", "answer": f"{i}"} for i in range(20)]
    for rows, mentions in ((same, ("20",)), (few, ("20", "4"))):
        with raises_code("data.no_held_out_rows", "a.jsonl", *mentions):
            load_rows(DataConfig(source=str(jsonl(tmp_path / "a.jsonl", *rows))), "valid")


def test_counts_of_one_are_singular(tmp_path):
    events = []
    data = DataConfig(source=str(jsonl(tmp_path / "a.jsonl", *numbered(10))))
    load_rows(data, "train", listener=events.append)
    assert events[1:] == [Note("a.jsonl has no held-out rows: 1 of its 10 is held out for validation")]
    with raises_code("data.no_rows", "b.jsonl:1"):
        load_rows(DataConfig(source=str(jsonl(tmp_path / "b.jsonl", {})), skip_bad_rows=True), "test")
    assert (counted(1, "row"), counted(0, "row"), counted(1_000, "row")) == ("1 row", "0 rows", "1,000 rows")


def test_limits_select_the_first_rows(tmp_path):
    for name in ("train", "valid", "test"):
        jsonl(tmp_path / f"{name}.jsonl", *numbered(50), "broken beyond the limit")
    data = DataConfig(source=str(tmp_path), limit=5, valid_limit=4)
    assert [len(load_rows(data, split)) for split in ("train", "valid")] == [5, 4]
    assert len(load_rows(data, "test", limit=3)) == 3
    assert len(load_rows(data, "train", limit=2)) == 2


def test_builtin_splits_are_disjoint():
    data = DataConfig(source="builtin", size=300, valid_limit=60)
    train, valid, test = (load_rows(data, split) for split in ("train", "valid", "test"))
    assert (len(train), len(valid), len(test), train.name) == (300, 60, 1000, "builtin"), (
        "valid_limit applies only to valid"
    )
    assert [len(load_rows(data, "test", limit=n)) for n in (70, 1200)] == [70, 1200]
    assert all(row.task and row.references[0] for row in train)
    assert train[0].where == "builtin train row 1"
    assert overlap(valid, train) == overlap(test, train) == overlap(test, valid) == 0
    one = load_rows(data.model_copy(update={"tasks": (train[0].task,)}), "train", limit=5)
    assert {row.task for row in one} == {train[0].task}
    assert len(one) == 5
