"""How many positions a model can tell apart, by its config."""

from __future__ import annotations

from transformers import PretrainedConfig

# MPT and LED have names of their own; a model with a limit on either side has the lower one.
_FIELDS = (
    "max_position_embeddings",
    "max_seq_len",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
)


def context_of(config: PretrainedConfig) -> int | None:
    """The most positions, prompt and response together; None where there is no limit."""
    text = config.get_text_config()
    return min((n for name in _FIELDS if (n := getattr(text, name, None)) is not None), default=None)
