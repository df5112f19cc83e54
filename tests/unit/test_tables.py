"""Test Arrow tables and compressed files: the same rows, no extra fields, and unused columns that are ignored."""

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
from tests.codes import raises_code

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = [{"prompt": f"{i}", "completion": "x"} for i in range(3)]


def prompts_and_answers(path: Path, split: str = "test", **fields) -> list[tuple]:
    rows = load_rows(DataConfig(source=str(path), **fields), split)
    return [(row.prompt or row.messages, row.answer or row.references) for row in rows]


def call(**arguments) -> list[dict]:
    return [{"type": "function", "function": {"name": "f", "arguments": arguments}}]


# No two of these messages have the same fields. A table stores the missing fields as nulls.
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


def save_table(format_: str, rows: list[dict], directory: Path, **options) -> Path:
    table = datasets.Dataset.from_list(rows, **options)
    if format_ == "parquet":
        table.to_parquet(directory / "a.parquet")
        return directory / "a.parquet"
    table.save_to_disk(directory / "a")
    return directory / "a"


@pytest.mark.parametrize("format_", ["parquet", "save_to_disk"])
def test_missing_message_fields_stay_absent(tmp_path, format_):
    path = save_table(format_, [{"messages": messages, "id": i} for i, messages in enumerate(CONVERSATIONS)], tmp_path)
    assert prompts_and_answers(path) == [(messages[:-1], messages[-1]) for messages in CONVERSATIONS]


@pytest.mark.parametrize("format_", ["parquet", "save_to_disk"])
def test_fields_of_mixed_types_are_restored(tmp_path, format_):
    # `datasets` stores them as JSON text in an extension type.
    answers = [{"role": "assistant", "content": "", "tool_calls": call(x=x)} for x in (1, "one", None, [2])]
    rows = [{"messages": [{"role": "user", "content": "a"}, answer]} for answer in answers]
    answers[2]["tool_calls"][0]["function"]["arguments"] = {}  # a null cannot be distinguished from a missing field
    assert [
        answer for _, answer in prompts_and_answers(save_table(format_, rows, tmp_path, on_mixed_types="use_json"))
    ] == answers


def test_saved_splits_are_recognized(tmp_path):
    split = {name: datasets.Dataset.from_list([{"prompt": name, "completion": "x"}] * 2) for name in ("train", "test")}
    datasets.DatasetDict(split).save_to_disk(tmp_path / "both")
    for name in split:
        rows = load_rows(DataConfig(source=str(tmp_path / "both"), valid="builtin"), name)
        assert [row.prompt for row in rows] == [name] * 2
        assert rows.splits == ("train", "test")
    datasets.DatasetDict(train_sft=split["train"]).save_to_disk(tmp_path / "other")
    with raises_code("data.no_split", "train_sft"):
        prompts_and_answers(tmp_path / "other")
    assert prompts_and_answers(tmp_path / "other" / "train_sft") == [("train", ("x",))] * 2


def test_shards_of_a_saved_dataset_are_read_in_order(tmp_path):
    rows = [{"prompt": f"{i}", "completion": "x"} for i in range(2500)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "a", num_shards=3)
    assert [prompt for prompt, _ in prompts_and_answers(tmp_path / "a")] == [row["prompt"] for row in rows]


@pytest.mark.parametrize("file", ["state.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("content", [b"", b"{}", b"hello", None])
def test_damaged_saved_dataset_is_a_data_error(tmp_path, file, content):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "a")
    (tmp_path / "a" / file).unlink()
    if content is not None:
        (tmp_path / "a" / file).write_bytes(content)
    with pytest.raises(DataError):
        prompts_and_answers(tmp_path / "a")


def unreadable_values(name: str) -> pa.Array:
    """Return values that pyarrow can store and Python cannot represent."""
    if name == "dates":
        return pa.array([0, 10**15, None], pa.timestamp("s"))
    stored = pa.array([b"a", b"\xff", b"c"], pa.binary())
    return pa.Array.from_buffers(pa.string(), 3, stored.buffers())


@pytest.mark.parametrize("name", ["bytes", "dates"])
def test_unused_columns_of_a_table_are_ignored(tmp_path, name):
    table = (
        pa.Table.from_pylist(ROWS)
        .append_column("odd", unreadable_values(name))
        .append_column("text", unreadable_values("bytes"))
    )
    pq.write_table(table, tmp_path / "a.parquet")
    events = []
    rows = load_rows(DataConfig(source=str(tmp_path / "a.parquet")), "test", listener=events.append)
    assert [row.prompt for row in rows] == ["0", "1", "2"]
    share = {"bytes": 100, "dates": 67}[name]
    assert events == [
        Note("a.parquet: 3 rows, prompt-completion (prompt, completion)"),
        Note(f"a.parquet: columns not read: odd ({share} % of rows), text (100 %)"),
    ]


def test_unreadable_value_is_rejected_or_skipped(tmp_path):
    table = pa.table({"prompt": unreadable_values("bytes"), "completion": ["x"] * 3})
    pq.write_table(table, tmp_path / "a.parquet")
    with raises_code("data.invalid_row", "a.parquet row 2", "`prompt`", "UTF-8") as caught:
        prompts_and_answers(tmp_path / "a.parquet")
    assert caught.value.exit_code == 3
    assert prompts_and_answers(tmp_path / "a.parquet", skip_bad_rows=True) == [("a", ("x",)), ("c", ("x",))]
    dates = pa.table({"prompt": ["a"] * 3, "completion": unreadable_values("dates")})
    pq.write_table(dates, tmp_path / "b.parquet")
    with raises_code("data.invalid_row", "b.parquet row 1", "`completion`", "datetime"):
        prompts_and_answers(tmp_path / "b.parquet")


def test_rows_with_images_are_rejected(tmp_path):
    image = pa.array([[], None, [{"bytes": b"1", "path": "a.png"}]])
    pq.write_table(pa.Table.from_pylist(ROWS).append_column("images", image), tmp_path / "a.parquet")
    with raises_code("data.invalid_row", "a.parquet row 3", "`images`"):
        prompts_and_answers(tmp_path / "a.parquet")
    assert len(prompts_and_answers(tmp_path / "a.parquet", skip_bad_rows=True)) == 2
    full = pa.array([[{"bytes": b"1", "path": "a.png"}]] * 3)
    pq.write_table(pa.Table.from_pylist(ROWS).append_column("images", full), tmp_path / "b.parquet")
    with raises_code("data.invalid_row", "b.parquet row 1", "`images`"):
        prompts_and_answers(tmp_path / "b.parquet")


def test_map_columns_become_objects(tmp_path):
    message_type = pa.list_(
        pa.struct([("role", pa.string()), ("content", pa.string()), ("extra", pa.map_("string", "int64"))])
    )
    messages = [
        {"role": "user", "content": "a", "extra": {"x": 1}},
        {"role": "assistant", "content": "b", "extra": None},
    ]
    pq.write_table(pa.table({"messages": pa.array([messages], message_type)}), tmp_path / "a.parquet")
    assert prompts_and_answers(tmp_path / "a.parquet") == [([messages[0]], {"role": "assistant", "content": "b"})]


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
        plain = prompts_and_answers(tmp_path / name)
        assert (
            prompts_and_answers(compressed(tmp_path / f"{name}{ending}", content))
            == plain
            == [(f"{i}", ("x",)) for i in range(3)]
        )
    (tmp_path / "set").mkdir()
    compressed(tmp_path / "set" / f"train.jsonl{ending}", LINES)
    compressed(tmp_path / "set" / f"dev.jsonl{ending}", LINES[: len(LINES) // 3])
    assert [len(prompts_and_answers(tmp_path / "set", split)) for split in ("train", "valid")] == [3, 1]
    many = b"".join(json.dumps({"prompt": f"{i}" * 1000, "completion": "x"}).encode() + b"\n" for i in range(1000))
    assert len(prompts_and_answers(compressed(tmp_path / f"many.jsonl{ending}", many))) == 1000


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_damaged_compressed_file_is_a_data_error(tmp_path, ending):
    compressed_bytes = compressed(tmp_path / f"a.jsonl{ending}", LINES * 50).read_bytes()
    for content in (b"hello", compressed_bytes[:-9], compressed_bytes[:20] + b"\xff\xff\xff" + compressed_bytes[23:]):
        (tmp_path / f"b.jsonl{ending}").write_bytes(content)
        with raises_code("data.unreadable", "b.jsonl"):
            prompts_and_answers(tmp_path / f"b.jsonl{ending}")
    for name in (f"rows{ending}", f"a.parquet{ending}", f"a.txt{ending}"):
        (tmp_path / name).write_bytes(compressed_bytes)
        with raises_code("data.unknown_format", name):
            prompts_and_answers(tmp_path / name)


def test_impossible_path_is_a_data_error(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("a.jsonl")
    (tmp_path / "d").symlink_to("d")
    other_paths = [Path(f"./{'x' * 5000}"), Path("~nobody-of-that-name/a.jsonl")]
    for path in (tmp_path / "a.jsonl", tmp_path / "d", tmp_path / "d" / "train.jsonl", *other_paths):
        with raises_code("data.not_found"):
            load_rows(DataConfig(source=f"./{path}" if "xx" in path.name else str(path)), "test")


@pytest.mark.parametrize("name", ["set", "rows.jsonl.gz", "rows.jsonl.zst"])
def test_pipeline_input_identity_changes_with_the_rows(tmp_path, name):
    directory, found = tmp_path / name, []
    for rows in (ROWS, ROWS[:2]):
        if name == "set":
            datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(directory)
        else:
            compressed(directory, "".join(json.dumps(row) + "\n" for row in rows).encode())
        found.append([_input_identity("data.source", str(path)) for path in (directory, tmp_path)])
    assert found[0][0] != found[1][0]
    assert name == "set" or found[0][1] != found[1][1]
