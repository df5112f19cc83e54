"""Rows → token ids: prompts with the special tokens around them, responses that end, nothing too long."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np

from distillm_cli.config.schema import Data
from distillm_cli.data.bare_ids import BareIds, Ends, bare_ids, find_ends, prompt_ids
from distillm_cli.data.rows import Row
from distillm_cli.data.templates import form_of
from distillm_cli.errors import DataError, ModelError
from distillm_cli.sequences import Sequence


@dataclass(frozen=True, slots=True)
class TooLong:
    """A row that was left out: its lengths and the limit it is over, in tokens. part: "prompt" or "row"."""

    where: str
    prompt: int
    response: int
    limit: int
    part: str


class Encoder:
    """Rows → token ids, the same way for training, generation and scoring.

    The prompt starts with whatever the tokenizer puts first (a beginning-of-sequence token, for some), except where a
    chat template wrote that already, and never ends with what it puts last. The response ends with end-of-sequence,
    unless it was cut. Can be pickled, tokenizer included.

    is_encoder_decoder: prompt and response are texts of their own. The prompt ends with whatever the tokenizer puts last,
    end-of-sequence at least, as T5's encoder knows it; the response starts with whatever the tokenizer puts first.
    ends: the tokenizer's, where they have been found.
    """

    def __init__(self, tokenizer: Any, data: Data, *, is_encoder_decoder: bool = False, ends: Ends | None = None):
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no end-of-sequence token",
                where=getattr(tokenizer, "name_or_path", None) or None,
                hint="name one as eos_token in its tokenizer_config.json",
            )
        self.tokenizer, self.data = tokenizer, data
        self.template = data.template
        self.max_length, self.max_prompt_length, self.too_long = data.max_length, data.max_prompt_length, data.too_long
        self.eos: int = tokenizer.eos_token_id
        self.is_encoder_decoder = is_encoder_decoder
        self._ends = start, end = ends or find_ends(tokenizer)
        self._start = np.array(start, dtype=np.int32)
        self._end = np.array((end or [self.eos]) if is_encoder_decoder else [], dtype=np.int32)

    def under(self, **changes: Any) -> Encoder:
        """One for the same model, whose rows are read by other fields of ``data``."""
        data = self.data.model_copy(update=changes)
        return Encoder(self.tokenizer, data, is_encoder_decoder=self.is_encoder_decoder, ends=self._ends)

    def prompt_ids(self, row: Row, limit: int | None = None) -> np.ndarray:
        """The prompt's ids, int32, at least one. limit: the model's context; DataError when the prompt is longer."""
        return self.prompts([row], limit)[0]

    def prompts(self, rows: SequenceOf[Row], limit: int | None = None) -> list[np.ndarray]:
        """``prompt_ids`` of many rows at once."""
        return self._whole(rows, prompt_ids(rows, self.template, self.tokenizer), limit)

    def _whole(self, rows: SequenceOf[Row], bare: list[np.ndarray], limit: int | None = None) -> list[np.ndarray]:
        """The prompts with the special tokens around them."""
        found = []
        for row, ids in zip(rows, bare, strict=True):
            if len(self._start) and form_of(row, self.template) != "chat":
                ids = np.concatenate((self._start, ids))
            if len(self._end) and not np.array_equal(ids[-len(self._end) :], self._end):
                ids = np.concatenate((ids, self._end))
            if not len(ids):  # an all-blank prompt, blanks dropped; the first response token needs a state
                first = self.eos if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
                ids = np.array([first], dtype=np.int32)
            if limit is not None and len(ids) > limit:
                what = f"a prompt of {len(ids):,} tokens is longer than the context of {limit:,}"
                raise DataError(f"{row.where}: {what}", hint="shorten it, or use a model with a longer context")
            found.append(ids)
        return found

    def sequence(self, row: Row, index: int, context: int | None = None) -> Sequence | TooLong:
        """One row with its first reference as a sequence of row ``index``, or what it is too long for.

        context: positions of the model, where it limits more than `data.max_length` does. Raises DataError under
        ``too_long: error``, and for a row without a response.
        """
        return self.sequences([row], index, context)[0]

    def sequences(
        self, rows: SequenceOf[Row], first: int = 0, context: int | None = None, bare: BareIds | None = None
    ) -> list[Sequence | TooLong]:
        """``sequence`` of many rows at once, numbered from ``first``. bare: their ids, where they have been made."""
        for row in rows:
            if not row.references:
                raise DataError(f"{row.where}: no response to train on", hint="generate responses first")
        bare = bare or bare_ids(rows, self.template, self.tokenizer)
        prompts, responses = self._whole(rows, bare.prompts), bare.responses
        if self.is_encoder_decoder and len(self._start):
            responses = [np.concatenate((self._start, ids)) for ids in responses]
        return [
            self._fit(row, prompt, response, index, context)
            for index, (row, prompt, response) in enumerate(zip(rows, prompts, responses, strict=True), start=first)
        ]

    def limit(self, context: int | None) -> int:
        """The most tokens of prompt and response together."""
        return self.max_length if context is None else min(self.max_length, context)

    def _fit(
        self, row: Row, prompt: np.ndarray, ids: np.ndarray, index: int, context: int | None
    ) -> Sequence | TooLong:
        # Some files spell the end-of-sequence token out.
        if not (len(ids) and (row.cut or ids[-1] == self.eos)):
            ids = np.append(ids, np.int32(self.eos))
        P, R, limit = len(prompt), len(ids), self.limit(context)
        over = None
        if self.max_prompt_length < P:
            over = TooLong(row.where, P, R, self.max_prompt_length, "prompt")
        elif limit <= P:  # no room for a single response token
            over = TooLong(row.where, P, R, limit, "prompt")
        elif limit < P + R:
            over = TooLong(row.where, P, R, limit, "row")
        if over is None:
            return Sequence(prompt, ids, index)
        if self.too_long == "error":
            raise self._refusal(over, context)
        if over.part == "row" and self.too_long == "truncate":
            return Sequence(prompt, ids[: limit - P].copy(), index)
        return over

    def _refusal(self, over: TooLong, context: int | None) -> DataError:
        length = over.prompt if over.part == "prompt" else over.prompt + over.response
        what = f"a prompt of {length:,} tokens" if over.part == "prompt" else f"{length:,} tokens, prompt and response"
        if context is not None and (length > context or (over.part == "prompt" and length == context)):
            limit, cure = f"the model's context is {context:,}", "use a model with a longer context"
        elif over.part == "prompt" and length > self.max_prompt_length:
            limit, cure = f"data.max_prompt_length is {self.max_prompt_length:,}", "raise it"
        else:
            limit, cure = f"data.max_length is {self.max_length:,}", "raise it with --max-length"
        return DataError(f"{over.where}: {what}, but {limit}", hint=f"{cure}, or try --set data.too_long=drop")
