"""Encode rows as token ids: prompts with special tokens, responses with an end token, both within the length limits."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from collections.abc import Sequence as SequenceOf
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distillm_cli.config.schema import DataConfig
from distillm_cli.data.chat import Text, special_tokens
from distillm_cli.data.rows import Row
from distillm_cli.data.templates import Renderer
from distillm_cli.data.token_ids import Affixes, TokenIds, find_affixes, special_tokens_error, token_ids, written_tokens
from distillm_cli.errors import DataError, ModelError
from distillm_cli.types import Sequence


@dataclass(frozen=True, slots=True)
class Encoded:
    """Hold a row as a sequence.

    spans_prompt_end: a token spans the end of its prompt. truncated: its response is cut at the length limit. end_ids:
    end tokens of its responses other than the usual one. special_tokens: those in the row's own text. ignored_fields:
    fields of its answer that the chat template omits.
    """

    sequence: Sequence
    spans_prompt_end: bool = False
    truncated: bool = False
    end_ids: frozenset[int] = frozenset()
    special_tokens: frozenset[str] = frozenset()
    ignored_fields: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class TooLong:
    """Hold the lengths of a row that was left out and the limit that it exceeds, in tokens. part: "prompt" or "row"."""

    where: str
    prompt: int
    response: int
    limit: int
    part: str


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Describe a row that was left out. reason: empty if it has no answer to train on (``weight: 0``)."""

    where: str
    reason: str = ""


class Encoder:
    """Encode rows as token ids, identically for training, generation and scoring.

    Prompt and response are tokenized together, as one text, and cut where the prompt ends. The prompt starts with the
    tokenizer's prefix (for some, a beginning-of-sequence token), unless a chat template already added it. The response
    ends with the end-of-turn token of the chat template, or with ``end_id``, unless it was cut. Can be pickled,
    including the tokenizer.

    is_encoder_decoder: prompt and response are two texts. The prompt ends with the tokenizer's suffix, or with
    end-of-sequence if it has none, as T5's encoder expects; the response starts with the prefix of the tokenizer's
    target mode. affixes: the tokenizer's, if they are known. stops: ids of the models' stop tokens. end_id: the end
    token of responses without a chat template; unset: the tokenizer's end-of-sequence. needs_responses: rows without a
    response are refused; otherwise their sequences are prompts alone.
    """

    def __init__(
        self,
        tokenizer: Any,
        data: DataConfig,
        *,
        is_encoder_decoder: bool = False,
        affixes: Affixes | None = None,
        stops: Collection[int] = (),
        end_id: int | None = None,
        needs_responses: bool = True,
    ):
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "model.no_end_token",
                "the tokenizer has no end-of-sequence token",
                where=getattr(tokenizer, "name_or_path", None) or None,
                hint="set eos_token in its tokenizer_config.json",
            )
        self.tokenizer = tokenizer
        self.data = data
        self.stops = frozenset(stops)
        self.renderer = Renderer(data, tokenizer, stops=stops)
        self.template = data.template
        self.max_length = data.max_length
        self.max_prompt_length = data.max_prompt_length
        self.too_long = data.too_long
        self.literal = data.special_tokens_in_text == "text"
        self.end_id: int = tokenizer.eos_token_id if end_id is None else end_id
        self.is_encoder_decoder = is_encoder_decoder
        self.needs_responses = needs_responses
        self.affixes = affixes or find_affixes(tokenizer)
        suffix = ()
        target_prefix = ()
        if is_encoder_decoder:
            suffix = self.affixes.suffix or (tokenizer.eos_token_id,)
            target_prefix = self.affixes.target_prefix
        self._prefix = np.array(self.affixes.prefix, dtype=np.int32)
        self._suffix = np.array(suffix, dtype=np.int32)
        self._target_prefix = np.array(target_prefix, dtype=np.int32)
        self._special = special_tokens(tokenizer)
        if self.renderer.chat is not None:
            self._special += [token for token in self.renderer.chat.end_tokens if token not in self._special]

    @property
    def end_ids(self) -> frozenset[int]:
        """Return the ids that responses are trained to end with: the usual one and the chat template's."""
        found = {self.end_id}
        if self.renderer.chat is not None and self.renderer.chat.turn_end.token is not None:
            found.add(self.renderer.chat.turn_end.token)
        return frozenset(found)

    def with_settings(self, **changes: Any) -> Encoder:
        """Return an encoder for the same model with other settings of ``data``."""
        return self._like(self.tokenizer, self.data.model_copy(update=changes))

    def with_chat_template(self, template: str | dict[str, str]) -> Encoder:
        """Return an encoder for the same model with another chat template."""
        tokenizer = copy(self.tokenizer)
        tokenizer.chat_template = template
        return self._like(tokenizer, self.data)

    def _like(self, tokenizer: Any, data: DataConfig) -> Encoder:
        return Encoder(
            tokenizer,
            data,
            is_encoder_decoder=self.is_encoder_decoder,
            affixes=self.affixes,
            stops=self.stops,
            end_id=self.end_id,
            needs_responses=self.needs_responses,
        )

    def prompt_ids(self, row: Row, limit: int | None = None) -> np.ndarray:
        """Return the prompt's ids, int32, at least one. limit: the model's context; DataError for a longer prompt."""
        return self.prompts([row], limit)[0]

    def prompts(self, rows: SequenceOf[Row], limit: int | None = None) -> list[np.ndarray]:
        """Return ``prompt_ids`` of many rows at once. Raises DataError, ModelError."""
        rendered = [self.renderer.prompt(row) for row in rows]
        texts = [
            Text(text, len(text), len(text), is_chat=self._is_chat(row))
            for row, text in zip(rows, rendered, strict=True)
        ]
        for row, text in zip(rows, texts, strict=True):
            self._check_written(row, text)
        encoded = token_ids(texts, self.tokenizer, separate=self.is_encoder_decoder, literal=self.literal)
        prompts = []
        for row, text, ids in zip(rows, texts, encoded, strict=True):
            prompt = self._with_affixes(ids.prompt, text.is_chat)
            if limit is not None and len(prompt) > limit:
                message = f"a prompt of {len(prompt):,} tokens is longer than the context of {limit:,}"
                raise DataError(
                    "data.row_too_long",
                    f"{row.where}: {message}",
                    hint="shorten it, or use a model with a longer context",
                )
            prompts.append(prompt)
        return prompts

    def _is_chat(self, row: Row) -> bool:
        return self.renderer.form(row) == "chat"

    def _with_affixes(self, ids: np.ndarray, is_chat: bool) -> np.ndarray:
        """Return the prompt with the special tokens around it."""
        if len(self._prefix) and not is_chat:
            ids = np.concatenate((self._prefix, ids))
        if len(self._suffix) and not np.array_equal(ids[-len(self._suffix) :], self._suffix):
            ids = np.concatenate((ids, self._suffix))
        if not len(ids):  # a prompt of blanks that were dropped: the first response token needs a state
            first = self.end_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
            ids = np.array([first], dtype=np.int32)
        return ids

    def sequence(self, row: Row, index: int, context: int | None = None) -> Sequence | TooLong | LeftOut:
        """Return one row with its first reference as the sequence of row ``index``, or the reason for leaving it out.

        context: positions of the model, if fewer than `data.max_length`. Raises DataError under
        ``too_long: error``, and for a row without a response.
        """
        return self.sequences([row], index, context)[0]

    def sequences(
        self, rows: SequenceOf[Row], first: int = 0, context: int | None = None
    ) -> list[Sequence | TooLong | LeftOut]:
        """Return ``sequence`` of many rows at once, numbered from ``first``."""
        outcomes = self.encode(rows, first, context)
        return [outcome.sequence if isinstance(outcome, Encoded) else outcome for outcome in outcomes]

    def encode(
        self,
        rows: SequenceOf[Row],
        first: int = 0,
        context: int | None = None,
        prefetched: SequenceOf[TokenIds] | None = None,
    ) -> list[Encoded | TooLong | LeftOut]:
        """Encode rows, numbered from ``first``. prefetched: their token ids, if they were prefetched.

        A row that cannot be rendered, or has special tokens that are refused, raises DataError, or is left out with
        ``data.skip_bad_rows``.
        """
        texts = [self._text(row) for row in rows]
        good = [i for i, text in enumerate(texts) if isinstance(text, Text)]
        if prefetched is None or self.is_encoder_decoder:  # prefetched ids are those of prompt and response in one text
            encoded = token_ids(
                [texts[i] for i in good], self.tokenizer, separate=self.is_encoder_decoder, literal=self.literal
            )
        else:
            encoded = prefetched
        ids = dict(zip(good, encoded, strict=True))
        return [
            self._fit(row, text, ids[i], first + i, context) if i in ids else text
            for i, (row, text) in enumerate(zip(rows, texts, strict=True))
        ]

    def _text(self, row: Row) -> Text | LeftOut:
        try:
            if self.needs_responses and not row.is_answered:
                raise DataError(
                    "data.no_answer", f"{row.where}: no response to train on", hint="generate responses first"
                )
            text = self.renderer.text(row)
            if text is None:
                return LeftOut(row.where)
            self._check_written(row, text)
        except DataError as error:
            if not self.data.skip_bad_rows:
                raise
            return LeftOut(row.where, error.what)
        return text

    def special_tokens_of(self, row: Row, text: Text) -> frozenset[str]:
        """Return the special tokens in the row's own texts; one that ends its response does not count."""
        if not self._special:
            return frozenset()
        texts = list(_texts_of(row)) if text.is_chat else [text.text[: text.response_end]]
        eos = self.tokenizer.eos_token
        return frozenset(written_tokens((t.removesuffix(eos) for t in texts), self._special))

    def _check_written(self, row: Row, text: Text) -> None:
        if self.data.special_tokens_in_text == "refuse" and (tokens := self.special_tokens_of(row, text)):
            raise special_tokens_error(row, tokens)

    def decode(self, prompt: np.ndarray, tokens: np.ndarray) -> str:
        """Return the text of a response as it continues its prompt, without the token that ends it.

        Structural special tokens (channels, tool calls) stay; padding, beginning-of-sequence and unknown tokens do not.
        An end-of-turn token that responses are not trained to end with (a tool call's) stays too.
        """
        tokens = tokens.tolist()
        if self.is_encoder_decoder:
            return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        dropped = {self.tokenizer.pad_token_id, self.tokenizer.bos_token_id, self.tokenizer.unk_token_id}
        dropped |= {self.tokenizer.eos_token_id, *self.end_ids}
        if tokens and tokens[-1] in dropped:
            tokens = tokens[:-1]
        prompt_tokens = [token for token in prompt.tolist() if token not in dropped]
        response_tokens = [token for token in tokens if token not in dropped]
        prompt_text = self._decode(prompt_tokens)
        full_text = self._decode(prompt_tokens + response_tokens)
        if not full_text.startswith(prompt_text):
            return self._decode(response_tokens)
        # A blank before the first word is decoded only together with the prompt: decoders drop it at the start of a
        # text.
        return full_text[len(prompt_text) :]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def references(self, row: Row) -> tuple[str, ...]:
        """Return the row's accepted responses in the form that a model generates.

        For a chat, they are the template's output, including structure, without the end-of-turn token.
        """
        if not self._is_chat(row) or not (row.references or row.answer):
            return row.references
        answers = [row] if row.answer is not None else [replace(row, references=(text,)) for text in row.references]
        found = []
        for answered in answers:
            text = self.renderer.text(replace(answered, raw=None))
            if text is None:  # an answer of weight 0 is still a reference
                found += answered.references
                continue
            target = text.text[text.response_start : text.response_end]
            for token in self.renderer.chat.end_tokens:
                target = target.removesuffix(token)
            if not text.is_closed and text.appended_id is not None and text.appended_id not in self.end_ids:
                target += self.tokenizer.convert_ids_to_tokens(text.appended_id)  # as in ``decode``
            found.append(target)
        return tuple(found)

    def limit(self, context: int | None) -> int:
        """Return the maximum number of tokens of prompt and response together."""
        return self.max_length if context is None else min(self.max_length, context)

    def _fit(self, row: Row, text: Text, ids: TokenIds, index: int, context: int | None) -> Encoded | TooLong:
        prompt = self._with_affixes(ids.prompt, text.is_chat)
        response = self._with_end(row, text, ids.response)
        turns = None
        if ids.turns is not None and len(ids.turns) and not self.is_encoder_decoder:
            turns = ids.turns
        limit = self.limit(context)
        excess = None
        if len(prompt) > self.max_prompt_length:
            excess = TooLong(row.where, len(prompt), len(response), self.max_prompt_length, "prompt")
        elif len(prompt) >= limit:  # no room for a single response token
            excess = TooLong(row.where, len(prompt), len(response), limit, "prompt")
        elif len(prompt) + len(response) > limit:
            excess = TooLong(row.where, len(prompt), len(response), limit, "row")
        if excess is not None:
            if self.too_long == "error":
                raise self._too_long_error(excess, context)
            if excess.part != "row" or self.too_long != "truncate":
                return excess
            response = response[: limit - len(prompt)].copy()
        return Encoded(
            Sequence(prompt, response, index, turns),
            spans_prompt_end=ids.spans_prompt_end,
            truncated=excess is not None,
            end_ids=text.end_ids,
            special_tokens=self.special_tokens_of(row, text),
            ignored_fields=text.ignored_fields,
        )

    def _with_end(self, row: Row, text: Text, ids: np.ndarray) -> np.ndarray:
        """Return the response with its first special tokens and, unless it was cut, the token that ends it."""
        if not row.is_answered and row.raw is None:
            return ids
        if self.is_encoder_decoder and len(self._target_prefix):
            ids = np.concatenate((self._target_prefix, ids))
        if row.truncated and len(ids):
            return ids[:-1] if text.is_closed else ids
        end_id = self.end_id if text.appended_id is None else text.appended_id
        # Some files have the end-of-sequence token as text.
        return ids if text.is_closed or (len(ids) and ids[-1] == end_id) else np.append(ids, np.int32(end_id))

    def _too_long_error(self, excess: TooLong, context: int | None) -> DataError:
        is_prompt = excess.part == "prompt"
        if is_prompt:
            length = excess.prompt
            found = f"a prompt of {length:,} tokens"
        else:
            length = excess.prompt + excess.response
            found = f"{length:,} tokens, prompt and response"
        if context is not None and (length > context or (is_prompt and length == context)):
            limit = f"the model's context is {context:,}"
            advice = "use a model with a longer context"
        elif is_prompt and length > self.max_prompt_length:
            limit = f"data.max_prompt_length is {self.max_prompt_length:,}"
            advice = "raise it"
        else:
            limit = f"data.max_length is {self.max_length:,}"
            advice = "raise it with --max-length"
        return DataError(
            "data.row_too_long",
            f"{excess.where}: {found}, but {limit}",
            hint=f"{advice}, or try --set data.too_long=drop",
        )


def _texts_of(row: Row) -> Iterator[str]:
    """Yield every text of a row that a chat template may write."""
    yield from (text for text in (row.instruction, row.input, row.prompt) if text)
    stack: list[Any] = [row.messages, row.answer, row.tools, row.documents]
    if row.answer is None:
        stack.append(row.references[:1])
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list | tuple):
            stack += value
