"""Answers that a template marks, reformats, or ends in ways of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from distillm_cli.data.batching import tokenize
from tests.chat_models import CALLS, USER, loop
from tests.unit.test_chat import bot, encoder, supervised, talk, user

DOCUMENTS = "{%- for d in documents or [] -%}<sys>{{ d.text }}{%- endfor -%}"
# The generation prompt opens a block that no answer begins with.
MARKED = loop(
    USER
    + "<bot>{%- generation -%}{{ m.content or '' }}"
    + CALLS
    + "<end>{%- endgeneration -%}{{ '\\n' }}{%- endif -%}",
    "<bot><think>",
    before="<bos>" + DOCUMENTS,
)
CALL = [{"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}]
TURNS = [user("say <end> and <bot>"), bot("two"), user("three?"), bot("four")]


def test_marked_answers_are_found_where_special_tokens_are_text():
    made = encoder(MARKED, special_tokens_in_text="text")
    sequence = made.sequence(talk(*TURNS), 0)
    assert supervised(made, sequence) == ["two<end>", "four<end>"]
    ids = [*sequence.prompt.tolist(), *sequence.response.tolist()]
    assert ids.count(made.tokenizer.convert_tokens_to_ids("<end>")) == 4  # the template's own


def test_marked_answers_are_found_behind_documents_and_null_content():
    made = encoder(MARKED)
    row = talk(user("one?"), bot(None, tool_calls=CALL), user("b"), bot("four"), documents=[{"text": "a paper"}])
    call = '<call>look {"at": "x"}<end>'
    assert supervised(made, made.sequence(row, 0)) == [call, "four<end>"]


def test_a_marked_answer_begins_where_the_generation_prompt_ends():
    marks_header = loop(
        USER + "{%- generation -%}<bot>{{ m.content }}<end>{%- endgeneration -%}{%- endif -%}", "<bot><think>"
    )
    made = encoder(marks_header)
    row = talk(*TURNS)
    assert supervised(made, made.sequence(row, 0)) == ["two<end>", "four<end>"]
    assert made.references(row) == ("four",)


@pytest.mark.parametrize("content", ["<think>\nAdd.\n</think>\n\n4", "<think>\n\n</think>\n\n4", "<think>a</think>4"])
def test_reasoning_in_the_content_may_be_written_in_another_way(content):
    parses = (
        "{%- set thought = m.content.split('</think>')[0].split('<think>')[-1] | trim -%}"
        "<think>{{ thought }}</think>{{ m.content.split('</think>')[-1] | trim }}<end>{%- endif -%}"
    )
    made = encoder(loop(USER + "<bot>" + parses, "<bot>"))
    thought = content.split("</think>")[0].removeprefix("<think>").strip()
    found = supervised(made, made.sequence(talk(user("2 + 2?"), bot(content)), 0))
    assert found == [f"<think>{thought}</think>4<end>"]


def test_a_token_that_ends_only_earlier_turns_is_never_learned():
    """As gpt-oss writes conversations: the answer's analysis vanishes from earlier turns, and so does its end."""
    template = loop(
        USER
        + "<bot>{%- if loop.index0 == last and m.thinking -%}<chan>analysis<msg>{{ m.thinking }}<end><bot>{%- endif -%}"
        + "<chan>final<msg>{{ m.content }}{%- if loop.index0 == last -%}<stop>{%- else -%}<end>{%- endif -%}"
        + "{%- endif -%}",
        "<bot>",
    )
    made = encoder(template, ("<eos>", "<stop>"))
    row = talk(user("one?"), bot("two", thinking="t"), user("three?"), bot("four", thinking="f"))
    sequence = made.sequence(row, 0)
    last = "<chan>analysis<msg>f<end><bot><chan>final<msg>four<stop>"
    assert supervised(made, sequence) == ["<chan>final<msg>two", last]
    turns = sequence.prompt[sequence.turns]
    assert not np.isin(turns, made.tokenizer.convert_tokens_to_ids(["<end>", "<stop>"])).any()


TOOL_END = (  # tool calls end with <stop>, other answers with <end>
    USER
    + "<bot>{{ m.content or '' }}"
    + CALLS
    + "{%- if m.tool_calls -%}<stop>{%- else -%}<end>{%- endif -%}{%- endif -%}"
)


def test_rows_that_end_with_another_token_are_not_cut():
    made = encoder(loop(TOOL_END, "<bot>"), ("<eos>",))
    row = talk(user("one?"), bot(None, tool_calls=CALL))
    found = tokenize([row], made, made.data)
    assert found.truncated == 0
    assert made.tokenizer.convert_ids_to_tokens(sorted(found.end_ids)) == ["<stop>"]
    whole = found.lengths[0]
    short = encoder(loop(TOOL_END, "<bot>"), ("<eos>",), max_length=int(whole) - 2, too_long="truncate")
    assert tokenize([row], short, short.data).truncated == 1


@pytest.mark.parametrize("header", [False, True], ids=["a token of its own", "the next header"])
def test_a_correct_tool_call_equals_its_reference(header):
    """GLM's calls end with the header of the tool's turn, which the template writes once that turn is there."""
    plain = "{%- if m.role == 'tool' -%}<sys>{{ m.content }}{%- elif m.role != 'assistant' -%}<user>{{ m.content }}"
    headers = plain + "{%- else -%}<bot>{{ m.content or '' }}" + CALLS + "{%- endif -%}"
    made = encoder(loop(headers if header else TOOL_END, "<bot>"), ("<eos>", "<user>", "<sys>", "<stop>"))
    row = talk(user("one?"), bot(None, tool_calls=CALL))
    sequence = made.sequence(row, 0)
    end = "<sys>" if header else "<stop>"
    assert made.tokenizer.convert_ids_to_tokens(int(sequence.response[-1])) == end
    assert (made.decode(sequence.prompt, sequence.response),) == made.references(row)


@pytest.mark.parametrize("answer", ["two<chan>", "<chan>final<msg>", "two"])
def test_a_sample_that_closes_with_structure_still_ends(answer):
    """As Cohere and LFM2 write answers and calls: another token closes the content, and then the turn ends."""
    made = encoder(loop(USER + "<bot>{{ m.content }}<end>{%- endif -%}", "<bot>"), ("<eos>", "<stop>"))
    asked = talk(user("one?"), bot("x"))
    response = np.append(
        made.tokenizer(answer, add_special_tokens=False)["input_ids"], made.renderer.chat.turn_end.token
    )
    written = made.decode(made.prompt_ids(asked), response)
    read = made.sequence(replace(asked, answer=None, references=(written,), raw=written), 0)
    assert read.response.tolist() == response.tolist()
