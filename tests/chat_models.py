"""Build tiny chat models: a tokenizer with control tokens and a chat template, and random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TOKENS = ("<bos>", "<eos>", "<sys>", "<user>", "<bot>", "<end>", "<stop>", "<call>", "<chan>", "<msg>")
STRUCTURE = ("<think>", "</think>")  # added tokens that are not special, as in Qwen's tokenizer

USER = "{%- if m.role != 'assistant' -%}<user>{{ m.content }}<end>{{ '\\n' }}{%- else -%}"
CALLS = (
    "{%- for c in m.tool_calls or [] -%}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}{%- endfor -%}"
)


def loop(body: str, prompt: str, *, before: str = "<bos>", after: str = "") -> str:
    """Return a template that writes ``body`` for each message, and ``prompt`` where a response is to be generated."""
    last = "{%- set last = messages | length - 1 -%}"
    prompt = "{%- if add_generation_prompt -%}" + prompt + "{%- else -%}" + after + "{%- endif -%}"
    return last + before + "{%- for m in messages -%}" + body + "{%- endfor -%}" + prompt


# Responses may have tool calls. The turn ends with a token other than the tokenizer's end-of-sequence token.
CHAT = loop(USER + "<bot>{{ m.content or '' }}" + CALLS + "<end>{{ '\\n' }}{%- endif -%}", "<bot>")


def tokenizer(template: str | dict | None, eos: str = "<eos>") -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with the control tokens above."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in STRUCTURE])
    result = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token=eos, pad_token=eos)
    result.chat_template = template
    return result


def save(directory: Path, template: str | None = CHAT, eos: str = "<eos>", *, width: int = 64, layers: int = 1) -> str:
    """Save a random Llama with this tokenizer. Return the directory."""
    result = tokenizer(template, eos)
    config = LlamaConfig(
        vocab_size=len(result),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=result.bos_token_id,
        eos_token_id=result.eos_token_id,
        pad_token_id=result.pad_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(width)
        LlamaForCausalLM(config).save_pretrained(directory)
    result.save_pretrained(directory)
    return str(directory)
