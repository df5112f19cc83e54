"""Test an encoder-decoder with language codes: codes on targets, and the forced first token."""

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

from tests.command_line import assert_error

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


def test_language_codes_are_trained_and_forced(cli, tmp_path, model):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    languages = ["--set", "data.source_language=eng_Latn", "--set", "data.target_language=deu_Latn"]
    run = ["sft", "--model", model, "--data", data, "--set", f"data.valid={data}", *languages, "--steps", 400]
    run += ["--batch-size", 4, "--lr", "3e-3", "--max-length", 32, "--dtype", "fp32"]
    run += ["--set", "data.max_prompt_length=16"]
    run += [f"--set={field}" for field in ("eval.report_rows=0", "train.save_steps=1000", "train.eval_steps=1000")]
    code, _, err = cli(*run, "--json", "--output", "a")
    assert code == 0, err

    # With transformers alone, generation gives the labels of the tokenizer's target mode.
    tokenizer, trained = AutoTokenizer.from_pretrained("a"), AutoModelForSeq2SeqLM.from_pretrained("a")
    german = tokenizer.convert_tokens_to_ids("deu_Latn")
    assert trained.generation_config.forced_bos_token_id == german
    tokenizer.src_lang, tokenizer.tgt_lang = "eng_Latn", "deu_Latn"
    inputs = tokenizer(["abc", "def"], return_tensors="pt")
    labels = tokenizer(text_target=["cba", "fed"], return_tensors="pt")["input_ids"]
    generated = trained.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=1)
    assert generated[:, 1:].tolist() == labels.tolist(), (
        "the targets are learned, including language codes and end tokens"
    )
    assert (labels[:, 0] == german).all()

    more = ["--data", data, "--greedy", "--max-new-tokens", 8, "--output", "responses.jsonl", "--json"]
    code, _, err = cli("generate", "--model", "a", *more)
    assert code == 0, err
    outputs = [json.loads(line)["output"] for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert outputs == [row["completion"] for row in ROWS]


def test_unknown_language_is_an_error(cli, model):
    for path, code in ((model, "xxx_Latn"), ("builtin", "deu_Latn")):
        options = ["--prompt", "abc", "--set", f"data.target_language={code}", "--output", "b.jsonl", "--json"]
        outcome = cli("generate", "--model", path, *options)
        assert_error(outcome, "usage.invalid_language", f"data.target_language = {code}")
