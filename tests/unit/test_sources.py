"""Files of every kind and every fault → rows, each knowing where it stands."""

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
from distillm_cli.errors import DataError
from distillm_cli.training.events import Note, Warned
from distillm_cli.utils.text import counted

PAIR = {"instruction": "Add.", "input": "1 + 1", "output": "2"}


def jsonl(path: Path, *records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def whole(path: Path, **fields):
    """All rows of one file."""
    require_output = fields.pop("require_output", True)
    return load_rows(DataConfig(source=str(path), **fields), "test", require_output=require_output)


def numbered(n: int) -> list[dict]:
    return [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(n)]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whatever is loaded here, nothing may so much as look up a name."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was asked for {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("DISTILLM_DATA", raising=False)


def test_the_paper_sets_load_whole_and_by_name(shared_data, monkeypatch):
    monkeypatch.setenv("DISTILLM_DATA", str(shared_data))
    # Upstream calls dolly's test split valid.jsonl, beside a dev.jsonl.
    sizes = {"dolly train": 11_435, "dolly valid": 1_000, "dolly test": 500, "sinst test": 1_694, "sni test": 1_694}
    sizes |= {"self-inst test": 242, "vicuna test": 80, "g2p train": 30_000, "g2p valid": 1_000, "g2p test": 2_000}
    for asked, size in sizes.items():
        rows = load_rows(DataConfig(source=asked.split()[0]), asked.split()[1])
        assert (len(rows), str(rows), rows.skipped) == (size, asked, [])
    dolly = load_rows(DataConfig(source="dolly", limit=3), "train")
    assert dolly[0].instruction == "Give me three different ways to reuse a paper grocery bag."
    assert dolly[0].prompt.endswith("### Response:\n")
    assert [row.where for row in dolly] == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3"]


def test_every_reference_of_a_row_is_kept(shared_data):
    rows = load_rows(DataConfig(source=str(shared_data / "g2p")), "valid")
    assert rows[0] == Row(
        "Pronounce the word.",
        "process",
        references=("P R AA S EH S", "P R AO S EH S"),
        where="valid.jsonl:1",
        format="instruction",
    )


def test_question_rows_and_a_slice_where_nothing_is_held_out(shared_data):
    said = []
    data = DataConfig(source=str(shared_data / "gsm8k"))
    train, valid = (load_rows(data, split, listener=said.append) for split in ("train", "valid"))
    assert (len(train), len(valid), len(load_rows(data, "test"))) == (7_473 - 373, 373, 1_319)
    assert not {row.where for row in train} & {row.where for row in valid}
    assert train[0].is_question
    assert train[0].references[0].endswith("#### 72")
    assert said == [
        Note("gsm8k train: 7,473 rows, question-answer (question, answer)"),
        Note("gsm8k has no held-out rows: 373 of its 7,473 are held out for validation"),
    ]


def test_upstreams_overlap_is_reported_rather_than_hidden(shared_data):
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
def test_shapes_of_rows(tmp_path, record, columns, expected):
    (row,) = whole(jsonl(tmp_path / "a.jsonl", record), columns=ColumnsConfig(**columns))
    assert row == replace(expected, where="a.jsonl:1", format=row.format)


def test_the_last_assistant_message_is_the_response(tmp_path):
    said = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "bye"},
    ]
    path = jsonl(tmp_path / "chat.jsonl", {"messages": said}, {"messages": said + said[1:2]}, {"messages": said[:2]})
    first, second, third = whole(path, require_output=False)
    assert (first.messages, first.answer, first.references) == (said[:4], said[4], ("bye",))
    assert (second.messages, second.references) == (said + said[1:2], ())  # asked again, and not answered yet
    assert (third.messages, third.references) == (said[:2], ())
    with pytest.raises(
        DataError, match=r"chat.jsonl:2: no response to the last message \(user\), and no response column"
    ):
        whole(path)
    elsewhere = jsonl(tmp_path / "both.jsonl", {"messages": said[:4], "output": "bye"})
    (row,) = whole(elsewhere)
    assert (row.messages, row.references) == (said[:4], ("bye",))


def test_prompts_need_no_response_where_none_is_used(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "a"}, {"instruction": "b", "output": []})
    assert [row.references for row in whole(path, require_output=False)] == [(), ()]
    with pytest.raises(DataError, match=r"a.jsonl:1: no response column .*found `prompt`"):
        whole(path)


def test_the_same_rows_from_every_kind_of_file(tmp_path):
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
    found = {path.name: whole(path) for path in sorted(tmp_path.iterdir())}
    assert len(found) == 6
    for rows_found in found.values():
        assert [(r.instruction, r.input, r.references[0]) for r in rows_found] == [tuple(row.values()) for row in rows]
    where = {name: [row.where for row in rows_found] for name, rows_found in found.items()}
    assert where["b.json"] == ["b.json:2", "b.json:7"]  # the line each row starts on
    assert where["c.json"] == ["c.json:7", "c.json:12"]
    assert where["d.csv"] == ["d.csv:2", "d.csv:3"]
    assert where["e[1].parquet"] == ["e[1].parquet row 1", "e[1].parquet row 2"]


def test_byte_order_mark_windows_line_ends_and_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps(PAIR | {"output": "two\u2028lines"}, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    assert [(row.where, row.references[0]) for row in whole(path)] == [
        ("a.jsonl:1", "two\u2028lines"),
        ("a.jsonl:4", "two\u2028lines"),
    ]


BROKEN = {
    '{"instruction": "a" "output": "b"}': "not JSON (expected ',' at column 21)",
    '{"instruction": "a", "output": "b"': "not JSON (expected ',' at column 35)",
    "[1, 2]": "expected an object with named columns, found a list",
    "[" * 100_000: "not JSON (nested too deeply)",
    '{"body": "a", "label": 1}': "no prompt column (messages, conversations, conversation, instruction, prompt, question, "
    "text, or data.columns.prompt); found `body`, `label`",
    '{"instruction": "a"}': "no response column (output, response, completion, answer, or data.columns.response); "
    "found `instruction`",
    '{"instruction": "a", "output": 42}': "column `output` must be text or a list of texts, found a number (42)",
    '{"instruction": "a", "output": ["b", null]}': "column `output` must be a list of texts; item 2 is null",
    '{"instruction": "a", "output": []}': "column `output` is an empty list",
    '{"instruction": true, "output": "b"}': "column `instruction` must be text, found true",
    '{"instruction": "a", "input": {}, "output": "b"}': "column `input` must be text, found an object",
    '{"instruction": " ", "input": "", "output": "b"}': "an empty prompt (column `instruction`)",
    '{"prompt": "", "completion": "b"}': "an empty prompt (column `prompt`)",
    r'{"prompt": "\ud83d", "completion": "b"}': "column `prompt` has half of a character (a lone surrogate)",
    '{"messages": "hi"}': "column `messages` must be a list of messages, found text",
    '{"messages": [{"role": "user"}]}': "message 1: `content` must be text, found null",
    '{"messages": [{"role": "assistant", "content": "b"}]}': "an empty prompt (column `messages` has no message before "
    "the response)",
}


@pytest.mark.parametrize("line", BROKEN, ids=lambda line: line[:40])
def test_a_broken_row_names_its_line_and_stops(tmp_path, line):
    path = jsonl(tmp_path / "train.jsonl", PAIR, "", line, PAIR)
    with pytest.raises(DataError) as caught:
        whole(path)
    assert caught.value.exit_code == 3
    assert caught.value.what == f"train.jsonl:3: {BROKEN[line]}"
    assert caught.value.where == str(path)
    assert "--skip-bad-rows" in caught.value.hint


def test_skipping_broken_rows_counts_and_lists_them(tmp_path):
    said = []
    path = jsonl(tmp_path / "train.jsonl", PAIR, *BROKEN, PAIR, *["{"] * 30)
    path.write_bytes(path.read_bytes() + b'{"prompt": "\xff"}\n')
    rows = load_rows(DataConfig(source=str(path), skip_bad_rows=True), "test", listener=said.append)
    assert [row.where for row in rows] == ["train.jsonl:1", f"train.jsonl:{len(BROKEN) + 2}"]
    messages = [f"train.jsonl:{line}: {what}" for line, what in enumerate(BROKEN.values(), start=2)]
    assert rows.skipped[: len(BROKEN)] == messages
    assert len(rows.skipped) == len(BROKEN) + 31
    assert rows.skipped[-1].endswith("not UTF-8 (byte 0xff at byte 13 of the line)")
    assert said[0] == Warned(f"skipped {messages[0]}")
    assert said[20] == Warned(f"skipped {len(BROKEN) + 31} broken rows of train.jsonl; the first 20 are above")
    assert said[21:] == [Note("train.jsonl: 2 rows, instruction (instruction, input, output)")]


def test_a_column_named_in_the_recipe_must_be_there(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"q": "a", "gold": "b"})
    for columns, complaint in {
        "prompt": "no column `x` (data.columns.prompt); found `q`, `gold`",
        "input": "no column `x` (data.columns.input); found `q`, `gold`",
        "response": "no column `x` (data.columns.response); found `q`, `gold`",
    }.items():
        named = ColumnsConfig(**({"prompt": "q", "response": "gold"} | {columns: "x"}))
        with pytest.raises(DataError) as caught:
            whole(path, columns=named)
        assert caught.value.what == f"a.jsonl:1: {complaint}"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.json", b'[{"prompt": "a",\n "output" 1}]', "a.json:2: not JSON (expected ':' at column 11)"),
        ("a.json", b'["\xff"]', "a.json:1: not UTF-8 (byte 0xff)"),
        ("a.json", b'{"rows": []}', "a.json:1: no prompt column"),
        ("a.json", b"[]", "a.json: no rows"),
        ("a.json", b"", "a.json: no rows"),
        ("a.jsonl", b"\n\n", "a.jsonl: no rows"),
        ("a.csv", b"", "a.csv: no rows"),
        ("a.csv", b"prompt,prompt\na,b\n", "a.csv:1: column `prompt` occurs twice"),
        ("a.csv", b'prompt,output\n"a\nb",c\nd\n', "a.csv:4: 1 cells where the header has 2"),
        ("a.csv", b'prompt,output\n"a,b\n', "a.csv:2: not CSV (unexpected end of data)"),
        ("a.csv", b"prompt,output\n\xff,b\n", "a.csv:2: column `prompt` is not UTF-8"),
        ("a.csv", b"text,output\na,b\n", "a.csv:2: no prompt column"),
        ("a.parquet", b"hello", "a.parquet: not parquet ("),
        ("a.txt", b"hello", "a.txt: unknown type of data file"),
    ],
)
def test_a_broken_file_is_a_data_error(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        whole(path)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_rows_broken_says_so(tmp_path):
    with pytest.raises(DataError, match=r"all 2 rows are broken, the first: a.jsonl:1: not JSON"):
        whole(jsonl(tmp_path / "a.jsonl", "{", "{"), skip_bad_rows=True)


# ------------------------------------------------------------------------------------------------ where sources are


def test_a_missing_path_is_refused_without_asking_the_hub(tmp_path):
    for name in ("./nowhere", "../nowhere/x", str(tmp_path / "nowhere"), "~/no/where", "train.jsonl", "prompts.txt"):
        with pytest.raises(DataError, match="no such file or directory"):
            load_rows(DataConfig(source=name), "train")


def test_an_unknown_name_says_where_it_was_looked_for(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"no data set `unni`: \$DISTILLM_DATA is not set, and MiniLLM/uinst cannot be"):
        load_rows(DataConfig(source="unni"), "test")
    monkeypatch.setenv("DISTILLM_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load_rows(DataConfig(source="someone/set"), "test")
    assert f"not under $DISTILLM_DATA ({tmp_path}), and someone/set cannot be read from the hub" in str(caught.value)
    assert "set DISTILLM_DATA to a directory that contains it, or pass a file" in caught.value.hint


@pytest.mark.parametrize(
    ("typed", "meant"), [("doly", "dolly"), ("Dolli", "dolly"), ("uni", "unni"), ("buildin", "builtin")]
)
def test_a_name_that_is_nearly_that_of_a_known_set_is_told(typed, meant, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=rf"no data set `{typed}`: .*; did you mean {meant}\?"):
        load_rows(DataConfig(source=typed), "train")
    monkeypatch.setenv("DISTILLM_DATA", str(tmp_path))
    (tmp_path / "letters").mkdir()
    with pytest.raises(DataError, match="did you mean letters"):
        load_rows(DataConfig(source="leters"), "test")


def test_a_bare_name_is_looked_for_under_distillm_data_first(tmp_path, monkeypatch):
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
def test_splits_of_a_directory(tmp_path, files, expected):
    for name in files.split():
        jsonl(tmp_path / f"{name}.jsonl", {"prompt": name, "output": "x"})
    for split in ("train", "valid", "test"):
        if split in expected:
            rows = load_rows(DataConfig(source=str(tmp_path)), split)
            assert [row.prompt for row in rows] == [expected[split]]
        else:
            with pytest.raises(DataError, match=f"no {split} rows, only"):
                load_rows(DataConfig(source=str(tmp_path)), split)


def test_rows_that_stand_in_for_test_rows_are_refused_where_those_were_asked_for(tmp_path):
    alone = jsonl(tmp_path / "a.jsonl", *numbered(40))
    (tmp_path / "train only").mkdir()
    jsonl(tmp_path / "train only/train.jsonl", *numbered(40))
    for source, stand_ins in ((alone, 40), (tmp_path / "train only", 2)):
        data = DataConfig(source=str(source))
        rows = load_rows(data, "test")
        assert (len(rows), rows.splits) == (stand_ins, ("train",))
        with pytest.raises(DataError, match=r"no test rows; there are train and valid \(held out of train\)"):
            load_rows(data, "test", stand_in=False)
        assert len(load_rows(data, "valid", stand_in=False)) == 2
    jsonl(tmp_path / "train only/test.jsonl", *numbered(7))
    assert len(load_rows(data, "test", stand_in=False)) == 7


def test_other_directories(tmp_path):
    for shard in (1, 0):  # as a clone from the hub has them
        jsonl(tmp_path / "clone" / "data" / f"train-0000{shard}-of-00002.jsonl", {"prompt": f"{shard}", "output": "x"})
    assert [row.prompt for row in load_rows(DataConfig(source=str(tmp_path / "clone"), valid="builtin"), "train")] == [
        "0",
        "1",
    ]
    jsonl(tmp_path / "one" / "rows.jsonl", {"prompt": "a", "output": "x"})
    assert len(whole(tmp_path / "one")) == 1
    for name in ("train.json", "train.jsonl"):
        jsonl(tmp_path / "twice" / name, {"prompt": "a", "output": "x"})
    with pytest.raises(DataError, match=r"several files for train \(train.json, train.jsonl\)"):
        whole(tmp_path / "twice")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no data files"):
        whole(tmp_path / "empty")


# ---------------------------------------------------------------------------------------------------- held-out rows


def test_a_slice_of_a_single_file_is_seeded_and_disjoint_from_train(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *numbered(200))
    slices = {}
    for seed in (1, 2):
        data = DataConfig(source=str(path), seed=seed)
        train, valid = load_rows(data, "train"), load_rows(data, "valid")
        assert (len(train), len(valid)) == (190, 10)
        assert {row.where for row in train} | {row.where for row in valid} == {row.where for row in whole(path)}
        assert load_rows(data, "valid").rows == valid.rows
        slices[seed] = [row.where for row in valid]
    assert slices[1] != slices[2]
    assert len(load_rows(DataConfig(source=str(path), valid_limit=3), "valid")) == 3
    assert len(load_rows(DataConfig(source=str(path), valid_limit=3), "train")) == 197


def test_rows_that_ask_the_same_thing_stay_on_one_side(tmp_path):
    rows = [{"question": f"word {i // 4}", "answer": f"{i}"} for i in range(400)]
    data = DataConfig(source=str(jsonl(tmp_path / "a.jsonl", *rows)))
    train, valid = load_rows(data, "train"), load_rows(data, "valid")
    assert (len(train), len(valid), overlap(valid, train)) == (380, 20, 0)


def test_a_named_validation_file_is_read_whole_and_train_keeps_its_rows(tmp_path):
    train, valid = jsonl(tmp_path / "a.jsonl", *numbered(40)), jsonl(tmp_path / "b.jsonl", *numbered(7))
    data = DataConfig(source=str(train), valid=str(valid))
    assert [len(load_rows(data, split)) for split in ("train", "valid", "test")] == [40, 7, 40]


def test_one_row_cannot_be_held_out(tmp_path):
    data = DataConfig(source=str(jsonl(tmp_path / "a.jsonl", PAIR)))
    assert len(load_rows(data, "train")) == 1
    with pytest.raises(DataError, match=r"too few for a held-out slice; .*data.valid=FILE"):
        load_rows(data, "valid")


def test_why_no_row_can_be_held_out_is_said(tmp_path):
    same, few = [PAIR] * 20, [{"question": f"word {i % 4}", "answer": f"{i}"} for i in range(20)]
    for rows, why in (
        (same, "all 20 rows have the same prompt, so none can be held out"),
        (few, "its 20 rows have 4 distinct prompts, each with more rows than the 1 to hold out"),
    ):
        with pytest.raises(DataError, match=why):
            load_rows(DataConfig(source=str(jsonl(tmp_path / "a.jsonl", *rows))), "valid")


def test_one_of_a_thing_is_told_in_the_singular(tmp_path):
    said = []
    data = DataConfig(source=str(jsonl(tmp_path / "a.jsonl", *numbered(10))))
    load_rows(data, "train", listener=said.append)
    assert said[1:] == [Note("a.jsonl has no held-out rows: 1 of its 10 is held out for validation")]
    with pytest.raises(DataError, match=r"its one row is broken: b.jsonl:1: "):
        load_rows(DataConfig(source=str(jsonl(tmp_path / "b.jsonl", {})), skip_bad_rows=True), "test")
    assert (counted(1, "row"), counted(0, "row"), counted(1_000, "row")) == ("1 row", "0 rows", "1,000 rows")


def test_limits_keep_the_first_rows(tmp_path):
    for name in ("train", "valid", "test"):
        jsonl(tmp_path / f"{name}.jsonl", *numbered(50), "broken beyond the limit")
    data = DataConfig(source=str(tmp_path), limit=5, valid_limit=4)
    assert [len(load_rows(data, split)) for split in ("train", "valid")] == [5, 4]
    assert len(load_rows(data, "test", limit=3)) == 3
    assert len(load_rows(data, "train", limit=2)) == 2


def test_builtin_rows_are_named_and_disjoint():
    data = DataConfig(source="builtin", size=300, valid_limit=60)
    train, valid, test = (load_rows(data, split) for split in ("train", "valid", "test"))
    assert (len(train), len(valid), len(test), train.name) == (300, 60, 1000, "builtin"), (
        "valid_limit is of valid alone"
    )
    assert [len(load_rows(data, "test", limit=n)) for n in (70, 1200)] == [70, 1200]
    assert all(row.task and row.references[0] for row in train)
    assert train[0].where == "builtin train row 1"
    assert overlap(valid, train) == overlap(test, train) == overlap(test, valid) == 0
    one = load_rows(data.model_copy(update={"tasks": (train[0].task,)}), "train", limit=5)
    assert {row.task for row in one} == {train[0].task}
    assert len(one) == 5
