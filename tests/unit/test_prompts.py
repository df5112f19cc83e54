"""Test prompt templates verbatim, and the first and last tokens of prompts and responses."""

from __future__ import annotations

import pickle
from functools import partial

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distillm_cli.config.schema import ColumnsConfig, DataConfig
from distillm_cli.data.encoder import Encoder, TooLong
from distillm_cli.data.rows import Row, parse
from distillm_cli.data.sources import load_rows
from distillm_cli.data.templates import Renderer
from distillm_cli.types import Sequence
from tests.codes import raises_code

DataConfig = partial(DataConfig, max_length=512, max_prompt_length=256)  # as in a run whose models are known

CHAT = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def letters(wrap: str = "$A", eos: str | None = "</s>", chat: str | None = None, bos: str | None = "<s>"):
    """Return a tokenizer of single characters. wrap: the post-processing template."""
    vocabulary = ["<s>", "</s>", "<unk>", *map(chr, range(32, 127)), "\n"]
    backend = Tokenizer(models.WordLevel({token: id for id, token in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single=wrap, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token=bos, eos_token=eos, chat_template=chat
    )


def render(row: Row, template: str, tokenizer) -> str:
    return Renderer(DataConfig(template=template), tokenizer).prompt(row)


def encode(tokenizer, row: Row, **fields):
    return Encoder(tokenizer, DataConfig(**fields)).sequence(row, 7)


ROW = Row("Add {this}.", "1 + 1", references=("2",), where="a.jsonl:3")


@pytest.fixture(scope="module")
def gpt2(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "gpt2")


# ------------------------------------------------------------------------------------------------------- templates


def test_alpaca_template_matches_the_papers_data(shared_data):
    for split in ("valid", "test"):
        for row in load_rows(DataConfig(source=str(shared_data / "dolly")), split):
            without = Row(row.instruction, row.input)
            assert render(without, "auto", None) == render(without, "alpaca", None) == row.prompt


ALPACA = render(ROW, "alpaca", None)
MESSAGES = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1"}]


@pytest.mark.parametrize(
    ("row", "rendered"),
    [
        (
            ROW,
            {
                "auto": "[user]Add {this}.\n1 + 1",
                "alpaca": ALPACA,
                "plain": "Add {this}.\n1 + 1\n",
                "exact": "Add {this}.\n1 + 1",
            },
        ),
        (
            Row("Add.", "1 + 1", "Sum of 1 and 1:"),  # the exact prompt, unless another template is set
            {
                "auto": "[user]Add.\n1 + 1",
                "alpaca": "Sum of 1 and 1:",
                "plain": "Add.\n1 + 1\n",
                "chat": "[user]Add.\n1 + 1",
            },
        ),
        (Row(prompt="1 + 1 ="), {"auto": "1 + 1 =", "alpaca": "1 + 1 =", "plain": "1 + 1 =", "chat": "[user]1 + 1 ="}),
        (Row("1 + 1?", is_question=True), {"auto": "[user]1 + 1?", "plain": "1 + 1?\n", "chat": "[user]1 + 1?"}),
        (
            Row(messages=MESSAGES),
            {
                "auto": "[system]Add.[user]1 + 1",
                "chat": "[system]Add.[user]1 + 1",
                "plain": "Add.\n1 + 1\n",
                "alpaca": render(Row("Add.", "1 + 1"), "alpaca", None),
            },
        ),
    ],
)
def test_each_template_renders_each_kind_of_row(row, rendered):
    tokenizer = letters(chat=CHAT)
    for template, text in rendered.items():
        expected = f"<s>{text}[assistant]" if text.startswith("[") else text
        assert render(row, template, tokenizer) == expected, template


def test_auto_template_without_a_chat_template():
    exact = Row("Add.", "1 + 1", "Sum of 1 and 1:")
    expected = [ALPACA, "Sum of 1 and 1:", "1 + 1 =", "1 + 1?\n"]
    rows = [ROW, exact, Row(prompt="1 + 1 ="), Row("1 + 1?", is_question=True)]
    assert [render(row, "auto", letters()) for row in rows] == expected


def test_alpaca_without_input_has_no_input_heading():
    assert "### Input" in ALPACA
    assert "### Input" not in render(Row("Add."), "alpaca", None)
    # braces in the row are plain text
    assert render(Row("Say {input}", "{instruction}"), "alpaca", None).count("{") == 2


def test_missing_chat_template_is_rejected():
    for template, row in {"chat": ROW, "auto": Row(messages=MESSAGES)}.items():
        with raises_code("model.no_chat_template", "--set data.template=alpaca") as caught:
            render(row, template, letters())
        assert caught.value.exit_code == 4


def test_conversation_without_chat_template_is_rejected():
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    with raises_code("data.template_mismatch", "a.jsonl:3", "user, assistant, user"):
        render(Row(messages=messages, where="a.jsonl:3"), "alpaca", None)
    with raises_code("model.no_chat_template", "a.jsonl:3") as caught:
        render(Row(messages=messages, where="a.jsonl:3"), "auto", letters())
    assert "alpaca" not in str(caught.value), "alpaca does not accept conversations"
    strict = letters(chat="{{ raise_exception('System role not supported') }}")
    with raises_code("data.chat_template_refuses", "a.jsonl:3", "System role not supported"):
        render(Row(messages=messages, where="a.jsonl:3"), "chat", strict)


# ---------------------------------------------------------------------------------------------------------- tokens


def test_dolly_rows_decode_to_prompt_and_response(shared_data, gpt2):
    encoder = Encoder(gpt2, DataConfig())
    rows = load_rows(DataConfig(source=str(shared_data / "dolly"), limit=20), "train")
    for index, (row, sequence) in enumerate(zip(rows, encoder.sequences(rows), strict=True)):
        assert sequence.prompt.dtype == sequence.response.dtype == np.int32
        assert gpt2.decode(sequence.prompt) == row.prompt
        assert gpt2.decode(sequence.response) == row.references[0] + "<|endoftext|>"
        assert sequence.row == index
        np.testing.assert_array_equal(sequence.prompt, encoder.prompt_ids(row))


@pytest.mark.parametrize(
    ("wrap", "start"), [("$A", []), ("<s> $A", [0]), ("<s> $A </s>", [0]), ("$A </s>", []), ("</s> $A </s>", [1])]
)
def test_prompt_has_the_start_but_no_end_token(wrap, start):
    tokenizer = letters(wrap)
    sequence = encode(tokenizer, Row(prompt="ab", references=("cd",)))
    plain = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("ab", "cd")}
    assert sequence.prompt.tolist() == start + plain["ab"]
    assert sequence.response.tolist() == plain["cd"] + [1]


def test_chat_prompt_starts_with_the_templates_tokens():
    tokenizer = letters("<s> $A </s>", chat=CHAT)
    sequence = encode(tokenizer, Row(messages=MESSAGES, references=("2",)))
    assert tokenizer.decode(sequence.prompt) == "<s>[system]Add.[user]1 + 1[assistant]"
    assert sequence.prompt.tolist().count(0) == 1
    assert sequence.response.tolist() == tokenizer("2", add_special_tokens=False)["input_ids"] + [1]


def test_response_has_one_end_token():
    assert encode(letters(), Row(prompt="a", references=("",))).response.tolist() == [1]
    with_end_text = encode(letters(), Row(prompt="a", references=("b</s>",)))
    assert with_end_text.response.tolist() == encode(letters(), Row(prompt="a", references=("b",))).response.tolist()
    with raises_code("model.no_end_token"):
        Encoder(letters(eos=None), DataConfig())


def test_empty_prompt_gets_a_start_token():
    for bos, token in {"<s>": 0, None: 1}.items():
        blank = letters(bos=bos)
        blank.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        assert encode(blank, Row("", " ", references=("a",)), template="plain").prompt.tolist() == [token]


def test_first_reference_is_trained_on():
    row = Row(prompt="a", references=("x", "y"), where="a.jsonl:3")
    assert letters().decode(encode(letters(), row).response) == "x</s>"
    with raises_code("data.no_answer", "a.jsonl:3"):
        encode(letters(), Row(prompt="a", where="a.jsonl:3"))


# --------------------------------------------------------------------------------------------------------- lengths


def lengths(prompt: int, response: int) -> Row:
    """Return a row with these numbers of tokens, the response's end-of-sequence included."""
    return Row(prompt="p" * prompt, references=("r" * (response - 1),), where="a.jsonl:3")


LIMITS = {"max_length": 10, "max_prompt_length": 6}


@pytest.mark.parametrize("policy", ["drop", "truncate", "error"])
def test_row_of_exactly_the_limit_is_not_cut(policy):
    sequence = encode(letters(), lengths(6, 4), too_long=policy, **LIMITS)
    assert isinstance(sequence, Sequence)
    assert (len(sequence.prompt), len(sequence.response), sequence.response[-1]) == (6, 4, 1)


def test_row_one_token_too_long_is_dropped_cut_or_rejected():
    over = TooLong("a.jsonl:3", 6, 5, 10, "row")
    assert encode(letters(), lengths(6, 5), too_long="drop", **LIMITS) == over
    cut = encode(letters(), lengths(6, 5), too_long="truncate", **LIMITS)
    assert (len(cut.prompt), len(cut.response)) == (6, 4)
    assert 1 not in cut.response  # a cut response has no end token
    with raises_code("data.row_too_long", "a.jsonl:3", "11 tokens", "data.max_length", "10", "--max-length"):
        encode(letters(), lengths(6, 5), too_long="error", **LIMITS)


def test_long_prompt_is_not_cut():
    over = TooLong("a.jsonl:3", 7, 2, 6, "prompt")
    for policy in ("drop", "truncate"):
        assert encode(letters(), lengths(7, 2), too_long=policy, **LIMITS) == over
    with raises_code("data.row_too_long", "a.jsonl:3", "7 tokens", "data.max_prompt_length", "6"):
        encode(letters(), lengths(7, 2), too_long="error", **LIMITS)
    wide = {"max_length": 6, "max_prompt_length": 6}  # room for the prompt, but for no token of the response
    assert encode(letters(), lengths(6, 1), too_long="truncate", **wide).part == "prompt"


def test_context_of_the_model_limits_the_length():
    encoder = Encoder(letters(), DataConfig(too_long="truncate", **LIMITS))
    assert len(encoder.sequence(lengths(3, 5), 0, context=5)) == 5
    assert encoder.sequence(lengths(5, 5), 0, context=5) == TooLong("a.jsonl:3", 5, 5, 5, "prompt")
    strict = Encoder(letters(), DataConfig(too_long="error", **LIMITS))
    with raises_code("data.row_too_long", "8 tokens", "context", "5"):
        strict.sequence(lengths(3, 5), 0, context=5)
    with raises_code("data.row_too_long", "9 tokens", "context", "8"):
        strict.sequence(lengths(9, 5), 0, context=8)


def test_prompt_longer_than_the_context_is_rejected(gpt2):
    encoder = Encoder(gpt2, DataConfig())
    row = Row(prompt=" the" * 1025, where="prompts.jsonl:4")
    assert len(encoder.prompt_ids(row)) == 1025
    with raises_code("data.row_too_long", "prompts.jsonl:4", "1,025 tokens", "1,024") as caught:
        encoder.prompt_ids(row, limit=1024)
    assert caught.value.exit_code == 3


def test_encoder_can_be_pickled():
    encoder = Encoder(letters("<s> $A"), DataConfig())
    row = Row(prompt="ab", references=("cd",))
    unpickled = pickle.loads(pickle.dumps(encoder)).sequence(row, 3)
    assert unpickled.prompt.tolist() == encoder.prompt_ids(row).tolist()


def test_truncated_response_has_no_end_token(shared_data):
    """Check rows that ``generate`` wrote with ``complete: false``, which end in the middle."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "gpt2")
    encoder = Encoder(tokenizer, DataConfig(template="plain"))
    record = {"prompt": "Tell me. ", "output": "Once upon a"}
    complete, incomplete = (parse(record | {"complete": c}, "x.jsonl:1", ColumnsConfig()) for c in (True, False))
    ids = tokenizer(" Once upon a")["input_ids"]  # the space is one token with the word after it
    assert encoder.sequence(complete, 0).response.tolist() == [*ids, tokenizer.eos_token_id]
    assert encoder.sequence(incomplete, 0).response.tolist() == ids
