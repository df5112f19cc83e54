"""Read the prompts of ``generate``, and format them for its output."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distillm_cli.config.schema import DataConfig
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.files import format_of
from distillm_cli.data.rows import BadRow, parse
from distillm_cli.data.sources import Row, load_rows, path_kind, user_path
from distillm_cli.errors import DataError
from distillm_cli.training.events import Listener, Warned
from distillm_cli.utils.text import all_are


@dataclass(frozen=True)
class PromptSource:
    """Describe where prompts come from (exactly one of data, prompts and input), how many, and the samples of each."""

    data: str | None = None
    split: str | None = None
    prompts: list[str] | None = None
    input: str | None = None
    limit: int | None = None
    samples: int = 1


def read_prompts(source: PromptSource, data: DataConfig, listener: Listener) -> list[Row]:
    """Return the rows with the prompts; they need no response. Raises DataError."""
    if source.prompts is not None:
        rows = [Row(instruction=text, where=f"--prompt {i}") for i, text in enumerate(source.prompts, start=1)]
        return rows[: source.limit]
    name = source.data if source.input is None else source.input
    path = user_path(name)
    is_text_file = source.input is not None and path_kind(path) != "directory" and format_of(path) is None
    if source.input == "-" or is_text_file:
        return _lines(source.input, data, listener)[: source.limit]
    # A model's own recipe may limit its training rows and name validation rows: neither concerns the prompts.
    data = data.model_copy(update={"source": name, "valid": None, "limit": None})
    # The test split of a single file is the whole file.
    split = source.split or ("test" if path_kind(path) == "file" else "train")
    stand_in = source.split is None  # a split that the user names is required
    rows = load_rows(data, split, listener=listener, require_output=False, limit=source.limit, stand_in=stand_in)
    return list(rows)


def _lines(source: str, data: DataConfig, listener: Listener) -> list[Row]:
    """Read a prompt from each line: an instruction as text, or a row as a JSON object."""
    try:
        raw = sys.stdin.buffer.read() if source == "-" else user_path(source).read_bytes()
        lines = raw.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"{source}: {error.strerror or error}", hint="check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 (byte {error.start})") from None
    name = "stdin" if source == "-" else Path(source).name
    numbered = [(f"{name}:{number}", line.rstrip("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise DataError(f"{name}: no prompts in it", hint="one per line")
    rows = []
    for where, line in numbered:
        try:
            record = json.loads(line) if line.lstrip().startswith("{") else None
        except ValueError:
            record = None  # a prompt that begins with a brace
        if not isinstance(record, dict):
            rows.append(Row(instruction=line, where=where))
            continue
        try:
            rows.append(parse(record, where, data.columns, require_output=False))
        except BadRow as error:
            if not data.skip_bad_rows:
                raise DataError(
                    f"{where}: {error}", hint="fix the row, or skip such rows with --skip-bad-rows"
                ) from None
            listener(Warned(f"skipped {where}: {error}"))
    if not rows:
        raise DataError(f"{name}: {all_are(len(numbered), 'row')} broken")
    return rows


def exact_texts(rows: list[Row], ids: list[np.ndarray], encoder: Encoder, listener: Listener) -> list[str]:
    """Return each prompt as text that gives the same tokens when it is read as the exact prompt of a row.

    A chat template writes the beginning-of-sequence token itself, while the encoder adds it to an exact prompt. Rows of
    messages are read as messages, so the text of their prompt does not matter.
    """
    texts = [encoder.renderer.prompt(row) for row in rows]
    chat_rows = [i for i, row in enumerate(rows) if encoder.renderer.form(row) == "chat"]
    if not chat_rows:
        return texts
    reader = encoder.with_settings(template="exact")
    start = encoder.tokenizer.bos_token
    inexact = 0
    for i in chat_rows:
        candidates = [texts[i], *([texts[i].removeprefix(start)] if start else [])]
        exact = [text for text in candidates if np.array_equal(reader.prompt_ids(Row(prompt=text)), ids[i])]
        texts[i] = exact[0] if exact else texts[i]
        inexact += not exact and rows[i].messages is None
    if inexact:
        listener(Warned(f"{inexact:,} chat prompts cannot be written so that they read back as the same tokens"))
    return texts
