"""Check that a tokenizer gives the same tokens after it was saved, and as the SentencePiece file it was read from."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distillm_cli.errors import ModelError
from distillm_cli.models.places import adapters_of, locate
from distillm_cli.models.tokenizer_files import quiet

if TYPE_CHECKING:
    from distillm_cli.models.backbone import Backbone

_PROBE = "Which of these 12 words, in 3 lines,\n is a  Word?"
_PROBES = (_PROBE, "  Grüße aus Köln: 世界, 42 %.", "def f(x):\n\treturn x ** 2")
_SENTENCEPIECE = "tokenizer.model"  # as Llama and Mistral call it


def check_reload(student: Backbone, *, borrowed: bool, text: str | None = None) -> None:
    """Check that the output directory will give this very tokenizer to `AutoTokenizer`.

    transformers picks the tokenizer's class by the model's family for some of them (Qwen2's, say), whatever was saved: a
    tokenizer that such a model was not trained with may come back cutting text in other places. borrowed: whether the
    tokenizer is another model's, or trained here. text: one more probe. Raises ModelError.
    """
    ours, family = student.tokenizer, student.model.config.model_type
    probes = [probe for probe in (*_PROBES, text) if probe]
    with TemporaryDirectory() as directory, quiet():
        student.model.config.save_pretrained(directory)
        ours.save_pretrained(directory)
        try:
            again = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            same = all(ours(probe)["input_ids"] == again(probe)["input_ids"] for probe in probes)
            same = same and (not borrowed or ours.get_vocab() == again.get_vocab())
        except Exception:  # whatever a family's tokenizer stumbles over, it is not ours that came back
            same = False
    if same:
        return
    if borrowed:
        raise ModelError(
            f"a {family} model's directory is read with {family}'s own kind of tokenizer, which this one is not",
            where="student.tokenizer",
            hint="take another family, for example --student random:llama:4x256, or a tokenizer of the family",
        )
    raise ModelError(
        f"this {family} model's tokenizer gives other token ids once transformers has saved it and read it back",
        where="the output directory would have another tokenizer than the run",
        hint="give the model's directory a tokenizer.json that transformers saves and reads back, or pass --tokenizer DIR",
    )


def differs_from_file(path: str, revision: str | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return what is wrong with a tokenizer that transformers converted from a SentencePiece file; None for nothing.

    The conversion can lose the space that the file puts before a text, for example: a model that was trained on the file's
    tokens is then given others. Looked at in local directories that have such a file and no tokenizer.json. Text is
    compared by tokens and not by ids, since families may number them otherwise.
    """
    _, base, _ = adapters_of(path, revision)
    name, local = locate(base)
    file = Path(name) / _SENTENCEPIECE
    if not local or not file.is_file() or (Path(name) / "tokenizer.json").is_file():
        return None
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError):  # another format of this name, tiktoken's for example
        return None
    expected, found = pieces.encode(_PROBE, out_type=str), tokenizer.tokenize(_PROBE)
    if expected == found:
        return None
    at = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), 0)
    return (
        f"transformers reads {file} otherwise than SentencePiece does: of a probe text token {at} is {found[at]!r}, not "
        f"{expected[at]!r}; a model trained on the file's own tokens needs a tokenizer.json beside it"
    )
