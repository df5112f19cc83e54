"""Describe the machine: versions of Python and the libraries, processor, devices."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from distillm_cli.training.distributed import world

_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "peft", "safetensors", "typer", "rich")


def environment() -> dict[str, str]:
    """Return the versions of Python, the system and the libraries, and the devices that torch finds."""
    found = {"python": platform.python_version(), "system": platform.platform(), "machine": platform.machine()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that cannot be loaded
        return found | {"devices": f"torch cannot be imported: {error}"}
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return found | {"cuda": torch.version.cuda or "none", "devices": ", ".join(["cpu", *names])}


def machine_of_run(device: str) -> dict[str, str]:
    """Return ``environment`` with the processor, cores, threads and processes of a run on a device."""
    import torch

    found = environment()
    found["processor"] = _processor()
    found["cores"] = str(os.cpu_count() or 1)
    found["threads"] = str(torch.get_num_threads())
    found["processes"] = str(world().size)
    found["device"] = device
    return found


def machine_title(machine: Mapping[str, str]) -> str:
    """Return a name for the machine of a run: its GPUs, else its processor."""
    gpus = [name for name in str(machine.get("devices", "")).split(", ") if name not in ("", "cpu")]
    is_on_gpu = str(machine.get("device", "")).startswith(("cuda", "mps")) and gpus
    return ", ".join(gpus) if is_on_gpu else f"{machine.get('processor', 'cpu')}, {machine.get('cores', '?')} cores"


def _processor() -> str:
    """Return the name of the processor, from Linux if it is the system."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
