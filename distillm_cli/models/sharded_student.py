"""Distribute a student's weights, gradients and optimizer state over the processes of a run, by torch's FSDP2.

Each block of the model (transformers' ``_no_split_modules``) gathers its weights when it runs, and the loss gathers those of
embeddings and head, which stay whole from the forward to the backward pass, since the fused loss reads the head without
calling it. Gradients are sums, as in a run without shards.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from distillm_cli.errors import UsageError
from distillm_cli.models.generation.working_copy import working_copy
from distillm_cli.training.distributed import lone_error, world
from distillm_cli.utils.distributed_tensors import like
from distillm_cli.utils.host_space import HostSpace
from distillm_cli.utils.modules import replace_parameters

if TYPE_CHECKING:
    from distillm_cli.models.backbone import Backbone

_FSDP = "ACCELERATE_USE_FSDP"  # set by accelerate launch


def is_sharded(shard: str) -> bool:
    """Return whether ``train.shard`` asks for shards in this run. auto: if accelerate is configured to use FSDP."""
    if shard == "auto":
        return world().size > 1 and os.environ.get(_FSDP, "false").lower() in ("1", "true")
    return world().size > 1 and shard == "full"


def check_can_shard(student: Backbone, extras: Collection[str]) -> None:
    """Raise UsageError for a run whose student cannot be distributed. extras: names of those that the run has."""
    reason = "the student is quantized" if student.is_quantized else None
    if extras:
        reason = f"{', '.join(extras)} needs all weights of the student in every process"
    if reason is not None:
        what = f"train.shard is full, but {reason}"
        raise UsageError("usage.cannot_shard", what, hint="use --set train.shard=none")


class ShardedStudent:
    """Distribute a student over the processes, and gather it where all weights are needed.

    root: the module whose forward pass runs the student, with the methods in ``methods`` that do so too. device: of the
    parts, float32. Each process reads its own part of the student's weights, which may be mapped from files. A copy
    without weights stays in memory; it is filled while the student samples or is saved.
    """

    is_on = True

    def __init__(self, student: Backbone, root: nn.Module, device: torch.device, methods: tuple[str, ...] = ()):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        self.student = student
        self._sharded = student.model
        self._device = device
        self._adapter = student.adapter
        self._copy_adapter = None
        self._decoding_copies: dict[torch.dtype, nn.Module] = {}
        weights = dict(student.model.named_parameters())
        replace_parameters(student.model, lambda weight: _to_meta(weight).float())
        self._copy = self._without_weights()
        student.stop_cpu_forward()  # it reads weights without calling the layers
        student.reshard = self._reshard
        student.is_to_be_sharded = False
        mesh = init_device_mesh(device.type, (world().size,))
        self._units = [*_blocks(student.model), root]
        for unit in self._units:
            fully_shard(unit, mesh=mesh)
            unit.set_gradient_divide_factor(1.0)  # sums, not means
            if device.type == "cpu":
                unit.set_force_sum_reduction_for_comms(True)  # gloo cannot scale in a sum
        for name in methods:
            register_fsdp_forward_method(root, name)
        parts = {
            id(shard): like(weights[name].detach(), shard).to(shard.dtype, copy=True)
            for name, shard in student.model.named_parameters()
        }
        replace_parameters(student.model, lambda shard: parts[id(shard)])  # FSDP takes them at the first pass

    @contextmanager
    def whole(self, *, to_save: HostSpace | None = None, dtype: torch.dtype = torch.float32) -> Iterator[None]:
        """Give the student a copy of its model with all weights inside the block, which every process enters.

        Under autocast it has the dtype for decoding, unless there is an adapter. to_save: the copy is in this space in
        the first process, and has no weights in the others. dtype: of that copy, unless there is an adapter.
        """
        target = self._decoding_copy() if to_save is None else self._saved_copy(dtype)
        place = self._to_device
        if to_save is not None:
            world().broadcast(partial(to_save.reserve, target.parameters()))
            place = to_save.copy if world().is_first else _to_meta
        with self.passes():
            self._fill(target, place)
        self.student.model = target
        self.student.adapter = self._copy_adapter
        try:
            yield
        finally:
            self.student.model = self._sharded
            self.student.adapter = self._adapter
            replace_parameters(target, _to_meta)

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Make passes inside the block. An error of one process ends it: the others wait for it in a pass."""
        try:
            yield
        except Exception as error:
            raise lone_error(error) from error

    def end(self) -> None:
        """Restore the student's model from before. Only the weights below an adapter are loaded, on the CPU."""
        if self._adapter is not None:
            with self.passes():
                self._fill(self._copy, torch.Tensor.cpu)
        self.student.model = self._copy
        self.student.adapter = self._copy_adapter
        self.student.reshard = None
        self.student.is_to_be_sharded = True

    def _without_weights(self) -> nn.Module:
        """Return a copy of the model, with its adapter. Its parameters are on the meta device, as the model's are."""
        model = self._sharded
        memo: dict[int, object] = {id(model.config): model.config} | {id(buffer): buffer for buffer in model.buffers()}
        if self._adapter is not None:
            self._copy_adapter = copy.deepcopy(self._adapter, memo)
            return self._copy_adapter.model.eval()
        return copy.deepcopy(model, memo).eval()

    def _decoding_copy(self) -> nn.Module:
        """Return the copy for decoding, as ``Backbone.plain`` makes it."""
        device = self._device.type
        if self._adapter is not None or not torch.is_autocast_enabled(device) or self._copy.dtype != torch.float32:
            return self._copy
        dtype = torch.get_autocast_dtype(device)
        if dtype not in self._decoding_copies:
            self._decoding_copies[dtype] = working_copy(self._copy, dtype)
        return self._decoding_copies[dtype]

    def _saved_copy(self, dtype: torch.dtype) -> nn.Module:
        """Return the copy for a file, as ``Prepared.export_model`` makes it for another dtype than float32."""
        if self._adapter is not None or dtype == torch.float32:
            return self._copy
        return working_copy(self._copy, torch.float32).to(dtype)

    @torch.no_grad()
    def _fill(self, target: nn.Module, place: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Give a copy the current weights, each gathered, cast and placed before the next one."""
        self._reshard()
        shards = dict(self._sharded.named_parameters())
        values = {
            id(weight): place(shards[name].detach().full_tensor().to(weight.dtype))
            for name, weight in target.named_parameters()
        }
        replace_parameters(target, lambda weight: values[id(weight)])

    def _reshard(self) -> None:
        for unit in self._units:
            unit.reshard()

    def _to_device(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self._device)


def _to_meta(weight: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(weight, device="meta")


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that may be gathered one by one: none if several of them share weights."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    weights = [id(weight) for block in blocks for weight in block.parameters()]
    return blocks if len(set(weights)) == len(weights) else []
