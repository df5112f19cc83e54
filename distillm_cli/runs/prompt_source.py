"""Check and read the prompts of ``generate``, and format them for its output. Imports no torch."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distillm_cli.config.schema import DataConfig
from distillm_cli.data.files import format_of
from distillm_cli.data.rows import BadRow, Split, parse
from distillm_cli.data.sources import Row, load_rows, local_path, path_kind, user_path
from distillm_cli.errors import DataError, UsageError
from distillm_cli.runs.responses import ResponseFile
from distillm_cli.training.distributed import world
from distillm_cli.training.events import Listener, Warned
from distillm_cli.utils.text import all_are

if TYPE_CHECKING:
    from distillm_cli.data.encoder import Encoder


_MAX_COUNT = 2**31  # rows, and samples of a row


@dataclass(frozen=True)
class PromptSource:
    """Describe the source of prompts (exactly one of data, prompts and input), their number, and the samples of each."""

    data: str | None = None
    split: Split | None = None
    prompts: list[str] | None = None
    input: str | None = None
    limit: int | None = None
    samples: int = 1


def check_request(source: PromptSource, output: str | None, *, resume: bool, overwrite: bool) -> None:
    """Raise UsageError for options that contradict each other or are out of range, and for a path that cannot be used."""
    sources = {"--data": source.data, "--prompt": source.prompts, "--input": source.input}
    given = [flag for flag, value in sources.items() if value is not None]
    if len(given) != 1:
        hint = "use one of --data SOURCE, --prompt TEXT, --input FILE"
        if not given:
            raise UsageError("usage.no_prompts", "no prompts", hint=hint)
        raise UsageError("usage.exclusive_options", f"{' and '.join(given)} are mutually exclusive", hint=hint)
    for flag, count in (("--limit", source.limit), ("--n", source.samples)):
        if count is not None and not 1 <= count < _MAX_COUNT:
            raise UsageError("usage.invalid_value", f"{flag} = {count}", where="expected an integer ≥ 1 and < 2^31")
    if any(not text.strip() for text in source.prompts or ()):
        raise UsageError(
            "usage.invalid_value",
            "empty --prompt",
            where="training rows may not have one either",
            hint="set a text",
        )
    if source.split is not None and source.data is None:
        raise UsageError(
            "usage.unused_option", f"--split {source.split} without --data", hint="remove it, or use --data"
        )
    if source.split not in (None, "train", "valid", "test"):
        raise UsageError("usage.invalid_value", f"--split = {source.split}", where="expected train, valid or test")
    if output is None and (resume or overwrite):
        raise UsageError(
            "usage.no_output", f"{'--resume' if resume else '--overwrite'} without --output", hint="use --output FILE"
        )
    if output is not None:
        ResponseFile(Path(output), resume=resume, overwrite=overwrite)
        if overwrite:
            _check_not_read(source, Path(output))


def _check_not_read(source: PromptSource, output: Path) -> None:
    """Raise UsageError if the file to replace is an input of the prompts."""
    for flag, name in (("--data", source.data), ("--input", source.input)):
        place = None if name is None or name == "-" else local_path(name)
        if place is None or not output.exists():
            continue
        read = [place, place / "data"] if place.is_dir() else [place]
        for path in read:
            if path.exists() and (output.samefile(path) or output.resolve().parent == path.resolve()):
                raise UsageError(
                    "usage.output_is_input",
                    f"--output {output} is an input of {flag} {name}",
                    hint="choose another --output",
                )


def read_prompts(source: PromptSource, data: DataConfig, listener: Listener) -> list[Row]:
    """Return the rows with the prompts; they need no response. Raises DataError."""
    if source.prompts is not None:
        rows = [Row(instruction=text, where=f"--prompt {i}") for i, text in enumerate(source.prompts, start=1)]
        return rows[: source.limit]
    name = source.data if source.input is None else source.input
    assert name is not None
    path = user_path(name)
    is_text_file = source.input is not None and path_kind(path) != "directory" and format_of(path) is None
    if source.input == "-" or is_text_file:
        return _lines(name, data, listener)[: source.limit]
    # A model's own recipe may limit its training rows and name validation rows, which do not apply to the prompts.
    data = data.of(name, valid=None, limit=None)
    # The test split of a single file is the whole file.
    split: Split = source.split or ("test" if path_kind(path) == "file" else "train")
    stand_in = source.split is None  # a split named by the user is required
    return list(load_rows(data, split, listener=listener, require_output=False, limit=source.limit, stand_in=stand_in))


def _lines(source: str, data: DataConfig, listener: Listener) -> list[Row]:
    """Read a prompt from each line: an instruction as text, or a row as a JSON object."""
    try:
        raw = world().broadcast(sys.stdin.buffer.read) if source == "-" else user_path(source).read_bytes()
        lines = raw.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise DataError("data.unreadable", f"{source}: {error.strerror or error}", hint="check the path") from error
    except UnicodeDecodeError as error:
        raise DataError("data.not_utf8", f"{source}: not UTF-8 (byte {error.start})") from None
    name = "stdin" if source == "-" else Path(source).name
    numbered = [(f"{name}:{number}", line.rstrip("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise DataError("data.no_rows", f"{name}: no prompts", hint="one per line")
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
                    "data.invalid_row", f"{where}: {error}", hint="fix the row, or skip such rows with --skip-bad-rows"
                ) from None
            listener(Warned(f"skipped {where}: {error}"))
    if not rows:
        raise DataError("data.no_rows", f"{name}: {all_are(len(numbered), 'row')} broken")
    return rows


def exact_texts(rows: list[Row], ids: list[np.ndarray], encoder: Encoder, listener: Listener) -> list[str]:
    """Return each prompt as text that has the same tokens as the exact prompt of a row.

    A chat template adds the beginning-of-sequence token itself, while the encoder adds it to an exact prompt. Rows of
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
        listener(Warned(f"{inexact:,} chat prompts cannot be written as text with the same tokens"))
    return texts
