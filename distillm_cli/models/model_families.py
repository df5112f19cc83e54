"""List the exceptions of model families, and the config fields that show them.

Every exception by family is an entry of `FAMILIES`, with the reason; no other module compares a ``model_type`` with a
name. Config fields that have different names in different families are tuples below the table. This module is light: it
imports neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """Hold the exceptions of a family. The defaults are those of a family without exceptions.

    name: the config's ``model_type``. why: the reason for the entry. paper_name: its name in the DistiLLM paper, whose
    learning rates and lengths are then the defaults of base models. hub_names: matches names of its base models on the
    hub, used if no config is available. class_prefix, cpu_layout: prefix of its classes in transformers, and the pass
    of ``models/cpu`` that implements them. head_scales: config field → power, in place of `HEAD_SCALE_FIELDS`; None:
    the family ignores the field. has_t5_head: whether embeddings are drawn with spread 1. t5_head_scale: the config
    field that selects whether the head's input is multiplied by width^−0.5; None: never. decodes_in_layers: whether
    layers hold the state of decoding themselves, so that no row can be padded or dropped. layers_depend_on_index:
    whether a layer computes something that depends on its index and is not a weight. uncalled_layers: linear layers
    whose weights are used without a call of the layer, so that an adapter has no effect. values_under_adapter: values
    that backpropagation saves for each adapted weight column and position (counted).
    """

    name: str
    why: str = "no exceptions"
    paper_name: str | None = None
    hub_names: re.Pattern[str] | None = None
    class_prefix: str | None = None
    cpu_layout: Literal["gpt2", "llama"] | None = None
    head_scales: Mapping[str, int | None] = field(default_factory=dict)
    has_t5_head: bool = False
    t5_head_scale: str | None = None
    decodes_in_layers: bool = False
    layers_depend_on_index: bool = False
    uncalled_layers: tuple[str, ...] = ()
    values_under_adapter: int = 9


_STATE_SPACE = {
    "why": "state space layers read out_proj, conv1d, x_proj and dt_proj without calling them: peft refuses mamba and "
    "mamba2, elsewhere an adapter would do nothing until it is merged",
    "uncalled_layers": ("out_proj", "conv1d", "x_proj", "dt_proj"),
}

_ENTRIES = (
    Family(
        "gpt2",
        why="the paper's; its GELU is many operations, whose results are saved",
        paper_name="GPT-2",
        hub_names=re.compile(r"(openai-community/)?(distil)?gpt2(-medium|-large|-xl)?", re.IGNORECASE),
        class_prefix="GPT2",
        cpu_layout="gpt2",
        values_under_adapter=24,
    ),
    Family(
        "opt",
        why="the paper's",
        paper_name="OPT",
        hub_names=re.compile(r"facebook/opt-[\d.]+[mb]", re.IGNORECASE),
    ),
    Family(
        "llama",
        why="the paper's OpenLLaMA",
        paper_name="Llama",
        hub_names=re.compile(r"(?!.*(instruct|chat))([^/]+/)?[^/]*llama[^/]*", re.IGNORECASE),
        class_prefix="Llama",
        cpu_layout="llama",
    ),
    Family("mistral", why="same structure as Llama", class_prefix="Mistral", cpu_layout="llama"),
    Family("qwen2", why="same structure as Llama", class_prefix="Qwen2", cpu_layout="llama"),
    Family("qwen3", why="same structure as Llama", class_prefix="Qwen3", cpu_layout="llama"),
    Family("t5", why="T5 v1.0 scales its tied head", has_t5_head=True, t5_head_scale="scale_decoder_outputs"),
    Family("longt5", why="as T5", has_t5_head=True, t5_head_scale="scale_decoder_outputs"),
    Family("umt5", why="scales its head if it is tied", has_t5_head=True, t5_head_scale="tie_word_embeddings"),
    Family("mt5", why="never scales its head", has_t5_head=True),
    Family("hyperclovax", why="multiplies by logits_scaling, others divide", head_scales={"logits_scaling": 1}),
    Family("mpt", why="has a logit_scale that it ignores", head_scales={"logit_scale": None}),
    Family("recurrent_gemma", why="recurrent state is stored in the layers", decodes_in_layers=True),
    Family("xlstm", why="recurrent state is stored in the layers", decodes_in_layers=True),
    Family("diffllama", why="each layer has a constant that depends on its index", layers_depend_on_index=True),
    Family("mamba", **_STATE_SPACE),
    Family("mamba2", **_STATE_SPACE),
    Family("falcon_mamba", **_STATE_SPACE),
    Family("falcon_h1", **_STATE_SPACE),
    Family("nemotron_h", **_STATE_SPACE),
)
FAMILIES: dict[str, Family] = {entry.name: entry for entry in _ENTRIES}

# Sizes of hub models that are not part of the name.
HUB_PARAMETERS = {"distilgpt2": 82e6, "gpt2": 124e6, "gpt2-medium": 355e6, "gpt2-large": 774e6, "gpt2-xl": 1.56e9}

# Fields for the largest number of positions, in transformers and in config.json. MPT and LED have their own names. A model
# with two limits has the lower one.
CONTEXT_FIELDS = (
    "max_position_embeddings",
    "max_seq_len",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
)
CONTEXT_FIELDS_ON_DISK = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
)

# Scales between `hidden @ weight.T + bias` and the logits: config field → power. Their product is the scale.
HEAD_SCALE_FIELDS = {"logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1, "logits_mup_width_multiplier": -1}
SOFT_CAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

ATTENTION_DROPOUT_FIELDS = ("attention_dropout", "attn_pdrop", "dropout_rate")  # the last is T5's
DECODER_DEPTH_FIELDS = ("num_decoder_layers", "decoder_layers")  # num_hidden_layers is then the encoder's
KEY_VALUE_HEADS_FIELDS = ("num_key_value_heads", "num_kv_heads")
INITIAL_SPREAD_FIELDS = ("initializer_range", "init_std")

# Fields that are not copied to a config of another shape, and fields that scale with the width.
IDENTITY_FIELDS = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "quantization_config",
    "transformers_version",
)
FEED_FORWARD_FIELDS = (
    "intermediate_size",
    "ffn_dim",
    "d_ff",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "n_inner",
    "ffn_hidden_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
)

# Layers that peft takes to be experts in a model that has some (peft.utils.transformers_weight_conversion).
PEFT_EXPERT_NAMES = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")

# Generic tokenizer classes, which only read tokenizer.json. AutoTokenizer would use the family's class instead.
PLAIN_TOKENIZER_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")


def family_of(model_type: str) -> Family:
    """Return the entry of a family, or the default one if it has none."""
    return FAMILIES.get(model_type) or Family(model_type)


def is_transformers_class(module: Any, name: str) -> bool:
    """Return whether an object's class is transformers' own class of that name, and not a subclass."""
    return type(module).__name__ == name and type(module).__module__.startswith("transformers.")


def family_of_hub_name(name: str) -> Family | None:
    """Return the family of a hub name; None if the name is not known, or that of a model with a chat template."""
    for family in FAMILIES.values():
        if family.hub_names is not None and family.hub_names.fullmatch(name):
            return family
    return None


def context_of(config: PretrainedConfig) -> int | None:
    """Return the maximum number of positions of prompt and response together, None without a limit."""
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in CONTEXT_FIELDS]
    return min((limit for limit in limits if limit is not None), default=None)


def longrope_bound(config: PretrainedConfig) -> int | None:
    """Return the length beyond which a model uses its second set of rotary factors; None for models with one set."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    longropes = [p for p in (rope, *rope.values()) if isinstance(p, dict) and p.get("rope_type") == "longrope"]
    bounds = [p.get("original_max_position_embeddings") for p in longropes]
    if longropes:
        bounds.append(getattr(text, "original_max_position_embeddings", None))
    return min((bound for bound in bounds if bound is not None), default=None)


def head_scale_and_cap(config: PretrainedConfig) -> tuple[float, float | None]:
    """Return the factor of the logits after the head's product, and their soft cap, None without one."""
    config = config.get_text_config()
    exceptions = family_of(config.model_type).head_scales
    scale = t5_head_scale(config)
    for name, usual_power in HEAD_SCALE_FIELDS.items():
        power = exceptions.get(name, usual_power)
        value = getattr(config, name, None)
        if power is not None and value is not None:
            scale *= float(value) ** power
    caps = (getattr(config, name, None) for name in SOFT_CAP_FIELDS)
    return scale, next((float(cap) for cap in caps if cap is not None), None)


def t5_head_scale(config: PretrainedConfig) -> float:
    """Return the factor by which a T5 scales its logits (via the head's input); 1 for other models.

    `Backbone.check_head` detects versions of transformers with another scale.
    """
    name = family_of(config.model_type).t5_head_scale
    return config.hidden_size**-0.5 if name is not None and getattr(config, name, False) else 1.0


def decoder_depth(config: PretrainedConfig) -> int:
    """Return the number of layers; of an encoder-decoder, those of the decoder."""
    layers = getattr(config, "num_hidden_layers", 1)
    if not config.is_encoder_decoder:
        return layers
    depths = (getattr(config, name, None) for name in DECODER_DEPTH_FIELDS)
    return next((depth for depth in depths if depth), layers)


def expert_counts(config: PretrainedConfig) -> tuple[int, int]:
    """Return the number of experts per token, and of all experts; (0, 0) without experts."""
    chosen = getattr(config, "num_experts_per_tok", None) or 0
    total: Any = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    return chosen, total


def token_compression(config: PretrainedConfig) -> int:
    """Return the number of tokens that the coarsest attention layer compresses into one; 0 without compression."""
    rates = getattr(config.get_text_config(), "compress_rates", None) or {}
    return max(rates.values(), default=0)
