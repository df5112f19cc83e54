"""LoRA adapters, by peft: merged into their model, put onto one to train, saved and read again.

An adapter that trains is put into the model's own layers, in place: the model stays transformers' own class, so that
hidden states, head and checks are what they are without one. What decodes and what is published is a plain copy with
the adapter merged in (`Adapter.folded`), made anew each time, of the weights as they are then.

An adapter directory is peft's: adapter_config.json, which names the model it belongs to, and adapter_model.safetensors.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distillm_cli.config.schema import AdapterConfig
from distillm_cli.errors import ModelError, out_of_memory
from distillm_cli.models.targets import find_targets

if TYPE_CHECKING:  # peft is slow to import, and most runs have no adapter
    from peft import LoraConfig, PeftModel

WEIGHTS = "adapter_model.safetensors"
_NAME, _PREFIX = "default", "base_model.model."  # of an adapter in a model; of its weights in a file


def parameter_of(layer: nn.Module) -> str:
    """Return the name, in the layer it is in, of the weight that a LoRA layer adapts."""
    return getattr(layer, "parameter_name", "weight")


class Adapter:
    """A LoRA adapter in the layers of a model, the rest of which is frozen."""

    def __init__(self, wrapped: PeftModel):
        self._wrapped = wrapped

    @property
    def model(self) -> PreTrainedModel:
        """The model it is in."""
        return self._wrapped.get_base_model()

    @property
    def config(self) -> LoraConfig:
        return self._wrapped.peft_config[_NAME]

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """The adapted layers by name."""
        from peft.tuners.lora import LoraLayer

        return ((name, module) for name, module in self.model.named_modules() if isinstance(module, LoraLayer))

    def frozen(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights that do not train: the model without the adapter."""
        return ((name, weight) for name, weight in self.model.named_parameters() if not weight.requires_grad)

    def save(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        """The adapter directory; it loads with `PeftModel.from_pretrained(base, directory)`."""
        from peft import get_peft_model_state_dict

        weights = get_peft_model_state_dict(self._wrapped, adapter_name=_NAME, save_embedding_layers=False)
        save_file(
            {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in weights.items()},
            directory / WEIGHTS,
            metadata={"format": "pt"},
        )
        config = copy.copy(self.config)
        config.inference_mode = True
        if not isinstance(config.target_modules, str):
            config.target_modules = sorted(config.target_modules)  # a set's order changes from process to process
        if config.target_parameters:
            config.target_parameters = sorted(config.target_parameters)
        config.save_pretrained(str(directory))

    def read(self, directory: Path) -> dict[str, torch.Tensor]:
        """The weights that `save` wrote, by their names in the model."""
        stored = load_file(directory / WEIGHTS)
        return {
            f"{name.removeprefix(_PREFIX).removesuffix('.weight')}.{_NAME}.weight": weight
            for name, weight in stored.items()
        }

    @torch.no_grad()
    def folded(self, made: Callable[[str, torch.Tensor], nn.Parameter]) -> dict[int, nn.Module]:
        """Return by id of each adapted layer the plain layer W + (alpha / r)·B·A, summed in float32.

        made: a weight's name in the plain model and its value → the parameter that stands for it there.
        """
        plain: dict[int, nn.Module] = {}
        for name, layer in self.layers():
            if ".base_layer" in name:  # the adapter of a second weight of the same layer, inside that of the first
                continue
            base = layer.get_base_layer()
            deltas, inner = {}, layer
            while inner is not base:
                deltas[parameter_of(inner)] = inner.get_delta_weight(_NAME)
                inner = inner.base_layer
            twin = copy.copy(base)
            twin._modules = dict(base._modules)
            twin._parameters = {}
            for own, weight in base._parameters.items():
                value = None if weight is None else weight.detach()
                if own in deltas:
                    value = (weight.float() + deltas[own].float()).to(weight.dtype)
                twin._parameters[own] = None if value is None else made(f"{name}.{own}", value)
            plain[id(layer)] = twin
        return plain


def attach(model: PreTrainedModel, config: AdapterConfig, *, seed: int, base: str, revision: str | None) -> Adapter:
    """A new adapter in the model, which is frozen beside it. A starts random (a function of the seed), B is zero.

    base, revision: what the adapter's config will say it belongs to. Raises ModelError for targets that are not there.
    """
    from peft import LoraConfig, get_peft_model

    alpha = config.alpha or 4 * config.r
    found = find_targets(model, config.targets)
    asked = LoraConfig(
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        r=config.r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=0.0 if found.parameters else config.dropout,  # peft cannot drop the input of a parameter
        target_modules=found.modules,
        target_parameters=found.parameters or None,
        fan_in_fan_out=found.kinds == {Conv1D},  # where both kinds occur peft sets it layer by layer
        base_model_name_or_path=base,
        revision=revision,
    )
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with _quiet(), torch.random.fork_rng(devices=sorted(devices, key=str)):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        wrapped = _read(lambda: get_peft_model(model, asked), f"of rank {config.r}", "try other student.lora.targets")
    # peft writes down where it found the model; the directory must say where others find it.
    wrapped.peft_config[_NAME].base_model_name_or_path = base
    return _checked(Adapter(wrapped), base)


def take_up(
    model: PreTrainedModel,
    place: str,
    config: AdapterConfig,
    *,
    base: str,
    base_revision: str | None,
    local: bool,
    revision: str | None,
) -> Adapter:
    """The adapter in ``place`` on its model, to go on training it. Raises ModelError where it is not the one asked for."""
    from peft import LoraConfig, PeftConfig

    own = _read(lambda: PeftConfig.from_pretrained(place, revision=revision, local_files_only=local), place)
    plain = isinstance(own, LoraConfig) and not (own.use_dora or own.modules_to_save or own.lora_bias)
    if not plain or own.rank_pattern or own.alpha_pattern or own.bias != "none":
        raise ModelError(
            f"the adapter {place} is not a plain LoRA, and cannot be trained on",
            hint="without --lora it is merged into its model, and every weight trains",
        )
    told = {"r": (config.r, own.r), "alpha": (config.alpha or own.lora_alpha, own.lora_alpha)}
    if config.targets is not None and not isinstance(own.target_modules, str):
        told["targets"] = (sorted(config.targets), sorted(own.target_modules))
    for name, (asked, there) in told.items():
        if asked != there:
            raise ModelError(
                f"student.lora.{name} is {asked}, and the adapter {place} has {there}",
                hint="give its own; without --lora it is merged into its model, and every weight trains",
            )
    own.lora_dropout = 0.0 if own.target_parameters else config.dropout
    own.inference_mode = False
    own.base_model_name_or_path, own.revision = base, base_revision
    return _checked(Adapter(_put(model, place, local=local, revision=revision, config=own, is_trainable=True)), place)


def merge(model: PreTrainedModel, place: str, *, local: bool, revision: str | None) -> PreTrainedModel:
    """The model with the adapter in ``place`` merged into its weights: a plain model again.

    Raises ModelError too where the adapter parts weights that a family cannot have apart.
    """
    tied = _tied(model)
    wrapped = _put(model, place, local=local, revision=revision)
    _part_adapted(model)
    merged = _read(lambda: wrapped.merge_and_unload(safe_merge=True), place).requires_grad_(True)  # peft froze it
    parted = _tied(merged)
    if parted != tied:
        config = merged.config
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        merged.tie_weights()  # as when it is loaded again
        # Encoder-decoders embed in two places, and some scale what a tied head reads.
        if config.is_encoder_decoder or _tied(merged) != parted:
            raise ModelError(
                f"the adapter {place} changes one of the weights that are tied in this {config.model_type} model",
                hint="put an adapter on the layers between embeddings and head only",
            )
    return merged


def _tied(model: nn.Module) -> set[frozenset[str]]:
    """The names of weights that are one tensor."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    return {frozenset(same) for same in names.values() if len(same) > 1}


def _part_adapted(model: nn.Module) -> None:
    """Gives adapted layers weights of their own: what is added to an embedding is not added to the head tied to it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    users = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        base = layer.get_base_layer()
        for name, weight in base._parameters.items():
            if weight is not None and users[id(weight)] > 1:
                users[id(weight)] -= 1
                base._parameters[name] = nn.Parameter(weight.detach().clone(), requires_grad=False)


def put_on(model: PreTrainedModel, place: str, *, local: bool, revision: str | None) -> PreTrainedModel:
    """The same beside weights that nothing can be added to, quantised ones: computed with them."""
    return _put(model, place, local=local, revision=revision).get_base_model()


def _put(model: PreTrainedModel, place: str, *, local: bool, revision: str | None, **more: Any) -> PeftModel:
    from peft import PeftModel, get_peft_model_state_dict

    more |= {"torch_device": str(model.device), "local_files_only": local}

    def load() -> PeftModel:
        # peft only warns of weights that are absent, and leaves them as they were made.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        wrapped = PeftModel.from_pretrained(model, place, revision=revision, **more)
        if local and (file := Path(place) / WEIGHTS).is_file():
            known = get_peft_model_state_dict(wrapped, adapter_name=_NAME)
            with safe_open(file, "pt") as there:  # of weights for layers that are not there peft says nothing
                if strangers := sorted(set(there.keys()) - known.keys()):
                    raise ValueError(f"no layer for {strangers[0]}")
        return wrapped

    return _read(load, place)


_INCOMPLETE = "the adapter must be complete, and belong to the model that its adapter_config.json names"


def _read(work: Callable[[], Any], place: str, hint: str = _INCOMPLETE) -> Any:
    try:
        with _quiet():
            return work()
    except Exception as error:  # a dozen types, by kind of adapter
        if out_of_memory(error):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()
        raise ModelError(
            f"cannot put the adapter {place} on its model: {' '.join(said[:2])[:200]}",
            hint=hint,
        ) from error


def _checked(adapter: Adapter, where: str) -> Adapter:
    """Return the adapter. Raises ModelError where it is on the embeddings or the head: the loss reads the head's weight."""
    from peft.tuners.lora import Linear
    from peft.tuners.lora.layer import ParamWrapper

    ends = (adapter.model.get_input_embeddings(), adapter.model.get_output_embeddings())
    for name, layer in adapter.layers():
        if not isinstance(layer, Linear | ParamWrapper) or layer in ends:
            raise ModelError(
                f"a LoRA adapter on {name}, and only linear layers and experts before the head can have one",
                where=where,
                hint="leave student.lora.targets unset: every linear layer but the head",
            )
    return adapter


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
