"""Manage this process's memory: garbage collection, freed and available memory, and retries when it runs out."""

from __future__ import annotations

import ctypes
import gc
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from distillm_cli.errors import out_of_memory

_T = TypeVar("_T")
_TRIM_THRESHOLD = -1  # parameters of mallopt in glibc's malloc.h
_MMAP_MAX = -4
_NEVER = -1
_MALLOC_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")

_is_paused = False


def pause_garbage_collection() -> None:
    """Stop the search for cyclic garbage until ``resume_garbage_collection``, in a process of this program.

    Importing torch and transformers creates a million permanent objects, which the collector traverses repeatedly: a sixth
    of the start time. Objects that are not part of a cycle are still freed at once.
    """
    global _is_paused
    if gc.isenabled():
        gc.disable()
        _is_paused = True


def resume_garbage_collection() -> None:
    """Resume garbage collection, with existing objects exempt. Does nothing if it was not paused.

    Call it before weights are loaded, so that weights in a cycle are still collected.
    """
    global _is_paused
    if _is_paused:
        gc.freeze()
        gc.enable()
        _is_paused = False


def retry_halved(attempt: Callable[[], _T], halve: Callable[[], bool]) -> _T:
    """Return the result of ``attempt``, repeated after a call of ``halve`` for as long as memory runs out.

    halve: makes the batches of the next attempt smaller; returns False if it cannot, and the error is raised.
    """
    while True:
        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            release(error)
            if not halve():
                raise


def release(error: BaseException) -> None:
    """Release the tensors that the frames of an error hold."""
    import torch

    current: BaseException | None = error
    while current is not None:
        traceback.clear_frames(current.__traceback__)
        current = current.__context__
    gc.collect()
    torch.cuda.empty_cache()  # cuBLAS and cuDNN cannot use memory cached by torch; does nothing without CUDA


def keep_freed_memory() -> None:
    """Keep freed tensors' memory in this process for the next ones of their size. Does nothing without glibc.

    By default glibc maps every block of over 32 MB and unmaps it when it is freed. A step on a CPU allocates large tensors
    of the same sizes as the step before, and the system clears their pages each time: a tenth of the step's time. Memory
    that is already allocated is freed as before. Settings of malloc in the environment take precedence.
    """
    mallopt = _glibc_function("mallopt")
    if mallopt is not None and not any(name in os.environ for name in _MALLOC_SETTINGS):
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _NEVER)


def return_freed_memory() -> None:
    """Return freed memory of this process to the system."""
    malloc_trim = _glibc_function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _glibc_function(name: str) -> Callable[..., int] | None:
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # Windows cannot open the process's own symbols
        return None


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes available to this process without swapping, within the limits of its control groups.

    None if the system does not report it. root: directory of the file systems /proc and /sys.
    """
    found = [size for size in (_machine_memory(root / "proc"), *_control_group_memory(root)) if size is not None]
    return min(found, default=None)


def _machine_memory(proc: Path) -> int | None:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:  # no /proc: half of the installed memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return None


def _control_group_memory(root: Path) -> list[int]:
    """Return the available bytes of this process's control group (version 2) and its parents, with freeable page cache."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        path = next(line[3:] for line in lines if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    top = root / "sys/fs/cgroup"
    available = []
    group = top / path.lstrip("/")
    for directory in (group, *group.parents):
        if not directory.is_relative_to(top):
            break
        try:
            limit = (directory / "memory.max").read_text().strip()
            used = int((directory / "memory.current").read_text())
            stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
            if limit != "max":
                available.append(max(0, int(limit) - used + int(stat.get("inactive_file", 0))))
        except (OSError, ValueError):
            continue
    return available
