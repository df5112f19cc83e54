"""One token through a GPT-2 or a Llama-like model, written out: what transformers computes, without what it looks up.

For one token of a few rows most of a model's own forward is Python around the products: module calls, hooks, masks,
configs. These steps read the weights where they are and do the products. They are used for the classes of transformers
they were written after and nothing else (no subclass, adapter, quantised layer or hook), and only where they have given
the model's own logits (`decoding.ways`).

Shape letters: B sequences, D width, H heads, K key-value heads, W width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from distillm_cli.models.cpu.products import Linear
from distillm_cli.models.generation.cache import ContiguousCache, ContiguousLayer, attend

# (ids [B], positions [B, 1], cache) → last hidden states [B, D]
Step = Callable[[torch.Tensor, torch.Tensor, ContiguousCache], torch.Tensor]

_LLAMAS = ("Llama", "Qwen2", "Qwen3", "Mistral")

# In a larger model the products take all the time, and a second copy of some weights is dear.
_MOST_WEIGHTS = 1_000_000_000


def step_of(trunk: nn.Module | None) -> Step | None:
    """The step of this model, its weights as they are now; None where none was written for it."""
    if trunk is None or any(altered(module) for module in trunk.modules()) or not is_small(weights_of(trunk)):
        return None
    if is_gpt2(trunk):
        return Gpt2Step(trunk)
    return LlamaStep(trunk) if is_llama(trunk) else None


class Gpt2Step:
    def __init__(self, trunk: nn.Module):
        self.tokens, self.positions, self.norm = trunk.wte.weight, trunk.wpe.weight, _layer_norm(trunk.ln_f)
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
        self.heads, self.head_width, self.scaling = attention.num_heads, attention.head_dim, attention.scaling
        self.norm_1, self.norm_2 = _layer_norm(block.ln_1), _layer_norm(block.ln_2)
        weights = (attention.c_attn, attention.c_proj, mlp.c_fc, mlp.c_proj)
        self.qkv, self.out, self.up, self.down = (Linear(conv.weight.t(), conv.bias) for conv in weights)
        self.act = fused_act(mlp.act)

    def __call__(self, x_BD: torch.Tensor, layer: ContiguousLayer, mask: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm_1(x_BD)).view(len(x_BD), 3, self.heads, self.head_width)
        query_BHW, key_BKW, value_BKW = qkv.unbind(1)
        layer.append(key_BKW, value_BKW)
        x_BD = x_BD + self.out(attend(query_BHW, layer.keys, layer.values, mask, self.scaling).flatten(1))
        return x_BD + self.down(self.up(self.norm_2(x_BD), self.act))


class LlamaStep:
    def __init__(self, trunk: nn.Module):
        self.tokens, self.norm, self.rotary = trunk.embed_tokens.weight, _rms_norm(trunk.norm), trunk.rotary_emb
        self.layers = [_LlamaLayer(layer) for layer in trunk.layers]

    def __call__(self, ids_B: torch.Tensor, positions_B1: torch.Tensor, cache: ContiguousCache) -> torch.Tensor:
        mask = cache.mask()
        x_BD = F.embedding(ids_B, self.tokens)
        cos_B1W, sin_B1W = self.rotary(x_BD[:, None], positions_B1)
        # transformers turns (a, b) into (−b, a) before it multiplies; the sign fits as well on the sine.
        half = sin_B1W.shape[-1] // 2
        sin_B1W = torch.cat([-sin_B1W[..., :half], sin_B1W[..., half:]], -1)
        for block, layer in zip(self.layers, cache.layers, strict=True):
            x_BD = block(x_BD, layer, mask, cos_B1W, sin_B1W)
        return self.norm(x_BD)


class _LlamaLayer:
    def __init__(self, layer: nn.Module):
        attention, mlp = layer.self_attn, layer.mlp
        self.head_width, self.scaling = attention.head_dim, attention.scaling
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.heads = [projection.out_features // self.head_width for projection in projections]
        self.qkv, self.out = _side_by_side(*projections), _side_by_side(attention.o_proj)
        self.gate_up, self.down = _side_by_side(mlp.gate_proj, mlp.up_proj), _side_by_side(mlp.down_proj)
        self.act = fused_act(mlp.act_fn)
        self.norm_1, self.norm_2 = _rms_norm(layer.input_layernorm), _rms_norm(layer.post_attention_layernorm)
        self.query_norm, self.key_norm = (
            _rms_norm(getattr(attention, name)) if hasattr(attention, name) else None for name in ("q_norm", "k_norm")
        )

    def __call__(self, x_BD, layer: ContiguousLayer, mask, cos_B1W, sin_B1W) -> torch.Tensor:
        qkv = self.qkv(self.norm_1(x_BD)).view(len(x_BD), sum(self.heads), self.head_width)
        if self.query_norm is None:
            turned, value_BKW = qkv.split([self.heads[0] + self.heads[1], self.heads[2]], 1)
        else:
            query_BHW, key_BKW, value_BKW = qkv.split(self.heads, 1)
            turned = torch.cat([self.query_norm(query_BHW), self.key_norm(key_BKW)], 1)
        turned = turned * cos_B1W + turned.roll(self.head_width // 2, -1) * sin_B1W
        query_BHW, key_BKW = turned.split(self.heads[:2], 1)
        layer.append(key_BKW, value_BKW)
        x_BD = x_BD + self.out(attend(query_BHW, layer.keys, layer.values, mask, self.scaling).flatten(1))
        gate, up = self.gate_up(self.norm_2(x_BD)).chunk(2, -1)
        return x_BD + self.down(self.act(gate) * up)


def fused_act(act: nn.Module) -> nn.Module:
    """The same function; transformers' GPT-2 writes the tanh form of GELU as eight operations where torch has one."""
    return nn.GELU(approximate="tanh") if _is(act, "NewGELUActivation") else act


def is_small(weights: int) -> bool:
    """Whether a second copy of so many weights is cheap enough."""
    return weights <= _MOST_WEIGHTS


def weights_of(trunk: nn.Module) -> int:
    return sum(weight.numel() for weight in trunk.parameters())


def is_gpt2(trunk: nn.Module) -> bool:
    """Whether trunk and blocks are GPT-2's, of transformers' own classes throughout."""
    return _is(trunk, "GPT2Model") and all(_plain_gpt2(block) for block in trunk.h)


def is_llama(trunk: nn.Module) -> bool:
    """The same for Llama and the families that are written as it is."""
    family = next((name for name in _LLAMAS if _is(trunk, f"{name}Model")), None)
    return family is not None and all(_plain_llama(layer, family) for layer in trunk.layers)


def _plain_gpt2(block: nn.Module) -> bool:
    attention, mlp = block.attn, block.mlp
    weights = (attention.c_attn, attention.c_proj, mlp.c_fc, mlp.c_proj)
    own = _is(block, "GPT2Block") and _is(attention, "GPT2Attention") and _is(mlp, "GPT2MLP")
    return own and all(_is(conv, "Conv1D") for conv in weights) and not hasattr(block, "crossattention")


def _plain_llama(layer: nn.Module, family: str) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    weights = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    weights += (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    own = _is(layer, f"{family}DecoderLayer") and _is(attention, f"{family}Attention") and _is(mlp, f"{family}MLP")
    return own and all(type(linear) is nn.Linear for linear in weights)


def altered(module: nn.Module) -> bool:
    """Whether calling it does more than its class says: hooks, or a forward of its own as accelerate gives it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _is(module: nn.Module, name: str) -> bool:
    """Whether a module is transformers' own class of that name, and no subclass of it."""
    return type(module).__name__ == name and type(module).__module__.startswith("transformers.")


def _side_by_side(*linears: nn.Linear) -> Linear:
    """Several projections of one input as a single product."""
    biases = [linear.bias for linear in linears]
    if len(linears) == 1:
        return Linear(linears[0].weight, biases[0])
    bias = None if biases[0] is None else torch.cat(biases)
    return Linear(torch.cat([linear.weight for linear in linears]), bias)


def _layer_norm(norm: nn.LayerNorm) -> Callable[[torch.Tensor], torch.Tensor]:
    return partial(
        F.layer_norm, normalized_shape=norm.normalized_shape, weight=norm.weight, bias=norm.bias, eps=norm.eps
    )


def _rms_norm(norm: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return partial(
        F.rms_norm, normalized_shape=norm.weight.shape, weight=norm.weight, eps=norm.variance_epsilon
    )  # fmt: skip
