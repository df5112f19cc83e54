"""Turn rows into token ids: prompts with the special tokens around them, responses that end, nothing too long."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distillm_cli.config.schema import DataConfig
from distillm_cli.data.chat import Text, special_tokens
from distillm_cli.data.rows import Row
from distillm_cli.data.templates import Renderer
from distillm_cli.data.token_ids import Affixes, TokenIds, find_affixes, refused, token_ids, written_tokens
from distillm_cli.errors import DataError, ModelError
from distillm_cli.types import Sequence


@dataclass(frozen=True, slots=True)
class Encoded:
    """Hold a row as a sequence.

    moved: a token spans the end of its prompt. cut: its response is cut at the limit of length. ends: the tokens that its
    answers end with, the usual one aside. written: special tokens in the row's own text. ignored: fields of its answer that
    the chat template does not write.
    """

    sequence: Sequence
    moved: bool = False
    cut: bool = False
    ends: frozenset[int] = frozenset()
    written: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class TooLong:
    """A row that was left out: its lengths and the limit it is over, in tokens. part: "prompt" or "row"."""

    where: str
    prompt: int
    response: int
    limit: int
    part: str


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Hold a row that was left out. why: the reason; empty where it has no answer to train on (``weight: 0``)."""

    where: str
    why: str = ""


class Encoder:
    """Turn rows into token ids, the same way for training, generation and scoring.

    Prompt and response are tokenized together, as one text, and cut where the prompt ends. The prompt starts with what
    the tokenizer puts first (a beginning-of-sequence token, for some), except where a chat template wrote that already.
    The response ends with the token that the chat template ends a turn with, or with ``end``, unless it was cut. Can be
    pickled, tokenizer included.

    is_encoder_decoder: prompt and response are texts of their own. The prompt ends with whatever the tokenizer puts last,
    end-of-sequence at least, as T5's encoder knows it; the response starts with what the tokenizer's target mode puts
    first. affixes: the tokenizer's, where they have been found. stops: ids that the models stop at. end: the id that ends
    responses which no chat template ends; unset: the tokenizer's end-of-sequence. needs_responses: rows without a response
    are refused; otherwise their sequences are prompts alone.
    """

    def __init__(
        self,
        tokenizer: Any,
        data: DataConfig,
        *,
        is_encoder_decoder: bool = False,
        affixes: Affixes | None = None,
        stops: Collection[int] = (),
        end: int | None = None,
        needs_responses: bool = True,
    ):
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no end-of-sequence token",
                where=getattr(tokenizer, "name_or_path", None) or None,
                hint="name one as eos_token in its tokenizer_config.json",
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
        self.end: int = tokenizer.eos_token_id if end is None else end
        self.is_encoder_decoder = is_encoder_decoder
        self.needs_responses = needs_responses
        self.affixes = affixes or find_affixes(tokenizer)
        self._before = np.array(self.affixes.before, dtype=np.int32)
        after = (self.affixes.after or (tokenizer.eos_token_id,)) if is_encoder_decoder else ()
        self._after = np.array(after, dtype=np.int32)
        self._target_before = np.array(self.affixes.target_before if is_encoder_decoder else (), dtype=np.int32)
        self._special = special_tokens(tokenizer)
        if self.renderer.chat is not None:
            self._special += [token for token in self.renderer.chat.end_tokens if token not in self._special]

    @property
    def ends(self) -> frozenset[int]:
        """Return the ids that responses are trained to end with: the usual one and the chat template's, as rows use them."""
        found = {self.end}
        if self.renderer.chat is not None and self.renderer.chat.end.token is not None:
            found.add(self.renderer.chat.end.token)
        return frozenset(found)

    def under(self, **changes: Any) -> Encoder:
        """Return one for the same model, whose rows are read by other fields of ``data``."""
        return Encoder(
            self.tokenizer,
            self.data.model_copy(update=changes),
            is_encoder_decoder=self.is_encoder_decoder,
            affixes=self.affixes,
            stops=self.stops,
            end=self.end,
            needs_responses=self.needs_responses,
        )

    def prompt_ids(self, row: Row, limit: int | None = None) -> np.ndarray:
        """Return the prompt's ids, int32, at least one. limit: the model's context; DataError for a longer prompt."""
        return self.prompts([row], limit)[0]

    def prompts(self, rows: SequenceOf[Row], limit: int | None = None) -> list[np.ndarray]:
        """Return ``prompt_ids`` of many rows at once. Raises DataError, ModelError."""
        written = [self.renderer.prompt(row) for row in rows]
        texts = [
            Text(text, len(text), len(text), is_chat=self._is_chat(row))
            for row, text in zip(rows, written, strict=True)
        ]
        for row, text in zip(rows, texts, strict=True):
            self._check_written(row, text)
        made = token_ids(texts, self.tokenizer, apart=self.is_encoder_decoder, literal=self.literal)
        found = []
        for row, text, ids in zip(rows, texts, made, strict=True):
            prompt = self._whole(ids.prompt, text.is_chat)
            if limit is not None and len(prompt) > limit:
                what = f"a prompt of {len(prompt):,} tokens is longer than the context of {limit:,}"
                raise DataError(f"{row.where}: {what}", hint="shorten it, or use a model with a longer context")
            found.append(prompt)
        return found

    def _is_chat(self, row: Row) -> bool:
        return self.renderer.form(row) == "chat"

    def _whole(self, ids: np.ndarray, is_chat: bool) -> np.ndarray:
        """Return the prompt with the special tokens around it."""
        if len(self._before) and not is_chat:
            ids = np.concatenate((self._before, ids))
        if len(self._after) and not np.array_equal(ids[-len(self._after) :], self._after):
            ids = np.concatenate((ids, self._after))
        if not len(ids):  # an all-blank prompt, blanks dropped; the first response token needs a state
            first = self.end if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
            ids = np.array([first], dtype=np.int32)
        return ids

    def sequence(self, row: Row, index: int, context: int | None = None) -> Sequence | TooLong | LeftOut:
        """Return one row with its first reference as the sequence of row ``index``, or why it is left out.

        context: positions of the model, where it limits more than `data.max_length` does. Raises DataError under
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
        made: SequenceOf[TokenIds] | None = None,
    ) -> list[Encoded | TooLong | LeftOut]:
        """Encode rows, numbered from ``first``. made: their ids, where they have been made already.

        A row that cannot be written or has special tokens that are refused raises DataError, or is left out where
        ``data.skip_bad_rows`` is set.
        """
        texts = [self._text(row) for row in rows]
        good = [i for i, text in enumerate(texts) if isinstance(text, Text)]
        if made is None or self.is_encoder_decoder:  # ids that are made ahead are those of whole texts
            picked = [texts[i] for i in good]
            made = token_ids(picked, self.tokenizer, apart=self.is_encoder_decoder, literal=self.literal)
        ids = dict(zip(good, made, strict=True))
        return [
            self._fit(row, text, ids[i], first + i, context) if i in ids else text
            for i, (row, text) in enumerate(zip(rows, texts, strict=True))
        ]

    def _text(self, row: Row) -> Text | LeftOut:
        try:
            if self.needs_responses and not row.is_answered:
                raise DataError(f"{row.where}: no response to train on", hint="generate responses first")
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
        """Return the special tokens that stand in the row's own texts; one that closes its response does not count."""
        if not self._special:
            return frozenset()
        texts = list(_texts_of(row)) if text.is_chat else [text.text[: text.end]]
        eos = self.tokenizer.eos_token
        return frozenset(written_tokens((t.removesuffix(eos) for t in texts), self._special))

    def _check_written(self, row: Row, text: Text) -> None:
        if self.data.special_tokens_in_text == "refuse" and (tokens := self.special_tokens_of(row, text)):
            raise refused(row, tokens)

    def decode(self, prompt: np.ndarray, tokens: np.ndarray) -> str:
        """Return the text of a response as it stands behind its prompt, without the token that ends it.

        Structural special tokens (channels, tool calls) stay; padding, beginning-of-sequence and unknown tokens do not.
        An end-of-turn token of another kind than responses are trained to end with (a tool call's) stays too.
        """
        tokens = tokens.tolist()
        if self.is_encoder_decoder:
            return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        dropped = {self.tokenizer.pad_token_id, self.tokenizer.bos_token_id, self.tokenizer.unk_token_id}
        dropped |= {self.tokenizer.eos_token_id, *self.ends}
        if tokens and tokens[-1] in dropped:
            tokens = tokens[:-1]
        before = [token for token in prompt.tolist() if token not in dropped]
        kept = [token for token in tokens if token not in dropped]
        head, whole = self._decoded(before), self._decoded(before + kept)
        # A blank before the first word shows only behind the prompt: decoders drop it at the start of a text.
        return whole[len(head) :] if whole.startswith(head) else self._decoded(kept)

    def _decoded(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def references(self, row: Row) -> tuple[str, ...]:
        """Return the row's accepted responses as a model that answers in this form writes them.

        Of a chat that is what the template writes of each, structure included, without the token that ends the turn.
        """
        if not self._is_chat(row) or not (row.references or row.answer):
            return row.references
        answers = [row] if row.answer is not None else [replace(row, references=(text,)) for text in row.references]
        found = []
        for answered in answers:
            text = self.renderer.text(replace(answered, raw=None))
            if text is None:  # an answer of weight 0 is a reference all the same
                found += answered.references
                continue
            target = text.text[text.cut : text.end]
            for token in self.renderer.chat.end_tokens:
                target = target.removesuffix(token)
            if not text.is_closed and text.end_id is not None and text.end_id not in self.ends:
                target += self.tokenizer.convert_ids_to_tokens(text.end_id)  # as ``decode`` leaves it
            found.append(target)
        return tuple(found)

    def limit(self, context: int | None) -> int:
        """Return the most tokens of prompt and response together."""
        return self.max_length if context is None else min(self.max_length, context)

    def _fit(self, row: Row, text: Text, ids: TokenIds, index: int, context: int | None) -> Encoded | TooLong:
        prompt, response = self._whole(ids.prompt, text.is_chat), self._ended(row, text, ids.response)
        turns = None
        if ids.turns is not None and len(ids.turns) and not self.is_encoder_decoder:
            turns = ids.turns
        P, R, limit = len(prompt), len(response), self.limit(context)
        over = None
        if self.max_prompt_length < P:
            over = TooLong(row.where, P, R, self.max_prompt_length, "prompt")
        elif limit <= P:  # no room for a single response token
            over = TooLong(row.where, P, R, limit, "prompt")
        elif limit < P + R:
            over = TooLong(row.where, P, R, limit, "row")
        if over is not None:
            if self.too_long == "error":
                raise self._refusal(over, context)
            if over.part != "row" or self.too_long != "truncate":
                return over
            response = response[: limit - P].copy()
        written = self.special_tokens_of(row, text)
        sequence = Sequence(prompt, response, index, turns)
        return Encoded(sequence, ids.moved, over is not None, text.ends, written, text.ignored)

    def _ended(self, row: Row, text: Text, ids: np.ndarray) -> np.ndarray:
        """Return the response with its first special tokens and its end; where it was cut, without the end."""
        if not row.is_answered and row.raw is None:
            return ids
        if self.is_encoder_decoder and len(self._target_before):
            ids = np.concatenate((self._target_before, ids))
        if row.cut and len(ids):
            return ids[:-1] if text.is_closed else ids
        end = self.end if text.end_id is None else text.end_id
        # Some files spell the end-of-sequence token out.
        return ids if text.is_closed or (len(ids) and ids[-1] == end) else np.append(ids, np.int32(end))

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
