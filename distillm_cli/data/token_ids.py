"""Convert texts to token ids: tokenize prompt and response as one text, then split it.

The ids are those of transformers' tokenizer for the whole text. Does not import torch, so that rows can be tokenized
first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from distillm_cli.data.chat import MARK_END, MARK_START, Text
from distillm_cli.data.row_store import kinds_of
from distillm_cli.data.rows import Row
from distillm_cli.data.templates import Renderer
from distillm_cli.errors import DataError

CHUNK = 500  # rows tokenized in one call


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Hold the ids of one example, int32, without surrounding special tokens.

    prompt, response: the whole text's ids, cut where the response begins. turns: indices of the prompt's ids that belong
    to earlier answers. spans_prompt_end: a token spanned the end of the prompt and was assigned to the response.
    """

    prompt: np.ndarray
    response: np.ndarray
    turns: np.ndarray | None = None
    spans_prompt_end: bool = False


def token_ids(
    texts: SequenceOf[Text], tokenizer: Any, *, separate: bool = False, literal: bool = False
) -> list[TokenIds]:
    """Tokenize examples. tokenizer: transformers', or a ``tokenizers.Tokenizer`` loaded from its file.

    separate: prompt and response are two texts, as for an encoder-decoder; the response in the tokenizer's
    target mode. literal: special tokens in a text are encoded as text.
    """
    if separate:
        prompts = ids_of([t.text[: t.response_start] for t in texts], tokenizer, literal=literal)
        responses = ids_of(
            [t.text[t.response_start : t.response_end] for t in texts], tokenizer, literal=literal, target=True
        )
        return [TokenIds(*pair) for pair in zip(prompts, responses, strict=True)]
    found: dict[int, TokenIds] = {}
    unmarked = [i for i, text in enumerate(texts) if not (MARK_START in text.text and text.is_chat)]
    encodings = _encodings([texts[i].text for i in unmarked], tokenizer, literal)
    if encodings is None:
        found = {i: _cut_by_prefixes(texts[i], tokenizer, literal) for i in unmarked}
    else:
        found = {i: _cut_by_offsets(texts[i], encoding) for i, encoding in zip(unmarked, encodings, strict=True)}
        # Offsets are not exact at blanks: where they are ambiguous, the ids of the prompt alone decide.
        doubtful = [i for i in unmarked if found[i].spans_prompt_end]
        prompts = ids_of([texts[i].text[: texts[i].response_start] for i in doubtful], tokenizer, literal=literal)
        for i, prompt in zip(doubtful, prompts, strict=True):
            whole = np.concatenate((found[i].prompt, found[i].response))
            if np.array_equal(prompt, whole[: len(prompt)]):
                found[i] = TokenIds(prompt, whole[len(prompt) :], found[i].turns)
    return [found[i] if i in found else _cut_marked(text, tokenizer) for i, text in enumerate(texts)]


def ids_of(texts: list[str], tokenizer: Any, *, literal: bool = False, target: bool = False) -> list[np.ndarray]:
    """Tokenize whole texts without surrounding special tokens; int32. literal, target: as in ``token_ids``."""
    if not texts:
        return []
    if isinstance(tokenizer, Tokenizer):
        batch = (encoded.ids for encoded in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    else:
        batch = _call_tokenizer(texts, tokenizer, literal, target)["input_ids"]
    return [np.array(ids, dtype=np.int32) for ids in batch]


def _call_tokenizer(texts: list[str], tokenizer: Any, literal: bool, target: bool = False) -> Any:
    # verbose=False: no warning about the tokenizer's own length limit, which does not apply here.
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    if literal:
        options["split_special_tokens"] = True
    return tokenizer(text_target=texts, **options) if target else tokenizer(texts, **options)


def _encodings(texts: list[str], tokenizer: Any, literal: bool) -> list[Encoding] | None:
    """Return encodings with offsets; None from a tokenizer that has none."""
    if not texts:
        return []
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.encode_batch(texts, add_special_tokens=False)
    return _call_tokenizer(texts, tokenizer, literal).encodings


def _cut_by_offsets(text: Text, encoding: Encoding) -> TokenIds:
    ids = np.array(encoding.ids, dtype=np.int32)
    cut, spans_prompt_end = _token_at(text.text, encoding, text.response_start)
    end = len(ids) if text.response_end == len(text.text) else _token_at(text.text, encoding, text.response_end)[0]
    spans = [
        np.arange(_token_at(text.text, encoding, start)[0], _token_at(text.text, encoding, stop)[0], dtype=np.int32)
        for start, stop in text.turns
    ]
    return TokenIds(ids[:cut], ids[cut:end], _turn_indices(spans, cut), spans_prompt_end)


def _turn_indices(spans: list[np.ndarray], cut: int) -> np.ndarray | None:
    """Return the indices of turns in the prompt. No state predicts the first token of a text, so it is left out."""
    if not spans:
        return None
    turns = np.concatenate(spans)
    return turns[(turns > 0) & (turns < cut)]


def _token_at(text: str, encoding: Encoding, char: int) -> tuple[int, bool]:
    """Return the first token of the text from ``char`` on, and whether the offsets are ambiguous.

    They are ambiguous if a token spans ``char``, text before it has no token, or a token has no character.
    """
    position = char
    while position < len(text) and (index := encoding.char_to_token(position)) is None:
        position += 1
    index = len(encoding) if position >= len(text) else index
    first = index
    # Tokens without a character, such as the blank that SentencePiece puts before a word, belong to the text after them.
    while index and encoding.token_to_chars(index - 1)[0] >= char:
        index -= 1
    spans = index < len(encoding) and encoding.token_to_chars(index)[0] < char
    ends_before = index > 0 and encoding.token_to_chars(index - 1)[1] < char
    return index, spans or ends_before or index < first


def _cut_by_prefixes(text: Text, tokenizer: Any, literal: bool) -> TokenIds:
    """Cut where the ids of the prompt alone differ from those of the whole text, for a tokenizer without offsets."""

    def ids(part: str) -> np.ndarray:
        return ids_of([part], tokenizer, literal=literal)[0]

    whole = ids(text.text)

    def token_at(char: int) -> tuple[int, bool]:
        prefix = ids(text.text[:char])
        length = min(len(prefix), len(whole))
        differences = np.flatnonzero(prefix[:length] != whole[:length])
        return (int(differences[0]), True) if len(differences) else (length, length < len(prefix))

    cut, spans_prompt_end = token_at(text.response_start)
    end = len(whole) if text.response_end == len(text.text) else token_at(text.response_end)[0]
    spans = [np.arange(token_at(start)[0], token_at(stop)[0], dtype=np.int32) for start, stop in text.turns]
    return TokenIds(whole[:cut], whole[cut:end], _turn_indices(spans, cut), spans_prompt_end)


_MARKED = re.compile(f"{MARK_START}([^{MARK_START}{MARK_END}]*){MARK_END}|[{MARK_START}{MARK_END}]")


def _cut_marked(text: Text, tokenizer: Any) -> TokenIds:
    """Tokenize a chat in which control tokens in the row's own text are marked: these are encoded as text.

    transformers does the same for whole chats (``sanitize_control_tokens``).
    """
    newline = ids_of(["\n"], tokenizer)[0]
    boundaries = sorted({0, text.response_start, text.response_end, *(char for span in text.turns for char in span)})
    ids: list[np.ndarray] = []
    token_index: dict[int, int] = {}
    for start, stop in zip(boundaries, [*boundaries[1:], text.response_end], strict=True):
        token_index[start] = sum(map(len, ids))
        for piece, is_text in _pieces(text.text[start:stop]):
            if ids or is_text:
                ids.append(_after_newline(piece, tokenizer, newline, is_text))
            else:
                ids.append(ids_of([piece], tokenizer)[0])
    whole = np.concatenate(ids) if ids else np.empty(0, dtype=np.int32)
    token_index.setdefault(text.response_end, len(whole))
    spans = [np.arange(token_index[start], token_index[stop], dtype=np.int32) for start, stop in text.turns]
    cut = token_index[text.response_start]
    return TokenIds(whole[:cut], whole[cut : token_index[text.response_end]], _turn_indices(spans, cut))


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a marked text without the marks, each with whether it is a control token to encode as text."""
    position = 0
    for found in _MARKED.finditer(text):
        if found.start() > position:
            yield text[position : found.start()], False
        if found[1]:
            yield found[1], True
        position = found.end()
    if position < len(text):
        yield text[position:], False


def _after_newline(piece: str, tokenizer: Any, newline: np.ndarray, literal: bool) -> np.ndarray:
    """Return the ids of a part of a text, without the blank that some tokenizers put before the first word of a text."""
    ids = ids_of(["\n" + piece], tokenizer, literal=literal)[0]
    if np.array_equal(ids[: len(newline)], newline):
        return ids[len(newline) :]
    return ids_of([piece], tokenizer, literal=literal)[0]


def load_tokenizer_rules(
    sources: Iterable[SequenceOf[Row]], renderer: Renderer, find_file: Callable[[], Path | None]
) -> Tokenizer | None:
    """Load the tokenizer from the ``tokenizer.json`` that ``find_file`` returns, without transformers.

    Return None if there is no file, and for rows in a chat template, which needs transformers.
    """
    file = find_file()
    if file is None or any(renderer.form(row) == "chat" for rows in sources for row in kinds_of(rows)):
        return None
    rules = Tokenizer.from_file(str(file))
    rules.no_truncation()
    rules.no_padding()
    return rules


# Keys of a tokenizer.json that do not change ids without special tokens.
_IGNORED_KEYS = ("post_processor", "truncation", "padding")
_PROBES = (
    "The quick brown fox.",
    "  Two blanks,\na line\tand a tab: 1,234.5 \u20ac \u00e9\u4e2d\U0001f600 </s><|endoftext|>",
)


def has_same_rules(rules: str, tokenizer: Any) -> bool:
    """Return whether a tokenizer of transformers has the same rules (``Tokenizer.to_str``) and returns the same ids.

    The rules may differ even with the same tokenizer.json, since classes of some model families change them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # encode_special_tokens: the one setting that is not part of the text (split_special_tokens, in transformers).
    if not isinstance(backend, Tokenizer) or backend.encode_special_tokens:
        return False
    if rules != (backend_rules := backend.to_str()):
        left, right = (json.loads(text) for text in (rules, backend_rules))
        if any(left.get(key) != right.get(key) for key in {*left, *right} if key not in _IGNORED_KEYS):
            return False
    # The class may also change texts or ids. It is called first, since that removes the file's length limit.
    texts = [*_PROBES, " ".join(tokenizer.all_special_tokens)]
    return all(map(np.array_equal, ids_of(texts, tokenizer), ids_of(texts, backend)))


@dataclass(frozen=True, slots=True)
class Affixes:
    """Hold the special tokens that a tokenizer puts before and after a text, and around a response in its target mode.

    The last two differ from the first two for encoder-decoders with language codes (NLLB).
    """

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    target_prefix: tuple[int, ...] = ()
    target_suffix: tuple[int, ...] = ()


def find_affixes(tokenizer: Any) -> Affixes:
    """Find the special tokens that a tokenizer puts around texts, by tokenizing short texts with and without them."""
    return Affixes(*_find_affixes_of(tokenizer, target=False), *_find_affixes_of(tokenizer, target=True))


def _find_affixes_of(tokenizer: Any, *, target: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    for probe in ("a", "1", ".", "the"):
        bare = ids_of([probe], tokenizer, target=target)[0].tolist()
        if bare:
            full = list(_with_special_tokens(probe, tokenizer, target))
            starts = (i for i in range(len(full)) if full[i : i + len(bare)] == bare)
            start = next(starts, None)
            if start is None:
                return (), ()
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    full = _with_special_tokens("", tokenizer, target)
    return tuple(token for token in full if token != tokenizer.eos_token_id), ()


def _with_special_tokens(text: str, tokenizer: Any, target: bool) -> list[int]:
    return (tokenizer(text_target=text) if target else tokenizer(text))["input_ids"]


def written_tokens(texts: Iterable[str], tokens: SequenceOf[str]) -> set[str]:
    """Return the tokens that occur in the texts."""
    texts = list(texts)
    return {token for token in tokens if any(token in text for text in texts)}


def special_tokens_error(row: Row, tokens: Iterable[str]) -> DataError:
    """Return the error for a row with special tokens in its text if ``data.special_tokens_in_text`` is refuse."""
    names = ", ".join(sorted(tokens))
    return DataError(
        "data.special_tokens",
        f"{row.where}: special tokens in the text: {names}",
        hint="remove them, or choose --set data.special_tokens_in_text=text",
    )
