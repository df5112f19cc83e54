"""Place a frozen teacher that is larger than the device: in other memory, or on the device only while it computes.

    teacher.device_map   auto, sequential: accelerate spreads the layers over GPUs, host memory and disk, and moves each to a
                         device when it computes. cpu: the whole model computes on the CPU.
    teacher.offload      the weights are in host memory, and on the device during each use.

The head is on the device in all cases, because the loss applies it to cached states in every step.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distillm_cli.config.schema import TeacherConfig
from distillm_cli.models.backbone import Backbone, Head
from distillm_cli.types import Batch
from distillm_cli.utils.modules import weights_fingerprint


def dispatch_arguments(teacher: TeacherConfig, device: torch.device) -> dict[str, Any] | None:
    """Return the arguments with which transformers spreads a teacher's weights; None for other teachers.

    teacher.max_memory limits each GPU or, in a run on the CPU, the host's memory; the rest of the weights stays on disk.
    """
    if teacher.device_map not in ("auto", "sequential"):
        return None
    from accelerate.utils import get_max_memory

    limits = {"cpu": get_max_memory()["cpu"]} if device.type == "cpu" else get_max_memory()
    if teacher.max_memory is not None:
        own = round(teacher.max_memory * 1e9)
        limits = {place: own if device.type == "cpu" or place != "cpu" else free for place, free in limits.items()}
    # Only for weights without safetensors files, which transformers copies.
    folder = Path(tempfile.gettempdir()) / f"distillm-teacher-{os.getpid()}"
    return {"device_map": teacher.device_map, "max_memory": limits, "offload_folder": str(folder)}


class PlacedTeacher(Backbone):
    """Hold a frozen model whose weights are not all on the device that needs its hidden states.

    loaded: the model where it was loaded. device: that of batches and of the states. is_offloaded: the weights move there
    for each use. Otherwise they compute where they are.
    """

    def __init__(self, loaded: Backbone, device: torch.device, *, is_offloaded: bool):
        super().__init__(loaded.model, loaded.tokenizer, loaded.vocab)
        self.own_logits = loaded.own_logits
        self.is_offloaded = is_offloaded
        self._inner = [loaded]  # the same model, where it is; a list, so that it is not a submodule
        self._device = device
        self._uses = 0
        self._head = None if self.own_logits else _copied_head(loaded, device)

    @property
    def is_dispatched(self) -> bool:
        """Return whether accelerate moves the layers."""
        return _is_dispatched(self.model)

    @property
    def device(self) -> torch.device:
        """Return the device of batches, of the states and of the head."""
        return self._device

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Have an offloaded model on the device inside the block. Blocks may be nested."""
        if not self.is_offloaded:
            yield
            return
        self._uses += 1
        try:
            if self._uses == 1:
                self._loaded.to(self._device)
            yield
        finally:
            self._uses -= 1
            if not self._uses:
                self._loaded.to("cpu")

    def hidden(self, batch: Batch, *, for_backward: bool = False) -> Tensor:
        if self.is_dispatched and not (self.own_logits or self.is_encoder_decoder):
            return self.trunk_states(batch).to(self._device)  # the passes of models/cpu read the weights themselves
        with self.on_device():
            return self._loaded.hidden(self._placed(batch)).to(self._device)

    def logits(self, batch: Batch) -> Tensor:
        with self.on_device():
            return self._loaded.logits(self._placed(batch)).to(self._device)

    def full_head(self) -> Head:
        return Head(None) if self.own_logits or self._head is None else self._head

    def state_dict(self, *args: Any, **keywords: Any) -> Mapping[str, Tensor]:  # type: ignore[override]
        """Return the weights by name. Those of other memory are read one by one, with ``items``."""
        return _Weights(self.model) if self.is_dispatched else super().state_dict(*args, **keywords)

    def fingerprint(self) -> str:
        if not self.is_dispatched:
            return super().fingerprint()
        return weights_fingerprint(_tensors(self.model), torch.bfloat16)

    @property
    def _loaded(self) -> Backbone:
        """Return the model with the vocabulary and the head that it has been given since it was loaded."""
        loaded = self._inner[0]
        loaded.vocab = self.vocab
        loaded.own_logits = self.own_logits
        return loaded

    def _placed(self, batch: Batch) -> Batch:
        """Return the batch where the model's first layer computes. accelerate moves it by itself."""
        return batch if self.is_dispatched or self.is_offloaded else batch.to("cpu")


class _Weights(Mapping[str, Tensor]):
    """Read the weights of a dispatched model in the order and with the names of ``Backbone.state_dict``."""

    def __init__(self, model: PreTrainedModel):
        self._model = model

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._named())

    def __len__(self) -> int:
        return sum(1 for _ in self._named())

    def __getitem__(self, name: str) -> Tensor:
        return next(tensor for key, tensor in self._named() if key == name)

    def items(self) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]
        return self._named()

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        return ((f"model.{name}", tensor) for name, tensor in _tensors(self._model))


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a dispatched model on the CPU, in the order of its ``state_dict``."""
    from accelerate.utils import align_module_device

    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        own = {name for name, _ in module.named_parameters(recurse=False)}
        own |= {name for name, _ in module.named_buffers(recurse=False)} - module._non_persistent_buffers_set
        if own:
            with align_module_device(module, "cpu"):
                found = module.state_dict()  # its own tensors come first
                yield from ((f"{prefix}{name}", found[name]) for name in found if name in own)


def _copied_head(loaded: Backbone, device: torch.device) -> Head:
    """Return the head on a device, with every row of its matrix. The model's own may be in other memory."""
    from accelerate.utils import align_module_device

    module = loaded.model.get_output_embeddings()
    with align_module_device(module, "cpu") if _is_dispatched(loaded.model) else nullcontext():
        bias = getattr(module, "bias", None)
        weight_VD = module.weight.detach().to(device, copy=True)
        bias_V = None if bias is None else bias.detach().to(device, copy=True)
    return Head(weight_VD, bias_V, loaded.head_scale, loaded.head_softcap)


def _is_dispatched(model: PreTrainedModel) -> bool:
    return bool(getattr(model, "hf_device_map", None))
