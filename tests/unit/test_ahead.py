"""Tokenizing in the background: the same sequences, the same complaints, and no thread that outlives its context."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distillm_cli.config.schema import DataConfig
from distillm_cli.data.ahead import Ahead
from distillm_cli.data.batching import tokenize
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.rows import Row
from distillm_cli.data.sources import load_rows
from distillm_cli.data.token_ids import CHUNK, Affixes
from distillm_cli.errors import DataError

DataConfig = partial(DataConfig, max_length=512, max_prompt_length=256)  # as of a run whose models are known


def letters(refuses: str | None = None) -> PreTrainedTokenizerFast:
    """Single characters between <s> and </s>. refuses: a text that it cannot be given."""

    class Letters(PreTrainedTokenizerFast):
        def __call__(self, text=None, **kwargs):
            if any(refuses in one for one in text or ()):
                raise ValueError(f"not {refuses}")
            return super().__call__(text, **kwargs)

    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "p": 2, "r": 3, "?": 4}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    kind = PreTrainedTokenizerFast if refuses is None else Letters
    return kind(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="?")


def rows(n: int) -> list[Row]:
    return [
        Row(prompt="p" * (1 + i % 9), references=("r" * (i % 5),), where=f"a.jsonl:{i + 1}", cut=i % 7 == 0)
        for i in range(n)
    ]


DATA = DataConfig(max_length=12, max_prompt_length=8)


def told(rows, encoder, data=DATA, ahead=None, context=None):
    """What tokenizing comes to, everything in it, and what it says on the way."""
    said = []
    examples = tokenize(rows, encoder, data, said.append, context, ahead)
    pairs = [
        (s.row, s.prompt.tolist(), s.response.tolist(), s.prompt.dtype, s.response.dtype) for s in examples.sequences
    ]
    return pairs, examples.rows, examples.dropped, examples.dropped_prompts, examples.truncated, said


def working() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("tokenizing")]


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_what_is_made_ahead_is_what_is_made_in_turn(too_long, is_encoder_decoder):
    train, valid, tokenizer = rows(2 * CHUNK + 7), rows(11), letters()
    data = DATA.model_copy(update={"too_long": too_long})
    alone = Encoder(tokenizer, data, is_encoder_decoder=is_encoder_decoder)
    plain = [told(part, alone, data, context=10) for part in (train, valid)]
    with Ahead((train, valid), data, tokenizer) as ahead:
        assert ahead.affixes(tokenizer) == Affixes((0,), (1,), (0,), (1,))
        encoder = Encoder(tokenizer, data, is_encoder_decoder=is_encoder_decoder, affixes=ahead.affixes(tokenizer))
        assert [told(part, encoder, data, ahead, context=10) for part in (train, valid)] == plain
    assert plain[0][0]
    assert plain[0][4 if too_long == "truncate" else 2]


def test_real_rows_and_a_real_tokenizer(shared_data):
    data = DataConfig(source=str(shared_data / "dolly"), limit=1_200)
    found, tokenizer = load_rows(data, "train"), AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "gpt2")
    encoder = Encoder(tokenizer, data)
    with Ahead((found,), data, tokenizer) as ahead:
        made = told(found, encoder, data, ahead)
    assert made == told(found, encoder, data)
    first = tokenizer(found[0].prompt, add_special_tokens=False)["input_ids"]
    np.testing.assert_array_equal(made[0][0][1], first)


def test_the_chunks_are_really_made_ahead():
    part, tokenizer = rows(CHUNK + 1), letters()
    with Ahead((part,), DATA, tokenizer) as ahead:
        first, second = ahead.take(part, 0, tokenizer), ahead.take(part, CHUNK, tokenizer)
        assert (len(first), len(second)) == (CHUNK, 1)
        assert second[0].prompt.tolist() == [2] * len(part[-1].prompt)
        assert ahead.take(part, 0, tokenizer) is None  # once: whoever took them holds them


def test_another_tokenizer_takes_nothing_and_makes_its_own():
    part, expected, taken = rows(3 * CHUNK), letters(), letters()
    encoder = Encoder(taken, DATA)
    with Ahead((part,), DATA, expected) as ahead:
        assert ahead.affixes(taken) is None
        assert told(part, encoder, ahead=ahead) == told(part, encoder)
        assert not working()


def test_without_a_tokenizer_nothing_is_begun():
    part, tokenizer = rows(3), letters()
    with Ahead((part,), DATA, None) as ahead:
        assert not working()
        assert (ahead.affixes(tokenizer), ahead.take(part, 0, tokenizer)) == (None, None)
        assert len(told(part, Encoder(tokenizer, DATA), ahead=ahead)[0]) == 3


def test_a_row_that_does_not_fit_is_complained_of_as_ever():
    part = rows(CHUNK + 3)
    talk = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}, {"role": "user", "content": "p"}]
    part[CHUNK + 1] = Row(messages=talk, references=("r",), where="a.jsonl:502")
    tokenizer, data = letters(), DATA.model_copy(update={"template": "alpaca", "max_length": 500})
    complaints = []
    for begun in (None, tokenizer):
        with Ahead((part,), data, begun) as ahead, pytest.raises(DataError) as caught:
            tokenize(part, Encoder(tokenizer, data), data, max_context=400, ahead=ahead)
        complaints.append((str(caught.value), caught.value.exit_code))
    assert complaints[0] == complaints[1]
    assert complaints[0][0].startswith("a.jsonl:502: a conversation (user, assistant, user)")


def test_a_tokenizer_that_fails_fails_where_it_always_did():
    part = rows(4 * CHUNK)
    part[CHUNK + 2] = Row(prompt="ppp", references=("never",), where="a.jsonl:503")
    tokenizer, said = letters(refuses="never"), []
    with Ahead((part,), DATA, tokenizer) as ahead, pytest.raises(ValueError, match="not never"):
        tokenize(part, Encoder(tokenizer, DATA), DATA, said.append, ahead=ahead)
    assert [event.done for event in said] == [CHUNK]
    assert not working()


@pytest.mark.parametrize("stop", [DataError("no such thing"), KeyboardInterrupt()])
def test_whatever_ends_the_context_ends_the_work(stop):
    part, tokenizer = rows(40 * CHUNK), letters()
    ahead = Ahead((part,), DATA, tokenizer)

    def stopped():
        with ahead:
            assert working()
            raise stop

    with pytest.raises(type(stop)):
        stopped()
    assert not working()
    assert ahead.take(part, 39 * CHUNK, tokenizer) is None
