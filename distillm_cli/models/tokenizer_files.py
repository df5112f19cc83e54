"""The tokenizer that a model brings along: found, read, made fit for supervision.

Imports no model class of transformers: reading a tokenizer need not wait for what loading weights takes to import.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distillm_cli.errors import DistillmError, ModelError, OutOfMemoryError, of_tokenizers, out_of_memory
from distillm_cli.models.places import adapters_of, cached, file_of, hub_is_there, locate
from distillm_cli.utils import manifest

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "*.model", "tekken.json")


_TRIED = "Hello, 1 é"  # some damages show only in use


@contextmanager
def quiet() -> Iterator[None]:
    """transformers and the hub say nothing below an error and draw no bars: stderr belongs to our own display."""
    loggings = (transformers.utils.logging, huggingface_hub.utils.logging)
    verbosities = [logging.get_verbosity() for logging in loggings]
    bars = transformers.utils.logging.is_progress_bar_enabled()
    for logging in loggings:
        logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging, verbosity in zip(loggings, verbosities, strict=True):
            logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def has_tokenizer(directory: Path) -> bool:
    return any(next(directory.glob(pattern), None) for pattern in _TOKENIZERS)


def load_tokenizer(path: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or a hub name. It has an end-of-sequence token, and a pad token (that one if none)."""
    name, local = locate(path)
    if local and not has_tokenizer(Path(name)):
        raise ModelError(f"{path} holds no tokenizer", hint="pass --tokenizer DIR, or bpe:SIZE, chars, words")
    if local:
        manifest.check_files(Path(name), weights=False)
    if local and _is_tekken(Path(name)) and importlib.util.find_spec("mistral_common") is None:
        raise _needs_package("tokenizer", path, "mistral-common")
    with quiet():
        try:
            tokenizer = _tokenizer_class(Path(name) if local else None).from_pretrained(
                name, revision=revision, local_files_only=local, trust_remote_code=False
            )
            tokenizer(_TRIED)
        except BaseException as error:
            if not (isinstance(error, Exception) or of_tokenizers(error)):
                raise
            raise not_loaded("tokenizer", path, local, error) from error
    if not local and (config := cached(name, "config.json", revision)) and not has_tokenizer(config.parent):
        # transformers makes an empty tokenizer of the family's kind where there are no files for one.
        raise ModelError(
            f"no files of a tokenizer for {path!r}", hint="pass --tokenizer DIR, or bpe:SIZE, chars, words"
        )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _template_of_processor(path, revision)
    for key in ("local_files_only", "is_local", "trust_remote_code"):  # how it was loaded is no part of what is saved
        tokenizer.init_kwargs.pop(key, None)
    return prepare_tokenizer(tokenizer, path)


def _template_of_processor(path: str, revision: str | None) -> str | None:
    """Return the chat template that a model with a processor has in a file of its own; None where it has none.

    Mistral 3 and SmolVLM2 have it there alone, where transformers reads it for a processor and not for a tokenizer.
    """
    file = file_of(path, "chat_template.json", revision)
    if file is None:
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot read {file}: {error}", hint="copy or download the file again") from error


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, where: str) -> PreTrainedTokenizerBase:
    """Checks for an end-of-sequence token and arranges a pad token: supervision goes by position, so it may be the same."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token, so no response could end",
            where=where,
            hint="name one in its tokenizer_config.json: eos_token",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def own_tokenizer(path: str, revision: str | None) -> PreTrainedTokenizerBase:
    """A model's; an adapter's where it brings one, else that of the model it belongs to."""
    adapters, base, base_revision = adapters_of(path, revision)
    for place in adapters:
        if place.local and has_tokenizer(Path(place.name)):
            return load_tokenizer(place.name)
        if not place.local:
            try:
                return load_tokenizer(place.name, revision=place.revision)
            except ModelError:  # it has none, or none is to be had from the hub
                continue
    return load_tokenizer(base, revision=base_revision)


class OwnTokenizers:
    """The tokenizers that a run's models bring along, each read once.

    Where two local directories hold the same one, as those of a teacher and its student mostly do, it is one object. What
    could not be read is refused again whenever it is asked for.
    """

    def __init__(self):
        self._read: dict[tuple[str, str | None], PreTrainedTokenizerBase | ModelError] = {}
        self._by_files: dict[str, PreTrainedTokenizerBase] = {}

    def of(self, path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
        """A model's, as ``own_tokenizer`` reads it. Raises ModelError."""
        if (path, revision) not in self._read:
            try:
                self._read[path, revision] = self._first(path, revision)
            except ModelError as error:
                self._read[path, revision] = error
        found = self._read[path, revision]
        if isinstance(found, ModelError):
            raise found
        return found

    def _first(self, path: str, revision: str | None) -> PreTrainedTokenizerBase:
        name, local = locate(path)
        files = _files_digest(Path(name)) if local and not adapters_of(path)[0] else None
        if files is None:
            return own_tokenizer(path, revision)
        if files not in self._by_files:
            self._by_files[files] = own_tokenizer(path, revision)
        return self._by_files[files]


# Of a model directory: what no tokenizer is read from. Any other file may be, by the class.
_NO_TOKENIZER = (*WEIGHTS, "config.json", "generation_config.json", "manifest.json", "*.md", "*.yaml", "*.jsonl")
# What transformers looks at in a model's config to choose a tokenizer's class, or to mend what the class got wrong.
_OF_CONFIG = ("model_type", "tokenizer_class", "transformers_version", "auto_map")


def _files_digest(directory: Path) -> str | None:
    """SHA-256 of all that decides a local directory's tokenizer; None where that cannot be told."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        digest = hashlib.sha256(json.dumps([config.get(key) for key in _OF_CONFIG]).encode())
        for file in sorted([*directory.glob("*"), *directory.glob("additional_chat_templates/*")]):
            if file.is_file() and not any(file.match(pattern) for pattern in _NO_TOKENIZER):
                found = file.read_bytes()
                digest.update(f"\n{file.relative_to(directory)} {len(found)}\n".encode())
                digest.update(found)
    except (OSError, ValueError, AttributeError):
        return None
    return digest.hexdigest()


def _tokenizer_class(directory: Path | None) -> Any:
    """AutoTokenizer lets the model's family overrule the class that the files name; a plain tokenizer.json stays itself."""
    if directory is None or not (directory / "tokenizer.json").is_file():
        return AutoTokenizer
    declared = transformers.models.auto.tokenization_auto.get_tokenizer_config(str(directory), local_files_only=True)
    plain = declared.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    return PreTrainedTokenizerFast if plain else AutoTokenizer


def _is_tekken(directory: Path) -> bool:
    """Return whether a directory's only tokenizer is Mistral's tekken.json."""
    others = [pattern for pattern in _TOKENIZERS if pattern not in ("tekken.json", "tokenizer_config.json")]
    return (directory / "tekken.json").is_file() and not any(next(directory.glob(other), None) for other in others)


def _needs_package(part: str, path: str, package: str) -> ModelError:
    return ModelError(f"the {part} of {path} needs the package {package}", hint=f"pip install {package}")


_NEEDS = re.compile(r"requires the ([\w-]+) library but it was not found")  # as transformers words it


def not_loaded(part: str, path: str, local: bool, error: BaseException) -> DistillmError:
    """What to tell of a part of a model (config, tokenizer, weights) that transformers could not read."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")
    if out_of_memory(error):
        hint = "close other programs, or choose a smaller model; `distillm plan` estimates the need"
        return OutOfMemoryError(f"out of memory while reading the {part} of {path}", where=said, hint=hint)
    if package := _NEEDS.search(str(error)):  # tekken.json, for example
        return _needs_package(part, path, package[1])
    if local:
        if isinstance(error, SafetensorError):
            said, hint = f"damaged or incomplete safetensors file ({said})", "copy or download the files again"
        else:
            hint = "the directory must be a model that this version of transformers knows"
        return ModelError(f"cannot read the {part} of {path}: {said}", hint=hint)
    hint = "pass a local directory, or check the spelling"
    if os.environ.get("HF_HUB_OFFLINE") and huggingface_hub.constants.HF_HUB_OFFLINE:
        said, hint = "HF_HUB_OFFLINE is set and it is not in the cache", f"{hint}, or unset HF_HUB_OFFLINE"
    elif not hub_is_there():
        said = f"{huggingface_hub.constants.ENDPOINT} cannot be reached, and it is not in the cache"
    return ModelError(f"cannot find {path!r}: no such directory here, and not from the hub: {said}", hint=hint)
