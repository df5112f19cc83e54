"""Read a record of any known format into a ``Row``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from distillm_cli.config.schema import ColumnsConfig
from distillm_cli.data.formats import LANGUAGE_MODELING, read_fields
from distillm_cli.data.records import BadRow, Record, kind

__all__ = ["BadRow", "Row", "Split", "parse", "read_row"]

Split = Literal["train", "valid", "test"]

_TRAINING_FIELDS = ("weight", "train")  # fields about training on a message


@dataclass(frozen=True, slots=True)
class Row:
    """Hold one example, before any template.

    instruction, input: the task as text, and its input text. prompt: the exact prompt of the file, complete. messages:
    the conversation up to the answer, each message with every field of the file. answer: the assistant message that
    ends a conversation, with every field of the file (``tool_calls``, ``reasoning_content``, …). tools, documents:
    arguments of the chat template. template_kwargs: further arguments of the chat template (``enable_thinking``).
    references: accepted responses as text; the first is trained on if there is no ``answer``. They may be empty if only
    prompts are needed. where: "train.jsonl:318". task: its kind, if known. is_question: the instruction comes from a
    column other than `instruction`, which template `auto` renders plain. truncated: the response was cut at a length
    limit (`complete: false`, as `generate` writes it) and has no end token. raw: for rows of `generate`, the response
    as generated, including structural special tokens. format: the name of the row's format, for display. template: of its
    source in a mixture, in place of the run's.
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
    is_question: bool = False
    truncated: bool = False
    raw: str | None = None
    format: str = ""
    template: str | None = None

    @property
    def is_answered(self) -> bool:
        """Return whether the row has a response of its own."""
        return self.answer is not None or bool(self.references)

    @property
    def key(self) -> str:
        """Return a key that is equal for rows with the same prompt."""
        if self.instruction is not None:
            content: Any = [self.instruction, self.input]
        elif self.format == LANGUAGE_MODELING:
            content = {"text": self.references[0]}  # no prompt; only equal texts share a key
        elif self.prompt is not None:
            content = self.prompt
        else:
            content = [{k: v for k, v in message.items() if k not in _TRAINING_FIELDS} for message in self.messages]
        extras = [self.tools, self.documents, self.template_kwargs]
        # Without extras the key is that of earlier versions, since digests of evaluations contain it.
        return json.dumps(content if extras == [None] * 3 else [content, *extras], default=str)


def parse(record: Any, where: str, columns: ColumnsConfig, *, require_output: bool = True) -> Row:
    """Read one record of a source into a Row. Raises BadRow with the column, what was found, and what was expected.

    require_output: if false, rows may lack a response, but not a prompt.
    """
    return read_row(record, where, columns, require_output=require_output)[0]


def read_row(record: Any, where: str, columns: ColumnsConfig, *, require_output: bool = True) -> tuple[Row, set[str]]:
    """Read one record like ``parse``, and also return the names of the columns that were read."""
    if not isinstance(record, dict):
        raise BadRow(f"expected an object with named columns, found {kind(record)}")
    reader = Record(record)
    return Row(where=where, **read_fields(reader, columns, require_output=require_output)), reader.read
