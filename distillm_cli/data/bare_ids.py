"""Texts → token ids as they are, and the special tokens a tokenizer would put around them.

Loads no torch, so that rows can be tokenised before it is there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from distillm_cli.data.rows import Row
from distillm_cli.data.templates import render


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


_NOT_OF_IDS = ("post_processor", "truncation", "padding")  # of a tokenizer.json: what bare ids do not depend on
_PROBES = (
    "The quick brown fox.",
    "  Two blanks,\na line\tand a tab: 1,234.5 \u20ac \u00e9\u4e2d\U0001f600 </s><|endoftext|>",
)


def same_rules(rules: Tokenizer, tokenizer: Any) -> bool:
    """Whether transformers' tokenizer makes the bare ids of a text by these very rules.

    It need not, of the same tokenizer.json: classes of some families mend what they read, or build it anew.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return False
    if (ours := rules.to_str()) != (theirs := backend.to_str()):
        left, right = (json.loads(text) for text in (ours, theirs))
        if any(left.get(key) != right.get(key) for key in {*left, *right} if key not in _NOT_OF_IDS):
            return False
    # Its class may have a way of its own around them, or a setting that is not among them (split_special_tokens).
    texts = [*_PROBES, " ".join(tokenizer.all_special_tokens)]
    return all(map(np.array_equal, _ids(rules, texts), _ids(tokenizer, texts)))


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
