"""Render conversations as text: what the tokenizer's chat template writes, and which of it the assistant must produce.

The template's own output decides. A conversation is rendered as a whole, and each answer is found in it by rendering the
messages before it with a generation prompt: what the template adds after that prompt, up to the token that ends the turn,
is the answer. A template that marks answers with ``{% generation %}`` is taken at its word where that does not work.
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
_FLAGS = ("weight", "train")  # fields about training on a message; no template sees them
# Stand for the content of an answer. They share no first and no last character with one another, so that the text around
# them is what two renderings have in common.
_PROBES = ("\u2042distillm\u2043", "\u203bmodel\u203c")
# Characters for private use, around control tokens that people wrote and that are to be encoded as text.
MARK_START, MARK_END = "\ue0d0", "\ue0d1"
_NO_MARKS = {ord(MARK_START): None, ord(MARK_END): None}
_STRFTIME = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(?P<quote>["'])(?P<format>[^"']*)(?P=quote)\s*\)""")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THOUGHT = re.compile(r"\A.*(?:</think(?:ing)?>|\[/THINK\]|<\|END_THINKING\|>)", re.DOTALL)
_TEMPLATE_HINT = "check the row, skip such rows with --skip-bad-rows, or choose another --set data.template=plain"


@dataclass(frozen=True, slots=True)
class Text:
    """Hold one example as text.

    text: prompt and response together. cut: where the response begins, in characters. end: where it ends; what the
    template writes after it is not used. turns: (start, end) of the earlier answers to supervise. is_closed: the response
    holds the token that ends it. is_chat: the chat template wrote it, beginning-of-sequence token included.
    end_id: the token to append where it is not closed, None for the usual one. ends: ids of the tokens that end the answers
    to supervise, the usual one aside. ignored: fields of the answer that the template does not write.
    """

    text: str
    cut: int
    end: int
    turns: tuple[tuple[int, int], ...] = ()
    is_closed: bool = False
    is_chat: bool = False
    end_id: int | None = None
    ends: frozenset[int] = frozenset()
    ignored: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """Describe how a chat template ends an assistant turn.

    token: the id of the token that ends the turn: one behind the content, or the header of the next turn; None where there
    is neither. text: what the template writes behind the content.
    """

    token: int | None
    text: str


class ChatTemplate:
    """Render with the chat template of a tokenizer, with everything that its output depends on besides the row.

    day: the date that templates see through ``strftime_now``. arguments: of every row, below its own. tools, documents:
    for rows without their own. stops: ids of the tokens that the models stop at. turns: "all" or "last". written:
    whether control tokens in the row's own texts are marked, to be encoded as text (see ``marked``).
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
        written: bool = False,
    ):
        self.tokenizer = tokenizer
        self.day = day
        self.arguments = dict(arguments or {})
        self.tools = tools
        self.documents = documents
        self.turns = turns
        self.stops = {*stops, tokenizer.eos_token_id}
        self.written = written
        self._sources: dict[bool, str] = {}
        self._end: TurnEnd | None = None
        self._content_form: str | None = None
        self._ids, self._control = control_tokens(tokenizer)
        self._special = special_tokens(tokenizer)

    @property
    def uses_date(self) -> bool:
        """Return whether the template uses the current date."""
        template = self.tokenizer.chat_template
        sources = template.values() if isinstance(template, Mapping) else [template or ""]
        return any("strftime_now" in source for source in sources)

    @property
    def content(self) -> str:
        """Return the form in which the template writes the content of messages: text, parts (SmolVLM), or either."""
        if self._content_form is None:
            self._content_form = "either"
            text, parts = (self._shows(content) for content in (_PROBES[0], _parts(_PROBES[0])))
            if text != parts:
                self._content_form = "text" if text else "parts"
        return self._content_form

    def _shows(self, content: str | list[Any]) -> bool:
        """Return whether the template writes this content of a user's message."""
        try:
            return _PROBES[0] in self._write(None, [{"role": "user", "content": content}])
        except DataError:  # a template that takes other conversations
            return False

    @property
    def end(self) -> TurnEnd:
        """Return how the template ends an answer, found by rendering short conversations."""
        if self._end is None:
            self._end = self._find_end()
        return self._end

    @property
    def end_tokens(self) -> list[str]:
        """Return the text of the end-of-turn token, where there is one."""
        return [text for text, i in self._ids.items() if i == self.end.token]

    def prompt(self, row: Any) -> str:
        """Return the prompt: the row's messages and the generation prompt.

        Raises ModelError for a template that cannot be used, DataError where it refuses the row.
        """
        return self._write(row, self._messages(row), prompting=True)

    def text(self, row: Any) -> Text | None:
        """Return the row's conversation with the answers to supervise, None where it has no such answer.

        Raises ModelError for a template that cannot be used, DataError where it refuses the row or where its answers
        cannot be found in what it writes.
        """
        if row.raw is not None:
            return self._as_written(row)
        if not row.is_answered:
            prompt = self.prompt(row)
            return Text(prompt, len(prompt), len(prompt), is_chat=True)
        messages = self._messages(row)
        answer = row.answer
        if answer is None:
            answer = {"role": "assistant", "content": row.references[0]}
        conversation = [*messages, answer]
        wanted = [k for k, m in enumerate(conversation) if m["role"] == "assistant" and _is_trained(m)]
        if self.turns == "last":
            wanted = wanted[-1:] if wanted and wanted[-1] == len(messages) else []
        if not wanted:
            return None
        conversation = conversation[: wanted[-1] + 1]
        whole = self._write(row, conversation)
        cut, end, closed, end_id = self._last(row, conversation, whole)
        ignored = self._check_written(row, conversation[-1], whole[cut:end])
        turns = tuple(self._earlier(row, conversation, k, whole) for k in wanted[:-1])
        closings = [self._stop(whole[start:stop]) for start, stop in turns]
        closings.append(end_id if not closed else self._closing_id(whole[cut:end]))
        ends = frozenset(token for token in closings if token is not None)
        return Text(whole, cut, end, turns, closed, is_chat=True, end_id=end_id, ends=ends, ignored=ignored)

    def _check_written(self, row: Any, answer: Message, target: str) -> frozenset[str]:
        """Return the fields of an answer that the template leaves out: reasoning, which some templates never write.

        Raises DataError where it leaves out the content or a tool call, which would train the end of the turn alone.
        """
        calls = [call for call in answer.get("tool_calls") or () if isinstance(call, Mapping)]
        names = [str((call.get("function") or call).get("name", "")) for call in calls]
        content = answer.get("content")
        texts = [content] if isinstance(content, str) else [part.get("text") for part in content or ()]
        missing = [name for name in names if name not in target]
        if missing or not all(_holds(target, text) for text in texts if isinstance(text, str)):
            what = f"the tool call {missing[0]}" if missing else "the content of the answer"
            raise DataError(f"{row.where}: the chat template does not write {what}", hint=_TEMPLATE_HINT)
        reasoning = [name for name in _REASONING if isinstance(answer.get(name), str) and answer[name].strip()]
        return frozenset(name for name in reasoning if not _holds(target, answer[name]))

    def _as_written(self, row: Any) -> Text:
        """Return a response that a model wrote after the prompt: the text as it is, not as the template would write it."""
        prompt = self.prompt(row)
        text = prompt + row.raw
        # Where the response ended as answers do, the file leaves that token out: any other is one that models stop at.
        is_closed = self._stop(row.raw) is not None and not row.cut
        return Text(text, len(prompt), len(text), is_closed=is_closed, is_chat=True, end_id=self.end.token)

    def _messages(self, row: Any) -> list[Message]:
        """Return the row's messages up to the answer; a row without any is one question of the user."""
        if row.messages is not None:
            return list(row.messages)
        text = row.prompt if row.instruction is None else "\n".join(filter(None, (row.instruction, row.input)))
        return [{"role": "user", "content": text}]

    def _marked_message(self, message: Message) -> Message:
        """Mark control tokens in what people wrote; an answer's own structure (``<think>``) stays."""
        if message["role"] != "assistant":
            return marked(message, self._control)
        return marked(message, "|".join(map(re.escape, self._special)) or "(?!)")

    def _given(self, row: Any, messages: SequenceOf[Message]) -> tuple[list[Message], dict[str, Any], dict[str, Any]]:
        """Return what the template receives: messages, the template with tools and documents, and other arguments."""
        tools = self.tools if row is None or row.tools is None else row.tools
        documents = self.documents if row is None or row.documents is None else row.documents
        arguments = self.arguments if row is None else self.arguments | (row.template_kwargs or {})
        given: dict[str, Any] = {"chat_template": self._source(bool(tools))}
        messages = [_without(message, _FLAGS) for message in messages]
        messages = [_in_form(message, self.content) for message in messages]
        if self.written:
            messages = [self._marked_message(message) for message in messages]
            tools, documents = marked(tools, self._control), marked(documents, self._control)
        given |= {"tools": list(tools) if tools else None, "documents": list(documents) if documents else None}
        return messages, given, arguments

    def _write(self, row: Any, messages: SequenceOf[Message], *, prompting: bool = False) -> str:
        """Return the template's output. Raises ModelError, DataError. row: None for a conversation of the project's own."""
        messages, given, arguments = self._given(row, messages)
        try:
            if taken := sorted(arguments.keys() & signature(self.tokenizer.apply_chat_template).parameters.keys()):
                raise ValueError(f"chat_template_kwargs cannot set `{taken[0]}`")
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=prompting, tokenize=False, **given, **arguments
            )
        except Exception as error:  # templates are programs: they fail in as many ways as programs do
            raise self._refusal(row, error) from error

    def _refusal(self, row: Any, error: Exception) -> DataError | ModelError:
        from jinja2 import TemplateSyntaxError

        what = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, TemplateSyntaxError):
            where = getattr(self.tokenizer, "name_or_path", None) or None
            return ModelError(f"the chat template is not valid: {what}", where=where, hint="use another tokenizer")
        place = "" if row is None else f"{row.where}: "
        return DataError(f"{place}the chat template cannot write this row: {what}", hint=_TEMPLATE_HINT)

    def _source(self, with_tools: bool) -> str:
        """Return the template's text, with the run's date in place of the current one."""
        if with_tools not in self._sources:
            try:
                found = self.tokenizer.get_chat_template(tools=[{}] if with_tools else None)
            except ValueError as error:
                names = self.tokenizer.chat_template
                what = "the tokenizer has no chat template"
                hint = "choose another --set data.template=plain, or a tokenizer with a chat template"
                if isinstance(names, Mapping):
                    what = f"the tokenizer has chat templates named {', '.join(names)}, and none named default"
                    hint = "name one with --set data.chat_template=FILE"
                raise ModelError(
                    what, where=getattr(self.tokenizer, "name_or_path", None) or None, hint=hint
                ) from error
            self._sources[with_tools] = _STRFTIME.sub(self._dated, found)
        return self._sources[with_tools]

    def _dated(self, call: re.Match[str]) -> str:
        return repr(self.day.strftime(call["format"]))

    # ------------------------------------------------------------------------------------------- the answers' places

    def _last(self, row: Any, conversation: SequenceOf[Message], whole: str) -> tuple[int, int, bool, int | None]:
        """Return where the last answer begins and ends, whether its end token is written, and the token to append if not."""
        prompt = self._write(row, conversation[:-1], prompting=True)
        start = len(prompt)
        if not whole.startswith(prompt):
            spans = self._generation_spans(row, conversation)
            if not spans:
                raise DataError(
                    f"{row.where}: the chat template does not write this answer after its own generation prompt, which "
                    f"ends with {_tail(prompt)}",
                    hint="try --set 'data.chat_template_kwargs={enable_thinking: false}', give the answer's reasoning, or "
                    "use a template with {% generation %}: --set data.chat_template=FILE",
                )
            start, end = spans[-1]
            start = max(start, self._shared(prompt, whole))
            closing = self._closing(whole[start:end])
            return (start, end, False, self.end.token) if closing is None else (start, start + closing[1], True, None)
        return (start, *self._end_of(row, conversation, whole, start))

    def _end_of(
        self, row: Any, conversation: SequenceOf[Message], whole: str, start: int
    ) -> tuple[int, bool, int | None]:
        """Return the end of the last answer, which begins at ``start``; whether it is closed, and the token to append."""
        closing = self._closing(whole[start:])
        if closing is not None:
            return start + closing[1], True, None
        behind = self.end.text
        end = len(whole) - len(behind) if behind and whole.endswith(behind) else len(whole)
        if behind.strip():  # text that is no token ends the turn: it belongs to the answer
            end = len(whole.rstrip())
        token = self.end.token
        if conversation[-1].get("tool_calls"):
            token = self._token_before(row, conversation, {"role": "tool", "content": _PROBES[1]}) or token
        return max(end, start), False, token

    def _earlier(self, row: Any, conversation: SequenceOf[Message], k: int, whole: str) -> tuple[int, int]:
        """Return where message ``k``, an answer that others follow, stands in the whole conversation."""
        prompt = self._write(row, conversation[:k], prompting=True)
        start = _common(prompt, whole)
        if start < len(prompt) or (end := self._as_prefix(row, conversation, k, whole, start)) is None:
            spans = self._generation_spans(row, conversation)
            if len(spans) == sum(message["role"] == "assistant" for message in conversation):
                begin, end = spans[sum(message["role"] == "assistant" for message in conversation[:k])]
                start = max(begin, self._shared(prompt, whole))
                closing = re.search(rf"(?:\s*(?:{self._control}))+\s*\Z", whole[start:end])
                return start, end if closing is None else start + self._ending(row, conversation, k, closing)
            first, content_end = self._content(row, conversation, k, whole)
            start = min(start, first)
            found = re.compile(f"(?:{self._control})+").search(whole, content_end)
            end = content_end if found is None else self._ending(row, conversation, k, found)
        if end <= start:
            raise DataError(
                f"{row.where}: the chat template writes message {k + 1}, an answer, in another way once others follow it",
                hint="train on the last answer alone with --set data.turns=last, or give weight 0 to the others",
            )
        self._check_written(row, conversation[k], whole[start:end])
        return start, end

    def _as_prefix(self, row: Any, conversation: SequenceOf[Message], k: int, whole: str, start: int) -> int | None:
        """Return the answer's end where the conversation up to it is written as it is in the whole; None where it is not."""
        try:
            part = self._write(row, conversation[: k + 1])
        except DataError:
            return None
        end, is_closed, _ = self._end_of(row, conversation[: k + 1], part, start)
        same = _common(part, whole)
        if same >= end:
            # Where the header of the next turn ends this one (GLM), that token is the answer's last.
            header = None if is_closed else re.match(rf"\s*({self._control})", whole[end:])
            return end + header.end() if header and self._ids[header[1]] in self.stops else end
        # The last answer of a conversation may end with another token than an earlier one (gpt-oss).
        closing = self._closing(part[start:]) if is_closed else None
        return start + closing[0] if closing is not None and same >= start + closing[0] else None

    def _content(self, row: Any, conversation: SequenceOf[Message], k: int, whole: str) -> tuple[int, int]:
        """Return where the content of message ``k`` begins and ends in the whole, found by writing something else there."""
        starts, ends = [], []
        for probe in _PROBES:
            other = {"role": conversation[k]["role"], "content": probe}
            changed = self._write(row, [*conversation[:k], other, *conversation[k + 1 :]])
            starts.append(_common(whole, changed))
            ends.append(len(whole) - _common(whole[::-1], changed[::-1]))
        return max(starts), min(ends)

    def _closing(self, answer: str) -> tuple[int, int] | None:
        """Return start and end of the token that ends the answer, among the control tokens that close its text.

        None where the text closes with none.
        """
        closing = re.search(rf"(?:\s*(?:{self._control}))+\s*\Z", answer)
        if closing is None:
            return None
        found = list(re.finditer(self._control, closing[0]))
        known = {*self.stops, self.end.token}
        token = next((m for m in found if self._ids[m[0]] in known), None)
        token = token or next((m for m in reversed(found) if m[0] in self._special), None)
        return None if token is None else (closing.start() + token.start(), closing.start() + token.end())

    def _closing_id(self, answer: str) -> int | None:
        closing = self._closing(answer)
        return None if closing is None else self._ids[answer[slice(*closing)]]

    def _stop(self, answer: str) -> int | None:
        """Return the token at the end of an answer, where models stop at it."""
        closing = self._closing(answer)
        token = None if closing is None or closing[1] < len(answer) else self._ids[answer[slice(*closing)]]
        return token if token in self.stops or token == self.end.token else None

    def _ending(self, row: Any, conversation: SequenceOf[Message], k: int, run: re.Match[str]) -> int:
        """Return the end of message ``k`` in the control tokens behind its content.

        A token that ends it only because others follow (gpt-oss's ``<|end|>``) does not belong to it: nothing stops there.
        """
        try:
            closing = self._closing(part := self._write(row, conversation[: k + 1]))
        except DataError:
            closing = None
        own = None if closing is None else part[slice(*closing)]
        known = {*self.stops, self.end.token}
        found = list(re.finditer(self._control, run[0]))
        token = next((m for m in found if self._ids[m[0]] in known or m[0] == own), None)
        if token is None and own is None:
            token = found[0]
        return run.start() + (0 if token is None else token.end())

    def _shared(self, prompt: str, whole: str) -> int:
        """Return the length of what a prompt and the whole conversation have in common, no control token cut in two."""
        shared = _common(prompt, whole)
        cut = (m.start() for m in re.finditer(self._control, whole) if m.start() < shared < m.end())
        return next(cut, shared)

    def _generation_spans(self, row: Any, conversation: SequenceOf[Message]) -> list[tuple[int, int]]:
        """Return the spans that the template marks with ``{% generation %}``, empty where it marks none."""
        messages, given, arguments = self._given(row, conversation)
        if not _GENERATION.search(given["chat_template"]):
            return []
        from transformers.utils.chat_template_utils import render_jinja_template

        # As apply_chat_template calls it, which gives the spans in tokens alone.
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            _, spans = render_jinja_template(
                conversations=[messages],
                return_assistant_tokens_mask=True,
                **given,
                **{**self.tokenizer.special_tokens_map, **arguments},
            )
        except Exception as error:
            raise self._refusal(row, error) from error
        return [(int(start), int(end)) for start, end in spans[0]]

    # --------------------------------------------------------------------------------------------- the format's ends

    def _find_end(self) -> TurnEnd:
        question = {"role": "user", "content": _PROBES[1]}
        probe = [question, {"role": "assistant", "content": _PROBES[0]}]
        try:
            whole = self._write(None, probe)
        except DataError:  # a template that takes other roles: rows show what it can do
            return TurnEnd(None, "")
        if _PROBES[0] not in whole:
            return TurnEnd(None, "")
        behind = whole.rpartition(_PROBES[0])[2]
        if run := re.search(f"(?:{self._control})+", behind):
            ids = [self._ids[m[0]] for m in re.finditer(self._control, run[0])]
            token = next((i for i in ids if i in self.stops), ids[-1])
            return TurnEnd(token, behind)
        return TurnEnd(self._token_before(None, probe, question), behind)

    def _token_before(self, row: Any, conversation: SequenceOf[Message], following: Message) -> int | None:
        """Return the control token that the template writes between an answer and the next message if models stop at it."""
        try:
            whole = self._write(row, conversation)
            longer = self._write(row, [*conversation, following])
        except DataError:
            return None
        between = longer[_common(whole.rstrip(), longer) :].lstrip()
        found = re.match(self._control, between)
        return self._ids[found[0]] if found and self._ids[found[0]] in self.stops else None


def control_tokens(tokenizer: Any) -> tuple[dict[str, int], str]:
    """Return the added tokens of a tokenizer, blank ones aside, by text, and a regular expression that finds them."""
    ids = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if not token.content.isspace()}
    return ids, "|".join(map(re.escape, sorted(ids, key=len, reverse=True))) or "(?!)"


def special_tokens(tokenizer: Any) -> list[str]:
    """Return the tokens that a tokenizer treats as special, longest first."""
    found = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted((text for text in found if not text.isspace()), key=len, reverse=True)


def marked(value: Any, control: str) -> Any:
    """Put marks around the control tokens in every text of a value. Marks that are there already are removed."""
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


def _holds(target: str, text: str) -> bool:
    """Return whether a target has the end of this text. Templates may trim it and reformat the reasoning before it."""
    plain = _THOUGHT.sub("", text.translate(_NO_MARKS)).strip()[-20:]
    return plain in target.translate(_NO_MARKS)


def _in_form(message: Message, form: str) -> Message:
    """Return the message with its content as text or in parts, as the template writes it."""
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


def _common(one: str, other: str) -> int:
    """Return the length of the common beginning of two texts."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle)
    return low


def _tail(text: str) -> str:
    """Return the last characters of a text, for a message."""
    return repr(text[-24:])
