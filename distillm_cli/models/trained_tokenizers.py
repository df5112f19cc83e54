"""Train tokenizers on the data, for students that are built from scratch: ``bpe:SIZE``, ``chars``, ``words``.

All three are lossless: tokens are pieces of the text, spaces and newlines included, and decoding concatenates them. All
have ``<pad>``, ``<eos>`` and ``<unk>`` as tokens 0, 1 and 2.

``bpe:SIZE``  byte-level byte-pair encoding with at most SIZE tokens. Any text can be encoded.
``chars``     every character of the data is one token; other characters are ``<unk>``.
``words``     every frequent word is one token, other words are split into characters. For data in which some strings are
              symbols and others are read letter by letter, such as phonemes and words.

In ``words``, a text is split before each space and around each newline. A piece is a word with the space before it
(`` AH``), a word without one (at the start of a text or line: ``CH``), or a single white-space character. A piece in the
vocabulary is one token, other pieces have one token per character. Words are never split into parts, so a frequent
``on`` does not match the end of ``salon``. Thus ``CH AH M P`` is four tokens, and in ``Pronounce the word.⏎chump⏎`` the
instruction is three and ``chump`` five.

A piece is frequent if it occurs in at least 10 texts and in at least one text of a thousand. With fewer occurrences a
small model would hardly train the word's embedding. The second bound limits the vocabulary to a thousand times the
words of an average text. A word at the start of a text is also a token if the same word after a space is one, so that a
phoneme that rarely comes first is one symbol there. This does not apply to the start of a later line, where a prompt
shows the word to be read: ``the`` in the instruction is one token, ``the`` as the word in question is three.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distillm_cli.errors import DataError, UsageError
from distillm_cli.models.tokenizer_files import load_tokenizer, prepare_tokenizer

# Prompts and responses in turn; prompts as rendered by the chat template of this tokenizer (None: before it is
# trained).
TrainingTexts = Callable[[PreTrainedTokenizerBase | None], Iterator[str]]

SPECIAL = ("<pad>", "<eos>", "<unk>")
MIN_TEXTS = 10
MIN_SHARE = 1000  # one text in this many

_BYTES = pre_tokenizers.ByteLevel.alphabet()
SMALLEST_BPE = len(SPECIAL) + len(_BYTES)


def is_trained_spec(spec: str) -> bool:
    """Return whether ``spec`` requests a tokenizer trained on the data, rather than a directory or a hub name."""
    return spec in ("chars", "words") or spec == "bpe" or spec.startswith("bpe:")


def load_or_train_tokenizer(spec: str | None, texts: TrainingTexts | None) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of ``student.tokenizer``; None if it is unset, or needs texts and there are none."""
    if spec is None:
        return None
    if not is_trained_spec(spec):
        return load_tokenizer(spec)
    return None if texts is None else prepare_tokenizer(train_tokenizer(spec, texts(None)), spec)


def train_tokenizer(spec: str, texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train a tokenizer on ``texts`` by ``spec``: ``bpe:SIZE``, ``chars`` or ``words`` (see the module's docstring).

    texts: prompts and responses, as separate texts. The same texts give the same tokenizer. BPE may return fewer than
    SIZE tokens if the texts have too few pairs. Raises UsageError for an invalid spec or a SIZE below the 256 bytes and
    the special tokens, DataError without texts.
    """
    size = _bpe_size(spec)
    texts = _not_empty(texts)
    if spec == "chars":
        tokenizer = _character_tokenizer(texts, words=False)
    elif spec == "words":
        tokenizer = _character_tokenizer(texts, words=True)
    else:
        tokenizer = _bpe_tokenizer(texts, size)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        unk_token=SPECIAL[2],
        clean_up_tokenization_spaces=False,
        # "<eos>" written in a row is five characters, not the end of a response.
        split_special_tokens=True,
        model_input_names=["input_ids", "attention_mask"],
    )


def append_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    """Append end-of-sequence to texts that are tokenized with special tokens, as for the input of an encoder."""
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )


def _bpe_size(spec: str) -> int | None:
    """Return SIZE of ``bpe:SIZE``; None for the other schemes."""
    if spec in ("chars", "words"):
        return None
    match = re.fullmatch(r"bpe:([0-9]+)", spec)
    if match is None:
        raise UsageError(
            "usage.invalid_tokenizer",
            f"no tokenizer can be trained as {spec!r}",
            where="student.tokenizer",
            hint="expected bpe:SIZE (such as bpe:1000), chars or words",
        )
    if int(match[1]) < SMALLEST_BPE:
        raise UsageError(
            "usage.invalid_tokenizer",
            f"a vocabulary of {match[1]} is too small for byte-level BPE",
            where=f"student.tokenizer = {spec}",
            hint=f"the minimum is bpe:{SMALLEST_BPE}: {len(_BYTES)} bytes and {len(SPECIAL)} special tokens",
        )
    return int(match[1])


def _not_empty(texts: Iterable[str]) -> Iterator[str]:
    """Return the texts that are not empty. Raises DataError if there is none."""
    full = (text for text in texts if text)
    first = next(full, None)
    if first is None:
        raise DataError(
            "data.no_rows", "no text to train a tokenizer on", where="student.tokenizer", hint="are all rows empty?"
        )
    return chain([first], full)


def _bpe_tokenizer(texts: Iterator[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=_BYTES, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _character_tokenizer(texts: Iterator[str], *, words: bool) -> Tokenizer:
    """Return a tokenizer of characters and, with ``words``, of the frequent pieces."""
    # The first branch splits a special token's name that occurs in a text: pieces are looked up in a vocabulary that also
    # has the special tokens.
    names = "|".join(name.strip("<>") for name in SPECIAL)
    cut = pre_tokenizers.Split(Regex(rf"<(?=(?:{names})>)| ?\S+|\s"), behavior="isolated")
    characters: set[str] = set()
    holding: Counter[str] = Counter()  # piece → texts that hold it
    openings: set[str] = set()
    total = 0
    for text in texts:
        total += 1
        characters.update(text)
        if words:
            pieces = [piece for piece, _ in cut.pre_tokenize_str(text)]
            holding.update(set(pieces))
            openings.add(pieces[0])

    def frequent(piece: str) -> bool:
        return holding[piece] >= MIN_TEXTS and holding[piece] * MIN_SHARE >= total

    known = {piece for piece in holding if len(piece) > 1 and frequent(piece)}
    known |= {piece for piece in openings if len(piece) > 1 and frequent(" " + piece)}
    vocabulary = (*SPECIAL, *sorted(characters), *sorted(known))
    # BPE without merges splits into characters; ignore_merges uses a whole piece if it is in the vocabulary.
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(vocabulary)}, merges=[], unk_token=SPECIAL[2], ignore_merges=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def lost_features(own: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """Return the features that a model loses with another tokenizer, as the start of a sentence; None without a loss."""
    if own is other:
        return None
    tokens = sorted(own.get_vocab().keys() - other.get_vocab().keys())
    more = f" and {len(tokens) - 3} more" if len(tokens) > 3 else ""
    parts = [f"tokens {', '.join(tokens[:3])}{more}"] if tokens else []
    if own.chat_template is not None and own.chat_template != other.chat_template:
        parts.append("chat template")
    return f"{' and '.join(parts)} {'are' if tokens else 'is'}" if parts else None
