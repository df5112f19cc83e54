"""Measure seconds and peak memory of work on a device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(work: Callable[[], object], device: torch.device, rounds: int = 5) -> dict[str, Any]:
    """Return the best milliseconds of some rounds after a warm-up, and the peak memory that the work adds in MB.

    Memory is that of CUDA's allocator; None elsewhere.
    """
    gc.collect()
    work()
    synchronize(device)
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    added = None
    if device.type == "cuda":
        added = round((torch.cuda.max_memory_allocated(device) - before) / 1e6)
    return {"ms": round(1e3 * best, 3), "peak_mb": added}


def error_line(error: BaseException) -> str:
    """Return an error on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
