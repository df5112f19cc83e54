"""Find the weights of a model for a LoRA adapter.

Linear layers get an adapter as modules. The experts of a mixture of experts are three-dimensional parameters, one
matrix for each expert, and get one as parameters (peft's `target_parameters`). For some of these families peft
interprets the names of dense and shared MLPs as the experts, as in transformers 4, so the weights of these layers are
also targeted as parameters. In a composite model, only the text model gets adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distillm_cli.errors import ModelError
from distillm_cli.models.composite import text_parameters
from distillm_cli.models.model_families import PEFT_EXPERT_NAMES, family_of


@dataclass(frozen=True)
class LoraTargets:
    """Hold the names of modules and parameters that peft targets. kinds: classes of these modules."""

    modules: list[str]
    parameters: list[str]
    kinds: set[type]


def expert_weights(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that hold a matrix for each expert, with their names."""
    for name, module in model.named_modules():
        for own, weight in module.named_parameters(recurse=False):
            if weight.dim() == 3 and getattr(module, "num_experts", None) == weight.shape[0]:
                yield f"{name}.{own}", weight


def find_targets(model: PreTrainedModel, requested: tuple[str, ...] | None) -> LoraTargets:
    """Return the targets of these names; if unset, every linear layer except the head, and every expert.

    Raises ModelError for a name without a match.
    """
    text = {id(weight) for _, weight in text_parameters(model)}
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    modules = {name: m for name, m in linear.items() if id(m.weight) in text and _is_plain(m)}
    head = next((name for name, module in modules.items() if module is model.get_output_embeddings()), "")
    modules.pop(head, None)
    experts = {name for name, weight in expert_weights(model) if id(weight) in text}
    if requested is None:
        uncalled = family_of(model.config.model_type).uncalled_layers
        modules = {name: module for name, module in modules.items() if _last(name) not in uncalled}
    else:
        experts, modules = _select_by_name(model, requested, modules, experts)
    renamed = {name for name in modules if _last(name) in PEFT_EXPERT_NAMES} if _has_experts(model) else set()
    parameters = sorted(experts | {f"{name}.weight" for name in renamed})
    modules = {name: module for name, module in modules.items() if name not in renamed}
    kinds = {type(module) for module in modules.values()}
    short = {_last(name) for name in modules}
    # A short name must not match the head, another model's layer, a router that is not a plain linear layer, or, if linear
    # layers are in a list and named by number, the decoder layers of these numbers.
    others = {name for name, _ in model.named_modules()} - modules.keys() - renamed
    whole_names = bool(short & {_last(name) for name in others})
    if requested is not None and not (whole_names or parameters):
        return LoraTargets(list(requested), [], kinds)
    return LoraTargets(sorted(modules if whole_names or requested is not None else short), parameters, kinds)


def _select_by_name(
    model: PreTrainedModel, requested: tuple[str, ...], modules: dict[str, nn.Module], experts: set[str]
) -> tuple[set[str], dict[str, nn.Module]]:
    """Select the experts and modules with these names."""
    found: set[str] = set()
    for target in requested:
        matches = {name for name in (*modules, *experts) if name == target or name.endswith(f".{target}")}
        if not matches:
            names = sorted({_last(name) for name in (*modules, *experts)})
            raise ModelError(
                "model.no_lora_target",
                f"no linear layer {target!r} before the head",
                where="student.lora.targets",
                hint=f"this {model.config.model_type} has {', '.join(names)}",
            )
        found |= matches
    return experts & found, {name: module for name, module in modules.items() if name in found}


def frozen_parts(model: PreTrainedModel) -> list[str]:
    """Return the names of frozen matrices in the layers of a mixture of experts with an adapter.

    Empty for other models. Embeddings, norms and the head never train under an adapter and are left out.
    """
    if not _has_experts(model):
        return []
    ends = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    parts: dict[str, None] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") or ".base_layer" in f".{name}":
            continue
        for own, weight in module.named_parameters(recurse=False):
            if weight.requires_grad or weight.dim() < 2 or id(weight) in ends:
                continue
            parts[".".join(part for part in name.split(".")[-2:] if not part.isdigit()) + f".{own}"] = None
    return list(parts)


def _is_plain(module: nn.Module) -> bool:
    """Return whether a layer is a plain linear layer: routers of some families are linear layers with two results."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _has_experts(model: PreTrainedModel) -> bool:
    return next(expert_weights(model), None) is not None


def _last(name: str) -> str:
    return name.rpartition(".")[2]
