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
from distillm_cli.data.conversations import content_text, is_blank, read_messages, split_answer
from distillm_cli.data.values import BadRow, decode_json, kind, valid_text

__all__ = ["BadRow", "Row", "parse"]

_PROMPTS = ("messages", "instruction", "prompt", "question")
_INPUTS = ("input", "context")
_OF_TRAINING = ("weight", "train")  # fields of a message that say how it is trained on
_RESPONSES = ("output", "response", "completion", "answer")


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
    was cut at a length limit (`complete: false`, as `generate` writes it), so there is no end to learn. format: the name
    of the row's format, for display.
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
    format: str = ""

    @property
    def key(self) -> str:
        """What makes two rows ask the same thing, whatever their responses."""
        if self.instruction is not None:
            asked: Any = [self.instruction, self.input]
        elif self.prompt is not None:
            asked = self.prompt
        else:
            asked = [{k: v for k, v in message.items() if k not in _OF_TRAINING} for message in self.messages]
        extras = [self.tools, self.documents, self.template_kwargs]
        # Without extras the same as before there were any: digests of evaluations contain it.
        return json.dumps(asked if extras == [None] * 3 else [asked, *extras], default=str)


def parse(record: Any, where: str, columns: Columns, *, require_output: bool = True) -> Row:
    """One record of a source → a Row. Raises BadRow with the column, what was found, and what was expected."""
    if not isinstance(record, dict):
        raise BadRow(f"expected an object with named columns, found {kind(record)}")
    name = _prompt_column(record, columns)
    fields: dict[str, Any] = {"where": where, "task": record["task"] if isinstance(record.get("task"), str) else None}
    fields["cut"] = record.get("complete") is False
    if name == "messages" or (columns.prompt is not None and isinstance(record[name], list)):
        messages, answer = read_messages(record[name], name), None
        if columns.response is None:
            messages, answer = split_answer(messages)
        if all(is_blank(message) for message in messages):
            raise BadRow(f"an empty prompt (column `{name}` has no message before the response)")
        if answer is not None:
            text = content_text(answer)
            references = () if text is None else (text,)
        else:
            unanswered = f"no reply to the last message ({messages[-1]['role']}), and "
            references = _references(record, columns, require_output, unanswered)
        fields |= _arguments(record)
        return Row(messages=messages, answer=answer, references=references, **fields)
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
        return (valid_text(value, f"column `{name}`"),)
    if not isinstance(value, list):
        raise BadRow(f"column `{name}` must be text or a list of texts, found {kind(value)}")
    if not value and required:
        raise BadRow(f"column `{name}` is an empty list")
    for number, reference in enumerate(value, start=1):
        if not isinstance(reference, str):
            raise BadRow(f"column `{name}` must be a list of texts; its number {number} is {kind(reference)}")
    return tuple(valid_text(reference, f"column `{name}`") for reference in value)


def _arguments(record: dict) -> dict[str, Any]:
    """What the chat template receives beside the messages."""
    found: dict[str, Any] = {}
    for name in ("tools", "documents"):
        value = _decoded(record, name)
        if value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise BadRow(f"column `{name}` must be a list of objects, found {kind(value)}")
        found[name] = value
    kwargs = _decoded(record, "chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise BadRow(f"column `chat_template_kwargs` must be an object, found {kind(kwargs)}")
    return found if kwargs is None else found | {"template_kwargs": kwargs}


def _decoded(record: dict, name: str) -> Any:
    """The value of a column that may hold JSON as text; None where it is blank."""
    value = record.get(name)
    if not isinstance(value, str):
        return value
    return decode_json(value, name) if value.strip() else None


def _text(record: dict, name: str) -> str:
    if not isinstance(record[name], str):
        raise BadRow(f"column `{name}` must be text, found {kind(record[name])}")
    return valid_text(record[name], f"column `{name}`")


def _names(record: dict) -> str:
    return ", ".join(f"`{name}`" for name in record) or "no columns"
