"""Rows → prompts as text, and prompts with responses as token ids."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np

from distillm_cli.config.schema import Data
from distillm_cli.data.rows import Row
from distillm_cli.errors import DataError, ModelError
from distillm_cli.sequences import Sequence

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def render(row: Row, template: str, tokenizer: Any) -> str:
    """The prompt of a row as text. template: auto, alpaca, chat or plain (see ``schema.Data.template``).

    auto: the row's own prompt, chat for messages, plain for question rows, alpaca for instruction rows. alpaca: the row's
    own prompt, else the Alpaca prompt. plain: instruction, input, each with a newline after it; a prompt that stands
    alone is complete as it is. chat: the tokenizer's own template around the instruction, prompt or messages.

    Raises ModelError when the tokenizer has no chat template, DataError when the row does not fit the template.
    """
    form = _form(row, template)
    if form == "exact":
        return row.prompt
    if form == "chat":
        return _chat(row, tokenizer)
    instruction, material = _instruction(row, form)
    if form == "plain":
        return f"{instruction}\n{material}\n" if material else f"{instruction}\n"
    # Not str.format on the row's text: braces in it are text.
    if material:
        head, middle, tail = _ALPACA_INPUT.replace("{input}", "{instruction}").split("{instruction}")
        return f"{head}{instruction}{middle}{material}{tail}"
    return _ALPACA.replace("{instruction}", instruction)


def _form(row: Row, template: str) -> str:
    if template == "auto":
        if row.prompt is not None:
            return "exact"
        if row.messages is not None:
            return "chat"
        return "plain" if row.question else "alpaca"
    own_prompt = row.prompt is not None and (template == "alpaca" or row.instruction is None)
    return "exact" if own_prompt and template != "chat" else template


def _instruction(row: Row, template: str) -> tuple[str, str]:
    """The row as instruction and input. One question with at most a system message before it is no conversation."""
    if row.instruction is not None:
        return row.instruction, row.input
    roles = [message["role"] for message in row.messages]
    texts = [message["content"] for message in row.messages]
    if roles == ["user"]:
        return texts[0], ""
    if roles == ["system", "user"]:
        return texts[0], texts[1]
    raise DataError(
        f"{row.where}: a conversation ({', '.join(roles)}) does not fit the template {template}",
        hint="try --set data.template=chat",
    )


def _chat(row: Row, tokenizer: Any) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ModelError("the tokenizer has no chat template", where=row.where, hint="try --set data.template=alpaca")
    messages = row.messages
    if messages is None:
        text = row.prompt if row.instruction is None else "\n".join(filter(None, (row.instruction, row.input)))
        messages = [{"role": "user", "content": text}]
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        hint = "mend the row, or try --set data.template=plain"
        raise DataError(f"{row.where}: the chat template refuses it ({error})", hint=hint) from error


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
    """

    def __init__(self, tokenizer: Any, data: Data, *, is_encoder_decoder: bool = False):
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no end-of-sequence token",
                where=getattr(tokenizer, "name_or_path", None) or None,
                hint="name one as eos_token in its tokenizer_config.json",
            )
        self.tokenizer = tokenizer
        self.template = data.template
        self.max_length, self.max_prompt_length, self.too_long = data.max_length, data.max_prompt_length, data.too_long
        self.eos: int = tokenizer.eos_token_id
        self.is_encoder_decoder = is_encoder_decoder
        self._start, end = self._find_ends()
        self._end = (end or [self.eos]) if is_encoder_decoder else []

    def prompt_ids(self, row: Row, limit: int | None = None) -> np.ndarray:
        """The prompt's ids, int32, at least one. limit: the model's context; DataError when the prompt is longer."""
        return self.prompts([row], limit)[0]

    def prompts(self, rows: SequenceOf[Row], limit: int | None = None) -> list[np.ndarray]:
        """``prompt_ids`` of many rows at once."""
        forms = [_form(row, self.template) for row in rows]
        texts = [render(row, self.template, self.tokenizer) for row in rows]
        found = []
        for row, form, ids in zip(rows, forms, self._ids(texts), strict=True):
            if form != "chat":
                ids = self._start + ids
            if self._end and ids[-len(self._end) :] != self._end:
                ids = ids + self._end
            if not ids:  # an all-blank prompt for a tokenizer that drops blanks; the first response token needs a state
                ids = [self.eos if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id]
            if limit is not None and len(ids) > limit:
                what = f"a prompt of {len(ids):,} tokens is longer than the context of {limit:,}"
                raise DataError(f"{row.where}: {what}", hint="shorten it, or use a model with a longer context")
            found.append(np.array(ids, dtype=np.int32))
        return found

    def sequence(self, row: Row, index: int, context: int | None = None) -> Sequence | TooLong:
        """One row with its first reference as a sequence of row ``index``, or what it is too long for.

        context: positions of the model, where it limits more than `data.max_length` does. Raises DataError under
        ``too_long: error``, and for a row without a response.
        """
        return self.sequences([row], index, context)[0]

    def sequences(self, rows: SequenceOf[Row], first: int = 0, context: int | None = None) -> list[Sequence | TooLong]:
        """``sequence`` of many rows at once, numbered from ``first``."""
        for row in rows:
            if not row.references:
                raise DataError(f"{row.where}: no response to train on", hint="generate responses first")
        responses = self._ids([row.references[0] for row in rows])
        if self.is_encoder_decoder:
            responses = [self._start + ids for ids in responses]
        prompts = self.prompts(rows)
        return [
            self._fit(row, prompt, response, index, context)
            for index, (row, prompt, response) in enumerate(zip(rows, prompts, responses, strict=True), start=first)
        ]

    def limit(self, context: int | None) -> int:
        """The most tokens of prompt and response together."""
        return self.max_length if context is None else min(self.max_length, context)

    def _fit(self, row: Row, prompt: np.ndarray, ids: list[int], index: int, context: int | None) -> Sequence | TooLong:
        ended = row.cut or ids[-1:] == [self.eos]  # some files spell the end-of-sequence token out
        if not (ids and ended):
            ids = [*ids, self.eos]
        P, R, limit = len(prompt), len(ids), self.limit(context)
        over = None
        if self.max_prompt_length < P:
            over = TooLong(row.where, P, R, self.max_prompt_length, "prompt")
        elif limit <= P:  # no room for a single response token
            over = TooLong(row.where, P, R, limit, "prompt")
        elif limit < P + R:
            over = TooLong(row.where, P, R, limit, "row")
        if over is None:
            return Sequence(prompt, np.array(ids, dtype=np.int32), index)
        if self.too_long == "error":
            raise self._refusal(over, context)
        if over.part == "row" and self.too_long == "truncate":
            return Sequence(prompt, np.array(ids[: limit - P], dtype=np.int32), index)
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

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: the tokenizer would warn of its own length limit, which is not the one that counts here.
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _find_ends(self) -> tuple[list[int], list[int]]:
        """The special tokens the tokenizer puts before a text, and those it puts after one."""
        for probe in ("a", "1", ".", "the"):
            bare = self._ids([probe])[0]
            if bare:
                full = self.tokenizer(probe)["input_ids"]
                starts = (at for at in range(len(full)) if full[at : at + len(bare)] == bare)
                at = next(starts, None)
                return ([], []) if at is None else (full[:at], full[at + len(bare) :])
        return [token for token in self.tokenizer("")["input_ids"] if token != self.eos], []
