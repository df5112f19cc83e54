"""Store the token ids of training rows on disk, and map them in later runs with the same rows, tokenizer and settings."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from distillm_cli.data.batching import Examples, tokenize, tokenize_into
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.row_store import StoredRows
from distillm_cli.data.sources import Rows
from distillm_cli.data.store import fingerprint, key_of, mapped, open_or_make
from distillm_cli.errors import StorageError
from distillm_cli.training.events import Event, Listener, Note, Warned
from distillm_cli.types import PackedSequences, SequencePacker
from distillm_cli.utils.storage import cache_root, known_sha256
from distillm_cli.utils.text import counted

_IDS = "ids.bin"  # int32: prompt and response of each sequence
_TURNS = "turns.bin"  # int32: supervised tokens of prompts
_SIZES = "sizes.bin"  # int32 [S, 3]: tokens of prompt and response, and turns
_KEPT = "kept.bin"  # int64: indices of the rows that became sequences
_EVENTS = {"note": Note, "warning": Warned}
# Fields of ``data`` that do not change the token ids of given rows.
_OTHER_FIELDS = {
    "source", "sources", "valid", "limit", "valid_limit", "teacher_samples", "size", "tasks", "seed", "columns",
    "bucket", "mixup", "workers", "store", "store_dir", "tools", "documents",
}  # fmt: skip


def open_tokens(rows: Rows, encoder: Encoder, listener: Listener, context: int | None) -> Examples:
    """Return the examples of stored rows, as ``tokenize`` does, with its notes. They are tokenized first if need be."""
    assert isinstance(rows.rows, StoredRows)
    key = key_of("tokens", rows.rows.digest, str(rows), _encoder_key(encoder), context)

    def make(directory: Path) -> dict[str, Any]:
        events: list[tuple[str, str]] = []

        def record(event: Event) -> None:
            kind = next((kind for kind, cls in _EVENTS.items() if isinstance(event, cls)), None)
            if kind is None:
                listener(event)
            else:
                events.append((kind, event.text))

        with (directory / _IDS).open("wb") as ids, (directory / _TURNS).open("wb") as turns:
            packer = SequencePacker(ids, turns)
            found = tokenize_into(packer, rows, encoder, encoder.data, record, context)
        (directory / _SIZES).write_bytes(packer.sizes_S3.tobytes())
        (directory / _KEPT).write_bytes(found.kept.tobytes())
        facts = found.facts()
        facts["end_ids"] = sorted(facts["end_ids"])
        return {"digest": packer.digest, "events": events, "examples": facts}

    root = cache_root("rows", encoder.data.store_dir)
    what = f"token ids of {counted(len(rows), 'row')}"
    try:
        store = open_or_make(root, "tokens", key, make, listener, what=what)
    except StorageError as error:
        if encoder.data.store == "on":
            raise
        listener(Warned(f"{error.what}: tokenizing into memory (data.store auto)"))
        return tokenize(rows, encoder, encoder.data, listener, context)
    for kind, text in store.facts["events"]:
        listener(_EVENTS[kind](text))
    place = store.directory
    sizes_S3 = mapped(place / _SIZES, np.int32).reshape(-1, 3)
    sequences = PackedSequences(
        mapped(place / _IDS, np.int32), sizes_S3, mapped(place / _TURNS, np.int32), store.facts["digest"]
    )
    facts = store.facts["examples"]
    facts = facts | {"end_ids": set(facts["end_ids"])}
    return Examples(sequences, rows.rows.pick(mapped(place / _KEPT, np.int64)), **facts)


def _encoder_key(encoder: Encoder) -> str:
    """Return a digest of everything in an encoder that token ids depend on: its settings and its tokenizer's files."""
    data = encoder.data
    files = {
        name: known_sha256(Path(path).expanduser()) for name in ("tools", "documents") if (path := getattr(data, name))
    }
    with tempfile.TemporaryDirectory(prefix="distillm-") as directory:
        encoder.tokenizer.save_pretrained(directory)
        tokenizer = fingerprint(sorted(path for path in Path(directory).rglob("*") if path.is_file()))
    described = [
        data.model_dump(mode="json", exclude=_OTHER_FIELDS),
        files,
        type(encoder.tokenizer).__qualname__,
        tokenizer,
        sorted(encoder.stops),
        encoder.end_id,
        encoder.is_encoder_decoder,
        encoder.needs_responses,
        str(encoder.affixes),
    ]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
