"""A record of any known shape → a ``Row``.

Shapes, by the column that holds the prompt: ``instruction`` (with ``input``, and perhaps an exact ``prompt``),
``prompt``, ``messages``, ``question``, or columns named in ``data.columns``. The response is in ``output``,
``response``, ``completion`` or ``answer``: text, or a list of texts of which the first is trained on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from distillm_cli.config.schema import Columns

_PROMPTS = ("messages", "instruction", "prompt", "question")
_INPUTS = ("input", "context")
_RESPONSES = ("output", "response", "completion", "answer")


class BadRow(ValueError):
    """What is wrong with a record, in words; the caller knows where it stands."""


@dataclass(frozen=True, slots=True)
class Row:
    """One example, before any template.

    instruction, input: the task as text, and the material it is about. prompt: the exact prompt of the file, complete.
    messages: the conversation up to the answer, each message with every field of the file. answer: the assistant message
    that closes a conversation, with every field of the file (``tool_calls``, ``reasoning_content``, …). tools, documents:
    what the chat template receives under these names. template_kwargs: further arguments of the chat template
    (``enable_thinking``). references: accepted responses as text; the first is trained on where there is no ``answer``,
    and there may be none where only prompts are needed. where: "train.jsonl:318". task: its kind, where known. question:
    the instruction comes from a column other than `instruction`, which template `auto` renders plain. cut: the response
    was cut at a length limit (`complete: false`, as `generate` writes it), so there is no end to learn. raw: the response
    as a model wrote it behind the prompt, structural special tokens included, where `generate` made the row. format: the
    name of the row's format, for display.
    """

    instruction: str | None = None
    input: str = ""
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    answer: dict[str, Any] | None = None
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None
    references: tuple[str, ...] = ()
    where: str = ""
    task: str | None = None
    question: bool = False
    cut: bool = False
    raw: str | None = None
    format: str = ""

    @property
    def key(self) -> str:
        """What makes two rows ask the same thing, whatever their responses."""
        if self.instruction is not None:
            return json.dumps([self.instruction, self.input])
        return json.dumps(self.messages if self.prompt is None else self.prompt, default=str)


def parse(record: Any, where: str, columns: Columns, *, require_output: bool = True) -> Row:
    """One record of a source → a Row. Raises BadRow with the column, what was found, and what was expected."""
    if not isinstance(record, dict):
        raise BadRow(f"expected an object with named columns, found {_kind(record)}")
    name = _prompt_column(record, columns)
    fields: dict[str, Any] = {"where": where, "task": record["task"] if isinstance(record.get("task"), str) else None}
    fields["cut"] = record.get("complete") is False
    if name == "messages" or (columns.prompt is not None and isinstance(record[name], list)):
        messages, reply = _conversation(record[name], name, columns)
        if reply is not None:
            references = (reply,)
        else:
            unanswered = f"no reply to the last message ({messages[-1]['role']}), and "
            references = _references(record, columns, require_output, unanswered)
        return Row(messages=messages, references=references, **fields)
    prompt = _text(record, name)
    material = _input(record, columns)
    if name == "instruction":
        # A column named in the recipe is what the person wants, so then the row's own `prompt` does not overrule it.
        exact = _text(record, "prompt") if columns.prompt is None and record.get("prompt") is not None else ""
        fields |= {"instruction": prompt, "input": material, "prompt": exact if exact.strip() else None}
    elif name == "prompt" and columns.input is None:
        exact, material = prompt, ""
        fields |= {"prompt": prompt}
    else:
        exact = ""
        fields |= {"instruction": prompt, "input": material, "question": True}
    if not (prompt.strip() or material.strip() or exact.strip()):
        raise BadRow(f"an empty prompt (column `{name}`)")
    return Row(references=_references(record, columns, require_output), **fields)


def _prompt_column(record: dict, columns: Columns) -> str:
    if columns.prompt is not None:
        if columns.prompt not in record:
            raise BadRow(f"no column `{columns.prompt}` (data.columns.prompt); found {_names(record)}")
        return columns.prompt
    present = [name for name in _PROMPTS if record.get(name) is not None]
    if not present:
        raise BadRow(f"no prompt column ({', '.join(_PROMPTS)}, or data.columns.prompt); found {_names(record)}")
    return present[0]


def _input(record: dict, columns: Columns) -> str:
    if columns.input is not None and columns.input not in record:
        raise BadRow(f"no column `{columns.input}` (data.columns.input); found {_names(record)}")
    for name in _INPUTS if columns.input is None else (columns.input,):
        if record.get(name) is not None:
            return _text(record, name)
    return ""


def _references(record: dict, columns: Columns, required: bool, also: str = "") -> tuple[str, ...]:
    """The accepted responses. also: what else is missing, before the complaint that there is no column of them."""
    if columns.response is not None:
        name = columns.response if columns.response in record else None
        known = f"no column `{columns.response}` (data.columns.response)"
    else:
        name = next((name for name in _RESPONSES if record.get(name) is not None), None)
        known = f"no response column ({', '.join(_RESPONSES)}, or data.columns.response)"
    if name is None or record[name] is None:
        if required:
            raise BadRow(f"column `{name}` is null" if name else f"{also}{known}; found {_names(record)}")
        return ()
    value = record[name]
    if isinstance(value, str):
        return (_valid(value, name),)
    if not isinstance(value, list):
        raise BadRow(f"column `{name}` must be text or a list of texts, found {_kind(value)}")
    if not value and required:
        raise BadRow(f"column `{name}` is an empty list")
    for number, reference in enumerate(value, start=1):
        if not isinstance(reference, str):
            raise BadRow(f"column `{name}` must be a list of texts; its number {number} is {_kind(reference)}")
    return tuple(_valid(reference, name) for reference in value)


def _conversation(messages: Any, name: str, columns: Columns) -> tuple[list[dict[str, Any]], str | None]:
    """The messages before a closing one of the assistant, and that one's text.

    Where another closes the conversation it is all prompt, to be answered: what the assistant said before is no answer to
    it. The text is then None, as where the response has a column of its own.
    """
    if not isinstance(messages, list):
        raise BadRow(f"column `{name}` must be a list of messages, found {_kind(messages)}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise BadRow(f"message {number} must have `role` and `content`, found {_kind(message)}")
        for part in ("role", "content"):
            if not isinstance(message.get(part), str):
                raise BadRow(f"message {number}: `{part}` must be text, found {_kind(message.get(part))}")
            _valid(message[part], f"{name}, message {number}")
    asked, reply = messages, None
    if messages and messages[-1]["role"] == "assistant" and columns.response is None:
        asked, reply = messages[:-1], messages[-1]["content"]
    if not any(message["content"].strip() for message in asked):
        raise BadRow(f"an empty prompt (column `{name}` has no message before the response)")
    return asked, reply


def _text(record: dict, name: str) -> str:
    if not isinstance(record[name], str):
        raise BadRow(f"column `{name}` must be text, found {_kind(record[name])}")
    return _valid(record[name], name)


def _valid(text: str, name: str) -> str:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; no tokenizer takes it
            raise BadRow(f"column `{name}` holds half of a character (a lone surrogate)") from None
    return text


def _names(record: dict) -> str:
    return ", ".join(f"`{name}`" for name in record) or "no columns"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"a number ({str(value)[:20]})"
    return {str: "text", list: "a list", dict: "an object"}.get(type(value), f"a {type(value).__name__}")
