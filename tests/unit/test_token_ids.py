"""Test that prompt and response have the ids that transformers gives for the whole text."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, NllbTokenizer, PreTrainedTokenizerFast

from distillm_cli.config.schema import DataConfig
from distillm_cli.data.batching import tokenize
from distillm_cli.data.chat import Text
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.rows import Row
from distillm_cli.data.sources import load_rows
from distillm_cli.data.token_ids import Affixes, find_affixes, token_ids

DATA = DataConfig(template="exact", max_length=512, max_prompt_length=256)
TEXTS = [
    "Name three rivers in the north of the country and say where they end.",
    "The answer is in the name: the river ends in the sea.\nAnd  so on, and so on.",
    "Élan vital – 中文, emoji 🙂 and\ttabs.",
]


def train_backend(model, pre_tokenizer, decoder, normalizer=None, **trainer) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer_class = trainers.UnigramTrainer if isinstance(model, models.Unigram) else trainers.BpeTrainer
    backend.train_from_iterator(TEXTS * 20, trainer_class(show_progress=False, **trainer))
    return backend


def sentencepiece_like(prepend: str) -> Tokenizer:
    """Return a backend like Llama's: a space before the first word, and byte fallback."""
    backend = train_backend(
        models.BPE(unk_token="<unk>"),
        pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False),
        decoders.Metaspace(prepend_scheme=prepend),
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def bytes_like(trim: bool = False) -> Tokenizer:
    backend = train_backend(
        models.BPE(),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    return backend


def unigram() -> Tokenizer:
    return train_backend(
        models.Unigram(),
        pre_tokenizers.Metaspace(),
        decoders.Metaspace(),
        normalizers.NFKC(),
        vocab_size=200,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
    )


KINDS = {
    "metaspace, always": lambda: sentencepiece_like("always"),
    "metaspace, first": lambda: sentencepiece_like("first"),
    "bytes": bytes_like,
    "bytes, trimmed offsets": lambda: bytes_like(trim=True),
    "unigram with a normalizer": unigram,
}
PAIRS = [
    ("Name three rivers.\n", "The rivers"),
    ("Name three rivers. ", "The rivers"),
    ("Name three rivers:", " the rivers"),
    ("Name", "s end in the sea"),
    ("the answer is in the n", "ame"),
    ("", "The answer"),
    ("The name:", ""),
    ("中", "文 🙂"),
    ("🙂", "🙂"),
    ("a  ", "  b"),
]


def wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", KINDS)
def test_ids_match_the_whole_text(kind):
    tokenizer = wrap(KINDS[kind]())
    texts = [Text(prompt + response, len(prompt), len(prompt + response)) for prompt, response in PAIRS]
    for each_tokenizer in (tokenizer, tokenizer.backend_tokenizer):
        for text, ids in zip(texts, token_ids(texts, each_tokenizer), strict=True):
            expected = tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True)
            assert [*ids.prompt.tolist(), *ids.response.tolist()] == expected["input_ids"]
            prompt = tokenizer(text.text[: text.response_start], add_special_tokens=False)["input_ids"]
            if expected["input_ids"][: len(prompt)] == prompt:
                assert ids.prompt.tolist() == prompt
            else:  # a token has characters of both; the whole response is supervised
                assert ids.spans_prompt_end
                assert all(end <= text.response_start for _, end in expected["offset_mapping"][: len(ids.prompt)])
                assert expected["offset_mapping"][len(ids.prompt)][1] > text.response_start


@pytest.mark.parametrize("kind", ["metaspace, always", "metaspace, first"])
def test_no_space_is_added_before_a_response(kind):
    """Check tokenizers that put a space before a response tokenized alone."""
    tokenizer = wrap(KINDS[kind]())
    sequence = Encoder(tokenizer, DATA).sequence(Row(prompt="Name.\n", references=("The sea",)), 0)
    expected = tokenizer("Name.\nThe sea")["input_ids"]
    assert [*sequence.prompt.tolist(), *sequence.response.tolist()] == [*expected, tokenizer.eos_token_id]
    assert sequence.prompt.tolist() == tokenizer("Name.\n")["input_ids"]
    assert sequence.response.tolist() != [*tokenizer("The sea", add_special_tokens=False)["input_ids"], 2]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_across_the_prompt_end_are_detected(kind):
    tokenizer = wrap(KINDS[kind]())
    texts = [Text(prompt + response, len(prompt), len(prompt + response)) for prompt, response in PAIRS]
    for text, ids in zip(texts, token_ids(texts, tokenizer), strict=True):
        prompt_ids = tokenizer(text.text[: text.response_start], add_special_tokens=False)["input_ids"]
        assert ids.spans_prompt_end == (ids.prompt.tolist() != prompt_ids), text.text


def split_within_a_token(tokenizer) -> tuple[str, str]:
    """Return a training text, split within a token of the whole text."""
    text = TEXTS[0]
    expected = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    end = next(end for start, end in expected if start and end - start > 2 and text[start] != " ")
    return text[: end - 1], text[end - 1 :]


def test_tokens_across_the_prompt_end_are_reported():
    tokenizer, events = wrap(bytes_like()), []
    prompt, response = split_within_a_token(tokenizer)
    rows = [Row(prompt=prompt, references=(response,)), Row(prompt="Name.\n", references=("The",))]
    examples = tokenize(rows, Encoder(tokenizer, DATA), DATA, events.append)
    assert examples.spanning == 1
    assert any("in 1 of 2 rows a token spans the end of the prompt" in getattr(event, "text", "") for event in events)


def test_tokenizer_without_offsets_splits_at_the_prompt():
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    for prompt, response in PAIRS:
        text = Text(prompt + response, len(prompt), len(prompt + response))
        (ids,) = token_ids([text], tokenizer)
        assert ids.prompt.tolist() == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert ids.response.tolist() == tokenizer(response, add_special_tokens=False)["input_ids"]


def test_dolly_ids_match_the_whole_text(shared_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "gpt2")
    rows = load_rows(DataConfig(source=str(shared_data / "dolly"), limit=300), "train")
    encoder = Encoder(tokenizer, DataConfig(max_length=4096, max_prompt_length=4096))
    for row, sequence in zip(rows, encoder.sequences(rows), strict=True):
        expected = tokenizer(row.prompt + row.references[0])["input_ids"]
        assert [*sequence.prompt.tolist(), *sequence.response.tolist()] == [*expected, tokenizer.eos_token_id]


def test_decode_returns_the_response_text():
    for kind in KINDS.values():
        tokenizer = wrap(kind())
        encoder = Encoder(tokenizer, DATA)
        for prompt, response in (("Name three rivers.", " The sea"), ("Name.\n", "The sea"), ("the n", "ame")):
            row = Row(prompt=prompt, references=(response,))
            sequence = encoder.sequence(row, 0)
            text = encoder.decode(sequence.prompt, sequence.response)
            if not token_ids([Text(prompt + response, len(prompt), len(prompt + response))], tokenizer)[
                0
            ].spans_prompt_end:
                assert text == response


# ------------------------------------------------------------------------------------------------- encoder-decoders


def nllb() -> NllbTokenizer:
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "▁": 4}
    vocab |= {letter: 5 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    return NllbTokenizer(vocab=vocab, merges=[], src_lang="eng_Latn", tgt_lang="deu_Latn")


def test_target_has_the_target_language_code():
    tokenizer = nllb()
    source, target = tokenizer("abc")["input_ids"], tokenizer(text_target="abc")["input_ids"]
    assert source != target  # the test needs different ids
    encoder = Encoder(tokenizer, DATA, is_encoder_decoder=True)
    sequence = encoder.sequence(Row(prompt="abc", references=("abc",)), 0)
    assert (sequence.prompt.tolist(), sequence.response.tolist()) == (source, target)
    assert encoder.decode(sequence.prompt, sequence.response) == "abc"


def test_affixes_without_languages_are_equal():
    backend = bytes_like()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert find_affixes(wrap(backend)) == Affixes((0,), (1,), (0,), (1,))


def test_literal_special_tokens_match_transformers():
    tokenizer = wrap(bytes_like())
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<x>", normalized=False)]})
    text = Text("a<x>b</s>", 4, 9)
    (ids,) = token_ids([text], tokenizer, literal=True)
    expected = tokenizer("a<x>b</s>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    np.testing.assert_array_equal([*ids.prompt, *ids.response], expected)
    assert tokenizer("<x>", add_special_tokens=False)["input_ids"] == [tokenizer.convert_tokens_to_ids("<x>")]
