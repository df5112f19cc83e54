"""What this machine has to give."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

from distillm_cli.training.events import Listener, Warned
from distillm_cli.utils.text import counted

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt, by glibc's malloc.h
_NEVER = -1
_SAYS_HOW = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(wanted: int | None, listener: Listener) -> None:
    """Set torch's CPU threads, at most the cores that this process may use: more are slower, and thousands crash.

    wanted: of the recipe, which may come from a larger machine. None leaves torch's choice.
    """
    if wanted is None:
        return
    import torch

    if wanted > cores():
        listener(Warned(f"train.threads = {wanted} is more than {counted(cores(), 'CPU core')}: using {cores()}"))
    torch.set_num_threads(min(wanted, cores()))


def keep_freed_memory() -> None:
    """What tensors leave stays with this process, for the next ones of their size. Does nothing without glibc.

    By itself glibc maps a block of over 32 MB anew each time and gives it back when it is freed. A step on a CPU makes the
    large tensors of the step before again, and the system clears their pages again: a tenth of its time. What is allocated
    already is freed as before. Where the environment says how malloc is to do it, that stays.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None and not any(name in os.environ for name in _SAYS_HOW):
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _NEVER)


def give_back_freed_memory() -> None:
    """What is kept and not in use, to the system."""
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # no such thing as the process's own symbols: Windows
        return None


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process may still take without swapping, its control groups' limits included.

    None where the system does not say. root: of the file systems /proc and /sys.
    """
    found = [size for size in (_of_machine(root / "proc"), *_of_groups(root)) if size is not None]
    return min(found, default=None)


def _of_machine(proc: Path) -> int | None:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:  # no /proc: half of what is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return None


def _of_groups(root: Path) -> list[int]:
    """What each control group (version 2) from this process's own upwards has left; page cache that can go counts."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        own = next(line[3:] for line in lines if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    top, left = root / "sys/fs/cgroup", []
    group = top / own.lstrip("/")
    for place in (group, *group.parents):
        if not place.is_relative_to(top):
            break
        try:
            limit, used = (place / "memory.max").read_text().strip(), int((place / "memory.current").read_text())
            stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            if limit != "max":
                left.append(max(0, int(limit) - used + int(stat.get("inactive_file", 0))))
        except (OSError, ValueError):
            continue
    return left
