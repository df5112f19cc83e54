"""Render rows as text: the prompt and the response."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from datetime import date
from pathlib import Path
from typing import Any

from distillm_cli.config.schema import DataConfig
from distillm_cli.data.chat import ChatTemplate, Text
from distillm_cli.data.conversations import content_text
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
_CHAT_MODEL_ADVICE = "a chat model or, for one from scratch, such a model's tokenizer (--tokenizer PATH)"


class Renderer:
    """Render rows as text by ``data.template``, the same way for training, generation and scoring.

    auto: chat for messages; the row's own prompt if it has nothing else; for instructions and questions chat if the
    tokenizer has a chat template, else Alpaca for instructions (the row's own prompt, if it has one) and plain for
    questions. alpaca: the row's own prompt, else the Alpaca prompt. plain: instruction, input, each with a newline
    after it. exact: instruction and input unchanged. In these three, a prompt without an instruction is used unchanged.
    chat: the chat template around the instruction, prompt or messages.

    tokenizer: of transformers, or None if no row needs one. stops: ids of the models' stop tokens.
    """

    def __init__(self, data: DataConfig, tokenizer: Any = None, *, stops: Collection[int] = ()):
        self.template = data.template
        self.has_chat = getattr(tokenizer, "chat_template", None) is not None
        self.chat: ChatTemplate | None = None
        if self.has_chat:
            self.chat = ChatTemplate(
                tokenizer,
                day=date.fromisoformat(data.date) if data.date else date.today(),
                arguments=data.chat_template_kwargs,
                tools=_load_json_list(data.tools, "data.tools"),
                documents=_load_json_list(data.documents, "data.documents"),
                stops=stops,
                turns=data.turns,
                mark_control_tokens=data.special_tokens_in_text == "text",
            )

    def form(self, row: Row) -> str:
        """Return how the row is rendered: exact (its own prompt), chat, plain or alpaca."""
        return form_of(row, row.template or self.template, self.has_chat)

    def prompt(self, row: Row) -> str:
        """Return the prompt's text.

        Raises ModelError if the tokenizer has no chat template, DataError if the row does not fit the template.
        """
        form = self.form(row)
        if form == "chat":
            return self._chat(row).prompt(row)
        if row.prompt is not None and form == "exact":
            return row.prompt
        return _render(*_instruction_and_input(row, form), form)

    def text(self, row: Row) -> Text | None:
        """Return prompt and response (the first reference, or the whole answer of a conversation) as one text.

        The response of a row without one is empty. None for a conversation whose answers are not to be trained on. Raises
        as ``prompt`` does.
        """
        if self.form(row) == "chat":
            return self._chat(row).text(row)
        if row.answer is not None and not row.references:
            raise DataError(
                "data.template_mismatch",
                f"{row.where}: a response without text (a tool call) needs a chat template",
                hint=f"use {_CHAT_MODEL_ADVICE}",
            )
        prompt = self.prompt(row)
        text = prompt + (row.references[0] if row.references else "")
        return Text(text, len(prompt), len(text))

    def _chat(self, row: Row) -> ChatTemplate:
        if self.chat is not None:
            return self.chat
        one_question = row.messages is None or _single_question(row.messages) is not None
        hint = "try --set data.template=alpaca" if one_question else f"conversations need one: use {_CHAT_MODEL_ADVICE}"
        raise ModelError("model.no_chat_template", "the tokenizer has no chat template", where=row.where, hint=hint)


def form_of(row: Row, template: str, has_chat: bool) -> str:
    """Return how a row is rendered by a template: exact (its own prompt), chat, plain or alpaca.

    has_chat: whether there is a chat template.
    """
    if template == "auto":
        if row.messages is not None:
            return "chat"
        if row.instruction is None:
            return "exact"
        if has_chat:
            return "chat"
        return "exact" if row.prompt is not None else "plain" if row.is_question else "alpaca"
    own_prompt = row.prompt is not None and (template == "alpaca" or row.instruction is None)
    return "exact" if own_prompt and template != "chat" else template


def resolve_auto_template(rows: Iterable[Row], has_chat: bool) -> tuple[str, str] | None:
    """Return the template that ``auto`` selects for these rows, and the reason; None if it selects several or none.

    Rows with a template of their own do not count. has_chat: whether teacher and student have chat templates.
    """
    rows = [row for row in rows if row.template is None]
    if not rows:
        return None
    kinds = {(form_of(row, "auto", has_chat), row.messages is not None, row.instruction is not None) for row in rows}
    forms = {form for form, _, _ in kinds}
    if forms == {"chat"}:
        of_messages = all(is_conversation for _, is_conversation, _ in kinds)
        if of_messages:
            return "chat", "rows are conversations"
        return "chat", "rows are instructions and the models have chat templates"
    if forms == {"exact"} and not any(has_instruction for *_, has_instruction in kinds):
        return "exact", "rows are whole prompts"
    if forms <= {"exact", "alpaca"}:
        return "alpaca", "rows are instructions"
    return ("plain", "rows are questions") if forms == {"plain"} else None


def _render(instruction: str, input_text: str, form: str) -> str:
    if form == "exact":
        return f"{instruction}\n{input_text}" if input_text else instruction
    if form == "plain":
        return f"{instruction}\n{input_text}\n" if input_text else f"{instruction}\n"
    # Not str.format: the row's text may contain braces.
    if input_text:
        head, middle, tail = _ALPACA_INPUT.replace("{input}", "{instruction}").split("{instruction}")
        return f"{head}{instruction}{middle}{input_text}{tail}"
    return _ALPACA.replace("{instruction}", instruction)


def _instruction_and_input(row: Row, template: str) -> tuple[str, str]:
    """Return the row as instruction and input. A single question, with or without a system message, counts as both."""
    if row.instruction is not None:
        return row.instruction, row.input
    question = _single_question(row.messages)
    if question is not None:
        return question
    roles = [message["role"] for message in row.messages]
    raise DataError(
        "data.template_mismatch",
        f"{row.where}: a conversation ({', '.join(roles)}) does not fit the template {template}",
        hint=f"try --set data.template=chat and {_CHAT_MODEL_ADVICE}",
    )


def _single_question(messages: list[dict[str, Any]]) -> tuple[str, str] | None:
    """Return the texts of a single question and its system message; None for longer conversations and other content."""
    texts = [content_text(message.get("content")) for message in messages]
    if None in texts:
        return None
    match [message["role"] for message in messages]:
        case ["user"]:
            return texts[0], ""
        case ["system", "user"]:
            return texts[0], texts[1]
    return None


def _load_json_list(path: str | None, key: str) -> list[Any] | None:
    if path is None:
        return None
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("data.unreadable", f"{key} = {path}: {error}", hint="use a file with a JSON list") from None
    if not isinstance(found, list):
        raise DataError("data.invalid_json", f"{key} = {path}: not a JSON list", hint="use a file with a JSON list")
    return found
