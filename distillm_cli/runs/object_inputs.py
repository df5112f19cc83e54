"""Save models, tokenizers and rows that are passed as objects, so that a run reads them like other files.

A name ends with a digest of the content, so an object has one copy in a directory for all runs, and a run that is
resumed with the same objects finds the paths of its recipe.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distillm_cli.errors import DataError, UsageError
from distillm_cli.training.distributed import in_first_process
from distillm_cli.utils.storage import atomic_directory, flush, staging_directory, storing

_DIGEST_LENGTH = 12  # characters of a name
_HINT = "free disk space, or choose another --output"
# Settings of a config that depend on how and by which version it was saved.
_VOLATILE = ("architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path")


def is_model(value: Any) -> bool:
    """Return whether a value is a model object, or a pair of a model and its tokenizer."""
    model = value[0] if isinstance(value, tuple) and len(value) == 2 else value
    return hasattr(model, "save_pretrained") and hasattr(model, "state_dict")


def is_tokenizer(value: Any) -> bool:
    """Return whether a value is a tokenizer object."""
    return hasattr(value, "save_pretrained") and not hasattr(value, "state_dict")


def is_rows(value: Any) -> bool:
    """Return whether a value holds rows: a data set, a data set with splits, or a list of mappings."""
    if hasattr(value, "column_names"):
        return True
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(row, Mapping) for row in value)


@in_first_process
def save_model(directory: Path, value: Any, tokenizer: Any = None) -> Path:
    """Save a model and its tokenizer in a new directory in ``directory``, and return its path.

    value: a model, or a pair of a model and its tokenizer. tokenizer: for a model without one. The model is not
    changed. An existing copy is not written again. Raises StorageError, and UsageError without a tokenizer.
    """
    model, tokenizer = value if isinstance(value, tuple) else (value, tokenizer)
    if tokenizer is None:
        what = f"a {type(model).__name__} object without a tokenizer"
        raise UsageError("usage.no_tokenizer", what, hint="pass (model, tokenizer), or the keyword tokenizer")
    digest = hashlib.sha256(type(model).__name__.encode())
    for config in (model.config, getattr(model, "generation_config", None)):
        settings = {} if config is None else config.to_dict()
        lasting = {key: value for key, value in settings.items() if key not in _VOLATILE}
        digest.update(json.dumps(lasting, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor))
    digest.update(_tokenizer_digest(directory, tokenizer).encode())
    name = Path(getattr(model, "name_or_path", "")).name or model.config.model_type
    return _saved(directory / f"{name}-{digest.hexdigest()[:_DIGEST_LENGTH]}", [tokenizer, model])


@in_first_process
def save_tokenizer(directory: Path, tokenizer: Any) -> Path:
    """Save a tokenizer in a new directory in ``directory``, and return its path. Raises StorageError."""
    return _saved(directory / f"tokenizer-{_tokenizer_digest(directory, tokenizer)}", [tokenizer])


@in_first_process
def save_rows(directory: Path, rows: Any) -> Path:
    """Write rows to a JSON lines file in ``directory``, and return its path.

    rows: an iterable of mappings, or a mapping of splits to iterables, which becomes a directory with a file per split.
    Raises StorageError, and DataError for a row that is not JSON.
    """
    splits = dict(rows) if isinstance(rows, Mapping) else {"rows": rows}
    digest = hashlib.sha256()
    with _writing(directory), staging_directory(directory / "rows") as staged:
        for split, part in splits.items():
            digest.update(f"{split}\n".encode())
            path = staged / f"{split}.jsonl"
            with path.open("wb") as file:
                for line in _json_lines(part, split):
                    digest.update(line)
                    file.write(line)
            flush(path)
        final = directory / f"rows-{digest.hexdigest()[:_DIGEST_LENGTH]}"
        if not isinstance(rows, Mapping):
            final = final.with_suffix(".jsonl")
            path.replace(final)
        elif not final.is_dir():
            staged.rename(final)
    return final


def _json_lines(rows: Iterable[Any], name: str) -> Iterable[bytes]:
    for number, row in enumerate(rows, start=1):
        try:
            yield json.dumps(row, ensure_ascii=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            hint = "use texts, numbers, lists and mappings"
            raise DataError(
                "data.invalid_row", f"row {number} of {name} cannot be written as JSON ({error})", hint=hint
            ) from error


def _bytes_of(tensor: Any) -> Any:
    import torch

    return tensor.detach().flatten().view(torch.uint8).cpu().numpy().data


def _tokenizer_digest(directory: Path, tokenizer: Any) -> str:
    digest = hashlib.sha256()
    with _writing(directory), staging_directory(directory / "tokenizer") as staged:
        tokenizer.save_pretrained(staged)
        for path in sorted(staged.rglob("*")):
            if path.is_file():
                digest.update(path.relative_to(staged).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:_DIGEST_LENGTH]


def _saved(final: Path, parts: list[Any]) -> Path:
    """Return the directory, after saving the parts into it unless it exists."""
    from distillm_cli.models.tokenizer_files import quiet

    if not final.is_dir():
        with quiet(), _writing(final.parent), atomic_directory(final) as staged:
            for part in parts:
                part.save_pretrained(staged)
            for path in staged.rglob("*"):
                flush(path)
    return final


def _writing(directory: Path) -> Any:
    with storing(f"cannot write to {directory}", _HINT):
        directory.mkdir(parents=True, exist_ok=True)
    return storing(f"cannot write to {directory}", _HINT)
