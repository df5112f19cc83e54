"""Read conversations: lists of messages with roles, in the forms that data sets use."""

from __future__ import annotations

from typing import Any

from distillm_cli.data.records import BadRow, decode_json, kind, valid_text

Message = dict[str, Any]

# Fields of an assistant message that may replace its content, which is then null or absent.
_CONTENT_SUBSTITUTES = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")

# Roles in ShareGPT's `from`.
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "function_call": "assistant",
}


def is_messages(value: Any) -> bool:
    """Return whether the value of a column that may also hold text is a list of messages, or JSON text of one."""
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return False
        try:
            value = decode_json(value, "")
        except BadRow:
            return False
        return bool(value) and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in value)
    return isinstance(value, dict) or (isinstance(value, list) and not all(isinstance(item, str) for item in value))


def read_messages(value: Any, name: str) -> list[Message]:
    """Return the messages of a column as ``role`` and ``content``, with every further field of the file.

    value: a list of messages (or a struct of lists, as `datasets` stores a ``Sequence`` of structs), or the same as JSON
    text. Messages of ShareGPT (``from``, ``value``) get the roles of chat templates. Raises BadRow with the number of the
    message.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = decode_json(value, f"column `{name}`")
    if isinstance(value, dict):
        value = _transposed(value)
    if not isinstance(value, list):
        raise BadRow(f"column `{name}` must be a list of messages, found {kind(value)}")
    return [_read_message(message, f"message {number}") for number, message in enumerate(value, start=1)]


def is_sharegpt(value: Any) -> bool:
    """Return whether a column's messages are those of ShareGPT."""
    if isinstance(value, str):
        return '"from"' in value and '"role"' not in value
    first = value if isinstance(value, dict) else next(iter(value), None)
    return isinstance(first, dict) and "from" in first and "role" not in first


def split_answer(messages: list[Message]) -> tuple[list[Message], Message | None]:
    """Split off the assistant message at the end of a conversation; None if it ends with another message."""
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]
    return messages, None


def without_training(messages: list[Message]) -> list[Message]:
    """Return the messages of a prompt. Assistant messages get ``weight`` 0, unless they have ``weight`` or ``train``."""
    return [
        message | {"weight": 0}
        if message["role"] == "assistant" and message.get("weight") is None and message.get("train") is None
        else message
        for message in messages
    ]


def references_of(answer: Message) -> tuple[str, ...]:
    """Return the text of an answer as the only reference, or no reference if it has no text."""
    text = content_text(answer.get("content"))
    return () if text is None else (text,)


def content_text(content: Any) -> str | None:
    """Return the text of a message's content, with its text parts joined; None if it has none."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        return "".join(part["text"] for part in content)
    return None


def is_blank(message: Message) -> bool:
    """Return whether a message contains only white space."""
    return not (content_text(message.get("content")) or "").strip() and not any(
        message.get(name) for name in _CONTENT_SUBSTITUTES
    )


def _transposed(columns: dict[str, Any]) -> list[Message] | dict[str, Any]:
    """Turn a struct of lists into a list of structs. Return anything else unchanged."""
    if not all(isinstance(values, list) for values in columns.values()):
        return columns
    if len({len(values) for values in columns.values()}) != 1:
        return columns
    found = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [{k: v for k, v in message.items() if v is not None or k == "content"} for message in found]


def _read_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise BadRow(f"{where} must have `role` and `content`, found {kind(message)}")
    if "from" in message and "role" not in message:
        message = _from_sharegpt(message, where)
    if not isinstance(message.get("role"), str):
        raise BadRow(f"{where}: `role` must be text, found {kind(message.get('role'))}")
    valid_text(message["role"], f"{where}: `role`")
    calls = message.get("tool_calls")
    if isinstance(calls, str):
        calls = decode_json(calls, f"{where}: `tool_calls`")
        message = message | {"tool_calls": calls}
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise BadRow(f"{where}: `tool_calls` must be a list of objects")
    _check_content(message, where)
    weight = message.get("weight")
    train = message.get("train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise BadRow(f"{where}: `weight` must be 0 or 1, found {kind(weight)}")
    if train is not None and not isinstance(train, bool):
        raise BadRow(f"{where}: `train` must be true or false, found {kind(train)}")
    return message


def _from_sharegpt(message: Message, where: str) -> Message:
    speaker = message["from"]
    value = message.get("value")
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(_SHAREGPT_ROLES)
        found = f"`{speaker}`" if isinstance(speaker, str) else kind(speaker)
        raise BadRow(f"{where}: `from` must be one of {known}; found {found}")
    rest = {name: field for name, field in message.items() if name not in ("from", "value")}
    if speaker != "function_call":
        return {"role": role, "content": value, **rest}
    call = decode_json(value, f"{where}: a function call") if isinstance(value, str) else value
    calls = call if isinstance(call, list) else [call]
    if not all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in calls):
        raise BadRow(f"{where}: a function call must be JSON with `name` and `arguments`")
    return {"role": role, "content": "", "tool_calls": [{"type": "function", "function": c} for c in calls], **rest}


def _check_content(message: Message, where: str) -> None:
    content = message.get("content")
    if content is None:
        if not any(message.get(name) for name in _CONTENT_SUBSTITUTES):
            raise BadRow(f"{where}: `content` must be text, found null")
    elif isinstance(content, str):
        valid_text(content, where)
    elif isinstance(content, list):
        for number, part in enumerate(content, start=1):
            _check_part(part, number, where)
    else:
        raise BadRow(f"{where}: `content` must be text or a list of parts, found {kind(content)}")


def _check_part(part: Any, number: int, where: str) -> None:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise BadRow(f"{where}: part {number} must be an object with a `type`")
    if part["type"] != "text":
        raise BadRow(f"{part['type']} parts are not supported ({where})")
    if not isinstance(part.get("text"), str):
        raise BadRow(f"{where}: part {number}: `text` must be text, found {kind(part.get('text'))}")
    valid_text(part["text"], where)
