"""Make random models of given shapes on a device, without files."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from distillm_cli.models.backbone import Backbone

_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def gpt2(layers: int, width: int, heads: int, vocab: int = 50257, **fields: object) -> AutoConfig:
    """Return the config of a GPT-2."""
    sizes = {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": vocab}
    return AutoConfig.for_model("gpt2", **sizes, **_NO_DROPOUT, **(_NO_TOKENS | fields))


def llama(layers: int, width: int, heads: int, inner: int, vocab: int = 128256, **fields: object) -> AutoConfig:
    """Return the config of a Llama 3 with eight key-value heads, or fewer if it has fewer heads."""
    return AutoConfig.for_model(
        "llama", num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=inner,
        num_key_value_heads=min(8, heads), vocab_size=vocab, max_position_embeddings=2048, **(_NO_TOKENS | fields),
    )  # fmt: skip


PAIRS = {  # name → (teacher, student)
    "GPT-2 XL → GPT-2": (gpt2(48, 1600, 25), gpt2(12, 768, 12)),
    "Llama 8B → 1B": (llama(32, 4096, 32, 14336), llama(16, 2048, 32, 8192, tie_word_embeddings=True)),
}
TINY_PAIRS = {
    "tiny GPT-2": (gpt2(2, 64, 4, 1031), gpt2(1, 32, 2, 1031)),
    "tiny Llama": (llama(2, 64, 4, 96, 1031), llama(1, 32, 2, 48, 1031, tie_word_embeddings=True)),
}


def tokenizer_without_end() -> PreTrainedTokenizerFast:
    """Return a tokenizer without an end-of-sequence token, so that every response has its full length."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


def backbone(config: AutoConfig, dtype: torch.dtype, device: torch.device) -> Backbone:
    """Return a model with random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return Backbone(model.eval(), tokenizer_without_end(), config.vocab_size)
