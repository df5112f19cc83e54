"""Simulate an accelerator: tensors report the device "simulated", compute on the CPU, and raise errors where CUDA does.

For example, an operation on a CPU tensor and a device tensor fails, and so does reading a device tensor as an array.
Device errors that would otherwise appear on a GPU only are found by the tests. The speed, kernels and autocast of a GPU
are not simulated. Uses torch's hooks for backends written in Python, which are experimental: ``supported`` is whether
this torch has them. Autograd counts the devices of a process once, so tests use the device in a separate process.

With ``strict``, the device also raises errors for what Apple's MPS cannot do, or does wrong: float64, and non-blocking
copies from the CPU.

    python -m tests.simulated_device [strict]    read command lines as JSON from standard input, one per line, run them
                                                 on the device, and write the outcomes to standard output
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
import torch.utils.backend_registration as registration
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from distillm_cli.utils import exact

NAME = "simulated"
supported = hasattr(registration, "_setup_privateuseone_for_python_backend")

# Operations whose tensors may be on two devices; those whose indices may be on the CPU; those that wait for the device,
# because the program needs their result or its size.
_CROSSING = ("aten::_to_copy", "aten::copy_")
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount", "aten::_unique2")


class SimulatedTensor(torch.Tensor):
    """Represent a tensor on the device. data_cpu: its values."""

    data_cpu: torch.Tensor

    @staticmethod
    def __new__(cls, data_cpu: torch.Tensor):
        layout = {"strides": data_cpu.stride(), "storage_offset": data_cpu.storage_offset(), "dtype": data_cpu.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, data_cpu.size(), device=torch.device(NAME, 0), **layout)

    def __init__(self, data_cpu: torch.Tensor):
        self.data_cpu = data_cpu

    def __repr__(self) -> str:
        return f"SimulatedTensor({self.data_cpu})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs)  # the mode below is not active in the thread of a backward pass


class _Calls(TorchFunctionMode):
    """Do in Python what torch does in C++, where it has no kernels for this device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return func(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        if args and isinstance(args[0], SimulatedTensor):
            first, rest = args[0], args[1:]
            if func is torch.Tensor.new_tensor:
                return torch.tensor(rest[0], dtype=kwargs.get("dtype", first.dtype)).to(NAME)
            if func is torch.Tensor.tolist:
                _waits["tolist"] += 1
                return first.data_cpu.tolist()
            if func is torch.Tensor.numpy:
                raise TypeError("a device tensor is not an array; use Tensor.cpu()")
            if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
                key = tuple(map(_index, rest[0])) if isinstance(rest[0], tuple) else _index(rest[0])
                args = (first, key, *rest[1:])
        return func(*args, **kwargs)


def _index(key: Any) -> Any:
    return torch.as_tensor(key) if isinstance(key, list) or type(key).__module__ == "numpy" else key


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs)


def _run(func, args, kwargs):
    """Run one operation on the CPU, or raise an error if a real device would."""
    kwargs, name = dict(kwargs or {}), func._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    simulated = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    device = kwargs.get("device")
    on_device = bool(simulated) if device is None else torch.device(device).type == NAME
    if name == "aten::copy_":
        on_device = isinstance(args[0], SimulatedTensor)
    cpu_tensors = [tensor for tensor in tensors if not isinstance(tensor, SimulatedTensor) and tensor.dim()]
    mixing_allowed = name in _CROSSING or (name in _INDEXING and isinstance(args[0], SimulatedTensor))
    if simulated and cpu_tensors and not mixing_allowed:
        raise RuntimeError(f"tensors on two devices: {func} of {[(tuple(t.shape), t.device) for t in tensors]}")
    if simulated and (name in _WAITING or (name in _CROSSING and not on_device)):
        _waits[name] += 1
    to_device = on_device and name in _CROSSING and not simulated
    if _is_strict and to_device and (kwargs.get("non_blocking") or args[2:3] == (True,)):
        raise RuntimeError(f"the device may read this memory later: {func} on {[tuple(t.shape) for t in tensors]}")
    if device is not None and on_device:
        kwargs["device"] = torch.device("cpu")
    args, kwargs = tree_map(lambda leaf: leaf.data_cpu if isinstance(leaf, SimulatedTensor) else leaf, (args, kwargs))
    with _disable_current_modes():
        out = func(*args, **kwargs)
    if not on_device:
        return out
    originals = {id(tensor.data_cpu): tensor for tensor in simulated}  # in-place operations return their argument

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if _is_strict and leaf.dtype == torch.float64:
            raise TypeError(f"the device has no float64: {func}")
        return originals[id(leaf)] if id(leaf) in originals else SimulatedTensor(leaf)

    return tree_map(wrap, out)


_waits: Counter[str] = Counter()
_is_strict = False


@contextmanager
def using(strict: bool = False) -> Iterator[Counter[str]]:
    """Enable ``.to("simulated")`` inside the context. Yield the number of waits for the device, by operation."""
    global _is_strict
    _is_strict = strict
    if strict:
        exact.WITHOUT_FLOAT64.add(NAME)
    _register()
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied
    _waits.clear()
    try:
        with _Calls(), _Operations():
            yield _waits
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
        exact.WITHOUT_FLOAT64.discard(NAME)


def _register() -> None:
    if torch._C._get_privateuse1_backend_name() == NAME:
        return

    class Module(registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())


def _serve() -> None:
    """Answer each {"argv": …, "cwd": …} with {"code": …, "out": …, "err": …}. The command lines run on the device."""
    from transformers import PreTrainedModel

    from distillm_cli.cli.app import main
    from distillm_cli.runs import inference, prepare

    save = PreTrainedModel.save_pretrained

    def save_on_cpu(model, directory, state_dict=None, **more):
        """Save CPU copies: transformers detects tied weights by their memory address, which this device lacks."""
        copies = {}
        weights = state_dict or model.state_dict(keep_vars=True)
        state = {name: copies.setdefault(id(weight), weight.detach().cpu()) for name, weight in weights.items()}
        save(model, directory, state_dict=state, **more)

    PreTrainedModel.save_pretrained = save_on_cpu
    for module in (prepare, inference):
        module.resolve_device = lambda name: torch.device(NAME)
    for line in sys.stdin:
        request = json.loads(line)
        os.chdir(request["cwd"])
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), using(strict="strict" in sys.argv[1:]):
            code = main(request["argv"])
        print(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}), flush=True)


if __name__ == "__main__":
    _serve()
