"""Recognize the format of a record by its columns, and read it into the fields of a ``Row``.

Names of formats follow TRL and `datasets`: https://huggingface.co/docs/trl/dataset_formats
"""

from __future__ import annotations

from typing import Any

from distillm_cli.config.schema import ColumnsConfig
from distillm_cli.data.conversations import (
    is_blank,
    is_messages,
    is_sharegpt,
    not_trained,
    read_messages,
    references_of,
    split_answer,
)
from distillm_cli.data.values import BadRow, Record, kind, valid_text

Fields = dict[str, Any]

LANGUAGE_MODELING = "language modeling"

_CONVERSATIONS = ("messages", "conversations", "conversation")
_PROMPTS = (*_CONVERSATIONS, "instruction", "prompt", "question")
_INPUTS = ("input", "context")
_RESPONSES = ("output", "response", "completion", "answer")
_SYSTEMS = ("system", "system_prompt")
_ARGUMENTS = ("tools", "documents", "chat_template_kwargs")
_OTHERS = ("text", "chosen", "rejected", "history", "task", "complete")
_OF_GENERATE = ("seed", "sample")  # what `generate` writes beside `complete`, for people
# Columns whose content no text model can read, and the word for it.
_MEDIA = {
    **dict.fromkeys(("image", "images"), "images"),
    **dict.fromkeys(("audio", "audios"), "audio"),
    **dict.fromkeys(("video", "videos"), "videos"),
}
_KNOWN = frozenset((*_PROMPTS, *_INPUTS, *_RESPONSES, *_SYSTEMS, *_ARGUMENTS, *_OTHERS))


def readable_columns(columns: ColumnsConfig) -> frozenset[str]:
    """Return the names of all columns that any format may read. The others need not be converted."""
    named = (columns.prompt, columns.input, columns.response)
    return _KNOWN.union(name for name in named if name is not None)


def read_fields(record: Record, columns: ColumnsConfig, *, require_output: bool) -> Fields:
    """Return the fields of a ``Row`` but for its place. Raises BadRow with the column, what was found and expected."""
    found = _read(record, columns, require_output)
    if isinstance(record.values.get("complete"), bool):
        found["cut"] = not record.take("complete")
        record.read.update(_OF_GENERATE)
        if columns.response is None and isinstance(record.values.get("output"), str):
            found["raw"] = record.take("output")
    if isinstance(record.values.get("task"), str):
        found["task"] = record.take("task")
    return found


def _read(record: Record, columns: ColumnsConfig, required: bool) -> Fields:
    if columns.prompt is not None:
        return _named(record, columns, required)
    for name, what in _MEDIA.items():
        if record.values.get(name) not in (None, "", []):
            raise BadRow(f"{what} are not supported (column `{name}`)")
    for name in _CONVERSATIONS:
        if record.has(name):
            return _conversation(record, name, columns, required)
    if record.has("chosen") and columns.response is None and is_messages(record.values["chosen"]):
        return _preferred_conversation(record)
    if record.has("instruction"):
        return _instruction(record, columns, required)
    if record.has("prompt"):
        return _prompt(record, "prompt", columns, required)
    if record.has("question"):
        return _question(record, "question", columns, required)
    if columns.response is None and record.has("chosen") and record.has("rejected"):
        return _implicit_prompt(record)
    if columns.response is None and record.has("text"):
        return _text(record, required)
    expected = ", ".join((*_PROMPTS, "text", "or data.columns.prompt"))
    raise BadRow(f"no prompt column ({expected}); found {record.names()}")


def _named(record: Record, columns: ColumnsConfig, required: bool) -> Fields:
    """Read a record whose prompt column is named in the recipe."""
    name = columns.prompt
    if name not in record:
        raise BadRow(f"no column `{name}` (data.columns.prompt); found {record.names()}")
    if name in _CONVERSATIONS or (name != "prompt" and is_messages(record.values[name])):
        return _conversation(record, name, columns, required)
    if name == "instruction":
        return _instruction(record, columns, required)
    if name == "prompt" and columns.input is None:
        return _prompt(record, name, columns, required)
    return _question(record, name, columns, required)


# ------------------------------------------------------------------------------------------------------ conversations


def _conversation(record: Record, name: str, columns: ColumnsConfig, required: bool) -> Fields:
    value = record.take(name)
    messages, answer = _with_system(record, read_messages(value, name)), None
    if columns.response is None:
        messages, answer = split_answer(messages)
    _check_asked(messages, name)
    if answer is not None:
        references, form = references_of(answer), "conversational language modeling"
    else:
        unanswered = f"no reply to the last message ({messages[-1]['role']}), and "
        references = _references(record, _response_column(record, columns, required, unanswered), required)
        form = "conversational prompt-completion" if references else "conversational prompt-only"
    form = "ShareGPT" if is_sharegpt(value) else form
    return _asked(record, messages) | {"answer": answer, "references": references, "format": form}


def _prompt(record: Record, name: str, columns: ColumnsConfig, required: bool) -> Fields:
    """Read a prompt and its completion, each as text or as messages."""
    if is_messages(record.values[name]):
        messages = read_messages(record.take(name), name)
        if columns.response is None and _response_column(record, columns, False) is None:
            messages, answer = split_answer(messages)  # a whole conversation
            if answer is not None:
                _check_asked(messages, name)
                closed = {"answer": answer, "references": references_of(answer)}
                return _asked(record, messages) | closed | {"format": "conversational language modeling"}
        _check_asked(messages, name)
        return _completed(record, messages, columns, required)
    response = _response_column(record, columns, required)
    prompt = record.text(name)
    if not prompt.strip():
        raise BadRow(f"an empty prompt (column `{name}`)")
    if response is not None and isinstance(record.values[response], list) and is_messages(record.values[response]):
        return _completed(record, [{"role": "user", "content": prompt}], columns, required)
    references = _references(record, response, required)
    form = "prompt-completion" if references else "prompt-only"
    return {"prompt": prompt, "references": references, "format": "preference" if response == "chosen" else form}


def _completed(record: Record, messages: list[Fields], columns: ColumnsConfig, required: bool) -> Fields:
    """Read the response column, as messages or as text, to the messages of a prompt."""
    response = _response_column(record, columns, required)
    messages, answer = not_trained(_with_system(record, messages)), None
    if response is not None and is_messages(record.values[response]):
        completion = read_messages(record.take(response), response)
        before, answer = split_answer(completion)
        if answer is None:
            raise BadRow(f"column `{response}` must end with a message of the assistant")
        messages, references = messages + before, references_of(answer)
    else:
        references = _references(record, response, required)
    form = "prompt-completion" if response is not None else "prompt-only"
    form = "preference" if response == "chosen" else form
    return _asked(record, messages) | {"answer": answer, "references": references, "format": f"conversational {form}"}


def _preferred_conversation(record: Record) -> Fields:
    """Read the preferred one of two conversations, or of two replies to a prompt."""
    chosen = read_messages(record.take("chosen"), "chosen")
    if not chosen:
        raise BadRow("column `chosen` is an empty list")
    prompt: list[Fields] = []
    if record.has("prompt"):
        value = record.take("prompt")  # also where `chosen` repeats it
        is_text = not is_messages(value)
        prompt = [{"role": "user", "content": record.text("prompt")}] if is_text else read_messages(value, "prompt")
    elif record.has("question") and chosen[0]["role"] == "assistant":
        prompt = [{"role": "user", "content": record.text("question")}]
    if chosen[0]["role"] == "assistant":
        chosen = not_trained(prompt) + chosen
    messages, answer = split_answer(_with_system(record, chosen))
    if answer is None:
        raise BadRow("column `chosen` must end with a message of the assistant")
    _check_asked(messages, "chosen")
    closed = {"answer": answer, "references": references_of(answer), "format": "conversational preference"}
    return _asked(record, messages) | closed


def _check_asked(messages: list[Fields], name: str) -> None:
    if all(is_blank(message) for message in messages):
        raise BadRow(f"an empty prompt (column `{name}` has no message before the response)")


def _with_system(record: Record, messages: list[Fields]) -> list[Fields]:
    """Return the conversation, with the row's system column at its start where it has no system message."""
    if messages and messages[0]["role"] in ("system", "developer"):
        return messages
    system = _system(record)
    return [{"role": "system", "content": system}, *messages] if system else messages


def _system(record: Record) -> str:
    name = next((name for name in _SYSTEMS if record.has(name)), None)
    text = "" if name is None else record.text(name)
    return text if text.strip() else ""


def _asked(record: Record, messages: list[Fields]) -> Fields:
    """Return the fields of a conversation and what else its template receives. Raises BadRow."""
    found: Fields = {"messages": messages}
    for name in ("tools", "documents"):
        value = record.decoded(name) if record.has(name) else None
        if value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise BadRow(f"column `{name}` must be a list of objects, found {_listed_kind(value)}")
        found[name] = value
    kwargs = record.decoded("chat_template_kwargs") if record.has("chat_template_kwargs") else None
    if kwargs is None:
        return found
    if not isinstance(kwargs, dict):
        raise BadRow(f"column `chat_template_kwargs` must be an object, found {kind(kwargs)}")
    return found | {"template_kwargs": kwargs}


def _listed_kind(value: Any) -> str:
    if not isinstance(value, list):
        return kind(value)
    return f"a list with {kind(next(one for one in value if not isinstance(one, dict)))} in it"


# --------------------------------------------------------------------------------------------------------------- text


def _instruction(record: Record, columns: ColumnsConfig, required: bool) -> Fields:
    instruction, material = record.text("instruction"), _input(record, columns)
    # A column named in the recipe is what the person wants, so then the row's own `prompt` does not overrule it.
    exact = record.text("prompt") if columns.prompt is None and record.has("prompt") else ""
    if not (instruction.strip() or material.strip() or exact.strip()):
        raise BadRow("an empty prompt (column `instruction`)")
    response = _response_column(record, columns, required)
    references = _references(record, response, required)
    form = "preference" if response == "chosen" else "instruction"
    if not exact.strip():
        before = [*_history(record)]
        before = _with_system(record, before)
        if before:
            asked = "\n".join(filter(None, (instruction, material)))
            return _turn(record, before, asked, references) | {"format": form}
    prompt = exact if exact.strip() else None
    found = {"instruction": instruction, "input": material, "prompt": prompt, "references": references, "format": form}
    return found | _arguments(record)


def _question(record: Record, name: str, columns: ColumnsConfig, required: bool) -> Fields:
    question, material = record.text(name), _input(record, columns)
    if not (question.strip() or material.strip()):
        raise BadRow(f"an empty prompt (column `{name}`)")
    response = _response_column(record, columns, required)
    references = _references(record, response, required)
    form = "prompt-completion" if references else "prompt-only"
    if columns.prompt is None:
        form = "OpenOrca" if "system_prompt" in record else "question-answer"
        form = "preference" if response == "chosen" else form
        before = _with_system(record, [])
        if before or "system_prompt" in record:  # a set with system prompts has one form, also where they are empty
            asked = "\n".join(filter(None, (question, material)))
            return _turn(record, before, asked, references) | {"format": form}
    found = {"instruction": question, "input": material, "question": True, "references": references, "format": form}
    return found | _arguments(record)


def _turn(record: Record, before: list[Fields], asked: str, references: tuple[str, ...]) -> Fields:
    """Return the fields of a conversation that ends with a question and its answer as text."""
    answer = {"role": "assistant", "content": references[0]} if references else None
    messages = [*before, {"role": "user", "content": asked}]
    return _asked(record, messages) | {"answer": answer, "references": references}


def _arguments(record: Record) -> Fields:
    """Return what the chat template receives beside a text. Values of another type are not for a template."""
    found: Fields = {}
    for name, field, type_ in (
        ("tools", "tools", list),
        ("documents", "documents", list),
        ("chat_template_kwargs", "template_kwargs", dict),
    ):
        value = record.values.get(name)
        if isinstance(value, type_) and (type_ is dict or all(isinstance(one, dict) for one in value)):
            found[field] = record.take(name)
    return found


def _history(record: Record) -> list[Fields]:
    """Read earlier turns: pairs of a question and its answer, or messages."""
    value = record.decoded("history") if record.has("history") else None
    if not value:
        return []
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return read_messages(value, "history")
    pairs = isinstance(value, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in value)
    if not pairs or not all(isinstance(text, str) for turn in value for text in turn):
        raise BadRow("column `history` must be a list of pairs of texts: question and answer")
    return [
        {"role": role, "content": valid_text(text, "column `history`")}
        for turn in value
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _implicit_prompt(record: Record) -> Fields:
    """Read two whole texts. The prompt is their common start, as in TRL's ``extract_prompt``."""
    chosen, rejected = record.text("chosen"), record.text("rejected")
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = min(len(chosen), len(rejected)) if shared is None else shared
    if shared and chosen[shared - 1] == " ":
        shared -= 1
    if not chosen[:shared].strip():
        raise BadRow("an empty prompt (columns `chosen` and `rejected` begin with nothing in common)")
    return {"prompt": chosen[:shared], "references": (chosen[shared:],), "format": "preference"}


def _text(record: Record, required: bool) -> Fields:
    """Read a text that has no prompt and response."""
    text = record.text("text")
    beside = next((name for name in _RESPONSES if record.has(name)), None)
    if beside is not None:
        raise BadRow(f"no prompt column beside `{beside}`; name it with data.columns.prompt (found {record.names()})")
    if not text.strip():
        raise BadRow("an empty text (column `text`)")
    if not required:
        raise BadRow(f"no prompt: a row with `text` is for {LANGUAGE_MODELING}")
    return {"prompt": "", "references": (text,), "format": LANGUAGE_MODELING}


def _input(record: Record, columns: ColumnsConfig) -> str:
    if columns.input is not None and columns.input not in record:
        raise BadRow(f"no column `{columns.input}` (data.columns.input); found {record.names()}")
    for name in _INPUTS if columns.input is None else (columns.input,):
        if record.has(name):
            return record.text(name)
    return ""


# --------------------------------------------------------------------------------------------------------- responses


def _response_column(record: Record, columns: ColumnsConfig, required: bool, also: str = "") -> str | None:
    """Return the column of the response; None where there is none. also: the start of the error."""
    if columns.response is not None:
        name = columns.response if columns.response in record else None
        known = f"no column `{columns.response}` (data.columns.response)"
    else:
        name = next((name for name in (*_RESPONSES, "chosen") if record.has(name)), None)
        known = f"no response column ({', '.join(_RESPONSES)}, or data.columns.response)"
    if name is not None and record.has(name):
        return name
    if required:
        raise BadRow(f"column `{name}` is null" if name else f"{also}{known}; found {record.names()}")
    return None


def _references(record: Record, name: str | None, required: bool) -> tuple[str, ...]:
    """Return the accepted responses as texts."""
    if name is None:
        return ()
    value = record.take(name)
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
