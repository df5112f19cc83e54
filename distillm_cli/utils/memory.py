"""Manage this process's memory: the garbage collector, freed memory, free memory, and retries where it runs out."""

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
_TRIM_THRESHOLD = -1  # of mallopt, by glibc's malloc.h
_MMAP_MAX = -4
_NEVER = -1
_MALLOC_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")

_is_paused = False


def pause_garbage_collection() -> None:
    """Stop the search for cyclic garbage until ``resume_garbage_collection``, in a process of our own.

    Importing torch and transformers makes a million objects that stay, and the collector walks through them again and
    again: a sixth of a start. What is not part of a cycle is freed at once as ever.
    """
    global _is_paused
    if gc.isenabled():
        gc.disable()
        _is_paused = True


def resume_garbage_collection() -> None:
    """Start the collector again, and exempt the objects that exist by now; nothing where it was not paused.

    Call it before weights are loaded: those must not stay for being part of a cycle.
    """
    global _is_paused
    if _is_paused:
        gc.freeze()
        gc.enable()
        _is_paused = False


def retry_halved(attempt: Callable[[], _T], halve: Callable[[], bool]) -> _T:
    """Return the result of ``attempt``, repeated after a call of ``halve`` for as long as memory runs out.

    halve: makes the next attempt's pieces smaller; False where they cannot be, and the error is raised.
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

    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    gc.collect()
    torch.cuda.empty_cache()  # cuBLAS and cuDNN cannot use what torch caches; does nothing without CUDA


def keep_freed_memory() -> None:
    """Keep freed tensors' memory in this process for the next ones of their size. Does nothing without glibc.

    By itself glibc maps a block of over 32 MB each time and unmaps it when it is freed. A step on a CPU makes the large
    tensors of the step before again, and the system clears their pages again: a tenth of its time. Memory that is
    allocated already is freed as before. Settings of malloc in the environment take precedence.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None and not any(name in os.environ for name in _MALLOC_SETTINGS):
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _NEVER)


def give_back_freed_memory() -> None:
    """Return memory that is kept and not in use to the system."""
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # Windows cannot open the process's own symbols
        return None


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process may still take without swapping, limits of its control groups included.

    None where the system does not tell. root: of the file systems /proc and /sys.
    """
    found = [size for size in (_of_machine(root / "proc"), *_of_groups(root)) if size is not None]
    return min(found, default=None)


def _of_machine(proc: Path) -> int | None:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:  # no /proc: half of the installed memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return None


def _of_groups(root: Path) -> list[int]:
    """Return what each control group (version 2) from this process's own upwards has left, freeable page cache included."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        own = next(line[3:] for line in lines if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    top = root / "sys/fs/cgroup"
    left = []
    group = top / own.lstrip("/")
    for place in (group, *group.parents):
        if not place.is_relative_to(top):
            break
        try:
            limit = (place / "memory.max").read_text().strip()
            used = int((place / "memory.current").read_text())
            stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            if limit != "max":
                left.append(max(0, int(limit) - used + int(stat.get("inactive_file", 0))))
        except (OSError, ValueError):
            continue
    return left
