"""Run one token through a GPT-2 or a Llama-like model, without the overhead of transformers.

For one token of a few rows most of the time of a model's own forward is Python overhead: module calls, hooks, masks,
configs. These steps use the weights directly. They are used only for the transformers classes that they implement (no
subclass, adapter, quantized layer or hook), and only if they match the model's own logits
(`decoding_checks.find_fast_paths`). ``DISTILLM_CPU_FAST=0`` turns them off.

Shape letters: B sequences, D width, H heads, K key-value heads, W width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from distillm_cli.models import cpu
from distillm_cli.models.cpu.packed import PackedLinear
from distillm_cli.models.generation.cache import ContiguousCache, ContiguousLayer, attend_one_token
from distillm_cli.models.generation.working_copy import fused_activation
from distillm_cli.models.model_families import family_of, is_transformers_class

# (ids [B], positions [B, 1], cache) → last hidden states [B, D]
DecodeStep = Callable[[torch.Tensor, torch.Tensor, ContiguousCache], torch.Tensor]

# In a larger model the products dominate the time, and a second copy of some weights needs too much memory.
_MOST_WEIGHTS = 1_000_000_000


def decode_step_of(trunk: nn.Module | None) -> DecodeStep | None:
    """Return the step of this model with its current weights; None if there is none for it."""
    if trunk is None or not cpu.is_enabled() or not is_small(weight_count(trunk)):
        return None
    if any(is_altered(module) for module in trunk.modules()):
        return None
    if is_gpt2(trunk):
        return Gpt2Step(trunk)
    return LlamaStep(trunk) if is_llama(trunk) else None


class Gpt2Step:
    def __init__(self, trunk: nn.Module):
        self.tokens = trunk.wte.weight
        self.positions = trunk.wpe.weight
        self.norm = _layer_norm(trunk.ln_f)
        self.blocks = [_Gpt2Block(block) for block in trunk.h]

    def __call__(self, ids_B: torch.Tensor, positions_B1: torch.Tensor, cache: ContiguousCache) -> torch.Tensor:
        mask = cache.mask()
        x_BD = F.embedding(ids_B, self.tokens) + F.embedding(positions_B1[:, 0], self.positions)
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x_BD = block(x_BD, layer, mask)
        return self.norm(x_BD)


class _Gpt2Block:
    def __init__(self, block: nn.Module):
        attention, mlp = block.attn, block.mlp
        self.heads = attention.num_heads
        self.head_width = attention.head_dim
        self.scaling = attention.scaling
        self.norm_1 = _layer_norm(block.ln_1)
        self.norm_2 = _layer_norm(block.ln_2)
        weights = (attention.c_attn, attention.c_proj, mlp.c_fc, mlp.c_proj)
        self.qkv, self.out, self.up, self.down = (PackedLinear(conv.weight.t(), conv.bias) for conv in weights)
        self.activation = fused_activation(mlp.act)

    def __call__(self, x_BD: torch.Tensor, layer: ContiguousLayer, mask: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm_1(x_BD)).view(len(x_BD), 3, self.heads, self.head_width)
        query_BHW, key_BKW, value_BKW = qkv.unbind(1)
        layer.append(key_BKW, value_BKW)
        x_BD = x_BD + self.out(attend_one_token(query_BHW, layer.keys, layer.values, mask, self.scaling).flatten(1))
        return x_BD + self.down(self.up(self.norm_2(x_BD), self.activation))


class LlamaStep:
    def __init__(self, trunk: nn.Module):
        self.tokens = trunk.embed_tokens.weight
        self.norm = _rms_norm(trunk.norm)
        self.rotary = trunk.rotary_emb
        self.layers = [_LlamaLayer(layer) for layer in trunk.layers]

    def __call__(self, ids_B: torch.Tensor, positions_B1: torch.Tensor, cache: ContiguousCache) -> torch.Tensor:
        mask = cache.mask()
        x_BD = F.embedding(ids_B, self.tokens)
        cos_B1W, sin_B1W = self.rotary(x_BD[:, None], positions_B1)
        # transformers maps (a, b) to (−b, a) before the product; here the sign is applied to the sine.
        half = sin_B1W.shape[-1] // 2
        sin_B1W = torch.cat([-sin_B1W[..., :half], sin_B1W[..., half:]], -1)
        for block, layer in zip(self.layers, cache.layers, strict=True):
            x_BD = block(x_BD, layer, mask, cos_B1W, sin_B1W)
        return self.norm(x_BD)


class _LlamaLayer:
    def __init__(self, layer: nn.Module):
        attention, mlp = layer.self_attn, layer.mlp
        self.head_width = attention.head_dim
        self.scaling = attention.scaling
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.heads = [projection.out_features // self.head_width for projection in projections]
        self.qkv = _joined(*projections)
        self.out = _joined(attention.o_proj)
        self.gate_up = _joined(mlp.gate_proj, mlp.up_proj)
        self.down = _joined(mlp.down_proj)
        self.activation = fused_activation(mlp.act_fn)
        self.norm_1 = _rms_norm(layer.input_layernorm)
        self.norm_2 = _rms_norm(layer.post_attention_layernorm)
        self.query_norm, self.key_norm = (
            _rms_norm(getattr(attention, name)) if hasattr(attention, name) else None for name in ("q_norm", "k_norm")
        )

    def __call__(self, x_BD, layer: ContiguousLayer, mask, cos_B1W, sin_B1W) -> torch.Tensor:
        qkv = self.qkv(self.norm_1(x_BD)).view(len(x_BD), sum(self.heads), self.head_width)
        if self.query_norm is None:
            rotated, value_BKW = qkv.split([self.heads[0] + self.heads[1], self.heads[2]], 1)
        else:
            query_BHW, key_BKW, value_BKW = qkv.split(self.heads, 1)
            rotated = torch.cat([self.query_norm(query_BHW), self.key_norm(key_BKW)], 1)
        rotated = rotated * cos_B1W + rotated.roll(self.head_width // 2, -1) * sin_B1W
        query_BHW, key_BKW = rotated.split(self.heads[:2], 1)
        layer.append(key_BKW, value_BKW)
        x_BD = x_BD + self.out(attend_one_token(query_BHW, layer.keys, layer.values, mask, self.scaling).flatten(1))
        gate, up = self.gate_up(self.norm_2(x_BD)).chunk(2, -1)
        return x_BD + self.down(self.activation(gate) * up)


def is_small(weights: int) -> bool:
    """Return whether a second copy of this number of weights is cheap enough."""
    return weights <= _MOST_WEIGHTS


def weight_count(trunk: nn.Module) -> int:
    """Return the number of weights."""
    return sum(weight.numel() for weight in trunk.parameters())


def is_gpt2(trunk: nn.Module) -> bool:
    """Return whether trunk and blocks are transformers' own GPT-2 classes."""
    return is_transformers_class(trunk, "GPT2Model") and all(_plain_gpt2(block) for block in trunk.h)


def is_llama(trunk: nn.Module) -> bool:
    """Return the same for Llama and the families with the same structure."""
    family = family_of(trunk.config.model_type)
    if family.cpu_layout != "llama" or not is_transformers_class(trunk, f"{family.class_prefix}Model"):
        return False
    return all(_plain_llama(layer, family.class_prefix) for layer in trunk.layers)


def _plain_gpt2(block: nn.Module) -> bool:
    attention, mlp = block.attn, block.mlp
    weights = (attention.c_attn, attention.c_proj, mlp.c_fc, mlp.c_proj)
    parts = ((block, "GPT2Block"), (attention, "GPT2Attention"), (mlp, "GPT2MLP"))
    own = all(is_transformers_class(module, name) for module, name in parts)
    return (
        own and all(is_transformers_class(conv, "Conv1D") for conv in weights) and not hasattr(block, "crossattention")
    )


def _plain_llama(layer: nn.Module, prefix: str) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    weights = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    weights += (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    parts = ((layer, "DecoderLayer"), (attention, "Attention"), (mlp, "MLP"))
    own = all(is_transformers_class(module, f"{prefix}{name}") for module, name in parts)
    return own and all(type(linear) is nn.Linear for linear in weights)


def is_altered(module: nn.Module) -> bool:
    """Return whether a call of the module differs from its class: it has hooks, or its own forward as set by accelerate."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _joined(*linears: nn.Linear) -> PackedLinear:
    """Return several projections of one input as a single product."""
    biases = [linear.bias for linear in linears]
    if len(linears) == 1:
        return PackedLinear(linears[0].weight, biases[0])
    bias = None if biases[0] is None else torch.cat(biases)
    return PackedLinear(torch.cat([linear.weight for linear in linears]), bias)


def _layer_norm(norm: nn.LayerNorm) -> Callable[[torch.Tensor], torch.Tensor]:
    return partial(
        F.layer_norm, normalized_shape=norm.normalized_shape, weight=norm.weight, bias=norm.bias, eps=norm.eps
    )


def _rms_norm(norm: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return partial(
        F.rms_norm, normalized_shape=norm.weight.shape, weight=norm.weight, eps=norm.variance_epsilon
    )  # fmt: skip
