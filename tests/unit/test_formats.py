"""Test that records of every format are read into the right rows or rejected with a reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from distillm_cli.config.schema import ColumnsConfig, DataConfig
from distillm_cli.data.records import UnreadableValue
from distillm_cli.data.rows import BadRow, Row, parse, read_row
from distillm_cli.data.sources import load_rows
from distillm_cli.training.events import Note

SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}
MORE = {"role": "user", "content": "and?"}
BYE = {"role": "assistant", "content": "bye"}
HUMAN = {"from": "human", "value": "hi"}
GPT = {"from": "gpt", "value": "hello"}
CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CHAT = Row(messages=[USER], answer=HELLO, references=("hello",))

# format → records, each with the fields of its row
READ: dict[str, list[tuple[dict, dict]]] = {
    "conversational language modeling": [
        ({"messages": [USER, HELLO]}, {"messages": [USER], "answer": HELLO, "references": ("hello",)}),
        (
            {"messages": [SYSTEM, USER, HELLO, MORE, BYE]},
            {"messages": [SYSTEM, USER, HELLO, MORE], "answer": BYE, "references": ("bye",)},
        ),
        ({"messages": json.dumps([USER, HELLO])}, {"messages": [USER], "answer": HELLO, "references": ("hello",)}),
        ({"conversations": [USER, HELLO]}, {"messages": [USER], "answer": HELLO, "references": ("hello",)}),
        ({"conversation": [USER, HELLO]}, {"messages": [USER], "answer": HELLO, "references": ("hello",)}),
        ({"prompt": [USER, HELLO]}, {"messages": [USER], "answer": HELLO, "references": ("hello",)}),
        # `datasets` before 4.0 stored a Sequence of structs as a struct of lists.
        (
            {"messages": {"role": ["user", "assistant"], "content": ["hi", "hello"], "name": [None, "a"]}},
            {"messages": [USER], "answer": HELLO | {"name": "a"}, "references": ("hello",)},
        ),
        (
            {"messages": [USER, HELLO], "system": "be brief"},
            {"messages": [SYSTEM, USER], "answer": HELLO, "references": ("hello",)},
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": CALLS}], "tools": [TOOL]},
            {
                "messages": [USER],
                "answer": {"role": "assistant", "content": None, "tool_calls": CALLS},
                "tools": [TOOL],
            },
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": json.dumps(CALLS)}], "tools": json.dumps([TOOL])},
            {"messages": [USER], "answer": {"role": "assistant", "tool_calls": CALLS}, "tools": [TOOL]},
        ),
        (
            {"messages": [USER, HELLO | {"reasoning_content": "so", "weight": 0, "train": False, "x": [1]}]},
            {
                "messages": [USER],
                "answer": HELLO | {"reasoning_content": "so", "weight": 0, "train": False, "x": [1]},
                "references": ("hello",),
            },
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "hello"}]}]},
            {
                "messages": [USER],
                "answer": {"role": "assistant", "content": [{"type": "text", "text": "hello"}]},
                "references": ("hello",),
            },
        ),
        (
            {
                "messages": [USER, HELLO],
                "tools": " ",
                "documents": [{"title": "t", "text": "x"}],
                "chat_template_kwargs": '{"enable_thinking": false}',
            },
            {
                "messages": [USER],
                "answer": HELLO,
                "references": ("hello",),
                "documents": [{"title": "t", "text": "x"}],
                "template_kwargs": {"enable_thinking": False},
            },
        ),
    ],
    "conversational prompt-completion": [
        ({"messages": [USER], "output": "hello"}, {"messages": [USER], "references": ("hello",)}),
        ({"prompt": [USER], "completion": [HELLO]}, {"messages": [USER], "answer": HELLO, "references": ("hello",)}),
        ({"prompt": "hi", "completion": [HELLO]}, {"messages": [USER], "answer": HELLO, "references": ("hello",)}),
        ({"prompt": [USER], "completion": "hello"}, {"messages": [USER], "references": ("hello",)}),
        (
            {"prompt": json.dumps([USER]), "completion": json.dumps([HELLO])},
            {"messages": [USER], "answer": HELLO, "references": ("hello",)},
        ),
        # Answers in the prompt are not trained on, those in the completion are.
        (
            {"prompt": [USER, HELLO, MORE], "completion": [BYE, MORE, HELLO]},
            {
                "messages": [USER, HELLO | {"weight": 0}, MORE, BYE, MORE],
                "answer": HELLO,
                "references": ("hello",),
            },
        ),
    ],
    "ShareGPT": [
        ({"conversations": [HUMAN, GPT]}, {"messages": [USER], "answer": HELLO, "references": ("hello",)}),
        (
            {"conversations": [HUMAN, GPT | {"weight": 1.0}], "system": "be brief"},
            {"messages": [SYSTEM, USER], "answer": HELLO | {"weight": 1.0}, "references": ("hello",)},
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "be brief"},
                    HUMAN,
                    {"from": "function_call", "value": json.dumps(CALLS[0]["function"])},
                    {"from": "observation", "value": "17"},
                    GPT,
                ],
                "tools": json.dumps([TOOL]),
            },
            {
                "messages": [
                    SYSTEM,
                    USER,
                    {"role": "assistant", "content": "", "tool_calls": CALLS},
                    {"role": "tool", "content": "17"},
                ],
                "answer": HELLO,
                "references": ("hello",),
                "tools": [TOOL],
            },
        ),
    ],
    "prompt-completion": [
        ({"prompt": "hi", "completion": "hello"}, {"prompt": "hi", "references": ("hello",)}),
        # Text that looks like messages stays text.
        ({"prompt": "[1]", "completion": '["a"]'}, {"prompt": "[1]", "references": ('["a"]',)}),
        ({"prompt": "hi", "completion": json.dumps([HELLO])}, {"prompt": "hi", "references": (json.dumps([HELLO]),)}),
    ],
    "instruction": [
        (
            {"instruction": "Add.", "input": "1", "output": "2", "system": None, "history": []},
            {"instruction": "Add.", "input": "1", "references": ("2",)},
        ),
        (
            {"instruction": "Add.", "input": "1", "output": "2", "system": "", "history": None},
            {"instruction": "Add.", "input": "1", "references": ("2",)},
        ),
        (
            {"instruction": "Add.", "input": "1", "output": "2", "system": "be brief", "history": [["hi", "hello"]]},
            {
                "messages": [SYSTEM, USER, HELLO, {"role": "user", "content": "Add.\n1"}],
                "answer": {"role": "assistant", "content": "2"},
                "references": ("2",),
            },
        ),
        (
            {"instruction": "Add.", "output": ["2", "two"], "history": '[["hi", "hello"]]'},
            {
                "messages": [USER, HELLO, {"role": "user", "content": "Add."}],
                "answer": {"role": "assistant", "content": "2"},
                "references": ("2", "two"),
            },
        ),
        (
            {"instruction": "Add.", "output": "2", "tools": [TOOL]},
            {"instruction": "Add.", "references": ("2",), "tools": [TOOL]},
        ),
        # A `documents` column of an instruction row is not passed to the chat template.
        ({"instruction": "Add.", "output": "2", "documents": ["a"]}, {"instruction": "Add.", "references": ("2",)}),
    ],
    "question-answer": [
        ({"question": "hi", "answer": "hello"}, {"instruction": "hi", "is_question": True, "references": ("hello",)})
    ],
    "OpenOrca": [
        (
            {"system_prompt": "be brief", "question": "hi", "response": "hello"},
            {"messages": [SYSTEM, USER], "answer": HELLO, "references": ("hello",)},
        ),
        (
            {"system_prompt": "", "question": "hi", "response": "hello"},
            {"messages": [USER], "answer": HELLO, "references": ("hello",)},
        ),
    ],
    "language modeling": [({"text": "Once upon a time."}, {"prompt": "", "references": ("Once upon a time.",)})],
    "preference": [
        ({"prompt": "hi", "chosen": "hello", "rejected": "no"}, {"prompt": "hi", "references": ("hello",)}),
        (
            {"chosen": "Q: sky? A: blue.", "rejected": "Q: sky? A: green."},
            {"prompt": "Q: sky? A:", "references": (" blue.",)},
        ),
        (
            {"system": "be brief", "question": "hi", "chosen": "hello", "rejected": "no"},
            {"messages": [SYSTEM, USER], "answer": HELLO, "references": ("hello",)},
        ),
    ],
    "conversational preference": [
        ({"chosen": [USER, HELLO], "rejected": [USER, BYE]}, CHAT),
        ({"prompt": [USER], "chosen": [HELLO], "rejected": [BYE]}, CHAT),
        ({"prompt": "hi", "chosen": [USER, HELLO], "rejected": [USER, BYE]}, CHAT),
        ({"prompt": "hi", "chosen": [HELLO], "rejected": [BYE]}, CHAT),
        ({"chosen": json.dumps([USER, HELLO]), "rejected": json.dumps([USER, BYE])}, CHAT),
        ({"prompt": [USER], "chosen": "hello", "rejected": "no"}, {"messages": [USER], "references": ("hello",)}),
    ],
}


def cases(table: dict) -> Iterator:
    for name, found in table.items():
        for number, (record, expected) in enumerate(found):
            yield pytest.param(record, expected, name, id=f"{name} {number}")


@pytest.mark.parametrize(("record", "expected", "name"), list(cases(READ)))
def test_record_is_read_into_its_row(record, expected, name):
    record_before = json.dumps(record)
    row = parse(record, "a:1", ColumnsConfig())
    fields = (
        expected
        if isinstance(expected, dict)
        else {f: getattr(expected, f) for f in ("messages", "answer", "references")}
    )
    assert row == Row(**fields, where="a:1", format=name)
    assert json.dumps(record) == record_before


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"prompt": "hi"}, "prompt-only"),
        ({"prompt": [USER]}, "conversational prompt-only"),
        ({"messages": [USER]}, "conversational prompt-only"),
        ({"messages": [USER, HELLO, MORE]}, "conversational prompt-only"),
        ({"instruction": "hi"}, "instruction"),
        ({"instruction": "hi", "system": "be brief"}, "instruction"),
        ({"system_prompt": "", "question": "hi"}, "OpenOrca"),
    ],
)
def test_prompt_without_response_is_read_if_not_required(record, name):
    row = parse(record, "a:1", ColumnsConfig(), require_output=False)
    assert (row.format, row.answer, row.references) == (name, None, ())
    with pytest.raises(BadRow):
        parse(record, "a:1", ColumnsConfig())


@pytest.mark.parametrize(
    ("record", "mentions"),
    [
        ({"messages": [USER, {"role": "assistant", "content": None}]}, ("message 2", "`content`", "null")),
        ({"messages": [USER, {"role": "assistant"}]}, ("message 2", "`content`", "null")),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, ("`content`", "(3)")),
        ({"messages": [{"content": "a"}, HELLO]}, ("message 1", "`role`", "null")),
        ({"messages": [USER, HELLO | {"weight": 0.5}]}, ("message 2", "`weight`", "(0.5)")),
        ({"messages": [USER, HELLO | {"weight": True}]}, ("message 2", "`weight`", "true")),
        ({"messages": [USER, HELLO | {"train": 1}]}, ("message 2", "`train`", "(1)")),
        ({"messages": [USER, HELLO | {"tool_calls": [3]}]}, ("message 2", "`tool_calls`")),
        (
            {"messages": [USER, {"role": "user", "content": [{"type": "image"}]}, HELLO]},
            ("message 2", "image parts"),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, HELLO]},
            ("message 1", "input_audio"),
        ),
        ({"messages": [{"role": "user", "content": ["a"]}, HELLO]}, ("message 1", "part 1", "`type`")),
        ({"messages": [USER, {"role": "user", "content": "\ud800"}, HELLO]}, ("message 2",)),
        ({"messages": "[{]"}, ("`messages`", "JSON")),
        ({"messages": [USER, HELLO], "tools": {"a": 1}}, ("`tools`", "an object")),
        ({"messages": [USER, HELLO], "tools": '"a"'}, ("`tools`", "text")),
        ({"messages": [USER, HELLO], "tools": "[{"}, ("`tools`", "JSON")),
        ({"messages": [USER, HELLO], "documents": ["a"]}, ("`documents`", "text")),
        ({"messages": [USER, HELLO], "chat_template_kwargs": [1]}, ("`chat_template_kwargs`", "list")),
        (
            {"conversations": [{"from": "narrator", "value": "a"}, GPT]},
            ("message 1", "`from`", "human", "`narrator`"),
        ),
        ({"conversations": [HUMAN, {"from": "gpt"}]}, ("message 2", "`content`", "null")),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "x"}]}, ("message 2", "JSON")),
        ({"prompt": [USER], "completion": [USER]}, ("`completion`", "assistant")),
        ({"chosen": [USER], "rejected": [USER]}, ("`chosen`", "assistant")),
        ({"chosen": [HELLO], "rejected": [BYE]}, ("prompt",)),
        ({"chosen": "a", "rejected": "b"}, ("prompt",)),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, ("`history`",)),
        ({"instruction": "a", "output": "b", "system": 3}, ("`system`", "(3)")),
        ({"text": "a", "output": "b"}, ("`output`",)),
        ({"text": " "}, ("`text`",)),
        ({"images": ["a.jpg"], "messages": [USER, HELLO]}, ("`images`",)),
        ({"image": "a.jpg", "conversations": [HUMAN, GPT]}, ("`image`",)),
        ({"prompt": UnreadableValue("is not UTF-8"), "completion": "b"}, ("`prompt`", "UTF-8")),
    ],
)
def test_invalid_record_is_rejected(record, mentions):
    with pytest.raises(BadRow) as caught:
        parse(record, "a:1", ColumnsConfig())
    for mention in mentions:
        assert mention in str(caught.value)


def test_read_row_returns_the_columns_it_uses():
    record = {
        "id": 1,
        "text": "x",
        "instruction": "a",
        "output": "b",
        "response": "c",
        "task": "sums",
        "complete": True,
    }
    assert read_row(record, "a:1", ColumnsConfig())[1] == {
        "instruction",
        "output",
        "task",
        "complete",
        "seed",
        "sample",
    }
    record = {
        "messages": [USER, HELLO],
        "tools": [],
        "prompt": "hi",
        "images": [],
        "bad": UnreadableValue("is not UTF-8"),
    }
    assert read_row(record, "a:1", ColumnsConfig())[1] == {"messages", "tools"}


def test_row_key_does_not_depend_on_the_answer():
    def key(**record) -> str:
        return parse(record, "a:1", ColumnsConfig(), require_output="text" in record).key

    assert key(messages=[USER, HELLO]) == key(messages=[USER, BYE]) == key(messages=[USER]) == key(prompt=[USER])
    assert key(messages=[USER, HELLO, MORE]) == key(prompt=[USER, HELLO, MORE]), "weights do not change the key"
    assert len({key(messages=[USER]), key(messages=[SYSTEM, USER]), key(messages=[USER], tools=[TOOL])}) == 3
    kwargs = [{"enable_thinking": True}, {"enable_thinking": False}]
    assert len({key(messages=[USER], chat_template_kwargs=one) for one in kwargs}) == 2
    assert key(text="a") != key(text="b")
    # Digests of stored evaluations depend on these keys.
    assert key(messages=[USER]) == json.dumps([USER])
    assert key(instruction="a", input="b") == '["a", "b"]'


def test_formats_and_unused_columns_are_reported_once(tmp_path):
    events = []
    path = tmp_path / "train.jsonl"
    records = [{"id": i, "messages": [USER | {"content": f"{i}"}, HELLO]} for i in range(20)]
    records += [{"prompt": f"{i}", "completion": "x", "source": "web"} for i in range(5)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = load_rows(DataConfig(source=str(path)), "train", listener=events.append)
    load_rows(DataConfig(source=str(path)), "valid", listener=events.append)
    assert events == [
        Note(
            "train.jsonl: 25 rows, 20 conversational language modeling, 5 prompt-completion (messages, prompt, completion)"
        ),
        Note("train.jsonl: columns not read: id (80 % of rows), source (20 %)"),
        Note("train.jsonl has no held-out rows: 1 of its 25 is held out for validation"),
    ]
    assert sum(rows.formats.values()) == 24


def test_skip_bad_rows_skips_every_invalid_row(tmp_path):
    path = tmp_path / "a.jsonl"
    invalid = [
        {"messages": [USER, HELLO | {"weight": 2}]},
        {"messages": [USER, HELLO], "tools": "x"},
        {"conversations": [{"from": "x"}]},
        {"images": ["a.jpg"], "messages": [USER, HELLO]},
        {"text": ""},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in [*invalid, {"messages": [USER, HELLO]}]))
    rows = load_rows(DataConfig(source=str(path), skip_bad_rows=True), "test")
    assert [row.where for row in rows] == ["a.jsonl:6"]
    assert len(rows.skipped) == len(invalid)


@pytest.fixture
def sample_files(shared_data) -> Path:
    directory = shared_data.parent / "cases"
    if not directory.is_dir():
        pytest.skip(f"no cases at {directory}")
    return directory


def test_sample_files_load(sample_files):
    formats = {
        path.name: load_rows(DataConfig(source=str(path)), "test").format_summary
        for path in sorted(sample_files.iterdir())
    }
    conversation = "conversational language modeling"
    assert formats == {
        "alpaca-system-history.jsonl": "instruction (instruction, output, system, history)",
        "chinese.jsonl": "prompt-completion (prompt, completion)",
        "content-parts.jsonl": f"{conversation} (messages)",
        "messages-json-string.jsonl": f"{conversation} (messages)",
        "multi-turn.jsonl": f"{conversation} (messages)",
        "one-bad-role.jsonl": f"{conversation} (messages)",
        "openorca.jsonl": "OpenOrca (system_prompt, question, response)",
        "parquet-null-args.parquet": f"{conversation} (messages)",
        "prompt-completion-messages.jsonl": "conversational prompt-completion (prompt, completion)",
        "reasoning-content.jsonl": f"{conversation} (messages)",
        "rows.jsonl.gz": "prompt-completion (prompt, completion)",
        "sharegpt.jsonl": "ShareGPT (conversations)",
        "template-kwargs.jsonl": f"{conversation} (messages, chat_template_kwargs)",
        "tool-call-null-content.jsonl": f"{conversation} (messages, tools)",
        "tool-call-reply.jsonl": f"{conversation} (messages, tools)",
        "tools-column.jsonl": f"{conversation} (messages, tools)",
        "weight-zero.jsonl": f"{conversation} (messages)",
    }
