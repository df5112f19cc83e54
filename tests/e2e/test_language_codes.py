"""An encoder-decoder with language codes, through the commands: codes on targets, and the first token forced."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    M2M100Config,
    M2M100ForConditionalGeneration,
    NllbTokenizer,
)

ROWS = [{"prompt": text, "completion": text[::-1]} for text in ("abc", "bcd", "cde", "def")]


@pytest.fixture
def model(tmp_path) -> str:
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "▁": 4}
    vocab |= {letter: 5 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    tokenizer = NllbTokenizer(vocab=vocab, merges=[], src_lang="eng_Latn", tgt_lang="fra_Latn")
    config = M2M100Config(
        vocab_size=len(tokenizer),
        d_model=48,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=64,
        decoder_start_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        M2M100ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_codes_are_on_targets_and_forced_in_decoding(typed, tmp_path, model):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    languages = ["--set", "data.source_language=eng_Latn", "--set", "data.target_language=deu_Latn"]
    run = ["sft", "--model", model, "--data", data, "--set", f"data.valid={data}", *languages, "--steps", 400]
    run += [
        "--batch-size",
        4,
        "--lr",
        "3e-3",
        "--max-length",
        32,
        "--set",
        "data.max_prompt_length=16",
        "--dtype",
        "fp32",
    ]
    run += [f"--set={field}" for field in ("eval.report_rows=0", "train.save_steps=1000", "train.eval_steps=1000")]
    code, _, err = typed(*run, "--json", "--output", "a")
    assert code == 0, err

    # transformers, with the directory alone, is asked as the tokenizer's source and target modes have it.
    tokenizer, trained = AutoTokenizer.from_pretrained("a"), AutoModelForSeq2SeqLM.from_pretrained("a")
    german = tokenizer.convert_tokens_to_ids("deu_Latn")
    assert trained.generation_config.forced_bos_token_id == german
    tokenizer.src_lang, tokenizer.tgt_lang = "eng_Latn", "deu_Latn"
    inputs = tokenizer(["abc", "def"], return_tensors="pt")
    labels = tokenizer(text_target=["cba", "fed"], return_tensors="pt")["input_ids"]
    said = trained.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=1)
    assert said[:, 1:].tolist() == labels.tolist(), "it has learned the targets, codes and ends included"
    assert (labels[:, 0] == german).all()

    more = ["--data", data, "--greedy", "--max-new-tokens", 8, "--output", "said.jsonl", "--json"]
    code, _, err = typed("generate", "--model", "a", *more)
    assert code == 0, err
    outputs = [json.loads(line)["output"] for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert outputs == [row["completion"] for row in ROWS]


def test_languages_that_a_tokenizer_does_not_have_are_refused(typed, model):
    def refusal(model: str, code: str) -> str:
        asked = ["--prompt", "abc", "--set", f"data.target_language={code}", "--output", "b.jsonl", "--json"]
        exit_code, result, _ = typed("generate", "--model", model, *asked)
        assert exit_code == 2
        return result["message"]

    assert "data.target_language = xxx_Latn: the tokenizer does not know this language" in refusal(model, "xxx_Latn")
    assert "the tokenizer has no language codes" in refusal("builtin", "deu_Latn")
