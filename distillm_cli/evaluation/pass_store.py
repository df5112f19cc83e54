"""Store the responses of a pass when it has ended, and read them back for the same model, prompts and settings.

    eval/dolly/t1/passes.json               a digest of model, prompts and sampling, and the passes with their checksums
    eval/dolly/t1/predictions-seed10.jsonl  the responses of a pass; ``save_results`` adds the scores

A pass is read back if the digest and the checksum of its file are unchanged. So an interrupted evaluation continues with
the next pass, and other metrics or further seeds need no response again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distillm_cli.config import schema
from distillm_cli.training.distributed import in_first_process
from distillm_cli.utils import manifest
from distillm_cli.utils.storage import atomic_write, storing

PASSES = "passes.json"
# Settings on which a response depends.
_SAMPLING = ("greedy", "temperature", "top_p", "top_k", "max_new_tokens", "no_repeat_ngram_size")


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """Hold a response without its scores. tokens: their number. entropy: their mean, nats; None from a server."""

    output: str
    tokens: int
    complete: bool
    entropy: float | None


@dataclass(frozen=True, slots=True)
class StoredPass:
    """Hold the responses of a pass, in the order of the rows, and the seconds of their generation."""

    responses: SequenceOf[StoredResponse]
    seconds: float


def predictions_file(name: str, kind: str = "predictions") -> str:
    """Return the name of the file with the responses of a pass: a seed, or a name without one such as ``greedy``."""
    return f"{kind}-{'seed' if name.isdigit() else ''}{name}.jsonl"


class PassStore:
    """Read and write the passes of one suite with one set of settings.

    about: identity of the model and of the prompts. reads: False to ignore the passes that are there.
    """

    def __init__(self, directory: Path, config: schema.EvalConfig, about: Mapping[str, Any], *, reads: bool = True):
        self.directory = directory
        settings = {name: getattr(config, name) for name in _SAMPLING}
        if config.greedy or config.temperature == 0:
            settings |= {"greedy": True, "temperature": 0.0, "top_p": 1.0, "top_k": 0}
        content = json.dumps([settings, about], sort_keys=True)
        self.key = hashlib.sha256(content.encode()).hexdigest()
        self._entries: dict[str, dict[str, Any]] = self._read() if reads else {}

    @in_first_process
    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads((self.directory / PASSES).read_text(encoding="utf-8"))
            return dict(found["passes"]) if found["key"] == self.key else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    @in_first_process
    def load(self, name: str, rows: int) -> StoredPass | None:
        """Return the responses of a pass to this number of rows; None if they are not stored or were changed."""
        entry = self._entries.get(name)
        try:
            content = (self.directory / predictions_file(name)).read_bytes()
        except OSError:
            return None
        if entry is None or hashlib.sha256(content).hexdigest() != entry["sha256"]:
            return None
        lines = [json.loads(line) for line in content.decode().splitlines()]
        if len(lines) != rows:
            return None
        fields = StoredResponse.__dataclass_fields__
        return StoredPass([StoredResponse(**{k: line[k] for k in fields}) for line in lines], entry["seconds"])

    @in_first_process
    def save(self, name: str, stored: StoredPass) -> None:
        """Write the responses of a pass. Raises StorageError."""
        file = predictions_file(name)
        lines = [json.dumps(asdict(response), ensure_ascii=False) + "\n" for response in stored.responses]
        text = "".join(lines)
        with storing(f"cannot write to {self.directory}", "choose another directory with --output"):
            self.directory.mkdir(parents=True, exist_ok=True)
            manifest.record(self.directory, [file])
            atomic_write(self.directory / file, text)
            digest = hashlib.sha256(text.encode()).hexdigest()
            self._entries[name] = {"seconds": stored.seconds, "sha256": digest}
            self._write_index()

    def update(self) -> None:
        """Write the checksums of the files that ``save_results`` has written in place of those of ``save``."""
        for name in list(self._entries):
            path = self.directory / predictions_file(name)
            if path.is_file():
                self._entries[name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                del self._entries[name]
        self._write_index()

    def _write_index(self) -> None:
        manifest.record(self.directory, [PASSES])
        content = {"key": self.key, "passes": self._entries}
        atomic_write(self.directory / PASSES, json.dumps(content, indent=1) + "\n")
