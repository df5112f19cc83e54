"""Render conversations with the chat template, and find the parts to supervise.

Only the template's output is used. A conversation is rendered as a whole, and each answer is found in it by rendering the
messages before it with a generation prompt: what the template adds after that prompt, up to the token that ends the turn,
is the answer. If that fails, the spans that the template marks with ``{% generation %}`` are used.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from datetime import date
from inspect import signature
from typing import Any

from distillm_cli.data.conversations import Message
from distillm_cli.errors import DataError, ModelError

_REASONING = ("reasoning_content", "thinking", "reasoning")
_FLAGS = ("weight", "train")  # fields about training on a message; not passed to the template
# Placeholders for the content of an answer. Their first and last characters differ, so that the common parts of two
# renderings are exactly the text around them.
_PROBES = ("\u2042distillm\u2043", "\u203bmodel\u203c")
# Private-use characters around control tokens in the text of rows, which are to be encoded as text.
MARK_START = "\ue0d0"
MARK_END = "\ue0d1"
_NO_MARKS = {ord(MARK_START): None, ord(MARK_END): None}
_STRFTIME = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(?P<quote>["'])(?P<format>[^"']*)(?P=quote)\s*\)""")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THOUGHT = re.compile(r"\A.*(?:</think(?:ing)?>|\[/THINK\]|<\|END_THINKING\|>)", re.DOTALL)
_TEMPLATE_HINT = "check the row, skip such rows with --skip-bad-rows, or choose another --set data.template=plain"


@dataclass(frozen=True, slots=True)
class Text:
    """Hold one example as text.

    text: prompt and response together. response_start, response_end: positions in characters; what the template writes
    after the response is not used. turns: (start, end) of the earlier answers to supervise. is_closed: the response
    includes the token that ends it. is_chat: the chat template wrote it, beginning-of-sequence token included.
    appended_id: the token to append if it is not closed, None for the usual one. end_ids: ids of other end tokens of
    the supervised answers than the usual one. ignored_fields: fields of the answer that the template omits.
    """

    text: str
    response_start: int
    response_end: int
    turns: tuple[tuple[int, int], ...] = ()
    is_closed: bool = False
    is_chat: bool = False
    appended_id: int | None = None
    end_ids: frozenset[int] = frozenset()
    ignored_fields: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """Describe how a chat template ends an assistant turn.

    token: the id of the token that ends the turn: one after the content, or the header of the next turn; None if there
    is neither. text: the template's text after the content.
    """

    token: int | None
    text: str


class ChatTemplate:
    """Render rows with the chat template of a tokenizer.

    day: the date that ``strftime_now`` returns. arguments: template arguments of every row; a row's own take precedence.
    tools, documents: for rows without their own. stops: ids of the models' stop tokens. turns: "all" or "last".
    mark_control_tokens: whether control tokens in the row's own texts are marked, to be encoded as text (see ``marked``).
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        day: date,
        arguments: Mapping[str, Any] | None = None,
        tools: SequenceOf[Any] | None = None,
        documents: SequenceOf[Any] | None = None,
        stops: Collection[int] = (),
        turns: str = "all",
        mark_control_tokens: bool = False,
    ):
        self.tokenizer = tokenizer
        self.day = day
        self.arguments = dict(arguments or {})
        self.tools = tools
        self.documents = documents
        self.turns = turns
        self.stops = {*stops, tokenizer.eos_token_id}
        self.mark_control_tokens = mark_control_tokens
        self._sources: dict[bool, str] = {}
        self._turn_end: TurnEnd | None = None
        self._content_form: str | None = None
        ids, pattern = control_tokens(tokenizer)
        self._ids = ids
        self._control = pattern
        self._special = special_tokens(tokenizer)

    @property
    def uses_date(self) -> bool:
        """Return whether the template uses the current date."""
        template = self.tokenizer.chat_template
        sources = template.values() if isinstance(template, Mapping) else [template or ""]
        return any("strftime_now" in source for source in sources)

    @property
    def content_form(self) -> str:
        """Return the form in which the template writes the content of messages: text, parts (SmolVLM), or either."""
        if self._content_form is None:
            self._content_form = "either"
            writes_text = self._writes_content(_PROBES[0])
            writes_parts = self._writes_content(_parts(_PROBES[0]))
            if writes_text != writes_parts:
                self._content_form = "text" if writes_text else "parts"
        return self._content_form

    def _writes_content(self, content: str | list[Any]) -> bool:
        """Return whether the template writes this content of a user's message."""
        try:
            return _PROBES[0] in self._write(None, [{"role": "user", "content": content}])
        except DataError:  # a template that requires another form of conversation
            return False

    @property
    def turn_end(self) -> TurnEnd:
        """Return how the template ends an answer, found by rendering short conversations."""
        if self._turn_end is None:
            self._turn_end = self._find_turn_end()
        return self._turn_end

    @property
    def end_tokens(self) -> list[str]:
        """Return the text of the end-of-turn token, if there is one."""
        return [text for text, i in self._ids.items() if i == self.turn_end.token]

    def prompt(self, row: Any) -> str:
        """Return the prompt: the row's messages and the generation prompt.

        Raises ModelError for an invalid template, DataError if it rejects the row.
        """
        return self._write(row, self._messages(row), prompting=True)

    def adds_generation_prompt(self, row: Any) -> bool:
        """Return whether the prompt differs from the row's messages alone. Raises as ``prompt`` does."""
        prompt = self.prompt(row)
        try:
            return prompt != self._write(row, self._messages(row))
        except DataError:  # a template that requires an answer after a question
            return True

    def text(self, row: Any) -> Text | None:
        """Return the row's conversation with the answers to supervise, None without such answers.

        Raises ModelError for an invalid template, DataError if it rejects the row or if the answers cannot be found in
        its output.
        """
        if row.raw is not None:
            return self._raw_text(row)
        if not row.is_answered:
            prompt = self.prompt(row)
            return Text(prompt, len(prompt), len(prompt), is_chat=True)
        messages = self._messages(row)
        answer = row.answer
        if answer is None:
            answer = {"role": "assistant", "content": row.references[0]}
        conversation = [*messages, answer]
        supervised = [k for k, m in enumerate(conversation) if m["role"] == "assistant" and _is_trained(m)]
        if self.turns == "last":
            supervised = supervised[-1:] if supervised and supervised[-1] == len(messages) else []
        if not supervised:
            return None
        conversation = conversation[: supervised[-1] + 1]
        whole = self._write(row, conversation)
        start, end, is_closed, appended_id = self._last_answer(row, conversation, whole)
        ignored_fields = self._check_written(row, conversation[-1], whole[start:end])
        turns = tuple(self._earlier_answer(row, conversation, k, whole) for k in supervised[:-1])
        closings = [self._stop_token(whole[first:last]) for first, last in turns]
        closings.append(self._closing_id(whole[start:end]) if is_closed else appended_id)
        return Text(
            whole,
            start,
            end,
            turns,
            is_closed,
            is_chat=True,
            appended_id=appended_id,
            end_ids=frozenset(token for token in closings if token is not None),
            ignored_fields=ignored_fields,
        )

    def _check_written(self, row: Any, answer: Message, target: str) -> frozenset[str]:
        """Return the fields of an answer that the template omits, such as reasoning in some templates.

        Raises DataError if it omits the content or a tool call: only the end of the turn would then be trained.
        """
        calls = [call for call in answer.get("tool_calls") or () if isinstance(call, Mapping)]
        names = [str((call.get("function") or call).get("name", "")) for call in calls]
        content = answer.get("content")
        texts = [content] if isinstance(content, str) else [part.get("text") for part in content or ()]
        missing = [name for name in names if name not in target]
        if missing or not all(_contains(target, text) for text in texts if isinstance(text, str)):
            part = f"the tool call {missing[0]}" if missing else "the content of the answer"
            raise DataError(
                "data.chat_template_omits", f"{row.where}: the chat template omits {part}", hint=_TEMPLATE_HINT
            )
        reasoning = [name for name in _REASONING if isinstance(answer.get(name), str) and answer[name].strip()]
        return frozenset(name for name in reasoning if not _contains(target, answer[name]))

    def _raw_text(self, row: Any) -> Text:
        """Return the prompt with a response as a model generated it, not as rendered by the template."""
        prompt = self.prompt(row)
        text = prompt + row.raw
        # The file omits the usual end token. Another token at the end is a stop token of the models.
        is_closed = self._stop_token(row.raw) is not None and not row.truncated
        return Text(text, len(prompt), len(text), is_closed=is_closed, is_chat=True, appended_id=self.turn_end.token)

    def _messages(self, row: Any) -> list[Message]:
        """Return the row's messages up to the answer. A row without messages becomes one user message."""
        if row.messages is not None:
            return list(row.messages)
        text = row.prompt if row.instruction is None else "\n".join(filter(None, (row.instruction, row.input)))
        return [{"role": "user", "content": text}]

    def _marked_message(self, message: Message) -> Message:
        """Mark control tokens in the text of a row; the structure of an answer (``<think>``) is not marked."""
        if message["role"] != "assistant":
            return marked(message, self._control)
        return marked(message, "|".join(map(re.escape, self._special)) or "(?!)")

    def _template_inputs(
        self, row: Any, messages: SequenceOf[Message]
    ) -> tuple[list[Message], dict[str, Any], dict[str, Any]]:
        """Return the template's inputs: messages, the template with tools and documents, and other arguments."""
        tools = self.tools if row is None or row.tools is None else row.tools
        documents = self.documents if row is None or row.documents is None else row.documents
        arguments = self.arguments if row is None else self.arguments | (row.template_kwargs or {})
        inputs: dict[str, Any] = {"chat_template": self._source(bool(tools))}
        messages = [_without(message, _FLAGS) for message in messages]
        messages = [_in_form(message, self.content_form) for message in messages]
        if self.mark_control_tokens:
            messages = [self._marked_message(message) for message in messages]
            tools, documents = marked(tools, self._control), marked(documents, self._control)
        inputs["tools"] = list(tools) if tools else None
        inputs["documents"] = list(documents) if documents else None
        return messages, inputs, arguments

    def _write(self, row: Any, messages: SequenceOf[Message], *, prompting: bool = False) -> str:
        """Return the template's output. Raises ModelError, DataError. row: None for a probe."""
        messages, inputs, arguments = self._template_inputs(row, messages)
        try:
            reserved = sorted(arguments.keys() & signature(self.tokenizer.apply_chat_template).parameters.keys())
            if reserved:
                raise ValueError(f"chat_template_kwargs cannot set `{reserved[0]}`")
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=prompting, tokenize=False, **inputs, **arguments
            )
        except Exception as error:  # templates are programs and may raise anything
            raise self._template_error(row, error) from error

    def _template_error(self, row: Any, error: Exception) -> DataError | ModelError:
        from jinja2 import TemplateSyntaxError

        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, TemplateSyntaxError):
            where = getattr(self.tokenizer, "name_or_path", None) or None
            return ModelError(
                "model.invalid_chat_template",
                f"the chat template is not valid: {reason}",
                where=where,
                hint="use another tokenizer",
            )
        place = "" if row is None else f"{row.where}: "
        return DataError(
            "data.chat_template_refuses",
            f"{place}the chat template cannot render this row: {reason}",
            hint=_TEMPLATE_HINT,
        )

    def _source(self, with_tools: bool) -> str:
        """Return the template's text, with the run's date in place of the current one."""
        if with_tools not in self._sources:
            try:
                source = self.tokenizer.get_chat_template(tools=[{}] if with_tools else None)
            except ValueError as error:
                names = self.tokenizer.chat_template
                message = "the tokenizer has no chat template"
                hint = "choose another --set data.template=plain, or a tokenizer with a chat template"
                if isinstance(names, Mapping):
                    message = f"the tokenizer has chat templates named {', '.join(names)}, and none named default"
                    hint = "set one with --set data.chat_template=FILE"
                raise ModelError(
                    "model.no_chat_template",
                    message,
                    where=getattr(self.tokenizer, "name_or_path", None) or None,
                    hint=hint,
                ) from error
            self._sources[with_tools] = _STRFTIME.sub(self._format_date, source)
        return self._sources[with_tools]

    def _format_date(self, call: re.Match[str]) -> str:
        return repr(self.day.strftime(call["format"]))

    # ------------------------------------------------------------------------------------------- positions of answers

    def _last_answer(
        self, row: Any, conversation: SequenceOf[Message], whole: str
    ) -> tuple[int, int, bool, int | None]:
        """Return start and end of the last answer, whether its end token is written, and the token to append if not."""
        prompt = self._write(row, conversation[:-1], prompting=True)
        start = len(prompt)
        if not whole.startswith(prompt):
            spans = self._generation_spans(row, conversation)
            if not spans:
                raise DataError(
                    "data.chat_template_rewrites",
                    f"{row.where}: the chat template does not render this answer after its own generation prompt, "
                    f"which ends with {_tail(prompt)}",
                    hint="try --set 'data.chat_template_kwargs={enable_thinking: false}', add the answer's "
                    "reasoning, or use a template with {% generation %}: --set data.chat_template=FILE",
                )
            start, end = spans[-1]
            start = max(start, self._shared_length(prompt, whole))
            closing = self._closing(whole[start:end])
            if closing is None:
                return start, end, False, self.turn_end.token
            return start, start + closing[1], True, None
        return (start, *self._end_of(row, conversation, whole, start))

    def _end_of(
        self, row: Any, conversation: SequenceOf[Message], whole: str, start: int
    ) -> tuple[int, bool, int | None]:
        """Return the end of the last answer, which begins at ``start``; whether it is closed, and the token to append."""
        closing = self._closing(whole[start:])
        if closing is not None:
            return start + closing[1], True, None
        suffix = self.turn_end.text
        end = len(whole) - len(suffix) if suffix and whole.endswith(suffix) else len(whole)
        if suffix.strip():  # text that is not a token ends the turn: it belongs to the answer
            end = len(whole.rstrip())
        token = self.turn_end.token
        if conversation[-1].get("tool_calls"):
            token = self._token_before(row, conversation, {"role": "tool", "content": _PROBES[1]}) or token
        return max(end, start), False, token

    def _earlier_answer(self, row: Any, conversation: SequenceOf[Message], k: int, whole: str) -> tuple[int, int]:
        """Return start and end of message ``k``, an answer before the last one, in the whole conversation."""
        prompt = self._write(row, conversation[:k], prompting=True)
        start = _common_length(prompt, whole)
        if start < len(prompt) or (end := self._end_by_prefix(row, conversation, k, whole, start)) is None:
            spans = self._generation_spans(row, conversation)
            if len(spans) == sum(message["role"] == "assistant" for message in conversation):
                begin, end = spans[sum(message["role"] == "assistant" for message in conversation[:k])]
                start = max(begin, self._shared_length(prompt, whole))
                closing = re.search(rf"(?:\s*(?:{self._control}))+\s*\Z", whole[start:end])
                return start, end if closing is None else start + self._end_by_tokens(row, conversation, k, closing)
            content_start, content_end = self._content_span(row, conversation, k, whole)
            start = min(start, content_start)
            found = re.compile(f"(?:{self._control})+").search(whole, content_end)
            end = content_end if found is None else self._end_by_tokens(row, conversation, k, found)
        if end <= start:
            raise DataError(
                "data.chat_template_rewrites",
                f"{row.where}: the chat template renders message {k + 1}, an answer, differently if other messages "
                "follow",
                hint="train only on the last answer with --set data.turns=last, or set weight 0 for the others",
            )
        self._check_written(row, conversation[k], whole[start:end])
        return start, end

    def _end_by_prefix(self, row: Any, conversation: SequenceOf[Message], k: int, whole: str, start: int) -> int | None:
        """Return the answer's end if the conversation up to it is a prefix of the whole one; None otherwise."""
        try:
            part = self._write(row, conversation[: k + 1])
        except DataError:
            return None
        end, is_closed, _ = self._end_of(row, conversation[: k + 1], part, start)
        shared = _common_length(part, whole)
        if shared >= end:
            # Where the header of the next turn ends this one (GLM), that token is the last of the answer.
            header = None if is_closed else re.match(rf"\s*({self._control})", whole[end:])
            return end + header.end() if header and self._ids[header[1]] in self.stops else end
        # The last answer of a conversation may end with another token than an earlier one (gpt-oss).
        closing = self._closing(part[start:]) if is_closed else None
        return start + closing[0] if closing is not None and shared >= start + closing[0] else None

    def _content_span(self, row: Any, conversation: SequenceOf[Message], k: int, whole: str) -> tuple[int, int]:
        """Return start and end of the content of message ``k``, found by rendering placeholders in its place."""
        starts = []
        ends = []
        for probe in _PROBES:
            other = {"role": conversation[k]["role"], "content": probe}
            changed = self._write(row, [*conversation[:k], other, *conversation[k + 1 :]])
            starts.append(_common_length(whole, changed))
            ends.append(len(whole) - _common_length(whole[::-1], changed[::-1]))
        return max(starts), min(ends)

    def _closing(self, answer: str) -> tuple[int, int] | None:
        """Return start and end of the token that ends the answer, among the control tokens at the end of its text.

        None if the text does not end with a control token.
        """
        closing = re.search(rf"(?:\s*(?:{self._control}))+\s*\Z", answer)
        if closing is None:
            return None
        found = list(re.finditer(self._control, closing[0]))
        known = {*self.stops, self.turn_end.token}
        token = next((m for m in found if self._ids[m[0]] in known), None)
        token = token or next((m for m in reversed(found) if m[0] in self._special), None)
        return None if token is None else (closing.start() + token.start(), closing.start() + token.end())

    def _closing_id(self, answer: str) -> int | None:
        closing = self._closing(answer)
        return None if closing is None else self._ids[answer[slice(*closing)]]

    def _stop_token(self, answer: str) -> int | None:
        """Return the token at the end of an answer if models stop at it."""
        closing = self._closing(answer)
        token = None if closing is None or closing[1] < len(answer) else self._ids[answer[slice(*closing)]]
        return token if token in self.stops or token == self.turn_end.token else None

    def _end_by_tokens(self, row: Any, conversation: SequenceOf[Message], k: int, run: re.Match[str]) -> int:
        """Return the end of message ``k`` in ``run``, the control tokens after its content.

        A token that ends it only because other messages follow (gpt-oss's ``<|end|>``) does not belong to it: models do
        not stop there.
        """
        try:
            closing = self._closing(part := self._write(row, conversation[: k + 1]))
        except DataError:
            closing = None
        end_token = None if closing is None else part[slice(*closing)]
        known = {*self.stops, self.turn_end.token}
        found = list(re.finditer(self._control, run[0]))
        token = next((m for m in found if self._ids[m[0]] in known or m[0] == end_token), None)
        if token is None and end_token is None:
            token = found[0]
        return run.start() + (0 if token is None else token.end())

    def _shared_length(self, prompt: str, whole: str) -> int:
        """Return the length of the common prefix of a prompt and the whole conversation, with no control token split."""
        shared = _common_length(prompt, whole)
        split = (m.start() for m in re.finditer(self._control, whole) if m.start() < shared < m.end())
        return next(split, shared)

    def _generation_spans(self, row: Any, conversation: SequenceOf[Message]) -> list[tuple[int, int]]:
        """Return the spans that the template marks with ``{% generation %}``, empty if it marks none."""
        messages, inputs, arguments = self._template_inputs(row, conversation)
        if not _GENERATION.search(inputs["chat_template"]):
            return []
        from transformers.utils.chat_template_utils import render_jinja_template

        # The same call as in apply_chat_template, which returns the spans in tokens only.
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            _, spans = render_jinja_template(
                conversations=[messages],
                return_assistant_tokens_mask=True,
                **inputs,
                **{**self.tokenizer.special_tokens_map, **arguments},
            )
        except Exception as error:
            raise self._template_error(row, error) from error
        return [(int(start), int(end)) for start, end in spans[0]]

    # --------------------------------------------------------------------------------------------- ends of turns

    def _find_turn_end(self) -> TurnEnd:
        question = {"role": "user", "content": _PROBES[1]}
        probe = [question, {"role": "assistant", "content": _PROBES[0]}]
        try:
            whole = self._write(None, probe)
        except DataError:  # a template that requires other roles
            return TurnEnd(None, "")
        if _PROBES[0] not in whole:
            return TurnEnd(None, "")
        suffix = whole.rpartition(_PROBES[0])[2]
        if run := re.search(f"(?:{self._control})+", suffix):
            ids = [self._ids[m[0]] for m in re.finditer(self._control, run[0])]
            token = next((i for i in ids if i in self.stops), ids[-1])
            return TurnEnd(token, suffix)
        return TurnEnd(self._token_before(None, probe, question), suffix)

    def _token_before(self, row: Any, conversation: SequenceOf[Message], following: Message) -> int | None:
        """Return the control token between an answer and the message that follows, if models stop at it."""
        try:
            whole = self._write(row, conversation)
            longer = self._write(row, [*conversation, following])
        except DataError:
            return None
        between = longer[_common_length(whole.rstrip(), longer) :].lstrip()
        found = re.match(self._control, between)
        return self._ids[found[0]] if found and self._ids[found[0]] in self.stops else None


def control_tokens(tokenizer: Any) -> tuple[dict[str, int], str]:
    """Return the ids of a tokenizer's added tokens by text, blank ones left out, and a pattern that matches them."""
    ids = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if not token.content.isspace()}
    return ids, "|".join(map(re.escape, sorted(ids, key=len, reverse=True))) or "(?!)"


def special_tokens(tokenizer: Any) -> list[str]:
    """Return the tokens that a tokenizer treats as special, longest first."""
    found = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted((text for text in found if not text.isspace()), key=len, reverse=True)


def marked(value: Any, control: str) -> Any:
    """Put marks around the control tokens in every text of a value. Existing marks are removed."""
    if isinstance(value, str):
        plain = value.translate(_NO_MARKS)
        return re.sub(control, lambda found: f"{MARK_START}{found[0]}{MARK_END}", plain)
    if isinstance(value, Mapping):
        return {key: marked(item, control) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [marked(item, control) for item in value]
    return value


def _is_trained(message: Message) -> bool:
    """Return whether this answer is trained on."""
    return message.get("weight") != 0 and message.get("train") is not False


def _contains(target: str, text: str) -> bool:
    """Return whether a target contains the end of this text. Templates may trim it and reformat the reasoning before it."""
    plain = _THOUGHT.sub("", text.translate(_NO_MARKS)).strip()[-20:]
    return plain in target.translate(_NO_MARKS)


def _in_form(message: Message, form: str) -> Message:
    """Return the message with its content in the form that the template writes: text or parts."""
    content = message.get("content")
    if form == "parts" and isinstance(content, str):
        return {**message, "content": _parts(content)}
    if form == "text" and isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        return {**message, "content": "".join(str(part.get("text", "")) for part in content)}
    return message


def _parts(text: str) -> list[Message]:
    return [{"type": "text", "text": text}]


def _without(message: Message, names: Collection[str]) -> Message:
    return {key: value for key, value in message.items() if key not in names}


def _common_length(one: str, other: str) -> int:
    """Return the length of the common prefix of two texts."""
    low = 0
    high = min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle
    return low


def _tail(text: str) -> str:
    """Return the last characters of a text, for a message."""
    return repr(text[-24:])
