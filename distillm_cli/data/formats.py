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
    read_messages,
    references_of,
    split_answer,
    without_training,
)
from distillm_cli.data.records import BadRow, Record, kind, valid_text

Fields = dict[str, Any]

LANGUAGE_MODELING = "language modeling"

_CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
_PROMPT_COLUMNS = (*_CONVERSATION_COLUMNS, "instruction", "prompt", "question")
_INPUT_COLUMNS = ("input", "context")
_RESPONSE_COLUMNS = ("output", "response", "completion", "answer")
_SYSTEM_COLUMNS = ("system", "system_prompt")
_ARGUMENT_COLUMNS = ("tools", "documents", "chat_template_kwargs")
_OTHER_COLUMNS = ("text", "chosen", "rejected", "history", "task", "complete")
_GENERATE_COLUMNS = ("seed", "sample")  # further columns in the output of `generate`, which are not read
# Columns with media that text models cannot read, with the name in errors.
_MEDIA_COLUMNS = {
    **dict.fromkeys(("image", "images"), "images"),
    **dict.fromkeys(("audio", "audios"), "audio"),
    **dict.fromkeys(("video", "videos"), "videos"),
}
_KNOWN_COLUMNS = frozenset(
    (
        *_PROMPT_COLUMNS,
        *_INPUT_COLUMNS,
        *_RESPONSE_COLUMNS,
        *_SYSTEM_COLUMNS,
        *_ARGUMENT_COLUMNS,
        *_OTHER_COLUMNS,
    )
)


def readable_columns(columns: ColumnsConfig) -> frozenset[str]:
    """Return the names of all columns that a format may read. The others need not be converted."""
    recipe_columns = (columns.prompt, columns.input, columns.response)
    return _KNOWN_COLUMNS.union(name for name in recipe_columns if name is not None)


def read_fields(record: Record, columns: ColumnsConfig, *, require_output: bool) -> Fields:
    """Return the fields of a ``Row`` except ``where``. Raises BadRow with the column, what was found and expected."""
    found = _read(record, columns, require_output)
    if isinstance(record.values.get("complete"), bool):
        found["truncated"] = not record.take("complete")
        record.read.update(_GENERATE_COLUMNS)
        if columns.response is None and isinstance(record.values.get("output"), str):
            found["raw"] = record.take("output")
    if isinstance(record.values.get("task"), str):
        found["task"] = record.take("task")
    return found


def _read(record: Record, columns: ColumnsConfig, required: bool) -> Fields:
    if columns.prompt is not None:
        return _read_named_prompt(record, columns, required)
    for name, media in _MEDIA_COLUMNS.items():
        if record.values.get(name) not in (None, "", []):
            raise BadRow(f"{media} are not supported (column `{name}`)")
    for name in _CONVERSATION_COLUMNS:
        if record.has(name):
            return _read_conversation(record, name, columns, required)
    if record.has("chosen") and columns.response is None and is_messages(record.values["chosen"]):
        return _read_preferred_conversation(record)
    if record.has("instruction"):
        return _read_instruction(record, columns, required)
    if record.has("prompt"):
        return _read_prompt(record, "prompt", columns, required)
    if record.has("question"):
        return _read_question(record, "question", columns, required)
    if columns.response is None and record.has("chosen") and record.has("rejected"):
        return _read_implicit_prompt(record)
    if columns.response is None and record.has("text"):
        return _read_text(record, required)
    expected = ", ".join((*_PROMPT_COLUMNS, "text", "or data.columns.prompt"))
    raise BadRow(f"no prompt column ({expected}); found {record.names()}")


def _read_named_prompt(record: Record, columns: ColumnsConfig, required: bool) -> Fields:
    """Read a record whose prompt column is named in the recipe."""
    name = columns.prompt
    if name not in record:
        raise BadRow(f"no column `{name}` (data.columns.prompt); found {record.names()}")
    if name in _CONVERSATION_COLUMNS or (name != "prompt" and is_messages(record.values[name])):
        return _read_conversation(record, name, columns, required)
    if name == "instruction":
        return _read_instruction(record, columns, required)
    if name == "prompt" and columns.input is None:
        return _read_prompt(record, name, columns, required)
    return _read_question(record, name, columns, required)


# ------------------------------------------------------------------------------------------------------ conversations


def _read_conversation(record: Record, name: str, columns: ColumnsConfig, required: bool) -> Fields:
    value = record.take(name)
    messages = _with_system(record, read_messages(value, name))
    answer = None
    if columns.response is None:
        messages, answer = split_answer(messages)
    _check_prompt(messages, name)
    if answer is not None:
        references = references_of(answer)
        form = "conversational language modeling"
    else:
        unanswered = f"no response to the last message ({messages[-1]['role']}), and "
        references = _read_references(record, _response_column(record, columns, required, unanswered), required)
        form = "conversational prompt-completion" if references else "conversational prompt-only"
    form = "ShareGPT" if is_sharegpt(value) else form
    return _conversation_fields(record, messages) | {"answer": answer, "references": references, "format": form}


def _read_prompt(record: Record, name: str, columns: ColumnsConfig, required: bool) -> Fields:
    """Read a prompt and its completion, each as text or as messages."""
    if is_messages(record.values[name]):
        messages = read_messages(record.take(name), name)
        if columns.response is None and _response_column(record, columns, False) is None:
            messages, answer = split_answer(messages)  # a whole conversation
            if answer is not None:
                _check_prompt(messages, name)
                answer_fields = {"answer": answer, "references": references_of(answer)}
                return (
                    _conversation_fields(record, messages)
                    | answer_fields
                    | {"format": "conversational language modeling"}
                )
        _check_prompt(messages, name)
        return _read_completion(record, messages, columns, required)
    response = _response_column(record, columns, required)
    prompt = record.text(name)
    if not prompt.strip():
        raise BadRow(f"an empty prompt (column `{name}`)")
    if response is not None and isinstance(record.values[response], list) and is_messages(record.values[response]):
        return _read_completion(record, [{"role": "user", "content": prompt}], columns, required)
    references = _read_references(record, response, required)
    form = "prompt-completion" if references else "prompt-only"
    return {"prompt": prompt, "references": references, "format": "preference" if response == "chosen" else form}


def _read_completion(record: Record, messages: list[Fields], columns: ColumnsConfig, required: bool) -> Fields:
    """Read the response column, as messages or as text, for a prompt of messages."""
    response = _response_column(record, columns, required)
    messages = without_training(_with_system(record, messages))
    answer = None
    if response is not None and is_messages(record.values[response]):
        completion = read_messages(record.take(response), response)
        earlier, answer = split_answer(completion)
        if answer is None:
            raise BadRow(f"column `{response}` must end with a message of the assistant")
        messages = messages + earlier
        references = references_of(answer)
    else:
        references = _read_references(record, response, required)
    form = "prompt-completion" if response is not None else "prompt-only"
    form = "preference" if response == "chosen" else form
    return _conversation_fields(record, messages) | {
        "answer": answer,
        "references": references,
        "format": f"conversational {form}",
    }


def _read_preferred_conversation(record: Record) -> Fields:
    """Read the preferred one of two conversations, or of two replies to a prompt."""
    chosen = read_messages(record.take("chosen"), "chosen")
    if not chosen:
        raise BadRow("column `chosen` is an empty list")
    prompt: list[Fields] = []
    if record.has("prompt"):
        value = record.take("prompt")  # counts as read, even if `chosen` repeats it
        is_text = not is_messages(value)
        prompt = [{"role": "user", "content": record.text("prompt")}] if is_text else read_messages(value, "prompt")
    elif record.has("question") and chosen[0]["role"] == "assistant":
        prompt = [{"role": "user", "content": record.text("question")}]
    if chosen[0]["role"] == "assistant":
        chosen = without_training(prompt) + chosen
    messages, answer = split_answer(_with_system(record, chosen))
    if answer is None:
        raise BadRow("column `chosen` must end with a message of the assistant")
    _check_prompt(messages, "chosen")
    answer_fields = {"answer": answer, "references": references_of(answer), "format": "conversational preference"}
    return _conversation_fields(record, messages) | answer_fields


def _check_prompt(messages: list[Fields], name: str) -> None:
    if all(is_blank(message) for message in messages):
        raise BadRow(f"an empty prompt (column `{name}` has no message before the response)")


def _with_system(record: Record, messages: list[Fields]) -> list[Fields]:
    """Return the conversation, with the row's system column at its start if it has no system message."""
    if messages and messages[0]["role"] in ("system", "developer"):
        return messages
    system = _system_prompt(record)
    return [{"role": "system", "content": system}, *messages] if system else messages


def _system_prompt(record: Record) -> str:
    name = next((name for name in _SYSTEM_COLUMNS if record.has(name)), None)
    text = "" if name is None else record.text(name)
    return text if text.strip() else ""


def _conversation_fields(record: Record, messages: list[Fields]) -> Fields:
    """Return the fields of a conversation and further arguments of the chat template. Raises BadRow."""
    found: Fields = {"messages": messages}
    for name in ("tools", "documents"):
        value = record.decoded(name) if record.has(name) else None
        if value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise BadRow(f"column `{name}` must be a list of objects, found {_list_kind(value)}")
        found[name] = value
    kwargs = record.decoded("chat_template_kwargs") if record.has("chat_template_kwargs") else None
    if kwargs is None:
        return found
    if not isinstance(kwargs, dict):
        raise BadRow(f"column `chat_template_kwargs` must be an object, found {kind(kwargs)}")
    return found | {"template_kwargs": kwargs}


def _list_kind(value: Any) -> str:
    if not isinstance(value, list):
        return kind(value)
    return f"a list with {kind(next(one for one in value if not isinstance(one, dict)))} in it"


# --------------------------------------------------------------------------------------------------------------- text


def _read_instruction(record: Record, columns: ColumnsConfig, required: bool) -> Fields:
    instruction = record.text("instruction")
    input_text = _read_input(record, columns)
    # A column named in the recipe takes precedence over the row's own `prompt`.
    exact = record.text("prompt") if columns.prompt is None and record.has("prompt") else ""
    if not (instruction.strip() or input_text.strip() or exact.strip()):
        raise BadRow("an empty prompt (column `instruction`)")
    response = _response_column(record, columns, required)
    references = _read_references(record, response, required)
    form = "preference" if response == "chosen" else "instruction"
    if not exact.strip():
        earlier = [*_read_history(record)]
        earlier = _with_system(record, earlier)
        if earlier:
            question_text = "\n".join(filter(None, (instruction, input_text)))
            return _single_turn_fields(record, earlier, question_text, references) | {"format": form}
    prompt = exact if exact.strip() else None
    found = {
        "instruction": instruction,
        "input": input_text,
        "prompt": prompt,
        "references": references,
        "format": form,
    }
    return found | _template_fields(record)


def _read_question(record: Record, name: str, columns: ColumnsConfig, required: bool) -> Fields:
    question = record.text(name)
    input_text = _read_input(record, columns)
    if not (question.strip() or input_text.strip()):
        raise BadRow(f"an empty prompt (column `{name}`)")
    response = _response_column(record, columns, required)
    references = _read_references(record, response, required)
    form = "prompt-completion" if references else "prompt-only"
    if columns.prompt is None:
        form = "OpenOrca" if "system_prompt" in record else "question-answer"
        form = "preference" if response == "chosen" else form
        earlier = _with_system(record, [])
        if earlier or "system_prompt" in record:  # a data set with system prompts has one form, even if they are empty
            question_text = "\n".join(filter(None, (question, input_text)))
            return _single_turn_fields(record, earlier, question_text, references) | {"format": form}
    found = {
        "instruction": question,
        "input": input_text,
        "is_question": True,
        "references": references,
        "format": form,
    }
    return found | _template_fields(record)


def _single_turn_fields(
    record: Record, earlier: list[Fields], question_text: str, references: tuple[str, ...]
) -> Fields:
    """Return the fields of a conversation that ends with a question and its answer as text."""
    answer = {"role": "assistant", "content": references[0]} if references else None
    messages = [*earlier, {"role": "user", "content": question_text}]
    return _conversation_fields(record, messages) | {"answer": answer, "references": references}


def _template_fields(record: Record) -> Fields:
    """Return further arguments of the chat template for a row of text. Values of another type are ignored."""
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


def _read_history(record: Record) -> list[Fields]:
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


def _read_implicit_prompt(record: Record) -> Fields:
    """Read two whole texts. The prompt is their common start, as in TRL's ``extract_prompt``."""
    chosen = record.text("chosen")
    rejected = record.text("rejected")
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = min(len(chosen), len(rejected)) if shared is None else shared
    if shared and chosen[shared - 1] == " ":
        shared -= 1
    if not chosen[:shared].strip():
        raise BadRow("an empty prompt (columns `chosen` and `rejected` have no common start)")
    return {"prompt": chosen[:shared], "references": (chosen[shared:],), "format": "preference"}


def _read_text(record: Record, required: bool) -> Fields:
    """Read a text that is not divided into prompt and response."""
    text = record.text("text")
    response_column = next((name for name in _RESPONSE_COLUMNS if record.has(name)), None)
    if response_column is not None:
        raise BadRow(
            f"no prompt column in addition to `{response_column}`; set it with data.columns.prompt (found {record.names()})"
        )
    if not text.strip():
        raise BadRow("an empty text (column `text`)")
    if not required:
        raise BadRow(f"no prompt: a row with `text` is for {LANGUAGE_MODELING}")
    return {"prompt": "", "references": (text,), "format": LANGUAGE_MODELING}


def _read_input(record: Record, columns: ColumnsConfig) -> str:
    if columns.input is not None and columns.input not in record:
        raise BadRow(f"no column `{columns.input}` (data.columns.input); found {record.names()}")
    for name in _INPUT_COLUMNS if columns.input is None else (columns.input,):
        if record.has(name):
            return record.text(name)
    return ""


# --------------------------------------------------------------------------------------------------------- responses


def _response_column(record: Record, columns: ColumnsConfig, required: bool, prefix: str = "") -> str | None:
    """Return the column of the response; None if there is none. prefix: the beginning of the error."""
    if columns.response is not None:
        name = columns.response if columns.response in record else None
        known = f"no column `{columns.response}` (data.columns.response)"
    else:
        name = next((name for name in (*_RESPONSE_COLUMNS, "chosen") if record.has(name)), None)
        known = f"no response column ({', '.join(_RESPONSE_COLUMNS)}, or data.columns.response)"
    if name is not None and record.has(name):
        return name
    if required:
        raise BadRow(f"column `{name}` is null" if name else f"{prefix}{known}; found {record.names()}")
    return None


def _read_references(record: Record, name: str | None, required: bool) -> tuple[str, ...]:
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
            raise BadRow(f"column `{name}` must be a list of texts; item {number} is {kind(reference)}")
    return tuple(valid_text(reference, f"column `{name}`") for reference in value)
