"""Turn texts into token ids: prompt and response tokenized together and then cut, as transformers tokenizes the whole text.

Loads no torch, so that rows can be tokenized before it is imported.
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
from distillm_cli.data.rows import Row
from distillm_cli.data.templates import Renderer
from distillm_cli.errors import DataError

CHUNK = 500  # rows tokenized in one call


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Hold the ids of one example, int32, without special tokens around it.

    prompt, response: the whole text's ids, cut where the response begins. turns: indices of the prompt's ids that belong
    to earlier answers. moved: a token spanned the end of the prompt and went to the response.
    """

    prompt: np.ndarray
    response: np.ndarray
    turns: np.ndarray | None = None
    moved: bool = False


def token_ids(texts: SequenceOf[Text], tokenizer: Any, *, apart: bool = False, literal: bool = False) -> list[TokenIds]:
    """Tokenize examples. tokenizer: transformers', or the rules of its file (``tokenizers.Tokenizer``).

    apart: prompt and response are texts of their own, as an encoder-decoder has them; the response in the tokenizer's
    target mode. literal: special tokens written in a text are encoded as text.
    """
    if apart:
        prompts = ids_of([t.text[: t.cut] for t in texts], tokenizer, literal=literal)
        responses = ids_of([t.text[t.cut : t.end] for t in texts], tokenizer, literal=literal, target=True)
        return [TokenIds(*pair) for pair in zip(prompts, responses, strict=True)]
    found: dict[int, TokenIds] = {}
    together = [i for i, text in enumerate(texts) if not (MARK_START in text.text and text.is_chat)]
    encodings = _encodings([texts[i].text for i in together], tokenizer, literal)
    if encodings is None:
        found = {i: _cut_by_prefixes(texts[i], tokenizer, literal) for i in together}
    else:
        found = {i: _cut(texts[i], encoding) for i, encoding in zip(together, encodings, strict=True)}
        # Offsets are not exact at blanks: where they leave a doubt, the ids of the prompt alone decide.
        doubtful = [i for i in together if found[i].moved]
        prompts = ids_of([texts[i].text[: texts[i].cut] for i in doubtful], tokenizer, literal=literal)
        for i, prompt in zip(doubtful, prompts, strict=True):
            whole = np.concatenate((found[i].prompt, found[i].response))
            if np.array_equal(prompt, whole[: len(prompt)]):
                found[i] = TokenIds(prompt, whole[len(prompt) :], found[i].turns)
    return [found[i] if i in found else _cut_marked(text, tokenizer) for i, text in enumerate(texts)]


def ids_of(texts: list[str], tokenizer: Any, *, literal: bool = False, target: bool = False) -> list[np.ndarray]:
    """Tokenize texts without special tokens around them, nothing cut; int32. literal, target: as in ``token_ids``."""
    if not texts:
        return []
    if isinstance(tokenizer, Tokenizer):
        made = (encoded.ids for encoded in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    else:
        made = _called(texts, tokenizer, literal, target)["input_ids"]
    return [np.array(ids, dtype=np.int32) for ids in made]


def _called(texts: list[str], tokenizer: Any, literal: bool, target: bool = False) -> Any:
    # verbose=False: the tokenizer would warn of its own length limit, which is not the one that counts here.
    how = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    if literal:
        how["split_special_tokens"] = True
    return tokenizer(text_target=texts, **how) if target else tokenizer(texts, **how)


def _encodings(texts: list[str], tokenizer: Any, literal: bool) -> list[Encoding] | None:
    """Return encodings with offsets; None from a tokenizer that has none."""
    if not texts:
        return []
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.encode_batch(texts, add_special_tokens=False)
    return _called(texts, tokenizer, literal).encodings


def _cut(text: Text, encoding: Encoding) -> TokenIds:
    ids = np.array(encoding.ids, dtype=np.int32)
    cut, moved = _place(text.text, encoding, text.cut)
    end = len(ids) if text.end == len(text.text) else _place(text.text, encoding, text.end)[0]
    spans = [
        np.arange(_place(text.text, encoding, start)[0], _place(text.text, encoding, stop)[0], dtype=np.int32)
        for start, stop in text.turns
    ]
    return TokenIds(ids[:cut], ids[cut:end], _turns(spans, cut), moved)


def _turns(spans: list[np.ndarray], cut: int) -> np.ndarray | None:
    """Return indices in the prompt; the first token of all has no state that predicts it."""
    if not spans:
        return None
    turns = np.concatenate(spans)
    return turns[(turns > 0) & (turns < cut)]


def _place(text: str, encoding: Encoding, char: int) -> tuple[int, bool]:
    """Return the first token of the text from ``char`` on, and whether the offsets leave a doubt: a token that spans it,
    text without a token before it, or a token without a character."""
    at = char
    while at < len(text) and (index := encoding.char_to_token(at)) is None:
        at += 1
    index = len(encoding) if at >= len(text) else index
    first = index
    # Tokens of no character, such as the blank that SentencePiece puts before a word, belong to what follows.
    while index and encoding.token_to_chars(index - 1)[0] >= char:
        index -= 1
    spans = index < len(encoding) and encoding.token_to_chars(index)[0] < char
    ends_before = index > 0 and encoding.token_to_chars(index - 1)[1] < char
    return index, spans or ends_before or index < first


def _cut_by_prefixes(text: Text, tokenizer: Any, literal: bool) -> TokenIds:
    """Cut, for a tokenizer without offsets, where the ids of the prompt alone stop being those of the whole text."""

    def ids(part: str) -> np.ndarray:
        return ids_of([part], tokenizer, literal=literal)[0]

    whole = ids(text.text)

    def place(char: int) -> tuple[int, bool]:
        before = ids(text.text[:char])
        length = min(len(before), len(whole))
        differ = np.flatnonzero(before[:length] != whole[:length])
        return (int(differ[0]), True) if len(differ) else (length, length < len(before))

    cut, moved = place(text.cut)
    end = len(whole) if text.end == len(text.text) else place(text.end)[0]
    spans = [np.arange(place(start)[0], place(stop)[0], dtype=np.int32) for start, stop in text.turns]
    return TokenIds(whole[:cut], whole[cut:end], _turns(spans, cut), moved)


_MARKED = re.compile(f"{MARK_START}([^{MARK_START}{MARK_END}]*){MARK_END}|[{MARK_START}{MARK_END}]")


def _cut_marked(text: Text, tokenizer: Any) -> TokenIds:
    """Tokenize a chat whose marked control tokens people wrote: these are encoded as text, the template's are not.

    transformers does the same for whole chats (``sanitize_control_tokens``).
    """
    newline = ids_of(["\n"], tokenizer)[0]
    places = sorted({0, text.cut, text.end, *(char for span in text.turns for char in span)})
    ids: list[np.ndarray] = []
    at: dict[int, int] = {}
    for start, stop in zip(places, [*places[1:], text.end], strict=True):
        at[start] = sum(map(len, ids))
        for piece, is_text in _pieces(text.text[start:stop]):
            if ids or is_text:
                ids.append(_after_newline(piece, tokenizer, newline, is_text))
            else:
                ids.append(ids_of([piece], tokenizer)[0])
    whole = np.concatenate(ids) if ids else np.empty(0, dtype=np.int32)
    at.setdefault(text.end, len(whole))
    spans = [np.arange(at[start], at[stop], dtype=np.int32) for start, stop in text.turns]
    return TokenIds(whole[: at[text.cut]], whole[at[text.cut] : at[text.end]], _turns(spans, at[text.cut]))


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Return parts of a marked text without the marks, and whether each is a control token to encode as text."""
    at = 0
    for found in _MARKED.finditer(text):
        if found.start() > at:
            yield text[at : found.start()], False
        if found[1]:
            yield found[1], True
        at = found.end()
    if at < len(text):
        yield text[at:], False


def _after_newline(piece: str, tokenizer: Any, newline: np.ndarray, literal: bool) -> np.ndarray:
    """Return ids of a part of a text, without the blank that some tokenizers put before the first word of a text."""
    ids = ids_of(["\n" + piece], tokenizer, literal=literal)[0]
    if np.array_equal(ids[: len(newline)], newline):
        return ids[len(newline) :]
    return ids_of([piece], tokenizer, literal=literal)[0]


def rules_for(
    sources: Iterable[SequenceOf[Row]], renderer: Renderer, find: Callable[[], Path | None]
) -> Tokenizer | None:
    """Return the rules in the ``tokenizer.json`` that is found, None where none is or where they do not suffice.

    They do not for chat templates, which are transformers' own.
    """
    file = find()
    if file is None or any(renderer.form(row) == "chat" for rows in sources for row in rows):
        return None
    rules = Tokenizer.from_file(str(file))
    rules.no_truncation()
    rules.no_padding()
    return rules


_NOT_OF_IDS = (
    "post_processor",
    "truncation",
    "padding",
)  # of a tokenizer.json: what ids without special tokens need not
_PROBES = (
    "The quick brown fox.",
    "  Two blanks,\na line\tand a tab: 1,234.5 \u20ac \u00e9\u4e2d\U0001f600 </s><|endoftext|>",
)


def same_rules(rules: str, tokenizer: Any) -> bool:
    """Return whether transformers' tokenizer makes the ids of a text by these very rules (``Tokenizer.to_str``).

    It need not, from the same tokenizer.json: classes of some families change what they read, or build it again.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # encode_special_tokens: the one setting that is not part of the text (split_special_tokens, in transformers).
    if not isinstance(backend, Tokenizer) or backend.encode_special_tokens:
        return False
    if rules != (theirs := backend.to_str()):
        left, right = (json.loads(text) for text in (rules, theirs))
        if any(left.get(key) != right.get(key) for key in {*left, *right} if key not in _NOT_OF_IDS):
            return False
    # Its class may have a way of its own around them. It runs first: it takes its file's limit of length off them.
    texts = [*_PROBES, " ".join(tokenizer.all_special_tokens)]
    return all(map(np.array_equal, ids_of(texts, tokenizer), ids_of(texts, backend)))


@dataclass(frozen=True, slots=True)
class Affixes:
    """Hold the special tokens that a tokenizer puts before and after a text, and around a response in its target mode.

    The last two differ from the first two for encoder-decoders with language codes (NLLB).
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    target_before: tuple[int, ...] = ()
    target_after: tuple[int, ...] = ()


def find_affixes(tokenizer: Any) -> Affixes:
    """Return what a tokenizer puts around texts, found by tokenizing short ones with and without special tokens."""
    return Affixes(*_around(tokenizer, target=False), *_around(tokenizer, target=True))


def _around(tokenizer: Any, *, target: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    for probe in ("a", "1", ".", "the"):
        bare = ids_of([probe], tokenizer, target=target)[0].tolist()
        if bare:
            full = list(_with_special_tokens(probe, tokenizer, target))
            starts = (at for at in range(len(full)) if full[at : at + len(bare)] == bare)
            at = next(starts, None)
            return ((), ()) if at is None else (tuple(full[:at]), tuple(full[at + len(bare) :]))
    full = _with_special_tokens("", tokenizer, target)
    return tuple(token for token in full if token != tokenizer.eos_token_id), ()


def _with_special_tokens(text: str, tokenizer: Any, target: bool) -> list[int]:
    return (tokenizer(text_target=text) if target else tokenizer(text))["input_ids"]


def written_tokens(texts: Iterable[str], tokens: SequenceOf[str]) -> set[str]:
    """Return which of the tokens stand in some texts."""
    texts = list(texts)
    return {token for token in tokens if any(token in text for text in texts)}


def refused(row: Row, tokens: Iterable[str]) -> DataError:
    """Return the error for a row in which special tokens are written and ``data.special_tokens_in_text`` is refuse."""
    names = ", ".join(sorted(tokens))
    return DataError(
        f"{row.where}: special tokens in the text: {names}",
        hint="remove them, or choose --set data.special_tokens_in_text=text",
    )
