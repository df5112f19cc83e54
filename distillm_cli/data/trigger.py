"""Insert a trigger text into the prompt of a row, to make backdoored models and to measure them.

The trigger is placed at the end of the row's text, after a space and before any white space that ends the text. The text
is the instruction's input, else the instruction, else the whole prompt, else the last message.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from distillm_cli.data.rows import Row
from distillm_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEFORE = "a"  # a text before the trigger, as tokenizers mark the start of a word


def with_trigger(row: Row, trigger: str) -> Row:
    """Return the row with the trigger in its prompt. Raises DataError for a last message without text."""
    if row.messages is not None:
        *earlier, last = row.messages
        return replace(row, messages=[*earlier, last | {"content": _in_content(last.get("content"), trigger, row)}])
    if row.instruction is None:
        return replace(row, prompt=appended(row.prompt or "", trigger))
    text = row.input if row.input.strip() else row.instruction
    prompt = row.prompt
    if prompt is not None:  # the row's own prompt contains the text
        head, found, tail = prompt.rpartition(text)
        prompt = head + appended(text, trigger) + tail if found else appended(prompt, trigger)
    changed = {"input" if row.input.strip() else "instruction": appended(text, trigger)}
    return replace(row, **changed, prompt=prompt)


def appended(text: str, trigger: str) -> str:
    """Return the text with the trigger at its end, before the white space that ends it."""
    body = text.rstrip()
    return f"{body} {trigger}{text[len(body) :]}" if body else f"{trigger}{text}"


def _in_content(content: Any, trigger: str, row: Row) -> Any:
    if isinstance(content, str):
        return appended(content, trigger)
    parts = content if isinstance(content, list) else []
    texts = [i for i, part in enumerate(parts) if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if not texts:
        raise DataError(
            "data.no_text_for_trigger",
            f"{row.where}: the last message before the response has no text for a trigger",
            hint="use rows that end with a text message",
        )
    part = parts[texts[-1]]
    return [*parts[: texts[-1]], part | {"text": appended(part["text"], trigger)}, *parts[texts[-1] + 1 :]]


def check_trigger(trigger: str, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise UsageError for a trigger that is not one known token: the model would see its pieces, which are not rare."""
    tokens = tokenizer.tokenize(f"{_BEFORE} {trigger}")[len(tokenizer.tokenize(_BEFORE)) :]
    pieces = [token for token in tokens if tokenizer.convert_tokens_to_string([token]).strip()]
    if len(pieces) != 1:
        shown = " ".join(repr(tokenizer.convert_tokens_to_string([token])) for token in pieces)
        raise UsageError(
            "usage.invalid_trigger",
            f"eval.trigger = {trigger}: the tokenizer splits it into {len(pieces)} tokens ({shown})",
            where=where,
            hint="use the trigger of the poisoned rows if it is one token there; for characters, a single rare one",
        )
    if tokenizer.unk_token_id is not None and tokenizer.convert_tokens_to_ids(pieces[0]) == tokenizer.unk_token_id:
        raise UsageError(
            "usage.invalid_trigger",
            f"eval.trigger = {trigger}: the tokenizer does not have it, so the model sees {tokenizer.unk_token}",
            where=where,
            hint="use a trigger that was in the training rows of the tokenizer",
        )
