"""Build tiny random models and tokenizers: the code of each model family with a few thousand parameters."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from distillm_cli.types import Batch, Sequence, collate

CONTEXT = 64
VOCAB = 41  # tokens of the models that `save` writes

_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
}
_NEOX: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
_OPT: dict[str, Any] = {
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "word_embed_proj_dim": 32,
}

_BART: dict[str, Any] = {
    "d_model": 32,
    "max_position_embeddings": CONTEXT,
    "forced_eos_token_id": None,
    **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 64))},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
}

# name → (model_type, config fields). Dropout stays at the default of the family, so that a missing eval() is noticed.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT2),
    "gpt2-untied": ("gpt2", _GPT2 | {"tie_word_embeddings": False}),
    "opt": ("opt", _OPT),
    "opt-350m": ("opt", _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "llama": ("llama", _LLAMA),
    "llama-tied": ("llama", _LLAMA | {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {k: v for k, v in _LLAMA.items() if k != "head_dim"}),
    "qwen3": ("qwen3", _LLAMA),
    "mistral": ("mistral", _LLAMA | {"sliding_window": 4}),
    "gemma": ("gemma", _LLAMA),
    "gemma2": (
        "gemma2",
        _LLAMA | {"sliding_window": 4, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "gemma3_text",
        _LLAMA
        | {"sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi": ("phi", _NEOX | {"partial_rotary_factor": 0.5}),
    "gptj": ("gptj", _GPT2 | {"rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", _NEOX),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "xglm": (
        "xglm",
        {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": CONTEXT},
    ),
    "cohere": ("cohere", {k: v for k, v in _LLAMA.items() if k != "head_dim"} | {"logit_scale": 0.25}),
    "granite": ("granite", {k: v for k, v in _LLAMA.items() if k != "head_dim"} | {"logits_scaling": 4.0}),
    "falcon_h1": (
        "falcon_h1",
        _LLAMA
        | {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
            "lm_head_multiplier": 0.5,
        },
    ),
    "bart-decoder": ("bart", _BART | {"is_decoder": True, "is_encoder_decoder": False}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT}),
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 6,
            "max_position_embeddings": CONTEXT,
        },
    ),
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}),
}

_T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2}
_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

# The same for encoder-decoders. T5 1.0 ties its head to the embeddings and scales before it; 1.1 and mT5 do not.
SEQ2SEQ: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", _T5),
    "t5-v1.1": ("t5", _T5 | _GATED | {"num_decoder_layers": 3}),
    "mt5": ("mt5", _T5 | _GATED),
    "umt5": ("umt5", _T5 | _GATED),
    "bart": ("bart", _BART),
}
_UNTIED = ("t5-v1.1", "mt5")


def tokenizer(words: str = string.ascii_lowercase, *, pad: bool = True, size: int | None = None):
    """Return a character tokenizer: <eos>, <pad> (if ``pad``), <unk>, the characters, and filler tokens up to ``size``."""
    tokens = ["<eos>", *(["<pad>"] if pad else []), "<unk>", *words]
    while size is not None and len(tokens) < size:
        tokens.append(f"t{len(tokens)}")
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = {"eos_token": "<eos>", "unk_token": "<unk>"} | ({"pad_token": "<pad>"} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def config(family: str, vocab_size: int = 101, **fields: Any):
    """Return the config of a tiny model of ``family``; ``fields`` override its values."""
    model_type, family_fields = (FAMILIES | SEQ2SEQ)[family]
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if family in SEQ2SEQ:
        ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 1}
    return AutoConfig.for_model(model_type, **{"vocab_size": vocab_size, **ids, **family_fields, **fields})


def model(family: str, vocab_size: int = 101, *, seed: int = 0, spread: float = 3.0, **fields: Any) -> PreTrainedModel:
    """Return a random model in eval mode, with weights large enough that attention is not a plain average.

    spread: the standard deviation of the logits, large enough that soft caps have an effect and argmaxes are clear.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto = AutoModelForSeq2SeqLM if family in SEQ2SEQ else AutoModelForCausalLM
        result = auto.from_config(config(family, vocab_size, **fields), dtype=torch.float32).eval()
        if family in _UNTIED:  # as in the published weights; transformers would tie them in a model from scratch
            result.lm_head.weight = nn.Parameter(result.lm_head.weight.detach().clone())
        with torch.no_grad():
            for name, parameter in result.named_parameters():
                # State space parameters (A_log, dt, conv) stay as they were initialized.
                if parameter.dim() >= 2 and "A_log" not in name and "conv" not in name:
                    parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
                elif name.endswith("bias") and "dt" not in name:
                    parameter.normal_(0, 0.3)
            head = result.get_output_embeddings()
            ids = torch.randint(vocab_size, (2, 8))
            responses = {"decoder_input_ids": ids} if family in SEQ2SEQ else {}
            logits = result(ids, **responses, use_cache=False).logits
            head.weight.mul_(spread / logits.std())
    return result


def save(directory: Path, family: str = "llama", *, rows: int = VOCAB, own_tokenizer=None, **fields: Any) -> str:
    """Save a model with `rows` embedding rows and a tokenizer of VOCAB tokens. Return the directory.

    own_tokenizer: a tokenizer to save instead, or False for none.
    """
    model(family, rows, **fields).save_pretrained(directory)
    if own_tokenizer is not False:
        (own_tokenizer or tokenizer(size=VOCAB)).save_pretrained(directory)
    return str(directory)


def batch(lengths: list[tuple[int, int]], vocab: int, seed: int = 0) -> Batch:
    """Return a batch of random sequences with these (prompt, response) lengths."""
    return collate(sequences(lengths, vocab, seed))


def sequences(lengths: list[tuple[int, int]], vocab: int, seed: int = 0) -> list[Sequence]:
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int):
        return torch.randint(vocab, (n,), generator=generator, dtype=torch.int32).numpy()

    return [Sequence(draw(p), draw(r), row) for row, (p, r) in enumerate(lengths)]


def save_encoder(
    directory: Path, *, pooling: str | None = "mean", kind: str = "bert", seed: int = 0, **fields: Any
) -> str:
    """Save a tiny BERT-shaped model with a character tokenizer. Return the directory.

    pooling: declared in the files of sentence-transformers; None: without these files.
    """
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **{"vocab_size": VOCAB, "max_position_embeddings": CONTEXT, **shape, **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(directory)
    backend = tokenizer(string.ascii_lowercase + " ", size=VOCAB)
    backend.save_pretrained(directory)
    if pooling is not None:
        modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        listed = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                  for i, (path, kind) in enumerate(modules)]  # fmt: skip
        (Path(directory) / "modules.json").write_text(json.dumps(listed))
        (Path(directory) / "1_Pooling").mkdir()
        names = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "last": "lasttoken"}
        flags = {f"pooling_mode_{name}": key == pooling for key, name in names.items()}
        (Path(directory) / "1_Pooling" / "config.json").write_text(
            json.dumps({"word_embedding_dimension": 32, **flags})
        )
    return str(directory)
