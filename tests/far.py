"""An accelerator that is none: tensors say they are on a device "far", compute on the CPU, and refuse what CUDA refuses.

A tensor of the CPU beside one of the device in one operation, a device's tensor read as an array, and so on: what would
stop the first run on a GPU stops a test here. Speed, kernels and autocast of a GPU are not to be seen. Stands on torch's
hooks for backends written in Python, which are experimental: ``there`` tells whether this torch has them. Autograd counts
a process's devices once, so whatever uses this one has a process of its own.

With ``strict`` it refuses what Apple's MPS cannot do as well, or does wrong: float64, and copies that nobody waits for.

    python -m tests.far [strict]    a machine with that device: command lines as JSON on standard input, one a line, what
                                    came of them on standard output
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

NAME = "far"
there = hasattr(registration, "_setup_privateuseone_for_python_backend")

# Operations whose tensors may be of two devices; those whose indices may be of the CPU; those for whose outcome, or its
# size, the program waits.
_CROSSING = ("aten::_to_copy", "aten::copy_")
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount", "aten::_unique2")


class Far(torch.Tensor):
    """A tensor of the device. near: its numbers."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor):
        alike = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, near.size(), device=torch.device(NAME, 0), **alike)

    def __init__(self, near: torch.Tensor):
        self.near = near

    def __repr__(self) -> str:
        return f"Far({self.near})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs)  # where the mode below is not: in a backward pass's own thread


class _Calls(TorchFunctionMode):
    """What torch does in C++ with a device that it knows no kernels of, in Python."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return func(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        if args and isinstance(args[0], Far):
            first, rest = args[0], args[1:]
            if func is torch.Tensor.new_tensor:
                return torch.tensor(rest[0], dtype=kwargs.get("dtype", first.dtype)).to(NAME)
            if func is torch.Tensor.tolist:
                _waits["tolist"] += 1
                return first.near.tolist()
            if func is torch.Tensor.numpy:
                raise TypeError("a tensor of a device is no array; use Tensor.cpu()")
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
    """One operation: computed on the CPU where a device would compute it, refused where a device would refuse it."""
    kwargs, name = dict(kwargs or {}), func._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    far = [tensor for tensor in tensors if isinstance(tensor, Far)]
    device = kwargs.get("device")
    is_far = bool(far) if device is None else torch.device(device).type == NAME
    if name == "aten::copy_":
        is_far = isinstance(args[0], Far)
    strangers = [tensor for tensor in tensors if not isinstance(tensor, Far) and tensor.dim()]
    may_mix = name in _CROSSING or (name in _INDEXING and isinstance(args[0], Far))
    if far and strangers and not may_mix:
        raise RuntimeError(f"tensors of two devices: {func} of {[(tuple(t.shape), t.device) for t in tensors]}")
    if far and (name in _WAITING or (name in _CROSSING and not is_far)):
        _waits[name] += 1
    if _is_strict and is_far and name in _CROSSING and (kwargs.get("non_blocking") or args[2:3] == (True,)) and not far:
        raise RuntimeError(f"the device may read this memory later: {func} of {[tuple(t.shape) for t in tensors]}")
    if device is not None and is_far:
        kwargs["device"] = torch.device("cpu")
    args, kwargs = tree_map(lambda leaf: leaf.near if isinstance(leaf, Far) else leaf, (args, kwargs))
    with _disable_current_modes():
        out = func(*args, **kwargs)
    if not is_far:
        return out
    written = {id(tensor.near): tensor for tensor in far}  # in place, say, and returned

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if _is_strict and leaf.dtype == torch.float64:
            raise TypeError(f"the device has no float64: {func}")
        return written[id(leaf)] if id(leaf) in written else Far(leaf)

    return tree_map(wrapped, out)


_waits: Counter[str] = Counter()
_is_strict = False


@contextmanager
def using(strict: bool = False) -> Iterator[Counter[str]]:
    """Inside, ``.to("far")`` works. The counter: how often the program had to wait for the device, by operation."""
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
    """{"argv": …, "cwd": …} → {"code": …, "out": …, "err": …}, every command line run on the device."""
    from transformers import PreTrainedModel

    from distillm_cli.cli.app import main
    from distillm_cli.runs import inference, prepare

    save = PreTrainedModel.save_pretrained

    def saved(model, directory, **more):
        """transformers tells tied weights by the address of their memory, which a pretended device has not."""
        near = {}
        state = {name: near.setdefault(id(p), p.detach().cpu()) for name, p in model.state_dict(keep_vars=True).items()}
        save(model, directory, state_dict=state, **more)

    PreTrainedModel.save_pretrained = saved
    for module in (prepare, inference):
        module.resolve_device = lambda name: torch.device(NAME)
    for line in sys.stdin:
        asked = json.loads(line)
        os.chdir(asked["cwd"])
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), using(strict="strict" in sys.argv[1:]):
            code = main(asked["argv"])
        print(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}), flush=True)


if __name__ == "__main__":
    _serve()
