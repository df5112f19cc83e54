"""What a config says of positions: how many the model can tell apart, and where it changes how."""

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


def longrope_bound(config: PretrainedConfig) -> int | None:
    """Beyond how many positions a model takes the second of its two sets of rotary factors; None for other models."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    found = [p for p in (rope, *rope.values()) if isinstance(p, dict) and p.get("rope_type") == "longrope"]
    bounds = [p.get("original_max_position_embeddings") for p in found]
    bounds += [getattr(text, "original_max_position_embeddings", None)] if found else []
    return min((n for n in bounds if n is not None), default=None)
