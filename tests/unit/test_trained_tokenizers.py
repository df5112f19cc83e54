"""Tokenizers trained on the data: lossless, the same every time, and one token per symbol."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, OPTConfig

from distillm_cli.data.builtin import rows
from distillm_cli.errors import DataError, UsageError
from distillm_cli.models.trained_tokenizers import SMALLEST_BPE, is_trained_spec, train_tokenizer

SPECS = ("chars", "words", "bpe:400")
AWKWARD = [
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
    made = [text for instruction, answers, _ in rows("train", 300, 1) for text in (instruction + "\n", *answers)]
    return made + AWKWARD


def pieces(tokenizer, text: str) -> list[str]:
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


def test_decoding_gives_back_every_text_of_the_data(tokenizer):
    for text in texts():
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        # Nothing in a row is taken for a special token, so skipping those loses nothing.
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ab AB\n\t<eospadunk>.'-é", max_size=40))
@pytest.mark.parametrize("spec", SPECS)
def test_decoding_gives_back_any_text_in_the_characters_of_the_data(spec, text):
    made = _of_words(spec)
    assert made.decode(made(text)["input_ids"], skip_special_tokens=True) == text


def _of_words(spec: str, cache: dict = {}):  # noqa: B006 - hypothesis calls once per example
    if spec not in cache:
        cache[spec] = train_tokenizer(spec, iter(["ab AB\n\t<eos> <pad> <unk>.'-é ab"] * 20))
    return cache[spec]


def test_special_tokens_come_first_and_only_by_id(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert not {0, 1, 2} & set(tokenizer("a <eos> b<pad>c\n<eos>\n<unk>")["input_ids"])
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<eos>"
    assert tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=True) == ""


def test_prompt_and_response_may_be_encoded_apart(tokenizer):
    apart = tokenizer("Add 3 and 5\n")["input_ids"] + tokenizer("8")["input_ids"]
    assert apart == tokenizer("Add 3 and 5\n8")["input_ids"]
    assert tokenizer.decode(apart) == "Add 3 and 5\n8"


def test_the_same_texts_give_the_same_tokenizer(tokenizer, request):
    again = train_tokenizer(request.node.callspec.params["tokenizer"], iter(texts()))
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize("config", [None, GPT2Config, LlamaConfig, OPTConfig])
def test_it_survives_saving_beside_a_model(tokenizer, config, tmp_path):
    # A config.json makes AutoTokenizer look for the family's own tokenizer class, which must not be taken.
    if config is not None:
        config().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)
    for text in AWKWARD:
        batch = loaded(text)
        assert batch["input_ids"] == tokenizer(text)["input_ids"]
        assert set(batch) == {"input_ids", "attention_mask"}
        assert loaded.decode(batch["input_ids"]) == text


def test_chars_is_one_token_per_character_and_unknown_ones_are_unk():
    tokenizer = train_tokenizer("chars", iter(["cab\n", "CH AH"]))
    assert pieces(tokenizer, "abc CH\n") == ["a", "b", "c", " ", "C", "H", "\n"]
    assert pieces(tokenizer, "axxb") == ["a", "<unk>", "<unk>", "b"]
    assert sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get) == ["<pad>", "<eos>", "<unk>", *"\n ACHabc"]


def test_words_are_whole_or_spelled_never_cut():
    tokenizer = train_tokenizer("words", iter(["sit on the mat\n"] * 10 + ["salon theme"] * 9))
    assert pieces(tokenizer, "sit on the mat\n") == ["sit", " on", " the", " mat", "\n"]
    assert pieces(tokenizer, "salon") == list("salon")
    assert pieces(tokenizer, "on the theme") == ["o", "n", " the", *" theme"]


def test_a_word_is_frequent_in_ten_texts_and_one_in_a_thousand():
    ten_of = lambda others: ["go now"] * 10 + [f"w{i}" for i in range(others)]  # noqa: E731
    assert pieces(train_tokenizer("words", iter(ten_of(9_990))), "go now") == ["go", " now"]
    assert pieces(train_tokenizer("words", iter(ten_of(9_991))), "go now") == list("go now")
    nine = ["go now now now"] * 9
    assert pieces(train_tokenizer("words", iter(nine)), "go now") == list("go now")


def test_a_rare_opening_is_whole_when_the_word_is_frequent_elsewhere():
    tokenizer = train_tokenizer("words", iter(["N AH ZH"] * 10 + ["ZH AH"] + ["read the\nAH"] * 9))
    assert pieces(tokenizer, "ZH AH") == ["ZH", " AH"]
    assert pieces(tokenizer, "AH ZH") == ["A", "H", " ZH"]


def test_bpe_is_at_most_its_size_and_writes_anything():
    tokenizer = train_tokenizer("bpe:300", iter(texts()))
    assert len(tokenizer) == 300
    assert tokenizer.decode(tokenizer("Ω≠ unseen \x00 🦆")["input_ids"]) == "Ω≠ unseen \x00 🦆"
    assert len(train_tokenizer(f"bpe:{SMALLEST_BPE}", iter(["abc"]))) == SMALLEST_BPE
    assert len(train_tokenizer("bpe:5000", iter(["abc"]))) < 300


@pytest.mark.parametrize("spec", ["bpe", "bpe:", "bpe:many", "bpe:-3", "char", "words:10", ""])
def test_a_spec_of_another_form_is_answered_with_the_forms(spec):
    with pytest.raises(UsageError, match=r"expected bpe:SIZE .*, chars or words"):
        train_tokenizer(spec, iter(["abc"]))


def test_a_bpe_size_below_the_bytes_is_answered_with_the_least():
    with pytest.raises(UsageError, match=r"a vocabulary of 100 .*bpe:100; the minimum is bpe:259"):
        train_tokenizer("bpe:100", iter(["abc"]))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("nothing", [[], ["", ""]])
def test_no_text_is_an_error_of_the_data(spec, nothing):
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_tokenizer(spec, iter(nothing))


def test_a_spec_is_told_from_a_path():
    assert all(is_trained_spec(spec) for spec in ("chars", "words", "bpe:1000", "bpe", "bpe:x"))
    assert not any(is_trained_spec(spec) for spec in ("gpt2", "./chars", "models/words", "org/bpe"))


def test_a_letter_and_a_phoneme_are_each_one_token(g2p, g2p_words):
    assert pieces(g2p_words, "Pronounce the word.\nchump\n") == ["Pronounce", " the", " word.", "\n", *"chump", "\n"]
    assert pieces(g2p_words, "CH AH M P") == ["CH", " AH", " M", " P"]
    # Every row: also the words of the instruction, should they be asked for.
    letters = [row["input"] for row in g2p] + ["the", "word", "pronounce"]
    assert [len(ids) for ids in g2p_words(letters)["input_ids"]] == [len(word) for word in letters]
    phonemes = [row["output"] for row in g2p]
    assert [len(ids) for ids in g2p_words(phonemes)["input_ids"]] == [len(text.split()) for text in phonemes]
    assert {f" {phoneme}" for phoneme in PHONEMES.split()} <= set(g2p_words.get_vocab())
    assert len(g2p_words) < 150


@pytest.mark.parametrize("spec", ["chars", "words", "bpe:1000"])
def test_real_rows_come_back_whole(spec, g2p_texts, g2p_words):
    tokenizer = g2p_words if spec == "words" else train_tokenizer(spec, iter(g2p_texts))
    some = g2p_texts[:4000]
    encoded = tokenizer(some)["input_ids"]
    assert tokenizer.batch_decode(encoded, skip_special_tokens=True) == some
    assert tokenizer.unk_token_id not in {i for ids in encoded for i in ids}


def test_prose_comes_back_whole(shared_data):
    with (shared_data / "dolly" / "valid.jsonl").open(encoding="utf-8") as file:
        prose = [text for line in file for row in [json.loads(line)] for text in (row["prompt"], row["output"])]
    prose = [text if isinstance(text, str) else text[0] for text in prose]
    tokenizer = train_tokenizer("words", iter(prose))
    assert tokenizer.batch_decode(tokenizer(prose)["input_ids"], skip_special_tokens=True) == prose
