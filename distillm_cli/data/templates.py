"""Rows → prompts as text."""

from __future__ import annotations

from typing import Any

from distillm_cli.data.rows import Row
from distillm_cli.errors import DataError, ModelError

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_CHAT_MODEL = "a chat model or, for one from scratch, such a model's tokenizer (--tokenizer PATH)"


def render(row: Row, template: str, tokenizer: Any) -> str:
    """The prompt of a row as text. template: auto, alpaca, chat or plain (see ``schema.Data.template``).

    auto: the row's own prompt, chat for messages, plain for question rows, alpaca for instruction rows. alpaca: the row's
    own prompt, else the Alpaca prompt. plain: instruction, input, each with a newline after it; a prompt that stands
    alone is complete as it is. chat: the tokenizer's own template around the instruction, prompt or messages.

    Raises ModelError when the tokenizer has no chat template, DataError when the row does not fit the template.
    """
    form = form_of(row, template)
    if form == "exact":
        return row.prompt
    if form == "chat":
        return _chat(row, tokenizer)
    instruction, material = _instruction(row, form)
    if form == "plain":
        return f"{instruction}\n{material}\n" if material else f"{instruction}\n"
    # Not str.format on the row's text: braces in it are text.
    if material:
        head, middle, tail = _ALPACA_INPUT.replace("{input}", "{instruction}").split("{instruction}")
        return f"{head}{instruction}{middle}{material}{tail}"
    return _ALPACA.replace("{instruction}", instruction)


def form_of(row: Row, template: str) -> str:
    """How this row is written under a template: exact (its own prompt), chat, plain or alpaca."""
    if template == "auto":
        if row.prompt is not None:
            return "exact"
        if row.messages is not None:
            return "chat"
        return "plain" if row.question else "alpaca"
    own_prompt = row.prompt is not None and (template == "alpaca" or row.instruction is None)
    return "exact" if own_prompt and template != "chat" else template


def _instruction(row: Row, template: str) -> tuple[str, str]:
    """The row as instruction and input. One question with at most a system message before it is no conversation."""
    if row.instruction is not None:
        return row.instruction, row.input
    question = _question(row.messages)
    if question is not None:
        return question
    roles = [message["role"] for message in row.messages]
    raise DataError(
        f"{row.where}: a conversation ({', '.join(roles)}) does not fit the template {template}",
        hint=f"try --set data.template=chat and {_CHAT_MODEL}",
    )


def _question(messages: list[dict[str, str]]) -> tuple[str, str] | None:
    """What one question and its system message ask; None for a conversation."""
    texts = [message["content"] for message in messages]
    match [message["role"] for message in messages]:
        case ["user"]:
            return texts[0], ""
        case ["system", "user"]:
            return texts[0], texts[1]
    return None


def _chat(row: Row, tokenizer: Any) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        one_question = row.messages is None or _question(row.messages) is not None
        hint = "try --set data.template=alpaca" if one_question else f"a conversation wants one: take {_CHAT_MODEL}"
        raise ModelError("the tokenizer has no chat template", where=row.where, hint=hint)
    messages = row.messages
    if messages is None:
        text = row.prompt if row.instruction is None else "\n".join(filter(None, (row.instruction, row.input)))
        messages = [{"role": "user", "content": text}]
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        hint = "mend the row, or try --set data.template=plain"
        raise DataError(f"{row.where}: the chat template refuses it ({error})", hint=hint) from error
