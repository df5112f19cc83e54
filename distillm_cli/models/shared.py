"""Share the weights of layers: a student that runs a stack of layers several times, in the style of Pea-KD's SPS.

The student is a plain model of transformers with a layer for each pass, so that masks, key-value caches and generation are
those of transformers. A layer of a later pass has the parameters of the first pass as its own. With ``swap`` the queries
of every second pass are computed by the weights of the keys, and the keys by those of the queries (arXiv 2009.14822).

A saved model has a copy of the layers for each pass, and loads with ``from_pretrained``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distillm_cli.errors import ModelError
from distillm_cli.models.model_families import KEY_VALUE_HEADS_FIELDS, is_transformers_class

_WITHOUT_SWAP = "share the layers without the swap, for example with shared:3x2"


def check_can_swap(config: PretrainedConfig, where: str) -> None:
    """Raise ModelError if queries and keys have different shapes, according to the config."""
    heads = getattr(config, "num_attention_heads", None)
    key_heads = next((n for name in KEY_VALUE_HEADS_FIELDS if (n := getattr(config, name, None)) is not None), heads)
    if heads != key_heads:
        what = f"cannot swap queries and keys: the teacher has {heads} heads of queries and {key_heads} of keys"
        raise ModelError("model.cannot_swap", what, where=where, hint=_WITHOUT_SWAP)


def share_layers(model: PreTrainedModel, layers: nn.ModuleList, stored: int, *, swap: bool, where: str) -> None:
    """Give the layers from index ``stored`` on the parameters of the first ``stored``, which then run several times.

    swap: queries and keys are swapped in every second pass. Raises ModelError for a family in which they cannot be swapped.
    """
    model.shares_layers = True
    for index in range(stored, len(layers)):
        is_swapped = swap and index // stored % 2 == 1
        if is_swapped and not _swap_fused(layers[index]) and not _has_query_and_key(layers[index]):
            what = f"cannot swap queries and keys of a {model.config.model_type}: its layers have no q_proj and k_proj"
            raise ModelError("model.cannot_swap", what, where=where, hint=_WITHOUT_SWAP)
        _use_parameters(layers[index], layers[index % stored], is_swapped=is_swapped, where=where)


def save_plain(model: PreTrainedModel, directory: Path) -> None:
    """Save a model as ``save_pretrained`` does, with a copy of the layers for each pass if layers are shared."""
    if not getattr(model, "shares_layers", False):
        model.save_pretrained(directory)
        return
    head = getattr(model.get_output_embeddings(), "weight", None)  # may be the embedding matrix, which is saved once
    state = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    saved: dict[str, Tensor] = {}
    for name, tensor in state.items():
        is_shared = id(tensor) in seen and tensor is not head
        saved[name] = tensor.detach().clone() if is_shared else tensor.detach()
        seen.add(id(tensor))
    model.save_pretrained(directory, state_dict=saved)


def _use_parameters(layer: nn.Module, first: nn.Module, *, is_swapped: bool, where: str) -> None:
    """Replace the parameters of a layer by those of another, with queries and keys swapped if ``is_swapped``."""
    parameters = dict(first.named_parameters())
    for name, own in list(layer.named_parameters()):
        source = parameters.get(_counterpart(name) if is_swapped else name)
        if source is None or source.shape != own.shape:
            what = f"cannot swap queries and keys: {name} has no counterpart of the same shape"
            raise ModelError("model.cannot_swap", what, where=where, hint=_WITHOUT_SWAP)
        path, _, attribute = name.rpartition(".")
        setattr(layer.get_submodule(path), attribute, source)


def _counterpart(name: str) -> str:
    """Return the name of a parameter with q and k swapped: ``self_attn.q_norm.weight`` and ``self_attn.k_norm.weight``."""
    swapped = {"q_": "k_", "k_": "q_"}
    return ".".join(swapped.get(part[:2], part[:2]) + part[2:] for part in name.split("."))


def _has_query_and_key(layer: nn.Module) -> bool:
    parts = {part for name, _ in layer.named_modules() for part in name.split(".")}
    return {"q_proj", "k_proj"} <= parts


def _swap_fused(layer: nn.Module) -> bool:
    """Swap queries and keys of a GPT-2 layer, whose projections are one matrix; return whether it is such a layer."""
    attention = getattr(layer, "attn", None)
    if not is_transformers_class(attention, "GPT2Attention"):
        return False
    attention.c_attn = SwappedConv1D(attention.c_attn)
    return True


class SwappedConv1D(Conv1D):
    """Compute queries, keys and values with the weights of keys, queries and values of a GPT-2 layer.

    Its state is that of the plain layer with the same outputs: a saved model needs no code of this package.
    """

    def __init__(self, plain: Conv1D):
        nn.Module.__init__(self)
        self.nx = plain.nx
        self.nf = plain.nf
        self.weight = plain.weight
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        return _swapped(super().forward(x))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, parameter in self.named_parameters():
            destination[prefix + name] = _swapped(parameter.detach())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = {n: _swapped(t) for n, t in state_dict.items() if n in (f"{prefix}weight", f"{prefix}bias")}
        super()._load_from_state_dict(own, prefix, *args)


def _swapped(states: Tensor) -> Tensor:
    """Return [..., 3·D] with the first and the second third swapped, not a view."""
    first, second, rest = states.chunk(3, -1)
    return torch.cat([second, first, rest], -1)
