"""Build students from copies of the teacher's layers, embeddings, final norm and head.

layers:6         six of them, evenly spaced, the first and the last included
layers:6:first   the first six; layers:6:last the last six
layers:0,3,7     these, counted from 0
layers:all       every one: the teacher itself, in float32
shared:3x2       the first three, which run twice with the same weights (``models/shared.py``)
"""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from distillm_cli.config.student_spec import FORMS, SharedLayers, StudentSpec, parse_student
from distillm_cli.errors import ModelError, UsageError, out_of_memory
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.composite import check_causal_class
from distillm_cli.models.model_families import family_of
from distillm_cli.models.shared import check_can_swap, share_layers
from distillm_cli.models.students import build_trunk, heads_are_tied, set_dropout, with_layers
from distillm_cli.utils.text import counted


def chosen_layers(text: str, depth: int) -> list[int]:
    """Return the layers, of ``depth``, that ``layers:…`` or ``shared:…`` names: counted from 0. Raises UsageError.

    Ascending; of ``shared:…``, once for each pass. Evenly spaced: i·(depth−1)/(n−1), rounded half up, i from 0 to n−1; of
    one layer, the first.
    """
    spec = parse_student(text)
    if isinstance(spec, SharedLayers):
        stored = spec.stored(depth)
        if stored > depth:
            what = f"{text}: the teacher has {counted(depth, 'layer')}"
            raise UsageError("usage.invalid_layers", what, hint=f"give 1 to {depth}")
        return list(range(stored)) * spec.passes
    if spec.indices is not None:
        highest = max(spec.indices)
        if highest >= depth:
            raise UsageError(
                "usage.invalid_layers",
                f"{text}: the teacher has no layer {highest}",
                hint=f"its layers are 0 to {depth - 1}",
            )
        if any(b <= a for a, b in pairwise(spec.indices)):
            hint = f"write {FORMS['layers:']}"
            raise UsageError(
                "usage.invalid_layers", f"{text}: the layers must be in the teacher's order, each once", hint=hint
            )
        return list(spec.indices)
    count = depth if spec.count is None else spec.count
    if not 1 <= count <= depth:
        raise UsageError(
            "usage.invalid_layers", f"{text}: the teacher has {counted(depth, 'layer')}", hint=f"give 1 to {depth}"
        )
    if spec.position == "first":
        return list(range(count))
    if spec.position == "last":
        return list(range(depth - count, depth))
    gaps = max(count - 1, 1)
    return [(2 * i * (depth - 1) + gaps) // (2 * gaps) for i in range(count)]


def build_from_layers(spec: str, teacher: Backbone, *, dropout: float | None = None) -> PreTrainedModel:
    """Build a float32 model of the teacher's family with these of its layers. No memory is shared with the teacher.

    dropout: None: the values of the teacher's config. Raises UsageError for an invalid spec or one that does not fit
    the teacher, ModelError for a family whose layers cannot be selected, and for an encoder-decoder, which has two
    stacks.
    """
    parsed = parse_student(spec)
    check_can_copy(spec, parsed, teacher.model.config)
    text = teacher.model.config.get_text_config()
    keep = chosen_layers(spec, text.num_hidden_layers)
    if family_of(text.model_type).layers_depend_on_index and keep != list(range(len(keep))):
        raise _cannot_take_layers(text, spec, "the computation of its layers depends on their index")
    config = with_layers(text, keep, spec)
    config.tie_word_embeddings = heads_are_tied(teacher.model)  # the file determines it, not the teacher's config
    if dropout is not None:
        set_dropout(config, dropout, where=spec)
    model = _build_unfilled(config, spec)
    _copy_weights(
        model, teacher.model, Backbone(model, teacher.tokenizer, teacher.vocab).trunk, teacher.trunk, keep, spec
    )
    if isinstance(parsed, SharedLayers):
        trunk = Backbone(model, teacher.tokenizer, teacher.vocab).trunk
        layers = trunk.get_submodule(_layers_of(trunk, config, spec))
        share_layers(model, layers, parsed.stored(text.num_hidden_layers), swap=parsed.swap, where=spec)
    elif getattr(text, "scale_attn_by_inverse_layer_idx", False):
        _move_attention_scales(model.get_decoder(), keep)
    if teacher.model.generation_config is not None:
        model.generation_config = copy.deepcopy(teacher.model.generation_config)
    return model.eval()


def check_can_copy(text: str, spec: StudentSpec, config: PretrainedConfig) -> None:
    """Raise ModelError if layers of a model with this config cannot be copied, or not be shared as requested."""
    if config.is_encoder_decoder:
        kind = config.model_type
        raise ModelError(
            "model.cannot_take_layers",
            f"cannot copy layers of a {kind} teacher: an encoder-decoder has two stacks of layers",
            where=text,
            hint=f"use a smaller model of the family, or --student random:{kind}:2x64",
        )
    if not isinstance(spec, SharedLayers):
        return
    config = config.get_text_config()
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise _cannot_take_layers(config, text, "the scale of its attention depends on the layer's index")
    if spec.swap:
        check_can_swap(config, text)


def build_trunk_from_layers(spec: str, teacher: PreTrainedModel, *, dropout: float | None = None) -> PreTrainedModel:
    """Build a float32 model without a head from these layers of a teacher without a head, for sentence embeddings.

    Raises UsageError and ModelError as ``build_from_layers``.
    """
    config = teacher.config
    if config.is_encoder_decoder:
        raise _cannot_take_layers(config, spec, "an encoder-decoder has two stacks of layers")
    text = config.get_text_config()
    keep = chosen_layers(spec, text.num_hidden_layers)
    if family_of(text.model_type).layers_depend_on_index and keep != list(range(len(keep))):
        raise _cannot_take_layers(text, spec, "the computation of its layers depends on their index")
    if getattr(text, "scale_attn_by_inverse_layer_idx", False):
        raise _cannot_take_layers(text, spec, "its attention depends on the index of the layer")
    student_config = with_layers(text, keep, spec)
    if dropout is not None:
        set_dropout(student_config, dropout, where=spec)
    student = build_trunk(student_config, seed=0, where=spec)
    try:
        student.load_state_dict(_kept_weights(teacher, config, keep, spec))
    except RuntimeError as error:  # layers of several shapes, or one tensor for all layers
        raise _cannot_take_layers(config, spec, str(error).splitlines()[-1].strip().rstrip(".")) from error
    return student


@torch.no_grad()
def _move_attention_scales(trunk: nn.Module, keep: list[int]) -> None:
    """Fold the scale of a layer's old index into its queries: such a GPT-2 divides scores by the index, counted from 1."""
    for new, old in enumerate(keep):
        attention = trunk.h[new].attn
        for weight in (attention.c_attn.weight, attention.c_attn.bias):
            weight[..., : attention.embed_dim] *= (new + 1) / (old + 1)


def _build_unfilled(config: PretrainedConfig, spec: str) -> PreTrainedModel:
    check_causal_class(config, spec)
    with torch.random.fork_rng(devices=[]):
        try:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        except Exception as error:  # every family checks its config in its own way
            if out_of_memory(error):
                raise
            reason = str(error).splitlines()[-1].strip()
            raise _cannot_take_layers(config, spec, reason) from error


def _copy_weights(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    student_trunk: nn.Module | None,
    teacher_trunk: nn.Module | None,
    keep: list[int],
    spec: str,
) -> None:
    if student_trunk is None or teacher_trunk is None:
        raise _cannot_take_layers(teacher.config, spec, "it has no separate part before the head")
    weights = _kept_weights(teacher_trunk, teacher.config, keep, spec)
    head, teacher_head = student.get_output_embeddings(), teacher.get_output_embeddings()
    try:
        student_trunk.load_state_dict(weights)
        head.load_state_dict(teacher_head.state_dict())
    except RuntimeError as error:  # layers of several shapes, or one tensor for all layers
        raise _cannot_take_layers(teacher.config, spec, str(error).splitlines()[-1].strip().rstrip(".")) from error
    filled = {id(p) for module in (student_trunk, head) for p in module.parameters()}
    unfilled = [name for name, p in student.named_parameters() if id(p) not in filled]
    if unfilled:
        raise _cannot_take_layers(teacher.config, spec, f"{unfilled[0]} is neither in the layers nor in the head")


def _kept_weights(trunk: nn.Module, config: PretrainedConfig, keep: list[int], spec: str) -> dict[str, torch.Tensor]:
    """Return the weights of a trunk with these of its layers, renumbered."""
    prefix = f"{_layers_of(trunk, config, spec)}."
    new_indices: dict[str, list[int]] = {}
    for new, old in enumerate(keep):
        new_indices.setdefault(str(old), []).append(new)
    weights = {}
    for name, weight in trunk.state_dict().items():
        if name.startswith(prefix):
            old, _, rest = name.removeprefix(prefix).partition(".")
            weights |= {f"{prefix}{new}.{rest}": weight for new in new_indices.get(old, [])}
        else:
            weights[name] = weight
    return weights


def _layers_of(trunk: nn.Module, config: PretrainedConfig, spec: str) -> str:
    """Return the name of the list that holds the layers."""
    depth = config.get_text_config().num_hidden_layers
    lists = [n for n, m in trunk.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise _cannot_take_layers(config, spec, "its layers are not in one list")
    return outer[0]


def _cannot_take_layers(config: PretrainedConfig, spec: str, why: str) -> ModelError:
    return ModelError(
        "model.cannot_take_layers",
        f"cannot copy layers of a {config.get_text_config().model_type} teacher: {why}",
        where=spec,
        hint="build the student from scratch, for example with --student width:0.5, or use a smaller model",
    )
