"""Texts → token ids as they are, and the special tokens a tokenizer would put around them.

Loads no torch, so that rows can be tokenised before it is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from distillm_cli.data.rows import Row
from distillm_cli.data.templates import form_of, render

CHUNK = 500  # rows tokenised in one call


@dataclass(frozen=True, slots=True)
class BareIds:
    """What a tokenizer makes of the texts of some rows, int32: no special tokens around them, nothing cut."""

    prompts: list[np.ndarray]
    responses: list[np.ndarray]


def bare_ids(rows: SequenceOf[Row], template: str, tokenizer: Any) -> BareIds:
    """Of each row's prompt and first reference. tokenizer: transformers', or the bare rules (``tokenizers.Tokenizer``).

    Raises as ``render`` does.
    """
    ids = _ids(tokenizer, [*_rendered(rows, template, tokenizer), *(row.references[0] for row in rows)])
    return BareIds(ids[: len(rows)], ids[len(rows) :])


def chunks(sources: Iterable[SequenceOf[Row]]) -> Iterator[tuple[SequenceOf[Row], int]]:
    """All rows of some sources in the order in which they are tokenised: a source, and where a chunk of it begins."""
    return ((rows, at) for rows in sources for at in range(0, len(rows), CHUNK))


def prompt_ids(rows: SequenceOf[Row], template: str, tokenizer: Any) -> list[np.ndarray]:
    """Of each row's prompt, int32. Raises as ``render`` does."""
    return _ids(tokenizer, _rendered(rows, template, tokenizer))


def _rendered(rows: SequenceOf[Row], template: str, tokenizer: Any) -> list[str]:
    return [render(row, template, tokenizer) for row in rows]


def _ids(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    if not texts:
        return []
    if isinstance(tokenizer, Tokenizer):
        made = (encoded.ids for encoded in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    else:
        # verbose=False: the tokenizer would warn of its own length limit, which is not the one that counts here.
        made = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [np.array(ids, dtype=np.int32) for ids in made]


def rules_for(sources: Iterable[SequenceOf[Row]], template: str, find: Callable[[], Path | None]) -> Tokenizer | None:
    """The rules in the ``tokenizer.json`` that is found, None where none is or where they are not enough for these rows."""
    file = find()
    # Chat templates are transformers' own.
    if file is None or any(form_of(row, template) == "chat" for rows in sources for row in rows):
        return None
    rules = Tokenizer.from_file(str(file))
    rules.no_truncation()
    rules.no_padding()
    return rules


_NOT_OF_IDS = ("post_processor", "truncation", "padding")  # of a tokenizer.json: what bare ids do not depend on
_PROBES = (
    "The quick brown fox.",
    "  Two blanks,\na line\tand a tab: 1,234.5 \u20ac \u00e9\u4e2d\U0001f600 </s><|endoftext|>",
)


def same_rules(rules: str, tokenizer: Any) -> bool:
    """Whether transformers' tokenizer makes the bare ids of a text by these very rules (``Tokenizer.to_str``).

    It need not, of the same tokenizer.json: classes of some families mend what they read, or build it anew.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # encode_special_tokens: the one setting that is not part of the text (split_special_tokens, in transformers).
    if not isinstance(backend, Tokenizer) or backend.encode_special_tokens:
        return False
    if rules != (theirs := backend.to_str()):
        left, right = (json.loads(text) for text in (rules, theirs))
        if any(left.get(key) != right.get(key) for key in {*left, *right} if key not in _NOT_OF_IDS):
            return False
    # Its class may have a way of its own around them. It is asked first: it takes its file's limit of length off them.
    texts = [*_PROBES, " ".join(tokenizer.all_special_tokens)]
    return all(map(np.array_equal, _ids(tokenizer, texts), _ids(backend, texts)))


Ends = tuple[list[int], list[int]]


def find_ends(tokenizer: Any) -> Ends:
    """The special tokens that a tokenizer puts before a text, and those it puts after one."""
    for probe in ("a", "1", ".", "the"):
        bare = _ids(tokenizer, [probe])[0].tolist()
        if bare:
            full = tokenizer(probe)["input_ids"]
            starts = (at for at in range(len(full)) if full[at : at + len(bare)] == bare)
            at = next(starts, None)
            return ([], []) if at is None else (full[:at], full[at + len(bare) :])
    return [token for token in tokenizer("")["input_ids"] if token != tokenizer.eos_token_id], []
