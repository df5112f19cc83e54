"""Count this process's CPU cores, and set torch's threads."""

from __future__ import annotations

import os

from distillm_cli.training.events import Listener, Warned
from distillm_cli.utils.text import counted


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(threads: int | None, listener: Listener) -> None:
    """Set torch's CPU threads, at most as many as the cores that this process may use. More are slower, and thousands crash.

    threads: the number in the recipe, which may be meant for a larger machine. None: torch's default.
    """
    if threads is None:
        return
    import torch

    if threads > cores():
        listener(Warned(f"train.threads = {threads} is more than {counted(cores(), 'CPU core')}: using {cores()}"))
    torch.set_num_threads(min(threads, cores()))
