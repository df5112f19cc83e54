"""Build tiny random composite models and mixtures of experts, with a character tokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from tests import tiny

VOCAB = tiny.VOCAB

_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "vocab_size": VOCAB,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
_IMAGES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "patch_size": 8}
_SIGLIP = _IMAGES | {"num_hidden_layers": 1, "image_size": 16}
_QWEN_IMAGES: dict[str, Any] = {
    "hidden_size": 32,
    "out_hidden_size": 32,
    "depth": 1,
    "num_heads": 4,
    "intermediate_size": 48,
    "patch_size": 8,
}
_QWEN_IDS = {"image_token_id": 40, "video_token_id": 39, "vision_start_token_id": 38, "vision_end_token_id": 37}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

COMPOSITE: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": _TEXT
        | {"sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": 40,
        "boi_token_index": 38,
        "eoi_token_index": 39,
    },
    "mistral3": {
        "text_config": _TEXT | {"model_type": "mistral"},
        "vision_config": _SIGLIP | {"model_type": "pixtral", "head_dim": 8},
        "image_token_index": 40,
    },
    "qwen2_5_vl": {
        "text_config": {k: v for k, v in _TEXT.items() if k != "head_dim"}
        | {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}},
        "vision_config": _QWEN_IMAGES | {"fullatt_block_indexes": [0]},
        **_QWEN_IDS,
    },
    "qwen3_vl": {
        "text_config": _TEXT | {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1], "mrope_interleaved": True}},
        "vision_config": _QWEN_IMAGES | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        **_QWEN_IDS,
    },
    "smolvlm": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _SIGLIP,
        "image_token_id": 40,
        "scale_factor": 2,
    },
}

_MIXED = {k: v for k, v in _TEXT.items() if k != "head_dim"}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": _MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _MIXED | _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "gpt_oss": _TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "phimoe": _MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": _MIXED | _EXPERTS | _DEEPSEEK,
    "deepseek_v3": _MIXED | _EXPERTS | _DEEPSEEK,
    "glm4_moe": _TEXT
    | _EXPERTS
    | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "ernie4_5_moe": _MIXED
    | {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "deepseek_v4": _MIXED
    | _EXPERTS
    | {
        "head_dim": 16,
        "qk_rope_head_dim": 8,
        "num_key_value_heads": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 4,
    },
}


def model(family: str, **fields: Any) -> PreTrainedModel:
    """Return a random model in eval mode; ``fields`` override those of its config."""
    composite = family in COMPOSITE
    config = AutoConfig.for_model(family, **(COMPOSITE | MIXTURES)[family] | fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto = AutoModelForImageTextToText if composite else AutoModelForCausalLM
        result = auto.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in result.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return result


def save(path: Path, family: str, **fields: Any) -> str:
    """Save a random model of the family with a tokenizer and, for a composite model, the file of a processor."""
    model(family, **fields).save_pretrained(path)
    tiny.tokenizer(size=VOCAB).save_pretrained(path)
    if family in COMPOSITE:
        (path / "preprocessor_config.json").write_text('{"do_resize": true}', encoding="utf-8")
    return str(path)


def rows(path: Path, count: int = 24) -> str:
    """Write rows of random words and their reversals. Return the path."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            word = "".join(rng.choices("abcdefghij", k=5))
            file.write(json.dumps({"prompt": word, "response": word[::-1]}) + "\n")
    return str(path)


# Few steps in float32, and responses of a few tokens.
QUICK = (
    *("--steps", 3, "--batch-size", 4, "--dtype", "fp32", "--lr", 0.01),
    *("--set", "eval.max_new_tokens=4", "--set", "rollout.max_new_tokens=4"),
)
