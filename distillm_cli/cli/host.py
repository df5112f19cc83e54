"""What this machine has to give."""

from __future__ import annotations

import os
from pathlib import Path


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
