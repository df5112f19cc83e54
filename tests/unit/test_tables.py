"""Arrow tables and compressed files: the same rows, nothing invented, and unread columns that do not matter."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from distillm_cli.config.schema import DataConfig
from distillm_cli.data.sources import load_rows
from distillm_cli.errors import DataError
from distillm_cli.runs.stage_record import _input_identity
from distillm_cli.training.events import Note

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = [{"prompt": f"{i}", "completion": "x"} for i in range(3)]


def asked(path: Path, split: str = "test", **fields) -> list[tuple]:
    rows = load_rows(DataConfig(source=str(path), **fields), split)
    return [(row.prompt or row.messages, row.answer or row.references) for row in rows]


def call(**arguments) -> list[dict]:
    return [{"type": "function", "function": {"name": "f", "arguments": arguments}}]


# No two of these messages have the same fields, which a table can only store with nulls.
CONVERSATIONS = [
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": call(city="Paris")},
        {"role": "tool", "content": "17", "name": "f"},
        {"role": "assistant", "content": "", "tool_calls": call(n=3)},
    ],
    [
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c", "reasoning_content": "so", "weight": 1},
    ],
]


@pytest.fixture(autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()


def saved(form: str, rows: list[dict], place: Path, **options) -> Path:
    table = datasets.Dataset.from_list(rows, **options)
    if form == "parquet":
        table.to_parquet(place / "a.parquet")
        return place / "a.parquet"
    table.save_to_disk(place / "a")
    return place / "a"


@pytest.mark.parametrize("form", ["parquet", "save_to_disk"])
def test_fields_that_a_message_lacks_stay_absent(tmp_path, form):
    path = saved(form, [{"messages": messages, "id": i} for i, messages in enumerate(CONVERSATIONS)], tmp_path)
    assert asked(path) == [(messages[:-1], messages[-1]) for messages in CONVERSATIONS]


@pytest.mark.parametrize("form", ["parquet", "save_to_disk"])
def test_fields_of_mixed_types_come_back_as_they_were(tmp_path, form):
    # `datasets` stores them as JSON text in an extension type.
    answers = [{"role": "assistant", "content": "", "tool_calls": call(x=x)} for x in (1, "one", None, [2])]
    rows = [{"messages": [{"role": "user", "content": "a"}, answer]} for answer in answers]
    answers[2]["tool_calls"][0]["function"]["arguments"] = {}  # a null is not stored apart from an absence
    assert [answer for _, answer in asked(saved(form, rows, tmp_path, on_mixed_types="use_json"))] == answers


def test_saved_splits_are_recognized(tmp_path):
    split = {name: datasets.Dataset.from_list([{"prompt": name, "completion": "x"}] * 2) for name in ("train", "test")}
    datasets.DatasetDict(split).save_to_disk(tmp_path / "both")
    for name in split:
        rows = load_rows(DataConfig(source=str(tmp_path / "both"), valid="builtin"), name)
        assert [row.prompt for row in rows] == [name] * 2
        assert rows.splits == ("train", "test")
    datasets.DatasetDict(train_sft=split["train"]).save_to_disk(tmp_path / "other")
    with pytest.raises(DataError, match="no split train, valid or test, but train_sft; use one of these"):
        asked(tmp_path / "other")
    assert asked(tmp_path / "other" / "train_sft") == [("train", ("x",))] * 2


def test_a_saved_set_of_several_files_is_read_in_order(tmp_path):
    rows = [{"prompt": f"{i}", "completion": "x"} for i in range(2500)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "a", num_shards=3)
    assert [prompt for prompt, _ in asked(tmp_path / "a")] == [row["prompt"] for row in rows]


@pytest.mark.parametrize("file", ["state.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("content", [b"", b"{}", b"hello", None])
def test_a_damaged_saved_set_is_a_data_error(tmp_path, file, content):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "a")
    (tmp_path / "a" / file).unlink()
    if content is not None:
        (tmp_path / "a" / file).write_bytes(content)
    with pytest.raises(DataError):
        asked(tmp_path / "a")


def odd(name: str) -> pa.Array:
    """Values that pyarrow stores and Python cannot hold."""
    if name == "dates":
        return pa.array([0, 10**15, None], pa.timestamp("s"))
    stored = pa.array([b"a", b"\xff", b"c"], pa.binary())
    return pa.Array.from_buffers(pa.string(), 3, stored.buffers())


@pytest.mark.parametrize("name", ["bytes", "dates"])
def test_unread_columns_of_a_table_do_not_matter(tmp_path, name):
    table = pa.Table.from_pylist(ROWS).append_column("odd", odd(name)).append_column("text", odd("bytes"))
    pq.write_table(table, tmp_path / "a.parquet")
    said = []
    rows = load_rows(DataConfig(source=str(tmp_path / "a.parquet")), "test", listener=said.append)
    assert [row.prompt for row in rows] == ["0", "1", "2"]
    share = {"bytes": 100, "dates": 67}[name]
    assert said == [
        Note("a.parquet: 3 rows, prompt-completion (prompt, completion)"),
        Note(f"a.parquet: columns not read: odd ({share} % of rows), text (100 %)"),
    ]


def test_a_value_that_cannot_be_read_is_named_and_skipped(tmp_path):
    table = pa.table({"prompt": odd("bytes"), "completion": ["x"] * 3})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet row 2: column `prompt` is not UTF-8") as caught:
        asked(tmp_path / "a.parquet")
    assert caught.value.exit_code == 3
    assert asked(tmp_path / "a.parquet", skip_bad_rows=True) == [("a", ("x",)), ("c", ("x",))]
    dates = pa.table({"prompt": ["a"] * 3, "completion": odd("dates")})
    pq.write_table(dates, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet row 1: column `completion` must be text .*, found a datetime"):
        asked(tmp_path / "b.parquet")


def test_images_of_a_table_are_refused_where_a_row_has_one(tmp_path):
    image = pa.array([[], None, [{"bytes": b"1", "path": "a.png"}]])
    pq.write_table(pa.Table.from_pylist(ROWS).append_column("images", image), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet row 3: images are not supported \(column `images`\)"):
        asked(tmp_path / "a.parquet")
    assert len(asked(tmp_path / "a.parquet", skip_bad_rows=True)) == 2
    full = pa.array([[{"bytes": b"1", "path": "a.png"}]] * 3)
    pq.write_table(pa.Table.from_pylist(ROWS).append_column("images", full), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet row 1: images are not supported"):
        asked(tmp_path / "b.parquet")


def test_maps_become_objects(tmp_path):
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("extra", pa.map_("string", "int64"))]))
    messages = [
        {"role": "user", "content": "a", "extra": {"x": 1}},
        {"role": "assistant", "content": "b", "extra": None},
    ]
    pq.write_table(pa.table({"messages": pa.array([messages], kind)}), tmp_path / "a.parquet")
    assert asked(tmp_path / "a.parquet") == [([messages[0]], {"role": "assistant", "content": "b"})]


# ------------------------------------------------------------------------------------------------- compressed files


def compressed(path: Path, content: bytes) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    else:
        with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as file:
            file.write(content)
    return path


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files_have_the_same_rows(tmp_path, ending):
    csv = b"prompt,completion\r\n" + b"".join(f"{row['prompt']},x\r\n".encode() for row in ROWS)
    contents = {"a.jsonl": LINES, "a.json": json.dumps(ROWS, indent=1).encode(), "lines.json": LINES, "a.csv": csv}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        plain = asked(tmp_path / name)
        assert asked(compressed(tmp_path / f"{name}{ending}", content)) == plain == [(f"{i}", ("x",)) for i in range(3)]
    (tmp_path / "set").mkdir()
    compressed(tmp_path / "set" / f"train.jsonl{ending}", LINES)
    compressed(tmp_path / "set" / f"dev.jsonl{ending}", LINES[: len(LINES) // 3])
    assert [len(asked(tmp_path / "set", split)) for split in ("train", "valid")] == [3, 1]
    many = b"".join(json.dumps({"prompt": f"{i}" * 1000, "completion": "x"}).encode() + b"\n" for i in range(1000))
    assert len(asked(compressed(tmp_path / f"many.jsonl{ending}", many))) == 1000


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_damaged_compressed_file_is_a_data_error(tmp_path, ending):
    whole = compressed(tmp_path / f"a.jsonl{ending}", LINES * 50).read_bytes()
    for content in (b"hello", whole[:-9], whole[:20] + b"\xff\xff\xff" + whole[23:]):
        (tmp_path / f"b.jsonl{ending}").write_bytes(content)
        with pytest.raises(DataError, match=r"b.jsonl.*: cannot be (read|decompressed) \("):
            asked(tmp_path / f"b.jsonl{ending}")
    for name in (f"rows{ending}", f"a.parquet{ending}", f"a.txt{ending}"):
        (tmp_path / name).write_bytes(whole)
        with pytest.raises(DataError, match="unknown type of data file"):
            asked(tmp_path / name)


def test_a_path_that_cannot_be_there_is_a_data_error(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("a.jsonl")
    (tmp_path / "d").symlink_to("d")
    elsewhere = [Path(f"./{'x' * 5000}"), Path("~nobody-of-that-name/a.jsonl")]
    for path in (tmp_path / "a.jsonl", tmp_path / "d", tmp_path / "d" / "train.jsonl", *elsewhere):
        with pytest.raises(DataError, match=r"no such file or directory|broken symbolic link"):
            load_rows(DataConfig(source=f"./{path}" if "xx" in path.name else str(path)), "test")


@pytest.mark.parametrize("name", ["set", "rows.jsonl.gz", "rows.jsonl.zst"])
def test_a_pipeline_notices_other_rows(tmp_path, name):
    place, found = tmp_path / name, []
    for rows in (ROWS, ROWS[:2]):
        if name == "set":
            datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(place)
        else:
            compressed(place, "".join(json.dumps(row) + "\n" for row in rows).encode())
        found.append([_input_identity("data.source", str(at)) for at in (place, tmp_path)])
    assert found[0][0] != found[1][0]
    assert name == "set" or found[0][1] != found[1][1]
