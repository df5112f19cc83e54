"""Load the tokenizer of a model, and check that it is the same after saving and loading.

Imports no model class of transformers, so that reading a tokenizer does not wait for these imports.
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
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import huggingface_hub
import transformers
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distillm_cli.errors import DistillmError, ModelError, OutOfMemoryError, is_tokenizer_failure, out_of_memory
from distillm_cli.models.model_families import PLAIN_TOKENIZER_CLASSES
from distillm_cli.models.model_paths import (
    adapter_chain,
    cached_hub_file,
    hub_is_reachable,
    locate_model,
    model_file,
)
from distillm_cli.utils import manifest

if TYPE_CHECKING:
    from distillm_cli.models.backbone import Backbone

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "*.model", "tekken.json")


_TRIAL_TEXT = "Hello, 1 é"  # some errors show only in use

_PROBE = "Which of these 12 words, in 3 lines,\n is a  Word?"
_PROBES = (_PROBE, "  Grüße aus Köln: 世界, 42 %.", "def f(x):\n\treturn x ** 2")
_SENTENCEPIECE_FILE = "tokenizer.model"  # name of SentencePiece files of Llama and Mistral


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and progress bars of transformers and the hub inside the block: stderr has our own display."""
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
    """Return whether a directory has a file that a tokenizer is read from."""
    return any(next(directory.glob(pattern), None) for pattern in _TOKENIZER_FILES)


def load_tokenizer(path: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a directory or a hub name.

    It has an end-of-sequence token, which is also the pad token if there is none.
    """
    return prepare_tokenizer(read_tokenizer(path, revision=revision), path)


def read_tokenizer(path: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a directory or a hub name as it is, also of an encoder."""
    name, local = locate_model(path)
    if local and not has_tokenizer(Path(name)):
        raise ModelError(
            "model.no_tokenizer", f"{path} has no tokenizer", hint="pass --tokenizer DIR, or bpe:SIZE, chars, words"
        )
    if local:
        manifest.check_files(Path(name), weights=False)
    if local and _is_tekken(Path(name)) and importlib.util.find_spec("mistral_common") is None:
        raise _missing_package("tokenizer", path, "mistral-common")
    with quiet():
        try:
            tokenizer = _tokenizer_class(Path(name) if local else None).from_pretrained(
                name, revision=revision, local_files_only=local, trust_remote_code=False
            )
            tokenizer(_TRIAL_TEXT)
        except BaseException as error:
            if not (isinstance(error, Exception) or is_tokenizer_failure(error)):
                raise
            raise load_error("tokenizer", path, local, error) from error
    if not local and (config := cached_hub_file(name, "config.json", revision)) and not has_tokenizer(config.parent):
        # Without files, transformers creates an empty tokenizer of the family.
        raise ModelError(
            "model.no_tokenizer",
            f"no tokenizer files for {path!r}",
            hint="pass --tokenizer DIR, or bpe:SIZE, chars, words",
        )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _template_of_processor(path, revision)
    for key in ("local_files_only", "is_local", "trust_remote_code"):  # arguments of loading, not saved
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def _template_of_processor(path: str, revision: str | None) -> str | None:
    """Return the chat template that a model with a processor has in a separate file; None without one.

    Mistral 3 and SmolVLM2 have it only there, and transformers reads it for a processor but not for a tokenizer.
    """
    file = model_file(path, "chat_template.json", revision)
    if file is None:
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            "model.unreadable", f"cannot read {file}: {error}", hint="copy or download the file again"
        ) from error


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, where: str) -> PreTrainedTokenizerBase:
    """Check for an end-of-sequence token, and use it as the pad token if there is none: supervision is by position."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "model.no_end_token",
            "the tokenizer has no end-of-sequence token, which responses need",
            where=where,
            hint="set eos_token in its tokenizer_config.json",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def own_tokenizer(path: str, revision: str | None) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; an adapter's if it has one, else that of its base model."""
    adapters, base, base_revision = adapter_chain(path, revision)
    for location in adapters:
        if location.local and has_tokenizer(Path(location.name)):
            return load_tokenizer(location.name)
        if not location.local:
            try:
                return load_tokenizer(location.name, revision=location.revision)
            except ModelError:  # it has none, or the hub has none
                continue
    return load_tokenizer(base, revision=base_revision)


class TokenizerCache:
    """Hold the tokenizers of a run's models, each read once.

    If two local directories have the same tokenizer, as teacher and student usually do, it is one object. A tokenizer
    that could not be read raises its error on every call.
    """

    def __init__(self):
        self._read: dict[tuple[str, str | None], PreTrainedTokenizerBase | ModelError] = {}
        self._by_files: dict[str, PreTrainedTokenizerBase] = {}

    def load(self, path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
        """Return a model's tokenizer, as ``own_tokenizer`` reads it. Raises ModelError."""
        if (path, revision) not in self._read:
            try:
                self._read[path, revision] = self._read_first(path, revision)
            except ModelError as error:
                self._read[path, revision] = error
        found = self._read[path, revision]
        if isinstance(found, ModelError):
            raise found
        return found

    def _read_first(self, path: str, revision: str | None) -> PreTrainedTokenizerBase:
        name, local = locate_model(path)
        files = _files_digest(Path(name)) if local and not adapter_chain(path)[0] else None
        if files is None:
            return own_tokenizer(path, revision)
        if files not in self._by_files:
            self._by_files[files] = own_tokenizer(path, revision)
        return self._by_files[files]


# Files of a model directory that no tokenizer class reads.
_NO_TOKENIZER = (*WEIGHT_FILES, "config.json", "generation_config.json", "manifest.json", "*.md", "*.yaml", "*.jsonl")
# Fields of a model's config by which transformers chooses a tokenizer's class, or corrects its behavior.
_CONFIG_FIELDS = ("model_type", "tokenizer_class", "transformers_version", "auto_map")


def _files_digest(directory: Path) -> str | None:
    """Return the SHA-256 of everything that determines a local directory's tokenizer; None if it cannot be read."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        digest = hashlib.sha256(json.dumps([config.get(key) for key in _CONFIG_FIELDS]).encode())
        for file in sorted([*directory.glob("*"), *directory.glob("additional_chat_templates/*")]):
            if file.is_file() and not any(file.match(pattern) for pattern in _NO_TOKENIZER):
                content = file.read_bytes()
                digest.update(f"\n{file.relative_to(directory)} {len(content)}\n".encode())
                digest.update(content)
    except (OSError, ValueError, AttributeError):
        return None
    return digest.hexdigest()


def _tokenizer_class(directory: Path | None) -> Any:
    """Return the class to load with. AutoTokenizer may replace the class in the files by the family's."""
    if directory is None or not (directory / "tokenizer.json").is_file():
        return AutoTokenizer
    declared = transformers.models.auto.tokenization_auto.get_tokenizer_config(str(directory), local_files_only=True)
    plain = declared.get("tokenizer_class") in PLAIN_TOKENIZER_CLASSES
    return PreTrainedTokenizerFast if plain else AutoTokenizer


def _is_tekken(directory: Path) -> bool:
    """Return whether a directory's only tokenizer is Mistral's tekken.json."""
    others = [pattern for pattern in _TOKENIZER_FILES if pattern not in ("tekken.json", "tokenizer_config.json")]
    return (directory / "tekken.json").is_file() and not any(next(directory.glob(other), None) for other in others)


def _missing_package(part: str, path: str, package: str) -> ModelError:
    return ModelError(
        "model.missing_package", f"the {part} of {path} needs the package {package}", hint=f"pip install {package}"
    )


_NEEDS = re.compile(r"requires the ([\w-]+) library but it was not found")  # message of transformers


def load_error(part: str, path: str, local: bool, error: BaseException) -> DistillmError:
    """Return the error for a part of a model (config, tokenizer, weights) that transformers could not read."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")
    if out_of_memory(error):
        hint = "close other programs, or choose a smaller model; `distillm plan` estimates the memory"
        return OutOfMemoryError(
            "memory.exhausted", f"out of memory while reading the {part} of {path}", where=reason, hint=hint
        )
    if package := _NEEDS.search(str(error)):  # tekken.json, for example
        return _missing_package(part, path, package[1])
    if local:
        if isinstance(error, SafetensorError):
            reason, hint = f"damaged or incomplete safetensors file ({reason})", "copy or download the files again"
        else:
            hint = "the directory must be a model that this version of transformers supports"
        return ModelError("model.unreadable", f"cannot read the {part} of {path}: {reason}", hint=hint)
    hint = "pass a local directory, or check the spelling"
    if os.environ.get("HF_HUB_OFFLINE") and huggingface_hub.constants.HF_HUB_OFFLINE:
        reason, hint = "it is not in the cache, and HF_HUB_OFFLINE is set", f"{hint}, or unset HF_HUB_OFFLINE"
    elif not hub_is_reachable():
        reason = f"it is not in the cache, and {huggingface_hub.constants.ENDPOINT} cannot be reached"
    return ModelError(
        "model.not_found",
        f"cannot find {path!r}: no such directory, and not available from the hub: {reason}",
        hint=hint,
    )


def check_reload(student: Backbone, *, is_borrowed: bool, text: str | None = None) -> None:
    """Check that `AutoTokenizer` loads the same tokenizer from the output directory.

    For some families (such as Qwen2), transformers chooses the tokenizer's class by the model's family and ignores the
    saved one, so another model's tokenizer may split text differently after loading. is_borrowed: whether the tokenizer
    is another model's, or trained here. text: an additional probe. Raises ModelError.
    """
    ours = student.tokenizer
    family = student.model.config.model_type
    probes = [probe for probe in (*_PROBES, text) if probe]
    with TemporaryDirectory() as directory, quiet():
        student.model.config.save_pretrained(directory)
        ours.save_pretrained(directory)
        try:
            reloaded = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            same = all(ours(probe)["input_ids"] == reloaded(probe)["input_ids"] for probe in probes)
            same = same and (not is_borrowed or ours.get_vocab() == reloaded.get_vocab())
        except Exception:  # an error of any type: the saved tokenizer cannot be loaded
            same = False
    if same:
        return
    if is_borrowed:
        raise ModelError(
            "model.tokenizer_not_kept",
            f"a {family} model's directory is always loaded with {family}'s own tokenizer class, which differs from "
            "this tokenizer's",
            where="student.tokenizer",
            hint="choose another family, for example --student random:llama:4x256, or a tokenizer of the family",
        )
    raise ModelError(
        "model.tokenizer_not_kept",
        f"this {family} model's tokenizer returns different token ids after saving and loading with transformers",
        where="the tokenizer of the output directory would differ from the run's",
        hint="add a tokenizer.json to the model's directory that transformers saves and loads correctly, or pass "
        "--tokenizer DIR",
    )


def sentencepiece_difference(path: str, revision: str | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Describe the error of a tokenizer that transformers converted from a SentencePiece file; None if it is correct.

    For example, the conversion can lose the space that the file adds before a text, so that the model gets other tokens
    than in training. Checked in local directories with such a file and no tokenizer.json. Tokens are compared, not ids,
    since families may number them differently.
    """
    _, base, _ = adapter_chain(path, revision)
    name, local = locate_model(base)
    file = Path(name) / _SENTENCEPIECE_FILE
    if not local or not file.is_file() or (Path(name) / "tokenizer.json").is_file():
        return None
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError):  # another format of this name, tiktoken's for example
        return None
    expected = pieces.encode(_PROBE, out_type=str)
    found = tokenizer.tokenize(_PROBE)
    if expected == found:
        return None
    index = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), 0)
    return (
        f"transformers reads {file} differently from SentencePiece: token {index} of a probe text is {found[index]!r}, not "
        f"{expected[index]!r}; a model trained on the file's own tokens needs a tokenizer.json next to it"
    )
