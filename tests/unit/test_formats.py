"""Records of every format are read into the rows they stand for, or refused by name."""

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
        # What is in the prompt is not trained on, what is in the completion is.
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
        # Text that only looks like messages stays text.
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
        # A passage of its own, in another column, is no document of a chat template.
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
def test_a_record_is_read_into_its_row(record, expected, name):
    untouched = json.dumps(record)
    row = parse(record, "a:1", ColumnsConfig())
    fields = (
        expected
        if isinstance(expected, dict)
        else {f: getattr(expected, f) for f in ("messages", "answer", "references")}
    )
    assert row == Row(**fields, where="a:1", format=name)
    assert json.dumps(record) == untouched


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
def test_a_prompt_alone_is_enough_where_no_response_is_needed(record, name):
    row = parse(record, "a:1", ColumnsConfig(), require_output=False)
    assert (row.format, row.answer, row.references) == (name, None, ())
    with pytest.raises(BadRow, match="no response column"):
        parse(record, "a:1", ColumnsConfig())


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2: `content` must be text, found null"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2: `content` must be text, found null"),
        (
            {"messages": [USER, {"role": "assistant", "content": 3}]},
            r"`content` must be text or a list of parts, .*\(3\)",
        ),
        ({"messages": [{"content": "a"}, HELLO]}, "message 1: `role` must be text, found null"),
        ({"messages": [USER, HELLO | {"weight": 0.5}]}, r"message 2: `weight` must be 0 or 1, found a number \(0.5\)"),
        ({"messages": [USER, HELLO | {"weight": True}]}, "message 2: `weight` must be 0 or 1, found true"),
        ({"messages": [USER, HELLO | {"train": 1}]}, r"message 2: `train` must be true or false, found a number \(1\)"),
        ({"messages": [USER, HELLO | {"tool_calls": [3]}]}, "message 2: `tool_calls` must be a list of objects"),
        (
            {"messages": [USER, {"role": "user", "content": [{"type": "image"}]}, HELLO]},
            r"image parts are not supported \(message 2\)",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, HELLO]},
            r"input_audio parts are not supported \(message 1\)",
        ),
        (
            {"messages": [{"role": "user", "content": ["a"]}, HELLO]},
            "message 1: part 1 must be an object with a `type`",
        ),
        ({"messages": [USER, {"role": "user", "content": "\ud800"}, HELLO]}, "message 2 has half of a character"),
        ({"messages": "[{]"}, "column `messages` is not JSON"),
        ({"messages": [USER, HELLO], "tools": {"a": 1}}, "column `tools` must be a list of objects, found an object"),
        ({"messages": [USER, HELLO], "tools": '"a"'}, "column `tools` must be a list of objects, found text"),
        ({"messages": [USER, HELLO], "tools": "[{"}, "column `tools` is not JSON"),
        (
            {"messages": [USER, HELLO], "documents": ["a"]},
            "column `documents` must be a list of objects, found a list with text in it",
        ),
        (
            {"messages": [USER, HELLO], "chat_template_kwargs": [1]},
            "column `chat_template_kwargs` must be an object, found a list",
        ),
        (
            {"conversations": [{"from": "narrator", "value": "a"}, GPT]},
            "message 1: `from` must be one of human, .*`narrator`",
        ),
        ({"conversations": [HUMAN, {"from": "gpt"}]}, "message 2: `content` must be text, found null"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "x"}]}, "message 2: a function call is not JSON"),
        ({"prompt": [USER], "completion": [USER]}, "column `completion` must end with a message of the assistant"),
        ({"chosen": [USER], "rejected": [USER]}, "column `chosen` must end with a message of the assistant"),
        ({"chosen": [HELLO], "rejected": [BYE]}, "an empty prompt"),
        ({"chosen": "a", "rejected": "b"}, "an empty prompt"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "column `history` must be a list of pairs of texts"),
        ({"instruction": "a", "output": "b", "system": 3}, r"column `system` must be text, found a number \(3\)"),
        ({"text": "a", "output": "b"}, "no prompt column in addition to `output`"),
        ({"text": " "}, r"an empty text \(column `text`\)"),
        ({"images": ["a.jpg"], "messages": [USER, HELLO]}, r"images are not supported \(column `images`\)"),
        ({"image": "a.jpg", "conversations": [HUMAN, GPT]}, r"images are not supported \(column `image`\)"),
        ({"prompt": UnreadableValue("is not UTF-8"), "completion": "b"}, "column `prompt` is not UTF-8"),
    ],
)
def test_what_is_wrong_is_named(record, what):
    with pytest.raises(BadRow, match=f"^.*{what}"):
        parse(record, "a:1", ColumnsConfig())


def test_columns_that_are_read_are_known():
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


def test_rows_ask_the_same_whatever_their_answers():
    def key(**record) -> str:
        return parse(record, "a:1", ColumnsConfig(), require_output="text" in record).key

    assert key(messages=[USER, HELLO]) == key(messages=[USER, BYE]) == key(messages=[USER]) == key(prompt=[USER])
    assert key(messages=[USER, HELLO, MORE]) == key(prompt=[USER, HELLO, MORE]), "weights do not change what is asked"
    assert len({key(messages=[USER]), key(messages=[SYSTEM, USER]), key(messages=[USER], tools=[TOOL])}) == 3
    kwargs = [{"enable_thinking": True}, {"enable_thinking": False}]
    assert len({key(messages=[USER], chat_template_kwargs=one) for one in kwargs}) == 2
    assert key(text="a") != key(text="b")
    # Digests of stored evaluations contain these.
    assert key(messages=[USER]) == json.dumps([USER])
    assert key(instruction="a", input="b") == '["a", "b"]'


def test_the_format_and_the_columns_that_are_not_read_are_named_once(tmp_path):
    said = []
    path = tmp_path / "train.jsonl"
    records = [{"id": i, "messages": [USER | {"content": f"{i}"}, HELLO]} for i in range(20)]
    records += [{"prompt": f"{i}", "completion": "x", "source": "web"} for i in range(5)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = load_rows(DataConfig(source=str(path)), "train", listener=said.append)
    load_rows(DataConfig(source=str(path)), "valid", listener=said.append)
    assert said == [
        Note(
            "train.jsonl: 25 rows, 20 conversational language modeling, 5 prompt-completion (messages, prompt, completion)"
        ),
        Note("train.jsonl: columns not read: id (80 % of rows), source (20 %)"),
        Note("train.jsonl has no held-out rows: 1 of its 25 is held out for validation"),
    ]
    assert sum(rows.formats.values()) == 24


def test_skipping_bad_rows_covers_every_refusal(tmp_path):
    path = tmp_path / "a.jsonl"
    bad = [
        {"messages": [USER, HELLO | {"weight": 2}]},
        {"messages": [USER, HELLO], "tools": "x"},
        {"conversations": [{"from": "x"}]},
        {"images": ["a.jpg"], "messages": [USER, HELLO]},
        {"text": ""},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in [*bad, {"messages": [USER, HELLO]}]))
    rows = load_rows(DataConfig(source=str(path), skip_bad_rows=True), "test")
    assert [row.where for row in rows] == ["a.jsonl:6"]
    assert len(rows.skipped) == len(bad)


@pytest.fixture
def cases_of_the_field(shared_data) -> Path:
    place = shared_data.parent / "cases"
    if not place.is_dir():
        pytest.skip(f"no cases at {place}")
    return place


def test_the_cases_of_the_field_load(cases_of_the_field):
    formats = {
        path.name: load_rows(DataConfig(source=str(path)), "test").format_summary
        for path in sorted(cases_of_the_field.iterdir())
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
