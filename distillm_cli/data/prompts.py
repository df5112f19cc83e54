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


@dataclass(frozen=True, slots=True)
class BareIds:
    """What a tokenizer makes of the texts of some rows, int32: no special tokens around them, nothing cut."""

    prompts: list[np.ndarray]
    responses: list[np.ndarray]


def bare_ids(rows: SequenceOf[Row], template: str, tokenizer: Any) -> BareIds:
    """Of each row's prompt and first reference. Raises as ``render`` does."""
    ids = _ids(tokenizer, [*_rendered(rows, template, tokenizer), *(row.references[0] for row in rows)])
    return BareIds(ids[: len(rows)], ids[len(rows) :])


def _rendered(rows: SequenceOf[Row], template: str, tokenizer: Any) -> list[str]:
    return [render(row, template, tokenizer) for row in rows]


def _ids(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    if not texts:
        return []
    # verbose=False: the tokenizer would warn of its own length limit, which is not the one that counts here.
    made = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [np.array(ids, dtype=np.int32) for ids in made]


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
        self.tokenizer = tokenizer
        self.template = data.template
        self.max_length, self.max_prompt_length, self.too_long = data.max_length, data.max_prompt_length, data.too_long
        self.eos: int = tokenizer.eos_token_id
        self.is_encoder_decoder = is_encoder_decoder
        start, end = ends or find_ends(tokenizer)
        self._start = np.array(start, dtype=np.int32)
        self._end = np.array((end or [self.eos]) if is_encoder_decoder else [], dtype=np.int32)

    def prompt_ids(self, row: Row, limit: int | None = None) -> np.ndarray:
        """The prompt's ids, int32, at least one. limit: the model's context; DataError when the prompt is longer."""
        return self.prompts([row], limit)[0]

    def prompts(self, rows: SequenceOf[Row], limit: int | None = None) -> list[np.ndarray]:
        """``prompt_ids`` of many rows at once."""
        return self._whole(rows, _ids(self.tokenizer, _rendered(rows, self.template, self.tokenizer)), limit)

    def _whole(self, rows: SequenceOf[Row], bare: list[np.ndarray], limit: int | None = None) -> list[np.ndarray]:
        """The prompts with the special tokens around them."""
        found = []
        for row, ids in zip(rows, bare, strict=True):
            if len(self._start) and _form(row, self.template) != "chat":
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
