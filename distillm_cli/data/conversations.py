"""Read conversations: lists of messages with roles, in the forms that data sets have them."""

from __future__ import annotations

from typing import Any

from distillm_cli.data.values import BadRow, decode_json, kind, valid_text

Message = dict[str, Any]

# Fields of an assistant message that stand for its content where that is null or absent.
_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def read_messages(value: Any, name: str) -> list[Message]:
    """Return the messages of a column as ``role``/``content``, with every further field of the file.

    value: a list of messages, or the same as JSON text. Raises BadRow with the number of the message.
    """
    if isinstance(value, str):
        value = decode_json(value, name) if value.lstrip().startswith("[") else value
    if not isinstance(value, list):
        raise BadRow(f"column `{name}` must be a list of messages, found {kind(value)}")
    return [_message(message, f"message {number}") for number, message in enumerate(value, start=1)]


def split_answer(messages: list[Message]) -> tuple[list[Message], Message | None]:
    """Split off the assistant's message that closes a conversation; None where another message closes it."""
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]
    return messages, None


def content_text(message: Message) -> str | None:
    """Return the text of a message's content; None where it has none."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content


def is_blank(message: Message) -> bool:
    """Return whether a message holds nothing but white space."""
    return not (content_text(message) or "").strip() and not any(message.get(name) for name in _INSTEAD_OF_CONTENT)


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise BadRow(f"{place} must have `role` and `content`, found {kind(message)}")
    if not isinstance(message.get("role"), str):
        raise BadRow(f"{place}: `role` must be text, found {kind(message.get('role'))}")
    valid_text(message["role"], f"{place}: `role`")
    _check_content(message, place)
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise BadRow(f"{place}: `weight` must be 0 or 1, found {kind(weight)}")
    if train is not None and not isinstance(train, bool):
        raise BadRow(f"{place}: `train` must be true or false, found {kind(train)}")
    calls = message.get("tool_calls")
    if isinstance(calls, str):
        calls = decode_json(calls, f"tool_calls of {place}")
        message = message | {"tool_calls": calls}
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise BadRow(f"{place}: `tool_calls` must be a list of objects")
    return message


def _check_content(message: Message, place: str) -> None:
    content = message.get("content")
    if content is None:
        if not any(message.get(name) for name in _INSTEAD_OF_CONTENT):
            raise BadRow(f"{place}: `content` must be text, found null")
    elif isinstance(content, str):
        valid_text(content, place)
    elif isinstance(content, list):
        for number, part in enumerate(content, start=1):
            _check_part(part, number, place)
    else:
        raise BadRow(f"{place}: `content` must be text or a list of parts, found {kind(content)}")


def _check_part(part: Any, number: int, place: str) -> None:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise BadRow(f"{place}: part {number} must be an object with a `type`")
    if part["type"] != "text":
        raise BadRow(f"{part['type']} parts are not supported ({place})")
    if not isinstance(part.get("text"), str):
        raise BadRow(f"{place}: part {number}: `text` must be text, found {kind(part.get('text'))}")
    valid_text(part["text"], place)
