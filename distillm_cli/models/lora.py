"""Use LoRA adapters, by peft: merge them into their model, attach them for training, save and load them.

An adapter for training is attached to the model's layers in place. The model keeps its transformers class, so that
hidden states, head and checks work as without an adapter. Decoding and the output directory use a plain copy with the
adapter merged in (`Adapter.merged_layers`), created from the current weights each time.

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
from distillm_cli.models.lora_targets import find_targets

if TYPE_CHECKING:  # peft is slow to import, and most runs have no adapter
    from peft import LoraConfig, PeftModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_NAME, _PREFIX = "default", "base_model.model."  # name of an adapter in a model; prefix of its weights in a file


def parameter_of(layer: nn.Module) -> str:
    """Return the name, within its layer, of the weight that a LoRA layer adapts."""
    return getattr(layer, "parameter_name", "weight")


class Adapter:
    """Hold a LoRA adapter in the layers of a frozen model."""

    def __init__(self, wrapped: PeftModel):
        self._wrapped = wrapped

    @property
    def model(self) -> PreTrainedModel:
        """Return the model that the adapter is attached to."""
        return self._wrapped.get_base_model()

    @property
    def config(self) -> LoraConfig:
        """Return peft's config of the adapter."""
        return self._wrapped.peft_config[_NAME]

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Return the adapted layers by name."""
        from peft.tuners.lora import LoraLayer

        return ((name, module) for name, module in self.model.named_modules() if isinstance(module, LoraLayer))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Use the model without the adapter inside the block."""
        with self._wrapped.disable_adapter():
            yield

    def frozen(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Return the frozen weights: the model without the adapter."""
        return ((name, weight) for name, weight in self.model.named_parameters() if not weight.requires_grad)

    def save(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the adapter directory; it loads with `PeftModel.from_pretrained(base, directory)`."""
        from peft import get_peft_model_state_dict

        weights = get_peft_model_state_dict(self._wrapped, adapter_name=_NAME, save_embedding_layers=False)
        save_file(
            {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in weights.items()},
            directory / ADAPTER_WEIGHTS,
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
        """Return the weights that `save` wrote, by their names in the model."""
        stored = load_file(directory / ADAPTER_WEIGHTS)
        return {
            f"{name.removeprefix(_PREFIX).removesuffix('.weight')}.{_NAME}.weight": weight
            for name, weight in stored.items()
        }

    @torch.no_grad()
    def merged_layers(self, make_parameter: Callable[[str, torch.Tensor], nn.Parameter]) -> dict[int, nn.Module]:
        """Return by id of each adapted layer the plain layer W + (alpha / r)·B·A, summed in float32.

        make_parameter: maps a weight's name in the plain model and its value to the parameter to use there.
        """
        plain: dict[int, nn.Module] = {}
        for name, layer in self.layers():
            if ".base_layer" in name:  # the adapter of a second weight of the same layer, nested in that of the first
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
                twin._parameters[own] = None if value is None else make_parameter(f"{name}.{own}", value)
            plain[id(layer)] = twin
        return plain


def attach(model: PreTrainedModel, config: AdapterConfig, *, seed: int, base: str, revision: str | None) -> Adapter:
    """Attach a new adapter to a model, which is frozen. A is random (determined by the seed), B is zero.

    base, revision: the base model in the adapter's config. Raises ModelError for targets that do not exist.
    """
    from peft import LoraConfig, get_peft_model

    alpha = config.alpha or 4 * config.r
    targets = find_targets(model, config.targets)
    peft_config = LoraConfig(
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        r=config.r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=0.0 if targets.parameters else config.dropout,  # peft cannot drop the input of a parameter
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        fan_in_fan_out=targets.kinds == {Conv1D},  # if both kinds occur, peft sets it for each layer
        base_model_name_or_path=base,
        revision=revision,
    )
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with _quiet(), torch.random.fork_rng(devices=sorted(devices, key=str)):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        hint = "try other student.lora.targets"
        wrapped = _checked_call(lambda: get_peft_model(model, peft_config), f"of rank {config.r}", hint)
    # peft records the path that it loaded the model from; the directory must have the public name.
    wrapped.peft_config[_NAME].base_model_name_or_path = base
    return _checked(Adapter(wrapped), base)


def continue_adapter(
    model: PreTrainedModel,
    path: str,
    config: AdapterConfig,
    *,
    base: str,
    base_revision: str | None,
    local: bool,
    revision: str | None,
) -> Adapter:
    """Attach the adapter in ``path`` to its model, to continue training. Raises ModelError if it differs from ``config``."""
    from peft import LoraConfig, PeftConfig

    own = _checked_call(lambda: PeftConfig.from_pretrained(path, revision=revision, local_files_only=local), path)
    plain = isinstance(own, LoraConfig) and not (own.use_dora or own.modules_to_save or own.lora_bias)
    if not plain or own.rank_pattern or own.alpha_pattern or own.bias != "none":
        raise ModelError(
            "model.invalid_adapter",
            f"the adapter {path} is not a plain LoRA adapter, and its training cannot be continued",
            hint="without --lora it is merged into its model, and all weights are trained",
        )
    settings = {"r": (config.r, own.r), "alpha": (config.alpha or own.lora_alpha, own.lora_alpha)}
    if config.targets is not None and not isinstance(own.target_modules, str):
        settings["targets"] = (sorted(config.targets), sorted(own.target_modules))
    for name, (requested, stored) in settings.items():
        if requested != stored:
            raise ModelError(
                "model.invalid_adapter",
                f"student.lora.{name} is {requested}, but the adapter {path} has {stored}",
                hint="use the adapter's value; without --lora it is merged into its model, and all weights are trained",
            )
    own.lora_dropout = 0.0 if own.target_parameters else config.dropout
    own.inference_mode = False
    own.base_model_name_or_path = base
    own.revision = base_revision
    wrapped = _load_adapter(model, path, local=local, revision=revision, config=own, is_trainable=True)
    return _checked(Adapter(wrapped), path)


def merge(model: PreTrainedModel, path: str, *, local: bool, revision: str | None) -> PreTrainedModel:
    """Return the model with the adapter in ``path`` merged into its weights: a plain model.

    Raises ModelError also if the adapter unties weights that the family ties.
    """
    tied = _tied(model)
    wrapped = _load_adapter(model, path, local=local, revision=revision)
    _untie_adapted(model)
    merged = _checked_call(lambda: wrapped.merge_and_unload(safe_merge=True), path)
    merged.requires_grad_(True)  # peft froze it
    still_tied = _tied(merged)
    if still_tied != tied:
        config = merged.config
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        merged.tie_weights()  # as after loading
        # Encoder-decoders embed twice, and some scale what a tied head reads.
        if config.is_encoder_decoder or _tied(merged) != still_tied:
            raise ModelError(
                "model.invalid_adapter",
                f"the adapter {path} changes only one of two tied weights of this {config.model_type} model",
                hint="use adapters only on layers between embeddings and head",
            )
    return merged


def _tied(model: nn.Module) -> set[frozenset[str]]:
    """Return the names of weights that share one tensor."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    return {frozenset(same) for same in names.values() if len(same) > 1}


def _untie_adapted(model: nn.Module) -> None:
    """Untie the weights of adapted layers, since an update of an embedding must not change the tied head."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    users = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        base = layer.get_base_layer()
        for name, weight in base._parameters.items():
            if weight is not None and users[id(weight)] > 1:
                users[id(weight)] -= 1
                base._parameters[name] = nn.Parameter(weight.detach().clone(), requires_grad=False)


def attach_frozen(model: PreTrainedModel, path: str, *, local: bool, revision: str | None) -> PreTrainedModel:
    """Attach the adapter in ``path`` to quantized weights. It is not merged, since the weights are quantized."""
    return _load_adapter(model, path, local=local, revision=revision).get_base_model()


def _load_adapter(
    model: PreTrainedModel, path: str, *, local: bool, revision: str | None, **arguments: Any
) -> PeftModel:
    from peft import PeftModel, get_peft_model_state_dict

    arguments |= {"torch_device": str(model.device), "local_files_only": local}

    def load() -> PeftModel:
        # peft only warns of absent weights and leaves them at their initial values.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        wrapped = PeftModel.from_pretrained(model, path, revision=revision, **arguments)
        if local and (file := Path(path) / ADAPTER_WEIGHTS).is_file():
            known = get_peft_model_state_dict(wrapped, adapter_name=_NAME)
            with safe_open(file, "pt") as stored:  # peft ignores weights for layers that do not exist
                if unknown := sorted(set(stored.keys()) - known.keys()):
                    raise ValueError(f"no layer for {unknown[0]}")
        return wrapped

    return _checked_call(load, path)


_INCOMPLETE = "the adapter must be complete, and belong to the model that its adapter_config.json names"


def _checked_call(call: Callable[[], Any], name: str, hint: str = _INCOMPLETE) -> Any:
    try:
        with _quiet():
            return call()
    except Exception as error:  # a dozen types, by kind of adapter
        if out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()
        raise ModelError(
            "model.invalid_adapter",
            f"cannot attach the adapter {name} to its model: {' '.join(reason[:2])[:200]}",
            hint=hint,
        ) from error


def _checked(adapter: Adapter, where: str) -> Adapter:
    """Return the adapter. Raises ModelError if it is on the embeddings or the head, whose weight the loss uses."""
    from peft.tuners.lora import Linear
    from peft.tuners.lora.layer import ParamWrapper

    ends = (adapter.model.get_input_embeddings(), adapter.model.get_output_embeddings())
    for name, layer in adapter.layers():
        if not isinstance(layer, Linear | ParamWrapper) or layer in ends:
            raise ModelError(
                "model.invalid_adapter",
                f"LoRA adapter on {name}, but only linear layers and experts before the head can have one",
                where=where,
                hint="leave student.lora.targets unset, for every linear layer except the head",
            )
    return adapter


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
