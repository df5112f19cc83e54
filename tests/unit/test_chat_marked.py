"""Test templates that mark answers, reformat them, or end them in unusual ways."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from distillm_cli.data.batching import tokenize
from tests.chat_models import CALLS, USER, loop
from tests.unit.test_chat import bot, conversation_row, encoder, supervised, user

DOCUMENTS = "{%- for d in documents or [] -%}<sys>{{ d.text }}{%- endfor -%}"
# The generation prompt opens a block with which no answer begins.
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


def test_marked_answers_with_special_tokens_as_text():
    enc = encoder(MARKED, special_tokens_in_text="text")
    sequence = enc.sequence(conversation_row(*TURNS), 0)
    assert supervised(enc, sequence) == ["two<end>", "four<end>"]
    ids = [*sequence.prompt.tolist(), *sequence.response.tolist()]
    assert ids.count(enc.tokenizer.convert_tokens_to_ids("<end>")) == 4  # those of the template


def test_marked_answers_after_documents_and_null_content():
    enc = encoder(MARKED)
    row = conversation_row(
        user("one?"), bot(None, tool_calls=CALL), user("b"), bot("four"), documents=[{"text": "a paper"}]
    )
    call = '<call>look {"at": "x"}<end>'
    assert supervised(enc, enc.sequence(row, 0)) == [call, "four<end>"]


def test_marked_answer_begins_after_the_generation_prompt():
    marks_header = loop(
        USER + "{%- generation -%}<bot>{{ m.content }}<end>{%- endgeneration -%}{%- endif -%}", "<bot><think>"
    )
    enc = encoder(marks_header)
    row = conversation_row(*TURNS)
    assert supervised(enc, enc.sequence(row, 0)) == ["two<end>", "four<end>"]
    assert enc.references(row) == ("four",)


@pytest.mark.parametrize("content", ["<think>\nAdd.\n</think>\n\n4", "<think>\n\n</think>\n\n4", "<think>a</think>4"])
def test_template_may_reformat_reasoning_in_content(content):
    parses = (
        "{%- set thought = m.content.split('</think>')[0].split('<think>')[-1] | trim -%}"
        "<think>{{ thought }}</think>{{ m.content.split('</think>')[-1] | trim }}<end>{%- endif -%}"
    )
    enc = encoder(loop(USER + "<bot>" + parses, "<bot>"))
    thought = content.split("</think>")[0].removeprefix("<think>").strip()
    found = supervised(enc, enc.sequence(conversation_row(user("2 + 2?"), bot(content)), 0))
    assert found == [f"<think>{thought}</think>4<end>"]


def test_end_token_of_earlier_turns_is_not_supervised():
    """Check a template like that of gpt-oss, which drops the analysis of earlier turns with its end token."""
    template = loop(
        USER
        + "<bot>{%- if loop.index0 == last and m.thinking -%}<chan>analysis<msg>{{ m.thinking }}<end><bot>{%- endif -%}"
        + "<chan>final<msg>{{ m.content }}{%- if loop.index0 == last -%}<stop>{%- else -%}<end>{%- endif -%}"
        + "{%- endif -%}",
        "<bot>",
    )
    enc = encoder(template, ("<eos>", "<stop>"))
    row = conversation_row(user("one?"), bot("two", thinking="t"), user("three?"), bot("four", thinking="f"))
    sequence = enc.sequence(row, 0)
    last = "<chan>analysis<msg>f<end><bot><chan>final<msg>four<stop>"
    assert supervised(enc, sequence) == ["<chan>final<msg>two", last]
    turns = sequence.prompt[sequence.turns]
    assert not np.isin(turns, enc.tokenizer.convert_tokens_to_ids(["<end>", "<stop>"])).any()


TOOL_END = (  # tool calls end with <stop>, other answers with <end>
    USER
    + "<bot>{{ m.content or '' }}"
    + CALLS
    + "{%- if m.tool_calls -%}<stop>{%- else -%}<end>{%- endif -%}{%- endif -%}"
)


def test_rows_with_another_end_token_are_not_truncated():
    enc = encoder(loop(TOOL_END, "<bot>"), ("<eos>",))
    row = conversation_row(user("one?"), bot(None, tool_calls=CALL))
    found = tokenize([row], enc, enc.data)
    assert found.truncated == 0
    assert enc.tokenizer.convert_ids_to_tokens(sorted(found.end_ids)) == ["<stop>"]
    full_length = found.lengths[0]
    short = encoder(loop(TOOL_END, "<bot>"), ("<eos>",), max_length=int(full_length) - 2, too_long="truncate")
    assert tokenize([row], short, short.data).truncated == 1


@pytest.mark.parametrize("header", [False, True], ids=["own token", "next header"])
def test_correct_tool_call_equals_its_reference(header):
    """Check calls that end with their own token or, like GLM's, with the header of the tool's turn.

    The template writes that header only once the tool's turn exists.
    """
    plain = "{%- if m.role == 'tool' -%}<sys>{{ m.content }}{%- elif m.role != 'assistant' -%}<user>{{ m.content }}"
    headers = plain + "{%- else -%}<bot>{{ m.content or '' }}" + CALLS + "{%- endif -%}"
    enc = encoder(loop(headers if header else TOOL_END, "<bot>"), ("<eos>", "<user>", "<sys>", "<stop>"))
    row = conversation_row(user("one?"), bot(None, tool_calls=CALL))
    sequence = enc.sequence(row, 0)
    end = "<sys>" if header else "<stop>"
    assert enc.tokenizer.convert_ids_to_tokens(int(sequence.response[-1])) == end
    assert (enc.decode(sequence.prompt, sequence.response),) == enc.references(row)


@pytest.mark.parametrize("answer", ["two<chan>", "<chan>final<msg>", "two"])
def test_sample_with_closing_structure_still_ends(answer):
    """Check samples like those of Cohere and LFM2: another token closes the content before the turn ends."""
    enc = encoder(loop(USER + "<bot>{{ m.content }}<end>{%- endif -%}", "<bot>"), ("<eos>", "<stop>"))
    prompt_row = conversation_row(user("one?"), bot("x"))
    response = np.append(enc.tokenizer(answer, add_special_tokens=False)["input_ids"], enc.renderer.chat.turn_end.token)
    written = enc.decode(enc.prompt_ids(prompt_row), response)
    read = enc.sequence(replace(prompt_row, answer=None, references=(written,), raw=written), 0)
    assert read.response.tolist() == response.tolist()
