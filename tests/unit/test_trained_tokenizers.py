"""Test tokenizers trained on the data: lossless, deterministic, and with one token per symbol."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, OPTConfig

from distillm_cli.data.builtin import rows
from distillm_cli.models.trained_tokenizers import SMALLEST_BPE, is_trained_spec, train_tokenizer
from tests.codes import raises_code

SPECS = ("chars", "words", "bpe:400")
SPECIAL_CASES = [
    "two  spaces, three   spaces",
    " begins and ends with one ",
    "lines\n\nand\r\n\ttabs\n",
    "Case CASE case",
    "naïve café — 雪だるま 🙂",
    "a <eos> b<pad>c",
    "<unk>",
    "<eos>",
    "don't join 'what' was , apart .",
]
PHONEMES = "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"


def texts() -> list[str]:
    trained = [text for instruction, answers, _ in rows("train", 300, 1) for text in (instruction + "\n", *answers)]
    return trained + SPECIAL_CASES


def tokens_of(tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


@pytest.fixture(scope="module", params=SPECS)
def tokenizer(request):
    return train_tokenizer(request.param, iter(texts()))


@pytest.fixture(scope="module")
def g2p(shared_data: Path) -> list[dict]:
    with (shared_data / "g2p" / "train.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def g2p_texts(g2p) -> list[str]:
    return [text for row in g2p for text in (f"{row['instruction']}\n{row['input']}\n", row["output"])]


@pytest.fixture(scope="module")
def g2p_words(g2p_texts):
    return train_tokenizer("words", iter(g2p_texts))


def test_decoding_restores_every_training_text(tokenizer):
    for text in texts():
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        # No text is tokenized as a special token, so skipping special tokens loses nothing.
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ab AB\n\t<eospadunk>.'-é", max_size=40))
@pytest.mark.parametrize("spec", SPECS)
def test_decoding_restores_any_text_of_known_characters(spec, text):
    trained = _trained(spec)
    assert trained.decode(trained(text)["input_ids"], skip_special_tokens=True) == text


def _trained(spec: str, cache: dict = {}):  # noqa: B006 - hypothesis calls once per example
    if spec not in cache:
        cache[spec] = train_tokenizer(spec, iter(["ab AB\n\t<eos> <pad> <unk>.'-é ab"] * 20))
    return cache[spec]


def test_special_tokens_have_the_first_ids(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert not {0, 1, 2} & set(tokenizer("a <eos> b<pad>c\n<eos>\n<unk>")["input_ids"])
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<eos>"
    assert tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=True) == ""


def test_prompt_and_response_can_be_encoded_separately(tokenizer):
    ids = tokenizer("Add 3 and 5\n")["input_ids"] + tokenizer("8")["input_ids"]
    assert ids == tokenizer("Add 3 and 5\n8")["input_ids"]
    assert tokenizer.decode(ids) == "Add 3 and 5\n8"


def test_training_is_deterministic(tokenizer, request):
    repeated = train_tokenizer(request.node.callspec.params["tokenizer"], iter(texts()))
    assert repeated.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize("config", [None, GPT2Config, LlamaConfig, OPTConfig])
def test_saved_tokenizer_reloads_next_to_a_model_config(tokenizer, config, tmp_path):
    # With a config.json AutoTokenizer looks for the family's own tokenizer class, which must not be used.
    if config is not None:
        config().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)
    for text in SPECIAL_CASES:
        batch = loaded(text)
        assert batch["input_ids"] == tokenizer(text)["input_ids"]
        assert set(batch) == {"input_ids", "attention_mask"}
        assert loaded.decode(batch["input_ids"]) == text


def test_chars_has_one_token_per_character():
    tokenizer = train_tokenizer("chars", iter(["cab\n", "CH AH"]))
    assert tokens_of(tokenizer, "abc CH\n") == ["a", "b", "c", " ", "C", "H", "\n"]
    assert tokens_of(tokenizer, "axxb") == ["a", "<unk>", "<unk>", "b"]
    assert sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get) == ["<pad>", "<eos>", "<unk>", *"\n ACHabc"]


def test_words_are_whole_or_spelled_out():
    tokenizer = train_tokenizer("words", iter(["sit on the mat\n"] * 10 + ["salon theme"] * 9))
    assert tokens_of(tokenizer, "sit on the mat\n") == ["sit", " on", " the", " mat", "\n"]
    assert tokens_of(tokenizer, "salon") == list("salon")
    assert tokens_of(tokenizer, "on the theme") == ["o", "n", " the", *" theme"]


def test_frequent_word_is_in_ten_texts_and_one_per_thousand():
    ten_of = lambda others: ["go now"] * 10 + [f"w{i}" for i in range(others)]  # noqa: E731
    assert tokens_of(train_tokenizer("words", iter(ten_of(9_990))), "go now") == ["go", " now"]
    assert tokens_of(train_tokenizer("words", iter(ten_of(9_991))), "go now") == list("go now")
    nine = ["go now now now"] * 9
    assert tokens_of(train_tokenizer("words", iter(nine)), "go now") == list("go now")


def test_frequent_word_is_whole_at_the_start_of_a_text():
    tokenizer = train_tokenizer("words", iter(["N AH ZH"] * 10 + ["ZH AH"] + ["read the\nAH"] * 9))
    assert tokens_of(tokenizer, "ZH AH") == ["ZH", " AH"]
    assert tokens_of(tokenizer, "AH ZH") == ["A", "H", " ZH"]


def test_bpe_has_at_most_its_size_and_encodes_any_text():
    tokenizer = train_tokenizer("bpe:300", iter(texts()))
    assert len(tokenizer) == 300
    assert tokenizer.decode(tokenizer("Ω≠ unseen \x00 🦆")["input_ids"]) == "Ω≠ unseen \x00 🦆"
    assert len(train_tokenizer(f"bpe:{SMALLEST_BPE}", iter(["abc"]))) == SMALLEST_BPE
    assert len(train_tokenizer("bpe:5000", iter(["abc"]))) < 300


@pytest.mark.parametrize("spec", ["bpe", "bpe:", "bpe:many", "bpe:-3", "char", "words:10", ""])
def test_malformed_tokenizer_specification_is_rejected(spec):
    with raises_code("usage.invalid_tokenizer", "bpe:SIZE", "chars", "words"):
        train_tokenizer(spec, iter(["abc"]))


def test_too_small_bpe_size_is_rejected():
    with raises_code("usage.invalid_tokenizer", "bpe:100", "bpe:259"):
        train_tokenizer("bpe:100", iter(["abc"]))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("empty_texts", [[], ["", ""]])
def test_training_without_text_is_a_data_error(spec, empty_texts):
    with raises_code("data.no_rows", "student.tokenizer"):
        train_tokenizer(spec, iter(empty_texts))


def test_specifications_are_distinguished_from_paths():
    assert all(is_trained_spec(spec) for spec in ("chars", "words", "bpe:1000", "bpe", "bpe:x"))
    assert not any(is_trained_spec(spec) for spec in ("gpt2", "./chars", "models/words", "org/bpe"))


def test_letters_and_phonemes_are_single_tokens(g2p, g2p_words):
    assert tokens_of(g2p_words, "Pronounce the word.\nchump\n") == ["Pronounce", " the", " word.", "\n", *"chump", "\n"]
    assert tokens_of(g2p_words, "CH AH M P") == ["CH", " AH", " M", " P"]
    # Check every row, and also the words of the instruction.
    letters = [row["input"] for row in g2p] + ["the", "word", "pronounce"]
    assert [len(ids) for ids in g2p_words(letters)["input_ids"]] == [len(word) for word in letters]
    phonemes = [row["output"] for row in g2p]
    assert [len(ids) for ids in g2p_words(phonemes)["input_ids"]] == [len(text.split()) for text in phonemes]
    assert {f" {phoneme}" for phoneme in PHONEMES.split()} <= set(g2p_words.get_vocab())
    assert len(g2p_words) < 150


@pytest.mark.parametrize("spec", ["chars", "words", "bpe:1000"])
def test_g2p_rows_decode_to_their_text(spec, g2p_texts, g2p_words):
    tokenizer = g2p_words if spec == "words" else train_tokenizer(spec, iter(g2p_texts))
    sample = g2p_texts[:4000]
    encoded = tokenizer(sample)["input_ids"]
    assert tokenizer.batch_decode(encoded, skip_special_tokens=True) == sample
    assert tokenizer.unk_token_id not in {i for ids in encoded for i in ids}


def test_dolly_rows_decode_to_their_text(shared_data):
    with (shared_data / "dolly" / "valid.jsonl").open(encoding="utf-8") as file:
        prose = [text for line in file for row in [json.loads(line)] for text in (row["prompt"], row["output"])]
    prose = [text if isinstance(text, str) else text[0] for text in prose]
    tokenizer = train_tokenizer("words", iter(prose))
    assert tokenizer.batch_decode(tokenizer(prose)["input_ids"], skip_special_tokens=True) == prose
