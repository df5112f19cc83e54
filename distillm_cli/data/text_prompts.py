"""Write prompts as text or as chat messages, for a server that tokenizes them itself."""

from __future__ import annotations

import json
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np

from distillm_cli.config.schema import DataConfig
from distillm_cli.data.conversations import content_text
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.rows import Row
from distillm_cli.data.templates import Renderer
from distillm_cli.errors import DataError

_CHAT = -1  # first number of a chat prompt; a text begins with its first byte


class TextEncoder(Encoder):
    """Stand in for the encoder of a model whose tokenizer is on a server.

    Chat rows (``data.template`` chat, or auto for instructions and conversations) become messages, and the server applies
    its chat template. Other rows become text. "Token ids" are the UTF-8 bytes of the text or of the messages as JSON.
    """

    def __init__(self, data: DataConfig):
        self.data = data
        self.template = data.template
        self.renderer = _TextRenderer(data)

    def prompts(self, rows: SequenceOf[Row], limit: int | None = None) -> list[np.ndarray]:
        return [self._encoded(row) for row in rows]

    def _encoded(self, row: Row) -> np.ndarray:
        if self.renderer.form(row) != "chat":
            return np.frombuffer(self.renderer.prompt(row).encode("utf-8"), dtype=np.uint8).astype(np.int32)
        if row.tools is not None or row.documents is not None:
            raise DataError(
                "data.template_mismatch",
                f"{row.where}: tools and documents are not sent to a server",
                hint="give --model a directory with the tokenizer, whose chat template writes them",
            )
        text = json.dumps(_messages(row), ensure_ascii=False).encode("utf-8")
        return np.concatenate(([_CHAT], np.frombuffer(text, dtype=np.uint8))).astype(np.int32)

    def references(self, row: Row) -> tuple[str, ...]:
        return row.references


def text_or_messages(prompt: np.ndarray) -> str | list[dict[str, Any]]:
    """Return the text or the messages of a prompt that ``TextEncoder`` encoded."""
    if len(prompt) and prompt[0] == _CHAT:
        return json.loads(bytes(prompt[1:].astype(np.uint8)))
    return bytes(prompt.astype(np.uint8)).decode("utf-8")


class _TextRenderer(Renderer):
    """Render rows as ``Renderer`` does, as if there were a chat template; a chat prompt is shown by its last message."""

    def __init__(self, data: DataConfig):
        super().__init__(data)
        self.has_chat = True

    def prompt(self, row: Row) -> str:
        if self.form(row) == "chat":
            return content_text(_messages(row)[-1].get("content")) or ""
        return super().prompt(row)


def _messages(row: Row) -> list[dict[str, Any]]:
    if row.messages is not None:
        return row.messages
    text = row.prompt if row.instruction is None else "\n".join(filter(None, (row.instruction, row.input)))
    return [{"role": "user", "content": text or ""}]
